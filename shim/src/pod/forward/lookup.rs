//! A program in the host's kernel by which two sockets get every TCP connection to a loopback address of a network
//! namespace, whatever its port (`BPF_PROG_TYPE_SK_LOOKUP`, since Linux 5.9).
//!
//! It needs no netfilter, no process in the namespace and no port list. The kernel takes it off the namespace when the last
//! descriptor of it is closed, however that comes about.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use bulkhead_bpf::code::{
    ADD, AND, CALL, EXIT, JUMP, JUMP_EQUAL, JUMP_NOT_EQUAL, LOAD_DOUBLE_IMMEDIATE, LOAD_WORD, MOVE,
    MOVE_REGISTER, STACK, STORE_WORD_IMMEDIATE,
};
use bulkhead_bpf::{Instruction, Moment, ProgramKind, instruction};

/// What the kernel did not take.
#[derive(Debug, thiserror::Error)]
#[error("can't {step} (BPF sk_lookup: Linux 5.9 or later)")]
pub(crate) struct LookupError {
    step: &'static str,
    #[source]
    source: io::Error,
}

/// Connections to loopback addresses go to our sockets as long as this exists.
#[derive(Debug)]
pub(crate) struct Redirection {
    _link: OwnedFd,
}

/// The two listening sockets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Targets<'a> {
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
    pub(crate) fn attach(
        namespace: BorrowedFd<'_>,
        targets: Targets<'_>,
    ) -> Result<Redirection, LookupError> {
        let failed = |step| move |source| LookupError { step, source };
        let sockets = bulkhead_bpf::socket_map(2).map_err(failed("make a map of sockets"))?;
        for (key, socket) in [(IPV4_KEY, Some(targets.ipv4)), (IPV6_KEY, targets.ipv6)] {
            if let Some(socket) = socket {
                bulkhead_bpf::store_socket(&sockets, key, socket)
                    .map_err(failed("put a socket into the map"))?;
            }
        }
        let program = program(sockets.as_raw_fd());
        let program = bulkhead_bpf::load(ProgramKind::SkLookup, Moment::Lookup, "bulkhead_port", &program)
            .map_err(failed("load the program"))?;
        let link = bulkhead_bpf::link(&program, namespace, Moment::Lookup)
            .map_err(failed("put the program on the network namespace"))?;
        Ok(Redirection { _link: link })
    }
}

const IPV4_KEY: u32 = 0;
const IPV6_KEY: u32 = 1;

/// Registers: results and arguments, then those that calls leave alone.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const CONTEXT: u8 = 6;
const SOCKET: u8 = 7;

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
    let op = |code, to, from, offset, immediate: i32| {
        instruction(code, to, from, offset, immediate.cast_unsigned())
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
