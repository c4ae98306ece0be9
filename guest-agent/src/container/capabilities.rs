//! The five capability sets of a process (capabilities(7)).

use std::io;

use bulkhead_base::capabilities::NAMES;

use super::spec::{self, items};
use crate::sys::{check, process};

const SYS_ADMIN: u64 = 1 << 21;
const VERSION_3: u32 = 0x2008_0522;

/// Capability sets, one bit a capability.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CapabilitySets {
    bounding: u64,
    effective: u64,
    inheritable: u64,
    permitted: u64,
    ambient: u64,
}

/// A failed change of capabilities.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub(crate) enum CapabilityError {
    #[error("can't read the kernel's last capability")]
    Last(#[source] io::Error),
    #[error("can't drop capability {0} from the bounding set")]
    Bounding(u32, #[source] io::Error),
    #[error("can't keep capabilities over the change of user")]
    Keep(#[source] io::Error),
    #[error("can't set the capabilities")]
    Set(#[source] io::Error),
    #[error("can't raise ambient capability {0}")]
    Ambient(u32, #[source] io::Error),
}

impl CapabilitySets {
    /// Reads the specification's names. Those that the kernel does not know can't be given, so they are left out, as
    /// runtimes do; they are returned for the log.
    pub(crate) fn new(capabilities: &spec::Capabilities) -> (Self, Vec<String>) {
        let mut unknown = Vec::new();
        let mut set = |names: &Option<Vec<String>>| {
            items(names).iter().fold(0, |set, name| match number(name) {
                Some(number) => set | 1 << number,
                None => {
                    unknown.push(name.clone());
                    set
                }
            })
        };
        let mut sets = Self {
            bounding: set(&capabilities.bounding),
            effective: set(&capabilities.effective),
            inheritable: set(&capabilities.inheritable),
            permitted: set(&capabilities.permitted),
            ambient: set(&capabilities.ambient),
        };
        // The kernel allows no others.
        sets.effective &= sets.permitted;
        sets.ambient &= sets.permitted & sets.inheritable;
        unknown.sort();
        unknown.dedup();
        (sets, unknown)
    }

    /// Reduces the bounding set, and has the change of user that follows keep the permitted set.
    pub(crate) fn prepare(&self) -> Result<(), CapabilityError> {
        let last = last_capability()?;
        for number in (0..=last).filter(|number| self.bounding & 1 << number == 0) {
            process::prctl(libc::PR_CAPBSET_DROP, number.into())
                .map_err(|error| CapabilityError::Bounding(number, error))?;
        }
        process::prctl(libc::PR_SET_KEEPCAPS, 1).map(drop).map_err(CapabilityError::Keep)
    }

    /// Sets everything after the change of user. With `keep_admin` the right to install a system call filter stays
    /// until [`drop_to_final`](Self::drop_to_final).
    pub(crate) fn apply(&self, keep_admin: bool) -> Result<(), CapabilityError> {
        let kept = if keep_admin { SYS_ADMIN } else { 0 };
        // The permitted set shrinks here and not before: the inheritable set needs what it held.
        set(self.effective | kept, self.permitted | kept, self.inheritable).map_err(CapabilityError::Set)?;
        // A process that never had an ambient set keeps none over the change of user, but this one may start as root.
        process::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong)
            .map_err(|error| CapabilityError::Ambient(0, error))?;
        for number in (0..64).filter(|number| self.ambient & 1 << number != 0) {
            raise_ambient(number).map_err(|error| CapabilityError::Ambient(number, error))?;
        }
        Ok(())
    }

    /// Gives up what [`apply`](Self::apply) kept.
    pub(crate) fn drop_to_final(&self) -> Result<(), CapabilityError> {
        set(self.effective, self.permitted, self.inheritable).map_err(CapabilityError::Set)
    }
}

fn number(name: &str) -> Option<u32> {
    NAMES.iter().position(|&known| known == name).and_then(|position| position.try_into().ok())
}

fn last_capability() -> Result<u32, CapabilityError> {
    // The bounding set can be asked for a capability without any file system.
    let known = |number: &u32| process::prctl(libc::PR_CAPBSET_READ, (*number).into()).is_ok();
    (0..64)
        .take_while(known)
        .last()
        .ok_or_else(|| CapabilityError::Last(io::Error::from_raw_os_error(libc::EINVAL)))
}

fn raise_ambient(number: u32) -> io::Result<()> {
    let raise = libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong;
    // SAFETY: takes numbers only.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, libc::c_ulong::from(number), 0, 0) }.into())
        .map(drop)
}

fn set(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let header: [u32; 2] = [VERSION_3, 0];
    let low = |set: u64| set as u32;
    let high = |set: u64| (set >> 32) as u32;
    let data: [u32; 6] = [
        low(effective),
        low(permitted),
        low(inheritable),
        high(effective),
        high(permitted),
        high(inheritable),
    ];
    // SAFETY: header and data have the layout of version 3 (a version and a pid; two times three words).
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_bits_and_unknown_ones_are_reported() {
        let list = |names: &[&str]| Some(names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>());
        let (sets, unknown) = CapabilitySets::new(&spec::Capabilities {
            bounding: list(&["CAP_CHOWN", "CAP_FLY", "CAP_CHECKPOINT_RESTORE"]),
            effective: list(&["CAP_CHOWN", "CAP_KILL"]),
            permitted: list(&["CAP_CHOWN", "CAP_BPF"]),
            inheritable: list(&["CAP_BPF"]),
            ambient: list(&["CAP_BPF", "CAP_KILL", "CHOWN"]),
        });
        assert_eq!(sets.bounding, 1 | 1 << 40);
        assert_eq!(sets.effective, 1, "no more than permitted");
        assert_eq!(sets.ambient, 1 << 39, "no more than permitted and inheritable");
        assert_eq!(unknown, ["CAP_FLY", "CHOWN"]);
    }
}
