//! Has programs reach one port of a loopback address at another one, without taking the port from anybody.
//!
//! Small programs in the kernel, on the root of the control groups, put one port for the other where a socket is connected to or
//! sends to the address, and back where it is told who sent (`BPF_PROG_TYPE_CGROUP_SOCK_ADDR`). The guest's kernel has no
//! NAT, with which Docker does the same on a host. They are gone with this value.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use bulkhead_bpf::code::{CONTEXT, EXIT, JUMP_NOT_EQUAL_32, LOAD_WORD, MOVE_32, RESULT, STORE_WORD};
use bulkhead_bpf::{Instruction, Moment, ProgramKind, instruction};

use crate::sys::path;

/// Attached programs.
#[derive(Debug)]
pub(crate) struct Redirection {
    _links: Vec<OwnedFd>,
}

impl Redirection {
    /// For all sockets of the groups below `cgroups`: what goes to the address goes to `port` of it.
    ///
    /// # Errors
    /// When the kernel does not take the programs.
    pub(crate) fn attach(cgroups: &Path, from: SocketAddrV4, port: u16) -> io::Result<Redirection> {
        let group = path::open_directory(cgroups)?;
        let there = program(from, port);
        let back = program(SocketAddrV4::new(*from.ip(), port), from.port());
        let links = [
            (Moment::Connect, &there),
            (Moment::Send, &there),
            (Moment::Receive, &back),
            (Moment::Peer, &back),
        ];
        let links =
            links.map(|(moment, program)| bulkhead_bpf::link(&load(program, moment)?, group.as_fd(), moment));
        Ok(Redirection { _links: links.into_iter().collect::<io::Result<_>>()? })
    }
}

const SCRATCH: u8 = 2;

/// Places in `struct bpf_sock_addr`, both in network order.
const ADDRESS: i16 = 4;
const PORT: i16 = 24;

/// Puts `to` in the place of the port of the address `from`, and lets every call go on.
fn program(from: SocketAddrV4, to: u16) -> [Instruction; 8] {
    let number = |port: u16| u32::from(port.to_be());
    [
        instruction(LOAD_WORD, SCRATCH, CONTEXT, ADDRESS, 0),
        instruction(JUMP_NOT_EQUAL_32, SCRATCH, 0, 4, u32::from_ne_bytes(from.ip().octets())),
        instruction(LOAD_WORD, SCRATCH, CONTEXT, PORT, 0),
        instruction(JUMP_NOT_EQUAL_32, SCRATCH, 0, 2, number(from.port())),
        instruction(MOVE_32, SCRATCH, 0, 0, number(to)),
        instruction(STORE_WORD, CONTEXT, SCRATCH, PORT, 0),
        instruction(MOVE_32, RESULT, 0, 0, 1),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

fn load(program: &[Instruction], moment: Moment) -> io::Result<OwnedFd> {
    bulkhead_bpf::load(ProgramKind::CgroupSockAddr, moment, "", program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_accepts_the_programs() {
        for moment in [Moment::Connect, Moment::Send, Moment::Receive, Moment::Peer] {
            load(&program("127.0.0.11:53".parse().unwrap(), 40_000), moment).unwrap();
        }
    }
}
