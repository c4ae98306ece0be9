//! A block volume inside the workload: a loop device of the node, handed to the container as a device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use super::{Bench, inside};
use crate::containerd::spec::{BlockDevice, Container};
use crate::pod::PodError;
use crate::runtime::Runtime;
use crate::workload::files;

const VOLUME_BYTES: u64 = 64 << 20;
const LOOP_MAJOR: u64 = 7;
// linux/loop.h
const LOOP_SET_FD: libc::Ioctl = 0x4C00;
const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;

/// Measures it, one runtime after the other.
pub(crate) async fn measure(bench: &mut Bench<'_>) {
    let volume = match Volume::new(bench.directory) {
        Ok(volume) => volume,
        Err(error) => {
            bench.progress(&format!("SKIPPED block: cannot make a loop device: {error}"));
            bench.results.skip("block", "all", format!("cannot make a loop device: {error}"));
            return;
        }
    };
    for runtime in bench.runtimes.clone() {
        if let Err(error) = one(bench, &runtime, &volume).await {
            bench.fail("block", runtime.kind.name(), &error);
        }
        bench.progress(&format!("block: {} done", runtime.kind.name()));
    }
}

async fn one(bench: &mut Bench<'_>, runtime: &Runtime, volume: &Volume) -> Result<(), PodError> {
    let container = Container {
        args: vec![files::PROGRAM.to_owned(), "block".to_owned(), volume.path().display().to_string()],
        device: Some(BlockDevice { path: volume.path(), major: LOOP_MAJOR, minor: volume.number }),
    };
    let output = bench.pods.run(runtime, &container).await?;
    inside::add_samples(bench, runtime, "block", &output, |row| row.to_owned())
}

/// A loop device over a file that is fully allocated. Dropping it detaches and removes them.
struct Volume {
    number: u64,
    device: File,
    file: PathBuf,
}

impl Volume {
    fn new(directory: &Path) -> io::Result<Self> {
        let file = directory.join("volume");
        let backing = OpenOptions::new().read(true).write(true).create_new(true).open(&file)?;
        nix::fcntl::posix_fallocate(&backing, 0, VOLUME_BYTES as i64)?;
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        // SAFETY: takes no argument; gives the number of a free device.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let device = OpenOptions::new().read(true).write(true).open(format!("/dev/loop{number}"))?;
        // SAFETY: the argument is an open descriptor.
        if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_FD, backing.as_raw_fd()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { number: number as u64, device, file })
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/loop{}", self.number))
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // SAFETY: takes no argument; detaches the file once nobody uses the device.
        unsafe { libc::ioctl(self.device.as_raw_fd(), LOOP_CLR_FD, 0) };
        let _ = std::fs::remove_file(&self.file);
    }
}
