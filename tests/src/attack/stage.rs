//! The host's side of an attempt: what is shared with the container, what is kept from it, and what the program said.

use std::fs;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use serde_json::Value;

use crate::bundle;
use crate::cases::Runtime;
use crate::failure::{Explain, Outcome};
use crate::layout::Layout;
use crate::process;
use crate::shim::CALL_LIMIT;

/// How much of what a program says is shown.
const SAID: usize = 300;

/// What an attempt's host side works with.
pub struct Stage {
    pub(super) runtime: Runtime,
    /// Where the parts are.
    pub layout: Layout,
    /// A directory of the host that no pod gets. `secret` in it holds what no pod may read.
    pub outside: PathBuf,
    /// Where shared directories are made.
    pub(super) shares: PathBuf,
    /// Mounts of the host that go with the stage, in order.
    pub(super) mounts: Vec<PathBuf>,
    /// Texts that no program may print.
    pub(super) secrets: Vec<String>,
    /// Why this node has not what the attempt needs, if so.
    pub absent: Option<String>,
    /// A socket that somebody on the host listens on.
    pub listener: Option<UnixListener>,
    /// The same on the network.
    pub server: Option<TcpListener>,
    /// A FIFO that somebody on the host reads from.
    pub fifo: Option<fs::File>,
    /// A process of the host's that has to live on.
    pub victim: Option<Child>,
}

impl Stage {
    /// Whether the container is one of ours.
    pub(crate) fn is_bulkhead(&self) -> bool {
        self.runtime == Runtime::Bulkhead
    }

    /// An empty directory on the host, to be given to the container.
    ///
    /// # Errors
    /// When it can't be made.
    pub(crate) fn share(&mut self, name: &str) -> Outcome<PathBuf> {
        let path = self.shares.join(name);
        fs::create_dir_all(&path).explain(|| format!("make {}", path.display()))?;
        Ok(path)
    }

    /// Where [`share`](Self::share) made one.
    pub(crate) fn shared(&self, name: &str) -> PathBuf {
        self.shares.join(name)
    }

    /// Something that no program may print, from now on.
    pub(crate) fn secret(&mut self) -> String {
        let secret = format!("secret-{}", nonce());
        self.secrets.push(secret.clone());
        secret
    }

    /// A file system on a disk of the host's (a loop device), mounted there.
    ///
    /// # Errors
    /// When it can't be mounted.
    pub(crate) fn disk(&mut self) -> Outcome<PathBuf> {
        let image = self.shares.join("disk.ext4");
        let scratch = self.layout.rootfs("busybox").with_file_name("scratch.ext4");
        fs::create_dir_all(&self.shares).explain(|| "make the stage's directory".into())?;
        fs::copy(&scratch, &image).explain(|| format!("copy {}", scratch.display()))?;
        let target = self.shares.join("disk");
        self.mount(&["-o", "loop", "-t", "ext4", &image.display().to_string()], &target)?;
        Ok(target)
    }

    /// Mounts something on the host, until the attempt is over.
    ///
    /// # Errors
    /// What `mount` says.
    pub(crate) fn mount(&mut self, arguments: &[&str], target: &Path) -> Outcome {
        fs::create_dir_all(target).explain(|| format!("make {}", target.display()))?;
        let mut command = Command::new("mount");
        process::run(command.args(arguments).arg(target), b"", CALL_LIMIT)?.success("mount")?;
        self.mounts.push(target.to_owned());
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(mut victim) = self.victim.take() {
            let _ = victim.kill();
            let _ = victim.wait();
        }
        for mount in self.mounts.iter().rev() {
            let _ = process::run(Command::new("umount").arg("-l").arg(mount), b"", CALL_LIMIT);
        }
        let _ = fs::remove_dir_all(&self.shares);
    }
}

/// Gives a container a volume.
pub(crate) fn volume(spec: &mut Value, source: &Path, destination: &str, options: &[&str]) {
    bundle::add(&mut spec["mounts"], bundle::bind(source, destination, options));
}

/// What a program said, and how it ended.
#[derive(Debug, Clone, Default)]
pub struct Said {
    /// Its output.
    pub stdout: String,
    /// Its error output.
    pub stderr: String,
    /// How it ended, for a person.
    pub end: String,
    /// The shim's log.
    pub log: String,
    /// The container was refused.
    pub refused: bool,
}

impl Said {
    /// The beginning and the end of it.
    pub(super) fn short(&self) -> String {
        let text = format!("{} {}", self.stdout.trim(), self.stderr.trim()).replace(['\n', '\0'], " ");
        let count = text.chars().count();
        let shown = match count > SAID {
            true => {
                let start: String = text.chars().take(SAID / 2).collect();
                let end: String = text.chars().skip(count - SAID / 2).collect();
                format!("{start} … {end}")
            }
            false => text,
        };
        format!("{} [{}]", shown.trim(), self.end)
    }
}

/// A number that nobody guesses.
pub(super) fn nonce() -> String {
    fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default().trim().to_owned()
}
