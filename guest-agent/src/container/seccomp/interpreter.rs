//! Runs classic BPF as the kernel does; for tests of the compiler.

use libc::sock_filter;

/// A system call as a filter sees it.
#[derive(Debug, Clone)]
pub struct Call {
    pub number: u32,
    pub architecture: u32,
    pub args: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        match offset {
            0 => self.number,
            4 => self.architecture,
            16..64 => {
                let argument = self.args[((offset - 16) / 8) as usize];
                if offset.is_multiple_of(8) { argument as u32 } else { (argument >> 32) as u32 }
            }
            _ => panic!("load of offset {offset}"),
        }
    }
}

/// The action that the program ends with.
pub fn run(program: &[sock_filter], call: &Call) -> u32 {
    execute(program, call).0
}

/// How many instructions the program executes.
pub fn cost(program: &[sock_filter], call: &Call) -> usize {
    execute(program, call).1
}

fn execute(program: &[sock_filter], call: &Call) -> (u32, usize) {
    let (mut position, mut accumulator, mut count) = (0usize, 0u32, 0);
    loop {
        let instruction = program[position];
        position += 1;
        count += 1;
        let jump = |holds: bool| usize::from(if holds { instruction.jt } else { instruction.jf });
        match (u32::from(instruction.code), instruction.k) {
            (0x20, k) => accumulator = call.word(k),
            (0x54, k) => accumulator &= k,
            (0x05, k) => position += k as usize,
            (0x15, k) => position += jump(accumulator == k),
            (0x25, k) => position += jump(accumulator > k),
            (0x35, k) => position += jump(accumulator >= k),
            (0x06, k) => return (k, count),
            (code, _) => panic!("instruction {code:#x}"),
        }
    }
}
