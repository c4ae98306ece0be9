//! The pod's cgroup on the host (cgroup version 2): its VMM and file server live in it, under limits.
//!
//! On a host without a plain version 2 hierarchy there is no pod cgroup, and [`PodCgroup::create`] says so.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_agent_protocol::{StatsResponse, cgroup as figures};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

/// Where the hierarchy is mounted.
pub(crate) const MOUNT: &str = "/sys/fs/cgroup";

/// The file that is there as long as the memory controller is on.
const MEMORY_MAX: &str = "memory.max";

/// Controllers that each pod's cgroup uses, if the host has them.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "io"];

/// Why there is no cgroup for the pod.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A cgroupsPath that can't be one.
    #[error("{0:?} is not a cgroup path")]
    Path(PathBuf),
    /// A file system operation failed.
    #[error("can't {action} the cgroup {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which directory or file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It is somebody else's.
    #[error("the cgroup {0} is in use: there are processes in it, or another pod has it")]
    Occupied(PathBuf),
    /// Somebody in it does not end.
    #[error("processes in the cgroup {0} are still there although they were killed")]
    Busy(PathBuf),
}

/// Limits of a pod as the host enforces them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Bytes for guest memory, VMM and file server together, page cache included.
    pub memory_max: u64,
    /// Processes and threads.
    pub pids_max: u32,
    /// What else there is to write, and to which file.
    pub settings: Vec<(&'static str, String)>,
}

/// A cgroup that the shim made, or found empty. It is this shim's as long as this lives: no other takes it meanwhile.
#[derive(Debug)]
pub(crate) struct PodCgroup {
    path: PathBuf,
    directory: Flock<File>,
    /// Whether memory could be limited in it when it was made.
    has_memory: bool,
}

/// Whether this host has cgroup version 2 and nothing else.
pub(crate) fn is_unified() -> bool {
    statfs(MOUNT).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Whether a process is in a frozen cgroup, by the text of its `/proc/pid/cgroup`.
pub(crate) fn is_frozen(membership: &str) -> bool {
    let unified = membership.lines().find_map(|line| line.strip_prefix("0::/"));
    let Some(path) = unified else { return false };
    fs::read_to_string(Path::new(MOUNT).join(path).join("cgroup.events"))
        .is_ok_and(|events| events.lines().any(|line| line == "frozen 1"))
}

/// The directory for a `linux.cgroupsPath` (runtime specification, "Cgroups Path"), in cgroupfs notation
/// (`/kubepods/pod1/id`) or systemd's (`kubepods-pod1.slice:cri-containerd:id`).
pub(crate) fn resolve(cgroups_path: &Path) -> Result<PathBuf, CgroupError> {
    let bad = || CgroupError::Path(cgroups_path.to_owned());
    let text = cgroups_path.to_str().ok_or_else(bad)?;
    let relative = match text.split(':').collect::<Vec<_>>().as_slice() {
        [slice, prefix, name] => expand_slice(slice).ok_or_else(bad)?.join(format!("{prefix}-{name}.scope")),
        [path] => PathBuf::from(path.trim_start_matches('/')),
        _ => return Err(bad()),
    };
    let plain = relative.components().all(|component| matches!(component, Component::Normal(_)));
    if !plain || relative.as_os_str().is_empty() || text.contains('\0') {
        return Err(bad());
    }
    Ok(Path::new(MOUNT).join(relative))
}

/// `a-b.slice` is `a.slice/a-b.slice` (systemd.slice(5)).
fn expand_slice(slice: &str) -> Option<PathBuf> {
    if slice.is_empty() || slice == "-.slice" {
        return Some(PathBuf::new());
    }
    let name = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
    }
    Some(path)
}

impl PodCgroup {
    /// The cgroup's directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the cgroup `path` (from [`resolve`]) and its missing parents. One that exists is taken if nobody is in it.
    pub(crate) fn create(path: &Path, limits: &Limits) -> Result<PodCgroup, CgroupError> {
        make(path)?;
        let directory = File::open(path).map_err(|source| CgroupError::Io {
            action: "open",
            path: path.to_owned(),
            source,
        })?;
        let directory =
            Flock::lock(directory, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
                Errno::EWOULDBLOCK => CgroupError::Occupied(path.to_owned()),
                errno => CgroupError::Io { action: "lock", path: path.to_owned(), source: errno.into() },
            })?;
        check_free(path)?;
        let has_memory = path.join(MEMORY_MAX).exists();
        let cgroup = PodCgroup { path: path.to_owned(), directory, has_memory };
        cgroup.limit(limits);
        Ok(cgroup)
    }

    /// Brings limits and figures back if they are gone. systemd, whenever it looks over its slices, leaves those controllers
    /// on that its own units need, and it does not know what kubelet's slices hold beside them.
    pub(crate) fn keep(&self, limits: impl FnOnce() -> Limits) {
        if self.has_memory && !self.path.join(MEMORY_MAX).exists() {
            log::info!("controllers of the cgroup {} were turned off: on again", self.path.display());
            enable(&self.path, &CONTROLLERS);
            self.limit(&limits());
        }
    }

    /// Sets limits; one that can't be set is said and left out.
    pub(crate) fn limit(&self, limits: &Limits) {
        let always = [
            (MEMORY_MAX, limits.memory_max.to_string()),
            // One pod, one fate: half a pod is of no use.
            ("memory.oom.group", "1".to_owned()),
            ("pids.max", limits.pids_max.to_string()),
        ];
        for (file, value) in always.iter().chain(&limits.settings) {
            self.set(file, value);
        }
    }

    fn set(&self, file: &str, value: &str) {
        let path = self.path.join(file);
        let mut written = write(&path, value);
        if written.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            // Not every pod needs every controller.
            enable(&self.path, &[file.split('.').next().unwrap_or_default()]);
            written = write(&path, value);
        }
        if let Err(error) = written {
            log::warn!("can't set {} to {value}: {error}; the pod goes without", path.display());
        }
    }
}

