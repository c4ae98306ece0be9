#!/usr/bin/env bash
# fetch-kernel.sh: make target/guest/vmlinux, the guest kernel, out of Debian's libkrunfw5 package.
#
# The library carries a flat kernel image in KERNEL_BUNDLE; krunfw_get_kernel() tells its load address, entry and size.
# We keep it as an ordinary ELF64 executable with one PT_LOAD segment, which any ELF loader can boot.
# Does nothing when the kernel is already there and was made by this very script.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/.." && pwd)
out=$root/target/guest
suite=sid package=libkrunfw5
# What the boot protocol code was written against. A library that says otherwise must be looked at by a person.
want_load=0x1000000 want_entry=0x1000123

digest=$(sha256sum "$here/fetch-kernel.sh" | cut -d' ' -f1)
if [[ -s $out/vmlinux && $(cat "$out/vmlinux.stamp" 2>/dev/null) == "$digest" ]]; then
    exit 0
fi

fail() {
    echo "fetch-kernel: $*" >&2
    exit 1
}
for tool in readelf objdump objcopy ld dpkg-deb; do
    command -v "$tool" >/dev/null || fail "$tool is missing; apt-get install binutils dpkg"
done

echo "fetch-kernel: getting the guest kernel out of Debian's $package"
"$here/fetch-debs.sh" "$suite" "$root/target/debs/$suite" "$package"
mkdir -p "$out"
work=$(mktemp -d "$out/fetch-kernel.XXXXXX")
trap 'rm -rf "$work"' EXIT
deb=("$root/target/debs/$suite/${package}"_*.deb)
dpkg-deb -x "${deb[0]}" "$work/deb" || fail "${deb[0]} is damaged; remove it and run this again"
library=$(find "$work/deb" -type f -name 'libkrunfw.so.*')
[[ -n $library ]] || fail "${deb[0]} has no libkrunfw.so"

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
echo "fetch-kernel: target/guest/vmlinux: ${version:-unknown version}, $((size / 1048576)) MiB, from $(basename "${deb[0]}")"
