# machine.sh: which nested host it is, sourced by build.sh and run.sh.
#
# NESTED_CPU says whose virtualisation extensions the host's CPU has: amd (SVM, emulated by QEMU) unless it says intel (VMX,
# emulated by Bochs). NESTED_KERNEL is the Debian release whose kernel it runs: bookworm (6.1) unless it says trixie (6.12).
# Each combination has a host of its own.
#
# qemu.sh and bochs.sh say what an emulator's host consists of:
#   host_tools       programs that it needs
#   host_files       scripts besides the common ones that it is made by
#   host_kernel      the package whose dependency is the kernel
#   host_modules     of KVM and of the devices through which init.sh is told what to run
#   host_boot_modules  the disks' drivers
#   host_version     prints what its stamp has to tell apart
#   host_emulator    makes the emulator itself, before anything else
#   host_finish DIR  makes $cache/root.img, initrd.img and vmlinuz into something that starts
#   host_run DIR     runs DIR/payload.img; leaves DIR/status, results.tar, console.log and emulator.log, sets host_code
#   host_stop        ends what host_finish or host_run has running
# NAME-node.sh is the part of init.sh that knows the emulator's devices.
nested_cpu=${NESTED_CPU:-amd}
nested_kernel=${NESTED_KERNEL:-bookworm}
case $nested_cpu in
amd) nested_host=qemu nested_directory=nested ;;
intel) nested_host=bochs nested_directory=nested-intel ;;
*)
    echo "nested: NESTED_CPU is '$nested_cpu': amd and intel are possible" >&2
    exit 125
    ;;
esac
case $nested_kernel in
bookworm) ;;
trixie) nested_directory+=-trixie ;;
*)
    echo "nested: NESTED_KERNEL is '$nested_kernel': bookworm and trixie are possible" >&2
    exit 125
    ;;
esac

nested_payload_bytes=$((1 << 30))
nested_results_bytes=$((256 << 20))
nested_command_line="console=ttyS0 quiet nokaslr mitigations=off init_on_alloc=0 panic=1 cgroup_no_v1=all"
. "$here/$nested_host.sh"
