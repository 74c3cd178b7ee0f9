#!/bin/bash
# Build what a hospital installs: sdist, wheel, an offline installer for each lane, a Debian package. Two builds of one
# commit are byte for byte the same: sources come from the commit, times are its time, tools and wheels have their hash
# in packaging/locks.
#
#   packaging/build.sh                      sdist, wheel, and all for the lane cpu (.run, .deb)
#   packaging/build.sh cpu windows gpu-cu13 more lanes: those of packaging/lock.py, or `none`
#     --out FOLDER        default: dist
#     --tree              the files as they lie here instead of the last commit's: to try a change
#     --version VERSION   instead of the sources' own: to try an upgrade
#     --bundle FOLDER     a bundle for the installers to import; may be repeated
#     --keys FILE --root-key ID   the list of keys whose signatures the bundles have, and the key that signed it
#
# Needs git, bash, GNU tar, Python 3.11, and dpkg-deb for the .deb. Wheels are fetched once, into .cache/wheels.
set -euo pipefail
umask 022
export LC_ALL=C TZ=UTC PIP_DISABLE_PIP_VERSION_CHECK=1

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
out=dist tree=no version='' keys='' root_key='' lanes=() bundles=()
while [ $# -gt 0 ]; do
    case $1 in
    --out) out=$2 && shift ;;
    --tree) tree=yes ;;
    --version) version=$2 && shift ;;
    --bundle) bundles+=("$(readlink -f "$2")") && shift ;;
    --keys) keys=$(readlink -f "$2") && shift ;;
    --root-key) root_key=$2 && shift ;;
    -h | --help) sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0" && exit ;;
    -*) echo "build.sh: unknown option $1; --help lists them" >&2 && exit 1 ;;
    *) lanes+=("$1") ;;
    esac
    shift
done
[ ${#lanes[@]} -gt 0 ] || lanes=(cpu)
mkdir -p "$out"
out=$(cd "$out" && pwd)
cache=$root/.cache
work=$(mktemp -d "$out/.build.XXXXXX")
trap 'rm -rf "$work"' EXIT

say() { echo "build: $*" >&2; }
sum_of() { sha256sum <"$1" | cut -d' ' -f1; }

SOURCE_DATE_EPOCH=$(git -C "$root" log -1 --format=%ct)
export SOURCE_DATE_EPOCH

# Write the files of a folder to stdout as an archive that depends on names and contents alone.
pack() {
    tar --sort=name --format=pax --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime \
        --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX -C "$1" -cf - "${@:2}"
}

# pip as the machine has it set up, of the environment of tools; wheels and sources are taken by their hash.
pip() { "$tools/bin/python" -m pip --quiet --quiet "$@"; }

make_tools() {
    tools=$cache/build-tools
    local stamp
    stamp=$(sha256sum <"$here/locks/tools.txt")
    [ "$(cat "$tools/stamp" 2>/dev/null)" != "$stamp" ] || return 0
    say "making the environment of tools"
    "$(command -v python3.11 || echo python3)" -m venv --clear "$tools"
    pip install --require-hashes --only-binary :all: --no-deps --requirement "$here/locks/tools.txt"
    echo "$stamp" >"$tools/stamp"
}

# A bill of materials; a licence that may not be shipped ends the build.
bill() {
    (cd "$work/source" && "$tools/bin/python" packaging/sbom.py "$@")
}

make_wheel() {
    mkdir "$work/source" "$work/sdist"
    if [ $tree = yes ]; then
        say "sdist and wheel of the files here"
        (cd "$root" && git ls-files -z --cached --others --exclude-standard |
            tar --null -T - --ignore-failed-read -cf -)
    else
        say "sdist and wheel of commit $(git -C "$root" rev-parse --short HEAD)"
        git -C "$root" archive HEAD
    fi | tar -xf - -C "$work/source"
    local file=$work/source/edgemed/__init__.py
    [ -z "$version" ] || sed -i "s/^__version__ = .*/__version__ = \"$version\"/" "$file"
    version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$file")
    build --sdist "$work/sdist" "$work/source"
    tar -xzf "$work/sdist/edgemed-$version.tar.gz" -C "$work/sdist"
    # Packed anew: setuptools writes the times of today.
    pack "$work/sdist" "edgemed-$version" | gzip -n9 >"$out/edgemed-$version.tar.gz"
    rm -rf "$work/sdist"/*
    tar -xzf "$out/edgemed-$version.tar.gz" -C "$work/sdist"
    build --wheel "$out" "$work/sdist/edgemed-$version"
    wheel=$out/edgemed-$version-py3-none-any.whl
}

build() {
    "$tools/bin/python" -m build --no-isolation "$1" --outdir "$2" "$3" >"$work/log" 2>&1 ||
        { tail -20 "$work/log" >&2 && false; }
}

# The man page and the completions are what the wheel itself says.
make_manual() {
    "$tools/bin/python" "$here/manual.py" "$wheel" "$work/share"
    mkdir -p "$work/share/edgemed"
    cp "$work/source/tests/files/sample_ct.dcm" "$work/source/LICENSE" "$work/source/NOTICE" "$work/share/edgemed/"
}

# Set payload to a folder with all that an installer of the lane holds.
make_payload() {
    local lane=$1 lock=$here/locks/$1.txt sources=$here/locks/$1.sources.txt made=$work/made-$1
    [ -f "$lock" ] || { say "there is no lane $lane" && exit 1; }
    payload=$work/$lane
    mkdir -p "$payload/wheels" "$payload/settings" "$made"
    fetch "$lane" "$lock"
    cp -l "$fetched"/*.whl "$payload/wheels/" 2>/dev/null || cp "$fetched"/*.whl "$payload/wheels/"
    cp "$wheel" "$made/"
    if [ -f "$sources" ]; then
        pip wheel --no-cache-dir --no-deps --no-build-isolation --require-hashes --wheel-dir "$made" -r "$sources"
    fi
    cp "$made"/* "$payload/wheels/"
    {
        sed -e '/^#/d' -e '/^pip==/d' "$lock" # pip runs from its wheel and is not installed
        for file in "$made"/*.whl; do
            basename "$file" | sed -E "s/^([^-]*)-([^-]*)-.*/\1==\2 --hash=sha256:$(sum_of "$file")/"
        done
    } >"$payload/requirements.txt"
    cp -R "$work/share" "$payload/share"
    write_settings
    for bundle in "${bundles[@]}"; do
        mkdir -p "$payload/bundles"
        cp -R "$bundle" "$payload/bundles/"
    done
    case $lane in
    windows) cp "$here/install.ps1" "$payload/" ;;
    *) install -m 755 "$here/install.sh" "$payload/setup" ;;
    esac
    echo "$version $lane 3.11" >"$payload/release"
    (cd "$payload" && find . -type f -printf '%P\n' | sort | xargs -d '\n' sha256sum) >"$work/sums"
    mv "$work/sums" "$payload/SHA256SUMS"
}

