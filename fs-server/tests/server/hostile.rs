//! What a hostile guest may send, through the real binary: it never dies, never hangs, never leaves its tree.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};

use crate::client::{ROOT, Server, bytes, expect_open_fds, mount_tmpfs, name_bytes, op, open_fds, read_body};

/// Xorshift64*: the same sequence each run, so that a failure repeats.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// The line of `/proc/<task>/status`, without its name.
fn status(task: &Path, name: &str) -> String {
    let text = fs::read_to_string(task.join("status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).trim().to_owned()
}

#[test]
fn every_thread_is_locked_up_by_one_filter() {
    let mut server = Server::start();
    let filters = |task: &Path| status(task, "Seccomp_filters").parse::<u32>().unwrap();
    let inherited = filters(Path::new("/proc/thread-self"));
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    let tasks: Vec<_> = tasks.map(|task| task.unwrap().path()).collect();
    assert_eq!(tasks.len(), 9, "four workers for each socket, and one that watches the mounts");
    for task in tasks {
        assert_eq!(status(&task, "Seccomp"), "2", "{task:?} has filters");
        assert_eq!(filters(&task), inherited + 1, "{task:?} has ours, once");
        assert_eq!(status(&task, "NoNewPrivs"), "1", "{task:?}");
    }
    server.assert_alive();
}

#[test]
fn names_that_leave_the_directory_are_refused() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    for name in ["..", ".", "", "/", "../c1", "a/b", "/etc/passwd"] {
        assert_eq!(server.fuse.lookup(rootfs, name), Err(libc::EINVAL), "{name:?}");
        assert_eq!(server.fuse.lookup(ROOT, name), Err(libc::EINVAL), "{name:?}");
        assert_eq!(server.fuse.mkdir(rootfs, name, 0o755), Err(libc::EINVAL), "{name:?}");
        assert_eq!(server.fuse.create(rootfs, name, libc::O_RDWR, 0o644).map(|_| ()), Err(libc::EINVAL));
        assert_eq!(server.fuse.call(op::UNLINK, rootfs, &name_bytes(name)), Err(libc::EINVAL), "{name:?}");
    }
    assert_eq!(server.fuse.lookup(rootfs, &"x".repeat(256)), Err(libc::ENAMETOOLONG));
    server.assert_alive();
}

/// What the host mounts into a shared directory later is not for the guest when it is no file system with files.
#[test]
fn the_hosts_kernel_interfaces_are_not_entered() {
    let mut server = Server::start();
    let mounted = server.node("c1/mounts/0");
    let (none, no_flags) = (None::<&str>, MsFlags::empty());
    let points = ["proc", "sys", "cgroup", "devpts", "mqueue", "dev", "loose", "tmp", "below"];
    for name in points {
        fs::create_dir(server.path("c1/mounts/0").join(name)).unwrap();
    }
    fs::write(server.path("c1/mounts/0/file"), "").unwrap();
    let at = |name: &str| server.shared.path().join("c1/mounts/0").join(name);
    for (kind, name) in [
        ("proc", "proc"),
        ("sysfs", "sys"),
        ("cgroup2", "cgroup"),
        ("devpts", "devpts"),
        ("mqueue", "mqueue"),
    ] {
        mount(Some("none"), &at(name), Some(kind), no_flags, none)
            .unwrap_or_else(|errno| panic!("{kind}: {errno}"));
    }
    // What can't be told from the host's /dev, then the real one, a good one, and a single file of procfs.
    mount(Some("none"), &at("loose"), Some("tmpfs"), no_flags, none).unwrap();
    mount(Some("none"), &at("dev"), Some("devtmpfs"), MsFlags::MS_NOSUID, none).unwrap();
    mount_tmpfs(&at("tmp"));
    fs::create_dir(at("tmp/below")).unwrap();
    mount(Some("none"), &at("tmp/below"), Some("proc"), no_flags, none).unwrap();
    mount(Some("/proc/sys/kernel/core_pattern"), &at("file"), none, MsFlags::MS_BIND, none).unwrap();

    let plus = read_body(server.fuse.opendir(mounted).unwrap(), 0, 64 * 1024);
    let listed = server.fuse.call(op::READDIRPLUS, mounted, &plus).unwrap();
    for name in ["proc", "sys", "cgroup", "devpts", "mqueue", "loose", "dev", "file"] {
        assert_eq!(server.fuse.lookup(mounted, name), Err(libc::EACCES), "{name}");
        let opened = server.fuse.create(mounted, name, libc::O_RDWR, 0o644).map(|_| ());
        assert_eq!(opened, Err(libc::EACCES), "{name}: nor by creating what is there");
        assert!(
            listed.windows(name.len()).any(|found| found == name.as_bytes()),
            "{name} is listed by its name"
        );
    }
    let tmp = server.fuse.lookup(mounted, "tmp").unwrap().node;
    assert_eq!(server.fuse.lookup(tmp, "below"), Err(libc::EACCES));
    server.assert_alive();
}

#[test]
fn symbolic_links_are_never_followed() {
    let mut server = Server::start();
    symlink("/", server.path("c1/rootfs/absolute")).unwrap();
    symlink("../../../..", server.path("c1/rootfs/relative")).unwrap();
    let rootfs = server.rootfs();
    for name in ["absolute", "relative"] {
        let link = server.fuse.lookup(rootfs, name).unwrap();
        assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(server.fuse.lookup(link.node, "etc"), Err(libc::ENOTDIR));
        assert_eq!(server.fuse.opendir(link.node), Err(libc::ENXIO));
        assert_eq!(server.fuse.open(link.node, libc::O_RDONLY), Err(libc::ENXIO));
        let opened = server.fuse.create(rootfs, name, libc::O_RDWR, 0o644).map(|_| ());
        assert_eq!(opened, Err(libc::ENXIO), "nor by creating what is there");
    }
}

#[test]
fn nothing_but_files_and_directories_is_opened() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    nix::unistd::mkfifo(&server.path("c1/rootfs/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(server.path("c1/rootfs/socket")).unwrap();
    let null = nix::sys::stat::makedev(1, 3);
    let device = server.path("c1/rootfs/null");
    nix::sys::stat::mknod(&device, nix::sys::stat::SFlag::S_IFCHR, nix::sys::stat::Mode::S_IRWXU, null)
        .unwrap();
    for name in ["fifo", "socket", "null"] {
        let node = server.fuse.lookup(rootfs, name).unwrap().node;
        // As many as there are workers and more: had one of these blocked, the last would have nobody to answer.
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY, libc::O_WRONLY] {
            assert_eq!(server.fuse.open(node, flags), Err(libc::ENXIO), "{name}");
        }
        assert_eq!(server.fuse.setattr(node, 8, 0, 0, (0, 0)), Err(libc::EINVAL), "truncate {name}");
    }
    for kind in [libc::S_IFDIR, libc::S_IFLNK] {
        let body = [bytes(&[kind | 0o666, 0x103, 0, 0]), name_bytes("node")].concat();
        assert!(server.fuse.call(op::MKNOD, rootfs, &body).is_err());
    }
    server.assert_alive();
}

#[test]
fn lengths_that_lie_are_refused_or_dropped() {
    let mut server = Server::start();
    // Too short for a header, or the header's length is not the packet's: there is nothing to answer.
    for length in [1, 39] {
        server.fuse.send(&vec![0; length]);
    }
    for claimed in [0u32, 39, 41, 1 << 20, u32::MAX] {
        let mut packet = server.fuse.packet(op::STATFS, ROOT, &[]);
        packet[..4].copy_from_slice(&claimed.to_le_bytes());
        server.fuse.send(&packet);
    }
    let giant = server.fuse.packet(op::WRITE, ROOT, &vec![0; 140 * 1024]);
    server.fuse.send(&giant);
    server.assert_alive();
    // Bodies of the wrong size are answered.
    for opcode in
        [op::GETATTR, op::SETATTR, op::READ, op::OPEN, op::RELEASE, op::FALLOCATE, op::LSEEK, op::INIT]
    {
        for length in [0, 1, 7, 9, 100] {
            assert_eq!(server.fuse.call(opcode, ROOT, &vec![0xff; length]), Err(libc::EINVAL), "{opcode}");
        }
    }
    // Sizes inside that are larger than any reply.
    let rootfs = server.rootfs();
    let (file, handle) = server.fuse.create(rootfs, "f", libc::O_RDWR, 0o644).unwrap();
    server.fuse.write(file.node, handle, 0, &[7; 128 * 1024], 0).unwrap();
    server.fuse.write(file.node, handle, 128 * 1024, &[7; 128 * 1024], 0).unwrap();
    for size in [1 << 20, u32::MAX] {
        let read = server.fuse.read(file.node, handle, 0, size).unwrap();
        assert!(read.len() >= 128 * 1024 && read.len() < 136 * 1024, "{}", read.len());
    }
    let directory = server.fuse.opendir(rootfs).unwrap();
    assert_eq!(server.fuse.names(rootfs, directory, u32::MAX), Err(libc::ENOMEM));
    for offset in [1, 1 << 62, u64::MAX] {
        let _any = server.fuse.call(op::READDIR, rootfs, &read_body(directory, offset, 4096));
        let _any = server.fuse.read(file.node, handle, offset, 4096);
    }
    server.assert_alive();
}

#[test]
fn unknown_nodes_and_handles_are_errors() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    let (file, handle) = server.fuse.create(rootfs, "f", libc::O_RDWR, 0o644).unwrap();
    for node in [0, 2_000_000, u64::MAX] {
        assert_eq!(server.fuse.getattr(node), Err(libc::ESTALE));
        assert_eq!(server.fuse.open(node, libc::O_RDONLY), Err(libc::ESTALE));
        assert_eq!(server.fuse.read(node, handle, 0, 1), Err(libc::EBADF), "a handle of another node");
    }
    assert_eq!(server.fuse.read(file.node, handle + 1, 0, 1), Err(libc::EBADF));
    assert_eq!(server.fuse.release(rootfs, handle), Err(libc::EBADF));
    // Forgetting more than was looked up, again and again, or the root.
    for _ in 0..3 {
        server.fuse.forget(file.node, u64::MAX);
        server.fuse.forget(ROOT, u64::MAX);
        server.fuse.forget(12345, 1);
    }
    assert_eq!(server.fuse.getattr(file.node), Err(libc::ESTALE));
    assert!(server.fuse.lookup(rootfs, "f").is_ok());
    server.assert_alive();
}

