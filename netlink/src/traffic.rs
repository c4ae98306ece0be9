//! Traffic control: what an interface receives is judged by small programs and passed on to another interface.
//!
//! The programs are classic BPF (the language of socket filters), which begin at the Ethernet header. They need `cls_bpf`
//! and `act_mirred` of the kernel, no right to load programs, and no table of rules however many addresses there are.

use std::io;

use crate::message::Message;
use crate::socket::{Socket, errno, unless};

/// `struct tcmsg`.
const HEADER: usize = 20;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_ACT: u16 = 1;
const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;
const TCA_BPF_FLAGS: u16 = 8;
/// `TCA_BPF_FLAG_ACT_DIRECT`: the program's result is the verdict.
const DIRECT: u32 = 1;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
/// `TCA_EGRESS_REDIR`.
const REDIRECT: u32 = 1;
/// `TC_ACT_STOLEN`.
const STOLEN: u32 = 4;

/// The queueing discipline for what is received: its handle and its parent.
const INGRESS: u32 = 0xffff_0000;
const INGRESS_PARENT: u32 = 0xffff_fff1;

/// Packets of every protocol.
const ALL: u32 = (libc::ETH_P_ALL as u16).to_be() as u32;

/// What a program says of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It matches: its action is carried out.
    Matches,
    /// It does not: the next program is asked.
    Passes,
    /// The packet goes no further. Only of a program that has no action.
    Drops,
}

impl Verdict {
    /// What the program returns.
    pub fn value(self) -> u32 {
        match self {
            Verdict::Matches => u32::MAX,
            Verdict::Passes => 0,
            // TC_ACT_SHOT.
            Verdict::Drops => 2,
        }
    }
}

/// One instruction: `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip if a comparison holds.
    pub then: u8,
    /// Instructions to skip if it does not.
    pub otherwise: u8,
    /// Operand.
    pub operand: u32,
}

impl Instruction {
    /// Ends with a verdict.
    pub fn end(verdict: Verdict) -> Instruction {
        let code = (libc::BPF_RET | libc::BPF_K) as u16;
        Instruction { code, then: 0, otherwise: 0, operand: verdict.value() }
    }

    fn bytes(&self) -> [u8; 8] {
        let ([a, b], [c, d, e, f]) = (self.code.to_ne_bytes(), self.operand.to_ne_bytes());
        [a, b, self.then, self.otherwise, c, d, e, f]
    }
}

fn header(index: u32, handle: u32, parent: u32, info: u32) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    for (place, value) in [(4, index), (8, handle), (12, parent), (16, info)] {
        header[place..place + 4].copy_from_slice(&value.to_ne_bytes());
    }
    header
}

/// Of handle 0 they are all of a priority.
fn filter(kind: u16, flags: libc::c_int, index: u32, priority: u16, handle: u32) -> Message {
    Message::new(kind, flags, &header(index, handle, INGRESS, u32::from(priority) << 16 | ALL))
}

impl Socket {
    /// Lets what an interface receives be judged; as it is if it has been already.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_ingress(&mut self, index: u32) -> io::Result<()> {
        let header = header(index, INGRESS, INGRESS_PARENT, 0);
        let mut message = Message::new(libc::RTM_NEWQDISC, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &header);
        message.put_name(TCA_KIND, "ingress");
        unless(self.request(message), &[libc::EEXIST]).map(drop)
    }

    /// Passes those of the packets that an interface receives which a program matches on to another interface, as if they
    /// were sent there. Programs are asked in the order of their priorities.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn redirect(&mut self, from: u32, priority: u16, program: &[Instruction], to: u32) -> io::Result<()> {
        self.add_program(from, priority, program, |options| {
            options.nest(TCA_BPF_ACT, |actions| {
                actions.nest(1, |action| {
                    action.put_name(TCA_ACT_KIND, "mirred");
                    action.nest(TCA_ACT_OPTIONS, |options| {
                        // `struct tc_mirred`: index, capabilities, verdict, two counters; what to do, with whom.
                        let parameters = [0, 0, STOLEN, 0, 0, REDIRECT, to].map(u32::to_ne_bytes).concat();
                        options.put(TCA_MIRRED_PARMS, &parameters);
                    });
                });
            });
        })
    }

    /// Lets a program decide over the packets that an interface receives.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn decide(&mut self, on: u32, priority: u16, program: &[Instruction]) -> io::Result<()> {
        self.add_program(on, priority, program, |options| {
            options.put_u32(TCA_BPF_FLAGS, DIRECT);
        })
    }

    fn add_program(
        &mut self,
        on: u32,
        priority: u16,
        program: &[Instruction],
        fill: impl FnOnce(&mut Message),
    ) -> io::Result<()> {
        let length = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut message =
            filter(libc::RTM_NEWTFILTER, libc::NLM_F_CREATE | libc::NLM_F_EXCL, on, priority, 1);
        message.put_name(TCA_KIND, "bpf");
        message.nest(TCA_OPTIONS, |options| {
            options.put(TCA_BPF_OPS_LEN, &length.to_ne_bytes());
            let bytes: Vec<u8> = program.iter().flat_map(Instruction::bytes).collect();
            options.put(TCA_BPF_OPS, &bytes);
            fill(options);
        });
        self.request(message)
    }

    /// Removes the program of a priority from an interface, and what let it be judged if nobody else has a program there.
    /// Tells whether the program was there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove_program(&mut self, index: u32, priority: u16) -> io::Result<bool> {
        let message = filter(libc::RTM_DELTFILTER, 0, index, priority, 0);
        // No interface, no discipline, no program.
        let none = [libc::ENODEV, libc::EINVAL, libc::ENOENT];
        if !unless(self.request(message), &none)? {
            return Ok(false);
        }
        let left = self.list(&Message::new(libc::RTM_GETTFILTER, 0, &header(index, 0, INGRESS, 0)))?;
        if !left.iter().any(|answer| answer.kind == libc::RTM_NEWTFILTER) {
            let message = Message::new(libc::RTM_DELQDISC, 0, &header(index, INGRESS, INGRESS_PARENT, 0));
            unless(self.request(message), &none)?;
        }
        Ok(true)
    }

    /// Whether an error says that the kernel lacks what was asked for, module and all.
    pub fn is_unknown(error: &io::Error) -> bool {
        errno(error) == Some(libc::ENOENT)
    }
}
