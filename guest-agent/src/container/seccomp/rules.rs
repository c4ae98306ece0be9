//! Reads an OCI seccomp profile (runtime specification 1.2, "Seccomp").

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use bulkhead_seccomp_compiler::{Action, Architecture, CallRules, Comparison, Condition, Profile, Width};
use syscalls::{x86, x86_64};

use crate::container::spec::{self, items};

/// Largest error number the kernel returns from a filter (`MAX_ERRNO`).
const MAX_ERRNO: u32 = 4095;

const NO_SUCH_CALL: Action = Action::errno(libc::ENOSYS as u32);

/// Which programs the running kernel can execute beside 64-bit ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelSupport {
    /// 32-bit programs. Without them no call of theirs can come, and their table would only cost time.
    pub x86: bool,
}

impl KernelSupport {
    /// What this kernel supports.
    pub(crate) fn detect() -> Self {
        // A parameter of the 32-bit entry code, which is there when that code is.
        Self { x86: Path::new("/proc/sys/abi/vsyscall32").exists() }
    }
}

/// Numbers by name. A profile names hundreds of calls, so looking each up in a list would take its time.
fn numbers(architecture: Architecture) -> HashMap<&'static str, u32> {
    match architecture {
        Architecture::X86_64 => x86_64::Sysno::iter().map(|call| (call.name(), call.id() as u32)).collect(),
        Architecture::X86 => x86::Sysno::iter().map(|call| (call.name(), call.id() as u32)).collect(),
    }
}

/// A checked profile of the specification.
#[derive(Debug, Clone)]
pub struct OciProfile {
    /// What the program is compiled from.
    pub profile: Profile,
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

impl OciProfile {
    /// Reads and checks a profile. Names of calls that an architecture does not have are left out.
    pub fn new(seccomp: &spec::Seccomp, kernel: KernelSupport) -> Result<Self, ProfileError> {
        if seccomp.listener_path.as_ref().is_some_and(|path| !path.as_os_str().is_empty()) {
            return Err(ProfileError::Notify);
        }
        let default = action(&seccomp.default_action, seccomp.default_errno_ret)?;
        let Listed { x86, x32 } = Listed::new(items(&seccomp.architectures))?;
        let mut architectures = vec![Architecture::X86_64];
        if x86 && kernel.x86 {
            architectures.push(Architecture::X86);
        }
        let mut rules = Vec::new();
        for rule in items(&seccomp.syscalls) {
            let action = action(&rule.action, rule.errno_ret)?;
            rules.push((&rule.names, action, alternatives(items(&rule.args))?));
        }
        let table = |architecture: Architecture| {
            let numbers = numbers(architecture);
            let mut table = BTreeMap::<u32, CallRules>::new();
            for (names, action, alternatives) in &rules {
                for number in names.iter().filter_map(|name| numbers.get(name.as_str())) {
                    add_rule(table.entry(*number).or_default(), alternatives, *action);
                }
            }
            (architecture, table)
        };
        let calls = architectures.into_iter().map(table).collect();
        // Programs try calls that are newer than the profile and fall back when these do not exist; they don't when the
        // call is forbidden. So what no one who wrote the profile can have known of does not exist.
        let newer = default.refuses().then_some(NO_SUCH_CALL);
        // The guest's kernel has no calls with 32-bit pointers, so an empty table says as much as the profile's.
        let x32 = if x32 { NO_SUCH_CALL } else { Action::KILL_PROCESS };
        Ok(Self { profile: Profile { default, newer, calls, x32 }, flags: flags(items(&seccomp.flags))? })
    }
}

fn action(name: &str, errno: Option<u32>) -> Result<Action, ProfileError> {
    let number = errno.unwrap_or(libc::EPERM as u32);
    if number > 0xffff {
        return Err(ProfileError::Errno(number));
    }
    Ok(match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Action(libc::SECCOMP_RET_KILL_THREAD),
        "SCMP_ACT_KILL_PROCESS" => Action::KILL_PROCESS,
        "SCMP_ACT_TRAP" => Action(libc::SECCOMP_RET_TRAP),
        // The kernel takes larger error numbers for the largest that it knows.
        "SCMP_ACT_ERRNO" => Action::errno(number.min(MAX_ERRNO)),
        "SCMP_ACT_TRACE" => Action(libc::SECCOMP_RET_TRACE | number),
        "SCMP_ACT_ALLOW" => Action::ALLOW,
        "SCMP_ACT_LOG" => Action(libc::SECCOMP_RET_LOG),
        "SCMP_ACT_NOTIFY" => return Err(ProfileError::Notify),
        other => return Err(ProfileError::UnknownAction(other.to_owned())),
    })
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
    Ok(Condition { argument, width: Width::All64, comparison })
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

#[cfg(test)]
mod tests {
    use bulkhead_seccomp_compiler::interpreter::{Call, cost, run};
    use bulkhead_seccomp_compiler::{X32_BIT, compile};

