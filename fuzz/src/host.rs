//! What stands for the host: files in memory, and the far ends of sockets.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use bulkhead_vmm_protocol::loan::Loan;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

/// What Rust does before `main`, which is libFuzzer's here: a write to a closed socket is an error and no signal.
pub fn prepare() {
    // SAFETY: nothing else has set a handler.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.expect("a signal that can be ignored");
}

/// A file in memory.
pub fn file(contents: &[u8]) -> File {
    let mut file = File::from(memfd_create("fuzz", MFdFlags::MFD_CLOEXEC).expect("a file in memory"));
    file.write_all(contents).expect("memory for a file");
    file
}

/// The far end of a socket, which never blocks.
#[derive(Debug)]
pub struct Peer(OwnedFd);

/// A socket that keeps packets apart, and its far end.
pub fn packets() -> (OwnedFd, Peer) {
    pair(SockType::SeqPacket)
}

/// A socket of bytes, and its far end.
pub fn stream() -> (OwnedFd, Peer) {
    pair(SockType::Stream)
}

fn pair(kind: SockType) -> (OwnedFd, Peer) {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, flags).expect("a pair of sockets");
    (ours, Peer(theirs))
}

impl Peer {
    /// Sends as much as there is room for.
    pub fn send(&self, bytes: &[u8]) {
        let _ = send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL);
    }

    /// Lends a file, if there is room.
    pub fn lend(&self, loan: Loan, file: &File) {
        let _ = loan.send(&self.0, file.as_fd());
    }

    /// What has come; `None` if nothing has, or at the end.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 18];
        let length =
            recv(self.0.as_raw_fd(), &mut bytes, MsgFlags::empty()).ok().filter(|length| *length > 0)?;
        bytes.truncate(length);
        Some(bytes)
    }
}