# Set fetched to a folder that holds the wheels of the lane's lock and nothing else; fetched once for each lock.
fetch() {
    fetched=$cache/wheels/$1-$(sha256sum <"$2" | cut -c1-12)
    [ ! -f "$fetched/whole" ] || return 0
    say "fetching the wheels of lane $1"
    "$tools/bin/python" "$here/lock.py" --download "$fetched" "$1"
    touch "$fetched/whole"
}

# An installed system takes signed bundles only, as far as the site does not say otherwise.
write_settings() {
    {
        echo '# Settings of edgemed on this machine; `edgemed config show --origin` tells what counts.'
        echo '[bundles]'
        echo 'require_signature = true'
        [ "$lane" = windows ] || echo 'shared = "/var/opt/edgemed/bundles"'
        [ -z "$keys" ] || printf 'trusted_keys = "trusted_keys.json"\nroot_keys = ["%s"]\n' "$root_key"
    } >"$payload/settings/config.toml"
    [ -z "$keys" ] || cp "$keys" "$payload/settings/trusted_keys.json"
}

# One file: the script, and after it the archive that it unpacks once it has checked the hash.
make_installer() {
    local lane=$1 archive=$work/$1.tar target=$out/edgemed-$version-$1.run
    say "$(basename "$target")"
    pack "$payload" . >"$archive"
    sed -e "s/^payload_bytes=0 .*/payload_bytes=$(stat -c %s "$archive")/" \
        -e "s/^payload_sha256=none/payload_sha256=$(sum_of "$archive")/" "$here/install.sh" >"$target"
    cat "$archive" >>"$target"
    chmod 755 "$target"
    rm "$archive"
}

