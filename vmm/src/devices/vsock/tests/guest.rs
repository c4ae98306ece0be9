//! A guest that speaks packets.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::super::connection::BUFFER_SIZE;
use super::super::packet::{HEADER_SIZE, Header, Op};
use super::super::{Vsock, VsockConnector};
use crate::devices::testing::{BUFFERS, Nonsense, TestDriver, readable, writable};

pub(super) const CID: u32 = 42;
pub(super) const PORT: u32 = 1024;
pub(super) const TO_GUEST: usize = 0;
pub(super) const FROM_GUEST: usize = 1;
/// Bytes of a receive buffer, and of the guest's receive window.
pub(super) const RECEIVE: u32 = 4096;
pub(super) const WINDOW: u32 = 256 * 1024;
/// Where packets to the host are put together.
pub(super) const OUTGOING: u64 = BUFFERS + 0x10_0000;

pub(super) struct Guest {
    pub(super) driver: TestDriver,
    pub(super) connector: VsockConnector,
    /// Where the receive buffer of each head is.
    pub(super) next_buffer: u64,
}

impl Guest {
    /// A guest with `buffers` receive buffers, which may connect to `PORT`, and the host's end of that.
    pub(super) fn new(buffers: usize) -> (Self, UnixStream) {
        Self::with_patience(buffers, Duration::from_secs(10))
    }

    pub(super) fn with_patience(buffers: usize, patience: Duration) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut device, connector) = Vsock::new(CID, vec![(PORT, theirs.into())]).unwrap();
        device.patience = patience;
        let driver = TestDriver::activated(Box::new(device), 0);
        let mut guest = Guest { driver, connector, next_buffer: 0 };
        guest.offer(buffers);
        ours.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        (guest, ours)
    }

    /// Makes receive buffers available.
    pub(super) fn offer(&mut self, count: usize) {
        for _ in 0..count {
            // Descriptor `n` of the test driver comes around after 128, and its buffer with it.
            let address = BUFFERS + u64::from(RECEIVE) * (self.next_buffer % 128);
            self.next_buffer += 1;
            self.driver.add(TO_GUEST, &[writable(address, RECEIVE)]);
        }
        self.driver.kick(TO_GUEST);
    }

    /// Sends a packet as it is.
    pub(super) fn send_raw(&mut self, header: &[u8], data: &[u8]) {
        self.driver.write_bytes(OUTGOING, header);
        self.driver.write_bytes(OUTGOING + 64, data);
        let mut buffers = vec![readable(OUTGOING, header.len() as u32)];
        if !data.is_empty() {
            buffers.push(readable(OUTGOING + 64, data.len() as u32));
        }
        assert_eq!(self.driver.request(FROM_GUEST, &buffers), Some(0));
    }

    pub(super) fn send(&mut self, header: Header, data: &[u8]) {
        self.send_raw(&header.to_bytes(), data);
    }

    /// All packets that came since the last call. Their buffers are offered again.
    pub(super) fn receive(&mut self) -> Vec<(Header, Vec<u8>)> {
        let packets = self.receive_some();
        self.offer(packets.len());
        packets
    }

    /// All packets that came; their buffers are not offered again.
    pub(super) fn receive_some(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.driver.run();
        let mut packets = Vec::new();
        while let Some((head, length)) = self.driver.take_used(TO_GUEST) {
            let bytes =
                self.driver.read_bytes(BUFFERS + u64::from(RECEIVE) * u64::from(head), length as usize);
            let header = Header::parse(bytes[..HEADER_SIZE].try_into().unwrap());
            assert_eq!(header.length as usize, bytes.len() - HEADER_SIZE);
            packets.push((header, bytes[HEADER_SIZE..].to_vec()));
        }
        packets
    }

    /// The one packet that came, which must be without data.
    pub(super) fn receive_one(&mut self, op: Op) -> Header {
        let packets = self.receive();
        assert_eq!(packets.len(), 1, "{packets:?}");
        assert_eq!(packets[0].0.op, Some(op), "{packets:?}");
        packets[0].0
    }

    /// All bytes that come out of the host's end until its end of file, while the device runs.
    pub(super) fn read_to_end(&mut self, host: &mut UnixStream) -> Vec<u8> {
        let mut all = Vec::new();
        let mut chunk = [0; 65536];
        self.wait(|_| {
            let length = host.read(&mut chunk).unwrap();
            all.extend(&chunk[..length]);
            length == 0
        });
        all
    }

    /// Opens the connection from port 5000 to `PORT`.
    pub(super) fn connect(&mut self) {
        self.send(header(Op::Request), &[]);
        let response = self.receive_one(Op::Response);
        assert_eq!((response.source_cid, response.destination_cid), (2, CID.into()));
        assert_eq!((response.source_port, response.destination_port), (PORT, 5000));
        assert_eq!(response.buffer_size, BUFFER_SIZE);
    }

    /// Sends until the host's end takes no more and some of it waits for it; gives the number of bytes.
    pub(super) fn fill_stream(&mut self) -> u32 {
        let (mut sent, mut consumed) = (0, 0);
        while sent - consumed < BUFFER_SIZE / 2 {
            self.send(data_header(4096), &[9; 4096]);
            sent += 4096;
            self.send(header(Op::CreditRequest), &[]);
            consumed = self.receive().last().map_or(consumed, |(header, _)| header.consumed);
        }
        sent
    }

    pub(super) fn wait(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let end = std::time::Instant::now() + Duration::from_secs(5);
        while !done(self) {
            assert!(std::time::Instant::now() < end, "it does not happen");
            std::thread::sleep(Duration::from_millis(2));
            self.driver.run();
        }
    }
}

/// A header of the connection from port 5000 to `PORT`.
pub(super) fn header(op: Op) -> Header {
    Header {
        source_cid: CID.into(),
        destination_cid: 2,
        source_port: 5000,
        destination_port: PORT,
        length: 0,
        op: Some(op),
        flags: 0,
        buffer_size: WINDOW,
        consumed: 0,
    }
}

pub(super) fn data_header(length: usize) -> Header {
    Header { length: length as u32, ..header(Op::ReadWrite) }
}

pub(super) fn shutdown(flags: u32) -> Header {
    Header { flags, ..header(Op::Shutdown) }
}

pub(super) fn is_closed(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let closed = matches!(stream.read(&mut [0]), Ok(0));
    stream.set_nonblocking(false).unwrap();
    closed
}

pub(super) fn random_header(nonsense: &mut Nonsense, length: u32) -> Header {
    let any = |nonsense: &mut Nonsense, likely: &[u32]| match nonsense.below(8) {
        0 => nonsense.next() as u32,
        _ => likely[nonsense.below(likely.len() as u64) as usize],
    };
    Header {
        source_cid: any(nonsense, &[CID, CID, CID, 2]).into(),
        destination_cid: any(nonsense, &[2, 2, 2, CID]).into(),
        source_port: any(nonsense, &[0, 1, 2, 5000]),
        destination_port: any(nonsense, &[PORT, 1 << 30, (1 << 30) + 1, (1 << 30) + 2]),
        length,
        op: (nonsense.below(20) != 0).then(|| Op::ALL[nonsense.below(7) as usize]),
        flags: any(nonsense, &[0, 1, 2, 3]),
        buffer_size: any(nonsense, &[0, 4096, WINDOW, u32::MAX]),
        consumed: any(nonsense, &[0, 100, 5000]),
    }
}
