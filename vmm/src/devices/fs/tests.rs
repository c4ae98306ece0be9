//! The device between a guest and a file server, either of which may be hostile.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;

use bulkhead_vmm_protocol::MAX_FUSE_MESSAGE;
use bulkhead_vmm_protocol::fuse::opcode::{
    BATCH_FORGET, FORGET, INIT, LOOKUP, READ, RELEASE, SETATTR, WRITE,
};
use bulkhead_vmm_protocol::fuse::{IN_HEADER, OUT_HEADER};
use bulkhead_vmm_protocol::loan::Loan;
use vmm_sys_util::tempfile::TempFile;

use super::FileSystem;
use super::message::ReplyHeader;
use crate::devices::testing::{BUFFERS, Buffer, Nonsense, TestDriver, readable, writable};

const FORGETS: usize = 0;
const REQUESTS: usize = 1;
/// Where replies go.
const REPLIES: u64 = BUFFERS + 0x10_0000;

/// A connected pair of packet sockets.
fn packet_sockets() -> (OwnedFd, UnixDatagram) {
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: `fds` has room for two.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) }, 0);
    // SAFETY: both were just created, nobody else owns them.
    let [one, other] = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let other = UnixDatagram::from(other);
    other.set_nonblocking(true).unwrap();
    (one, other)
}

struct Guest {
    driver: TestDriver,
    server: UnixDatagram,
}

impl Guest {
    fn new() -> Self {
        let (ours, server) = packet_sockets();
        let device = FileSystem::new("shared", ours).unwrap();
        Guest { driver: TestDriver::activated(Box::new(device), 0), server }
    }

    /// Puts a request into memory; the buffer to read it from.
    fn write_request(&self, at: u64, opcode: u32, unique: u64, body: &[u8]) -> Buffer {
        let length = (IN_HEADER + body.len()) as u32;
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(opcode.to_le_bytes());
        bytes.extend(unique.to_le_bytes());
        bytes.resize(IN_HEADER, 0);
        bytes.extend(body);
        self.driver.write_bytes(at, &bytes);
        readable(at, length)
    }

    fn request(&mut self, unique: u64, body: &[u8], room: u32) -> Option<u32> {
        let request = self.write_request(BUFFERS, LOOKUP, unique, body);
        self.driver.request(REQUESTS, &[request, writable(REPLIES, room)])
    }

    /// The next request as the server sees it: its number and body.
    fn serve(&self) -> Option<(u64, Vec<u8>)> {
        let mut bytes = vec![0; MAX_FUSE_MESSAGE + 1];
        let length = self.server.recv(&mut bytes).ok().filter(|length| *length > 0)?;
        bytes.truncate(length);
        assert_eq!(u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize, length);
        Some((u64::from_le_bytes(bytes[8..16].try_into().unwrap()), bytes.split_off(IN_HEADER)))
    }

    fn reply(&mut self, unique: u64, body: &[u8]) {
        let header = ReplyHeader { length: (OUT_HEADER + body.len()) as u32, error: 0, unique };
        self.server.send(&[&header.to_bytes()[..], body].concat()).unwrap();
        self.driver.run();
    }

    /// The reply in memory.
    fn read_reply(&self, length: u32) -> (ReplyHeader, Vec<u8>) {
        let mut bytes = self.driver.read_bytes(REPLIES, length as usize);
        let header = ReplyHeader::parse(&bytes).unwrap();
        (header, bytes.split_off(OUT_HEADER))
    }
}

#[test]
fn the_driver_finds_the_tag() {
    let guest = Guest::new();
    let bytes: Vec<u8> = (0..10).flat_map(|word| guest.driver.get(0x100 + 4 * word).to_le_bytes()).collect();
    assert_eq!(&bytes[..7], b"shared\0");
    assert_eq!(bytes[36..], 1u32.to_le_bytes());
    for tag in ["", &"x".repeat(37)] {
        assert!(FileSystem::new(tag, packet_sockets().0).is_err());
    }
}

