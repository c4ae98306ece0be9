# qemu-node.sh: what init.sh has to know of QEMU's machine: the disks, and three ports of a virtio console.
kvm_module=kvm-amd
root_disk=/dev/vda payload_disk=/dev/vdb results_disk=/dev/vdc

# The ports' numbers as the kernel gave them, looked up by name.
port() { for p in /sys/class/virtio-ports/*; do [ "$(cat "$p/name")" = "$1" ] && echo "/dev/${p##*/}"; done; }
node_devices() { go=$(port go) out=$(port out) status=$(port status); }

# Comes back once there is a line of arguments: the state is saved before that.
node_arguments() {
    # Everything on the root disk into the page cache: a wait for the disk makes virtual time jump to the next timer.
    find /usr /lib /etc -xdev -type f -exec cat {} + >/dev/null
    sync
    echo ready >"$status"
    read -r arguments <"$go"
    # ---- from here on in each run, out of the restored state ----
    blockdev --flushbufs "$payload_disk"
}
node_payload() { find /payload -type f -exec cat {} + >/dev/null; }
