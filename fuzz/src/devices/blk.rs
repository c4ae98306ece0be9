//! The block device.

use std::os::unix::fs::FileExt;

use bulkhead_vmm::devices::blk::Block;
use bulkhead_vmm::devices::parts::Parts;

use crate::guest::Guest;
use crate::host;
use crate::input::Input;

/// Not a whole number of large blocks.
const SIZE: usize = 16 * 1024 + 1536;
static CONTENTS: [u8; SIZE] = [0x5a; SIZE];

/// Requests against a small disk. It never changes its size, and a read-only one nothing at all.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let (read_only, block_size) = (flags & 1 != 0, 512 << (flags >> 1 & 3));
    let disk = host::file(&CONTENTS);
    let contents = if flags & 8 != 0 && read_only {
        let part = || (disk.try_clone().unwrap().into(), 5 * 4096);
        Parts::follow_each_other([part(), part()])
    } else {
        Parts::whole(disk.try_clone().unwrap().into())
    };
    let device = Block::new(contents.unwrap(), read_only, "fuzz", block_size);
    Guest::new(Box::new(device)).run(&mut input, &mut |_| {});
    assert_eq!(disk.metadata().unwrap().len(), SIZE as u64, "the disk has another size");
    if read_only {
        let mut now = [0; SIZE];
        disk.read_exact_at(&mut now, 0).unwrap();
        assert!(now == CONTENTS, "a read-only disk has changed");
    }
}
