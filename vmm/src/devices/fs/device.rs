//! The device: queues, requests in flight, and the socket's readiness.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bulkhead_vmm_protocol::fuse::{IN_HEADER, OUT_HEADER};
use event_manager::EventSet;
use log::{debug, error};
use vm_memory::{ByteValued, Le32};

use super::loans::Loans;
use super::message::{ReplyHeader, RequestHeader};
use super::server::{Received, Sent, Server};
use crate::devices::{
    Activated, BackendState, Chain, ConfigSpace, DeviceEvents, DeviceFault, DeviceInfo, DeviceKind, Progress,
    VirtioDevice,
};

/// Queues by their numbers: `FORGET` and the like, and everything else.
const QUEUE_SIZES: [u16; 2] = [64, 128];

/// Bytes of the tag in the configuration space.
const TAG_SIZE: usize = 36;

/// `struct virtio_fs_config` (section 5.11.4).
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Config {
    tag: [u8; TAG_SIZE],
    num_request_queues: Le32,
}

// SAFETY: only integers and arrays of them, without padding: any bytes are a value.
unsafe impl ByteValued for Config {}

/// Requests or replies moved in one go, before other devices have a turn.
const BATCH: usize = 32;

/// The device's only token.
const SERVER: u32 = 0;

/// The device.
pub struct FileSystem {
    config: Arc<ConfigSpace>,
    /// `None` once the file server is gone: every request fails from then on.
    server: Option<Server>,
    loans: Loans,
    requests: InFlight,
    /// The queues whose next request the socket had no room for.
    blocked: [bool; QUEUE_SIZES.len()],
    /// Whether the socket is watched for room.
    watching_room: bool,
}

impl FileSystem {
    /// A device that the guest mounts by `tag` (1 to 36 bytes), served at the other end of `server`.
    pub fn new(tag: &str, server: OwnedFd) -> io::Result<FileSystem> {
        if !(1..=TAG_SIZE).contains(&tag.len()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a tag has 1 to 36 bytes"));
        }
        let mut config = Config { tag: [0; TAG_SIZE], num_request_queues: 1.into() };
        config.tag[..tag.len()].copy_from_slice(tag.as_bytes());
        Ok(FileSystem {
            config: Arc::new(ConfigSpace::of(&config)),
            server: Some(Server::new(server)),
            loans: Loans::default(),
            requests: InFlight::default(),
            blocked: [false; QUEUE_SIZES.len()],
            watching_room: false,
        })
    }

