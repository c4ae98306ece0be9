//! Descriptor chains whose every buffer is known to lie inside guest memory.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::queue_fault::QueueFault;
use crate::memory::{GuestRam, SharedRam};

/// The most buffers handed to the kernel in one call: what a queue's longest chain has, and a header.
const MAX_IOVECS: usize = 258;

/// A read or write past the end of a chain's buffers.
#[derive(Debug, thiserror::Error)]
pub enum MemoryFault {
    /// The driver's buffers are too short for what must be in them.
    #[error("a descriptor chain has {available} bytes where {wanted} are needed")]
    TooShort {
        /// Bytes the device needs.
        wanted: usize,
        /// Bytes the driver provided.
        available: usize,
    },
    /// Guest memory refused an access that was checked before.
    #[error("guest memory can't be accessed")]
    Access(#[source] vm_memory::GuestMemoryError),
}

/// A guest-physical range inside guest memory, never empty.
#[derive(Debug, Clone, Copy)]
struct Segment {
    address: GuestAddress,
    length: usize,
}

/// Room for a chain's buffers that is used again and again.
#[derive(Debug, Default)]
pub(super) struct Place(Vec<Segment>);

/// One descriptor chain: first buffers that the device reads, then buffers that it writes.
///
/// The invariant: every segment lies wholly inside guest memory. The *contents* change at the guest's will: read a value
/// once, check it, and use what was checked.
///
/// A chain must end in [`crate::devices::Virtqueue::complete`] or [`crate::devices::Virtqueue::put_back`].
#[derive(Debug)]
#[must_use]
pub(crate) struct Chain {
    head: u16,
    ram: SharedRam,
    segments: Vec<Segment>,
    /// How many of the segments are readable.
    readable: usize,
}

impl Chain {
    /// Walks a chain to its end; see [`QueueFault`] for what is refused. Zero-length buffers are skipped.
    /// `place` is where its buffers are noted.
    pub(super) fn walk(
        mut descriptors: DescriptorChain<&GuestRam>,
        limit: usize,
        ram: &SharedRam,
        place: Place,
    ) -> Result<Self, QueueFault> {
        let head = descriptors.head_index();
        let mut chain = Chain { head, ram: ram.clone(), segments: place.0, readable: 0 };
        let mut last: Option<Descriptor> = None;
        let mut count = 0;
        let mut writing = false;
        for descriptor in descriptors.by_ref() {
            count += 1;
            if count > limit {
                return Err(QueueFault::LongChain(head));
            }
            if descriptor.is_write_only() {
                writing = true;
            } else if writing {
                return Err(QueueFault::Order(head));
            }
            last = Some(descriptor);
            let length = descriptor.len();
            if length == 0 {
                continue;
            }
            let segment = Segment { address: descriptor.addr(), length: length as usize };
            if !GuestMemoryBackend::check_range(&**ram, segment.address, segment.length) {
                return Err(QueueFault::BufferRange { head, address: segment.address.0, length });
            }
            chain.segments.push(segment);
            if !writing {
                chain.readable += 1;
            }
        }
        // The iterator stops at a broken link just as at the end: a complete chain ends without a link.
        match last {
            Some(last) if !last.has_next() => Ok(chain),
            Some(_) if count >= limit => Err(QueueFault::LongChain(head)),
            _ => Err(QueueFault::BrokenChain(head)),
        }
    }

    /// Index of the chain's first descriptor: unique among the chains in flight of its queue.
    pub(crate) fn head(&self) -> u16 {
        self.head
    }

    /// What another chain's buffers can be noted in.
    pub(super) fn into_place(mut self) -> Place {
        self.segments.clear();
        Place(self.segments)
    }

    /// Bytes the device may read.
    pub(crate) fn readable_len(&self) -> usize {
        total(&self.segments[..self.readable])
    }

    /// Bytes the device may write.
    pub(crate) fn writable_len(&self) -> usize {
        total(&self.segments[self.readable..])
    }

