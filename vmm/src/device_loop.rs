//! The device thread: one event loop for all devices.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::devices::worker::DeviceWorker;

/// Stack of the device and vCPU threads, in bytes.
pub const THREAD_STACK: usize = 128 * 1024;

/// Events taken from the kernel in one go.
const READY_EVENTS: usize = 32;

/// How long devices may go on with what the guest left behind when it ends.
const DRAIN_LIMIT: Duration = Duration::from_millis(100);

/// How long the thread may take to end: it can be in the middle of a disk's work.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// The device thread can't do its work.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// No eventfd, no epoll.
    #[error("can't create the device loop: {0}")]
    Create(event_manager::Error),
    /// No eventfd.
    #[error("can't create an eventfd for the device loop")]
    EventFd(#[source] io::Error),
    /// No thread.
    #[error("can't start the device thread")]
    Spawn(#[source] io::Error),
    /// Waiting failed.
    #[error("the device loop can't wait for events: {0}")]
    Wait(event_manager::Error),
}

/// A handle to the running device thread.
#[derive(Debug)]
pub struct DeviceLoop {
    thread: JoinHandle<Option<Stopped>>,
    stop: Arc<Stop>,
}

/// The devices after their thread has ended, in the order in which they were given.
pub struct Stopped {
    /// Their workers.
    pub workers: Vec<DeviceWorker>,
    /// Whether everything that was queued is finished.
    pub at_rest: bool,
}

impl Stopped {
    fn idle() -> Self {
        Stopped { workers: Vec::new(), at_rest: true }
    }
}

#[derive(Debug)]
struct Stop {
    requested: AtomicBool,
    wake: EventFd,
}

enum Subscriber {
    Device(DeviceWorker),
    Stop(Arc<Stop>),
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, ops: &mut EventOps) {
        match self {
            Subscriber::Device(worker) => worker.init(ops),
            Subscriber::Stop(stop) => {
                if ops.add(Events::new(&stop.wake, EventSet::IN)).is_err() {
                    // A loop that can't be stopped must not start.
                    stop.requested.store(true, Ordering::SeqCst);
                }
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match self {
            Subscriber::Device(worker) => worker.process(events, ops),
            Subscriber::Stop(stop) => drop(stop.wake.read()),
        }
    }
}

impl DeviceLoop {
    /// Starts the thread, which then waits for its devices. `enter` runs in it first (it installs the thread's seccomp
    /// filter); when it or the loop fails, `failed` hears of it.
    pub fn start(
        workers: Receiver<Vec<DeviceWorker>>,
        enter: impl FnOnce() -> Result<(), String> + Send + 'static,
        failed: impl FnOnce(String) + Send + 'static,
    ) -> Result<Self, LoopError> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(LoopError::EventFd)?;
        let stop = Arc::new(Stop { requested: AtomicBool::new(false), wake });
        let seen = stop.clone();
        let mut manager = EventManager::new_with_capacity(READY_EVENTS).map_err(LoopError::Create)?;
        let body = move || {
            let result = enter().and_then(|()| {
                // Without a machine there is nothing to do.
                let Ok(workers) = workers.recv() else { return Ok(Stopped::idle()) };
                manager.add_subscriber(Subscriber::Stop(seen.clone()));
                let mut ids = Vec::with_capacity(workers.len());
                for worker in workers {
                    ids.push(manager.add_subscriber(Subscriber::Device(worker)));
                }
                let at_rest = run(&mut manager, &seen).map_err(|error| error.to_string())?;
                let workers = ids.into_iter().filter_map(|id| match manager.remove_subscriber(id) {
                    Ok(Subscriber::Device(worker)) => Some(worker),
                    _ => None,
                });
                Ok(Stopped { workers: workers.collect(), at_rest })
            });
            match result {
                Ok(stopped) => Some(stopped),
                Err(error) => {
                    failed(error);
                    None
                }
            }
        };
        let thread = thread::Builder::new()
            .name("devices".into())
            .stack_size(THREAD_STACK)
            .spawn(body)
            .map_err(LoopError::Spawn)?;
        Ok(DeviceLoop { thread, stop })
    }

    /// Lets the devices finish what is queued, then stops the thread. `None`: it failed, or didn't end in time.
    pub fn stop(self) -> Option<Stopped> {
        self.stop.requested.store(true, Ordering::SeqCst);
        let _ = self.stop.wake.write(1);
        let start = Instant::now();
        while !self.thread.is_finished() {
            if start.elapsed() > STOP_LIMIT {
                return None;
            }
            thread::sleep(Duration::from_micros(200));
        }
        self.thread.join().ok().flatten()
    }
}

/// Runs until the stop. Says whether the devices came to rest then.
fn run(manager: &mut EventManager<Subscriber>, stop: &Stop) -> Result<bool, LoopError> {
    while !stop.requested.load(Ordering::SeqCst) {
        manager.run().map_err(LoopError::Wait)?;
    }
    let start = Instant::now();
    while start.elapsed() < DRAIN_LIMIT {
        if manager.run_with_timeout(0).map_err(LoopError::Wait)? == 0 {
            return Ok(true);
        }
    }
    Ok(false)
}
