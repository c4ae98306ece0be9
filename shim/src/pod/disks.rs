//! Disks of a running pod: from the host's block device or image to the guest's block device, and what is mounted from it.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_agent_protocol as api;
use bulkhead_agent_protocol::{DISKS_DIR, LAYERS_DIR};
use bulkhead_vmm_protocol::{AttachDisk, DiskRole, Request};
use tokio::time::Instant;

use super::Pod;
use super::agent::AgentError;
use super::machine::MachineError;
use super::slots::MAX_DISKS;
use crate::error::{Classify, Code, chain};
use crate::host::disk::OpenDisk;
use crate::host::erofs::{EROFS, Layer};
use crate::host::ext4;
use crate::spec::DeviceNumber;

/// How long the guest may take to write back what it has for all disks of a container.
const DETACH_LIMIT: Duration = Duration::from_secs(90);

/// Why a pod does not get a disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
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
pub(crate) struct FileSystem {
    /// Its type.
    pub kind: String,
    /// How it is to be mounted, in the words of mount(8).
    pub options: Vec<String>,
}

/// The overlay that the guest makes of layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Overlay {
    /// Its upper and its working directory, in the guest; none if it can only be read.
    pub changes: Option<(String, String)>,
    /// Its further options.
    pub options: Vec<String>,
}

/// What a disk for changes is made as.
const EXT4: &str = "ext4";

/// Logical blocks of a disk that consists of files, in bytes.
const FILE_BLOCKS: u32 = 512;

/// A disk in a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AttachedDisk {
    slot: u8,
    /// Where it was found on the host.
    path: PathBuf,
    /// Its number in the guest.
    pub number: DeviceNumber,
}

impl AttachedDisk {
    /// Where the file system on it is mounted in the guest, if that was asked for.
    pub(crate) fn mount_point(&self) -> PathBuf {
        PathBuf::from(format!("{DISKS_DIR}/{}", self.slot))
    }

    /// Where in the guest the upper and the working directory of an overlay are, if that is what it is for.
    pub(crate) fn changes(&self) -> (String, String) {
        let place = |name: &str| format!("{LAYERS_DIR}/{}/changes/{name}", self.slot);
        (place(ext4::UPPER_NAME), place(ext4::WORK_NAME))
    }
}

/// What is to be put into a pod.
struct Order<'a> {
    /// What errors name.
    path: PathBuf,
    role: DiskRole,
    read_only: bool,
    block_size: u32,
    parts: Vec<u64>,
    files: Vec<BorrowedFd<'a>>,
}

impl Pod {
    /// How many more disks the pod may have for what of a container could be shared as files; the `others` that it asks for come
    /// first.
    pub(crate) fn room_for_roots(&self, others: usize) -> usize {
        self.slots.room_for_roots(others)
    }

    /// Gives the guest a disk, and has it mount the file system on it if there is one to be mounted.
    pub(crate) async fn attach_disk(
        &self,
        disk: &OpenDisk,
        file_system: Option<&FileSystem>,
    ) -> Result<AttachedDisk, AttachError> {
        let mut request = api::AddDiskRequest::default();
        if let Some(FileSystem { kind, options }) = file_system {
            request.file_system = kind.clone();
            request.options = options.clone();
        }
        let order = Order {
            path: disk.path.clone(),
            role: if file_system.is_some() { DiskRole::Root } else { DiskRole::Volume },
            read_only: disk.read_only,
            block_size: disk.block_size,
            parts: Vec::new(),
            files: vec![disk.file.as_fd()],
        };
        self.attach(order, request).await
    }

