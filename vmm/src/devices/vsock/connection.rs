//! The state of one connection: plain data, no descriptors.
//!
//! ```text
//!  host opens: Requested ──REQUEST sent──► Awaiting ──RESPONSE──► Open
//!  guest opens: ─────────────REQUEST, RESPONSE due──────────────► Open
//!
//!  Open, each direction by itself:  data ──► SHUTDOWN after the last byte
//!  over: the guest will neither send nor receive and its bytes are delivered, or either side sent RST;
//!        a guest that sends RST too soon after its last byte leaves the connection Draining
//! ```
//!
//! Credit (virtio 1.2, section 5.10.6.3): each side counts bytes modulo 2³², and sends no more than the other has room
//! for. What the guest claims about its room only ever lets *it* receive more; what it sends beyond ours is a violation.

use serde::{Deserialize, Serialize};

use super::packet::{Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes that a guest may have sent which the host's end has not taken yet.
pub(crate) const BUFFER_SIZE: u32 = 64 * 1024;

/// Both directions of a `SHUTDOWN`.
const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// How far the opening of a connection got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    /// The host wants it, the guest has not been asked.
    Requested,
    /// The guest has been asked.
    Awaiting,
    /// Data may flow.
    Open,
    /// The guest has dropped it after it sent its last byte; the stream has not got them all.
    Draining,
}

/// What the guest did that no sound driver does. The connection is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Violation;

/// One connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConnectionState {
    /// Port in the guest.
    pub guest_port: u32,
    /// Port on the host.
    pub host_port: u32,
    phase: Phase,
    response_due: bool,
    credit_due: bool,
    /// Bytes sent to the guest, and how many of them it has consumed of how large a buffer.
    sent: u32,
    guest_consumed: u32,
    guest_buffer: u32,
    /// Bytes that came from the guest, how many of them the stream has taken, and how many the guest knows of.
    received: u32,
    forwarded: u32,
    announced: u32,
    /// What came from the guest and the stream has not taken yet.
    backlog: Vec<u8>,
    /// Directions that the guest has closed.
    guest_closed: u32,
    /// Directions that the host's end has closed, and that the guest was told of.
    host_closed: u32,
    host_closed_told: u32,
}

impl ConnectionState {
    /// A connection that the host opens.
    pub(crate) fn requested(guest_port: u32, host_port: u32) -> Self {
        ConnectionState {
            guest_port,
            host_port,
            phase: Phase::Requested,
            response_due: false,
            credit_due: false,
            sent: 0,
            guest_consumed: 0,
            guest_buffer: 0,
            received: 0,
            forwarded: 0,
            announced: 0,
            backlog: Vec::new(),
            guest_closed: 0,
            host_closed: 0,
            host_closed_told: 0,
        }
    }

    /// A connection that the guest opens with this `REQUEST`.
    pub(crate) fn accepted(request: &Header) -> Self {
        let mut state = Self::requested(request.source_port, request.destination_port);
        state.phase = Phase::Open;
        state.response_due = true;
        state.take_credit(request);
        state
    }

