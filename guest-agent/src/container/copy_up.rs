//! Copies the tree that a tmpfs is about to hide into it (the mount option `tmpcopyup`).

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::Path;

use crate::sys::path;

/// Deepest directory that is copied; deeper trees are an error.
const MAX_DEPTH: usize = 64;

/// Copies directories, files and symbolic links with owner and mode from `from` to `to`, both handles of directories.
///
/// Other kinds of files are left out: nothing that listens or drives a device can be copied.
pub(crate) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    if path::file_type(from)? != libc::S_IFDIR {
        return Ok(());
    }
    copy_directory(&path::proc_path(from), &path::proc_path(to), 0)
}

fn copy_directory(from: &Path, to: &Path, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::from_raw_os_error(libc::ELOOP));
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        let metadata = fs::symlink_metadata(&from)?;
        let kind = metadata.file_type();
        if kind.is_symlink() {
            symlink(fs::read_link(&from)?, &to)?;
            lchown(&to, Some(metadata.uid()), Some(metadata.gid()))?;
            continue;
        }
        if kind.is_dir() {
            fs::create_dir(&to)?;
            copy_directory(&from, &to, depth + 1)?;
        } else if kind.is_file() {
            let (mut reader, mut writer) = (File::open(&from)?, File::create_new(&to)?);
            io::copy(&mut reader, &mut writer)?;
        } else {
            continue;
        }
        chown(&to, Some(metadata.uid()), Some(metadata.gid()))?;
        fs::set_permissions(&to, Permissions::from_mode(metadata.mode() & 0o7777))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_tree_is_copied_with_its_modes_and_links() {
        let base = tempfile::tempdir().unwrap();
        let (from, to) = (base.path().join("from"), base.path().join("to"));
        fs::create_dir_all(from.join("sub")).unwrap();
        fs::create_dir_all(&to).unwrap();
        fs::write(from.join("sub/file"), "text").unwrap();
        fs::set_permissions(from.join("sub/file"), Permissions::from_mode(0o4711)).unwrap();
        symlink("sub/file", from.join("link")).unwrap();

        copy(File::open(&from).unwrap().as_fd(), File::open(&to).unwrap().as_fd()).unwrap();

        assert_eq!(fs::read_to_string(to.join("link")).unwrap(), "text");
        assert_eq!(fs::metadata(to.join("sub/file")).unwrap().mode() & 0o7777, 0o4711);
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("sub/file"));
    }
}
