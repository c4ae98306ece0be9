//! Landlock: landlock(7). One more lock on what the empty root and the filters close already, of another kind of code.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

const CREATE_RULESET_VERSION: u32 = 1;

/// The kernel's `struct landlock_ruleset_attr`. Older kernels take its beginning.
#[repr(C)]
struct Attributes {
    file_system: u64,
    network: u64,
    scoped: u64,
}

/// What each version of the interface can refuse: rights over files, over TCP ports, and what is kept to the process itself.
fn all_of(version: i64) -> (Attributes, usize) {
    let file_system = match version {
        1 => (1 << 13) - 1,
        2 => (1 << 14) - 1,
        3 | 4 => (1 << 15) - 1,
        _ => (1 << 16) - 1,
    };
    // Binding and connecting.
    let network = if version >= 4 { 0b11 } else { 0 };
    // Abstract sockets and signals.
    let scoped = if version >= 6 { 0b11 } else { 0 };
    let size = match version {
        ..4 => 8,
        4 | 5 => 16,
        _ => 24,
    };
    (Attributes { file_system, network, scoped }, size)
}

/// Refuses the calling thread, and those that it will start, every file and port that it does not hold yet. `no_new_privs` must
/// be set. A kernel without Landlock, or one that was booted with it switched off, refuses nothing.
pub(crate) fn refuse_everything() -> Result<(), Errno> {
    match version()? {
        Some(version) => restrict(all_of(version)),
        None => Ok(()),
    }
}

/// The same for ports, abstract sockets and signals alone, where the kernel knows of these (Linux 6.7 and 6.12). What is not restricted is not looked at: files are as before.
pub(crate) fn refuse_all_but_files() -> Result<(), Errno> {
    match version()? {
        Some(version @ 4..) => {
            let (attributes, size) = all_of(version);
            restrict((Attributes { file_system: 0, ..attributes }, size))
        }
        _ => Ok(()),
    }
}

/// The version of the kernel's interface, if there is one.
fn version() -> Result<Option<i64>, Errno> {
    // SAFETY: with this flag and no attributes the call tells a version and does nothing.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<Attributes>(),
            0,
            CREATE_RULESET_VERSION,
        )
    };
    match Errno::result(version) {
        Ok(version) => Ok(Some(version)),
        Err(Errno::ENOSYS | Errno::EOPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Refuses what the attributes say. There are no rules: nothing of it is let through.
fn restrict((attributes, size): (Attributes, usize)) -> Result<(), Errno> {
    // SAFETY: the attributes are valid for the size given.
    let ruleset = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attributes, size, 0) };
    let ruleset = Errno::result(ruleset)?;
    // SAFETY: the call just returned this descriptor, nobody else owns it. Descriptors are ints.
    let ruleset = unsafe { OwnedFd::from_raw_fd(ruleset as i32) };
    // SAFETY: takes integers only.
    let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_gets_what_it_knows_and_no_more() {
        let refused = |version| {
            let (attributes, size) = all_of(version);
            (attributes.file_system, attributes.network, attributes.scoped, size)
        };
        assert_eq!(refused(1), (0x1fff, 0, 0, 8));
        assert_eq!(refused(2), (0x3fff, 0, 0, 8));
        assert_eq!(refused(3), (0x7fff, 0, 0, 8));
        assert_eq!(refused(4), (0x7fff, 3, 0, 16));
        assert_eq!(refused(5), (0xffff, 3, 0, 16));
        assert_eq!(refused(6), (0xffff, 3, 3, 24));
        assert_eq!(refused(99), refused(6));
    }
}