    /// Takes requests from a queue until it is empty, the socket is full, or others should have a turn.
    fn take_requests(
        &mut self,
        queue: usize,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<Progress, DeviceFault> {
        let mut progress = Progress::More;
        let mut completed = false;
        for _ in 0..BATCH {
            let Some(chain) = active.queues[queue].pop()? else {
                progress = Progress::Done;
                break;
            };
            match self.forward(&chain)? {
                Forwarded::Awaits { unique, tag } => {
                    self.requests.insert(tag, Pending { chain, queue, unique })
                }
                Forwarded::Done(written) => {
                    active.queues[queue].complete(chain, written)?;
                    completed = true;
                }
                Forwarded::NotNow => {
                    active.queues[queue].put_back(chain);
                    self.blocked[queue] = true;
                    progress = Progress::Done;
                    break;
                }
                Forwarded::ServerGone => {
                    active.queues[queue].put_back(chain);
                    self.lose_server(active, events)?;
                }
            }
        }
        if completed {
            active.queues[queue].signal()?;
        }
        Ok(progress)
    }

    /// Serves one request from a file that is lent, or passes it on to the server.
    fn forward(&mut self, chain: &Chain) -> Result<Forwarded, DeviceFault> {
        let mut reader = chain.reader();
        let available = reader.remaining();
        let mut bytes = [0; IN_HEADER];
        reader.read_exact(&mut bytes)?;
        let Some(header) = RequestHeader::parse(bytes, available) else {
            return Err(DeviceFault::Protocol("a FUSE request's length is not that of its buffers"));
        };
        if !header.is_silent() && chain.writable_len() < OUT_HEADER {
            return Err(DeviceFault::Protocol("a FUSE request has no room for its reply"));
        }
        let fail = |errno| -> Result<Forwarded, DeviceFault> {
            if header.is_silent() {
                return Ok(Forwarded::Done(0));
            }
            chain.writer().write_all(&ReplyHeader::error(header.unique(), errno).to_bytes())?;
            Ok(Forwarded::Done(OUT_HEADER as u32))
        };
        let Some(server) = &self.server else { return fail(libc::EIO) };
        if let Some(written) = self.loans.serve(&header, reader.clone(), chain.writer())? {
            return Ok(Forwarded::Done(written));
        }
        self.loans.before(&header, reader.clone())?;
        let tag = self.requests.next_tag();
        match server.send(&header.with_unique(tag), &mut reader)? {
            Sent::Yes if header.is_silent() => Ok(Forwarded::Done(0)),
            Sent::Yes => Ok(Forwarded::Awaits { unique: header.unique(), tag }),
            Sent::WouldBlock => Ok(Forwarded::NotNow),
            Sent::Refused => fail(libc::EIO),
            Sent::Gone => Ok(Forwarded::ServerGone),
        }
    }

    /// Takes replies from the server.
    fn take_replies(
        &mut self,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        let mut completed = [false; QUEUE_SIZES.len()];
        for _ in 0..BATCH {
            let Some(server) = &mut self.server else { break };
            match server.receive() {
                Received::WouldBlock => break,
                Received::Packet(packet) => {
                    if let Some(queue) = deliver(packet, &mut self.requests, active)? {
                        completed[queue] = true;
                    }
                }
                Received::Lent(loan, file) => self.loans.take(loan, file),
                Received::TooLong => debug!("the file server sent a packet that is too long"),
                Received::Gone => self.lose_server(active, events)?,
            }
            if self.requests.is_empty() {
                // Nothing more can come.
                if let Some(server) = &mut self.server {
                    server.rest();
                }
                break;
            }
        }
        for (queue, completed) in completed.into_iter().enumerate() {
            if completed {
                active.queues[queue].signal()?;
            }
        }
        Ok(())
    }

    /// Fails everything that waits for the server, and whatever comes.
    fn lose_server(
        &mut self,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        self.drop_server(events)?;
        for Pending { chain, queue, unique } in self.requests.take_all() {
            chain.writer().write_all(&ReplyHeader::error(unique, libc::EIO).to_bytes())?;
            active.queues[queue].complete(chain, OUT_HEADER as u32)?;
            active.queues[queue].signal()?;
        }
        Ok(())
    }

    /// Once the server is gone: fails what waits in queues that waited for the socket, since that won't wake them.
    fn fail_blocked(
        &mut self,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        if self.server.is_some() {
            return Ok(());
        }
        for queue in 0..QUEUE_SIZES.len() {
            if !std::mem::take(&mut self.blocked[queue]) {
                continue;
            }
            // Many times what a queue holds: a driver that adds on while everything fails must be stopped.
            let mut rounds = 0..64;
            while self.take_requests(queue, active, events)? == Progress::More {
                rounds.next().ok_or(DeviceFault::Protocol("requests go on and on without a file server"))?;
            }
        }
        Ok(())
    }

    fn drop_server(&mut self, events: &mut DeviceEvents<'_, '_>) -> Result<(), DeviceFault> {
        if let Some(server) = self.server.take() {
            error!("the file server is gone: the guest's shared files fail from here on");
            self.loans.clear();
            events.remove(server.as_fd())?;
        }
        Ok(())
    }

    /// Watches the socket for room when a queue waits for some.
    fn watch(&mut self, events: &mut DeviceEvents<'_, '_>) -> Result<(), DeviceFault> {
        let wanted = self.blocked.contains(&true);
        if let Some(server) = &self.server
            && wanted != self.watching_room
        {
            let set = if wanted { EventSet::IN | EventSet::OUT } else { EventSet::IN };
            events.modify(server.as_fd(), SERVER, set)?;
            self.watching_room = wanted;
        }
        Ok(())
    }
}

/// What became of a request.
enum Forwarded {
    /// The server has it.
    Awaits {
        /// The guest's number for it.
        unique: u64,
        /// The device's number for it.
        tag: u64,
    },
    /// It needs no reply, or has one of so many bytes.
    Done(u32),
    /// The socket is full.
    NotNow,
    /// There is no server any more.
    ServerGone,
}

/// Gives a reply to the request that awaits it; tells that one's queue. A reply that nothing awaits is dropped.
fn deliver(
    packet: &[u8],
    requests: &mut InFlight,
    active: &mut Activated,
) -> Result<Option<usize>, DeviceFault> {
    let Some(header) = ReplyHeader::parse(packet) else {
        debug!("the file server sent something that is no reply");
        return Ok(None);
    };
    let Some(Pending { chain, queue, unique }) = requests.take(header.unique) else {
        debug!("the file server sent a reply that nothing awaits");
        return Ok(None);
    };
    let mut writer = chain.writer();
    let written = if packet.len() <= writer.remaining() {
        writer.write_all(&ReplyHeader { unique, ..header }.to_bytes())?;
        writer.write_all(&packet[OUT_HEADER..])?;
        header.length
    } else {
        debug!("the file server sent a reply that doesn't fit");
        writer.write_all(&ReplyHeader::error(unique, libc::EIO).to_bytes())?;
        OUT_HEADER as u32
    };
    active.queues[queue].complete(chain, written)?;
    Ok(Some(queue))
}

/// A request that the server has.
struct Pending {
    chain: Chain,
    queue: usize,
    /// The guest's number.
    unique: u64,
}

/// Requests that the server has, by the device's own numbers: the lower bits are the slot, the rest counts, so that no
/// number comes twice. There are never more than the queues have descriptors.
#[derive(Default)]
struct InFlight {
    slots: Vec<Option<(u64, Pending)>>,
    counter: u64,
}

const SLOT_BITS: u32 = 16;

impl InFlight {
    /// The number that the next request should have.
    fn next_tag(&mut self) -> u64 {
        let free = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        self.counter += 1;
        self.counter << SLOT_BITS | free as u64
    }

