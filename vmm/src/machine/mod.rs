//! Building a virtual machine and running it.
//!
//! The order of the calls matters for speed: a change of the memory slots after an ioeventfd exists waits for a grace
//! period of the host kernel, so memory and vCPUs come first and ioeventfds last.

mod restore;
mod save;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};

use bulkhead_seccomp::Filter;
use bulkhead_vmm_protocol::{ExitReason, VmConfig};
use kvm_ioctls::VcpuFd;
use log::error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::{self, BootError};
use crate::bus::Bus;
use crate::cpu::{self, CpuError, CpuidTemplate};
use crate::device_loop::{DeviceLoop, LoopError};
use crate::devices::VirtioDevice;
use crate::devices::mmio::MmioTransport;
use crate::devices::slot::DeviceSlot;
use crate::devices::worker::{DeviceWorker, chain_of};
use crate::ioapic::IoApic;
use crate::memory::{MemoryError, SharedRam, map_ram};
use crate::resources::{Handles, ResourceError, Resources};
use crate::template::TemplateError;
use crate::vcpu::{self, Vcpu};
use crate::vm::{self, KvmRouter};

use self::save::Saver;

/// Stack of the device and vCPU threads, in bytes.
pub const THREAD_STACK: usize = 128 * 1024;

/// Why a virtual machine can't be built or started.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Something that came with the configuration can't be used.
    #[error("the virtual machine's configuration can't be used")]
    Resources(#[from] ResourceError),
    /// No memory.
    #[error("no memory for the guest")]
    Memory(#[from] MemoryError),
    /// Nothing to boot.
    #[error("the guest can't be booted")]
    Boot(#[from] BootError),
    /// The descriptor isn't KVM, or is a KVM that we can't use.
    #[error("KVM can't be used: {0}")]
    NoKvm(&'static str),
    /// KVM refused.
    #[error("KVM refused to {what}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A vCPU can't be set up.
    #[error("vCPU {id} can't be set up")]
    Vcpu {
        /// Its number.
        id: u8,
        /// Why not.
        #[source]
        source: CpuError,
    },
    /// The host is out of something.
    #[error("the host refused {what}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The device thread.
    #[error("the devices can't be started")]
    Devices(#[from] LoopError),
    /// A saved machine can't be restored.
    #[error("the saved machine can't be restored")]
    Template(#[from] TemplateError),
}

pub(crate) fn kvm_failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

fn host_failed(what: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Host { what, source }
}

/// A virtual machine that hasn't started.
pub struct Machine {
    vcpus: Vec<VcpuFd>,
    bus: Arc<Bus>,
    ram: SharedRam,
    workers: Vec<DeviceWorker>,
    saver: Option<Saver>,
}

/// Devices, by their faces.
struct DeviceParts {
    transports: Vec<MmioTransport>,
    workers: Vec<DeviceWorker>,
    slots: Vec<Arc<DeviceSlot>>,
}

impl DeviceParts {
    fn new(devices: Vec<Box<dyn VirtioDevice>>, ram: &SharedRam) -> Result<Self, MachineError> {
        let mut parts = DeviceParts { transports: Vec::new(), workers: Vec::new(), slots: Vec::new() };
        for device in devices {
            let info = device.info();
            let slot =
                DeviceSlot::new(info.queue_sizes.len()).map_err(host_failed("eventfds for a device"))?;
            parts.transports.push(MmioTransport::new(info, slot.clone(), ram.clone()));
            parts.workers.push(DeviceWorker::new(device, slot.clone()));
            parts.slots.push(slot);
        }
        Ok(parts)
    }
}

/// A running virtual machine.
pub struct RunningMachine {
    stop: Arc<AtomicBool>,
    vcpus: Vec<JoinHandle<Option<VcpuFd>>>,
    bus: Arc<Bus>,
    saver: Option<Saver>,
    devices: DeviceLoop,
    exits: Receiver<ExitReason>,
    exit_event: Arc<EventFd>,
}

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

impl Machine {
    /// Builds a machine that boots, from its configuration and the descriptors that came with it.
    pub fn build(config: &VmConfig, fds: Vec<OwnedFd>) -> Result<(Self, Handles), MachineError> {
        let Resources { kvm, start: mut kernel, memory, devices, handles } =
            Resources::take(config, config.kernel, fds)?;
        let kvm = vm::open_kvm(kvm)?;

        let ram = map_ram(config.memory_mib, &memory)?;
        let command_line =
            boot::command_line(devices.len(), &config.cmdline).map_err(BootError::CommandLine)?;
        let entry = boot::load(&ram, &mut kernel, &command_line, config.vcpus, devices.len())?;

        let failed = |id| move |source| MachineError::Vcpu { id, source };
        let vm = Arc::new(vm::create_vm(&kvm)?);
        vm::set_memory(&vm, &ram)?;
        let cpuid = CpuidTemplate::new(&kvm, config.vcpus).map_err(failed(0))?;
        let vcpus = vm::create_vcpus(&vm, &cpuid, config.vcpus)?;
        for (vcpu, id) in vcpus.iter().zip(0..) {
            cpu::set_interrupt_pins(vcpu).map_err(failed(id))?;
            // The others wait until the first one starts them by interrupt.
            if id == 0 {
                cpu::set_boot_registers(vcpu, entry).map_err(failed(id))?;
            }
        }

        let parts = DeviceParts::new(devices, &ram)?;
        vm::wire(&vm, &parts.slots)?;
        let router = KvmRouter { vm: vm.clone(), slots: parts.slots };
        let ioapic = IoApic::new(config.vcpus, Box::new(router));
        let bus = Arc::new(Bus::new(parts.transports, ioapic));
        let saver = Saver::new(config, &memory, &kvm, vm, &cpuid)?;
        Ok((Machine { vcpus, bus, ram, workers: parts.workers, saver }, handles))
    }

    /// Starts the device thread and the vCPUs, each under its seccomp filter, and puts the calling thread under the
    /// control thread's. The guest's first instruction runs after that.
    pub fn start(self) -> Result<RunningMachine, MachineError> {
        vcpu::install_kick_handler()
            .map_err(|error| host_failed("a signal handler")(io::Error::from_raw_os_error(error.errno())))?;
        let (reasons, exits) = channel();
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host_failed("an eventfd"))?;
        let reporter = ExitReporter { reasons, event: Arc::new(event) };

        let device_reporter = reporter.clone();
        let devices = DeviceLoop::start(
            self.workers,
            || Filter::VmmDevice.install().map_err(|error| chain_of(&error)),
            move |detail| device_reporter.report(ExitReason::Internal { detail }),
        )?;

        let stop = Arc::new(AtomicBool::new(false));
        let gate = Arc::new(Barrier::new(self.vcpus.len() + 1));
        let mut vcpus = Vec::new();
        for (fd, id) in self.vcpus.into_iter().zip(0..) {
            let vcpu = Vcpu::new(id, fd, self.bus.clone(), self.ram.clone(), stop.clone());
            vcpus.push(start_vcpu(vcpu, reporter.clone(), gate.clone())?);
        }
        let filter = if self.saver.is_some() { Filter::VmmTemplate } else { Filter::VmmControl };
        filter
            .install()
            .map_err(|error| host_failed("the control thread's filter")(io::Error::other(error)))?;
        gate.wait();
        let (bus, saver) = (self.bus, self.saver);
        Ok(RunningMachine { stop, vcpus, bus, saver, devices, exits, exit_event: reporter.event })
    }
}

impl RunningMachine {
    /// Becomes readable when the machine has ended.
    pub fn exit_event(&self) -> &EventFd {
        &self.exit_event
    }

    /// Stops what is still running, lets the devices finish what the guest left behind, and says why the machine ended;
    /// without a reason of its own that is `fallback`.
    pub fn finish(self, fallback: ExitReason) -> ExitReason {
        self.stop.store(true, Ordering::SeqCst);
        if vcpu::join(self.vcpus).is_none() {
            error!("a vCPU didn't stop in time");
        }
        if self.devices.stop().is_none() {
            error!("the device thread didn't stop in time");
        }
        self.exits.try_recv().unwrap_or(fallback)
    }
}

fn start_vcpu(
    vcpu: Vcpu,
    reporter: ExitReporter,
    gate: Arc<Barrier>,
) -> Result<JoinHandle<Option<VcpuFd>>, MachineError> {
    let body = move || {
        let result = Filter::VmmVcpu.install();
        gate.wait();
        match result {
            Ok(()) => match vcpu.run() {
                (fd, None) => Some(fd),
                (_, Some(reason)) => {
                    reporter.report(reason);
                    None
                }
            },
            Err(error) => {
                reporter.report(ExitReason::Internal { detail: chain_of(&error) });
                None
            }
        }
    };
    thread::Builder::new()
        .name("vcpu".into())
        .stack_size(THREAD_STACK)
        .spawn(body)
        .map_err(host_failed("a thread for a vCPU"))
}
