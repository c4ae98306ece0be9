//! The mounts of a container: what each is, and how it is made and attached inside the container's root.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::SHM_SIZE_OPTION;

use super::copy_up;
use super::mount_options::{MountOptions, OptionError};
use super::spec;
use crate::sys::mount::{self, AttrChange, attr};
use crate::sys::path::{self, Missing};

/// The guest's own sysfs.
const SYS: &str = "/sys";

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// An existing directory or file.
    Bind {
        /// Path in the guest.
        path: PathBuf,
        /// Whether mounts below it come along.
        recursive: bool,
        /// How many bytes the guest's shared memory has to have room for.
        room: Option<u64>,
    },
    /// A file system of its own.
    FileSystem {
        /// Its type.
        kind: String,
        /// Device or name.
        source: Option<String>,
    },
}

/// A checked mount.
#[derive(Debug, Clone)]
pub(crate) struct MountPlan {
    /// Path in the container, absolute.
    pub destination: PathBuf,
    /// What is mounted.
    pub source: Source,
    /// How.
    pub options: MountOptions,
}

/// A wrong mount, or one that failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum MountError {
    #[error("mounts: {destination:?} is not a path below the root")]
    Destination { destination: PathBuf },
    #[error("mounts: {destination:?} needs a source")]
    NoSource { destination: PathBuf },
    #[error("mounts: {destination:?} needs a type")]
    NoType { destination: PathBuf },
    #[error("mounts: {destination:?}")]
    Options { destination: PathBuf, source: OptionError },
    #[error("mounts: {destination:?}: id-mapped mounts are not supported")]
    IdMapped { destination: PathBuf },
    #[error("can't open {path:?} to bind it to {destination:?}")]
    OpenSource { path: PathBuf, destination: PathBuf, source: io::Error },
    #[error("can't mount a {kind} for {destination:?}")]
    New { kind: String, destination: PathBuf, source: io::Error },
    #[error("can't make the mount point {destination:?}")]
    Target { destination: PathBuf, source: io::Error },
    #[error("{destination:?} must be an ordinary directory to mount a {kind} on it")]
    NotOrdinary { kind: String, destination: PathBuf },
    #[error("can't copy what the tmpfs at {destination:?} would hide")]
    CopyUp { destination: PathBuf, source: io::Error },
    #[error("can't set the mount options of {destination:?}")]
    SetOptions { destination: PathBuf, source: io::Error },
    #[error("can't attach the mount at {destination:?}")]
    Attach { destination: PathBuf, source: io::Error },
}

impl MountPlan {
    /// Checks one of the specification's mounts.
    pub(crate) fn new(mount: &spec::Mount) -> Result<Self, MountError> {
        // The specification wants absolute destinations; older ones are relative to the root.
        let destination = Path::new("/").join(&mount.destination);
        if destination.parent().is_none() {
            return Err(MountError::Destination { destination });
        }
        if !spec::items(&mount.uid_mappings).is_empty() || !spec::items(&mount.gid_mappings).is_empty() {
            return Err(MountError::IdMapped { destination });
        }
        let kind = mount.kind.as_deref().unwrap_or_default();
        let (asked, room) = split_room(mount);
        let options = match MountOptions::parse(&asked, matches!(kind, "bind" | "rbind")) {
            Ok(options) => options,
            Err(source) => return Err(MountError::Options { destination, source }),
        };
        let source = match (options.bind, kind) {
            (Some(recursive), _) => match mount.source.as_deref() {
                None | Some("") => return Err(MountError::NoSource { destination }),
                Some(path) => {
                    Source::Bind { path: path.into(), recursive: recursive || kind == "rbind", room }
                }
            },
            (None, "" | "none") => return Err(MountError::NoType { destination }),
            (None, kind) => {
                Source::FileSystem { kind: file_system(kind).to_owned(), source: mount.source.clone() }
            }
        };
        Ok(Self { destination, source, options })
    }

