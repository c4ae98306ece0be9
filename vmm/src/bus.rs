//! Where trapped accesses of vCPUs go.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_base::guest::POWER_OFF;

use crate::devices::mmio::MmioTransport;
use crate::devices::registers::RegisterMemory;
use crate::devices::{BackendState, DeviceState};
use crate::ioapic::{IoApic, IoApicState};
use crate::layout::{
    I8042_COMMAND, I8042_DATA, I8042_RESET, IOAPIC_BASE, IOAPIC_SIZE, MMIO_BASE, MMIO_STRIDE, POWER_PORT,
};

/// What a guest asks of its machine through a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// Power off.
    Off,
    /// Reset.
    Reset,
}

/// Everything behind ports and memory that isn't RAM.
pub struct Bus {
    /// What windows without a device are written is ignored.
    devices: Vec<Mutex<Option<MmioTransport>>>,
    registers: Arc<RegisterMemory>,
    ioapic: Mutex<IoApic>,
}

impl Bus {
    /// A bus with a window for each device, in order, and `free` more windows for devices that come later.
    pub fn new(
        devices: Vec<MmioTransport>,
        free: usize,
        registers: Arc<RegisterMemory>,
        ioapic: IoApic,
    ) -> Self {
        let devices = devices.into_iter().map(Some).chain((0..free).map(|_| None));
        Bus { devices: devices.map(Mutex::new).collect(), registers, ioapic: Mutex::new(ioapic) }
    }

    /// Puts a device into window number `index`, or takes it away.
    pub(crate) fn set_device(&self, index: usize, device: Option<MmioTransport>) {
        if let Some(window) = self.devices.get(index) {
            *lock(window) = device;
        }
    }

    /// The IOAPIC's state.
    pub fn ioapic_state(&self) -> IoApicState {
        lock(&self.ioapic).state().clone()
    }

    /// The state of device number `index`, with that of its backend; `None` when there is no such device.
    pub(crate) fn device_state(
        &self,
        index: usize,
        backend: BackendState,
    ) -> Option<Result<DeviceState, &'static str>> {
        self.devices.get(index).and_then(|device| lock(device).as_ref().map(|device| device.save(backend)))
    }

    /// A write to a port. Ports that don't exist ignore it.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<PowerRequest> {
        match (port, data) {
            (POWER_PORT, [POWER_OFF, ..]) => Some(PowerRequest::Off),
            (I8042_COMMAND, [I8042_RESET]) => Some(PowerRequest::Reset),
            _ => None,
        }
    }

    /// A read from a port. Ports that don't exist read as all ones.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(match port {
            // The keyboard controller is always ready for a command, and has nothing to say.
            I8042_COMMAND | I8042_DATA => 0,
            _ => 0xff,
        });
    }

    /// A write to memory that isn't RAM. What isn't there ignores it.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((index, offset)) = self.window(address) {
            if let Some(device) = lock(&self.devices[index]).as_mut() {
                device.write(offset, data);
            }
        } else if let Some(offset) = ioapic_offset(address) {
            lock(&self.ioapic).write(offset, data);
        }
    }

    /// A read from memory that isn't RAM. What isn't there reads as all ones. Registers of devices are memory where KVM can have it
    /// read-only; only elsewhere their reads come here.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if let Some((index, offset)) = self.window(address) {
            self.registers.window(index).read(offset, data);
        } else if let Some(offset) = ioapic_offset(address) {
            lock(&self.ioapic).read(offset, data);
        } else {
            data.fill(0xff);
        }
    }

    /// A local APIC finished an interrupt that KVM tells the IOAPIC of.
    pub fn end_of_interrupt(&self, vector: u8) {
        lock(&self.ioapic).end_of_interrupt(vector);
    }

    /// The number of the window behind an address, and the offset in it.
    fn window(&self, address: u64) -> Option<(usize, u64)> {
        let offset = address.checked_sub(MMIO_BASE)?;
        let index = usize::try_from(offset / MMIO_STRIDE).ok()?;
        (index < self.devices.len()).then_some((index, offset % MMIO_STRIDE))
    }
}

fn ioapic_offset(address: u64) -> Option<u64> {
    address.checked_sub(IOAPIC_BASE).filter(|offset| *offset < IOAPIC_SIZE)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::VirtioDevice;
    use crate::devices::rng::Rng;
    use crate::devices::slot::DeviceSlot;
    use crate::devices::testing::test_ram;
    use crate::ioapic::{InterruptRouter, MsiRoute};

    struct Nowhere;

    impl InterruptRouter for Nowhere {
        fn set_routes(&self, _routes: &[MsiRoute]) -> Result<(), std::io::Error> {
            Ok(())
        }

        fn raise(&self, _pin: u32) {}
    }

    fn rng(registers: &Arc<RegisterMemory>, window: usize) -> (MmioTransport, Arc<DeviceSlot>) {
        let slot = DeviceSlot::new(1, registers.window(window)).unwrap();
        (MmioTransport::new(Rng.info(), slot.clone(), test_ram()), slot)
    }

    fn bus() -> Bus {
        let registers = RegisterMemory::new();
        let (rng, _) = rng(&registers, 0);
        Bus::new(vec![rng], 1, registers, IoApic::new(1, Box::new(Nowhere)))
    }

    fn read(bus: &Bus, address: u64) -> u32 {
        let mut data = [0x55; 4];
        bus.mmio_read(address, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn addresses_find_their_device() {
        let bus = bus();
        assert_eq!(read(&bus, MMIO_BASE), 0x7472_6976);
        assert_eq!(read(&bus, MMIO_BASE + 8), 4);
        assert_eq!(read(&bus, MMIO_BASE + 2 * MMIO_STRIDE), u32::MAX);
        assert_eq!(read(&bus, MMIO_BASE - 4), u32::MAX);
        bus.mmio_write(IOAPIC_BASE, &[1, 0, 0, 0]);
        assert_eq!(read(&bus, IOAPIC_BASE + 0x10) & 0xff, 0x11);
        assert_eq!(read(&bus, u64::MAX), u32::MAX);
    }

    #[test]
    fn a_window_without_a_device_shows_a_placeholder() {
        let bus = bus();
        let window = MMIO_BASE + MMIO_STRIDE;
        assert_eq!([0, 4, 8, 0x100].map(|register| read(&bus, window + register)), [0x7472_6976, 2, 0, 0]);
        bus.mmio_write(window + 0x70, &1u32.to_le_bytes());
        assert_eq!(read(&bus, window + 0x70), 0);
        let (rng, slot) = rng(&bus.registers, 1);
        bus.set_device(1, Some(rng));
        assert_eq!(read(&bus, window + 8), 4);
        bus.set_device(1, None);
        slot.clear();
        assert_eq!(read(&bus, window + 8), 0);
    }

    #[test]
    fn only_the_right_bytes_end_the_machine() {
        let bus = bus();
        assert_eq!(bus.port_write(0x604, &[0x34]), Some(PowerRequest::Off));
        assert_eq!(bus.port_write(0x604, &[0x35]), None);
        assert_eq!(bus.port_write(0x64, &[0xfe]), Some(PowerRequest::Reset));
        assert_eq!(bus.port_write(0x64, &[0xd1]), None);
        assert_eq!(bus.port_write(0x80, &[]), None);
        let mut data = [0x55];
        bus.port_read(0x64, &mut data);
        assert_eq!(data, [0]);
        bus.port_read(0x21, &mut data);
        assert_eq!(data, [0xff]);
    }
}