/// That a cgroup may be taken: it does not exist, or nobody is in it or below it.
pub(crate) fn check_free(path: &Path) -> Result<(), CgroupError> {
    match fs::read_to_string(path.join("cgroup.events")) {
        Ok(events) if events.lines().any(|line| line == "populated 1") => {
            Err(CgroupError::Occupied(path.to_owned()))
        }
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(CgroupError::Io { action: "look into", path: path.to_owned(), source }),
    }
}

/// Makes a cgroup and its missing parents.
fn make(path: &Path) -> Result<(), CgroupError> {
    let below_mount = path.strip_prefix(MOUNT).map_err(|_| CgroupError::Path(path.to_owned()))?;
    let mut current = PathBuf::from(MOUNT);
    for component in below_mount.components() {
        // A controller that the host lacks or that a parent withholds is simply not there for the pod.
        allow_below(&current, &CONTROLLERS);
        current.push(component);
        match fs::create_dir(&current) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(CgroupError::Io { action: "create", path: current, source }),
        }
    }
    Ok(())
}

/// Has the cgroup `path` offer the files of these controllers.
fn enable(path: &Path, controllers: &[&str]) {
    let Ok(below_mount) = path.strip_prefix(MOUNT) else { return };
    let mut current = PathBuf::from(MOUNT);
    for component in below_mount.components() {
        allow_below(&current, controllers);
        current.push(component);
    }
}

fn allow_below(parent: &Path, controllers: &[&str]) {
    for controller in controllers {
        let _ = write(&parent.join("cgroup.subtree_control"), &format!("+{controller}"));
    }
}

impl AsFd for PodCgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// Kills all that is left in a cgroup and removes it with every parent that is empty then. Idempotent.
pub(crate) fn remove(path: &Path, limit: Duration) -> Result<(), CgroupError> {
    if path == Path::new(MOUNT) || !path.starts_with(MOUNT) {
        return Err(CgroupError::Path(path.to_owned()));
    }
    match write(&path.join("cgroup.kill"), "1") {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => {
            return Err(CgroupError::Io { action: "kill the processes of", path: path.to_owned(), source });
        }
    }
    let deadline = Instant::now() + limit;
    loop {
        match fs::remove_dir(path) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            // A killed process leaves its cgroup only when it is really gone.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                if Instant::now() >= deadline {
                    return Err(CgroupError::Busy(path.to_owned()));
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(source) => return Err(CgroupError::Io { action: "remove", path: path.to_owned(), source }),
        }
    }
    Ok(())
}

/// Removes those of `parents` that are empty, innermost last in the list.
pub(crate) fn remove_empty(parents: &[PathBuf]) {
    for parent in parents.iter().rev().filter(|parent| parent.starts_with(MOUNT)) {
        if fs::remove_dir(parent).is_err() {
            break;
        }
    }
}

/// The directories between the mount and `path` that do not exist yet, outermost first: making `path` will make them.
pub(crate) fn missing_parents(path: &Path) -> Vec<PathBuf> {
    let mut missing: Vec<PathBuf> = path
        .ancestors()
        .skip(1)
        .take_while(|ancestor| *ancestor != Path::new(MOUNT) && !ancestor.exists())
        .map(Path::to_owned)
        .collect();
    missing.reverse();
    missing
}

/// What all that is in a cgroup uses.
pub(crate) fn stats(path: &Path) -> StatsResponse {
    figures::read(&|file| fs::read_to_string(path.join(file)).unwrap_or_default())
}

/// Moves a process into a cgroup that exists (runtime option `ShimCgroup`).
pub(crate) fn join(cgroup: &str, pid: u32) -> Result<(), CgroupError> {
    let path = resolve(Path::new(cgroup))?;
    fs::create_dir_all(&path)
        .and_then(|()| write(&path.join("cgroup.procs"), &pid.to_string()))
        .map_err(|source| CgroupError::Io { action: "join", path, source })
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(path: &str) -> Option<String> {
        resolve(Path::new(path)).ok().map(|path| path.to_str().unwrap().trim_start_matches(MOUNT).to_owned())
    }

    #[test]
    fn both_notations_are_understood() {
        assert_eq!(resolved("/default/demo").as_deref(), Some("/default/demo"));
        assert_eq!(resolved("kubepods/pod1/c1").as_deref(), Some("/kubepods/pod1/c1"));
        assert_eq!(
            resolved("kubepods-burstable-pod1.slice:cri-containerd:c1").as_deref(),
            Some(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-c1.scope"
            )
        );
        assert_eq!(resolved(":ctr:c1").as_deref(), Some("/ctr-c1.scope"));
    }

    #[test]
    fn a_path_cannot_leave_the_hierarchy() {
        for path in
            ["", "/", "/..", "/a/../../etc", "a:b", "a:b:c:d", "a--b.slice:x:y", "slice:x:y", "../x:y:z"]
        {
            assert_eq!(resolved(path), None, "{path}");
        }
        assert!(remove(Path::new("/tmp/x"), Duration::ZERO).is_err());
        assert!(remove(Path::new(MOUNT), Duration::ZERO).is_err());
    }
}
