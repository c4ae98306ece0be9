//! Which thread serves which device.
//!
//! File systems and disks may have to wait for the node's storage, and for as long as it likes, so they don't share a thread with the
//! devices without which nobody can talk to the guest: network, sockets, console. Volumes may be on other storage than what a container's
//! programs are loaded from, so these two don't share one either. Each thread has a filter that knows the calls of its devices only.

use bulkhead_base::chain;
use bulkhead_seccomp::{Filter, FilterError};
use bulkhead_vmm_protocol::DiskRole;

use crate::device_loop::{DeviceLoop, LoopError, Stopped};
use crate::devices::DeviceKind;
use crate::devices::worker::DeviceWorker;
use crate::patience::Patience;

/// What a device's thread may have to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waits {
    /// Nothing.
    Never,
    /// What the containers' files are on, and the guest's image.
    ForFiles,
    /// What a volume is on.
    ForVolumes,
}

impl Waits {
    /// Of a device that a machine starts with.
    fn of(kind: DeviceKind) -> Self {
        match kind {
            DeviceKind::Block | DeviceKind::FileSystem => Waits::ForFiles,
            DeviceKind::Net
            | DeviceKind::Console
            | DeviceKind::Entropy
            | DeviceKind::Balloon
            | DeviceKind::Vsock => Waits::Never,
        }
    }
}

impl From<DiskRole> for Waits {
    fn from(role: DiskRole) -> Self {
        match role {
            DiskRole::Root => Waits::ForFiles,
            DiskRole::Volume => Waits::ForVolumes,
        }
    }
}

/// Handles to the threads.
#[derive(Debug)]
pub(crate) struct DeviceThreads {
    never: DeviceLoop,
    for_files: DeviceLoop,
    for_volumes: DeviceLoop,
}

impl DeviceThreads {
    /// Starts the threads, each under its seccomp filter; they wait for their devices. When one fails, `failed` hears of it.
    pub(crate) fn start(failed: impl FnOnce(String) + Clone + Send + 'static) -> Result<Self, LoopError> {
        let start = |name, filter: Filter, patience| {
            let enter = move || filter.install().map_err(|error: FilterError| chain(&error));
            DeviceLoop::start(name, patience, enter, failed.clone())
        };
        Ok(DeviceThreads {
            never: start("devices", Filter::VmmDevice, None)?,
            for_files: start("files", Filter::VmmStorage, Some(Patience::default()))?,
            for_volumes: start("volumes", Filter::VmmStorage, Some(Patience::default()))?,
        })
    }

    /// Gives the threads the devices that they run from the start, which have their places as numbers.
    pub(crate) fn run(&self, workers: Vec<DeviceWorker>) {
        let (never, for_files) =
            workers.into_iter().enumerate().partition(|(_, worker)| Waits::of(worker.kind()) == Waits::Never);
        self.never.run(never);
        self.for_files.run(for_files);
        self.for_volumes.run(Vec::new());
    }

    /// Has a thread take on another device; `key` is a number of the caller's for it.
    pub(crate) fn add(&self, key: usize, waits: Waits, worker: DeviceWorker) {
        self.thread(waits).add(key, worker);
    }

    /// Has the thread drop a device that it took on. `false`: it has not done so in time.
    pub(crate) fn remove(&self, key: usize, waits: Waits) -> bool {
        self.thread(waits).remove(key)
    }

    /// Lets the devices finish what is queued, then stops the threads: all devices that they ran from the start, by their numbers.
    /// `None`: a thread failed, or didn't end in time.
    pub(crate) fn stop(self) -> Option<Stopped> {
        let stopped = [self.never, self.for_files, self.for_volumes].map(DeviceLoop::stop);
        let mut all = Stopped::idle();
        for thread in stopped {
            let thread = thread?;
            all.at_rest &= thread.at_rest;
            all.workers.extend(thread.workers);
        }
        all.workers.sort_unstable_by_key(|(place, _)| *place);
        Some(all)
    }

    fn thread(&self, waits: Waits) -> &DeviceLoop {
        match waits {
            Waits::Never => &self.never,
            Waits::ForFiles => &self.for_files,
            Waits::ForVolumes => &self.for_volumes,
        }
    }
}
