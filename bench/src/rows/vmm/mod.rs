//! The VMMs alone, without containerd: Bulkhead's beside QEMU's microvm machine, with the same guest kernel, the same image and the
//! same amount of memory, from the start of the VMM's process until the guest's init prints.

mod ours;
mod pvh;
mod qemu;

use std::fs::File;
use std::io::{self, PipeReader, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use bulkhead_base::parts;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Bench;
use crate::node;
use crate::report::Better;
use crate::workload::files;

/// Guest memory in MiB: the shim's default.
const GUEST_MEMORY_MIB: u32 = 256;
/// Mappings from this size on are guest memory.
const GUEST_MEMORY_MAPPING: u64 = 32 << 20;
/// Kernel parameters besides those for devices, which QEMU puts behind these.
const KERNEL_PARAMETERS: &str = "root=/dev/vda rootfstype=erofs ro init=/workload quiet";
/// How long a guest may take.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// The most console output that is kept while waiting for init's line.
const MAX_CONSOLE_BYTES: usize = 64 << 10;
const MIB: f64 = 1024.0 * 1024.0;

/// What keeps a VMM from being measured.
#[derive(Debug, thiserror::Error)]
enum VmmError {
    #[error("{0} is not there")]
    Missing(PathBuf),
    #[error("{0} is not in the PATH")]
    NoProgram(&'static str),
    #[error("cannot {step}: {source}")]
    Io { step: &'static str, source: io::Error },
    #[error("the kernel is not one that QEMU's microvm machine can boot: {0}")]
    Kernel(#[from] pvh::PvhError),
    #[error("the VMM's control socket: {0}")]
    Control(#[from] bulkhead_vmm_protocol::ChannelError),
    #[error("the VMM refused to boot: {0}")]
    Refused(String),
    #[error("init printed nothing within {} s; the console's last words: {console:?}", BOOT_LIMIT.as_secs())]
    Silent { console: String },
    #[error("the VMM ended before init printed; the console's last words: {console:?}")]
    Ended { console: String },
}

/// The VMMs, with what each needs.
enum Vmm {
    Ours(ours::Parts),
    Qemu(qemu::Parts),
}

/// A VMM whose guest boots. Dropping it ends it.
struct Running {
    process: Child,
    console: PipeReader,
    /// Open as long as the VMM shall live, for those that have one.
    _control: Option<bulkhead_vmm_protocol::Channel>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Neither can fail for a child that nobody else waits for.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Measures it, the VMMs taking turns.
pub(crate) async fn measure(bench: &mut Bench<'_>) {
    let mut vmms = Vec::new();
    for (name, found) in [
        ("bulkhead-vmm", ours::Parts::find().map(Vmm::Ours)),
        ("qemu-microvm", qemu::Parts::find(bench.directory).map(Vmm::Qemu)),
    ] {
        match found {
            Ok(vmm) => vmms.push((name, vmm)),
            Err(error) => skip(bench, name, &error),
        }
    }
    for round in 0..bench.rounds {
        let mut failed = Vec::new();
        for (name, vmm) in &vmms {
            match boot(vmm) {
                Ok((elapsed, memory)) => {
                    bench.results.add_time("vmm-boot", name, elapsed);
                    if let Some(bytes) = memory {
                        bench.results.add("vmm-boot-memory", name, "MiB", Better::Lower, bytes as f64 / MIB);
                    }
                }
                Err(error) => {
                    skip(bench, name, &error);
                    failed.push(*name);
                }
            }
        }
        vmms.retain(|(name, _)| !failed.contains(name));
        bench.progress(&format!("vmm: round {} of {}", round + 1, bench.rounds));
    }
}

fn skip(bench: &mut Bench<'_>, name: &'static str, error: &VmmError) {
    bench.progress(&format!("SKIPPED vmm-boot under {name}: {error}"));
    bench.results.skip("vmm-boot", name, error.to_string());
}

/// Boots a guest; the time until init's line, and the VMM's own resident memory then.
fn boot(vmm: &Vmm) -> Result<(Duration, Option<u64>), VmmError> {
    let started = Instant::now();
    let mut running = match vmm {
        Vmm::Ours(parts) => parts.start()?,
        Vmm::Qemu(parts) => parts.start()?,
    };
    wait_for_init(&mut running.console)?;
    let elapsed = started.elapsed();
    Ok((elapsed, node::resident_without_large_mappings(running.process.id(), GUEST_MEMORY_MAPPING)))
}

fn wait_for_init(console: &mut PipeReader) -> Result<(), VmmError> {
    let deadline = Instant::now() + BOOT_LIMIT;
    let mut output = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let ready = poll(&mut [PollFd::new(console.as_fd(), PollFlags::POLLIN)], timeout)
            .map_err(|errno| VmmError::Io { step: "wait for the console", source: errno.into() })?;
        let text = || String::from_utf8_lossy(&output).into_owned();
        if ready == 0 {
            return Err(VmmError::Silent { console: text() });
        }
        let mut chunk = [0; 4096];
        let count =
            console.read(&mut chunk).map_err(|source| VmmError::Io { step: "read the console", source })?;
        if count == 0 || output.len() > MAX_CONSOLE_BYTES {
            return Err(VmmError::Ended { console: text() });
        }
        output.extend_from_slice(&chunk[..count]);
        if output.windows(files::INIT_READY.len()).any(|window| window == files::INIT_READY) {
            return Ok(());
        }
    }
}

/// A part that was installed beside us, as `PREFIX/PLACE`.
fn installed(place: &str) -> Result<PathBuf, VmmError> {
    let path = node::installed(place);
    if path.is_file() { Ok(path) } else { Err(VmmError::Missing(path)) }
}

fn kernel() -> Result<PathBuf, VmmError> {
    installed(parts::KERNEL)
}

fn image() -> Result<PathBuf, VmmError> {
    installed("share/bulkhead/bench-guest.erofs")
}

fn open(step: &'static str, path: &Path) -> Result<File, VmmError> {
    File::open(path).map_err(|source| VmmError::Io { step, source })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_line_is_found_across_reads_and_behind_other_output() {
        let (mut console, mut guest) = io::pipe().unwrap();
        let (first, second) = files::INIT_READY.split_at(5);
        guest.write_all(b"kernel: something\r\n").unwrap();
        guest.write_all(first).unwrap();
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            guest.write_all(second).unwrap();
            guest
        });
        wait_for_init(&mut console).unwrap();
        drop(writer.join().unwrap());
    }

    #[test]
    fn a_vmm_that_ends_is_quoted() {
        let (mut console, mut guest) = io::pipe().unwrap();
        guest.write_all(b"Kernel panic").unwrap();
        drop(guest);
        let error = wait_for_init(&mut console).unwrap_err();
        assert!(matches!(&error, VmmError::Ended { console } if console == "Kernel panic"), "{error}");
    }
}
