//! Has programs reach one port of a loopback address at another one, without taking the port from anybody.
//!
//! Small programs in the kernel, on the root of the control groups, put one port for the other where a socket is connected to or
//! sends to the address, and back where it is told who sent (`BPF_PROG_TYPE_CGROUP_SOCK_ADDR`). The guest's kernel has no
//! netfilter, with which Docker does the same on a host. They are gone with this value.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use crate::sys::{check, path};

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

/// `struct bpf_insn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const SCRATCH: u8 = 2;

const LOAD_WORD: u8 = 0x61;
const STORE_WORD: u8 = 0x63;
const MOVE_32: u8 = 0xb4;
const JUMP_NOT_EQUAL: u8 = 0x56;
const EXIT: u8 = 0x95;

/// Places in `struct bpf_sock_addr`, both in network order.
const ADDRESS: i16 = 4;
const PORT: i16 = 24;

/// Puts `to` in the place of the port of the address `from`, and lets every call go on.
fn program(from: SocketAddrV4, to: u16) -> [Instruction; 8] {
    let op = |code, to: u8, from: u8, offset, immediate: u32| Instruction {
        code,
        registers: from << 4 | to,
        offset,
        immediate: immediate.cast_signed(),
    };
    let number = |port: u16| u32::from(port.to_be());
    [
        op(LOAD_WORD, SCRATCH, CONTEXT, ADDRESS, 0),
        op(JUMP_NOT_EQUAL, SCRATCH, 0, 4, u32::from_ne_bytes(from.ip().octets())),
        op(LOAD_WORD, SCRATCH, CONTEXT, PORT, 0),
        op(JUMP_NOT_EQUAL, SCRATCH, 0, 2, number(from.port())),
        op(MOVE_32, SCRATCH, 0, 0, number(to)),
        op(STORE_WORD, CONTEXT, SCRATCH, PORT, 0),
        op(MOVE_32, RESULT, 0, 0, 1),
        op(EXIT, 0, 0, 0, 0),
    ]
}

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;

/// The part of `union bpf_attr` for loading a program.
#[derive(Default)]
#[repr(C)]
struct LoadAttribute {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

/// The part of `union bpf_attr` for a link.
#[repr(C)]
struct LinkAttribute {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_long, attribute: &T) -> io::Result<OwnedFd> {
    // SAFETY: the attribute has the kernel's layout for the command and its size is passed; what it points to outlives
    // the call.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attribute), size_of::<T>())
    })?;
    // SAFETY: both commands return a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

fn load(program: &[Instruction], moment: u32) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let attribute = LoadAttribute {
        program_type: BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        expected_attach_type: moment,
        ..Default::default()
    };
    bpf(BPF_PROG_LOAD, &attribute)
}

fn link(program: &OwnedFd, group: &OwnedFd, moment: u32) -> io::Result<OwnedFd> {
    let number = |fd: &OwnedFd| fd.as_raw_fd().unsigned_abs();
    let attribute =
        LinkAttribute { program: number(program), target: number(group), attach_type: moment, flags: 0 };
    bpf(BPF_LINK_CREATE, &attribute)
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
