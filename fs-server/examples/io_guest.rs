//! PID 1 of a guest that tries and measures the shared file system and vsock; see `io_host`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fixture")]

#[path = "io/workload.rs"]
mod workload;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nix::mount::{MsFlags, mount};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, VsockAddr};

const MOUNT: &str = "/run";

fn main() {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc")] {
        // The kernel may have mounted it.
        let _busy = mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>);
    }
    std::panic::set_hook(Box::new(|info| {
        eprintln!("{info}");
        power_off();
    }));
    run();
    power_off();
}

fn run() {
    let mut report = connect(1024);
    let begin = Instant::now();
    mount(Some("shared"), MOUNT, Some("virtiofs"), MsFlags::empty(), None::<&str>).expect("mount virtiofs");
    writeln!(report, "mounted in {} us", begin.elapsed().as_micros()).unwrap();

    let rootfs = Path::new(MOUNT).join("c1/rootfs");
    workload::check(&rootfs.join("check")).expect("the root file system");
    workload::check(&Path::new(MOUNT).join("c1/mounts/0/check")).expect("the volume");
    // A program of the root file system runs: it is mapped.
    let status =
        std::process::Command::new(rootfs.join("busybox")).args(["true"]).status().expect("run busybox");
    assert!(status.success());
    let host = fs::read_to_string(Path::new(MOUNT).join("c1/mounts/0/from-host")).expect("the host's file");
    writeln!(report, "checked; the host says {}", host.trim()).unwrap();
    // The host changes it; that is seen within two seconds.
    writeln!(report, "change").unwrap();
    let begin = Instant::now();
    while fs::read_to_string(Path::new(MOUNT).join("c1/mounts/0/from-host")).unwrap() == host {
        assert!(begin.elapsed().as_secs() < 5, "the host's change is not seen");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    writeln!(report, "change seen").unwrap();

    let figures = workload::measure(&rootfs.join("bench"), || {
        let mut file = OpenOptions::new().write(true).open("/proc/sys/vm/drop_caches").unwrap();
        file.write_all(b"3").unwrap();
    });
    for figure in figures.expect("the benchmark") {
        writeln!(report, "figure {}|{}|{}", figure.name, figure.value, figure.unit).unwrap();
    }

    // Round trips, then bulk both ways, on the same connection.
    let mut byte = [0];
    let begin = Instant::now();
    for _ in 0..200 {
        report.write_all(b"p\n").unwrap();
        report.read_exact(&mut byte).unwrap();
    }
    writeln!(report, "figure vsock round trip|{}|us", begin.elapsed().as_micros() as f64 / 200.0).unwrap();
    writeln!(report, "bulk").unwrap();
    let mut chunk = vec![0; 64 << 10];
    let begin = Instant::now();
    let mut left = BULK;
    while left > 0 {
        left -= report.read(&mut chunk).unwrap();
    }
    let down = BULK as f64 / f64::from(1 << 20) / begin.elapsed().as_secs_f64();
    chunk.fill(7);
    let begin = Instant::now();
    for _ in 0..BULK / chunk.len() {
        report.write_all(&chunk).unwrap();
    }
    // The host answers when it has all.
    report.read_exact(&mut byte).unwrap();
    let up = BULK as f64 / f64::from(1 << 20) / begin.elapsed().as_secs_f64();
    writeln!(report, "figure vsock to guest|{down}|MiB/s").unwrap();
    writeln!(report, "figure vsock from guest|{up}|MiB/s").unwrap();

    // The host opens connections; each is echoed until its end, which comes back after the last byte.
    let listener = socket::socket(AddressFamily::Vsock, SockType::Stream, SockFlag::empty(), None).unwrap();
    socket::bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, 1025)).unwrap();
    socket::listen(&listener, Backlog::new(16).unwrap()).unwrap();
    writeln!(report, "listening").unwrap();
    for _ in 0..3 {
        let fd = socket::accept(listener.as_raw_fd()).unwrap();
        // SAFETY: accept just returned it. A vsock stream is read, written and shut down like any other.
        let mut stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut byte).unwrap_or(0), 0);
    }
    let mut lines = BufReader::new(report.try_clone().unwrap()).lines();
    writeln!(report, "done").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "bye");
}

/// Bytes of the bulk transfer each way.
const BULK: usize = 8 << 20;

fn connect(port: u32) -> UnixStream {
    let fd = socket::socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    socket::connect(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_HOST, port))
        .expect("connect to the host");
    UnixStream::from(fd)
}

fn power_off() -> ! {
    if let Ok(mut port) = File::options().write(true).open("/dev/port") {
        let _position = port.seek(SeekFrom::Start(0x604));
        let _written = port.write_all_at(&[0x34], 0x604);
    }
    loop {
        std::thread::park();
    }
}
