//! Directories that are taken down completely, whatever way this program ends.
//!
//! What runs, is mounted or lies below a [`WorkDir`] is gone after its drop; after a panic or SIGINT and SIGTERM too, once
//! [`guard`] was called. After SIGKILL nothing can be done here, so names tell what a left-over belongs to.

use std::fs;
use std::panic;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{SigSet, Signal};

use crate::failure::{Explain, Outcome};
use crate::node;

static LIVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A directory of our own for state, sockets and mounts.
#[derive(Debug)]
pub(crate) struct WorkDir {
    path: PathBuf,
}

impl WorkDir {
    /// Makes an empty directory. Its path is short, since socket paths are limited to 107 bytes.
    ///
    /// # Errors
    /// When it can't be made.
    pub(crate) fn new(name: &str) -> Outcome<Self> {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("bulkhead-{name}-{}-{number}", process::id()));
        fs::create_dir(&path).explain(|| format!("make {}", path.display()))?;
        LIVE.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
        Ok(Self { path })
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        release(&self.path);
        LIVE.lock().unwrap_or_else(PoisonError::into_inner).retain(|path| *path != self.path);
    }
}

/// Makes panics and SIGINT and SIGTERM release every work directory first. To be called before any thread is started.
///
/// # Errors
/// When the signals can't be blocked.
pub fn guard() -> Outcome {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().explain(|| "block signals".into())?;
    thread::spawn(move || {
        if let Ok(signal) = signals.wait() {
            release_all();
            process::exit(128 + signal as i32);
        }
    });
    let default = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        default(info);
        release_all();
    }));
    Ok(())
}

fn release_all() {
    // A panic may have happened with the lock held.
    let live = LIVE.try_lock().map(|live| live.clone()).unwrap_or_default();
    live.iter().for_each(|path| release(path));
}

/// Kills what was started for the directory, unmounts what is mounted below it, removes it.
fn release(directory: &Path) {
    let name = directory.display().to_string();
    let belongs = |process: &node::Process| {
        let works_there =
            fs::read_link(format!("/proc/{}/cwd", process.pid)).is_ok_and(|cwd| cwd.starts_with(directory));
        process.pid != process::id() as i32 && (works_there || process.command.contains(&name))
    };
    // Ends at the first round in normal life; a dying shim may start a cleanup, though.
    for _ in 0..50 {
        let ours: Vec<_> = node::processes()
            .into_iter()
            .filter(|process| process.state != 'Z' && belongs(process))
            .collect();
        if ours.is_empty() {
            break;
        }
        ours.iter().for_each(|process| drop(node::kill_hard(process.pid)));
        thread::sleep(Duration::from_millis(20));
    }
    for mount in node::mount_points().iter().rev().filter(|mount| mount.starts_with(directory)) {
        let _ = umount2(mount, MntFlags::MNT_DETACH);
    }
    let _ = fs::remove_dir_all(directory);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_and_files_of_a_work_directory_go_with_it() {
        let directory = WorkDir::new("test").unwrap();
        let path = directory.path().to_owned();
        fs::write(path.join("file"), "").unwrap();
        let mut child = process::Command::new("sleep").arg("60").current_dir(&path).spawn().unwrap();
        drop(directory);
        assert!(!path.exists());
        assert!(!child.wait().unwrap().success());
    }
}
