//! The device with a driver in miniature, and sockets that keep packets apart instead of a tap.

use std::os::fd::OwnedFd;

use bulkhead_vmm_protocol::{AttachNet, NetOffloads};

use super::Net;
use super::header::HEADER_SIZE;
use crate::devices::VirtioDevice;
use crate::devices::testing::{BUFFERS, Buffer, Nonsense, TestDriver, readable, writable};

const RX: usize = 0;
const TX: usize = 1;
const MTU: u16 = 1500;
/// Where the tests put buffers for reception.
const RECEIVED: u64 = BUFFERS + 0x8_0000;

const OFFLOADS: NetOffloads = NetOffloads { checksum_and_tso: true, uso: true };
const PLAIN: NetOffloads = NetOffloads { checksum_and_tso: false, uso: false };

/// Feature bits.
const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO6: u64 = 1 << 8;
const MRG_RXBUF: u64 = 1 << 15;
const GUEST_USO4: u64 = 1 << 54;

/// The other end of a queue of the tap.
struct Wire(OwnedFd);

fn pair() -> (OwnedFd, Wire) {
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the array has room for the two descriptors, which become ours.
    let [ours, theirs] = unsafe {
        assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()), 0);
        use std::os::fd::FromRawFd;
        fds.map(|fd| OwnedFd::from_raw_fd(fd))
    };
    (ours, Wire(theirs))
}

impl Wire {
    fn send(&self, packet: &[u8]) {
        assert_eq!(nix_like::write(&self.0, packet), Some(packet.len()), "the socket is full");
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 70_000];
        let length = nix_like::read(&self.0, &mut packet)?;
        packet.truncate(length);
        Some(packet)
    }
}

mod nix_like {
    use std::os::fd::{AsRawFd, OwnedFd};

    pub(crate) fn write(fd: &OwnedFd, bytes: &[u8]) -> Option<usize> {
        // SAFETY: the pointer and length are those of a live slice.
        usize::try_from(unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) }).ok()
    }

    pub(crate) fn read(fd: &OwnedFd, bytes: &mut [u8]) -> Option<usize> {
        // SAFETY: the pointer and length are those of a live, exclusive slice.
        usize::try_from(unsafe { libc::read(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) }).ok()
    }
}

fn device(pairs: u8, offloads: NetOffloads) -> (Box<dyn VirtioDevice>, Vec<Wire>) {
    let (queues, wires) = (0..pairs).map(|_| pair()).unzip();
    let request = AttachNet { slot: 0, mac: [2, 0, 0, 0, 0, 7], mtu: MTU, queue_pairs: pairs, offloads };
    (Box::new(Net::new(&request, queues).unwrap()), wires)
}

fn guest(pairs: u8, offloads: NetOffloads) -> (TestDriver, Vec<Wire>) {
    let (device, wires) = device(pairs, offloads);
    (TestDriver::activated(device, 0), wires)
}

/// A header and a packet of `length` bytes that count up.
fn packet(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_SIZE];
    bytes.extend((0..length).map(|at| (at % 251) as u8));
    bytes
}

/// Bytes of the header but for the number of buffers, and the packet.
fn split(bytes: &[u8]) -> (&[u8], u16, &[u8]) {
    (&bytes[..10], u16::from_le_bytes([bytes[10], bytes[11]]), &bytes[12..])
}

impl TestDriver {
    /// Offers buffers of `size` bytes, each in its place.
    fn offer(&mut self, queue: usize, count: u64, size: u32) {
        for index in 0..count {
            self.add(queue, &[writable(RECEIVED + index * u64::from(size), size)]);
        }
        self.kick(queue);
    }

    /// Sends a packet with its header, and expects the device to be done with it.
    fn transmit(&mut self, bytes: &[u8]) {
        self.write_bytes(BUFFERS, bytes);
        assert_eq!(self.request(TX, &[readable(BUFFERS, bytes.len() as u32)]), Some(0));
    }

    fn configuration(&self) -> Vec<u8> {
        (0..12)
            .map(|at| {
                let mut byte = [0];
                self.transport.slot().registers.read(0x100 + at, &mut byte);
                byte[0]
            })
            .collect()
    }
}

