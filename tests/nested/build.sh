#!/usr/bin/env bash
# build.sh: make the nested KVM host under target/nested/ (or another directory, see machine.sh), once.
#
# A Debian kernel and a small root disk (containerd, ctr and CNI plugins of Debian sid, runc, crun and iptables of 13, busybox)
# for an emulator whose CPU has virtualisation extensions (machine.sh). Rebuilt only when something that goes in has changed.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
. "$here/machine.sh"
cache=$root/target/$nested_directory
debs=$root/target/debs

modules=(irqbypass kvm "${host_modules[@]}" tun fuse overlay erofs loop veth bridge
    sch_ingress cls_bpf act_mirred vsock unix_diag af_packet_diag
    ip_tables ip6_tables) # by whatever set up the node's own rules: for a container the kernel loads tables, and not these
# Loaded by the kernel itself when something asks for them, as on any node: connection tracking costs each packet.
modules_at_hand=(macvlan ipvlan dummy ip{,6}table_nat ip{,6}table_filter xt_nat xt_MASQUERADE xt_addrtype xt_comment xt_conntrack xt_mark
    xt_multiport xt_tcpudp
    # What the cases about the guest's kernel ask of the node's, under runc.
    ip{,6}table_{mangle,raw} ip{,6}t_REJECT xt_{CT,REDIRECT,TPROXY,connmark,limit,owner,recent,set,socket,state,statistic} nf_tables
    nft_{chain_nat,compat,ct,fib_inet,limit,log,masq,nat,numgen,redir,reject_inet} nf_log_syslog nf_conntrack_netlink br_netfilter
    8021q vxlan wireguard ip_set_hash_{ip,ipport,net} tls)
bookworm=(busybox-static)
trixie=(runc crun libc6 libseccomp2 libcap2 libyajl2 libsystemd0 # bookworm's crun refuses containerd 2.1's specs
    iptables libxtables12 libip4tc2 libip6tc2)
sid=(containerd containernetworking-plugins)
cni=(bridge host-local ipvlan loopback macvlan portmap ptp static)
# What the portmap plugin's rules consist of, as files of iptables.
iptables=(libxt_{DNAT,MARK,MASQUERADE,NAT,SNAT,addrtype,comment,conntrack,mark,multiport,standard,tcp,udp}.so)

fail() {
    echo "nested: $*" >&2
    exit 1
}
for tool in "${host_tools[@]}" cpio depmod modprobe mke2fs strip readelf; do
    command -v "$tool" >/dev/null || PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null ||
        fail "$tool is missing; run tests/install-packages.sh"
done
PATH=$PATH:/usr/sbin:/sbin

digest=$({
    (cd "$here" && cat build.sh machine.sh init.sh initramfs-init.sh "$nested_host.sh" "$nested_host-node.sh" "${host_files[@]}")
    host_version
} | sha256sum | cut -d' ' -f1)
up_to_date() { [[ $(cat "$cache/stamp" 2>/dev/null) == "$digest" ]]; }
up_to_date && exit 0
mkdir -p "$cache"
exec 8>"$cache/lock"
flock 8
up_to_date && exit 0 # another build just made it

