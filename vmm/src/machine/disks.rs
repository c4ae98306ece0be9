//! Disks that come and go while the machine runs.
//!
//! The guest knows a window for each slot from its boot on, so from the template too. While a slot is free the window shows
//! a placeholder, which drivers leave alone; with a disk in it, the guest's kernel finds the disk when it is made to probe
//! the window once more. Wiring a slot costs calls to KVM, so it is done for the first disk and kept for later ones.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_vmm_protocol::{AttachDisk, ConfigError};
use kvm_ioctls::VmFd;

use super::{MachineError, host_failed};
use crate::bus::Bus;
use crate::device_loop::DeviceLoop;
use crate::devices::VirtioDevice;
use crate::devices::blk::Block;
use crate::devices::mmio::MmioTransport;
use crate::devices::slot::DeviceSlot;
use crate::devices::worker::DeviceWorker;
use crate::layout::DISK_SLOTS;
use crate::memory::SharedRam;
use crate::vm;

/// Why a disk can't be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The request breaks a limit.
    #[error("the request breaks a limit")]
    Config(#[from] ConfigError),
    /// There is a disk already.
    #[error("there is a disk in slot {0}")]
    Taken(u8),
    /// There is none, or no such slot.
    #[error("there is no disk in slot {0}")]
    Empty(u8),
    /// It can't be read.
    #[error("disk {serial} can't be used")]
    Unusable {
        /// Its serial.
        serial: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The host gives no eventfd, or KVM does not take it.
    #[error("slot {slot} can't be wired")]
    Wire {
        /// Which one.
        slot: u8,
        /// What failed.
        #[source]
        source: Box<MachineError>,
    },
    /// The device thread is busy with a request of the guest.
    #[error("the device thread does not let the disk in slot {0} go")]
    Stuck(u8),
    /// It would be part of the template.
    #[error("a machine that is to be saved takes no disks")]
    Template,
}

/// The slots of a machine.
pub(super) struct Disks {
    vm: Arc<VmFd>,
    ram: SharedRam,
    /// Number of the first slot's window.
    first: usize,
    slots: [Slot; DISK_SLOTS],
}

#[derive(Default)]
struct Slot {
    wired: Option<Arc<DeviceSlot>>,
    taken: bool,
}

impl Disks {
    /// Free slots behind the windows of `first` other devices.
    pub fn new(vm: Arc<VmFd>, ram: SharedRam, first: usize) -> Self {
        Disks { vm, ram, first, slots: Default::default() }
    }

    /// Puts a disk into a free slot.
    pub fn attach(
        &mut self,
        request: &AttachDisk,
        file: OwnedFd,
        bus: &Bus,
        devices: &DeviceLoop,
    ) -> Result<(), DiskError> {
        request.validate()?;
        let AttachDisk { slot: number, read_only, serial, block_size } = request;
        let (index, slot) = self.find(*number)?;
        if slot.taken {
            return Err(DiskError::Taken(*number));
        }
        let disk = Block::new(file, *read_only, serial, *block_size)
            .map_err(|source| DiskError::Unusable { serial: serial.clone(), source })?;
        let info = disk.info();
        let wired = match &slot.wired {
            Some(wired) => wired.clone(),
            None => {
                let failed = |source| DiskError::Wire { slot: *number, source: Box::new(source) };
                let wired = DeviceSlot::new(info.queue_sizes.len())
                    .map_err(|error| failed(host_failed("eventfds for a disk")(error)))?;
                vm::wire(&self.vm, index, std::slice::from_ref(&wired)).map_err(failed)?;
                wired
            }
        };
        let slot = &mut self.slots[usize::from(*number)];
        *slot = Slot { wired: Some(wired.clone()), taken: true };
        devices.add(index, DeviceWorker::new(Box::new(disk), wired.clone()));
        bus.set_device(index, Some(MmioTransport::new(info, wired, self.ram.clone())));
        Ok(())
    }

    /// Takes the disk out of a slot and closes it.
    pub fn detach(&mut self, number: u8, bus: &Bus, devices: &DeviceLoop) -> Result<(), DiskError> {
        let (index, slot) = self.find(number)?;
        let Some(wired) = slot.wired.clone().filter(|_| slot.taken) else {
            return Err(DiskError::Empty(number));
        };
        // First the guest can't reach it any more, then nobody serves it.
        bus.set_device(index, None);
        if !devices.remove(index) {
            return Err(DiskError::Stuck(number));
        }
        wired.clear();
        self.slots[usize::from(number)].taken = false;
        Ok(())
    }

    /// A slot and the number of its window.
    fn find(&self, number: u8) -> Result<(usize, &Slot), DiskError> {
        let slot = self.slots.get(usize::from(number)).ok_or(DiskError::Empty(number))?;
        Ok((self.first + usize::from(number), slot))
    }
}
