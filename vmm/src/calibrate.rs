//! How fast does guest kernel code run on a KVM, beside the same code on the host?
//!
//! A hand-made guest counts down at privilege level 0, and this process counts down as well. Where the CPU executes the
//! guest, both are about as fast; a software KVM (such as PVM's, which interprets what isn't user mode) is a hundred to a
//! thousand times slower. An ordinary kernel never finishes booting on the latter. Since the two are compared, it doesn't matter how
//! fast the clock goes.

use std::arch::asm;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::GuestRam;

/// Where the code is; the rest of the page stays empty.
const CODE: u64 = 0;
const RAM_SIZE: usize = 4096;

/// `1: dec ecx; jnz 1b; hlt`, in 32-bit code.
const COUNTDOWN: [u8; 5] = [0xff, 0xc9, 0x75, 0xfc, 0xf4];

/// Rounds of the first run, which is enough for a slow KVM. A round is two instructions.
const FIRST: u32 = 50_000;
/// Rounds of the last run, if the clock has hardly moved in all before it.
const MOST: u32 = FIRST << 10;
/// What a run has to take to be a measurement.
const ENOUGH: Duration = Duration::from_millis(1);
/// What a run must take less than to be worth repeating.
const PATIENCE: Duration = Duration::from_millis(20);
/// Runs of which the fastest counts: others were interrupted.
const RUNS: u32 = 3;

const CR0_PE: u64 = 1;
const RFLAGS_RESERVED: u64 = 2;

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    /// Guest kernel instructions a second.
    pub guest: f64,
    /// The same instructions on the host, a second.
    pub host: f64,
}

impl Speed {
    /// The guest's speed as a part of the host's.
    pub fn ratio(&self) -> f64 {
        self.guest / self.host
    }
}

/// Why a KVM couldn't be measured.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// Missing, or not ours to open.
    #[error("can't open {path}")]
    Open {
        /// What was opened.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It isn't KVM, or it is broken.
    #[error("KVM refused to {what}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// No memory for the guest.
    #[error("can't map a page for the guest")]
    Memory(#[source] vm_memory::mmap::FromRangesError),
    /// The page can't be written.
    #[error("can't write the guest's code")]
    Code(#[source] vm_memory::GuestMemoryError),
    /// The guest left in another way than by `hlt`.
    #[error("the guest ended with {0}")]
    Exit(String),
}

fn kvm_failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CalibrateError {
    move |source| CalibrateError::Kvm { what, source }
}

/// Runs the counting guest on the KVM at `path` (usually `/dev/kvm`), and counts on the host. Takes about 0.1 s on a slow
/// KVM and some milliseconds on a fast one.
pub fn measure(path: &Path) -> Result<Speed, CalibrateError> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|source| CalibrateError::Open { path: path.display().to_string(), source })?;
    // SAFETY: the descriptor is open and ours alone; ioctls on what isn't KVM fail.
    let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).map_err(CalibrateError::Memory)?;
    ram.write_slice(&COUNTDOWN, GuestAddress(CODE)).map_err(CalibrateError::Code)?;

    let vm = kvm.create_vm().map_err(kvm_failed("create a virtual machine"))?;
    let host = ram.get_host_address(GuestAddress(0)).map_err(CalibrateError::Code)?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: RAM_SIZE as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: `ram` outlives `vm` in this function.
    unsafe { vm.set_user_memory_region(slot) }.map_err(kvm_failed("take guest memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(kvm_failed("create a vCPU"))?;
    enter_protected_mode(&vcpu)?;

    // The first entry pays for page faults and the like.
    count_down(&mut vcpu, 1)?;
    let host = rate(|rounds| Ok(count_down_here(rounds)))?;
    let guest = rate(|rounds| count_down(&mut vcpu, rounds))?;
    Ok(Speed { guest, host })
}

/// Instructions a second of what `run` takes the time of, with as many rounds as that needs.
fn rate(mut run: impl FnMut(u32) -> Result<Duration, CalibrateError>) -> Result<f64, CalibrateError> {
    let mut rounds = FIRST;
    let mut time = run(rounds)?;
    while time < ENOUGH && rounds < MOST {
        rounds *= 2;
        time = run(rounds)?;
    }
    for _ in 1..RUNS {
        if time < PATIENCE {
            time = time.min(run(rounds)?);
        }
    }
    Ok(2.0 * f64::from(rounds) / time.as_secs_f64().max(1e-9))
}

fn count_down_here(rounds: u32) -> Duration {
    let start = Instant::now();
    // SAFETY: counts in a register of its own, down to zero.
    unsafe {
        asm!("2:", "dec {count:e}", "jnz 2b", count = inout(reg) rounds => _, options(nomem, nostack));
    }
    start.elapsed()
}

/// Flat 32-bit segments, no paging: the least state that isn't real mode, which some KVMs interpret on any CPU.
fn enter_protected_mode(vcpu: &VcpuFd) -> Result<(), CalibrateError> {
    let mut sregs = vcpu.get_sregs().map_err(kvm_failed("get the system registers"))?;
    let mut data = sregs.ds;
    (data.base, data.limit, data.g, data.db, data.type_) = (0, 0xffff_ffff, 1, 1, 0x3);
    (data.selector, data.present, data.s, data.dpl) = (0x10, 1, 1, 0);
    let mut code = data;
    (code.selector, code.type_) = (0x8, 0xb);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 |= CR0_PE;
    vcpu.set_sregs(&sregs).map_err(kvm_failed("set the system registers"))
}

fn count_down(vcpu: &mut VcpuFd, rounds: u32) -> Result<Duration, CalibrateError> {
    let regs = kvm_regs { rip: CODE, rcx: rounds.into(), rflags: RFLAGS_RESERVED, ..kvm_regs::default() };
    vcpu.set_regs(&regs).map_err(kvm_failed("set the registers"))?;
    let start = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(start.elapsed()),
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => return Err(CalibrateError::Exit(format!("{exit:?}"))),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(source) => return Err(CalibrateError::Kvm { what: "run the guest", source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_kvm_is_an_error_that_names_it() {
        let error = measure(Path::new("/nowhere/kvm")).unwrap_err();
        assert_eq!(error.to_string(), "can't open /nowhere/kvm");
    }

    #[test]
    fn a_rate_does_not_depend_on_how_fast_the_clock_goes() {
        for round_ns in [1, 50, 20_000] {
            let time = |rounds: u32| Ok(Duration::from_nanos(u64::from(rounds) * round_ns));
            let expected = 2e9 / round_ns as f64;
            assert!((rate(time).unwrap() / expected - 1.0).abs() < 0.01);
        }
        // A clock that stands still is no reason to go on for ever.
        assert!(rate(|_| Ok(Duration::ZERO)).unwrap() > 1e9);
        assert!(count_down_here(FIRST) > Duration::ZERO);
    }

    #[test]
    fn what_is_not_kvm_is_an_error() {
        assert!(matches!(measure(Path::new("/dev/null")), Err(CalibrateError::Kvm { .. })));
    }
}
