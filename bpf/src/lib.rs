//! Programs for the kernel's eBPF machine: `bpf(2)`, as far as the shim and the agent need it.
//!
//! Numbers and structures are those of `linux/bpf.h`. What a program does stands with whoever loads it.

use std::ffi::{c_int, c_long};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

pub mod code;

/// `struct bpf_insn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// What it does, one of [`code`].
    pub code: u8,
    /// The register that is written, and in the upper half the one that is read.
    pub registers: u8,
    /// Where in memory, or how many instructions a jump leaves out.
    pub offset: i16,
    /// A number that it brings along.
    pub immediate: i32,
}

/// An instruction that reads the register `from` and writes `to`.
pub fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: u32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, immediate: immediate.cast_signed() }
}

/// What a program is (`enum bpf_prog_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgramKind {
    /// `BPF_PROG_TYPE_CGROUP_DEVICE`: decides which devices the processes of a control group may use.
    CgroupDevice = 15,
    /// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`: changes the addresses of sockets of a control group.
    CgroupSockAddr = 18,
    /// `BPF_PROG_TYPE_SK_LOOKUP`: chooses which listener of a network namespace gets a connection (since Linux 5.9).
    SkLookup = 30,
}

/// Where a program is attached (`enum bpf_attach_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// `BPF_CGROUP_DEVICE`: a device is opened or made.
    Device = 6,
    /// `BPF_CGROUP_INET4_CONNECT`: a socket is connected.
    Connect = 10,
    /// `BPF_CGROUP_UDP4_SENDMSG`: a socket without connection sends.
    Send = 14,
    /// `BPF_CGROUP_UDP4_RECVMSG`: a socket is told who sent.
    Receive = 19,
    /// `BPF_CGROUP_INET4_GETPEERNAME`: a socket is told whom it is connected to.
    Peer = 29,
    /// `BPF_SK_LOOKUP`: a listener is looked for.
    Lookup = 36,
}

/// Commands (`enum bpf_cmd`).
const MAP_CREATE: c_long = 0;
const MAP_UPDATE_ELEM: c_long = 2;
const PROG_LOAD: c_long = 5;
const PROG_ATTACH: c_long = 8;
const PROG_DETACH: c_long = 9;
const LINK_CREATE: c_long = 28;

/// `BPF_MAP_TYPE_SOCKMAP`.
const SOCKMAP: u32 = 15;

/// `BPF_F_ALLOW_MULTI`.
const ALLOW_MULTI: u32 = 2;

/// The beginnings of `union bpf_attr`, one for each kind of command.
#[repr(C)]
struct MapAttribute {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct ElementAttribute {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

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

#[repr(C)]
struct AttachAttribute {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct LinkAttribute {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// Loads a program for a moment. Of its name, for whoever lists programs, 15 bytes count.
///
/// # Errors
/// When the kernel does not take it.
pub fn load(kind: ProgramKind, moment: Moment, name: &str, program: &[Instruction]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let mut attribute = LoadAttribute {
        program_type: kind as u32,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        expected_attach_type: moment as u32,
        ..Default::default()
    };
    // The last byte stays 0.
    for (place, byte) in attribute.name[..15].iter_mut().zip(name.bytes()) {
        *place = byte;
    }
    bpf_fd(PROG_LOAD, &attribute)
}

/// Attaches a program to a control group beside those that are there, until it is detached or the group is gone.
///
/// # Errors
/// When the kernel does not attach it.
pub fn attach(program: &OwnedFd, group: BorrowedFd<'_>, moment: Moment) -> io::Result<()> {
    bpf(PROG_ATTACH, &attachment(program, group, moment, ALLOW_MULTI)).map(drop)
}

/// Takes a program off a control group again.
///
/// # Errors
/// When it is not there.
pub fn detach(program: &OwnedFd, group: BorrowedFd<'_>, moment: Moment) -> io::Result<()> {
    bpf(PROG_DETACH, &attachment(program, group, moment, 0)).map(drop)
}

fn attachment(program: &OwnedFd, group: BorrowedFd<'_>, moment: Moment, flags: u32) -> AttachAttribute {
    AttachAttribute {
        target: number(group),
        program: number(program.as_fd()),
        attach_type: moment as u32,
        flags,
    }
}

/// Attaches a program to a control group or a network namespace for as long as the link is open.
///
/// # Errors
/// When the kernel does not attach it.
pub fn link(program: &OwnedFd, target: BorrowedFd<'_>, moment: Moment) -> io::Result<OwnedFd> {
    let attribute = LinkAttribute {
        program: number(program.as_fd()),
        target: number(target),
        attach_type: moment as u32,
        flags: 0,
    };
    bpf_fd(LINK_CREATE, &attribute)
}

/// Makes a map of up to `entries` sockets by numbers.
///
/// # Errors
/// When the kernel makes none.
pub fn socket_map(entries: u32) -> io::Result<OwnedFd> {
    let attribute = MapAttribute { map_type: SOCKMAP, key_size: 4, value_size: 8, max_entries: entries };
    bpf_fd(MAP_CREATE, &attribute)
}

/// Puts a socket into a map.
///
/// # Errors
/// When the kernel does not take it.
pub fn store_socket(map: &OwnedFd, key: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    let value = u64::from(number(socket));
    let attribute = ElementAttribute {
        map: number(map.as_fd()),
        padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    bpf(MAP_UPDATE_ELEM, &attribute).map(drop)
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

/// A command. `T` has the layout of the beginning of `union bpf_attr` for it. Gives a descriptor, or 0.
fn bpf<T>(command: c_long, attribute: &T) -> io::Result<c_int> {
    // SAFETY: the attribute has the kernel's layout for the command and its size is passed; what it points to outlives
    // the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attribute), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as c_int) }
}

/// A command that makes a descriptor.
fn bpf_fd<T>(command: c_long, attribute: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attribute)?;
    // SAFETY: the command returned a new descriptor, close-on-exec, that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
