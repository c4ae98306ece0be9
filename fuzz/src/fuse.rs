//! FUSE requests as the file server takes them: its judgement, then the library's decoding, on a file system that has nothing.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsRawFd;

use bulkhead_fs::message::{Verdict, check};
use bulkhead_vmm_protocol::fuse::{is_silent, opcode};
use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem, OpenOptions};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader};

use crate::host;

/// The most bytes of a reply.
const ROOM: usize = 1 << 16;

/// Refuses everything, and sees to the names that come through: each is one component of a path.
struct Nothing;

fn refuse<T>(names: &[&CStr]) -> io::Result<T> {
    for name in names {
        let name = name.to_bytes();
        let is_component = !matches!(name, b"" | b"." | b"..") && !name.contains(&b'/') && name.len() <= 255;
        assert!(is_component, "the name {name:?}");
    }
    Err(io::ErrorKind::NotFound.into())
}

impl FileSystem for Nothing {
    type Inode = u64;
    type Handle = u64;

    fn lookup(&self, _: &Context, _: u64, name: &CStr) -> io::Result<Entry> {
        refuse(&[name])
    }

    fn symlink(&self, _: &Context, target: &CStr, _: u64, name: &CStr) -> io::Result<Entry> {
        assert!((1..4096).contains(&target.to_bytes().len()));
        refuse(&[name])
    }

    fn mknod(&self, _: &Context, _: u64, name: &CStr, _: u32, _: u32, _: u32) -> io::Result<Entry> {
        refuse(&[name])
    }

    fn mkdir(&self, _: &Context, _: u64, name: &CStr, _: u32, _: u32) -> io::Result<Entry> {
        refuse(&[name])
    }

    fn unlink(&self, _: &Context, _: u64, name: &CStr) -> io::Result<()> {
        refuse(&[name])
    }

    fn rmdir(&self, _: &Context, _: u64, name: &CStr) -> io::Result<()> {
        refuse(&[name])
    }

    fn rename(&self, _: &Context, _: u64, old: &CStr, _: u64, new: &CStr, _: u32) -> io::Result<()> {
        refuse(&[old, new])
    }

    fn link(&self, _: &Context, _: u64, _: u64, name: &CStr) -> io::Result<Entry> {
        refuse(&[name])
    }

    fn create(
        &self,
        _: &Context,
        _: u64,
        name: &CStr,
        _: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        refuse(&[name])
    }
}

/// One packet.
pub fn run(data: &[u8]) {
    let header = match check(data) {
        Verdict::Serve(header) => header,
        Verdict::Refuse { errno, .. } => return assert!(errno > 0),
        Verdict::Drop => return,
    };
    // The server answers these itself.
    if matches!(header.opcode, opcode::INIT | opcode::COPY_FILE_RANGE) {
        return;
    }
    let (mut request, mut reply) = (data.to_vec(), vec![0; ROOM]);
    let (socket, peer) = host::packets();
    let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(&mut request)).unwrap();
    let writer = FuseDevWriter::<()>::new(socket.as_raw_fd(), &mut reply).unwrap();
    let handled = Server::new(Nothing).handle_message(reader, writer.into(), None, None);
    let answered = peer.receive();
    assert!(handled.is_ok() || answered.is_none(), "an answer and an error to opcode {}", header.opcode);
    if let Some(answer) = answered {
        assert!(!is_silent(header.opcode), "an answer to opcode {}", header.opcode);
        assert_eq!(
            answer.get(8..16),
            Some(&header.unique.to_le_bytes()[..]),
            "the answer of another request"
        );
    }
}
