//! Files that the file server lends the VMM: what is read from one, or written to it, need not pass through the server then.
//!
//! A loan is a packet on the FUSE socket that looks like a reply to no request: `struct fuse_out_header` with 0 as `unique`, then
//! node id and handle of the open file, eight bytes each, and its descriptor beside it. It ends with the handle (`FUSE_RELEASE`), or
//! the session.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Result;
use rustix::net::RecvFlags;

use crate::fuse::OUT_HEADER;
use crate::packet;

/// Bytes of the packet.
const SIZE: usize = OUT_HEADER + 16;

/// Bytes that the kernel takes for a descriptor.
const SPACE: usize = rustix::cmsg_space!(ScmRights(1));

/// What is lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loan {
    /// The node id it was opened by.
    pub node: u64,
    /// The number it has in the guest's requests; no other file ever has the same.
    pub handle: u64,
}

impl Loan {
    /// Lends an open file. Waits for room in the socket.
    ///
    /// # Errors
    /// As `sendmsg(2)`; nothing is lent then.
    pub fn send(self, socket: impl AsFd, file: BorrowedFd<'_>) -> Result<()> {
        packet::send(socket, &self.to_bytes(), &[file], &mut [MaybeUninit::uninit(); SPACE])
    }

    /// The loan that a packet tells of, if it does.
    #[must_use]
    pub fn parse(packet: &[u8]) -> Option<Loan> {
        let packet: &[u8; SIZE] = packet.try_into().ok()?;
        let (&[header, unique, node, handle], []) = packet.as_chunks::<8>() else { return None };
        let sound = header == Self::header() && unique == [0; 8];
        sound.then(|| Loan { node: u64::from_le_bytes(node), handle: u64::from_le_bytes(handle) })
    }

    fn to_bytes(self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        bytes[..8].copy_from_slice(&Self::header());
        bytes[OUT_HEADER..OUT_HEADER + 8].copy_from_slice(&self.node.to_le_bytes());
        bytes[OUT_HEADER + 8..].copy_from_slice(&self.handle.to_le_bytes());
        bytes
    }

    /// Length, and no error.
    fn header() -> [u8; 8] {
        (SIZE as u64).to_le_bytes()
    }
}

/// Takes the next packet without waiting: its length, which is 0 when the other end is closed, and a descriptor that came with it.
///
/// # Errors
/// As `recvmsg(2)`, `EAGAIN` without a packet among them.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut received = packet::receive(socket, buffer, &mut space, RecvFlags::DONTWAIT)?;
    Ok((received.length, received.fds.pop()))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    use rustix::io::Errno;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn a_loan_arrives_with_its_file() {
        let (server, vmm) = pair();
        let mut buffer = [0; 100];
        assert_eq!(receive(&vmm, &mut buffer).unwrap_err(), Errno::AGAIN);

        let loan = Loan { node: 5, handle: u64::MAX };
        let (reader, writer) = std::io::pipe().unwrap();
        loan.send(&server, writer.as_fd()).unwrap();
        drop(writer);
        let (length, file) = receive(&vmm, &mut buffer).unwrap();
        assert_eq!(Loan::parse(&buffer[..length]), Some(loan));
        drop(file.unwrap());
        assert_eq!(File::from(OwnedFd::from(reader)).read(&mut buffer).unwrap(), 0, "nobody else has it");

        packet::send(&server, b"a reply", &[], &mut []).unwrap();
        let (length, file) = receive(&vmm, &mut buffer).unwrap();
        assert_eq!((&buffer[..length], file.is_none()), (&b"a reply"[..], true));
    }

    #[test]
    fn descriptors_that_nobody_asked_for_are_closed() {
        let (server, vmm) = pair();
        let (reader, writer) = std::io::pipe().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
        packet::send(&server, b"x", &[writer.as_fd(); 5], &mut space).unwrap();
        drop(writer);
        drop(receive(&vmm, &mut [0; 8]).unwrap());
        assert_eq!(File::from(OwnedFd::from(reader)).read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn a_loan_looks_like_no_reply() {
        let bytes = Loan { node: 1, handle: 2 }.to_bytes();
        assert_eq!(Loan::parse(&bytes), Some(Loan { node: 1, handle: 2 }));
        for at in 0..OUT_HEADER {
            let mut other = bytes;
            other[at] ^= 1;
            assert_eq!(Loan::parse(&other), None, "byte {at}");
        }
        assert_eq!(Loan::parse(&bytes[1..]), None);
    }
}
