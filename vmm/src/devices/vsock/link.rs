//! A connection joined to its stream.

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::time::Instant;

use event_manager::EventSet;

use super::connection::ConnectionState;
use super::stream::{Stream, Transfer};
use crate::devices::{ChainReader, DeviceEvents, DeviceFault};

/// A connection and its host end.
pub(crate) struct Connection {
    /// What a snapshot would have to save.
    pub state: ConnectionState,
    /// The host's end.
    pub stream: Stream,
    /// What the stream is watched for.
    pub watched: Option<EventSet>,
    /// The stream's directions that were closed for the guest: towards the host, and from it.
    shut_down: (bool, bool),
    /// When patience with the guest ends.
    pub deadline: Option<Instant>,
}

impl Connection {
    /// Joins the two; the stream is not watched yet.
    pub(crate) fn new(state: ConnectionState, stream: Stream, deadline: Option<Instant>) -> Self {
        Connection { state, stream, watched: None, shut_down: (false, false), deadline }
    }

    /// Gives bytes of the guest to the stream, or keeps them for it.
    pub(crate) fn forward(
        &mut self,
        mut data: ChainReader<'_>,
        mut length: usize,
    ) -> Result<(), DeviceFault> {
        if !self.state.does_host_receive() {
            self.state.forwarded(length);
            return Ok(());
        }
        while length > 0 && self.state.backlog().is_empty() {
            match self.stream.write_from_guest(&mut data, length)? {
                Transfer::Moved(0) | Transfer::WouldBlock => break,
                Transfer::Moved(moved) => {
                    self.state.forwarded(moved);
                    length -= moved.min(length);
                }
                Transfer::Gone => {
                    self.state.host_receives_no_more();
                    self.state.forwarded(length);
                    return Ok(());
                }
            }
        }
        if length > 0 {
            let backlog = self.state.backlog_mut();
            let before = backlog.len();
            backlog.resize(before + length, 0);
            data.read_exact(&mut backlog[before..])?;
        }
        Ok(())
    }

    /// Gives the backlog to the stream.
    pub(crate) fn flush(&mut self) {
        while !self.state.backlog().is_empty() {
            match self.stream.write(self.state.backlog()) {
                Transfer::Moved(0) | Transfer::WouldBlock => return,
                Transfer::Moved(moved) => self.state.forwarded(moved),
                Transfer::Gone => self.state.host_receives_no_more(),
            }
        }
    }

    /// Closes the stream's directions that the guest has closed.
    pub(crate) fn follow_guest(&mut self) {
        if self.state.has_guest_sent_all() && !self.shut_down.0 {
            self.stream.shut_down(Shutdown::Write);
            self.shut_down.0 = true;
        }
        if !self.state.does_guest_receive() && !self.shut_down.1 {
            self.stream.shut_down(Shutdown::Read);
            self.shut_down.1 = true;
        }
    }

    /// Whether nothing that the stream may still hold is for the guest.
    pub(crate) fn has_nothing_to_read(&self) -> bool {
        self.state.has_host_sent_all() || !self.state.does_guest_receive()
    }

    /// What the stream should be watched for. `None`: nothing it could tell would be of use now, and an unused
    /// readiness or hang-up would be reported for ever.
    fn wanted(&self, starved: bool) -> Option<EventSet> {
        let mut set = EventSet::empty();
        if !starved && self.state.may_send() > 0 {
            set |= EventSet::IN;
        }
        if !self.state.backlog().is_empty() {
            set |= EventSet::OUT;
        }
        let waits_for_hang_up = self.state.does_host_receive() && self.has_nothing_to_read();
        (!set.is_empty() || waits_for_hang_up).then_some(set)
    }

    /// Brings the watch in line with [`Connection::wanted`].
    pub(crate) fn watch(
        &mut self,
        token: u32,
        starved: bool,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        let wanted = self.wanted(starved);
        if wanted == self.watched {
            return Ok(());
        }
        let fd = self.stream.as_fd();
        match (self.watched, wanted) {
            (None, Some(set)) => events.add(fd, token, set)?,
            (Some(_), Some(set)) => events.modify(fd, token, set)?,
            (Some(_), None) => events.remove(fd)?,
            (None, None) => {}
        }
        self.watched = wanted;
        Ok(())
    }
}
