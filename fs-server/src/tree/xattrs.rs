//! Which extended attributes a guest's files have, and what they are called on the host.
//!
//! Some are the host's: labels of its security modules, and what overlayfs keeps in `trusted.overlay.*`. What a guest keeps in
//! `trusted.*` (overlayfs does, on a volume of a container that mounts one) is not the host's business: there it is in
//! names of ours, which the guest can't reach otherwise. Access control lists are not the guest's: its kernel does not enforce
//! those of this file system, and a rule that nobody enforces must not be stored.
//!
//! Where the guest's overlay keeps a container's changes, all that is kept of what it notes is which directory hides what is
//! below it: the shim tells the host's kernel (`bulkhead_vmm_protocol::OPAQUE_NOTE`). The rest (where a copy came from) an overlay can do without.

use std::ffi::{CStr, CString};

use rustix::io::{Errno, Result};

use super::mounts::Sharing;
use super::nodes;

/// Names of the guest's that only its privileged processes may use.
const TRUSTED: &[u8] = b"trusted.";

/// Names that overlayfs keeps things in.
const OVERLAY: &[u8] = b"trusted.overlay.";

/// The one by which a directory hides what is below it.
const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// What they begin with on the host.
const TRUSTED_ON_HOST: &[u8] = b"user.bulkhead.trusted.";

/// What becomes of an attribute of a guest's file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kept {
    /// It is kept under this name.
    As(CString),
    /// It is not, which nobody is told.
    Not,
}

/// What becomes of an attribute; an error if a guest's file can't have it.
pub(super) fn keep(name: &CStr, sharing: Sharing) -> Result<Kept> {
    let bytes = name.to_bytes();
    if sharing == Sharing::Changes && bytes.starts_with(OVERLAY) && bytes != OPAQUE {
        return Ok(Kept::Not);
    }
    on_host(name).map(Kept::As).ok_or(Errno::OPNOTSUPP)
}

/// Why a guest's file has not an attribute which it can't have: as file systems say it.
pub(super) fn missing(name: &CStr) -> Errno {
    const KINDS: [&[u8]; 4] = [b"user.", b"trusted.", b"security.", b"system.posix_acl_"];
    if KINDS.iter().any(|kind| name.to_bytes().starts_with(kind)) { Errno::NODATA } else { Errno::OPNOTSUPP }
}

/// The host's name of an attribute that a guest's file may have.
fn on_host(name: &CStr) -> Option<CString> {
    let bytes = name.to_bytes();
    if let Some(rest) = bytes.strip_prefix(TRUSTED) {
        return CString::new([TRUSTED_ON_HOST, rest].concat()).ok();
    }
    let is_guests =
        bytes.starts_with(b"user.") && !bytes.starts_with(nodes::PREFIX) || bytes == b"security.capability";
    is_guests.then(|| name.to_owned())
}

/// The guest's list of names for the host's. Those of privileged processes are told to root only.
pub(super) fn in_guest(host: &[u8], is_root: bool) -> Vec<u8> {
    let mut list = Vec::with_capacity(host.len());
    for name in host.split_inclusive(|&byte| byte == 0) {
        match name.strip_prefix(TRUSTED_ON_HOST) {
            Some(rest) if is_root => list.extend_from_slice(&[TRUSTED, rest].concat()),
            Some(_) => {}
            None if CStr::from_bytes_with_nul(name)
                .ok()
                .and_then(on_host)
                .is_some_and(|on_host| on_host.as_bytes_with_nul() == name) =>
            {
                list.extend_from_slice(name);
            }
            None => {}
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_own_and_the_hosts_are_kept_apart() {
        let host = |name: &CStr| on_host(name).map(|name| name.into_string().unwrap());
        assert_eq!(host(c"user.mime").as_deref(), Some("user.mime"));
        assert_eq!(host(c"trusted.overlay.opaque").as_deref(), Some("user.bulkhead.trusted.overlay.opaque"));
        assert_eq!(host(c"security.capability").as_deref(), Some("security.capability"));
        for not in [c"user.bulkhead.node", c"user.bulkhead.trusted.x", c"security.selinux", c"system.x", c""]
        {
            assert_eq!(host(not), None, "{not:?}");
        }
    }

    #[test]
    fn what_no_file_can_have_is_told_from_what_this_one_has_not() {
        for name in [c"security.selinux", c"user.bulkhead.node", c"system.posix_acl_access"] {
            assert_eq!(missing(name), Errno::NODATA, "{name:?}");
        }
        for name in [c"other.kind", c"system.x", c"os2.x"] {
            assert_eq!(missing(name), Errno::OPNOTSUPP, "{name:?}");
        }
    }

    #[test]
    fn lists_are_translated() {
        let list = b"user.a\0user.bulkhead.node\0trusted.overlay.origin\0user.bulkhead.trusted.b\0security.selinux\0";
        let guest = |is_root| in_guest(list, is_root);
        assert_eq!(guest(true), b"user.a\0trusted.b\0");
        assert_eq!(guest(false), b"user.a\0");
    }

    #[test]
    fn of_an_overlay_only_what_hides_a_directory_is_kept() {
        let changes = |name: &CStr| keep(name, Sharing::Changes);
        let opaque = changes(c"trusted.overlay.opaque");
        assert_eq!(opaque, Ok(Kept::As(bulkhead_vmm_protocol::OPAQUE_NOTE.to_owned())));
        for not in [c"trusted.overlay.origin", c"trusted.overlay.redirect", c"trusted.overlay.metacopy"] {
            assert_eq!(changes(not), Ok(Kept::Not), "{not:?}");
        }
        assert_eq!(changes(c"trusted.x"), Ok(Kept::As(c"user.bulkhead.trusted.x".into())));
        assert_eq!(changes(c"security.selinux"), Err(Errno::OPNOTSUPP));
        let elsewhere = keep(c"trusted.overlay.opaque", Sharing::GuestOnly);
        assert_eq!(elsewhere, Ok(Kept::As(c"user.bulkhead.trusted.overlay.opaque".into())));
    }
}
