//! The first request: which version and options of the protocol are spoken.
//!
//! Answered here because the library's own answer promises messages of a mebibyte.

use bulkhead_vmm_protocol::MAX_FUSE_MESSAGE;
use bulkhead_vmm_protocol::fuse::IN_HEADER;

use crate::reply;
use crate::tree::Session;
use bulkhead_fs::message::u32_at;

const MAJOR: u32 = 7;

/// Linux 5.11: the first with `FUSE_HANDLE_KILLPRIV_V2`.
const MINOR: u32 = 33;

/// The most data bytes in a message, and as many pages.
const MAX_DATA: u32 = 128 * 1024;
const MAX_PAGES: u16 = 32;
const _: () = assert!(MAX_DATA as usize + 4096 <= MAX_FUSE_MESSAGE);
const _: () = assert!(MAX_PAGES as u32 * 4096 == MAX_DATA);

/// Requests that the guest's kernel issues ahead of need (readahead) and may have under way, and when it slows down.
const MAX_BACKGROUND: u16 = 64;
const CONGESTION: u16 = 48;

/// The options of `enum` `FUSE_*` that are wanted in a session if offered.
fn options(session: Session) -> u32 {
    match session {
        Session::Shared => OPTIONS | AUTO_INVAL_DATA | ATOMIC_O_TRUNC,
        // There is nobody to tell that a file is opened to be truncated.
        Session::Roots => OPTIONS | NO_OPEN_SUPPORT,
    }
}

/// Those of every session.
const OPTIONS: u32 = ASYNC_READ
    | BIG_WRITES
    | DO_READDIRPLUS
    | READDIRPLUS_AUTO
    | ASYNC_DIO
    | PARALLEL_DIROPS
    | MAX_PAGES_FIELD
    | CACHE_SYMLINKS
    | SUBMOUNTS
    | HANDLE_KILLPRIV_V2;

const ASYNC_READ: u32 = 1 << 0;
const ATOMIC_O_TRUNC: u32 = 1 << 3;
const BIG_WRITES: u32 = 1 << 5;
/// Cached data goes when modification time or size turn out to have changed: files may change on the host.
const AUTO_INVAL_DATA: u32 = 1 << 12;
const DO_READDIRPLUS: u32 = 1 << 13;
const READDIRPLUS_AUTO: u32 = 1 << 14;
const ASYNC_DIO: u32 = 1 << 15;
/// Files need not be opened: `ENOSYS` says so.
const NO_OPEN_SUPPORT: u32 = 1 << 17;
const PARALLEL_DIROPS: u32 = 1 << 18;
const MAX_PAGES_FIELD: u32 = 1 << 22;
const CACHE_SYMLINKS: u32 = 1 << 23;
/// The guest may have parts of the tree as file systems of their own.
const SUBMOUNTS: u32 = 1 << 27;
/// The host clears set-id bits and file capabilities on write; saves the guest an attribute request before each one.
const HANDLE_KILLPRIV_V2: u32 = 1 << 28;

/// Answers a checked `INIT` request.
pub(crate) fn answer(session: Session, packet: &[u8], unique: u64) -> Vec<u8> {
    let field = |index: usize| u32_at(packet, IN_HEADER + 4 * index).unwrap_or(0);
    let (major, minor, max_readahead, offered) = (field(0), field(1), field(2), field(3));
    if major < MAJOR || (major == MAJOR && minor < MINOR) {
        return reply::error(unique, libc::EPROTO);
    }
    let mut body = Vec::with_capacity(64);
    body.extend(MAJOR.to_le_bytes());
    body.extend(MINOR.to_le_bytes());
    if major == MAJOR {
        body.extend(max_readahead.to_le_bytes());
        body.extend((offered & options(session)).to_le_bytes());
        body.extend(MAX_BACKGROUND.to_le_bytes());
        body.extend(CONGESTION.to_le_bytes());
        body.extend(MAX_DATA.to_le_bytes());
        // Granularity of time stamps, in nanoseconds.
        body.extend(1u32.to_le_bytes());
        body.extend(MAX_PAGES.to_le_bytes());
    }
    // A newer major version gets ours alone, and asks again.
    body.resize(64, 0);
    reply::data(unique, &body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_fs::message::u64_at;

    fn init(major: u32, minor: u32, flags: u32) -> Vec<u8> {
        let mut packet = vec![0; IN_HEADER];
        for value in [major, minor, 4096, flags] {
            packet.extend(value.to_le_bytes());
        }
        packet
    }

    #[test]
    fn only_offered_options_are_taken_and_messages_fit() {
        let reply = answer(Session::Roots, &init(7, 41, u32::MAX), 5);
        assert_eq!(reply.len(), 80);
        assert_eq!(u64_at(&reply, 8), Some(5));
        assert_eq!(u32_at(&reply, 28), Some(options(Session::Roots)));
        assert_eq!(u32_at(&reply, 36), Some(MAX_DATA));
        let reply = answer(Session::Roots, &init(7, 41, ASYNC_READ | 2), 5);
        assert_eq!(u32_at(&reply, 28), Some(ASYNC_READ));
    }

    #[test]
    fn old_versions_are_refused_and_newer_ones_told_ours() {
        assert_eq!(answer(Session::Roots, &init(7, 32, 0), 5), reply::error(5, libc::EPROTO));
        assert_eq!(answer(Session::Roots, &init(6, 99, 0), 5), reply::error(5, libc::EPROTO));
        let reply = answer(Session::Roots, &init(8, 0, u32::MAX), 5);
        assert_eq!((u32_at(&reply, 16), u32_at(&reply, 28)), (Some(7), Some(0)));
    }
}
