//! Reads an OCI seccomp profile (runtime specification 1.2, "Seccomp").

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use syscalls::{x86, x86_64};

use crate::container::spec::{self, items};

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

    fn parse(name: &str, errno: Option<u32>) -> Result<Self, ProfileError> {
        let number = errno.unwrap_or(libc::EPERM as u32);
        if number > 0xffff {
            return Err(ProfileError::Errno(number));
        }
        Ok(match name {
            "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Self(libc::SECCOMP_RET_KILL_THREAD),
            "SCMP_ACT_KILL_PROCESS" => Self::KILL_PROCESS,
            "SCMP_ACT_TRAP" => Self(libc::SECCOMP_RET_TRAP),
            // The kernel takes larger error numbers for the largest that it knows.
            "SCMP_ACT_ERRNO" => Self::errno(number.min(MAX_ERRNO)),
            "SCMP_ACT_TRACE" => Self(libc::SECCOMP_RET_TRACE | number),
            "SCMP_ACT_ALLOW" => Self::ALLOW,
            "SCMP_ACT_LOG" => Self(libc::SECCOMP_RET_LOG),
            "SCMP_ACT_NOTIFY" => return Err(ProfileError::Notify),
            other => return Err(ProfileError::UnknownAction(other.to_owned())),
        })
    }

    /// Whether a call that meets this action fails or ends the caller.
    pub fn refuses(self) -> bool {
        !matches!(
            self.0 & libc::SECCOMP_RET_ACTION_FULL,
            libc::SECCOMP_RET_ALLOW | libc::SECCOMP_RET_LOG | libc::SECCOMP_RET_TRACE
        )
    }
}

/// Largest error number the kernel returns from a filter (`MAX_ERRNO`).
const MAX_ERRNO: u32 = 4095;

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
    /// Equal in the bits of a mask.
    MaskedEqual {
        /// The bits that count.
        mask: u64,
        /// What they have to be.
        value: u64,
    },
}

/// A condition on an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Condition {
    /// Number of the argument, 0 to 5.
    pub argument: u8,
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

/// Which programs the running kernel can execute beside 64-bit ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelSupport {
    /// 32-bit programs. Without them no call of theirs can come, and their table would only cost time.
    pub x86: bool,
}

impl KernelSupport {
    /// What this kernel supports.
    pub fn detect() -> Self {
        // A parameter of the 32-bit entry code, which is there when that code is.
        Self { x86: Path::new("/proc/sys/abi/vsyscall32").exists() }
    }
}

impl Architecture {
    /// Numbers by name. A profile names hundreds of calls, so looking each up in a list would take its time.
    fn numbers(self) -> HashMap<&'static str, u32> {
        match self {
            Self::X86_64 => x86_64::Sysno::iter().map(|call| (call.name(), call.id() as u32)).collect(),
            Self::X86 => x86::Sysno::iter().map(|call| (call.name(), call.id() as u32)).collect(),
        }
    }
}

/// A checked profile: rules by call number for each architecture that it lets in.
#[derive(Debug, Clone)]
pub struct Profile {
    /// What happens to calls without a rule.
    pub default: Action,
    /// Rules of each architecture.
    pub calls: Vec<(Architecture, BTreeMap<u32, CallRules>)>,
    /// Whether the profile lets in 64-bit programs with 32-bit pointers. The guest's kernel has none of their calls.
    pub x32: bool,
    /// `SECCOMP_FILTER_FLAG_*` for the kernel.
    pub flags: libc::c_ulong,
}

/// A profile that can't be carried out.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ProfileError {
    #[error("linux.seccomp: there is no action {0:?}")]
    UnknownAction(String),
    #[error(
        "linux.seccomp: SCMP_ACT_NOTIFY and listenerPath need a listener on the host, which a guest can't reach"
    )]
    Notify,
    #[error("linux.seccomp: {0} is not an error number")]
    Errno(u32),
    #[error("linux.seccomp: there is no architecture {0:?}")]
    UnknownArchitecture(String),
    #[error("linux.seccomp: there is no flag {0:?}")]
    UnknownFlag(String),
    #[error("linux.seccomp: there is no comparison {0:?}")]
    UnknownOperator(String),
    #[error("linux.seccomp: system calls have no argument {0}")]
    Argument(u32),
    #[error("linux.seccomp: the profile needs {0} instructions; the kernel takes 4096")]
    TooLong(usize),
}

