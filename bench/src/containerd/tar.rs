//! Writing and reading the plain POSIX tar format (ustar): directories and regular files, names of at most 100 bytes.

const BLOCK: usize = 512;
const NAME_BYTES: usize = 100;
const REGULAR: u8 = b'0';
const DIRECTORY: u8 = b'5';

/// A tar archive under construction. Every entry belongs to root and is dated at the epoch, so equal contents are equal bytes.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
}

/// A name that does not fit an entry.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the archive entry's name {0:?} is longer than {NAME_BYTES} bytes")]
pub struct NameTooLong(String);

impl Archive {
    /// Adds a directory with these permission bits.
    ///
    /// # Errors
    /// When the name does not fit.
    pub(crate) fn directory(&mut self, name: &str, mode: u32) -> Result<(), NameTooLong> {
        self.header(name, mode, DIRECTORY, 0)
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// When the name does not fit.
    pub(crate) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), NameTooLong> {
        self.header(name, mode, REGULAR, content.len())?;
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK), 0);
        Ok(())
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        // Two empty blocks end an archive.
        self.bytes.resize(self.bytes.len() + 2 * BLOCK, 0);
        self.bytes
    }

    fn header(&mut self, name: &str, mode: u32, kind: u8, size: usize) -> Result<(), NameTooLong> {
        if name.len() > NAME_BYTES {
            return Err(NameTooLong(name.to_owned()));
        }
        let mut block = [0u8; BLOCK];
        let mut put =
            |offset: usize, text: &str| block[offset..offset + text.len()].copy_from_slice(text.as_bytes());
        put(0, name);
        put(100, &format!("{mode:07o}"));
        put(108, "0000000");
        put(116, "0000000");
        put(124, &format!("{size:011o}"));
        put(136, "00000000000");
        // The checksum is taken with its own field blank.
        put(148, "        ");
        put(156, &char::from(kind).to_string());
        put(257, "ustar");
        put(263, "00");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&block);
        Ok(())
    }
}

/// An entry of an archive that is being read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Entry<'a> {
    /// A directory.
    Directory {
        /// Its path.
        name: &'a str,
    },
    /// A regular file.
    File {
        /// Its path.
        name: &'a str,
        /// What is in it.
        content: &'a [u8],
    },
}

/// The entries of an archive made by [`Archive`]; ends at the first block that is none of its headers.
pub(crate) fn entries(mut archive: &[u8]) -> impl Iterator<Item = Entry<'_>> {
    std::iter::from_fn(move || {
        let (header, rest) = archive.split_at_checked(BLOCK)?;
        let name_end = header[..NAME_BYTES].iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
        let name = std::str::from_utf8(&header[..name_end]).ok().filter(|name| !name.is_empty())?;
        let size = usize::from_str_radix(std::str::from_utf8(&header[124..135]).ok()?, 8).ok()?;
        let content = rest.get(..size)?;
        archive = rest.get(size.next_multiple_of(BLOCK)..)?;
        match header[156] {
            DIRECTORY => Some(Entry::Directory { name }),
            REGULAR => Some(Entry::File { name, content }),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::default();
        archive.directory("dir/", 0o755).unwrap();
        archive.file("dir/a", 0o644, &[b'x'; 700]).unwrap();
        archive.file("empty", 0o755, b"").unwrap();
        archive.finish()
    }

    #[test]
    fn what_was_written_is_read() {
        let bytes = sample();
        let read: Vec<Entry> = entries(&bytes).collect();
        assert_eq!(
            read,
            [
                Entry::Directory { name: "dir/" },
                Entry::File { name: "dir/a", content: &[b'x'; 700] },
                Entry::File { name: "empty", content: b"" },
            ]
        );
    }

    #[test]
    fn tar_itself_understands_it() {
        let mut tar = Command::new("tar")
            .args(["-t", "-v", "--numeric-owner", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        tar.stdin.take().unwrap().write_all(&sample()).unwrap();
        let output = tar.wait_with_output().unwrap();
        assert!(output.status.success());
        let listing = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = listing.lines().collect();
        assert_eq!(lines.len(), 3, "{listing}");
        assert!(lines[0].starts_with("drwxr-xr-x 0/0"), "{listing}");
        assert!(lines[1].starts_with("-rw-r--r-- 0/0") && lines[1].contains(" 700 "), "{listing}");
        assert!(lines[2].starts_with("-rwxr-xr-x 0/0") && lines[2].ends_with("empty"), "{listing}");
    }

    #[test]
    fn long_names_are_refused() {
        let name = "n".repeat(101);
        assert_eq!(Archive::default().file(&name, 0o644, b""), Err(NameTooLong(name)));
    }

    #[test]
    fn truncated_archives_end_early() {
        let bytes = sample();
        assert_eq!(entries(&bytes[..700]).count(), 1);
        assert_eq!(entries(&bytes[..100]).count(), 0);
        assert_eq!(entries(&[0; 1024]).count(), 0);
    }
}
