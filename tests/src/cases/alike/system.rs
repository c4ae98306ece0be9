//! Rows about processes and about the node.

use super::files::LISTS;
use super::{Row, but, instead, same};

const LACKS: &str = "the guest's kernel does not have it";
const NO_NETWORK: &str = "a pod without interfaces takes no parameters of a network from the node";
const BY_MEMORY: &str = "kernels choose it by the machine's memory";
const ONE_NETWORK: &str = "in the guest it is the kernel's first network namespace";

/// What a container finds.
pub(crate) const ROWS: &[Row] = &[
    same(
        "a process's status",
        "grep -E '^(Umask|State|Uid|Gid|FDSize|Groups|Threads|Sig[BIC]|Shd|Cap|NoNewPrivs|Seccomp|Cpus_allowed:)' /proc/self/status",
    ),
    same("its limits", "cat /proc/self/limits"),
    same("its limits by the shell", "ulimit -a"),
    same(
        "its namespaces",
        "ls /proc/self/ns; cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups",
    ),
    but(
        "its score, niceness, scheduling",
        "cat /proc/self/oom_score_adj /proc/self/coredump_filter /proc/self/timerslack_ns /proc/self/personality; nice; cut -d' ' -f18,19,41 /proc/self/stat",
        &[instead("1\n", "0\n", "the specification says nothing, and runc's container has its shim's")],
    ),
    but(
        "its session and login",
        "cat /proc/self/loginuid && echo; cat /proc/self/sessionid && echo; cut -d' ' -f6,7 /proc/1/stat",
        &[
            instead(
                "4294967295\n",
                "cat: can't open '/proc/self/loginuid': No such file or directory\n",
                LACKS,
            ),
            instead(
                "4294967295\n",
                "cat: can't open '/proc/self/sessionid': No such file or directory\n",
                LACKS,
            ),
        ],
    ),
    same(
        "its open files",
        "ls -l /proc/self/fd 2>/dev/null | awk 'NR > 1 && $9 < 3 { sub(/:.*/, \"\", $11); print $1, $9, $11 }'; ls /proc/self/fd | wc -l",
    ),
    same(
        "process 1",
        "tr '\\0' ' ' </proc/1/environ; echo; cat /proc/1/comm; ls -l /proc/1/exe /proc/1/cwd /proc/1/root | sed 's/.* \\//\\//'; echo $PPID $$ | wc -w",
    ),
    same(
        "processes",
        "ps -o pid,ppid,user,comm | head -n 2; kill -0 1; echo $?; kill -9 1; echo $?; kill -9 99999",
    ),
    same(
        "signals",
        "sleep 100 & kill -TERM $!; wait $!; echo $?; sleep 100 & kill -KILL $!; wait $!; echo $?; trap 'echo caught' USR1; kill -USR1 $$; sh -c 'kill -SEGV $$'; echo $?; kill -l | md5sum",
    ),
    same("who", "id; whoami; groups; umask; pwd; env | sort; tty; echo $HOME"),
    same(
        "names of the host",
        "hostname; cat /proc/sys/kernel/hostname /proc/sys/kernel/domainname; uname -s; uname -m; uname -n",
    ),
    but(
        "devices",
        "ls -lA /dev | awk 'NR > 1 { name = $0; sub(/.*:[0-9][0-9] /, \"\", name); print $1, $3, $4, ($1 ~ /^[bc]/ ? $5 $6 : \"\"), name }'; ls -l /dev/pts | awk 'NR > 1 { print $1, $NF }'",
        &[instead(
            "lrwxrwxrwx root root  core -> /proc/kcore\n",
            "",
            "the guest's kernel has no /proc/kcore",
        )],
    ),
    same(
        "devices work",
        "head -c 3 /dev/zero | wc -c; echo x >/dev/null; (echo x >/dev/full); head -c 8 /dev/urandom | wc -c; head -c 8 /dev/random | wc -c; (: </dev/tty)",
    ),
    same(
        "devices that are made",
        "mknod d c 1 3; cat d; mknod m c 1 1; cat m; mknod b b 8 0; head -c 1 b; mknod k c 1 11; head -c 1 k; stat -c '%F %t:%T' d m b",
    ),
    but(
        "masked and read-only paths",
        "for p in /proc/kcore /proc/keys /proc/timer_list /proc/acpi /proc/scsi /sys/firmware /proc/latency_stats /proc/sched_debug; do [ -e $p ] && stat -c '%A %n' $p; done; for p in /proc/sys/kernel/hostname /proc/sysrq-trigger /proc/irq/default_smp_affinity /proc/bus/x /sys/x /proc/sys/vm/drop_caches; do (echo 1 >$p); done",
        &[
            instead("crw-rw-rw- /proc/kcore\n", "", LACKS),
            instead("drwxrwxrwt /proc/acpi\n", "", LACKS),
            instead("drwxrwxrwt /sys/firmware\n", "drwxr-xr-x /sys/firmware\n", "it is empty already"),
            instead(
                "can't create /proc/sysrq-trigger: Read-only file system",
                "can't create /proc/sysrq-trigger: nonexistent directory",
                LACKS,
            ),
        ],
    ),
    but(
        "what is in /proc",
        "echo lacks; cd /proc; for f in acpi buddyinfo bus cgroups cmdline consoles cpuinfo crypto devices diskstats driver execdomains fb filesystems fs interrupts iomem ioports irq kallsyms kcore key-users keys kmsg loadavg locks meminfo misc modules mounts mtrr net pagetypeinfo partitions pressure schedstat self slabinfo softirqs stat swaps sys sysrq-trigger sysvipc thread-self timer_list tty uptime version vmallocinfo vmstat zoneinfo; do [ -e $f ] || echo $f; done",
        &[instead(
            "lacks\n",
            "lacks\nacpi\nfb\nkcore\nmodules\nmtrr\nschedstat\nslabinfo\nswaps\nsysrq-trigger\n",
            LACKS,
        )],
    ),
    but(
        "what is in /sys",
        "ls /sys | grep -v hypervisor; ls /sys/class/net; ls /sys/fs/cgroup 2>&1 | head -n 3",
        &[instead("power\n", "", LACKS)],
    ),
    but(
        "/proc/self",
        "echo lacks; cd /proc/self; for f in attr autogroup auxv cgroup clear_refs cmdline comm coredump_filter cpuset cwd environ exe fd fdinfo gid_map io limits loginuid map_files maps mem mountinfo mounts mountstats net ns numa_maps oom_adj oom_score oom_score_adj pagemap personality projid_map root sched schedstat sessionid setgroups smaps smaps_rollup stack stat statm status syscall task timens_offsets timers timerslack_ns uid_map wchan; do [ -e $f ] || echo $f; done",
        &[instead(
            "lacks\n",
            "lacks\nautogroup\ncpuset\nloginuid\nnuma_maps\nsched\nschedstat\nsessionid\nstack\ntimers\n",
            LACKS,
        )],
    ),
    same(
        "privileges",
        "mount -t tmpfs none /mnt; mount -o bind / /mnt; hostname x; chroot / true; echo $?; date -s 2020-01-01; ifconfig lo 127.0.0.2; dmesg | head -n 1; swapoff -a; nice -n -5 true; renice -n -1 $$; ulimit -n 1000000; insmod x.ko; reboot -f",
    ),
    same(
        "namespaces of one's own",
        "unshare -U id -u; unshare -m true; echo $?; unshare -n true; echo $?; unshare -p true; echo $?; unshare -r sh -c 'mount -t tmpfs none /mnt && echo mounted; hostname inner'",
    ),
    same(
        "network",
        "ifconfig -a | grep -v packets | grep -v bytes; route -n; ping -c 1 -W 1 127.0.0.1 | grep -c '1 packets received'; ping -c 1 -W 1 192.0.2.1; cat /proc/net/dev | wc -l; nc 127.0.0.1 1; ls /proc/net | md5sum | wc -l",
    ),
    but(
        "parameters of the network",
        "cd /proc/sys/net; for p in ipv4/ip_forward ipv4/ip_local_port_range ipv4/ip_unprivileged_port_start ipv4/ping_group_range ipv4/tcp_syncookies ipv4/tcp_keepalive_time ipv4/tcp_fin_timeout ipv4/tcp_rmem ipv4/tcp_wmem ipv4/tcp_congestion_control ipv4/ip_default_ttl ipv4/tcp_tw_reuse ipv4/tcp_max_syn_backlog core/somaxconn core/rmem_max core/wmem_max ipv4/conf/all/rp_filter ipv4/conf/all/forwarding ipv4/conf/default/rp_filter ipv6/conf/all/disable_ipv6 ipv6/conf/default/accept_ra unix/max_dgram_qlen; do set -- $p $(cat $p); case $p in *mem) set -- $1 $2 $3 $(($4 >> 20))M;; esac; echo $*; done",
        &[
            instead("ip_forward 1\n", "ip_forward 0\n", NO_NETWORK),
            instead("tcp_rmem 4096 131072 6M\n", "tcp_rmem 4096 131072 1M\n", BY_MEMORY),
            instead("tcp_wmem 4096 16384 4M\n", "tcp_wmem 4096 16384 1M\n", BY_MEMORY),
            instead("tcp_max_syn_backlog 256\n", "tcp_max_syn_backlog 128\n", BY_MEMORY),
            instead(
                "cat: can't open 'core/rmem_max': No such file or directory\ncore/rmem_max\n",
                "core/rmem_max 212992\n",
                ONE_NETWORK,
            ),
            instead(
                "cat: can't open 'core/wmem_max': No such file or directory\ncore/wmem_max\n",
                "core/wmem_max 212992\n",
                ONE_NETWORK,
            ),
            instead("all/forwarding 1\n", "all/forwarding 0\n", NO_NETWORK),
        ],
    ),
    but(
        "parameters of the kernel",
        "cd /proc/sys; for p in kernel/pid_max kernel/randomize_va_space kernel/core_pattern kernel/core_uses_pid kernel/shmmax kernel/shmall kernel/shmmni kernel/msgmax kernel/msgmnb kernel/sem kernel/cap_last_cap kernel/ngroups_max kernel/dmesg_restrict kernel/kptr_restrict kernel/perf_event_paranoid kernel/unprivileged_bpf_disabled kernel/yama/ptrace_scope kernel/panic_on_oops kernel/sched_rt_runtime_us vm/overcommit_memory vm/overcommit_ratio vm/max_map_count vm/swappiness vm/mmap_min_addr vm/dirty_ratio vm/panic_on_oom vm/oom_kill_allocating_task fs/nr_open fs/pipe-max-size fs/pipe-user-pages-soft fs/lease-break-time fs/leases-enable fs/protected_hardlinks fs/protected_symlinks fs/protected_fifos fs/protected_regular fs/suid_dumpable fs/inotify/max_user_instances fs/inotify/max_queued_events fs/mqueue/msg_max fs/mqueue/msgsize_max; do echo $p $(cat $p); done",
        &[
            instead(
                "kernel/yama/ptrace_scope 0\n",
                "cat: can't open 'kernel/yama/ptrace_scope': No such file or directory\nkernel/yama/ptrace_scope\n",
                LACKS,
            ),
            instead("panic_on_oops 0\n", "panic_on_oops 1\n", "a guest whose kernel is broken ends"),
        ],
    ),
    same(
        "the time",
        "[ $(($(date +%s) - $(stat -c %Y .))) -lt 3 ] && echo close; date +%Z; [ -e /proc/uptime ] && awk '{ print ($1 > 0) }' /proc/uptime; adjtimex 2>/dev/null | grep -c tick",
    ),
    but(
        "memory",
        "awk '/^(HugePages_Total|Hugepagesize|SwapTotal)/' /proc/meminfo; cat /proc/swaps | wc -l; cat /sys/kernel/mm/transparent_hugepage/enabled",
        &[
            instead(
                "1\n",
                "cat: can't open '/proc/swaps': No such file or directory\n0\n",
                "there is no swap space",
            ),
            instead(
                "[always] madvise never",
                "always madvise [never]",
                "kernels of machines with less than 512 MiB make no huge pages",
            ),
        ],
    ),
    same(
        "shared memory and queues",
        "ipcs | grep -c .; ls -d /dev/mqueue; df -k /dev/shm | awk 'END { print $2 }'",
    ),
    same("a long pipe", "head -c 3000000 /dev/zero | wc -c; yes | head -n 100000 | md5sum"),
    same(
        "many processes",
        "for i in $(seq 60); do sleep 0.5 & done; ps | grep -c '[s]leep 0.5'; wait; echo done",
    ),
    same("an orphan", "sh -c '(sleep 0.3; ps -o ppid,comm | grep -c \"1 sleep\") &' ; sleep 0.5"),
    same(
        "files in /etc and /",
        "ls -la / | awk 'NR > 3 { print $1, $3, $4, $NF }'; ls -la /etc | awk 'NR > 3 { print $1, $3, $4, $5, $NF }'",
    ),
    same(
        "the CPU",
        "grep -c ^processor /proc/cpuinfo; cat /sys/devices/system/cpu/online; getconf _NPROCESSORS_ONLN 2>/dev/null; nproc",
    ),
    but(
        "attributes of security modules",
        "cat /proc/self/attr/current; echo $?",
        &[instead(
            "unconfined\n0\n",
            "cat: read error: Invalid argument\n1\n",
            "the guest's kernel has no AppArmor",
        )],
    ),
];