    /// Reads the device-readable buffers from their start.
    pub(crate) fn reader(&self) -> ChainReader<'_> {
        ChainReader(Cursor::new(&self.ram, &self.segments[..self.readable]))
    }

    /// Adds the device-writable buffers to a list of host memory. What the list says holds for as long as the chain exists.
    pub(crate) fn add_writable_to(&self, vectors: &mut Vec<libc::iovec>) -> Result<(), MemoryFault> {
        for segment in &self.segments[self.readable..] {
            for slice in GuestMemoryBackend::get_slices(&*self.ram, segment.address, segment.length) {
                vectors.push(vector(&slice.map_err(MemoryFault::Access)?));
            }
        }
        Ok(())
    }

    /// Writes the device-writable buffers from their start.
    pub(crate) fn writer(&self) -> ChainWriter<'_> {
        ChainWriter(Cursor::new(&self.ram, &self.segments[self.readable..]))
    }
}

/// The lengths of a chain's descriptors fit 32 bits together (the iterator sees to that), so this can't overflow.
fn total(segments: &[Segment]) -> usize {
    segments.iter().map(|segment| segment.length).sum()
}

/// A position in a list of segments.
#[derive(Debug, Clone)]
struct Cursor<'a> {
    ram: &'a GuestRam,
    segments: &'a [Segment],
    /// Bytes of the first segment that are behind us.
    offset: usize,
    remaining: usize,
}

impl<'a> Cursor<'a> {
    fn new(ram: &'a GuestRam, segments: &'a [Segment]) -> Self {
        Cursor { ram, segments, offset: 0, remaining: total(segments) }
    }

    /// The rest of the current segment: address and length.
    fn current(&self) -> Option<(GuestAddress, usize)> {
        // The segment was checked to lie in guest memory, so the sum can't overflow.
        self.segments
            .first()
            .map(|first| (GuestAddress(first.address.0 + self.offset as u64), first.length - self.offset))
    }

    fn advance(&mut self, mut count: usize) {
        while let Some((_, left)) = self.current() {
            let step = left.min(count);
            self.remaining -= step;
            if step < left {
                self.offset += step;
                return;
            }
            count -= step;
            self.segments = &self.segments[1..];
            self.offset = 0;
        }
    }

    fn require(&self, wanted: usize) -> Result<(), MemoryFault> {
        if wanted > self.remaining {
            return Err(MemoryFault::TooShort { wanted, available: self.remaining });
        }
        Ok(())
    }

    /// Adds up to `limit` bytes from here on as host memory, as far as there is room in the list; returns how many.
    fn add_to(&self, vectors: &mut Vectors, limit: usize) -> Result<usize, MemoryFault> {
        let mut rest = self.clone();
        let mut left = limit.min(self.remaining);
        let wanted = left;
        'all: while let Some((address, length)) = rest.current().filter(|_| left > 0) {
            let length = length.min(left);
            for slice in GuestMemoryBackend::get_slices(rest.ram, address, length) {
                let slice = slice.map_err(MemoryFault::Access)?;
                if !vectors.push(vector(&slice)) {
                    break 'all;
                }
                left -= slice.len();
            }
            rest.advance(length);
        }
        Ok(wanted - left)
    }
}

/// A list for one system call, without an allocation.
struct Vectors {
    list: [MaybeUninit<libc::iovec>; MAX_IOVECS],
    count: usize,
}

impl Vectors {
    fn new() -> Self {
        Vectors { list: [MaybeUninit::uninit(); MAX_IOVECS], count: 0 }
    }

    /// `false` when the list is full.
    fn push(&mut self, vector: libc::iovec) -> bool {
        match self.list.get_mut(self.count) {
            Some(place) => {
                place.write(vector);
                self.count += 1;
                true
            }
            None => false,
        }
    }

    fn as_mut_ptr(&mut self) -> *mut libc::iovec {
        self.list.as_mut_ptr().cast()
    }
}

/// Guest memory as the kernel wants it named. It stays mapped for as long as any chain exists.
fn vector(slice: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
}

/// Reads what the driver wrote; made by [`Chain::reader`].
#[derive(Debug, Clone)]
pub(crate) struct ChainReader<'a>(Cursor<'a>);

