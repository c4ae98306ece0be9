//! Virtio block device (virtio 1.2, section 5.2) on raw files or a host block device.
//!
//! Requests are served one after the other. Reads of what the node does not have in memory come last: to try
//! them makes its kernel begin with all of them, and only then the first one is waited for. Requests that make no sense get an
//! error status; a chain that isn't even a request (no header, no status byte) stops the device.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use log::warn;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{ByteValued, Le16, Le32, Le64};

use super::chain::{ChainReader, ChainWriter, IoFault};
use super::parts::{Parts, Piece};
use super::queue::Turn;
use super::{
    Activated, Chain, ConfigSpace, DeviceEvents, DeviceFault, DeviceInfo, DeviceKind, Progress, VirtioDevice,
};

const QUEUE_SIZE: u16 = 128;
/// Data buffers of one request: the queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of one data buffer.
const SIZE_MAX: u32 = 128 * 1024;
/// Bytes of one request.
const REQUEST_MAX: usize = SEG_MAX as usize * SIZE_MAX as usize;

/// Bytes of a sector, the unit of all positions whatever the size of a logical block is.
pub(crate) const SECTOR: u64 = 512;
/// Sectors of one range to discard or zero: 4 MiB, since zeroes may have to be written out.
const RANGE_SECTORS: u32 = 8192;
/// Ranges of one request.
const RANGES: u32 = 16;
/// Sectors that a range should be a multiple of: 4 KiB.
const RANGE_ALIGNMENT: u32 = 8;
const ID_SIZE: usize = 20;

/// `struct virtio_blk_config` (section 5.2.4), as far as the features of this device go.
#[repr(C, packed)]
#[derive(Default, Clone, Copy)]
struct Config {
    capacity: Le64,
    size_max: Le32,
    seg_max: Le32,
    geometry: [u8; 4],
    blk_size: Le32,
    topology: [u8; 8],
    writeback: u8,
    _unused0: u8,
    num_queues: Le16,
    max_discard_sectors: Le32,
    max_discard_seg: Le32,
    discard_sector_alignment: Le32,
    max_write_zeroes_sectors: Le32,
    max_write_zeroes_seg: Le32,
    write_zeroes_may_unmap: u8,
    _unused1: [u8; 3],
}

/// What `struct virtio_blk_req` (section 5.2.6) begins with.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct RequestHeader {
    kind: Le32,
    _reserved: Le32,
    sector: Le64,
}

/// `struct virtio_blk_discard_write_zeroes` (section 5.2.6).
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct Range {
    sector: Le64,
    num_sectors: Le32,
    flags: Le32,
}

// SAFETY: only integers and arrays of them, without padding: any bytes are a value.
unsafe impl ByteValued for Config {}
// SAFETY: as above.
unsafe impl ByteValued for RequestHeader {}
// SAFETY: as above.
unsafe impl ByteValued for Range {}

/// Zeroes to write where the file system can't make holes.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// How a request ended, when not well.
#[derive(Debug)]
enum Failure {
    /// It would have to wait.
    NotYet,
    /// `VIRTIO_BLK_S_IOERR`.
    Io,
    /// `VIRTIO_BLK_S_UNSUPP`.
    Unsupported,
    /// The device has to stop.
    Fault(DeviceFault),
}

impl From<DeviceFault> for Failure {
    fn from(fault: DeviceFault) -> Self {
        Failure::Fault(fault)
    }
}

impl From<super::MemoryFault> for Failure {
    fn from(fault: super::MemoryFault) -> Self {
        Failure::Fault(fault.into())
    }
}

/// The block device.
#[derive(Debug)]
pub struct Block {
    disk: Parts,
    read_only: bool,
    /// Size, fixed when the device is made.
    sectors: u64,
    /// Bytes of a logical block.
    block_size: u32,
    id: [u8; ID_SIZE],
    /// A write must be on stable storage before it is answered: the driver doesn't flush.
    write_through: bool,
    /// Whether the host can read without waiting: not every file system can.
    tells_what_waits: bool,
    warned: bool,
}

impl Block {
    /// A device over `disk`, whose contents are raw. `serial` is cut to 20 bytes; `block_size` is the size of a logical
    /// block in bytes, a power of two from [`SECTOR`] on.
    pub fn new(disk: Parts, read_only: bool, serial: &str, block_size: u32) -> Self {
        let blocks = disk.size() / u64::from(block_size);
        let sectors = blocks * (u64::from(block_size) / SECTOR);
        let mut id = [0; ID_SIZE];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Block {
            disk,
            read_only,
            sectors,
            block_size,
            id,
            write_through: false,
            tells_what_waits: true,
            warned: false,
        }
    }

