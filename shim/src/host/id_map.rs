//! Mounts whose files have other owners than on the disk: what a container with a user namespace of its own is given.
//!
//! The kernel takes the mapping in the form of a user namespace, which a process has to make that has nothing else to do.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, pipe2};
use oci_spec::runtime::LinuxIdMapping;

/// Most ranges of a map, as the kernel has it.
const MAX_RANGES: usize = 340;

/// Ids in a row: those on the disk, what they become, and how many there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    on_disk: u32,
    seen: u32,
    length: u32,
}

/// How the owners of files are mapped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMap {
    users: Vec<Range>,
    groups: Vec<Range>,
}

/// A mapping that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum IdMapError {
    /// It makes no sense.
    #[error("the mapping {0:?} of ids can't be understood")]
    Malformed(String),
    /// Half of one, or one without end.
    #[error("a mapping of ids needs ranges of users and of groups, {MAX_RANGES} at most")]
    Ranges,
    /// The kernel refuses it.
    #[error("can't make a user namespace for a mapping of ids: {step}")]
    Namespace {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl IdMap {
    /// The mapping of a mount in a specification; `None` if it has none.
    pub(crate) fn of(users: Option<&[LinuxIdMapping]>, groups: Option<&[LinuxIdMapping]>) -> Option<IdMap> {
        let ranges = |list: Option<&[LinuxIdMapping]>| {
            let range = |map: &LinuxIdMapping| Range {
                on_disk: map.container_id(),
                seen: map.host_id(),
                length: map.size(),
            };
            list.unwrap_or_default().iter().map(range).collect::<Vec<_>>()
        };
        let map = IdMap { users: ranges(users), groups: ranges(groups) };
        (map != IdMap::default()).then_some(map)
    }

    /// Takes a mapping out of the options of a mount, as containerd's snapshotters write it: `uidmap=0:100000:65536`.
    pub(crate) fn take(options: &mut Vec<String>) -> Result<Option<IdMap>, IdMapError> {
        let mut map = IdMap::default();
        for option in std::mem::take(options) {
            if let Some(ranges) = option.strip_prefix("uidmap=") {
                map.users = parse(ranges)?;
            } else if let Some(ranges) = option.strip_prefix("gidmap=") {
                map.groups = parse(ranges)?;
            } else {
                options.push(option);
            }
        }
        Ok((map != IdMap::default()).then_some(map))
    }

    /// A user namespace with this mapping.
    pub(crate) fn namespace(&self) -> Result<OwnedFd, IdMapError> {
        let possible = 1..=MAX_RANGES;
        if !possible.contains(&self.users.len()) || !possible.contains(&self.groups.len()) {
            return Err(IdMapError::Ranges);
        }
        let failed = |step| move |source| IdMapError::Namespace { step, source };
        let (wait, go) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from).map_err(failed("make a pipe"))?;
        let child = clone_into_new_users(wait.as_fd(), go.as_fd()).map_err(failed("clone a process"))?;
        let process = format!("/proc/{child}");
        let namespace = std::fs::write(format!("{process}/uid_map"), text(&self.users))
            .map_err(failed("map users"))
            .and_then(|()| {
                std::fs::write(format!("{process}/gid_map"), text(&self.groups)).map_err(failed("map groups"))
            })
            .and_then(|()| std::fs::File::open(format!("{process}/ns/user")).map_err(failed("open it")));
        // The process ends with the pipe.
        drop(go);
        while waitpid(Pid::from_raw(child), None) == Err(Errno::EINTR) {}
        namespace.map(OwnedFd::from)
    }
}

fn parse(text: &str) -> Result<Vec<Range>, IdMapError> {
    let malformed = || IdMapError::Malformed(text.chars().take(64).collect());
    let range = |part: &str| {
        let numbers: Vec<u32> = part.split(':').map_while(|number| number.parse().ok()).collect();
        match numbers.as_slice() {
            &[on_disk, seen, length] if part.split(':').count() == 3 => Ok(Range { on_disk, seen, length }),
            _ => Err(malformed()),
        }
    };
    text.split(',').map(range).collect()
}

fn text(ranges: &[Range]) -> String {
    ranges.iter().map(|range| format!("{} {} {}\n", range.on_disk, range.seen, range.length)).collect()
}

/// Clones a process into a new user namespace, that lives until the pipe is closed or this process has ended.
fn clone_into_new_users(wait: BorrowedFd<'_>, go: BorrowedFd<'_>) -> io::Result<libc::pid_t> {
    let (wait, go) = (wait.as_raw_fd(), go.as_raw_fd());
    let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
    let null = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: without CLONE_VM and without a stack this is a fork. The child makes three system calls on its own
    // descriptors, takes no lock and allocates nothing, whatever other threads were doing.
    unsafe {
        let child = Errno::result(libc::syscall(libc::SYS_clone, flags, null, null, null, null))?;
        if child == 0 {
            libc::close(go);
            let mut byte = [0u8];
            libc::read(wait, byte.as_mut_ptr().cast(), 1);
            libc::_exit(0);
        }
        Ok(child as libc::pid_t)
    }
}

/// Has a detached tree of mounts show its files with owners of a namespace; of all mounts in it, or the topmost one.
pub(crate) fn apply(tree: BorrowedFd<'_>, namespace: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: namespace.as_raw_fd() as u64,
    };
    let recursion = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor; the structure is valid for the size given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursion,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Ok(Errno::result(result).map(drop)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_taken_out_of_options() {
        let mut options = ["ro", "uidmap=0:100000:65536", "gidmap=0:5:1,1:9:2"].map(str::to_owned).to_vec();
        let map = IdMap::take(&mut options).unwrap().unwrap();
        assert_eq!(options, ["ro"]);
        assert_eq!(text(&map.users), "0 100000 65536\n");
        assert_eq!(text(&map.groups), "0 5 1\n1 9 2\n");
        assert_eq!(IdMap::take(&mut options).unwrap(), None);
        for wrong in ["uidmap=", "uidmap=1:2", "uidmap=1:2:3:4", "gidmap=a:b:c"] {
            assert!(IdMap::take(&mut vec![wrong.to_owned()]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_namespace_has_the_mapping() {
        let mut options = ["uidmap=0:100000:65536", "gidmap=0:7:1"].map(str::to_owned).to_vec();
        let map = IdMap::take(&mut options).unwrap().unwrap();
        let namespace = map.namespace().unwrap();
        // `NS_GET_NSTYPE` of ioctl_ns(2).
        // SAFETY: takes no argument.
        let kind = unsafe { libc::ioctl(namespace.as_raw_fd(), 0xb703) };
        assert_eq!(kind, libc::CLONE_NEWUSER);
        assert!(matches!(IdMap { groups: Vec::new(), ..map }.namespace(), Err(IdMapError::Ranges)));
    }
}
