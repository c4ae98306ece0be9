//! Enters the jail in a forked child and looks around from inside.
#![allow(clippy::expect_used, reason = "a test that can't be set up has failed")]

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use bulkhead_jail::{Jail, JailError, Limits, Root, enter, enter_file_server};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, geteuid, getgid, getgroups, getuid};

const JAIL: Jail = Jail {
    last_fd: 2,
    root: Root::Empty,
    limits: Limits { open_files: 32, processes: 512 },
    uid: 65534,
    gid: 65534,
};

/// Runs `inside` in a child; each `Err` names what it found wrong.
fn in_child(inside: impl FnOnce() -> Result<(), String>) {
    if !geteuid().is_root() {
        eprintln!("SKIPPED: only root can enter the jail");
        return;
    }
    // SAFETY: the child touches nothing that another thread of this test process may hold locked but the allocator,
    // which the C library keeps usable across fork.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => {
            let code = match inside() {
                Ok(()) => 0,
                Err(wrong) => {
                    eprintln!("inside the jail: {wrong}");
                    1
                }
            };
            // SAFETY: ends the child without running the test harness's handlers.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => {
            assert_eq!(waitpid(child, None).expect("waitpid"), WaitStatus::Exited(child, 0));
        }
    }
}

fn check(holds: bool, what: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what.to_owned()) }
}

fn has_landlock() -> bool {
    landlock_version() > 0
}

fn landlock_version() -> i64 {
    // SAFETY: asks for the version and does nothing (landlock_create_ruleset(2)).
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, 1) }
}

/// What Landlock refuses of what the jail itself leaves open here: ports and abstract sockets.
fn check_landlock() -> Result<(), String> {
    let refused = |version, error: std::io::Error, what: &str| {
        let expected = landlock_version() >= version;
        check((error.kind() == std::io::ErrorKind::PermissionDenied) == expected, what)
    };
    if let Err(error) = TcpListener::bind("127.0.0.1:0") {
        refused(4, error, "binding fails for another reason")?;
    } else {
        check(landlock_version() < 4, "a port could be bound")?;
    }
    let name = SocketAddr::from_abstract_name(ABSTRACT).map_err(|error| error.to_string())?;
    match UnixStream::connect_addr(&name) {
        Err(error) => refused(6, error, "connecting fails for another reason"),
        Ok(_) => check(landlock_version() < 6, "an abstract socket could be connected to"),
    }
}

/// A socket that this process listens on.
const ABSTRACT: &str = "bulkhead-jail-test";

#[test]
fn landlock_refuses_ports_and_abstract_sockets() {
    let name = SocketAddr::from_abstract_name(ABSTRACT).expect("a name");
    let _listening = UnixListener::bind_addr(&name).expect("listen");
    if landlock_version() < 4 {
        eprintln!("SKIPPED in part: this takes Linux 6.12 with Landlock");
    }
    in_child(|| {
        enter(&JAIL).map_err(|error| error.to_string())?;
        check_landlock()
    });
    let directory = tempfile::tempdir().expect("make a directory");
    let dir = directory.path();
    in_child(|| {
        let none = None::<&str>;
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(|error| error.to_string())?;
        nix::mount::mount(
            none,
            "/",
            none,
            nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE,
            none,
        )
        .map_err(|error| error.to_string())?;
        nix::mount::mount(Some("tmpfs"), dir, Some("tmpfs"), nix::mount::MsFlags::empty(), none)
            .map_err(|error| error.to_string())?;
        // The tree itself becomes read-only, what is mounted below it does not.
        let below = dir.join("shared");
        fs::create_dir(&below).map_err(|error| error.to_string())?;
        nix::mount::mount(Some("tmpfs"), &below, Some("tmpfs"), nix::mount::MsFlags::empty(), none)
            .map_err(|error| error.to_string())?;
        std::env::set_current_dir(dir).map_err(|error| error.to_string())?;
        let files = enter_file_server(2, &JAIL.limits);
        files.map_err(|error| format!("{error}: {:?}", std::error::Error::source(&error)))?;
        check_landlock()?;
        // Its files are its own still, between directories too: Landlock forbids that by itself once it has to do with files.
        let moved = || -> std::io::Result<Vec<u8>> {
            fs::create_dir("/shared/from")?;
            fs::create_dir("/shared/to")?;
            fs::write("/shared/from/file", "text")?;
            fs::hard_link("/shared/from/file", "/shared/to/link")?;
            fs::rename("/shared/from/file", "/shared/to/file")?;
            fs::read("/shared/to/file")
        };
        moved().map(drop).map_err(|error| format!("a file can't be moved: {error}"))
    });
}

