//! The connections that there are.

use std::time::Instant;

use super::connection::{ConnectionState, Phase};
use super::link::Connection;
use super::stream::Stream;

/// The most connections at a time. With [`super::connection::BUFFER_SIZE`] it bounds the memory of all backlogs.
pub(super) const MAX_CONNECTIONS: usize = 512;

/// Connections, each at an index of its own as long as it lives.
#[derive(Default)]
pub(super) struct Table {
    /// A free one is `None`.
    slots: Vec<Option<Connection>>,
}

impl Table {
    /// The connection between two ports, unless it is only there for what its stream has not taken yet.
    pub(super) fn find(&self, guest_port: u32, host_port: u32) -> Option<usize> {
        self.slots.iter().position(|slot| {
            slot.as_ref().is_some_and(|Connection { state, .. }| {
                (state.guest_port, state.host_port) == (guest_port, host_port)
                    && state.phase() != Phase::Draining
            })
        })
    }

    /// Takes a connection in; gives its stream back when there is no room.
    pub(super) fn insert(
        &mut self,
        state: ConnectionState,
        stream: Stream,
        deadline: Option<Instant>,
    ) -> Result<(), Stream> {
        let connection = Connection::new(state, stream, deadline);
        match self.slots.iter().position(Option::is_none) {
            Some(index) => self.slots[index] = Some(connection),
            None if self.slots.len() < MAX_CONNECTIONS => self.slots.push(Some(connection)),
            None => return Err(connection.stream),
        }
        Ok(())
    }

    pub(super) fn get(&self, index: usize) -> Option<&Connection> {
        self.slots.get(index).and_then(Option::as_ref)
    }

    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut Connection> {
        self.slots.get_mut(index).and_then(Option::as_mut)
    }

    /// Takes a connection out.
    pub(super) fn take(&mut self, index: usize) -> Option<Connection> {
        self.slots.get_mut(index).and_then(Option::take)
    }

    /// Takes out those for which `is_over` holds.
    pub(super) fn take_if(
        &mut self,
        is_over: impl Fn(&Connection) -> bool,
    ) -> impl Iterator<Item = Connection> {
        self.slots.iter_mut().filter_map(move |slot| slot.take_if(|connection| is_over(connection)))
    }

    /// All that there are.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Connection> {
        self.slots.iter().flatten()
    }

    /// All that there are, with their indices.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (usize, &mut Connection)> {
        self.slots.iter_mut().enumerate().filter_map(|(index, slot)| Some((index, slot.as_mut()?)))
    }

    /// Past the last index.
    pub(super) fn end(&self) -> usize {
        self.slots.len()
    }
}
