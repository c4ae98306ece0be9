//! Restoring a saved machine.

use std::os::fd::OwnedFd;

use bulkhead_vmm_protocol::RestoreConfig;
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::{VcpuFd, VmFd};

use super::{DeviceParts, Machine, MachineError, Prepared};
use crate::devices::{DeviceState, VirtioDevice};
use crate::ioapic::IoApic;
use crate::memory::Memory;
use crate::resources::{Handles, Resources};
use crate::template::{self, MachineState, TemplateError};
use crate::vm::{self, KvmRouter};

impl Machine {
    /// Builds a machine that goes on from where a saved one was.
    pub(crate) fn restore(
        prepared: Prepared,
        config: &RestoreConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<(Self, Handles), MachineError> {
        let Prepared { vm, memory, memory_mib, ram, registers, cpuid, vcpus, .. } = &prepared;
        let RestoreConfig { config, state } = config;
        let Resources { start: mut file, mut devices, handles } = Resources::take(config, *state, fds)?;
        if matches!(memory, Memory::Anonymous) {
            return Err(TemplateError::NoMemoryFile.into());
        }
        let mut state = template::read(&mut file).map_err(TemplateError::from)?;
        let mismatch = |what| Err(TemplateError::Mismatch(what).into());
        if state.memory_mib != *memory_mib {
            return mismatch("memory size");
        }
        if state.vcpus.len() != vcpus.len() {
            return mismatch("vCPUs");
        }
        if state.devices.len() != devices.len() {
            return mismatch("devices");
        }
        if !cpuid.for_vcpu(0).iter().eq(state.cpuid.iter().map(|entry| &entry.0)) {
            return mismatch("CPU features");
        }
        restore_backends(&mut devices, &mut state.devices)?;
        let mut parts = DeviceParts::new(devices, ram, registers)?;
        for (index, (transport, saved)) in parts.transports.iter_mut().zip(&state.devices).enumerate() {
            transport.restore(saved).map_err(|fault| device_failed(index, &fault))?;
        }
        let router = KvmRouter { vm: vm.clone(), slots: parts.slots.clone() };
        // Routes before the lines that follow them.
        let ioapic = IoApic::restored(state.ioapic.clone(), Box::new(router));
        vm::wire(vm, 0, &parts.slots)?;
        restore_vcpus(vm, vcpus, &state)?;
        // What was pending may or may not have reached a local APIC; once more does no harm.
        for (slot, saved) in parts.slots.iter().zip(&state.devices) {
            if saved.interrupt_status != 0 {
                slot.interrupt().raise_again();
            }
        }
        Ok((prepared.into_machine(parts, ioapic)?, handles))
    }
}

/// Gives backends their states, before the register faces are made from them.
fn restore_backends(
    devices: &mut [Box<dyn VirtioDevice>],
    states: &mut [DeviceState],
) -> Result<(), TemplateError> {
    for (index, (device, state)) in devices.iter_mut().zip(states).enumerate() {
        let backend = std::mem::take(&mut state.backend);
        device.restore(backend).map_err(|fault| device_failed(index, &fault))?;
    }
    Ok(())
}

fn device_failed(index: usize, fault: &crate::devices::StateFault) -> TemplateError {
    TemplateError::Device { index, why: fault.to_string() }
}

fn restore_vcpus(vm: &VmFd, vcpus: &[VcpuFd], state: &MachineState) -> Result<(), TemplateError> {
    if let (Some(first), Some(saved)) = (vcpus.first(), state.vcpus.first()) {
        saved.leave_startup_tsc(first).map_err(|source| TemplateError::Vcpu { id: 0, source })?;
    }
    for ((vcpu, saved), id) in vcpus.iter().zip(&state.vcpus).zip(0..) {
        saved.restore(vcpu).map_err(|source| TemplateError::Vcpu { id, source })?;
    }
    // The clock goes on from where it stood: for the guest no time has passed.
    let clock = kvm_clock_data { clock: state.clock.0.clock, ..kvm_clock_data::default() };
    vm.set_clock(&clock).map_err(|source| TemplateError::Kvm { what: "set the clock", source })?;
    for vcpu in vcpus {
        // It fails for a guest that doesn't use the clock, which has no watchdog to be told then.
        let _ = vcpu.kvmclock_ctrl();
    }
    Ok(())
}
