//! `bulkhead install` and `bulkhead uninstall`: the parts under a prefix, a drop-in for containerd, and a template built ahead.
//!
//! Everything that is put somewhere is recorded first, with its digest, so that uninstalling takes away just that, also after
//! an installation that did not come to its end.

mod files;
mod record;
mod uninstall;

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub(crate) use uninstall::{UninstallError, uninstall};

use self::files::{FileError, Part};
use self::record::{Record, RecordError};
use crate::containerd::{self, Configuration, ContainerdError, Version, in_root};

/// Our file in the directory that containerd's configuration usually imports.
const DROP_IN: &str = "conf.d/bulkhead.toml";

/// What `bulkhead install` is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    /// The prefix that the parts come from; this program's own if there is none.
    pub from: Option<PathBuf>,
    /// Where they go.
    pub prefix: PathBuf,
    /// The root directory of the system that is installed into.
    pub root: PathBuf,
    /// containerd's main configuration file.
    pub config: PathBuf,
    /// The version of the configuration, for a system that has no such file.
    pub version: Option<Version>,
    /// Only say what would be done.
    pub dry_run: bool,
    /// Restart containerd if its configuration has changed.
    pub restart: bool,
    /// Build the template of the default size.
    pub templates: bool,
    /// Run what is to be run in the other system (`root`) there, by chroot.
    pub chroot: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            from: None,
            prefix: "/usr/local".into(),
            root: "/".into(),
            config: containerd::DEFAULT_FILE.into(),
            version: None,
            dry_run: false,
            restart: false,
            templates: true,
            chroot: false,
        }
    }
}

impl Options {
    fn place(&self, path: &Path) -> PathBuf {
        in_root(&self.root, path)
    }

    /// Whether programs of the system that is installed into can be run.
    fn can_run(&self) -> bool {
        self.chroot || self.root == Path::new("/")
    }

    fn record_path(&self) -> PathBuf {
        self.prefix.join("share/bulkhead/installed.json")
    }

    fn drop_in(&self) -> PathBuf {
        self.config.parent().unwrap_or(Path::new("/")).join(DROP_IN)
    }

    /// A command of the system that is installed into.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).current_dir("/");
        if self.root != Path::new("/") {
            let root = self.root.clone();
            // SAFETY: chroot and chdir are async-signal-safe; the path was made before the fork and nix's copy of a path
            // that is short is on the stack.
            unsafe {
                command.pre_exec(move || {
                    nix::unistd::chroot(&root)?;
                    nix::unistd::chdir("/")?;
                    Ok(())
                });
            }
        }
        command
    }
}

/// How many files the installation under `prefix` has, and which of them are no longer what was put there; `None` if it was not made by
/// [`install`].
///
/// # Errors
/// When the record or a file can't be read.
pub(crate) fn altered(root: &Path, prefix: &Path) -> Result<Option<(usize, Vec<PathBuf>)>, InstallError> {
    let options = Options { root: root.to_owned(), prefix: prefix.to_owned(), ..Options::default() };
    let record = Record::load(&options.place(&options.record_path()))?;
    record.map(|record| Ok((record.files.len(), record.altered(root)?))).transpose()
}

