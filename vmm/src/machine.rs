//! Building a virtual machine and running it.
//!
//! The order of the calls matters for speed: a change of the memory slots after an ioeventfd exists waits for a grace
//! period of the host kernel, so memory and vCPUs come first and ioeventfds last.

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};

use bulkhead_seccomp::Filter;
use bulkhead_vmm_protocol::{ExitReason, VmConfig};
use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_PMU_CAP_DISABLE,
    KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use log::error;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::{self, BootError};
use crate::bus::Bus;
use crate::cpu::{self, CpuError, CpuidTemplate};
use crate::device_loop::{DeviceLoop, LoopError};
use crate::devices::mmio::MmioTransport;
use crate::devices::slot::DeviceSlot;
use crate::devices::worker::{DeviceWorker, chain_of};
use crate::ioapic::{InterruptRouter, IoApic, MsiRoute};
use crate::layout::{FIRST_IRQ, IRQ_PINS, KVM_TSS, irq, mmio_address};
use crate::memory::{MemoryError, SharedRam, map_ram};
use crate::resources::{ResourceError, Resources};
use crate::vcpu::{self, Vcpu};

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
}

fn kvm_failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
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
}

/// A running virtual machine.
pub struct RunningMachine {
    stop: Arc<AtomicBool>,
    vcpus: Vec<JoinHandle<()>>,
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

/// The IOAPIC's way to KVM and to the devices' lines.
struct KvmRouter {
    vm: Arc<VmFd>,
    slots: Vec<Arc<DeviceSlot>>,
}

impl InterruptRouter for KvmRouter {
    fn set_routes(&self, routes: &[MsiRoute]) -> Result<(), io::Error> {
        let entries: Vec<kvm_irq_routing_entry> = routes.iter().map(routing_entry).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.vm.set_gsi_routing(&table).map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    fn raise(&self, pin: u32) {
        let slot = pin.checked_sub(FIRST_IRQ).and_then(|index| self.slots.get(index as usize));
        if let Some(slot) = slot {
            let _ = slot.interrupt().line().write(1);
        }
    }
}

fn routing_entry(route: &MsiRoute) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi: route.pin, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = route.address;
    entry.u.msi.data = route.data;
    entry
}

impl Machine {
    /// Builds a machine from its configuration and the descriptors that came with it.
    pub fn build(
        config: &VmConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<(Self, crate::resources::Handles), MachineError> {
        let Resources { kvm, mut kernel, devices, handles } = Resources::take(config, fds)?;
        let kvm = open_kvm(kvm)?;

        let ram = map_ram(config.memory_mib)?;
        let command_line =
            boot::command_line(devices.len(), &config.cmdline).map_err(BootError::CommandLine)?;
        let entry = boot::load(&ram, &mut kernel, &command_line, config.vcpus, devices.len())?;

        let vm = Arc::new(create_vm(&kvm)?);
        set_memory(&vm, &ram)?;
        let vcpus = create_vcpus(&kvm, &vm, config.vcpus, entry)?;

        let mut transports = Vec::new();
        let mut workers = Vec::new();
        let mut slots = Vec::new();
        for device in devices {
            let info = device.info();
            let slot =
                DeviceSlot::new(info.queue_sizes.len()).map_err(host_failed("eventfds for a device"))?;
            transports.push(MmioTransport::new(info, slot.clone(), ram.clone()));
            workers.push(DeviceWorker::new(device, slot.clone()));
            slots.push(slot);
        }
        wire(&vm, &slots)?;
        let router = KvmRouter { vm, slots };
        let ioapic = IoApic::new(config.vcpus, Box::new(router));
        let bus = Arc::new(Bus::new(transports, ioapic));
        Ok((Machine { vcpus, bus, ram, workers }, handles))
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
            let vcpu = Vcpu { id, fd, bus: self.bus.clone(), ram: self.ram.clone(), stop: stop.clone() };
            vcpus.push(start_vcpu(vcpu, reporter.clone(), gate.clone())?);
        }
        Filter::VmmControl
            .install()
            .map_err(|error| host_failed("the control thread's filter")(io::Error::other(error)))?;
        gate.wait();
        Ok(RunningMachine { stop, vcpus, devices, exits, exit_event: reporter.event })
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
        if !vcpu::join(self.vcpus) {
            error!("a vCPU didn't stop in time");
        }
        if !self.devices.stop() {
            error!("the device thread didn't stop in time");
        }
        self.exits.try_recv().unwrap_or(fallback)
    }
}

fn start_vcpu(
    vcpu: Vcpu,
    reporter: ExitReporter,
    gate: Arc<Barrier>,
) -> Result<JoinHandle<()>, MachineError> {
    let body = move || {
        let result = Filter::VmmVcpu.install();
        gate.wait();
        match result {
            Ok(()) => {
                if let Some(reason) = vcpu.run() {
                    reporter.report(reason);
                }
            }
            Err(error) => reporter.report(ExitReason::Internal { detail: chain_of(&error) }),
        }
    };
    thread::Builder::new()
        .name("vcpu".into())
        .stack_size(THREAD_STACK)
        .spawn(body)
        .map_err(host_failed("a thread for a vCPU"))
}

fn open_kvm(fd: OwnedFd) -> Result<Kvm, MachineError> {
    // SAFETY: the descriptor is open and ours; ioctls on what isn't KVM fail, which the next line finds.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Err(MachineError::NoKvm("the descriptor is not /dev/kvm, or its API is not version 12"));
    }
    let needed = [
        (Cap::UserMemory, "it lacks KVM_CAP_USER_MEMORY"),
        (Cap::SplitIrqchip, "it lacks KVM_CAP_SPLIT_IRQCHIP"),
        (Cap::Irqfd, "it lacks KVM_CAP_IRQFD"),
        (Cap::Ioeventfd, "it lacks KVM_CAP_IOEVENTFD"),
        (Cap::ImmediateExit, "it lacks KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::SetTssAddr, "it lacks KVM_CAP_SET_TSS_ADDR"),
        (Cap::ExtCpuid, "it lacks KVM_CAP_EXT_CPUID"),
    ];
    match needed.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, what)) => Err(MachineError::NoKvm(what)),
        None => Ok(kvm),
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, MachineError> {
    let vm = loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => continue,
            result => break result.map_err(kvm_failed("create a virtual machine"))?,
        }
    };
    vm.set_tss_address(KVM_TSS).map_err(kvm_failed("place its TSS"))?;
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    split.args[0] = IRQ_PINS.into();
    vm.enable_cap(&split).map_err(kvm_failed("split the interrupt controllers"))?;
    // Where KVM can, the guest gets no performance counters at all, not only none that CPUID lists.
    if kvm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into()) & KVM_PMU_CAP_DISABLE as i32 != 0 {
        let mut no_counters = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
        no_counters.args[0] = KVM_PMU_CAP_DISABLE.into();
        vm.enable_cap(&no_counters).map_err(kvm_failed("take the performance counters away"))?;
    }
    Ok(vm)
}

