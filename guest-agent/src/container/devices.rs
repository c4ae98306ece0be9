//! Device nodes of a container: the default ones, those of the specification, and the usual links in `/dev`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::spec;
use crate::sys::path::{self, Missing};
use crate::sys::{c_path, check, mount};

/// A device node to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DevicePlan {
    /// Path in the container, absolute.
    pub path: PathBuf,
    /// File type bits: character or block device, or FIFO.
    pub kind: libc::mode_t,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits.
    pub mode: libc::mode_t,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Whether it may be left out where the guest has no such device.
    pub optional: bool,
}

/// A wrong device, or one that could not be made.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum DeviceError {
    #[error("linux.devices: {path:?} has the unknown type {kind:?}")]
    Kind { path: PathBuf, kind: String },
    #[error("linux.devices: {path:?} has no valid device number")]
    Number { path: PathBuf },
    #[error("linux.devices: {path:?} is not a plain absolute path")]
    Path { path: PathBuf },
    #[error("linux.devices: {path:?}: the guest's kernel has no character device {major}:{minor}")]
    Absent { path: PathBuf, major: u32, minor: u32 },
    #[error("can't make the device {path:?}")]
    Make { path: PathBuf, source: io::Error },
    #[error("can't make the link {path:?}")]
    Link { path: PathBuf, source: io::Error },
}

/// The devices that every Linux container has (runtime specification, "Default Devices").
const DEFAULT: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Links in `/dev` and where they point.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// The major number of devices that are there or not as the kernel was built (`MISC_MAJOR`): FUSE, the TUN device.
const MISC: u32 = 10;

/// The default devices and those of the specification, which overrule the default ones. A container that may use any
/// device was given all there are, and does without some.
pub(crate) fn plan(
    devices: &[spec::Device],
    rules: &[spec::DeviceRule],
) -> Result<Vec<DevicePlan>, DeviceError> {
    let is_wild = |number: Option<i64>| number.is_none_or(|number| number < 0);
    let may_use_any = rules.iter().any(|rule| {
        rule.allow
            && matches!(rule.kind.as_deref(), None | Some("" | "a"))
            && is_wild(rule.major)
            && is_wild(rule.minor)
    });
    let own = devices
        .iter()
        .map(|device| Ok(DevicePlan { optional: may_use_any, ..DevicePlan::new(device)? }))
        .collect::<Result<Vec<_>, DeviceError>>()?;
    let default = DEFAULT.iter().map(|&(name, major, minor)| DevicePlan {
        path: Path::new("/dev").join(name),
        kind: libc::S_IFCHR,
        major,
        minor,
        mode: 0o666,
        uid: 0,
        gid: 0,
        optional: false,
    });
    let mut plan: Vec<DevicePlan> =
        default.filter(|device| !own.iter().any(|other| other.path == device.path)).collect();
    plan.extend(own);
    Ok(plan)
}

impl DevicePlan {
    fn new(device: &spec::Device) -> Result<Self, DeviceError> {
        let path = device.path.clone();
        if !path::is_plain_absolute(&path) || path.parent().is_none() {
            return Err(DeviceError::Path { path });
        }
        let kind = match device.kind.as_str() {
            "c" | "u" => libc::S_IFCHR,
            "b" => libc::S_IFBLK,
            "p" => libc::S_IFIFO,
            _ => return Err(DeviceError::Kind { path, kind: device.kind.clone() }),
        };
        let (Ok(major), Ok(minor)) = (device.major.try_into(), device.minor.try_into()) else {
            return Err(DeviceError::Number { path });
        };
        Ok(Self {
            path,
            kind,
            major,
            minor,
            mode: device.file_mode.unwrap_or(0o666) & 0o7777,
            uid: device.uid.unwrap_or(0),
            gid: device.gid.unwrap_or(0),
            optional: false,
        })
    }

    /// Makes the node inside `root`. Where nodes can't be made (a user namespace, a file system without devices) the
    /// guest's own node of that name is bound in its place, so this has to happen before the root is changed.
    pub(crate) fn make(&self, root: BorrowedFd<'_>) -> Result<(), DeviceError> {
        if self.kind == libc::S_IFCHR && self.major == MISC && !self.guest_has_it() {
            let absent =
                DeviceError::Absent { path: self.path.clone(), major: self.major, minor: self.minor };
            return if self.optional { Ok(()) } else { Err(absent) };
        }
        let error = |source| DeviceError::Make { path: self.path.clone(), source };
        match self.make_node(root) {
            Ok(()) => Ok(()),
            Err(refused) if is_refusal(&refused) => match self.guest_node() {
                Some(mount) => self.bind(root, mount.as_fd()).map_err(error),
                None => Err(error(refused)),
            },
            Err(other) => Err(error(other)),
        }
    }

    fn guest_has_it(&self) -> bool {
        Path::new(&format!("/sys/dev/char/{}:{}", self.major, self.minor)).exists()
    }

