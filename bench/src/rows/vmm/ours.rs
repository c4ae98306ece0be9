//! Bulkhead's VMM, started as the shim starts it: in its jail, everything handed over by descriptor.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use bulkhead_base::parts;
use bulkhead_vmm_protocol::{
    BlockConfig, CONTROL_FD, Channel, FdIndex, FromVmm, PrepareConfig, Request, VmConfig,
};

use super::{
    BOOT_LIMIT, GUEST_MEMORY_MIB, KERNEL_PARAMETERS, Running, VmmError, image, installed, kernel, open,
};

/// No pod of the shim's has this uid: it is above all that it gives out.
const UID: &str = "2147483000";

/// Where everything is.
pub(crate) struct Parts {
    vmm: PathBuf,
    kernel: PathBuf,
    image: PathBuf,
}

impl Parts {
    /// Finds the installed parts.
    pub(crate) fn find() -> Result<Self, VmmError> {
        Ok(Self { vmm: installed(parts::VMM)?, kernel: kernel()?, image: image()? })
    }

    /// Starts the VMM and boots the guest.
    pub(crate) fn start(&self) -> Result<Running, VmmError> {
        let (control, theirs) = Channel::pair()?;
        let process = spawn(&self.vmm, theirs)?;
        let (console, console_end) =
            std::io::pipe().map_err(|source| VmmError::Io { step: "make the console's pipe", source })?;
        // From here on the process is ended when anything fails.
        let running = Running { process, console, _control: None };
        let kvm = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(|source| VmmError::Io { step: "open /dev/kvm", source })?;
        control.set_timeout(Some(BOOT_LIMIT))?;
        let preparation = PrepareConfig::anonymous(FdIndex(0), 1, GUEST_MEMORY_MIB);
        control.send(&Request::Prepare(preparation), &[kvm.as_fd()])?;
        expect_reply(&control)?;
        let descriptors: [OwnedFd; 3] = [
            open("open the kernel", &self.kernel)?.into(),
            console_end.into(),
            open("open the image", &self.image)?.into(),
        ];
        let config = VmConfig {
            console: Some(FdIndex(1)),
            disks: vec![BlockConfig { file: FdIndex(2), read_only: true, serial: "image".to_owned() }],
            ..VmConfig::new(FdIndex(0), KERNEL_PARAMETERS)
        };
        control.send(&Request::Boot(Box::new(config)), &descriptors.each_ref().map(AsFd::as_fd))?;
        expect_reply(&control)?;
        let mut running = running;
        running._control = Some(control);
        Ok(running)
    }
}

fn expect_reply(control: &Channel) -> Result<(), VmmError> {
    match control.receive::<FromVmm>()?.message {
        FromVmm::Reply(Ok(())) => Ok(()),
        other => Err(VmmError::Refused(format!("{other:?}"))),
    }
}

fn spawn(program: &Path, control: Channel) -> Result<Child, VmmError> {
    let mut command = Command::new(program);
    command.args(["--uid", UID, "--gid", UID]).env_clear();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let socket = control.as_raw_fd();
    // SAFETY: dup2 and fcntl are async-signal-safe and take no pointers; `control` is open until after the spawn.
    unsafe {
        command.pre_exec(move || {
            // dup2 onto itself would leave the descriptor close-on-exec.
            let result = if socket == CONTROL_FD {
                libc::fcntl(socket, libc::F_SETFD, 0)
            } else {
                libc::dup2(socket, CONTROL_FD)
            };
            if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    command.spawn().map_err(|source| VmmError::Io { step: "start bulkhead-vmm", source })
}