impl Profile {
    /// Reads and checks a profile. Names of calls that an architecture does not have are left out.
    pub fn new(seccomp: &spec::Seccomp, kernel: KernelSupport) -> Result<Self, ProfileError> {
        if seccomp.listener_path.as_ref().is_some_and(|path| !path.as_os_str().is_empty()) {
            return Err(ProfileError::Notify);
        }
        let default = Action::parse(&seccomp.default_action, seccomp.default_errno_ret)?;
        let Listed { x86, x32 } = Listed::new(items(&seccomp.architectures))?;
        let mut architectures = vec![Architecture::X86_64];
        if x86 && kernel.x86 {
            architectures.push(Architecture::X86);
        }
        let mut rules = Vec::new();
        for rule in items(&seccomp.syscalls) {
            let action = Action::parse(&rule.action, rule.errno_ret)?;
            rules.push((&rule.names, action, alternatives(items(&rule.args))?));
        }
        let table = |architecture: Architecture| {
            let numbers = architecture.numbers();
            let mut table = BTreeMap::<u32, CallRules>::new();
            for (names, action, alternatives) in &rules {
                for number in names.iter().filter_map(|name| numbers.get(name.as_str())) {
                    add_rule(table.entry(*number).or_default(), alternatives, *action);
                }
            }
            (architecture, table)
        };
        let calls = architectures.into_iter().map(table).collect();
        Ok(Self { default, calls, x32, flags: flags(items(&seccomp.flags))? })
    }
}

/// The first unconditional rule of a call decides; a second one would never be reached.
fn add_rule(rules: &mut CallRules, alternatives: &[Vec<Condition>], action: Action) {
    if alternatives.is_empty() {
        rules.otherwise.get_or_insert(action);
    } else {
        rules.conditional.extend(alternatives.iter().map(|conditions| (conditions.clone(), action)));
    }
}

/// The conditions of a rule hold together, except where an argument is named more than once: then each counts alone.
fn alternatives(args: &[spec::SyscallArg]) -> Result<Vec<Vec<Condition>>, ProfileError> {
    let conditions = args.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
    let named_twice = conditions.iter().enumerate().any(|(position, condition)| {
        conditions[..position].iter().any(|other| other.argument == condition.argument)
    });
    Ok(match (conditions.is_empty(), named_twice) {
        (true, _) => Vec::new(),
        (false, false) => vec![conditions],
        (false, true) => conditions.into_iter().map(|condition| vec![condition]).collect(),
    })
}

fn condition(arg: &spec::SyscallArg) -> Result<Condition, ProfileError> {
    let argument =
        u8::try_from(arg.index).ok().filter(|&index| index < 6).ok_or(ProfileError::Argument(arg.index))?;
    let comparison = match arg.op.as_str() {
        "SCMP_CMP_NE" => Comparison::NotEqual(arg.value),
        "SCMP_CMP_LT" => Comparison::Less(arg.value),
        "SCMP_CMP_LE" => Comparison::LessOrEqual(arg.value),
        "SCMP_CMP_EQ" => Comparison::Equal(arg.value),
        "SCMP_CMP_GE" => Comparison::GreaterOrEqual(arg.value),
        "SCMP_CMP_GT" => Comparison::Greater(arg.value),
        "SCMP_CMP_MASKED_EQ" => Comparison::MaskedEqual { mask: arg.value, value: arg.value_two },
        other => return Err(ProfileError::UnknownOperator(other.to_owned())),
    };
    Ok(Condition { argument, comparison })
}

/// What a profile lists beside the native architecture, which is always let in.
#[derive(Debug, Default)]
struct Listed {
    x86: bool,
    x32: bool,
}

impl Listed {
    fn new(names: &[String]) -> Result<Self, ProfileError> {
        let mut listed = Self::default();
        for name in names {
            match name.as_str() {
                "SCMP_ARCH_X86_64" => {}
                "SCMP_ARCH_X86" => listed.x86 = true,
                "SCMP_ARCH_X32" => listed.x32 = true,
                // Calls of other processors can't come here.
                other if FOREIGN.contains(&other) => {}
                other => return Err(ProfileError::UnknownArchitecture(other.to_owned())),
            }
        }
        Ok(listed)
    }
}

const FOREIGN: [&str; 17] = [
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_LOONGARCH64",
];

fn flags(names: &[String]) -> Result<libc::c_ulong, ProfileError> {
    names.iter().try_fold(0, |flags, name| {
        Ok(flags
            | match name.as_str() {
                // The process has a single thread when the filter is installed.
                "SECCOMP_FILTER_FLAG_TSYNC" => 0,
                "SECCOMP_FILTER_FLAG_LOG" => libc::SECCOMP_FILTER_FLAG_LOG,
                "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                // Has a meaning with a listener only.
                "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => return Err(ProfileError::Notify),
                other => return Err(ProfileError::UnknownFlag(other.to_owned())),
            })
    })
}
