//! File system semantics, through the real binary.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};

use crate::client::{
    FATTR_UID_GID, ROOT, Server, bytes, entry, expect_open_fds, name_bytes, op, open_fds, read_body, u32_at,
    u64_at,
};

const FATTR_MODE: u32 = 1;
const FATTR_SIZE: u32 = 8;

#[test]
fn what_is_written_is_read_and_on_the_host() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    let (file, handle) = server.fuse.create(rootfs, "f", libc::O_RDWR, 0o640).unwrap();
    let data: Vec<u8> = (0..128 * 1024u32).map(|n| (n % 251) as u8).collect();
    assert_eq!(server.fuse.write(file.node, handle, 0, &data, 0), Ok(data.len() as u32));
    assert_eq!(server.fuse.write(file.node, handle, 128 * 1024, b"end", 0), Ok(3));
    assert_eq!(server.fuse.read(file.node, handle, 0, 128 * 1024).unwrap(), data);
    assert_eq!(server.fuse.read(file.node, handle, 128 * 1024 - 1, 4096).unwrap()[1..], b"end"[..]);
    assert_eq!(server.fuse.read(file.node, handle, 1 << 40, 4096).unwrap(), b"");
    server.fuse.call(op::FSYNC, file.node, &[&handle.to_le_bytes()[..], &[0; 8]].concat()).unwrap();
    assert_eq!(fs::read(server.path("c1/rootfs/f")).unwrap().len(), 128 * 1024 + 3);
    server.fuse.release(file.node, handle).unwrap();
    assert_eq!(server.fuse.read(file.node, handle, 0, 1), Err(libc::EBADF));
    server.assert_alive();
}

#[test]
fn files_of_a_root_are_lent_at_their_second_use() {
    let mut server = Server::start();
    for (directory, mode, lent) in
        [("c1/rootfs", 0o600, 1), ("c1/rootfs", 0o4600, 0), ("c1/mounts/0", 0o600, 0)]
    {
        let parent = server.node(directory);
        let name = format!("f{mode:o}");
        let (file, handle) = server.fuse.create(parent, &name, libc::O_RDWR, mode).unwrap();
        server.fuse.lent.borrow_mut().clear();
        server.fuse.write(file.node, handle, 0, b"first", 0).unwrap();
        assert_eq!(server.fuse.lent.borrow().len(), 0);
        for _ in 0..3 {
            assert_eq!(server.fuse.read(file.node, handle, 0, 100).unwrap(), b"first");
        }
        let loans = server.fuse.lent.take();
        assert_eq!(loans.len(), lent, "{directory} {mode:o}");
        for (loan, open) in loans {
            assert_eq!((loan.node, loan.handle), (file.node, handle));
            open.write_all_at(b"by the other end", 0).unwrap();
            assert_eq!(server.fuse.read(file.node, handle, 0, 100).unwrap(), b"by the other end");
        }
    }
    // No other file's handle, and no directory.
    let rootfs = server.rootfs();
    let listed = server.fuse.opendir(rootfs).unwrap();
    for (node, handle) in [(rootfs, listed), (rootfs, 1 << 40)] {
        for _ in 0..3 {
            assert!(server.fuse.read(node, handle, 0, 100).is_err());
        }
    }
    assert_eq!(server.fuse.lent.borrow().len(), 0);
    server.assert_alive();
}

