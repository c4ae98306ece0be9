//! A vCPU's thread: runs the guest, serves its exits, and can be stopped at any time.

use std::cell::Cell;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulkhead_vmm_protocol::ExitReason;
use kvm_bindings::{KVM_EXIT_NOTIFY, KVM_EXIT_X86_BUS_LOCK};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::{Bus, PowerRequest};
use crate::layout::RESET_FLAG;
use crate::memory::SharedRam;

/// What Linux leaves at [`RESET_FLAG`] when a reset follows a panic (`reboot=panic_warm`).
const WARM_RESET: u16 = 0x1234;

/// How long a vCPU rests after it has locked the bus of the whole host, which all others wait for: programs that mean to do
/// so are none, and Linux on the host makes its own rest longer (`split_lock_detect`).
const BUS_LOCK_REST: Duration = Duration::from_millis(1);

/// How long a vCPU may take to stop: it can be in the middle of a disk's or the host kernel's work.
const STOP_LIMIT: Duration = Duration::from_secs(5);

thread_local! {
    /// The `kvm_run.immediate_exit` of the vCPU that runs on this thread.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Everything a vCPU's thread needs.
pub(crate) struct Vcpu {
    id: u8,
    fd: VcpuFd,
    /// Where its accesses go.
    bus: Arc<Bus>,
    /// Guest memory, for the word that tells panics from resets.
    ram: SharedRam,
    /// Set to stop the thread, followed by the signal.
    stop: Arc<AtomicBool>,
    /// The last entry ended without anything to serve.
    left: bool,
}

/// Prepares the process for [`kick`]; once, before any vCPU's thread starts.
pub(crate) fn install_kick_handler() -> Result<(), vmm_sys_util::errno::Error> {
    extern "C" fn leave_guest(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let flag = IMMEDIATE_EXIT.get();
        if !flag.is_null() {
            // SAFETY: the pointer is set only while this thread's vCPU, which the flag is part of, is alive. The write is
            // volatile because the kernel reads it.
            unsafe { flag.write_volatile(1) };
        }
    }
    register_signal_handler(SIGRTMIN(), leave_guest)
}

/// Makes a vCPU's thread leave the guest, or not enter it again, and look at its `stop` flag.
pub(crate) fn kick<T>(thread: &JoinHandle<T>) {
    // The only failure is a thread that has ended.
    let _ = thread.kill(SIGRTMIN());
}

/// Stops vCPU threads whose `stop` flag is set. Returns what they leave, or `None` if not all ended in time.
pub(crate) fn join<T>(threads: Vec<JoinHandle<T>>) -> Option<Vec<T>> {
    for thread in &threads {
        kick(thread);
    }
    let start = Instant::now();
    while threads.iter().any(|thread| !thread.is_finished()) {
        if start.elapsed() > STOP_LIMIT {
            return None;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    threads.into_iter().map(|thread| thread.join().ok()).collect()
}

impl Vcpu {
    /// A vCPU that hasn't run in this thread.
    pub(crate) fn new(id: u8, fd: VcpuFd, bus: Arc<Bus>, ram: SharedRam, stop: Arc<AtomicBool>) -> Self {
        Vcpu { id, fd, bus, ram, stop, left: false }
    }

    /// Runs until the guest ends (the reason) or `stop` is set (`None`). KVM's vCPU comes back: with `None` its state is
    /// complete, so that it could be saved.
    pub(crate) fn run(mut self) -> (VcpuFd, Option<ExitReason>) {
        let flag: *mut u8 = &raw mut self.fd.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.set(flag);
        let reason = self.run_guest();
        IMMEDIATE_EXIT.set(ptr::null_mut());
        (self.fd, reason)
    }

    fn run_guest(&mut self) -> Option<ExitReason> {
        while !self.stop.load(Ordering::SeqCst) {
            if let Some(reason) = self.enter() {
                return Some(reason);
            }
        }
        self.settle()
    }

    /// Lets KVM finish the instruction whose access was served last: it does so at the next entry only.
    fn settle(&mut self) -> Option<ExitReason> {
        self.left = false;
        while !self.left {
            self.fd.set_kvm_immediate_exit(1);
            if let Some(reason) = self.enter() {
                return Some(reason);
            }
        }
        None
    }

    /// One stay in the guest, and what it left for.
    fn enter(&mut self) -> Option<ExitReason> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) => {
                return match error.errno() {
                    // A signal: the caller looks at `stop`.
                    libc::EINTR | libc::EAGAIN => {
                        self.left = true;
                        self.fd.set_kvm_immediate_exit(0);
                        None
                    }
                    _ => Some(self.failed(format!("KVM_RUN: {error}"))),
                };
            }
        };
        match exit {
            VcpuExit::IoOut(port, data) => {
                let request = self.bus.port_write(port, data)?;
                Some(self.power(request))
            }
            VcpuExit::IoIn(port, data) => {
                self.bus.port_read(port, data);
                None
            }
            VcpuExit::MmioWrite(address, data) => {
                self.bus.mmio_write(address, data);
                None
            }
            VcpuExit::MmioRead(address, data) => {
                self.bus.mmio_read(address, data);
                None
            }
            VcpuExit::IoapicEoi(vector) => {
                self.bus.end_of_interrupt(vector);
                None
            }
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => None,
            VcpuExit::Unsupported(KVM_EXIT_X86_BUS_LOCK) => {
                // Not a sleep, which is a call that this thread's filter hasn't.
                std::thread::park_timeout(BUS_LOCK_REST);
                None
            }
            VcpuExit::Unsupported(KVM_EXIT_NOTIFY) => {
                Some(self.failed("the guest took no interrupts, and its state is lost".into()))
            }
            VcpuExit::Shutdown => Some(ExitReason::TripleFault),
            VcpuExit::FailEntry(reason, cpu) => Some(
                self.failed(format!("the CPU refused to enter the guest: reason {reason:#x} on CPU {cpu}")),
            ),
            VcpuExit::InternalError => {
                let detail = self.internal_error();
                Some(self.failed(detail))
            }
            VcpuExit::MemoryFault { gpa, .. } => {
                Some(self.failed(format!("guest memory at {gpa:#x} can't be accessed")))
            }
            other => {
                let detail = format!("unexpected exit {other:?}");
                Some(self.failed(detail))
            }
        }
    }

    fn power(&self, request: PowerRequest) -> ExitReason {
        match request {
            PowerRequest::Off => ExitReason::PowerOff,
            PowerRequest::Reset => match self.ram.read_obj::<u16>(GuestAddress(RESET_FLAG)) {
                Ok(WARM_RESET) => ExitReason::Panic,
                _ => ExitReason::Reset,
            },
        }
    }

    fn failed(&self, mut detail: String) -> ExitReason {
        if let Ok(regs) = self.fd.get_regs() {
            detail.push_str(&format!(" (rip {:#x})", regs.rip));
        }
        ExitReason::VcpuFailed { vcpu: self.id, detail }
    }

    fn internal_error(&mut self) -> String {
        // SAFETY: KVM_EXIT_INTERNAL_ERROR filled this member of the union, which is plain data anyway.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let what = match internal.suberror {
            1 => "an instruction that KVM can't emulate",
            2 => "exceptions at the same time",
            3 => "an exit while an event was delivered",
            4 => "an unexpected exit reason",
            _ => "unknown",
        };
        let count = (internal.ndata as usize).min(internal.data.len());
        format!("KVM internal error {} ({what}), data {:x?}", internal.suberror, &internal.data[..count])
    }
}
