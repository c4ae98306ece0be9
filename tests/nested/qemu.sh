# qemu.sh: the nested host with AMD's SVM, which QEMU's software CPU emulates. Sourced by machine.sh, which says what is what.
#
# The host is booted once, up to "ready": modules loaded, /dev/kvm there, everything in the page cache. That state is saved
# (memory: ram.img, the rest: state), and runs start from it. A saved state can only be restored into exactly the machine that it
# was saved from, so both get their command here.
#
# -icount shift=0,sleep=off: one instruction is one virtual nanosecond and idle time costs nothing, which makes virtual
# time repeatable. ioeventfd=off: a queue's kick is served within the instruction that made it, for the same reason.

qemu_memory=4096M
qemu_boot_limit=900 # seconds of wall time; a loaded machine needs about 90
qemu_pid='' reader_pid=

host_tools=(qemu-system-x86_64)
host_files=(fix-qemu.sh)
host_kernel=linux-image-cloud-amd64
host_modules=(kvm-amd virtio_console)
host_boot_modules=(virtio_pci virtio_blk)

host_version() { qemu-system-x86_64 --version; }

host_emulator() {
    # QEMU looks for its firmware and modules beside itself.
    mkdir -p "$cache/bin"
    ln -sfn /usr/share "$cache/share"
    ln -sfn /usr/lib "$cache/lib"
    "$here/fix-qemu.sh" "$cache/bin/qemu-system-x86_64"
}

# qemu_machine SHARE DIR: sets the array `machine`. SHARE is on (the guest's memory is written to ram.img) or off (ram.img is
# only the origin of a private copy). DIR holds this run's payload.img, results.img, status, console.log; the three character
# devices `go`, `out` and `status` are for the caller to add.
qemu_machine() {
    local share=$1 dir=$2
    machine=(
        "$cache/bin/qemu-system-x86_64" -nodefaults -no-user-config -nographic -no-reboot
        -accel tcg,thread=single -icount shift=0,sleep=off -rtc clock=vm
        -cpu EPYC-v3,+svm,+npt -smp 1 -m "$qemu_memory" -M q35,memory-backend=ram
        -object "memory-backend-file,id=ram,size=$qemu_memory,mem-path=$cache/ram.img,share=$share"
        -kernel "$cache/vmlinuz" -initrd "$cache/initrd.img"
        -append "$nested_command_line"
        -drive "id=root,if=none,format=raw,read-only=on,file=$cache/root.img"
        -device virtio-blk-pci,drive=root,ioeventfd=off
        -drive "id=payload,if=none,format=raw,read-only=on,file=$dir/payload.img"
        -device virtio-blk-pci,drive=payload,ioeventfd=off
        -drive "id=results,if=none,format=raw,cache=unsafe,file=$dir/results.img"
        -device virtio-blk-pci,drive=results,ioeventfd=off
        -device virtio-serial-pci,ioeventfd=off
        -device virtserialport,chardev=go,name=go
        -device virtserialport,chardev=out,name=out
        -device virtserialport,chardev=status,name=status
        -serial "file:$dir/console.log" -monitor stdio
    )
}

host_finish() {
    local dir=$1 limit
    truncate -s "$nested_payload_bytes" "$dir/payload.img"
    truncate -s "$nested_results_bytes" "$dir/results.img"
    rm -f "$cache"/{ram.img,state}
    truncate -s "$qemu_memory" "$cache/ram.img"
    qemu_machine on "$dir"
    mkfifo "$dir/monitor"
    echo "nested: first boot (limit $qemu_boot_limit s; console: target/$nested_directory/build.log)"
    "${machine[@]}" -chardev "file,id=go,path=$dir/go" -chardev "file,id=out,path=$dir/out" \
        -chardev "file,id=status,path=$dir/status" <"$dir/monitor" >"$dir/emulator.log" 2>&1 8>&- &
    qemu_pid=$!
    exec 7>"$dir/monitor"
    limit=$((SECONDS + qemu_boot_limit))
    until grep -qs '^ready$' "$dir/status"; do
        kill -0 "$qemu_pid" 2>/dev/null && ((SECONDS < limit)) || {
            cp "$dir/console.log" "$cache/build.log" 2>/dev/null || true
            tail -n 15 "$dir/emulator.log" "$dir/console.log" >&2 || true
            fail "the nested host did not get ready ($(cat "$dir/status" 2>/dev/null || echo no status)); see above"
        }
        sleep 0.2
    done
    printf 'migrate_set_capability x-ignore-shared on\nmigrate "exec:cat > %s"\ninfo migrate\nquit\n' "$cache/state" >&7
    wait "$qemu_pid" || fail "QEMU could not save the nested host: $(tail -n 3 "$dir/emulator.log")"
    qemu_pid=
    cp "$dir/console.log" "$cache/build.log"
    grep -q 'Migration status: completed' "$dir/emulator.log" || fail "saving the nested host failed: $(tail -n 3 "$dir/emulator.log")"
    host_size="memory $(du -sm "$cache/ram.img" | cut -f1) MiB"
}

host_run() {
    local dir=$1
    truncate -s "$nested_results_bytes" "$dir/results.img"
    mkfifo "$dir/out" "$dir/go"
    exec 6<>"$dir/go" # keeps the line in the pipe until QEMU reads it
    printf '%s\n' "$nested_arguments" >&6
    # State and memory file are only ever read: share=off makes the memory a private copy-on-write mapping.
    printf 'migrate_set_capability x-ignore-shared on\nmigrate_incoming "exec:cat %s"\n' "$cache/state" >"$dir/monitor.in"

    cat "$dir/out" &
    reader_pid=$!
    qemu_machine off "$dir"
    timeout --foreground -k 5 "$wall_limit" "${machine[@]}" -incoming defer -chardev "pipe,id=go,path=$dir/go" \
        -chardev "file,id=out,path=$dir/out" -chardev "file,id=status,path=$dir/status" \
        <"$dir/monitor.in" >"$dir/monitor.log" 2>&1 6>&- &
    qemu_pid=$!
    host_code=0
    wait "$qemu_pid" || host_code=$?
    qemu_pid=
    # QEMU that died before it opened the pipe leaves its reader waiting: open and close it ourselves.
    : 1<>"$dir/out"
    wait "$reader_pid" || true
    reader_pid=
    # Without QEMU's warnings about the software CPU and the monitor's line editing.
    grep -av -e "TCG doesn't support" -e $'\033' "$dir/monitor.log" >"$dir/emulator.log" || true
    ln -s results.img "$dir/results.tar"
}

host_stop() {
    # TERM: timeout passes it on to QEMU, and kills QEMU if that does not help.
    [[ -z $qemu_pid ]] || { kill -TERM "$qemu_pid" 2>/dev/null && wait "$qemu_pid"; } || true
    [[ -z $reader_pid ]] || kill -KILL "$reader_pid" 2>/dev/null || true
}
