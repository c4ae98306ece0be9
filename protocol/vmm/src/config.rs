//! What a virtual machine is made of.

use serde::{Deserialize, Serialize};

use crate::attach::{DEVICE_SLOTS, MAX_PARTS, MAX_QUEUE_PAIRS, PART_ALIGNMENT};

/// The position of a file descriptor among those of the packet that names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u8);

/// The most vCPUs a virtual machine can have.
pub const MAX_VCPUS: u8 = 16;

/// The least guest memory that the guest kernel boots in, in MiB.
pub const MIN_MEMORY_MIB: u32 = 64;

/// The most guest memory, in MiB: 1 TiB.
const MAX_MEMORY_MIB: u32 = 1024 * 1024;

/// The first vsock context id that is a guest's (virtio 1.2, section 5.10.4).
pub const FIRST_GUEST_CID: u32 = 3;

/// Marks pages that guests write to, in a working set's file.
pub const PAGES_WRITTEN: u32 = 1 << 31;

/// What the VMM has to know to get ready for any guest of a size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrepareConfig {
    /// `/dev/kvm`, open for reading and writing.
    pub kvm: FdIndex,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest memory in MiB, at least [`MIN_MEMORY_MIB`].
    pub memory_mib: u32,
    /// What guest memory is made of.
    pub memory: MemorySource,
    /// With a template's memory: the list of the pages that its guests are known to use first, open for reading. Entries of 8
    /// bytes, two little-endian numbers of 4 bytes each: the number of the first page in the memory file, with
    /// [`PAGES_WRITTEN`] set if guests write to them, and the number of pages.
    pub working_set: Option<FdIndex>,
}

/// Everything else the VMM needs to boot a guest; each resource is a descriptor that came with the message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The guest kernel: an ELF `vmlinux` or a bzImage, open for reading.
    pub kernel: FdIndex,
    /// Kernel parameters after those that the VMM sets for its own devices.
    pub cmdline: String,
    /// Where the guest's console output goes (a pipe's write end or a file). Without it output is dropped.
    pub console: Option<FdIndex>,
    /// Block devices, `vda` first.
    pub disks: Vec<BlockConfig>,
    /// File systems of the pod's file server.
    pub fs: Vec<FsConfig>,
    /// The vsock device.
    pub vsock: VsockConfig,
}

/// What guest memory is made of.
///
/// A file's first byte is the guest's first; the ranges of the guest's memory map follow each other in the file without
/// gaps. Its size must be that of the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemorySource {
    /// Zeroes that belong to this machine alone.
    Anonymous,
    /// A file that is written through: a template in the making. Open for reading and writing.
    Shared(FdIndex),
    /// A template's memory file: what the guest changes is its own, everything else is shared. Open for reading.
    Private(FdIndex),
}

/// A machine that goes on from where [`crate::Request::Save`] left one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// The machine. Devices and the vsock context id (which means nothing outside of one machine) must
    /// be those of the saved one, and so must the size that was prepared for. Its memory is [`MemorySource::Private`]. The kernel and the command line are in
    /// memory already: neither is looked at, and `kernel` may name any descriptor.
    ///
    /// A vsock connection that the guest had opened to one of the `guest_streams` ports goes on with the given stream.
    pub config: VmConfig,
    /// The file that [`crate::Request::Save`] wrote, open for reading.
    pub state: FdIndex,
}

/// One virtio block device (virtio 1.2, section 5.2).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    /// A regular file or a block device with raw contents; its format is never probed.
    pub file: FdIndex,
    /// Refuse writes in the VMM, whatever the guest asks.
    pub read_only: bool,
    /// What the guest reads as the device's serial (`VIRTIO_BLK_T_GET_ID`); at most 20 bytes.
    pub serial: String,
}

/// A virtio file system device (virtio 1.2, section 5.11).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// The VMM's end of one of the file server's sockets (see [`crate::FUSE_FD`]).
    pub server: FdIndex,
    /// The tag the guest mounts it by; 1 to 36 bytes.
    pub tag: String,
}

/// The virtio socket device (virtio 1.2, section 5.10).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, [`FIRST_GUEST_CID`] or more.
    pub guest_cid: u32,
    /// The only connections that the guest may open to the host: each once, to the given port.
    pub guest_streams: Vec<GuestStream>,
}

