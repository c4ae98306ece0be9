//! Asking the device for connections to the guest, from the control thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::stream::Stream;

/// Connections that may be asked for ahead of the device thread.
const MAX_REQUESTS: usize = 256;

/// Opens connections to the guest, from another thread.
#[derive(Debug)]
pub struct VsockConnector {
    requests: SyncSender<(u32, Stream)>,
    wake: Arc<EventFd>,
}

impl VsockConnector {
    /// Has `stream` joined to a port of the guest. If the guest does not accept, or not in time, the stream is closed.
    ///
    /// Fails when too many requests wait already, or the device is gone.
    pub fn connect(&self, port: u32, stream: OwnedFd) -> io::Result<()> {
        let stream = Stream::new(stream)?;
        self.requests.try_send((port, stream)).map_err(|error| match error {
            TrySendError::Full(_) => io::Error::new(io::ErrorKind::WouldBlock, "too many connections wait"),
            TrySendError::Disconnected(_) => {
                io::Error::new(io::ErrorKind::NotConnected, "the device is gone")
            }
        })?;
        self.wake.write(1)
    }
}

/// The device's end.
#[derive(Debug)]
pub(crate) struct Requests {
    requests: Receiver<(u32, Stream)>,
    /// Readable when there is a request.
    pub wake: Arc<EventFd>,
}

impl Requests {
    /// The next port and stream that were asked for.
    pub(crate) fn next(&self) -> Option<(u32, Stream)> {
        self.requests.try_recv().ok()
    }
}

/// Both ends of a queue of requests.
pub(crate) fn connector() -> io::Result<(VsockConnector, Requests)> {
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let (sender, requests) = sync_channel(MAX_REQUESTS);
    Ok((VsockConnector { requests: sender, wake: wake.clone() }, Requests { requests, wake }))
}
