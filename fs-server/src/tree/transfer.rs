//! Moving file contents between the FUSE library's buffers and files.

use std::fs::File;
use std::io::{Error, IoSlice, Result};

use fuse_backend_rs::api::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use rustix::io::{ReadWriteFlags, pread, pwritev2};

/// Reads from a file into a reply.
pub(super) fn read(file: &File, reply: &mut dyn ZeroCopyWriter, size: usize, offset: u64) -> Result<usize> {
    reply.write_from(&mut At { file, flags: ReadWriteFlags::empty() }, size, offset)
}

/// Writes a request's data to a file as the guest's file was opened (`O_APPEND`, `O_DSYNC`, `O_SYNC`).
pub(super) fn write(
    file: &File,
    request: &mut dyn ZeroCopyReader,
    size: usize,
    offset: u64,
    opened: u32,
) -> Result<usize> {
    let has = |flag: libc::c_int| opened & flag as u32 == flag as u32;
    let flag = |flag, meaning| if has(flag) { meaning } else { ReadWriteFlags::empty() };
    let flags = flag(libc::O_APPEND, ReadWriteFlags::APPEND)
        | flag(libc::O_DSYNC, ReadWriteFlags::DSYNC)
        | flag(libc::O_SYNC, ReadWriteFlags::SYNC);
    request.read_to(&mut At { file, flags }, size, offset)
}

/// A file as the library wants one.
struct At<'a> {
    file: &'a File,
    flags: ReadWriteFlags,
}

impl FileReadWriteVolatile for At<'_> {
    fn read_volatile(&mut self, _slice: FileVolatileSlice<'_>) -> Result<usize> {
        Err(unpositioned())
    }

    fn write_volatile(&mut self, _slice: FileVolatileSlice<'_>) -> Result<usize> {
        Err(unpositioned())
    }

    fn read_at_volatile(&mut self, slice: FileVolatileSlice<'_>, offset: u64) -> Result<usize> {
        // SAFETY: the slice is memory of the library's reply buffer, valid and used by nobody else during the call.
        let buffer = unsafe { std::slice::from_raw_parts_mut(slice.as_ptr(), slice.len()) };
        Ok(pread(self.file, buffer, offset)?)
    }

    fn write_at_volatile(&mut self, slice: FileVolatileSlice<'_>, offset: u64) -> Result<usize> {
        // SAFETY: the slice is memory of the request buffer, valid and written by nobody during the call.
        let data = unsafe { std::slice::from_raw_parts(slice.as_ptr().cast_const(), slice.len()) };
        Ok(pwritev2(self.file, &[IoSlice::new(data)], offset, self.flags)?)
    }
}

/// Requests always say where in the file.
fn unpositioned() -> Error {
    Error::from_raw_os_error(libc::ESPIPE)
}
