//! Taking an installation away again.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bulkhead_shim::host::pin::{self, NamespaceError};

use super::files::{self, FileError};
use super::record::{Record, RecordError};
use super::{InstallError, Options, restart};
use crate::pods;

/// What keeps an installation from being removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UninstallError {
    /// There is nothing.
    #[error("bulkhead install has installed nothing under {0}")]
    Nothing(PathBuf),
    /// Pods need what is installed to be ended.
    #[error(
        "{count} pods run on this node; delete them first, or give --force and see to their ends by hand: {pods}"
    )]
    Pods {
        /// How many.
        count: usize,
        /// Which.
        pods: String,
    },
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// What pods start from.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// containerd could not be told.
    #[error(transparent)]
    Restart(#[from] InstallError),
    /// Nothing can be printed.
    #[error("can't write to standard output")]
    Output(#[from] io::Error),
}

/// Removes what `bulkhead install` put under a prefix, as far as nobody has changed it since.
///
/// # Errors
/// When nothing was installed, pods run, or something can't be removed.
pub(crate) fn uninstall(options: &Options, force: bool, out: &mut impl Write) -> Result<(), UninstallError> {
    let path = options.record_path();
    let place = options.place(&path);
    let record = Record::load(&place)?.ok_or_else(|| UninstallError::Nothing(options.prefix.clone()))?;
    if options.root == Path::new("/") && !force {
        let running = pods::running();
        if !running.is_empty() {
            let pods = running.iter().map(|pod| pod.id.as_str()).collect::<Vec<_>>().join(", ");
            return Err(UninstallError::Pods { count: running.len(), pods });
        }
    }
    let would = if options.dry_run { "would remove" } else { "removed" };
    if options.can_run() {
        remove_templates(options, &record, would, out)?;
    }
    // First of all: no new pod is to find half of the rest.
    let drop_in = options.drop_in();
    let mut unregistered = false;
    let others = record.files.keys().filter(|file| **file != drop_in);
    for file in record.files.keys().filter(|file| **file == drop_in).chain(others) {
        let place = options.place(file);
        match files::present(&place)? {
            None => {}
            Some(digest) if record.has(file, &digest) => {
                remove(options, &place, |place| fs::remove_file(place))?;
                unregistered |= *file == drop_in && !options.dry_run;
                writeln!(out, "{would} {}", file.display())?;
            }
            Some(_) => writeln!(out, "left {}: it has been changed since", file.display())?,
        }
    }
    remove(options, &place, |place| fs::remove_file(place))?;
    for directory in record.directories.iter().rev() {
        // What others have put there stays, and so does the directory.
        if !options.dry_run && fs::remove_dir(options.place(directory)).is_ok() {
            writeln!(out, "{would} {}", directory.display())?;
        }
    }
    if options.root == Path::new("/") && !options.dry_run && pin::release()? {
        writeln!(out, "removed the namespaces that pods started from")?;
    }
    Ok(restart(options, unregistered, out)?)
}

fn remove(
    options: &Options,
    place: &Path,
    remove: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<(), FileError> {
    if options.dry_run {
        return Ok(());
    }
    remove(place).map_err(|source| FileError::Remove { path: place.to_owned(), source })
}

fn remove_templates(options: &Options, record: &Record, would: &str, out: &mut impl Write) -> io::Result<()> {
    for key in &record.templates {
        if !options.dry_run {
            let program = options.prefix.join("bin/bulkhead");
            // One that is gone already is as good.
            let _ = options.command(&program).args(["template", "remove", key]).output();
        }
        writeln!(out, "{would} template {key}")?;
    }
    Ok(())
}
