//! Compiles a checked profile.
//!
//! The program tells architectures apart, then finds the call's number by bisection over ranges of numbers with the same
//! treatment: a profile of hundreds of calls costs about ten comparisons. Conditions on arguments come last.

use std::collections::{BTreeMap, HashMap};

use super::assembler::{Assembler, Label, Test};
use super::rules::{Action, Architecture, CallRules, Comparison, Condition, Profile};

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
/// Calls of 64-bit programs with 32-bit pointers have the 64-bit architecture and this bit in their number.
const X32_BIT: u32 = 0x4000_0000;

const NO_SUCH_CALL: Action = Action::errno(libc::ENOSYS as u32);

/// Compiles the profile for a kernel on x86-64.
pub fn compile(profile: &Profile) -> Vec<libc::sock_filter> {
    let mut writer = Writer { assembler: Assembler::default(), actions: HashMap::new() };
    // As with libseccomp, a call of an architecture that the profile does not list kills the caller.
    let unlisted = writer.action(Action::KILL_PROCESS);
    let table = |architecture| {
        profile.calls.iter().find(|(listed, _)| *listed == architecture).map(|(_, calls)| calls)
    };

    let x86 = match table(Architecture::X86) {
        Some(calls) => {
            let start = writer.search(&segments(calls, profile.default));
            let load = writer.load_number(start);
            Some(load)
        }
        None => None,
    };
    // The kernel has no such calls, so an empty table says as much as the profile's.
    let x32 = if profile.x32 { writer.action(NO_SUCH_CALL) } else { unlisted };
    let native = match table(Architecture::X86_64) {
        Some(calls) => writer.search(&segments(calls, profile.default)),
        None => unlisted,
    };
    let number = writer.assembler.branch(Test::GreaterOrEqual, X32_BIT, x32, native);
    let native = writer.load_number(number);
    let other = match x86 {
        Some(x86) => writer.assembler.branch(Test::Equal, AUDIT_ARCH_I386, x86, unlisted),
        None => unlisted,
    };
    writer.assembler.branch(Test::Equal, AUDIT_ARCH_X86_64, native, other);
    writer.assembler.load(ARCHITECTURE);
    writer.assembler.finish()
}

/// Calls from a number on, up to the next segment's, that are treated alike.
#[derive(Debug, PartialEq, Eq)]
struct Segment<'a> {
    first: u32,
    treatment: Treatment<'a>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Treatment<'a> {
    Always(Action),
    Conditional(&'a CallRules, Action),
}

/// Lays the rules out as segments from number 0 to the end.
fn segments(calls: &BTreeMap<u32, CallRules>, default: Action) -> Vec<Segment<'_>> {
    let mut segments: Vec<Segment<'_>> = Vec::new();
    let mut push = |first: u32, treatment| match segments.last_mut() {
        Some(last) if last.first == first => last.treatment = treatment,
        Some(last) if last.treatment == treatment && matches!(treatment, Treatment::Always(_)) => {}
        _ => segments.push(Segment { first, treatment }),
    };
    push(0, Treatment::Always(default));
    for (&number, rules) in calls {
        let treatment = match rules.otherwise {
            Some(action) if rules.conditional.iter().all(|(_, other)| *other == action) => {
                Treatment::Always(action)
            }
            otherwise => Treatment::Conditional(rules, otherwise.unwrap_or(default)),
        };
        push(number, treatment);
        push(number + 1, Treatment::Always(default));
    }
    // Programs try calls that are newer than the profile and fall back when these do not exist; they don't when the
    // call is forbidden. So what no one who wrote the profile can have known of does not exist.
    if let (Some((&last, _)), true) = (calls.last_key_value(), default.refuses()) {
        push(last + 1, Treatment::Always(NO_SUCH_CALL));
    }
    segments
}

struct Writer {
    assembler: Assembler,
    /// Where each action has been written.
    actions: HashMap<u32, Label>,
}

impl Writer {
    /// The place of an action. It is written again where the last one is far: an instruction is as short as a jump.
    fn action(&mut self, action: Action) -> Label {
        match self.actions.get(&action.0) {
            Some(&label) if self.assembler.is_near(label) => label,
            _ => {
                let label = self.assembler.action(action.0);
                self.actions.insert(action.0, label);
                label
            }
        }
    }

    fn load_number(&mut self, next: Label) -> Label {
        self.assembler.jump(next);
        self.assembler.load(NUMBER)
    }

