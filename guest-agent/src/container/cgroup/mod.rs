//! Control groups, version 2: one group a container, directly below the hierarchy's root.

pub(crate) mod device_filter;
pub(crate) mod events;
pub(crate) mod resources;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_agent_protocol::cgroup::flat_value;
use tokio::time::{Instant, sleep};

use crate::sys::path;

/// Controllers that containers use, if the kernel has them.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];

/// Most process ids that are reported of a container; the host takes no long answers.
const MAX_PIDS: usize = 8192;

/// Groups that a container may make inside its own: how deep, and how many.
const MAX_DEPTH: &str = "64";
const MAX_DESCENDANTS: &str = "4096";

/// How long the kernel may take to freeze or empty a group.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// A failed use of control groups.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum CgroupError {
    #[error("can't make the cgroup {path:?}")]
    Create { path: PathBuf, source: io::Error },
    #[error("can't remove the cgroup {path:?}")]
    Remove { path: PathBuf, source: io::Error },
    #[error("can't read {path:?}")]
    Read { path: PathBuf, source: io::Error },
    #[error("can't write {value:?} to {path:?}")]
    Write { path: PathBuf, value: String, source: io::Error },
    #[error("the guest's kernel has no cgroup controller {controller:?} for {property}")]
    NoController { controller: String, property: String },
    #[error("{path:?} did not become {state} within {} seconds", SETTLE_LIMIT.as_secs())]
    Unsettled { path: PathBuf, state: &'static str },
}

/// The mounted hierarchy.
#[derive(Debug, Clone)]
pub(crate) struct Hierarchy {
    root: PathBuf,
    controllers: BTreeSet<String>,
}

impl Hierarchy {
    /// Opens the hierarchy mounted at `root` and enables its controllers for the groups below.
    pub(crate) fn open(root: &Path) -> Result<Self, CgroupError> {
        let available = read(&root.join("cgroup.controllers"))?;
        let controllers: BTreeSet<String> = available
            .split_whitespace()
            .filter(|name| CONTROLLERS.contains(name))
            .map(str::to_owned)
            .collect();
        if !controllers.is_empty() {
            let enable: Vec<String> = controllers.iter().map(|name| format!("+{name}")).collect();
            write(&root.join("cgroup.subtree_control"), &enable.join(" "))?;
        }
        Ok(Self { root: root.to_owned(), controllers })
    }

    /// Whether groups have the files of a controller.
    pub(crate) fn has(&self, controller: &str) -> bool {
        self.controllers.contains(controller)
    }

    /// Makes the group of a container.
    pub(crate) fn create(&self, container_id: &str) -> Result<Cgroup, CgroupError> {
        // The prefix keeps an id from being the name of a file of the kernel's.
        let path = self.root.join(format!("container-{container_id}"));
        let error = |source| CgroupError::Create { path: path.clone(), source };
        match fs::create_dir(&path) {
            // Left behind by a container whose group could not be removed.
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_dir(&path).and_then(|()| fs::create_dir(&path)).map_err(error)?
            }
            result => result.map_err(error)?,
        }
        let directory = path::open_directory(&path).map_err(error)?;
        let cgroup = Cgroup { path, directory };
        // What a container makes there the agent has to walk through.
        cgroup.write("cgroup.max.depth", MAX_DEPTH)?;
        cgroup.write("cgroup.max.descendants", MAX_DESCENDANTS)?;
        Ok(cgroup)
    }
}

/// A container's group.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// A file of the group.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The group's directory, to start processes in it.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Reads one of the group's files.
    pub(crate) fn read(&self, name: &str) -> Result<String, CgroupError> {
        read(&self.file(name))
    }

    fn write(&self, name: &str, value: &str) -> Result<(), CgroupError> {
        write(&self.file(name), value)
    }

    /// Kills every process of the group and of those below, also if it is frozen.
    pub(crate) fn kill(&self) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1")
    }

    /// The processes of the group and of those below; at most [`MAX_PIDS`].
    pub(crate) fn pids(&self) -> Result<Vec<u32>, CgroupError> {
        let mut pids = Vec::new();
        self.visit(&self.path, &mut |path| {
            let procs = read(&path.join("cgroup.procs"))?;
            pids.extend(
                procs.lines().filter_map(|line| line.parse::<u32>().ok()).take(MAX_PIDS - pids.len()),
            );
            Ok(())
        })?;
        Ok(pids)
    }

    /// Whether a process was killed for want of memory in the group, and how many.
    pub(crate) fn oom_kills(&self) -> u64 {
        self.read("memory.events").map_or(0, |text| flat_value(&text, "oom_kill"))
    }

    /// Stops or continues every process, and waits until the kernel is done with it.
    pub(crate) async fn set_frozen(&self, frozen: bool) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        let state = if frozen { "frozen" } else { "running" };
        let settled = self.wait_for_event("frozen", frozen.into(), state).await;
        if settled.is_err() && frozen {
            // Half frozen would be worse than not at all.
            self.write("cgroup.freeze", "0")?;
        }
        settled
    }

    /// Kills what is left, waits until it is gone, and removes the group with all below.
    pub(crate) async fn remove(&self) -> Result<(), CgroupError> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        self.wait_for_event("populated", 0, "empty").await?;
        let mut groups = Vec::new();
        self.visit(&self.path, &mut |path| {
            groups.push(path.to_owned());
            Ok(())
        })?;
        // Parents were visited first.
        for path in groups.into_iter().rev() {
            match fs::remove_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result.map_err(|source| CgroupError::Remove { path, source })?,
            }
        }
        Ok(())
    }

    async fn wait_for_event(&self, key: &str, value: u64, state: &'static str) -> Result<(), CgroupError> {
        let deadline = Instant::now() + SETTLE_LIMIT;
        let mut pause = Duration::from_micros(200);
        while flat_value(&self.read("cgroup.events")?, key) != value {
            if Instant::now() >= deadline {
                return Err(CgroupError::Unsettled { path: self.path.clone(), state });
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(())
    }

    fn visit(
        &self,
        path: &Path,
        action: &mut dyn FnMut(&Path) -> Result<(), CgroupError>,
    ) -> Result<(), CgroupError> {
        action(path)?;
        let error = |source| CgroupError::Read { path: path.to_owned(), source };
        for entry in fs::read_dir(path).map_err(error)? {
            let entry = entry.map_err(error)?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                match self.visit(&entry.path(), action) {
                    Err(CgroupError::Read { source, .. }) if is_passed_over(&source) => {}
                    result => result?,
                }
            }
        }
        Ok(())
    }
}

/// Whether a group inside a container's is gone meanwhile, or is one of threads, whose processes are listed above it.
fn is_passed_over(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP))
}

fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|source| CgroupError::Read { path: path.to_owned(), source })
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    // The kernel makes these files; one that is missing must not be created.
    let open = fs::OpenOptions::new().write(true).open(path);
    open.and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
        .map_err(|source| CgroupError::Write { path: path.to_owned(), value: value.to_owned(), source })
}