impl ChainReader<'_> {
    /// Bytes left.
    pub(crate) fn remaining(&self) -> usize {
        self.0.remaining
    }

    /// Copies up to `buffer.len()` bytes; less only at the end.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, MemoryFault> {
        let mut done = 0;
        while done < buffer.len() {
            let Some((address, length)) = self.0.current() else { break };
            let length = length.min(buffer.len() - done);
            self.0.ram.read_slice(&mut buffer[done..done + length], address).map_err(MemoryFault::Access)?;
            self.0.advance(length);
            done += length;
        }
        Ok(done)
    }

    /// Fills `buffer` or fails without reading anything.
    pub(crate) fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), MemoryFault> {
        self.0.require(buffer.len())?;
        self.read(buffer).map(|_| ())
    }

    /// Reads one plain-data value.
    pub(crate) fn read_obj<T: ByteValued>(&mut self) -> Result<T, MemoryFault> {
        let mut value = T::zeroed();
        self.read_exact(value.as_mut_slice())?;
        Ok(value)
    }

    /// Skips `count` bytes, or fails.
    pub(crate) fn skip(&mut self, count: usize) -> Result<(), MemoryFault> {
        self.0.require(count)?;
        self.0.advance(count);
        Ok(())
    }

    /// Writes up to `limit` bytes into a descriptor, in one system call straight from guest memory: `pwritev` at
    /// `position`, or `writev` without one. Returns the number of bytes written (may be less than asked for).
    pub(crate) fn write_to(
        &mut self,
        fd: BorrowedFd<'_>,
        limit: usize,
        position: Option<u64>,
    ) -> Result<usize, IoFault> {
        let mut vectors = Vectors::new();
        self.0.add_to(&mut vectors, limit)?;
        let (list, count) = (vectors.as_mut_ptr(), vectors.count as libc::c_int);
        let result = match position {
            // SAFETY: each vector points into guest memory that `self` keeps mapped; the kernel only reads from it.
            None => unsafe { libc::writev(fd.as_raw_fd(), list, count) },
            Some(position) => {
                let position = file_position(position)?;
                // SAFETY: as above.
                unsafe { libc::pwritev(fd.as_raw_fd(), list, count, position) }
            }
        };
        let done = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        self.0.advance(done);
        Ok(done)
    }

    /// Sends `head` and then everything that is left as one packet, without waiting, straight from guest memory.
    /// `EMSGSIZE` when that is too long or too scattered.
    pub(crate) fn send_packet(&mut self, socket: BorrowedFd<'_>, head: &[u8]) -> Result<(), IoFault> {
        let mut vectors = self.with_head(head)?;
        // SAFETY: `msghdr` is plain data, for which zeros are valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = vectors.as_mut_ptr();
        message.msg_iovlen = vectors.count;
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: each vector points to `head` or into guest memory that `self` keeps mapped; the kernel only reads them.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) };
        if sent < 0 {
            return Err(io::Error::last_os_error().into());
        }
        self.0.advance(self.0.remaining);
        Ok(())
    }

    /// Writes `head` and then everything that is left into a descriptor that takes it whole or not at all, straight from guest
    /// memory. `EMSGSIZE` when it is too scattered.
    pub(crate) fn write_packet(&mut self, fd: BorrowedFd<'_>, head: &[u8]) -> Result<(), IoFault> {
        let mut vectors = self.with_head(head)?;
        let (list, count) = (vectors.as_mut_ptr(), vectors.count as libc::c_int);
        // SAFETY: each vector points to `head` or into guest memory that `self` keeps mapped; the kernel only reads them.
        if unsafe { libc::writev(fd.as_raw_fd(), list, count) } < 0 {
            return Err(io::Error::last_os_error().into());
        }
        self.0.advance(self.0.remaining);
        Ok(())
    }

    /// `head` and everything that is left.
    fn with_head(&self, head: &[u8]) -> Result<Vectors, IoFault> {
        let mut vectors = Vectors::new();
        vectors.push(libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
        if self.0.add_to(&mut vectors, self.0.remaining)? != self.0.remaining {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE).into());
        }
        Ok(vectors)
    }
}

