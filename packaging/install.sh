#!/bin/sh
# edgemed: install, upgrade, roll back, uninstall. No network is used, and no package of the system's Python is touched.
#
#   sh edgemed-VERSION-LANE.run             install beside what is there, check it, then switch to it
#   PREFIX/setup --rollback                 switch back to the version before; again: forward
#   PREFIX/setup --uninstall                remove all versions; bundles, settings, engines and results stay
#   PREFIX/setup --status                   what is installed
#     --prefix FOLDER    default: /opt/edgemed for root, ~/.local/share/edgemed-app for others
#     --python FILE      the Python to build on; default: the one of the right version on PATH
#     --reinstall        make the version anew, although it is there
#     --as USER          ask the doctor as this user (the package does so for its node)
#     --user             as for an ordinary user, although this is root
#     --no-link          put no link to the command into /usr/local/bin (root) or ~/.local/bin
#
# A version is a virtual environment PREFIX/VERSION-LANE, whole if it holds the file `release`. PREFIX/current and
# PREFIX/previous are links, each replaced by one rename. Exit codes are those of edgemed: 1 wrong usage, 22 a damaged
# installer, 40 cannot write, else the code of `edgemed doctor`.
set -eu
umask 022

payload_bytes=0     # of the archive that follows this script; 0: the payload lies in the folder of this script
payload_sha256=none

say() { printf 'edgemed setup: %s\n' "$*" >&2; }
die() {
    code=$1
    shift
    say "$*"
    exit "$code"
}

main() {
    action=install prefix='' python='' reinstall=no link=yes as='' own=no
    while [ $# -gt 0 ]; do
        case $1 in
        --prefix | --python | --as)
            [ $# -gt 1 ] || die 1 "$1 needs a value"
            case $1 in
            --prefix) prefix=$2 ;;
            --python) python=$2 ;;
            --as) as="setpriv --reuid=$2 --regid=$2 --clear-groups" ;;
            esac
            shift
            ;;
        --rollback | --uninstall | --status | --install) action=${1#--} ;;
        --reinstall) reinstall=yes ;;
        --no-link) link=no ;;
        --user) own=yes ;;
        -h | --help)
            sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        *) die 1 "unknown option $1; --help lists them" ;;
        esac
        shift
    done
    choose_places
    case $action in
    status) show_status ;;
    *)
        mkdir -p "$prefix" 2>/dev/null || die 40 "$prefix cannot be made; choose another --prefix"
        [ -w "$prefix" ] || die 40 "$prefix cannot be written; choose another --prefix"
        exec 9>"$prefix/.lock"
        flock -n 9 || die 40 "another setup is at work in $prefix; wait for it to end"
        rm -rf "$prefix"/.unpack.* # of one that was killed
        "$action"
        ;;
    esac
}

