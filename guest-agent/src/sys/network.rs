//! Network interfaces.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::check;

/// `struct ethtool_sset_info` that asks for one set, with the room for its length.
#[repr(C)]
struct SetInfo {
    command: u32,
    reserved: u32,
    mask: u64,
    length: u32,
}

/// `struct ethtool_gstrings`, with room for as many features as a kernel may come to have.
#[repr(C)]
struct Names {
    command: u32,
    set: u32,
    length: u32,
    names: [[u8; NAME_LENGTH]; MAX_FEATURES],
}

/// `struct ethtool_sfeatures`: for each 32 features those that are meant, and those of them that are to be on.
#[repr(C)]
struct Features {
    command: u32,
    words: u32,
    pairs: [[u32; 2]; MAX_FEATURES / 32],
}

const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_SFEATURES: u32 = 0x3b;
/// The set of the features' names.
const ETH_SS_FEATURES: u32 = 4;
/// `ETH_GSTRING_LEN`.
const NAME_LENGTH: usize = 32;
const MAX_FEATURES: usize = 128;

/// Brings the loopback interface of the calling process's network namespace up.
pub(crate) fn bring_loopback_up() -> io::Result<()> {
    let socket = socket()?;
    let mut request = request_for("lo");
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads the name and the flags of the request.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into()).map(drop)
}

/// Turns a feature of an interface on by its name, which is one of those that `ethtool --show-features` tells. It stays off where the
/// device can't do it.
///
/// # Errors
/// When the kernel does not know the feature, or has so many that they are not looked through.
pub(crate) fn turn_on_feature(interface: &str, feature: &str) -> io::Result<()> {
    let socket = socket()?;
    let mut info =
        SetInfo { command: ETHTOOL_GSSET_INFO, reserved: 0, mask: 1 << ETH_SS_FEATURES, length: 0 };
    // SAFETY: the kernel writes the length of the one set that is asked for.
    unsafe { ethtool(&socket, interface, &mut info) }?;
    let length = info.length as usize;
    if info.mask == 0 || length > MAX_FEATURES {
        return Err(io::Error::other(format!("the kernel has {length} features of interfaces")));
    }
    let mut names = Names {
        command: ETHTOOL_GSTRINGS,
        set: ETH_SS_FEATURES,
        length: info.length,
        names: [[0; NAME_LENGTH]; MAX_FEATURES],
    };
    // SAFETY: there is room for as many names as the kernel has just said that it has.
    unsafe { ethtool(&socket, interface, &mut names) }?;
    let is_it = |name: &[u8; NAME_LENGTH]| name.split(|&byte| byte == 0).next() == Some(feature.as_bytes());
    let number = names.names[..length].iter().position(is_it);
    let number = number.ok_or_else(|| io::Error::other(format!("the kernel knows no feature {feature}")))?;
    let mut change = Features {
        command: ETHTOOL_SFEATURES,
        words: info.length.div_ceil(32),
        pairs: [[0; 2]; MAX_FEATURES / 32],
    };
    change.pairs[number / 32] = [1 << (number % 32); 2];
    // SAFETY: the kernel reads as many pairs as it has words of features, which are no more than there are.
    unsafe { ethtool(&socket, interface, &mut change) }
}

/// `SIOCETHTOOL`.
///
/// # Safety
/// `command` begins with an ethtool command's number and has room for whatever the kernel reads and writes for it.
unsafe fn ethtool<T>(socket: &OwnedFd, interface: &str, command: &mut T) -> io::Result<()> {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    let mut request = request_for(interface);
    request.ifr_ifru.ifru_data = std::ptr::from_mut(command).cast();
    // SAFETY: the request's name is NUL-terminated; the rest is the caller's promise.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) }.into()).map(drop)
}

/// A socket to speak with the kernel about interfaces.
fn socket() -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only and returns a new descriptor.
    let fd = check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) }.into())?;
    // SAFETY: the call returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// A request about an interface. A name that is too long is cut, which the kernel does not find.
fn request_for(interface: &str) -> libc::ifreq {
    // SAFETY: a request of zeros is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_found_by_name() {
        turn_on_feature("lo", "tx-udp-segmentation").unwrap();
        let error = turn_on_feature("lo", "tx-nothing").unwrap_err().to_string();
        assert_eq!(error, "the kernel knows no feature tx-nothing");
        let error = turn_on_feature("an-interface-that-is-not-there", "tx-udp-segmentation").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }
}