/// An IPv4 TCP packet of so many bytes with its header, to be cut into segments of 1400 bytes.
fn segments(length: usize) -> Vec<u8> {
    let mut bytes = vec![1, 1, 54, 0, 0x78, 5, 34, 0, 16, 0, 0, 0];
    bytes.extend(packet(length)[HEADER_SIZE..].iter());
    bytes[24..26].copy_from_slice(&[8, 0]);
    bytes[26..28].copy_from_slice(&[0x45, 0]);
    bytes[32..34].copy_from_slice(&[0x40, 0]);
    bytes[35] = 6;
    bytes[58] = 5 << 4;
    bytes
}

#[test]
fn it_offers_what_the_tap_does() {
    let (driver, _wires) = guest(2, OFFLOADS);
    assert_eq!(driver.get(8), 1);
    assert_eq!(driver.configuration(), [2, 0, 0, 0, 0, 7, 1, 0, 2, 0, 0xdc, 5]);
    let common = 1 << 32 | 1 << 28 | 1 << 29;
    let base = 1 << 3 | 1 << 5 | MRG_RXBUF | 1 << 16 | common;
    let tso = CSUM | GUEST_CSUM | 1 << 7 | GUEST_TSO6 | 1 << 11 | 1 << 12;
    let uso = GUEST_USO4 | 1 << 55 | 1 << 56;
    for (pairs, offloads, features) in [
        (1, PLAIN, base),
        (1, NetOffloads { uso: false, ..OFFLOADS }, base | tso),
        (4, OFFLOADS, base | tso | uso | 1 << 17 | 1 << 22),
    ] {
        let (device, _wires) = device(pairs, offloads);
        let mut driver = TestDriver::new(device);
        let low = driver.get(0x10);
        driver.set(0x14, 1);
        assert_eq!(u64::from(driver.get(0x10)) << 32 | u64::from(low), features);
    }
}

#[test]
fn a_driver_that_does_not_take_what_the_tap_hands_out_is_refused() {
    for missing in [MRG_RXBUF, GUEST_CSUM, GUEST_TSO6, GUEST_USO4] {
        let (device, _wires) = device(1, OFFLOADS);
        let mut driver = TestDriver::new(device);
        driver.set(0x70, 1);
        driver.set(0x70, 3);
        for sel in [0, 1] {
            driver.set(0x14, sel);
            let offered = driver.get(0x10);
            driver.set(0x24, sel);
            driver.set(0x20, offered & !((missing >> (32 * sel)) as u32));
        }
        driver.set(0x70, 11);
        assert_eq!(driver.get(0x70), 3, "accepted without {missing:#x}");
    }
}

#[test]
fn packets_are_sent_as_they_are_with_a_clean_header() {
    let (mut driver, wires) = guest(1, OFFLOADS);
    let mut plain = packet(60);
    plain[2..12].fill(9);
    driver.transmit(&plain);
    plain[2..12].fill(0);
    assert_eq!(wires[0].receive(), Some(plain));

    // In pieces, some of them odd, and far more than is looked at.
    let large = segments(60_000);
    driver.write_bytes(BUFFERS, &large);
    let pieces: Vec<Buffer> = [(0, 7), (7, 40), (47, 1), (48, 3000), (3048, 56_964)]
        .map(|(at, length)| readable(BUFFERS + at, length))
        .to_vec();
    assert_eq!(driver.request(TX, &pieces), Some(0));
    assert_eq!(wires[0].receive(), Some(large));
    assert_eq!(wires[0].receive(), None);
    assert!(!driver.needs_reset());
}

#[test]
fn what_is_not_sound_goes_nowhere_and_the_queue_goes_on() {
    let (mut driver, wires) = guest(1, OFFLOADS);
    let mut bad = segments(9000);
    bad[0] = 2;
    for packet in [&[0u8; 4][..], &[0; 12], &[0; 25], &bad, &packet(2000)] {
        driver.transmit(packet);
        assert_eq!(wires[0].receive(), None, "{} bytes were sent", packet.len());
    }
    // A chain without anything to be read, and one that is longer than any packet.
    assert_eq!(driver.request(TX, &[writable(BUFFERS, 100)]), Some(0));
    assert_eq!(driver.request(TX, &[readable(BUFFERS, 70_000)]), Some(0));
    assert_eq!(wires[0].receive(), None);
    driver.transmit(&packet(100));
    assert!(wires[0].receive().is_some());
    assert!(!driver.needs_reset());
}

