//! Mitigations that a process has to ask for: `PR_SET_SPECULATION_CTRL` of prctl(2).

use nix::errno::Errno;

/// Store bypass and indirect branches.
const KINDS: [libc::c_ulong; 2] = [0, 1];

/// Off for good, also for programs that are executed later.
const FORCE_DISABLE: libc::c_ulong = 1 << 3;

/// Switches off, for the calling thread and those that it will start, what speculation the processor lets a thread switch off.
/// A guest shares the core with the process that serves it.
pub(crate) fn disable() -> Result<(), Errno> {
    for kind in KINDS {
        // SAFETY: takes integers only.
        let result = unsafe { libc::prctl(libc::PR_SET_SPECULATION_CTRL, kind, FORCE_DISABLE, 0, 0) };
        match Errno::result(result) {
            // The processor has no such flaw or no such switch, or the host has decided for all processes.
            Ok(_) | Err(Errno::ENODEV | Errno::ENXIO | Errno::EPERM | Errno::EINVAL) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
