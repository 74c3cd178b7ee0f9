#!/bin/bash
# Prove the installer and the package: in a fresh Debian 12 root without a network, with nothing copied in but what
# build.sh wrote. Prints what was checked and a table of sizes and times; exit code 0 only if everything held.
#
#   packaging/prove_install.sh [--out FOLDER] [--base FOLDER] [--quick] [--tree]
#     --out FOLDER     where it builds and keeps its logs; default: dist/proof
#     --base FOLDER    a Debian 12 root with python3 and systemd; default: .cache/debian12, made by debootstrap
#     --quick          not the second build, nor one where there is one in --out already
#     --tree           of the files as they lie here instead of the last commit's
#
# Needs root (it mounts, and enters namespaces of its own), debootstrap or apt-get, and PYTHON: one with edgemed, which
# makes keys and signs a bundle; default: .venv/bin/python.
set -euo pipefail
export LC_ALL=C

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
out=$root/dist/proof base=$root/.cache/debian12 quick=no tree=''
while [ $# -gt 0 ]; do
    case $1 in
    --out) out=$2 && shift ;;
    --base) base=$2 && shift ;;
    --quick) quick=yes ;;
    --tree) tree=--tree ;;
    *) sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0" && exit 1 ;;
    esac
    shift
done
PYTHON=${PYTHON:-$root/.venv/bin/python}
mkdir -p "$out"
out=$(cd "$out" && pwd)

say() { echo "prove: $*" >&2; }

# A root as debootstrap makes it; the address of the archive is the one that this machine's apt uses.
make_base() {
    [ ! -x "$base/usr/bin/python3" ] || return 0
    local tool archive
    tool=$(mktemp -d)
    (cd "$tool" && apt-get -qq download debootstrap && dpkg-deb -x debootstrap_*.deb .)
    archive=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' 'Identifier: Packages' | head -1)
    DEBOOTSTRAP_DIR=$tool/usr/share/debootstrap sh "$tool/usr/sbin/debootstrap" --variant=minbase \
        --include=python3,systemd,systemd-sysv,logrotate bookworm "$base" "$archive" >"$out/debootstrap.log"
    rm -rf "$tool"
}

# A signed bundle (the embedded one under another name) and the list of keys that its signature needs.
make_bundle() {
    rm -rf "$out/site"
    mkdir -p "$out/site/bundle"
    (
        cd "$out/site"
        edgemed() { PYTHONPATH=$root EDGEMED_HOME=$out/site/home "$PYTHON" -m edgemed "$@"; }
        cp -R "$root/edgemed/bundles/nano" bundle/site-ct
        sed -i 's/"name":"nano"/"name":"site-ct"/' bundle/site-ct/bundle.json
        edgemed bundle keygen root >root.id
        edgemed bundle keygen vendor >/dev/null
        edgemed bundle keys edit keys.json --key root.key.pem --trust vendor=vendor.pub.pem
        edgemed bundle sign bundle/site-ct --key vendor.key.pem --role vendor
    ) >"$out/site.log"
}

build() {
    "$here/build.sh" $tree "$@" --bundle "$out/site/bundle/site-ct" --keys "$out/site/keys.json" \
        --root-key "$(cat "$out/site/root.id")" cpu
}

# Run inside.sh WHAT in a copy of the base that lives as long as the command: own mounts, own network of nothing.
inside() {
    local fresh=$out/fresh
    rm -rf "$fresh"
    mkdir -p "$fresh"/{up,work,root}
    say "$1, in a fresh root"
    unshare --mount --net --pid --fork --kill-child bash -euo pipefail -c '
        mount -t overlay overlay -o "lowerdir=$2,upperdir=$3/up,workdir=$3/work" "$3/root"
        mount -t proc proc "$3/root/proc"
        mount -t sysfs -o ro sysfs "$3/root/sys"
        mount --rbind /dev "$3/root/dev"
        mount -t tmpfs tmpfs "$3/root/tmp"
        mkdir "$3/root/proof"
        cp "$4"/new/*.run "$4"/new/*.deb "$4"/old/*.run "$4"/old/*.deb "$5/inside.sh" "$3/root/proof/"
        exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
            chroot "$3/root" bash -euo pipefail /proof/inside.sh "$1"
    ' bash "$1" "$base" "$fresh" "$out" "$here" 2>"$out/$1.log" || { tail -25 "$out/$1.log" >&2 && return 1; }
    rm -rf "$fresh"
}

make_base
[ $quick = yes ] && [ -d "$out/new" ] || make_bundle
[ $quick = yes ] || rm -rf "$out/new" "$out/old"
[ -d "$out/new" ] || build --out "$out/new"
[ -d "$out/old" ] || build --out "$out/old" --version 0.0.9
if [ $quick = no ]; then
    rm -rf "$out/again"
    build --out "$out/again"
    cmp "$out/new/SHA256SUMS" "$out/again/SHA256SUMS"
    echo "ok    two builds are the same, byte for byte"
    rm -rf "$out/again"
fi
systemd-analyze security --offline=true "$here/deb/edgemed.service" 2>/dev/null |
    grep -o 'exposure.*[0-9.]* [A-Z]*' | sed 's/^/ok    unit without its drop-in: /'
inside installer
inside package
(cd "$out/new" && stat -c 'size  %n %s bytes' edgemed*)