#[test]
fn requests_and_replies_pass_unchanged_but_for_the_number() {
    let mut guest = Guest::new();
    // In several buffers, cut at odd places.
    let body: Vec<u8> = (0..100_000u32).map(|n| (n % 253) as u8).collect();
    let whole = guest.write_request(BUFFERS, LOOKUP, 77, &body);
    let pieces = [
        readable(BUFFERS, 40),
        readable(BUFFERS + 40, 3),
        readable(BUFFERS + 43, whole.length - 43),
        writable(REPLIES, 17),
        writable(REPLIES + 17, 100_000),
    ];
    assert_eq!(guest.driver.request(REQUESTS, &pieces), None, "not answered yet");
    let (unique, received) = guest.serve().unwrap();
    assert_ne!(unique, 77);
    assert!(received == body);
    guest.reply(unique, &body[..50_000]);
    let (_, length) = guest.driver.take_used(REQUESTS).unwrap();
    assert_eq!(length as usize, OUT_HEADER + 50_000);
    let (header, received) = guest.read_reply(length);
    assert_eq!((header.unique, header.error), (77, 0));
    assert!(received == body[..50_000]);
}

#[test]
fn replies_in_any_order_find_their_requests() {
    let mut guest = Guest::new();
    let mut tags = Vec::new();
    for number in 0..20u64 {
        let request = guest.write_request(BUFFERS + 4096 * number, LOOKUP, number, &number.to_le_bytes());
        let reply = writable(REPLIES + 4096 * number, 100);
        assert_eq!(guest.driver.request(REQUESTS, &[request, reply]), None);
        tags.push(guest.serve().unwrap().0);
    }
    for number in (0..20).rev() {
        guest.reply(tags[number], &[number as u8]);
        assert!(guest.driver.take_used(REQUESTS).is_some());
        let bytes = guest.driver.read_bytes(REPLIES + 4096 * number as u64, 17);
        assert_eq!((bytes[8], bytes[16]), (number as u8, number as u8));
    }
}

#[test]
fn forgetting_needs_no_reply() {
    let mut guest = Guest::new();
    let request = guest.write_request(BUFFERS, FORGET, 5, &[1; 8]);
    assert_eq!(guest.driver.request(FORGETS, &[request]), Some(0));
    assert_eq!(guest.serve().unwrap().1, [1; 8]);
}

#[test]
fn lengths_that_lie_stop_the_device() {
    let break_it = |buffers: &dyn Fn(&Guest) -> Vec<Buffer>| {
        let mut guest = Guest::new();
        let buffers = buffers(&guest);
        assert_eq!(guest.driver.request(REQUESTS, &buffers), None);
        assert!(guest.driver.needs_reset(), "{buffers:?}");
        assert_eq!(guest.serve(), None);
    };
    let room = writable(REPLIES, 100);
    break_it(&|guest| vec![readable(guest.write_request(BUFFERS, LOOKUP, 1, &[0; 8]).address, 47), room]);
    break_it(&|guest| vec![readable(guest.write_request(BUFFERS, LOOKUP, 1, &[0; 8]).address, 49), room]);
    break_it(&|guest| vec![readable(guest.write_request(BUFFERS, LOOKUP, 1, &[]).address, 39), room]);
    break_it(&|guest| vec![guest.write_request(BUFFERS, LOOKUP, 1, &vec![0; MAX_FUSE_MESSAGE - 39]), room]);
    break_it(&|guest| vec![guest.write_request(BUFFERS, LOOKUP, 1, &[]), writable(REPLIES, 15)]);
    break_it(&|guest| vec![guest.write_request(BUFFERS, LOOKUP, 1, &[])]);
    break_it(&|_| vec![room]);
}

