//! The device from both ends: a guest that speaks packets, and the host's sockets.

mod guest;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use self::guest::{
    CID, FROM_GUEST, Guest, OUTGOING, TO_GUEST, data_header, header, is_closed, random_header, shutdown,
};
use super::Vsock;
use super::connection::BUFFER_SIZE;
use super::packet::{HEADER_SIZE, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::devices::testing::{BUFFERS, Nonsense, TestDriver, readable, writable};

#[test]
fn bytes_written_before_the_guest_connects_reach_it() {
    let (mut guest, mut host) = Guest::new(16);
    host.write_all(b"early").unwrap();
    guest.send(header(Op::Request), &[]);
    let packets = guest.receive();
    let ops: Vec<_> = packets.iter().map(|(header, data)| (header.op.unwrap(), &data[..])).collect();
    assert_eq!(ops, [(Op::Response, &b""[..]), (Op::ReadWrite, b"early")]);
    guest.send(data_header(6), b"answer");
    let mut answer = [0; 6];
    host.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
}

#[test]
fn only_the_given_ports_may_be_connected_to_and_each_once() {
    let (mut guest, host) = Guest::new(16);
    for port in [0, 1, 1023, 1025, u32::MAX] {
        guest.send(Header { destination_port: port, ..header(Op::Request) }, &[]);
        let reset = guest.receive_one(Op::Reset);
        assert_eq!((reset.source_port, reset.destination_port), (port, 5000));
    }
    guest.connect();
    guest.send(Header { source_port: 5001, ..header(Op::Request) }, &[]);
    guest.receive_one(Op::Reset);
    // A second request on the open connection breaks it.
    guest.send(header(Op::Request), &[]);
    guest.receive_one(Op::Reset);
    let mut host = host;
    assert!(is_closed(&mut host));
}

#[test]
fn false_addresses_and_unknown_connections_get_a_reset() {
    let (mut guest, _host) = Guest::new(64);
    for op in [Op::Response, Op::Shutdown, Op::ReadWrite, Op::CreditUpdate, Op::CreditRequest] {
        guest.send(header(op), &[]);
        guest.receive_one(Op::Reset);
    }
    guest.send(header(Op::Reset), &[]);
    assert_eq!(guest.receive(), [], "a reset is not answered");
    guest.send(Header { destination_cid: 7, ..header(Op::Request) }, &[]);
    assert_eq!(guest.receive_one(Op::Reset).source_cid, 7);
    guest.send(Header { source_cid: 7, ..header(Op::Request) }, &[]);
    assert_eq!(guest.receive(), [], "somebody else's address");
    guest.send(Header { op: None, ..header(Op::Request) }, &[]);
    guest.receive_one(Op::Reset);
    guest.connect();
    guest.send(Header { op: None, ..header(Op::Request) }, &[]);
    guest.receive_one(Op::Reset);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn packets_that_lie_about_their_length_stop_the_device() {
    for (header_bytes, length, data) in
        [(HEADER_SIZE, 100u32, 99), (HEADER_SIZE, u32::MAX, 0), (HEADER_SIZE - 1, 0, 0), (1, 0, 0)]
    {
        let (mut guest, mut host) = Guest::new(4);
        guest.connect();
        let bytes = data_header(length as usize).to_bytes();
        guest.driver.write_bytes(OUTGOING, &bytes[..header_bytes]);
        guest.driver.write_bytes(OUTGOING + 64, &vec![0; data]);
        let mut buffers = vec![readable(OUTGOING, header_bytes as u32)];
        if data > 0 {
            buffers.push(readable(OUTGOING + 64, data as u32));
        }
        assert_eq!(guest.driver.request(FROM_GUEST, &buffers), None);
        assert!(guest.driver.needs_reset());
        assert!(is_closed(&mut host), "nothing is left of the driver's connections");
    }
}

#[test]
fn much_data_crosses_both_ways_unchanged() {
    let (mut guest, mut host) = Guest::new(32);
    guest.connect();
    let data: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();

    // To the host, as fast as credit allows; the host reads slowly.
    let expected = data.clone();
    let reader = std::thread::spawn(move || {
        let mut all = vec![0; expected.len()];
        for chunk in all.chunks_mut(10_000) {
            host.read_exact(chunk).unwrap();
        }
        assert!(all == expected);
        host
    });
    let (mut sent, mut consumed) = (0u32, 0u32);
    while (sent as usize) < data.len() {
        let room = BUFFER_SIZE - (sent - consumed);
        let chunk = &data[sent as usize..data.len().min(sent as usize + room.min(60_000) as usize)];
        if chunk.is_empty() {
            guest.wait(|guest| {
                let packets = guest.receive();
                consumed = packets.last().map_or(consumed, |(header, _)| header.consumed);
                !packets.is_empty()
            });
        } else {
            guest.send(data_header(chunk.len()), chunk);
            sent += chunk.len() as u32;
        }
    }
    guest.wait(|_| reader.is_finished());
    let host = reader.join().unwrap();

    // To the guest, with a window that fills.
    let to_send = data.clone();
    let writer = std::thread::spawn(move || {
        let mut host = host;
        host.write_all(&to_send).unwrap();
        host
    });
    let mut received = Vec::new();
    while received.len() < data.len() {
        for (header, chunk) in guest.receive() {
            if header.op == Some(Op::ReadWrite) {
                received.extend(chunk);
            }
        }
        let consumed = received.len() as u32;
        guest.send(Header { consumed, ..header(Op::CreditUpdate) }, &[]);
    }
    assert!(received == data);
    drop(writer.join().unwrap());
}

#[test]
fn the_guests_window_is_never_exceeded() {
    let (mut guest, mut host) = Guest::new(64);
    guest.send(Header { buffer_size: 100, ..header(Op::Request) }, &[]);
    guest.receive_one(Op::Response);
    host.write_all(&[7; 1000]).unwrap();
    let bytes = |packets: Vec<(Header, Vec<u8>)>| packets.iter().map(|(_, data)| data.len()).sum::<usize>();
    assert_eq!(bytes(guest.receive()), 100);
    guest.send(Header { buffer_size: 100, consumed: 0, ..header(Op::CreditUpdate) }, &[]);
    assert_eq!(bytes(guest.receive()), 0);
    guest.send(Header { buffer_size: 100, consumed: 30, ..header(Op::CreditUpdate) }, &[]);
    assert_eq!(bytes(guest.receive()), 30);
    // Nonsense is no room.
    guest.send(Header { buffer_size: 100, consumed: u32::MAX, ..header(Op::CreditUpdate) }, &[]);
    assert_eq!(bytes(guest.receive()), 0);
    guest.send(Header { buffer_size: u32::MAX, consumed: 130, ..header(Op::CreditUpdate) }, &[]);
    assert_eq!(bytes(guest.receive()), 870);
}

#[test]
fn data_beyond_the_credit_breaks_the_connection() {
    let (mut guest, mut host) = Guest::new(16);
    guest.connect();
    // The host reads nothing: what its socket does not take is kept, up to the credit.
    let chunk = vec![1; 32 * 1024];
    let mut sent = 0;
    let reset = loop {
        guest.send(data_header(chunk.len()), &chunk);
        sent += chunk.len();
        let packets = guest.receive();
        if let Some((header, _)) = packets.last()
            && header.op == Some(Op::Reset)
        {
            break *header;
        }
        assert!(sent < 10 << 20, "it takes without end");
    };
    assert_eq!(reset.destination_port, 5000);
    let mut all = Vec::new();
    let _end_or_reset = host.read_to_end(&mut all);
    assert!(all.len() <= sent, "{} of {sent}", all.len());
}

#[test]
fn the_guests_last_byte_arrives_before_its_end() {
    let (mut guest, mut host) = Guest::new(16);
    guest.connect();
    let sent = guest.fill_stream();
    guest.send(shutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE), &[]);
    assert_eq!(guest.receive(), [], "bytes still wait for the host");
    assert_eq!(guest.read_to_end(&mut host).len(), sent as usize);
    guest.receive_one(Op::Reset);
}

#[test]
fn a_guest_that_gives_up_waiting_loses_nothing_it_sent() {
    let (mut guest, mut host) = Guest::new(16);
    guest.connect();
    let sent = guest.fill_stream();
    guest.send(shutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE), &[]);
    guest.send(header(Op::Reset), &[]);
    // The port pair is free for another connection, which isn't mistaken for the old one.
    guest.send(header(Op::ReadWrite), &[]);
    guest.receive_one(Op::Reset);
    assert_eq!(guest.read_to_end(&mut host).len(), sent as usize);
    assert_eq!(guest.receive(), []);
}

