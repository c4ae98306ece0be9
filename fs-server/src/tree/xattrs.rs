//! Which extended attributes a guest's files have, and what they are called on the host.
//!
//! Some are the host's: labels of its security modules, and what overlayfs keeps in `trusted.overlay.*`. What a guest keeps in
//! `trusted.*` (overlayfs does, on a volume of a container that mounts one) is not the host's business: there it is in
//! names of ours, which the guest can't reach otherwise. Access control lists are not the guest's: its kernel does not enforce
//! those of this file system, and a rule that nobody enforces must not be stored.

use std::ffi::{CStr, CString};

use super::nodes;

/// Names of the guest's that only its privileged processes may use.
const TRUSTED: &[u8] = b"trusted.";

/// What they begin with on the host.
const TRUSTED_ON_HOST: &[u8] = b"user.bulkhead.trusted.";

/// The host's name of an attribute that a guest's file may have.
pub fn on_host(name: &CStr) -> Option<CString> {
    let bytes = name.to_bytes();
    if let Some(rest) = bytes.strip_prefix(TRUSTED) {
        return CString::new([TRUSTED_ON_HOST, rest].concat()).ok();
    }
    let is_guests =
        bytes.starts_with(b"user.") && !bytes.starts_with(nodes::PREFIX) || bytes == b"security.capability";
    is_guests.then(|| name.to_owned())
}

/// The guest's list of names for the host's. Those of privileged processes are told to root only.
pub fn in_guest(host: &[u8], is_root: bool) -> Vec<u8> {
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
    fn lists_are_translated() {
        let list = b"user.a\0user.bulkhead.node\0trusted.overlay.origin\0user.bulkhead.trusted.b\0security.selinux\0";
        assert_eq!(in_guest(list, true), b"user.a\0trusted.b\0");
        assert_eq!(in_guest(list, false), b"user.a\0");
    }
}