/// In a container with limits and a control group file system.
pub(crate) const LIMITS: &[Row] = &[
    same("control group", "cat /proc/self/cgroup; awk '{ print $3, $4 }' /proc/mounts | grep cgroup"),
    but(
        "files of the control group",
        "echo lacks; cd /sys/fs/cgroup; for f in cgroup.controllers cgroup.events cgroup.freeze cgroup.kill cgroup.max.depth cgroup.max.descendants cgroup.pressure cgroup.procs cgroup.stat cgroup.subtree_control cgroup.threads cgroup.type cpu.idle cpu.max cpu.max.burst cpu.pressure cpu.stat cpu.weight cpu.weight.nice cpuset.cpus cpuset.cpus.effective cpuset.mems io.max io.pressure io.stat memory.current memory.events memory.events.local memory.high memory.low memory.max memory.min memory.numa_stat memory.oom.group memory.peak memory.pressure memory.reclaim memory.stat memory.swap.current memory.swap.events memory.swap.high memory.swap.max pids.current pids.events pids.max; do [ -e $f ] || echo $f; done",
        &[instead(
            "lacks\n",
            "lacks\nmemory.numa_stat\nmemory.swap.current\nmemory.swap.events\nmemory.swap.high\nmemory.swap.max\n",
            "there is no swap space, and one memory",
        )],
    ),
    but(
        "limits of the control group",
        "cd /sys/fs/cgroup; for f in memory.max memory.high memory.low memory.min memory.swap.max memory.oom.group cpu.max cpu.weight pids.max cgroup.type cgroup.controllers cgroup.subtree_control cgroup.freeze cgroup.events; do echo $f $(cat $f); done",
        &[
            instead(
                "memory.swap.max 0\n",
                "cat: can't open 'memory.swap.max': No such file or directory\nmemory.swap.max\n",
                "there is no swap space",
            ),
            instead(
                "cpu.weight 20\n",
                "cpu.weight 59\n",
                "512 shares are converted as runc does since 1.3.2",
            ),
            instead(" rdma misc\n", "\n", LACKS),
        ],
    ),
    same(
        "what is counted",
        "cd /sys/fs/cgroup; for f in memory.stat cpu.stat memory.events pids.events; do echo $f $(awk '{ print $1 }' $f | head -n 3); done; cat pids.current cgroup.procs | wc -l; [ $(cat memory.current) -gt 0 ] && echo counts",
    ),
    same(
        "pressure",
        "cd /sys/fs/cgroup; for f in *.pressure /proc/pressure/*; do echo $f $(cut -d= -f1 $f); done",
    ),
    same("the control group is read-only", "mkdir /sys/fs/cgroup/x; echo 1 >/sys/fs/cgroup/pids.max"),
    same(
        "memory enough for the limit",
        "awk '/^MemTotal/ { print ($2 >= 128 * 1024) }' /proc/meminfo; dd if=/dev/zero of=/dev/null bs=90000000 count=1 2>&1 | tail -n 1 | cut -d' ' -f1-2",
    ),
    same(
        "more memory than the limit",
        "dd if=/dev/zero of=/dev/null bs=200000000 count=1 2>/dev/null; echo $?; cat /sys/fs/cgroup/memory.events | grep oom_kill",
    ),
    same(
        "more processes than the limit",
        "for i in $(seq 120); do sleep 1 & done 2>&1 | grep -c fork; wait; cat /sys/fs/cgroup/pids.events",
    ),
    same(
        "files in a volume in memory count",
        "dd if=/dev/zero of=/m/f bs=1M count=20 2>/dev/null; stat -c %s /m/f; rm /m/f",
    ),
];

