//! Has programs reach one port of a loopback address at another one, without taking the port from anybody.
//!
//! Small programs in the kernel, on the root of the control groups, put one port for the other where a socket is connected to or
//! sends to the address, and back where it is told who sent (`BPF_PROG_TYPE_CGROUP_SOCK_ADDR`). The guest's kernel has no
//! NAT, with which Docker does the same on a host. They are gone with this value.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use crate::sys::bpf::{
    self, CONTEXT, EXIT, Instruction, JUMP_NOT_EQUAL, LOAD_WORD, MOVE_32, RESULT, instruction,
};
use crate::sys::path;

/// Attached programs.
#[derive(Debug)]
pub struct Redirection {
    _links: Vec<OwnedFd>,
}

impl Redirection {
    /// For all sockets of the groups below `cgroups`: what goes to the address goes to `port` of it.
    ///
    /// # Errors
    /// When the kernel does not take the programs.
    pub fn attach(cgroups: &Path, from: SocketAddrV4, port: u16) -> io::Result<Redirection> {
        let group = path::open_directory(cgroups)?;
        let there = program(from, port);
        let back = program(SocketAddrV4::new(*from.ip(), port), from.port());
        let links = [(CONNECT, &there), (SEND, &there), (RECEIVE, &back), (PEER, &back)];
        let links = links.map(|(moment, program)| link(&load(program, moment)?, &group, moment));
        Ok(Redirection { _links: links.into_iter().collect::<io::Result<_>>()? })
    }
}

/// Moments (`enum bpf_attach_type`).
const CONNECT: u32 = 10;
const SEND: u32 = 14;
const RECEIVE: u32 = 19;
const PEER: u32 = 29;

const SCRATCH: u8 = 2;

const STORE_WORD: u8 = 0x63;

/// Places in `struct bpf_sock_addr`, both in network order.
const ADDRESS: i16 = 4;
const PORT: i16 = 24;

/// Puts `to` in the place of the port of the address `from`, and lets every call go on.
fn program(from: SocketAddrV4, to: u16) -> [Instruction; 8] {
    let number = |port: u16| u32::from(port.to_be());
    [
        instruction(LOAD_WORD, SCRATCH, CONTEXT, ADDRESS, 0),
        instruction(JUMP_NOT_EQUAL, SCRATCH, 0, 4, u32::from_ne_bytes(from.ip().octets())),
        instruction(LOAD_WORD, SCRATCH, CONTEXT, PORT, 0),
        instruction(JUMP_NOT_EQUAL, SCRATCH, 0, 2, number(from.port())),
        instruction(MOVE_32, SCRATCH, 0, 0, number(to)),
        instruction(STORE_WORD, CONTEXT, SCRATCH, PORT, 0),
        instruction(MOVE_32, RESULT, 0, 0, 1),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;

/// The part of `union bpf_attr` for a link.
#[repr(C)]
struct LinkAttribute {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

fn load(program: &[Instruction], moment: u32) -> io::Result<OwnedFd> {
    bpf::load(BPF_PROG_TYPE_CGROUP_SOCK_ADDR, moment, program)
}

fn link(program: &OwnedFd, group: &OwnedFd, moment: u32) -> io::Result<OwnedFd> {
    let number = |fd: &OwnedFd| fd.as_raw_fd().unsigned_abs();
    let attribute =
        LinkAttribute { program: number(program), target: number(group), attach_type: moment, flags: 0 };
    bpf::bpf_fd(BPF_LINK_CREATE, &attribute)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_accepts_the_programs() {
        for moment in [CONNECT, SEND, RECEIVE, PEER] {
            load(&program("127.0.0.11:53".parse().unwrap(), 40_000), moment).unwrap();
        }
    }
}
