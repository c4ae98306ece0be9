# bochs-node.sh: what init.sh has to know of Bochs' machine: the disks, and two serial ports that are files.
kvm_module=kvm-intel
root_disk=/dev/sda payload_disk=/dev/sdb results_disk=/dev/sdc

node_devices() {
    out=/dev/ttyS1 status=/dev/ttyS2
    for port in "$out" "$status"; do stty -F "$port" raw 115200; done
    dd if="$results_disk" of=/run/arguments bs=64k count=1 2>/dev/null
}
node_arguments() { read -r arguments </run/arguments; }
node_payload() { :; }
