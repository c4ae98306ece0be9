//! Loading a kernel image: ELF `vmlinux` or bzImage, told apart by their magic numbers.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{Error as LoaderError, KernelLoader};
use vm_memory::GuestAddress;

use crate::layout::HIGH_RAM;
use crate::memory::{GuestRam, low_ram_end};

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Offset of the boot protocol's magic number, and the number.
const SETUP_MAGIC: (u64, [u8; 4]) = (0x202, *b"HdrS");
/// Where a bzImage's protected-mode part has its 64-bit entry.
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// `xloadflags`: the kernel has a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;

/// Why a kernel image can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file can't be read.
    #[error("can't read the kernel file")]
    Read(#[source] io::Error),
    /// Neither format.
    #[error("the kernel file is neither an ELF vmlinux nor a bzImage")]
    UnknownFormat,
    /// The loader stopped.
    #[error("the kernel file is truncated or corrupt, or doesn't fit into {ram_mib} MiB of guest memory")]
    Load {
        /// RAM that a kernel may use.
        ram_mib: u64,
        /// Where it stopped.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// Loaded, but there is no sense in starting it.
    #[error("the kernel's entry {entry:#x} is outside of what was loaded, {HIGH_RAM:#x} to {end:#x}")]
    Entry {
        /// Guest-physical address.
        entry: u64,
        /// Guest-physical address.
        end: u64,
    },
    /// The kernel's zero-initialised data lie past the end of memory.
    #[error(
        "the kernel needs memory up to {end:#x}, the guest has it up to {ram_end:#x}: give it more memory"
    )]
    TooLarge {
        /// Guest-physical address.
        end: u64,
        /// Guest-physical address.
        ram_end: u64,
    },
    /// A 32-bit bzImage.
    #[error("the bzImage has no 64-bit entry")]
    Not64Bit,
}

/// A kernel in guest memory.
#[derive(Debug)]
pub(super) struct Loaded {
    /// Guest-physical address of the 64-bit entry.
    pub entry: u64,
    /// A bzImage's own setup header.
    pub setup_header: Option<setup_header>,
}

pub(super) fn load(ram: &GuestRam, file: &mut File) -> Result<Loaded, KernelError> {
    if magic_at(file, 0)? == Some(ELF_MAGIC) {
        load_elf(ram, file)
    } else if magic_at(file, SETUP_MAGIC.0)? == Some(SETUP_MAGIC.1) {
        load_bzimage(ram, file)
    } else {
        Err(KernelError::UnknownFormat)
    }
}

fn load_elf(ram: &GuestRam, file: &mut File) -> Result<Loaded, KernelError> {
    let result = Elf::load(ram, None, file, Some(GuestAddress(HIGH_RAM))).map_err(|e| load_failed(ram, e))?;
    let (entry, end, ram_end) = (result.kernel_load.0, result.kernel_end, low_ram_end(ram));
    if end > ram_end {
        return Err(KernelError::TooLarge { end, ram_end });
    }
    if !(HIGH_RAM..end).contains(&entry) {
        return Err(KernelError::Entry { entry, end });
    }
    Ok(Loaded { entry, setup_header: None })
}

fn load_bzimage(ram: &GuestRam, file: &mut File) -> Result<Loaded, KernelError> {
    let result =
        BzImage::load(ram, None, file, Some(GuestAddress(HIGH_RAM))).map_err(|e| load_failed(ram, e))?;
    let header = result.setup_header.ok_or(KernelError::Not64Bit)?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::Not64Bit);
    }
    let (end, ram_end) = (result.kernel_load.0 + u64::from(header.init_size), low_ram_end(ram));
    if end > ram_end {
        return Err(KernelError::TooLarge { end, ram_end });
    }
    Ok(Loaded { entry: result.kernel_load.0 + BZIMAGE_ENTRY_64, setup_header: Some(header) })
}

fn load_failed(ram: &GuestRam, error: LoaderError) -> KernelError {
    // The outer error only repeats the inner one.
    let source: Box<dyn Error + Send + Sync> = match error {
        LoaderError::Elf(inner) => Box::new(inner),
        LoaderError::Bzimage(inner) => Box::new(inner),
        other => Box::new(other),
    };
    KernelError::Load { ram_mib: low_ram_end(ram) >> 20, source }
}

/// The four bytes at `offset`; `None` past the end of the file.
fn magic_at(file: &mut File, offset: u64) -> Result<Option<[u8; 4]>, KernelError> {
    let mut magic = [0; 4];
    file.seek(SeekFrom::Start(offset)).map_err(KernelError::Read)?;
    match file.read_exact(&mut magic) {
        Ok(()) => Ok(Some(magic)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(KernelError::Read(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    const LOAD: u64 = 0x20_0000;

    /// An ELF file with one segment.
    fn elf(entry: u64, data: &[u8], memory_size: u64) -> Vec<u8> {
        let mut file = Vec::new();
        file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file.extend(2u16.to_le_bytes());
        file.extend(62u16.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        file.extend(entry.to_le_bytes());
        file.extend(64u64.to_le_bytes());
        file.extend([0; 12]);
        for half in [64u16, 56, 1, 0, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        file.extend(1u32.to_le_bytes());
        file.extend(5u32.to_le_bytes());
        for word in [120, LOAD, LOAD, data.len() as u64, memory_size, 0x1000] {
            file.extend(word.to_le_bytes());
        }
        file.extend(data);
        file
    }

    fn load_bytes(bytes: &[u8]) -> (GuestRam, Result<Loaded, KernelError>) {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(bytes).unwrap();
        let loaded = load(&ram, &mut file);
        (ram, loaded)
    }

    #[test]
    fn an_elf_kernel_is_put_where_it_says() {
        let (ram, loaded) = load_bytes(&elf(LOAD + 1, b"kernel", 4096));
        assert_eq!(loaded.unwrap().entry, LOAD + 1);
        let mut bytes = [0; 6];
        ram.read_slice(&mut bytes, GuestAddress(LOAD)).unwrap();
        assert_eq!(&bytes, b"kernel");
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole = elf(LOAD, b"kernel", 4096);
        for length in 0..whole.len() {
            assert!(load_bytes(&whole[..length]).1.is_err(), "{length} bytes were accepted");
        }
    }

    #[test]
    fn nonsense_is_told_apart() {
        assert!(matches!(load_bytes(&[0xaa; 4096]).1, Err(KernelError::UnknownFormat)));
        assert!(matches!(load_bytes(&elf(LOAD + 4096, b"kernel", 4096)).1, Err(KernelError::Entry { .. })));
        assert!(matches!(load_bytes(&elf(LOAD, b"kernel", 4 << 20)).1, Err(KernelError::TooLarge { .. })));
        let mut big_endian = elf(LOAD, b"kernel", 4096);
        big_endian[5] = 2;
        assert!(matches!(load_bytes(&big_endian).1, Err(KernelError::Load { .. })));
    }

    #[test]
    fn flipped_bits_never_panic() {
        let whole = elf(LOAD, b"kernel", 4096);
        for bit in 0..120 * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let _ = load_bytes(&bytes).1;
        }
    }
}
