//! Compiles a profile.
//!
//! The program tells architectures apart, then finds the call's number by bisection over ranges of numbers with the same
//! treatment: a profile of hundreds of calls costs about ten comparisons. Conditions on arguments come last, so that the
//! kernel sees of each other call that its fate never changes, and does not run the program for those it allows.

use std::collections::{BTreeMap, HashMap};

use crate::assembler::{Assembler, Label, Test};
use crate::profile::{Action, Architecture, CallRules, Comparison, Condition, Profile, Width, X32_BIT};

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// Compiles the profile for a kernel on x86-64. The kernel takes no more than `BPF_MAXINSNS` instructions.
pub fn compile(profile: &Profile) -> Vec<libc::sock_filter> {
    let mut writer = Writer { assembler: Assembler::default(), actions: HashMap::new() };
    // As with libseccomp, a call of an architecture that the profile does not list kills the caller.
    let unlisted = writer.action(Action::KILL_PROCESS);
    let mut table = |architecture| {
        let (_, calls) = profile.calls.iter().find(|(listed, _)| *listed == architecture)?;
        let start = writer.search(&segments(profile, architecture, calls));
        Some(writer.load_number(start))
    };
    let x86 = table(Architecture::X86);
    let native = table(Architecture::X86_64).unwrap_or(unlisted);
    let other = match x86 {
        Some(x86) => writer.assembler.branch(Test::Equal, Architecture::X86.audit(), x86, unlisted),
        None => unlisted,
    };
    writer.assembler.branch(Test::Equal, Architecture::X86_64.audit(), native, other);
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
fn segments<'a>(
    profile: &Profile,
    architecture: Architecture,
    calls: &'a BTreeMap<u32, CallRules>,
) -> Vec<Segment<'a>> {
    let mut segments: Vec<Segment<'_>> = Vec::new();
    let mut push = |first: u32, treatment| {
        if segments.last().is_none_or(|last| last.treatment != treatment) {
            segments.push(Segment { first, treatment });
        }
    };
    let mut next = 0;
    for (&number, rules) in calls.range(..X32_BIT) {
        if number > next {
            push(next, Treatment::Always(profile.default));
        }
        let treatment = match rules.otherwise.unwrap_or(profile.default) {
            action if rules.conditional.iter().all(|(_, other)| *other == action) => {
                Treatment::Always(action)
            }
            otherwise => Treatment::Conditional(rules, otherwise),
        };
        push(number, treatment);
        next = number + 1;
    }
    let newer = profile.newer.filter(|_| next > 0).unwrap_or(profile.default);
    push(next, Treatment::Always(newer));
    if architecture == Architecture::X86_64 {
        push(X32_BIT, Treatment::Always(profile.x32));
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

    fn test(&mut self, condition: &Condition, yes: Label, no: Label) -> Label {
        let argument = Argument::of(condition);
        match condition.comparison {
            Comparison::Equal(value) => self.equal(argument, value, u64::MAX, yes, no),
            Comparison::NotEqual(value) => self.equal(argument, value, u64::MAX, no, yes),
            // What a mask leaves of the argument has no bits but the mask's.
            Comparison::MaskedEqual { mask, value } if value & !mask & argument.bits != 0 => no,
            Comparison::MaskedEqual { mask, value } => self.equal(argument, value, mask, yes, no),
            Comparison::Greater(value) => self.greater(argument, value, Test::Greater, yes, no),
            Comparison::LessOrEqual(value) => self.greater(argument, value, Test::Greater, no, yes),
            Comparison::GreaterOrEqual(value) => self.greater(argument, value, Test::GreaterOrEqual, yes, no),
            Comparison::Less(value) => self.greater(argument, value, Test::GreaterOrEqual, no, yes),
        }
    }

    /// Compares a 64-bit argument in two halves.
    fn equal(&mut self, argument: Argument, value: u64, mask: u64, yes: Label, no: Label) -> Label {
        let mask = mask & argument.bits;
        let low = self.half_equal(argument.low, value as u32, mask as u32, yes, no);
        self.half_equal(argument.high(), high_half(value), high_half(mask), low, no)
    }

    fn half_equal(&mut self, offset: u32, value: u32, mask: u32, yes: Label, no: Label) -> Label {
        if mask == 0 {
            // No bit of this half counts.
            return yes;
        }
        self.assembler.branch(Test::Equal, value, yes, no);
        if mask != u32::MAX {
            self.assembler.and(mask);
        }
        self.assembler.load(offset)
    }

    fn greater(&mut self, argument: Argument, value: u64, test: Test, yes: Label, no: Label) -> Label {
        self.assembler.branch(test, value as u32, yes, no);
        let low = self.assembler.load(argument.low);
        if high_half(argument.bits) == 0 {
            return low;
        }
        // The high halves decide unless they are equal.
        let equal = self.assembler.branch(Test::Equal, high_half(value), low, no);
        self.assembler.branch(Test::Greater, high_half(value), yes, equal);
        self.assembler.load(argument.high())
    }
}

