//! The IOAPIC (Intel 82093AA), in user space beside KVM's local APICs ("split irqchip").
//!
//! It does the one thing our devices need: it turns its redirection table into MSI routes, one per pin, and KVM
//! delivers an edge on a device's irqfd along them without coming back here.

use log::error;
use serde::{Deserialize, Serialize};

use crate::layout::{IRQ_PINS, device_of};

/// Register select, at this offset of the window.
const IOREGSEL: u64 = 0x00;
/// Data of the selected register.
const IOWIN: u64 = 0x10;

const REGISTER_ID: u8 = 0x00;
const REGISTER_VERSION: u8 = 0x01;
const REGISTER_ARBITRATION: u8 = 0x02;
const REGISTER_TABLE: u8 = 0x10;

/// Version 0x11, and the number of the last pin.
const VERSION: u32 = (IRQ_PINS - 1) << 16 | 0x11;

const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 7 << 8;
const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR.
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;

/// Address of MSIs; the destination is in bits 12 to 19.
const MSI_ADDRESS: u32 = 0xfee0_0000;

/// How an edge on a pin reaches the CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiRoute {
    /// The pin.
    pub pin: u32,
    /// Low half of the address; the high half is zero.
    pub address: u32,
    /// The message.
    pub data: u32,
}

/// Where the IOAPIC's effects go.
pub trait InterruptRouter: Send {
    /// Replaces all routes. A pin without a route delivers nothing.
    fn set_routes(&self, routes: &[MsiRoute]) -> Result<(), std::io::Error>;

    /// Raises an interrupt on a pin, as its device would.
    fn raise(&self, pin: u32);
}

/// What software wrote: plain data.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    id: u8,
    select: u8,
    table: [u64; IRQ_PINS as usize],
}

/// The IOAPIC's registers.
pub struct IoApic {
    state: IoApicState,
    router: Box<dyn InterruptRouter>,
}

impl IoApic {
    /// An IOAPIC after reset: every pin masked.
    pub fn new(id: u8, router: Box<dyn InterruptRouter>) -> Self {
        IoApic { state: IoApicState { id, select: 0, table: [MASKED; IRQ_PINS as usize] }, router }
    }

    /// An IOAPIC that goes on from a saved state. Its routes are set at once.
    pub fn restored(state: IoApicState, router: Box<dyn InterruptRouter>) -> Self {
        let ioapic = IoApic { state, router };
        ioapic.publish();
        ioapic
    }

    /// What software wrote so far.
    pub(crate) fn state(&self) -> &IoApicState {
        &self.state
    }

    /// A guest's read at `offset` of the window.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match offset {
            IOREGSEL => u32::from(self.state.select),
            IOWIN => self.read_register(),
            _ => 0,
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// A guest's write at `offset` of the window.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        match offset {
            IOREGSEL => self.state.select = value as u8,
            IOWIN => self.write_register(value),
            _ => {}
        }
    }

    /// A local APIC finished an interrupt of a level-triggered pin.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for entry in &mut self.state.table {
            if *entry & LEVEL != 0 && *entry & VECTOR == u64::from(vector) {
                *entry &= !REMOTE_IRR;
            }
        }
    }

    fn read_register(&self) -> u32 {
        match self.state.select {
            REGISTER_ID | REGISTER_ARBITRATION => u32::from(self.state.id) << 24,
            REGISTER_VERSION => VERSION,
            select => match selected_entry(select) {
                Some((pin, high)) => (self.state.table[pin] >> if high { 32 } else { 0 }) as u32,
                None => 0,
            },
        }
    }

    fn write_register(&mut self, value: u32) {
        if self.state.select == REGISTER_ID {
            self.state.id = (value >> 24) as u8 & 0xf;
            return;
        }
        let Some((pin, high)) = selected_entry(self.state.select) else { return };
        let old = self.state.table[pin];
        let new = if high {
            old & 0xffff_ffff | u64::from(value) << 32
        } else {
            old & (0xffff_ffff << 32 | READ_ONLY) | u64::from(value) & !READ_ONLY
        };
        self.state.table[pin] = new;
        if route(pin, old) != route(pin, new) {
            self.publish();
        }
        // An edge that came while the pin was masked is lost; a spurious interrupt costs a driver nothing.
        if old & MASKED != 0 && new & MASKED == 0 && device_of(pin as u32).is_some() {
            self.router.raise(pin as u32);
        }
    }

    fn publish(&self) {
        let routes: Vec<MsiRoute> =
            self.state.table.iter().enumerate().filter_map(|(pin, entry)| route(pin, *entry)).collect();
        if let Err(error) = self.router.set_routes(&routes) {
            error!("interrupt routes can't be changed: {error}");
        }
    }
}

