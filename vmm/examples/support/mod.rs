//! What the examples share.

use std::error::Error;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use bulkhead_vmm_protocol::{CONTROL_FD, Channel};

/// Starts a VMM with its end of a control socket.
pub fn spawn(vmm: &str, control: Channel) -> Result<Child, Box<dyn Error>> {
    let mut command = Command::new(vmm);
    command.args(["--uid", "65534", "--gid", "65534"]).stdin(Stdio::null()).stdout(Stdio::null()).env_clear();
    let fd = control.as_raw_fd();
    // SAFETY: dup2 and fcntl are async-signal-safe and have no memory arguments; `control` outlives the spawn.
    unsafe {
        command.pre_exec(move || {
            let result =
                if fd == CONTROL_FD { libc::fcntl(fd, libc::F_SETFD, 0) } else { libc::dup2(fd, CONTROL_FD) };
            if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let child = command.spawn()?;
    drop(control);
    Ok(child)
}

/// Milliseconds since then.
pub fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
