//! The device: its face, its queues, and the tap's readiness.

use std::collections::BTreeMap;
use std::io;
use std::mem::offset_of;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_vmm_protocol::{AttachNet, NetOffloads};
use event_manager::EventSet;
use log::{error, warn};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vm_memory::{ByteValued, Le16};

use super::check::{Limits, MAX_PACKET, frame_size};
use super::control;
use super::header::HEADER_SIZE;
use super::rx::{self, Receiver};
use super::tap::TapQueue;
use super::tx::{Dropped, Transmitter};
use crate::devices::console::set_nonblocking;
use crate::devices::{
    Activated, ConfigSpace, DeviceEvents, DeviceFault, DeviceInfo, DeviceKind, Progress, VirtioDevice,
};

/// Descriptors of a receive or transmit queue.
const QUEUE_SIZE: u16 = 256;
/// Descriptors of the control queue.
const CONTROL_SIZE: u16 = 16;

/// `struct virtio_net_config` (section 5.1.4), as far as the features of this device go.
#[repr(C, packed)]
#[derive(Default, Clone, Copy)]
struct Config {
    mac: [u8; 6],
    status: Le16,
    max_virtqueue_pairs: Le16,
    mtu: Le16,
}

// SAFETY: only integers and arrays of them, without padding: any bytes are a value.
unsafe impl ByteValued for Config {}

/// The device.
pub struct Net {
    config: Arc<ConfigSpace>,
    offloads: NetOffloads,
    mtu: usize,
    /// How many queue pairs the driver may use.
    max_pairs: usize,
    /// How many it uses: packets of the other queues of the tap are spread over the first.
    pairs: usize,
    /// Empty once the tap is gone: the link is down from then on.
    taps: Vec<TapQueue>,
    receivers: Vec<Receiver>,
    transmitters: Vec<Transmitter>,
    limits: Limits,
    /// Whether the driver is ready.
    is_active: bool,
    dropped: Losses,
}

impl Net {
    /// A device on the queues of a tap, as many as it is to have queue pairs.
    pub fn new(request: &AttachNet, queues: Vec<OwnedFd>) -> io::Result<Net> {
        queues.iter().try_for_each(set_nonblocking)?;
        let max_pairs = queues.len();
        let config = Config {
            mac: request.mac,
            status: (VIRTIO_NET_S_LINK_UP as u16).into(),
            max_virtqueue_pairs: u16::from(request.queue_pairs).into(),
            mtu: request.mtu.into(),
        };
        Ok(Net {
            config: Arc::new(ConfigSpace::of(&config)),
            offloads: request.offloads,
            mtu: request.mtu.into(),
            max_pairs,
            pairs: 1,
            taps: queues.into_iter().map(TapQueue::new).collect(),
            receivers: (0..max_pairs).map(|_| Receiver::default()).collect(),
            transmitters: (0..max_pairs).map(|_| Transmitter::new()).collect(),
            limits: limits(0, request.mtu.into()),
            is_active: false,
            dropped: Losses::default(),
        })
    }

    /// The longest packet that the tap hands out, with its header.
    fn longest(&self) -> usize {
        let packet = if self.offloads.checksum_and_tso { MAX_PACKET } else { frame_size(self.mtu) };
        HEADER_SIZE + packet
    }

    /// What decides how the tap hands out packets: a driver that does not take it can't be served.
    fn required(&self) -> u64 {
        let mut features = 1 << VIRTIO_NET_F_MRG_RXBUF;
        if self.offloads.checksum_and_tso {
            features |=
                1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
        }
        if self.offloads.uso {
            features |= 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
        }
        features
    }

    fn features(&self) -> u64 {
        let mut features =
            self.required() | 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU | 1 << VIRTIO_NET_F_STATUS;
        if self.max_pairs > 1 {
            features |= 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
        }
        if self.offloads.checksum_and_tso {
            features |= 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4 | 1 << VIRTIO_NET_F_HOST_TSO6;
        }
        if self.offloads.uso {
            features |= 1 << VIRTIO_NET_F_HOST_USO;
        }
        features
    }

