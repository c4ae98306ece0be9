//! A network namespace with a loopback interface, as CNI leaves one for a pod without a network.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};

use crate::failure::{Explain, Outcome};
use crate::process;

const LIMIT: Duration = Duration::from_secs(10);

/// There as long as this is.
#[derive(Debug)]
pub(crate) struct NetworkNamespace {
    path: PathBuf,
    /// The thread that holds it ends with this.
    _keeper: mpsc::Sender<()>,
}

impl NetworkNamespace {
    /// Makes one.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn new() -> Outcome<Self> {
        let (told, made) = mpsc::channel();
        let (keeper, ended) = mpsc::channel::<()>();
        thread::spawn(move || {
            let _ = told.send(make());
            let _ = ended.recv();
        });
        let path = made.recv().explain(|| "make a network namespace".into())??;
        Ok(Self { path, _keeper: keeper })
    }

    /// Its file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Does something in it.
    ///
    /// # Errors
    /// When it can't be entered.
    pub(crate) fn within<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Outcome<T> {
        let file = std::fs::File::open(&self.path).explain(|| format!("open {}", self.path.display()))?;
        let entered = thread::spawn(move || setns(file, CloneFlags::CLONE_NEWNET).map(|()| work()));
        let result = entered.join().ok().explain(|| "work in a network namespace".into())?;
        result.explain(|| "enter a network namespace".into())
    }
}

fn make() -> Outcome<PathBuf> {
    unshare(CloneFlags::CLONE_NEWNET).explain(|| "make a network namespace".into())?;
    let mut up = std::process::Command::new("ip");
    process::run(up.args(["link", "set", "lo", "up"]), b"", LIMIT)?.success("ip link set lo up")?;
    let thread = nix::unistd::gettid();
    Ok(format!("/proc/{}/task/{thread}/ns/net", std::process::id()).into())
}
