#!/usr/bin/env bash
# fix-qemu.sh FILE: copy qemu-system-x86_64 to FILE without a bug of its SVM emulation that hangs a pod now and then.
#
# VMRUN with an external interrupt to inject delivers it at once, but also leaves its vector in `exception_index`. When the
# vCPU is asked to stop (a timer is due) before the next exit or exception clears that, the vector is taken for an exception and
# delivered a second time, whether the guest has interrupts enabled or not: its handler then spins on a lock that it holds.
# Nothing needs the value that is left behind, so the copy does not store it. See helper_vmrun() and cpu_handle_interrupt().
# A QEMU whose code looks different is copied as it is, with a warning.
set -euo pipefail

source=$(command -v qemu-system-x86_64)
target=$1
cp --remove-destination "$source" "$target" # a copy that is running stays as it is

# exception_index = vector; exception_is_int = 0; exception_next_eip = -1; if (qemu_loglevel_mask(...)) ...;
# do_interrupt_x86_hardirq(env, vector, 1)
store='\x89\xb3[\x00-\xff]{4}'
rest='\xc7\x83[\x00-\xff]{4}\x00{4}\x48\xc7\x83[\x00-\xff]{4}\xff{4}\xf6\x05[\x00-\xff]{4}\x02\x0f\x85[\x00-\xff]{4}\xba\x01\x00{3}\x48\x89\xdf\xe8'
mapfile -t offsets < <(LC_ALL=C grep -obUaP "$store(?=$rest)" "$source" | cut -d: -f1)
if ((${#offsets[@]} != 1)); then
    echo "nested: WARNING: cannot fix this QEMU's interrupt injection (${#offsets[@]} matches): now and then a pod will hang in the nested host" >&2
    exit 0
fi
printf '\x66\x0f\x1f\x44\x00\x00' | dd of="$target" bs=1 seek="${offsets[0]}" conv=notrunc status=none # a no-op of six bytes