    /// Moves packets from one queue of the tap.
    fn receive(
        &mut self,
        tap: usize,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        let (pair, longest) = (tap % self.pairs, self.longest());
        let (Some(tap), Some(receiver)) = (self.taps.get(tap), self.receivers.get_mut(pair)) else {
            return Ok(());
        };
        let (outcome, dropped) = receiver.receive(tap, &mut active.queues[2 * pair], longest)?;
        if dropped > 0 {
            self.dropped.count(Loss::Received, dropped);
        }
        match outcome {
            rx::Outcome::Gone => self.lose_tap(active, events),
            rx::Outcome::Drained | rx::Outcome::More | rx::Outcome::Starved => Ok(()),
        }
    }

    /// The driver has new buffers for a receiver that had none.
    fn feed(
        &mut self,
        pair: usize,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        let hungry = self.receivers.get(pair).is_some_and(Receiver::is_starved);
        if !hungry || !active.queues[2 * pair].has_available() {
            return Ok(());
        }
        self.receivers[pair].wake();
        if pair < self.pairs {
            for tap in (pair..self.taps.len()).step_by(self.pairs) {
                self.receive(tap, active, events)?;
            }
        }
        self.watch(events)
    }

    /// Moves packets to one queue of the tap.
    fn transmit(
        &mut self,
        pair: usize,
        has_room: bool,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<Progress, DeviceFault> {
        let (tap, losses) = (self.taps.get(pair), &mut self.dropped);
        let Some(transmitter) = self.transmitters.get_mut(pair) else { return Ok(Progress::Done) };
        let count = |why| losses.count(Loss::Sent(why), 1);
        let queue = &mut active.queues[2 * pair + 1];
        let outcome = transmitter.transmit(tap, queue, &self.limits, has_room, count)?;
        if outcome.tap_is_gone {
            self.lose_tap(active, events)?;
        }
        self.watch(events)?;
        Ok(outcome.progress)
    }

    fn serve_control(
        &mut self,
        queue: usize,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<Progress, DeviceFault> {
        let (pairs, max) = (&mut self.pairs, self.max_pairs);
        let progress = active.queues[queue].serve(|chain| {
            control::serve(chain, |wanted| {
                let possible = (1..=max).contains(&usize::from(wanted));
                if possible {
                    *pairs = wanted.into();
                }
                possible
            })
        })?;
        // What waits in one queue may be for another now.
        self.receivers.iter_mut().for_each(Receiver::wake);
        self.watch(events)?;
        Ok(progress)
    }

    /// Takes the link down: nothing can be received any more, and everything that is sent is dropped.
    fn lose_tap(
        &mut self,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        if self.drop_taps(events)? {
            active.signal_config();
        }
        Ok(())
    }

    fn drop_taps(&mut self, events: &mut DeviceEvents<'_, '_>) -> Result<bool, DeviceFault> {
        if self.taps.is_empty() {
            return Ok(false);
        }
        error!("the tap of a network interface is gone: its link is down");
        self.taps.iter().try_for_each(|tap| tap.stop(events))?;
        self.taps.clear();
        self.config.update(offset_of!(Config, status), &0u16.to_le_bytes());
        Ok(true)
    }

    /// Watches each queue of the tap for what can be dealt with now: a packet for which there is no buffer is not.
    fn watch(&mut self, events: &mut DeviceEvents<'_, '_>) -> Result<(), DeviceFault> {
        for (index, tap) in self.taps.iter_mut().enumerate() {
            let mut wanted = EventSet::empty();
            if self.is_active && !self.receivers[index % self.pairs].is_starved() {
                wanted |= EventSet::IN;
            }
            if self.transmitters[index].is_blocked() {
                wanted |= EventSet::OUT;
            }
            tap.watch(index as u32, wanted, events)?;
        }
        Ok(())
    }
}

/// What a driver that accepted these features may leave to the tap.
fn limits(features: u64, mtu: usize) -> Limits {
    let has = |bit: u32| features & 1 << bit != 0;
    Limits {
        checksum: has(VIRTIO_NET_F_CSUM),
        tcp4: has(VIRTIO_NET_F_HOST_TSO4),
        tcp6: has(VIRTIO_NET_F_HOST_TSO6),
        udp: has(VIRTIO_NET_F_HOST_USO),
        mtu,
    }
}

impl VirtioDevice for Net {
    fn info(&self) -> DeviceInfo {
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * self.max_pairs];
        if self.max_pairs > 1 {
            queue_sizes.push(CONTROL_SIZE);
        }
        DeviceInfo {
            kind: DeviceKind::Net,
            features: self.features(),
            required: self.required(),
            queue_sizes,
            config: self.config.clone(),
        }
    }

    fn start(&mut self, events: &mut DeviceEvents<'_, '_>) -> Result<(), DeviceFault> {
        self.taps.iter().zip(0..).try_for_each(|(tap, token)| tap.start(token, events))
    }

    fn activate(
        &mut self,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        self.limits = limits(active.features, self.mtu);
        self.is_active = true;
        self.watch(events)
    }

    fn queue_ready(
        &mut self,
        queue: usize,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<Progress, DeviceFault> {
        let pair = queue / 2;
        if pair == self.max_pairs {
            return self.serve_control(queue, active, events);
        }
        if queue.is_multiple_of(2) {
            self.feed(pair, active, events)?;
            return Ok(Progress::Done);
        }
        if self.transmitters[pair].is_blocked() {
            return Ok(Progress::Done);
        }
        self.transmit(pair, false, active, events)
    }

    fn descriptor_ready(
        &mut self,
        token: u32,
        set: EventSet,
        active: Option<&mut Activated>,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        let is_gone = set.intersects(EventSet::ERROR | EventSet::HANG_UP);
        let Some(active) = active else {
            if is_gone {
                self.drop_taps(events)?;
            }
            return Ok(());
        };
        let tap = token as usize;
        if set.contains(EventSet::IN) {
            self.receive(tap, active, events)?;
        }
        if is_gone {
            self.lose_tap(active, events)?;
        }
        if set.contains(EventSet::OUT)
            && self.transmitters.get(tap).is_some_and(Transmitter::is_blocked)
            && self.transmit(tap, true, active, events)? == Progress::More
        {
            // The rest has its turn as if it had been kicked.
            active.kick(2 * tap + 1);
        }
        self.watch(events)
    }

    fn reset(&mut self, events: &mut DeviceEvents<'_, '_>) {
        self.receivers.iter_mut().for_each(Receiver::reset);
        self.transmitters.iter_mut().for_each(Transmitter::reset);
        self.pairs = 1;
        self.is_active = false;
        // They were watched, so this can't fail; and there is nobody to tell.
        let _ = self.watch(events);
    }
}

/// Why packets were lost in the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
enum Loss {
    #[error("for the guest, which has too small buffers")]
    Received,
    #[error("of the guest: {0}")]
    Sent(Dropped),
}

/// How many packets were lost, and why. A few lines tell of it, however many there are.
#[derive(Debug, Default)]
struct Losses(BTreeMap<Loss, u64>);

impl Losses {
    fn count(&mut self, why: Loss, packets: u64) {
        let count = self.0.entry(why).or_default();
        let before = *count;
        *count = before.saturating_add(packets);
        // At the first, and whenever there are as many again or more.
        if before.checked_ilog2() != count.checked_ilog2() && why != Loss::Sent(Dropped::NoTap) {
            warn!("a network interface has dropped {count} packets {why}");
        }
    }
}
