//! Programs for the kernel's eBPF machine: `bpf(2)`, as far as the agent needs it.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use super::check;

/// `struct bpf_insn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Instruction {
    pub code: u8,
    /// The one that is written, and in the upper half the one that is read.
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

/// The register of a program's result.
pub(crate) const RESULT: u8 = 0;
/// The register of what a program is told.
pub(crate) const CONTEXT: u8 = 1;

pub(crate) const LOAD_WORD: u8 = 0x61;
pub(crate) const MOVE_32: u8 = 0xb4;
pub(crate) const JUMP_NOT_EQUAL: u8 = 0x56;
pub(crate) const EXIT: u8 = 0x95;

pub(crate) fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: u32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, immediate: immediate.cast_signed() }
}

const BPF_PROG_LOAD: libc::c_long = 5;

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

/// Loads a program of a type (`enum bpf_prog_type`) for a place to attach it to (`enum bpf_attach_type`; 0 where the type says it).
///
/// # Errors
/// When the kernel does not take it.
pub(crate) fn load(program_type: u32, attach_type: u32, program: &[Instruction]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let attribute = LoadAttribute {
        program_type,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        expected_attach_type: attach_type,
        ..Default::default()
    };
    bpf_fd(BPF_PROG_LOAD, &attribute)
}

/// A command whose result is not a descriptor. `T` has the layout of the beginning of `union bpf_attr` for it.
///
/// # Errors
/// What the kernel says.
pub(crate) fn bpf<T>(command: libc::c_long, attribute: &T) -> io::Result<libc::c_long> {
    // SAFETY: the attribute has the kernel's layout for the command and its size is passed; what it points to outlives
    // the call.
    check(unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attribute), size_of::<T>()) })
}

/// A command that makes a descriptor.
///
/// # Errors
/// What the kernel says.
pub(crate) fn bpf_fd<T>(command: libc::c_long, attribute: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attribute)?;
    // SAFETY: the command returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}
