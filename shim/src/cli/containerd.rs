//! Which containerd runs us, as far as the answer to `start` depends on it.
//!
//! Up to 1.7, containerd knows version 2 of the Task API only; from 2.0 on it knows version 3, with which one shim serves
//! a pod without being started again for each container. Nothing that containerd passes along tells the two apart. Its
//! own program does: the build information that every Go program carries names its modules.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Names the second major version of containerd's module.
const V2_MODULE: &[u8] = b"github.com/containerd/containerd/v2";

const SECTION: &[u8] = b".go.buildinfo\0";

/// More than any program's build information.
const MAX_SECTION: u64 = 256 * 1024;

/// Whether the program at `path` is a containerd 2.0 or later. When it can't be told it counts as older, since later
/// ones understand version 2 too.
pub fn is_version_2(path: &Path) -> bool {
    match build_info(path) {
        Ok(info) => info.windows(V2_MODULE.len()).any(|window| window == V2_MODULE),
        Err(_) => false,
    }
}

/// The section with the build information of a Go program: an ELF file of 64 bits, little endian.
fn build_info(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let malformed = || io::Error::from(io::ErrorKind::InvalidData);
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)?;
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return Err(malformed());
    }
    let field = |bytes: &[u8], at: usize, length: usize| -> u64 {
        bytes[at..at + length].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
    };
    let (table, entry_size, count, names_index) =
        (field(&header, 40, 8), field(&header, 58, 2), field(&header, 60, 2), field(&header, 62, 2));
    if entry_size != 64 || names_index >= count {
        return Err(malformed());
    }
    let mut entries = vec![0; (count * entry_size) as usize];
    file.read_exact_at(&mut entries, table)?;
    let entry = |index: u64| &entries[(index * 64) as usize..(index * 64 + 64) as usize];
    let read = |entry: &[u8]| -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; field(entry, 32, 8).min(MAX_SECTION) as usize];
        file.read_exact_at(&mut bytes, field(entry, 24, 8))?;
        Ok(bytes)
    };
    let names = read(entry(names_index))?;
    for index in 0..count {
        let name = field(entry(index), 0, 4) as usize;
        if names.get(name..).is_some_and(|name| name.starts_with(SECTION)) {
            return read(entry(index));
        }
    }
    Err(malformed())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with two sections: names, and build information that says `info`.
    fn program(info: &[u8]) -> tempfile::NamedTempFile {
        let names = b"\0.go.buildinfo\0";
        let (names_at, info_at, table_at) =
            (64u64, 64 + names.len() as u64, 64 + (names.len() + info.len()) as u64);
        let mut bytes = vec![0; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[40..48].copy_from_slice(&table_at.to_le_bytes());
        bytes[58..64].copy_from_slice(&[64, 0, 2, 0, 0, 0]);
        bytes.extend(names);
        bytes.extend(info);
        for (section_name, offset, size) in [(0u32, names_at, names.len()), (1, info_at, info.len())] {
            let mut entry = [0; 64];
            entry[..4].copy_from_slice(&section_name.to_le_bytes());
            entry[24..32].copy_from_slice(&offset.to_le_bytes());
            entry[32..40].copy_from_slice(&(size as u64).to_le_bytes());
            bytes.extend(entry);
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    #[test]
    fn the_major_version_is_read_from_the_program() {
        let cases: [(&str, &[u8], bool); 2] = [
            (
                "two",
                b"\xff Go buildinf:go1.24\npath\tgithub.com/containerd/containerd/v2/cmd/containerd\n",
                true,
            ),
            (
                "one",
                b"\xff Go buildinf:go1.19\npath\tgithub.com/containerd/containerd/cmd/containerd\n",
                false,
            ),
        ];
        for (name, info, expected) in cases {
            let file = program(info);
            assert_eq!(is_version_2(file.path()), expected, "{name}");
        }
    }

    #[test]
    fn other_files_count_as_old() {
        for path in ["/nonexistent", "/etc/passwd", "/proc/self/exe", "/dev/null"] {
            assert!(!is_version_2(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn a_damaged_program_is_only_an_error() {
        let file = program(b"github.com/containerd/containerd/v2");
        let path = file.path();
        let sound = std::fs::read(path).unwrap();
        for position in 0..sound.len() {
            let mut damaged = sound.clone();
            damaged[position] ^= 0xff;
            std::fs::write(path, damaged).unwrap();
            is_version_2(path);
        }
        for length in 0..sound.len() {
            std::fs::write(path, &sound[..length]).unwrap();
            is_version_2(path);
        }
    }
}
