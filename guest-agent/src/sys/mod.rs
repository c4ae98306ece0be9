//! Thin wrappers of the system calls that the agent needs and no crate in the tree offers.
//!
//! Nothing here knows about containers. Every wrapper turns a failure into an [`io::Error`] with the kernel's number.

pub mod fd;
pub(crate) mod mount;
pub(crate) mod network;
pub(crate) mod path;
pub mod process;
pub(crate) mod terminal;

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Turns a system call's result (-1 on failure) into a [`Result`].
pub(crate) fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The path as the kernel takes it.
///
/// # Errors
/// `EINVAL` when the path holds a NUL byte.
pub(crate) fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// The string as the kernel takes it.
///
/// # Errors
/// `EINVAL` when the string holds a NUL byte.
pub(crate) fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Runs a system call again as long as a signal interrupts it.
pub(crate) fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The running kernel's release, as `uname -r` prints it.
pub(crate) fn kernel_release() -> String {
    // SAFETY: a structure of zeros is valid, and the kernel fills it in with NUL-terminated strings.
    let name = unsafe {
        let mut name: libc::utsname = std::mem::zeroed();
        libc::uname(&raw mut name);
        name
    };
    name.release.iter().take_while(|&&byte| byte != 0).map(|&byte| byte as u8 as char).collect()
}
