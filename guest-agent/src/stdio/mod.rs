//! Standard streams and connections to ports: the host's connections, and copying between them and the processes.
//!
//! A process gets pipes or a terminal, never a connection itself: programs open `/dev/stdout` again, which a socket does
//! not allow, and a connection must end when the process does, not when the last of its grandchildren does.

mod connection;
mod copy;
mod listener;
mod names;
mod port;
mod question;

pub(crate) use connection::Connection;
pub(crate) use copy::{InputControl, copy_input, copy_output, discard_output};
pub(crate) use listener::StreamError;
pub use listener::Streams;
