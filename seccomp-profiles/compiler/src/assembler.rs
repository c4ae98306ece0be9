//! Writes classic BPF back to front.
//!
//! Jumps of classic BPF go forward only, so a program that is written from its end knows the target of every jump when it
//! writes it, and can take the long form of a jump exactly where the short one does not reach.

use libc::sock_filter;

/// Longest jump of a conditional instruction.
const MAX_JUMP: usize = 255;

/// A place in the program, counted from its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Label(usize);

/// A condition on the accumulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Test {
    /// Equal to the operand.
    Equal,
    /// Greater than the operand, unsigned.
    Greater,
    /// Greater than the operand or equal, unsigned.
    GreaterOrEqual,
}

/// A program in the making.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    reversed: Vec<sock_filter>,
}

impl Assembler {
    fn put(&mut self, code: u32, k: u32, jt: u8, jf: u8) -> Label {
        self.reversed.push(sock_filter { code: code as u16, jt, jf, k });
        self.here()
    }

    /// The instruction written last, which is the one executed first.
    pub(crate) fn here(&self) -> Label {
        Label(self.reversed.len())
    }

    /// Whether a conditional jump from here reaches `target`, with some room.
    pub(crate) fn is_near(&self, target: Label) -> bool {
        self.distance(target) < MAX_JUMP - 8
    }

    /// Ends with an action.
    pub(crate) fn action(&mut self, action: u32) -> Label {
        self.put(libc::BPF_RET | libc::BPF_K, action, 0, 0)
    }

    /// Loads a word of `struct seccomp_data` into the accumulator.
    pub(crate) fn load(&mut self, offset: u32) -> Label {
        self.put(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0)
    }

    /// Keeps the bits of a mask in the accumulator.
    pub(crate) fn and(&mut self, mask: u32) -> Label {
        self.put(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask, 0, 0)
    }

    /// Continues at `target`.
    pub(crate) fn jump(&mut self, target: Label) -> Label {
        if target == self.here() {
            return target;
        }
        let distance = self.distance(target);
        self.put(libc::BPF_JMP | libc::BPF_JA, u32::try_from(distance).unwrap_or(u32::MAX), 0, 0)
    }

    /// Continues at `yes` if the test holds and at `no` if it does not.
    pub(crate) fn branch(&mut self, test: Test, operand: u32, yes: Label, no: Label) -> Label {
        // A long jump goes right behind the test. Writing the one moves the other target away by one instruction.
        let no = if self.distance(no) + 1 > MAX_JUMP { self.jump(no) } else { no };
        let yes = if self.distance(yes) > MAX_JUMP { self.jump(yes) } else { yes };
        let code = match test {
            Test::Equal => libc::BPF_JEQ,
            Test::Greater => libc::BPF_JGT,
            Test::GreaterOrEqual => libc::BPF_JGE,
        };
        let (jt, jf) = (self.distance(yes) as u8, self.distance(no) as u8);
        self.put(libc::BPF_JMP | code | libc::BPF_K, operand, jt, jf)
    }

    /// Instructions between the next one to be written and `target`.
    fn distance(&self, target: Label) -> usize {
        self.reversed.len() - target.0
    }

    /// The program, first instruction first.
    pub(crate) fn finish(mut self) -> Vec<sock_filter> {
        self.reversed.reverse();
        self.reversed
    }
}