    fn config(&self) -> Config {
        Config {
            capacity: self.sectors.into(),
            size_max: SIZE_MAX.into(),
            seg_max: SEG_MAX.into(),
            blk_size: self.block_size.into(),
            max_discard_sectors: RANGE_SECTORS.into(),
            max_discard_seg: RANGES.into(),
            discard_sector_alignment: RANGE_ALIGNMENT.into(),
            max_write_zeroes_sectors: RANGE_SECTORS.into(),
            max_write_zeroes_seg: RANGES.into(),
            write_zeroes_may_unmap: 1,
            ..Config::default()
        }
    }

    /// Serves one request; returns how many bytes were written to the driver's buffers, or `None` for a read that would have to wait,
    /// which happens in the first turn only.
    fn serve(&mut self, chain: &Chain, turn: Turn) -> Result<Option<u32>, DeviceFault> {
        let mut reader = chain.reader();
        let mut writer = chain.writer();
        if reader.remaining() < size_of::<RequestHeader>() || writer.remaining() == 0 {
            return Err(DeviceFault::Protocol("a block request without header or status"));
        }
        let header: RequestHeader = reader.read_obj()?;
        let (kind, sector) = (u32::from(header.kind), u64::from(header.sector));

        let room = writer.remaining() - 1;
        let result = match kind {
            VIRTIO_BLK_T_IN => self.read(&mut writer, sector, room, turn),
            VIRTIO_BLK_T_OUT => self.write(&mut reader, sector).map(|()| 0),
            VIRTIO_BLK_T_FLUSH => self.flush().map(|()| 0),
            VIRTIO_BLK_T_GET_ID => self.write_id(&mut writer, room),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.clear_ranges(&mut reader, kind == VIRTIO_BLK_T_DISCARD).map(|()| 0)
            }
            _ => Err(Failure::Unsupported),
        };
        let (status, written) = match result {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::NotYet) => return Ok(None),
            Err(Failure::Io) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Failure::Fault(fault)) => return Err(fault),
        };
        let mut last = chain.writer();
        last.skip(room)?;
        last.write_obj(status as u8)?;
        Ok(Some(written + 1))
    }

    /// The position in bytes of a range of whole sectors inside the disk.
    fn position(&self, sector: u64, length: u64) -> Result<u64, Failure> {
        let end = sector.checked_add(length / SECTOR).ok_or(Failure::Io)?;
        if !length.is_multiple_of(SECTOR) || length > REQUEST_MAX as u64 || end > self.sectors {
            return Err(Failure::Io);
        }
        Ok(sector * SECTOR)
    }

    fn read(
        &mut self,
        writer: &mut ChainWriter<'_>,
        sector: u64,
        length: usize,
        turn: Turn,
    ) -> Result<u32, Failure> {
        let mut position = self.position(sector, length as u64)?;
        let mut left = length;
        while left > 0 {
            let waits = turn == Turn::Last || !self.tells_what_waits;
            let done = match self.disk.at(position) {
                Some(Piece::File(file, position, most)) => {
                    let most = usize::try_from(most).unwrap_or(usize::MAX).min(left);
                    if waits {
                        writer.read_from(file.as_fd(), most, Some(position))
                    } else {
                        writer.read_ready_from(file.as_fd(), most, position)
                    }
                }
                Some(Piece::Zeroes(most)) => {
                    let most = usize::try_from(most).unwrap_or(usize::MAX).min(left).min(ZEROES.len());
                    writer.write_all(&ZEROES[..most])?;
                    Ok(most)
                }
                None => Ok(0),
            };
            match done {
                Ok(0) => return Err(self.failed("read", &io::Error::from(io::ErrorKind::UnexpectedEof))),
                Ok(done) => {
                    left -= done;
                    position += done as u64;
                }
                Err(IoFault::Host(error)) if !waits && error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(Failure::NotYet);
                }
                Err(IoFault::Host(error)) if !waits && error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    self.tells_what_waits = false;
                }
                Err(fault) => self.retry("read", fault)?,
            }
        }
        Ok(length as u32)
    }

    fn write(&mut self, reader: &mut ChainReader<'_>, sector: u64) -> Result<(), Failure> {
        if self.read_only {
            return Err(Failure::Io);
        }
        let mut position = self.position(sector, reader.remaining() as u64)?;
        while reader.remaining() > 0 {
            match reader.write_to(self.disk.file().as_fd(), usize::MAX, Some(position)) {
                Ok(0) => return Err(self.failed("write", &io::Error::from(io::ErrorKind::WriteZero))),
                Ok(done) => position += done as u64,
                Err(fault) => self.retry("write", fault)?,
            }
        }
        if self.write_through { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Failure> {
        if self.read_only {
            return Ok(());
        }
        self.disk.file().sync_data().map_err(|error| self.failed("flush", &error))
    }

    fn write_id(&mut self, writer: &mut ChainWriter<'_>, room: usize) -> Result<u32, Failure> {
        let length = room.min(ID_SIZE);
        writer.write_all(&self.id[..length])?;
        Ok(length as u32)
    }

    fn clear_ranges(&mut self, reader: &mut ChainReader<'_>, discard: bool) -> Result<(), Failure> {
        if self.read_only {
            return Err(Failure::Io);
        }
        let length = reader.remaining();
        let ranges = length / size_of::<Range>();
        if length == 0 || !length.is_multiple_of(size_of::<Range>()) || ranges > RANGES as usize {
            return Err(Failure::Io);
        }
        while reader.remaining() > 0 {
            let range: Range = reader.read_obj()?;
            let (sector, sectors, flags) =
                (u64::from(range.sector), u32::from(range.num_sectors), u32::from(range.flags));
            let known = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
            if flags & !known != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors > RANGE_SECTORS {
                return Err(Failure::Io);
            }
            let length = u64::from(sectors) * SECTOR;
            let position = self.position(sector, length)?;
            if length > 0 {
                self.clear(position, length, discard || flags != 0, discard)?;
            }
        }
        if self.write_through { self.flush() } else { Ok(()) }
    }

    /// Makes a range read as zeroes; a hole when `unmap` says so and the host can.
    fn clear(&mut self, position: u64, length: u64, unmap: bool, discard: bool) -> Result<(), Failure> {
        let mode = if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
        // SAFETY: fallocate has no memory arguments.
        let result = unsafe {
            libc::fallocate(
                self.disk.file().as_raw_fd(),
                mode | libc::FALLOC_FL_KEEP_SIZE,
                position as libc::off_t,
                length as libc::off_t,
            )
        };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // A discard is a hint.
            Some(libc::EOPNOTSUPP) if discard => Ok(()),
            Some(libc::EOPNOTSUPP) => self.write_zeroes(position, length),
            _ => Err(self.failed("fallocate", &error)),
        }
    }

    fn write_zeroes(&mut self, mut position: u64, length: u64) -> Result<(), Failure> {
        let end = position + length;
        while position < end {
            let piece = (end - position).min(ZEROES.len() as u64) as usize;
            let result = std::os::unix::fs::FileExt::write_at(self.disk.file(), &ZEROES[..piece], position);
            match result {
                Ok(0) => return Err(self.failed("write", &io::Error::from(io::ErrorKind::WriteZero))),
                Ok(done) => position += done as u64,
                Err(error) => self.retry("write", error.into())?,
            }
        }
        Ok(())
    }

    /// Tells what is worth another try from what isn't.
    fn retry(&mut self, what: &'static str, fault: IoFault) -> Result<(), Failure> {
        match fault {
            IoFault::Host(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            IoFault::Host(error) => Err(self.failed(what, &error)),
            IoFault::Memory(fault) => Err(fault.into()),
        }
    }

    fn failed(&mut self, what: &'static str, error: &io::Error) -> Failure {
        if !std::mem::replace(&mut self.warned, true) {
            warn!(
                "disk {}: {what} failed: {error}",
                String::from_utf8_lossy(&self.id).trim_end_matches('\0')
            );
        }
        Failure::Io
    }
}

impl VirtioDevice for Block {
    fn info(&self) -> DeviceInfo {
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        DeviceInfo {
            kind: DeviceKind::Block,
            features,
            required: 0,
            queue_sizes: vec![QUEUE_SIZE],
            config: Arc::new(ConfigSpace::of(&self.config())),
        }
    }

    fn activate(
        &mut self,
        active: &mut Activated,
        _events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        self.write_through = active.features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        Ok(())
    }

    fn queue_ready(
        &mut self,
        queue: usize,
        active: &mut Activated,
        _events: &mut DeviceEvents<'_, '_>,
    ) -> Result<Progress, DeviceFault> {
        active.queues[queue].serve_in_turns(|chain, turn| self.serve(chain, turn))
    }
}

#[cfg(test)]
mod tests;
