//! `start`: leaves a server for the container's pod behind and tells containerd its address.
//!
//! The socket is bound here and handed over, so that of two callers one is told that the other was first, and so that
//! containerd can connect at once. The server reports when it is ready; if it dies before, the caller hears why.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use containerd_shim::Flags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::SERVE;
use super::containerd::is_version_2;
use super::request::{RequestError, StartRequest};
use super::serve::READY;
use crate::host::cgroup::{self, CgroupError};
use crate::id::{self, IdError};
use crate::spec::sandbox::{Role, RoleError};
use crate::spec::{self, SpecError};

/// The server is ready within this time.
const READY_LIMIT: Duration = Duration::from_secs(10);

/// `sockaddr_un` has room for this path, and a NUL.
const MAX_SOCKET_PATH: usize = 107;

/// The file in the bundle that holds the address, for `delete` and for containerd 1.x.
pub(super) const ADDRESS_FILE: &str = "address";

#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error(transparent)]
    Id(#[from] IdError),
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Role(#[from] RoleError),
    #[error("the pod {0:?} that the container belongs to does not run")]
    NoPod(String),
    #[error(
        "the socket path {0} is longer than {MAX_SOCKET_PATH} bytes: set a shorter socket directory in containerd"
    )]
    SocketPath(PathBuf),
    #[error("can't listen on {path}")]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("can't start the shim's server: {step}")]
    Spawn {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("can't put the shim into its cgroup")]
    Cgroup(#[from] CgroupError),
    #[error("the shim's server did not start: {0}")]
    Server(String),
    #[error("can't write {0}")]
    Write(&'static str, #[source] io::Error),
}

pub(super) fn run(flags: &Flags) -> Result<(), StartError> {
    id::check(&flags.id)?;
    let request = StartRequest::read(flags, || is_version_2(Path::new(&flags.publish_binary)))?;
    let bundle =
        std::env::current_dir().map_err(|source| StartError::Spawn { step: "find the bundle", source })?;
    let address = match role(&bundle)? {
        Role::Member(sandbox) => address_of_pod(flags, &request, sandbox)?,
        Role::Single | Role::Sandbox => serve(flags, &request)?,
    };
    fs::write(ADDRESS_FILE, &address).map_err(|error| StartError::Write("the address file", error))?;
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(&request.reply(&address))
        .and_then(|()| stdout.flush())
        .map_err(|error| StartError::Write("the answer", error))
}

/// With the Sandbox API there may be no specification: then the shim is for a sandbox.
fn role(bundle: &Path) -> Result<Role, StartError> {
    if !bundle.join("config.json").exists() {
        return Ok(Role::Sandbox);
    }
    Ok(Role::of(&spec::read(bundle)?)?)
}

fn address(flags: &Flags, request: &StartRequest, id: &str) -> String {
    containerd_shim::StartOpts {
        address: request.grpc_address.clone(),
        namespace: flags.namespace.clone(),
        socket_dir: request.socket_dir.clone(),
        ..Default::default()
    }
    .socket_address(id)
}

/// containerd 1.x starts a shim for each container of a pod: the answer is the one that is there.
fn address_of_pod(flags: &Flags, request: &StartRequest, sandbox: String) -> Result<String, StartError> {
    let address = address(flags, request, &sandbox);
    match UnixStream::connect(socket_path(&address)) {
        Ok(_) => Ok(address),
        Err(_) => Err(StartError::NoPod(sandbox)),
    }
}

/// The path in an address.
pub(super) fn socket_path(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap_or(address))
}

fn serve(flags: &Flags, request: &StartRequest) -> Result<String, StartError> {
    let address = address(flags, request, &flags.id);
    let path = socket_path(&address);
    let Some(listener) = listen(path)? else {
        // A server of this container is there already.
        return Ok(address);
    };
    let served = spawn_server(flags, request, &address, listener);
    if served.is_err() {
        let _ = fs::remove_file(path);
    }
    served.map(|()| address)
}

