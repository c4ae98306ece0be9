//! Disks of a running pod: from the host's block device or image to the guest's block device, and what is mounted from it.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_agent_protocol::DISKS_DIR;
use bulkhead_vmm_protocol::{AttachDisk, Request};
use tokio::time::Instant;

use super::Pod;
use super::agent::AgentError;
use super::machine::MachineError;
use super::slots::MAX_DISKS;
use crate::error::{Classify, Code, chain};
use crate::host::disk::OpenDisk;
use crate::spec::DeviceNumber;

/// How long the guest may take to write back what it has for all disks of a container.
const DETACH_LIMIT: Duration = Duration::from_secs(90);

/// Why a pod does not get a disk.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// It has as many as it can have.
    #[error(
        "the pod has no slot left for a disk: it can have {MAX_DISKS}, less those that network interfaces took"
    )]
    NoSlot,
    /// The VMM does not take it.
    #[error("can't put {path} into the pod")]
    Machine {
        /// Which one.
        path: PathBuf,
        /// Why not.
        #[source]
        source: MachineError,
    },
    /// The guest does not take it.
    #[error("the guest does not take {path}")]
    Guest {
        /// Which one.
        path: PathBuf,
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

/// A file system on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSystem {
    /// Its type.
    pub kind: String,
    /// How it is to be mounted, in the words of mount(8).
    pub options: Vec<String>,
}

/// A disk in a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachedDisk {
    slot: u8,
    /// Where it was found on the host.
    path: PathBuf,
    /// Its number in the guest.
    pub number: DeviceNumber,
}

impl AttachedDisk {
    /// Where the file system on it is mounted in the guest, if that was asked for.
    pub fn mount_point(&self) -> PathBuf {
        PathBuf::from(format!("{DISKS_DIR}/{}", self.slot))
    }
}

impl Pod {
    /// Gives the guest a disk, and has it mount the file system on it if there is one to be mounted.
    pub async fn attach_disk(
        &self,
        disk: &OpenDisk,
        file_system: Option<&FileSystem>,
    ) -> Result<AttachedDisk, AttachError> {
        let path = disk.path.clone();
        let slot = self.slots.take_for_disk().ok_or(AttachError::NoSlot)?;
        let request = Request::AttachDisk(AttachDisk {
            slot,
            read_only: disk.read_only,
            block_size: disk.block_size,
            serial: format!("slot{slot}"),
        });
        if let Err(source) = self.control.request("AttachDisk", &request, &[disk.file.as_fd()]).await {
            self.slots.give_back(slot);
            return Err(AttachError::Machine { path, source });
        }
        match self.agent.add_disk(slot, file_system).await {
            Ok(number) => Ok(AttachedDisk { slot, path, number }),
            Err(source) => {
                self.take_out(slot).await;
                Err(AttachError::Guest { path, source })
            }
        }
    }

    /// Takes disks away from the guest; what fails is logged, since the pod's end will do it in any case.
    pub async fn detach_disks(&self, disks: &[AttachedDisk]) {
        let deadline = Instant::now() + DETACH_LIMIT;
        for AttachedDisk { slot, path, .. } in disks {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Err(error) = self.agent.remove_disk(*slot, left).await {
                log::warn!("the guest does not let go of {}: {}", path.display(), chain(&error));
            }
            self.take_out(*slot).await;
        }
    }

    /// Has the VMM close what is behind the device in a slot.
    pub(super) async fn take_out(&self, slot: u8) {
        match self.control.request("DetachDevice", &Request::DetachDevice { slot }, &[]).await {
            Ok(()) => self.slots.give_back(slot),
            Err(error) => log::error!("a device stays in the pod for now: {}", chain(&error)),
        }
    }
}
