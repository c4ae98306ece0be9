//! Where a device's register face and its backend meet.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::registers::Registers;
use super::{Activated, Interrupt};

/// Shared by one [`super::mmio::MmioTransport`] and one [`super::worker::DeviceWorker`].
#[derive(Debug)]
pub struct DeviceSlot {
    state: Mutex<SlotState>,
    /// Wakes the worker after a change of the state.
    pub(super) wake: EventFd,
    /// The driver's notifications arrive here.
    pub(super) kicks: Kicks,
    pub(super) interrupt: Interrupt,
    /// Where KVM leaves acknowledgements of used buffers; nobody reads it.
    acknowledged: EventFd,
    pub(super) registers: Registers,
}

/// The eventfds of a device's notifications.
#[derive(Debug)]
pub(crate) enum Kicks {
    /// One for each queue.
    PerQueue(Vec<EventFd>),
    /// One for all queues, however many the device has.
    Shared(EventFd),
}

impl Kicks {
    /// The one that notifies a queue.
    pub(super) fn of(&self, queue: usize) -> Option<&EventFd> {
        match self {
            Kicks::PerQueue(kicks) => kicks.get(queue),
            Kicks::Shared(kick) => Some(kick),
        }
    }

    /// All of them.
    pub(super) fn all(&self) -> &[EventFd] {
        match self {
            Kicks::PerQueue(kicks) => kicks,
            Kicks::Shared(kick) => std::slice::from_ref(kick),
        }
    }
}

/// What happened to the device since the worker looked last.
#[derive(Debug, Default)]
pub(super) struct SlotState {
    /// The queues while the device is activated.
    pub active: Option<Activated>,
    /// The driver reset the device and the backend hasn't heard of it.
    pub reset_pending: bool,
    /// The queues are new and the backend hasn't seen them.
    pub fresh: bool,
    /// The queues go on from where a saved device was.
    pub resumed: bool,
}

impl DeviceSlot {
    /// A slot for a device of `queues` queues with these registers.
    pub fn new(queues: usize, registers: Registers) -> std::io::Result<Arc<Self>> {
        Self::with(Kicks::PerQueue((0..queues).map(|_| eventfd()).collect::<Result<_, _>>()?), registers)
    }

    /// A slot for one device after the other, each with as many queues as it likes.
    pub(crate) fn reusable(registers: Registers) -> std::io::Result<Arc<Self>> {
        Self::with(Kicks::Shared(eventfd()?), registers)
    }

    fn with(kicks: Kicks, registers: Registers) -> std::io::Result<Arc<Self>> {
        let interrupt = Interrupt::new(eventfd()?, registers.clone());
        let (state, wake, acknowledged) = (Mutex::default(), eventfd()?, eventfd()?);
        Ok(Arc::new(DeviceSlot { state, wake, kicks, interrupt, acknowledged, registers }))
    }

    /// The device's interrupt, for the wiring of its line.
    pub(crate) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// The eventfds of notifications, for the wiring of ioeventfds.
    pub(crate) fn kicks(&self) -> &Kicks {
        &self.kicks
    }

    /// Where acknowledgements of used buffers go, for the wiring of an ioeventfd.
    pub(crate) fn acknowledged(&self) -> &EventFd {
        &self.acknowledged
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, SlotState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands checked queues to the backend.
    pub(super) fn activate(&self, active: Activated) {
        let mut state = self.lock();
        state.active = Some(active);
        state.fresh = true;
        drop(state);
        self.wake_worker();
    }

    /// Hands queues to the backend that go on from where a saved device was; before the worker starts.
    pub(super) fn resume(&self, active: Activated) {
        let mut state = self.lock();
        state.active = Some(active);
        state.fresh = true;
        state.resumed = true;
    }

    /// Takes the queues away. When this returns the backend doesn't touch guest memory any more.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        state.active = None;
        state.fresh = false;
        state.reset_pending = true;
        self.interrupt.clear();
        drop(state);
        self.wake_worker();
    }

    /// Makes it as new, for another device. Neither register face nor worker of the last one may be left.
    pub(crate) fn clear(&self) {
        *self.lock() = SlotState::default();
        self.interrupt.clear();
        self.registers.show_placeholder();
    }

    fn wake_worker(&self) {
        // The only failure is a full counter: then the worker is about to wake anyway.
        let _ = self.wake.write(1);
    }
}

fn eventfd() -> std::io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}
