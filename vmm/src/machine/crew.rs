//! The threads of a machine: started and locked up before there is a machine for them to run.
//!
//! To start a thread and to install its filter takes a millisecond or so, in which the control thread waits for the host's
//! kernel anyway. Each thread waits for its work, then at the gate, and the guest's first instruction runs behind that.

use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};

use bulkhead_base::chain;
use bulkhead_seccomp::Filter;
use bulkhead_vmm_protocol::ExitReason;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{MachineError, host_failed};
use crate::device_loop::THREAD_STACK;
use crate::device_threads::DeviceThreads;
use crate::devices::worker::DeviceWorker;
use crate::vcpu::{self, Vcpu};

/// Where threads report that the machine has ended; the first report counts.
#[derive(Clone)]
struct ExitReporter {
    reasons: Sender<ExitReason>,
    event: Arc<EventFd>,
}

impl ExitReporter {
    fn report(&self, reason: ExitReason) {
        // The only failure of either is a machine that isn't waited for any more.
        let _ = self.reasons.send(reason);
        let _ = self.event.write(1);
    }
}

/// Threads that wait for a machine. When they are dropped instead they end.
pub(super) struct Crew {
    vcpus: Vec<VcpuThread>,
    devices: DeviceThreads,
    stop: Arc<AtomicBool>,
    gate: Arc<Barrier>,
    exits: Receiver<ExitReason>,
    exit_event: Arc<EventFd>,
}

struct VcpuThread {
    thread: JoinHandle<Option<VcpuFd>>,
    vcpu: Sender<Vcpu>,
}

/// Threads that have a machine, up to the gate.
pub(super) struct Posted {
    pub vcpus: Vec<JoinHandle<Option<VcpuFd>>>,
    pub devices: DeviceThreads,
    pub exits: Receiver<ExitReason>,
    pub exit_event: Arc<EventFd>,
    pub stop: Arc<AtomicBool>,
    gate: Arc<Barrier>,
}

impl Crew {
    /// Starts the threads of the devices and one for each vCPU, each under its seccomp filter.
    pub(crate) fn start(vcpus: u8) -> Result<Self, MachineError> {
        vcpu::install_kick_handler()
            .map_err(|error| host_failed("a signal handler")(io::Error::from_raw_os_error(error.errno())))?;
        let (reasons, exits) = channel();
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host_failed("an eventfd"))?;
        let reporter = ExitReporter { reasons, event: Arc::new(event) };

        let device_reporter = reporter.clone();
        let devices =
            DeviceThreads::start(move |detail| device_reporter.report(ExitReason::Internal { detail }))?;
        let gate = Arc::new(Barrier::new(usize::from(vcpus) + 1));
        let vcpus = (0..vcpus)
            .map(|_| start_vcpu(reporter.clone(), gate.clone()))
            .collect::<Result<_, MachineError>>()?;
        let stop = Arc::new(AtomicBool::new(false));
        Ok(Crew { vcpus, devices, stop, gate, exits, exit_event: reporter.event })
    }

    /// How many vCPUs there are threads for.
    pub(crate) fn vcpus(&self) -> u8 {
        // One was asked for by a `u8`.
        self.vcpus.len() as u8
    }

    /// The flag that stops the vCPUs, for those that are to be given to [`Crew::post`].
    pub(crate) fn stop_flag(&self) -> Arc<AtomicBool> {
        self.stop.clone()
    }

    /// Gives the threads their work: as many vCPUs as there are threads.
    pub(crate) fn post(self, vcpus: Vec<Vcpu>, workers: Vec<DeviceWorker>) -> Posted {
        self.devices.run(workers);
        let threads = self.vcpus.into_iter().zip(vcpus).map(|(thread, vcpu)| {
            let _ = thread.vcpu.send(vcpu);
            thread.thread
        });
        Posted {
            vcpus: threads.collect(),
            devices: self.devices,
            exits: self.exits,
            exit_event: self.exit_event,
            stop: self.stop,
            gate: self.gate,
        }
    }
}

impl Posted {
    /// Lets the vCPUs run.
    pub(crate) fn open_gate(&self) {
        self.gate.wait();
    }
}

fn start_vcpu(reporter: ExitReporter, gate: Arc<Barrier>) -> Result<VcpuThread, MachineError> {
    let (vcpu, waiting) = channel::<Vcpu>();
    let body = move || {
        let locked_up = Filter::VmmVcpu.install();
        // Without a machine there is nothing to do.
        let vcpu = waiting.recv().ok()?;
        gate.wait();
        match locked_up {
            Ok(()) => match vcpu.run() {
                (fd, None) => Some(fd),
                (_, Some(reason)) => {
                    reporter.report(reason);
                    None
                }
            },
            Err(error) => {
                reporter.report(ExitReason::Internal { detail: chain(&error) });
                None
            }
        }
    };
    let thread = thread::Builder::new()
        .name("vcpu".into())
        .stack_size(THREAD_STACK)
        .spawn(body)
        .map_err(host_failed("a thread for a vCPU"))?;
    Ok(VcpuThread { thread, vcpu })
}
