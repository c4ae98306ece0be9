//! Building a virtual machine and running it.
//!
//! A machine comes about in two steps: what is the same for every guest of a size is [`Prepared`] before anything else of the
//! guest is known, since that is where the host's kernel takes its time; then the guest is booted or restored.
//!
//! The order of the calls matters for speed: a change of the memory slots after an ioeventfd exists waits for a grace
//! period of the host kernel, so memory and vCPUs come first and ioeventfds last.

mod crew;
mod error;
mod restore;
mod save;
mod slots;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::thread::{self, JoinHandle};

use bulkhead_base::chain;
use bulkhead_seccomp::Filter;
use bulkhead_vmm_protocol::{AttachDisk, AttachNet, ExitReason, PrepareConfig, VmConfig};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use log::{error, warn};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, BootError};
use crate::bus::Bus;
use crate::cpu::{self, CpuidTemplate};
use crate::device_loop::THREAD_STACK;
use crate::device_threads::DeviceThreads;
use crate::devices::VirtioDevice;
use crate::devices::mmio::MmioTransport;
use crate::devices::registers::RegisterMemory;
use crate::devices::slot::DeviceSlot;
use crate::devices::worker::DeviceWorker;
use crate::ioapic::IoApic;
use crate::layout::DEVICE_SLOTS;
use crate::memory::{GuestRam, Memory, SharedRam, map_ram};
use crate::resources::{Handles, Preparation, Resources};
use crate::vcpu::{self, Vcpu};
use crate::vm::{self, KvmRouter};
use crate::working_set;

use self::crew::{Crew, Posted};
pub(crate) use self::error::MachineError;
use self::error::host_failed;
pub(crate) use self::error::kvm_failed;
use self::save::Saver;
pub(crate) use self::slots::SlotError;
use self::slots::Slots;

/// A virtual machine without devices, and the threads that will run it.
pub(crate) struct Prepared {
    kvm: Kvm,
    vm: Arc<VmFd>,
    memory: Memory,
    memory_mib: u32,
    ram: SharedRam,
    registers: Arc<RegisterMemory>,
    cpuid: CpuidTemplate,
    vcpus: Vec<VcpuFd>,
    crew: Crew,
}

impl Prepared {
    /// Creates everything that does not depend on the guest.
    pub(crate) fn new(config: &PrepareConfig, fds: Vec<OwnedFd>) -> Result<Self, MachineError> {
        let Preparation { kvm, memory, working_set } = Preparation::take(config, fds)?;
        let kvm = vm::open_kvm(kvm)?;
        let memory_mib = config.memory_mib;
        let ram = map_ram(memory_mib, &memory)?;
        // The threads lock themselves up while the kernel takes its time with the machine.
        let crew = Crew::start(config.vcpus)?;
        let cpuid =
            CpuidTemplate::new(&kvm, config.vcpus).map_err(|source| MachineError::Vcpu { id: 0, source })?;
        let vm = Arc::new(match working_set {
            None => vm::create_vm(&kvm)?,
            Some(mut file) => create_vm_and_populate(&kvm, &ram, &mut file)?,
        });
        let registers = RegisterMemory::new();
        vm::set_memory(&vm, &ram)?;
        vm::show_registers(&kvm, &vm, &registers, ram.num_regions())?;
        let vcpus = vm::create_vcpus(&kvm, &vm, &cpuid, config.vcpus)?;
        Ok(Prepared { kvm, vm, memory, memory_mib, ram, registers, cpuid, vcpus, crew })
    }

    /// The machine, when its vCPUs are set and its devices wired.
    fn into_machine(self, parts: DeviceParts, ioapic: IoApic) -> Result<Machine, MachineError> {
        let Prepared { kvm, vm, memory, memory_mib, ram, registers, cpuid, vcpus, crew } = self;
        let DeviceParts { transports, workers, .. } = parts;
        let slots = Slots::new(vm.clone(), ram.clone(), registers.clone(), transports.len());
        let bus = Arc::new(Bus::new(transports, DEVICE_SLOTS, registers, ioapic));
        let saver = Saver::new(memory_mib, &memory, &kvm, vm, &cpuid)?;
        Ok(Machine { vcpus, crew, bus, ram, workers, slots, saver })
    }
}

/// Maps the working set while the kernel takes its time with the machine.
fn create_vm_and_populate(kvm: &Kvm, ram: &GuestRam, working_set: &mut File) -> Result<VmFd, MachineError> {
    thread::scope(|scope| {
        let creating = thread::Builder::new()
            .stack_size(THREAD_STACK)
            .spawn_scoped(scope, || vm::create_vm(kvm))
            .map_err(host_failed("a thread to create the machine"))?;
        // Only how fast the guest starts depends on it.
        if let Err(error) = working_set::populate(ram, working_set) {
            warn!("the template's working set is of no use, make it again: {}", chain(&error));
        }
        creating.join().map_err(|_| MachineError::NoKvm("the thread that creates the machine died"))?
    })
}

/// A virtual machine that hasn't started.
pub(crate) struct Machine {
    vcpus: Vec<VcpuFd>,
    crew: Crew,
    bus: Arc<Bus>,
    ram: SharedRam,
    workers: Vec<DeviceWorker>,
    slots: Slots,
    saver: Option<Saver>,
}

/// Devices, by their faces.
struct DeviceParts {
    transports: Vec<MmioTransport>,
    workers: Vec<DeviceWorker>,
    slots: Vec<Arc<DeviceSlot>>,
}

