//! The pod's network namespace: named by a path, held open, entered by threads that end in it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use bulkhead_netlink::Socket;
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::NetError;

/// How long all that is done at once in a namespace may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(8);

/// `NS_GET_NSTYPE` of ioctl_ns(2).
const GET_KIND: libc::c_ulong = 0xb703;

/// What a namespace is found by again, and known to be the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    path: PathBuf,
    device: u64,
    inode: u64,
}

/// A pod's network namespace.
#[derive(Debug, Clone)]
pub(crate) struct Namespace {
    fd: Arc<OwnedFd>,
    record: Record,
}

impl Namespace {
    /// Opens the namespace at a path. The host's own is refused.
    pub(crate) fn open(path: &Path) -> Result<Namespace, NetError> {
        let failed = |source| NetError::Open { path: path.to_owned(), source };
        // Not to be caught by a FIFO.
        let flags = libc::O_NONBLOCK;
        let file = File::options().read(true).custom_flags(flags).open(path).map_err(failed)?;
        // SAFETY: takes no argument; what is no namespace refuses it.
        if unsafe { libc::ioctl(file.as_raw_fd(), GET_KIND) } != libc::CLONE_NEWNET {
            return Err(NetError::NotANamespace(path.to_owned()));
        }
        let found = file.metadata().map_err(failed)?;
        let own = std::fs::metadata("/proc/self/ns/net").map_err(failed)?;
        if (found.dev(), found.ino()) == (own.dev(), own.ino()) {
            return Err(NetError::Host(path.to_owned()));
        }
        let record = Record { path: path.to_owned(), device: found.dev(), inode: found.ino() };
        Ok(Namespace { fd: Arc::new(file.into()), record })
    }

    /// Finds a recorded namespace; `None` if it is gone.
    pub(crate) fn find(record: &Record) -> Option<Namespace> {
        Namespace::open(&record.path).ok().filter(|found| found.record == *record)
    }

    /// What it is found by again.
    pub(crate) fn record(&self) -> &Record {
        &self.record
    }

    /// Does something on a thread in the namespace.
    pub(crate) async fn inside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Socket) -> Result<T, NetError> + Send + 'static,
    ) -> Result<T, NetError> {
        let (sender, receiver) = oneshot::channel();
        self.spawn(work, move |result| drop(sender.send(result)))?;
        match tokio::time::timeout(LIMIT, receiver).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(NetError::TimedOut),
        }
    }

    /// The same for a caller without a runtime.
    pub(crate) fn inside_blocking<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl FnOnce(&mut Socket) -> Result<T, NetError> + Send + 'static,
    ) -> Result<T, NetError> {
        let (sender, receiver): (_, Receiver<Result<T, NetError>>) = sync_channel(1);
        self.spawn(work, move |result| drop(sender.send(result)))?;
        receiver.recv_timeout(limit).unwrap_or(Err(NetError::TimedOut))
    }

    fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Socket) -> Result<T, NetError> + Send + 'static,
        tell: impl FnOnce(Result<T, NetError>) + Send + 'static,
    ) -> Result<(), NetError> {
        let namespace = self.fd.clone();
        let failed = |step| move |source| NetError::Enter { step, source };
        let body = move || {
            // The thread's own, and it ends with it.
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)
                .map_err(io::Error::from)
                .map_err(failed("setns"))?;
            work(&mut Socket::open().map_err(failed("open a netlink socket"))?)
        };
        std::thread::Builder::new()
            .name("network".into())
            .stack_size(128 * 1024)
            // Nobody may wait any more: the result goes, and with it what it owns.
            .spawn(move || tell(body()))
            .map(drop)
            .map_err(failed("start a thread"))
    }

    /// A new namespace that nothing else knows.
    #[cfg(test)]
    pub(crate) fn for_test() -> Namespace {
        let thread = std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
            // The namespace outlives the thread by this descriptor.
            let fd = File::open("/proc/thread-self/ns/net").unwrap();
            PathBuf::from(format!(
                "/proc/{}/fd/{}",
                std::process::id(),
                std::os::fd::IntoRawFd::into_raw_fd(fd)
            ))
        });
        Namespace::open(&thread.join().unwrap()).unwrap()
    }

    /// The namespace itself.
    pub(crate) fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        (*self.fd).as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_network_namespaces_other_than_the_hosts_are_taken() {
        let open = |path: &str| Namespace::open(Path::new(path)).map(drop).unwrap_err();
        assert!(matches!(open("/nonexistent"), NetError::Open { .. }));
        assert!(matches!(open("/dev/null"), NetError::NotANamespace(_)));
        assert!(matches!(open("/proc/self/ns/mnt"), NetError::NotANamespace(_)));
        assert!(matches!(open("/proc/self/ns/net"), NetError::Host(_)));
    }

    #[test]
    fn a_namespace_is_found_again_unless_it_is_another() {
        let namespace = Namespace::for_test();
        let record = namespace.record().clone();
        assert!(Namespace::find(&record).is_some());
        assert!(Namespace::find(&Record { inode: record.inode + 1, ..record.clone() }).is_none());
        assert!(Namespace::find(&Record { path: "/nonexistent".into(), ..record }).is_none());
    }

    #[tokio::test]
    async fn work_is_done_inside() {
        let namespace = Namespace::for_test();
        let links = namespace
            .inside(|socket| socket.links().map_err(|source| NetError::Read { what: "links", source }))
            .await
            .unwrap();
        assert!(links.iter().all(|link| !link.is_up()), "{links:?}");
    }
}
