//! `bulkhead-agent`: process 1 of the guest.
//!
//! As any other process it serves its API on descriptors that it inherits, in the namespaces that it is in, which is how
//! the tests run it without a guest:
//!
//!     bulkhead-agent --serve-fd N --streams-fd N --cgroups DIR

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use async_trait::async_trait;
use bulkhead_agent::pod::Pod;
use bulkhead_agent::reaper::Reaper;
use bulkhead_agent::service::{ConfigureFailure, Machine, Service};
use bulkhead_agent::stdio::Streams;
use bulkhead_agent::{guest, logging, server, sys};
use bulkhead_agent_protocol::{AddDiskRequest, AddDiskResponse, AddInterfaceRequest, ConfigureRequest};

fn main() -> ExitCode {
    if std::process::id() == 1 {
        guest::run();
    }
    logging::to_stderr();
    let served = Options::parse(std::env::args().skip(1)).and_then(serve);
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

struct Options {
    connection: RawFd,
    streams: RawFd,
    cgroups: PathBuf,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut connection, mut streams, mut cgroups) = (None, None, None);
        while let Some(option) = args.next() {
            let value = args.next().ok_or_else(|| format!("{option} needs a value"))?;
            let number = || value.parse().map_err(|_| format!("{option} {value}: not a descriptor"));
            match option.as_str() {
                "--serve-fd" => connection = Some(number()?),
                "--streams-fd" => streams = Some(number()?),
                "--cgroups" => cgroups = Some(value.into()),
                _ => return Err(format!("unknown option {option}")),
            }
        }
        match (connection, streams, cgroups) {
            (Some(connection), Some(streams), Some(cgroups)) => Ok(Self { connection, streams, cgroups }),
            _ => {
                Err("this is process 1 of a guest; elsewhere it needs --serve-fd, --streams-fd and --cgroups"
                    .into())
            }
        }
    }
}

fn serve(options: Options) -> Result<(), String> {
    let text = |error: &dyn std::error::Error| bulkhead_base::chain(error);
    let inherited = |fd: RawFd| {
        // SAFETY: the caller of the program says that these descriptors are ours; each is taken over once.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        sys::fd::set_close_on_exec(std::os::fd::AsFd::as_fd(&fd), true)
            .map(|()| fd)
            .map_err(|error| text(&error))
    };
    let (connection, streams_listener) = (inherited(options.connection)?, inherited(options.streams)?);
    sys::process::prctl(libc::PR_SET_DUMPABLE, 0).map_err(|error| text(&error))?;
    // Orphans of containers come to the agent, as they do to process 1.
    sys::process::prctl(libc::PR_SET_CHILD_SUBREAPER, 1).map_err(|error| text(&error))?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| text(&error))?;
    runtime.block_on(async {
        let reaper = Arc::new(Reaper::new().map_err(|error| text(&error))?);
        let streams = Arc::new(Streams::default());
        let pod = Pod::new(reaper.clone(), streams.clone(), Path::new(&options.cgroups)).map_err(|error| text(&error))?;
        let service = Arc::new(Service::new(pod.clone(), Arc::new(ForeignMachine)));
        let served = tokio::select! {
            result = server::serve(connection, service) => result.map_err(|error| text(&error)),
            result = reaper.run() => result.map(|never| match never {}).map_err(|error| text(&error)),
            result = streams.accept(streams_listener) => result.map(|never| match never {}).map_err(|error| text(&error)),
        };
        pod.end_everything().await;
        served
    })
}

/// A machine that is not the agent's: it is left alone.
struct ForeignMachine;

#[async_trait]
impl Machine for ForeignMachine {
    fn configure(&self, _: &ConfigureRequest) -> Result<(), ConfigureFailure> {
        Ok(())
    }

    fn started_us(&self) -> u64 {
        0
    }

    fn ready_us(&self) -> u64 {
        0
    }

    fn now_us(&self) -> u64 {
        0
    }

    fn set_clock(&self, _: i64) -> Result<(), String> {
        Ok(())
    }

    fn forget_files(&self) {}

    async fn add_disk(&self, _: &AddDiskRequest) -> Result<AddDiskResponse, String> {
        Err("this machine is not the agent's".to_owned())
    }

    async fn remove_disk(&self, _: u32) -> Result<(), String> {
        Ok(())
    }

    async fn add_interface(&self, _: &AddInterfaceRequest) -> Result<(), String> {
        Err("this machine is not the agent's".to_owned())
    }

    async fn power_off(&self) {}
}
