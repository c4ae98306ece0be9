#!/usr/bin/env bash
# fetch-kernel.sh: make target/guest/vmlinux, the guest kernel, out of Debian's libkrunfw5 package.
#
# The library carries a flat kernel image in KERNEL_BUNDLE; krunfw_get_kernel() tells its load address, entry and size.
# We keep it as an ordinary ELF64 executable with one PT_LOAD segment, which any ELF loader can boot.
# Does nothing when the kernel is already there and was made by this very script of the package that is to be had.
#
# kernel.lock pins the package by version and SHA-256. A suite keeps one version at a time: when the pinned one is gone from
# Debian's archive, the suite's is taken, whose digest is signed by Debian as the pinned one's was, and a warning says so: else a
# clone would stop working on a day that nobody chose. With KERNEL_LOCK=strict, as for a release, it is an error.
# fetch-kernel.sh --update pins what the suite has now.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/.." && pwd)
out=$root/target/guest
fail() {
    echo "fetch-kernel: $*" >&2
    exit 1
}
suite=sid lock=$here/kernel.lock
read -r package version sha256 < <(grep -v '^#' "$lock")
# What the boot protocol code was written against. A library that says otherwise must be looked at by a person.
want_load=0x1000000 want_entry=0x1000123

digest=$(cat "$here/fetch-kernel.sh" "$lock" | sha256sum | cut -d' ' -f1)
made=$(cat "$out/vmlinux.stamp" 2>/dev/null || true)
if [[ ${1:-} != --update && -s $out/vmlinux ]]; then
    [[ $made != "$digest" ]] || exit 0
    [[ ${KERNEL_LOCK:-} == strict || $made != "$digest unpinned" ]] || exit 0
fi

for tool in readelf objdump objcopy ld dpkg-deb; do
    command -v "$tool" >/dev/null || fail "$tool is missing; apt-get install binutils dpkg"
done

debs=$root/target/debs/kernel
mkdir -p "$out" "$debs"
work=$(mktemp -d "$out/fetch-kernel.XXXXXX")
trap 'rm -rf "$work"' EXIT

is_pinned() { [[ -s $1 && $(sha256sum "$1" | cut -d' ' -f1) == "$sha256" ]]; }

# What the suite has now; apt checks Debian's signature.
newest() {
    "$here/fetch-debs.sh" "$suite" "$work/newest" "$package"
    deb=$(echo "$work/newest/${package}"_*.deb)
}

echo "fetch-kernel: getting the guest kernel out of Debian's $package $version"
file=${package}_${version}_amd64.deb deb=$debs/$file
if [[ ${1:-} == --update ]]; then
    newest
    version=$(dpkg-deb -f "$deb" Version) sha256=$(sha256sum "$deb" | cut -d' ' -f1)
    sed -i "s/^$package .*/$package $version $sha256/" "$lock"
    echo "fetch-kernel: $lock pins $package $version"
    digest=$(cat "$here/fetch-kernel.sh" "$lock" | sha256sum | cut -d' ' -f1)
elif ! is_pinned "$deb"; then
    newest
    if [[ $(dpkg-deb -f "$deb" Version) != "$version" ]]; then
        # Another suite may still have it: then it is in the archive.
        found=$(dpkg-deb -f "$deb" Version) source=$(dpkg-deb -f "$deb" Source)
        source=${source%% *}
        source=${source:-$package} mirror=$(awk '{ print $4 }' "$root/target/apt/$suite/sources.list")
        case $source in lib?*) initial=${source:0:4} ;; *) initial=${source:0:1} ;; esac
        if /usr/lib/apt/apt-helper download-file "${mirror%/}/pool/main/$initial/$source/$file" "$work/$file" "SHA256:$sha256" >/dev/null 2>&1; then
            deb=$work/$file
        elif [[ ${KERNEL_LOCK:-} == strict ]]; then
            fail "the lock pins $package $version, which Debian's archive has no more; $suite has $found: try it, then run guest-image/fetch-kernel.sh --update"
        else
            echo "fetch-kernel: WARNING: the lock pins $package $version, which Debian's archive has no more: TAKING $found OF $suite, which nobody has tried (guest-image/fetch-kernel.sh --update pins it)" >&2
            digest+=" unpinned"
        fi
    fi
    if [[ $digest != *unpinned ]]; then
        is_pinned "$deb" || fail "$deb has another SHA-256 than $lock says: do not use it"
        mv "$deb" "$debs/$file"
        deb=$debs/$file
    fi
