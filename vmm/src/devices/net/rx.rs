//! From the tap to the guest.
//!
//! A packet's length is known only when it has been read, and what does not fit is lost. So buffers for the longest packet are
//! taken from the queue ahead; a packet fills as many as it needs, and the others wait for the next one.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use super::header::{HEADER_SIZE, NUM_BUFFERS};
use super::tap::{Received, TapQueue};
use crate::devices::{Chain, DeviceFault, Virtqueue};

/// Packets, and bytes of them, that are moved in one go, before other devices have a turn.
const BATCH: usize = 64;
const BATCH_BYTES: usize = 512 * 1024;

/// The most pieces of memory that the kernel takes in one call (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Fills one receive queue.
#[derive(Default)]
pub(crate) struct Receiver {
    buffers: Buffers,
    /// A packet that was read when there were too few buffers for the longest: it may fit, or has to wait.
    aside: Vec<u8>,
    /// Bytes of the packet that waits.
    waiting: Option<usize>,
    /// The queue has no buffers: only its driver can change that.
    starved: bool,
}

/// How receiving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nothing else is there.
    Drained,
    /// There may be more.
    More,
    /// There are no buffers.
    Starved,
    /// The tap is gone.
    Gone,
}

impl Receiver {
    /// Whether it waits for its driver.
    pub(crate) fn is_starved(&self) -> bool {
        self.starved
    }

    /// Has it try again, whatever it waits for.
    pub(crate) fn wake(&mut self) {
        self.starved = false;
    }

    /// Forgets everything that belongs to the driver, the packet that waits for it included.
    pub(crate) fn reset(&mut self) {
        *self = Receiver::default();
    }

    /// Moves packets of at most `longest` bytes. Returns how it ended and how many packets were dropped.
    pub(crate) fn receive(
        &mut self,
        tap: &TapQueue,
        queue: &mut Virtqueue,
        longest: usize,
    ) -> Result<(Outcome, u64), DeviceFault> {
        let (mut outcome, mut dropped) = (Outcome::More, 0);
        let (mut packets, mut bytes) = (0, 0);
        while packets < BATCH && bytes < BATCH_BYTES {
            let length = match self.next(tap, queue, longest)? {
                Next::Packet(length) => length,
                Next::Dropped => {
                    dropped += 1;
                    0
                }
                Next::None(reason) => {
                    outcome = reason;
                    break;
                }
            };
            packets += 1;
            bytes += length;
        }
        if bytes > 0 {
            queue.signal()?;
        }
        self.starved = outcome == Outcome::Starved;
        Ok((outcome, dropped))
    }

    /// Moves one packet.
    fn next(&mut self, tap: &TapQueue, queue: &mut Virtqueue, longest: usize) -> Result<Next, DeviceFault> {
        if let Some(length) = self.waiting {
            if !self.buffers.fill(queue, length)? {
                // With every buffer that the driver can offer at a time it does not fit.
                if self.buffers.chains.len() < usize::from(queue.size()) {
                    return Ok(Next::None(Outcome::Starved));
                }
                self.waiting = None;
                return Ok(Next::Dropped);
            }
            self.waiting = None;
            self.buffers.write(&self.aside[..length])?;
            self.buffers.complete(queue, length)?;
            return Ok(Next::Packet(length));
        }
        if self.buffers.fill(queue, longest)? {
            return Ok(match TapQueue::received(self.buffers.read(tap.as_fd())) {
                Received::Packet(length) => {
                    self.buffers.complete(queue, length)?;
                    Next::Packet(length)
                }
                Received::Nothing => Next::None(Outcome::Drained),
                Received::Gone => Next::None(Outcome::Gone),
            });
        }
        if self.buffers.room == 0 {
            return Ok(Next::None(Outcome::Starved));
        }
        self.aside.resize(longest, 0);
        Ok(match TapQueue::received(read(tap.as_fd(), &mut self.aside)) {
            Received::Packet(length) => {
                self.waiting = Some(length);
                return self.next(tap, queue, longest);
            }
            Received::Nothing => Next::None(Outcome::Drained),
            Received::Gone => Next::None(Outcome::Gone),
        })
    }
}

enum Next {
    /// One of so many bytes was moved.
    Packet(usize),
    /// One was dropped.
    Dropped,
    /// None was.
    None(Outcome),
}

/// Buffers that were taken from the queue and hold nothing yet, oldest first.
#[derive(Default)]
struct Buffers {
    chains: VecDeque<Buffer>,
    /// The memory of all chains, in order. It is theirs, so it is mapped for as long as they are here.
    pieces: Vec<libc::iovec>,
    /// Bytes of all.
    room: usize,
}

// SAFETY: the addresses in `pieces` are those of guest memory, which `chains` keep mapped; any thread may use it.
unsafe impl Send for Buffers {}

struct Buffer {
    chain: Chain,
    /// How many of the pieces are its.
    pieces: usize,
    size: usize,
}

impl Buffers {
    /// Takes buffers from the queue until there is room for so many bytes; `false` when it has too few.
    fn fill(&mut self, queue: &mut Virtqueue, wanted: usize) -> Result<bool, DeviceFault> {
        while self.room < wanted {
            let Some(chain) = queue.pop()? else { return Ok(false) };
            let size = chain.writable_len();
            if size < HEADER_SIZE {
                return Err(DeviceFault::Protocol("a receive buffer has no room for a header"));
            }
            let before = self.pieces.len();
            chain.add_writable_to(&mut self.pieces)?;
            if self.pieces.len() > MAX_PIECES {
                return Err(DeviceFault::Protocol("receive buffers are in too many pieces"));
            }
            self.room += size;
            self.chains.push_back(Buffer { chain, pieces: self.pieces.len() - before, size });
        }
        Ok(true)
    }

    /// Reads a packet into them.
    fn read(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let count = self.pieces.len() as libc::c_int;
        // SAFETY: each piece is guest memory that `chains` keep mapped and that no Rust reference covers.
        let result = unsafe { libc::readv(fd.as_raw_fd(), self.pieces.as_ptr(), count) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Writes a packet into them, for which there must be room.
    fn write(&mut self, mut packet: &[u8]) -> Result<(), DeviceFault> {
        for buffer in &self.chains {
            let written = buffer.chain.writer().write(packet)?;
            packet = &packet[written..];
            if packet.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// Gives those that a packet of `length` bytes is in back to the driver.
    fn complete(&mut self, queue: &mut Virtqueue, length: usize) -> Result<(), DeviceFault> {
        let (mut count, mut pieces, mut room) = (0u16, 0, 0);
        for buffer in &self.chains {
            count += 1;
            pieces += buffer.pieces;
            room += buffer.size;
            if room >= length {
                break;
            }
        }
        if let Some(first) = self.chains.front() {
            let mut writer = first.chain.writer();
            writer.skip(NUM_BUFFERS)?;
            writer.write_obj(count.to_le())?;
        }
        self.pieces.drain(..pieces);
        self.room -= room;
        let mut left = length;
        let used = self.chains.drain(..usize::from(count)).map(|buffer| {
            let written = left.min(buffer.size);
            left -= written;
            // A packet has less than 2³² bytes.
            (buffer.chain, written as u32)
        });
        Ok(queue.complete_together(used)?)
    }
}

fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and length are those of a live, exclusive slice.
    let result = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
