//! What the image has in it besides the workload's binary.

use crate::containerd::tar::{Archive, NameTooLong};

/// The workload's binary.
pub(crate) const PROGRAM: &str = "/bin/workload";
/// The root of a tree of [`TREE_DIRECTORIES`] times [`TREE_FILES`] small files, to be walked.
pub(crate) const TREE: &str = "/tree";
/// Directories in the tree.
pub(crate) const TREE_DIRECTORIES: usize = 20;
/// Files in each of its directories.
pub(crate) const TREE_FILES: usize = 20;
/// An archive of [`ARCHIVE_FILES`] files of [`ARCHIVE_FILE_BYTES`] bytes each, to be unpacked.
pub(crate) const ARCHIVE: &str = "/files.tar";
/// Files in the archive.
pub(crate) const ARCHIVE_FILES: usize = 200;
/// Bytes of each.
pub(crate) const ARCHIVE_FILE_BYTES: usize = 4096;
/// What the workload says on the console as a virtual machine's init.
pub(crate) const INIT_READY: &[u8] = b"workload: init is ready";
/// The workload's output ends with this.
pub(crate) const END_MARK: &[u8] = b"end\n";

const TREE_FILE_BYTES: usize = 64;

/// Adds the tree to the image's layer.
///
/// # Errors
/// Never, as long as its names are short.
pub(crate) fn add_tree(layer: &mut Archive) -> Result<(), NameTooLong> {
    let root = TREE.trim_start_matches('/');
    layer.directory(&format!("{root}/"), 0o755)?;
    for directory in 0..TREE_DIRECTORIES {
        layer.directory(&format!("{root}/d{directory}/"), 0o755)?;
        for file in 0..TREE_FILES {
            layer.file(&format!("{root}/d{directory}/f{file}"), 0o644, &[b'.'; TREE_FILE_BYTES])?;
        }
    }
    Ok(())
}

/// The content of [`ARCHIVE`].
///
/// # Errors
/// Never, as long as its names are short.
pub(crate) fn archive() -> Result<Vec<u8>, NameTooLong> {
    let mut archive = Archive::default();
    archive.directory("unpacked/", 0o755)?;
    for file in 0..ARCHIVE_FILES {
        archive.file(&format!("unpacked/f{file}"), 0o644, &[b'a'; ARCHIVE_FILE_BYTES])?;
    }
    Ok(archive.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containerd::tar::{Entry, entries};

    #[test]
    fn the_image_has_the_promised_files() {
        let mut layer = Archive::default();
        add_tree(&mut layer).unwrap();
        let layer = layer.finish();
        let files = entries(&layer).filter(|entry| matches!(entry, Entry::File { .. })).count();
        assert_eq!(files, TREE_DIRECTORIES * TREE_FILES);
        assert_eq!(entries(&archive().unwrap()).count(), 1 + ARCHIVE_FILES);
    }
}
