//! The device: queues, descriptors and what goes through them.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::EventSet;
use log::debug;
use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::{ConnectionState, Phase, Violation};
use super::connector::{Requests, VsockConnector, connector};
use super::link::Connection;
use super::packet::{HEADER_SIZE, HOST_CID, Header, Op};
use super::stream::{Stream, Transfer};
use super::table::{MAX_CONNECTIONS, Table};
use crate::devices::{
    Activated, BackendState, Chain, ChainReader, ConfigSpace, DeviceEvents, DeviceFault, DeviceInfo,
    DeviceKind, Progress, StateFault, VirtioDevice, Virtqueue,
};

/// `VIRTIO_VSOCK_F_STREAM`.
const FEATURE_STREAM: u64 = 1 << 0;

/// Queues by their numbers: to the guest, from the guest, events (of which there are none).
const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];

/// The most `RST`s for unknown connections that wait for buffers of the guest; more are dropped.
const MAX_RESETS: usize = 64;

/// Packets moved in one go, before other devices have a turn.
const BATCH: usize = 64;

/// The most bytes of one packet to the guest.
const MAX_PAYLOAD: usize = 64 * 1024;

/// How long the guest may take to answer a `REQUEST`, or to close a connection whose host end is gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// The first port of connections that the host opens; the guest's own ports and well-known ones are below.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Tokens of watched descriptors; connections have theirs from `CONNECTIONS` on.
const WAKE: u32 = 0;
const TIMER: u32 = 1;
const CONNECTIONS: u32 = 2;

/// What a saved machine keeps of the device: plain data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The connections that the guest has opened. Their streams are the ones handed over for their ports.
    connections: Vec<ConnectionState>,
    next_host_port: u32,
}

/// The device.
pub struct Vsock {
    guest_cid: u64,
    /// Where the guest may connect to, and what it is joined to then.
    guest_streams: BTreeMap<u32, Stream>,
    /// The index gives the token.
    connections: Table,
    /// Answers to packets of no connection.
    resets: VecDeque<Header>,
    /// The guest has no buffer for what should be sent to it.
    starved: bool,
    /// Something was sent to the guest that it was not interrupted for.
    delivered: bool,
    next_host_port: u32,
    requests: Requests,
    /// [`PATIENCE`], but for tests.
    pub(super) patience: Duration,
    timer: TimerFd,
    /// What the timer is set to.
    alarm: Option<Instant>,
}

impl Vsock {
    /// A device for a guest with this context id, which may connect once to each of these host ports.
    pub fn new(guest_cid: u32, streams: Vec<(u32, OwnedFd)>) -> io::Result<(Vsock, VsockConnector)> {
        let guest_streams = streams
            .into_iter()
            .map(|(port, stream)| Ok((port, Stream::new(stream)?)))
            .collect::<io::Result<_>>()?;
        let (connector, requests) = connector()?;
        let device = Vsock {
            guest_cid: guest_cid.into(),
            guest_streams,
            connections: Table::default(),
            resets: VecDeque::new(),
            starved: false,
            delivered: false,
            next_host_port: FIRST_HOST_PORT,
            requests,
            patience: PATIENCE,
            timer: TimerFd::new()?,
            alarm: None,
        };
        Ok((device, connector))
    }

    fn insert(&mut self, state: ConnectionState, stream: Stream) -> Result<(), Stream> {
        let deadline = (state.phase() != Phase::Open).then(|| Instant::now() + self.patience);
        self.connections.insert(state, stream, deadline)
    }

    /// Closes a connection's stream and frees its slot.
    fn remove(&mut self, index: usize, events: &mut DeviceEvents<'_, '_>) -> Result<(), DeviceFault> {
        if let Some(connection) = self.connections.take(index)
            && connection.watched.is_some()
        {
            events.remove(connection.stream.as_fd())?;
        }
        Ok(())
    }

    /// Ends a connection: tells the guest, unless it was the one to end it.
    fn end(&mut self, index: usize, events: &mut DeviceEvents<'_, '_>) -> Result<(), DeviceFault> {
        if self.connections.get(index).is_some_and(|connection| connection.state.phase() == Phase::Draining) {
            return self.remove(index, events);
        }
        self.reset_connection(index, events)
    }

    /// Closes a connection and tells the guest.
    fn reset_connection(
        &mut self,
        index: usize,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        if let Some(Connection { state, .. }) = self.connections.get_mut(index) {
            let header = state.header(self.guest_cid, Op::Reset, 0, 0);
            self.push_reset(header);
        }
        self.remove(index, events)
    }

    fn push_reset(&mut self, header: Header) {
        if self.resets.len() < MAX_RESETS + MAX_CONNECTIONS {
            self.resets.push_back(header);
        }
    }