start=$SECONDS
echo "nested: building the nested KVM host (once; some minutes)"
rm -f "$cache"/{stamp,root.img,initrd.img,vmlinuz}
work=$(mktemp -d "$cache/build.XXXXXX")
cleanup() {
    host_stop
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

fetch() { "$root/guest-image/fetch-debs.sh" "$@"; }
deb() { compgen -G "$debs/$1/$2_*.deb" | sort -V | tail -n1; }
host_emulator
fetch bookworm "$debs/bookworm" "${bookworm[@]}"
fetch trixie "$debs/trixie" "${trixie[@]}"
fetch sid "$debs/sid" "${sid[@]}"
fetch "$nested_kernel" "$debs/$nested_kernel" "$host_kernel"
image=$(dpkg-deb -f "$(deb "$nested_kernel" "$host_kernel")" Depends | sed 's/ .*//')
fetch "$nested_kernel" "$debs/$nested_kernel" "$image"
kernel=${image#linux-image-}

echo "nested: kernel $kernel and the root disk"
for package in "${bookworm[@]}"; do dpkg-deb -x "$(deb bookworm "$package")" "$work/unpacked"; done
for package in "${trixie[@]}"; do dpkg-deb -x "$(deb trixie "$package")" "$work/unpacked"; done
for package in "${sid[@]}"; do dpkg-deb -x "$(deb sid "$package")" "$work/unpacked"; done
dpkg-deb -x "$(deb "$nested_kernel" "$image")" "$work/kernel"
[[ -e $work/kernel/lib ]] || ln -s usr/lib "$work/kernel/lib" # where Debian 13 has its modules
cp "$work/kernel/boot/vmlinuz-$kernel" "$cache/vmlinuz"
depmod -b "$work/kernel" "$kernel"
# module_files NAME...: the files of these modules and of those they need, in load order.
module_files() { for m in "$@"; do modprobe -d "$work/kernel" -S "$kernel" --show-depends "$m" | awk '$1 == "insmod" { print $2 }'; done | awk '!seen[$0]++'; }

r=$work/root
mkdir -p "$r"/{dev,proc,sys,run,tmp,var,root,etc,payload,results,usr/{bin,sbin,lib/modules,lib64,local/bin,local/sbin}}
for dir in bin sbin lib lib64; do ln -s "usr/$dir" "$r/$dir"; done
for program in usr/bin/{containerd,containerd-shim-runc-v2,ctr,crun} usr/sbin/{runc,xtables-legacy-multi} bin/busybox; do
    cp "$work/unpacked/$program" "$r/usr/bin/"
done
mkdir -p "$r/usr/lib/cni" "$r/usr/lib/x86_64-linux-gnu/xtables"
for plugin in "${cni[@]}"; do cp "$work/unpacked/usr/lib/cni/$plugin" "$r/usr/lib/cni/"; done
for extension in "${iptables[@]}"; do
    cp -a "$work/unpacked/usr/lib/x86_64-linux-gnu/xtables/$extension" "$r/usr/lib/x86_64-linux-gnu/xtables/"
done
for name in ip{,6}tables{,-save,-restore}; do ln -s ../bin/xtables-legacy-multi "$r/usr/sbin/$name"; done
"$r/usr/bin/busybox" --list | while read -r applet; do ln -s busybox "$r/usr/bin/$applet" 2>/dev/null || true; done
for place in modprobe init; do ln -s ../bin/busybox "$r/usr/sbin/$place"; done
# copy_libraries FILE: the libraries that FILE needs, and those that they need.
copy_libraries() {
    local name file
    for name in ld-linux-x86-64.so.2 $(readelf -dW "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
        [[ ! -e $r/usr/lib/x86_64-linux-gnu/$name ]] || continue
        file=$(find "$work/unpacked" -name "$name" -print -quit)
        [[ -n $file ]] || fail "no fetched package has $name, which $(basename "$1") needs"
        cp -L "$file" "$r/usr/lib/x86_64-linux-gnu/"
        copy_libraries "$file"
    done
}
for program in "$r"/usr/bin/{containerd,containerd-shim-runc-v2,ctr,crun,runc,xtables-legacy-multi}; do copy_libraries "$program"; done
ln -s ../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 "$r/usr/lib64/"
module_files "${modules[@]}" "${modules_at_hand[@]}" | while read -r file; do
    install -D "$file" "$r/usr/lib/${file#"$work/kernel/lib/"}"
done
find "$r/usr/lib" -name '*.ko' -exec strip --strip-debug {} +
cp "$work/kernel/lib/modules/$kernel"/modules.{order,builtin,builtin.modinfo} "$r/usr/lib/modules/$kernel/"
depmod -b "$r" "$kernel"
printf '%s\n' "${modules[@]}" >"$r/etc/nested-modules"
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' >"$r/etc/passwd"
printf 'root:x:0:\ntty:x:5:\nnogroup:x:65534:\n' >"$r/etc/group"
printf '127.0.0.1 localhost nested-host\n' >"$r/etc/hosts"
printf 'nameserver 192.0.2.53\nsearch bulkhead.test\n' >"$r/etc/resolv.conf" # pods get a copy; nobody answers there
printf 'ID=debian\nVERSION_ID=12\nPRETTY_NAME="Nested KVM host (Debian 12 parts)"\n' >"$r/etc/os-release"
install -m 755 "$here/init.sh" "$r/usr/sbin/nested-init"
install -m 644 "$here/$nested_host-node.sh" "$r/etc/nested-host"
size=$(du -sm "$r" | cut -f1)
mke2fs -q -t ext4 -O ^has_journal,^resize_inode -m 0 -E root_owner=0:0 -d "$r" "$cache/root.img" "$((size * 11 / 10 + 8))M" >/dev/null ||
    fail "mke2fs could not make the root disk"

i=$work/initramfs
mkdir -p "$i"/{bin,dev,proc,root}
cp "$work/unpacked/bin/busybox" "$i/bin/"
for applet in sh mount umount insmod cat echo switch_root poweroff sleep; do ln -s busybox "$i/bin/$applet"; done
install -m 755 "$here/initramfs-init.sh" "$i/init"
install -m 644 "$here/$nested_host-node.sh" "$i/nested-host"
module_files "${host_boot_modules[@]}" | while read -r file; do cp "$file" "$i/" && basename "$file"; done >"$i/modules"
find "$i" -name '*.ko' -exec strip --strip-debug {} +
(cd "$i" && find . | cpio -o -H newc --quiet) >"$cache/initrd.img"

host_finish "$work"
echo "$digest" >"$cache/stamp"
echo "nested: ready in $((SECONDS - start)) s: $kernel, $(dpkg-deb -f "$(deb sid containerd)" Version | sed 's/^/containerd /'), $host_size, root disk $size MiB"
