//! A program in the host's kernel by which two sockets get every TCP connection to a loopback address of a network
//! namespace, whatever its port (`BPF_PROG_TYPE_SK_LOOKUP`, since Linux 5.9).
//!
//! It needs no netfilter, no process in the namespace and no port list. The kernel takes it off the namespace when the last
//! descriptor of it is closed, however that comes about.

use std::ffi::{c_int, c_long};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What the kernel did not take.
#[derive(Debug, thiserror::Error)]
#[error("can't {step} (BPF sk_lookup: Linux 5.9 or later)")]
pub struct LookupError {
    step: &'static str,
    #[source]
    source: io::Error,
}

/// Connections to loopback addresses go to our sockets as long as this exists.
#[derive(Debug)]
pub struct Redirection {
    _link: OwnedFd,
}

/// The two listening sockets.
#[derive(Debug, Clone, Copy)]
pub struct Targets<'a> {
    /// For `127.0.0.0/8`.
    pub ipv4: BorrowedFd<'a>,
    /// For `::1`, where the host has IPv6.
    pub ipv6: Option<BorrowedFd<'a>>,
}

impl Redirection {
    /// Puts the program on a network namespace.
    ///
    /// # Errors
    /// When the kernel can't, or does not let us.
    pub fn attach(namespace: BorrowedFd<'_>, targets: Targets<'_>) -> Result<Redirection, LookupError> {
        let failed = |step| move |source| LookupError { step, source };
        let sockets = create_map().map_err(failed("make a map of sockets"))?;
        for (key, socket) in [(IPV4_KEY, Some(targets.ipv4)), (IPV6_KEY, targets.ipv6)] {
            if let Some(socket) = socket {
                store(&sockets, key, socket).map_err(failed("put a socket into the map"))?;
            }
        }
        let program = load(&program(sockets.as_raw_fd())).map_err(failed("load the program"))?;
        let link = link(&program, namespace).map_err(failed("put the program on the network namespace"))?;
        Ok(Redirection { _link: link })
    }
}

const IPV4_KEY: u32 = 0;
const IPV6_KEY: u32 = 1;

/// `struct bpf_insn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Registers: results and arguments, then those that calls leave alone.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const CONTEXT: u8 = 6;
const SOCKET: u8 = 7;
const STACK: u8 = 10;

const LOAD_WORD: u8 = 0x61;
const LOAD_DOUBLE_IMMEDIATE: u8 = 0x18;
const STORE_WORD_IMMEDIATE: u8 = 0x62;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const ADD: u8 = 0x07;
const AND: u8 = 0x57;
const JUMP: u8 = 0x05;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

const PSEUDO_MAP_FD: u8 = 1;
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
const SK_PASS: i32 = 1;

/// Places in `struct bpf_sk_lookup`. Addresses are in network order, words of them in the host's.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];

/// Jumps to these are filled in at the end.
const TO_IPV4: i16 = i16::MIN;
const TO_LOOKUP: i16 = i16::MIN + 1;
const TO_PASS: i16 = i16::MIN + 2;