fn set_memory(vm: &VmFd, ram: &SharedRam) -> Result<(), MachineError> {
    for (region, slot) in ram.iter().zip(0..) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping stays for as long as vCPUs run: their threads hold `ram` as well.
        unsafe { vm.set_user_memory_region(slot) }.map_err(kvm_failed("take guest memory"))?;
    }
    Ok(())
}

fn create_vcpus(kvm: &Kvm, vm: &VmFd, count: u8, entry: u64) -> Result<Vec<VcpuFd>, MachineError> {
    let failed = |id| move |source| MachineError::Vcpu { id, source };
    let cpuid = CpuidTemplate::new(kvm, count).map_err(failed(0))?;
    let mut vcpus = Vec::new();
    for id in 0..count {
        let vcpu = vm.create_vcpu(id.into()).map_err(kvm_failed("create a vCPU"))?;
        cpuid.apply(&vcpu, id).map_err(failed(id))?;
        cpu::set_interrupt_pins(&vcpu).map_err(failed(id))?;
        // The others wait until the first one starts them by interrupt.
        if id == 0 {
            cpu::set_boot_registers(&vcpu, entry).map_err(failed(id))?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// Joins lines and notifications of the devices to KVM; last of all.
fn wire(vm: &VmFd, slots: &[Arc<DeviceSlot>]) -> Result<(), MachineError> {
    for (index, slot) in slots.iter().enumerate() {
        vm.register_irqfd(slot.interrupt().line(), irq(index)).map_err(kvm_failed("take an irqfd"))?;
    }
    for (index, slot) in slots.iter().enumerate() {
        let address = IoEventAddress::Mmio(mmio_address(index) + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY));
        for (kick, queue) in slot.kicks().iter().zip(0u32..) {
            vm.register_ioevent(kick, &address, queue).map_err(kvm_failed("take an ioeventfd"))?;
        }
    }
    Ok(())
}
