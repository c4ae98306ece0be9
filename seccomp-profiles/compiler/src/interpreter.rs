//! Runs classic BPF as the kernel does. For tests of what the compiler makes, here and in other crates: a program that no
//! filter may be ends in a panic.
#![allow(clippy::panic, reason = "only tests run programs here")]

use libc::sock_filter;

use crate::profile::{Comparison, Condition, Width};

/// Where the arguments begin in `struct seccomp_data`; in front of them is what is the same at each call of a number.
const ARGUMENTS: u32 = 16;

/// A system call as a filter sees it.
#[derive(Debug, Clone)]
pub struct Call {
    /// Its number.
    pub number: u32,
    /// `AUDIT_ARCH_*` of the caller.
    pub architecture: u32,
    /// Its arguments.
    pub args: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        match offset {
            0 => self.number,
            4 => self.architecture,
            ARGUMENTS..64 if offset.is_multiple_of(4) => {
                let argument = self.args[((offset - ARGUMENTS) / 8) as usize];
                if offset.is_multiple_of(8) { argument as u32 } else { (argument >> 32) as u32 }
            }
            _ => panic!("load of offset {offset}"),
        }
    }
}

/// Whether a condition of a profile holds for a call, as the specification says it: what a program is compared with.
pub fn holds(condition: &Condition, call: &Call) -> bool {
    let bits = if condition.width == Width::Low32 { u32::MAX.into() } else { u64::MAX };
    let argument = call.args[usize::from(condition.argument)] & bits;
    match condition.comparison {
        Comparison::Equal(value) => argument == value & bits,
        Comparison::NotEqual(value) => argument != value & bits,
        Comparison::Less(value) => argument < value & bits,
        Comparison::LessOrEqual(value) => argument <= value & bits,
        Comparison::Greater(value) => argument > value & bits,
        Comparison::GreaterOrEqual(value) => argument >= value & bits,
        Comparison::MaskedEqual { mask, value } => argument & mask & bits == value & bits,
    }
}

/// The action that the program ends with.
pub fn run(program: &[sock_filter], call: &Call) -> u32 {
    execute(program, call).action
}

/// How many instructions the program executes.
pub fn cost(program: &[sock_filter], call: &Call) -> usize {
    execute(program, call).count
}

/// The action if it is the same for all arguments, as the kernel finds out when a filter is installed: it gives up at the
/// first load of an argument. The calls that are allowed in this way never run the program.
pub fn constant(program: &[sock_filter], number: u32, architecture: u32) -> Option<u32> {
    let end = execute(program, &Call { number, architecture, args: [0; 6] });
    (!end.has_loaded_arguments).then_some(end.action)
}

struct End {
    action: u32,
    count: usize,
    has_loaded_arguments: bool,
}

fn execute(program: &[sock_filter], call: &Call) -> End {
    let (mut position, mut accumulator, mut count) = (0usize, 0u32, 0);
    let mut has_loaded_arguments = false;
    loop {
        let instruction = program[position];
        position += 1;
        count += 1;
        let jump = |holds: bool| usize::from(if holds { instruction.jt } else { instruction.jf });
        match (u32::from(instruction.code), instruction.k) {
            (0x20, offset) => {
                accumulator = call.word(offset);
                has_loaded_arguments |= offset >= ARGUMENTS;
            }
            (0x54, k) => accumulator &= k,
            (0x05, k) => position += k as usize,
            (0x15, k) => position += jump(accumulator == k),
            (0x25, k) => position += jump(accumulator > k),
            (0x35, k) => position += jump(accumulator >= k),
            (0x06, action) => return End { action, count, has_loaded_arguments },
            (code, _) => panic!("instruction {code:#x}"),
        }
    }
}
