//! The register face of a device: virtio over MMIO, version 2 (virtio 1.2, section 4.2).

use std::sync::Arc;

use bulkhead_base::chain;
use log::error;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID,
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW,
    VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::interrupt::USED_BUFFER;
use super::queue::{QueueRegisters, Virtqueue};
use super::queue_fault::QueueFault;
use super::slot::{DeviceSlot, SlotState};
use super::{Activated, BackendState, DeviceInfo, DeviceState, StateFault};
use crate::memory::SharedRam;

/// "blkh", little-endian: ours.
const VENDOR: u32 = 0x686b_6c62;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// Feature bits offered for every device.
const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What the driver wrote to the registers: plain data.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// `Status`, without `DEVICE_NEEDS_RESET`.
    pub status: u32,
    /// `DeviceFeaturesSel`.
    pub device_features_sel: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_sel: u32,
    /// `DriverFeatures`, both halves.
    pub driver_features: u64,
    /// `QueueSel`.
    pub queue_sel: u32,
    /// Each queue's registers.
    pub queues: Vec<QueueRegisters>,
}

/// One device's registers. Called by vCPU threads, under a lock.
#[derive(Debug)]
pub struct MmioTransport {
    info: DeviceInfo,
    slot: Arc<DeviceSlot>,
    ram: SharedRam,
    state: TransportState,
}

impl MmioTransport {
    /// The registers of a device whose backend works at the other side of `slot`.
    pub fn new(info: DeviceInfo, slot: Arc<DeviceSlot>, ram: SharedRam) -> Self {
        let mut transport = MmioTransport { info, slot, ram, state: TransportState::default() };
        transport.state = transport.initial_state();
        transport.show();
        transport
    }

    /// What the driver wrote so far.
    #[cfg(test)]
    pub(crate) fn state(&self) -> &TransportState {
        &self.state
    }

