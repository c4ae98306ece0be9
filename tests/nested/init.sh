#!/bin/sh
# /sbin/nested-init, PID 1 of the nested host: set the node up, report "ready" (the state is saved there), wait for a
# line of arguments on the port `go`, run the payload, hand back its results and exit code.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t cgroup2 -o nsdelegate,memory_recursiveprot cgroup /sys/fs/cgroup
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t mqueue mqueue /dev/mqueue
for dir in /run /tmp /var /root /results; do mount -t tmpfs -o mode=755 tmpfs "$dir"; done
chmod 1777 /tmp
mkdir -p /var/lib /var/log /var/tmp /run/etc /run/lock
cp -a /etc/. /run/etc && mount --bind /run/etc /etc
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr

for module in $(cat /etc/nested-modules); do modprobe "$module" || echo "nested host: no module $module" >/dev/console; done
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control; done
hostname nested-host
ip link set lo up
echo 1 >/proc/sys/net/ipv4/ip_forward
ulimit -n 1048576

. /etc/nested-host
node_devices
if [ ! -c /dev/kvm ]; then
    echo "no /dev/kvm" >"$status"
    reboot -f
fi
node_arguments
if mount -t ext4 -o ro,noatime "$payload_disk" /payload && node_payload; then
    eval "$arguments" # sets virtual_limit, kvm_parameters and the positional parameters
    [ -z "$kvm_parameters" ] || { modprobe -r "$kvm_module" && modprobe "$kvm_module" $kvm_parameters; }
    cd /payload
    started=$(cut -d' ' -f1 /proc/uptime)
    timeout "$virtual_limit" ./run "$@" </dev/null >"$out" 2>&1
    code=$?
    ended=$(cut -d' ' -f1 /proc/uptime)
else
    echo "nested host: cannot mount the payload" >"$out"
    code=125 started=0 ended=0
fi
dmesg >/results/nested-dmesg.txt
tar c -C /results . | dd of="$results_disk" bs=1M iflag=fullblock 2>/dev/null
sync
echo "exit $code $started $ended" >"$status"
reboot -f