/// Writes what the driver will read; made by [`Chain::writer`].
#[derive(Debug, Clone)]
pub(crate) struct ChainWriter<'a>(Cursor<'a>);

impl ChainWriter<'_> {
    /// Bytes left.
    pub(crate) fn remaining(&self) -> usize {
        self.0.remaining
    }

    /// Copies up to `buffer.len()` bytes; less only at the end.
    pub(crate) fn write(&mut self, buffer: &[u8]) -> Result<usize, MemoryFault> {
        let mut done = 0;
        while done < buffer.len() {
            let Some((address, length)) = self.0.current() else { break };
            let length = length.min(buffer.len() - done);
            self.0.ram.write_slice(&buffer[done..done + length], address).map_err(MemoryFault::Access)?;
            self.0.advance(length);
            done += length;
        }
        Ok(done)
    }

    /// Writes all of `buffer` or fails without writing anything.
    pub(crate) fn write_all(&mut self, buffer: &[u8]) -> Result<(), MemoryFault> {
        self.0.require(buffer.len())?;
        self.write(buffer).map(|_| ())
    }

    /// Writes one plain-data value.
    pub(crate) fn write_obj<T: ByteValued>(&mut self, value: T) -> Result<(), MemoryFault> {
        self.write_all(value.as_slice())
    }

    /// Skips `count` bytes, or fails.
    pub(crate) fn skip(&mut self, count: usize) -> Result<(), MemoryFault> {
        self.0.require(count)?;
        self.0.advance(count);
        Ok(())
    }

    /// Reads up to `limit` bytes from a descriptor, in one system call straight into guest memory: `preadv` at
    /// `position`, or `readv` without one. Returns the number of bytes read (0 at the end of a file).
    pub(crate) fn read_from(
        &mut self,
        fd: BorrowedFd<'_>,
        limit: usize,
        position: Option<u64>,
    ) -> Result<usize, IoFault> {
        let position = position.map(file_position).transpose()?;
        self.fill(limit, |list, count| match position {
            // SAFETY: each vector points into guest memory that `self` keeps mapped and that no Rust reference covers.
            None => unsafe { libc::readv(fd.as_raw_fd(), list, count) },
            // SAFETY: as above.
            Some(position) => unsafe { libc::preadv(fd.as_raw_fd(), list, count, position) },
        })
    }

    /// The same from a file at `position`, as far as it needs no waiting: `WouldBlock` for what the host has to fetch, which it begins
    /// with then, and `EOPNOTSUPP` from file systems that can't tell.
    pub(crate) fn read_ready_from(
        &mut self,
        file: BorrowedFd<'_>,
        limit: usize,
        position: u64,
    ) -> Result<usize, IoFault> {
        let position = file_position(position)?;
        self.fill(limit, |list, count| {
            // SAFETY: as in `read_from`.
            unsafe { libc::preadv2(file.as_raw_fd(), list, count, position, libc::RWF_NOWAIT) }
        })
    }

    /// Has `read`, a system call that tells how many bytes it read, fill up to `limit` bytes from here on.
    fn fill(
        &mut self,
        limit: usize,
        read: impl FnOnce(*const libc::iovec, libc::c_int) -> libc::ssize_t,
    ) -> Result<usize, IoFault> {
        let mut vectors = Vectors::new();
        self.0.add_to(&mut vectors, limit)?;
        let result = read(vectors.as_mut_ptr(), vectors.count as libc::c_int);
        let done = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        self.0.advance(done);
        Ok(done)
    }
}

fn file_position(position: u64) -> Result<libc::off_t, io::Error> {
    libc::off_t::try_from(position).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Why data couldn't be moved between a chain and a descriptor.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IoFault {
    /// The chain's side.
    #[error("a buffer can't be used")]
    Memory(#[from] MemoryFault),
    /// The descriptor's side.
    #[error("the host refused the transfer")]
    Host(#[from] io::Error),
}
