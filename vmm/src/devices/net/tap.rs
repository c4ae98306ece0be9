//! A queue of the tap.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use event_manager::EventSet;

use crate::devices::chain::IoFault;
use crate::devices::{DeviceEvents, DeviceFault, MemoryFault};

/// One queue, and what it is watched for.
#[derive(Debug)]
pub(crate) struct TapQueue {
    fd: OwnedFd,
    watched: EventSet,
}

/// What came of reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// A packet of so many bytes, its header included.
    Packet(usize),
    /// Nothing is there.
    Nothing,
    /// The tap does not exist any more.
    Gone,
}

/// What came of writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
    /// The packet is on its way.
    Yes,
    /// The host's kernel has too many already.
    NotNow,
    /// It does not take this one.
    Refused,
    /// The tap does not exist any more.
    Gone,
}

impl TapQueue {
    /// Takes a queue, whose reads and writes must not wait.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        TapQueue { fd, watched: EventSet::empty() }
    }

    /// Lets the device hear of the tap's end, and of nothing else yet.
    pub(crate) fn start(&self, token: u32, events: &mut DeviceEvents<'_, '_>) -> Result<(), DeviceFault> {
        events.add(self.fd.as_fd(), token, self.watched)
    }

    /// Watches for packets, for room, or for neither.
    pub(crate) fn watch(
        &mut self,
        token: u32,
        wanted: EventSet,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        if self.watched != wanted {
            events.modify(self.fd.as_fd(), token, wanted)?;
            self.watched = wanted;
        }
        Ok(())
    }

    /// Stops watching, before it is closed.
    pub(crate) fn stop(&self, events: &mut DeviceEvents<'_, '_>) -> Result<(), DeviceFault> {
        events.remove(self.fd.as_fd())
    }

    /// The result of a read.
    pub(crate) fn received(result: io::Result<usize>) -> Received {
        match result {
            Ok(0) => Received::Gone,
            Ok(length) => Received::Packet(length),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => Received::Nothing,
                _ => Received::Gone,
            },
        }
    }

    /// The result of a write.
    pub(crate) fn sent(result: Result<(), IoFault>) -> Result<Sent, MemoryFault> {
        let error = match result {
            Ok(()) => return Ok(Sent::Yes),
            Err(IoFault::Memory(fault)) => return Err(fault),
            Err(IoFault::Host(error)) => error,
        };
        Ok(match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR) => Sent::NotNow,
            // No interface behind the descriptor; for the socket of a test, nobody at the other end.
            Some(libc::EBADFD | libc::ENXIO | libc::EPIPE | libc::ECONNREFUSED) => Sent::Gone,
            // It is down, has no memory, or does not like the packet.
            _ => Sent::Refused,
        })
    }
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