#[test]
fn in_the_session_of_roots_files_need_not_be_opened() {
    let mut server = Server::start();
    let pid = server.pid();
    let container = server.roots.lookup(ROOT, "c1").unwrap().node;
    let rootfs = server.roots.lookup(container, "rootfs").unwrap().node;
    let (file, handle) = server.roots.create(rootfs, "f", libc::O_RDWR, 0o600).unwrap();
    assert_eq!(handle, 0);
    assert_eq!(server.roots.open(file.node, libc::O_RDONLY), Err(libc::ENOSYS));
    assert_eq!(server.roots.write(file.node, 0, 0, b"first", 0), Ok(5));
    assert_eq!(server.roots.write(file.node, 0, 0, b"second", libc::O_APPEND), Ok(6));
    assert_eq!(server.roots.read(file.node, 0, 0, 100).unwrap(), b"firstsecond");
    server.roots.setattr(file.node, FATTR_SIZE, 5, 0, (0, 0)).unwrap();
    assert_eq!(server.roots.read(file.node, 0, 0, 100).unwrap(), b"first");
    assert_eq!(server.roots.lent.borrow()[0].0.node, file.node);
    server.roots.call(op::FSYNC, file.node, &[0; 16]).unwrap();
    server.roots.release(file.node, 0).unwrap();
    assert_eq!(server.roots.read(file.node, 0, 0, 100).unwrap(), b"first", "nobody said that it was closed");

    // What is only to be read is not opened to be written: it would be copied from an image's layer.
    fs::write(server.path("c1/rootfs/old"), "old").unwrap();
    let old = server.roots.lookup(rootfs, "old").unwrap().node;
    server.roots.lent.borrow_mut().clear();
    for _ in 0..3 {
        assert_eq!(server.roots.read(old, 0, 0, 100).unwrap(), b"old");
    }
    let lent = server.roots.lent.take();
    assert!(lent[0].1.write_all_at(b"new", 0).is_err());
    drop(lent);
    server.roots.write(old, 0, 0, b"new", 0).unwrap();
    assert_eq!(fs::read(server.path("c1/rootfs/old")).unwrap(), b"new");

    // Nothing is open of what the guest has forgotten, so what is removed is gone.
    let before = open_fds(pid);
    server.roots.call(op::UNLINK, rootfs, &name_bytes("f")).unwrap();
    server.roots.forget(file.node, 1);
    expect_open_fds(pid, before - 2);
    assert_eq!(server.roots.read(file.node, 0, 0, 1), Err(libc::ESTALE));
    let directory = server.roots.mkdir(rootfs, "d", 0o700).unwrap().node;
    assert_eq!(server.roots.read(directory, 0, 0, 1), Err(libc::EBADF));
    server.assert_alive();
}

#[test]
fn new_files_belong_to_the_caller() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    server.fuse.ids = (1000, 2000);
    let (file, _) = server.fuse.create(rootfs, "f", libc::O_WRONLY, 0o4755).unwrap();
    assert_eq!((file.attr.uid, file.attr.gid, file.attr.mode & 0o7777), (1000, 2000, 0o4755));
    // rootfs belongs to root and is not writable for others: the guest's kernel decides, not the host's.
    let directory = server.fuse.mkdir(rootfs, "d", 0o750).unwrap();
    assert_eq!((directory.attr.uid, directory.attr.gid), (1000, 2000));
    let fifo = [bytes(&[libc::S_IFIFO | 0o600, 0, 0, 0]), name_bytes("p")].concat();
    let fifo = entry(&server.fuse.call(op::MKNOD, rootfs, &fifo).unwrap());
    assert_eq!((fifo.attr.uid, fifo.attr.mode), (1000, libc::S_IFIFO | 0o600));
    let link = [name_bytes("l"), name_bytes("../../../etc/passwd")].concat();
    let link = entry(&server.fuse.call(op::SYMLINK, rootfs, &link).unwrap());
    assert_eq!((link.attr.uid, link.attr.mode & libc::S_IFMT), (1000, libc::S_IFLNK));
    assert_eq!(server.fuse.call(op::READLINK, link.node, &[]).unwrap(), b"../../../etc/passwd");
    let on_host = fs::symlink_metadata(server.path("c1/rootfs/d")).unwrap();
    assert_eq!((on_host.uid(), on_host.gid(), on_host.mode() & 0o7777), (1000, 2000, 0o750));
    server.fuse.ids = (0, 0);
    let (file, _) = server.fuse.create(rootfs, "roots", libc::O_WRONLY, 0o600).unwrap();
    assert_eq!((file.attr.uid, file.attr.gid), (0, 0), "the thread is itself again");
    for ids in [(u32::MAX, 0), (0, u32::MAX)] {
        server.fuse.ids = ids;
        assert_eq!(server.fuse.mkdir(rootfs, "nobodys", 0o700), Err(libc::EINVAL));
    }
}