# Wheels are packed already, so the package is stored as it is. dpkg-deb takes SOURCE_DATE_EPOCH for what is newer only:
# a wheel that was fetched before the commit would keep its own time.
make_package() {
    local lane=$1 tree=$work/deb name=edgemed from=$here/deb kilobytes
    [ "$lane" = cpu ] || name=edgemed-$lane
    rm -rf "$tree"
    mkdir -p "$tree"/{DEBIAN,usr/{bin,lib/{systemd/system,sysusers.d,tmpfiles.d},share/{doc/$name/examples,man/man1}}} \
        "$tree"/usr/share/{bash-completion/completions,zsh/vendor-completions,fish/vendor_completions.d} \
        "$tree"/etc/{edgemed,logrotate.d,systemd/system/edgemed.service.d}
    cp -al "$payload" "$tree/usr/lib/edgemed" 2>/dev/null || cp -a "$payload" "$tree/usr/lib/edgemed"
    ln -s /opt/edgemed/current/bin/edgemed "$tree/usr/bin/edgemed"
    cp "$payload"/settings/* "$tree/etc/edgemed/"
    cp "$from/edgemed.service" "$tree/usr/lib/systemd/system/"
    cp "$from/network.conf" "$tree/etc/systemd/system/edgemed.service.d/"
    cp "$from/sysusers.conf" "$tree/usr/lib/sysusers.d/edgemed.conf"
    cp "$from/tmpfiles.conf" "$tree/usr/lib/tmpfiles.d/edgemed.conf"
    cp "$from/logrotate" "$tree/etc/logrotate.d/edgemed"
    cp "$from/node.toml" "$from/gpu.conf" "$payload/share/edgemed/sample_ct.dcm" \
        "$tree/usr/share/doc/$name/examples/"
    cp "$payload/share/edgemed/LICENSE" "$tree/usr/share/doc/$name/copyright"
    cp "$payload/share/edgemed/NOTICE" "$tree/usr/share/doc/$name/"
    gzip -n9 <"$payload/share/man/man1/edgemed.1" >"$tree/usr/share/man/man1/edgemed.1.gz"
    cp "$payload/share/completions/edgemed.bash" "$tree/usr/share/bash-completion/completions/edgemed"
    cp "$payload/share/completions/edgemed.zsh" "$tree/usr/share/zsh/vendor-completions/_edgemed"
    cp "$payload/share/completions/edgemed.fish" "$tree/usr/share/fish/vendor_completions.d/"
    (cd "$tree" && find etc -type f -printf '/%p\n' | sort) >"$tree/DEBIAN/conffiles"
    (cd "$tree" && find usr -type f | sort | xargs -d '\n' md5sum) >"$tree/DEBIAN/md5sums"
    kilobytes=$(find "$tree" -type f -printf '%s\n' | awk '{ n += $1 } END { print int(n / 1024) }')
    sed -e "s/@version@/$version/" -e "s/@lane@/$lane/" -e "s/@kilobytes@/$kilobytes/" \
        -e "s/^Package: .*/Package: $name/" "$from/control" >"$tree/DEBIAN/control"
    [ "$lane" = cpu ] || printf 'Provides: edgemed\nConflicts: edgemed\nReplaces: edgemed\n' >>"$tree/DEBIAN/control"
    chmod -R u=rwX,go=rX "$tree"
    install -m 755 "$from/postinst" "$from/prerm" "$from/postrm" "$tree/DEBIAN/"
    find "$tree" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
    say "${name}_${version}_amd64.deb"
    dpkg-deb --root-owner-group -Znone --build "$tree" "$out/${name}_${version}_amd64.deb" >/dev/null
}

make_tools
make_wheel
bill wheel "$wheel" -o "$out/edgemed-$version.cdx.json"
mkdir "$work/share"
make_manual
for lane in "${lanes[@]}"; do
    [ "$lane" != none ] || continue
    make_payload "$lane"
    bill wheelhouse "$payload/wheels" -o "$out/edgemed-$version-$lane.cdx.json"
    bill soup "$payload/wheels" -o "$out/edgemed-$version-$lane-SOUP.md"
    if [ "$lane" = windows ]; then
        say "edgemed-$version-windows.zip"
        "$tools/bin/python" "$here/zip_folder.py" "$payload" "$out/edgemed-$version-windows.zip"
        rm -rf "$payload"
        continue
    fi
    make_installer "$lane"
    if command -v dpkg-deb >/dev/null; then make_package "$lane"; else say "no dpkg-deb here: no .deb"; fi
    rm -rf "$payload"
done
(cd "$out" && find . -maxdepth 1 -name 'edgemed*' -printf '%P\n' | sort | xargs -d '\n' sha256sum) >"$work/sums"
mv "$work/sums" "$out/SHA256SUMS"
