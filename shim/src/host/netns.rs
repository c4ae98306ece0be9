//! Work inside a network namespace of the host.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use nix::sched::{CloneFlags, setns};
use tokio::sync::oneshot;

/// The thread does a handful of system calls.
const STACK: usize = 64 * 1024;

/// A namespace that can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NamespaceError {
    /// It is not there.
    #[error("can't open the network namespace {path}")]
    Open {
        /// Where it was looked for.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is the host's.
    #[error("the network namespace {0} is the host's own")]
    Own(PathBuf),
    /// It can't be entered.
    #[error("can't enter the network namespace {path}")]
    Enter {
        /// Where it was found.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A network namespace that is not the host's.
#[derive(Debug)]
pub(crate) struct NetworkNamespace {
    path: PathBuf,
    file: File,
}

impl NetworkNamespace {
    /// Opens it.
    ///
    /// # Errors
    /// When it is not there, or is the one that this process is in.
    pub(crate) fn open(path: &Path) -> Result<NetworkNamespace, NamespaceError> {
        let identity = |file: &File| file.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
        let opened = |path: &Path| {
            let file = File::open(path)?;
            identity(&file).map(|identity| (file, identity))
        };
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| NamespaceError::Open { path, source }
        };
        let own = Path::new("/proc/self/ns/net");
        let (file, wanted) = opened(path).map_err(failed(path))?;
        let (_, ours) = opened(own).map_err(failed(own))?;
        if wanted == ours {
            return Err(NamespaceError::Own(path.to_owned()));
        }
        Ok(NetworkNamespace { path: path.to_owned(), file })
    }

    /// The namespace itself.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Does some work in it, on a thread of its own.
    ///
    /// # Errors
    /// When it can't be entered.
    pub(crate) async fn within<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NamespaceError> {
        let failed = |source| NamespaceError::Enter { path: self.path.clone(), source };
        let file = self.file.try_clone().map_err(failed)?;
        let (sender, done) = oneshot::channel();
        thread::Builder::new()
            .name("netns".into())
            .stack_size(STACK)
            .spawn(move || {
                let result = setns(file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
                // Whoever asked may have given up.
                let _ = sender.send(result.map(|()| work()));
            })
            .map_err(failed)?;
        done.await.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into())).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_hosts_own_namespace_is_refused_and_others_are_entered() {
        let own = Path::new("/proc/thread-self/ns/net");
        assert!(matches!(NetworkNamespace::open(own), Err(NamespaceError::Own(_))));
        let missing = Path::new("/nonexistent");
        assert!(matches!(NetworkNamespace::open(missing), Err(NamespaceError::Open { .. })));
        let wrong = NetworkNamespace::open(Path::new("/dev/null")).unwrap();
        assert!(matches!(wrong.within(|| ()).await, Err(NamespaceError::Enter { .. })));
    }
}
