//! What a disk is made of: one file, or several that follow each other.
//!
//! Nothing of a file is looked at: where each begins on the disk the host says, and tells the guest by a way of its own.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;

/// A file, and where on the disk it is.
#[derive(Debug)]
struct Part {
    file: File,
    start: u64,
    /// The size of the file when it came.
    length: u64,
    /// Where the next part begins. What lies between are zeroes.
    end: u64,
}

/// The contents of a disk.
#[derive(Debug)]
pub struct Parts {
    /// In their order, one at least.
    parts: Vec<Part>,
}

/// What is at a position of a disk, and for how many bytes.
#[derive(Debug)]
pub(crate) enum Piece<'a> {
    /// A file, from a position on.
    File(&'a File, u64, u64),
    /// Nothing.
    Zeroes(u64),
}

impl Parts {
    /// One file, whole.
    pub fn whole(file: OwnedFd) -> io::Result<Parts> {
        let mut file = File::from(file);
        let length = file.seek(SeekFrom::End(0))?;
        Ok(Parts { parts: vec![Part { file, start: 0, length, end: length }] })
    }

    /// Files, each with as many bytes of the disk as it takes up; one that is longer is cut.
    pub fn follow_each_other(files: impl IntoIterator<Item = (OwnedFd, u64)>) -> io::Result<Parts> {
        let mut parts = Vec::new();
        let mut start = 0u64;
        for (file, room) in files {
            let mut file = File::from(file);
            let length = file.seek(SeekFrom::End(0))?.min(room);
            let end = start.checked_add(room).ok_or(io::ErrorKind::FileTooLarge)?;
            parts.push(Part { file, start, length, end });
            start = end;
        }
        if parts.is_empty() { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(Parts { parts }) }
    }

    /// Bytes of the disk.
    pub(crate) fn size(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.end)
    }

    /// The file that a disk for writing is: the first.
    pub(crate) fn file(&self) -> &File {
        &self.parts[0].file
    }

    /// What is at a position; `None` behind the end.
    pub(crate) fn at(&self, position: u64) -> Option<Piece<'_>> {
        let part = &self.parts[self.parts.partition_point(|part| part.end <= position)..].first()?;
        let within = position - part.start;
        Some(match part.length.checked_sub(within) {
            Some(left) if left > 0 => Piece::File(&part.file, within, left),
            _ => Piece::Zeroes(part.end - position),
        })
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    fn file(length: u64) -> OwnedFd {
        let file = TempFile::new().unwrap().into_file();
        file.set_len(length).unwrap();
        file.into()
    }

    fn shape(parts: &Parts, position: u64) -> Option<(bool, u64, u64)> {
        Some(match parts.at(position)? {
            Piece::File(_, position, left) => (true, position, left),
            Piece::Zeroes(left) => (false, 0, left),
        })
    }

    #[test]
    fn every_position_has_one_part() {
        let parts =
            Parts::follow_each_other([(file(5000), 8192), (file(4096), 4096), (file(9000), 4096)]).unwrap();
        assert_eq!(parts.size(), 16384);
        for (position, expected) in [
            (0, Some((true, 0, 5000))),
            (4999, Some((true, 4999, 1))),
            (5000, Some((false, 0, 3192))),
            (8191, Some((false, 0, 1))),
            (8192, Some((true, 0, 4096))),
            (12287, Some((true, 4095, 1))),
            (12288, Some((true, 0, 4096))),
            (16383, Some((true, 4095, 1))),
            (16384, None),
            (u64::MAX, None),
        ] {
            assert_eq!(shape(&parts, position), expected, "{position}");
        }
    }

    #[test]
    fn one_file_is_all_there_is() {
        let parts = Parts::whole(file(700)).unwrap();
        assert_eq!((parts.size(), shape(&parts, 699), shape(&parts, 700)), (700, Some((true, 699, 1)), None));
        assert!(Parts::follow_each_other([]).is_err());
        assert!(Parts::follow_each_other([(file(1), u64::MAX), (file(1), 4096)]).is_err());
    }
}