/// In a container with every privilege.
pub(crate) const PRIVILEGED: &[Row] = &[
    but(
        "trusted attributes",
        "cd /v; mkdir t; cd t; probe attributes; cd ..; rm -r t",
        &[instead(
            "system.posix_acl_access EOPNOTSUPP\nget ENODATA\nsystem.posix_acl_default EOPNOTSUPP\nget ENODATA\n",
            "system.posix_acl_access EOPNOTSUPP\nget EOPNOTSUPP\nsystem.posix_acl_default EOPNOTSUPP\nget EOPNOTSUPP\n",
            LISTS,
        )],
    ),
    same(
        "overlay on a volume",
        "cd /v; mkdir o o/low o/up o/work o/all; echo 1 >o/low/a; echo 2 >o/low/b; mkdir o/low/d; mount -t overlay -o lowerdir=o/low,upperdir=o/up,workdir=o/work none o/all && { rm o/all/a; echo 3 >>o/all/b; rmdir o/all/d; mkdir o/all/d; ls o/all; cat o/all/b; umount o/all; ls -l o/up | awk 'NR > 1 { print $1, $NF }'; }; rm -rf o",
    ),
    same(
        "a tmpfs, a bind, a remount",
        "mkdir a b; mount -t tmpfs -o size=1m,mode=700 none a; stat -c %a a; mount --bind a b; touch b/x; ls a; mount -o remount,ro b; umount b a",
    ),
    same(
        "nested /proc and devpts",
        "mkdir p; mount -t proc none p && ls p/self/status && umount p; mount -t devpts -o newinstance none p && ls p && umount p",
    ),
    same(
        "a loop device's file",
        "dd if=/dev/zero of=/v/img bs=1M count=2 2>/dev/null; mke2fs /v/img 2>&1 | grep -c superblock; rm -f /v/img",
    ),
    same("capabilities", "grep Cap /proc/self/status"),
];