#[test]
fn a_packet_fills_as_many_buffers_as_it_needs() {
    let (mut driver, wires) = guest(1, OFFLOADS);
    driver.offer(RX, 100, 1536);
    // What is taken ahead and not needed serves the next packet.
    let mut next = 0u64;
    for length in [20, 1524, 1525, 60_000, 46, 65_550] {
        let sent = packet(length);
        wires[0].send(&sent);
        driver.run();
        let buffers = (length + HEADER_SIZE).div_ceil(1536);
        let mut got = Vec::new();
        for _ in 0..buffers {
            let (_, written) = driver.take_used(RX).unwrap();
            got.extend(driver.read_bytes(RECEIVED + next * 1536, written as usize));
            next += 1;
        }
        let (header, count, bytes) = split(&got);
        assert_eq!((header, usize::from(count)), (&[0; 10][..], buffers), "{length}");
        assert_eq!(bytes, &sent[HEADER_SIZE..]);
        assert_eq!(driver.take_used(RX), None);
    }
}

#[test]
fn without_buffers_packets_wait_and_nothing_spins() {
    let (mut driver, wires) = guest(1, OFFLOADS);
    for length in [100, 200] {
        wires[0].send(&packet(length));
    }
    // Comes to rest although the socket is readable.
    driver.run();
    assert_eq!(driver.take_used(RX), None);
    driver.offer(RX, 60, 1536);
    assert_eq!(driver.take_used(RX).map(|used| used.1), Some(112));
    assert_eq!(driver.take_used(RX).map(|used| used.1), Some(212));
    wires[0].send(&packet(300));
    driver.run();
    assert_eq!(driver.take_used(RX).map(|used| used.1), Some(312));
}

#[test]
fn with_too_few_buffers_for_the_longest_packet_those_that_fit_arrive() {
    let (mut driver, wires) = guest(1, OFFLOADS);
    driver.offer(RX, 2, 200);
    wires[0].send(&packet(100));
    wires[0].send(&packet(500));
    wires[0].send(&packet(30));
    driver.run();
    assert_eq!(driver.take_used(RX).map(|used| used.1), Some(112));
    assert_eq!(driver.take_used(RX), None, "512 bytes do not fit into 200");
    driver.offer(RX, 3, 200);
    let sizes: Vec<u32> = std::iter::from_fn(|| driver.take_used(RX)).map(|used| used.1).collect();
    assert_eq!(sizes, [200, 200, 112, 42]);
}

#[test]
fn what_fits_no_buffers_of_this_driver_is_dropped() {
    let (mut driver, wires) = guest(1, OFFLOADS);
    driver.offer(RX, 256, 16);
    wires[0].send(&packet(5000));
    wires[0].send(&packet(20));
    driver.run();
    let sizes: Vec<u32> = std::iter::from_fn(|| driver.take_used(RX)).map(|used| used.1).collect();
    assert_eq!(sizes, [16, 16]);
    assert!(!driver.needs_reset());
}

#[test]
fn a_full_tap_makes_only_the_guest_wait() {
    let (mut driver, wires) = guest(1, OFFLOADS);
    let large = segments(60_000);
    driver.write_bytes(BUFFERS, &large);
    for _ in 0..40 {
        driver.add(TX, &[readable(BUFFERS, large.len() as u32)]);
    }
    driver.kick(TX);
    let sent = std::iter::from_fn(|| driver.take_used(TX)).count();
    assert!((1..39).contains(&sent), "{sent} packets fit the socket");
    // More kicks change nothing.
    driver.kick(TX);
    assert_eq!(driver.take_used(TX), None);
    let mut arrived = 0;
    while let Some(packet) = wires[0].receive() {
        assert_eq!(packet, large);
        arrived += 1;
        driver.run();
    }
    assert_eq!(arrived, 40);
    assert_eq!(sent + std::iter::from_fn(|| driver.take_used(TX)).count(), 40);
}