#[test]
fn a_directory_with_setgid_passes_its_group_on() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    let directory = server.fuse.mkdir(rootfs, "d", 0o755).unwrap();
    server.fuse.setattr(directory.node, FATTR_UID_GID, 0, 0, (0, 3000)).unwrap();
    let attr = server.fuse.setattr(directory.node, FATTR_MODE, 0, 0o2775, (0, 0)).unwrap();
    assert_eq!(attr.mode & 0o7777, 0o2775);
    server.fuse.ids = (1000, 2000);
    let (file, _) = server.fuse.create(directory.node, "f", libc::O_WRONLY, 0o644).unwrap();
    assert_eq!((file.attr.uid, file.attr.gid), (1000, 3000));
}

#[test]
fn mode_owner_and_size_change() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    let (file, handle) = server.fuse.create(rootfs, "f", libc::O_RDWR, 0o644).unwrap();
    server.fuse.write(file.node, handle, 0, b"0123456789", 0).unwrap();
    let attr = server.fuse.setattr(file.node, FATTR_SIZE, 4, 0, (0, 0)).unwrap();
    assert_eq!(attr.size, 4);
    assert_eq!(server.fuse.setattr(file.node, FATTR_SIZE, 1 << 20, 0, (0, 0)).unwrap().size, 1 << 20);
    assert_eq!(server.fuse.setattr(file.node, FATTR_SIZE, u64::MAX, 0, (0, 0)), Err(libc::EFBIG));
    let attr = server.fuse.setattr(file.node, FATTR_MODE, 0, 0o6755, (0, 0)).unwrap();
    assert_eq!(attr.mode & 0o7777, 0o6755);
    let attr = server.fuse.setattr(file.node, FATTR_UID_GID, 0, 0, (7, 8)).unwrap();
    assert_eq!((attr.uid, attr.gid, attr.mode & 0o7777), (7, 8, 0o755), "set-id bits go with the owner");
    let fallocate = |mode: u32, offset: u64, length: u64| {
        [
            &handle.to_le_bytes()[..],
            &offset.to_le_bytes(),
            &length.to_le_bytes(),
            &mode.to_le_bytes(),
            &[0; 4],
        ]
        .concat()
    };
    server.fuse.call(op::FALLOCATE, file.node, &fallocate(0, 1 << 20, 4096)).unwrap();
    assert_eq!(server.fuse.getattr(file.node).unwrap().size, (1 << 20) + 4096);
    // Punch a hole and find it: FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, SEEK_HOLE.
    server.fuse.write(file.node, handle, 0, &[1; 65536], 0).unwrap();
    server.fuse.call(op::FALLOCATE, file.node, &fallocate(3, 4096, 4096)).unwrap();
    let seek = [&handle.to_le_bytes()[..], &0u64.to_le_bytes(), &4u32.to_le_bytes(), &[0; 4]].concat();
    assert_eq!(u64_at(&server.fuse.call(op::LSEEK, file.node, &seek).unwrap(), 0), 4096);
}

/// `FUSE_WRITE_KILL_SUIDGID`.
const KILL_SUIDGID: u32 = 4;

