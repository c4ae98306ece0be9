//! A device thread: one event loop for some of the machine's devices ([`crate::device_threads`] says which).

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::devices::worker::DeviceWorker;
use crate::patience::Patience;

/// Stack of every thread but the first, in bytes: too small for the host to back it with a huge page, which it would keep.
pub(crate) const THREAD_STACK: usize = 128 * 1024;

/// Events taken from the kernel in one go.
const READY_EVENTS: usize = 32;

/// How long devices may go on with what the guest left behind when it ends.
const DRAIN_LIMIT: Duration = Duration::from_millis(100);

/// How long the thread may take to end: it can be in the middle of a disk's work.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// The device thread can't do its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoopError {
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

/// A handle to the running device thread. A thread that has not been given its devices ends with its handle.
#[derive(Debug)]
pub(crate) struct DeviceLoop {
    thread: JoinHandle<Option<Stopped>>,
    orders: Sender<Order>,
    control: Arc<Control>,
}

/// What the thread is told.
enum Order {
    /// Run these.
    Start(Vec<(usize, DeviceWorker)>),
    /// Run this one as well.
    Add(usize, Box<DeviceWorker>),
    /// Drop it and say so.
    Remove(usize, Sender<()>),
}

/// The devices after their thread has ended.
pub(crate) struct Stopped {
    /// The workers that it started with, each with the number that it came with.
    pub workers: Vec<(usize, DeviceWorker)>,
    /// Whether everything that was queued is finished.
    pub at_rest: bool,
}

impl Stopped {
    /// Without devices there is nothing left to do.
    pub(crate) fn idle() -> Self {
        Stopped { workers: Vec::new(), at_rest: true }
    }
}

#[derive(Debug)]
struct Control {
    stop: AtomicBool,
    /// Requests that devices have taken since the loop last waited.
    taken: AtomicU32,
    /// Written after every order and after the request to stop.
    wake: EventFd,
}

enum Subscriber {
    Device(DeviceWorker, Arc<Control>),
    Control(Arc<Control>),
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, ops: &mut EventOps) {
        match self {
            Subscriber::Device(worker, _) => worker.init(ops),
            Subscriber::Control(control) => {
                if ops.add(Events::new(&control.wake, EventSet::IN)).is_err() {
                    // A loop that can't be stopped must not start.
                    control.stop.store(true, Ordering::SeqCst);
                }
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match self {
            Subscriber::Device(worker, control) => {
                worker.process(events, ops);
                control.taken.fetch_add(worker.take_taken(), Ordering::Relaxed);
            }
            Subscriber::Control(control) => drop(control.wake.read()),
        }
    }
}

impl DeviceLoop {
    /// Starts the thread, which then waits for its devices. `enter` runs in it first (it installs the thread's seccomp
    /// filter); when it or the loop fails, `failed` hears of it. With `patience` the thread learns when to let the guest finish.
    pub(crate) fn start(
        name: &str,
        patience: Option<Patience>,
        enter: impl FnOnce() -> Result<(), String> + Send + 'static,
        failed: impl FnOnce(String) + Send + 'static,
    ) -> Result<Self, LoopError> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(LoopError::EventFd)?;
        let control = Arc::new(Control { stop: AtomicBool::new(false), taken: AtomicU32::new(0), wake });
        let seen = control.clone();
        let (orders, waiting) = channel();
        let mut manager = EventManager::new_with_capacity(READY_EVENTS).map_err(LoopError::Create)?;
        let body = move || {
            let result = enter().and_then(|()| {
                // Without a machine there is nothing to do.
                let Ok(Order::Start(workers)) = waiting.recv() else { return Ok(Stopped::idle()) };
                manager.add_subscriber(Subscriber::Control(seen.clone()));
                let mut ids = Vec::with_capacity(workers.len());
                for (key, worker) in workers {
                    ids.push((key, manager.add_subscriber(Subscriber::Device(worker, seen.clone()))));
                }
                let at_rest =
                    run(&mut manager, &seen, patience, &waiting).map_err(|error| error.to_string())?;
                let workers = ids.into_iter().filter_map(|(key, id)| match manager.remove_subscriber(id) {
                    Ok(Subscriber::Device(worker, _)) => Some((key, worker)),
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
            .name(name.into())
            .stack_size(THREAD_STACK)
            .spawn(body)
            .map_err(LoopError::Spawn)?;
        Ok(DeviceLoop { thread, orders, control })
    }

    /// Gives the thread the devices that it runs from the start, each with a number of the caller's.
    pub(crate) fn run(&self, workers: Vec<(usize, DeviceWorker)>) {
        // A thread that has ended has reported why.
        let _ = self.orders.send(Order::Start(workers));
    }

    /// Has the running thread take on another device; `key` is the caller's number for it.
    pub(crate) fn add(&self, key: usize, worker: DeviceWorker) {
        let _ = self.orders.send(Order::Add(key, Box::new(worker)));
        let _ = self.control.wake.write(1);
    }

    /// Has the thread drop a device that was added. `false`: it has not done so in time.
    pub(crate) fn remove(&self, key: usize) -> bool {
        let (done, dropped) = channel();
        let _ = self.orders.send(Order::Remove(key, done));
        let _ = self.control.wake.write(1);
        dropped.recv_timeout(STOP_LIMIT).is_ok()
    }

    /// Lets the devices finish what is queued, then stops the thread. `None`: it failed, or didn't end in time.
    pub(crate) fn stop(self) -> Option<Stopped> {
        self.control.stop.store(true, Ordering::SeqCst);
        let _ = self.control.wake.write(1);
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
fn run(
    manager: &mut EventManager<Subscriber>,
    control: &Arc<Control>,
    mut patience: Option<Patience>,
    orders: &Receiver<Order>,
) -> Result<bool, LoopError> {
    let mut added: BTreeMap<usize, SubscriberId> = BTreeMap::new();
    while !control.stop.load(Ordering::SeqCst) {
        manager.run().map_err(LoopError::Wait)?;
        let taken = control.taken.swap(0, Ordering::Relaxed);
        if taken > 0
            && let Some(patience) = &mut patience
        {
            patience.found(taken);
        }
        for order in orders.try_iter() {
            match order {
                Order::Start(_) => {}
                Order::Add(key, worker) => {
                    added.insert(key, manager.add_subscriber(Subscriber::Device(*worker, control.clone())));
                }
                Order::Remove(key, done) => {
                    if let Some(id) = added.remove(&key) {
                        drop(manager.remove_subscriber(id));
                    }
                    // Whoever asked may have given up.
                    let _ = done.send(());
                }
            }
        }
    }
    let start = Instant::now();
    while start.elapsed() < DRAIN_LIMIT {
        if manager.run_with_timeout(0).map_err(LoopError::Wait)? == 0 {
            return Ok(true);
        }
    }
    Ok(false)
}
