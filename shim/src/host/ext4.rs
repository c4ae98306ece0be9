//! An empty ext4 for a disk that one guest writes to and nobody reads afterwards: what `mkfs.ext4` would write, but only the few
//! blocks that are not zero, so that a sparse file of any size is made in no time, without a program of the node's.
//!
//! It has no journal and no copies of the superblock, as it never outlives the machine that mounts it. What belongs to all
//! groups (bitmaps, tables of inodes) is packed at the beginning, and groups that are untouched say so, so that a guest does
//! not read them. Numbers and places are those of the kernel's documentation (`Documentation/filesystems/ext4`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of a block.
const BLOCK: u64 = 4096;
/// Blocks of a group.
const GROUP_BLOCKS: u64 = 32768;
/// What sizes are multiples of: bytes of a group.
pub(crate) const GROUP: u64 = BLOCK * GROUP_BLOCKS;
/// The most groups: the guest's kernel keeps a few hundred bytes for each, and looks at all when it mounts.
const MAX_GROUPS: u64 = 2048;

const INODE_SIZE: usize = 256;
/// Inodes of a group: one for 16 KiB, as `mkfs.ext4` has it.
const GROUP_INODES: u64 = 8192;
/// Blocks of a group's table of inodes.
const TABLE_BLOCKS: u64 = GROUP_INODES * INODE_SIZE as u64 / BLOCK;

const DESCRIPTOR: usize = 32;
/// No inodes of the group have been used, no blocks; and its table of inodes is zero.
const INODE_UNINIT: u16 = 1;
const BLOCK_UNINIT: u16 = 2;
const INODE_ZEROED: u16 = 4;

const ROOT: u32 = 2;
/// The first inode that is not reserved: that of `lost+found`, which some versions look for.
const LOST_AND_FOUND: u32 = 11;
const UPPER: u32 = 12;
const WORK: u32 = 13;

/// The names of the directories that an overlay takes.
pub(crate) const UPPER_NAME: &str = "upper";
/// See [`UPPER_NAME`].
pub(crate) const WORK_NAME: &str = "work";

/// No two of these are ever compared.
const UUID: [u8; 16] = *b"bulkhead changes";

/// How a guest mounts it. Nothing on the disk is worth anything once its machine is gone, so that it is enough for whoever wants something written if the node
/// has it: no barriers, and no writing because of a rename. Blocks of removed files are given back to the node.
pub(crate) const MOUNT_OPTIONS: [&str; 4] = ["discard", "nobarrier", "noauto_da_alloc", "noinit_itable"];

/// Who owns a directory, and what others may do in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permissions.
    pub mode: u32,
}

/// The size of the largest that takes up no more than `bytes`: one group at least.
pub(crate) fn size_within(bytes: u64) -> u64 {
    (bytes / GROUP).clamp(1, MAX_GROUPS) * GROUP
}

/// Makes one of `size` bytes in an empty file, with two directories for an overlay: one as its upper directory is to be, and one to
/// work in. `now` is in seconds since the epoch.
pub(crate) fn make(file: &File, size: u64, upper: Owner, now: u32) -> io::Result<()> {
    let layout = Layout::of(size);
    file.set_len(layout.groups * GROUP)?;
    // Superblock, descriptors and the first bitmaps follow each other.
    let mut head = vec![0; ((1 + layout.descriptor_blocks) * BLOCK) as usize];
    layout.superblock(&mut head[1024..2048], now);
    for (group, descriptor) in (0..layout.groups).zip(head[BLOCK as usize..].chunks_exact_mut(DESCRIPTOR)) {
        layout.descriptor(group, descriptor);
    }
    let marked = layout.marked_groups() * BLOCK;
    let taken = layout.taken();
    let bitmaps = head.len();
    head.resize(bitmaps + marked as usize, 0);
    set_bits(&mut head[bitmaps..], 0, taken as usize);
    file.write_all_at(&head, 0)?;

    let mut inodes_used = [0; BLOCK as usize];
    set_bits(&mut inodes_used, 0, WORK as usize);
    // Bits of no inode.
    set_bits(&mut inodes_used, GROUP_INODES as usize, 8 * BLOCK as usize);
    file.write_all_at(&inodes_used, layout.inode_bitmaps() * BLOCK)?;

    let root = Owner { uid: 0, gid: 0, mode: 0o755 };
    let private = Owner { mode: 0o700, ..root };
    let directories = [
        (ROOT, root, 5, vec![("lost+found", LOST_AND_FOUND), (UPPER_NAME, UPPER), (WORK_NAME, WORK)]),
        (LOST_AND_FOUND, private, 2, vec![]),
        (UPPER, upper, 2, vec![]),
        (WORK, private, 2, vec![]),
    ];
    let mut table = [0; BLOCK as usize];
    let mut contents = Vec::new();
    for (place, (number, owner, links, entries)) in (layout.directories()..).zip(&directories) {
        let at = (*number as usize - 1) * INODE_SIZE;
        inode(&mut table[at..at + INODE_SIZE], *owner, *links, place as u32, now);
        contents.extend(directory(*number, entries));
    }
    file.write_all_at(&table, layout.tables() * BLOCK)?;
    file.write_all_at(&contents, layout.directories() * BLOCK)
}