#[test]
fn set_id_bits_go_only_if_the_guest_says_so() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    let (file, handle) = server.fuse.create(rootfs, "f", libc::O_RDWR, 0o6755).unwrap();
    let write = |server: &mut Server, flags: u32| {
        let mut body = [handle.to_le_bytes(), 0u64.to_le_bytes()].concat();
        body.extend(bytes(&[4, flags, 0, 0, 0, 0]));
        body.extend(b"text");
        server.fuse.call(op::WRITE, file.node, &body).unwrap();
        server.fuse.getattr(file.node).unwrap().mode & 0o7777
    };
    assert_eq!(write(&mut server, 0), 0o6755);
    let attr = server.fuse.setattr(file.node, FATTR_SIZE, 2, 0, (0, 0)).unwrap();
    assert_eq!((attr.size, attr.mode & 0o7777), (2, 0o6755), "truncated");
    server.fuse.open(file.node, libc::O_WRONLY | libc::O_TRUNC).unwrap();
    assert_eq!(server.fuse.getattr(file.node).unwrap().mode & 0o7777, 0o6755, "opened to be truncated");
    assert_eq!(write(&mut server, KILL_SUIDGID), 0o755);
    assert_eq!(write(&mut server, 0), 0o755, "they don't come back");
    let attr = server.fuse.setattr(file.node, FATTR_MODE, 0, 0o4755, (0, 0)).unwrap();
    assert_eq!(attr.mode & 0o7777, 0o4755);
    let attr = server.fuse.setattr(file.node, FATTR_SIZE | 0x800, 1, 0, (0, 0)).unwrap();
    assert_eq!(attr.mode & 0o7777, 0o755, "FATTR_KILL_SUIDGID");

    // Requests that say nothing of it.
    let number = |number: u64| number.to_le_bytes();
    let reserve = [number(handle), number(0), number(4096), number(0)].concat();
    let copy =
        [number(handle), number(0), number(file.node), number(handle), number(8), number(1), number(0)]
            .concat();
    for (opcode, body) in [(op::FALLOCATE, reserve), (op::COPY_FILE_RANGE, copy)] {
        for (uid, left) in [(0, 0o4755), (1000, 0o755)] {
            server.fuse.ids = (0, 0);
            server.fuse.setattr(file.node, FATTR_MODE, 0, 0o4755, (0, 0)).unwrap();
            server.fuse.ids = (uid, uid);
            server.fuse.call(opcode, file.node, &body).unwrap();
            let mode = server.fuse.getattr(file.node).unwrap().mode & 0o7777;
            assert_eq!(mode, left, "request {opcode} of user {uid}");
        }
    }
}

#[test]
fn device_nodes_are_the_guests_alone() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    // Tmpfs has user attributes since Linux 6.6; the directory that the tests are in may have them before.
    for parent in [rootfs, server.node("c1/mounts/0")] {
        let make = |server: &mut Server, name: &str, mode: u32, number: u32| {
            let body = [bytes(&[mode, number, 0, 0]), name_bytes(name)].concat();
            server.fuse.call(op::MKNOD, parent, &body).map(|body| entry(&body))
        };
        server.fuse.ids = (5, 6);
        let null = make(&mut server, "null", libc::S_IFCHR | 0o640, 0x103).unwrap();
        server.fuse.ids = (0, 0);
        assert_eq!((null.attr.mode, null.attr.uid), (libc::S_IFCHR | 0o640, 5));
        let disk = make(&mut server, "disk", libc::S_IFBLK | 0o600, 0x800).unwrap();
        assert_eq!(disk.attr.mode, libc::S_IFBLK | 0o600);
        assert_eq!(make(&mut server, "disk", libc::S_IFBLK | 0o600, 0x800).map(|_| ()), Err(libc::EEXIST));
        let attr = server.fuse.setattr(null.node, FATTR_MODE, 0, 0o666, (0, 0)).unwrap();
        assert_eq!(attr.mode, libc::S_IFCHR | 0o666);
        // Nobody can make it an ordinary file, nor open it.
        assert_eq!(server.fuse.open(null.node, libc::O_RDWR), Err(libc::ENXIO));
        assert_eq!(server.fuse.setattr(null.node, FATTR_SIZE, 1, 0, (0, 0)), Err(libc::EINVAL));
        server.fuse.forget(null.node, 1);
        let again = server.fuse.lookup(parent, "null").unwrap();
        assert_eq!(again.attr.mode, libc::S_IFCHR | 0o666, "also when it was forgotten meanwhile");
        let rename = [&parent.to_le_bytes()[..], b"null\0moved\0"].concat();
        server.fuse.call(op::RENAME, parent, &rename).unwrap();
        assert_eq!(server.fuse.lookup(parent, "moved").unwrap().node, again.node);
        // An ordinary file does not become one by its looks.
        let (file, _) = server.fuse.create(parent, "file", libc::O_RDWR, 0o1644).unwrap();
        assert_eq!(file.attr.mode, libc::S_IFREG | 0o1644);
    }
    for name in ["moved", "disk"] {
        let on_host = fs::symlink_metadata(server.path("c1/rootfs").join(name)).unwrap();
        assert!(on_host.is_file() && on_host.len() == 0, "{name}");
    }
    let whiteout = [bytes(&[libc::S_IFCHR, 0, 0, 0]), name_bytes("whiteout")].concat();
    let whiteout = entry(&server.fuse.call(op::MKNOD, rootfs, &whiteout).unwrap());
    assert_eq!(whiteout.attr.mode & libc::S_IFMT, libc::S_IFCHR);
    let on_host = fs::symlink_metadata(server.path("c1/rootfs/whiteout")).unwrap();
    assert_eq!(on_host.rdev(), 0);
    server.assert_alive();
}