/// Which entry a register belongs to, and whether it is its upper half.
fn selected_entry(select: u8) -> Option<(usize, bool)> {
    let register = select.checked_sub(REGISTER_TABLE)?;
    let pin = usize::from(register / 2);
    (pin < IRQ_PINS as usize).then_some((pin, register % 2 == 1))
}

/// Vectors below 16 can't be delivered.
fn route(pin: usize, entry: u64) -> Option<MsiRoute> {
    if entry & MASKED != 0 || entry & VECTOR < 16 {
        return None;
    }
    let destination = (entry >> 56) as u32;
    let logical = if entry & LOGICAL != 0 { 1 << 2 } else { 0 };
    Some(MsiRoute {
        pin: pin as u32,
        address: MSI_ADDRESS | destination << 12 | logical,
        // The lines are edge-triggered whatever the entry says: a level would need a device that holds it.
        data: (entry & (VECTOR | DELIVERY_MODE)) as u32,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Default, Clone)]
    struct Recorder {
        routes: Arc<Mutex<Vec<Vec<MsiRoute>>>>,
        raised: Arc<Mutex<Vec<u32>>>,
    }

    impl InterruptRouter for Recorder {
        fn set_routes(&self, routes: &[MsiRoute]) -> Result<(), std::io::Error> {
            self.routes.lock().unwrap().push(routes.to_vec());
            Ok(())
        }

        fn raise(&self, pin: u32) {
            self.raised.lock().unwrap().push(pin);
        }
    }

    fn read(ioapic: &mut IoApic, register: u8) -> u32 {
        ioapic.write(IOREGSEL, &u32::from(register).to_le_bytes());
        let mut data = [0; 4];
        ioapic.read(IOWIN, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(ioapic: &mut IoApic, register: u8, value: u32) {
        ioapic.write(IOREGSEL, &u32::from(register).to_le_bytes());
        ioapic.write(IOWIN, &value.to_le_bytes());
    }

    #[test]
    fn it_identifies_itself() {
        let mut ioapic = IoApic::new(3, Box::new(Recorder::default()));
        assert_eq!(read(&mut ioapic, 0), 3 << 24);
        assert_eq!(read(&mut ioapic, 1), 23 << 16 | 0x11);
        assert_eq!(read(&mut ioapic, 0x10), MASKED as u32);
    }

    #[test]
    fn an_unmasked_entry_becomes_a_route() {
        let recorder = Recorder::default();
        let mut ioapic = IoApic::new(0, Box::new(recorder.clone()));
        write(&mut ioapic, 0x10 + 2 * 9 + 1, 3 << 24);
        assert!(recorder.routes.lock().unwrap().is_empty());
        write(&mut ioapic, 0x10 + 2 * 9, 0x31 | LOGICAL as u32);
        let route = MsiRoute { pin: 9, address: 0xfee0_3004, data: 0x31 };
        assert_eq!(*recorder.routes.lock().unwrap(), [vec![route]]);
        assert_eq!(*recorder.raised.lock().unwrap(), [9]);

        write(&mut ioapic, 0x10 + 2 * 9, MASKED as u32 | 0x31);
        assert_eq!(recorder.routes.lock().unwrap().last(), Some(&Vec::new()));
    }

    #[test]
    fn read_only_bits_stay() {
        let mut ioapic = IoApic::new(0, Box::new(Recorder::default()));
        write(&mut ioapic, 0x10, u32::MAX);
        assert_eq!(u64::from(read(&mut ioapic, 0x10)) & READ_ONLY, 0);
    }

    #[test]
    fn no_register_and_no_size_panics() {
        let mut ioapic = IoApic::new(0, Box::new(Recorder::default()));
        for register in 0..=255 {
            write(&mut ioapic, register, 0xffff_ff10);
            read(&mut ioapic, register);
        }
        for size in 0..=8 {
            ioapic.write(IOWIN, &[0xff; 8][..size]);
            ioapic.read(IOWIN, &mut [0; 8][..size]);
        }
        for vector in 0..=255 {
            ioapic.end_of_interrupt(vector);
        }
    }
}
