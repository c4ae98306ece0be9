//! Tap devices: an Ethernet interface of the host whose other end is a descriptor.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use bulkhead_netlink::{LinkChange, Socket};
use bulkhead_vmm_protocol::NetOffloads;

use super::{Interface, NetError};

const DEVICE: &str = "/dev/net/tun";

/// The kernel puts a number in the place of `%d`.
const NAME: &str = "bulkhead%d";

/// What the VMM expects in front of each packet: `struct virtio_net_hdr_v1`.
const HEADER_LENGTH: libc::c_int = 12;

/// `TUN_F_CSUM`, `TUN_F_TSO4`, `TUN_F_TSO6`; `TUN_F_USO4`, `TUN_F_USO6`.
const CHECKSUM_AND_TSO: libc::c_uint = 0x01 | 0x02 | 0x04;
const USO: libc::c_uint = 0x20 | 0x40;

/// Packets that wait for the VMM.
const QUEUE_LENGTH: u32 = 1000;

/// A tap device, which is gone when nobody has its queues open any more.
#[derive(Debug)]
pub(crate) struct Tap {
    /// Its number.
    pub index: u32,
    /// Its queues.
    pub queues: Vec<OwnedFd>,
    /// What it leaves to the other end.
    pub offloads: NetOffloads,
}

impl Tap {
    /// Makes one beside an interface, in the namespace of the calling thread and the socket.
    pub(crate) fn make(socket: &mut Socket, beside: &Interface, queues: u8) -> Result<Tap, NetError> {
        let failed = |step| {
            let name = beside.name.clone();
            move |source| NetError::Tap { name, step, source }
        };
        // SAFETY: a request of zeros is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
            *to = from.cast_signed();
        }
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        let mut opened = Vec::new();
        for _ in 0..queues.max(1) {
            let file = open().map_err(failed("open /dev/net/tun (is the module tun loaded?)"))?;
            // The first makes the device and puts its name into the request, the others join it.
            // SAFETY: the request is valid, and written to within its bounds only.
            check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
                .map_err(failed("TUNSETIFF"))?;
            opened.push(file);
        }
        // SAFETY: the kernel fills this member in.
        let name: Vec<u8> = request.ifr_name.iter().map(|byte| byte.cast_unsigned()).collect();
        let name =
            String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();

        let file = opened.first().ok_or_else(|| failed("open it")(io::ErrorKind::NotFound.into()))?;
        // SAFETY: the length is valid and only read.
        check(unsafe {
            libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, std::ptr::from_ref(&HEADER_LENGTH))
        })
        .map_err(failed("TUNSETVNETHDRSZ"))?;
        let offloads = set_offloads(file).map_err(failed("TUNSETOFFLOAD"))?;

        let link = socket.link(&name).map_err(failed("look for it"))?;
        let link = link.ok_or_else(|| failed("look for it")(io::ErrorKind::NotFound.into()))?;
        let change = LinkChange {
            mtu: Some(beside.mtu.into()),
            queue_length: Some(QUEUE_LENGTH),
            set: libc::IFF_UP,
            no_automatic_addresses: true,
            ..LinkChange::default()
        };
        socket.change_link(link.index, &change).map_err(failed("set its MTU and begin its use"))?;
        Ok(Tap { index: link.index, queues: opened.into_iter().map(OwnedFd::from).collect(), offloads })
    }
}

fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE)
}

/// Sets what the kernel may leave to us, all that it knows.
fn set_offloads(file: &File) -> io::Result<NetOffloads> {
    let set = |flags: libc::c_uint| {
        let flags = libc::c_ulong::from(flags);
        // SAFETY: the argument is a number.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, flags) })
    };
    // Since Linux 6.2.
    if set(CHECKSUM_AND_TSO | USO).is_ok() {
        return Ok(NetOffloads { checksum_and_tso: true, uso: true });
    }
    set(CHECKSUM_AND_TSO).map(|()| NetOffloads { checksum_and_tso: true, uso: false })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
