//! Virtio network device (virtio 1.2, section 5.1) on the queues of a tap.
//!
//! Packets go between the tap and the guest's buffers in one system call each, with nothing in between: the tap's header is the
//! device's. What comes from the guest goes to the host's kernel, so its header is checked against the packet first
//! ([`check`]). The tap is made and set up by whoever hands it over; the device offers the guest what it is set to do and has no
//! way to change it.

mod check;
mod control;
mod device;
mod header;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod tx;

pub use device::Net;
