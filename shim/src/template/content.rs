//! The digest of a memory file, which is large and mostly holes.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use sha2::{Digest, Sha256};

use super::key::hex;

/// Bytes that are looked at as one.
const PAGE: u64 = 4096;

/// Bytes read at once.
const CHUNK: u64 = 256 * 1024;

/// The digest of the pages that hold anything but zeroes, each with its number. So a hole and a page of zeroes are the
/// same, as they are to the guest.
pub(crate) fn memory_digest(file: &File) -> io::Result<String> {
    let size = file.metadata()?.len();
    let mut digest = Sha256::new();
    digest.update(size.to_le_bytes());
    let mut buffer = vec![0; CHUNK as usize];
    let mut offset = 0;
    while let Some((start, end)) = next_data(file, offset, size)? {
        // Extents follow the file system's blocks, which may be smaller than a page.
        let start = (start / PAGE * PAGE).max(offset);
        let mut position = start;
        while position < end {
            let length = CHUNK.min(size - position).min((end - position).next_multiple_of(PAGE));
            let chunk = &mut buffer[..length as usize];
            file.read_exact_at(chunk, position)?;
            for (index, page) in chunk.chunks(PAGE as usize).enumerate() {
                if page.iter().any(|&byte| byte != 0) {
                    digest.update((position / PAGE + index as u64).to_le_bytes());
                    digest.update(page);
                }
            }
            position += length;
        }
        offset = position;
    }
    Ok(hex(&digest.finalize()))
}

/// The next range of `file` at or after `offset` that is not a hole.
fn next_data(file: &File, offset: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if offset >= size {
        return Ok(None);
    }
    let seek = |from: u64, whence| {
        let from = i64::try_from(from).map_err(io::Error::other)?;
        lseek(file.as_fd(), from, whence).map(|found| found.unsigned_abs()).map_err(io::Error::from)
    };
    match seek(offset, Whence::SeekData) {
        Ok(start) => Ok(Some((start, seek(start, Whence::SeekHole)?.min(size)))),
        Err(error) if error.raw_os_error() == Some(Errno::ENXIO as i32) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(size: u64, content: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (offset, bytes) in content {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file
    }

    #[test]
    fn holes_are_zeroes_and_every_other_byte_counts() {
        const SIZE: u64 = 3 << 20;
        let digest = |content: &[(u64, &[u8])]| memory_digest(&file(SIZE, content)).unwrap();
        let base = digest(&[(0, b"start"), (1 << 20, b"middle"), (SIZE - 3, b"end")]);
        let written_zeroes =
            digest(&[(8192, &[0; 600_000]), (0, b"start"), (1 << 20, b"middle"), (SIZE - 3, b"end")]);
        assert_eq!(base, written_zeroes);
        assert_ne!(base, digest(&[(0, b"start"), ((1 << 20) + 4096, b"middle"), (SIZE - 3, b"end")]));
        assert_ne!(base, digest(&[(0, b"start"), (1 << 20, b"middle"), (SIZE - 3, b"enD")]));
        assert_ne!(digest(&[]), memory_digest(&file(SIZE + 4096, &[])).unwrap());
    }
}
