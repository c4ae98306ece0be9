//! A file system of the node that makes whoever writes to it wait.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::libc;

use crate::failure::{Explain, Outcome};

/// `FIFREEZE` and `FITHAW` of `linux/fs.h`, which the C library does not name.
const FREEZE: libc::Ioctl = 0xc004_5877;
const THAW: libc::Ioctl = 0xc004_5878;

/// A frozen file system; it thaws when this is dropped.
#[derive(Debug)]
pub(crate) struct Frozen(File);

impl Frozen {
    /// Writes out what there is and holds up what follows.
    ///
    /// # Errors
    /// When the file system at `mount_point` can't be frozen.
    pub(crate) fn new(mount_point: &Path) -> Outcome<Self> {
        let root = File::open(mount_point).explain(|| format!("open {}", mount_point.display()))?;
        // SAFETY: the kernel ignores the argument.
        if unsafe { libc::ioctl(root.as_raw_fd(), FREEZE, 0) } != 0 {
            return Err(io::Error::last_os_error()).explain(|| format!("freeze {}", mount_point.display()));
        }
        Ok(Self(root))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // SAFETY: the kernel ignores the argument.
        unsafe { libc::ioctl(self.0.as_raw_fd(), THAW, 0) };
    }
}
