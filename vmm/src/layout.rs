//! The guest-physical address space.
//!
//! ```text
//! 0x0000_0500  GDT                         } below 640 KiB: what the boot protocol needs.
//! 0x0000_7000  zero page (boot_params)     } All of it but the MP table may be reused by
//! 0x0000_9000  page tables, 6 pages        } the kernel once it runs.
//! 0x0002_0000  kernel command line         }
//! 0x0009_fc00  MP table                    }
//! 0x0010_0000  RAM: the kernel, wherever its headers say
//! 0xd000_0000  end of RAM below 4 GiB; virtio-mmio windows, eight to a page
//! 0xfec0_0000  IOAPIC
//! 0xfee0_0000  local APICs
//! 0xfffb_d000  three pages that KVM needs on Intel CPUs
//! 1_0000_0000  RAM that didn't fit below
//! ```

/// The word where PC firmware looks for how a reset came about; Linux writes it before every reset.
pub(crate) const RESET_FLAG: u64 = 0x472;
/// The global descriptor table.
pub(crate) const GDT: u64 = 0x500;
/// `struct boot_params`.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Where the stack starts (downwards): unused by Linux, which has its own.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
/// The first of the page tables: PML4, PDPT, four page directories.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// Room for the kernel command line with its terminating NUL: what x86 Linux takes (`COMMAND_LINE_SIZE`).
pub(crate) const CMDLINE_SIZE: usize = 2048;
/// The MP configuration table: the last KiB of base memory, where kernels look for it.
pub(crate) const MP_TABLE: u64 = 0x9_fc00;
/// Where "high memory" starts; kernels are loaded at or above this.
pub(crate) const HIGH_RAM: u64 = 0x10_0000;

/// The first device window.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Size and distance of device windows: the registers and as many bytes of configuration space.
pub(crate) const MMIO_STRIDE: u64 = 0x200;
/// The IOAPIC's window.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Size of the IOAPIC's window.
pub(crate) const IOAPIC_SIZE: u64 = 0x1000;
/// The local APICs' window.
pub(crate) const LAPIC_BASE: u64 = 0xfee0_0000;
/// Three pages that KVM uses on CPUs that can't run real mode natively.
pub(crate) const KVM_TSS: usize = 0xfffb_d000;
/// Where RAM goes on above the window for devices.
pub(crate) const RAM_ABOVE_4G: u64 = 1 << 32;

/// Pins of the IOAPIC, which are the interrupt numbers of the guest.
pub(crate) const IRQ_PINS: u32 = 24;
/// The first pin for devices; kernels look for parts of a PC that we don't have at the lower ones (8 is the clock).
pub(crate) const FIRST_IRQ: u32 = 9;
/// Windows for devices that come while the machine runs; they follow those of the devices that it starts with.
pub(crate) const DEVICE_SLOTS: usize = bulkhead_vmm_protocol::DEVICE_SLOTS as usize;
/// Pins for two more devices. They were those of sound cards and printers, which kernels don't look for.
const SPARE_IRQS: [u32; 2] = [5, 7];
/// The most devices, those in slots included.
pub(crate) const MAX_DEVICES: usize = (IRQ_PINS - FIRST_IRQ) as usize + SPARE_IRQS.len();

/// The port that the agent writes [`POWER_OFF`](bulkhead_base::guest::POWER_OFF) to.
pub(crate) const POWER_PORT: u16 = 0x604;
/// Data port of the keyboard controller.
pub(crate) const I8042_DATA: u16 = 0x60;
/// Command and status port of the keyboard controller.
pub(crate) const I8042_COMMAND: u16 = 0x64;
/// The keyboard controller's command that resets the machine.
pub(crate) const I8042_RESET: u8 = 0xfe;

/// Guest-physical address of device number `index`'s window.
pub(crate) const fn mmio_address(index: usize) -> u64 {
    MMIO_BASE + MMIO_STRIDE * index as u64
}

/// Interrupt number of device number `index`.
pub(crate) const fn irq(index: usize) -> u32 {
    let pin = FIRST_IRQ + index as u32;
    if pin < IRQ_PINS { pin } else { SPARE_IRQS[(pin - IRQ_PINS) as usize] }
}

/// The number of the device whose interrupt it is.
pub(crate) const fn device_of(irq: u32) -> Option<usize> {
    match irq {
        _ if irq == SPARE_IRQS[0] => Some(MAX_DEVICES - 2),
        _ if irq == SPARE_IRQS[1] => Some(MAX_DEVICES - 1),
        FIRST_IRQ.. => Some((irq - FIRST_IRQ) as usize),
        _ => None,
    }
}
