//! The runtimes that are compared, and whether this node has them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use protobuf::well_known_types::any::Any;
use protobuf::{CodedOutputStream, Message, MessageField};

use crate::node::find_program;
use crate::proto;

/// Everything that can be asked for, in the order of the report.
pub(crate) const ALL: [Kind; 5] =
    [Kind::Runc, Kind::Crun, Kind::Runsc, Kind::Bulkhead, Kind::BulkheadTemplate];

/// A runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The reference: containers on the host's kernel.
    Runc,
    /// The same in C.
    Crun,
    /// gVisor: a kernel in user space.
    Runsc,
    /// Ours, each pod booting a kernel.
    Bulkhead,
    /// Ours, each pod restored from a template.
    BulkheadTemplate,
}

impl Kind {
    /// The name in reports and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
            Self::Runsc => "runsc",
            Self::Bulkhead => "bulkhead",
            Self::BulkheadTemplate => "bulkhead-template",
        }
    }

    /// The runtime of a name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Whether it is one of ours.
    pub fn is_bulkhead(self) -> bool {
        matches!(self, Self::Bulkhead | Self::BulkheadTemplate)
    }

    /// The program that decides which version it is.
    fn program(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
            Self::Runsc => "runsc",
            Self::Bulkhead | Self::BulkheadTemplate => "containerd-shim-bulkhead-v1",
        }
    }
}