/// What keeps an installation from being made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InstallError {
    /// It is not known where the parts are.
    #[error("can't tell where this program is installed; give --from")]
    From(#[source] io::Error),
    /// A path that depends on the working directory.
    #[error("{option} is {path:?}: write an absolute path")]
    Relative {
        /// Which option.
        option: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A part.
    #[error(transparent)]
    File(#[from] FileError),
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// containerd's configuration.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// Our own drop-in is somebody else's.
    #[error("{0} was not written by bulkhead install, or has been changed since: remove it first")]
    Foreign(PathBuf),
    /// Nothing can be printed.
    #[error("can't write to standard output")]
    Output(#[from] io::Error),
}

/// Installs. Whatever is there already as it should be is left alone.
///
/// # Errors
/// What keeps a part from being installed. What only comes later, such as a template, is reported and fails nothing.
pub(crate) fn install(options: &Options, out: &mut impl Write) -> Result<(), InstallError> {
    for (option, path) in
        [("--prefix", &options.prefix), ("--root", &options.root), ("--containerd-config", &options.config)]
    {
        if !path.is_absolute() {
            return Err(InstallError::Relative { option, path: path.clone() });
        }
    }
    let from = match &options.from {
        Some(from) => from.clone(),
        None => crate::check::own_prefix().map_err(InstallError::From)?,
    };
    let mut parts = files::parts(&from, options)?;

    let main = Configuration::load(&options.root, &options.config)?;
    let version = match &main {
        Some(main) => main.version,
        None => options.version.unwrap_or_else(|| guess_version(options)),
    };
    let text = containerd::drop_in(version, &options.prefix, main.as_ref().and_then(Configuration::section));
    parts.push(Part::written(options, options.drop_in(), text.into_bytes()));

    let place = options.place(&options.record_path());
    let before = Record::load(&place)?.unwrap_or_default();
    check_foreign(options, &before, &parts)?;
    let mut changed = false;
    if options.dry_run {
        for part in &parts {
            writeln!(out, "{} {}", part.state()?.would(), part.path.display())?;
        }
    } else {
        let mut record = before.with(&parts)?;
        record.add_directories(&options.root, &options.record_path());
        record.save(&place)?;
        for part in &parts {
            let state = part.state()?;
            if !state.is_same() {
                part.put()?;
                changed |= part.path == options.drop_in();
            }
            writeln!(out, "{} {}", state.done(), part.path.display())?;
        }
        record.only(&parts)?;
        record.save(&place)?;
        if options.templates && options.can_run() {
            template(options, &mut record, out)?;
            record.save(&place)?;
        }
    }
    say_imports(options, main.as_ref(), version, out)?;
    restart(options, changed, out)
}

/// A drop-in of somebody else's is not overwritten.
fn check_foreign(options: &Options, record: &Record, parts: &[Part]) -> Result<(), InstallError> {
    let drop_in = options.drop_in();
    let Some(part) = parts.iter().find(|part| part.path == drop_in) else { return Ok(()) };
    match part.present()? {
        Some(digest) if digest != part.digest()? && !record.has(&drop_in, &digest) => {
            Err(InstallError::Foreign(drop_in))
        }
        _ => Ok(()),
    }
}

/// The version that a containerd without a configuration file wants in an imported one.
fn guess_version(options: &Options) -> Version {
    let old = ["/usr/local/bin/containerd", "/usr/bin/containerd"]
        .iter()
        .map(|path| options.place(Path::new(path)))
        .find(|path| path.is_file())
        .is_some_and(|path| !bulkhead_shim::cli::is_containerd_2(&path));
    if old { Version::Two } else { Version::Three }
}

fn template(options: &Options, record: &mut Record, out: &mut impl Write) -> Result<(), InstallError> {
    let program = options.prefix.join("bin/bulkhead");
    match options.command(&program).args(["template", "build"]).output() {
        Ok(output) if output.status.success() => {
            let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            if let Some((key, _)) = said.split_once(" made in ") {
                record.templates.push(key.to_owned());
            }
            writeln!(out, "template {said}")?;
        }
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            writeln!(out, "note: no template was built, so the first pod boots: {said}")?;
        }
        Err(error) => {
            writeln!(
                out,
                "note: no template was built, because {} does not run: {error}",
                program.display()
            )?;
        }
    }
    Ok(())
}

fn say_imports(
    options: &Options,
    main: Option<&Configuration>,
    version: Version,
    out: &mut impl Write,
) -> io::Result<()> {
    let (drop_in, config) = (options.drop_in(), options.config.display());
    let line = format!("imports = ['{}/*.toml']", drop_in.parent().unwrap_or(Path::new("/")).display());
    match main {
        Some(main) if main.imports(&drop_in) => Ok(()),
        Some(_) => writeln!(
            out,
            "to do: {config} does not import {}; add this line before its first section:\n    {line}",
            drop_in.display()
        ),
        None => writeln!(
            out,
            "to do: there is no {config}; make one with these lines:\n    version = {}\n    {line}",
            version.number()
        ),
    }
}

/// Restarts containerd if that was asked for and makes a difference, or says how. Pods live on.
fn restart(options: &Options, changed: bool, out: &mut impl Write) -> Result<(), InstallError> {
    const COMMAND: &str = "systemctl restart containerd";
    if !changed {
        return Ok(());
    }
    if !options.restart || !options.can_run() {
        writeln!(out, "to do: containerd reads its configuration when it starts: {COMMAND}")?;
        return Ok(());
    }
    // In a root that was changed to, systemctl would do nothing: it is the host's own here.
    let mut command = options.command(Path::new("systemctl"));
    let status = command.env("SYSTEMD_IGNORE_CHROOT", "1").args(["restart", "containerd"]).status();
    match status {
        Ok(status) if status.success() => writeln!(out, "restarted containerd")?,
        Ok(status) => writeln!(out, "to do: {COMMAND} (it ended with {status})")?,
        Err(error) => writeln!(out, "to do: {COMMAND} (it could not be run: {error})")?,
    }
    Ok(())
}

#[cfg(test)]
mod tests;
