//! What programs of all kinds ask their kernel for by system calls, tried one after the other. Our own program does it, as a file in a
//! container.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use nix::libc;

/// `IORING_SETUP` with room for so many requests, and bytes of `struct io_uring_params`.
const RING: (libc::c_long, usize) = (4, 120);
/// `LANDLOCK_CREATE_RULESET_VERSION`.
const LANDLOCK_VERSION: libc::c_long = 1;
/// `UFFD_USER_MODE_ONLY`.
const USER_MODE_ONLY: libc::c_long = 1;
/// `SECCOMP_GET_NOTIF_SIZES`, and bytes of `struct seccomp_notif_sizes`.
const NOTIFICATION_SIZES: (libc::c_long, usize) = (3, 6);
/// `BPF_MAP_CREATE`, and an array with one entry of four bytes (`union bpf_attr`).
const MAP_CREATE: (libc::c_long, [u32; 4]) = (0, [2, 4, 4, 1]);

/// An i386 program that ends with 42: `mov eax, 1; mov ebx, 42; int 0x80`.
const CODE_32: [u8; 12] = [0xb8, 1, 0, 0, 0, 0xbb, 42, 0, 0, 0, 0xcd, 0x80];

/// A try.
type Try = fn() -> io::Result<()>;

/// The tries, by what is tried.
const TRIES: [(&str, Try); 9] = [
    ("io_uring", io_uring),
    ("landlock", landlock),
    ("userfaultfd", userfaultfd),
    ("fanotify", fanotify),
    ("inotify", inotify),
    ("seccomp-notification", seccomp_notification),
    ("bpf", bpf),
    ("tls", tls),
    ("32-bit", program_of_32_bits),
];

/// Names of all that is tried.
pub(crate) fn names() -> Vec<&'static str> {
    TRIES.iter().map(|(name, _)| *name).collect()
}

/// Acts as a program in a container: prints a line for each facility.
pub fn command() {
    for (name, attempt) in TRIES {
        match attempt() {
            Ok(()) => println!("{name} yes"),
            Err(error) => println!("{name} {error}"),
        }
    }
}

/// A system call that gives a descriptor or a number; a descriptor is left to the end of this process.
fn call(number: libc::c_long, [a, b, c]: [libc::c_long; 3]) -> io::Result<libc::c_long> {
    // SAFETY: pointers among the arguments are to buffers that live until the call has returned, of the size that it expects.
    let result = unsafe { libc::syscall(number, a, b, c) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn address_of<T: ?Sized>(value: &mut T) -> libc::c_long {
    std::ptr::from_mut(value).cast::<u8>().expose_provenance() as libc::c_long
}

fn io_uring() -> io::Result<()> {
    let mut parameters = [0u8; RING.1];
    call(libc::SYS_io_uring_setup, [RING.0, address_of(&mut parameters), 0]).map(drop)
}

fn landlock() -> io::Result<()> {
    call(libc::SYS_landlock_create_ruleset, [0, 0, LANDLOCK_VERSION]).map(drop)
}

fn userfaultfd() -> io::Result<()> {
    call(libc::SYS_userfaultfd, [libc::c_long::from(libc::O_CLOEXEC) | USER_MODE_ONLY, 0, 0]).map(drop)
}

fn fanotify() -> io::Result<()> {
    call(libc::SYS_fanotify_init, [libc::c_long::from(libc::FAN_CLASS_NOTIF), 0, 0]).map(drop)
}

fn inotify() -> io::Result<()> {
    call(libc::SYS_inotify_init1, [0, 0, 0]).map(drop)
}

fn seccomp_notification() -> io::Result<()> {
    let mut sizes = [0u8; NOTIFICATION_SIZES.1];
    call(libc::SYS_seccomp, [NOTIFICATION_SIZES.0, 0, address_of(&mut sizes)]).map(drop)
}

fn bpf() -> io::Result<()> {
    let mut attribute = MAP_CREATE.1;
    let length = size_of_val(&attribute) as libc::c_long;
    call(libc::SYS_bpf, [MAP_CREATE.0, address_of(&mut attribute), length]).map(drop)
}

/// A connection with encryption in the kernel.
fn tls() -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let stream = TcpStream::connect(listener.local_addr()?)?;
    let name = b"tls\0";
    let length = name.len() as libc::socklen_t;
    // SAFETY: the name lives until the call has returned.
    let result = unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::SOL_TCP, libc::TCP_ULP, name.as_ptr().cast(), length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn program_of_32_bits() -> io::Result<()> {
    const ADDRESS: u32 = 0x40_0000;
    const HEADERS: u32 = 52 + 32;
    let size = HEADERS + CODE_32.len() as u32;
    let mut bytes = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0".to_vec();
    bytes.extend([1, ADDRESS + HEADERS, 52, 0, 0].iter().flat_map(|word: &u32| word.to_le_bytes()));
    bytes.extend([52, 32, 1, 40, 0, 0].iter().flat_map(|half: &u16| half.to_le_bytes()));
    bytes.extend(
        [1, 0, ADDRESS, ADDRESS, size, size, 5, 4096].iter().flat_map(|word: &u32| word.to_le_bytes()),
    );
    bytes.extend(CODE_32);
    let path = "/tmp/program-of-32-bits";
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o755).open(path)?;
    io::Write::write_all(&mut file, &bytes)?;
    drop(file);
    match Command::new(path).status()?.code() {
        Some(42) => Ok(()),
        other => Err(io::Error::other(format!("it ended with {other:?}"))),
    }
}
