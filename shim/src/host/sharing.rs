//! Mounts that a pod may not share are taken out of a tree before the pod's file server can see it.
//!
//! In their place is something empty, and not just what they were mounted on: a pod could remove that, and the kernel would then
//! take away what the host has mounted on it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use bulkhead_vmm_protocol::is_shareable_name;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, fstat};

use super::mounts::{DetachedTree, MountError, Propagation};

/// Mounts of the calling thread's namespace.
pub(crate) const MOUNTINFO: &str = "/proc/thread-self/mountinfo";

/// Triggers of mounts to come. They hold nothing, and what they mount lies on top of them and would go with them. The file
/// server does not enter them.
const TRIGGER: &str = "autofs";

/// More mounts than this are not taken out of one tree.
const MAX_REMOVED: usize = 4096;

/// What is put in the place of mounts that are taken out, in the calling thread's namespace.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Empty {
    /// For directories.
    pub directory: &'static str,
    /// For everything else.
    pub file: &'static str,
}

/// Takes out what may not be shared of the mounts below `top`, which is a mount point. The mount at `top` itself has to be
/// shareable. `origin` is where it all comes from.
pub(crate) fn prune(top: &Path, origin: &Path, empty: Empty) -> Result<(), MountError> {
    let mut removed: BTreeSet<PathBuf> = BTreeSet::new();
    for _ in 0..MAX_REMOVED {
        let text = fs::read_to_string(MOUNTINFO)
            .map_err(|error| look(origin, Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))))?;
        let Some(refused) = mounts(&text, top).find(|mount| !may_stay(mount.kind)) else {
            return removed.iter().try_for_each(|point| cover(point, empty));
        };
        if refused.point == top {
            return Err(MountError::Unshareable { path: origin.to_owned(), what: refused.kind.to_owned() });
        }
        log::debug!("{}: the {} on it is left out", origin.display(), refused.kind);
        // Lazily: with all that is mounted on it. Where mounts lie on top of each other, the topmost goes first.
        umount2(&refused.point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|source| look(origin, source))?;
        removed.insert(refused.point);
    }
    Err(look(origin, Errno::ELOOP))
}

/// Mounts something empty at `point`, unless it has just gone.
fn cover(point: &Path, empty: Empty) -> Result<(), MountError> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let look = |source| look(point, source);
    match open(point, flags, Mode::empty()) {
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(()),
        place => cover_held(place.map_err(look)?.as_fd(), point, empty),
    }
}

/// Mounts something empty at a place that is held as a descriptor and called `point`.
pub(crate) fn cover_held(place: BorrowedFd<'_>, point: &Path, empty: Empty) -> Result<(), MountError> {
    let with = match fstat(place).map_err(|source| look(point, source))?.st_mode & libc::S_IFMT {
        libc::S_IFDIR => empty.directory,
        libc::S_IFLNK => return Ok(()),
        _ => empty.file,
    };
    let tree = DetachedTree::bind(Path::new(with), false)?;
    tree.restrict(Propagation::Private)?;
    tree.make_read_only(false)?;
    tree.attach_to(place)
}

fn look(origin: &Path, source: Errno) -> MountError {
    MountError::Look { path: origin.to_owned(), source }
}

fn may_stay(kind: &str) -> bool {
    is_shareable_name(kind) || kind == TRIGGER
}

/// A line of mountinfo.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mounted<'a> {
    /// Where it is mounted.
    pub point: PathBuf,
    /// Its file system's type.
    pub kind: &'a str,
    /// Its file system's device number, and which of its directories is mounted.
    pub what: (&'a str, &'a str),
}

/// The mounts at and below `top`, in the order in which the kernel lists them: each after those it is mounted on.
pub(crate) fn mounts<'a>(mountinfo: &'a str, top: &'a Path) -> impl Iterator<Item = Mounted<'a>> {
    mountinfo.lines().filter_map(parse).filter(move |mount| mount.point.starts_with(top))
}

/// A line of mountinfo: proc_pid_mountinfo(5). The fields before the hyphen vary in number.
fn parse(line: &str) -> Option<Mounted<'_>> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(2);
    let (device, root, point) = (fields.next()?, fields.next()?, fields.next()?);
    Some(Mounted { point: unescape(point), kind: file_system.split(' ').next()?, what: (device, root) })
}

/// Blanks, line ends and backslashes are written as a backslash and three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        match (first, after) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => bytes.push(*first),
        }
    }
    OsString::from_vec(bytes).into()
}

/// What a file system that is not on the list is called, as far as people know it.
pub(crate) fn describe(file_system: u32) -> String {
    let name = match file_system {
        0x9fa0 => "procfs",
        0x6265_6572 => "sysfs",
        0x0027_e0eb | 0x6367_7270 => "a cgroup file system",
        0x1cd1 => "devpts",
        0x6462_6720 | 0x7472_6163 => "a debugging file system",
        0x7363_6673 => "securityfs",
        0xcafe_4a11 => "a BPF file system",
        0x6e73_6673 => "a namespace",
        0x1980_0202 => "a file system of message queues",
        0x9584_58f6 => "a file system of huge pages",
        other => return format!("a file system of a kind that is not known to hold files ({other:#x})"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_place_and_kind() {
        let text = "30 29 0:26 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n\
                    31 30 0:5 / /staging rw - overlay overlay rw\n\
                    32 31 0:22 / /staging/a\\040b\\134 rw shared:2 master:3 - proc proc rw\n\
                    33 30 0:23 / /staging-file rw - sysfs sysfs rw\n\
                    garbage\n";
        let found: Vec<_> = mounts(text, Path::new("/staging")).collect();
        assert_eq!(
            found,
            [
                Mounted { point: "/staging".into(), kind: "overlay", what: ("0:5", "/") },
                Mounted { point: "/staging/a b\\".into(), kind: "proc", what: ("0:22", "/") }
            ]
        );
    }

    #[test]
    fn names_are_read_as_the_kernel_writes_them() {
        assert_eq!(unescape("/a\\011\\012\\0"), Path::new("/a\t\n\\0"));
        assert_eq!(unescape("/plain\\"), Path::new("/plain\\"));
        assert_eq!(unescape("/\\777"), Path::new("/\\777"), "no byte");
    }
}
