#!/usr/bin/env bash
# erofs.sh PAYLOAD KIND: put mkfs.erofs into a payload for the nested KVM host, of that host's own Debian release and with the libraries that
# it has not: containerd's erofs snapshotter calls it, and so do the cases about layers. With the KIND hardware it is this machine's.
set -euo pipefail

payload=$1 kind=$2
root=$(cd "$(dirname "$0")/../.." && pwd)
debs=$root/target/debs
[[ $kind != hardware ]] || exit 0

packages=(erofs-utils libdeflate0 liblz4-1 liblzma5 libpcre2-8-0 libselinux1 libuuid1 libxxhash0 libzstd1 zlib1g libgcc-s1)
kept=$debs/bench/erofs
if [[ ! -x $kept/mkfs.erofs ]]; then
    "$root/guest-image/fetch-debs.sh" trixie "$debs/trixie" "${packages[@]}"
    mkdir -p "$debs/bench"
    work=$(mktemp -d "$debs/bench/unpack.XXXXXX")
    for package in "${packages[@]}"; do
        dpkg-deb -x "$(compgen -G "$debs/trixie/${package}_*.deb" | sort -V | tail -n1)" "$work"
    done
    mkdir -p "$kept"
    find "$work" -name '*.so.*' \( -type f -o -type l \) -print0 | xargs -0 cp -L -t "$kept"
    mv "$work/usr/bin/mkfs.erofs" "$kept/"
    rm -rf "$work"
fi
cp -al "$kept" "$payload/erofs"
printf '#!/bin/sh\nhere=$(cd "$(dirname "$0")/../erofs" && pwd)\nLD_LIBRARY_PATH=$here exec "$here/mkfs.erofs" "$@"\n' \
    >"$payload/bin/mkfs.erofs"
chmod 755 "$payload/bin/mkfs.erofs"