    fn insert(&mut self, tag: u64, pending: Pending) {
        let slot = slot_of(tag);
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        if let Some(free) = self.slots.get_mut(slot) {
            *free = Some((tag, pending));
        }
    }

    fn take(&mut self, tag: u64) -> Option<Pending> {
        let slot = self.slots.get_mut(slot_of(tag))?;
        slot.take_if(|(awaited, _)| *awaited == tag).map(|(_, pending)| pending)
    }

    fn is_empty(&self) -> bool {
        self.slots.iter().all(Option::is_none)
    }

    fn take_all(&mut self) -> impl Iterator<Item = Pending> + use<> {
        std::mem::take(&mut self.slots).into_iter().flatten().map(|(_, pending)| pending)
    }
}

fn slot_of(tag: u64) -> usize {
    (tag & ((1 << SLOT_BITS) - 1)) as usize
}

impl VirtioDevice for FileSystem {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            kind: DeviceKind::FileSystem,
            features: 0,
            required: 0,
            queue_sizes: QUEUE_SIZES.to_vec(),
            config: self.config.clone(),
        }
    }

    fn save(&self) -> Result<BackendState, &'static str> {
        if self.server.is_none() {
            return Err("its file server is gone");
        }
        if !self.requests.is_empty() || self.blocked.contains(&true) {
            return Err("requests wait for the file server");
        }
        Ok(BackendState::None)
    }

    fn start(&mut self, events: &mut DeviceEvents<'_, '_>) -> Result<(), DeviceFault> {
        match &self.server {
            Some(server) => events.add(server.as_fd(), SERVER, EventSet::IN),
            None => Ok(()),
        }
    }

    fn queue_ready(
        &mut self,
        queue: usize,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<Progress, DeviceFault> {
        if self.blocked[queue] {
            return Ok(Progress::Done);
        }
        let progress = self.take_requests(queue, active, events)?;
        self.fail_blocked(active, events)?;
        self.watch(events)?;
        Ok(progress)
    }

    fn descriptor_ready(
        &mut self,
        _token: u32,
        set: EventSet,
        active: Option<&mut Activated>,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        let Some(active) = active else {
            // Nothing is awaited. A server that is gone is found to be so, anything else is dropped.
            for _ in 0..BATCH {
                let Some(server) = &mut self.server else { break };
                match server.receive() {
                    Received::Gone => self.drop_server(events)?,
                    Received::WouldBlock => break,
                    Received::Packet(_) | Received::Lent(..) | Received::TooLong => {}
                }
            }
            return Ok(());
        };
        self.take_replies(active, events)?;
        if set.contains(EventSet::OUT) {
            for queue in 0..QUEUE_SIZES.len() {
                if std::mem::take(&mut self.blocked[queue])
                    && self.take_requests(queue, active, events)? == Progress::More
                {
                    // The rest when there is room again, which there may be right now.
                    self.blocked[queue] = true;
                }
            }
        }
        self.fail_blocked(active, events)?;
        self.watch(events)
    }

    fn reset(&mut self, events: &mut DeviceEvents<'_, '_>) {
        // Dropped requests: their replies will find nobody.
        self.requests.take_all().for_each(drop);
        self.loans.clear();
        self.blocked = [false; QUEUE_SIZES.len()];
        // It was watched, so this can't fail; and there is nobody to tell.
        let _ = self.watch(events);
    }
}
