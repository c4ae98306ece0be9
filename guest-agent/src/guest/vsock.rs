//! The guest's side of vsock: dialing the host, and listening for it.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::sys::{check, fd};

/// Connections of the host that may wait to be accepted.
const BACKLOG: libc::c_int = 512;

/// A connection that is being made.
#[derive(Debug)]
pub(crate) struct Dialing(AsyncFd<OwnedFd>);

impl Dialing {
    /// Asks the host for a connection to one of its ports. Has to be called inside the runtime.
    pub(crate) fn start(port: u32) -> io::Result<Self> {
        let socket = socket()?;
        let address = address(libc::VMADDR_CID_HOST, port);
        // SAFETY: the address is valid for the length that is passed.
        let result = check(
            unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LENGTH) }.into(),
        );
        match result {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
            _ => Ok(Self(fd::watch(socket)?)),
        }
    }

    /// Waits for the host's answer.
    pub(crate) async fn finish(self, limit: Duration) -> io::Result<OwnedFd> {
        drop(timeout(limit, self.0.writable()).await??);
        let socket = self.0.into_inner();
        match error_of(&socket)? {
            0 => Ok(socket),
            number => Err(io::Error::from_raw_os_error(number)),
        }
    }
}

/// Listens on a port of the guest.
pub(crate) fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address is valid for the length that is passed; listen takes numbers.
    unsafe {
        check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LENGTH).into())?;
        check(libc::listen(socket.as_raw_fd(), BACKLOG).into())?;
    }
    Ok(socket)
}

const ADDRESS_LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes numbers only and returns a new descriptor.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) }.into())?;
    // SAFETY: the call returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: an address of zeros is valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn error_of(socket: &OwnedFd) -> io::Result<libc::c_int> {
    let mut error: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    let value = (&raw mut error).cast();
    // SAFETY: value and length describe a place for an int.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ERROR, value, &raw mut length)
    };
    check(result.into())?;
    Ok(error)
}
