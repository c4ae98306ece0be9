//! Descriptors: closing what must not be inherited, and sending descriptors over a socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use tokio::io::unix::AsyncFd;

use super::check;

/// Closes every descriptor of the process but the listed ones.
pub(crate) fn close_all_but(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|&fd| u32::try_from(fd).ok()).collect();
    keep.sort_unstable();
    keep.dedup();
    let mut first = 0u32;
    for fd in keep {
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX)
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: takes numbers only. The callers are children that own every descriptor of their process and use none of
    // the closed ones again.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
}

/// Whether a descriptor is closed when the process executes a program.
pub fn set_close_on_exec(fd: BorrowedFd<'_>, close: bool) -> io::Result<()> {
    let flags = if close { libc::FD_CLOEXEC } else { 0 };
    // SAFETY: F_SETFD takes a number.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, flags) }.into()).map(drop)
}

/// Makes `number` a copy of `fd` that a program executed later inherits.
pub(crate) fn duplicate_to(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    if fd.as_raw_fd() == number {
        return set_close_on_exec(fd, false);
    }
    // SAFETY: takes numbers only; the callers replace descriptors 0 to 2 of a child, which nothing there owns.
    check(unsafe { libc::dup2(fd.as_raw_fd(), number) }.into()).map(drop)
}

/// Puts a descriptor into the runtime's care, as non-blocking. Has to be called inside the runtime.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: F_GETFL and F_SETFL take numbers.
    unsafe {
        let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL).into())?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags as libc::c_int | libc::O_NONBLOCK).into())?;
    }
    // SAFETY: an `OwnedFd` always returns the same, open descriptor.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// A connected pair of sockets that keep message boundaries, closed on exec.
pub(crate) fn message_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Sends one message, with at most one descriptor.
pub(crate) fn send_message(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let raw = fd.map(|fd| [fd.as_raw_fd()]);
    let control: Vec<ControlMessage<'_>> = raw.iter().map(|raw| ControlMessage::ScmRights(raw)).collect();
    super::retry(|| {
        let iov = [IoSlice::new(bytes)];
        Ok(sendmsg::<()>(socket.as_raw_fd(), &iov, &control, MsgFlags::MSG_NOSIGNAL, None).map(drop)?)
    })
}

/// Receives one message of at most `buffer.len()` bytes; 0 bytes mean that the other side is gone.
///
/// # Errors
/// A message longer than the buffer is `EMSGSIZE`.
pub(crate) fn receive_message(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut iov = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut fd = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raws) = control {
            for raw in raws {
                // SAFETY: the kernel just made this descriptor for us; nothing else owns it.
                fd = Some(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
    }
    if message.flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    Ok((message.bytes, fd))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_message_carries_a_descriptor() {
        let (left, right) = message_pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        send_message(left.as_fd(), b"hello", Some(null.as_fd())).unwrap();
        let mut buffer = [0; 16];
        let (length, fd) = receive_message(right.as_fd(), &mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"hello");
        assert!(fd.is_some());
    }

    #[test]
    fn an_overlong_message_is_an_error_and_a_closed_socket_is_empty() {
        let (left, right) = message_pair().unwrap();
        send_message(left.as_fd(), &[7; 64], None).unwrap();
        let mut buffer = [0; 16];
        let error = receive_message(right.as_fd(), &mut buffer).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
        drop(left);
        assert_eq!(receive_message(right.as_fd(), &mut buffer).unwrap().0, 0);
    }
}