    /// Opens the source of a bind mount as a detached mount; `None` for a file system of its own.
    ///
    /// A sysfs shows the network namespace, and only that one's owner may mount it. Where a container has users of its own
    /// and the pod's network, it gets the guest's.
    ///
    /// Message queues are those of the IPC namespace; where that is the pod's, only the guest may mount them.
    pub(crate) fn open_source(&self, own_users: bool, own_ipc: bool) -> Result<Option<OwnedFd>, MountError> {
        if let Source::FileSystem { kind, .. } = &self.source
            && own_users
            && !own_ipc
            && kind == "mqueue"
        {
            // A kernel without them says so once more when it is to be mounted.
            return Ok(mount::new_file_system(kind, Some(kind), &[], 0).ok());
        }
        if let Source::FileSystem { kind, .. } = &self.source
            && own_users
            && kind == "sysfs"
        {
            return mount::clone_tree(Path::new(SYS), false).map(Some).map_err(|source| {
                MountError::OpenSource { path: SYS.into(), destination: self.destination.clone(), source }
            });
        }
        let Source::Bind { path, recursive, room } = &self.source else { return Ok(None) };
        let make_room = || room.map_or(Ok(()), |bytes| mount::grow_tmpfs(path, bytes));
        make_room().and_then(|()| mount::clone_tree(path, *recursive)).map(Some).map_err(|source| {
            MountError::OpenSource { path: path.clone(), destination: self.destination.clone(), source }
        })
    }

    /// Makes the mount and attaches it inside `root`. `source` is what [`open_source`](Self::open_source) returned.
    ///
    /// Returns the mount if it has yet to become read-only, which is so where more is made inside it.
    pub(crate) fn mount(&self, root: BorrowedFd<'_>, source: Option<OwnedFd>) -> Result<Mounted, MountError> {
        let detached = match (source, &self.source) {
            (Some(bind), _) => bind,
            (None, Source::Bind { .. }) => {
                return Err(MountError::NoSource { destination: self.destination() });
            }
            (None, Source::FileSystem { kind, source }) => {
                match self.new_file_system(root, kind, source.as_deref()) {
                    // Not every kernel has every file system; nothing a container does by itself needs this one.
                    Err(MountError::New { source, .. }) if kind == "mqueue" && is_unknown_type(&source) => {
                        return Ok(Mounted::Skipped(format!(
                            "{:?} not mounted: no mqueue in this kernel",
                            self.destination
                        )));
                    }
                    result => result?,
                }
            }
        };
        let target = self.target(root, detached.as_fd())?;
        if self.options.copy_up {
            copy_up::copy(target.as_fd(), detached.as_fd())
                .map_err(|source| MountError::CopyUp { destination: self.destination(), source })?;
        }
        let late_read_only = self.options.read_only() && !matches!(self.source, Source::Bind { .. });
        self.set_options(detached.as_fd(), late_read_only)?;
        mount::attach(detached.as_fd(), target.as_fd())
            .map_err(|source| MountError::Attach { destination: self.destination(), source })?;
        self.set_propagation(detached.as_fd())?;
        Ok(if late_read_only { Mounted::ReadOnlyLater(detached) } else { Mounted::Done })
    }

    fn destination(&self) -> PathBuf {
        self.destination.clone()
    }

    fn new_file_system(
        &self,
        root: BorrowedFd<'_>,
        kind: &str,
        source: Option<&str>,
    ) -> Result<OwnedFd, MountError> {
        let mut data = self.options.data.clone();
        if kind == "tmpfs"
            && !data.iter().any(|option| option.starts_with("mode="))
            && let Some(mode) = self.hidden_mode(root)
        {
            data.push(format!("mode={mode:o}"));
        }
        // A file system on a device has to know; the attribute of the mount alone would come too late.
        if self.options.read_only() && source.is_some_and(|source| source.starts_with("/dev/")) {
            data.push("ro".to_owned());
        }
        mount::new_file_system(kind, source, &data, 0).map_err(|source| MountError::New {
            kind: kind.to_owned(),
            destination: self.destination(),
            source,
        })
    }

    /// The mode of the directory that is mounted over, if there is one.
    fn hidden_mode(&self, root: BorrowedFd<'_>) -> Option<libc::mode_t> {
        let hidden = path::open_in_root(root, &self.destination, libc::O_PATH | libc::O_DIRECTORY).ok()?;
        Some(path::stat(hidden.as_fd()).ok()?.st_mode & 0o7777)
    }