#[test]
fn appending_truncating_and_unlinked_files_work() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    let (file, handle) = server.fuse.create(rootfs, "f", libc::O_RDWR, 0o644).unwrap();
    server.fuse.write(file.node, handle, 0, b"one", 0).unwrap();
    server.fuse.write(file.node, handle, 0, b"two", libc::O_APPEND).unwrap();
    assert_eq!(server.fuse.read(file.node, handle, 0, 99).unwrap(), b"onetwo");
    server.fuse.call(op::UNLINK, rootfs, &name_bytes("f")).unwrap();
    assert_eq!(server.fuse.lookup(rootfs, "f").unwrap().node, 0, "told as absent, to be remembered");
    assert_eq!(server.fuse.read(file.node, handle, 0, 99).unwrap(), b"onetwo");
    assert_eq!(server.fuse.getattr(file.node).unwrap().links, 0);
    let again = server.fuse.open(file.node, libc::O_RDWR | libc::O_TRUNC).unwrap();
    assert_eq!(server.fuse.read(file.node, again, 0, 99).unwrap(), b"");
    assert_eq!(server.fuse.create(rootfs, "f", libc::O_WRONLY | libc::O_EXCL, 0o644).map(|_| ()), Ok(()));
    assert_eq!(
        server.fuse.create(rootfs, "f", libc::O_WRONLY | libc::O_EXCL, 0o644).map(|_| ()),
        Err(libc::EEXIST)
    );
    assert!(server.fuse.create(rootfs, "f", libc::O_WRONLY, 0o644).is_ok());
}

#[test]
fn links_and_renames_work() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    let (file, _) = server.fuse.create(rootfs, "a", libc::O_RDWR, 0o644).unwrap();
    let link = [&file.node.to_le_bytes()[..], b"b\0"].concat();
    let linked = entry(&server.fuse.call(op::LINK, rootfs, &link).unwrap());
    assert_eq!((linked.node, linked.attr.links, linked.attr.number), (file.node, 2, file.attr.number));
    let directory = server.fuse.mkdir(rootfs, "d", 0o755).unwrap();
    let rename = [&directory.node.to_le_bytes()[..], b"b\0c\0"].concat();
    server.fuse.call(op::RENAME, rootfs, &rename).unwrap();
    assert_eq!(server.fuse.lookup(directory.node, "c").unwrap().node, file.node);
    let rename2 = |flags: u32| [&rootfs.to_le_bytes()[..], &bytes(&[flags, 0]), b"a\0d\0"].concat();
    assert_eq!(server.fuse.call(op::RENAME2, rootfs, &rename2(1)), Err(libc::EEXIST), "RENAME_NOREPLACE");
    assert_eq!(server.fuse.call(op::RENAME2, rootfs, &rename2(2)), Ok(Vec::new()), "RENAME_EXCHANGE");
    assert_eq!(
        server.fuse.call(op::RENAME2, rootfs, &rename2(6)),
        Err(libc::EINVAL),
        "they exclude each other"
    );
    assert_eq!(server.fuse.lookup(rootfs, "a").unwrap().node, directory.node);
    // A symbolic link as such can be linked and given away.
    symlink("target", server.path("c1/rootfs/s")).unwrap();
    let symbolic = server.fuse.lookup(rootfs, "s").unwrap();
    let attr = server.fuse.setattr(symbolic.node, FATTR_UID_GID, 0, 0, (5, 6)).unwrap();
    assert_eq!((attr.uid, attr.gid), (5, 6));
    let link = [&symbolic.node.to_le_bytes()[..], b"s2\0"].concat();
    assert_eq!(entry(&server.fuse.call(op::LINK, rootfs, &link).unwrap()).node, symbolic.node);
}