    /// Bisects the segments by the call's number, which is in the accumulator.
    fn search(&mut self, segments: &[Segment<'_>]) -> Label {
        match segments {
            [] => self.action(Action::KILL_PROCESS),
            [only] => self.treat(only.treatment),
            _ => {
                let (low, high) = segments.split_at(segments.len() / 2);
                let upper = self.search(high);
                let lower = self.search(low);
                self.assembler.branch(Test::GreaterOrEqual, high[0].first, upper, lower)
            }
        }
    }

    fn treat(&mut self, treatment: Treatment<'_>) -> Label {
        match treatment {
            Treatment::Always(action) => self.action(action),
            Treatment::Conditional(rules, otherwise) => {
                // Back to front: each rule continues with the one behind it when a condition fails.
                let mut next = self.action(otherwise);
                for (conditions, action) in rules.conditional.iter().rev() {
                    let mut then = self.action(*action);
                    for condition in conditions.iter().rev() {
                        then = self.test(condition, then, next);
                    }
                    next = then;
                }
                next
            }
        }
    }

    /// Compares a 64-bit argument in two halves.
    fn test(&mut self, condition: &Condition, yes: Label, no: Label) -> Label {
        let halves = Halves::of(condition.argument);
        let (high, low) = (|value: u64| (value >> 32) as u32, |value: u64| value as u32);
        match condition.comparison {
            Comparison::Equal(value) => self.equal(halves, value, u64::MAX, yes, no),
            Comparison::NotEqual(value) => self.equal(halves, value, u64::MAX, no, yes),
            Comparison::MaskedEqual { mask, value } => self.equal(halves, value, mask, yes, no),
            Comparison::Greater(value) => {
                self.greater(halves, high(value), low(value), Test::Greater, yes, no)
            }
            Comparison::LessOrEqual(value) => {
                self.greater(halves, high(value), low(value), Test::Greater, no, yes)
            }
            Comparison::GreaterOrEqual(value) => {
                self.greater(halves, high(value), low(value), Test::GreaterOrEqual, yes, no)
            }
            Comparison::Less(value) => {
                self.greater(halves, high(value), low(value), Test::GreaterOrEqual, no, yes)
            }
        }
    }

    fn equal(&mut self, halves: Halves, value: u64, mask: u64, yes: Label, no: Label) -> Label {
        let low = self.half_equal(halves.low, value as u32, mask as u32, yes, no);
        self.half_equal(halves.high, (value >> 32) as u32, (mask >> 32) as u32, low, no)
    }

    fn half_equal(&mut self, offset: u32, value: u32, mask: u32, yes: Label, no: Label) -> Label {
        self.assembler.branch(Test::Equal, value, yes, no);
        if mask != u32::MAX {
            self.assembler.and(mask);
        }
        self.assembler.load(offset)
    }

    fn greater(&mut self, halves: Halves, high: u32, low: u32, test: Test, yes: Label, no: Label) -> Label {
        self.assembler.branch(test, low, yes, no);
        let low = self.assembler.load(halves.low);
        // The high halves decide unless they are equal.
        let equal = self.assembler.branch(Test::Equal, high, low, no);
        self.assembler.branch(Test::Greater, high, yes, equal);
        self.assembler.load(halves.high)
    }
}

/// Offsets of an argument's halves; the machine is little-endian.
#[derive(Debug, Clone, Copy)]
struct Halves {
    low: u32,
    high: u32,
}

impl Halves {
    fn of(argument: u8) -> Self {
        let low = ARGUMENTS + 8 * u32::from(argument);
        Self { low, high: low + 4 }
    }
}

#[cfg(test)]
mod tests {
    use super::super::interpreter::{Call, run};
    use super::super::rules::KernelSupport;
    use super::*;
    use crate::container::spec::Seccomp;

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

    fn profile(json: &str) -> Profile {
        Profile::new(&serde_json::from_str::<Seccomp>(json).unwrap(), KernelSupport { x86: true }).unwrap()
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
        let program = |x86| compile(&Profile::new(&seccomp, KernelSupport { x86 }).unwrap());
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

    /// Many rules with many arguments make jumps too long for one byte.
    #[test]
    fn a_large_program_means_what_the_profile_says() {
        let mut profile =
            profile(r#"{"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86"]}"#);
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for (_, calls) in &mut profile.calls {
            for number in 0..300 {
                let mut rules = CallRules::default();
                for _ in 0..random() % 4 {
                    let value = random() % 4;
                    let comparison = match random() % 4 {
                        0 => Comparison::Equal(value),
                        1 => Comparison::GreaterOrEqual(value << 32),
                        2 => Comparison::MaskedEqual { mask: 3, value },
                        _ => Comparison::NotEqual(value),
                    };
                    let condition = Condition { argument: (random() % 6) as u8, comparison };
                    rules.conditional.push((vec![condition], Action::errno((random() % 100) as u32)));
                }
                rules.otherwise = [None, Some(Action::ALLOW)][(random() % 2) as usize];
                calls.insert(number, rules);
            }
        }
        let program = compile(&profile);
        assert!(program.len() > 2000, "{}", program.len());

        let expect = |calls: &BTreeMap<u32, CallRules>, call: &Call| {
            let holds = |condition: &Condition| {
                let value = call.args[usize::from(condition.argument)];
                match condition.comparison {
                    Comparison::Equal(other) => value == other,
                    Comparison::NotEqual(other) => value != other,
                    Comparison::GreaterOrEqual(other) => value >= other,
                    Comparison::MaskedEqual { mask, value: other } => value & mask == other,
                    _ => unreachable!(),
                }
            };
            let rules = &calls[&call.number];
            let first = rules.conditional.iter().find(|(conditions, _)| conditions.iter().all(holds));
            first.map(|(_, action)| *action).or(rules.otherwise).unwrap_or(profile.default).0
        };
        for round in 0..6000 {
            let number = round % 300;
            let args = std::array::from_fn(|_| (random() % 5) << [0, 32][(random() % 2) as usize]);
            for (position, architecture) in [AUDIT_ARCH_X86_64, AUDIT_ARCH_I386].into_iter().enumerate() {
                let call = Call { number, architecture, args };
                assert_eq!(run(&program, &call), expect(&profile.calls[position].1, &call), "{call:?}");
            }
        }
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
        let worst =
            (0..330).map(|n| super::super::interpreter::cost(&program, &native(n, [0; 6]))).max().unwrap();
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
