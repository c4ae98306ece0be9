//! Rows about files.

use super::{Row, but, instead, same};

const SHARED: &str = "virtio-fs has no such request";
const DIRECT: &str = "the guest's kernel needs no alignment, and the node's file system is not asked";
pub(crate) const LISTS: &str = "access control lists are refused rather than kept and not followed";
const DNOTIFY: &str = "the guest's kernel has no dnotify, which inotify came for";
const ALIAS: &str = "the guest's kernel keeps what it knows by another mount";
const KIND: &str = "the file system is the share, whatever it is on the node";

/// What any file system does; each in the root file system and in volumes.
pub(crate) const ANYWHERE: &[Row] = &[
    same("kinds in a listing", "probe kinds"),
    same("O_TMPFILE", "probe temporary"),
    same("copy_file_range and FICLONE", "probe copies"),
    but(
        "holes and fallocate",
        "probe holes",
        &[instead("collapse 0\nsize 2158592\ninsert 0\n", "collapse EOPNOTSUPP\nsize 2162688\ninsert EOPNOTSUPP\n", SHARED).at(&["/v"])],
    ),
    but(
        "FIEMAP and other ioctls",
        "probe extents",
        &[
            instead("FS_IOC_GETFLAGS 0\nFS_IOC_GETVERSION ENOTTY\nFIGETBSZ EINVAL\n0\n", "FS_IOC_GETFLAGS ENOTTY\nFS_IOC_GETVERSION ENOTTY\nFIGETBSZ 0\n4096\n", SHARED).at(&["/"]),
            instead("FIEMAP 0\n1 extents\n", "FIEMAP EOPNOTSUPP\n", SHARED).at(&["/v"]),
            instead("FS_IOC_GETFLAGS 0\nFS_IOC_GETVERSION 0\nFIGETBSZ 0\n1024\n", "FS_IOC_GETFLAGS ENOTTY\nFS_IOC_GETVERSION ENOTTY\nFIGETBSZ 0\n4096\n", SHARED).at(&["/v"]),
            instead("FS_IOC_GETFLAGS 0\n", "FS_IOC_GETFLAGS ENOTTY\n", SHARED).at(&["/m"]),
        ],
    ),
    but("leases", "probe leases", &[instead("notify 0\n", "notify EINVAL\n", DNOTIFY)]),
    same("flock, fcntl and OFD locks", "probe locks"),
    same("renames", "probe renames"),
    same("files that are removed while open", "probe unlinked"),
    same("mappings", "probe mappings"),
    same("four writers that append", "probe append"),
    but(
        "O_DIRECT",
        "probe direct",
        &[instead("O_DIRECT EINVAL\n", "O_DIRECT 0\nwrite 65536\nread 8192\ncached write 3\nread 4096\nnew\nwrite 4096\ncached read 1\nd\nsize 65536\n", DIRECT).at(&["/", "/m"])],
    ),
    but(
        "O_DIRECT that is not aligned",
        "probe unaligned",
        &[
            instead("place EBADF\nlength EBADF\n", "place 4096\nlength 100\n", DIRECT).at(&["/", "/m"]),
            instead("place EINVAL\nlength EINVAL\n", "place 4096\nlength 100\n", DIRECT).at(&["/v"]),
        ],
    ),
    but(
        "times and statx",
        "probe times",
        &[instead("basic birth, 1\n", "basic -, 0\n", "the time of a file's birth is not asked for")],
    ),
    same("1,000 files removed while listed", "probe deleting"),
    same("telldir and seekdir", "probe seeking"),
    same("a set-group-id directory (CVE-2022-0358)", "probe set-group-id"),
    same("set-id bits of a user's files", "probe privileges"),
    same("sticky directories", "probe sticky"),
    same("names", "probe names"),
    but(
        "extended attributes",
        "probe attributes",
        &[
            instead("system.posix_acl_access EOPNOTSUPP\nget ENODATA\nsystem.posix_acl_default EOPNOTSUPP\nget ENODATA\n", "system.posix_acl_access EOPNOTSUPP\nget EOPNOTSUPP\nsystem.posix_acl_default EOPNOTSUPP\nget EOPNOTSUPP\n", LISTS).at(&["/v", "/m"]),
        ],
    ),
    but(
        "access control lists",
        "probe access-lists",
        &[instead("set 0\nacl 660 group 0\nopen 0\n", "set EOPNOTSUPP\nacl 600 group 0\nopen EACCES\n", LISTS)],
    ),
    same("inotify", "probe notify"),
    same("sockets", "probe sockets"),
    same("umask", "umask 027; touch f; mkdir d; mkfifo p; stat -c '%A %n' f d p"),
    same("FIFO", "mkfifo p; (echo through >p &); cat p"),
    same(
        "hard links",
        "echo 1 >a; ln a b; ln b c; echo 2 >>b; cat c; stat -c %h a; rm b; stat -c %h a c; ln a c",
    ),
    same(
        "rm -r",
        "mkdir -p a/b/c/d; touch a/1 a/b/2 a/b/c/3; for i in $(seq 300); do : >a/b/f$i; done; rm -r a; ls",
    ),
    same(
        "cp -a",
        "mkdir a; echo x >a/f; ln -s f a/l; chmod 4751 a/f; chown 5:6 a/f; touch -d @1000000000 a/f; cp -a a b; stat -c '%A %u %g %s %N' b/f b/l; stat -c %Y b/f",
    ),
    same(
        "tar",
        "mkdir a; for i in $(seq 20); do echo $i >a/$i; done; tar c a | (mkdir b; cd b; tar x); find b -type f | sort | xargs cat | md5sum",
    ),
    same(
        "a script",
        "printf '#!/bin/sh\\necho $0 $1\\n' >s; chmod 755 s; ./s word; sh ./s word; chmod 644 s; ./s",
    ),
    same(
        "a script without an interpreter",
        "printf '#!/no/such\\n' >s; chmod 755 s; ./s; printf 'echo bare\\n' >t; chmod 755 t; ./t",
    ),
    same(
        "a program that is being written",
        "cp /bin/busybox b; exec 3>>b; ./b true; echo $?; exec 3>&-; ./b true; echo $?",
    ),
    same(
        "a running program is written",
        "cp /bin/busybox sleep; ./sleep 2 & sleep 0.2; echo x >>sleep; kill $!",
    ),
    same(
        "blocks of a file",
        "dd if=/dev/zero of=f bs=4096 count=4 2>/dev/null; sync; stat -c '%b %B %s' f; truncate -s 1M s; stat -c '%b %s' s; du -k s",
    ),
    same(
        "a directory's links",
        "mkdir d; stat -c %h d; mkdir d/a d/b; stat -c %h d; rmdir d/a; stat -c %h d",
    ),
    same(
        "the wrong owner",
        "touch f; chown 12345:54321 f; stat -c '%u %g' f; chown -R 0:0 .; stat -c '%u %g' f",
    ),
    same("sync", "echo x >f; sync; sync f 2>&1; fsync f; echo $?"),
    same("mktemp and mv over", "a=$(mktemp -p .); echo 1 >$a; echo 2 >b; mv $a b; cat b; ls | wc -l"),
];

