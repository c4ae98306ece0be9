//! How fast does this KVM execute guest kernel code?
//!
//! A software KVM (one without VT-x or AMD-V underneath) answers every capability question like a real one, yet interprets
//! guest kernel code at about a million instructions a second: no ordinary kernel boots on it. Only measuring tells them
//! apart, so a tiny long-mode guest counts down at privilege level 0 and halts.
//!
//! This is a tool for `bulkhead check` and for tests: it opens the KVM device by itself, which the VMM process never does.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// Guest instructions per second from which on KVM counts as hardware KVM. Software KVM reaches 1 to 5 million; a hardware
/// one more than 500 million, also when it is itself nested.
pub const HARDWARE_RATE: f64 = 100e6;

/// Wall time after which a guest that still counts is stopped; the rate is then that of the part it did.
const TIME_LIMIT: Duration = Duration::from_secs(5);
/// Between two signals to a vCPU thread that does not return: a signal just before it enters the guest is lost.
const KICK_INTERVAL: Duration = Duration::from_millis(5);
/// Rounds of the loop, which is two instructions.
const ROUNDS: u64 = 500_000;
const INSTRUCTIONS_PER_ROUND: f64 = 2.0;

const MEMORY_BYTES: usize = 0x4000;
const PML4: u64 = 0x0000;
const PAGE_DIRECTORY_POINTERS: u64 = 0x1000;
const PAGE_DIRECTORY: u64 = 0x2000;
const CODE: u64 = 0x3000;
/// `loop: dec ecx; jnz loop; hlt`
const PROGRAM: [u8; 5] = [0xff, 0xc9, 0x75, 0xfc, 0xf4];

const PRESENT_WRITABLE: u64 = 0b11;
const PAGE_SIZE_2M: u64 = 1 << 7;
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;

/// Why the speed could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// The KVM device can't be opened.
    #[error("cannot open {path}")]
    Open {
        /// The device's path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The calibration guest's memory can't be mapped or filled.
    #[error("cannot set up {MEMORY_BYTES} bytes of guest memory: {0}")]
    Memory(String),
    /// KVM refused a step.
    #[error("KVM refused to {step} the calibration guest")]
    Kvm {
        /// What was asked of it.
        step: &'static str,
        /// What KVM said.
        source: io::Error,
    },
    /// The guest did something else than count and halt.
    #[error("the calibration guest ended with {0} where it should have halted")]
    UnexpectedExit(String),
    /// The vCPU thread can't be started or interrupted.
    #[error("cannot run the calibration guest's vCPU thread")]
    Thread(#[source] io::Error),
    /// The guest executed nothing within the time limit.
    #[error("the calibration guest executed no instruction in {} s", TIME_LIMIT.as_secs())]
    Stuck,
}

/// The rate, in instructions per second, at which the KVM behind `device` (usually `/dev/kvm`) executes guest kernel code.
///
/// Takes under a millisecond on hardware KVM, about a second on a software one, and 5 s at most.
///
/// # Errors
/// Whatever keeps the guest from being made or from counting down.
pub fn calibrate(device: &Path) -> Result<f64, CalibrateError> {
    let open = |source| CalibrateError::Open { path: device.to_owned(), source };
    let path = std::ffi::CString::new(device.as_os_str().as_encoded_bytes())
        .map_err(|_| open(io::Error::from(io::ErrorKind::InvalidInput)))?;
    let kvm = Kvm::new_with_path(path).map_err(|errno| open(errno.into()))?;
    let guest = Guest::new(&kvm)?;
    run_limited(guest)
}

/// Whether a rate measured by [`calibrate`] is that of hardware KVM.
pub fn is_hardware(rate: f64) -> bool {
    rate >= HARDWARE_RATE
}

/// A guest that is ready to count. Field order is drop order: the vCPU and VM go before their memory.
struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: GuestMemoryMmap<()>,
}

