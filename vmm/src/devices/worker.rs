//! The side of a device that its thread runs: event dispatch, activation, faults.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use bulkhead_base::chain;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{debug, error};
use vmm_sys_util::eventfd::EventFd;

use super::slot::{DeviceSlot, Kicks, SlotState};
use super::{BackendState, DeviceFault, DeviceKind, Progress, VirtioDevice};

/// Event data at and above this value belong to the device.
const DEVICE_TOKENS: u32 = 1 << 16;
/// Event data of the slot's wake eventfd; below are the queues.
const WAKE: u32 = DEVICE_TOKENS - 1;

/// The descriptors that one device watches beside its queues' kicks.
///
/// A descriptor must be removed *before* it is closed: another process may hold a copy, and then the kernel keeps
/// reporting it.
#[derive(Debug)]
pub struct DeviceEvents<'a, 'b> {
    ops: &'a mut EventOps<'b>,
}

impl<'a, 'b> DeviceEvents<'a, 'b> {
    pub(crate) fn new(ops: &'a mut EventOps<'b>) -> Self {
        DeviceEvents { ops }
    }

    /// Watches `fd` (level-triggered unless `set` says otherwise); [`VirtioDevice::descriptor_ready`] gets `token`,
    /// which must be less than 2³¹. Errors and hang-ups are always reported, also with an empty `set`.
    pub(crate) fn add(&mut self, fd: BorrowedFd<'_>, token: u32, set: EventSet) -> Result<(), DeviceFault> {
        Ok(self.ops.add(events(fd, token, set))?)
    }

    /// Replaces the set of a watched descriptor.
    pub(crate) fn modify(
        &mut self,
        fd: BorrowedFd<'_>,
        token: u32,
        set: EventSet,
    ) -> Result<(), DeviceFault> {
        Ok(self.ops.modify(events(fd, token, set))?)
    }

    /// Stops watching a descriptor, and drops events of it that were not delivered yet.
    pub(crate) fn remove(&mut self, fd: BorrowedFd<'_>) -> Result<(), DeviceFault> {
        Ok(self.ops.remove(Events::empty_raw(fd.as_raw_fd()))?)
    }
}

fn events(fd: BorrowedFd<'_>, token: u32, set: EventSet) -> Events {
    Events::with_data_raw(fd.as_raw_fd(), DEVICE_TOKENS.saturating_add(token), set)
}

/// Runs one device's backend on its thread.
pub struct DeviceWorker {
    device: Box<dyn VirtioDevice>,
    kind: DeviceKind,
    slot: Arc<DeviceSlot>,
    /// Chains taken from queues that were kicked.
    taken: u32,
}

impl DeviceWorker {
    /// Joins a backend to its slot.
    pub fn new(device: Box<dyn VirtioDevice>, slot: Arc<DeviceSlot>) -> Self {
        DeviceWorker { kind: device.info().kind, device, slot, taken: 0 }
    }

    /// The backend's state, when its thread has ended.
    pub(crate) fn save(&self) -> Result<BackendState, &'static str> {
        self.device.save()
    }

    /// How many chains were taken from queues that were kicked, since the last time that this was asked.
    pub(crate) fn take_taken(&mut self) -> u32 {
        std::mem::take(&mut self.taken)
    }

    /// What it runs.
    pub(crate) fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// Lets the backend know of a reset or an activation by the driver.
    fn catch_up(
        &mut self,
        state: &mut SlotState,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        if std::mem::take(&mut state.reset_pending) {
            debug!("{:?}: reset by the driver", self.kind);
            self.device.reset(events);
        }
        let resumed = std::mem::take(&mut state.resumed);
        if std::mem::take(&mut state.fresh)
            && let Some(active) = &mut state.active
        {
            debug!("{:?}: activated, features {:#x}", self.kind, active.features);
            self.device.activate(active, events)?;
            // The driver may have kicked before the queues got here.
            for queue in 0..active.queues.len() {
                // To look at an empty queue writes to guest memory: a page to copy, when machines share it.
                if resumed && !active.queues[queue].has_available() {
                    continue;
                }
                let progress = self.device.queue_ready(queue, active, events)?;
                self.requeue(queue, progress);
            }
        }
        Ok(())
    }

    fn dispatch(
        &mut self,
        event: Events,
        state: &mut SlotState,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        self.catch_up(state, events)?;
        match (event.data(), &mut state.active) {
            (WAKE, _) => Ok(()),
            (data, active) if data >= DEVICE_TOKENS => {
                self.device.descriptor_ready(data - DEVICE_TOKENS, event.event_set(), active.as_mut(), events)
            }
            (kick, Some(active)) => {
                let queues = match self.slot.kicks {
                    Kicks::PerQueue(_) => kick as usize..kick as usize + 1,
                    Kicks::Shared(_) => 0..active.queues.len(),
                };
                for queue in queues {
                    let before = active.queues[queue].next_available();
                    let progress = self.device.queue_ready(queue, active, events)?;
                    let taken = active.queues[queue].next_available().wrapping_sub(before);
                    self.taken = self.taken.saturating_add(u32::from(taken));
                    self.requeue(queue, progress);
                }
                Ok(())
            }
            (_, None) => Ok(()),
        }
    }

    /// Asks for another turn of a queue, after those of the other devices.
    fn requeue(&self, queue: usize, progress: Progress) {
        if progress == Progress::More
            && let Some(kick) = self.slot.kicks.of(queue)
        {
            let _ = kick.write(1);
        }
    }

    /// Marks the device as needing a reset: it stays dead until the driver resets it.
    fn fail(&mut self, fault: &DeviceFault, state: &mut SlotState, events: &mut DeviceEvents<'_, '_>) {
        error!("{:?} device stopped until the driver resets it: {}", self.kind, chain(fault));
        state.active = None;
        state.fresh = false;
        self.device.reset(events);
        self.slot.interrupt.signal_needs_reset();
    }
}

impl MutEventSubscriber for DeviceWorker {
    fn init(&mut self, ops: &mut EventOps) {
        // What is reported is each time that something is written, so nobody has to read it to be told of the next.
        let each_write = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let watch = |ops: &mut EventOps, fd: &EventFd, data| {
            ops.add(Events::with_data(fd, data, each_write)).map_err(DeviceFault::from)
        };
        let slot = self.slot.clone();
        let mut result = watch(ops, &slot.wake, WAKE);
        for (kick, data) in slot.kicks.all().iter().zip(0..) {
            result = result.and_then(|()| watch(ops, kick, data));
        }
        let mut events = DeviceEvents::new(ops);
        let result = result.and_then(|()| self.device.start(&mut events));
        let result = result.and_then(|()| self.catch_up(&mut slot.lock(), &mut events));
        if let Err(fault) = result {
            self.fail(&fault, &mut slot.lock(), &mut events);
        }
    }

    fn process(&mut self, event: Events, ops: &mut EventOps) {
        let slot = self.slot.clone();
        let mut state = slot.lock();
        let mut events = DeviceEvents::new(ops);
        if let Err(fault) = self.dispatch(event, &mut state, &mut events) {
            self.fail(&fault, &mut state, &mut events);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokens_leave_room_for_queues_and_wake() {
        const { assert!(WAKE < DEVICE_TOKENS) };
        let (reader, _writer) = std::io::pipe().unwrap();
        let event = events(std::os::fd::AsFd::as_fd(&reader), 7, EventSet::IN);
        assert_eq!(event.data(), DEVICE_TOKENS + 7);
    }
}
