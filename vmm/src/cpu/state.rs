//! The state of a vCPU that has run, as KVM gives and takes it.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::{CpuError, kvm_failed};
use crate::template::Raw;

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Older names of the paravirtual clock's MSRs: the same registers, but to write them changes how the clock works.
const MSR_KVM_WALL_CLOCK_OLD: u32 = 0x11;
const MSR_KVM_SYSTEM_TIME_OLD: u32 = 0x12;
/// Has no state: to write it makes KVM write the time to guest memory.
const MSR_KVM_WALL_CLOCK: u32 = 0x4b56_4d00;

/// MSRs moved at a time: KVM takes 256 at most.
const MSR_BATCH: usize = 256;

/// Words of the FPU's state. It is longer only in processes that asked for more (AMX), which this one doesn't.
const XSAVE_WORDS: usize = 1024;
const XSAVE_BYTES: usize = XSAVE_WORDS * size_of::<u32>();

/// Everything KVM tells of a vCPU: plain data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: Raw<kvm_mp_state>,
    regs: Raw<kvm_regs>,
    sregs: Raw<kvm_sregs>,
    xsave: Raw<[u32; XSAVE_WORDS]>,
    xcrs: Raw<kvm_xcrs>,
    debug_regs: Raw<kvm_debugregs>,
    lapic: Raw<kvm_lapic_state>,
    tsc_khz: u32,
    msrs: Vec<(u32, u64)>,
    events: Raw<kvm_vcpu_events>,
}

/// The MSRs that are saved, in the order in which they have to be written.
pub(crate) fn saved_msrs(kvm: &Kvm) -> Result<Vec<u32>, CpuError> {
    let list = kvm.get_msr_index_list().map_err(kvm_failed("list the MSRs"))?;
    let skipped = [MSR_KVM_WALL_CLOCK_OLD, MSR_KVM_SYSTEM_TIME_OLD, MSR_KVM_WALL_CLOCK];
    let mut msrs: Vec<u32> =
        list.as_slice().iter().copied().filter(|index| !skipped.contains(index)).collect();
    // The deadline is a value of the counter.
    msrs.sort_by_key(|index| *index == MSR_IA32_TSC_DEADLINE);
    Ok(msrs)
}

/// Whether what there is to save fits into what is saved.
///
/// # Errors
/// When guests of this process have more floating-point state than that.
pub(crate) fn check_size(kvm: &Kvm) -> Result<(), CpuError> {
    size_fits(kvm.check_extension_int(Cap::Xsave2))
}

/// KVMs before Linux 5.17 say 0 and have no larger states.
fn size_fits(bytes: i32) -> Result<(), CpuError> {
    match usize::try_from(bytes) {
        Ok(size) if size > XSAVE_BYTES => Err(CpuError::StateSize { size, most: XSAVE_BYTES }),
        _ => Ok(()),
    }
}

impl VcpuState {
    /// Reads the state of a vCPU that doesn't run. No vCPU of the machine may run meanwhile.
    pub(crate) fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, CpuError> {
        // This one first: it makes KVM process what is pending, which changes the rest.
        let mp_state = vcpu.get_mp_state().map_err(kvm_failed("get the run state"))?;
        let regs = vcpu.get_regs().map_err(kvm_failed("get the registers"))?;
        let sregs = vcpu.get_sregs().map_err(kvm_failed("get the system registers"))?;
        let xsave = vcpu.get_xsave().map_err(kvm_failed("get the floating-point state"))?;
        let xcrs = vcpu.get_xcrs().map_err(kvm_failed("get the extended control registers"))?;
        let debug_regs = vcpu.get_debug_regs().map_err(kvm_failed("get the debug registers"))?;
        let lapic = vcpu.get_lapic().map_err(kvm_failed("get the local APIC"))?;
        let tsc_khz = vcpu.get_tsc_khz().map_err(kvm_failed("get the TSC's frequency"))?;
        let msrs = read_msrs(vcpu, msrs)?;
        // And this one last: the others may have left events.
        let events = vcpu.get_vcpu_events().map_err(kvm_failed("get the pending events"))?;
        Ok(VcpuState {
            mp_state: Raw(mp_state),
            regs: Raw(regs),
            sregs: Raw(sregs),
            xsave: Raw(xsave.region),
            xcrs: Raw(xcrs),
            debug_regs: Raw(debug_regs),
            lapic: Raw(lapic),
            tsc_khz,
            msrs,
            events: Raw(events),
        })
    }