/// Where things are, in blocks.
#[derive(Debug, Clone, Copy)]
struct Layout {
    groups: u64,
    descriptor_blocks: u64,
}

impl Layout {
    fn of(size: u64) -> Layout {
        let groups = (size / GROUP).clamp(1, MAX_GROUPS);
        Layout { groups, descriptor_blocks: (groups * DESCRIPTOR as u64).div_ceil(BLOCK) }
    }

    fn block_bitmaps(self) -> u64 {
        1 + self.descriptor_blocks
    }

    fn inode_bitmaps(self) -> u64 {
        self.block_bitmaps() + self.groups
    }

    fn tables(self) -> u64 {
        self.inode_bitmaps() + self.groups
    }

    fn directories(self) -> u64 {
        self.tables() + self.groups * TABLE_BLOCKS
    }

    /// How many blocks at the beginning are taken.
    fn taken(self) -> u64 {
        self.directories() + 4
    }

    /// How many groups these are in.
    fn marked_groups(self) -> u64 {
        self.taken().div_ceil(GROUP_BLOCKS)
    }

    fn superblock(self, to: &mut [u8], now: u32) {
        let mut put32 = |at: usize, value: u64| to[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
        let inodes = self.groups * GROUP_INODES;
        put32(0x00, inodes);
        put32(0x04, self.groups * GROUP_BLOCKS);
        put32(0x0c, self.groups * GROUP_BLOCKS - self.taken());
        put32(0x10, inodes - u64::from(WORK));
        // Sizes of blocks and clusters, as powers of two above a kibibyte.
        put32(0x18, 2);
        put32(0x1c, 2);
        put32(0x20, GROUP_BLOCKS);
        put32(0x24, GROUP_BLOCKS);
        put32(0x28, GROUP_INODES);
        put32(0x30, now.into());
        put32(0x40, now.into());
        // The first revision with inodes of other sizes.
        put32(0x4c, 1);
        put32(0x54, LOST_AND_FOUND.into());
        // Extended attributes, indexed directories, no copies of the superblock but in listed groups.
        put32(0x5c, 0x8 | 0x20 | 0x200);
        // Types in directories, extents, what belongs to groups anywhere.
        put32(0x60, 0x2 | 0x40 | 0x200);
        // Large and huge files, checksums of descriptors (without which there are no untouched groups), many subdirectories,
        // large inodes.
        put32(0x64, 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40);
        put32(0x108, now.into());
        // Names are hashed as signed characters.
        put32(0x160, 1);
        // What `df` leaves out.
        put32(0x248, self.taken() - 4);
        let mut put16 = |at: usize, value: u16| to[at..at + 2].copy_from_slice(&value.to_le_bytes());
        put16(0x36, u16::MAX); // never checked after so many mounts
        put16(0x38, 0xef53);
        put16(0x3a, 1); // clean
        put16(0x3c, 1); // goes on after errors
        put16(0x58, INODE_SIZE as u16);
        put16(0x15c, 32);
        put16(0x15e, 32);
        to[0x68..0x78].copy_from_slice(&UUID);
        to[0xec..0xfc].copy_from_slice(&UUID); // seed of hashes
        to[0xfc] = 1; // half MD4
        to[0x174] = 4; // 16 groups are allocated from together
    }

    fn descriptor(self, group: u64, to: &mut [u8]) {
        let first = group * GROUP_BLOCKS;
        let taken = self.taken().saturating_sub(first).min(GROUP_BLOCKS);
        let used = if group == 0 { u64::from(WORK) } else { 0 };
        let mut flags = INODE_ZEROED;
        if group > 0 {
            flags |= INODE_UNINIT;
        }
        // The last group's bitmap is there by custom; it is zero.
        if taken == 0 && group + 1 < self.groups {
            flags |= BLOCK_UNINIT;
        }
        let places = [
            self.block_bitmaps() + group,
            self.inode_bitmaps() + group,
            self.tables() + group * TABLE_BLOCKS,
        ];
        for (to, place) in to.chunks_exact_mut(4).zip(places) {
            to.copy_from_slice(&(place as u32).to_le_bytes());
        }
        let mut put = |at: usize, value: u64| to[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
        put(0x0c, GROUP_BLOCKS - taken);
        put(0x0e, GROUP_INODES - used);
        put(0x10, if group == 0 { 4 } else { 0 }); // directories
        put(0x12, flags.into());
        put(0x1c, GROUP_INODES - used); // inodes at the table's end that were never used
        let sum = crc16(crc16(crc16(u16::MAX, &UUID), &(group as u32).to_le_bytes()), &to[..0x1e]);
        to[0x1e..0x20].copy_from_slice(&sum.to_le_bytes());
    }
}

/// A directory's inode; it has one block.
fn inode(to: &mut [u8], owner: Owner, links: u16, block: u32, now: u32) {
    let mut put16 = |at: usize, value: u32| to[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    put16(0x00, libc::S_IFDIR | owner.mode & 0o7777);
    put16(0x02, owner.uid);
    put16(0x18, owner.gid);
    put16(0x1a, links.into());
    put16(0x78, owner.uid >> 16);
    put16(0x7a, owner.gid >> 16);
    put16(0x80, 32); // how much of a large inode has a meaning
    // A list of extents with room for four and one in it, of one block.
    put16(0x28, 0xf30a);
    put16(0x2a, 1);
    put16(0x2c, 4);
    put16(0x38, 1);
    let mut put32 = |at: usize, value: u32| to[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put32(0x04, BLOCK as u32);
    for time in [0x08, 0x0c, 0x10, 0x90] {
        put32(time, now);
    }
    put32(0x1c, (BLOCK / 512) as u32);
    put32(0x20, 0x80000); // it has extents
    put32(0x3c, block);
}

/// A directory's block. Its parent is the root, as the root's own is.
fn directory(number: u32, entries: &[(&str, u32)]) -> Vec<u8> {
    const IS_DIRECTORY: u8 = 2;
    let mut block = Vec::with_capacity(BLOCK as usize);
    let all = [(".", number), ("..", ROOT)].into_iter().chain(entries.iter().copied());
    let mut last = 0;
    for (name, number) in all {
        last = block.len();
        let length = (8 + name.len()).next_multiple_of(4);
        block.extend(number.to_le_bytes());
        block.extend((length as u16).to_le_bytes());
        block.extend([name.len() as u8, IS_DIRECTORY]);
        block.extend(name.as_bytes());
        block.resize(last + length, 0);
    }
    // The last one reaches to the end.
    let length = BLOCK as usize - last;
    block[last + 4..last + 6].copy_from_slice(&(length as u16).to_le_bytes());
    block.resize(BLOCK as usize, 0);
    block
}

fn set_bits(bitmap: &mut [u8], first: usize, end: usize) {
    let (whole, rest) = (first.div_ceil(8)..end / 8, end / 8 * 8..end);
    debug_assert!(first.is_multiple_of(8), "no bitmap here begins within a byte");
    bitmap[whole].fill(0xff);
    for bit in rest {
        bitmap[bit / 8] |= 1 << (bit % 8);
    }
}

const CRC16: [u16; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u16;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { value >> 1 ^ 0xa001 } else { value >> 1 };
            bit += 1;
        }
        table[byte] = value;
        byte += 1;
    }
    table
};

fn crc16(start: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(start, |sum, byte| sum >> 8 ^ CRC16[usize::from(sum as u8 ^ byte)])
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;

    use super::*;

    fn tool(name: &str, arguments: &[&str], image: &std::path::Path) -> (bool, String) {
        let output = Command::new(name)
            .env("PATH", "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")
            .args(arguments)
            .arg(image)
            .output()
            .unwrap_or_else(|error| panic!("{name} (e2fsprogs): {error}"));
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    #[test]
    fn others_find_nothing_to_mend() {
        let upper = Owner { uid: 100_000, gid: 200_001, mode: 0o1751 };
        for groups in [1, 2, 3, 17, 64, 127, 512, MAX_GROUPS] {
            let image = tempfile::NamedTempFile::new().unwrap();
            let (file, path) = (image.as_file(), image.path());
            make(file, groups * GROUP, upper, 1_700_000_000).unwrap();
            let taken = file.metadata().unwrap().blocks() * 512;
            let checked = tool("e2fsck", &["-fn"], path);
            let shown = tool("debugfs", &["-R", "stat upper"], path);
            let summary = tool("dumpe2fs", &["-h"], path);
            assert!(checked.0, "{groups} groups: {}", checked.1);
            assert!(shown.1.contains("Mode:  01751"), "{}", shown.1);
            assert!(shown.1.contains("User: 100000   Group: 200001"), "{}", shown.1);
            assert!(summary.1.contains("Filesystem state:         clean"), "{}", summary.1);
            assert!(taken <= 64 * 1024 + groups * 160, "{groups} groups: {taken} bytes on the host");
        }
    }

    #[test]
    fn sizes_are_whole_groups() {
        assert_eq!(size_within(0), GROUP);
        assert_eq!(size_within(3 * GROUP - 1), 2 * GROUP);
        assert_eq!(size_within(u64::MAX), MAX_GROUPS * GROUP);
    }
}
