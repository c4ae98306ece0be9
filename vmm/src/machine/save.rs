//! Saving a machine: it stops for good, and its state is written down.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::{MachineError, RunningMachine};
use crate::cpu::{self, CpuidTemplate, VcpuState};
use crate::device_loop::Stopped;
use crate::devices::DeviceState;
use crate::memory::Memory;
use crate::template::{self, MachineState, Raw, TemplateError};
use crate::vcpu;

/// What has to be known of a machine that can be saved, beside what runs.
pub(super) struct Saver {
    vm: Arc<VmFd>,
    msrs: Vec<u32>,
    cpuid: Vec<kvm_cpuid_entry2>,
    memory_mib: u32,
}

impl Saver {
    /// `None` for a machine that can't be saved, which needs none of this.
    pub(crate) fn new(
        memory_mib: u32,
        memory: &Memory,
        kvm: &Kvm,
        vm: Arc<VmFd>,
        cpuid: &CpuidTemplate,
    ) -> Result<Option<Self>, MachineError> {
        if !matches!(memory, Memory::Shared(_)) {
            return Ok(None);
        }
        let msrs = cpu::check_size(kvm)
            .and_then(|()| cpu::saved_msrs(kvm))
            .map_err(|source| MachineError::Vcpu { id: 0, source })?;
        Ok(Some(Saver { vm, msrs, cpuid: cpuid.for_vcpu(0), memory_mib }))
    }
}

impl RunningMachine {
    /// Stops the machine and writes its state to `file`. It can't go on after that, whatever the outcome.
    pub(crate) fn save(self, file: &mut File) -> Result<(), TemplateError> {
        let saver = self.saver.ok_or(TemplateError::NotSaveable)?;
        self.stop.store(true, Ordering::SeqCst);
        let vcpus: Vec<VcpuFd> = vcpu::join(self.vcpus)
            .and_then(|vcpus| vcpus.into_iter().collect())
            .ok_or(TemplateError::NotStopped)?;
        // Nothing comes from the guest any more: the devices finish what they have.
        let Stopped { workers, at_rest } = self.devices.stop().ok_or(TemplateError::NotStopped)?;
        let mut devices: Vec<DeviceState> = Vec::new();
        for (index, worker) in workers {
            let busy = |why| TemplateError::Busy { kind: worker.kind(), why };
            if !at_rest {
                return Err(busy("devices don't come to rest"));
            }
            let backend = worker.save().map_err(busy)?;
            let state = self.bus.device_state(index, backend).ok_or(busy("it has no registers"))?;
            devices.push(state.map_err(busy)?);
        }
        let clock =
            saver.vm.get_clock().map_err(|source| TemplateError::Kvm { what: "tell the time", source })?;
        let state = MachineState {
            memory_mib: saver.memory_mib,
            cpuid: saver.cpuid.into_iter().map(Raw).collect(),
            vcpus: save_vcpus(&vcpus, &saver.msrs)?,
            clock: Raw(clock),
            ioapic: self.bus.ioapic_state(),
            devices,
        };
        Ok(template::write(&state, file)?)
    }
}

fn save_vcpus(vcpus: &[VcpuFd], msrs: &[u32]) -> Result<Vec<VcpuState>, TemplateError> {
    let mut states = Vec::with_capacity(vcpus.len());
    for (vcpu, id) in vcpus.iter().zip(0..) {
        states.push(VcpuState::save(vcpu, msrs).map_err(|source| TemplateError::Vcpu { id, source })?);
    }
    // They were read one after the other. The last reading is that of all: on none may time go backwards.
    if let Some(tsc) = states.iter().filter_map(VcpuState::tsc).max() {
        for state in &mut states {
            state.set_tsc(tsc);
        }
    }
    Ok(states)
}
