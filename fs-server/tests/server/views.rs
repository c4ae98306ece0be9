//! Views of the tree, and what becomes of mounts that the host takes away.

use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};

use crate::client::{ROOT, Server, expect_open_fds, mount_tmpfs, name_bytes, op, open_fds, u32_at};

#[test]
fn a_view_is_the_tree_once_more_as_a_file_system_of_its_own() {
    let mut server = Server::start();
    std::fs::write(server.path("c1/mounts/0/f"), "text").unwrap();
    // struct fuse_entry_out ends with fuse_attr, and that with its flags.
    let flags = |server: &mut Server, node: u64, name: &str| {
        server.fuse.call(op::LOOKUP, node, &name_bytes(name)).map(|body| u32_at(&body, body.len() - 4))
    };
    assert_eq!(flags(&mut server, ROOT, "@5"), Ok(1), "FUSE_ATTR_SUBMOUNT");
    assert_eq!(flags(&mut server, ROOT, "c1"), Ok(0));
    let view = server.node("@5");
    assert_eq!(server.node("@5"), view);
    assert_ne!(server.node("@6"), view);
    let [there, here] = ["@5/c1/mounts/0/f", "c1/mounts/0/f"].map(|path| server.node(path));
    assert_ne!(there, here, "what a file system of its own has is its own");
    assert_eq!(server.node("@5/c1/mounts/0/f"), there);
    for (directory, name) in [(view, "@5"), (view, "@6"), (ROOT, "@0"), (ROOT, "@x"), (there, "@5")] {
        assert!(flags(&mut server, directory, name).is_err(), "{name} in {directory}");
    }
}

#[test]
fn what_the_host_unmounts_is_let_go() {
    let mut server = Server::start();
    for directory in ["c1/mounts/0/below", "c1/mounts/0/below/deep"] {
        std::fs::create_dir(server.path(directory)).unwrap();
        mount_tmpfs(&server.path(directory));
    }
    for file in ["c1/mounts/0/f", "c1/mounts/0/below/f", "c1/mounts/0/below/deep/f"] {
        std::fs::write(server.path(file), "").unwrap();
    }
    let before = open_fds(server.pid());
    let stays = server.node("c1/mounts/0/f");
    let known = open_fds(server.pid());
    let gone = ["c1/mounts/0/below/f", "c1/mounts/0/below/deep/f"].map(|path| server.node(path));
    assert!(known > before);
    expect_open_fds(server.pid(), known + 4);

    umount2(&server.path("c1/mounts/0/below"), MntFlags::MNT_DETACH).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while open_fds(server.pid()) > known {
        assert!(Instant::now() < end, "{} descriptors stay", open_fds(server.pid()) - known);
        std::thread::sleep(Duration::from_millis(5));
    }
    for node in gone {
        assert_eq!(server.fuse.getattr(node).err(), Some(libc::ESTALE));
    }
    assert!(server.fuse.getattr(stays).is_ok());
    // What was under it.
    let below = server.node("c1/mounts/0/below");
    assert_eq!(server.fuse.lookup(below, "f").err(), Some(libc::ENOENT));
    server.assert_alive();
}