/// Whatever happens the program passes: connections to other addresses go where they would have gone.
fn program(map: c_int) -> Vec<Instruction> {
    let op = |code, to: u8, from: u8, offset, immediate| Instruction {
        code,
        registers: from << 4 | to,
        offset,
        immediate,
    };
    let key = -4;
    let mut code = vec![
        op(MOVE_REGISTER, CONTEXT, R1, 0, 0),
        op(LOAD_WORD, R2, CONTEXT, PROTOCOL, 0),
        op(JUMP_NOT_EQUAL, R2, 0, TO_PASS, libc::IPPROTO_TCP),
        op(LOAD_WORD, R2, CONTEXT, FAMILY, 0),
        op(JUMP_EQUAL, R2, 0, TO_IPV4, libc::AF_INET),
        op(JUMP_NOT_EQUAL, R2, 0, TO_PASS, libc::AF_INET6),
    ];
    for (position, expected) in [0, 0, 0, 1u32.to_be() as i32].into_iter().enumerate() {
        code.push(op(LOAD_WORD, R2, CONTEXT, LOCAL_IP6[position], 0));
        code.push(op(JUMP_NOT_EQUAL, R2, 0, TO_PASS, expected));
    }
    code.push(op(STORE_WORD_IMMEDIATE, STACK, 0, key, IPV6_KEY as i32));
    code.push(op(JUMP, 0, 0, TO_LOOKUP, 0));
    let ipv4 = code.len();
    code.extend([
        op(LOAD_WORD, R2, CONTEXT, LOCAL_IP4, 0),
        op(AND, R2, 0, 0, u32::from_be_bytes([0xff, 0, 0, 0]).to_be() as i32),
        op(JUMP_NOT_EQUAL, R2, 0, TO_PASS, u32::from_be_bytes([127, 0, 0, 0]).to_be() as i32),
        op(STORE_WORD_IMMEDIATE, STACK, 0, key, IPV4_KEY as i32),
    ]);
    let lookup = code.len();
    code.extend([
        op(LOAD_DOUBLE_IMMEDIATE, R1, PSEUDO_MAP_FD, 0, map),
        op(0, 0, 0, 0, 0),
        op(MOVE_REGISTER, R2, STACK, 0, 0),
        op(ADD, R2, 0, 0, key.into()),
        op(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        op(JUMP_EQUAL, R0, 0, TO_PASS, 0),
        op(MOVE_REGISTER, SOCKET, R0, 0, 0),
        op(MOVE_REGISTER, R1, CONTEXT, 0, 0),
        op(MOVE_REGISTER, R2, SOCKET, 0, 0),
        op(MOVE, R3, 0, 0, 0),
        op(CALL, 0, 0, 0, SK_ASSIGN),
        op(MOVE_REGISTER, R1, SOCKET, 0, 0),
        op(CALL, 0, 0, 0, SK_RELEASE),
    ]);
    let pass = code.len();
    code.extend([op(MOVE, R0, 0, 0, SK_PASS), op(EXIT, 0, 0, 0, 0)]);
    for (position, instruction) in code.iter_mut().enumerate() {
        let target = match instruction.offset {
            TO_IPV4 => ipv4,
            TO_LOOKUP => lookup,
            TO_PASS => pass,
            _ => continue,
        };
        // A few dozen instructions.
        instruction.offset = (target - position - 1) as i16;
    }
    code
}

const BPF_MAP_CREATE: c_long = 0;
const BPF_MAP_UPDATE_ELEM: c_long = 2;
const BPF_PROG_LOAD: c_long = 5;
const BPF_LINK_CREATE: c_long = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

/// The beginnings of `union bpf_attr`, one for each command.
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
struct LinkAttribute {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

fn bpf<T>(command: c_long, attribute: &T) -> io::Result<c_int> {
    // SAFETY: the attribute has the kernel's layout for the command and its size is passed; what it points to outlives
    // the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attribute), size_of::<T>()) };
    // A descriptor, or 0.
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as c_int) }
}

fn bpf_fd<T>(command: c_long, attribute: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attribute)?;
    // SAFETY: the command returned a new descriptor, close-on-exec, that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: &impl AsRawFd) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

fn create_map() -> io::Result<OwnedFd> {
    let attribute =
        MapAttribute { map_type: BPF_MAP_TYPE_SOCKMAP, key_size: 4, value_size: 8, max_entries: 2 };
    bpf_fd(BPF_MAP_CREATE, &attribute)
}

fn store(map: &OwnedFd, key: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    let value = u64::from(number(&socket));
    let attribute = ElementAttribute {
        map: number(map),
        padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &attribute).map(drop)
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let mut name = [0; 16];
    name[..13].copy_from_slice(b"bulkhead_port");
    let attribute = LoadAttribute {
        program_type: BPF_PROG_TYPE_SK_LOOKUP,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        name,
        expected_attach_type: BPF_SK_LOOKUP,
        ..Default::default()
    };
    bpf_fd(BPF_PROG_LOAD, &attribute)
}

fn link(program: &OwnedFd, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attribute = LinkAttribute {
        program: number(program),
        target: number(&namespace),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    bpf_fd(BPF_LINK_CREATE, &attribute)
}