fi
dpkg-deb -x "$deb" "$work/deb" || fail "$deb is damaged; remove it and run this again"
library=$(find "$work/deb" -type f -name 'libkrunfw.so.*')
[[ -n $library ]] || fail "$deb has no libkrunfw.so"

# The accessor stores load address, entry and size as immediates, in that order.
accessor=$(readelf --dyn-syms -W "$library" | awk '$8 == "krunfw_get_kernel" { print "0x" $2, $3 }')
bundle=$(readelf --dyn-syms -W "$library" | awk '$8 == "KERNEL_BUNDLE" { print "0x" $2 }')
[[ -n $accessor && -n $bundle ]] || fail "$library lacks krunfw_get_kernel or KERNEL_BUNDLE"
read -r start length <<<"$accessor"
mapfile -t stored < <(objdump -d "$library" --start-address="$start" --stop-address=$((start + length)) |
    sed -n 's/.*movq *\$\(0x[0-9a-f]*\),(%rax)$/\1/p')
((${#stored[@]} == 3)) || fail "cannot read krunfw_get_kernel of $library: found ${#stored[@]} stores, not 3"
load=${stored[0]} entry=${stored[1]} size=$((stored[2]))
[[ $load == "$want_load" && $entry == "$want_entry" ]] ||
    fail "$library loads at $load with entry $entry, expected $want_load and $want_entry"

# KERNEL_BUNDLE's virtual address as an offset in the file: through the PT_LOAD segment that holds it.
offset=$(readelf -lW "$library" | awk '$1 == "LOAD" { print $2, $3, $5 }' | while read -r off vaddr filesz; do
    if ((bundle >= vaddr && bundle + size <= vaddr + filesz)); then echo $((bundle - vaddr + off)); fi
done)
[[ -n $offset ]] || fail "no segment of $library holds all $size bytes of KERNEL_BUNDLE"
dd if="$library" of="$work/kernel.bin" bs=1M iflag=skip_bytes,count_bytes skip="$offset" count="$size" status=none

cat >"$work/kernel.ld" <<LD
OUTPUT_FORMAT(elf64-x86-64)
ENTRY(kernel_entry)
kernel_entry = $entry;
PHDRS { kernel PT_LOAD FLAGS(7); }
SECTIONS { .kernel $load : AT($load) { *(.data) } :kernel /DISCARD/ : { *(.note*) } }
LD
(cd "$work" && objcopy -I binary -O elf64-x86-64 kernel.bin kernel.o && ld --no-warn-rwx-segments -z max-page-size=4096 -T kernel.ld -o vmlinux kernel.o)
strip "$work/vmlinux"

# Prove that what a loader will see is what the library held.
read -r seg_offset seg_addr seg_size < <(readelf -lW "$work/vmlinux" | awk '$1 == "LOAD" { print $2, $4, $5 }')
[[ $(readelf -lW "$work/vmlinux" | grep -c '^ *LOAD') == 1 && $((seg_addr)) == $((load)) && $((seg_size)) == "$size" ]] ||
    fail "the linker laid the kernel out wrongly: offset $seg_offset, address $seg_addr, size $seg_size"
readelf -hW "$work/vmlinux" | grep -q "Entry point address: *$entry\$" || fail "the linker set the wrong entry"
cmp <(tail -c +$((seg_offset + 1)) "$work/vmlinux" | head -c "$size") "$work/kernel.bin" ||
    fail "the kernel's bytes changed on the way into ELF"

mv "$work/vmlinux" "$out/vmlinux"
echo "$digest" >"$out/vmlinux.stamp"
version=$(grep -aom1 'Linux version [0-9][^ ]*' "$out/vmlinux" || true)
echo "fetch-kernel: target/guest/vmlinux: ${version:-unknown version}, $((size / 1048576)) MiB, from $(basename "$deb")"
