# The whole of systemd as the container's first process: units with control groups, users and mounts of their own.
cd /etc/systemd/system
cat >limited.service <<C
[Service]
MemoryMax=30M
DynamicUser=yes
ProtectSystem=strict
PrivateDevices=yes
ExecStart=/bin/sleep 1000
C
cat >probe.service <<C
[Unit]
After=limited.service
Wants=limited.service
[Service]
Type=oneshot
PrivateTmp=yes
StandardOutput=file:/srv/said
StandardError=file:/srv/said
ExecStart=/bin/sh -c 'systemctl is-active limited.service; cat /sys/fs/cgroup/system.slice/limited.service/memory.max; systemd-detect-virt -c; systemctl exit 0'
C
: >/etc/machine-id
export container=oci
exec /usr/lib/systemd/systemd --unit=probe.service --log-target=null --show-status=no