/// Binds the socket; `None` if somebody serves there already.
fn listen(path: &Path) -> Result<Option<UnixListener>, StartError> {
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(StartError::SocketPath(path.to_owned()));
    }
    let failed = |source| StartError::Listen { path: path.to_owned(), source };
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed)?;
    }
    let listener = match UnixListener::bind(path) {
        Ok(listener) => listener,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            // Left behind by a server that was killed.
            fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path).map_err(failed)?
        }
        Err(error) => return Err(failed(error)),
    };
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(Some(listener))
}

/// Starts the server with the socket as its standard input, and waits for its report on its standard output.
fn spawn_server(
    flags: &Flags,
    request: &StartRequest,
    address: &str,
    listener: UnixListener,
) -> Result<(), StartError> {
    let failed = |step| move |source| StartError::Spawn { step, source };
    let (report, writer) = io::pipe().map_err(failed("create a pipe"))?;
    let executable = std::env::current_exe().map_err(failed("find its program"))?;
    let bundle = std::env::current_dir().map_err(failed("find the bundle"))?;
    let mut command = Command::new(executable);
    command
        .args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &request.grpc_address])
        // Not for the server: who looks at it finds the pod's record by this.
        .arg("-bundle")
        .arg(bundle)
        .args(["-socket", address])
        .env("TTRPC_ADDRESS", &request.ttrpc_address)
        .stdin(OwnedFd::from(listener))
        .stdout(OwnedFd::from(writer))
        .stderr(Stdio::null());
    for (name, value) in request.options.to_environment() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    if request.debug {
        command.arg("-debug");
    }
    command.arg(SERVE);
    let mut server = command.spawn().map_err(failed("run its program"))?;
    // It holds copies of the descriptors; the report would never end.
    drop(command);
    let outcome = confine(request, server.id()).and_then(|()| await_report(report.into(), &mut server));
    if outcome.is_err() {
        let _ = server.kill();
        let _ = server.wait();
    }
    outcome
}

/// Puts the server into the cgroup that the options ask for, and makes it a later victim than what it serves, but an
/// earlier one than containerd.
fn confine(request: &StartRequest, pid: u32) -> Result<(), StartError> {
    if !request.options.shim_cgroup.is_empty() {
        cgroup::join(&request.options.shim_cgroup, pid)?;
    }
    let ours = fs::read_to_string("/proc/self/oom_score_adj")
        .ok()
        .and_then(|score| score.trim().parse::<i32>().ok());
    if let Some(score) = ours {
        // Raising it is always allowed; that it fails would say that the process is gone, which the report tells better.
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), (score + 1).min(1000).to_string());
    }
    Ok(())
}

fn await_report(report: OwnedFd, server: &mut Child) -> Result<(), StartError> {
    let deadline = Instant::now() + READY_LIMIT;
    let mut report = fs::File::from(report);
    let mut text = Vec::new();
    loop {
        let left = PollTimeout::try_from(deadline.saturating_duration_since(Instant::now()))
            .unwrap_or(PollTimeout::ZERO);
        use std::os::fd::AsFd;
        let mut fds = [PollFd::new(report.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, left) {
            Ok(0) => {
                return Err(StartError::Server(format!("nothing from it for {} s", READY_LIMIT.as_secs())));
            }
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(errno) => {
                return Err(StartError::Spawn { step: "wait for its report", source: errno.into() });
            }
        }
        let mut buffer = [0; 1024];
        match report.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => text.extend_from_slice(&buffer[..length]),
            Err(source) => return Err(StartError::Spawn { step: "read its report", source }),
        }
        if text == READY {
            return Ok(());
        }
    }
    let said = String::from_utf8_lossy(&text).trim().to_owned();
    match server.wait() {
        _ if !said.is_empty() => Err(StartError::Server(said)),
        Ok(status) => Err(StartError::Server(format!("it ended early, {status}"))),
        Err(source) => Err(StartError::Spawn { step: "wait for it", source }),
    }
}
