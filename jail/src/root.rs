//! Replacing the root directory: after this, the host's file system can't be named any more.

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};

use crate::JailError;

/// What a jailed process sees as `/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Root {
    /// An empty, read-only directory.
    Empty,
    /// The directory the process was started in. What the host mounts below it later appears there, nothing flows back.
    CurrentDirectory,
}

/// Any directory that each Linux system has; it is covered in the process's own mount namespace only.
const COVERED: &str = "/dev";

const EMPTY_FLAGS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

impl Root {
    /// Must be called in a new mount namespace.
    pub(crate) fn enter(self) -> Result<(), JailError> {
        // Slave, not private: mounts made on the host later must still come in below a shared tree.
        change_mount("/", MsFlags::MS_SLAVE | MsFlags::MS_REC).map_err(failed("make all mounts slaves"))?;
        match self {
            Root::Empty => {
                mount(
                    Some("none"),
                    COVERED,
                    Some("tmpfs"),
                    EMPTY_FLAGS,
                    Some("size=4k,nr_inodes=1,mode=555"),
                )
                .map_err(failed("mount an empty directory"))?;
                chdir(COVERED).map_err(failed("enter the empty directory"))?;
            }
            // The kernel moved the working directory to this namespace's copy of its mount at unshare.
            Root::CurrentDirectory => {}
        }
        // Both names are the new root: the old one ends up stacked on top of it, and is what umount then finds.
        pivot_root(".", ".").map_err(failed("pivot_root"))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(failed("detach the old root"))?;
        chdir("/").map_err(failed("enter the new root"))?;
        if self == Root::Empty {
            change_mount("/", EMPTY_FLAGS.union(MsFlags::MS_REMOUNT).union(MsFlags::MS_RDONLY))
                .map_err(failed("make the empty directory read-only"))?;
        }
        Ok(())
    }
}

fn change_mount(path: &str, flags: MsFlags) -> Result<(), Errno> {
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
}

fn failed(step: &'static str) -> impl FnOnce(Errno) -> JailError {
    move |source| JailError::Root { step, source }
}
