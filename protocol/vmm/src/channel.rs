//! One end of the control socket: packets of JSON with file descriptors.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::packet::{self, Received};

/// The largest packet, in bytes.
pub const MAX_PACKET: usize = 64 * 1024;

/// The most descriptors beside one packet.
pub const MAX_FDS: usize = crate::MAX_PARTS;

/// Bytes that the kernel takes for as many descriptors.
const SPACE: usize = rustix::cmsg_space!(ScmRights(MAX_FDS));

/// One end of a control socket.
///
/// Both ends treat the other as untrusted: sizes are fixed, descriptors are closed when a packet isn't understood.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

/// A received message and the descriptors that came with it.
#[derive(Debug)]
pub struct Packet<M> {
    /// The message.
    pub message: M,
    /// Its descriptors, all close-on-exec; [`crate::FdIndex`] counts in here.
    pub fds: Vec<OwnedFd>,
}

/// What goes wrong on a control socket.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// No socket pair to be had.
    #[error("can't create a control socket pair")]
    Create(#[source] Errno),
    /// The time limit can't be set.
    #[error("can't set the control socket's time limit")]
    TimeLimit(#[source] Errno),
    /// Sending failed.
    #[error("can't send a control message")]
    Send(#[source] Errno),
    /// Receiving failed.
    #[error("can't receive a control message")]
    Receive(#[source] Errno),
    /// Nothing came within the time limit of [`Channel::set_timeout`].
    #[error("no control message came within the time limit")]
    TimedOut,
    /// The other end is gone.
    #[error("the other end of the control socket is closed")]
    Closed,
    /// A message is larger than [`MAX_PACKET`] or has more than [`MAX_FDS`] descriptors.
    #[error("a control message is larger than {MAX_PACKET} bytes or {MAX_FDS} descriptors")]
    TooLarge,
    /// Not the JSON that was expected.
    #[error("a control message can't be understood")]
    Malformed(#[source] serde_json::Error),
}

impl Channel {
    /// Creates a connected pair, both ends close-on-exec.
    pub fn pair() -> Result<(Channel, Channel), ChannelError> {
        let kind = SocketType::SEQPACKET;
        let (one, other) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
            .map_err(ChannelError::Create)?;
        Ok((Channel { socket: one }, Channel { socket: other }))
    }

    /// Bounds every later [`Channel::send`] and [`Channel::receive`]; `None` waits for ever.
    pub fn set_timeout(&self, limit: Option<Duration>) -> Result<(), ChannelError> {
        for timeout in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&self.socket, timeout, limit).map_err(ChannelError::TimeLimit)?;
        }
        Ok(())
    }

    /// Sends one message with its descriptors.
    pub fn send<M: Serialize>(&self, message: &M, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(message).map_err(ChannelError::Malformed)?;
        if bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
            return Err(ChannelError::TooLarge);
        }
        loop {
            match packet::send(&self.socket, &bytes, fds, &mut [MaybeUninit::uninit(); SPACE]) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Err(ChannelError::TimedOut),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ChannelError::Closed),
                Err(errno) => return Err(ChannelError::Send(errno)),
            }
        }
    }

    /// Receives one message with its descriptors.
    pub fn receive<M: DeserializeOwned>(&self) -> Result<Packet<M>, ChannelError> {
        let mut bytes = vec![0; MAX_PACKET];
        let mut reset = false;
        let Received { length, fds, cut } = loop {
            let mut space = [MaybeUninit::uninit(); SPACE];
            match packet::receive(&self.socket, &mut bytes, &mut space, RecvFlags::empty()) {
                Ok(received) => break received,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Err(ChannelError::TimedOut),
                // Told once by an end that closed without having read everything; what it had sent is still to be read.
                Err(Errno::CONNRESET) if !reset => reset = true,
                Err(Errno::CONNRESET) => return Err(ChannelError::Closed),
                Err(errno) => return Err(ChannelError::Receive(errno)),
            }
        };
        if cut || fds.len() > MAX_FDS {
            return Err(ChannelError::TooLarge);
        }
        if length == 0 {
            return Err(ChannelError::Closed);
        }
        let message = serde_json::from_slice(&bytes[..length]).map_err(ChannelError::Malformed)?;
        Ok(Packet { message, fds })
    }
}

impl From<OwnedFd> for Channel {
    fn from(socket: OwnedFd) -> Self {
        Channel { socket }
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.socket
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use super::*;
    use crate::message::{Event, ExitReason, FromVmm, Request};

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (shim, vmm) = Channel::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();

        shim.send(&Request::ConnectVsock { port: 7 }, &[writer.as_fd()]).unwrap();
        drop(writer);
        let packet: Packet<Request> = vmm.receive().unwrap();

        assert_eq!(packet.message, Request::ConnectVsock { port: 7 });
        let mut fds = packet.fds;
        assert_eq!(fds.len(), 1);
        let mut passed = File::from(fds.remove(0));
        passed.write_all(b"through").unwrap();
        drop(passed);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn a_closed_end_is_told_apart() {
        let (shim, vmm) = Channel::pair().unwrap();
        drop(vmm);
        assert!(matches!(shim.receive::<FromVmm>(), Err(ChannelError::Closed)));
        assert!(matches!(
            shim.send(&FromVmm::Event(Event::Exited(ExitReason::Reset)), &[]),
            Err(ChannelError::Closed)
        ));
    }

    #[test]
    fn last_words_are_heard_though_the_other_end_did_not_listen() {
        let (shim, vmm) = Channel::pair().unwrap();
        shim.send(&Request::ConnectVsock { port: 1 }, &[]).unwrap();
        let event = FromVmm::Event(Event::Exited(ExitReason::Panic));
        vmm.send(&event, &[]).unwrap();
        drop(vmm);
        assert_eq!(shim.receive::<FromVmm>().unwrap().message, event);
        assert!(matches!(shim.receive::<FromVmm>(), Err(ChannelError::Closed)));
    }

    #[test]
    fn waiting_ends_at_the_time_limit() {
        let (shim, _vmm) = Channel::pair().unwrap();
        shim.set_timeout(Some(Duration::from_millis(20))).unwrap();
        assert!(matches!(shim.receive::<FromVmm>(), Err(ChannelError::TimedOut)));
    }

    #[test]
    fn nonsense_is_refused_and_its_descriptors_are_closed() {
        let (shim, vmm) = Channel::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        vmm.send(&"nonsense", &[writer.as_fd()]).unwrap();
        drop(writer);

        assert!(matches!(shim.receive::<FromVmm>(), Err(ChannelError::Malformed(_))));

        // Only when the received copy is closed as well does the pipe end.
        assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn too_many_descriptors_are_refused_and_closed() {
        let (shim, vmm) = Channel::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS + 9))];
        packet::send(&vmm, b"1", &vec![writer.as_fd(); MAX_FDS + 9], &mut space).unwrap();
        drop(writer);
        assert!(matches!(shim.receive::<u32>(), Err(ChannelError::TooLarge)));
        assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn an_oversized_message_is_refused() {
        let (shim, _vmm) = Channel::pair().unwrap();
        assert!(matches!(shim.send(&"x".repeat(MAX_PACKET), &[]), Err(ChannelError::TooLarge)));
    }
}
