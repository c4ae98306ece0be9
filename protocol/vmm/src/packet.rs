//! Packets with file descriptors beside them (`SCM_RIGHTS`, unix(7)).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Result;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// A packet that was received.
#[derive(Debug)]
pub(crate) struct Received {
    /// Bytes in the buffer; 0 when the other end is closed.
    pub length: usize,
    /// What came with it, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// Whether there was more than fits, of either.
    pub cut: bool,
}

/// Receives one packet, with the descriptors that `space` has room for; there may be one more than was meant.
pub(crate) fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
    space: &mut [MaybeUninit<u8>],
    flags: RecvFlags,
) -> Result<Received> {
    // Closes what is not taken out of it.
    let mut control = RecvAncillaryBuffer::new(space);
    let mut slices = [IoSliceMut::new(buffer)];
    let received = recvmsg(socket, &mut slices, &mut control, flags | RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let cut = received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    Ok(Received { length: received.bytes, fds, cut })
}

/// Sends one packet with descriptors, for which `space` must have room.
pub(crate) fn send(
    socket: impl AsFd,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    space: &mut [MaybeUninit<u8>],
) -> Result<()> {
    let mut control = SendAncillaryBuffer::new(space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(rustix::io::Errno::MSGSIZE);
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).map(drop)
}
