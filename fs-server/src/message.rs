//! Checking FUSE requests before anything interprets them.
//!
//! A request is bytes of the guest's choosing. [`check`] looks at the header and at the shape that its opcode
//! prescribes (the kernel's `include/uapi/linux/fuse.h`): lengths that agree, names that are one path component, values
//! within limits. What passes can't surprise the FUSE library or the file system calls behind it.

use std::ffi::CStr;
use std::num::TryFromIntError;

use bulkhead_vmm_protocol::fuse::{IN_HEADER, is_silent, opcode};

/// The longest name of a directory entry or extended attribute (`NAME_MAX`, `XATTR_NAME_MAX`).
const MAX_NAME: usize = 255;

/// The longest target of a symbolic link, without its NUL (`PATH_MAX - 1`).
const MAX_LINK_TARGET: usize = 4095;

/// The largest value of an extended attribute (`XATTR_SIZE_MAX`).
const MAX_XATTR_VALUE: usize = 64 * 1024;

/// What stands for the name of a file that has none, in a `TMPFILE` request; no name is like it.
pub const NAMELESS: &CStr = c"/";

/// The header of a request that has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What is asked for; see [`opcode`].
    pub opcode: u32,
    /// Which request this is: the reply carries the same number.
    pub unique: u64,
    /// The inode it is about.
    pub node: u64,
    /// The guest's user on whose behalf it is.
    pub uid: u32,
}

/// What to do with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Sound: carry it out.
    Serve(Header),
    /// Answer with this error number.
    Refuse {
        /// The `unique` of the request.
        unique: u64,
        /// A positive errno.
        errno: i32,
    },
    /// Nothing that could be answered.
    Drop,
}

/// What follows the header of a request.
enum Shape {
    /// Exactly so many bytes.
    Fixed(usize),
    /// That many bytes, then that many names, each ended by NUL.
    Names(usize, usize),
    /// `struct fuse_create_in` and [`NAMELESS`].
    Nameless,
    /// A name, then the target of a symbolic link.
    NameAndTarget,
    /// `struct fuse_mknod_in` and a name.
    Node,
    /// That many bytes, then the name of an extended attribute.
    XattrName(usize),
    /// `struct fuse_setxattr_in`, name and value.
    XattrNameAndValue,
    /// `struct fuse_write_in` and data.
    Data,
    /// `struct fuse_init_in`, in its short or extended form.
    Init,
    /// `struct fuse_batch_forget_in` and its items.
    Forgets,
}

fn shape(opcode: u32) -> Option<Shape> {
    Some(match opcode {
        opcode::LOOKUP | opcode::UNLINK | opcode::RMDIR => Shape::Names(0, 1),
        opcode::MKDIR | opcode::LINK => Shape::Names(8, 1),
        opcode::CREATE => Shape::Names(16, 1),
        opcode::TMPFILE => Shape::Nameless,
        opcode::RENAME => Shape::Names(8, 2),
        opcode::RENAME2 => Shape::Names(16, 2),
        opcode::MKNOD => Shape::Node,
        opcode::SYMLINK => Shape::NameAndTarget,
        opcode::READLINK | opcode::STATFS | opcode::DESTROY => Shape::Fixed(0),
        opcode::FORGET
        | opcode::OPEN
        | opcode::OPENDIR
        | opcode::LISTXATTR
        | opcode::ACCESS
        | opcode::INTERRUPT => Shape::Fixed(8),
        opcode::GETATTR | opcode::FSYNC | opcode::FSYNCDIR => Shape::Fixed(16),
        opcode::RELEASE | opcode::RELEASEDIR | opcode::LSEEK => Shape::Fixed(24),
        opcode::FALLOCATE => Shape::Fixed(32),
        opcode::READ | opcode::READDIR | opcode::READDIRPLUS => Shape::Fixed(40),
        opcode::COPY_FILE_RANGE => Shape::Fixed(56),
        opcode::SETATTR => Shape::Fixed(88),
        opcode::WRITE => Shape::Data,
        opcode::SETXATTR => Shape::XattrNameAndValue,
        opcode::GETXATTR => Shape::XattrName(8),
        opcode::REMOVEXATTR => Shape::XattrName(0),
        opcode::INIT => Shape::Init,
        opcode::BATCH_FORGET => Shape::Forgets,
        // Not served, and not asked for again by the guest's kernel when told so: ioctl, poll, bmap, DAX mappings, locks
        // (it keeps those itself), syncfs (it would flush the host's whole file system), statx, and flush at
        // close: the host's file is closed right after, by the release, and a round trip at each close is dear. What
        // network file systems report only at close is lost; fsync tells.
        _ => return None,
    })
}

