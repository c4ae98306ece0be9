//! From the guest to the tap.

use std::os::fd::AsFd;

use super::check::{HEAD_SIZE, Limits, MAX_PACKET, Unsound};
use super::header::{HEADER_SIZE, Header};
use super::tap::{Sent, TapQueue};
use crate::devices::{Chain, DeviceFault, Progress, Virtqueue};

/// Packets, and bytes of them, that are moved in one go, before other devices have a turn.
const BATCH: usize = 64;
const BATCH_BYTES: usize = 512 * 1024;

/// Empties one transmit queue.
pub(crate) struct Transmitter {
    /// The header and the first bytes of the packet in hand.
    head: Box<[u8; HEADER_SIZE + HEAD_SIZE]>,
    /// The tap had no room for the next packet.
    blocked: bool,
}

/// Why a packet went nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub(crate) enum Dropped {
    /// The device does not let it through.
    #[error("{0}")]
    Unsound(Unsound),
    /// The host's kernel did not take it.
    #[error("the host does not take them")]
    Refused,
    /// There is no tap any more.
    #[error("there is no tap any more")]
    NoTap,
}

/// What became of a packet.
enum Fate {
    Sent,
    NotNow,
    Dropped(Dropped),
}

/// How transmitting ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Whether the queue is empty.
    pub progress: Progress,
    /// Whether the tap turned out to be gone.
    pub tap_is_gone: bool,
}

impl Transmitter {
    /// Nothing was sent yet.
    pub(crate) fn new() -> Self {
        Transmitter { head: Box::new([0; _]), blocked: false }
    }

    /// Whether it waits for room in the tap.
    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Forgets what belongs to the driver.
    pub(crate) fn reset(&mut self) {
        self.blocked = false;
    }

    /// Moves packets until the queue is empty, the tap is full, or others should have a turn. `dropped` hears of each that goes
    /// nowhere. After a tap that `has_room` the first packet does not wait again: it is sent or dropped.
    pub(crate) fn transmit(
        &mut self,
        tap: Option<&TapQueue>,
        queue: &mut Virtqueue,
        limits: &Limits,
        has_room: bool,
        mut dropped: impl FnMut(Dropped),
    ) -> Result<Outcome, DeviceFault> {
        let mut outcome = Outcome { progress: Progress::More, tap_is_gone: false };
        let (mut packets, mut bytes) = (0, 0);
        self.blocked = false;
        while packets < BATCH && bytes < BATCH_BYTES {
            let Some(chain) = queue.pop()? else {
                outcome.progress = Progress::Done;
                break;
            };
            let tap = tap.filter(|_| !outcome.tap_is_gone);
            match self.send(tap, &chain, limits)? {
                Fate::NotNow if !has_room || packets > 0 => {
                    queue.put_back(chain);
                    self.blocked = true;
                    outcome.progress = Progress::Done;
                    break;
                }
                Fate::NotNow => dropped(Dropped::Refused),
                Fate::Dropped(why) => {
                    outcome.tap_is_gone |= why == Dropped::NoTap;
                    dropped(why);
                }
                Fate::Sent => {}
            }
            packets += 1;
            bytes += chain.readable_len();
            queue.complete(chain, 0)?;
        }
        if packets > 0 {
            queue.signal()?;
        }
        Ok(outcome)
    }

    /// Sends one packet, if it is sound.
    fn send(&mut self, tap: Option<&TapQueue>, chain: &Chain, limits: &Limits) -> Result<Fate, DeviceFault> {
        let Some(tap) = tap else { return Ok(Fate::Dropped(Dropped::NoTap)) };
        let mut reader = chain.reader();
        let length = reader.remaining().saturating_sub(HEADER_SIZE);
        if length > MAX_PACKET {
            return Ok(Fate::Dropped(Dropped::Unsound(Unsound::Length)));
        }
        // What is checked is what is sent: the guest may change the rest of the packet meanwhile, but not this.
        let filled = reader.read(&mut self.head[..])?;
        let Some((header, packet)) = self.head[..filled].split_first_chunk_mut::<HEADER_SIZE>() else {
            return Ok(Fate::Dropped(Dropped::Unsound(Unsound::Length)));
        };
        match limits.check(Header::parse(header), packet, length) {
            Ok(checked) => *header = checked.to_bytes(),
            Err(why) => return Ok(Fate::Dropped(Dropped::Unsound(why))),
        }
        Ok(match TapQueue::sent(reader.write_packet(tap.as_fd(), &self.head[..filled]))? {
            Sent::Yes => Fate::Sent,
            Sent::NotNow => Fate::NotNow,
            Sent::Refused => Fate::Dropped(Dropped::Refused),
            Sent::Gone => Fate::Dropped(Dropped::NoTap),
        })
    }
}
