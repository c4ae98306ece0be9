//! The socket: requests with an answer each, and lists.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvmsg, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::attributes::{Attributes, name, number16, number32};
use crate::message::{Answer, HEADER, Message};

/// How long the kernel may take for one answer.
pub const LIMIT: Duration = Duration::from_secs(5);

/// A datagram of a list is never larger than this.
const BUFFER: usize = 64 * 1024;

/// The most that is taken of one list, in messages: a namespace of a pod has a handful.
const MAX_ANSWERS: usize = 16 * 1024;

/// A list that changes under way is asked for again this often.
const ATTEMPTS: u32 = 5;

/// `NLMSGERR_ATTR_MSG`: the kernel's own words.
const ERROR_TEXT: u16 = 1;

/// A routing netlink socket in the network namespace of the thread that made it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open() -> io::Result<Socket> {
        let kind = SockType::Raw;
        let fd = socket(AddressFamily::Netlink, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        let limit = TimeVal::new(LIMIT.as_secs().try_into().unwrap_or(i64::MAX), 0);
        setsockopt(&fd, sockopt::ReceiveTimeout, &limit)?;
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            let on: libc::c_int = 1;
            // SAFETY: the value is a valid int of the size given; old kernels refuse the option, which does no harm.
            unsafe {
                libc::setsockopt(fd.as_raw_fd(), libc::SOL_NETLINK, option, (&raw const on).cast(), 4);
            }
        }
        Ok(Socket { fd, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// Has the kernel carry a request out.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn request(&mut self, message: Message) -> io::Result<()> {
        let sequence = self.send(message, libc::NLM_F_REQUEST | libc::NLM_F_ACK)?;
        self.receive(sequence, |_| {}).map(drop)
    }

    /// Asks for a list.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn list(&mut self, message: &Message) -> io::Result<Vec<Answer>> {
        for _ in 0..ATTEMPTS {
            let sequence = self.send(message.clone(), libc::NLM_F_REQUEST | libc::NLM_F_DUMP)?;
            let mut answers = Vec::new();
            let complete = self.receive(sequence, |answer| {
                if answers.len() < MAX_ANSWERS {
                    answers.push(answer);
                }
            })?;
            if complete {
                return Ok(answers);
            }
        }
        Err(io::Error::other("the list changes all the time"))
    }

    fn send(&mut self, message: Message, flags: libc::c_int) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.finish(flags, self.sequence);
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        Ok(self.sequence)
    }

    /// Receives up to the end of an answer; tells whether a list is of one piece.
    fn receive(&mut self, sequence: u32, mut take: impl FnMut(Answer)) -> io::Result<bool> {
        let mut complete = true;
        loop {
            let mut slices = [IoSliceMut::new(&mut self.buffer)];
            let received =
                match recvmsg::<NetlinkAddr>(self.fd.as_raw_fd(), &mut slices, None, MsgFlags::empty()) {
                    Ok(received) => received,
                    Err(Errno::EINTR) => continue,
                    Err(Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                    Err(errno) => return Err(errno.into()),
                };
            if received.flags.contains(MsgFlags::MSG_TRUNC) {
                return Err(io::Error::other("an answer of the kernel is too large"));
            }
            let length = received.bytes;
            let mut rest = &self.buffer[..length];
            while let Some((header, body, behind)) = split(rest) {
                rest = behind;
                // Left over from a request that was given up.
                if header.sequence != sequence {
                    continue;
                }
                complete &= i32::from(header.flags) & libc::NLM_F_DUMP_INTR == 0;
                match libc::c_int::from(header.kind) {
                    libc::NLMSG_DONE => return status(body, header.flags).map(|()| complete),
                    libc::NLMSG_ERROR => return status(body, header.flags).map(|()| complete),
                    libc::NLMSG_NOOP => {}
                    _ => take(Answer { kind: header.kind, body: body.to_vec() }),
                }
            }
        }
    }
}

struct Header {
    kind: u16,
    flags: u16,
    sequence: u32,
}

/// The first message: header, body, and what follows.
fn split(bytes: &[u8]) -> Option<(Header, &[u8], &[u8])> {
    let length = usize::try_from(number32(bytes)?).ok()?;
    let body = bytes.get(HEADER..length)?;
    let header = Header {
        kind: number16(bytes.get(4..)?)?,
        flags: number16(bytes.get(6..)?)?,
        sequence: number32(bytes.get(8..)?)?,
    };
    Some((header, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// What the kernel says at the end of an answer: a negative number of an error, and maybe words.
fn status(body: &[u8], flags: u16) -> io::Result<()> {
    let code = number32(body).unwrap_or_default().cast_signed();
    if code >= 0 {
        return Ok(());
    }
    let error = io::Error::from_raw_os_error(-code);
    // A capped error: the number, the request's header, and then attributes.
    let text = (i32::from(flags) & libc::NLM_F_ACK_TLVS != 0)
        .then(|| Attributes::behind(body, 4 + HEADER).find(|(kind, _)| *kind == ERROR_TEXT))
        .flatten();
    match text {
        Some((_, words)) => Err(io::Error::new(error.kind(), Told { errno: -code, words: name(words) })),
        None => Err(error),
    }
}

/// An error with the kernel's own words.
#[derive(Debug)]
struct Told {
    errno: i32,
    words: String,
}

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", io::Error::from_raw_os_error(self.errno), self.words)
    }
}

impl std::error::Error for Told {}

/// The number of an error of this crate.
pub(crate) fn errno(error: &io::Error) -> Option<i32> {
    let told = || error.get_ref()?.downcast_ref::<Told>().map(|told| told.errno);
    error.raw_os_error().or_else(told)
}

/// As a success, what is so already.
pub(crate) fn unless(result: io::Result<()>, tolerated: &[i32]) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if errno(&error).is_some_and(|errno| tolerated.contains(&errno)) => Ok(false),
        Err(error) => Err(error),
    }
}