/// Judges one packet.
pub fn check(packet: &[u8]) -> Verdict {
    let Some(header) = header(packet) else { return Verdict::Drop };
    let result = match shape(header.opcode) {
        None => Err(libc::ENOSYS),
        Some(shape) => check_body(&shape, &packet[IN_HEADER..]),
    };
    match result {
        // Interrupting is optional, and no request here waits for anybody but the disk.
        Ok(()) if header.opcode == opcode::INTERRUPT => Verdict::Drop,
        Ok(()) => Verdict::Serve(header),
        Err(_) if is_silent(header.opcode) => Verdict::Drop,
        Err(errno) => Verdict::Refuse { unique: header.unique, errno },
    }
}

fn header(packet: &[u8]) -> Option<Header> {
    if packet.len() < IN_HEADER || usize::try_from(u32_at(packet, 0)?) != Ok(packet.len()) {
        return None;
    }
    Some(Header {
        opcode: u32_at(packet, 4)?,
        unique: u64_at(packet, 8)?,
        node: u64_at(packet, 16)?,
        uid: u32_at(packet, 24)?,
    })
}

fn check_body(shape: &Shape, body: &[u8]) -> Result<(), i32> {
    match *shape {
        Shape::Fixed(size) => exactly(body, size),
        Shape::Names(fixed, count) => {
            let mut rest = body.get(fixed..).ok_or(libc::EINVAL)?;
            for _ in 0..count {
                rest = take_name(rest)?;
            }
            exactly(rest, 0)
        }
        Shape::Nameless if body.get(16..) == Some(NAMELESS.to_bytes_with_nul()) => Ok(()),
        Shape::Nameless => Err(libc::EINVAL),
        Shape::NameAndTarget => {
            let target = take_name(body)?;
            let (target, rest) = split_at_nul(target)?;
            if target.is_empty() {
                return Err(libc::ENOENT);
            }
            if target.len() > MAX_LINK_TARGET {
                return Err(libc::ENAMETOOLONG);
            }
            exactly(rest, 0)
        }
        Shape::Node => {
            exactly(take_name(body.get(16..).ok_or(libc::EINVAL)?)?, 0)?;
            match u32_at(body, 0).ok_or(libc::EINVAL)? & libc::S_IFMT {
                0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK | libc::S_IFCHR | libc::S_IFBLK => Ok(()),
                _ => Err(libc::EINVAL),
            }
        }
        Shape::XattrName(fixed) => exactly(take_xattr_name(body.get(fixed..).ok_or(libc::EINVAL)?)?, 0),
        Shape::XattrNameAndValue => {
            let value = take_xattr_name(body.get(8..).ok_or(libc::EINVAL)?)?;
            if value.len() > MAX_XATTR_VALUE {
                return Err(libc::E2BIG);
            }
            exactly(value, length(u32_at(body, 0))?)
        }
        Shape::Data => {
            let data = body.get(40..).ok_or(libc::EINVAL)?;
            exactly(data, length(u32_at(body, 16))?)
        }
        Shape::Init => match body.len() {
            16 | 64 => Ok(()),
            _ => Err(libc::EINVAL),
        },
        Shape::Forgets => {
            let items = body.get(8..).ok_or(libc::EINVAL)?;
            let size = length(u32_at(body, 0))?.checked_mul(16).ok_or(libc::EINVAL)?;
            exactly(items, size)
        }
    }
}

fn exactly(bytes: &[u8], size: usize) -> Result<(), i32> {
    if bytes.len() == size { Ok(()) } else { Err(libc::EINVAL) }
}

fn length(field: Option<u32>) -> Result<usize, i32> {
    field.ok_or(libc::EINVAL)?.try_into().map_err(|_: TryFromIntError| libc::EINVAL)
}

