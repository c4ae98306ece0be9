//! Entering the jail: the last thing a process that faces the guest does with privileges.
//!
//! The shim starts such a process as root in a PID namespace and cgroup of its own and in a network namespace that is not the
//! host's, with an empty environment and its resources as descriptors. The process then jails itself, before it reads a byte from anybody. The order is the one
//! in which each step still has the privilege it needs and nothing has happened yet that a later failure would leave
//! half done: descriptors and environment, checks, limits, namespaces, root, identity.

mod capabilities;
mod file_server;
mod id_map;
mod landlock;
mod limits;
mod root;
mod speculation;

use std::os::fd::RawFd;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use capabilities::Capability;
pub use file_server::{OwnFiles, enter_file_server};
pub use limits::Limits;
pub use root::Root;

/// What each jailed process has of its own, beside the PID namespace that it is born in. The network namespace is the one
/// that it was started in: whatever is there, no filter lets the process make a socket.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWCGROUP)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

/// What the jail of a process looks like.
#[derive(Debug, Clone)]
pub struct Jail {
    /// Descriptors above this one are closed. Standard streams and what the shim handed over stay.
    pub last_fd: RawFd,
    /// What the process still sees of the file system.
    pub root: Root,
    /// Resource limits for the rest of its life.
    pub limits: Limits,
    /// User to become; never 0.
    pub uid: u32,
    /// Group to become; never 0.
    pub gid: u32,
}

/// Why a process could not be jailed. It must exit: it may be half inside.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Descriptors could not be closed.
    #[error("can't close the descriptors above {0}")]
    CloseDescriptors(RawFd, #[source] Errno),
    /// Root is not a user to jail a process as.
    #[error("user {uid} and group {gid} asked for: neither may be 0")]
    RootIdentity {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
    },
    /// A resource limit could not be set.
    #[error("can't limit {0}")]
    Limit(&'static str, #[source] Errno),
    /// No namespaces of its own.
    #[error("can't create mount, cgroup, IPC and UTS namespaces")]
    Namespaces(#[source] Errno),
    /// The root directory could not be replaced.
    #[error("can't replace the root directory: {step}")]
    Root {
        /// Which step failed.
        step: &'static str,
        /// Its error.
        #[source]
        source: Errno,
    },
    /// No user namespace of its own.
    #[error("can't use a user namespace: {step} (does the sysctl user.max_user_namespaces allow any?)")]
    UserNamespace {
        /// Which step failed.
        step: &'static str,
        /// Its error.
        #[source]
        source: Errno,
    },
    /// Privileges could not be dropped.
    #[error("can't drop privileges: {step}")]
    Privileges {
        /// Which step failed.
        step: &'static str,
        /// Its error.
        #[source]
        source: Errno,
    },
}

/// Jails the calling process. It must still have only one thread.
pub fn enter(jail: &Jail) -> Result<(), JailError> {
    close_descriptors_above(jail.last_fd)?;
    clear_environment();

    if jail.uid == 0 || jail.gid == 0 {
        return Err(JailError::RootIdentity { uid: jail.uid, gid: jail.gid });
    }

    jail.limits.apply()?;

    unshare(NAMESPACES).map_err(JailError::Namespaces)?;
    jail.root.enter()?;

    become_unprivileged(Uid::from_raw(jail.uid), Gid::from_raw(jail.gid))
}

fn close_descriptors_above(last: RawFd) -> Result<(), JailError> {
    let first = last.saturating_add(1) as libc::c_uint;
    // SAFETY: close_range has no memory arguments. Nothing in this process owns a descriptor above `last` yet: it has
    // only just started.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
    Errno::result(result).map(drop).map_err(|errno| JailError::CloseDescriptors(last, errno))
}

fn clear_environment() {
    // SAFETY: the process has one thread, so nobody reads the environment meanwhile.
    unsafe { libc::clearenv() };
}

/// Gives up every privilege: root's identity, capabilities of all sets, the ability to gain any by exec, being
/// traced or dumped by processes of the same user, and whatever Landlock can refuse.
fn become_unprivileged(uid: Uid, gid: Gid) -> Result<(), JailError> {
    let failed = |step| move |source| JailError::Privileges { step, source };
    setgroups(&[]).map_err(failed("drop supplementary groups"))?;
    setresgid(gid, gid, gid).map_err(failed("change the group"))?;
    nix::sys::prctl::set_keepcaps(true).map_err(failed("keep capabilities"))?;
    setresuid(uid, uid, uid).map_err(failed("change the user"))?;
    enter_user_namespace()?;
    // All of them in there, and none outside.
    capabilities::bound_to(&[]).map_err(failed("empty the capability bounding set"))?;
    capabilities::reduce_to(&[]).map_err(failed("give up the capabilities"))?;
    nix::sys::prctl::set_dumpable(false).map_err(failed("become undumpable"))?;
    nix::sys::prctl::set_no_new_privs().map_err(failed("set no_new_privs"))?;
    landlock::refuse_everything().map_err(failed("have Landlock refuse everything"))?;
    speculation::disable().map_err(failed("switch speculation off"))
}

/// A user namespace that maps no id at all: there is nobody that the process could become.
fn enter_user_namespace() -> Result<(), JailError> {
    let failed = |step| move |source| JailError::UserNamespace { step, source };
    // Hosts that let no ordinary user have one let whoever may administer the system.
    capabilities::reduce_to(&[Capability::SYS_ADMIN]).map_err(failed("keep one capability for it"))?;
    unshare(CloneFlags::CLONE_NEWUSER).map_err(failed("create it"))
}
