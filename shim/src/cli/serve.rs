//! The server: one per pod, from `start` until containerd shuts it down.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim::Flags;
use log::LevelFilter;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use super::start::socket_path;
use crate::events::Publisher;
use crate::operator;
use crate::options::RuntimeOptions;
use crate::sandbox;
use crate::task;
use crate::task::shim::Shim;

/// What the server says when it is ready.
pub(super) const READY: &[u8] = b"ready\n";

/// Answers that are on their way get out within this time when the server ends.
const LINGER: Duration = Duration::from_millis(10);

#[derive(Debug, thiserror::Error)]
pub(super) enum ServeError {
    #[error("start the shim with the action start: the server needs what that passes on")]
    NotStarted,
    #[error("can't set the shim's server up: {step}")]
    Setup {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("can't serve containerd")]
    Serve(#[source] ttrpc::Error),
}

pub(super) fn run(flags: &Flags) -> Result<(), ServeError> {
    let (listener, report) = take_descriptors().inspect_err(|error| eprintln!("{error}"))?;
    match set_up(flags).and_then(|runtime| Ok((runtime, prepare(listener)?))) {
        Ok((runtime, listener)) => runtime.block_on(serve(flags, listener, report)),
        Err(error) => {
            // `start` passes it on to containerd.
            let _ = writeln!(fs::File::from(report), "{}", crate::error::chain(&error));
            Err(error)
        }
    }
}

/// Standard input is the bound socket, standard output the report to `start`. Both are replaced by /dev/null.
fn take_descriptors() -> Result<(OwnedFd, OwnedFd), ServeError> {
    let setup = |step| move |source| ServeError::Setup { step, source };
    let listener = io::stdin().as_fd().try_clone_to_owned().map_err(setup("take the socket"))?;
    let report = io::stdout().as_fd().try_clone_to_owned().map_err(setup("take the report"))?;
    if nix::sys::socket::getsockopt(&listener, nix::sys::socket::sockopt::AcceptConn) != Ok(true) {
        return Err(ServeError::NotStarted);
    }
    let null =
        fs::OpenOptions::new().read(true).write(true).open("/dev/null").map_err(setup("open /dev/null"))?;
    for stream in [libc::STDIN_FILENO, libc::STDOUT_FILENO] {
        // SAFETY: dup2 takes two descriptor numbers; nobody in this process owns the standard streams.
        if unsafe { libc::dup2(null.as_raw_fd(), stream) } < 0 {
            return Err(setup("replace standard streams")(io::Error::last_os_error()));
        }
    }
    Ok((listener, report))
}

fn set_up(flags: &Flags) -> Result<tokio::runtime::Runtime, ServeError> {
    let setup = |step| move |source| ServeError::Setup { step, source };
    nix::unistd::setsid().map_err(|errno| setup("become a session leader")(errno.into()))?;
    // SAFETY: mallopt takes integers; there is one thread. One arena is enough for one runtime thread, and keeps memory
    // that short-lived threads used from lying around.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    let level = if flags.debug { LevelFilter::Debug } else { LevelFilter::Info };
    crate::logging::init(Path::new("log"), &flags.id, level).map_err(setup("open the log"))?;
    // Nothing is named by the working directory any more, and the bundle can be unmounted.
    std::env::set_current_dir("/").map_err(setup("leave the bundle"))?;
    raise_descriptor_limit().map_err(setup("raise the limit of open files"))?;
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(setup("start the runtime"))
}

/// Each process has up to nine descriptors here, and the usual soft limit is for programs that use `select`.
fn raise_descriptor_limit() -> io::Result<()> {
    // Containers are to have what containerd has given us.
    crate::spec::rlimits::inherited();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

fn prepare(listener: OwnedFd) -> Result<UnixListener, ServeError> {
    let listener = UnixListener::from(listener);
    listener
        .set_nonblocking(true)
        .map_err(|source| ServeError::Setup { step: "unblock the socket", source })?;
    Ok(listener)
}

async fn serve(flags: &Flags, listener: UnixListener, report: OwnedFd) -> Result<(), ServeError> {
    let setup = |step| move |source| ServeError::Setup { step, source };
    let mut terminate = signal(SignalKind::terminate()).map_err(setup("handle SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(setup("handle SIGINT"))?;
    let publisher = Publisher::start(&std::env::var("TTRPC_ADDRESS").unwrap_or_default(), &flags.namespace);
    let least_logged = if flags.debug { LevelFilter::Debug } else { LevelFilter::Off };
    let shim = Arc::new(Shim::new(publisher, least_logged));
    let listener = Listener::try_from(listener).map_err(setup("listen"))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(task::service::services(&shim))
        .register_service(sandbox::service::services(&shim, RuntimeOptions::from_environment()))
        .register_service(task::streams::service(&shim.streams))
        .register_service(operator::service(&shim));
    server.start().await.map_err(ServeError::Serve)?;

    fs::File::from(report).write_all(READY).map_err(setup("report to the start action"))?;
    log::debug!("serving");
    tokio::select! {
        () = shim.exiting() => {}
        _ = terminate.recv() => end_by_signal("SIGTERM", &shim).await,
        _ = interrupt.recv() => end_by_signal("SIGINT", &shim).await,
    }
    tokio::time::sleep(LINGER).await;
    let _ = fs::remove_file(socket_path(&flags.socket));
    let _ = server.shutdown().await;
    log::debug!("the shim ends");
    Ok(())
}

/// Whoever ends the shim ends the pod: nobody else could look after it.
async fn end_by_signal(name: &str, shim: &Shim) {
    log::warn!("{name}: the pod is ended");
    shim.end_pod().await;
    shim.exit();
    shim.exiting().await;
}
