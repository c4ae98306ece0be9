//! Devices that come while the machine runs.

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, check_serial};

/// How many devices a running machine can be given, beside those that it starts with.
pub const DEVICE_SLOTS: u8 = 10;

/// The most queue pairs of a network interface.
pub const MAX_QUEUE_PAIRS: u8 = 4;

/// The largest disk that is made of parts: what a file can be.
const MAX_SIZE: u64 = i64::MAX as u64;

/// The least that an interface can send at once, in bytes without the Ethernet header (virtio 1.2, section 5.1.4).
const MIN_MTU: u16 = 68;

/// The most files that one disk can be made of, each with a descriptor.
pub const MAX_PARTS: usize = 128;

/// What the parts of a disk begin and end at: a multiple of this many bytes.
pub const PART_ALIGNMENT: u64 = 4096;

/// A disk for a running machine.
///
/// With it comes its descriptor; or as many as it has [`parts`](AttachDisk::parts), which follow each other on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachDisk {
    /// Where it goes, from 0 and below [`DEVICE_SLOTS`].
    pub slot: u8,
    /// What hangs if it does.
    pub role: DiskRole,
    /// As in [`crate::BlockConfig`].
    pub read_only: bool,
    /// As in [`crate::BlockConfig`].
    pub serial: String,
    /// Size of a logical block in bytes: a power of two from 512 to 4096.
    pub block_size: u32,
    /// How many bytes of the disk each file takes up, multiples of [`PART_ALIGNMENT`]; a file that ends before is followed by
    /// zeroes. Only for disks that are read-only. None: the disk is one file, and as large.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<u64>,
}

/// What a disk is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskRole {
    /// Root file systems, without which no program starts.
    Root,
    /// A volume: only who uses it waits for it.
    Volume,
}

/// A network interface for a running machine (virtio 1.2, section 5.1).
///
/// With it come as many descriptors as it has queue pairs. Each is a queue of the same tap device: non-blocking, without
/// packet information, with a header of 12 bytes (`struct virtio_net_hdr_v1`, little-endian) before each packet, and with the
/// offloads of [`NetOffloads`] set. The VMM never changes a tap: it offers the guest exactly what is set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachNet {
    /// Where it goes, from 0 and below [`DEVICE_SLOTS`].
    pub slot: u8,
    /// The address that the guest gives its interface.
    pub mac: [u8; 6],
    /// The most bytes of a packet without the Ethernet header.
    pub mtu: u16,
    /// From 1 to [`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u8,
    /// What may be left undone in packets of either direction.
    pub offloads: NetOffloads,
}

/// Work on packets that one side of a network interface may leave to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetOffloads {
    /// Checksums, and the segmentation of TCP: `TUN_F_CSUM`, `TUN_F_TSO4` and `TUN_F_TSO6` are set.
    pub checksum_and_tso: bool,
    /// The segmentation of UDP: `TUN_F_USO4` and `TUN_F_USO6` are set, which Linux knows since 6.2. Only with the others.
    pub uso: bool,
}

impl AttachDisk {
    /// Checks every limit, and that `fd_count` descriptors are what it needs.
    pub fn validate(&self, fd_count: usize) -> Result<(), ConfigError> {
        check_slot(self.slot)?;
        if !matches!(self.block_size, 512 | 1024 | 2048 | 4096) {
            return Err(ConfigError::BlockSize(self.block_size));
        }
        let count = self.parts.len();
        if count > MAX_PARTS || fd_count != count.max(1) || (count > 0 && !self.read_only) {
            return Err(ConfigError::Parts { parts: count, files: fd_count });
        }
        let mut size = 0u64;
        for &part in &self.parts {
            size =
                size.checked_add(part).filter(|&size| size <= MAX_SIZE).ok_or(ConfigError::PartSize(part))?;
            if part == 0 || !part.is_multiple_of(PART_ALIGNMENT) {
                return Err(ConfigError::PartSize(part));
            }
        }
        check_serial(&self.serial)
    }
}

