//! Virtio block device (virtio 1.2, section 5.2) on raw files or a host block device.
//!
//! Every request is served in one go on the device thread. Requests that make no sense get an error status; a chain
//! that isn't even a request (no header, no status byte) stops the device.

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

use super::chain::{ChainReader, ChainWriter, IoFault};
use super::parts::{Parts, Piece};
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
pub const SECTOR: u64 = 512;
/// Sectors of one range to discard or zero: 4 MiB, since zeroes may have to be written out.
const RANGE_SECTORS: u32 = 8192;
/// Ranges of one request.
const RANGES: u32 = 16;
const RANGE_SIZE: usize = 16;
const ID_SIZE: usize = 20;

/// Zeroes to write where the file system can't make holes.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// How a request ended, when not well.
#[derive(Debug)]
enum Failure {
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
        Block { disk, read_only, sectors, block_size, id, write_through: false, warned: false }
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put =
            |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &self.block_size.to_le_bytes());
        // Discard: sectors, ranges, alignment. Write zeroes: sectors, ranges, may unmap.
        put(36, &RANGE_SECTORS.to_le_bytes());
        put(40, &RANGES.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &RANGE_SECTORS.to_le_bytes());
        put(52, &RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }

    /// Serves one request; returns how many bytes were written to the driver's buffers.
    fn serve(&mut self, chain: &Chain) -> Result<u32, DeviceFault> {
        let mut reader = chain.reader();
        let mut writer = chain.writer();
        if reader.remaining() < RANGE_SIZE || writer.remaining() == 0 {
            return Err(DeviceFault::Protocol("a block request without header or status"));
        }
        let kind = u32::from_le(reader.read_obj::<u32>()?);
        let _reserved: u32 = reader.read_obj()?;
        let sector = u64::from_le(reader.read_obj::<u64>()?);

        let room = writer.remaining() - 1;
        let result = match kind {
            VIRTIO_BLK_T_IN => self.read(&mut writer, sector, room),
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
            Err(Failure::Io) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Failure::Fault(fault)) => return Err(fault),
        };
        let mut last = chain.writer();
        last.skip(room)?;
        last.write_obj(status as u8)?;
        Ok(written + 1)
    }

    /// The position in bytes of a range of whole sectors inside the disk.
    fn position(&self, sector: u64, length: u64) -> Result<u64, Failure> {
        let end = sector.checked_add(length / SECTOR).ok_or(Failure::Io)?;
        if !length.is_multiple_of(SECTOR) || length > REQUEST_MAX as u64 || end > self.sectors {
            return Err(Failure::Io);
        }
        Ok(sector * SECTOR)
    }

    fn read(&mut self, writer: &mut ChainWriter<'_>, sector: u64, length: usize) -> Result<u32, Failure> {
        let mut position = self.position(sector, length as u64)?;
        let mut left = length;
        while left > 0 {
            let done = match self.disk.at(position) {
                Some(Piece::File(file, position, most)) => {
                    let most = usize::try_from(most).unwrap_or(usize::MAX).min(left);
                    writer.read_from(file.as_fd(), most, Some(position))
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
        if length == 0 || !length.is_multiple_of(RANGE_SIZE) || length / RANGE_SIZE > RANGES as usize {
            return Err(Failure::Io);
        }
        while reader.remaining() > 0 {
            let sector = u64::from_le(reader.read_obj::<u64>()?);
            let sectors = u32::from_le(reader.read_obj::<u32>()?);
            let flags = u32::from_le(reader.read_obj::<u32>()?);
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
            config: Arc::new(ConfigSpace::new(self.config())),
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
        active.queues[queue].serve(|chain| self.serve(chain))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vmm_sys_util::tempfile::TempFile;

    use super::super::testing::{BUFFERS, Nonsense, TestDriver, readable, writable};
    use super::*;

    const HEADER: u64 = BUFFERS;
    const STATUS: u64 = BUFFERS + 0x100;
    const DATA: u64 = BUFFERS + 0x1000;
    const SECTORS: u64 = 64;

    fn disk(read_only: bool) -> (TestDriver, TempFile) {
        let file = TempFile::new().unwrap();
        file.as_file().set_len(SECTORS * SECTOR).unwrap();
        for sector in 0..SECTORS {
            file.as_file().write_all_at(&[sector as u8; SECTOR as usize], sector * SECTOR).unwrap();
        }
        let whole = Parts::whole(file.as_file().try_clone().unwrap().into()).unwrap();
        let block = Block::new(whole, read_only, "serial", 512);
        (TestDriver::activated(Box::new(block), 0), file)
    }

    fn put_header(driver: &TestDriver, kind: u32, sector: u64) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        driver.write_bytes(HEADER, &header);
        driver.write_bytes(STATUS, &[0xee]);
    }

    /// A request whose data the device writes; returns (length, status).
    fn fetch(driver: &mut TestDriver, kind: u32, sector: u64, length: u32) -> (Option<u32>, u32) {
        put_header(driver, kind, sector);
        let written = driver.request(0, &[readable(HEADER, 16), writable(DATA, length), writable(STATUS, 1)]);
        (written, driver.read_bytes(STATUS, 1)[0].into())
    }

    /// A request whose data the device reads; returns the status.
    fn store(driver: &mut TestDriver, kind: u32, sector: u64, length: u32) -> u32 {
        put_header(driver, kind, sector);
        let written = driver.request(0, &[readable(HEADER, 16), readable(DATA, length), writable(STATUS, 1)]);
        assert_eq!(written, Some(1));
        driver.read_bytes(STATUS, 1)[0].into()
    }

    fn ranges(driver: &TestDriver, list: &[(u64, u32, u32)]) -> u32 {
        let mut bytes = Vec::new();
        for (sector, count, flags) in list {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        driver.write_bytes(DATA, &bytes);
        bytes.len() as u32
    }

    #[test]
    fn a_disk_ends_with_its_last_whole_block() {
        let file = TempFile::new().unwrap();
        file.as_file().set_len(3 * 4096 + 512).unwrap();
        let whole = Parts::whole(file.as_file().try_clone().unwrap().into()).unwrap();
        let block = Block::new(whole, false, "", 4096);
        let config = block.config();
        assert_eq!((&config[..8], &config[20..24]), (&24u64.to_le_bytes()[..], &4096u32.to_le_bytes()[..]));
    }

    #[test]
    fn sectors_are_read() {
        let (mut driver, _file) = disk(true);
        assert_eq!(fetch(&mut driver, VIRTIO_BLK_T_IN, 7, 1024), (Some(1025), VIRTIO_BLK_S_OK));
        assert_eq!(driver.read_bytes(DATA, 512), [7; 512]);
        assert_eq!(driver.read_bytes(DATA + 512, 512), [8; 512]);
    }

    #[test]
    fn a_read_goes_over_the_ends_of_parts() {
        let file = |byte: u8, length: usize| {
            let file = TempFile::new().unwrap().into_file();
            file.write_all_at(&vec![byte; length], 0).unwrap();
            file.into()
        };
        let parts = Parts::follow_each_other([(file(1, 5000), 8192), (file(2, 4096), 4096)]).unwrap();
        let mut driver = TestDriver::activated(Box::new(Block::new(parts, true, "", 512)), 0);
        assert_eq!(fetch(&mut driver, VIRTIO_BLK_T_IN, 8, 8192), (Some(8193), VIRTIO_BLK_S_OK));
        let bytes = driver.read_bytes(DATA, 8192);
        let count = |byte: u8| bytes.iter().filter(|&&b| b == byte).count();
        assert_eq!((count(1), count(0), count(2)), (5000 - 4096, 8192 - 5000, 4096));
        assert!(bytes[..904].iter().all(|&b| b == 1) && bytes[4096..].iter().all(|&b| b == 2));
        assert_eq!(fetch(&mut driver, VIRTIO_BLK_T_IN, 23, 1024).1, VIRTIO_BLK_S_IOERR);
        assert_eq!(store(&mut driver, VIRTIO_BLK_T_OUT, 0, 512), VIRTIO_BLK_S_IOERR);
    }

    #[test]
    fn sectors_are_written_and_flushed() {
        let (mut driver, file) = disk(false);
        driver.write_bytes(DATA, &[0xab; 512]);
        assert_eq!(store(&mut driver, VIRTIO_BLK_T_OUT, 3, 512), VIRTIO_BLK_S_OK);
        assert_eq!(store(&mut driver, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
        let mut sector = [0; 512];
        file.as_file().read_exact_at(&mut sector, 3 * 512).unwrap();
        assert_eq!(sector, [0xab; 512]);
    }

    #[test]
    fn a_read_only_disk_refuses_every_kind_of_write() {
        let (mut driver, file) = disk(true);
        assert_eq!(store(&mut driver, VIRTIO_BLK_T_OUT, 3, 512), VIRTIO_BLK_S_IOERR);
        let length = ranges(&driver, &[(3, 1, 0)]);
        assert_eq!(store(&mut driver, VIRTIO_BLK_T_DISCARD, 0, length), VIRTIO_BLK_S_IOERR);
        assert_eq!(store(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, length), VIRTIO_BLK_S_IOERR);
        let mut sector = [0; 512];
        file.as_file().read_exact_at(&mut sector, 3 * 512).unwrap();
        assert_eq!(sector, [3; 512]);
    }

    #[test]
    fn the_end_of_the_disk_is_the_end() {
        let (mut driver, file) = disk(false);
        assert_eq!(fetch(&mut driver, VIRTIO_BLK_T_IN, SECTORS - 1, 512).1, VIRTIO_BLK_S_OK);
        assert_eq!(fetch(&mut driver, VIRTIO_BLK_T_IN, SECTORS - 1, 1024).1, VIRTIO_BLK_S_IOERR);
        assert_eq!(fetch(&mut driver, VIRTIO_BLK_T_IN, u64::MAX, 512).1, VIRTIO_BLK_S_IOERR);
        assert_eq!(fetch(&mut driver, VIRTIO_BLK_T_IN, u64::MAX / 512, 512).1, VIRTIO_BLK_S_IOERR);
        assert_eq!(store(&mut driver, VIRTIO_BLK_T_OUT, SECTORS, 512), VIRTIO_BLK_S_IOERR);
        assert_eq!(fetch(&mut driver, VIRTIO_BLK_T_IN, 0, 100).1, VIRTIO_BLK_S_IOERR);
        assert_eq!(file.as_file().metadata().unwrap().len(), SECTORS * SECTOR);
    }

    #[test]
    fn a_file_that_shrank_is_an_io_error() {
        let (mut driver, file) = disk(false);
        file.as_file().set_len(512).unwrap();
        assert_eq!(fetch(&mut driver, VIRTIO_BLK_T_IN, 2, 512).1, VIRTIO_BLK_S_IOERR);
    }

    #[test]
    fn ranges_are_zeroed_and_discarded() {
        let (mut driver, file) = disk(false);
        let length = ranges(&driver, &[(8, 8, 1), (24, 2, 0)]);
        assert_eq!(store(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, length), VIRTIO_BLK_S_OK);
        let length = ranges(&driver, &[(32, 8, 0)]);
        assert_eq!(store(&mut driver, VIRTIO_BLK_T_DISCARD, 0, length), VIRTIO_BLK_S_OK);
        let mut bytes = vec![0; (SECTORS * SECTOR) as usize];
        file.as_file().read_exact_at(&mut bytes, 0).unwrap();
        for sector in 0..SECTORS {
            let zero = (8..16).contains(&sector) || (24..26).contains(&sector) || (32..40).contains(&sector);
            let expected = if zero { 0 } else { sector as u8 };
            assert_eq!(bytes[(sector * SECTOR) as usize], expected, "sector {sector}");
        }
    }

    #[test]
    fn wrong_ranges_are_refused() {
        let (mut driver, _file) = disk(false);
        for (list, status) in [
            (vec![(SECTORS, 1, 0)], VIRTIO_BLK_S_IOERR),
            (vec![(u64::MAX, 1, 0)], VIRTIO_BLK_S_IOERR),
            (vec![(0, RANGE_SECTORS + 1, 0)], VIRTIO_BLK_S_IOERR),
            (vec![(0, 1, 2)], VIRTIO_BLK_S_UNSUPP),
            (vec![(0, 1, 0); 17], VIRTIO_BLK_S_IOERR),
            (vec![], VIRTIO_BLK_S_IOERR),
        ] {
            let length = ranges(&driver, &list);
            assert_eq!(store(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, length), status, "{list:?}");
        }
    }

    #[test]
    fn the_serial_and_unknown_requests() {
        let (mut driver, _file) = disk(true);
        assert_eq!(fetch(&mut driver, VIRTIO_BLK_T_GET_ID, 0, 20), (Some(21), VIRTIO_BLK_S_OK));
        assert_eq!(&driver.read_bytes(DATA, 8), b"serial\0\0");
        assert_eq!(fetch(&mut driver, 77, 0, 20), (Some(1), VIRTIO_BLK_S_UNSUPP));
    }

    #[test]
    fn the_status_byte_may_share_a_buffer_with_the_data() {
        let (mut driver, _file) = disk(true);
        put_header(&driver, VIRTIO_BLK_T_IN, 1);
        let written = driver.request(0, &[readable(HEADER, 16), writable(DATA, 513)]);
        assert_eq!(written, Some(513));
        assert_eq!(driver.read_bytes(DATA, 513)[510..], [1, 1, 0]);
    }

    #[test]
    fn what_is_no_request_stops_the_device() {
        for buffers in [vec![readable(HEADER, 15), writable(STATUS, 1)], vec![readable(HEADER, 16)]] {
            let (mut driver, _file) = disk(true);
            assert_eq!(driver.request(0, &buffers), None);
            assert!(driver.needs_reset());
        }
    }

    #[test]
    fn random_requests_never_panic_and_never_leave_the_disk() {
        let mut nonsense = Nonsense(7);
        for _ in 0..200 {
            let (mut driver, file) = disk(false);
            for _ in 0..20 {
                let kind = nonsense.below(16) as u32;
                let sector = nonsense.next() >> nonsense.below(64);
                put_header(&driver, kind, sector);
                let mut buffers = vec![readable(HEADER, 16 + nonsense.below(40) as u32)];
                for _ in 0..nonsense.below(4) {
                    buffers.push(readable(DATA + nonsense.below(0x1000), nonsense.below(2000) as u32));
                }
                for _ in 0..nonsense.below(4) {
                    buffers.push(writable(DATA + nonsense.below(0x1000), nonsense.below(2000) as u32));
                }
                driver.request(0, &buffers);
            }
            assert_eq!(file.as_file().metadata().unwrap().len(), SECTORS * SECTOR);
        }
    }
}