/// A host port that the guest may connect to once, and the socket that the connection is joined to.
///
/// The host's end may be written to before the guest connects: the bytes wait in the socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestStream {
    /// Port on the host side (context id 2).
    pub port: u32,
    /// One end of a `SOCK_STREAM` socket pair.
    pub stream: FdIndex,
}

/// A [`VmConfig`] that no virtual machine can be made from.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Number of vCPUs out of range.
    #[error("{0} vCPUs asked for: 1 to {MAX_VCPUS} are possible")]
    Vcpus(u8),
    /// Too little or too much memory.
    #[error("{0} MiB of guest memory asked for: {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB are possible")]
    Memory(u32),
    /// The file system tag is empty or too long.
    #[error("the file system tag has {0} bytes: 1 to 36 are possible")]
    Tag(usize),
    /// A disk's serial is too long.
    #[error("a disk's serial has {0} bytes: at most 20 are possible")]
    Serial(usize),
    /// There is no such slot.
    #[error("there is no slot {0}: the last one is {last}", last = DEVICE_SLOTS - 1)]
    Slot(u8),
    /// A size of logical blocks that no guest knows.
    #[error("logical blocks of {0} bytes asked for: 512, 1024, 2048 and 4096 are possible")]
    BlockSize(u32),
    /// Not one descriptor for each part, too many parts, or a disk for writing that has any.
    #[error(
        "a disk of {parts} parts came with {files} descriptors: it has one for each, {MAX_PARTS} at most, and is read-only if it has parts"
    )]
    Parts {
        /// How many it has.
        parts: usize,
        /// How many came.
        files: usize,
    },
    /// A part of a disk that begins or ends within a page, or is too large.
    #[error("a part of a disk has {0} bytes: multiples of {PART_ALIGNMENT} are possible, up to 8 EiB in all")]
    PartSize(u64),
    /// Too few or too many queue pairs.
    #[error("{0} queue pairs asked for: 1 to {MAX_QUEUE_PAIRS} are possible")]
    QueuePairs(u8),
    /// Not one descriptor for each queue pair.
    #[error("an interface of {wanted} queue pairs came with {count} descriptors")]
    TapQueues {
        /// How many it needs.
        wanted: u8,
        /// How many came.
        count: usize,
    },
    /// Packets so small that no guest can use them.
    #[error("an interface with an MTU of {0} bytes asked for: at least 68 are needed")]
    Mtu(u16),
    /// No address of one interface.
    #[error("{0:02x?} is no unicast Ethernet address")]
    Mac([u8; 6]),
    /// Segmentation of UDP without checksums.
    #[error("UDP segmentation asked for without checksums and TCP segmentation")]
    UsoAlone,
    /// A reserved context id.
    #[error("{0} is a reserved vsock context id: use 3 or more")]
    Cid(u32),
    /// An index that points past the descriptors that came along.
    #[error("descriptor {index} is named but only {count} came with the message")]
    MissingFd {
        /// The index.
        index: u8,
        /// How many came.
        count: usize,
    },
}

impl PrepareConfig {
    /// A size, and memory of the machine's own.
    pub fn anonymous(kvm: FdIndex, vcpus: u8, memory_mib: u32) -> Self {
        PrepareConfig { kvm, vcpus, memory_mib, memory: MemorySource::Anonymous, working_set: None }
    }

    /// Checks both limits, and that each descriptor index is below `fd_count`.
    pub fn validate(&self, fd_count: usize) -> Result<(), ConfigError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(ConfigError::Vcpus(self.vcpus));
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&self.memory_mib) {
            return Err(ConfigError::Memory(self.memory_mib));
        }
        let memory = match self.memory {
            MemorySource::Anonymous => None,
            MemorySource::Shared(file) | MemorySource::Private(file) => Some(file),
        };
        check_indices([self.kvm].into_iter().chain(memory).chain(self.working_set), fd_count)
    }
}

fn check_indices(mut fds: impl Iterator<Item = FdIndex>, fd_count: usize) -> Result<(), ConfigError> {
    match fds.find(|fd| usize::from(fd.0) >= fd_count) {
        Some(fd) => Err(ConfigError::MissingFd { index: fd.0, count: fd_count }),
        None => Ok(()),
    }
}

