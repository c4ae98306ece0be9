#!/usr/bin/env bash
# payload.sh PAYLOAD KIND: complete the payload directory that tests/run.sh made (binaries, guest kernel and image, containerd) with
# what the benchmark compares with. KIND is hardware, or anything else for the nested KVM host, which has runc and crun itself.
#
# On hardware KVM runc is this machine's own, or else Debian's for it; crun takes part if it is installed.
set -euo pipefail

payload=$1 kind=$2
root=$(cd "$(dirname "$0")/.." && pwd)
release=$root/target/x86_64-unknown-linux-gnu/release
debs=$root/target/debs

fail() {
    echo "bench: $*" >&2
    exit 1
}
[[ -f $release/bulkhead-bench-workload ]] || fail "$release/bulkhead-bench-workload is missing; run make build"
ln "$release/bulkhead-bench-workload" "$payload/bin/"

# program SUITE PACKAGE PATH: takes one program out of a Debian package, once.
program() {
    local kept=$debs/bench/$1/${3##*/}
    if [[ ! -x $kept ]]; then
        "$root/guest-image/fetch-debs.sh" "$1" "$debs/$1" "$2"
        local deb work
        deb=$(compgen -G "$debs/$1/$2_*.deb" | sort -V | tail -n1)
        mkdir -p "$debs/bench/$1"
        work=$(mktemp -d "$debs/bench/unpack.XXXXXX")
        dpkg-deb -x "$deb" "$work"
        mv "$work/$3" "$kept"
        rm -rf "$work"
    fi
    ln "$kept" "$payload/bin/"
}
program bookworm-backports runsc usr/bin/runsc
if [[ $kind == hardware ]]; then
    program sid containerd usr/bin/containerd-shim-runc-v2
    command -v runc >/dev/null || program bookworm runc usr/sbin/runc
fi

# The VMM alone boots this image, whose init is the workload.
mkfs=$(PATH=$PATH:/usr/sbin:/sbin command -v mkfs.erofs) || fail "mkfs.erofs is missing; run tests/install-packages.sh"
guest=$(mktemp -d "$payload/guest.XXXXXX")
mkdir "$guest"/{dev,proc,sys,run,tmp}
cp "$release/bulkhead-bench-workload" "$guest/workload"
"$mkfs" --quiet -T0 --all-root "$payload/share/bulkhead/bench-guest.erofs" "$guest" >/dev/null || fail "mkfs.erofs failed"
rm -rf "$guest"

# What containerd's blockfile snapshotter begins with: an empty file system.
mkfs=$(PATH=$PATH:/usr/sbin:/sbin command -v mkfs.ext4) || fail "mkfs.ext4 is missing; run tests/install-packages.sh"
"$mkfs" -q -m 0 "$payload/share/bulkhead/bench-scratch.ext4" 64M >/dev/null || fail "mkfs.ext4 failed"

# For containerd's erofs snapshotter.
"$root/tests/images/erofs.sh" "$payload" "$kind"

# QEMU for the comparison of VMMs: the nested host has none, so this machine's goes along with its libraries and firmware.
if [[ $kind != hardware ]] && qemu=$(command -v qemu-system-x86_64); then
    mkdir -p "$payload"/qemu/{lib,share}
    cp "$qemu" "$payload/qemu/"
    ldd "$qemu" | awk '$3 ~ /^\// { print $3 }' | grep -vE '/lib(c|m|dl|rt|pthread|resolv)\.so' | xargs cp -L -t "$payload/qemu/lib"
    cp -L /usr/share/qemu/{qboot.rom,pvh.bin} "$payload/qemu/share/"
    printf '#!/bin/sh\nhere=$(cd "$(dirname "$0")/../qemu" && pwd)\nLD_LIBRARY_PATH=$here/lib exec "$here/qemu-system-x86_64" -L "$here/share" "$@"\n' \
        >"$payload/bin/qemu-system-x86_64"
    chmod 755 "$payload/bin/qemu-system-x86_64"
fi

# What is measured: the commit, and whether there is more than it.
revision=$(git -C "$root" describe --always --dirty 2>/dev/null || echo unknown)
if [[ $kind == hardware ]]; then
    place=(--clock wall --out "$root/target/bench")
else
    place=(--clock virtual --out /results)
fi
rm -f "$payload/run"
{
    echo '#!/bin/sh'
    echo 'PATH=$(cd "$(dirname "$0")" && pwd)/bin:$PATH'
    echo 'export PATH'
    # What bulkhead check advises nodes with older kernels to do; the report says whether it was done.
    [[ $kind == hardware || -z ${BENCH_FAVORDYNMODS:-} ]] ||
        echo 'mount -o remount,nsdelegate,memory_recursiveprot,favordynmods /sys/fs/cgroup'
    printf 'exec bulkhead-bench run --revision %q' "$revision"
    printf ' %q' "${place[@]}"
    echo ' "$@"'
} >"$payload/run"
chmod 755 "$payload/run"
