//! Which namespaces a container gets: new ones, existing ones by path, or the pod's.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::spec::{self, IdMapping, Linux, items};
use crate::sys::{path, process};

/// A kind of namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Process ids.
    Pid,
    /// Network.
    Network,
    /// Mounts.
    Mount,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host name.
    Uts,
    /// Users and capabilities.
    User,
    /// The view of the cgroup tree.
    Cgroup,
    /// Monotonic and boot-time clocks.
    Time,
}

impl Kind {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "pid" => Self::Pid,
            "network" => Self::Network,
            "mount" => Self::Mount,
            "ipc" => Self::Ipc,
            "uts" => Self::Uts,
            "user" => Self::User,
            "cgroup" => Self::Cgroup,
            "time" => Self::Time,
            _ => return None,
        })
    }

    /// The kernel's `CLONE_NEW*` flag.
    pub(crate) fn flag(self) -> libc::c_int {
        match self {
            Self::Pid => libc::CLONE_NEWPID,
            Self::Network => libc::CLONE_NEWNET,
            Self::Mount => libc::CLONE_NEWNS,
            Self::Ipc => libc::CLONE_NEWIPC,
            Self::Uts => libc::CLONE_NEWUTS,
            Self::User => libc::CLONE_NEWUSER,
            Self::Cgroup => libc::CLONE_NEWCGROUP,
            Self::Time => libc::CLONE_NEWTIME,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pid => "pid",
            Self::Network => "network",
            Self::Mount => "mount",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::User => "user",
            Self::Cgroup => "cgroup",
            Self::Time => "time",
        })
    }
}

/// A wrong list of namespaces, or one that could not be joined.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum NamespaceError {
    #[error("linux.namespaces: there is no namespace type {0:?}")]
    UnknownKind(String),
    #[error("linux.namespaces: the {0} namespace is given twice")]
    Duplicate(Kind),
    #[error("linux.namespaces: a container needs a new mount namespace")]
    NoMount,
    #[error("linux.uidMappings and linux.gidMappings need a new user namespace, and it needs both")]
    Mappings,
    #[error("linux.timeOffsets needs a new time namespace and the clocks \"monotonic\" or \"boottime\"")]
    TimeOffsets,
    #[error("can't open the {kind} namespace {path}")]
    Open { kind: Kind, path: PathBuf, source: io::Error },
    #[error("{path} is not a namespace")]
    NotANamespace { path: PathBuf },
    #[error("can't join the {kind} namespace {path}")]
    Join { kind: Kind, path: PathBuf, source: io::Error },
    #[error("can't write {path} of a new namespace")]
    Write { path: PathBuf, source: io::Error },
}

/// The namespaces of a container.
#[derive(Debug, Clone, Default)]
pub struct Namespaces {
    new: libc::c_int,
    joined: Vec<(Kind, PathBuf)>,
    uid_map: String,
    gid_map: String,
    time_offsets: String,
}

impl Namespaces {
    /// Reads and checks the `linux` object.
    pub(crate) fn new(linux: &Linux) -> Result<Self, NamespaceError> {
        let mut plan = Self::default();
        for namespace in items(&linux.namespaces) {
            let kind = Kind::parse(&namespace.kind)
                .ok_or_else(|| NamespaceError::UnknownKind(namespace.kind.clone()))?;
            if plan.has(kind) {
                return Err(NamespaceError::Duplicate(kind));
            }
            if namespace.path.as_os_str().is_empty() {
                plan.new |= kind.flag();
            } else {
                plan.joined.push((kind, namespace.path.clone()));
            }
        }
        if !plan.is_new(Kind::Mount) {
            return Err(NamespaceError::NoMount);
        }
        plan.uid_map = id_map(items(&linux.uid_mappings));
        plan.gid_map = id_map(items(&linux.gid_mappings));
        let user = plan.is_new(Kind::User);
        if plan.uid_map.is_empty() == user || plan.gid_map.is_empty() == user {
            return Err(NamespaceError::Mappings);
        }
        plan.time_offsets = time_offsets(linux, plan.is_new(Kind::Time))?;
        Ok(plan)
    }

