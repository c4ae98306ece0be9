//! The seccomp compiler against its interpreter: a program decides as the profile that it was made from.

use std::collections::BTreeMap;

use bulkhead_seccomp_compiler::interpreter::{Call, constant, holds, run as execute};
use bulkhead_seccomp_compiler::{
    Action, Architecture, CallRules, Comparison, Condition, Profile, Width, X32_BIT, compile,
};

use crate::input::Input;

/// What the kernel takes.
const MAX_INSTRUCTIONS: usize = 4096;

/// A profile of the input's making, and calls to hold it against.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let profile = profile(&mut input);
    let program = compile(&profile);
    check_form(&program);
    let mut numbers = vec![0, X32_BIT - 1, X32_BIT, u32::MAX];
    for (_, calls) in &profile.calls {
        numbers.extend(
            calls.keys().flat_map(|number| [number.wrapping_sub(1), *number, number.wrapping_add(1)]),
        );
    }
    let values = values(&profile);
    for architecture in [Architecture::X86_64.audit(), Architecture::X86.audit(), 0xc000_00b7] {
        for &number in &numbers {
            let constant = constant(&program, number, architecture);
            for round in 0..8 {
                let args = std::array::from_fn(|index| {
                    let any = values[(usize::from(input.u8()) + round + index) % values.len()];
                    if round & 1 == 0 { any } else { any.wrapping_add(input.u8().into()).wrapping_sub(1) }
                });
                let call = Call { number, architecture, args };
                let wanted = decide(&profile, &call);
                assert_eq!(execute(&program, &call), wanted, "{call:x?} by {profile:x?}");
                assert!(constant.is_none_or(|action| action == wanted), "not constant: {call:x?}");
            }
        }
    }
}

/// Classic BPF as the kernel's checker wants it: jumps go forward and inside, and the last instruction returns.
pub fn check_form(program: &[libc::sock_filter]) {
    for (position, instruction) in program.iter().enumerate() {
        let farthest = match instruction.code {
            0x05 => instruction.k as usize,
            0x15 | 0x25 | 0x35 => instruction.jt.max(instruction.jf).into(),
            _ => 0,
        };
        let falls_off = instruction.code != 0x06 && position + 1 + farthest >= program.len();
        assert!(!falls_off, "instruction {position} of {} leaves the program", program.len());
    }
    assert!(program.len() <= MAX_INSTRUCTIONS * 8, "{} instructions", program.len());
}

fn action(input: &mut Input<'_>) -> Action {
    match input.below(5) {
        0 => Action::ALLOW,
        1 => Action::KILL_PROCESS,
        2 => Action(libc::SECCOMP_RET_LOG),
        _ => Action::errno(input.u8().into()),
    }
}

fn condition(input: &mut Input<'_>) -> Condition {
    let value = input.telling();
    let comparison = match input.below(7) {
        0 => Comparison::Equal(value),
        1 => Comparison::NotEqual(value),
        2 => Comparison::Less(value),
        3 => Comparison::LessOrEqual(value),
        4 => Comparison::Greater(value),
        5 => Comparison::GreaterOrEqual(value),
        _ => Comparison::MaskedEqual { mask: input.telling(), value },
    };
    let width = if input.flag() { Width::Low32 } else { Width::All64 };
    Condition { argument: input.below(6) as u8, width, comparison }
}

fn rules(input: &mut Input<'_>) -> CallRules {
    let conditional = (0..input.below(4)).map(|_| {
        let conditions = (0..input.below(4)).map(|_| condition(input)).collect();
        (conditions, action(input))
    });
    let conditional = conditional.collect();
    CallRules { conditional, otherwise: input.flag().then(|| action(input)) }
}

fn profile(input: &mut Input<'_>) -> Profile {
    let (default, x32) = (action(input), action(input));
    let newer = input.flag().then(|| action(input));
    let mut calls = Vec::new();
    for architecture in [Architecture::X86_64, Architecture::X86] {
        if input.u8() & 3 == 3 {
            continue;
        }
        let mut table = BTreeMap::new();
        let mut number = 0u32;
        for _ in 0..input.u8() & 0x3f {
            number =
                if input.u8() == 0xff { input.u32() } else { number.wrapping_add(input.u8() as u32 & 15) };
            table.insert(number, rules(input));
        }
        calls.push((architecture, table));
    }
    Profile { default, newer, calls, x32 }
}

/// Arguments that make a difference.
fn values(profile: &Profile) -> Vec<u64> {
    let mut values = vec![0, 1, u64::MAX, 1 << 32, u32::MAX.into()];
    let rules = profile.calls.iter().flat_map(|(_, calls)| calls.values());
    for condition in rules.flat_map(|rules| &rules.conditional).flat_map(|(conditions, _)| conditions) {
        match condition.comparison {
            Comparison::Equal(value)
            | Comparison::NotEqual(value)
            | Comparison::Less(value)
            | Comparison::LessOrEqual(value)
            | Comparison::Greater(value)
            | Comparison::GreaterOrEqual(value) => values.push(value),
            Comparison::MaskedEqual { mask, value } => values.extend([value, value | !mask]),
        }
    }
    values.truncate(200);
    values
}

/// What the profile says of a call, by its definition.
fn decide(profile: &Profile, call: &Call) -> u32 {
    let listed = profile.calls.iter().find(|(architecture, _)| architecture.audit() == call.architecture);
    let Some((architecture, calls)) = listed else { return Action::KILL_PROCESS.0 };
    if call.number >= X32_BIT && *architecture == Architecture::X86_64 {
        return profile.x32.0;
    }
    let known = calls.range(..X32_BIT).next_back().map(|(last, _)| *last);
    let Some(rules) = calls.get(&call.number).filter(|_| call.number < X32_BIT) else {
        let is_newer = known.is_some_and(|last| call.number > last);
        return profile.newer.filter(|_| is_newer).unwrap_or(profile.default).0;
    };
    let met = |conditions: &[Condition]| conditions.iter().all(|condition| holds(condition, call));
    let first = rules.conditional.iter().find(|(conditions, _)| met(conditions)).map(|(_, action)| *action);
    first.or(rules.otherwise).unwrap_or(profile.default).0
}
