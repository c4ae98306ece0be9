//! `bulkhead-vmm`: one virtual machine, for the shim that started it.
//!
//! Started with the control socket as descriptor 3 and an identity to become:
//! `bulkhead-vmm --uid UID --gid GID`. Without an identity it runs as whoever started it, unless that is root.

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use bulkhead_base::chain;
use bulkhead_jail::{Jail, JailError, Limits, Root};
use bulkhead_vmm::control::{self, ControlError};
use bulkhead_vmm::devices::rng;
use bulkhead_vmm::logger;
use bulkhead_vmm_protocol::{CONTROL_FD, Channel};

/// Open descriptors at any time: those of the boot message, eventfds of devices, vsock streams.
const OPEN_FILES: u64 = 1024;

/// Threads at any time, with room for a user id that two pods share: shims on nodes within a node may have the same process id.
const PROCESSES: u64 = 512;

/// Why the process ends without having served a machine to its end.
#[derive(Debug, thiserror::Error)]
enum MainError {
    #[error(
        "usage: bulkhead-vmm --uid UID --gid GID, with the control socket as descriptor {CONTROL_FD}: {0}"
    )]
    Usage(String),
    #[error("running as root without a jail: --uid and --gid are needed")]
    Root,
    #[error("the jail can't be entered")]
    Jail(#[from] JailError),
    #[error("the host has no randomness")]
    Random(#[source] std::io::Error),
    #[error("serving failed")]
    Control(#[from] ControlError),
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-vmm: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), MainError> {
    let identity = parse(std::env::args().skip(1))?;
    match identity {
        Some((uid, gid)) => {
            let limits = Limits { open_files: OPEN_FILES, processes: PROCESSES };
            bulkhead_jail::enter(&Jail { last_fd: CONTROL_FD, root: Root::Empty, limits, uid, gid })?;
        }
        // SAFETY: geteuid can't fail and has no arguments.
        None if unsafe { libc::geteuid() } == 0 => return Err(MainError::Root),
        None => {}
    }
    logger::init();
    rng::wait_for_seed().map_err(MainError::Random)?;
    // SAFETY: whoever starts this program leaves the control socket at this number, and nothing else here owns it. If
    // it isn't there, the first use fails.
    let channel = Channel::from(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    control::serve(&channel)?;
    Ok(())
}

/// The user and group to become, if any.
fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<(u32, u32)>, MainError> {
    let (mut uid, mut gid) = (None, None);
    while let Some(name) = arguments.next() {
        let target = match name.as_str() {
            "--uid" => &mut uid,
            "--gid" => &mut gid,
            _ => return Err(MainError::Usage(format!("{name} is not an option"))),
        };
        let value = arguments.next().ok_or_else(|| MainError::Usage(format!("{name} needs a number")))?;
        let number = value.parse().map_err(|_| MainError::Usage(format!("{value} is not a number")))?;
        *target = Some(number);
    }
    match (uid, gid) {
        (Some(uid), Some(gid)) => Ok(Some((uid, gid))),
        (None, None) => Ok(None),
        _ => Err(MainError::Usage("--uid and --gid go together".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &[&str]) -> Result<Option<(u32, u32)>, MainError> {
        parse(words.iter().map(ToString::to_string))
    }

    #[test]
    fn both_ids_or_none() {
        assert!(matches!(parse_words(&[]), Ok(None)));
        assert!(matches!(parse_words(&["--uid", "7", "--gid", "8"]), Ok(Some((7, 8)))));
        for words in [
            &["--uid", "7"][..],
            &["--uid"],
            &["--uid", "x", "--gid", "8"],
            &["--uid", "-1", "--gid", "8"],
            &["extra"],
        ] {
            assert!(matches!(parse_words(words), Err(MainError::Usage(_))), "{words:?}");
        }
    }
}