    /// Looks the mount point up, or makes it.
    fn target(&self, root: BorrowedFd<'_>, mount: BorrowedFd<'_>) -> Result<OwnedFd, MountError> {
        let error = |source| MountError::Target { destination: self.destination(), source };
        let missing = match path::file_type(mount).map_err(error)? {
            libc::S_IFDIR => Missing::Directory,
            _ => Missing::File,
        };
        if let Source::FileSystem { kind, .. } = &self.source
            && matches!(kind.as_str(), "proc" | "sysfs")
        {
            // What is later written to these must not end up elsewhere because of a link in the image.
            let relative = self.destination.strip_prefix("/").unwrap_or(&self.destination);
            let link = path::open_in_root(root, relative, libc::O_PATH | libc::O_NOFOLLOW);
            if link.is_ok_and(|fd| path::file_type(fd.as_fd()).is_ok_and(|kind| kind != libc::S_IFDIR)) {
                return Err(MountError::NotOrdinary { kind: kind.clone(), destination: self.destination() });
            }
        }
        path::create_in_root(root, &self.destination, missing).map_err(error)
    }

    fn set_options(&self, mount: BorrowedFd<'_>, late_read_only: bool) -> Result<(), MountError> {
        let mut own = self.options.attributes;
        if late_read_only {
            own.set &= !attr::RDONLY;
        }
        for (change, recursive) in [(self.options.recursive_attributes, true), (own, false)] {
            if !change.is_empty() {
                mount::set_attributes(mount, change, recursive)
                    .map_err(|source| MountError::SetOptions { destination: self.destination(), source })?;
            }
        }
        Ok(())
    }

    fn set_propagation(&self, mount: BorrowedFd<'_>) -> Result<(), MountError> {
        for &(kind, recursive) in &self.options.propagation {
            mount::set_attributes(mount, AttrChange::propagation(kind), recursive)
                .map_err(|source| MountError::SetOptions { destination: self.destination(), source })?;
        }
        Ok(())
    }
}

/// Takes the size that a bind of the guest's shared memory has to have out of a mount's options.
fn split_room(mount: &spec::Mount) -> (Vec<String>, Option<u64>) {
    let mut options = spec::items(&mount.options).to_vec();
    let mut room = None;
    if mount.source.as_deref() == Some("/dev/shm") {
        options.retain(|option| match option.strip_prefix(SHM_SIZE_OPTION).map(str::parse) {
            Some(Ok(bytes)) => {
                room = Some(bytes);
                false
            }
            _ => true,
        });
    }
    (options, room)
}

/// What became of a mount.
#[derive(Debug)]
pub(crate) enum Mounted {
    /// It is there as asked.
    Done,
    /// It is there, and has to become read-only once everything in it is made.
    ReadOnlyLater(OwnedFd),
    /// It was left out, for the reason given.
    Skipped(String),
}

/// The guest's name of a file system type: its cgroups are version 2 only.
fn file_system(kind: &str) -> &str {
    if kind == "cgroup" { "cgroup2" } else { kind }
}

fn is_unknown_type(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENODEV)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<MountPlan, MountError> {
        MountPlan::new(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn kinds_of_mounts_are_told_apart() {
        let bind = plan(r#"{"destination": "/data", "source": "/srv", "options": ["rbind", "ro"]}"#).unwrap();
        assert_eq!(bind.source, Source::Bind { path: "/srv".into(), recursive: true, room: None });
        let bind = plan(r#"{"destination": "data", "type": "bind", "source": "/srv"}"#).unwrap();
        assert_eq!(bind.source, Source::Bind { path: "/srv".into(), recursive: false, room: None });
        assert_eq!(bind.destination, Path::new("/data"));
        let cgroup =
            plan(r#"{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}"#).unwrap();
        let Source::FileSystem { kind, .. } = cgroup.source else { panic!("{:?}", cgroup.source) };
        assert_eq!(kind, "cgroup2");
    }

    #[test]
    fn shared_memory_has_a_size() {
        let plan = plan(
            r#"{"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind", "size=65536"]}"#,
        );
        let source = Source::Bind { path: "/dev/shm".into(), recursive: true, room: Some(65536) };
        assert_eq!(plan.unwrap().source, source);
    }

    #[test]
    fn wrong_mounts_are_refused() {
        for (json, text) in [
            (r#"{"destination": "/", "type": "tmpfs"}"#, "below the root"),
            (r#"{"destination": "/a", "type": "bind"}"#, "needs a source"),
            (r#"{"destination": "/a", "source": "/b"}"#, "needs a type"),
            (r#"{"destination": "/a", "source": "/b", "options": ["bind", "r0"]}"#, "/a"),
            (r#"{"destination": "/a", "type": "tmpfs", "uidMappings": [{}]}"#, "id-mapped"),
        ] {
            let error = plan(json).unwrap_err().to_string();
            assert!(error.contains(text), "{json}: {error}");
        }
    }
}