/// What one run of the guest gave.
struct Counted {
    rounds: u64,
    elapsed: Duration,
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, CalibrateError> {
        let refused =
            |step| move |errno: kvm_ioctls::Error| CalibrateError::Kvm { step, source: errno.into() };
        let memory = memory()?;
        let host_address = memory
            .get_host_address(GuestAddress(0))
            .map_err(|error| CalibrateError::Memory(error.to_string()))?;
        let vm = kvm.create_vm().map_err(refused("create"))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY_BYTES as u64,
            userspace_addr: host_address as u64,
        };
        // SAFETY: the region is the whole of `memory`, which the guest owns and drops after the VM.
        unsafe { vm.set_user_memory_region(region) }.map_err(refused("give memory to"))?;
        let vcpu = vm.create_vcpu(0).map_err(refused("create a vCPU for"))?;
        let mut sregs = vcpu.get_sregs().map_err(refused("read the registers of"))?;
        enter_long_mode(&mut sregs);
        vcpu.set_sregs(&sregs).map_err(refused("set the control registers of"))?;
        let mut regs = vcpu.get_regs().map_err(refused("read the registers of"))?;
        (regs.rip, regs.rcx, regs.rflags) = (CODE, ROUNDS, RFLAGS);
        vcpu.set_regs(&regs).map_err(refused("set the registers of"))?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    /// Counts until the guest halts or a signal interrupts it.
    fn count(mut self) -> Result<Counted, CalibrateError> {
        let started = Instant::now();
        let exit = match self.vcpu.run() {
            Ok(VcpuExit::Hlt) => None,
            Ok(other) => Some(format!("{other:?}")),
            Err(errno) if errno.errno() == libc::EINTR => None,
            Err(errno) => return Err(CalibrateError::Kvm { step: "run", source: errno.into() }),
        };
        let elapsed = started.elapsed();
        if let Some(exit) = exit {
            return Err(CalibrateError::UnexpectedExit(exit));
        }
        let regs = self
            .vcpu
            .get_regs()
            .map_err(|errno| CalibrateError::Kvm { step: "read the registers of", source: errno.into() })?;
        Ok(Counted { rounds: ROUNDS.saturating_sub(regs.rcx), elapsed })
    }
}

/// Memory with the program, and page tables that map the first 2 MiB to themselves.
fn memory() -> Result<GuestMemoryMmap<()>, CalibrateError> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
        .map_err(|error| CalibrateError::Memory(error.to_string()))?;
    let entries = [
        (PML4, PAGE_DIRECTORY_POINTERS | PRESENT_WRITABLE),
        (PAGE_DIRECTORY_POINTERS, PAGE_DIRECTORY | PRESENT_WRITABLE),
        (PAGE_DIRECTORY, PAGE_SIZE_2M | PRESENT_WRITABLE),
    ];
    for (address, entry) in entries {
        memory
            .write_obj(entry, GuestAddress(address))
            .map_err(|error| CalibrateError::Memory(error.to_string()))?;
    }
    memory
        .write_slice(&PROGRAM, GuestAddress(CODE))
        .map_err(|error| CalibrateError::Memory(error.to_string()))?;
    Ok(memory)
}

fn enter_long_mode(sregs: &mut kvm_sregs) {
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x8,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 0x10, type_: 0x3, db: 1, l: 0, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
}

extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Runs the guest on a thread of its own, which is interrupted when the time is over.
fn run_limited(guest: Guest) -> Result<f64, CalibrateError> {
    let signal = SIGRTMIN();
    register_signal_handler(signal, interrupted).map_err(|errno| CalibrateError::Thread(errno.into()))?;
    let (sender, receiver) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name("calibrate".to_owned())
        .spawn(move || {
            // The receiver waits for this message and outlives it.
            let _ = sender.send(guest.count());
        })
        .map_err(CalibrateError::Thread)?;
    let mut wait = TIME_LIMIT;
    let counted = loop {
        match receiver.recv_timeout(wait) {
            Ok(counted) => break counted?,
            Err(RecvTimeoutError::Timeout) => {
                thread.kill(signal).map_err(|errno| CalibrateError::Thread(errno.into()))?;
                wait = KICK_INTERVAL;
            }
            Err(RecvTimeoutError::Disconnected) => return Err(CalibrateError::Stuck),
        }
    };
    if counted.rounds == 0 {
        return Err(CalibrateError::Stuck);
    }
    Ok(counted.rounds as f64 * INSTRUCTIONS_PER_ROUND / counted.elapsed.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_named() {
        let error = calibrate(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(matches!(error, CalibrateError::Open { .. }));
        assert_eq!(error.to_string(), "cannot open /nonexistent/kvm");
    }

    #[test]
    fn a_file_that_is_no_kvm_device_is_refused() {
        assert!(calibrate(Path::new("/dev/null")).is_err());
    }

    #[test]
    fn the_measured_rate_is_plausible() {
        if !Path::new("/dev/kvm").exists() {
            eprintln!("SKIPPED: no /dev/kvm on this machine");
            return;
        }
        let rate = calibrate(Path::new("/dev/kvm")).unwrap();
        assert!((1e4..1e11).contains(&rate), "{rate} instructions a second");
        // A machine without these CPU features can only have a software KVM.
        let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        if !flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
            assert!(!is_hardware(rate), "{rate} instructions a second without VT-x or AMD-V");
        }
    }
}
