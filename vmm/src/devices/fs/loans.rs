//! Files that the server has lent: the device itself moves what is read from them and written to them, straight between file and
//! guest memory, as it does with disks.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use bulkhead_vmm_protocol::MAX_FUSE_MESSAGE;
use bulkhead_vmm_protocol::fuse::{OUT_HEADER, opcode};
use bulkhead_vmm_protocol::loan::Loan;

use super::message::{ReplyHeader, RequestHeader};
use crate::devices::chain::{ChainReader, ChainWriter, IoFault};
use crate::devices::{DeviceFault, MemoryFault};

/// The most files at a time; the one of the oldest node goes for another.
const MAX_LOANS: usize = 128;

/// `FATTR_MODE` in `struct fuse_setattr_in`.
const MODE: u32 = 1 << 0;

/// Bytes of `struct fuse_write_out`.
const WRITE_OUT: usize = 8;

/// Writes of files that were opened with one of these are the server's.
const SERVERS: u32 = (libc::O_APPEND | libc::O_SYNC | libc::O_DSYNC) as u32;

/// The most nodes that one request forgets: as many as fit into a message.
const MAX_FORGOTTEN: usize = MAX_FUSE_MESSAGE / 16;

/// The files, by node id and handle.
#[derive(Debug, Default)]
pub(crate) struct Loans {
    open: BTreeMap<(u64, u64), File>,
}

/// The part of `struct fuse_read_in` and `struct fuse_write_in` that both have in common.
struct Transfer {
    handle: u64,
    offset: u64,
    size: usize,
    /// As in open(2).
    flags: u32,
}

impl Transfer {
    fn read(body: &mut ChainReader<'_>) -> Result<Self, MemoryFault> {
        let handle = u64::from_le(body.read_obj()?);
        let offset = u64::from_le(body.read_obj()?);
        let size = u32::from_le(body.read_obj()?) as usize;
        let _kind: u32 = body.read_obj()?;
        let _lock_owner: u64 = body.read_obj()?;
        let flags = u32::from_le(body.read_obj()?);
        let _padding: u32 = body.read_obj()?;
        Ok(Transfer { handle, offset, size, flags })
    }
}

/// Bytes of what [`Transfer::read`] takes.
const TRANSFER: usize = 40;

impl Loans {
    /// Takes a file.
    pub(crate) fn take(&mut self, loan: Loan, file: File) {
        if self.open.len() >= MAX_LOANS {
            self.open.pop_first();
        }
        self.open.insert((loan.node, loan.handle), file);
    }

    /// Gives all back.
    pub(crate) fn clear(&mut self) {
        self.open.clear();
    }

    /// Gives back what a request ends that goes to the server.
    pub(crate) fn before(
        &mut self,
        header: &RequestHeader,
        mut body: ChainReader<'_>,
    ) -> Result<(), MemoryFault> {
        if self.open.is_empty() {
            return Ok(());
        }
        match header.opcode() {
            opcode::RELEASE if body.remaining() >= size_of::<u64>() => {
                self.open.remove(&(header.node(), u64::from_le(body.read_obj()?)));
            }
            // In a session in which files are not opened they are not released either.
            opcode::FORGET => self.forget(header.node()),
            opcode::BATCH_FORGET if body.remaining() >= size_of::<u64>() => {
                body.skip(size_of::<u64>())?;
                for _ in 0..(body.remaining() / 16).min(MAX_FORGOTTEN) {
                    self.forget(u64::from_le(body.read_obj()?));
                    let _lookups: u64 = body.read_obj()?;
                }
            }
            // Set-id bits stay with a file that root writes to, which takes the server.
            opcode::SETATTR if body.remaining() >= size_of::<u32>() => {
                let valid = u32::from_le(body.read_obj()?);
                if valid & MODE != 0 {
                    self.forget(header.node());
                }
            }
            opcode::INIT | opcode::DESTROY => self.clear(),
            _ => {}
        }
        Ok(())
    }

    fn forget(&mut self, node: u64) {
        if self.open.range((node, 0)..=(node, u64::MAX)).next().is_some() {
            self.open.retain(|(of, _), _| *of != node);
        }
    }

    /// Reads or writes if that is what a request asks for and the file is here: the length of the reply then.
    pub(crate) fn serve(
        &self,
        header: &RequestHeader,
        mut body: ChainReader<'_>,
        mut reply: ChainWriter<'_>,
    ) -> Result<Option<u32>, DeviceFault> {
        let opcode = header.opcode();
        if self.open.is_empty()
            || !matches!(opcode, opcode::READ | opcode::WRITE)
            || body.remaining() < TRANSFER
        {
            return Ok(None);
        }
        let transfer = Transfer::read(&mut body)?;
        let Some(file) = self.open.get(&(header.node(), transfer.handle)) else { return Ok(None) };
        let mut head = reply.clone();
        let done = if opcode == opcode::READ {
            if body.remaining() > 0 {
                return Ok(None);
            }
            reply.skip(OUT_HEADER)?;
            read(file, &mut reply, &transfer)?.map(|read| (OUT_HEADER + read, None))
        } else {
            let is_servers = transfer.flags & SERVERS != 0;
            if is_servers || body.remaining() != transfer.size || reply.remaining() < OUT_HEADER + WRITE_OUT {
                return Ok(None);
            }
            write(file, &mut body, &transfer)?.map(|written| (OUT_HEADER + WRITE_OUT, Some(written)))
        };
        let (header, written) = match done {
            // It was lent to be read only, or to be written only: the server has another.
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => return Ok(None),
            Ok((length, written)) => {
                (ReplyHeader { length: length as u32, error: 0, unique: header.unique() }, written)
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                (ReplyHeader::error(header.unique(), errno), None)
            }
        };
        head.write_all(&header.to_bytes())?;
        if let Some(written) = written {
            head.write_obj(written as u64)?;
        }
        Ok(Some(header.length))
    }
}

/// As many bytes as there are, want to be read and fit.
fn read(
    file: &File,
    reply: &mut ChainWriter<'_>,
    transfer: &Transfer,
) -> Result<io::Result<usize>, MemoryFault> {
    let wanted = transfer.size.min(reply.remaining());
    until(wanted, |done| reply.read_from(file.as_fd(), wanted - done, Some(transfer.offset + done as u64)))
}

fn write(
    file: &File,
    data: &mut ChainReader<'_>,
    transfer: &Transfer,
) -> Result<io::Result<usize>, MemoryFault> {
    let wanted = transfer.size;
    until(wanted, |done| data.write_to(file.as_fd(), wanted - done, Some(transfer.offset + done as u64)))
}

/// Goes on until `wanted` bytes are moved, or no more can be. An error tells only if nothing was moved before it.
fn until(
    wanted: usize,
    mut step: impl FnMut(usize) -> Result<usize, IoFault>,
) -> Result<io::Result<usize>, MemoryFault> {
    let mut done = 0;
    while done < wanted {
        match step(done) {
            Ok(0) => break,
            Ok(moved) => done += moved,
            Err(IoFault::Host(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(IoFault::Host(error)) if done == 0 => return Ok(Err(error)),
            Err(IoFault::Host(_)) => break,
            Err(IoFault::Memory(fault)) => return Err(fault),
        }
    }
    Ok(Ok(done))
}
