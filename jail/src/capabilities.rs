//! Capabilities of the calling thread: capabilities(7).

use nix::errno::Errno;

/// One capability by its number in `linux/capability.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capability(u32);

impl Capability {
    pub(crate) const CHOWN: Self = Self(0);
    pub(crate) const DAC_OVERRIDE: Self = Self(1);
    pub(crate) const FOWNER: Self = Self(3);
    pub(crate) const FSETID: Self = Self(4);
    pub(crate) const SETGID: Self = Self(6);
    pub(crate) const SETUID: Self = Self(7);
    pub(crate) const SYS_ADMIN: Self = Self(21);
    pub(crate) const SETFCAP: Self = Self(31);
}

/// `SECBIT_NOROOT`, `SECBIT_NO_SETUID_FIXUP` and `SECBIT_NO_CAP_AMBIENT_RAISE`, each with its lock.
const SECURE_BITS: libc::c_ulong = 0b1100_1111;

const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// From here on a change of user changes no capability, nor does root's identity give any, for good.
pub(crate) fn separate_from_identity() -> Result<(), Errno> {
    // SAFETY: PR_SET_SECUREBITS takes integers only.
    let result = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECURE_BITS, 0, 0, 0) };
    Errno::result(result).map(drop)
}

/// Drops everything else from the bounding set.
pub(crate) fn bound_to(kept: &[Capability]) -> Result<(), Errno> {
    for number in 0..64 {
        if kept.contains(&Capability(number)) {
            continue;
        }
        // SAFETY: PR_CAPBSET_DROP takes integers only.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) };
        match Errno::result(result) {
            Ok(_) => {}
            // Past the last capability this kernel knows.
            Err(Errno::EINVAL) => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Makes these the permitted and effective capabilities, and none inheritable.
pub(crate) fn reduce_to(kept: &[Capability]) -> Result<(), Errno> {
    let mut sets = [Sets { effective: 0, permitted: 0, inheritable: 0 }; 2];
    for &Capability(number) in kept {
        let set = &mut sets[(number / 32) as usize];
        set.effective |= 1 << (number % 32);
        set.permitted |= 1 << (number % 32);
    }
    let header = Header { version: VERSION_3, pid: 0 };
    // SAFETY: both pointers are valid for the call; version 3 takes two `Sets`.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    Errno::result(result).map(drop)
}
