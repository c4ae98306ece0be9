//! The agent as process 1 of the guest.

mod clock;
mod disks;
mod filesystems;
mod interfaces;
mod layers;
mod machine;
mod parameters;
mod power;
mod redirect;
mod room;
mod slots;
mod vsock;

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_protocol::{AGENT_PORT, STDIO_PORT};
use bulkhead_base::chain;

use crate::pod::{Pod, PodError};
use crate::reaper::Reaper;
use crate::service::{Machine as _, Service};
use crate::stdio::Streams;
use crate::{logging, server};

pub(crate) use filesystems::CGROUPS;
use filesystems::FileSystemError;
use machine::GuestMachine;
pub(crate) use redirect::Redirection;

/// How long the host may take to accept the connection.
const DIAL_LIMIT: Duration = Duration::from_secs(10);

/// A guest that can't serve its pod.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
enum GuestError {
    #[error(transparent)]
    FileSystem(#[from] FileSystemError),
    #[error("can't {what}")]
    System { what: &'static str, source: io::Error },
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error("can't serve the host")]
    Serve(#[source] ttrpc::Error),
    #[error("the connection to the host is gone")]
    Disconnected,
}

/// Runs the guest and powers it off in the end, whatever that end is.
pub fn run() -> ! {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let error = match runtime {
        Ok(runtime) => match runtime.block_on(serve_host()) {
            Ok(never) => match never {},
            Err(error) => error,
        },
        Err(source) => GuestError::System { what: "make a runtime", source },
    };
    // The end of the connection is how a host that was killed says so.
    log::error!("powering off: {}", chain(&error));
    power::off()
}

async fn serve_host() -> Result<Infallible, GuestError> {
    let started_us = machine::monotonic_us();
    let system = |what| move |source| GuestError::System { what, source };
    // The host answers while the rest is done.
    let dialing = vsock::Dialing::start(AGENT_PORT).map_err(system("dial the host"))?;
    // Clones inherit this until they execute their program, so nothing in a container can trace them.
    crate::sys::process::prctl(libc::PR_SET_DUMPABLE, 0).map_err(system("stop being dumpable"))?;
    filesystems::mount_early()?;
    logging::to_kernel().map_err(system("open the kernel's log"))?;
    forbid_modules().map_err(system("forbid loading kernel modules"))?;
    if let Err(error) = keep_less_on_cpus() {
        log::warn!("free memory stays with the CPUs: {error}");
    }

    raise_limits().map_err(system("raise the limits of processes"))?;

    let reaper = Arc::new(Reaper::new().map_err(system("watch for the end of processes"))?);
    let streams = Arc::new(Streams::default());
    let listener = vsock::listen(STDIO_PORT).map_err(system("listen for streams"))?;
    let pod = Pod::new(reaper.clone(), streams.clone(), Path::new(filesystems::CGROUPS))?;
    if let Err(error) = room::for_each_cpu(Path::new(filesystems::CGROUPS)) {
        log::warn!("each pod makes room for what its CPUs have of their own: {error}");
    }
    let connection = dialing.finish(DIAL_LIMIT).await.map_err(system("connect to the host"))?;
    let machine = Arc::new(GuestMachine::new(reaper.clone(), started_us));

    let service = Arc::new(Service::new(pod.clone(), machine.clone()));
    let serving = async { server::serve(connection, service).await.map_err(GuestError::Serve) };
    let error = tokio::select! {
        result = serving => result.err().unwrap_or(GuestError::Disconnected),
        result = reaper.run() => match result {
            Ok(never) => match never {},
            Err(source) => GuestError::System { what: "collect processes", source },
        },
        result = streams.accept(listener) => match result {
            Ok(never) => match never {},
            Err(source) => GuestError::System { what: "accept streams", source },
        },
    };
    log::error!("{}", chain(&error));
    pod.end_everything().await;
    machine.power_off().await;
    Err(error)
}

/// Gives containers that name no limits what they have elsewhere, instead of what the kernel gives its first process,
/// which goes by the guest's memory.
fn raise_limits() -> io::Result<()> {
    const UNLIMITED: u64 = libc::RLIM64_INFINITY;
    let limits = [
        // Programs that close every descriptor they could have, or use select, need the soft limit to stay low.
        (libc::RLIMIT_NOFILE, 1024, 524_288),
        (libc::RLIMIT_NPROC, UNLIMITED, UNLIMITED),
        (libc::RLIMIT_SIGPENDING, UNLIMITED, UNLIMITED),
    ];
    for (resource, soft, hard) in limits {
        let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
        // SAFETY: the limit is a valid structure; no old one is asked for.
        let set = unsafe { libc::prlimit64(0, resource, &raw const limit, std::ptr::null_mut()) };
        crate::sys::check(set.into())?;
    }
    Ok(())
}

/// What CPUs keep of free pages for themselves is not reported to the host, and may be an eighth of the memory. Of a 64th it is
/// what kernels before 6.7 had, more or less.
fn keep_less_on_cpus() -> io::Result<()> {
    std::fs::write("/proc/sys/vm/percpu_pagelist_high_fraction", "64")
}

/// Makes the kernel refuse modules for ever, if it could load any at all.
fn forbid_modules() -> io::Result<()> {
    match std::fs::OpenOptions::new().write(true).open("/proc/sys/kernel/modules_disabled") {
        Ok(mut file) => io::Write::write_all(&mut file, b"1"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