#[test]
fn each_direction_ends_by_itself() {
    let (mut guest, mut host) = Guest::new(16);
    guest.connect();
    host.write_all(b"last").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let packets = guest.receive();
    let ops: Vec<_> =
        packets.iter().map(|(header, data)| (header.op.unwrap(), header.flags, &data[..])).collect();
    assert_eq!(ops, [(Op::ReadWrite, 0, &b"last"[..]), (Op::Shutdown, SHUTDOWN_SEND, b"")]);
    guest.send(data_header(5), b"still");
    let mut bytes = [0; 5];
    host.read_exact(&mut bytes).unwrap();
    guest.send(shutdown(SHUTDOWN_SEND), &[]);
    assert_eq!(host.read(&mut bytes).unwrap(), 0);
    // With both ends of the stream closed, the guest is told so, and closes.
    guest.wait(|guest| guest.receive().iter().any(|(header, _)| header.flags == 3));
    guest.send(shutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE), &[]);
    guest.receive_one(Op::Reset);
    drop(host);
    assert_eq!(guest.receive(), []);
}

#[test]
fn a_guest_that_does_not_receive_makes_the_host_notice() {
    let (mut guest, mut host) = Guest::new(16);
    guest.connect();
    guest.send(shutdown(SHUTDOWN_RECEIVE), &[]);
    assert_eq!(host.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    guest.send(data_header(2), b"ok");
    let mut bytes = [0; 2];
    host.read_exact(&mut bytes).unwrap();
    drop(host);
    guest.wait(|guest| guest.receive().iter().any(|(header, _)| header.op == Some(Op::Shutdown)));
    guest.send(data_header(2), b"no");
    assert_eq!(guest.receive(), [], "void, but no error");
}

#[test]
fn a_host_end_that_is_closed_ends_both_directions_after_the_data() {
    let (mut guest, mut host) = Guest::new(16);
    guest.connect();
    host.write_all(b"bye").unwrap();
    drop(host);
    let packets = guest.receive();
    assert_eq!(packets[0].1, b"bye");
    let last = packets.last().unwrap().0;
    assert_eq!((last.op, last.flags), (Some(Op::Shutdown), SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
    guest.send(header(Op::Reset), &[]);
    assert_eq!(guest.receive(), []);
}

#[test]
fn a_guest_that_does_not_close_is_reset_once_it_has_read_all() {
    let (mut guest, mut host) = Guest::with_patience(16, Duration::from_millis(30));
    guest.connect();
    host.write_all(b"bye").unwrap();
    drop(host);
    assert_eq!(guest.receive().len(), 2);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(guest.receive(), [], "it may still read");
    guest.send(Header { consumed: 3, ..header(Op::CreditUpdate) }, &[]);
    guest.wait(|guest| guest.receive().iter().any(|(header, _)| header.op == Some(Op::Reset)));
}

#[test]
fn the_host_opens_connections() {
    let (mut guest, _host) = Guest::new(16);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.connector.connect(1025, theirs.into()).unwrap();
    let request = guest.receive_one(Op::Request);
    assert_eq!((request.destination_port, request.source_cid), (1025, 2));
    let reply = |op| Header { source_port: 1025, destination_port: request.source_port, ..header(op) };
    guest.send(reply(Op::Response), &[]);
    ours.write_all(b"stdin").unwrap();
    assert_eq!(guest.receive()[0].1, b"stdin");
    guest.send(Header { length: 6, ..reply(Op::ReadWrite) }, b"stdout");
    let mut bytes = [0; 6];
    ours.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"stdout");

    // Refused, and answered nonsensically.
    for op in [Op::Reset, Op::ReadWrite, Op::Shutdown] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        guest.connector.connect(1025, theirs.into()).unwrap();
        let request = guest.receive_one(Op::Request);
        guest.send(Header { source_port: 1025, destination_port: request.source_port, ..header(op) }, &[]);
        assert!(is_closed(&mut ours), "{op:?}");
        guest.receive();
    }
}

#[test]
fn requests_that_are_not_answered_end_in_time() {
    let (mut guest, _host) = Guest::with_patience(16, Duration::from_millis(30));
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.connector.connect(1025, theirs.into()).unwrap();
    guest.receive_one(Op::Request);
    assert!(!is_closed(&mut ours));
    guest.driver.run_until(|_| is_closed(&mut ours));
    guest.receive_one(Op::Reset);
}

#[test]
fn connections_are_bounded() {
    let (mut guest, _host) = Guest::new(0);
    let mut streams = Vec::new();
    for _ in 0..600 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        guest.connector.connect(1025, theirs.into()).unwrap();
        guest.driver.run();
        streams.push(ours);
    }
    let open = streams.iter_mut().filter_map(|stream| (!is_closed(stream)).then_some(())).count();
    assert_eq!(open, 512);
    // Resets are bounded too: a flood without receive buffers costs no memory.
    for number in 0..1000 {
        guest.send(Header { source_port: number, ..header(Op::ReadWrite) }, &[]);
    }
    guest.offer(128);
    let packets = guest.receive();
    let resets = packets.iter().filter(|(header, _)| header.op == Some(Op::Reset)).count();
    assert_eq!(resets, 64);
}

