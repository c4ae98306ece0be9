//! A process's terminal, made from the container's own `devpts`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::TerminalSize;
use crate::sys::path::{self, Missing};
use crate::sys::{mount, terminal};

/// A terminal that could not be made.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub(crate) enum TerminalError {
    #[error("can't open /dev/pts/ptmx for a terminal; the container needs a devpts there")]
    Open(#[source] io::Error),
    #[error("/dev/pts/ptmx is not on a devpts")]
    NotDevpts,
    #[error("can't open the terminal")]
    Peer(#[source] io::Error),
    #[error("can't set the size of the terminal")]
    Size(#[source] io::Error),
    #[error("can't make the terminal the controlling one")]
    Controlling(#[source] io::Error),
    #[error("can't make the terminal /dev/console")]
    Console(#[source] io::Error),
}

/// Both sides of a terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    /// The agent's side.
    pub master: OwnedFd,
    /// The process's side.
    pub slave: OwnedFd,
}

impl Terminal {
    /// Makes a terminal. The calling process is inside the container.
    pub(crate) fn open(size: TerminalSize) -> Result<Self, TerminalError> {
        let root = path::open_directory(Path::new("/")).map_err(TerminalError::Open)?;
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NOFOLLOW;
        let master = path::open_in_root(root.as_fd(), Path::new("dev/pts/ptmx"), flags)
            .map_err(TerminalError::Open)?;
        // The container may have put something else there.
        if path::file_system_magic(master.as_fd()).map_err(TerminalError::Open)? != libc::DEVPTS_SUPER_MAGIC {
            return Err(TerminalError::NotDevpts);
        }
        terminal::unlock(master.as_fd()).map_err(TerminalError::Peer)?;
        let slave = terminal::open_peer(master.as_fd()).map_err(TerminalError::Peer)?;
        if size.columns != 0 && size.rows != 0 {
            terminal::set_size(slave.as_fd(), size.columns, size.rows).map_err(TerminalError::Size)?;
        }
        Ok(Self { master, slave })
    }

    /// Makes it the controlling terminal of the calling process, which leads a session.
    pub(crate) fn make_controlling(&self) -> Result<(), TerminalError> {
        terminal::make_controlling(self.slave.as_fd()).map_err(TerminalError::Controlling)
    }

    /// Makes it the container's `/dev/console`.
    pub(crate) fn bind_console(&self) -> Result<(), TerminalError> {
        bind_console(self.slave.as_fd()).map_err(TerminalError::Console)
    }
}

fn bind_console(slave: BorrowedFd<'_>) -> io::Result<()> {
    let root = path::open_directory(Path::new("/"))?;
    let target = path::create_in_root(root.as_fd(), Path::new("/dev/console"), Missing::File)?;
    let terminal = mount::clone_tree_of(slave, false)?;
    mount::attach(terminal.as_fd(), target.as_fd())
}
