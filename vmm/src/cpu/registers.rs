//! The state of vCPUs when the guest starts.

use kvm_bindings::{Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::{CpuError, kvm_failed};
use crate::boot::{CODE_SELECTOR, DATA_SELECTOR, GDT_ENTRIES};
use crate::layout::{BOOT_STACK, GDT, PAGE_TABLES, ZERO_PAGE};

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_RESERVED: u64 = 2;
/// Control words of an FPU after reset.
const FPU_CONTROL: u16 = 0x37f;
const SSE_CONTROL: u32 = 0x1f80;

const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;

/// Offsets of the local interrupt pins in the local APIC's registers, and the delivery modes firmware leaves there.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const LVT_MODE: u32 = 0x700;
const MODE_EXTERNAL: u32 = 0x700;
const MODE_NMI: u32 = 0x400;

/// Lets the first vCPU start a kernel at its 64-bit entry: long mode, first 4 GiB mapped, zero page in RSI.
pub(crate) fn set_boot_registers(vcpu: &VcpuFd, entry: u64) -> Result<(), CpuError> {
    let mut sregs = vcpu.get_sregs().map_err(kvm_failed("get the system registers"))?;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (size_of_val(&GDT_ENTRIES) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = segment(CODE_SELECTOR, true);
    for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *data = segment(DATA_SELECTOR, false);
    }
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(kvm_failed("set the system registers"))?;

    let regs = kvm_regs {
        rip: entry,
        rsp: BOOT_STACK,
        rbp: BOOT_STACK,
        rsi: ZERO_PAGE,
        rflags: RFLAGS_RESERVED,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&regs).map_err(kvm_failed("set the registers"))?;

    let fpu = kvm_fpu { fcw: FPU_CONTROL, mxcsr: SSE_CONTROL, ..kvm_fpu::default() };
    vcpu.set_fpu(&fpu).map_err(kvm_failed("set the floating-point state"))
}

/// Sets any vCPU up as firmware would: local interrupt pins for external interrupts and NMIs, memory that is cached, fast strings.
/// A kernel takes features away from an Intel CPU whose fast strings are off, though it has begun to use them on the first.
pub(crate) fn set_firmware_registers(vcpu: &VcpuFd) -> Result<(), CpuError> {
    let mut lapic = vcpu.get_lapic().map_err(kvm_failed("get the local APIC"))?;
    set_delivery_mode(&mut lapic, LVT_LINT0, MODE_EXTERNAL);
    set_delivery_mode(&mut lapic, LVT_LINT1, MODE_NMI);
    vcpu.set_lapic(&lapic).map_err(kvm_failed("set the local APIC"))?;
    set_msrs(
        vcpu,
        &[(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK), (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS)],
    )
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let bytes = &mut lapic.regs[register..register + 4];
    let mut value = [0; 4];
    for (to, from) in value.iter_mut().zip(bytes.iter()) {
        *to = *from as u8;
    }
    let value = u32::from_le_bytes(value) & !LVT_MODE | mode;
    for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
        *to = from as i8;
    }
}

fn segment(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        // Accessed; code can be read, data can be written.
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..kvm_segment::default()
    }
}

fn set_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), CpuError> {
    let entries: Vec<kvm_msr_entry> = values
        .iter()
        .map(|&(index, data)| kvm_msr_entry { index, data, ..kvm_msr_entry::default() })
        .collect();
    let msrs = Msrs::from_entries(&entries).map_err(|_| CpuError::Table)?;
    let written = vcpu.set_msrs(&msrs).map_err(kvm_failed("set the MSRs"))?;
    match values.get(written) {
        Some(&(index, _)) => Err(CpuError::Msr(index)),
        None => Ok(()),
    }
}