    /// The guest's own node of that name, as a detached mount, if it is the same device.
    fn guest_node(&self) -> Option<OwnedFd> {
        let path = Path::new("/dev").join(self.path.file_name()?);
        let mount = mount::clone_tree(&path, false).ok()?;
        let stat = path::stat(mount.as_fd()).ok()?;
        let same =
            stat.st_mode & libc::S_IFMT == self.kind && stat.st_rdev == libc::makedev(self.major, self.minor);
        same.then_some(mount)
    }

    fn make_node(&self, root: BorrowedFd<'_>) -> io::Result<()> {
        let (Some(parent), Some(name)) = (self.path.parent(), self.path.file_name()) else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        let parent = path::create_in_root(root, parent, Missing::Directory)?;
        let name = c_path(Path::new(name))?;
        let number = libc::makedev(self.major, self.minor);
        // SAFETY: `name` is NUL-terminated and outlives the calls.
        unsafe {
            let made = libc::mknodat(parent.as_raw_fd(), name.as_ptr(), self.kind | self.mode, number);
            check(made.into())?;
            // The mask of the process took bits away from the mode.
            check(libc::fchmodat(parent.as_raw_fd(), name.as_ptr(), self.mode, 0).into())?;
            let flags = libc::AT_SYMLINK_NOFOLLOW;
            check(libc::fchownat(parent.as_raw_fd(), name.as_ptr(), self.uid, self.gid, flags).into())?;
        }
        Ok(())
    }

    fn bind(&self, root: BorrowedFd<'_>, mount: BorrowedFd<'_>) -> io::Result<()> {
        let target = path::create_in_root(root, &self.path, Missing::File)?;
        mount::attach(mount, target.as_fd())
    }
}

/// Whether making a node failed because nodes can't be made there, or because the image has a file in its place.
fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EPERM | libc::EACCES | libc::EOPNOTSUPP | libc::EEXIST | libc::EROFS)
    )
}

/// Makes the usual links in `/dev`; those that exist stay.
pub(crate) fn make_links(root: BorrowedFd<'_>) -> Result<(), DeviceError> {
    let error = |path: &str| {
        let path = Path::new("/dev").join(path);
        move |source| DeviceError::Link { path, source }
    };
    let dev = path::create_in_root(root, Path::new("/dev"), Missing::Directory).map_err(error(""))?;
    for (name, target) in LINKS {
        let (link, target) = (c_path(Path::new(name)), c_path(Path::new(target)));
        let (link, target) = (link.map_err(error(name))?, target.map_err(error(name))?);
        // SAFETY: both strings are NUL-terminated and outlive the call.
        let made = check(unsafe { libc::symlinkat(target.as_ptr(), dev.as_raw_fd(), link.as_ptr()) }.into());
        match made {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => return Err(error(name)(source)),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(json: &str) -> Result<Vec<DevicePlan>, DeviceError> {
        plan(&[serde_json::from_str(json).unwrap()], &[])
    }

    #[test]
    fn own_devices_come_beside_the_default_ones() {
        let plan =
            device(r#"{"type": "b", "path": "/dev/sda", "major": 8, "minor": 0, "fileMode": 432}"#).unwrap();
        assert_eq!(plan.len(), DEFAULT.len() + 1);
        assert_eq!((plan[6].kind, plan[6].mode), (libc::S_IFBLK, 0o660));
    }

    #[test]
    fn own_devices_overrule_the_default_ones() {
        let plan =
            device(r#"{"type": "c", "path": "/dev/null", "major": 1, "minor": 3, "fileMode": 292}"#).unwrap();
        let null: Vec<_> = plan.iter().filter(|device| device.path == Path::new("/dev/null")).collect();
        assert_eq!(null.len(), 1);
        assert_eq!(null[0].mode, 0o444);
    }

    #[test]
    fn devices_that_the_guest_lacks_are_refused_unless_they_came_unasked() {
        use std::os::fd::AsFd;
        let absent = r#"{"type": "c", "path": "/dev/no", "major": 10, "minor": 1048575}"#;
        let devices = [serde_json::from_str(absent).unwrap()];
        let make = |rules: &str| {
            let plan = plan(&devices, &serde_json::from_str::<Vec<_>>(rules).unwrap()).unwrap();
            let root = path::open_directory(Path::new("/")).unwrap();
            plan.last().unwrap().make(root.as_fd())
        };
        assert!(make("[]").unwrap_err().to_string().contains("10:1048575"));
        make(r#"[{"allow": true, "access": "rwm"}]"#).unwrap();
    }

    #[test]
    fn wrong_devices_are_refused() {
        for (json, text) in [
            (r#"{"type": "x", "path": "/dev/a"}"#, "unknown type"),
            (r#"{"type": "c", "path": "/dev/a", "major": -1}"#, "device number"),
            (r#"{"type": "c", "path": "/dev/../etc/passwd", "major": 1, "minor": 3}"#, "plain absolute"),
        ] {
            let error = device(json).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }
}