    /// The device's state, with that of its backend. Neither vCPUs nor the device's thread may run.
    pub(crate) fn save(&self, backend: BackendState) -> Result<DeviceState, &'static str> {
        if self.slot.interrupt.needs_reset() {
            return Err("it has stopped until its driver resets it");
        }
        let state = self.slot.lock();
        if state.reset_pending || state.fresh {
            return Err("it has not seen what its driver did");
        }
        let positions = match &state.active {
            Some(active) if active.queues.iter().any(|queue| queue.in_flight() > 0) => {
                return Err("requests of its driver are not finished");
            }
            Some(active) => Some(active.queues.iter().map(Virtqueue::position).collect()),
            None => None,
        };
        Ok(DeviceState {
            id: self.info.kind.id(),
            config: self.info.config.contents(),
            config_generation: self.info.config.generation(),
            transport: self.state.clone(),
            interrupt_status: self.pending_interrupts(&state),
            positions,
            backend,
        })
    }

    /// What a driver may not have taken notice of.
    fn pending_interrupts(&self, state: &SlotState) -> u32 {
        let status = self.slot.interrupt.status();
        let all_seen =
            state.active.as_ref().is_none_or(|active| active.queues.iter().all(Virtqueue::is_seen));
        if all_seen { status & !USED_BUFFER } else { status }
    }

    /// Takes a saved state, which goes through the checks that its driver went through. Before the device's thread starts.
    pub fn restore(&mut self, saved: &DeviceState) -> Result<(), StateFault> {
        if saved.id != self.info.kind.id() {
            return Err(StateFault::Other("type"));
        }
        if saved.config != self.info.config.contents() {
            return Err(StateFault::Other("configuration"));
        }
        let TransportState { status, queues, .. } = &saved.transport;
        if queues.len() != self.info.queue_sizes.len() {
            return Err(StateFault::Other("number of queues"));
        }
        if status & !(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED) != 0 {
            return Err(StateFault::Impossible("its status"));
        }
        self.state = saved.transport.clone();
        if status & FEATURES_OK != 0 && !self.features_acceptable(*status) {
            return Err(StateFault::Other("set of features"));
        }
        self.info.config.set_generation(saved.config_generation);
        let features = self.state.driver_features;
        // An interrupt for what its driver has seen since may be on its way.
        let on_its_way = if features & 1 << VIRTIO_RING_F_EVENT_IDX != 0 { USED_BUFFER } else { 0 };
        self.slot.interrupt.restore(saved.interrupt_status | on_its_way);
        self.show();
        let Some(positions) = &saved.positions else {
            return if status & DRIVER_OK == 0 { Ok(()) } else { Err(StateFault::Impossible("it is idle")) };
        };
        if status & (FEATURES_OK | DRIVER_OK) != FEATURES_OK | DRIVER_OK || positions.len() != queues.len() {
            return Err(StateFault::Impossible("its queues are in use"));
        }
        let mut queues = self.check_queues(features)?;
        for (queue, position) in queues.iter_mut().zip(positions) {
            match (queue.position(), position) {
                (Some(_), Some(position)) => queue.resume(*position),
                (None, None) => {}
                _ => return Err(StateFault::Impossible("its queues' positions")),
            }
        }
        self.slot.resume(Activated { queues, features });
        Ok(())
    }

    /// The device's slot.
    #[cfg(test)]
    pub(crate) fn slot(&self) -> &Arc<DeviceSlot> {
        &self.slot
    }

    /// A guest's write at `offset` of the device's window. What isn't a writable register is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = u32::try_from(offset) else { return };
        if let Ok(data) = <[u8; 4]>::try_from(data)
            && offset < VIRTIO_MMIO_CONFIG
        {
            self.write_register(offset, u32::from_le_bytes(data));
            if !matches!(offset, VIRTIO_MMIO_QUEUE_NOTIFY | VIRTIO_MMIO_INTERRUPT_ACK) {
                self.show_state();
            }
        }
    }

    fn initial_state(&self) -> TransportState {
        let queues =
            self.info.queue_sizes.iter().map(|&size| QueueRegisters { size, ..QueueRegisters::default() });
        TransportState { queues: queues.collect(), ..TransportState::default() }
    }

    fn offered_features(&self) -> u64 {
        self.info.features | COMMON_FEATURES
    }

    /// Shows everything that the driver can read.
    fn show(&self) {
        let registers = &self.slot.registers;
        registers.identify();
        registers.store(VIRTIO_MMIO_DEVICE_ID, self.info.kind.id());
        registers.store(VIRTIO_MMIO_VENDOR_ID, VENDOR);
        // No shared memory region: all ones (section 4.2.2).
        for register in [
            VIRTIO_MMIO_SHM_LEN_LOW,
            VIRTIO_MMIO_SHM_LEN_HIGH,
            VIRTIO_MMIO_SHM_BASE_LOW,
            VIRTIO_MMIO_SHM_BASE_HIGH,
        ] {
            registers.store(register, u32::MAX);
        }
        self.info.config.show(registers);
        self.show_state();
    }

    /// Shows what depends on what the driver wrote.
    fn show_state(&self) {
        let registers = &self.slot.registers;
        let selected = self.state.queue_sel as usize;
        let size = self.info.queue_sizes.get(selected).map_or(0, |&size| u32::from(size));
        let ready = self.state.queues.get(selected).map_or(0, |queue| u32::from(queue.ready));
        registers.store(
            VIRTIO_MMIO_DEVICE_FEATURES,
            half(self.offered_features(), self.state.device_features_sel),
        );
        registers.store(VIRTIO_MMIO_QUEUE_NUM_MAX, size);
        registers.store(VIRTIO_MMIO_QUEUE_READY, ready);
        self.slot.interrupt.show_status(self.state.status);
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.state.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.state.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.state.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                // Usually an ioeventfd takes this; the upper half is only used with NOTIFICATION_DATA.
                if let Some(kick) = self.slot.kicks.of(value as usize) {
                    let _ = kick.write(1);
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => self.slot.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    fn write_features(&mut self, value: u32) {
        if self.state.status & (DRIVER | FEATURES_OK) != DRIVER {
            return;
        }
        let features = &mut self.state.driver_features;
        match self.state.driver_features_sel {
            0 => *features = *features & !0xffff_ffff | u64::from(value),
            1 => *features = *features & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    /// Queue registers can be written between the negotiation of features and `DRIVER_OK`, never after.
    fn write_queue_register(&mut self, offset: u32, value: u32) {
        if self.state.status & (FEATURES_OK | DRIVER_OK | FAILED) != FEATURES_OK {
            return;
        }
        let Some(queue) = self.state.queues.get_mut(self.state.queue_sel as usize) else { return };
        match offset {
            // A size that doesn't fit becomes one that activation refuses.
            VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            VIRTIO_MMIO_QUEUE_READY => queue.ready = value == 1,
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    /// The driver's steps of section 3.1.1: bits are only ever added, in order; zero resets.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.state = self.initial_state();
            self.slot.reset();
            return;
        }
        let old = self.state.status;
        let mut new = old | value & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        let added = new & !old;
        if added & DRIVER != 0 && new & ACKNOWLEDGE == 0 {
            new &= !DRIVER;
        }
        if added & FEATURES_OK != 0 && !self.features_acceptable(new) {
            new &= !FEATURES_OK;
        }
        if added & DRIVER_OK != 0 && (new & FEATURES_OK == 0 || new & FAILED != 0) {
            new &= !DRIVER_OK;
        }
        self.state.status = new;
        if new & !old & DRIVER_OK != 0 {
            self.activate();
        }
    }

    fn features_acceptable(&self, status: u32) -> bool {
        let features = self.state.driver_features;
        status & DRIVER != 0
            && features & !self.offered_features() == 0
            && features & self.info.required == self.info.required
            && features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        let features = self.state.driver_features;
        match self.check_queues(features) {
            Ok(queues) => self.slot.activate(Activated { queues, features }),
            Err(fault) => {
                error!("{:?} device can't be activated: {}", self.info.kind, chain(&fault));
                self.slot.interrupt.signal_needs_reset();
            }
        }
    }

    fn check_queues(&self, features: u64) -> Result<Vec<Virtqueue>, QueueFault> {
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queues = self.state.queues.iter().zip(&self.info.queue_sizes);
        queues
            .map(|(registers, &max)| {
                Virtqueue::new(registers, max, event_idx, self.ram.clone(), self.slot.clone())
            })
            .collect()
    }
}

/// The half of a feature word that a `Sel` register names; zero past the second.
fn half(features: u64, sel: u32) -> u32 {
    match sel {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::super::testing::{BUFFERS, Echo, Nonsense, TestDriver, readable, writable};
    use super::*;

    fn fresh() -> TestDriver {
        TestDriver::new(Box::new(Echo::default()))
    }

    #[test]
    fn the_identification_registers() {
        let driver = fresh();
        assert_eq!(driver.get(0x00), 0x7472_6976);
        assert_eq!(driver.get(0x04), 2);
        assert_eq!(driver.get(0x08), 4);
        assert_eq!(driver.get(0xb0), u32::MAX);
    }

    #[test]
    fn features_are_offered_in_two_halves() {
        let mut driver = fresh();
        assert_eq!(driver.get(0x10), 1 << 3 | 1 << 28 | 1 << 29);
        driver.set(0x14, 1);
        assert_eq!(driver.get(0x10), 1);
        driver.set(0x14, 2);
        assert_eq!(driver.get(0x10), 0);
    }

    #[test]
    fn the_configuration_space_is_shown() {
        let driver = fresh();
        let mut data = [0xee; 10];
        driver.transport.slot().registers.read(0x100, &mut data);
        assert_eq!(data, [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]);
    }

    #[test]
    fn steps_out_of_order_are_not_taken() {
        let mut driver = fresh();
        driver.set(0x70, DRIVER);
        assert_eq!(driver.get(0x70), 0);
        driver.set(0x70, ACKNOWLEDGE | DRIVER | DRIVER_OK);
        assert_eq!(driver.get(0x70), ACKNOWLEDGE | DRIVER);
        // VERSION_1 must be accepted.
        driver.set(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(driver.get(0x70), ACKNOWLEDGE | DRIVER);
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let mut driver = fresh();
        driver.set(0x70, ACKNOWLEDGE | DRIVER);
        driver.set(0x24, 1);
        driver.set(0x20, 1);
        driver.set(0x24, 0);
        driver.set(0x20, 1 << 4);
        driver.set(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(driver.get(0x70) & FEATURES_OK, 0);
        driver.set(0x20, 1 << 3);
        driver.set(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(driver.get(0x70) & FEATURES_OK, FEATURES_OK);
        // Settled now.
        driver.set(0x20, 0);
        assert_eq!(driver.transport.state().driver_features, 1 << 32 | 1 << 3);
    }

    #[test]
    fn queue_registers_are_frozen_once_the_driver_is_ready() {
        let mut driver = TestDriver::activated(Box::new(Echo::default()), 0);
        let before = driver.transport.state().clone();
        driver.write_queue(0, QueueRegisters { descriptors: 0x4000, ..driver.queue_registers(0) });
        driver.set(0x44, 0);
        assert_eq!(driver.transport.state().queues, before.queues);
    }

    #[test]
    fn unsound_queues_are_refused_at_activation() {
        let sound = fresh().queue_registers(0);
        let cases = [
            QueueRegisters { size: 0, ..sound },
            QueueRegisters { size: 3, ..sound },
            QueueRegisters { size: 32, ..sound },
            QueueRegisters { descriptors: 0, ..sound },
            QueueRegisters { descriptors: sound.descriptors + 8, ..sound },
            QueueRegisters { available: sound.available + 1, ..sound },
            QueueRegisters { used: sound.used + 2, ..sound },
            QueueRegisters { descriptors: 0x3f_fff0, ..sound },
            QueueRegisters { used: u64::MAX - 3, ..sound },
            QueueRegisters { available: 1 << 40, ..sound },
        ];
        for registers in cases {
            let mut driver = fresh();
            driver.negotiate(0);
            driver.write_queue(0, registers);
            driver.set(0x70, 15);
            assert!(driver.needs_reset(), "{registers:?}");
            driver.kick(0);
            assert_eq!(driver.take_used(0), None);
        }
    }

    #[test]
    fn a_queue_that_was_left_out_stays_empty() {
        let mut driver = fresh();
        driver.negotiate(0);
        driver.write_queue(1, driver.queue_registers(1));
        driver.set(0x70, 15);
        driver.run();
        driver.kick(0);
        assert_eq!(driver.request(1, &[readable(BUFFERS, 4), writable(BUFFERS, 4)]), Some(4));
        assert!(!driver.needs_reset());
    }

    #[test]
    fn a_reset_takes_the_queues_away_at_once() {
        let echo = Echo::default();
        let resets = echo.resets.clone();
        let mut driver = TestDriver::activated(Box::new(echo), 0);
        let before = resets.load(Ordering::SeqCst);
        driver.add(0, &[readable(BUFFERS, 4), writable(BUFFERS, 4)]);
        driver.set(0x50, 0);
        driver.set(0x70, 0);
        driver.run();
        assert_eq!(driver.take_used(0), None);
        assert_eq!(resets.load(Ordering::SeqCst), before + 1);
        assert_eq!(driver.get(0x70), 0);
        assert_eq!(driver.get(0x44), 0);
    }

    #[test]
    fn interrupts_are_acknowledged() {
        let mut driver = TestDriver::activated(Box::new(Echo::default()), 0);
        driver.request(0, &[writable(BUFFERS, 4)]);
        assert_eq!(driver.get(0x60), 1);
        driver.transport.slot().interrupt.signal_config();
        assert_eq!(driver.get(0x60), 3);
        // That of used buffers may come to nobody's ears, so it changes nothing.
        driver.set(0x64, 1);
        assert_eq!(driver.get(0x60), 3);
        driver.set(0x64, 3);
        assert_eq!(driver.get(0x60), 1);
        driver.set(0x70, 0);
        assert_eq!(driver.get(0x60), 0);
    }

    #[test]
    fn random_accesses_never_panic() {
        let mut nonsense = Nonsense(99);
        let mut driver = fresh();
        for _ in 0..200_000 {
            let offset = nonsense.below(0x120);
            let size = 1 << nonsense.below(4);
            if nonsense.below(4) == 0 {
                driver.transport.slot().registers.read(offset, &mut [0; 8][..size]);
            } else {
                let value = nonsense.next() >> nonsense.below(64);
                driver.transport.write(offset, &value.to_le_bytes()[..size]);
            }
            if nonsense.below(50) == 0 {
                driver.negotiate(0);
            }
        }
        driver.run();
    }
}
