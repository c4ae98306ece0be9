# machine.sh: the nested host's machine, sourced by build.sh and run.sh. A saved state can only be restored into exactly
# the machine that it was saved from, so both build their QEMU command here.
#
# -icount shift=0,sleep=off: one instruction is one virtual nanosecond and idle time costs nothing, which makes virtual
# time repeatable. ioeventfd=off: a queue's kick is served within the instruction that made it, for the same reason.

# NESTED_KERNEL is the Debian release whose kernel the host runs: bookworm (6.1) unless it says trixie (6.12). Each has a host
# of its own.
nested_kernel=${NESTED_KERNEL:-bookworm}
case $nested_kernel in
bookworm) nested_directory=nested ;;
trixie) nested_directory=nested-trixie ;;
*)
    echo "nested: NESTED_KERNEL is '$nested_kernel': bookworm and trixie are possible" >&2
    exit 125
    ;;
esac

nested_memory=4096M
nested_payload_bytes=$((1 << 30))
nested_results_bytes=$((256 << 20))

# nested_machine SHARE DIR: sets the array `machine`. SHARE is on (the guest's memory is written to ram.img) or off (ram.img is
# only the origin of a private copy). DIR holds this run's payload.img, results.img, status, console.log; the three character
# devices `go`, `out` and `status` are for the caller to add.
nested_machine() {
    local share=$1 dir=$2 cache=$3
    machine=(
        "$cache/bin/qemu-system-x86_64" -nodefaults -no-user-config -nographic -no-reboot
        -accel tcg,thread=single -icount shift=0,sleep=off -rtc clock=vm
        -cpu EPYC-v3,+svm,+npt -smp 1 -m "$nested_memory" -M q35,memory-backend=ram
        -object "memory-backend-file,id=ram,size=$nested_memory,mem-path=$cache/ram.img,share=$share"
        -kernel "$cache/vmlinuz" -initrd "$cache/initrd.img"
        -append "console=ttyS0 quiet nokaslr mitigations=off init_on_alloc=0 panic=1 cgroup_no_v1=all"
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
