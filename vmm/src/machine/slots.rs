//! Devices that come and go while the machine runs: disks and network interfaces.
//!
//! The guest knows a window for each slot from its boot on, so from the template too. While a slot is free the window shows
//! a placeholder, which drivers leave alone; with a device in it, the guest's kernel finds the device when it is made to probe
//! the window once more. Wiring a slot costs calls to KVM, so it is done for the first device and kept for later ones,
//! whatever they are.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_vmm_protocol::{AttachDisk, AttachNet, ConfigError};
use kvm_ioctls::VmFd;

use super::{MachineError, host_failed};
use crate::bus::Bus;
use crate::device_threads::{DeviceThreads, Waits};
use crate::devices::VirtioDevice;
use crate::devices::blk::Block;
use crate::devices::mmio::MmioTransport;
use crate::devices::net::Net;
use crate::devices::parts::Parts;
use crate::devices::registers::RegisterMemory;
use crate::devices::slot::DeviceSlot;
use crate::devices::worker::DeviceWorker;
use crate::layout::DEVICE_SLOTS;
use crate::memory::SharedRam;
use crate::vm;

/// Why a device can't be attached or detached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SlotError {
    /// The request breaks a limit.
    #[error("the request breaks a limit")]
    Config(#[from] ConfigError),
    /// There is a device already.
    #[error("there is a device in slot {0}")]
    Taken(u8),
    /// There is none, or no such slot.
    #[error("there is no device in slot {0}")]
    Empty(u8),
    /// It can't be read.
    #[error("disk {serial} can't be used")]
    Disk {
        /// Its serial.
        serial: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A queue of a tap can't be used.
    #[error("the tap can't be used")]
    Tap(#[source] std::io::Error),
    /// The host gives no eventfd, or KVM does not take it.
    #[error("slot {slot} can't be wired")]
    Wire {
        /// Which one.
        slot: u8,
        /// What failed.
        #[source]
        source: Box<MachineError>,
    },
    /// The device's thread is busy with a request of the guest.
    #[error("the thread of the device in slot {0} does not let it go")]
    Stuck(u8),
    /// It would be part of the template.
    #[error("a machine that is to be saved takes no devices")]
    Template,
}

/// The slots of a machine.
pub(super) struct Slots {
    vm: Arc<VmFd>,
    ram: SharedRam,
    registers: Arc<RegisterMemory>,
    /// Number of the first slot's window.
    first: usize,
    slots: [Slot; DEVICE_SLOTS],
}

#[derive(Default)]
struct Slot {
    wired: Option<Arc<DeviceSlot>>,
    /// By which thread the device in it is served.
    taken: Option<Waits>,
}

impl Slots {
    /// Free slots behind the windows of `first` other devices.
    pub(crate) fn new(vm: Arc<VmFd>, ram: SharedRam, registers: Arc<RegisterMemory>, first: usize) -> Self {
        Slots { vm, ram, registers, first, slots: Default::default() }
    }

    /// Puts a disk into a free slot.
    pub(crate) fn attach_disk(
        &mut self,
        request: &AttachDisk,
        files: Vec<OwnedFd>,
        bus: &Bus,
        devices: &DeviceThreads,
    ) -> Result<(), SlotError> {
        request.validate(files.len())?;
        let AttachDisk { slot, role, read_only, serial, block_size, parts } = request;
        let make = || {
            let mut files = files.into_iter();
            let contents = match (parts.as_slice(), files.next()) {
                ([], Some(file)) => Parts::whole(file),
                (_, first) => {
                    Parts::follow_each_other(first.into_iter().chain(files).zip(parts.iter().copied()))
                }
            };
            let contents = contents.map_err(|source| SlotError::Disk { serial: serial.clone(), source })?;
            Ok(Block::new(contents, *read_only, serial, *block_size))
        };
        self.attach(*slot, (*role).into(), make, bus, devices)
    }

    /// Puts a network interface into a free slot.
    pub(crate) fn attach_net(
        &mut self,
        request: &AttachNet,
        queues: Vec<OwnedFd>,
        bus: &Bus,
        devices: &DeviceThreads,
    ) -> Result<(), SlotError> {
        request.validate(queues.len())?;
        let make = || Net::new(request, queues).map_err(SlotError::Tap);
        self.attach(request.slot, Waits::Never, make, bus, devices)
    }

    /// Puts what `make` makes into a free slot.
    fn attach<D: VirtioDevice + 'static>(
        &mut self,
        number: u8,
        waits: Waits,
        make: impl FnOnce() -> Result<D, SlotError>,
        bus: &Bus,
        devices: &DeviceThreads,
    ) -> Result<(), SlotError> {
        let (index, slot) = self.find(number)?;
        if slot.taken.is_some() {
            return Err(SlotError::Taken(number));
        }
        let device = make()?;
        let wired = match &slot.wired {
            Some(wired) => wired.clone(),
            None => {
                let failed = |source| SlotError::Wire { slot: number, source: Box::new(source) };
                let wired = DeviceSlot::reusable(self.registers.window(index))
                    .map_err(|error| failed(host_failed("eventfds for a device")(error)))?;
                vm::wire(&self.vm, index, std::slice::from_ref(&wired)).map_err(failed)?;
                wired
            }
        };
        self.slots[usize::from(number)] = Slot { wired: Some(wired.clone()), taken: Some(waits) };
        let info = device.info();
        devices.add(index, waits, DeviceWorker::new(Box::new(device), wired.clone()));
        bus.set_device(index, Some(MmioTransport::new(info, wired, self.ram.clone())));
        Ok(())
    }

    /// Takes the device out of a slot and closes what is behind it.
    pub(crate) fn detach(&mut self, number: u8, bus: &Bus, devices: &DeviceThreads) -> Result<(), SlotError> {
        let (index, slot) = self.find(number)?;
        let (Some(wired), Some(waits)) = (slot.wired.clone(), slot.taken) else {
            return Err(SlotError::Empty(number));
        };
        // First the guest can't reach it any more, then nobody serves it.
        bus.set_device(index, None);
        if !devices.remove(index, waits) {
            return Err(SlotError::Stuck(number));
        }
        wired.clear();
        self.slots[usize::from(number)].taken = None;
        Ok(())
    }

    /// A slot and the number of its window.
    fn find(&self, number: u8) -> Result<(usize, &Slot), SlotError> {
        let slot = self.slots.get(usize::from(number)).ok_or(SlotError::Empty(number))?;
        Ok((self.first + usize::from(number), slot))
    }
}
