//! The network device between a guest and a tap.

use bulkhead_vmm::devices::net::Net;
use bulkhead_vmm_protocol::{AttachNet, NetOffloads};

use crate::guest::Guest;
use crate::host;
use crate::input::Input;

const HEADER: usize = 12;
const MTU: u16 = 1500;

/// `struct virtio_net_hdr`: the flag for a checksum, and kinds of segments.
const NEEDS_CHECKSUM: u8 = 1;
const KINDS: [u8; 3] = [1, 4, 5];

/// Packets both ways. What reaches the tap has a header that the host's kernel can believe.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let pairs = 1 + (flags & 3);
    let offloads = NetOffloads { checksum_and_tso: flags & 4 != 0, uso: flags & 12 == 12 };
    let (queues, wires): (Vec<_>, Vec<_>) = (0..pairs).map(|_| host::packets()).unzip();
    let request = AttachNet { slot: 0, mac: [2, 0, 0, 0, 0, 7], mtu: MTU, queue_pairs: pairs, offloads };
    request.validate(queues.len()).unwrap();
    let mut wires: Vec<_> = wires.into_iter().map(Some).collect();
    let mut guest = Guest::new(Box::new(Net::new(&request, queues).unwrap()));
    guest.run(&mut input, &mut |input| {
        let wire = input.below(wires.len());
        let Some(end) = &wires[wire] else { return };
        match input.below(8) {
            0 => wires[wire] = None,
            1..=3 => {
                while let Some(packet) = end.receive() {
                    check(&packet, offloads);
                }
            }
            // The kernel's end of a tap sends whole packets with their headers; what is in them is anybody's.
            _ => {
                let mut packet = vec![0; HEADER];
                packet.extend(input.take(64));
                let longest = if offloads.checksum_and_tso { 65_550 } else { usize::from(MTU) + 22 };
                packet.resize(HEADER + (14 + usize::from(input.u16())).min(longest), 3);
                end.send(&packet);
            }
        }
    });
    for wire in wires.iter().flatten() {
        while let Some(packet) = wire.receive() {
            check(&packet, offloads);
        }
    }
}

fn check(packet: &[u8], offloads: NetOffloads) {
    let half = |at: usize| usize::from(u16::from_le_bytes([packet[at], packet[at + 1]]));
    assert!(packet.len() >= HEADER + 14, "a packet of {} bytes", packet.len());
    let (flags, kind, length) = (packet[0], packet[1], packet.len() - HEADER);
    let (headers, size, start, offset) = (half(2), half(4), half(6), half(8));
    assert!(flags & !NEEDS_CHECKSUM == 0, "flags {flags:#x}");
    if flags & NEEDS_CHECKSUM != 0 {
        assert!(offloads.checksum_and_tso, "a checksum that was not negotiated");
        assert!(
            start >= 14 && start + offset + 2 <= length,
            "a checksum at {start} and {offset} of {length}"
        );
    }
    if kind == 0 {
        assert!(length <= usize::from(MTU) + 22, "{length} bytes");
        return;
    }
    assert!(KINDS.contains(&kind), "kind {kind}");
    assert!(offloads.checksum_and_tso && (kind != 5 || offloads.uso), "segments that were not negotiated");
    assert!(flags & NEEDS_CHECKSUM != 0, "segments without a checksum");
    assert!(size > 0 && headers > start && headers < length, "{size} bytes a segment, headers of {headers}");
    // Behind the Ethernet header, which 14 bytes have.
    assert!(headers - 14 + size <= usize::from(MTU) + 8, "segments of {size} bytes");
    assert!(length <= 65_550, "{length} bytes");
}