    /// Answers a packet that belongs to no connection.
    fn refuse(&mut self, header: &Header) {
        // A reset is never answered, and an answer to a false sender would reach somebody else.
        if header.op == Some(Op::Reset) || header.source_cid != self.guest_cid {
            return;
        }
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(Header {
                source_cid: header.destination_cid,
                destination_cid: header.source_cid,
                source_port: header.destination_port,
                destination_port: header.source_port,
                length: 0,
                op: Some(Op::Reset),
                flags: 0,
                buffer_size: 0,
                consumed: 0,
            });
        }
    }

    /// Takes one packet from the guest.
    fn receive(&mut self, chain: &Chain, events: &mut DeviceEvents<'_, '_>) -> Result<(), DeviceFault> {
        let mut reader = chain.reader();
        let mut bytes = [0; HEADER_SIZE];
        reader.read_exact(&mut bytes)?;
        let header = Header::parse(&bytes);
        if header.length as usize > reader.remaining() {
            return Err(DeviceFault::Protocol("a packet is shorter than its header says"));
        }
        if header.source_cid != self.guest_cid || header.destination_cid != HOST_CID {
            self.refuse(&header);
            return Ok(());
        }
        match (self.connections.find(header.source_port, header.destination_port), header.op) {
            (None, Some(Op::Request)) => self.accept(&header),
            (None, _) => self.refuse(&header),
            (Some(index), Some(Op::Reset)) => {
                let slot = self.connections.get_mut(index);
                if !slot.is_some_and(|connection| connection.state.take_reset()) {
                    self.remove(index, events)?;
                }
            }
            (Some(index), op) => self.receive_for(index, op, &header, reader, events)?,
        }
        Ok(())
    }

    /// The guest opens a connection.
    fn accept(&mut self, header: &Header) {
        let Some(stream) = self.guest_streams.remove(&header.destination_port) else {
            debug!("the guest may not connect to port {}", header.destination_port);
            self.refuse(header);
            return;
        };
        if let Err(stream) = self.insert(ConnectionState::accepted(header), stream) {
            self.guest_streams.insert(header.destination_port, stream);
            self.refuse(header);
        }
    }

    fn receive_for(
        &mut self,
        index: usize,
        op: Option<Op>,
        header: &Header,
        data: ChainReader<'_>,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        let Some(connection) = self.connections.get_mut(index) else {
            return Ok(());
        };
        connection.state.take_credit(header);
        let result = match op {
            Some(Op::ReadWrite) => match connection.state.take_data(header.length) {
                Ok(()) => {
                    connection.forward(data, header.length as usize)?;
                    Ok(())
                }
                Err(violation) => Err(violation),
            },
            Some(op) => connection.state.take_control(op, header.flags),
            None => Err(Violation),
        };
        if result.is_err() {
            debug!("vsock connection {index}: unexpected packet {header:?}");
            return self.reset_connection(index, events);
        }
        if connection.state.phase() == Phase::Open && !connection.state.is_end_told() {
            connection.deadline = None;
        }
        connection.follow_guest();
        if connection.state.is_over() {
            return self.end(index, events);
        }
        Ok(())
    }

    /// Sends what is due to the guest and carries no data, as far as it has buffers.
    fn send_control(&mut self, queue: &mut Virtqueue) -> Result<(), DeviceFault> {
        while let Some(header) = self.resets.front() {
            if !send_header(queue, *header)? {
                self.starved = true;
                return Ok(());
            }
            self.delivered = true;
            self.resets.pop_front();
        }
        for (_, connection) in self.connections.iter_mut() {
            while connection.state.has_control() {
                // Popped first: what `next_control` gives counts as sent.
                let Some(chain) = queue.pop()? else {
                    self.starved = true;
                    return Ok(());
                };
                let Some((op, flags)) = connection.state.next_control() else {
                    queue.put_back(chain);
                    break;
                };
                let header = connection.state.header(self.guest_cid, op, flags, 0);
                chain.writer().write_all(&header.to_bytes())?;
                queue.complete(chain, HEADER_SIZE as u32)?;
                self.delivered = true;
                if connection.state.is_end_told() && connection.deadline.is_none() {
                    connection.deadline = Some(Instant::now() + self.patience);
                }
            }
        }
        Ok(())
    }

    /// Moves bytes from a readable stream to the guest.
    fn send_data(&mut self, index: usize, hung_up: bool, queue: &mut Virtqueue) -> Result<(), DeviceFault> {
        let guest_cid = self.guest_cid;
        let Some(connection) = self.connections.get_mut(index) else {
            return Ok(());
        };
        for _ in 0..BATCH {
            let credit = connection.state.may_send();
            if credit == 0 {
                return Ok(());
            }
            let Some(chain) = queue.pop()? else {
                self.starved = true;
                return Ok(());
            };
            let mut writer = chain.writer();
            let mut room = writer.clone();
            room.skip(HEADER_SIZE)?;
            let wanted = room.remaining().min(credit as usize).min(MAX_PAYLOAD);
            if wanted == 0 {
                return Err(DeviceFault::Protocol("a receive buffer has no room for data"));
            }
            let moved = match connection.stream.read_to_guest(&mut room, wanted)? {
                Transfer::Moved(0) => {
                    queue.put_back(chain);
                    connection.state.host_sent_all();
                    if hung_up {
                        connection.state.host_receives_no_more();
                    }
                    return Ok(());
                }
                Transfer::Moved(moved) => moved,
                Transfer::WouldBlock => {
                    queue.put_back(chain);
                    return Ok(());
                }
                Transfer::Gone => {
                    queue.put_back(chain);
                    connection.state.host_sent_all();
                    connection.state.host_receives_no_more();
                    return Ok(());
                }
            };
            // At most MAX_PAYLOAD.
            let length = moved as u32;
            connection.state.sent(length);
            let header = connection.state.header(guest_cid, Op::ReadWrite, 0, length);
            writer.write_all(&header.to_bytes())?;
            queue.complete(chain, HEADER_SIZE as u32 + length)?;
            self.delivered = true;
            if moved < wanted {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Opens the connections that the control thread asked for.
    fn open_requested(&mut self) {
        while let Some((port, stream)) = self.requests.next() {
            let host_port = self.free_host_port(port);
            if self.insert(ConnectionState::requested(port, host_port), stream).is_err() {
                debug!("no room for another connection to port {port} of the guest");
            }
        }
    }

    fn free_host_port(&mut self, guest_port: u32) -> u32 {
        // There are more ports than connections: this ends.
        loop {
            let port = self.next_host_port;
            self.next_host_port = port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if self.connections.find(guest_port, port).is_none() {
                return port;
            }
        }
    }

    /// Ends connections whose time is over.
    fn expire(&mut self, events: &mut DeviceEvents<'_, '_>) -> Result<(), DeviceFault> {
        let now = Instant::now();
        for index in 0..self.connections.end() {
            let Some(connection) = self.connections.get_mut(index) else { continue };
            if connection.deadline.is_none_or(|deadline| deadline > now) {
                continue;
            }
            match connection.state.phase() {
                Phase::Open if !connection.state.should_be_over() => {
                    connection.deadline = Some(now + self.patience);
                }
                // The guest never heard of it.
                Phase::Requested => self.remove(index, events)?,
                // The host takes what it was sent or closes its end.
                Phase::Draining => connection.deadline = None,
                Phase::Awaiting | Phase::Open => self.reset_connection(index, events)?,
            }
        }
        Ok(())
    }

    /// Sends what is due, then brings watches and timer in line with the state of the connections.
    fn settle(
        &mut self,
        active: Option<&mut Activated>,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        if let Some(queue) = active.and_then(|active| active.queues.get_mut(TO_GUEST)) {
            if !self.starved {
                self.send_control(queue)?;
            }
            if std::mem::take(&mut self.delivered) {
                queue.signal()?;
            }
        }
        for (index, connection) in self.connections.iter_mut() {
            // At most MAX_CONNECTIONS.
            connection.watch(CONNECTIONS + index as u32, self.starved, events)?;
        }
        self.set_alarm()
    }

    fn set_alarm(&mut self) -> Result<(), DeviceFault> {
        let earliest = self.connections.iter().filter_map(|connection| connection.deadline).min();
        if earliest == self.alarm {
            return Ok(());
        }
        let failed = |error: vmm_sys_util::errno::Error| DeviceFault::Backend {
            what: "set the timer of vsock connections",
            source: error.into(),
        };
        match earliest {
            // Zero would disarm it.
            Some(at) => {
                let wait = at.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
                self.timer.reset(wait, None).map_err(failed)?;
            }
            None => self.timer.clear().map_err(failed)?,
        }
        self.alarm = earliest;
        Ok(())
    }
}

/// Sends a packet without data. `false`: the guest has no buffer for it.
fn send_header(queue: &mut Virtqueue, header: Header) -> Result<bool, DeviceFault> {
    let Some(chain) = queue.pop()? else { return Ok(false) };
    chain.writer().write_all(&header.to_bytes())?;
    queue.complete(chain, HEADER_SIZE as u32)?;
    Ok(true)
}

impl VirtioDevice for Vsock {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            kind: DeviceKind::Vsock,
            features: FEATURE_STREAM,
            required: 0,
            queue_sizes: QUEUE_SIZES.to_vec(),
            config: Arc::new(ConfigSpace::new(self.guest_cid.to_le_bytes().to_vec())),
        }
    }

    fn start(&mut self, events: &mut DeviceEvents<'_, '_>) -> Result<(), DeviceFault> {
        events.add(borrow(&*self.requests.wake), WAKE, EventSet::IN)?;
        events.add(borrow(&self.timer), TIMER, EventSet::IN)
    }

    /// Restored connections have to be watched.
    fn activate(
        &mut self,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        self.settle(Some(active), events)
    }

    fn save(&self) -> Result<BackendState, &'static str> {
        if !self.resets.is_empty() {
            return Err("the guest was not told of the end of a connection");
        }
        let connections: Vec<ConnectionState> =
            self.connections.iter().map(|connection| connection.state.clone()).collect();
        if connections.iter().any(|state| state.host_port >= FIRST_HOST_PORT) {
            return Err("there are connections that the host has opened");
        }
        if !connections.iter().all(ConnectionState::is_at_rest) {
            return Err("a connection is being opened or closed, or has bytes that its stream has not taken");
        }
        Ok(BackendState::Vsock(VsockState { connections, next_host_port: self.next_host_port }))
    }

    fn restore(&mut self, state: BackendState) -> Result<(), StateFault> {
        let BackendState::Vsock(VsockState { connections, next_host_port }) = state else {
            return Err(StateFault::Impossible("it is not a socket device's"));
        };
        if next_host_port < FIRST_HOST_PORT {
            return Err(StateFault::Impossible("its next port"));
        }
        self.next_host_port = next_host_port;
        for state in connections {
            if !state.is_at_rest() {
                return Err(StateFault::Impossible("a connection is not at rest"));
            }
            // Each port's stream is taken once, so no connection comes twice.
            let port = state.host_port;
            let missing =
                || StateFault::Missing(format!("the stream of the guest's connection to port {port}"));
            let stream = self.guest_streams.remove(&port).ok_or_else(missing)?;
            self.insert(state, stream).map_err(|_| StateFault::Impossible("the number of connections"))?;
        }
        Ok(())
    }

    fn queue_ready(
        &mut self,
        queue: usize,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<Progress, DeviceFault> {
        let mut progress = Progress::Done;
        match queue {
            TO_GUEST => self.starved = false,
            FROM_GUEST => {
                let queue = &mut active.queues[FROM_GUEST];
                progress = Progress::More;
                let mut taken = 0;
                while taken < BATCH {
                    let Some(chain) = queue.pop()? else {
                        progress = Progress::Done;
                        break;
                    };
                    self.receive(&chain, events)?;
                    queue.complete(chain, 0)?;
                    taken += 1;
                }
                if taken > 0 {
                    queue.signal()?;
                }
            }
            // The event queue: its buffers stay with the driver until the transport is reset under a live guest.
            _ => {}
        }
        self.settle(Some(active), events)?;
        Ok(progress)
    }

    fn descriptor_ready(
        &mut self,
        token: u32,
        set: EventSet,
        mut active: Option<&mut Activated>,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        match token {
            WAKE => {
                // Emptied before the requests are looked at; it can only fail if it is empty.
                let _ = self.requests.wake.read();
                self.open_requested();
            }
            TIMER => {
                self.alarm = None;
                let _ = self.timer.clear();
                self.expire(events)?;
            }
            token => {
                let index = (token - CONNECTIONS) as usize;
                let Some(connection) = self.connections.get_mut(index) else {
                    return Ok(());
                };
                let hung_up = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
                if set.contains(EventSet::OUT) || hung_up {
                    connection.flush();
                    connection.follow_guest();
                }
                if connection.state.is_over() {
                    self.end(index, events)?;
                } else if hung_up && connection.has_nothing_to_read() {
                    connection.state.host_sent_all();
                    connection.state.host_receives_no_more();
                } else if let Some(active) = active.as_deref_mut()
                    && let Some(queue) = active.queues.get_mut(TO_GUEST)
                {
                    self.send_data(index, hung_up, queue)?;
                }
            }
        }
        self.settle(active, events)
    }

    fn reset(&mut self, events: &mut DeviceEvents<'_, '_>) {
        // What the driver was not told of yet may still be opened when it is ready.
        for connection in self.connections.take_if(|connection| connection.state.phase() != Phase::Requested)
        {
            if connection.watched.is_some() {
                // It was watched, so this can't fail; and there is nobody to tell.
                let _ = events.remove(connection.stream.as_fd());
            }
        }
        self.resets.clear();
        self.starved = false;
        self.delivered = false;
    }
}

/// For the descriptors of types that don't lend them.
fn borrow(owner: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the owner keeps its descriptor open, and is borrowed as long.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}
