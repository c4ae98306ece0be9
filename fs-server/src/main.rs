//! The jailed file server behind virtio-fs.
//!
//! The shim starts it as root with the pod's shared directory (a mount point) as working directory and
//! `SOCK_SEQPACKET` sockets at descriptors 3 and 4. It jails itself and answers the FUSE requests that the VMM takes from the
//! guest, one packet each, until a socket is closed. By the second socket the guest has root file systems, which only it changes. It takes
//! no arguments and no environment; what stops it early it says in one line on standard error.

mod init;
mod reply;
mod server;
mod tree;

use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Barrier};
use std::{io, thread};

use bulkhead_base::chain;
use bulkhead_jail::{JailError, Limits, enter_file_server};
use bulkhead_seccomp::{Filter, FilterError};
use bulkhead_vmm_protocol::{FUSE_FD, ROOTS_FD};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use server::{Server, ServerError};
use tree::{Rooms, Session, SharedTree};

/// Threads that serve the requests of one socket. A request that waits for the disk holds up one of them.
const WORKERS: usize = 4;

/// Stack of a worker, in bytes.
const STACK: usize = 256 * 1024;

/// The most descriptors, however many the shim's own limit allows: the host's memory behind them counts against the
/// pod's cgroup, this is the stop behind that.
const MAX_OPEN_FILES: u64 = 1 << 20;

/// Threads of each user that the server acts as.
const PROCESSES: u64 = 64;

/// Where the kernel says how many files may be open on the whole node. One pod gets three quarters of them at
/// most: what a guest has in its caches is held open, and trees of a hundred thousand files are nothing special.
const ALL_OPEN_FILES: &str = "/proc/sys/fs/file-max";
const SHARE: (u64, u64) = (3, 4);

/// Fewer are of no use, however small the node is.
const MIN_OPEN_FILES: u64 = 1 << 12;

/// Why the server can't start or go on.
#[derive(Debug, thiserror::Error)]
enum FatalError {
    #[error("can't enter the jail")]
    Jail(#[source] JailError),
    #[error("can't lock up the workers")]
    Filter(#[source] FilterError),
    #[error("can't open the shared directory")]
    Tree(#[source] rustix::io::Errno),
    #[error("can't copy a descriptor")]
    Descriptor(#[source] io::Error),
    #[error("can't start a worker")]
    Thread(#[source] io::Error),
    #[error("can't watch the mounts")]
    Watch(#[source] Errno),
    #[error("can't serve")]
    Server(#[source] ServerError),
    #[error(
        "it takes no arguments: start it in the shared directory, with the FUSE sockets as descriptors 3 and 4"
    )]
    Arguments,
}

fn main() {
    end(run())
}

/// Ends the process with all its threads. The first worker to see the end of the socket, or to fail, ends them all.
fn end(result: Result<(), FatalError>) -> ! {
    let code = match result {
        Ok(()) => 0,
        Err(error) => {
            report(&error);
            1
        }
    };
    // SAFETY: nothing has to be cleaned up at exit. The C library's own exit would do so beside the other workers.
    unsafe { libc::_exit(code) }
}

/// How many descriptors the server may have, of those that it is `allowed` and `all` that the node has.
fn open_files(allowed: u64, all: Option<&str>) -> u64 {
    let all = all.and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(u64::MAX);
    allowed.min(MAX_OPEN_FILES).min((all / SHARE.1 * SHARE.0).max(MIN_OPEN_FILES))
}

fn run() -> Result<(), FatalError> {
    if std::env::args_os().len() > 1 {
        return Err(FatalError::Arguments);
    }
    let allowed = getrlimit(Resource::Nofile).maximum.unwrap_or(MAX_OPEN_FILES);
    let all = std::fs::read_to_string(ALL_OPEN_FILES).ok();
    let open_files = open_files(allowed, all.as_deref());
    let own = enter_file_server(ROOTS_FD, &Limits { open_files, processes: PROCESSES })
        .map_err(FatalError::Jail)?;

    let rooms = Rooms::of(open_files as usize);
    let serve = |fd, session| -> Result<Server, FatalError> {
        // SAFETY: the shim put the socket there for us, nobody else in this process owns it.
        let socket = UnixDatagram::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let own_fds = own.own_fds.try_clone().map_err(FatalError::Descriptor)?;
        let tree = SharedTree::new(own_fds, &rooms, session).map_err(FatalError::Tree)?;
        Ok(Server::new(socket, tree))
    };
    let servers = [serve(FUSE_FD, Session::Shared)?, serve(ROOTS_FD, Session::Roots)?];
    drop(own.own_fds);
    let shared = Arc::new((servers, Barrier::new(2 * WORKERS + 1)));
    for worker in 1..2 * WORKERS {
        let shared = shared.clone();
        thread::Builder::new()
            .stack_size(STACK)
            .spawn(move || end(work(&shared, worker % 2, || Ok(()))))
            .map_err(FatalError::Thread)?;
    }
    let watched = shared.clone();
    thread::Builder::new()
        .stack_size(STACK)
        .spawn(move || end(watch(&watched, &own.mount_table)))
        .map_err(FatalError::Thread)?;
    // One installation for all: the kernel takes its time over each.
    work(&shared, 0, || Filter::FsServer.install_on_all_threads().map_err(FatalError::Filter))
}

/// Serves the requests of one of the sockets. One of the workers is given what locks up all of them.
fn work(
    (servers, all): &([Server; 2], Barrier),
    socket: usize,
    lock_up: impl FnOnce() -> Result<(), FatalError>,
) -> Result<(), FatalError> {
    // The filter does not know the calls that the C library makes when a thread starts.
    all.wait();
    lock_up()?;
    // No request is looked at while a thread of the process may still call what it likes.
    all.wait();
    servers[socket].run().map_err(FatalError::Server)
}

/// Waits for changes of the mounts that the server sees, and lets go of what is mounted no more.
fn watch((servers, all): &([Server; 2], Barrier), mount_table: &OwnedFd) -> Result<(), FatalError> {
    all.wait();
    all.wait();
    loop {
        let mut table = [PollFd::new(mount_table, PollFlags::PRI)];
        match poll(&mut table, None) {
            Ok(_) => servers.iter().for_each(|server| server.tree().drop_unmounted()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(FatalError::Watch(errno)),
        }
    }
}

fn report(error: &FatalError) {
    eprintln!("bulkhead-fs: {}", chain(error));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_never_gets_all_of_the_nodes_open_files() {
        assert_eq!(open_files(1 << 30, Some("9223372036854775807\n")), MAX_OPEN_FILES);
        assert_eq!(open_files(1 << 30, Some("400000\n")), 300_000);
        assert_eq!(open_files(1024, Some("400000")), 1024);
        assert_eq!(open_files(1 << 30, Some("100")), MIN_OPEN_FILES);
        assert_eq!(open_files(1 << 30, None), MAX_OPEN_FILES);
    }
}