#[test]
fn descriptors_are_bounded_and_come_back() {
    let mut server = Server::start_with_files(512);
    let rootfs = server.rootfs();
    let before = open_fds(server.pid());
    for number in 0..400 {
        fs::write(server.path(&format!("c1/rootfs/f{number}")), "").unwrap();
    }
    let results: Vec<_> = (0..400).map(|number| server.fuse.lookup(rootfs, &format!("f{number}"))).collect();
    let nodes: Vec<u64> = results.iter().flatten().map(|entry| entry.node).collect();
    assert!((200..300).contains(&nodes.len()), "{}", nodes.len());
    assert!(results[nodes.len()..].iter().all(|result| *result == Err(libc::ENFILE)));
    let mut handles = Vec::new();
    let error = loop {
        match server.fuse.open(nodes[0], libc::O_RDONLY) {
            Ok(handle) => handles.push(handle),
            Err(errno) => break errno,
        }
    };
    assert_eq!(error, libc::ENFILE);
    assert!(handles.len() >= 30, "inodes leave room for open files: {}", handles.len());
    assert_eq!(server.fuse.create(rootfs, "new", libc::O_RDWR, 0o644).map(|_| ()), Err(libc::ENFILE));
    assert!(!server.path("c1/rootfs/new").exists(), "a refused request has no effect");
    assert!(open_fds(server.pid()) < 512);
    for handle in handles {
        server.fuse.release(nodes[0], handle).unwrap();
    }
    for node in nodes {
        server.fuse.forget(node, 1);
    }
    server.assert_alive();
    expect_open_fds(server.pid(), before);
}