    /// Whether the container has a namespace of this kind that is not the agent's.
    pub(crate) fn has(&self, kind: Kind) -> bool {
        self.is_new(kind) || self.joined.iter().any(|(joined, _)| *joined == kind)
    }

    /// Whether the container gets a new namespace of this kind.
    pub(crate) fn is_new(&self, kind: Kind) -> bool {
        self.new & kind.flag() != 0
    }

    /// Whether the namespace of this kind is the one at a path.
    pub(crate) fn joins(&self, kind: Kind, path: &Path) -> bool {
        self.joined.iter().any(|(joined, at)| (*joined, at.as_path()) == (kind, path))
    }

    /// Gives the path of a namespace of this kind that is joined.
    pub(crate) fn join_instead(&mut self, kind: Kind, path: PathBuf) {
        if let Some((_, at)) = self.joined.iter_mut().find(|(joined, _)| *joined == kind) {
            *at = path;
        }
    }

    /// Whether any namespace is joined by its path.
    pub(crate) fn joins_any(&self) -> bool {
        !self.joined.is_empty()
    }

    /// Every `CLONE_NEW*` flag of the kinds that are not the agent's: what a further process has to join.
    pub(crate) fn all_flags(&self) -> libc::c_int {
        self.joined.iter().fold(self.new, |flags, (kind, _)| flags | kind.flag())
    }

    /// The flags to clone the container's first process with. A new cgroup namespace is not among them: it takes the
    /// group that the process is in when it is made, which during a clone is still the parent's.
    pub(crate) fn clone_flags(&self) -> libc::c_int {
        self.new & !(libc::CLONE_NEWCGROUP | libc::CLONE_NEWTIME)
    }

    /// Joins the namespaces given by path; a user namespace last, because it takes the privilege for the others. The
    /// cgroup namespace is returned: it can be joined only by a process that is in the container's group.
    pub(crate) fn join(&self) -> Result<Option<OwnedFd>, NamespaceError> {
        let open = |(kind, path): &(Kind, PathBuf)| Ok((*kind, path.clone(), open_namespace(*kind, path)?));
        let mut opened = self.joined.iter().map(open).collect::<Result<Vec<_>, NamespaceError>>()?;
        opened.sort_by_key(|(kind, ..)| *kind == Kind::User);
        let mut cgroup = None;
        for (kind, path, fd) in opened {
            if kind == Kind::Cgroup {
                cgroup = Some(fd);
                continue;
            }
            process::join_namespaces(fd.as_fd(), kind.flag()).map_err(|source| NamespaceError::Join {
                kind,
                path,
                source,
            })?;
        }
        Ok(cgroup)
    }

    /// Writes the id maps of a process that was just cloned into a new user namespace.
    pub(crate) fn write_id_maps(&self, pid: libc::pid_t) -> Result<(), NamespaceError> {
        for (name, map) in [("gid_map", &self.gid_map), ("uid_map", &self.uid_map)] {
            write(Path::new(&format!("/proc/{pid}/{name}")), map)?;
        }
        Ok(())
    }

    /// Makes the time namespace for the children of the calling process, and sets its clocks.
    pub(crate) fn unshare_time(&self) -> Result<(), NamespaceError> {
        if !self.is_new(Kind::Time) {
            return Ok(());
        }
        let path = || PathBuf::from("/proc/self/timens_offsets");
        process::unshare(libc::CLONE_NEWTIME).map_err(|source| NamespaceError::Join {
            kind: Kind::Time,
            path: path(),
            source,
        })?;
        if self.time_offsets.is_empty() { Ok(()) } else { write(&path(), &self.time_offsets) }
    }
}

