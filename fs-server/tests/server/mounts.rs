//! Mounts below the tree, and what the host changes in it, through the real binary.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use crate::client::{FATTR_UID_GID, ROOT, Server, mount_tmpfs, name_bytes, op};
use nix::mount::{MsFlags, mount, umount2};

#[test]
fn mounts_are_crossed_and_their_numbers_told_apart() {
    let mut server = Server::start();
    // Two fresh tmpfs give their first files the same numbers.
    fs::write(server.path("c1/rootfs/f"), "root").unwrap();
    fs::write(server.path("c1/mounts/0/f"), "volume").unwrap();
    let on_host = |path| fs::metadata(path).unwrap().ino();
    assert_eq!(on_host(server.path("c1/rootfs/f")), on_host(server.path("c1/mounts/0/f")));
    let (rootfs, volume) = (server.rootfs(), server.node("c1/mounts/0"));
    let one = server.fuse.lookup(rootfs, "f").unwrap();
    let other = server.fuse.lookup(volume, "f").unwrap();
    assert_ne!(one.node, other.node);
    assert_ne!(one.attr.number, other.attr.number);
    assert_eq!(server.fuse.lookup(rootfs, "f").unwrap().attr.number, one.attr.number);
    assert_eq!(
        (one.valid, other.valid),
        ((60, 60), (1, 1)),
        "only the root file system is the guest's alone"
    );
    assert_eq!(server.fuse.lookup(volume, "absent"), Err(libc::ENOENT), "the host may create it");

    // Mounts that come and go later: another container.
    fs::create_dir_all(server.path("c2/rootfs")).unwrap();
    mount_tmpfs(&server.path("c2/rootfs"));
    fs::write(server.path("c2/rootfs/late"), "late").unwrap();
    fs::write(server.path("c2/hosts"), "").unwrap();
    let file = server.path("c1/mounts/0/f");
    mount(Some(&file), &server.path("c2/hosts"), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    let late = server.node("c2/rootfs/late");
    let handle = server.fuse.open(late, libc::O_RDONLY).unwrap();
    assert_eq!(server.fuse.read(late, handle, 0, 99).unwrap(), b"late");
    let bound = server.node("c2/hosts");
    assert_eq!(bound, other.node, "a file is one, whatever mount it is reached by");
    // Made read-only before it gets into the tree, as the shim does.
    let aside = tempfile::NamedTempFile::new().unwrap();
    let aside = aside.path();
    fs::write(server.path("c2/locked"), "").unwrap();
    mount(Some(&file), aside, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    let read_only =
        MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount(None::<&str>, aside, None::<&str>, read_only, None::<&str>).unwrap();
    mount(Some(aside), &server.path("c2/locked"), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    umount2(aside, nix::mount::MntFlags::MNT_DETACH).unwrap();
    let locked = server.node("c2/locked");
    assert_ne!(locked, bound, "but for a read-only one");
    assert_eq!(server.fuse.open(locked, libc::O_RDWR), Err(libc::EROFS));
    let handle = server.fuse.open(bound, libc::O_RDWR).unwrap();
    assert_eq!(server.fuse.read(bound, handle, 0, 99).unwrap(), b"volume");
    umount2(&server.path("c2/rootfs"), nix::mount::MntFlags::MNT_DETACH).unwrap();
    let container = server.node("c2");
    let empty = server.fuse.lookup(container, "rootfs").unwrap();
    assert_eq!(server.fuse.lookup(empty.node, "late"), Err(libc::ENOENT));
}

#[test]
fn changes_on_the_host_show() {
    let mut server = Server::start();
    let volume = server.node("c1/mounts/0");
    fs::write(server.path("c1/mounts/0/config"), "old").unwrap();
    let file = server.fuse.lookup(volume, "config").unwrap();
    fs::write(server.path("c1/mounts/0/config"), "newer").unwrap();
    assert_eq!(server.fuse.getattr(file.node).unwrap().size, 5);
    fs::write(server.path("c1/mounts/0/next"), "replaced").unwrap();
    fs::rename(server.path("c1/mounts/0/next"), server.path("c1/mounts/0/config")).unwrap();
    let replaced = server.fuse.lookup(volume, "config").unwrap();
    assert_ne!(replaced.node, file.node);
    assert_eq!(replaced.attr.size, 8);
}

#[test]
fn the_top_and_read_only_mounts_can_not_be_written() {
    let mut server = Server::start();
    assert_eq!(server.fuse.mkdir(ROOT, "mine", 0o755), Err(libc::EROFS));
    let container = server.node("c1");
    assert_eq!(server.fuse.create(container, "mine", libc::O_WRONLY, 0o644).map(|_| ()), Err(libc::EROFS));
    let rename = [&ROOT.to_le_bytes()[..], b"c1\0c9\0"].concat();
    assert_eq!(server.fuse.call(op::RENAME, ROOT, &rename), Err(libc::EROFS));
    let none = None::<&str>;
    let volume = server.path("c1/mounts/0");
    fs::write(volume.join("f"), "").unwrap();
    let flags =
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount(none, &volume, none, flags, none).unwrap();
    // Flags of a mount do not propagate; a mount made read-only from the start does.
    let read_only = server.path("c1/read-only");
    fs::create_dir(&read_only).unwrap();
    mount(Some(&volume), &read_only, none, MsFlags::MS_BIND, none).unwrap();
    let before = server.node("c1/read-only/f");
    assert!(server.fuse.open(before, libc::O_RDONLY).is_ok());
    assert_eq!(server.fuse.open(before, libc::O_WRONLY), Err(libc::EROFS));
}

#[test]
fn an_overlay_as_root_file_system_keeps_ownership_and_numbers() {
    let mut server = Server::start();
    let layers = server.path("c1/mounts/0");
    for directory in ["lower", "upper", "work"] {
        fs::create_dir(layers.join(directory)).unwrap();
    }
    fs::write(layers.join("lower/suid"), "binary").unwrap();
    fs::set_permissions(layers.join("lower/suid"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::create_dir_all(server.path("c2/rootfs")).unwrap();
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| layers.join(name).display().to_string());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let target = server.path("c2/rootfs");
    mount(Some("overlay"), &target, Some("overlay"), MsFlags::empty(), Some(&options[..])).unwrap();
    let rootfs = server.node("c2/rootfs");
    let before = server.fuse.lookup(rootfs, "suid").unwrap();
    assert_eq!(before.attr.mode, libc::S_IFREG | 0o4755);
    let attr = server.fuse.setattr(before.node, FATTR_UID_GID, 0, 0, (1234, 4321)).unwrap();
    assert_eq!((attr.uid, attr.gid), (1234, 4321), "copied up");
    let after = server.fuse.lookup(rootfs, "suid").unwrap();
    assert_eq!((after.node, after.attr.number), (before.node, before.attr.number));
    assert_eq!(fs::metadata(layers.join("upper/suid")).unwrap().uid(), 1234, "writes land in the snapshot");
    server.fuse.call(op::UNLINK, rootfs, &name_bytes("suid")).unwrap();
    let rename = [&rootfs.to_le_bytes()[..], b"d\0e\0"].concat();
    server.fuse.mkdir(rootfs, "d", 0o755).unwrap();
    server.fuse.call(op::RENAME, rootfs, &rename).unwrap();
    let (_, handle) = server.fuse.create(rootfs, "new", libc::O_RDWR, 0o600).unwrap();
    assert!(handle > 0);
    let handle = server.fuse.opendir(rootfs).unwrap();
    let mut names = server.fuse.names(rootfs, handle, 4096).unwrap();
    names.sort();
    assert_eq!(names, [".", "..", "e", "new"]);
}

#[test]
fn layers_on_file_systems_of_their_own_may_number_their_files_alike() {
    const FILES: usize = 40;
    let mut server = Server::start();
    let layers = server.path("c1/mounts/0");
    for directory in ["lower", "changes"] {
        fs::create_dir(layers.join(directory)).unwrap();
        // Two fresh tmpfs give their files the same numbers.
        mount_tmpfs(&layers.join(directory));
    }
    for directory in ["changes/upper", "changes/work"] {
        fs::create_dir(layers.join(directory)).unwrap();
    }
    for index in 0..FILES {
        fs::write(layers.join(format!("lower/old{index}")), format!("old {index}")).unwrap();
    }
    fs::create_dir_all(server.path("c2/rootfs")).unwrap();
    let [lower, upper, work] =
        ["lower", "changes/upper", "changes/work"].map(|name| layers.join(name).display().to_string());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let target = server.path("c2/rootfs");
    mount(Some("overlay"), &target, Some("overlay"), MsFlags::empty(), Some(&options[..])).unwrap();
    let rootfs = server.node("c2/rootfs");

    let mut nodes = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    let mut by_name = BTreeSet::new();
    for index in 0..FILES {
        let old = server.fuse.lookup(rootfs, &format!("old{index}")).unwrap();
        let (new, handle) = server.fuse.create(rootfs, &format!("new{index}"), libc::O_RDWR, 0o600).unwrap();
        server.fuse.write(new.node, handle, 0, format!("new {index}").as_bytes(), 0).unwrap();
        nodes.extend([old.node, new.node]);
        numbers.extend([old.attr.number, new.attr.number]);
        by_name.extend([(format!("old{index}"), old.attr.number), (format!("new{index}"), new.attr.number)]);
    }
    assert_eq!((nodes.len(), numbers.len()), (2 * FILES, 2 * FILES), "two files as one");
    let handle = server.fuse.opendir(rootfs).unwrap();
    let mut listed = server.fuse.entries(rootfs, handle, 4096).unwrap();
    listed.retain(|(name, _)| !matches!(&name[..], "." | ".."));
    assert_eq!(BTreeSet::from_iter(listed), by_name, "numbers as they are listed");
    for index in 0..FILES {
        assert_eq!(fs::read(target.join(format!("old{index}"))).unwrap(), format!("old {index}").as_bytes());
        assert_eq!(fs::read(target.join(format!("new{index}"))).unwrap(), format!("new {index}").as_bytes());
    }
}
