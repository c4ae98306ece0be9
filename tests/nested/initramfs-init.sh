#!/bin/sh
# /init of the nested host's initramfs: disk drivers, then the real root (runc's pivot_root refuses an initramfs as root).
. /nested-host
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in $(cat /modules); do
    insmod "/$module" || echo "nested host: cannot load $module" >/dev/console
done
# Not every driver has found its disks once it is loaded.
tries=0
until [ -b "$root_disk" ] || [ "$tries" = 100 ]; do
    tries=$((tries + 1))
    sleep 0.1
done
mount -t ext4 -o ro "$root_disk" /root || { echo "nested host: no root disk" >/dev/console; poweroff -f; }
mount --move /dev /root/dev
umount /proc
exec switch_root /root /sbin/nested-init
