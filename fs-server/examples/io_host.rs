//! Boots a guest with `io_guest` as PID 1 under `bulkhead-vmm`, with a `bulkhead-fs` and vsock connections, checks what
//! the guest does, and prints how fast it is beside the same on the host.
//!
//! `io_host VMM FS_SERVER KERNEL IMAGE BUSYBOX`, as root, where there is a `/dev/kvm` that can run Linux.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fixture")]

#[path = "io/workload.rs"]
mod workload;

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_vmm_protocol::{
    BlockConfig, Channel, Event, ExitReason, FdIndex, FromVmm, FsConfig, GuestStream, PrepareConfig, Request,
    VmConfig, VsockConfig,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

const BULK: usize = 8 << 20;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [vmm, fs_server, kernel, image, busybox] = &arguments[..] else {
        panic!("usage: io_host VMM FS_SERVER KERNEL IMAGE BUSYBOX")
    };
    let shared = prepare(Path::new(busybox));
    let (fuse_vmm, fuse_server) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let (_no_roots, roots_server) = UnixStream::pair().unwrap();
    let (control, control_vmm) = Channel::pair().unwrap();
    let mut file_server =
        spawn(fs_server, &[], &[fuse_server.as_raw_fd(), roots_server.as_raw_fd()], &shared);
    drop(fuse_server);
    let control_vmm = OwnedFd::from(control_vmm);
    let mut machine =
        spawn(vmm, &["--uid", "65534", "--gid", "65534"], &[control_vmm.as_raw_fd()], Path::new("/"));
    drop(control_vmm);

    let (report, report_vmm) = UnixStream::pair().unwrap();
    let (mut console, console_vmm) = std::io::pipe().unwrap();
    let begin = Instant::now();
    boot(&control, kernel, image, fuse_vmm, report_vmm.into(), console_vmm.into());
    std::thread::spawn(move || {
        let mut text = [0; 4096];
        while let Ok(length @ 1..) = console.read(&mut text) {
            print!("guest: {}", String::from_utf8_lossy(&text[..length]));
        }
    });
    let mut guest = HashMap::new();
    follow(report, &control, &shared, begin, &mut guest);

    let memory = |child: &Child| {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap_or("VmRSS: gone").to_owned();
        line.split_once(':').map(|(_, size)| size.trim().to_owned())
    };
    println!("file server's memory: {:?}", memory(&file_server));
    loop {
        match control.receive::<FromVmm>().unwrap().message {
            FromVmm::Event(Event::Exited(reason)) => {
                assert_eq!(reason, ExitReason::PowerOff);
                break;
            }
            FromVmm::Reply(reply) => reply.unwrap(),
        }
    }
    assert!(machine.wait().unwrap().success());
    // The VMM's end of the socket is gone, so the file server ends.
    assert!(file_server.wait().unwrap().success());

    // What holds in the guest holds on the host.
    workload::check(&shared.join("c1/rootfs/host-check")).unwrap();
    let host = workload::measure(&shared.join("c1/rootfs/host-bench"), || {
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    });
    for figure in host.unwrap() {
        let in_guest: f64 = guest.remove(figure.name).unwrap_or(f64::NAN);
        let percent = 100.0 * in_guest / figure.value;
        println!(
            "{:30} guest {in_guest:12.1} host {:12.1} {:6} {percent:6.1} %",
            figure.name, figure.value, figure.unit
        );
    }
    for (name, value) in guest {
        println!("{name:30} guest {value:12.1}");
    }
    println!("all went well");
}

/// A shared directory with an overlay as root file system and a volume.
fn prepare(busybox: &Path) -> PathBuf {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
    let base = PathBuf::from("/tmp/bulkhead-io");
    let shared = base.join("shared");
    fs::create_dir_all(&shared).unwrap();
    mount(Some("none"), &shared, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    mount(none, &shared, none, MsFlags::MS_SHARED, none).unwrap();
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| base.join(name));
    for directory in [&lower, &upper, &work, &shared.join("c1/rootfs"), &shared.join("c1/mounts/0")] {
        fs::create_dir_all(directory).unwrap();
    }
    fs::copy(busybox, lower.join("busybox")).unwrap();
    fs::set_permissions(lower.join("busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    let options =
        format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    let rootfs = shared.join("c1/rootfs");
    mount(Some("overlay"), &rootfs, Some("overlay"), MsFlags::empty(), Some(&options[..])).unwrap();
    mount(
        Some("none"),
        &shared.join("c1/mounts/0"),
        Some("tmpfs"),
        MsFlags::MS_NODEV | MsFlags::MS_NOSUID,
        none,
    )
    .unwrap();
    fs::write(shared.join("c1/mounts/0/from-host"), "hello").unwrap();
    shared
}

/// Starts a program with a socket as descriptor 3.
fn spawn(program: &str, arguments: &[&str], sockets: &[RawFd], directory: &Path) -> Child {
    let program = fs::canonicalize(program).unwrap();
    let mut command = Command::new(program);
    command.args(arguments).current_dir(directory).env_clear().stdin(Stdio::null()).stdout(Stdio::null());
    let sockets = sockets.to_vec();
    // SAFETY: only system calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            for (socket, place) in sockets.iter().zip(3..) {
                let moved = libc::fcntl(*socket, libc::F_DUPFD_CLOEXEC, 100);
                if libc::dup2(moved, place) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        })
    };
    command.spawn().unwrap()
}

