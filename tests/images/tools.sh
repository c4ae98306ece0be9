#!/usr/bin/env bash
# tools.sh: make target/images/tools/rootfs, the test image's busybox with tools of Debian 13 that ask much of a kernel: iptables of both
# kinds, nft, wg, conntrack, ipset, ip, chrt, ipcmk, buildah.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=$root/target/images/tools
packages=(busybox-static libc6 iptables libxtables12 libip4tc2 libip6tc2 libnftnl11 libmnl0 libnfnetlink0 libnetfilter-conntrack3 nftables libnftables1
    libjansson4 libgmp10 libedit2 libbsd0 libmd0 libtinfo6 wireguard-tools conntrack util-linux libcap-ng0 libsmartcols1 iproute2
    ipset libipset13t64 libbpf1 libelf1t64 libcap2 libselinux1 libpcre2-8-0 zlib1g libzstd1
    buildah uidmap libgpgme11t64 libassuan9 libgpg-error0 libseccomp2 libsqlite3-0 libsubid5 libacl1 libattr1 libaudit1 libcrypt1 libpam0g
    libsemanage2 libsepol2 libbz2-1.0)
programs=(usr/sbin/{xtables-nft-multi,xtables-legacy-multi,nft,conntrack,ipset} usr/bin/{ip,wg,chrt,ipcmk,buildah,newuidmap,newgidmap})
digest=$(sha256sum "$here/build.sh" "$here/tools.sh" | sha256sum | cut -d' ' -f1)
[[ $(cat "$out/stamp" 2>/dev/null) != "$digest" ]] || exit 0

"$here/build.sh"
"$root/guest-image/fetch-debs.sh" trixie "$root/target/debs/trixie" "${packages[@]}"
rm -rf "$out" && mkdir -p "$out"
work=$(mktemp -d "$out/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
for package in "${packages[@]}"; do
    dpkg-deb -x "$(compgen -G "$root/target/debs/trixie/${package}_*.deb" | sort -V | tail -n1)" "$work"
done
cp -a "$root/target/images/busybox/rootfs" "$out/rootfs"
# Static as it is, it loads glibc's libraries to look up names: those of its own release.
cat "$(find "$work" -path '*/bin/busybox' -print -quit)" >"$out/rootfs/bin/busybox"
libraries=lib/x86_64-linux-gnu
mkdir -p "$out/rootfs"/{lib64,"usr/$libraries",sbin}
ln -s "usr/lib" "$out/rootfs/lib"
# copy_libraries FILE: what it needs, and what that needs.
copy_libraries() {
    local name file
    for name in $(readelf -dW "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
        [[ ! -e $out/rootfs/usr/$libraries/$name ]] || continue
        file=$(find "$work" -name "$name" -print -quit)
        [[ -n $file ]] || { echo "images: no fetched package has $name, which $(basename "$1") needs" >&2; exit 1; }
        cp -L "$file" "$out/rootfs/usr/$libraries/"
        copy_libraries "$file"
    done
}
for program in "${programs[@]}"; do
    cp --remove-destination "$work/$program" "$out/rootfs/bin/"
    copy_libraries "$work/$program"
done
chmod 4755 "$out/rootfs/bin"/new{u,g}idmap
cp -a "$work/usr/$libraries/xtables" "$out/rootfs/usr/$libraries/"
find "$out/rootfs/usr/$libraries/xtables" -type f -name '*.so' | while read -r file; do copy_libraries "$file"; done
cp -L "$(find "$work" -name ld-linux-x86-64.so.2 -print -quit)" "$out/rootfs/lib64/"
for kind in nft legacy; do
    for name in ip{,6}tables{,-save,-restore}; do ln -s "xtables-$kind-multi" "$out/rootfs/bin/${name/tables/tables-$kind}"; done
done
echo "$digest" >"$out/stamp"