/// Splits off a name of one path component; what is left is returned.
fn take_name(bytes: &[u8]) -> Result<&[u8], i32> {
    let (name, rest) = split_at_nul(bytes)?;
    match name {
        b"" | b"." | b".." => Err(libc::EINVAL),
        _ if name.contains(&b'/') => Err(libc::EINVAL),
        _ if name.len() > MAX_NAME => Err(libc::ENAMETOOLONG),
        _ => Ok(rest),
    }
}

fn take_xattr_name(bytes: &[u8]) -> Result<&[u8], i32> {
    let (name, rest) = split_at_nul(bytes)?;
    if name.is_empty() || name.len() > MAX_NAME { Err(libc::ERANGE) } else { Ok(rest) }
}

fn split_at_nul(bytes: &[u8]) -> Result<(&[u8], &[u8]), i32> {
    let end = bytes.iter().position(|&byte| byte == 0).ok_or(libc::EINVAL)?;
    Ok((&bytes[..end], &bytes[end + 1..]))
}

/// The little-endian integer at an offset.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().map(|chunk| u32::from_le_bytes(*chunk))
}

/// The little-endian integer at an offset.
pub fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes.get(offset..)?.first_chunk().map(|chunk| u64::from_le_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(opcode: u32, body: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        packet.extend(u32::try_from(IN_HEADER + body.len()).unwrap().to_le_bytes());
        packet.extend(opcode.to_le_bytes());
        packet.extend(7u64.to_le_bytes());
        packet.extend(1u64.to_le_bytes());
        packet.extend([0; 16]);
        packet.extend(body);
        packet
    }

    fn with_name(fixed: usize, name: &[u8]) -> Vec<u8> {
        let mut body = vec![0; fixed];
        body.extend(name);
        body.push(0);
        body
    }

    fn refused(opcode: u32, body: &[u8]) -> Option<i32> {
        match check(&packet(opcode, body)) {
            Verdict::Refuse { unique: 7, errno } => Some(errno),
            Verdict::Serve(_) => None,
            other => panic!("{other:?}"),
        }
    }

    /// Opcodes whose body is fixed bytes and one name.
    const NAMED: [(u32, usize); 7] = [
        (opcode::LOOKUP, 0),
        (opcode::UNLINK, 0),
        (opcode::RMDIR, 0),
        (opcode::MKDIR, 8),
        (opcode::LINK, 8),
        (opcode::CREATE, 16),
        (opcode::MKNOD, 16),
    ];

    #[test]
    fn a_sound_name_passes_everywhere() {
        for (opcode, fixed) in NAMED {
            for name in [&b"a"[..], b"..a", b"...", b" ", b"\xff\xfe", &[b'x'; 255]] {
                assert_eq!(refused(opcode, &with_name(fixed, name)), None, "{opcode} {name:?}");
            }
        }
    }

    #[test]
    fn names_that_are_not_one_component_are_refused_everywhere() {
        for (opcode, fixed) in NAMED {
            for name in [&b""[..], b".", b"..", b"/", b"a/b", b"../x", b"/etc"] {
                assert_eq!(refused(opcode, &with_name(fixed, name)), Some(libc::EINVAL), "{opcode} {name:?}");
            }
            assert_eq!(refused(opcode, &with_name(fixed, &[b'x'; 256])), Some(libc::ENAMETOOLONG));
            assert_eq!(refused(opcode, &with_name(fixed, b"a\0b")), Some(libc::EINVAL), "NUL inside");
            assert_eq!(refused(opcode, &vec![b'a'; fixed + 3]), Some(libc::EINVAL), "no NUL");
        }
    }

    #[test]
    fn a_file_without_a_name_has_none() {
        assert_eq!(refused(opcode::TMPFILE, &with_name(16, b"/")), None);
        for name in [&b""[..], b"a", b"..", b"//", b"/a"] {
            assert_eq!(refused(opcode::TMPFILE, &with_name(16, name)), Some(libc::EINVAL), "{name:?}");
        }
        assert_eq!(refused(opcode::TMPFILE, &[0; 16]), Some(libc::EINVAL));
    }

    #[test]
    fn both_names_of_a_rename_are_checked() {
        for (opcode, fixed) in [(opcode::RENAME, 8), (opcode::RENAME2, 16)] {
            let body = |old: &[u8], new: &[u8]| [with_name(fixed, old), with_name(0, new)].concat();
            assert_eq!(refused(opcode, &body(b"a", b"b")), None);
            assert_eq!(refused(opcode, &body(b"..", b"b")), Some(libc::EINVAL));
            assert_eq!(refused(opcode, &body(b"a", b"../b")), Some(libc::EINVAL));
            assert_eq!(refused(opcode, &with_name(fixed, b"a")), Some(libc::EINVAL));
            assert_eq!(refused(opcode, &[body(b"a", b"b"), vec![0]].concat()), Some(libc::EINVAL));
        }
    }

    #[test]
    fn only_what_is_a_node_is_made_as_one() {
        let body = |mode: u32| [&mode.to_le_bytes()[..], &[0; 12], b"n\0"].concat();
        for (mode, errno) in [
            (libc::S_IFREG, None),
            (libc::S_IFIFO, None),
            (libc::S_IFSOCK, None),
            (libc::S_IFCHR, None),
            (libc::S_IFBLK, None),
            (libc::S_IFDIR, Some(libc::EINVAL)),
            (libc::S_IFLNK, Some(libc::EINVAL)),
        ] {
            assert_eq!(refused(opcode::MKNOD, &body(mode | 0o644)), errno, "{mode:o}");
        }
    }

    #[test]
    fn link_targets_are_bounded_but_free() {
        let body = |target: &[u8]| [with_name(0, b"l"), with_name(0, target)].concat();
        assert_eq!(refused(opcode::SYMLINK, &body(b"../../etc/passwd")), None);
        assert_eq!(refused(opcode::SYMLINK, &body(&[b'x'; 4095])), None);
        assert_eq!(refused(opcode::SYMLINK, &body(b"")), Some(libc::ENOENT));
        assert_eq!(refused(opcode::SYMLINK, &body(&[b'x'; 4096])), Some(libc::ENAMETOOLONG));
    }

    #[test]
    fn sizes_inside_must_agree_with_the_packet() {
        let write = |size: u32, data: &[u8]| {
            let mut body = vec![0; 40];
            body[16..20].copy_from_slice(&size.to_le_bytes());
            body.extend(data);
            body
        };
        assert_eq!(refused(opcode::WRITE, &write(3, b"abc")), None);
        assert_eq!(refused(opcode::WRITE, &write(4, b"abc")), Some(libc::EINVAL));
        assert_eq!(refused(opcode::WRITE, &write(u32::MAX, b"abc")), Some(libc::EINVAL));
        assert_eq!(refused(opcode::WRITE, &[0; 39]), Some(libc::EINVAL));
        let xattr = |size: u32| [&size.to_le_bytes()[..], &[0; 4], b"user.a\0", b"value"].concat();
        assert_eq!(refused(opcode::SETXATTR, &xattr(5)), None);
        assert_eq!(refused(opcode::SETXATTR, &xattr(6)), Some(libc::EINVAL));
        let forgets = |count: u32| [&count.to_le_bytes()[..], &[0; 4], &[0; 32]].concat();
        assert!(matches!(check(&packet(opcode::BATCH_FORGET, &forgets(2))), Verdict::Serve(_)));
        for count in [0, 1, 3, u32::MAX] {
            assert_eq!(check(&packet(opcode::BATCH_FORGET, &forgets(count))), Verdict::Drop);
        }
    }

    #[test]
    fn a_header_that_lies_about_the_length_is_dropped() {
        let sound = packet(opcode::STATFS, &[]);
        assert!(matches!(check(&sound), Verdict::Serve(_)));
        for length in [0u32, 1, 39, 41, u32::MAX] {
            let mut lying = sound.clone();
            lying[..4].copy_from_slice(&length.to_le_bytes());
            assert_eq!(check(&lying), Verdict::Drop, "{length}");
        }
        for cut in 0..IN_HEADER {
            assert_eq!(check(&sound[..cut]), Verdict::Drop, "{cut}");
        }
    }

    #[test]
    fn opcodes_that_are_not_served_are_refused() {
        for opcode in [0, 7, 19, 25, 31, 32, 33, 37, 39, 40, 48, 49, 50, 52, 53, 4096, u32::MAX] {
            assert_eq!(refused(opcode, &[]), Some(libc::ENOSYS), "{opcode}");
        }
    }
}