#[test]
fn replies_that_nothing_awaits_or_that_do_not_fit_do_no_harm() {
    let mut guest = Guest::new();
    assert_eq!(guest.request(1, &[], 20), None);
    let (tag, _) = guest.serve().unwrap();
    let ok = ReplyHeader { length: 16, error: 0, unique: tag };
    for bad in [
        ReplyHeader { unique: tag + 1, ..ok }.to_bytes().to_vec(),
        ReplyHeader { unique: tag ^ 1 << 20, ..ok }.to_bytes().to_vec(),
        ReplyHeader { unique: 1, ..ok }.to_bytes().to_vec(),
        ReplyHeader { unique: u64::MAX, ..ok }.to_bytes().to_vec(),
        ReplyHeader { length: 17, ..ok }.to_bytes().to_vec(),
        ReplyHeader { error: 5, ..ok }.to_bytes().to_vec(),
        vec![0; 15],
        vec![0; MAX_FUSE_MESSAGE + 100],
    ] {
        guest.server.send(&bad).unwrap();
        guest.driver.run();
        assert_eq!(guest.driver.take_used(REQUESTS), None, "{:?}", &bad[..15]);
    }
    guest.reply(tag, &[0; 5]);
    let (_, length) = guest.driver.take_used(REQUESTS).unwrap();
    assert_eq!(guest.read_reply(length).0, ReplyHeader::error(1, libc::EIO), "21 bytes do not fit into 20");
    guest.reply(tag, &[]);
    assert_eq!(guest.driver.take_used(REQUESTS), None, "only once");
    assert_eq!(guest.driver.read_bytes(REPLIES + 16, 5), [0; 5]);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn a_server_that_is_slow_makes_only_the_guest_wait() {
    let mut guest = Guest::new();
    let body = vec![3; 60_000];
    let mut sent = 0u64;
    for number in 0..20 {
        let request = guest.write_request(BUFFERS, LOOKUP, number, &body);
        guest.driver.add(REQUESTS, &[request, writable(REPLIES, 16)]);
        sent += 1;
    }
    guest.driver.kick(REQUESTS);
    let forget = guest.write_request(BUFFERS + 0x8_0000, FORGET, 99, &[1; 8]);
    guest.driver.add(FORGETS, &[forget]);
    guest.driver.kick(FORGETS);
    assert_eq!(guest.driver.take_used(FORGETS), None, "no room in the socket");
    let mut served = 0;
    while let Some((tag, body)) = guest.serve() {
        if body.len() == 8 {
            continue;
        }
        assert_eq!(body.len(), 60_000);
        guest.reply(tag, &[]);
        assert!(guest.driver.take_used(REQUESTS).is_some());
        served += 1;
    }
    assert_eq!(served, sent);
    assert!(guest.driver.take_used(FORGETS).is_some());
}

#[test]
fn without_a_server_every_request_fails_and_nothing_hangs() {
    let mut guest = Guest::new();
    assert_eq!(guest.request(1, &[], 100), None);
    // So much that the socket is full, and requests wait in the queues.
    let body = vec![3; 60_000];
    let mut waiting = 1;
    for number in 0..20 {
        let request = guest.write_request(BUFFERS, LOOKUP, number, &body);
        guest.driver.add(REQUESTS, &[request, writable(REPLIES, 16)]);
        waiting += 1;
    }
    guest.driver.kick(REQUESTS);
    let forget = guest.write_request(BUFFERS + 0x8_0000, FORGET, 99, &[1; 8]);
    guest.driver.add(FORGETS, &[forget]);
    guest.driver.kick(FORGETS);
    guest.server = UnixDatagram::unbound().unwrap();
    guest.driver.run();
    for _ in 0..waiting {
        let (_, length) = guest.driver.take_used(REQUESTS).unwrap();
        assert_eq!(guest.read_reply(length).0.error, -libc::EIO);
    }
    assert!(guest.driver.take_used(FORGETS).is_some());
    assert_eq!(guest.request(2, &[], 100), Some(16));
    assert_eq!(guest.read_reply(16).0, ReplyHeader::error(2, libc::EIO));
    assert!(!guest.driver.needs_reset());
}

#[test]
fn replies_from_before_a_reset_are_dropped() {
    let mut guest = Guest::new();
    assert_eq!(guest.request(1, &[], 100), None);
    let (tag, _) = guest.serve().unwrap();
    guest.driver.restart();
    guest.reply(tag, &[]);
    assert_eq!(guest.driver.take_used(REQUESTS), None);
    assert_eq!(guest.request(2, &[], 100), None);
    let (tag, _) = guest.serve().unwrap();
    guest.reply(tag, &[]);
    let (_, length) = guest.driver.take_used(REQUESTS).unwrap();
    assert_eq!(guest.read_reply(length).0.unique, 2);
}

/// The handle of the file that a test lends; its node id is 0, as in all requests here.
const HANDLE: u64 = 7;

/// `struct fuse_read_in`, or `struct fuse_write_in` with as many zeroes.
fn transfer(handle: u64, offset: u64, size: u32, flags: u32) -> Vec<u8> {
    let mut body = [handle.to_le_bytes(), offset.to_le_bytes()].concat();
    for field in [size, 0, 0, 0, flags, 0] {
        body.extend(field.to_le_bytes());
    }
    body
}

impl Guest {
    fn lend(&mut self, content: &[u8]) -> TempFile {
        let file = TempFile::new().unwrap();
        file.as_file().write_all_at(content, 0).unwrap();
        Loan { node: 0, handle: HANDLE }.send(&self.server, file.as_file().as_fd()).unwrap();
        self.driver.run();
        file
    }

    /// A request of which the reply's buffers are cut at an odd place; the reply if the device made it.
    fn ask(&mut self, opcode: u32, body: &[u8], room: u32) -> Option<(ReplyHeader, Vec<u8>)> {
        let request = self.write_request(BUFFERS, opcode, 77, body);
        let reply = [writable(REPLIES, 19), writable(REPLIES + 19, room - 3)];
        let length = self.driver.request(REQUESTS, &[request, reply[0], reply[1]])?;
        Some(self.read_reply(length))
    }
}

#[test]
fn what_is_lent_is_read_and_written_without_the_server() {
    let mut guest = Guest::new();
    let content: Vec<u8> = (0..100_000u32).map(|n| (n % 251) as u8).collect();
    let file = guest.lend(&content);
    let (header, data) = guest.ask(READ, &transfer(HANDLE, 10, 50_000, 0), 60_000).unwrap();
    assert_eq!((header.unique, header.error), (77, 0));
    assert!(data == content[10..50_010]);
    for (offset, size, room, length) in
        [(99_990, 4096, 5000, 10), (100_000, 4096, 5000, 0), (0, 4096, 100, 100), (0, u32::MAX, 4096, 4096)]
    {
        let (header, data) = guest.ask(READ, &transfer(HANDLE, offset, size, 0), room).unwrap();
        assert_eq!((header.error, data.len()), (0, length), "{offset} {size} {room}");
    }
    let body = [transfer(HANDLE, 99_998, 5, 0), b"12345".to_vec()].concat();
    let (header, written) = guest.ask(WRITE, &body, 8).unwrap();
    assert_eq!((header.error, written), (0, 5u64.to_le_bytes().to_vec()));
    let mut end = [0; 5];
    file.as_file().read_exact_at(&mut end, 99_998).unwrap();
    assert_eq!(&end, b"12345");
    let (header, _) = guest.ask(READ, &transfer(HANDLE, u64::MAX, 5, 0), 100).unwrap();
    assert_eq!(header.error, -libc::EINVAL);
    assert_eq!(guest.serve(), None, "nobody asked the server");
    assert!(!guest.driver.needs_reset());
}

#[test]
fn what_the_device_must_not_do_itself_goes_to_the_server() {
    let append = [transfer(HANDLE, 0, 1, libc::O_APPEND as u32), vec![1]].concat();
    let sync = [transfer(HANDLE, 0, 1, libc::O_DSYNC as u32), vec![1]].concat();
    let longer = [transfer(HANDLE, 0, 1, 0), vec![1; 2]].concat();
    let after = [transfer(HANDLE, 0, 1, 0), vec![1; 8]].concat();
    let whole = [transfer(HANDLE, 0, 1, 0), vec![1]].concat();
    for (opcode, body, room) in [
        (READ, &transfer(HANDLE + 1, 0, 100, 0), 100),
        (READ, &after, 100),
        (READ, &transfer(HANDLE, 0, 100, 0)[..32].to_vec(), 100),
        (WRITE, &append, 100),
        (WRITE, &sync, 100),
        (WRITE, &longer, 100),
        (WRITE, &whole, 7),
        (LOOKUP, &transfer(HANDLE, 0, 100, 0), 100),
    ] {
        let mut guest = Guest::new();
        let _file = guest.lend(b"content");
        assert_eq!(guest.ask(opcode, body, room), None, "{opcode} {body:?}");
        assert_eq!(guest.serve().unwrap().1, *body);
    }
}

#[test]
fn a_loan_ends() {
    let mode = [1u32.to_le_bytes().to_vec(), vec![0; 84]].concat();
    let times = [0x30u32.to_le_bytes().to_vec(), vec![0; 84]].concat();
    let forget = |nodes: &[u64]| {
        let items = nodes.iter().flat_map(|node| [*node, 1]).flat_map(u64::to_le_bytes);
        [0; 8].into_iter().chain(items).collect::<Vec<u8>>()
    };
    let release = |handle: u64| [handle.to_le_bytes().to_vec(), vec![0; 16]].concat();
    for (opcode, body, ends) in [
        (RELEASE, release(HANDLE), true),
        (RELEASE, release(HANDLE + 1), false),
        (SETATTR, mode, true),
        (SETATTR, times, false),
        (INIT, vec![0; 64], true),
        (FORGET, vec![0; 8], true),
        (BATCH_FORGET, forget(&[5, 0]), true),
        (BATCH_FORGET, forget(&[5, 6]), false),
    ] {
        let mut guest = Guest::new();
        let _file = guest.lend(b"content");
        let request = guest.write_request(BUFFERS, opcode, 77, &body);
        let answered = guest.driver.request(REQUESTS, &[request, writable(REPLIES, 200)]).is_some();
        assert_eq!(answered, matches!(opcode, FORGET | BATCH_FORGET));
        guest.serve().unwrap();
        let reply = writable(REPLIES + 4096, 100);
        let request = guest.write_request(BUFFERS + 4096, READ, 78, &transfer(HANDLE, 0, 7, 0));
        let served = guest.driver.request(REQUESTS, &[request, reply]).is_some();
        assert_eq!(served, !ends, "{opcode} {body:?}");
    }
    let mut guest = Guest::new();
    let _file = guest.lend(b"content");
    guest.driver.restart();
    assert_eq!(guest.ask(READ, &transfer(HANDLE, 0, 7, 0), 100), None);
}

#[test]
fn what_was_lent_to_be_read_is_written_by_the_server() {
    let mut guest = Guest::new();
    let file = guest.lend(b"content");
    let open = std::fs::File::open(file.as_path()).unwrap();
    Loan { node: 0, handle: HANDLE }.send(&guest.server, open.as_fd()).unwrap();
    guest.driver.run();
    assert!(guest.ask(READ, &transfer(HANDLE, 0, 7, 0), 100).is_some());
    let body = [transfer(HANDLE, 0, 1, 0), vec![1]].concat();
    assert_eq!(guest.ask(WRITE, &body, 100), None);
    assert_eq!(guest.serve().unwrap().1, body);
}

#[test]
fn the_oldest_loan_goes_for_another() {
    let mut guest = Guest::new();
    let file = guest.lend(b"content");
    // Of the same node, so by their handles.
    for handle in 1000..1128 {
        Loan { node: 0, handle }.send(&guest.server, file.as_file().as_fd()).unwrap();
        guest.driver.run();
    }
    assert!(guest.ask(READ, &transfer(1000, 0, 7, 0), 100).is_some());
    assert_eq!(guest.ask(READ, &transfer(HANDLE, 0, 7, 0), 100), None);
}

#[test]
fn random_requests_and_replies_never_hurt() {
    let mut nonsense = Nonsense(0x1234_5678_9abc_def1);
    for _ in 0..50 {
        let mut guest = Guest::new();
        let mut tags = vec![0];
        let mut added = 0;
        for _ in 0..200 {
            let number = nonsense.next();
            // Descriptors are reused in order: the driver keeps clear of those in flight.
            if nonsense.below(2) == 0 && added < 30 {
                added += 1;
                let body = vec![0; nonsense.below(3000) as usize];
                let request = guest.write_request(BUFFERS, nonsense.below(60) as u32, number, &body);
                let queue = nonsense.below(2) as usize;
                guest.driver.add(queue, &[request, writable(REPLIES, 16 + nonsense.below(5000) as u32)]);
                guest.driver.kick(queue);
            } else {
                let length = nonsense.below(6000) as usize;
                let mut reply = vec![0; length + 1];
                let claimed = if nonsense.below(4) == 0 { number as u32 } else { length as u32 + 1 };
                let tag = tags[nonsense.below(tags.len() as u64) as usize];
                let header = ReplyHeader { length: claimed, error: -(nonsense.below(3) as i32), unique: tag };
                for (to, from) in reply.iter_mut().zip(header.to_bytes()) {
                    *to = from;
                }
                guest.server.send(&reply).unwrap();
                guest.driver.run();
            }
            tags.extend(guest.serve().map(|(tag, _)| tag));
            while guest.driver.take_used(REQUESTS).is_some() {}
            while guest.driver.take_used(FORGETS).is_some() {}
        }
        assert!(!guest.driver.needs_reset());
    }
}
