#!/bin/sh
# /init of the nested host's initramfs: disk drivers, then the real root (runc's pivot_root refuses an initramfs as root).
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in $(cat /modules); do
    insmod "/$module" || echo "nested host: cannot load $module" >/dev/console
done
mount -t ext4 -o ro /dev/vda /root || { echo "nested host: no root disk" >/dev/console; poweroff -f; }
mount --move /dev /root/dev
umount /proc
exec switch_root /root /sbin/nested-init
