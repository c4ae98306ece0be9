//! The cgroup of a process that makes a template beside pods: what it takes of the node is limited like a pod's, and it comes
//! after all of them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::Size;
use crate::host::cgroup::{self, CgroupError, Limits, MOUNT, PodCgroup};

/// What the maker's cgroups are called, before its process id.
const PREFIX: &str = "bulkhead-template-maker-";

/// What the maker may use beside guest memory, bytes. Most of it is what it has just written and can be taken back.
const MEMORY_OVERHEAD: u64 = 256 << 20;

/// Processes and threads: the maker's, a VMM's and a file server's.
const PIDS_MAX: u32 = 128;

/// One CPU: microseconds out of as many.
const CPU_MAX: &str = "100000 100000";

/// How often it is tried to remove the cgroup of a maker that was killed, and the pauses. After that the next maker does it.
const REMOVALS: (u32, Duration) = (20, Duration::from_millis(100));

/// The least that there is.
const CPU_WEIGHT: &str = "1";

/// The calling process and its children to come in a cgroup of their own, until dropped.
#[derive(Debug)]
pub(crate) struct Confined {
    path: PathBuf,
    /// Where it was before.
    before: PathBuf,
}

impl Confined {
    /// Enters it. `None` on hosts without cgroup version 2, where pods have no limits either.
    pub(crate) fn enter(size: Size) -> Result<Option<Confined>, CgroupError> {
        if !cgroup::is_unified() {
            return Ok(None);
        }
        remove_left_over();
        let path = path_for(std::process::id());
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| CgroupError::Io { action, path, source }
        };
        let membership = fs::read_to_string("/proc/self/cgroup").map_err(failed("find", &path))?;
        let before = membership.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let before = Path::new(MOUNT).join(before);
        PodCgroup::create(
            &path,
            &Limits {
                memory_max: (u64::from(size.memory_mib) << 20) + MEMORY_OVERHEAD,
                pids_max: PIDS_MAX,
                settings: vec![("cpu.max", CPU_MAX.to_owned()), ("cpu.weight", CPU_WEIGHT.to_owned())],
            },
        )?;
        let confined = Confined { path, before };
        move_to(&confined.path).map_err(failed("join", &confined.path))?;
        Ok(Some(confined))
    }
}

impl Drop for Confined {
    fn drop(&mut self) {
        // What stays is empty, and the next maker removes it.
        let _ = move_to(&self.before).and_then(|()| fs::remove_dir(&self.path));
    }
}

fn path_for(pid: u32) -> PathBuf {
    Path::new(MOUNT).join(format!("{PREFIX}{pid}"))
}

/// Removes the cgroup of a maker that has ended and may have been killed, as soon as what it had started is gone too.
pub(crate) async fn remove(pid: u32) {
    for _ in 0..REMOVALS.0 {
        match fs::remove_dir(path_for(pid)) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => tokio::time::sleep(REMOVALS.1).await,
            _ => return,
        }
    }
}

fn move_to(path: &Path) -> io::Result<()> {
    fs::write(path.join("cgroup.procs"), "0")
}

/// Removes the cgroups of makers that were killed. One that is in use can't be removed.
fn remove_left_over() {
    for entry in fs::read_dir(MOUNT).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_maker_is_limited_and_leaves_nothing() {
        let size = Size { vcpus: 1, memory_mib: 64 };
        if !cgroup::is_unified() || !nix::unistd::geteuid().is_root() {
            return eprintln!("SKIPPED: this takes root and cgroup version 2");
        }
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let Ok(Some(confined)) = Confined::enter(size) else {
            return eprintln!("SKIPPED: no cgroup can be made here");
        };
        let path = confined.path.clone();
        let inside = fs::read_to_string("/proc/self/cgroup").unwrap();
        let limit = fs::read_to_string(path.join("memory.max")).unwrap_or_default();
        drop(confined);
        assert!(inside.contains(PREFIX), "{inside}");
        // Where the controller is there.
        assert!(limit.is_empty() || limit.trim() == (320u64 << 20).to_string(), "{limit}");
        assert_eq!(fs::read_to_string("/proc/self/cgroup").unwrap(), own);
        assert!(!path.exists());
    }
}