#[test]
fn nothing_of_the_host_is_left() {
    let outside = fs::File::open("/").expect("open the root directory");
    in_child(|| {
        enter(&JAIL).map_err(|error| format!("{error}: {:?}", std::error::Error::source(&error)))?;
        check(fs::metadata("/etc").is_err(), "the host's files are there")?;
        match fs::read_dir("/") {
            Ok(entries) => {
                check(!has_landlock(), "Landlock refuses nothing")?;
                check(entries.count() == 0, "the root directory isn't empty")?;
            }
            Err(error) => check(error.kind() == std::io::ErrorKind::PermissionDenied, "another error")?,
        }
        check(fs::write("/file", "x").is_err(), "the root directory is writable")?;
        check(outside.metadata().is_err(), "a descriptor of the host's root is open")?;
        check(std::env::vars_os().next().is_none(), "the environment isn't empty")
    });
}

#[test]
fn no_privilege_is_left() {
    in_child(|| {
        enter(&JAIL).map_err(|error| error.to_string())?;
        check(getuid().as_raw() == 65534 && getgid().as_raw() == 65534, "wrong user or group")?;
        check(getgroups().is_ok_and(|groups| groups.is_empty()), "supplementary groups are left")?;
        check(nix::unistd::setuid(0.into()).is_err(), "root can be had back")?;
        check(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err(), "CAP_SYS_ADMIN is left")?;
        check(nix::sys::prctl::get_no_new_privs() == Ok(true), "no_new_privs isn't set")?;
        check(nix::sys::prctl::get_dumpable() == Ok(false), "the process is dumpable")?;
        check(nix::unistd::setuid(65534.into()).is_err(), "the user namespace maps an id")?;
        // SAFETY: PR_CAPBSET_READ takes integers only; 21 is CAP_SYS_ADMIN.
        let bound = unsafe { libc::prctl(libc::PR_CAPBSET_READ, 21, 0, 0, 0) };
        check(bound == 0, "the bounding set isn't empty")?;
        check(getrlimit(Resource::RLIMIT_CORE) == Ok((1, 1)), "a core dump could be piped")?;
        check(getrlimit(Resource::RLIMIT_NPROC) == Ok((512, 512)), "the limit on processes isn't set")?;
        check(getrlimit(Resource::RLIMIT_NOFILE) == Ok((32, 32)), "the limit on open files isn't set")
    });
}

#[test]
fn the_current_directory_can_become_the_root() {
    let directory = tempfile::tempdir().expect("make a directory");
    let dir = directory.path();
    fs::create_dir(dir.join("inside")).expect("make a directory in it");
    // For whoever the child becomes.
    fs::set_permissions(dir, Permissions::from_mode(0o755)).expect("open the directory");
    in_child(|| {
        let outside = fs::metadata(dir).map_err(|error| error.to_string())?.ino();
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(|error| error.to_string())?;
        let none = None::<&str>;
        let bind = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some(dir), dir, none, bind, none).map_err(|error| error.to_string())?;
        std::env::set_current_dir(dir).map_err(|error| error.to_string())?;

        enter(&Jail { root: Root::CurrentDirectory, ..JAIL }).map_err(|error| error.to_string())?;

        check(fs::metadata("/").is_ok_and(|root| root.ino() == outside), "/ is another directory")?;
        check(fs::metadata("/inside").is_ok(), "the directory's contents are missing")?;
        check(fs::metadata("/etc").is_err(), "the host's files are there")
    });
}

#[test]
fn root_is_refused_as_an_identity() {
    in_child(|| match enter(&Jail { uid: 0, ..JAIL }) {
        Err(JailError::RootIdentity { uid: 0, gid: 65534 }) => Ok(()),
        other => Err(format!("{other:?}")),
    });
}