impl DeviceParts {
    fn new(
        devices: Vec<Box<dyn VirtioDevice>>,
        ram: &SharedRam,
        registers: &Arc<RegisterMemory>,
    ) -> Result<Self, MachineError> {
        let mut parts = DeviceParts { transports: Vec::new(), workers: Vec::new(), slots: Vec::new() };
        for (device, index) in devices.into_iter().zip(0..) {
            let info = device.info();
            let slot = DeviceSlot::new(info.queue_sizes.len(), registers.window(index))
                .map_err(host_failed("eventfds for a device"))?;
            parts.transports.push(MmioTransport::new(info, slot.clone(), ram.clone()));
            parts.workers.push(DeviceWorker::new(device, slot.clone()));
            parts.slots.push(slot);
        }
        Ok(parts)
    }
}

/// A running virtual machine.
pub(crate) struct RunningMachine {
    stop: Arc<AtomicBool>,
    vcpus: Vec<JoinHandle<Option<VcpuFd>>>,
    bus: Arc<Bus>,
    saver: Option<Saver>,
    slots: Slots,
    devices: DeviceThreads,
    exits: Receiver<ExitReason>,
    exit_event: Arc<EventFd>,
}

impl Machine {
    /// Builds a machine that boots, from its configuration and the descriptors that came with it.
    pub(crate) fn build(
        prepared: Prepared,
        config: &VmConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<(Self, Handles), MachineError> {
        let Resources { start: mut kernel, devices, handles } = Resources::take(config, config.kernel, fds)?;
        let Prepared { vm, ram, vcpus, crew, .. } = &prepared;

        let command_line = boot::command_line(devices.len(), DEVICE_SLOTS, &config.cmdline)
            .map_err(BootError::CommandLine)?;
        let windows = devices.len() + DEVICE_SLOTS;
        let entry = boot::load(ram, &mut kernel, &command_line, crew.vcpus(), windows)?;

        let failed = |id| move |source| MachineError::Vcpu { id, source };
        for (vcpu, id) in vcpus.iter().zip(0..) {
            cpu::set_firmware_registers(vcpu).map_err(failed(id))?;
            // The others wait until the first one starts them by interrupt.
            if id == 0 {
                cpu::set_boot_registers(vcpu, entry).map_err(failed(id))?;
            }
        }

        let parts = DeviceParts::new(devices, ram, &prepared.registers)?;
        vm::wire(vm, 0, &parts.slots)?;
        let router = KvmRouter { vm: vm.clone(), slots: parts.slots.clone() };
        let ioapic = IoApic::new(crew.vcpus(), Box::new(router));
        Ok((prepared.into_machine(parts, ioapic)?, handles))
    }

    /// Gives the threads their work and puts the calling one under the control thread's filter. The guest's first
    /// instruction runs after that.
    pub(crate) fn start(self) -> Result<RunningMachine, MachineError> {
        let Machine { vcpus, crew, bus, ram, workers, slots, saver } = self;
        let stop = crew.stop_flag();
        let vcpu = |(fd, id)| Vcpu::new(id, fd, bus.clone(), ram.clone(), stop.clone());
        let posted = crew.post(vcpus.into_iter().zip(0..).map(vcpu).collect(), workers);
        let filter = if saver.is_some() { Filter::VmmTemplate } else { Filter::VmmControl };
        filter
            .install()
            .map_err(|error| host_failed("the control thread's filter")(io::Error::other(error)))?;
        posted.open_gate();
        let Posted { vcpus, devices, exits, exit_event, stop, .. } = posted;
        Ok(RunningMachine { stop, vcpus, bus, saver, slots, devices, exits, exit_event })
    }
}

impl RunningMachine {
    /// Becomes readable when the machine has ended.
    pub(crate) fn exit_event(&self) -> &EventFd {
        &self.exit_event
    }

    /// Puts a disk into a free slot; the guest finds it when it probes the slot's window.
    pub(crate) fn attach_disk(&mut self, request: &AttachDisk, files: Vec<OwnedFd>) -> Result<(), SlotError> {
        self.refuse_for_template()?;
        self.slots.attach_disk(request, files, &self.bus, &self.devices)
    }

    /// Puts a network interface into a free slot, as a disk.
    pub(crate) fn attach_net(&mut self, request: &AttachNet, queues: Vec<OwnedFd>) -> Result<(), SlotError> {
        self.refuse_for_template()?;
        self.slots.attach_net(request, queues, &self.bus, &self.devices)
    }

    /// Takes the device out of a slot and closes what is behind it.
    pub(crate) fn detach_device(&mut self, slot: u8) -> Result<(), SlotError> {
        self.slots.detach(slot, &self.bus, &self.devices)
    }

    fn refuse_for_template(&self) -> Result<(), SlotError> {
        if self.saver.is_some() { Err(SlotError::Template) } else { Ok(()) }
    }

    /// Stops what is still running, lets the devices finish what the guest left behind, and says why the machine ended;
    /// without a reason of its own that is `fallback`.
    pub(crate) fn finish(self, fallback: ExitReason) -> ExitReason {
        self.stop.store(true, Ordering::SeqCst);
        if vcpu::join(self.vcpus).is_none() {
            error!("a vCPU didn't stop in time");
        }
        if self.devices.stop().is_none() {
            error!("a thread of the devices didn't stop in time");
        }
        self.exits.try_recv().unwrap_or(fallback)
    }
}
