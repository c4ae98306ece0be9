//! A kernel that QEMU's microvm machine boots: it wants an ELF file whose program headers lead to the PVH note (the entry point in
//! 32-bit mode). Linux has that note among its data; our kernel's file only lacks the header that leads there.

/// An ELF64 header, the parts that are used: offsets into the file.
const PROGRAM_HEADERS_OFFSET: usize = 32;
const PROGRAM_HEADER_COUNT: usize = 56;
const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const PT_NOTE: u32 = 4;
/// A note: the lengths of name and content, its type, the name and then the content, both padded to 4 bytes.
const NOTE_HEADER_BYTES: usize = 12;
const XEN: &[u8] = b"Xen\0";
/// `XEN_ELFNOTE_PHYS32_ENTRY`
const PHYS32_ENTRY: u32 = 18;

/// Why a kernel can't be made bootable for QEMU.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PvhError {
    /// Not ELF64, or its program headers are not right behind the file header.
    #[error("it is no ELF64 file of the expected layout")]
    Layout,
    /// Other data follows the program headers immediately.
    #[error("its file has no room for another program header")]
    NoRoom,
    /// Built without PVH support.
    #[error("it has no PVH note (built without CONFIG_PVH)")]
    NoNote,
}

/// Adds a program header for the kernel's PVH note.
///
/// # Errors
/// When the file is not laid out as ours are.
pub(crate) fn with_note(mut kernel: Vec<u8>) -> Result<Vec<u8>, PvhError> {
    if !kernel.starts_with(b"\x7fELF\x02")
        || u64_at(&kernel, PROGRAM_HEADERS_OFFSET) != Some(ELF_HEADER_BYTES as u64)
    {
        return Err(PvhError::Layout);
    }
    let count = u16_at(&kernel, PROGRAM_HEADER_COUNT).ok_or(PvhError::Layout)?;
    let place = ELF_HEADER_BYTES + usize::from(count) * PROGRAM_HEADER_BYTES;
    let room = kernel.get(place..place + PROGRAM_HEADER_BYTES).ok_or(PvhError::NoRoom)?;
    if room.iter().any(|byte| *byte != 0) {
        return Err(PvhError::NoRoom);
    }
    let (offset, length) = note(&kernel).ok_or(PvhError::NoNote)?;

    let mut header = Vec::with_capacity(PROGRAM_HEADER_BYTES);
    header.extend(PT_NOTE.to_le_bytes());
    // Flags: readable.
    header.extend(4_u32.to_le_bytes());
    // Offset, virtual and physical address, lengths in file and memory, alignment.
    for field in [offset, 0, 0, length, length, 4] {
        header.extend((field as u64).to_le_bytes());
    }
    kernel[place..place + PROGRAM_HEADER_BYTES].copy_from_slice(&header);
    kernel[PROGRAM_HEADER_COUNT..PROGRAM_HEADER_COUNT + 2].copy_from_slice(&(count + 1).to_le_bytes());
    Ok(kernel)
}

/// Where the note is, and its length.
fn note(kernel: &[u8]) -> Option<(usize, usize)> {
    // Notes are aligned to 4 bytes.
    (0..kernel.len()).step_by(4).find_map(|offset| {
        let header = kernel.get(offset..offset + NOTE_HEADER_BYTES + XEN.len())?;
        let content = u32_at(header, 4)? as usize;
        let matches = &header[NOTE_HEADER_BYTES..] == XEN
            && u32_at(header, 0)? as usize == XEN.len()
            && u32_at(header, 8)? == PHYS32_ENTRY
            && (content == 4 || content == 8);
        matches.then_some((offset, NOTE_HEADER_BYTES + XEN.len() + content))
    })
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header with one program header, and a note at 0x1000.
    fn kernel() -> Vec<u8> {
        let mut kernel = vec![0; 0x1000];
        kernel[..5].copy_from_slice(b"\x7fELF\x02");
        kernel[PROGRAM_HEADERS_OFFSET] = ELF_HEADER_BYTES as u8;
        kernel[PROGRAM_HEADER_COUNT] = 1;
        kernel[ELF_HEADER_BYTES] = 1;
        for word in [4_u32, 8, PHYS32_ENTRY] {
            kernel.extend(word.to_le_bytes());
        }
        kernel.extend(XEN);
        kernel.extend(0x100_0000_u64.to_le_bytes());
        kernel
    }

    #[test]
    fn the_note_gets_a_header() {
        let kernel = with_note(kernel()).unwrap();
        assert_eq!(u16_at(&kernel, PROGRAM_HEADER_COUNT), Some(2));
        let header = &kernel[ELF_HEADER_BYTES + PROGRAM_HEADER_BYTES..];
        assert_eq!(u32_at(header, 0), Some(PT_NOTE));
        assert_eq!(u64_at(header, 8), Some(0x1000));
        assert_eq!(u64_at(header, 32), Some(24));
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(with_note(b"MZ".to_vec()), Err(PvhError::Layout));
        let mut no_note = kernel();
        no_note.truncate(0x1000);
        assert_eq!(with_note(no_note), Err(PvhError::NoNote));
        let mut full = kernel();
        full[ELF_HEADER_BYTES + PROGRAM_HEADER_BYTES + 8] = 1;
        assert_eq!(with_note(full), Err(PvhError::NoRoom));
        let mut short = kernel();
        short.truncate(100);
        assert_eq!(with_note(short), Err(PvhError::NoRoom));
    }
}