    /// Gives the guest a disk for what a container changes. It makes an overlay of that and `lower`, a directory of its own, or leaves
    /// that to whoever attaches layers.
    pub(crate) async fn attach_changes(
        &self,
        disk: &OpenDisk,
        lower: Option<&str>,
        options: &[String],
    ) -> Result<AttachedDisk, AttachError> {
        let request = api::AddDiskRequest {
            file_system: EXT4.to_owned(),
            options: ext4::MOUNT_OPTIONS.map(str::to_owned).to_vec(),
            overlay: protobuf::MessageField::some(api::Overlay {
                lower: lower.unwrap_or_default().to_owned(),
                upper: ext4::UPPER_NAME.to_owned(),
                work: ext4::WORK_NAME.to_owned(),
                options: options.to_vec(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let order = Order {
            path: disk.path.clone(),
            role: DiskRole::Root,
            read_only: false,
            block_size: disk.block_size,
            parts: Vec::new(),
            files: vec![disk.file.as_fd()],
        };
        self.attach(order, request).await
    }

    /// Gives the guest layers, from the uppermost down, as one disk, and has it mount them as `overlay` says.
    pub(crate) async fn attach_layers(
        &self,
        layers: &[Layer],
        overlay: &Overlay,
    ) -> Result<AttachedDisk, AttachError> {
        let request = api::AddDiskRequest {
            file_system: EROFS.to_owned(),
            // What a container may do with a file its mode says, as with a file in the shared tree.
            options: ["ro", "noacl"].map(str::to_owned).to_vec(),
            parts: layers.iter().map(|layer| layer.room).collect(),
            overlay: protobuf::MessageField::some(api::Overlay {
                upper: overlay.changes.as_ref().map(|(upper, _)| upper.clone()).unwrap_or_default(),
                work: overlay.changes.as_ref().map(|(_, work)| work.clone()).unwrap_or_default(),
                options: overlay.options.clone(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let order = Order {
            path: layers.first().map(|layer| layer.path.clone()).unwrap_or_default(),
            role: DiskRole::Root,
            read_only: true,
            block_size: FILE_BLOCKS,
            parts: request.parts.clone(),
            files: layers.iter().map(|layer| layer.file.as_fd()).collect(),
        };
        self.attach(order, request).await
    }

    async fn attach(
        &self,
        order: Order<'_>,
        mut request: api::AddDiskRequest,
    ) -> Result<AttachedDisk, AttachError> {
        let Order { path, role, read_only, block_size, parts, files } = order;
        let slot = self.slots.take_for_disk().ok_or(AttachError::NoSlot)?;
        let disk = AttachDisk { slot, role, read_only, block_size, serial: format!("slot{slot}"), parts };
        let attached = self.control.request("AttachDisk", &Request::AttachDisk(disk), &files).await;
        if let Err(source) = attached {
            self.slots.give_back(slot);
            return Err(AttachError::Machine { path, source });
        }
        request.slot = slot.into();
        match self.agent.add_disk(&request).await {
            Ok(number) => Ok(AttachedDisk { slot, path, number }),
            Err(source) => {
                self.take_out(slot).await;
                Err(AttachError::Guest { path, source })
            }
        }
    }

    /// Takes disks away from the guest; what fails is logged, since the pod's end will do it in any case.
    pub(crate) async fn detach_disks(&self, disks: &[AttachedDisk]) {
        let deadline = Instant::now() + DETACH_LIMIT;
        // The other way round: layers lie below changes that have come before.
        for AttachedDisk { slot, path, .. } in disks.iter().rev() {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Err(error) = self.agent.remove_disk(*slot, left).await {
                // What the end of the pod interrupts is no failure.
                let level = if *self.stopping.borrow() { log::Level::Debug } else { log::Level::Warn };
                log::log!(level, "the guest does not let go of {}: {}", path.display(), chain(&error));
            }
            self.take_out(*slot).await;
        }
    }

    /// Has the VMM close what is behind the device in a slot.
    pub(super) async fn take_out(&self, slot: u8) {
        match self.control.request("DetachDevice", &Request::DetachDevice { slot }, &[]).await {
            Ok(()) => self.slots.give_back(slot),
            Err(error) => {
                let level = if *self.stopping.borrow() { log::Level::Debug } else { log::Level::Error };
                log::log!(level, "a device stays in the pod for now: {}", chain(&error));
            }
        }
    }
}
