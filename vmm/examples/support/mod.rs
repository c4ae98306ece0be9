//! What the examples share.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use bulkhead_vmm_protocol::{CONTROL_FD, Channel, FdIndex, FromVmm, MemorySource, PrepareConfig, Request};

/// Starts a VMM with its end of a control socket.
pub(crate) fn spawn(vmm: &str, control: Channel) -> Result<Child, Box<dyn Error>> {
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

/// A memory file, and what is made of it.
pub(crate) type MemoryFile = (fn(FdIndex) -> MemorySource, File);

/// Has a VMM prepare for a machine of so many vCPUs and MiB; `memory` is what is made of the file that comes with it.
pub(crate) fn prepare(
    control: &Channel,
    (vcpus, memory_mib): (u8, u32),
    memory: Option<MemoryFile>,
) -> Result<(), Box<dyn Error>> {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    let mut fds = vec![kvm.as_fd()];
    let memory = match &memory {
        Some((source, file)) => {
            fds.push(file.as_fd());
            source(FdIndex(1))
        }
        None => MemorySource::Anonymous,
    };
    let config = PrepareConfig { kvm: FdIndex(0), vcpus, memory_mib, memory, working_set: None };
    control.send(&Request::Prepare(config), &fds)?;
    match control.receive::<FromVmm>()?.message {
        FromVmm::Reply(result) => Ok(result?),
        FromVmm::Event(event) => Err(format!("{event:?} instead of a reply").into()),
    }
}

/// Milliseconds since then.
pub(crate) fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