    /// How far it got.
    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    /// Takes a packet's word on the guest's receive buffer; every packet carries it.
    pub(crate) fn take_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buffer_size;
        self.guest_consumed = header.consumed;
    }

    /// Takes a packet other than data. An error means that the connection must be reset.
    pub(crate) fn take_control(&mut self, op: Op, flags: u32) -> Result<(), Violation> {
        match (op, self.phase) {
            (Op::Response, Phase::Awaiting) => self.phase = Phase::Open,
            (Op::Shutdown, Phase::Open) => self.guest_closed |= flags & SHUTDOWN_BOTH,
            (Op::CreditRequest, Phase::Open) => self.credit_due = true,
            (Op::CreditUpdate, Phase::Open) => {}
            _ => return Err(Violation),
        }
        Ok(())
    }

    /// Accounts for data that came from the guest, before any of it is looked at.
    pub(crate) fn take_data(&mut self, length: u32) -> Result<(), Violation> {
        let waiting = self.received.wrapping_sub(self.forwarded);
        if self.phase != Phase::Open
            || self.guest_closed & SHUTDOWN_SEND != 0
            || length > BUFFER_SIZE.saturating_sub(waiting)
        {
            return Err(Violation);
        }
        self.received = self.received.wrapping_add(length);
        Ok(())
    }

    /// Takes the guest's `RST`. `true`: bytes that the guest had sent in good order still wait for the stream.
    pub(crate) fn take_reset(&mut self) -> bool {
        if self.guest_closed & SHUTDOWN_SEND == 0 || self.backlog.is_empty() {
            return false;
        }
        self.guest_closed = SHUTDOWN_BOTH;
        self.phase = Phase::Draining;
        true
    }

    /// Whether it is open both ways and nothing but data is under way: it can go on with another stream.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.phase == Phase::Open
            && !self.response_due
            && self.backlog.is_empty()
            && self.received == self.forwarded
            && self.guest_closed | self.host_closed | self.host_closed_told == 0
    }

    /// Bytes that wait for the stream.
    pub(crate) fn backlog(&self) -> &[u8] {
        &self.backlog
    }

    /// Keeps bytes for the stream. They were accounted for by [`ConnectionState::take_data`], so they are bounded.
    pub(crate) fn backlog_mut(&mut self) -> &mut Vec<u8> {
        &mut self.backlog
    }

    /// The stream took so many bytes, the first of the backlog if there is one.
    pub(crate) fn forwarded(&mut self, bytes: usize) {
        self.backlog.drain(..bytes.min(self.backlog.len()));
        if self.backlog.is_empty() {
            self.backlog = Vec::new();
        }
        // At most BUFFER_SIZE at a time.
        self.forwarded = self.forwarded.wrapping_add(bytes as u32);
        let room_known = BUFFER_SIZE.saturating_sub(self.received.wrapping_sub(self.announced));
        if room_known < BUFFER_SIZE / 2 && self.forwarded != self.announced {
            self.credit_due = true;
        }
    }

    /// How many more bytes may be sent to the guest now.
    pub(crate) fn may_send(&self) -> u32 {
        let sendable = self.phase == Phase::Open
            && !self.response_due
            && self.guest_closed & SHUTDOWN_RECEIVE == 0
            && self.host_closed & SHUTDOWN_SEND == 0;
        if !sendable {
            return 0;
        }
        self.guest_buffer.saturating_sub(self.sent.wrapping_sub(self.guest_consumed))
    }

    /// So many bytes are on their way to the guest.
    pub(crate) fn sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// The host's end will not send any more, and this was the last byte.
    pub(crate) fn host_sent_all(&mut self) {
        self.host_closed |= SHUTDOWN_SEND;
    }

    /// The host's end takes no more bytes; what waits for it is void.
    pub(crate) fn host_receives_no_more(&mut self) {
        self.host_closed |= SHUTDOWN_RECEIVE;
        let void = self.backlog.len();
        self.forwarded(void);
    }

    /// Whether the host's end has sent its last byte.
    pub(crate) fn has_host_sent_all(&self) -> bool {
        self.host_closed & SHUTDOWN_SEND != 0
    }

    /// Whether the host's end still takes bytes.
    pub(crate) fn does_host_receive(&self) -> bool {
        self.host_closed & SHUTDOWN_RECEIVE == 0
    }

    /// Whether the guest has sent its last byte, and the stream has it.
    pub(crate) fn has_guest_sent_all(&self) -> bool {
        self.guest_closed & SHUTDOWN_SEND != 0 && self.backlog.is_empty()
    }

    /// Whether the guest still takes bytes.
    pub(crate) fn does_guest_receive(&self) -> bool {
        self.guest_closed & SHUTDOWN_RECEIVE == 0
    }

    /// Whether nothing can happen any more but the final reset.
    pub(crate) fn is_over(&self) -> bool {
        self.has_guest_sent_all() && !self.does_guest_receive()
    }

    /// Whether the guest knows that the host's end is gone, and has consumed all that came from it: it should have
    /// closed its end.
    pub(crate) fn should_be_over(&self) -> bool {
        self.host_closed_told == SHUTDOWN_BOTH && self.sent == self.guest_consumed
    }

    /// Whether the guest was told that the host's end is gone.
    pub(crate) fn is_end_told(&self) -> bool {
        self.host_closed_told == SHUTDOWN_BOTH
    }

    /// Whether [`ConnectionState::next_control`] has anything.
    pub(crate) fn has_control(&self) -> bool {
        match self.phase {
            Phase::Requested => true,
            Phase::Awaiting | Phase::Draining => false,
            Phase::Open => self.response_due || self.credit_due || self.host_closed != self.host_closed_told,
        }
    }

    /// The next packet without data that is due, and its flags. It counts as sent.
    pub(crate) fn next_control(&mut self) -> Option<(Op, u32)> {
        match self.phase {
            Phase::Requested => {
                self.phase = Phase::Awaiting;
                Some((Op::Request, 0))
            }
            Phase::Open if std::mem::take(&mut self.response_due) => Some((Op::Response, 0)),
            Phase::Open if self.host_closed != self.host_closed_told => {
                self.host_closed_told = self.host_closed;
                Some((Op::Shutdown, self.host_closed))
            }
            Phase::Open if self.credit_due => Some((Op::CreditUpdate, 0)),
            Phase::Awaiting | Phase::Open | Phase::Draining => None,
        }
    }

    /// The header of a packet to the guest. It tells the guest of our receive buffer, as every packet does.
    pub(crate) fn header(&mut self, guest_cid: u64, op: Op, flags: u32, length: u32) -> Header {
        self.announced = self.forwarded;
        self.credit_due = false;
        Header {
            source_cid: super::packet::HOST_CID,
            destination_cid: guest_cid,
            source_port: self.host_port,
            destination_port: self.guest_port,
            length,
            op: Some(op),
            flags,
            buffer_size: BUFFER_SIZE,
            consumed: self.forwarded,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Header {
        Header {
            source_cid: 3,
            destination_cid: 2,
            source_port: 5000,
            destination_port: 1024,
            length: 0,
            op: Some(Op::Request),
            flags: 0,
            buffer_size: 1000,
            consumed: 0,
        }
    }

    fn open() -> ConnectionState {
        let mut state = ConnectionState::accepted(&request());
        assert_eq!(state.next_control(), Some((Op::Response, 0)));
        let _sent = state.header(3, Op::Response, 0, 0);
        state
    }

    #[test]
    fn nothing_is_sent_before_the_response() {
        let mut state = ConnectionState::accepted(&request());
        assert_eq!(state.may_send(), 0);
        assert_eq!(state.next_control(), Some((Op::Response, 0)));
        assert_eq!(state.may_send(), 1000);
        assert_eq!(state.next_control(), None);
    }

    #[test]
    fn a_connection_of_the_host_opens_with_the_response() {
        let mut state = ConnectionState::requested(1025, 1 << 30);
        assert_eq!(state.next_control(), Some((Op::Request, 0)));
        assert_eq!((state.phase(), state.next_control(), state.may_send()), (Phase::Awaiting, None, 0));
        assert_eq!(state.clone().take_control(Op::Shutdown, 3), Err(Violation));
        assert_eq!(state.clone().take_data(1), Err(Violation));
        state.take_credit(&Header { op: Some(Op::Response), ..request() });
        assert_eq!(state.take_control(Op::Response, 0), Ok(()));
        assert_eq!(state.may_send(), 1000);
        assert_eq!(state.take_control(Op::Response, 0), Err(Violation), "only once");
    }

    #[test]
    fn the_guests_room_is_respected_and_wraps() {
        let mut state = open();
        state.sent = u32::MAX - 99;
        state.take_credit(&Header { consumed: u32::MAX - 99, ..request() });
        assert_eq!(state.may_send(), 1000);
        state.sent(600);
        assert_eq!(state.may_send(), 400);
        state.take_credit(&Header { consumed: 500, ..request() });
        assert_eq!(state.may_send(), 1000);
        // A buffer that shrinks below what is under way, or nonsense, is no room at all.
        state.sent(1000);
        state.take_credit(&Header { buffer_size: 10, consumed: 500, ..request() });
        assert_eq!(state.may_send(), 0);
        state.take_credit(&Header { consumed: 501 + 1000, ..request() });
        assert_eq!(state.may_send(), 0, "it claims to have consumed more than was sent");
    }

    #[test]
    fn data_beyond_our_room_is_a_violation() {
        let mut state = open();
        assert_eq!(state.take_data(BUFFER_SIZE), Ok(()));
        assert_eq!(state.take_data(1), Err(Violation));
        state.forwarded(100);
        assert_eq!(state.take_data(101), Err(Violation));
        assert_eq!(state.take_data(100), Ok(()));
        assert_eq!(open().take_data(u32::MAX), Err(Violation));
    }

    #[test]
    fn credit_is_told_before_the_guest_runs_out() {
        let mut state = open();
        state.take_data(1000).unwrap();
        state.forwarded(1000);
        assert!(!state.has_control(), "there is lots of room");
        state.take_data(BUFFER_SIZE / 2).unwrap();
        assert!(!state.has_control(), "nothing new to tell");
        state.forwarded(BUFFER_SIZE as usize / 2);
        assert_eq!(state.next_control(), Some((Op::CreditUpdate, 0)));
        assert_eq!(state.header(3, Op::CreditUpdate, 0, 0).consumed, BUFFER_SIZE / 2 + 1000);
        assert!(!state.has_control());
        assert_eq!(state.take_control(Op::CreditRequest, 0), Ok(()));
        assert_eq!(state.next_control(), Some((Op::CreditUpdate, 0)));
    }

    #[test]
    fn each_direction_closes_by_itself() {
        let mut state = open();
        state.host_sent_all();
        assert_eq!(state.next_control(), Some((Op::Shutdown, SHUTDOWN_SEND)));
        assert_eq!((state.may_send(), state.is_over()), (0, false));
        assert_eq!(state.take_data(10), Ok(()), "the guest may go on");
        state.backlog_mut().extend([0; 10]);
        state.take_control(Op::Shutdown, SHUTDOWN_SEND).unwrap();
        assert!(!state.has_guest_sent_all(), "the stream has not got it yet");
        state.forwarded(10);
        assert!(state.has_guest_sent_all());
        assert_eq!(state.take_data(0), Err(Violation), "after its last byte");
        assert!(!state.is_over());
        state.take_control(Op::Shutdown, SHUTDOWN_RECEIVE).unwrap();
        assert!(state.is_over());
    }

    #[test]
    fn a_reset_does_not_take_back_what_was_sent_in_good_order() {
        let mut state = open();
        state.take_data(10).unwrap();
        state.backlog_mut().extend([0; 10]);
        assert!(!state.clone().take_reset(), "no SHUTDOWN: the guest gave up");
        state.take_control(Op::Shutdown, SHUTDOWN_SEND).unwrap();
        assert!(state.take_reset());
        assert_eq!((state.phase(), state.is_over(), state.has_control()), (Phase::Draining, false, false));
        state.forwarded(10);
        assert!(state.is_over());
    }

    #[test]
    fn a_host_end_that_is_gone_is_told_once() {
        let mut state = open();
        state.sent(5);
        state.take_data(10).unwrap();
        state.backlog_mut().extend([0; 10]);
        state.host_sent_all();
        state.host_receives_no_more();
        assert_eq!(state.backlog(), b"");
        assert_eq!(state.next_control(), Some((Op::Shutdown, SHUTDOWN_BOTH)));
        assert_eq!(state.next_control(), None);
        assert!(!state.should_be_over(), "the guest may still read what it has");
        state.take_credit(&Header { consumed: 5, ..request() });
        assert!(state.should_be_over());
    }
}