#[test]
fn without_its_tap_the_link_is_down_and_nothing_else() {
    for offer in [0, 60] {
        let (mut driver, mut wires) = guest(2, OFFLOADS);
        if offer > 0 {
            driver.offer(RX, offer, 1536);
        }
        driver.interrupts();
        wires.remove(0);
        driver.run();
        assert_eq!(driver.configuration()[6], 0);
        assert_eq!(driver.get(0x60) & 2, 2, "the driver is told");
        assert!(driver.interrupts() > 0);
        driver.transmit(&packet(100));
        assert_eq!(wires[0].receive(), Some(Vec::new()), "the other queue is closed");
        driver.restart();
        driver.transmit(&packet(100));
        assert!(!driver.needs_reset());
    }
}

#[test]
fn a_tap_that_went_before_the_driver_came_shows_as_well() {
    let (device, wires) = device(1, OFFLOADS);
    let mut driver = TestDriver::new(device);
    drop(wires);
    driver.run();
    assert_eq!(driver.configuration()[6], 0);
    driver.restart();
    driver.transmit(&packet(100));
    assert!(!driver.needs_reset());
}

/// Sends a command; returns the device's answer.
fn command(driver: &mut TestDriver, bytes: &[u8]) -> u8 {
    const CONTROL: usize = 8;
    driver.write_bytes(BUFFERS, bytes);
    driver.write_bytes(BUFFERS + 64, &[0xee]);
    let chain = [readable(BUFFERS, bytes.len() as u32), writable(BUFFERS + 64, 1)];
    assert_eq!(driver.request(CONTROL, &chain), Some(1));
    driver.read_bytes(BUFFERS + 64, 1)[0]
}

