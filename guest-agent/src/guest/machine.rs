//! What the host's requests do to the guest as a whole.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bulkhead_agent_protocol::{
    AddDiskRequest, AddDiskResponse, AddInterfaceRequest, ConfigureRequest, ROOTS_DIR, SHARED_DIR,
};
use bulkhead_base::chain;
use tokio::time::timeout;

use super::{clock, disks, filesystems, interfaces, layers, parameters, power};
use crate::reaper::Reaper;
use crate::service::{ConfigureFailure, Machine};
use crate::sys::process::{CloneOptions, clone_process, exit_now};
use crate::sys::{check, network};

/// Least entropy that the host has to give, in bytes.
const MIN_ENTROPY: usize = 32;

/// Most entropy that is passed on, in bytes.
const MAX_ENTROPY: usize = 512;

/// How long writing back to the host's disks may take at the end.
const SYNC_LIMIT: Duration = Duration::from_secs(5);

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` of `linux/random.h`.
const ADD_ENTROPY: libc::c_ulong = 0x4008_5203;
const RESEED: libc::c_ulong = 0x5207;

/// The guest.
#[derive(Debug)]
pub(crate) struct GuestMachine {
    reaper: Arc<Reaper>,
    started_us: u64,
    ready_us: u64,
}

impl GuestMachine {
    /// The guest, ready from now on; the agent began at `started_us`.
    pub(crate) fn new(reaper: Arc<Reaper>, started_us: u64) -> Self {
        Self { reaper, started_us, ready_us: monotonic_us() }
    }
}

#[async_trait]
impl Machine for GuestMachine {
    fn configure(&self, request: &ConfigureRequest) -> Result<(), ConfigureFailure> {
        let invalid = |message: &str| Err(ConfigureFailure { invalid: true, message: message.to_owned() });
        let failed = |what: &'static str| {
            move |error: io::Error| ConfigureFailure {
                invalid: false,
                message: format!("can't {what}: {error}"),
            }
        };
        if request.entropy.len() < MIN_ENTROPY {
            return invalid("entropy: at least 32 bytes are needed");
        }
        if request.hostname.len() > 64 {
            return invalid("hostname: more than 64 bytes");
        }
        if request.realtime_ns <= 0 {
            return invalid("realtime_ns: not a time after 1970");
        }
        // Before anything else draws random numbers for the pod.
        add_entropy(&request.entropy).map_err(failed("add entropy"))?;
        clock::set(request.realtime_ns).map_err(failed("set the clock"))?;
        if !request.hostname.is_empty() {
            nix::unistd::sethostname(&request.hostname)
                .map_err(|error| failed("set the host name")(error.into()))?;
        }
        parameters::set(&request.parameters);
        network::bring_loopback_up().map_err(failed("bring the loopback interface up"))?;
        for (tag, place) in [(&request.shared_tag, SHARED_DIR), (&request.roots_tag, ROOTS_DIR)] {
            if !tag.is_empty() {
                filesystems::mount_shared(tag, Path::new(place))
                    .map_err(|error| ConfigureFailure { invalid: false, message: chain(&error) })?;
            }
        }
        Ok(())
    }

    fn set_clock(&self, realtime_ns: i64) -> Result<(), String> {
        clock::follow(realtime_ns).map_err(|error| format!("can't set the clock: {error}"))
    }

    fn started_us(&self) -> u64 {
        self.started_us
    }

    fn ready_us(&self) -> u64 {
        self.ready_us
    }

    fn now_us(&self) -> u64 {
        monotonic_us()
    }

    fn forget_files(&self) {
        // Directory entries and inodes only: the host's file server holds a file open for each. Failing to is no harm
        // but the host's memory.
        if let Err(error) = std::fs::write("/proc/sys/vm/drop_caches", "2") {
            log::warn!("files of a container stay cached: {error}");
        }
    }

    async fn add_disk(&self, request: &AddDiskRequest) -> Result<AddDiskResponse, String> {
        disks::add(request, &self.reaper).await.map_err(|error| chain(&error))
    }

    async fn remove_disk(&self, slot: u32) -> Result<(), String> {
        disks::remove(slot, &self.reaper).await.map_err(|error| chain(&error))
    }

    async fn add_interface(&self, request: &AddInterfaceRequest) -> Result<(), String> {
        interfaces::add(request, &self.reaper).await.map_err(|error| chain(&error))
    }

    async fn power_off(&self) {
        // In a process of its own, because a host that does not answer must not keep the guest alive.
        // SAFETY: the agent runs on one thread.
        match unsafe { clone_process(CloneOptions::default()) } {
            Ok(0) => {
                layers::give_up_all();
                // SAFETY: takes nothing.
                unsafe { libc::sync() };
                exit_now(0)
            }
            Ok(pid) => {
                if timeout(SYNC_LIMIT, self.reaper.expect(pid)).await.is_err() {
                    log::warn!("file systems were not written back within {} seconds", SYNC_LIMIT.as_secs());
                }
            }
            Err(error) => log::warn!("file systems are not written back: {error}"),
        }
        power::off()
    }
}

fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    let bytes = bytes.get(..MAX_ENTROPY).unwrap_or(bytes);
    let length = bytes.len() as libc::c_int;
    // `struct rand_pool_info`: entropy in bits, length in bytes, then the bytes.
    let mut pool = [(length * 8).to_ne_bytes(), length.to_ne_bytes()].concat();
    pool.extend_from_slice(bytes);
    let random = File::open("/dev/random")?;
    // SAFETY: the structure is complete and outlives the call; reseeding takes no argument.
    unsafe {
        check(libc::ioctl(random.as_raw_fd(), ADD_ENTROPY, pool.as_ptr()).into())?;
        check(libc::ioctl(random.as_raw_fd(), RESEED).into())?;
    }
    Ok(())
}

/// Monotonic time in microseconds.
pub(crate) fn monotonic_us() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is a valid place for a time; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    (time.tv_sec * 1_000_000 + time.tv_nsec / 1000).unsigned_abs()
}