impl AttachNet {
    /// Checks every limit, and that `fd_count` descriptors are what it needs.
    pub fn validate(&self, fd_count: usize) -> Result<(), ConfigError> {
        check_slot(self.slot)?;
        if !(1..=MAX_QUEUE_PAIRS).contains(&self.queue_pairs) {
            return Err(ConfigError::QueuePairs(self.queue_pairs));
        }
        if usize::from(self.queue_pairs) != fd_count {
            return Err(ConfigError::TapQueues { wanted: self.queue_pairs, count: fd_count });
        }
        if self.mtu < MIN_MTU {
            return Err(ConfigError::Mtu(self.mtu));
        }
        if self.mac == [0; 6] || self.mac[0] & 1 != 0 {
            return Err(ConfigError::Mac(self.mac));
        }
        if self.offloads.uso && !self.offloads.checksum_and_tso {
            return Err(ConfigError::UsoAlone);
        }
        Ok(())
    }
}

fn check_slot(slot: u8) -> Result<(), ConfigError> {
    if slot >= DEVICE_SLOTS { Err(ConfigError::Slot(slot)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_that_cannot_be_attached_are_refused() {
        let disk = AttachDisk {
            slot: 9,
            role: DiskRole::Volume,
            read_only: false,
            serial: String::new(),
            block_size: 4096,
            parts: Vec::new(),
        };
        assert_eq!(disk.validate(1), Ok(()));
        assert_eq!(AttachDisk { slot: 10, ..disk.clone() }.validate(1), Err(ConfigError::Slot(10)));
        assert_eq!(
            AttachDisk { block_size: 513, ..disk.clone() }.validate(1),
            Err(ConfigError::BlockSize(513))
        );
        assert_eq!(AttachDisk { serial: "x".repeat(21), ..disk }.validate(1), Err(ConfigError::Serial(21)));
    }

    #[test]
    fn parts_are_whole_pages_of_read_only_disks() {
        let disk = |parts: &[u64]| AttachDisk {
            slot: 0,
            role: DiskRole::Root,
            read_only: true,
            serial: String::new(),
            block_size: 512,
            parts: parts.to_vec(),
        };
        assert_eq!(disk(&[4096, 8192]).validate(2), Ok(()));
        assert_eq!(disk(&[4096; MAX_PARTS]).validate(MAX_PARTS), Ok(()));
        let counts = |parts, files| Err(ConfigError::Parts { parts, files });
        assert_eq!(disk(&[4096, 8192]).validate(1), counts(2, 1));
        assert_eq!(
            disk(&[4096; MAX_PARTS + 1]).validate(MAX_PARTS + 1),
            counts(MAX_PARTS + 1, MAX_PARTS + 1)
        );
        assert_eq!(disk(&[]).validate(0), counts(0, 0));
        assert_eq!(AttachDisk { read_only: false, ..disk(&[4096]) }.validate(1), counts(1, 1));
        for wrong in [0, 512, 4097, u64::MAX - 4095] {
            assert_eq!(disk(&[4096, wrong]).validate(2), Err(ConfigError::PartSize(wrong)), "{wrong}");
        }
    }

    #[test]
    fn interfaces_that_cannot_be_attached_are_refused() {
        let net = AttachNet {
            slot: 9,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            queue_pairs: 4,
            offloads: NetOffloads { checksum_and_tso: true, uso: true },
        };
        assert_eq!(net.validate(4), Ok(()));
        let alone = NetOffloads { checksum_and_tso: false, uso: true };
        let cases = [
            (AttachNet { slot: 10, ..net.clone() }, 4, ConfigError::Slot(10)),
            (AttachNet { queue_pairs: 0, ..net.clone() }, 0, ConfigError::QueuePairs(0)),
            (AttachNet { queue_pairs: 5, ..net.clone() }, 5, ConfigError::QueuePairs(5)),
            (net.clone(), 3, ConfigError::TapQueues { wanted: 4, count: 3 }),
            (AttachNet { mtu: 67, ..net.clone() }, 4, ConfigError::Mtu(67)),
            (AttachNet { mac: [0; 6], ..net.clone() }, 4, ConfigError::Mac([0; 6])),
            (AttachNet { mac: [0xff; 6], ..net.clone() }, 4, ConfigError::Mac([0xff; 6])),
            (AttachNet { offloads: alone, ..net }, 4, ConfigError::UsoAlone),
        ];
        for (net, fds, error) in cases {
            assert_eq!(net.validate(fds), Err(error));
        }
    }
}
