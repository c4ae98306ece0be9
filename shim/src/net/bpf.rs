//! Programs of classic BPF, as sockets and traffic control take them.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use bulkhead_netlink::{Instruction, Verdict};

pub(crate) const LOAD_32: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
pub(crate) const LOAD_16: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
pub(crate) const LOAD_8: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const JUMP: u32 = libc::BPF_JMP | libc::BPF_JA;

/// A place in a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Label(usize);

/// Puts a program together whose jumps lead to labels.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    code: Vec<Instruction>,
    /// Where the labels are.
    places: Vec<usize>,
    /// Jumps, and the labels that they lead to.
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    pub(crate) fn new_label(&mut self) -> Label {
        self.places.push(0);
        Label(self.places.len() - 1)
    }

    pub(crate) fn place(&mut self, label: Label) {
        self.places[label.0] = self.code.len();
    }

    pub(crate) fn push(&mut self, code: u32, then: u8, otherwise: u8, operand: u32) {
        self.code.push(Instruction { code: code as u16, then, otherwise, operand });
    }

    pub(crate) fn load(&mut self, size: u32, offset: u32) {
        self.push(size, 0, 0, offset);
    }

    /// Keeps these bits of what was loaded.
    pub(crate) fn and(&mut self, bits: u32) {
        self.push(AND, 0, 0, bits);
    }

    pub(crate) fn jump(&mut self, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.push(JUMP, 0, 0, 0);
    }

    // Conditional jumps reach 255 instructions only: they skip one that reaches any.
    pub(crate) fn if_equal(&mut self, value: u32, to: Label) {
        self.push(IF_EQUAL, 0, 1, value);
        self.jump(to);
    }

    pub(crate) fn unless_equal(&mut self, value: u32, to: Label) {
        self.push(IF_EQUAL, 1, 0, value);
        self.jump(to);
    }

    pub(crate) fn end(&mut self, verdict: Verdict) {
        self.code.push(Instruction::end(verdict));
    }

    pub(crate) fn finish(mut self) -> Vec<Instruction> {
        for (position, label) in self.jumps {
            // All labels are behind the jumps to them, and programs far shorter than 4 GiB.
            let distance = self.places[label.0].saturating_sub(position + 1);
            self.code[position].operand = u32::try_from(distance).unwrap_or(u32::MAX);
        }
        self.code
    }
}

/// Has a socket take only what the program matches.
pub(crate) fn attach(socket: &impl AsFd, program: &[Instruction]) -> io::Result<()> {
    let mut code: Vec<libc::sock_filter> = program
        .iter()
        .map(|i| libc::sock_filter { code: i.code, jt: i.then, jf: i.otherwise, k: i.operand })
        .collect();
    // The kernel refuses what is longer than 4096 instructions.
    let filter = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
    // SAFETY: the option's value is the program, of which the size is passed; it outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size_of_val(&filter) as u32,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
