//! What the compiler is told.

use std::collections::BTreeMap;

/// Calls of 64-bit programs with 32-bit pointers have the 64-bit architecture and this bit in their number.
pub const X32_BIT: u32 = 0x4000_0000;

/// What the kernel does at a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Action(pub u32);

impl Action {
    /// Carries the call out.
    pub const ALLOW: Self = Self(libc::SECCOMP_RET_ALLOW);
    /// Kills the process.
    pub const KILL_PROCESS: Self = Self(libc::SECCOMP_RET_KILL_PROCESS);

    /// Fails with an error number.
    pub const fn errno(number: u32) -> Self {
        Self(libc::SECCOMP_RET_ERRNO | number)
    }

    /// Whether a call that meets this action fails or ends the caller.
    pub fn refuses(self) -> bool {
        !matches!(
            self.0 & libc::SECCOMP_RET_ACTION_FULL,
            libc::SECCOMP_RET_ALLOW | libc::SECCOMP_RET_LOG | libc::SECCOMP_RET_TRACE
        )
    }
}

/// A comparison with an argument's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// Equal.
    Equal(u64),
    /// Different.
    NotEqual(u64),
    /// Less than, unsigned.
    Less(u64),
    /// Less or equal, unsigned.
    LessOrEqual(u64),
    /// Greater than, unsigned.
    Greater(u64),
    /// Greater or equal, unsigned.
    GreaterOrEqual(u64),
    /// Equal in the bits of a mask. A value with other bits than the mask's is never met.
    MaskedEqual {
        /// The bits that count.
        mask: u64,
        /// What they have to be.
        value: u64,
    },
}

/// How much of an argument is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// The low 32 bits, of the argument and of what it is compared with: what the kernel looks at if it takes an `int`.
    Low32,
    /// All 64 bits.
    All64,
}

/// A condition on an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Condition {
    /// Number of the argument, 0 to 5.
    pub argument: u8,
    /// How much of it counts.
    pub width: Width,
    /// What it has to be.
    pub comparison: Comparison,
}

/// A system call's rules: the action of the first whose conditions all hold, else the unconditional one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CallRules {
    /// Conditional actions, in order.
    pub conditional: Vec<(Vec<Condition>, Action)>,
    /// What happens if no condition holds; `None` means the profile's default.
    pub otherwise: Option<Action>,
}

/// The table of calls of one architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// 64-bit.
    X86_64,
    /// 32-bit programs.
    X86,
}

impl Architecture {
    /// The kernel's number for it (`AUDIT_ARCH_*`).
    pub const fn audit(self) -> u32 {
        match self {
            Self::X86_64 => 0xc000_003e,
            Self::X86 => 0x4000_0003,
        }
    }
}

/// Rules by call number for each architecture that is let in. A call of any other one kills the process.
#[derive(Debug, Clone)]
pub struct Profile {
    /// What happens to calls without a rule.
    pub default: Action,
    /// What happens to calls behind the last one that has a rule, if not the default. Whoever wrote the profile may not
    /// have known of them.
    pub newer: Option<Action>,
    /// Rules of each architecture.
    pub calls: Vec<(Architecture, BTreeMap<u32, CallRules>)>,
    /// What happens to calls of 64-bit programs with 32-bit pointers ([`X32_BIT`]).
    pub x32: Action,
}