    use super::*;
    use crate::container::spec::Seccomp;

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    const AUDIT_ARCH_X86_64: u32 = Architecture::X86_64.audit();
    const AUDIT_ARCH_I386: u32 = Architecture::X86.audit();

    fn profile(json: &str) -> Profile {
        let seccomp = serde_json::from_str::<Seccomp>(json).unwrap();
        OciProfile::new(&seccomp, KernelSupport { x86: true }).unwrap().profile
    }

    fn native(number: u32, args: [u64; 6]) -> Call {
        Call { number, architecture: AUDIT_ARCH_X86_64, args }
    }

    #[test]
    fn calls_are_told_apart_by_number_and_architecture() {
        let program = compile(&profile(
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [{"names": ["read", "openat", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
                             {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}"#,
        ));
        let result = |number, architecture| run(&program, &Call { number, architecture, args: [0; 6] });
        assert_eq!(result(0, AUDIT_ARCH_X86_64), ALLOW);
        assert_eq!(result(257, AUDIT_ARCH_X86_64), ALLOW);
        assert_eq!(result(1, AUDIT_ARCH_X86_64), EPERM);
        assert_eq!(result(83, AUDIT_ARCH_X86_64), libc::SECCOMP_RET_ERRNO | 28);
        assert_eq!(result(258, AUDIT_ARCH_X86_64), ENOSYS, "newer than the profile");
        assert_eq!(result(3, AUDIT_ARCH_I386), ALLOW, "read has another number there");
        assert_eq!(result(0, AUDIT_ARCH_I386), EPERM);
        assert_eq!(result(X32_BIT, AUDIT_ARCH_X86_64), KILL, "x32 is not listed");
        assert_eq!(result(0, 0x4000_0028), KILL, "nor is ARM");
    }

    #[test]
    fn x32_calls_do_not_exist_when_listed() {
        let program = compile(&profile(
            r#"{"defaultAction": "SCMP_ACT_LOG", "architectures": ["SCMP_ARCH_X32"],
                "syscalls": [{"names": ["read"], "action": "SCMP_ACT_TRAP"}]}"#,
        ));
        assert_eq!(run(&program, &native(X32_BIT, [0; 6])), ENOSYS);
        assert_eq!(run(&program, &native(0, [0; 6])), libc::SECCOMP_RET_TRAP);
        assert_eq!(
            run(&program, &native(500, [0; 6])),
            libc::SECCOMP_RET_LOG,
            "no ENOSYS where calls are allowed"
        );
    }

    #[test]
    fn a_kernel_without_32_bit_programs_needs_no_table_for_them() {
        let json = r#"{"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86"],
                       "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}"#;
        let seccomp = serde_json::from_str::<Seccomp>(json).unwrap();
        let program = |x86| compile(&OciProfile::new(&seccomp, KernelSupport { x86 }).unwrap().profile);
        let call = Call { number: 3, architecture: AUDIT_ARCH_I386, args: [0; 6] };
        assert_eq!(run(&program(true), &call), ALLOW);
        assert_eq!(run(&program(false), &call), KILL);
    }

    #[test]
    fn every_comparison_looks_at_all_64_bits() {
        type Expected = fn(u64) -> bool;
        const V: u64 = 0x1_0000_0005;
        let cases: [(&str, Expected); 6] = [
            ("SCMP_CMP_EQ", |x| x == V),
            ("SCMP_CMP_NE", |x| x != V),
            ("SCMP_CMP_LT", |x| x < V),
            ("SCMP_CMP_LE", |x| x <= V),
            ("SCMP_CMP_GT", |x| x > V),
            ("SCMP_CMP_GE", |x| x >= V),
        ];
        for (operator, expected) in cases {
            let program = compile(&profile(&format!(
                r#"{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                    "args": [{{"index": 2, "value": {V}, "op": "{operator}"}}]}}]}}"#
            )));
            for value in [0, 4, 5, 6, V - 1, V, V + 1, 0x2_0000_0000, 0x1_0000_0000, u64::MAX, 0x2_0000_0005]
            {
                let result = run(&program, &native(0, [9, 9, value, 9, 9, 9]));
                assert_eq!(result == ALLOW, expected(value), "{operator} {value:#x}");
            }
        }
        let masked = compile(&profile(
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["clone"], "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]}]}"#,
        ));
        assert_eq!(run(&masked, &native(56, [0x11, 0, 0, 0, 0, 0])), ALLOW);
        assert_eq!(run(&masked, &native(56, [0x1000_0011, 0, 0, 0, 0, 0])), EPERM);
    }

    #[test]
    fn conditions_hold_together_unless_they_name_an_argument_twice() {
        let args = |second| {
            format!(
                r#"{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                    "args": [{{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}},
                             {{"index": {second}, "value": 2, "op": "SCMP_CMP_EQ"}}]}}]}}"#
            )
        };
        let together = compile(&profile(&args(1)));
        assert_eq!(run(&together, &native(0, [1, 2, 0, 0, 0, 0])), ALLOW);
        assert_eq!(run(&together, &native(0, [1, 3, 0, 0, 0, 0])), EPERM);
        assert_eq!(run(&together, &native(0, [0, 2, 0, 0, 0, 0])), EPERM);
        let each = compile(&profile(&args(0)));
        assert_eq!(run(&each, &native(0, [1, 0, 0, 0, 0, 0])), ALLOW);
        assert_eq!(run(&each, &native(0, [2, 0, 0, 0, 0, 0])), ALLOW);
        assert_eq!(run(&each, &native(0, [3, 0, 0, 0, 0, 0])), EPERM);
    }

    #[test]
    fn many_calls_cost_few_instructions() {
        let names: Vec<String> = (0..330)
            .filter(|n| n % 3 != 0)
            .filter_map(|n| Some(format!("\"{}\"", syscalls::Sysno::new(n)?.name())))
            .collect();
        let program = compile(&profile(&format!(
            r#"{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{{"names": [{}], "action": "SCMP_ACT_ALLOW"}}]}}"#,
            names.join(",")
        )));
        let worst = (0..330).map(|n| cost(&program, &native(n, [0; 6]))).max().unwrap();
        assert!(worst <= 16, "{worst} instructions");
        assert!(program.len() < 1000, "{} instructions", program.len());
    }

    #[test]
    fn what_can_not_be_carried_out_is_refused() {
        let error = |json: &str| {
            super::super::Filter::new(&serde_json::from_str(json).unwrap())
                .map(|filter| filter.len())
                .unwrap_err()
                .to_string()
        };
        assert!(error(r#"{"defaultAction": "SCMP_ACT_PRAY"}"#).contains("SCMP_ACT_PRAY"));
        assert!(error(r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#).contains("listener"));
        assert!(
            error(r#"{"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_FUN"]}"#)
                .contains("FUN")
        );
        assert!(
            error(r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_PDP11"]}"#)
                .contains("PDP11")
        );
        let rule = |op, index| {
            format!(
                r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{{"names": ["read"], "action": "SCMP_ACT_ERRNO",
                    "args": [{{"index": {index}, "value": 1, "op": "{op}"}}]}}]}}"#
            )
        };
        assert!(error(&rule("SCMP_CMP_ODD", 0)).contains("SCMP_CMP_ODD"));
        assert!(error(&rule("SCMP_CMP_EQ", 6)).contains("argument 6"));
    }

    /// The kernel itself takes the program and acts by it.
    #[test]
    fn the_kernel_accepts_the_program() {
        let filter = super::super::Filter::new(
            &serde_json::from_str(
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                    {"names": ["getppid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 61},
                    {"names": ["getpriority"], "action": "SCMP_ACT_ERRNO", "errnoRet": 62,
                     "args": [{"index": 1, "value": 77, "op": "SCMP_CMP_EQ"}]}]}"#,
            )
            .unwrap(),
        )
        .unwrap();
        // A filter holds for the thread that installs it, so the test gives it a thread of its own.
        let thread = std::thread::spawn(move || {
            crate::sys::process::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).unwrap();
            filter.install().unwrap();
            // SAFETY: the calls take numbers only.
            unsafe {
                let ppid = crate::sys::check(libc::syscall(libc::SYS_getppid));
                let other = crate::sys::check(libc::syscall(libc::SYS_getpriority, 0, 0));
                let priority = crate::sys::check(libc::syscall(libc::SYS_getpriority, 0, 77));
                (ppid.unwrap_err().raw_os_error(), other.is_ok(), priority.unwrap_err().raw_os_error())
            }
        });
        assert_eq!(thread.join().unwrap(), (Some(61), true, Some(62)));
    }
}