# Set prefix, bin, and home: where an ordinary user's bundles go and the doctor looks. One for the whole machine puts
# them where bundles.shared of the settings says, for all users to read.
choose_places() {
    machine=no
    if [ "$(id -u)" = 0 ] && [ $own = no ]; then
        machine=yes
        : "${prefix:=/opt/edgemed}"
        bin=/usr/local/bin
        settings=/etc/edgemed
        export EDGEMED_HOME="${EDGEMED_HOME:-/var/lib/edgemed}"
        home=$EDGEMED_HOME
    else
        : "${prefix:=${XDG_DATA_HOME:-$HOME/.local/share}/edgemed-app}"
        bin=$HOME/.local/bin
        settings=${EDGEMED_HOME:-${XDG_CONFIG_HOME:-$HOME/.config}/edgemed}
        home=${EDGEMED_HOME:-${XDG_DATA_HOME:-$HOME/.local/share}/edgemed}
    fi
    case $prefix in /*) ;; *) prefix=$PWD/$prefix ;; esac
    [ "$prefix" != / ] || die 1 "--prefix / was given; a folder of edgemed's own was expected"
}

install() {
    unpack
    read -r version lane wanted <"$payload/release"
    target=$prefix/$version-$lane
    if [ -f "$target/release" ] && [ $reinstall = no ]; then
        say "$version-$lane is already here; nothing to install (--reinstall makes it anew)"
    else
        find_python
        [ "$(uname -m)" = x86_64 ] || die 1 "this is $(uname -m); these packages are for x86_64"
        need_room
        say "installing $version-$lane into $target"
        rm -f "$target/release"
        rm -rf "$target"
        make_environment || {
            rm -rf "$target"
            die 40 "the packages could not be installed; the reason is above"
        }
    fi
    write_settings
    import_bundles
    ask_doctor "$version-$lane"
    cp "$payload/setup" "$prefix/.setup.new"
    mv -f "$prefix/.setup.new" "$prefix/setup"
    switch_to "$version-$lane"
    make_link
    remove_old
    say "edgemed $version ($lane) is ready: $prefix/current/bin/edgemed"
    say "try: edgemed infer $prefix/current/share/edgemed/sample_ct.dcm --prompt 'Where are the liver and the spleen?'"
}

# Set payload to a folder whose every file has the hash that it was built with.
unpack() {
    payload=$(dirname "$(readlink -f "$0")")
    if [ "$payload_bytes" != 0 ]; then
        [ "$(tail -c "$payload_bytes" "$0" | sha256sum)" = "$payload_sha256  -" ] ||
            die 22 "this file is damaged: it has not the hash that it was built with; copy it again"
        payload=$(mktemp -d "$prefix/.unpack.XXXXXX")
        trap 'rm -rf "$payload"' EXIT
        trap 'exit 130' INT TERM HUP
        tail -c "$payload_bytes" "$0" | tar -xf - -C "$payload" --no-same-owner || die 40 "$prefix has no room"
    fi
    [ -f "$payload/SHA256SUMS" ] || die 1 "there is nothing to install beside this script; run the installer itself"
    (cd "$payload" && sha256sum --quiet --check --strict SHA256SUMS >&2) ||
        die 22 "a file of the installer is damaged; copy it again"
}

find_python() {
    ok='import sys, venv; sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1] or sys.maxsize < 2**32)'
    for candidate in ${python:+"$python"} "python$wanted" python3; do
        if command -v "$candidate" >/dev/null && "$candidate" -I -c "$ok" "$wanted" 2>/dev/null; then
            python=$(command -v "$candidate")
            return
        fi
        [ -z "$python" ] || break
    done
    die 1 "no 64-bit Python $wanted with the module venv was found; install it, or name one with --python"
}

# Wheels unpack to about three times their size.
need_room() {
    needed=$(($(du -sk "$payload/wheels" | cut -f1) * 4))
    free=$(df -Pk "$prefix" | awk 'NR == 2 { print $4 }')
    [ "$free" -gt "$needed" ] || die 40 "$prefix has $((free / 1024)) MiB free; $((needed / 1024)) MiB are needed"
}

# pip runs from its own wheel, told to look at nothing but the wheels here, and is not installed.
make_environment() {
    "$python" -I -m venv --without-pip "$target" || return
    for pip in "$payload"/wheels/pip-*.whl; do :; done
    "$target/bin/python" -I "$pip/pip" --isolated --disable-pip-version-check --no-cache-dir install --quiet \
        --no-index --find-links "$payload/wheels" --only-binary :all: --require-hashes --no-deps \
        --root-user-action=ignore --requirement "$payload/requirements.txt" || return
    cp -R "$payload/share" "$target/" || return
    cp "$payload/release" "$target/release.part" || return
    sync "$target/release.part" && mv "$target/release.part" "$target/release"
}

# Settings that are there stay as they are.
write_settings() {
    mkdir -p "$settings"
    for file in "$payload"/settings/*; do
        [ -e "$settings/${file##*/}" ] || cp "$file" "$settings/"
    done
}