/// About what is mounted where.
pub(crate) const MOUNTS: &[Row] = &[
    same(
        "which paths share a device",
        "for p in / /v /ro /m /below /below/inner /below-ro /below-ro/inner /f /node /run /dev /dev/shm /proc /sys /alike /bin/attack-probe; do set -- $p $(stat -c %d $p); eval \"first=\\$d$2\"; [ \"$first\" ] || { eval d$2=$1; first=$1; }; echo $1 $first; done",
    ),
    same(
        "find -xdev",
        "find / -xdev -path '/alike*' ; find / -xdev | grep -c . | awk '{ print ($1 < 1000) }'; find /v -xdev -name inner; find /below -xdev | sort",
    ),
    same(
        "mount points",
        "for p in / /v /ro /m /below /below/inner /f /node /run /etc /bin/attack-probe; do mountpoint $p; done",
    ),
    same(
        "/proc/mounts: where and how",
        "awk '{ n = split($4, o, \",\"); s = o[1]; for (i = 2; i <= n; i++) if (o[i] ~ /^no|relatime|strictatime/) s = s \",\" o[i]; print $2, s }' /proc/mounts | grep -v '^/proc/' | sort",
    ),
    same(
        "mountinfo: where, how, and propagation",
        "awk '{ print $5, $6, $7 }' /proc/self/mountinfo | grep -v '^/proc/' | sort",
    ),
    same(
        "read-only volumes",
        "for p in /ro/x /ro/single /ro/node/x /below-ro/x /below-ro/inner/x; do (echo x >>$p) && echo $p is written; done; mkdir /ro/d; rm /ro/single; chmod 700 /ro/single; touch /ro/single; rm -f /below-ro/inner/x; mknod /ro/n p; ln -s x /ro/l; mv /ro/single /ro/s",
    ),
    same("read-only remounted", "mount -o remount,rw /ro; umount /ro; mount -t tmpfs none /mnt"),
    same("mount points can't be removed", "rmdir /v; rm /f; mv /m /n; mv /f /g; rmdir /below/inner"),
    same(
        "a single file",
        "cat /f; echo more >>/f; cat /v/single; echo new >/v/new; mv /v/new /v/other; rm /v/other; stat -c '%h %s' /f",
    ),
    same(
        "one file by two mounts",
        "[ $(stat -c %i /v/single) = $(stat -c %i /f) ] && echo same; mkfifo /node/p; (echo through >/node/p &); timeout 3 cat /v/node/p; rm /node/p; flock /f sleep 1 & sleep 0.3; flock -n /v/single true || echo busy; wait",
    ),
    same(
        "renames and links between mounts",
        "cd /v/node; echo x >a; ln a /node/b; mv a /node/c; ls /node; rm -f /node/c",
    ),
    but(
        "room of a file that was known by another mount",
        "used() { sync; df -k /v | awk 'END { print $3 }'; }; a=$(used); dd if=/dev/zero of=/node/f bs=1k count=500 2>/dev/null; stat -c %s /v/node/f; rm /node/f; b=$(used); echo $(((b - a) / 500)); sleep 1.2; [ -e /v/node/f ]; for try in $(seq 50); do c=$(used); [ $c = $a ] && break; sleep 0.1; done; echo $((c - a))",
        &[instead("\n0\n", "\n1\n", ALIAS)],
    ),
    same(
        "room",
        "df -k / /v /ro /m /below/inner /f /dev/shm /run | awk '{ print $2, $6 }'; sync; df -k /v /m | awk '{ print $3, $4 }'; ls -laR /v; du -ak /v; df -i /v /m | awk '{ print $2 }'",
    ),
    same(
        "room as it is used",
        "a=$(df -k /m | awk 'END { print $3 }'); dd if=/dev/zero of=/m/f bs=1M count=4 2>/dev/null; b=$(df -k /m | awk 'END { print $3 }'); echo $((b - a)); rm /m/f; sync; c=$(df -k /m | awk 'END { print $3 }'); echo $((c - a))",
    ),
    same(
        "no room",
        "dd if=/dev/zero of=/below/inner/f bs=64k count=32 2>&1 | head -n 1; stat -c %s /below/inner/f; (echo x >/below/inner/g); rm /below/inner/*; echo y >/below/inner/g; cat /below/inner/g; rm /below/inner/g",
    ),
    but(
        "kinds of file systems",
        "probe room / /v /m /dev/shm /proc /sys /dev",
        &[
            instead("/ type 794c7630", "/ type 65735546", KIND),
            instead("/v type ef53", "/v type 65735546", KIND),
            instead("/m type 1021994", "/m type 65735546", KIND),
        ],
    ),
    same(
        "numbers of 32 bits",
        "touch /x /v/x /m/x; probe numbers / /x /bin/busybox /v /v/x /v/single /ro/single /m /m/x /below/inner /f /proc /dev/null; rm /x /v/x /m/x",
    ),
    same("10,000 open files", "cd /m; mkdir o; cd o; probe open 10000; cd ..; rm -r o"),
    but(
        "a change by the node, and inotify",
        "cd /node; probe await answer; cat answer; rm answer",
        &[instead(
            "there, told\n",
            "there, not told\n",
            "the guest's kernel does not hear of changes by the node",
        )],
    ),
    same(
        "tmpfs of the container",
        "stat -c '%a %u %g' /run /dev/shm; touch /run/x; cp /bin/busybox /run/b; /run/b echo runs; cp /bin/busybox /dev/shm/b; /dev/shm/b echo runs; rm /run/* /dev/shm/*",
    ),
];