#[test]
fn extended_attributes_of_the_guest_work_and_the_hosts_do_not() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    let (file, _) = server.fuse.create(rootfs, "f", libc::O_RDWR, 0o755).unwrap();
    let set = |name: &str, value: &[u8]| {
        [bytes(&[value.len() as u32, 0]), name_bytes(name), value.to_vec()].concat()
    };
    let get = |name: &str, size: u32| [bytes(&[size, 0]), name_bytes(name)].concat();
    // struct vfs_cap_data, version 2: CAP_NET_BIND_SERVICE, effective.
    let capability = bytes(&[0x0200_0001, 1 << 10, 0, 0, 0]);
    server.fuse.call(op::SETXATTR, file.node, &set("security.capability", &capability)).unwrap();
    let size = server.fuse.call(op::GETXATTR, file.node, &get("security.capability", 0)).unwrap();
    assert_eq!(u32_at(&size, 0), 20);
    assert_eq!(
        server.fuse.call(op::GETXATTR, file.node, &get("security.capability", 64)).unwrap(),
        capability
    );
    assert_eq!(server.fuse.call(op::GETXATTR, file.node, &get("security.capability", 3)), Err(libc::ERANGE));
    assert_eq!(
        server.fuse.call(op::GETXATTR, file.node, &get("security.capability", u32::MAX)).unwrap(),
        capability,
        "a giant size costs nothing"
    );
    server.fuse.call(op::SETXATTR, file.node, &set("trusted.overlay.redirect", b"x")).unwrap();
    let value = server.fuse.call(op::GETXATTR, file.node, &get("trusted.overlay.redirect", 64)).unwrap();
    assert_eq!(value, b"x");
    for name in [
        "user.bulkhead.node",
        "user.bulkhead.trusted.overlay.redirect",
        "security.selinux",
        "security.ima",
        "system.posix_acl_access",
        "system.posix_acl_default",
    ] {
        assert_eq!(
            server.fuse.call(op::SETXATTR, file.node, &set(name, b"x")),
            Err(libc::EOPNOTSUPP),
            "{name}"
        );
        assert_eq!(server.fuse.call(op::GETXATTR, file.node, &get(name, 64)), Err(libc::ENODATA), "{name}");
    }
    let names = server.fuse.call(op::LISTXATTR, file.node, &bytes(&[4096, 0])).unwrap();
    let mut names: Vec<&[u8]> = names.split_inclusive(|&byte| byte == 0).collect();
    names.sort_unstable();
    assert_eq!(names, [&b"security.capability\0"[..], b"trusted.overlay.redirect\0"]);
    assert_eq!(server.fuse.call(op::LISTXATTR, file.node, &bytes(&[3, 0])), Err(libc::ERANGE));
}

#[test]
fn large_directories_are_listed_whole() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    for number in 0..3000 {
        fs::write(server.path(&format!("c1/rootfs/file-with-a-long-name-{number:05}")), "").unwrap();
    }
    let handle = server.fuse.opendir(rootfs).unwrap();
    for size in [512, 4096, 128 * 1024] {
        let mut names = server.fuse.names(rootfs, handle, size).unwrap();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 3002, "with . and .., by {size} bytes");
    }
    let plus = server.fuse.call(op::READDIRPLUS, rootfs, &read_body(handle, 0, 4096)).unwrap();
    let names: Vec<_> = direntplus(&plus);
    assert!(names.len() > 5, "{names:?}");
    assert!(names.iter().all(|(name, node)| (*node == 0) == name.starts_with('.')), "{names:?}");
}

