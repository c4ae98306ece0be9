//! The file systems that the guest itself needs.

use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};

/// Where the cgroup v2 hierarchy is mounted.
pub(crate) const CGROUPS: &str = "/sys/fs/cgroup";

/// A mount that failed.
#[derive(Debug, thiserror::Error)]
#[error("can't mount {kind} on {target}")]
pub(crate) struct FileSystemError {
    kind: String,
    target: String,
    source: io::Error,
}

/// Type, place, flags and options, in order.
const EARLY: [(&str, &str, MsFlags, &str); 8] = {
    let no = MsFlags::MS_NOSUID;
    let no_devices = no.union(MsFlags::MS_NODEV);
    let nothing = no_devices.union(MsFlags::MS_NOEXEC);
    let no_programs = no.union(MsFlags::MS_NOEXEC);
    [
        ("devtmpfs", "/dev", no_programs, "mode=755"),
        ("proc", "/proc", nothing, ""),
        ("sysfs", "/sys", nothing, ""),
        // Delegated, so that a container that may write to its own group can't lift the limits on it.
        ("cgroup2", CGROUPS, nothing, "nsdelegate,memory_recursiveprot"),
        ("tmpfs", "/run", no_devices, "mode=755"),
        ("tmpfs", "/tmp", no_devices, "mode=1777"),
        ("devpts", "/dev/pts", no_programs, "mode=620,ptmxmode=666,gid=5"),
        // As large as container engines make it.
        ("tmpfs", "/dev/shm", nothing, "mode=1777,size=65536k"),
    ]
};

/// Mounts what is needed before anything else.
pub(crate) fn mount_early() -> Result<(), FileSystemError> {
    for (kind, target, flags, options) in EARLY {
        match mount_one(kind, kind, Path::new(target), flags, options) {
            // The kernel may have mounted its devices itself.
            Err(error) if kind == "devtmpfs" && error.source.raw_os_error() == Some(libc::EBUSY) => {}
            result => result?,
        }
    }
    Ok(())
}

/// Mounts what the pod shares with the host. A device node in it means what its number means here, to a container that may use it.
pub(crate) fn mount_shared(tag: &str, place: &Path) -> Result<(), FileSystemError> {
    mount_one("virtiofs", tag, place, MsFlags::empty(), "")
}

fn mount_one(
    kind: &str,
    source: &str,
    target: &Path,
    flags: MsFlags,
    options: &str,
) -> Result<(), FileSystemError> {
    let error = |source: io::Error| FileSystemError {
        kind: kind.to_owned(),
        target: target.display().to_string(),
        source,
    };
    let options = Some(options).filter(|options| !options.is_empty());
    let attempt = || mount(Some(source), target, Some(kind), flags, options).map_err(io::Error::from);
    match attempt() {
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(target).map_err(error)?;
            attempt().map_err(error)
        }
        result => result.map_err(error),
    }
}
