//! The socket device.

use std::os::fd::OwnedFd;

use bulkhead_vmm::devices::vsock::Vsock;

use crate::guest::Guest;
use crate::host::{self, Peer};
use crate::input::Input;

/// The ports that the guest may connect to, once each.
const PORTS: [u32; 2] = [1024, 1025];

/// The most connections that the host opens.
const OPENED: usize = 8;

/// Packets of the guest's, while the host opens connections, sends, receives and hangs up.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut peers: Vec<Option<Peer>> = Vec::new();
    let mut end = |()| -> OwnedFd {
        let (stream, peer) = host::stream();
        peers.push(Some(peer));
        stream
    };
    let streams = PORTS.map(|port| (port, end(()))).into();
    let (device, connector) = Vsock::new(7, streams).unwrap();
    Guest::new(Box::new(device)).run(&mut input, &mut |input| {
        let chosen = input.below(peers.len());
        match input.below(8) {
            0 if peers.len() < PORTS.len() + OPENED => {
                let (stream, peer) = host::stream();
                peers.push(Some(peer));
                let _ = connector.connect(input.u32(), stream);
            }
            0 | 1 => peers[chosen] = None,
            2..=4 => drop(peers[chosen].as_ref().and_then(Peer::receive)),
            _ => {
                if let Some(peer) = &peers[chosen] {
                    let length = input.u16();
                    peer.send(&vec![5; length.into()]);
                }
            }
        }
    });
}
