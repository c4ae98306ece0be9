//! What clone3(2) takes that libraries don't have: they lack its flags beyond 32 bits.

/// Reset all signals with handlers to their default action.
pub const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;

/// Be born in the cgroup that [`CloneArgs::cgroup`] names.
pub const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The kernel's `struct clone_args`.
#[repr(C)]
#[derive(Debug, Default)]
#[allow(missing_docs, reason = "each is the kernel's name")]
pub struct CloneArgs {
    pub flags: u64,
    pub pidfd: u64,
    pub child_tid: u64,
    pub parent_tid: u64,
    pub exit_signal: u64,
    pub stack: u64,
    pub stack_size: u64,
    pub tls: u64,
    pub set_tid: u64,
    pub set_tid_size: u64,
    pub cgroup: u64,
}