/// A runtime that this node has.
#[derive(Debug, Clone)]
pub struct Runtime {
    /// Which one.
    pub kind: Kind,
    /// Its program.
    pub program: PathBuf,
    containerd_name: &'static str,
    options: Any,
    /// The same as keys of a handler's options in containerd's configuration.
    settings: Vec<(&'static str, PathBuf)>,
}

/// Why a runtime can't take part.
#[derive(Debug, thiserror::Error)]
pub enum Absent {
    /// Its program is not installed.
    #[error("{0} is not in the PATH")]
    Program(&'static str),
    /// Its template can't be made.
    #[error("cannot make its template: {0}")]
    Template(String),
    /// A file for it can't be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// Which one.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Its options can't be encoded.
    #[error("cannot encode its options: {0}")]
    Options(#[from] protobuf::Error),
}

/// How gVisor is run.
#[derive(Debug, Clone)]
pub struct RunscOptions {
    /// The platform: `systrap`, `kvm` or `ptrace`.
    pub platform: String,
}

impl Runtime {
    /// The runtime of a kind, if the node has it. Files that it needs go into `directory`.
    ///
    /// # Errors
    /// Why it can't take part.
    pub fn find(kind: Kind, directory: &Path, runsc: &RunscOptions) -> Result<Self, Absent> {
        let program = find_program(kind.program()).ok_or(Absent::Program(kind.program()))?;
        let of_runc =
            |binary: &Path| vec![("BinaryName", binary.to_owned()), ("Root", directory.join(kind.name()))];
        let (containerd_name, options, settings) = match kind {
            Kind::Runc | Kind::Crun => {
                ("io.containerd.runc.v2", runc_options(&program, kind, directory)?, of_runc(&program))
            }
            Kind::Runsc => {
                let wrapper = runsc_wrapper(&program, directory, runsc, "none")?;
                let networked = runsc_wrapper(&program, directory, runsc, "sandbox")?;
                ("io.containerd.runc.v2", runc_options(&wrapper, kind, directory)?, of_runc(&networked))
            }
            Kind::Bulkhead => {
                let config = bulkhead_config(kind, directory, "templates = \"off\"\n")?;
                ("io.containerd.bulkhead.v1", bulkhead_options(&config)?, vec![("ConfigPath", config)])
            }
            Kind::BulkheadTemplate => {
                let store = directory.join("templates");
                let text = format!("templates = \"auto\"\ntemplate_dir = \"{}\"\n", store.display());
                let config = bulkhead_config(kind, directory, &text)?;
                build_template(&config)?;
                ("io.containerd.bulkhead.v1", bulkhead_options(&config)?, vec![("ConfigPath", config)])
            }
        };
        Ok(Self { kind, program, containerd_name, options, settings })
    }

    /// The same with the changes of root file systems on disks, which only ours has.
    ///
    /// # Errors
    /// When its configuration can't be written.
    pub(crate) fn with_changes_on_disk(&self) -> Result<Self, Absent> {
        let mut changed = self.clone();
        for (_, path) in changed.settings.iter_mut().filter(|_| self.kind.is_bulkhead()) {
            let failed = |source| Absent::Write { path: path.clone(), source };
            let text = fs::read_to_string(&*path).map_err(failed)? + "root_changes = \"disk\"\n";
            let other = path.with_extension("disk.toml");
            fs::write(&other, text).map_err(failed)?;
            changed.options = bulkhead_options(&other)?;
            *path = other;
        }
        Ok(changed)
    }

    /// A handler of the CRI plugin for it, in containerd's configuration.
    pub(crate) fn handler(&self) -> String {
        let table =
            format!("plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{}", self.kind.name());
        let settings = self.settings.iter().map(|(key, path)| format!("{key} = \"{}\"\n", path.display()));
        format!(
            "[{table}]\nruntime_type = \"{}\"\n[{table}.options]\n{}",
            self.containerd_name,
            settings.collect::<String>()
        )
    }

    /// Its part of a container's record.
    pub(crate) fn record(&self) -> proto::container::Runtime {
        let options = if self.options.type_url.is_empty() {
            MessageField::none()
        } else {
            MessageField::some(self.options.clone())
        };
        proto::container::Runtime { name: self.containerd_name.to_owned(), options, ..Default::default() }
    }
}

/// Options of containerd's runc shim, which drives every runtime that has runc's command line. Each has a state directory of
/// its own.
fn runc_options(binary: &Path, kind: Kind, directory: &Path) -> Result<Any, Absent> {
    let options = proto::RuncOptions {
        binary_name: binary.display().to_string(),
        root: directory.join(kind.name()).display().to_string(),
        ..Default::default()
    };
    Ok(Any {
        type_url: "containerd.runc.v1.Options".to_owned(),
        value: options.write_to_bytes()?,
        ..Default::default()
    })
}

/// Writes a configuration of ours.
fn bulkhead_config(kind: Kind, directory: &Path, text: &str) -> Result<PathBuf, Absent> {
    let path = directory.join(format!("{}.toml", kind.name()));
    fs::write(&path, text).map_err(|source| Absent::Write { path: path.clone(), source })?;
    Ok(path)
}

/// Options by which containerd tells a shim where its configuration is: `runtimeoptions.v1.Options` with a `config_path`.
fn bulkhead_options(config: &Path) -> Result<Any, Absent> {
    let mut value = Vec::new();
    let mut output = CodedOutputStream::vec(&mut value);
    output.write_string(2, &config.display().to_string())?;
    output.flush()?;
    drop(output);
    Ok(Any { type_url: "runtimeoptions.v1.Options".to_owned(), value, ..Default::default() })
}

/// Makes the template of the default size, so that no pod that is measured has to boot.
fn build_template(config: &Path) -> Result<(), Absent> {
    let program = find_program("bulkhead").ok_or(Absent::Program("bulkhead"))?;
    let output = Command::new(program)
        .args(["template", "build", "--config"])
        .arg(config)
        .output()
        .map_err(|error| Absent::Template(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Absent::Template(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// The runc shim passes no options of gVisor's own, so a script adds them. Its cost is one start of the shell.
fn runsc_wrapper(
    program: &Path,
    directory: &Path,
    options: &RunscOptions,
    network: &str,
) -> Result<PathBuf, Absent> {
    let path = directory.join(format!("runsc-wrapper-{network}"));
    let script = format!(
        "#!/bin/sh\nexec {} --platform={} --network={network} \"$@\"\n",
        program.display(),
        options.platform
    );
    fs::write(&path, script)
        .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
        .map_err(|source| Absent::Write { path: path.clone(), source })?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for kind in ALL {
            assert_eq!(Kind::from_name(kind.name()), Some(kind));
        }
        assert_eq!(Kind::from_name("docker"), None);
    }

    #[test]
    fn runc_options_are_readable_again() {
        let any = runc_options(Path::new("/bin/crun"), Kind::Crun, Path::new("/run/x")).unwrap();
        let options = proto::RuncOptions::parse_from_bytes(&any.value).unwrap();
        assert_eq!(options.binary_name, "/bin/crun");
        assert_eq!(options.root, "/run/x/crun");
    }
}