#[test]
fn a_new_session_starts_from_nothing() {
    let mut server = Server::start();
    let before = open_fds(server.pid());
    let rootfs = server.rootfs();
    let (file, handle) = server.fuse.create(rootfs, "f", libc::O_RDWR, 0o644).unwrap();
    server.fuse.init();
    expect_open_fds(server.pid(), before);
    assert_eq!(server.fuse.read(file.node, handle, 0, 1), Err(libc::EBADF));
    assert_eq!(server.fuse.getattr(file.node), Err(libc::ESTALE));
    assert!(server.fuse.lookup(ROOT, "c1").is_ok());
}

#[test]
fn mounting_and_unmounting_for_ever_leaves_nothing() {
    let mut server = Server::start();
    fs::create_dir_all(server.path("c2/rootfs")).unwrap();
    let container = server.node("c2");
    let before = open_fds(server.pid());
    let mut numbers = HashSet::new();
    for _ in 0..600 {
        mount_tmpfs(&server.path("c2/rootfs"));
        let rootfs = server.fuse.lookup(container, "rootfs").unwrap();
        let (file, handle) = server.fuse.create(rootfs.node, "f", libc::O_RDWR, 0o644).unwrap();
        numbers.insert(file.attr.number);
        server.fuse.release(file.node, handle).unwrap();
        server.fuse.forget(file.node, 1);
        server.fuse.forget(rootfs.node, 1);
        nix::mount::umount2(&server.path("c2/rootfs"), nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
    expect_open_fds(server.pid(), before);
    assert!(numbers.len() < 10, "the number of a mount that is gone is used again: {numbers:?}");
}

#[test]
fn random_bytes_never_kill_it() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    let (file, handle) = server.fuse.create(rootfs, "f", libc::O_RDWR, 0o644).unwrap();
    let directory = server.fuse.opendir(rootfs).unwrap();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let end = Instant::now() + Duration::from_secs(5);
    let mut sent = 0u32;
    while Instant::now() < end {
        for _ in 0..20 {
            server.fuse.send(&nonsense(&mut random, &[1, rootfs, file.node, handle, directory]));
            sent += 1;
        }
        // Collect what came back, so that neither side ever waits for the other.
        server.fuse.socket.set_nonblocking(true).unwrap();
        while server.fuse.socket.recv(&mut [0; 16]).is_ok() {}
        server.fuse.socket.set_nonblocking(false).unwrap();
    }
    assert!(sent > 10_000, "only {sent} messages in five seconds");
    // Replies that are still on their way, then an answer to a sound request. Its threads may answer in another order.
    let packet = server.fuse.packet(op::STATFS, ROOT, &[]);
    let unique = crate::client::u64_at(&packet, 8);
    server.fuse.send(&packet);
    while server.fuse.receive().0 != unique {}
}

/// A message that is mostly right in its header and random in the rest.
fn nonsense(random: &mut Random, interesting: &[u64]) -> Vec<u8> {
    const SIZES: [u64; 12] = [0, 1, 8, 16, 17, 24, 32, 40, 56, 64, 88, 300];
    let mut length = SIZES[random.below(12) as usize];
    if random.below(4) == 0 {
        length += random.below(300);
    }
    let mut body: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
    // Fields that mean something, so that not everything ends at the first check.
    for field in body.chunks_exact_mut(8) {
        match random.below(4) {
            0 => field.copy_from_slice(&interesting[random.below(5) as usize].to_le_bytes()),
            1 => field.copy_from_slice(&random.below(300).to_le_bytes()),
            _ => {}
        }
    }
    if random.below(2) == 0 {
        let names: [&[u8]; 6] = [b"f\0", b"..\0", b"a/b\0", b"x\0y\0", b"user.x\0", b"\0"];
        body.extend(names[random.below(6) as usize]);
    }
    let mut packet = (40 + body.len() as u32).to_le_bytes().to_vec();
    // Not opcode 38, which ends the session and with it what the loop plays with.
    let opcode =
        [1 + random.below(37), 39 + random.below(15), random.next()][random.below(8).min(2) as usize];
    packet.extend((opcode as u32).to_le_bytes());
    packet.extend((1 << 40 | random.below(1000)).to_le_bytes());
    packet.extend(interesting[random.below(3) as usize].to_le_bytes());
    let ids = [0, 1000, u32::MAX, random.next() as u32];
    packet.extend(bytes(&[ids[random.below(4) as usize], ids[random.below(4) as usize], 0, 0]));
    packet.extend(body);
    if random.below(50) == 0 {
        packet.truncate(random.below(60) as usize + 1);
    }
    packet
}

#[test]
fn it_is_jailed() {
    let mut server = Server::start();
    server.assert_alive();
    let proc = format!("/proc/{}", server.pid());
    let threads = fs::read_dir(format!("{proc}/task")).unwrap();
    for thread in threads {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        assert_eq!(field("Seccomp:"), "2");
        assert_eq!(field("NoNewPrivs:"), "1");
        // chown, dac_override, fowner, fsetid, setgid, setuid, setfcap
        for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
            assert_eq!(field(set), "00000000800000db", "{set}");
        }
        assert_eq!(field("CapInh:"), "0000000000000000");
        assert_eq!(field("CapAmb:"), "0000000000000000");
    }
    for namespace in ["user", "mnt", "ipc", "uts"] {
        let theirs = fs::read_link(format!("{proc}/ns/{namespace}")).unwrap();
        assert_ne!(
            theirs,
            fs::read_link(format!("/proc/thread-self/ns/{namespace}")).unwrap(),
            "{namespace}"
        );
    }
    let mounts = fs::read_to_string(format!("{proc}/mountinfo")).unwrap();
    let targets: Vec<&str> = mounts.lines().map(|line| line.split(' ').nth(4).unwrap()).collect();
    assert_eq!(targets, ["/", "/c1/rootfs", "/c1/mounts/0"]);
    // The standard streams, the table of mounts; and for each session socket, shared directory and its own descriptors.
    assert!(open_fds(server.pid()) <= 10);
}

#[test]
fn the_end_of_the_socket_ends_it() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    let _open = server.fuse.create(rootfs, "f", libc::O_RDWR, 0o644).unwrap();
    server.fuse.socket.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn started_wrongly_it_says_so() {
    let run = |arguments: &[&str]| {
        let output =
            std::process::Command::new(env!("CARGO_BIN_EXE_bulkhead-fs")).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let usage = run(&["--help"]);
    assert!(usage.starts_with("bulkhead-fs: it takes no arguments"), "{usage}");
    assert_eq!(usage.lines().count(), 1);
}
