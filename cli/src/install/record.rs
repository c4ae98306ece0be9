//! What an installation has put where: `share/bulkhead/installed.json` under the prefix.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::files::{FileError, Part, present};
use crate::containerd::in_root;

/// The record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    /// Files, as the installed system sees them, with the digests that they may have: two while they are being replaced.
    pub files: BTreeMap<PathBuf, Vec<String>>,
    /// Directories that were not there before, outermost first.
    pub directories: Vec<PathBuf>,
    /// Keys of templates that were built.
    pub templates: Vec<String>,
}

/// The record can't be kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    /// It can't be read.
    #[error("can't read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not what we wrote.
    #[error("{path} is damaged: remove what was installed by hand")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// It can't be written.
    #[error("can't write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Record {
    /// Reads the record; `None` if there is none.
    ///
    /// # Errors
    /// When it can't be read.
    pub(super) fn load(place: &Path) -> Result<Option<Self>, RecordError> {
        match fs::read(place) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|source| RecordError::Damaged { path: place.to_owned(), source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(RecordError::Read { path: place.to_owned(), source }),
        }
    }

    /// The record while these parts are being put in place. What is there already, and was not put there by us, is not ours to
    /// take away.
    ///
    /// # Errors
    /// When a part can't be read.
    pub(super) fn with(&self, parts: &[Part]) -> Result<Self, FileError> {
        let mut record = self.clone();
        for part in parts {
            let digest = part.digest()?;
            if !record.files.contains_key(&part.path) && part.present()?.as_ref() == Some(&digest) {
                continue;
            }
            let digests = record.files.entry(part.path.clone()).or_default();
            if !digests.contains(&digest) {
                digests.push(digest);
            }
        }
        Ok(record)
    }

    /// From now on these parts are as they should be.
    ///
    /// # Errors
    /// When a part can't be read.
    pub(super) fn only(&mut self, parts: &[Part]) -> Result<(), FileError> {
        for part in parts {
            if let Some(digests) = self.files.get_mut(&part.path) {
                *digests = vec![part.digest()?];
            }
        }
        Ok(())
    }

    /// Notes the directories that are missing for the files of the record and for the record itself.
    pub(super) fn add_directories(&mut self, root: &Path, own: &Path) {
        let paths: Vec<PathBuf> = self.files.keys().cloned().chain([own.to_owned()]).collect();
        for path in paths {
            let mut missing: Vec<PathBuf> = path
                .ancestors()
                .skip(1)
                .take_while(|directory| !in_root(root, directory).exists())
                .map(Path::to_owned)
                .collect();
            missing.reverse();
            for directory in missing {
                if !self.directories.contains(&directory) {
                    self.directories.push(directory);
                }
            }
        }
    }

    /// Whether a file with this digest was put there.
    pub(super) fn has(&self, path: &Path, digest: &str) -> bool {
        self.files.get(path).is_some_and(|digests| digests.iter().any(|known| known == digest))
    }

    /// Which files are no longer what was put there, as the installed system sees them.
    ///
    /// # Errors
    /// When one can't be read.
    pub(super) fn altered(&self, root: &Path) -> Result<Vec<PathBuf>, FileError> {
        let mut altered = Vec::new();
        for path in self.files.keys() {
            let present = present(&in_root(root, path))?;
            if !present.is_some_and(|digest| self.has(path, &digest)) {
                altered.push(path.clone());
            }
        }
        Ok(altered)
    }

    /// Writes the record, at once or not at all.
    ///
    /// # Errors
    /// When it can't be written.
    pub(super) fn save(&self, place: &Path) -> Result<(), RecordError> {
        let write = || {
            if let Some(directory) = place.parent() {
                fs::create_dir_all(directory)?;
            }
            let new = place.with_extension("new");
            let mut file = fs::File::create(&new)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            fs::rename(&new, place)
        };
        write().map_err(|source| RecordError::Write { path: place.to_owned(), source })
    }
}
