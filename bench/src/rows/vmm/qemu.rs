//! QEMU's microvm machine: the leanest that QEMU has, with the same devices.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{GUEST_MEMORY_MIB, KERNEL_PARAMETERS, Running, VmmError, image, kernel, pvh};
use crate::node::find_program;

const PROGRAM: &str = "qemu-system-x86_64";
/// As QEMU's documentation of the machine recommends for the shortest start.
const MACHINE: &str = "microvm,accel=kvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off";

/// Where everything is.
pub(crate) struct Parts {
    program: PathBuf,
    kernel: PathBuf,
    image: PathBuf,
}

impl Parts {
    /// Finds QEMU and makes a kernel for it in `directory`.
    pub(crate) fn find(directory: &Path) -> Result<Self, VmmError> {
        let program = find_program(PROGRAM).ok_or(VmmError::NoProgram(PROGRAM))?;
        let original =
            fs::read(kernel()?).map_err(|source| VmmError::Io { step: "read the kernel", source })?;
        let kernel = directory.join("vmlinux.pvh");
        fs::write(&kernel, pvh::with_note(original)?)
            .map_err(|source| VmmError::Io { step: "write QEMU's kernel", source })?;
        Ok(Self { program, kernel, image: image()? })
    }

    /// Starts QEMU.
    pub(crate) fn start(&self) -> Result<Running, VmmError> {
        let (console, console_end) =
            std::io::pipe().map_err(|source| VmmError::Io { step: "make the console's pipe", source })?;
        let process = Command::new(&self.program)
            .args(["-M", MACHINE, "-cpu", "host", "-smp", "1", "-m", &GUEST_MEMORY_MIB.to_string()])
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .arg("-kernel")
            .arg(&self.kernel)
            .args(["-append", &format!("console=hvc0 reboot=t panic=-1 {KERNEL_PARAMETERS}")])
            .arg("-drive")
            .arg(format!("id=root,if=none,format=raw,readonly=on,file={}", self.image.display()))
            .args(["-device", "virtio-blk-device,drive=root"])
            .args(["-device", "virtio-rng-device"])
            .args(["-chardev", "stdio,id=console", "-device", "virtio-serial-device"])
            .args(["-device", "virtconsole,chardev=console"])
            .stdin(Stdio::null())
            .stdout(
                console_end
                    .try_clone()
                    .map_err(|source| VmmError::Io { step: "share the console's pipe", source })?,
            )
            .stderr(console_end)
            .spawn()
            .map_err(|source| VmmError::Io { step: "start QEMU", source })?;
        Ok(Running { process, console, _control: None })
    }
}
