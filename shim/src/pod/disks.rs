//! Disks of a running pod: from the host's block device to the guest's.

use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_vmm_protocol::{AttachDisk, DISK_SLOTS, Request};

use super::Pod;
use super::agent::AgentError;
use super::machine::MachineError;
use crate::error::{Classify, Code, chain};
use crate::host::disk::OpenDisk;
use crate::spec::{DeviceNumber, DiskPlace};

/// Why a pod does not get a disk.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// It has as many as it can have.
    #[error("the pod has {DISK_SLOTS} block devices already, which is as many as it can have")]
    NoSlot,
    /// The VMM does not take it.
    #[error("can't put the block device {}:{} into the pod", .number.major, .number.minor)]
    Machine {
        /// Which one.
        number: DeviceNumber,
        /// Why not.
        #[source]
        source: MachineError,
    },
    /// The guest does not take it.
    #[error("the guest does not take the block device {}:{}", .number.major, .number.minor)]
    Guest {
        /// Which one.
        number: DeviceNumber,
        /// Why not.
        #[source]
        source: AgentError,
    },
}

impl Classify for AttachError {
    fn code(&self) -> Code {
        match self {
            AttachError::NoSlot => Code::RESOURCE_EXHAUSTED,
            AttachError::Machine { source, .. } => source.code(),
            AttachError::Guest { source, .. } => source.code(),
        }
    }
}

/// A disk in a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttachedDisk {
    slot: u8,
    /// Its numbers.
    pub place: DiskPlace,
}

/// Which slots are taken.
#[derive(Debug, Default)]
pub(super) struct Slots(Mutex<[bool; DISK_SLOTS as usize]>);

impl Slots {
    fn take(&self) -> Option<u8> {
        let mut taken = self.lock();
        let slot = taken.iter().position(|taken| !taken)?;
        taken[slot] = true;
        u8::try_from(slot).ok()
    }

    fn give_back(&self, slot: u8) {
        self.lock()[usize::from(slot)] = false;
    }

    fn lock(&self) -> MutexGuard<'_, [bool; DISK_SLOTS as usize]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pod {
    /// Gives the guest disks, all or none.
    pub async fn attach_disks(&self, disks: &[OpenDisk]) -> Result<Vec<AttachedDisk>, AttachError> {
        let mut attached = Vec::with_capacity(disks.len());
        for disk in disks {
            match self.attach_disk(disk).await {
                Ok(disk) => attached.push(disk),
                Err(error) => {
                    self.detach_disks(&attached).await;
                    return Err(error);
                }
            }
        }
        Ok(attached)
    }

    async fn attach_disk(&self, disk: &OpenDisk) -> Result<AttachedDisk, AttachError> {
        let number = disk.number;
        let slot = self.disk_slots.take().ok_or(AttachError::NoSlot)?;
        let request = Request::AttachDisk(AttachDisk {
            slot,
            read_only: disk.read_only,
            block_size: disk.block_size,
            serial: format!("{}:{}", number.major, number.minor),
        });
        if let Err(source) = self.control.request("AttachDisk", &request, &[disk.file.as_fd()]).await {
            self.disk_slots.give_back(slot);
            return Err(AttachError::Machine { number, source });
        }
        match self.agent.add_disk(slot).await {
            Ok(guest) => Ok(AttachedDisk { slot, place: DiskPlace { host: number, guest } }),
            Err(source) => {
                self.take_out(slot).await;
                Err(AttachError::Guest { number, source })
            }
        }
    }

    /// Takes disks away from the guest; what fails is logged, since the pod's end will do it in any case.
    pub async fn detach_disks(&self, disks: &[AttachedDisk]) {
        for AttachedDisk { slot, place } in disks {
            if let Err(error) = self.agent.remove_disk(*slot).await {
                let DeviceNumber { major, minor } = place.host;
                log::warn!(
                    "the guest does not let go of the block device {major}:{minor}: {}",
                    chain(&error)
                );
            }
            self.take_out(*slot).await;
        }
    }

    /// Has the VMM close the disk in a slot.
    async fn take_out(&self, slot: u8) {
        match self.control.request("DetachDisk", &Request::DetachDisk { slot }, &[]).await {
            Ok(()) => self.disk_slots.give_back(slot),
            Err(error) => log::error!("a block device stays in the pod for now: {}", chain(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_bounded_and_used_again() {
        let slots = Slots::default();
        let all: Vec<u8> = (0..DISK_SLOTS).filter_map(|_| slots.take()).collect();
        assert_eq!(all, Vec::from_iter(0..DISK_SLOTS));
        assert_eq!(slots.take(), None);
        slots.give_back(3);
        assert_eq!(slots.take(), Some(3));
    }
}