fn high_half(value: u64) -> u32 {
    (value >> 32) as u32
}

/// Where an argument is, and which of its bits count. The machine is little-endian: the low half comes first.
#[derive(Debug, Clone, Copy)]
struct Argument {
    low: u32,
    bits: u64,
}

impl Argument {
    fn of(condition: &Condition) -> Self {
        let bits = match condition.width {
            Width::Low32 => u32::MAX.into(),
            Width::All64 => u64::MAX,
        };
        Self { low: ARGUMENTS + 8 * u32::from(condition.argument), bits }
    }

    fn high(self) -> u32 {
        self.low + 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interpreter::{Call, constant, cost, holds, run};

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

    /// A profile of the 64-bit architecture that fails what has no rule with `EPERM`.
    fn profile(calls: impl IntoIterator<Item = (u32, CallRules)>) -> Profile {
        Profile {
            default: Action::errno(libc::EPERM as u32),
            newer: None,
            calls: vec![(Architecture::X86_64, calls.into_iter().collect())],
            x32: Action::KILL_PROCESS,
        }
    }

    fn always(action: Action) -> CallRules {
        CallRules { conditional: Vec::new(), otherwise: Some(action) }
    }

    /// Allows the call if one of the rules holds.
    fn allow_if(rules: impl IntoIterator<Item = Vec<Condition>>) -> CallRules {
        let conditional = rules.into_iter().map(|conditions| (conditions, Action::ALLOW)).collect();
        CallRules { conditional, otherwise: None }
    }

    fn condition(argument: u8, width: Width, comparison: Comparison) -> Condition {
        Condition { argument, width, comparison }
    }

    fn native(number: u32, args: [u64; 6]) -> Call {
        Call { number, architecture: Architecture::X86_64.audit(), args }
    }

    #[test]
    fn what_is_newer_than_the_profile_has_an_action_of_its_own() {
        let result = |profile: &Profile, number| run(&compile(profile), &native(number, [0; 6]));
        let mut profile = profile([(0, always(Action::ALLOW)), (257, always(Action::ALLOW))]);
        assert_eq!(result(&profile, 256), EPERM);
        assert_eq!(result(&profile, 258), EPERM);
        profile.newer = Some(Action::errno(libc::ENOSYS as u32));
        assert_eq!(result(&profile, 256), EPERM);
        assert_eq!(result(&profile, 257), ALLOW);
        assert_eq!(result(&profile, 258), ENOSYS);
        assert_eq!(result(&profile, X32_BIT - 1), ENOSYS);
        assert_eq!(result(&profile, X32_BIT), KILL);
        profile.calls[0].1.clear();
        assert_eq!(result(&profile, 258), EPERM, "no call is newer than none");
    }

    #[test]
    fn other_architectures_are_killed_and_x32_has_an_action_of_its_own() {
        let mut profile = profile([(0, always(Action::ALLOW))]);
        profile.x32 = Action::ALLOW;
        let program = compile(&profile);
        assert_eq!(run(&program, &native(X32_BIT, [0; 6])), ALLOW);
        assert_eq!(run(&program, &native(u32::MAX, [0; 6])), ALLOW);
        for architecture in [Architecture::X86.audit(), 0xc000_00b7, 0] {
            assert_eq!(run(&program, &Call { number: 0, architecture, args: [0; 6] }), KILL);
        }
    }

    #[test]
    fn comparisons_look_at_the_bits_of_their_width() {
        const V: u64 = 0x1_0000_0005;
        let comparisons = [
            Comparison::Equal(V),
            Comparison::NotEqual(V),
            Comparison::Less(V),
            Comparison::LessOrEqual(V),
            Comparison::Greater(V),
            Comparison::GreaterOrEqual(V),
            Comparison::MaskedEqual { mask: 0xf_0000_000f, value: V },
            Comparison::MaskedEqual { mask: 0xf_0000_0000, value: 0x1_0000_0000 },
            Comparison::MaskedEqual { mask: 0xf, value: 5 },
            Comparison::MaskedEqual { mask: 0xf, value: V },
            Comparison::MaskedEqual { mask: 0xf, value: 0x15 },
            Comparison::MaskedEqual { mask: 0, value: 0 },
        ];
        for comparison in comparisons {
            for width in [Width::Low32, Width::All64] {
                let condition = condition(2, width, comparison);
                let program = compile(&profile([(0, allow_if([vec![condition]]))]));
                for value in
                    [0, 4, 5, 6, V - 1, V, V + 1, V - 5, V + V, 0x2_0000_0000, 0x2_0000_0005, u64::MAX]
                {
                    let call = native(0, [9, 9, value, 9, 9, 9]);
                    assert_eq!(
                        run(&program, &call) == ALLOW,
                        holds(&condition, &call),
                        "{condition:?} {value:#x}"
                    );
                }
            }
        }
    }

    #[test]
    fn only_the_half_that_counts_is_loaded() {
        let mask = Comparison::MaskedEqual { mask: 0xf0, value: 0x10 };
        for (width, comparison, cost_of_condition) in [
            (Width::All64, mask, 3),
            (Width::All64, Comparison::MaskedEqual { mask: 0xf0 << 32, value: 0 }, 3),
            (Width::All64, Comparison::MaskedEqual { mask: 0xffff_ffff, value: 0 }, 2),
            (Width::All64, Comparison::Equal(0), 4),
            (Width::Low32, mask, 3),
            (Width::Low32, Comparison::Equal(0), 2),
            (Width::Low32, Comparison::LessOrEqual(0), 2),
        ] {
            let call = native(0, [0x10, 0, 0, 0, 0, 0]);
            let condition = condition(0, width, comparison);
            let costs = |rules| cost(&compile(&profile([(0, rules)])), &call);
            let unconditional = costs(always(Action::ALLOW));
            let found = costs(allow_if([vec![condition]])) - unconditional;
            assert!(found <= cost_of_condition, "{condition:?}: {found} instructions");
        }
    }

    #[test]
    fn neighbours_that_are_treated_alike_are_one_segment() {
        let rules = || allow_if([vec![condition(2, Width::Low32, Comparison::Equal(1))]]);
        let profile = profile([
            (3, always(Action::ALLOW)),
            (4, always(Action::ALLOW)),
            (5, always(Action::ALLOW)),
            (9, rules()),
            (10, rules()),
        ]);
        let segments = segments(&profile, Architecture::X86_64, &profile.calls[0].1);
        let firsts: Vec<u32> = segments.iter().map(|segment| segment.first).collect();
        assert_eq!(firsts, [0, 3, 6, 9, 11, X32_BIT]);
    }

    /// What the kernel can't tell in advance it asks the program at each call.
    #[test]
    fn calls_without_conditions_are_constant_to_the_kernel() {
        let allowed_if = allow_if([vec![condition(0, Width::All64, Comparison::Equal(1))]]);
        let program = compile(&profile((0..100).map(|number| {
            (2 * number, if number == 50 { allowed_if.clone() } else { always(Action::ALLOW) })
        })));
        for number in 0..300 {
            let expected = match number {
                100 => None,
                number if number % 2 == 0 && number < 200 => Some(ALLOW),
                _ => Some(EPERM),
            };
            assert_eq!(constant(&program, number, Architecture::X86_64.audit()), expected, "{number}");
        }
    }

    /// Many rules with many arguments make jumps too long for one byte.
    #[test]
    fn a_large_program_means_what_the_profile_says() {
        let mut profile = profile([]);
        profile.calls.push((Architecture::X86, BTreeMap::new()));
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
                    let width = [Width::All64, Width::Low32][(random() % 2) as usize];
                    let condition = condition((random() % 6) as u8, width, comparison);
                    rules.conditional.push((vec![condition], Action::errno((random() % 100) as u32)));
                }
                rules.otherwise = [None, Some(Action::ALLOW)][(random() % 2) as usize];
                calls.insert(number, rules);
            }
        }
        let program = compile(&profile);
        assert!(program.len() > 2000, "{}", program.len());

        let expect = |calls: &BTreeMap<u32, CallRules>, call: &Call| {
            let rules = &calls[&call.number];
            let all_hold = |conditions: &[Condition]| conditions.iter().all(|one| holds(one, call));
            let first = rules.conditional.iter().find(|(conditions, _)| all_hold(conditions));
            first.map(|(_, action)| *action).or(rules.otherwise).unwrap_or(profile.default).0
        };
        for round in 0..6000 {
            let number = round % 300;
            let args = std::array::from_fn(|_| (random() % 5) << [0, 32][(random() % 2) as usize]);
            for (architecture, calls) in &profile.calls {
                let call = Call { number, architecture: architecture.audit(), args };
                assert_eq!(run(&program, &call), expect(calls, &call), "{call:?}");
            }
        }
    }

    #[test]
    fn many_calls_cost_few_instructions() {
        let listed = (0..330).filter(|number| number % 3 != 0);
        let program = compile(&profile(listed.map(|number| (number, always(Action::ALLOW)))));
        let worst = (0..330).map(|number| cost(&program, &native(number, [0; 6]))).max().unwrap();
        assert!(worst <= 16, "{worst} instructions");
        assert!(program.len() < 1000, "{} instructions", program.len());
    }
}