fn open_namespace(kind: Kind, path: &Path) -> Result<OwnedFd, NamespaceError> {
    let file = fs::File::open(path).map_err(|source| NamespaceError::Open {
        kind,
        path: path.to_owned(),
        source,
    })?;
    match path::file_system_magic(file.as_fd()) {
        Ok(libc::NSFS_MAGIC) => Ok(file.into()),
        Ok(_) => Err(NamespaceError::NotANamespace { path: path.to_owned() }),
        Err(source) => Err(NamespaceError::Open { kind, path: path.to_owned(), source }),
    }
}

fn write(path: &Path, text: &str) -> Result<(), NamespaceError> {
    fs::write(path, text).map_err(|source| NamespaceError::Write { path: path.to_owned(), source })
}

fn id_map(mappings: &[IdMapping]) -> String {
    mappings.iter().map(|map| format!("{} {} {}\n", map.container_id, map.host_id, map.size)).collect()
}

fn time_offsets(linux: &Linux, new: bool) -> Result<String, NamespaceError> {
    let offsets = linux.time_offsets.iter().flatten();
    let mut text = String::new();
    for (clock, offset) in offsets {
        if !new || !matches!(clock.as_str(), "monotonic" | "boottime") {
            return Err(NamespaceError::TimeOffsets);
        }
        let spec::TimeOffset { secs, nanosecs } = offset;
        text.push_str(&format!("{clock} {secs} {nanosecs}\n"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Namespaces, NamespaceError> {
        Namespaces::new(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn new_and_joined_namespaces_are_told_apart() {
        let plan = parse(
            r#"{"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "network", "path": "/proc/1/ns/net"}]}"#,
        )
        .unwrap();
        assert!(plan.is_new(Kind::Pid) && !plan.is_new(Kind::Network) && plan.has(Kind::Network));
        assert!(!plan.has(Kind::Uts));
        assert_eq!(plan.clone_flags(), libc::CLONE_NEWNS | libc::CLONE_NEWPID);
        assert_eq!(plan.all_flags(), libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET);
    }

    #[test]
    fn wrong_lists_are_refused() {
        let error = |json: &str| parse(json).unwrap_err().to_string();
        assert!(error(r#"{"namespaces": [{"type": "mount"}, {"type": "psychic"}]}"#).contains("psychic"));
        assert!(error(r#"{"namespaces": [{"type": "mount"}, {"type": "mount"}]}"#).contains("twice"));
        assert!(error(r#"{"namespaces": [{"type": "mount", "path": "/x"}]}"#).contains("mount namespace"));
        assert!(error(r#"{"namespaces": [{"type": "mount"}, {"type": "user"}]}"#).contains("uidMappings"));
        let maps = r#""uidMappings": [{"containerID": 0, "hostID": 5, "size": 9}]"#;
        assert!(
            error(&format!(r#"{{"namespaces": [{{"type": "mount"}}], {maps}}}"#)).contains("user namespace")
        );
    }

    #[test]
    fn id_maps_and_time_offsets_have_the_kernels_form() {
        let plan = parse(
            r#"{"namespaces": [{"type": "mount"}, {"type": "user"}, {"type": "time"}],
                "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
                "gidMappings": [{"containerID": 0, "hostID": 2000, "size": 1}],
                "timeOffsets": {"boottime": {"secs": -3, "nanosecs": 4}}}"#,
        )
        .unwrap();
        assert_eq!(plan.uid_map, "0 1000 10\n");
        assert_eq!(plan.gid_map, "0 2000 1\n");
        assert_eq!(plan.time_offsets, "boottime -3 4\n");
    }

    #[test]
    fn a_file_that_is_no_namespace_is_refused() {
        let error = open_namespace(Kind::Pid, Path::new("/dev/null")).unwrap_err();
        assert!(matches!(error, NamespaceError::NotANamespace { .. }), "{error}");
    }
}
