//! The parts of a machine beside its devices: the bus, what it boots from, what it is restored from.

use std::io;

use bulkhead_vmm::boot;
use bulkhead_vmm::bus::Bus;
use bulkhead_vmm::devices::VirtioDevice;
use bulkhead_vmm::devices::balloon::Balloon;
use bulkhead_vmm::devices::blk::Block;
use bulkhead_vmm::devices::console::Console;
use bulkhead_vmm::devices::fs::FileSystem;
use bulkhead_vmm::devices::mmio::MmioTransport;
use bulkhead_vmm::devices::parts::Parts;
use bulkhead_vmm::devices::registers::RegisterMemory;
use bulkhead_vmm::devices::rng::Rng;
use bulkhead_vmm::devices::slot::DeviceSlot;
use bulkhead_vmm::devices::vsock::Vsock;
use bulkhead_vmm::ioapic::{InterruptRouter, IoApic, MsiRoute};
use bulkhead_vmm::layout::{IOAPIC_BASE, MMIO_BASE};
use bulkhead_vmm::template::{self, MachineState};
use bulkhead_vmm::{devices::DeviceState, working_set};

use crate::guest::{Guest, memory};
use crate::host;
use crate::input::Input;

/// Routes must be what the machine can carry.
struct Router;

impl InterruptRouter for Router {
    fn set_routes(&self, routes: &[MsiRoute]) -> Result<(), io::Error> {
        for route in routes {
            assert!(route.pin < 24 && route.address >> 20 == 0xfee, "{route:?}");
        }
        Ok(())
    }

    fn raise(&self, pin: u32) {
        assert!(pin < 24, "pin {pin}");
    }
}

/// Accesses of vCPUs to ports and memory that isn't RAM.
pub fn bus(data: &[u8]) {
    let mut input = Input::new(data);
    let (registers, ram) = (RegisterMemory::new(), memory(1 << 20));
    let devices: [Box<dyn VirtioDevice>; 2] = [Box::new(Rng), Box::new(Console::new(None).unwrap())];
    let transports = devices.iter().enumerate().map(|(index, device)| {
        let info = device.info();
        let slot = DeviceSlot::new(info.queue_sizes.len(), registers.window(index)).unwrap();
        MmioTransport::new(info, slot, ram.clone())
    });
    let bus = Bus::new(transports.collect(), 2, registers.clone(), IoApic::new(0, Box::new(Router)));
    while !input.is_empty() {
        let operation = input.u8();
        let size = 1 + usize::from(operation >> 4) % 8;
        let mut value = [0; 8];
        let address = match operation >> 1 & 3 {
            0 => MMIO_BASE + u64::from(input.u16() & 0xfff),
            1 => IOAPIC_BASE + u64::from(input.u8()),
            2 => IOAPIC_BASE + 0x10 * u64::from(input.u8() & 1),
            _ => input.telling(),
        };
        if operation & 1 == 0 {
            value = input.u64().to_le_bytes();
            bus.mmio_write(address, &value[..size]);
            bus.port_write(address as u16, &value[..size]);
        } else {
            bus.mmio_read(address, &mut value[..size]);
            bus.port_read(address as u16, &mut value[..size]);
            bus.end_of_interrupt(address as u8);
        }
    }
    let _ = bus.ioapic_state();
}

/// A kernel image.
pub fn kernel(data: &[u8]) {
    let ram = memory(4 << 20);
    if let Ok(entry) = boot::load(&ram, &mut host::file(data), "console=hvc0", 2, 3) {
        assert!((1 << 20..4 << 20).contains(&entry), "the entry is {entry:#x}");
    }
}

/// The list of pages to map in advance.
pub fn working_set(data: &[u8]) {
    let _ = working_set::populate(&memory(1 << 20), &mut host::file(data));
}

/// The file of a saved machine, and each device restored from it. The checksum, which is no defence, is made to fit.
pub fn state(data: &[u8]) {
    let _ = template::read(&mut host::file(data));
    let Ok(mut state) = postcard::from_bytes::<MachineState>(data) else { return };
    // What was understood is written and read again as it was.
    let mut file = host::file(&[]);
    template::write(&state, &mut file).expect("a state that was read can be written");
    let again = template::read(&mut file).expect("what was written can be read");
    assert!(format!("{again:?}") == format!("{state:?}"), "a state changes by being kept");
    IoApic::restored(state.ioapic.clone(), Box::new(Router)).end_of_interrupt(data.len() as u8);
    for device in state.devices.iter_mut().take(8) {
        restore(device);
    }
}

fn restore(state: &mut DeviceState) {
    let (socket, _peer) = host::packets();
    let mut device: Box<dyn VirtioDevice> = match state.id {
        2 => Box::new(Block::new(Parts::whole(host::file(&[0; 4096]).into()).unwrap(), false, "fuzz", 512)),
        3 => Box::new(Console::new(None).unwrap()),
        4 => Box::new(Rng),
        5 => Box::new(Balloon::default()),
        19 => Box::new(Vsock::new(7, vec![(1024, host::stream().0)]).unwrap().0),
        _ => Box::new(FileSystem::new("fuzz", socket).unwrap()),
    };
    if device.restore(std::mem::take(&mut state.backend)).is_err() {
        return;
    }
    if let Some(mut guest) = Guest::restored(device, state) {
        guest.turn();
    }
}
