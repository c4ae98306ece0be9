//! Tests of the block device.

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
    let config = config.as_slice();
    assert_eq!(config.len(), 60);
    assert_eq!((&config[..8], &config[20..24]), (&24u64.to_le_bytes()[..], &4096u32.to_le_bytes()[..]));
    assert_eq!((&config[36..40], config[56]), (&RANGE_SECTORS.to_le_bytes()[..], 1));
}

#[test]
fn sectors_are_read() {
    let (mut driver, _file) = disk(true);
    assert_eq!(fetch(&mut driver, VIRTIO_BLK_T_IN, 7, 1024), (Some(1025), VIRTIO_BLK_S_OK));
    assert_eq!(driver.read_bytes(DATA, 512), [7; 512]);
    assert_eq!(driver.read_bytes(DATA + 512, 512), [8; 512]);
}

#[test]
fn what_the_node_has_not_in_memory_is_read_all_the_same() {
    let (mut driver, file) = disk(true);
    file.as_file().sync_all().unwrap();
    // SAFETY: no memory is passed.
    let result = unsafe { libc::posix_fadvise(file.as_file().as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(result, 0);
    for sector in [0, 63, 7] {
        assert_eq!(fetch(&mut driver, VIRTIO_BLK_T_IN, sector, 512), (Some(513), VIRTIO_BLK_S_OK));
        assert_eq!(driver.read_bytes(DATA, 512), [sector as u8; 512]);
    }
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