#[test]
fn removing_what_was_listed_skips_nothing() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    for opcode in [op::READDIR, op::READDIRPLUS] {
        for number in 0..1000 {
            fs::write(server.path(&format!("c1/rootfs/file-{number}")), "").unwrap();
        }
        let handle = server.fuse.opendir(rootfs).unwrap();
        let (mut offset, mut removed) = (0, 0);
        loop {
            let body = server.fuse.call(opcode, rootfs, &read_body(handle, offset, 4096)).unwrap();
            if body.is_empty() {
                break;
            }
            // struct fuse_direntplus is a struct fuse_entry_out of 128 bytes and a struct fuse_dirent.
            let (skipped, mut rest) = (if opcode == op::READDIR { 0 } else { 128 }, &body[..]);
            while !rest.is_empty() {
                let entry = &rest[skipped..];
                let length = u32_at(entry, 16) as usize;
                offset = u64_at(entry, 8);
                let name = str::from_utf8(&entry[24..24 + length]).unwrap();
                if !name.starts_with('.') {
                    server.fuse.call(op::UNLINK, rootfs, &name_bytes(name)).unwrap();
                    removed += 1;
                }
                rest = &rest[(skipped + 24 + length).next_multiple_of(8)..];
            }
        }
        assert_eq!(removed, 1000);
        assert_eq!(fs::read_dir(server.path("c1/rootfs")).unwrap().count(), 0);
    }
}

/// Name and node id of each `struct fuse_direntplus`.
fn direntplus(mut rest: &[u8]) -> Vec<(String, u64)> {
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let length = u32_at(rest, 144) as usize;
        entries.push((String::from_utf8(rest[152..152 + length].to_vec()).unwrap(), u64_at(rest, 0)));
        rest = &rest[(152 + length).next_multiple_of(8)..];
    }
    entries
}

#[test]
fn a_file_without_a_name_is_its_users_and_gets_one_by_a_link() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    let body = [bytes(&[libc::O_RDWR as u32, libc::S_IFREG | 0o640, 0, 0]), b"/\0".to_vec()].concat();
    let mut packet = server.fuse.packet(op::TMPFILE, rootfs, &body);
    packet[24..32].copy_from_slice(&bytes(&[1234, 4321]));
    server.fuse.send(&packet);
    let reply = server.fuse.receive().1.unwrap();
    let (file, handle) = (entry(&reply), u64_at(&reply, 128));
    assert_eq!((file.attr.mode, file.attr.uid, file.attr.gid), (libc::S_IFREG | 0o640, 1234, 4321));
    let opened = server.fuse.opendir(rootfs).unwrap();
    let before = server.fuse.names(rootfs, opened, 4096).unwrap();
    server.fuse.write(file.node, handle, 0, b"text", 0).unwrap();
    let link = [&file.node.to_le_bytes()[..], b"named\0"].concat();
    let linked = entry(&server.fuse.call(op::LINK, rootfs, &link).unwrap());
    assert_eq!((linked.node, linked.attr.number), (file.node, file.attr.number));
    assert_eq!(fs::read(server.path("c1/rootfs/named")).unwrap(), b"text");
    let opened = server.fuse.opendir(rootfs).unwrap();
    assert_eq!(server.fuse.names(rootfs, opened, 4096).unwrap().len(), before.len() + 1);
    // Nowhere else, and by no other name.
    assert_eq!(server.fuse.call(op::TMPFILE, ROOT, &body), Err(libc::EROFS));
    let named = [&body[..16], b"a\0"].concat();
    assert_eq!(server.fuse.call(op::TMPFILE, rootfs, &named), Err(libc::EINVAL));
}

#[test]
fn a_copy_stays_inside_the_host() {
    let mut server = Server::start();
    let rootfs = server.rootfs();
    let (from, from_handle) = server.fuse.create(rootfs, "a", libc::O_RDWR, 0o644).unwrap();
    let (to, to_handle) = server.fuse.create(rootfs, "b", libc::O_RDWR, 0o644).unwrap();
    server.fuse.write(from.node, from_handle, 0, b"0123456789", 0).unwrap();
    let body: Vec<u8> = [from_handle, 2, to.node, to_handle, 1, 5, 0]
        .iter()
        .flat_map(|value: &u64| value.to_le_bytes())
        .collect();
    let reply = server.fuse.call(op::COPY_FILE_RANGE, from.node, &body).unwrap();
    assert_eq!(u32_at(&reply, 0), 5);
    assert_eq!(server.fuse.read(to.node, to_handle, 0, 99).unwrap(), b"\x0023456");
}
