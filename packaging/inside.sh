#!/bin/bash
# What prove_install.sh runs inside the fresh root: `installer` or `package`. Not for a machine in use.
set -euo pipefail
old=0.0.9
for new in /proof/edgemed-*-cpu.run; do case $new in *-$old-*) ;; *) break ;; esac; done
new=${new#/proof/edgemed-} new=${new%-cpu.run}

ok() { echo "ok    $*"; }
fail() { echo "FAIL  $*" && exit 1; }
expect() { # CODE COMMAND...
    local wanted=$1 found=0
    shift
    "$@" || found=$?
    [ "$found" = "$wanted" ] || fail "$* ended with $found, not $wanted"
}
is() { [ "$1" = "$2" ] || fail "$3 is '$1', not '$2'"; }
took() { # NAME COMMAND...: how long the command took, as a row of the table
    local name=$1 start end
    shift
    start=$(date +%s%N)
    "$@" >&2
    end=$(date +%s%N)
    echo "time  $name $(((end - start) / 1000000)) ms"
}
files() { # every file with type, link, mode, owner, size; of a folder the size says nothing
    find / -xdev \( -path /proc -o -path /proof -o -path /tmp -o -path /dev -o -path /sys -o -path /run \) -prune \
        -o -type d -printf '%p d %m %u\n' -o -printf '%p %y %l %m %u %s\n' | sort
}

[ "$(ls /sys/class/net)" = lo ] || fail "there is a network: $(ls /sys/class/net)"
python3 -c 'import socket; socket.create_connection(("192.0.2.1", 80), 2)' 2>/dev/null && fail "an address answers"
ok "no network; Debian $(cat /etc/debian_version), $(python3 --version), no pip, no package of edgemed"
python3 -c 'import pip' 2>/dev/null && fail "the system's Python has pip"

ask() { # AS_USER EDGEMED VERSION: the sample scan answers, and the answer says by which version
    local answer
    answer=$($1 "$2" infer "$sample" --prompt "Where are the liver and the spleen?" --json -q)
    python3 - "$answer" "$3" <<'P' || fail "the answer is not what was expected"
import json, sys
answer = json.loads(sys.argv[1])
assert {r["label"] for r in answer["regions"]} == {"liver", "spleen"}, answer["text"]
assert all(r["mask"]["area_mm2"] > 5000 for r in answer["regions"])
assert answer["provenance"]["edgemed"] == sys.argv[2], answer["provenance"]["edgemed"]
P
}

site=/var/opt/edgemed/bundles
shared() { # AS_USER EDGEMED: the machine's bundle is listed and answers, and this user cannot change it
    $1 "$2" models list | grep '^site-ct .* shared' >&2 || fail "the machine's bundle is not listed for: $1"
    $1 "$2" infer "$sample" --prompt "Where is the liver?" --bundle site-ct -q >&2
    expect 40 $1 "$2" models rm --shared site-ct
    expect 40 $1 "$2" models import $site/site-ct --shared --replace
}
modes() { # the machine's bundle is root's to change and everyone's to read
    is "$(stat -c '%U %a' $site $site/site-ct $site/site-ct/bundle.json | tr '\n' ';')" \
        "root 755;root 755;root 644;" "the owner of the machine's bundles"
    is "$(find ${site%/*} -perm /022 -o ! -user root | wc -l)" 0 "the count of what others may change"
}

installer() {
    useradd --create-home physicist # a user of the fresh root, whose paths follow
    local prefix=/home/physicist/.local/share/edgemed-app as="runuser -u physicist --" command
    as="$as env HOME=/home/physicist PATH=/usr/bin:/bin"
    command=$prefix/current/bin/edgemed sample=$prefix/current/share/edgemed/sample_ct.dcm
    files >/tmp/before

    took "install $old" $as sh /proof/edgemed-$old-cpu.run
    expect 0 $as $command doctor --device cpu >&2
    took "first answer" ask "$as" $command $old
    ok "$old installs for an ordinary user; the doctor is content; the sample scan answers"
    is "$($as $command models list | grep -c ^site-ct)" 1 "the count of the signed bundle"
    $as $command infer $sample --prompt "Where is the liver?" --bundle site-ct -q >&2
    ok "the signed bundle was imported and answers"
    is "$($as $command config show | grep -c 'require_signature = true')" 1 "the setting for signatures"
    cp -R $prefix/current/lib/python3*/site-packages/edgemed/bundles/nano /tmp/unsigned
    sed -i 's/"name":"nano"/"name":"unsigned"/' /tmp/unsigned/bundle.json
    expect 81 $as $command models import /tmp/unsigned
    ok "a bundle without a signature is refused (81)"

    $as mkdir -p /home/physicist/.cache/edgemed/engines /home/physicist/results
    echo kept | $as tee /home/physicist/.cache/edgemed/engines/mine /home/physicist/results/mine >/dev/null
    echo '# mine' | $as tee -a /home/physicist/.config/edgemed/config.toml >/dev/null
    local mine="/home/physicist/.config/edgemed/config.toml /home/physicist/.cache/edgemed/engines/mine"
    cat $mine >/tmp/mine

    cp /proof/edgemed-$new-cpu.run /tmp/damaged.run
    printf '\377' | dd of=/tmp/damaged.run bs=1 seek=90000000 conv=notrunc status=none
    expect 22 $as sh /tmp/damaged.run
    head -c 150000000 /proof/edgemed-$new-cpu.run >/tmp/damaged.run
    expect 22 $as sh /tmp/damaged.run
    rm /tmp/damaged.run
    is "$($as $command --version)" "edgemed $old" "the version after damaged installers"
    ok "a changed byte and a short copy are refused (22); nothing was changed"

    for after in 1 4 9; do
        setsid $as sh /proof/edgemed-$new-cpu.run 2>/dev/null &
        sleep $after
        kill -9 -- -$! 2>/dev/null || true
        wait $! 2>/dev/null || true
        is "$($as $command --version)" "edgemed $old" "the version after a kill at $after s"
    done
    ok "killed after 1, 4 and 9 s: the version in use still runs"

    took "upgrade to $new" $as sh /proof/edgemed-$new-cpu.run
    ask "$as" $command "$new"
    is "$($as $prefix/setup --status | tr '\n' ';')" "$old-cpu previous;$new-cpu current;" "the status"
    is "$(find $prefix -maxdepth 1 -name '.unpack*' | wc -l)" 0 "what killed installers left"
    ok "upgrade to $new"
    took "rollback" $as $prefix/setup --rollback
    ask "$as" $command $old
    took "forward" $as $prefix/setup --rollback
    ask "$as" $command "$new"
    expect 0 $as sh /proof/edgemed-$new-cpu.run
    is "$($as $prefix/setup --status | tr '\n' ';')" "$old-cpu previous;$new-cpu current;" "the status"
    is "$(cat $mine)" "$(cat /tmp/mine)" "what is in the user's settings and engines"
    ok "rollback and forward; settings and engines are as they were"
    echo "size  installed $(du -sm $prefix/$new-cpu | cut -f1) MiB a version"

    took "uninstall" $as $prefix/setup --uninstall
    files >/tmp/after
    left '/home/physicist(/\.local(/share(/edgemed(/.*)?)?|/bin)?|/\.(config|cache)(/edgemed(/.*)?)?|/results(/.*)?)?'
    is "$($as cat /home/physicist/results/mine)" kept "a result"
    ok "uninstall leaves bundles, settings, engines and results, and nothing else"
    machine "$as"
}

# The installer once more, by root: for every user, also one who has a bundle of the same name.
machine() {
    useradd --create-home nurse
    local prefix=/opt/edgemed nurse="runuser -u nurse -- env HOME=/home/nurse PATH=/usr/bin:/bin"
    command=/usr/local/bin/edgemed sample=$prefix/current/share/edgemed/sample_ct.dcm
    files >/tmp/before
    took "install $new by root" sh "/proof/edgemed-$new-cpu.run"
    modes
    shared "$nurse" $command
    shared "$1" $command
    is "$($1 $command models list | grep -c 'site-ct .* shared, goes before /home/physicist/')" 1 "the bundle of one's own"
    expect 0 $nurse $command doctor --device cpu --bundle site-ct >&2
    chmod o+w $site
    expect 20 $nurse $command infer $sample --prompt "Where is the liver?" --bundle site-ct -q
    chmod o-w $site
    ok "installed by root: two users list and ask the machine's bundle, and cannot change it; open to others it is refused"
    took "uninstall by root" $prefix/setup --uninstall
    files >/tmp/after
    left '/home/(nurse|physicist)(/.*)?|/opt|/usr/local/bin|/etc(/edgemed(/.*)?)?|/var/opt(/edgemed(/.*)?)?'
    modes
}

# Fail if a file was added, changed or removed since `before`, unless its path fits.
left() {
    diff /tmp/before /tmp/after | grep '^[<>]' | cut -d' ' -f2 | sort -u | grep -Evx "$1" >/tmp/left || true
    [ ! -s /tmp/left ] || fail "left or changed: $(head -20 /tmp/left)"
}

package() {
    useradd --create-home physicist
    local as="runuser -u physicist -- env HOME=/home/physicist PATH=/usr/bin:/bin" setup=/opt/edgemed/setup
    sample=/usr/share/doc/edgemed/examples/sample_ct.dcm
    files >/tmp/before

    took "dpkg -i $old" dpkg -i /proof/edgemed_${old}_amd64.deb
    $as edgemed doctor --device cpu >&2
    ask "$as" edgemed $old
    ok "dpkg -i $old: the doctor is content, the sample scan answers for an ordinary user"
    is "$(stat -c '%U %a' /var/lib/edgemed)" "edgemed 700" "the owner of the node's folder"
    is "$(find /var/lib/edgemed -name bundle.json | wc -l)" 0 "the count of the node's own bundles"
    modes
    shared "$as" edgemed
    local unit=/usr/lib/systemd/system/edgemed.service
    local node
    node="runuser -u $(sed -n 's/^User=//p' $unit) -- env $(sed -n 's/^Environment=//p' $unit)"
    shared "$node" edgemed
    grep -E '^(InaccessiblePaths|TemporaryFileSystem|RootDirectory|RootImage)=' $unit && fail "the unit hides folders"
    ok "an ordinary user and the unit's list and ask the machine's bundle, and cannot change it"
    systemd-analyze verify --man=no /usr/lib/systemd/system/edgemed.service >&2
    systemd-analyze security --offline=true --root=/ edgemed.service 2>/dev/null |
        grep -o 'exposure.*[0-9.]* [A-Z]*' | sed 's/^/ok    with its drop-in: /'
    logrotate --debug /etc/logrotate.d/edgemed 2>/dev/null
    bash -n /usr/share/bash-completion/completions/edgemed
    local words='_EDGEMED_COMPLETE=bash_complete COMP_CWORD=1'
    is "$($as env $words COMP_WORDS='edgemed doc' edgemed)" plain,doctor "the completion of doc"
    ok "unit, log rotation and completion hold"

    mkdir -p /var/lib/edgemed/results
    echo kept >/var/lib/edgemed/results/mine
    echo '# mine' >>/etc/edgemed/config.toml
    took "dpkg -i $new" dpkg --force-confold -i "/proof/edgemed_${new}_amd64.deb"
    ask "$as" edgemed "$new"
    took "rollback" $setup --rollback --as edgemed --no-link
    ask "$as" edgemed $old
    $setup --rollback --as edgemed --no-link
    ask "$as" edgemed "$new"
    ok "upgrade to $new, rollback, forward"
    dpkg --force-downgrade -i /proof/edgemed_${old}_amd64.deb >&2
    ask "$as" edgemed $old
    is "$(tail -1 /etc/edgemed/config.toml)" "# mine" "the last line of the settings"
    ok "dpkg -i $old goes back, too; the settings are as they were"

    took "dpkg -r" dpkg -r edgemed
    [ ! -e /opt/edgemed ] && [ ! -e /usr/lib/edgemed ] || fail "dpkg -r left /opt/edgemed or /usr/lib/edgemed"
    is "$(tail -1 /etc/edgemed/config.toml)" "# mine" "the last line of the settings after dpkg -r"
    dpkg -P edgemed >&2
    files >/tmp/after
    # The node's own, what dpkg keeps about every package, and the accounts.
    local accounts='/etc(/(passwd|group|g?shadow)-?|/\.pwd\.lock)?'
    left "/var/(lib|log)(/edgemed(/.*)?|/dpkg(/.*|\.log)?)?|$accounts|/opt|/var/opt(/edgemed(/.*)?)?"
    modes
    is "$(cat /var/lib/edgemed/results/mine)" kept "a result"
    ok "dpkg -P leaves what the node made, its user, and nothing else"
}

"$1"
