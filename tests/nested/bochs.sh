# bochs.sh: the nested host with Intel's VMX, which Bochs emulates. Sourced by machine.sh, which says what is what.
#
# NESTED_MODEL is the CPU, one of those that `bochs --help cpu` lists. The host boots each time, from a CD with the kernel.
# A virtual second has 10^9 instructions, as QEMU's: `clock: sync=none` and `ips`. Waiting costs a fraction of that.
#
# Bochs is built from Debian's source: Debian's own program is built with the debugger, which costs half the speed, and has
# no display that does without a screen or a client.

bochs_model=${NESTED_MODEL:-corei7_haswell_4770}
bochs_options=(--with-nogui --disable-docbook --disable-plugins --disable-readline --disable-debugger --disable-show-ips
    --enable-cpu-level=6 --enable-x86-64 --enable-long-phy-address --enable-all-optimizations --enable-pci --enable-cdrom
    --enable-vmx=2 --enable-avx --enable-evex --enable-amx --enable-protection-keys --enable-cet --enable-memtype
    --enable-monitor-mwait)
bochs_memory=3072 # MiB; what is touched beyond 2048 is in a file
bochs_pid='' reader_pid=

host_tools=(g++ make patch xorriso)
host_files=(bochs.patch)
host_kernel=linux-image-amd64 # the one for clouds has no driver for Bochs' disks
host_modules=(kvm-intel)
host_boot_modules=(ata_piix sd_mod crc32c_generic ext4)

host_version() { :; }

host_emulator() {
    local dir=$work/bochs stamp
    stamp="${bochs_options[*]} $(sha256sum <"$here/bochs.patch")"
    [[ $(cat "$cache/bochs.stamp" 2>/dev/null) != "$stamp" ]] || return 0
    echo "nested: building Bochs (some minutes)"
    fetch trixie "$debs/trixie-source" --source bochs
    mkdir "$dir"
    tar -x -f "$(compgen -G "$debs/trixie-source/bochs_*.orig.tar.*" | sort -V | tail -n1)" -C "$dir" --strip-components=1
    patch -s -p1 -d "$dir" <"$here/bochs.patch" || fail "bochs.patch does not fit this Bochs"
    (cd "$dir" && CXXFLAGS="-O3 -w" CFLAGS="-O3 -w" ./configure "${bochs_options[@]}" && make -j"$(nproc)") >"$cache/bochs.log" 2>&1 ||
        fail "Bochs does not build: $(tail -n 3 "$cache/bochs.log")"
    install -s "$dir/bochs" "$cache/bochs"
    rm -rf "$dir"
    echo "$stamp" >"$cache/bochs.stamp"
}

host_finish() {
    local dir=$1 package
    local packages=(bochsbios vgabios isolinux syslinux-common)
    fetch trixie "$debs/trixie" "${packages[@]}"
    for package in "${packages[@]}"; do dpkg-deb -x "$(deb trixie "$package")" "$dir/boot"; done
    cp "$dir/boot/usr/share/bochs/BIOS-bochs-latest" "$cache/bios"
    cp "$dir/boot/usr/share/vgabios/vgabios.bin" "$cache/vgabios"
    mkdir "$dir/iso"
    cp "$dir/boot/usr/lib/ISOLINUX/isolinux.bin" "$dir/boot/usr/lib/syslinux/modules/bios/ldlinux.c32" "$cache"/{vmlinuz,initrd.img} "$dir/iso/"
    # A restart is a triple fault, which ends Bochs. Newer processors name a frequency that Bochs' counter does not have, and all
    # waiting would cost several times as much. Those with AMX have it without XFD, which Linux does not expect: it goes without.
    # Bochs has no IA32_MISC_ENABLE, so Linux takes fast strings (ERMS) for switched off, and the short ones (FSRM) of newer processors
    # for on; the memmove of 6.1 then runs away. And it does not come back from system management mode to five levels of page tables.
    printf 'default nested\nprompt 0\nlabel nested\n kernel vmlinuz\n append initrd=initrd.img reboot=t tsc_early_khz=1000000 clearcpuid=amx_tile,fsrm no5lvl %s\n' "$nested_command_line" >"$dir/iso/isolinux.cfg"
    xorriso -as mkisofs -quiet -o "$dir/boot.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table "$dir/iso" >"$dir/xorriso.log" 2>&1 ||
        fail "cannot make the boot disk: $(tail -n 3 "$dir/xorriso.log")"
    mv "$dir/boot.iso" "$cache/" # running ones keep the one that they have
    host_size="boot disk $(du -sm "$cache/boot.iso" | cut -f1) MiB"
}

host_run() {
    local dir=$1
    # What is to be run stands at the head of the disk for the results.
    printf '%s\n' "$nested_arguments" >"$dir/results.img"
    truncate -s "$nested_results_bytes" "$dir/results.img"
    : >"$dir/out" # there before its reader looks for it
    cat >"$dir/bochsrc" <<RC
display_library: nogui
config_interface: textconfig
cpu: model=$bochs_model, count=1, ips=1000000000, reset_on_triple_fault=0
memory: guest=$bochs_memory, host=2048
romimage: file=$cache/bios
vgaromimage: file=$cache/vgabios
pci: enabled=1, chipset=i440fx
clock: sync=none, time0=utc
boot: cdrom
ata0-master: type=disk, path=$cache/root.img, mode=volatile, journal=$dir/root.journal
ata0-slave: type=disk, path=$dir/payload.img, mode=volatile, journal=$dir/payload.journal
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata1-master: type=disk, path=$dir/results.img, mode=flat
ata1-slave: type=cdrom, path=$cache/boot.iso, status=inserted
com1: enabled=1, mode=file, dev=$dir/console.log
com2: enabled=1, mode=file, dev=$dir/out
com3: enabled=1, mode=file, dev=$dir/status
log: $dir/emulator.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
RC
    timeout --foreground -k 5 "$wall_limit" "$cache/bochs" -q -f "$dir/bochsrc" </dev/null >"$dir/bochs.log" 2>&1 &
    bochs_pid=$!
    tail -n +1 -s 0.2 -f --pid="$bochs_pid" "$dir/out" &
    reader_pid=$!
    host_code=0
    wait "$bochs_pid" || host_code=$?
    bochs_pid=
    wait "$reader_pid" || true
    reader_pid=
    ln -s results.img "$dir/results.tar"
}

host_stop() {
    [[ -z $bochs_pid ]] || { kill -TERM "$bochs_pid" 2>/dev/null && wait "$bochs_pid"; } || true
    [[ -z $reader_pid ]] || kill -KILL "$reader_pid" 2>/dev/null || true
}