    /// Gives the state to a new vCPU that has its CPUID table.
    pub(crate) fn restore(&self, vcpu: &VcpuFd) -> Result<(), CpuError> {
        vcpu.set_mp_state(self.mp_state.0).map_err(kvm_failed("set the run state"))?;
        vcpu.set_regs(&self.regs.0).map_err(kvm_failed("set the registers"))?;
        vcpu.set_sregs(&self.sregs.0).map_err(kvm_failed("set the system registers"))?;
        let xsave = kvm_xsave { region: self.xsave.0, ..kvm_xsave::default() };
        // SAFETY: KVM reads no more than the 4096 bytes of the structure, as no larger features were asked for.
        unsafe { vcpu.set_xsave(&xsave) }.map_err(kvm_failed("set the floating-point state"))?;
        // A host without XSAVE has none, and refuses to be given as many.
        if self.xcrs.0.nr_xcrs > 0 {
            vcpu.set_xcrs(&self.xcrs.0).map_err(kvm_failed("set the extended control registers"))?;
        }
        vcpu.set_debug_regs(&self.debug_regs.0).map_err(kvm_failed("set the debug registers"))?;
        // After the system registers, which hold the base address of the local APIC.
        vcpu.set_lapic(&self.lapic.0).map_err(kvm_failed("set the local APIC"))?;
        if vcpu.get_tsc_khz().map_err(kvm_failed("get the TSC's frequency"))? != self.tsc_khz {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(kvm_failed("set the TSC's frequency"))?;
        }
        // After the local APIC, whose timer one of them sets.
        write_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events.0).map_err(kvm_failed("set the pending events"))
    }

    /// Makes KVM take the counter of the first vCPU as it is: a value within a second of what it expects, and a new machine's
    /// counter starts at 0, is taken for an attempt to set a counter in step with the others, and not for its value
    /// (`kvm_synchronize_tsc`, before Linux 6.8). So one that is far away is written first. The other vCPUs are then in
    /// step with this one, which is what they should be.
    pub(crate) fn leave_startup_tsc(&self, vcpu: &VcpuFd) -> Result<(), CpuError> {
        const FAR_MS: u64 = 100_000;
        match self.tsc() {
            Some(tsc) => {
                let far = tsc.wrapping_add(u64::from(self.tsc_khz) * FAR_MS);
                write_msrs(vcpu, &[(MSR_IA32_TSC, far)])
            }
            None => Ok(()),
        }
    }

    /// The time stamp counter.
    pub fn tsc(&self) -> Option<u64> {
        self.msrs.iter().find(|(index, _)| *index == MSR_IA32_TSC).map(|(_, value)| *value)
    }

    /// Moves the time stamp counter.
    pub(crate) fn set_tsc(&mut self, tsc: u64) {
        if let Some((_, value)) = self.msrs.iter_mut().find(|(index, _)| *index == MSR_IA32_TSC) {
            *value = tsc;
        }
    }
}

/// Reads those of the MSRs that this vCPU has.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, CpuError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let batch = &left[..left.len().min(MSR_BATCH)];
        let entries: Vec<kvm_msr_entry> =
            batch.iter().map(|&index| kvm_msr_entry { index, ..kvm_msr_entry::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| CpuError::Table)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(kvm_failed("get the MSRs"))?.min(batch.len());
        values.extend(msrs.as_slice()[..read].iter().map(|entry| (entry.index, entry.data)));
        // KVM stops at one that this vCPU's features don't include.
        let skipped = usize::from(read < batch.len());
        left = &left[read + skipped..];
    }
    Ok(values)
}

fn write_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), CpuError> {
    let mut left = values;
    while !left.is_empty() {
        let batch = &left[..left.len().min(MSR_BATCH)];
        let entries: Vec<kvm_msr_entry> = batch
            .iter()
            .map(|&(index, data)| kvm_msr_entry { index, data, ..kvm_msr_entry::default() })
            .collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| CpuError::Table)?;
        let written = vcpu.set_msrs(&msrs).map_err(kvm_failed("set the MSRs"))?.min(batch.len());
        left = &left[written..];
        if written < batch.len() {
            // KVM reads some as zero that it doesn't let anybody write: nothing is lost.
            match left.split_first() {
                Some(((_, 0), rest)) => left = rest,
                Some(((index, _), _)) => return Err(CpuError::Msr(*index)),
                None => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_state_than_is_saved_is_refused() {
        for fitting in [-1, 0, 576, 4096] {
            assert!(size_fits(fitting).is_ok(), "{fitting}");
        }
        let error = size_fits(11008).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a vCPU has 11008 bytes of floating-point state here, and 4096 can be saved"
        );
    }
}