#[test]
fn requests_before_the_driver_is_ready_wait_and_survive_its_reset() {
    let (device, connector) = Vsock::new(CID, Vec::new()).unwrap();
    let mut driver = TestDriver::new(Box::new(device));
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    connector.connect(1025, theirs.into()).unwrap();
    driver.run();
    driver.negotiate(0);
    driver.run();
    assert!(!is_closed(&mut ours));
    for queue in 0..3 {
        driver.write_queue(queue, driver.queue_registers(queue));
    }
    driver.set(0x70, 15);
    driver.run();
    let mut guest = Guest { driver, connector, next_buffer: 0 };
    guest.offer(4);
    guest.receive_one(Op::Request);
    // A reset of the driver after that ends the connection.
    guest.driver.set(0x70, 0);
    guest.driver.run();
    assert!(is_closed(&mut ours));
}

#[test]
fn without_receive_buffers_nothing_is_lost_and_nothing_spins() {
    let (mut guest, mut host) = Guest::new(0);
    guest.send(header(Op::Request), &[]);
    host.write_all(b"patience").unwrap();
    // `run` fails when the loop does not come to rest.
    guest.driver.run();
    guest.offer(1);
    assert_eq!(guest.receive_some()[0].0.op, Some(Op::Response));
    drop(host);
    guest.driver.run();
    guest.offer(1);
    assert_eq!(guest.receive_some()[0].1, b"patience");
    guest.offer(1);
    assert_eq!(guest.receive_some()[0].0.flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
}

#[test]
fn a_receive_buffer_without_room_stops_the_device() {
    for length in [10, HEADER_SIZE as u32] {
        let (mut guest, mut host) = Guest::new(1);
        guest.connect();
        guest.driver.run();
        host.write_all(b"x").unwrap();
        // The one sound buffer is offered again already; use it up.
        assert_eq!(guest.receive_some()[0].1, b"x");
        guest.driver.add(TO_GUEST, &[writable(BUFFERS, length)]);
        guest.driver.kick(TO_GUEST);
        host.write_all(b"y").unwrap();
        guest.driver.run();
        assert!(guest.driver.needs_reset(), "{length}");
    }
}

#[test]
fn random_packets_never_hurt() {
    let mut nonsense = Nonsense(0x5851_f42d_4c95_7f2d);
    for _ in 0..30 {
        let (mut guest, mut host) = Guest::new(64);
        host.set_nonblocking(true).unwrap();
        let mut streams = Vec::new();
        for _ in 0..500 {
            match nonsense.below(20) {
                0 if streams.len() < 20 => {
                    let (ours, theirs) = UnixStream::pair().unwrap();
                    ours.set_nonblocking(true).unwrap();
                    guest.connector.connect(nonsense.below(3) as u32, theirs.into()).unwrap();
                    streams.push(ours);
                }
                1 => drop(streams.pop()),
                2 => {
                    let _full = host.write(&[0; 100]);
                    let _empty = host.read(&mut [0; 5000]);
                }
                3 => {
                    for stream in &mut streams {
                        let _full = stream.write(&[0; 3000]);
                        let _empty = stream.read(&mut [0; 30_000]);
                    }
                }
                4 => drop(guest.receive()),
                _ => {}
            }
            let data = vec![0; nonsense.below(5000) as usize];
            let header = random_header(&mut nonsense, data.len() as u32);
            guest.send(header, &data);
            assert!(!guest.driver.needs_reset());
        }
        guest.receive();
        // Whatever became of the connections, the device still answers.
        guest.send(Header { source_port: 777, destination_port: 1, ..header(Op::ReadWrite) }, &[]);
        let packets = guest.receive();
        assert!(packets.iter().any(|(header, _)| header.destination_port == 777), "{packets:?}");
    }
}
