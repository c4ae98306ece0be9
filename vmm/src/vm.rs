//! What is asked of KVM to make a virtual machine, in pieces.

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_API_VERSION, KVM_BUS_LOCK_DETECTION_EXIT, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_PMU_CAPABILITY,
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_BUS_LOCK_EXIT, KVM_CAP_X86_NOTIFY_VMEXIT, KVM_IRQ_ROUTING_MSI,
    KVM_MEM_READONLY, KVM_PMU_CAP_DISABLE, KVM_X86_NOTIFY_VMEXIT_ENABLED, KvmIrqRouting, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_NOTIFY};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::cpu::CpuidTemplate;
use crate::devices::interrupt::USED_BUFFER;
use crate::devices::registers::RegisterMemory;
use crate::devices::slot::{DeviceSlot, Kicks};
use crate::ioapic::{InterruptRouter, MsiRoute};
use crate::layout::{IRQ_PINS, KVM_TSS, MMIO_BASE, device_of, irq, mmio_address};
use crate::machine::{MachineError, kvm_failed};
use crate::memory::SharedRam;

/// The IOAPIC's way to KVM and to the devices' lines.
pub(crate) struct KvmRouter {
    pub vm: Arc<VmFd>,
    pub slots: Vec<Arc<DeviceSlot>>,
}

impl InterruptRouter for KvmRouter {
    fn set_routes(&self, routes: &[MsiRoute]) -> Result<(), io::Error> {
        let entries: Vec<kvm_irq_routing_entry> = routes.iter().map(routing_entry).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.vm.set_gsi_routing(&table).map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    fn raise(&self, pin: u32) {
        if let Some(slot) = device_of(pin).and_then(|index| self.slots.get(index)) {
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

/// What KVM has to have beyond its oldest interface, and what each is called there.
pub const NEEDED_CAPABILITIES: [(Cap, &str); 9] = [
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
];

/// Takes `/dev/kvm`, if it can do what is needed.
pub(crate) fn open_kvm(fd: OwnedFd) -> Result<Kvm, MachineError> {
    // SAFETY: the descriptor is open and ours; ioctls on what isn't KVM fail, which the next line finds.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Err(MachineError::NoKvm("the descriptor is not /dev/kvm, or its API is not version 12"));
    }
    match NEEDED_CAPABILITIES.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, what)) => Err(MachineError::Lacking(what)),
        None => Ok(kvm),
    }
}

/// What KVM takes away from a guest where it can: a capability, the flag that it is announced by and switched on with, and what
/// that does.
const RESTRICTIONS: [(u32, u32, &str); 3] = [
    // Not only none that CPUID lists.
    (KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, "take the performance counters away"),
    // A lock across two cache lines stops the memory of the whole host: see `Vcpu`.
    (KVM_CAP_X86_BUS_LOCK_EXIT, KVM_BUS_LOCK_DETECTION_EXIT, "have locks of the whole bus reported"),
    // A guest that keeps the CPU from noticing interrupts, by exceptions without end, is made to leave.
    (KVM_CAP_X86_NOTIFY_VMEXIT, KVM_X86_NOTIFY_VMEXIT_ENABLED, "have a guest that takes no interrupts leave"),
];

fn with_argument(cap: u32, argument: u64) -> kvm_enable_cap {
    let mut enable = kvm_enable_cap { cap, ..Default::default() };
    enable.args[0] = argument;
    enable
}

/// Creates a virtual machine without memory, vCPUs and devices.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd, MachineError> {
    let vm = loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => continue,
            result => break result.map_err(kvm_failed("create a virtual machine"))?,
        }
    };
    vm.set_tss_address(KVM_TSS).map_err(kvm_failed("place its TSS"))?;
    vm.enable_cap(&with_argument(KVM_CAP_SPLIT_IRQCHIP, IRQ_PINS.into()))
        .map_err(kvm_failed("split the interrupt controllers"))?;
    for (cap, flag, what) in RESTRICTIONS {
        if kvm.check_extension_raw(cap.into()) as u32 & flag != 0 {
            vm.enable_cap(&with_argument(cap, flag.into())).map_err(kvm_failed(what))?;
        }
    }
    Ok(vm)
}

/// Gives a virtual machine its memory.
pub(crate) fn set_memory(vm: &VmFd, ram: &SharedRam) -> Result<(), MachineError> {
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

/// Lets the guest read the registers of devices without an exit, where KVM can. `slot` is the number of a free memory slot.
pub(crate) fn show_registers(
    kvm: &Kvm,
    vm: &VmFd,
    registers: &RegisterMemory,
    slot: usize,
) -> Result<(), MachineError> {
    if !kvm.check_extension(Cap::ReadonlyMem) {
        return Ok(());
    }
    let slot = kvm_userspace_memory_region {
        slot: slot as u32,
        flags: KVM_MEM_READONLY,
        guest_phys_addr: MMIO_BASE,
        memory_size: registers.size(),
        userspace_addr: registers.address(),
    };
    // SAFETY: the memory stays for as long as vCPUs run: their threads hold the bus, which holds it as well.
    unsafe { vm.set_user_memory_region(slot) }.map_err(kvm_failed("take the registers of devices"))
}

/// Creates vCPUs, each with its features and nothing else set.
pub(crate) fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    cpuid: &CpuidTemplate,
    count: u8,
) -> Result<Vec<VcpuFd>, MachineError> {
    let enforced = kvm.check_extension_raw(KVM_CAP_ENFORCE_PV_FEATURE_CPUID.into()) > 0;
    (0..count)
        .map(|id| {
            let vcpu = vm.create_vcpu(id.into()).map_err(kvm_failed("create a vCPU"))?;
            if enforced {
                // KVM's own MSRs and hypercalls that CPUID doesn't show are not there: else they all are.
                vcpu.enable_cap(&with_argument(KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1))
                    .map_err(kvm_failed("hold paravirtual features to what CPUID shows"))?;
            }
            cpuid.apply(&vcpu, id).map_err(|source| MachineError::Vcpu { id, source })?;
            Ok(vcpu)
        })
        .collect()
}

/// Joins lines and notifications of devices to KVM, of which the first one has window number `first`; last of all.
pub(crate) fn wire(vm: &VmFd, first: usize, slots: &[Arc<DeviceSlot>]) -> Result<(), MachineError> {
    for (slot, index) in slots.iter().zip(first..) {
        vm.register_irqfd(slot.interrupt().line(), irq(index)).map_err(kvm_failed("take an irqfd"))?;
    }
    for (slot, index) in slots.iter().zip(first..) {
        let address = IoEventAddress::Mmio(mmio_address(index) + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY));
        match slot.kicks() {
            Kicks::PerQueue(kicks) => {
                for (kick, queue) in kicks.iter().zip(0u32..) {
                    vm.register_ioevent(kick, &address, queue).map_err(kvm_failed("take an ioeventfd"))?;
                }
            }
            // Whatever is written there.
            Kicks::Shared(kick) => {
                vm.register_ioevent(kick, &address, NoDatamatch).map_err(kvm_failed("take an ioeventfd"))?;
            }
        }
        // Nobody has to hear of it (see `Interrupt`), so it ends in KVM.
        let address = IoEventAddress::Mmio(mmio_address(index) + u64::from(VIRTIO_MMIO_INTERRUPT_ACK));
        vm.register_ioevent(slot.acknowledged(), &address, USED_BUFFER)
            .map_err(kvm_failed("take an ioeventfd"))?;
    }
    Ok(())
}
