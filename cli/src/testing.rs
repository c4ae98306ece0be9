//! What the tests share.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::TempDir;

/// A directory that is removed again.
#[derive(Debug)]
pub(crate) struct Directory(TempDir);

impl Directory {
    /// Makes it.
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file in it.
    pub(crate) fn write(&self, place: &str, content: impl AsRef<[u8]>) {
        let path = self.0.path().join(place);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
    }

    /// Writes a program in it.
    pub(crate) fn write_program(&self, place: &str, content: impl AsRef<[u8]>) {
        self.write(place, content);
        fs::set_permissions(self.0.path().join(place), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Every file and directory in it.
    pub(crate) fn list(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut pending = vec![self.0.path().to_owned()];
        while let Some(directory) = pending.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                found.push(path.strip_prefix(self.0.path()).unwrap().display().to_string());
                if path.is_dir() {
                    pending.push(path);
                }
            }
        }
        found.sort();
        found
    }
}
