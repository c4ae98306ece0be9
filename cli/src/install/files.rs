//! The files of an installation.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use bulkhead_base::parts;
use sha2::{Digest, Sha256};

use super::Options;

/// What is installed under a prefix, and the mode it has there.
const PARTS: [(&str, u32); 6] = [
    (parts::SHIM, 0o755),
    (parts::COMMAND, 0o755),
    (parts::VMM, 0o755),
    (parts::FS_SERVER, 0o755),
    (parts::KERNEL, 0o644),
    (parts::IMAGE, 0o644),
];

/// A file that can't be read or put where it belongs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    /// Not every part is there.
    #[error(
        "{0} is missing: --from names a directory with bin, libexec/bulkhead and share/bulkhead, as make install leaves it"
    )]
    Missing(PathBuf),
    /// It can't be read.
    #[error("can't read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It can't be written.
    #[error("can't write {path}")]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It can't be removed.
    #[error("can't remove {path}")]
    Remove {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What a part consists of.
#[derive(Debug)]
enum Content {
    Copy(PathBuf),
    Text(Vec<u8>),
}

/// One file to be installed.
#[derive(Debug)]
pub(super) struct Part {
    /// Where it goes, as the installed system sees it.
    pub path: PathBuf,
    /// The same as seen from here.
    place: PathBuf,
    mode: u32,
    content: Content,
}

/// What is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing.
    New,
    /// Something else.
    Changed,
    /// The same.
    Same,
}

impl State {
    /// For what has been done.
    pub(super) fn done(self) -> &'static str {
        match self {
            Self::New => "installed",
            Self::Changed => "replaced",
            Self::Same => "unchanged",
        }
    }

    /// For what would be done.
    pub(super) fn would(self) -> &'static str {
        match self {
            Self::New => "would install",
            Self::Changed => "would replace",
            Self::Same => "unchanged",
        }
    }

    /// Whether there is nothing to do.
    pub(super) fn is_same(self) -> bool {
        self == Self::Same
    }
}

/// The parts that come from another prefix.
///
/// # Errors
/// When one is not there.
pub(super) fn parts(from: &Path, options: &Options) -> Result<Vec<Part>, FileError> {
    PARTS
        .iter()
        .map(|(name, mode)| {
            let source = from.join(name);
            if !source.is_file() {
                return Err(FileError::Missing(source));
            }
            let path = options.prefix.join(name);
            let place = options.place(&path);
            Ok(Part { path, place, mode: *mode, content: Content::Copy(source) })
        })
        .collect()
}

impl Part {
    /// A part whose content is made here.
    pub(super) fn written(options: &Options, path: PathBuf, text: Vec<u8>) -> Self {
        let place = options.place(&path);
        Self { path, place, mode: 0o644, content: Content::Text(text) }
    }

    /// The digest of what is to be there.
    ///
    /// # Errors
    /// When that can't be read.
    pub(super) fn digest(&self) -> Result<String, FileError> {
        match &self.content {
            Content::Copy(source) => digest(source),
            Content::Text(text) => Ok(hex(&Sha256::digest(text))),
        }
    }

    /// The digest of what is there now.
    ///
    /// # Errors
    /// When that can't be read.
    pub(super) fn present(&self) -> Result<Option<String>, FileError> {
        present(&self.place)
    }

    /// What there is to do.
    ///
    /// # Errors
    /// When what is there, or is to be, can't be read.
    pub(super) fn state(&self) -> Result<State, FileError> {
        let Some(present) = self.present()? else { return Ok(State::New) };
        let metadata = fs::metadata(&self.place)
            .map_err(|source| FileError::Read { path: self.place.clone(), source })?;
        let same = present == self.digest()? && metadata.permissions().mode() & 0o7777 == self.mode;
        Ok(if same { State::Same } else { State::Changed })
    }

    /// Puts it there, at once or not at all: programs that run keep what they were started from.
    ///
    /// # Errors
    /// When it can't be written.
    pub(super) fn put(&self) -> Result<(), FileError> {
        let failed = |source| FileError::Write { path: self.place.clone(), source };
        if let Some(directory) = self.place.parent() {
            fs::create_dir_all(directory).map_err(failed)?;
        }
        let mut name = self.place.file_name().unwrap_or_default().to_owned();
        name.push(".bulkhead-new");
        let new = self.place.with_file_name(name);
        let written = self.write(&new).and_then(|()| fs::rename(&new, &self.place));
        written.map_err(|source| {
            let _ = fs::remove_file(&new);
            failed(source)
        })
    }

    fn write(&self, new: &Path) -> io::Result<()> {
        let mut file = File::create(new)?;
        match &self.content {
            Content::Copy(source) => {
                io::copy(&mut File::open(source)?, &mut file)?;
            }
            Content::Text(text) => file.write_all(text)?,
        }
        file.set_permissions(Permissions::from_mode(self.mode))?;
        file.sync_all()
    }
}

/// The digest of a file; `None` if there is none.
///
/// # Errors
/// When it can't be read.
pub(super) fn present(place: &Path) -> Result<Option<String>, FileError> {
    match digest(place) {
        Ok(digest) => Ok(Some(digest)),
        Err(FileError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn digest(path: &Path) -> Result<String, FileError> {
    let read = || {
        let mut file = File::open(path)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hex(&hash.finalize())),
                length => hash.update(buffer.get(..length).unwrap_or_default()),
            }
        }
    };
    read().map_err(|source| FileError::Read { path: path.to_owned(), source })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