fn boot(control: &Channel, kernel: &str, image: &str, fuse: OwnedFd, report: OwnedFd, console: OwnedFd) {
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut pass = |fd: OwnedFd| {
        fds.push(fd);
        FdIndex(fds.len() as u8 - 1)
    };
    let config = VmConfig {
        kernel: pass(File::open(kernel).unwrap().into()),
        cmdline: "root=/dev/vda rootfstype=erofs ro init=/init quiet".into(),
        console: Some(pass(console)),
        disks: vec![BlockConfig {
            file: pass(File::open(image).unwrap().into()),
            read_only: true,
            serial: "image".into(),
        }],
        fs: vec![FsConfig { server: pass(fuse), tag: "shared".into() }],
        vsock: VsockConfig {
            guest_cid: 3,
            guest_streams: vec![GuestStream { port: 1024, stream: pass(report) }],
        },
    };
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").unwrap();
    let preparation = PrepareConfig::anonymous(FdIndex(0), 1, 256);
    control.set_timeout(Some(Duration::from_secs(60))).unwrap();
    control.send(&Request::Prepare(preparation), &[kvm.as_fd()]).unwrap();
    assert_eq!(control.receive::<FromVmm>().unwrap().message, FromVmm::Reply(Ok(())));
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    control.send(&Request::Boot(Box::new(config)), &borrowed).unwrap();
    assert_eq!(control.receive::<FromVmm>().unwrap().message, FromVmm::Reply(Ok(())));
}

/// Does the host's part of what the guest reports.
fn follow(
    report: UnixStream,
    control: &Channel,
    shared: &Path,
    begin: Instant,
    figures: &mut HashMap<String, f64>,
) {
    let mut to_guest = report.try_clone().unwrap();
    let mut lines = BufReader::new(report);
    loop {
        let mut line = String::new();
        assert!(lines.read_line(&mut line).unwrap() > 0, "the guest is gone");
        let line = line.trim_end();
        if let Some(figure) = line.strip_prefix("figure ") {
            let mut parts = figure.split('|');
            let name = parts.next().unwrap().to_owned();
            figures.insert(name, parts.next().unwrap().parse().unwrap());
            continue;
        }
        match line {
            "p" => to_guest.write_all(b"p").unwrap(),
            "change" => fs::write(shared.join("c1/mounts/0/from-host"), "changed").unwrap(),
            "bulk" => {
                to_guest.write_all(&vec![1; BULK]).unwrap();
                let mut all = vec![0; BULK];
                lines.read_exact(&mut all).unwrap();
                assert!(all.iter().all(|byte| *byte == 7));
                to_guest.write_all(b"k").unwrap();
            }
            "listening" => {
                for size in [0, 10, 1_000_000] {
                    echo(control, size);
                }
                println!("three connections of the host were echoed to their end");
            }
            "done" => {
                to_guest.write_all(b"bye\n").unwrap();
                return;
            }
            other => println!("{other} ({} ms after boot)", begin.elapsed().as_millis()),
        }
    }
}

/// Sends bytes through a connection of the host's, ends them, and wants them back with their end.
fn echo(control: &Channel, size: usize) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let theirs = OwnedFd::from(theirs);
    control.send(&Request::ConnectVsock { port: 1025 }, &[theirs.as_fd()]).unwrap();
    drop(theirs);
    assert_eq!(control.receive::<FromVmm>().unwrap().message, FromVmm::Reply(Ok(())));
    let bytes: Vec<u8> = (0..size).map(|number| (number % 249) as u8).collect();
    ours.write_all(&bytes).unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    let mut back = Vec::new();
    ours.read_to_end(&mut back).unwrap();
    assert!(back == bytes, "{} of {} bytes came back", back.len(), bytes.len());
}
