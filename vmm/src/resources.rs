//! What the shim handed over: descriptors become devices here, before anything is built.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use bulkhead_vmm_protocol::{FdIndex, MemorySource, PrepareConfig, VmConfig};

use crate::devices::VirtioDevice;
use crate::devices::balloon::Balloon;
use crate::devices::blk::{Block, SECTOR};
use crate::devices::console::Console;
use crate::devices::fs::FileSystem;
use crate::devices::parts::Parts;
use crate::devices::rng::Rng;
use crate::devices::vsock::{Vsock, VsockConnector};
use crate::layout::{DEVICE_SLOTS, MAX_DEVICES};
use crate::memory::Memory;

/// What can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResourceError {
    /// The configuration breaks a limit.
    #[error("it breaks a limit")]
    Config(#[from] bulkhead_vmm_protocol::ConfigError),
    /// A descriptor is used for two things.
    #[error("descriptor {0} is named twice")]
    NamedTwice(u8),
    /// More devices than interrupts.
    #[error("{0} devices asked for: at most {max} are possible", max = MAX_DEVICES - DEVICE_SLOTS)]
    TooManyDevices(usize),
    /// A disk can't be used.
    #[error("disk {index} ({serial}) can't be used")]
    Disk {
        /// Its position in the configuration.
        index: usize,
        /// Its serial.
        serial: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another device can't be made.
    #[error("the {what} can't be used")]
    Device {
        /// Which one.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Handles to devices that the control thread talks to.
pub(crate) struct Handles {
    /// Opens connections to the guest.
    pub vsock: VsockConnector,
}

/// What a machine is built from.
pub(crate) struct Resources {
    /// The kernel to boot, or the state to restore.
    pub start: File,
    /// In the order of their windows; disks in the order of the configuration.
    pub devices: Vec<Box<dyn VirtioDevice>>,
    pub handles: Handles,
}

/// Descriptors of which each can be taken once.
struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    fn take(&mut self, index: FdIndex) -> Result<OwnedFd, ResourceError> {
        self.0.get_mut(usize::from(index.0)).and_then(Option::take).ok_or(ResourceError::NamedTwice(index.0))
    }
}

/// What a machine is prepared with.
pub(crate) struct Preparation {
    pub kvm: OwnedFd,
    pub memory: Memory,
    pub working_set: Option<File>,
}

impl Preparation {
    /// Takes the descriptors of a `Prepare` request.
    pub(crate) fn take(config: &PrepareConfig, fds: Vec<OwnedFd>) -> Result<Self, ResourceError> {
        config.validate(fds.len())?;
        let mut fds = Fds(fds.into_iter().map(Some).collect());
        Ok(Preparation {
            kvm: fds.take(config.kvm)?,
            memory: match config.memory {
                MemorySource::Anonymous => Memory::Anonymous,
                MemorySource::Shared(file) => Memory::Shared(File::from(fds.take(file)?)),
                MemorySource::Private(file) => Memory::Private(File::from(fds.take(file)?)),
            },
            working_set: config.working_set.map(|file| fds.take(file)).transpose()?.map(File::from),
        })
    }
}

impl Resources {
    /// Turns descriptors into devices. What the configuration doesn't name is closed. `start` is the kernel, or the
    /// state of a saved machine.
    pub(crate) fn take(config: &VmConfig, start: FdIndex, fds: Vec<OwnedFd>) -> Result<Self, ResourceError> {
        config.validate(fds.len())?;
        let mut fds = Fds(fds.into_iter().map(Some).collect());
        let device_failed = |what| move |source| ResourceError::Device { what, source };

        let start = File::from(fds.take(start)?);
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();

        let output = config.console.map(|index| fds.take(index)).transpose()?;
        devices.push(Box::new(Console::new(output).map_err(device_failed("console's output"))?));
        devices.push(Box::new(Rng));
        let streams = config.vsock.guest_streams.iter();
        let streams = streams
            .map(|guest| Ok((guest.port, fds.take(guest.stream)?)))
            .collect::<Result<_, ResourceError>>()?;
        let (vsock, connector) =
            Vsock::new(config.vsock.guest_cid, streams).map_err(device_failed("vsock device"))?;
        devices.push(Box::new(vsock));
        for fs in &config.fs {
            let server = fds.take(fs.server)?;
            devices.push(Box::new(
                FileSystem::new(&fs.tag, server).map_err(device_failed("file system device"))?,
            ));
        }
        for (index, disk) in config.disks.iter().enumerate() {
            let file = fds.take(disk.file)?;
            let whole = Parts::whole(file).map_err(|source| ResourceError::Disk {
                index,
                serial: disk.serial.clone(),
                source,
            })?;
            devices.push(Box::new(Block::new(whole, disk.read_only, &disk.serial, SECTOR as u32)));
        }
        devices.push(Box::new(Balloon::default()));
        if devices.len() > MAX_DEVICES - DEVICE_SLOTS {
            return Err(ResourceError::TooManyDevices(devices.len()));
        }
        Ok(Resources { start, devices, handles: Handles { vsock: connector } })
    }
}