#[test]
fn packets_come_to_as_many_queues_as_the_driver_uses() {
    let (mut driver, wires) = guest(4, OFFLOADS);
    for pair in 0..4 {
        driver.offer(2 * pair, 60, 1536);
    }
    let arrivals = |driver: &mut TestDriver| {
        for wire in &wires {
            wire.send(&packet(100));
        }
        driver.run();
        [0, 2, 4, 6].map(|queue| std::iter::from_fn(|| driver.take_used(queue)).count())
    };
    assert_eq!(arrivals(&mut driver), [4, 0, 0, 0]);
    assert_eq!(command(&mut driver, &[4, 0, 4, 0]), 0);
    assert_eq!(arrivals(&mut driver), [1, 1, 1, 1]);
    assert_eq!(command(&mut driver, &[4, 0, 3, 0]), 0);
    assert_eq!(arrivals(&mut driver), [2, 1, 1, 0]);
    // A queue that ran out of buffers, got some while it was not used, and is used again.
    driver.restart();
    driver.offer(2, 1, 1536);
    command(&mut driver, &[4, 0, 2, 0]);
    wires[1].send(&packet(100));
    wires[1].send(&packet(100));
    driver.run();
    assert_eq!(std::iter::from_fn(|| driver.take_used(2)).count(), 1);
    command(&mut driver, &[4, 0, 1, 0]);
    driver.offer(2, 60, 1536);
    assert_eq!(driver.take_used(2), None);
    command(&mut driver, &[4, 0, 2, 0]);
    assert_eq!(std::iter::from_fn(|| driver.take_used(2)).count(), 1);
    for pair in 0..4 {
        driver.offer(2 * pair, 60, 1536);
    }
    command(&mut driver, &[4, 0, 3, 0]);
    assert_eq!(arrivals(&mut driver), [2, 1, 1, 0]);
    for impossible in [
        &[4, 0, 0, 0][..],
        &[4, 0, 5, 0],
        &[4, 0, 4, 1],
        &[4, 0, 4],
        &[4, 0],
        &[4, 1, 2, 0],
        &[0, 0, 1],
        &[1, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(command(&mut driver, impossible), 1, "{impossible:?}");
    }
    assert_eq!(arrivals(&mut driver), [2, 1, 1, 0]);
    // Each queue sends on its own queue of the tap.
    driver.write_bytes(BUFFERS, &packet(60));
    driver.request(7, &[readable(BUFFERS, 72)]).unwrap();
    assert!(wires[3].receive().is_some());
    driver.restart();
    driver.offer(RX, 60, 1536);
    assert_eq!(arrivals(&mut driver), [4, 0, 0, 0], "a reset leaves one");
}

#[test]
fn what_is_no_command_or_no_receive_buffer_stops_the_device() {
    for (queue, buffers) in [
        (8, vec![readable(BUFFERS, 4)]),
        (8, vec![readable(BUFFERS, 1), writable(BUFFERS + 64, 1)]),
        (RX, vec![writable(BUFFERS, 11)]),
        (RX, vec![readable(BUFFERS, 1000)]),
    ] {
        let (mut driver, wires) = guest(4, OFFLOADS);
        driver.add(queue, &buffers);
        driver.kick(queue);
        wires[0].send(&packet(30));
        driver.run();
        assert!(driver.needs_reset(), "queue {queue}");
        driver.restart();
        driver.transmit(&packet(100));
        assert!(wires[0].receive().is_some());
    }
}

#[test]
fn receive_buffers_in_too_many_pieces_stop_the_device() {
    let (mut driver, wires) = guest(1, OFFLOADS);
    // Each chain is a table of 200 pieces.
    let table = BUFFERS + 0x1000;
    for index in 0..200u64 {
        let mut entry = (RECEIVED + index).to_le_bytes().to_vec();
        entry.extend(1u32.to_le_bytes());
        entry.extend((if index < 199 { 3u16 } else { 2 }).to_le_bytes());
        entry.extend((index as u16 + 1).to_le_bytes());
        driver.write_bytes(table + 16 * index, &entry);
    }
    for head in 0..8 {
        driver.write_raw_descriptor(RX, head, table, 200 * 16, 4, 0);
        driver.make_available(RX, head);
    }
    wires[0].send(&packet(30));
    driver.kick(RX);
    assert!(driver.needs_reset());
}

#[test]
fn a_reset_forgets_buffers_and_packets_that_wait() {
    let (mut driver, wires) = guest(1, OFFLOADS);
    driver.offer(RX, 2, 200);
    wires[0].send(&packet(1000));
    driver.run();
    driver.restart();
    driver.write_bytes(RECEIVED, &[0xee; 400]);
    driver.offer(RX, 60, 1536);
    wires[0].send(&packet(50));
    driver.run();
    assert_eq!(driver.take_used(RX), Some((0, 62)));
    assert_eq!(driver.take_used(RX), None);
}

#[test]
fn random_rings_never_panic_and_always_come_to_rest() {
    let mut nonsense = Nonsense(0x4242);
    let mut faults = 0;
    for round in 0..600 {
        let (mut driver, wires) = guest(if round % 2 == 0 { 1 } else { 2 }, OFFLOADS);
        let queues = if round % 2 == 0 { 2 } else { 5 };
        for queue in 0..queues {
            for index in 0..16 {
                let buffer = Buffer {
                    address: BUFFERS + nonsense.below(0x1_0000),
                    length: nonsense.below(3000) as u32,
                    writable: nonsense.below(4) == u64::from(queue % 2 == 0),
                };
                let next = (nonsense.below(3) == 0).then(|| nonsense.below(18) as u16);
                driver.write_descriptor(queue, index, buffer, next);
                if nonsense.below(32) == 0 {
                    let (address, length) = (nonsense.next() >> nonsense.below(64), nonsense.next() as u32);
                    let flags = nonsense.below(8) as u16;
                    driver.write_raw_descriptor(queue, index, address, length, flags, nonsense.next() as u16);
                }
            }
        }
        for _ in 0..200 {
            let at = BUFFERS + nonsense.below(0x1_0000);
            driver.write_bytes(at, &[nonsense.next() as u8 & 7]);
        }
        for _ in 0..8 {
            let queue = nonsense.below(queues as u64) as usize;
            for _ in 0..nonsense.below(6) {
                driver.make_available(queue, nonsense.below(17) as u16);
            }
            if nonsense.below(2) == 0 {
                let _ = nix_like::write(&wires[0].0, &packet(nonsense.below(5000) as usize));
            }
            driver.kick(queue);
        }
        faults += u32::from(driver.needs_reset());
    }
    assert!((100..600).contains(&faults), "{faults} of 600 were faulty");
}
