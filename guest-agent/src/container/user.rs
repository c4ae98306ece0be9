//! The identity of a process: user, groups, file mode mask, home directory.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd};

use super::spec;
use crate::sys::check;

/// How much of `/etc/passwd` is read.
const MAX_PASSWD: u64 = 1 << 20;

/// A failed change of identity.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub(crate) enum UserError {
    #[error("can't set the supplementary groups")]
    Groups(#[source] io::Error),
    #[error("can't become group {0}")]
    Group(u32, #[source] io::Error),
    #[error("can't become user {0}")]
    User(u32, #[source] io::Error),
}

/// Takes the identity on.
pub(crate) fn become_user(user: &spec::User) -> Result<(), UserError> {
    let groups = spec::items(&user.additional_gids);
    // SAFETY: the pointer and the length describe the slice.
    check(unsafe { libc::setgroups(groups.len(), groups.as_ptr()) }.into()).map_err(UserError::Groups)?;
    // SAFETY: takes numbers only.
    check(unsafe { libc::setresgid(user.gid, user.gid, user.gid) }.into())
        .map_err(|error| UserError::Group(user.gid, error))?;
    // SAFETY: takes numbers only.
    check(unsafe { libc::setresuid(user.uid, user.uid, user.uid) }.into())
        .map_err(|error| UserError::User(user.uid, error))?;
    // SAFETY: takes a number only, and can't fail.
    unsafe { libc::umask(user.umask.unwrap_or(0o022) & 0o777) };
    Ok(())
}

/// Gives a pipe or terminal to a user, so that a program can open `/dev/stdout` again. What can't be given (a null device
/// on a read-only mount, a user without a place in the namespace) works without.
pub(crate) fn give(fd: BorrowedFd<'_>, uid: u32) {
    // SAFETY: takes numbers only; -1 leaves the group.
    let _ = unsafe { libc::fchown(fd.as_raw_fd(), uid, libc::gid_t::MAX) };
}

/// The user's home directory by the container's `/etc/passwd`, `/` if it names none.
pub(crate) fn home_directory(uid: u32) -> String {
    let mut text = String::new();
    let read = File::open("/etc/passwd").and_then(|file| file.take(MAX_PASSWD).read_to_string(&mut text));
    read.ok().and_then(|_| home_in_passwd(&text, uid)).unwrap_or("/").to_owned()
}

fn home_in_passwd(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let matches = fields.nth(2)?.parse() == Ok(uid);
        fields.nth(2).filter(|home| matches && !home.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_home_directory_is_the_sixth_field() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/false\nx:x:44:44::\n";
        assert_eq!(home_in_passwd(passwd, 0), Some("/root"));
        assert_eq!(home_in_passwd(passwd, 33), Some("/var/www"));
        assert_eq!(home_in_passwd(passwd, 44), None);
        assert_eq!(home_in_passwd(passwd, 1), None);
    }
}