# The settings may be older than bundles.shared, and then only the node (or root) sees the bundles.
import_bundles() {
    [ -d "$payload/bundles" ] || return 0
    who=$as shared=''
    if [ $machine = yes ] && "$target/bin/edgemed" config show | grep -q '^shared = '; then
        who='' shared=--shared
    else
        mkdir -p "$home"
        [ $machine = no ] || say "bundles.shared is not set in $settings/config.toml: other users will not see the bundles"
    fi
    for bundle in "$payload"/bundles/*; do
        name=${bundle##*/}
        if ! $who "$target/bin/edgemed" models import "$bundle" --replace $shared >&2; then
            $as "$target/bin/edgemed" models show "$name" >/dev/null 2>&1 || die 80 "bundle $name could not be imported"
            say "the bundle $name that is already here stays"
        fi
    done
}

ask_doctor() {
    $as "$prefix/$1/bin/edgemed" doctor --device cpu >&2 || die $? "the doctor found $1 not ready; nothing was switched"
}

switch_to() {
    was=$(readlink "$prefix/current" || true)
    if [ -n "$was" ] && [ "$was" != "$1" ] && [ -f "$prefix/$was/release" ]; then
        point previous "$was"
    fi
    point current "$1"
}

point() {
    ln -sfn "$2" "$prefix/.$1.new"
    mv -fT "$prefix/.$1.new" "$prefix/$1"
}

make_link() {
    [ $link = yes ] || return 0
    there=$(readlink "$bin/edgemed" || true)
    if [ -e "$bin/edgemed" ] && [ "$there" != "$prefix/current/bin/edgemed" ]; then
        say "$bin/edgemed is something else; it stays"
        return 0
    fi
    mkdir -p "$bin"
    ln -sfn "$prefix/current/bin/edgemed" "$bin/edgemed"
}

# Only the version in use and the one before are kept.
remove_old() {
    for folder in "$prefix"/*/; do
        name=$(basename "$folder")
        [ "$name" != "$(readlink "$prefix/current")" ] || continue
        [ "$name" != "$(readlink "$prefix/previous")" ] || continue
        if [ -f "$folder/pyvenv.cfg" ] && [ ! -L "${folder%/}" ]; then
            say "removing $name"
            rm -rf "${prefix:?}/$name"
        fi
    done
}

rollback() {
    back=$(readlink "$prefix/previous" || true)
    [ -n "$back" ] && [ -f "$prefix/$back/release" ] || die 1 "there is no version before; nothing was changed"
    ask_doctor "$back"
    switch_to "$back"
    say "edgemed is $back again; --rollback goes forward to $(readlink "$prefix/previous")"
}

uninstall() {
    for folder in "$prefix"/*/; do
        if [ -f "$folder/pyvenv.cfg" ] && [ ! -L "${folder%/}" ]; then rm -rf "$folder"; fi
    done
    rm -f "$prefix/current" "$prefix/previous" "$prefix/setup" "$prefix/.lock" "$prefix"/.*.new
    if [ "$(readlink "$bin/edgemed" || true)" = "$prefix/current/bin/edgemed" ]; then rm -f "$bin/edgemed"; fi
    rmdir "$prefix" 2>/dev/null || say "$prefix holds other files; they stay"
    shared=$(sed -n 's/^shared = "\(.*\)"$/\1/p' "$settings/config.toml" 2>/dev/null || true)
    [ $machine = no ] || home="$home${shared:+ and $shared}"
    say "edgemed is removed; bundles in $home, settings in $settings, engines and results stay"
}

show_status() {
    for folder in "$prefix"/*/; do
        name=$(basename "$folder")
        [ -f "$folder/release" ] && [ ! -L "${folder%/}" ] || continue
        state=''
        [ "$name" != "$(readlink "$prefix/current")" ] || state=current
        [ "$name" != "$(readlink "$prefix/previous")" ] || state=previous
        echo "$name $state"
    done
}

main "$@"
exit $?