pub(crate) fn check_serial(serial: &str) -> Result<(), ConfigError> {
    if serial.len() > 20 { Err(ConfigError::Serial(serial.len())) } else { Ok(()) }
}

impl VmConfig {
    /// A kernel with its parameters, and no devices but those that every machine has.
    pub fn new(kernel: FdIndex, cmdline: impl Into<String>) -> Self {
        VmConfig {
            kernel,
            cmdline: cmdline.into(),
            console: None,
            disks: Vec::new(),
            fs: Vec::new(),
            vsock: VsockConfig { guest_cid: FIRST_GUEST_CID, guest_streams: Vec::new() },
        }
    }

    /// Checks every limit, and that each descriptor index is below `fd_count`.
    pub fn validate(&self, fd_count: usize) -> Result<(), ConfigError> {
        if let Some(fs) = self.fs.iter().find(|fs| !(1..=36).contains(&fs.tag.len())) {
            return Err(ConfigError::Tag(fs.tag.len()));
        }
        self.disks.iter().try_for_each(|disk| check_serial(&disk.serial))?;
        if self.vsock.guest_cid < FIRST_GUEST_CID {
            return Err(ConfigError::Cid(self.vsock.guest_cid));
        }
        check_indices(self.fds(), fd_count)
    }

    fn fds(&self) -> impl Iterator<Item = FdIndex> + '_ {
        [self.kernel]
            .into_iter()
            .chain(self.console)
            .chain(self.disks.iter().map(|disk| disk.file))
            .chain(self.fs.iter().map(|fs| fs.server))
            .chain(self.vsock.guest_streams.iter().map(|guest| guest.stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        let disk = BlockConfig { file: FdIndex(1), read_only: true, serial: "image".into() };
        VmConfig { disks: vec![disk], ..VmConfig::new(FdIndex(0), "") }
    }

    fn preparation() -> PrepareConfig {
        PrepareConfig::anonymous(FdIndex(0), MAX_VCPUS, 128)
    }

    #[test]
    fn a_sound_config_passes() {
        assert_eq!(config().validate(2), Ok(()));
        assert_eq!(preparation().validate(1), Ok(()));
    }

    #[test]
    fn limits_are_enforced() {
        let cases = [
            (
                VmConfig { fs: vec![FsConfig { server: FdIndex(0), tag: "x".repeat(37) }], ..config() },
                ConfigError::Tag(37),
            ),
            (
                VmConfig { vsock: VsockConfig { guest_cid: 2, guest_streams: Vec::new() }, ..config() },
                ConfigError::Cid(2),
            ),
        ];
        for (config, error) in cases {
            assert_eq!(config.validate(2), Err(error));
        }
        for vcpus in [0, MAX_VCPUS + 1] {
            let config = PrepareConfig { vcpus, ..preparation() };
            assert_eq!(config.validate(1), Err(ConfigError::Vcpus(vcpus)));
        }
        let config = PrepareConfig { memory_mib: 1, ..preparation() };
        assert_eq!(config.validate(1), Err(ConfigError::Memory(1)));
    }

    #[test]
    fn an_index_past_the_descriptors_is_refused() {
        assert_eq!(config().validate(1), Err(ConfigError::MissingFd { index: 1, count: 1 }));
        let config = PrepareConfig { memory: MemorySource::Private(FdIndex(9)), ..preparation() };
        assert_eq!(config.validate(2), Err(ConfigError::MissingFd { index: 9, count: 2 }));
        let config = PrepareConfig { working_set: Some(FdIndex(1)), ..preparation() };
        assert_eq!(config.validate(1), Err(ConfigError::MissingFd { index: 1, count: 1 }));
        assert_eq!(preparation().validate(0), Err(ConfigError::MissingFd { index: 0, count: 0 }));
    }

    #[test]
    fn an_unknown_field_is_refused() {
        let mut json = serde_json::to_value(config()).unwrap();
        json["surprise"] = true.into();
        assert!(serde_json::from_value::<VmConfig>(json).is_err());
    }
}
