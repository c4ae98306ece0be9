//! Guests that execute random programs of queue and register operations against the real program's devices.
//!
//! `BULKHEAD_PROGRAMS` says how many, `BULKHEAD_SEED` the first seed: a failure names the seed that replays it.
//! `BULKHEAD_VMM` is another VMM than the one of this build, for other machines.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use bulkhead_vmm_protocol::{AttachNet, ExitReason, FsConfig, NetOffloads, Request};
use common::guest::MMIO;
use common::process::{Boot, kvm_or_skip};
use common::program::{BUFFERS, Dice, Program, RAM, random};

/// Console, entropy, vsock, file system, disk, balloon, and the first two slots: a network interface and one that stays empty.
const DEVICES: u64 = 8;

/// Operations of the random part of a program.
const STEPS: usize = 400;

/// What the VMM may take beside the guest's memory.
const OWN_MEMORY: u64 = 24 << 20;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn a_program_is_executed() {
    if !kvm_or_skip("a_program_is_executed") {
        return;
    }
    let mut program = Program::default();
    let register = |offset| MMIO + offset;
    for status in [0, 1, 3] {
        program.store32(register(0x70), status);
    }
    program.store32(register(0x24), 1);
    program.store32(register(0x20), 1);
    program.store32(register(0x70), 11);
    program.store32(register(0x30), 1);
    program.store32(register(0x38), 8);
    let rings = [0x80_0000, 0x81_0000, 0x82_0000];
    for (offset, ring) in [0x80, 0x90, 0xa0].into_iter().zip(rings) {
        program.store64(register(offset), ring);
    }
    program.store32(register(0x44), 1);
    program.store32(register(0x70), 15);
    for (index, byte) in b"byte code\n".iter().enumerate() {
        program.store8(BUFFERS + index as u64, *byte);
    }
    program.store64(rings[0], BUFFERS);
    program.store64(rings[0] + 8, 10);
    program.store16(rings[1] + 4, 0);
    program.store16(rings[1] + 2, 1);
    program.store32(register(0x50), 1);
    assert!(program.len() > 20);
    let (reason, output) = Boot::new(&program.kernel()).run();
    assert_eq!(reason, ExitReason::PowerOff);
    assert_eq!(output, "byte code\n");
}

/// A pair of sockets that keep messages apart.
fn packets() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: the array has room for the two descriptors.
    let result = unsafe {
        libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr())
    };
    assert_eq!(result, 0);
    // SAFETY: the kernel made them for us just now.
    unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) }
}

/// What programs had their devices do.
#[derive(Debug, Default)]
struct Done {
    console_bytes: u64,
    fuse_requests: u64,
    packets: u64,
    disk_writes: u64,
}

/// A machine with all devices runs a program, and ends as the program says and with nothing else amiss.
fn run(seed: u64, done: &mut Done) {
    let mut dice = Dice::new(seed);
    let program = random(&mut dice, STEPS, DEVICES);
    let mut boot = Boot::new(&program.kernel());
    assert_eq!(u64::from(boot.prepare.memory_mib), RAM >> 20);
    let (server, peer) = packets();
    let server = boot.pass(server);
    boot.config.fs = vec![FsConfig { server, tag: "shared".into() }];
    let contents = vec![7; 64 << 10];
    let disk = File::from(boot.disk(&contents, false));
    let (vmm, reply) = boot.start();
    reply.unwrap();
    let (tap, wire) = UnixDatagram::pair().unwrap();
    let offloads = NetOffloads { checksum_and_tso: false, uso: false };
    let net = AttachNet { slot: 0, mac: [2, 0x11, 0x22, 0x33, 4, 5], mtu: 1500, queue_pairs: 1, offloads };
    vmm.control.send(&Request::AttachNet(net), &[tap.as_fd()]).unwrap();
    // A file server and a network that talk nonsense.
    let talk = std::thread::spawn(move || {
        wire.set_nonblocking(true).unwrap();
        let peer = UnixDatagram::from(peer);
        peer.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let mut buffer = [0; 4096];
        let (mut requests, mut packets) = (0, 0);
        for round in 0..100 {
            for byte in &mut buffer {
                *byte = dice.next() as u8;
            }
            // The kernel's side of a tap is trusted to send whole packets; what is in them is anybody's.
            buffer[..12].fill(0);
            let length = dice.one_of(&[26, 72, 1526]);
            let _ = wire.send(&buffer[..length]);
            let mut request = [0; 4096];
            packets += u64::from(wire.recv(&mut request).is_ok());
            let Ok(length) = peer.recv(&mut request) else { continue };
            requests += u64::from(length > 0);
            let _ = match round % 3 {
                0 => peer.send(&buffer[..length.min(200)]),
                // As an answer looks: its length, no error, the request's number.
                1 => {
                    buffer[..4].copy_from_slice(&80u32.to_le_bytes());
                    buffer[4..8].fill(0);
                    buffer[8..16].copy_from_slice(&request[8..16]);
                    peer.send(&buffer[..80])
                }
                _ => Ok(0),
            };
        }
        (requests, packets)
    });
    let (reason, console_bytes) = vmm.end_of_machine();
    assert_eq!(reason, ExitReason::PowerOff, "seed {seed}");
    drop(tap);
    let (requests, packets) = talk.join().unwrap();
    let mut now = vec![0; contents.len()];
    disk.read_exact_at(&mut now, 0).unwrap();
    done.console_bytes += console_bytes;
    done.fuse_requests += requests;
    done.packets += packets;
    done.disk_writes += u64::from(now != contents);
}

#[test]
fn random_programs_end_as_they_say() {
    if !kvm_or_skip("random_programs_end_as_they_say") {
        return;
    }
    let (first, count) = (number("BULKHEAD_SEED", 1), number("BULKHEAD_PROGRAMS", 12));
    let mut done = Done::default();
    for seed in first..first + count {
        eprintln!("seed {seed}");
        run(seed, &mut done);
    }
    // Programs that get nowhere show nothing.
    let got_somewhere =
        done.console_bytes > 0 && done.fuse_requests > 0 && done.packets > 0 && done.disk_writes > 0;
    assert!(got_somewhere || count < 12, "{done:?}");
    // SAFETY: the structure is plain data, and the kernel fills it.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage);
        usage
    };
    let most = usage.ru_maxrss as u64 * 1024;
    assert!(most < RAM + OWN_MEMORY, "a VMM had {most} bytes");
    println!(
        "{count} programs of {STEPS} steps and more: {done:?}; the VMM's most memory {} MiB",
        most >> 20
    );
}
