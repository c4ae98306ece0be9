//! The shim's configuration: a TOML file, and annotations for the size of one pod.

mod root_changes;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_base::parts;
use bulkhead_vmm_protocol::{MAX_VCPUS, MIN_MEMORY_MIB};
use log::LevelFilter;
use serde::{Deserialize, Serialize};

pub(crate) use self::root_changes::RootChanges;
use crate::error::{Classify, Code};
use crate::quantity::{self, QuantityError};
use crate::sizing::{self, Demand, SizeError};

/// Read when the runtime options name no other file, if it exists.
pub(crate) const DEFAULT_FILE: &str = "/etc/bulkhead/config.toml";

/// Number of vCPUs of this pod.
pub(crate) const VCPUS_ANNOTATION: &str = "io.bulkhead.vcpus";

/// Guest memory of this pod, as a Kubernetes quantity.
pub(crate) const MEMORY_ANNOTATION: &str = "io.bulkhead.memory";

/// What the names of all our annotations begin with.
pub(crate) const ANNOTATIONS: &str = "io.bulkhead.";

/// A configuration file is never near this size, in bytes.
const MAX_FILE: usize = 64 * 1024;

/// What pods are made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The virtual machine monitor.
    pub vmm: PathBuf,
    /// The file server.
    pub fs_server: PathBuf,
    /// The guest kernel: an ELF `vmlinux` or a bzImage.
    pub kernel: PathBuf,
    /// The guest image with the agent.
    pub image: PathBuf,
    /// The KVM device.
    pub kvm: PathBuf,
    /// Size of a pod's virtual machine: that of a pod without limits, until [`Config::for_pod`] has seen the pod's.
    pub size: Size,
    /// What no pod gets more of, where the operator says so.
    pub maxima: Maxima,
    /// Whether pods may ask for a size by annotations.
    pub annotations: bool,
    /// Kernel parameters after our own.
    pub kernel_params: String,
    /// Whether pods start from templates.
    pub templates: Templates,
    /// Where templates are kept.
    pub template_dir: PathBuf,
    /// How much disk space all templates together may take, bytes.
    pub template_limit: u64,
    /// Whether what a pod sends has to come from the addresses that its network interfaces were given.
    pub spoof_check: bool,
    /// Whether a pod has a core's threads to itself while it runs there.
    pub core_scheduling: bool,
    /// What holds for each container.
    pub containers: Containers,
    /// What is logged.
    pub log_level: LevelFilter,
}

/// What holds for each container of a pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Containers {
    /// Whether those that bring no system call filter get our default one.
    pub default_seccomp: bool,
    /// Where what they change of their root file systems goes.
    pub root_changes: RootChanges,
}

/// Whether pods start from templates.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Templates {
    /// Every pod boots.
    Off,
    /// From a template if there is one for the pod's size; if not, one is made in the background.
    #[default]
    Auto,
}

/// Size of a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// MiB, at least [`MIN_MEMORY_MIB`].
    pub memory_mib: u32,
}

/// What no pod gets more of; `None` stands for what the host has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Maxima {
    /// vCPUs.
    pub vcpus: Option<u8>,
    /// MiB of guest memory.
    pub memory_mib: Option<u32>,
}

/// The file's keys as they are written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    vmm: Option<PathBuf>,
    fs_server: Option<PathBuf>,
    kernel: Option<PathBuf>,
    image: Option<PathBuf>,
    kvm: Option<PathBuf>,
    vcpus: Option<u64>,
    memory: Option<String>,
    max_vcpus: Option<u64>,
    max_memory: Option<String>,
    annotations: Option<bool>,
    kernel_params: Option<String>,
    templates: Option<Templates>,
    template_dir: Option<PathBuf>,
    template_limit: Option<String>,
    spoof_check: Option<bool>,
    core_scheduling: Option<bool>,
    default_seccomp: Option<bool>,
    root_changes: Option<RootChanges>,
    log_level: Option<String>,
}

/// A configuration that no pod can be made with.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read the configuration file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not the TOML that is expected.
    #[error("the configuration {path} is wrong")]
    Parse {
        /// The file, or what stands for it.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A memory size that is not one.
    #[error("the guest memory asked for by {from} is wrong")]
    Memory {
        /// Key or annotation.
        from: &'static str,
        /// Why.
        #[source]
        source: QuantityError,
    },
    /// A limit that is not one.
    #[error("template_limit is wrong")]
    TemplateLimit(#[source] QuantityError),
    /// Not enough memory to boot in.
    #[error("{from} asks for {mib} MiB of guest memory: {MIN_MEMORY_MIB} MiB or more are needed")]
    MemoryTooSmall {
        /// Key or annotation.
        from: &'static str,
        /// What was asked for.
        mib: u32,
    },
    /// A number of vCPUs that no pod can have.
    #[error("{from} asks for {value:?} vCPUs: 1 to {MAX_VCPUS} are possible")]
    Vcpus {
        /// Key or annotation.
        from: &'static str,
        /// What was asked for.
        value: String,
    },
    /// More than the operator allows.
    #[error("{from} asks for {asked}: {key} allows {allowed}")]
    AboveMaximum {
        /// Key or annotation.
        from: &'static str,
        /// What was asked for.
        asked: String,
        /// The key of the maximum.
        key: &'static str,
        /// The maximum.
        allowed: String,
    },
    /// Annotations are off.
    #[error(
        "the annotation {0} has no effect on this node: its configuration does not have annotations = true"
    )]
    AnnotationsOff(String),
    /// An annotation of ours that does not exist.
    #[error("there is no annotation {0}: {VCPUS_ANNOTATION} and {MEMORY_ANNOTATION} are known")]
    Annotation(String),
    /// Limits that no pod can be made for.
    #[error(transparent)]
    Limits(#[from] SizeError),
    /// A path that depends on the working directory.
    #[error("{key} is {path:?}: write an absolute path")]
    RelativePath {
        /// The key.
        key: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A log level that does not exist.
    #[error("log_level is {0:?}: use error, warn, info, debug or trace")]
    LogLevel(String),
    /// Kernel parameters that would not survive the kernel's command line.
    #[error("kernel_params holds a control character or is longer than 1024 bytes")]
    KernelParams,
    /// Our own location is unknown.
    #[error("can't tell where the shim is installed")]
    Prefix(#[source] io::Error),
}

impl Classify for ConfigError {
    fn code(&self) -> Code {
        match self {
            ConfigError::Prefix(_) => Code::INTERNAL,
            ConfigError::Limits(error) => error.code(),
            _ => Code::INVALID_ARGUMENT,
        }
    }
}

/// Where a configuration comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// [`DEFAULT_FILE`] if it exists.
    Default,
    /// A file that must exist.
    File(PathBuf),
    /// The contents themselves, from containerd's runtime options.
    Inline(String),
}

impl Config {
    /// Loads a configuration and completes it with defaults for our place of installation.
    pub fn load(source: &Source) -> Result<Config, ConfigError> {
        let executable = std::env::current_exe().map_err(ConfigError::Prefix)?;
        Config::load_for(
            source,
            executable.parent().and_then(Path::parent).unwrap_or(Path::new("/usr/local")),
        )
    }

    /// Loads a configuration and completes it with defaults for a place of installation.
    pub fn load_for(source: &Source, prefix: &Path) -> Result<Config, ConfigError> {
        match source {
            Source::Inline(text) => Config::parse(Path::new("in the runtime options"), text, prefix),
            Source::File(path) => Config::parse(path, &read(path)?, prefix),
            Source::Default => match read(Path::new(DEFAULT_FILE)) {
                Ok(text) => Config::parse(Path::new(DEFAULT_FILE), &text, prefix),
                Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    Config::parse(Path::new(DEFAULT_FILE), "", prefix)
                }
                Err(error) => Err(error),
            },
        }
    }

    fn parse(path: &Path, text: &str, prefix: &Path) -> Result<Config, ConfigError> {
        let file: File = toml::from_str(text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        let path = |key, value: Option<PathBuf>, default: PathBuf| match value {
            Some(path) if path.is_relative() => Err(ConfigError::RelativePath { key, path }),
            Some(path) => Ok(path),
            None => Ok(default),
        };
        let vcpus = file.vcpus.unwrap_or(1);
        let size = Size {
            vcpus: check_vcpus("vcpus", Some(vcpus), &vcpus.to_string())?,
            memory_mib: check_memory("memory", file.memory.as_deref().unwrap_or("256Mi"))?,
        };
        let most = |most: u64| check_vcpus("max_vcpus", Some(most), &most.to_string());
        let maxima = Maxima {
            vcpus: file.max_vcpus.map(most).transpose()?,
            memory_mib: file
                .max_memory
                .as_deref()
                .map(|most| check_memory("max_memory", most))
                .transpose()?,
        };
        maxima.check("vcpus", "memory", size)?;
        let kernel_params = file.kernel_params.unwrap_or_default();
        if kernel_params.len() > 1024 || kernel_params.chars().any(char::is_control) {
            return Err(ConfigError::KernelParams);
        }
        Ok(Config {
            vmm: path("vmm", file.vmm, prefix.join(parts::VMM))?,
            fs_server: path("fs_server", file.fs_server, prefix.join(parts::FS_SERVER))?,
            kernel: path("kernel", file.kernel, prefix.join(parts::KERNEL))?,
            image: path("image", file.image, prefix.join(parts::IMAGE))?,
            kvm: path("kvm", file.kvm, PathBuf::from("/dev/kvm"))?,
            size,
            maxima,
            annotations: file.annotations.unwrap_or(false),
            kernel_params,
            templates: file.templates.unwrap_or_default(),
            template_dir: path(
                "template_dir",
                file.template_dir,
                PathBuf::from("/var/lib/bulkhead/templates"),
            )?,
            template_limit: quantity::parse_bytes(file.template_limit.as_deref().unwrap_or("8Gi"))
                .map_err(ConfigError::TemplateLimit)?,
            spoof_check: file.spoof_check.unwrap_or(true),
            core_scheduling: file.core_scheduling.unwrap_or(false),
            containers: Containers {
                default_seccomp: file.default_seccomp.unwrap_or(false),
                root_changes: file.root_changes.unwrap_or_default(),
            },
            log_level: match file.log_level.as_deref().unwrap_or("info") {
                "error" => LevelFilter::Error,
                "warn" => LevelFilter::Warn,
                "info" => LevelFilter::Info,
                "debug" => LevelFilter::Debug,
                "trace" => LevelFilter::Trace,
                other => return Err(ConfigError::LogLevel(other.to_owned())),
            },
        })
    }

    /// The same for a virtual machine of another size, given as in the annotations.
    pub fn with_size(mut self, vcpus: Option<&str>, memory: Option<&str>) -> Result<Config, ConfigError> {
        if let Some(text) = vcpus {
            // Strictly decimal: `parse` alone would take a sign.
            let value = text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten();
            self.size.vcpus = check_vcpus(VCPUS_ANNOTATION, value, text)?;
        }
        if let Some(text) = memory {
            self.size.memory_mib = check_memory(MEMORY_ANNOTATION, text)?;
        }
        self.maxima.check(VCPUS_ANNOTATION, MEMORY_ANNOTATION, self.size)?;
        Ok(self)
    }

    /// The same with the size that a pod gets: from its limits, and from its annotations where these are allowed.
    pub fn for_pod(
        mut self,
        demand: &Demand,
        annotations: &HashMap<String, String>,
    ) -> Result<Config, ConfigError> {
        let ours = annotations.keys().filter(|key| key.starts_with(ANNOTATIONS));
        for key in ours {
            let shown = || key.chars().take(64).collect();
            if !self.annotations {
                return Err(ConfigError::AnnotationsOff(shown()));
            }
            if ![VCPUS_ANNOTATION, MEMORY_ANNOTATION].contains(&key.as_str()) {
                return Err(ConfigError::Annotation(shown()));
            }
        }
        let asked = |key| annotations.get(key).map(String::as_str);
        let (vcpus, memory) = (asked(VCPUS_ANNOTATION), asked(MEMORY_ANNOTATION));
        // Who names a size means it, whatever the limits.
        let left = Demand { memory: demand.memory.filter(|_| memory.is_none()), ..*demand };
        self.size = sizing::choose(&left, self.size, self.maxima)?;
        self.with_size(vcpus, memory)
    }
}

impl Maxima {
    /// That an explicit size is within them; `vcpus` and `memory` are where it comes from.
    fn check(&self, vcpus: &'static str, memory: &'static str, size: Size) -> Result<(), ConfigError> {
        let above = |from, asked, key, allowed| Err(ConfigError::AboveMaximum { from, asked, key, allowed });
        match (self.vcpus, self.memory_mib) {
            (Some(most), _) if size.vcpus > most => {
                above(vcpus, format!("{} vCPUs", size.vcpus), "max_vcpus", most.to_string())
            }
            (_, Some(most)) if size.memory_mib > most => above(
                memory,
                format!("{} MiB of guest memory", size.memory_mib),
                "max_memory",
                format!("{most} MiB"),
            ),
            _ => Ok(()),
        }
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    use std::io::Read;
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("not a regular file")));
    }
    file.take(MAX_FILE as u64 + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() > MAX_FILE {
        return Err(failed(io::Error::other(format!("larger than {MAX_FILE} bytes"))));
    }
    Ok(text)
}

fn check_vcpus(from: &'static str, value: Option<u64>, text: &str) -> Result<u8, ConfigError> {
    value
        .and_then(|value| u8::try_from(value).ok())
        .filter(|vcpus| (1..=MAX_VCPUS).contains(vcpus))
        .ok_or_else(|| ConfigError::Vcpus { from, value: text.chars().take(64).collect() })
}

fn check_memory(from: &'static str, text: &str) -> Result<u32, ConfigError> {
    let mib = quantity::parse_mib(text).map_err(|source| ConfigError::Memory { from, source })?;
    if mib < MIN_MEMORY_MIB {
        return Err(ConfigError::MemoryTooSmall { from, mib });
    }
    Ok(mib)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::chain;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("/c.toml"), text, Path::new("/usr/local"))
    }

    fn annotated(pairs: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let annotations = pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
        parse("annotations = true\nmax_vcpus = 8\nmax_memory = \"2Gi\"")
            .unwrap()
            .for_pod(&Demand::default(), &annotations)
    }

    #[test]
    fn every_key_has_a_default() {
        let config = parse("").unwrap();
        assert_eq!(config.vmm, Path::new("/usr/local/libexec/bulkhead/bulkhead-vmm"));
        assert_eq!(config.image, Path::new("/usr/local/share/bulkhead/guest.erofs"));
        assert_eq!(config.kvm, Path::new("/dev/kvm"));
        assert_eq!(config.size, Size { vcpus: 1, memory_mib: 256 });
        assert_eq!(config.templates, Templates::Auto);
        assert_eq!(config.template_dir, Path::new("/var/lib/bulkhead/templates"));
        assert_eq!(config.template_limit, 8 << 30);
        assert!(config.spoof_check && !config.core_scheduling);
        assert_eq!(config.containers, Containers::default());
        assert_eq!(config.log_level, LevelFilter::Info);
    }

    #[test]
    fn every_key_can_be_set() {
        let config = parse(
            r#"
            vmm = "/v"
            fs_server = "/f"
            kernel = "/k"
            image = "/i"
            kvm = "/d"
            vcpus = 4
            memory = "1.5Gi"
            max_vcpus = 8
            max_memory = "64Gi"
            annotations = true
            kernel_params = "mitigations=off"
            templates = "off"
            template_dir = "/t"
            template_limit = "1Gi"
            spoof_check = false
            core_scheduling = true
            default_seccomp = true
            root_changes = "auto"
            log_level = "debug"
            "#,
        )
        .unwrap();
        assert_eq!(
            config,
            Config {
                vmm: "/v".into(),
                fs_server: "/f".into(),
                kernel: "/k".into(),
                image: "/i".into(),
                kvm: "/d".into(),
                size: Size { vcpus: 4, memory_mib: 1536 },
                maxima: Maxima { vcpus: Some(8), memory_mib: Some(65_536) },
                annotations: true,
                kernel_params: "mitigations=off".into(),
                templates: Templates::Off,
                template_dir: "/t".into(),
                template_limit: 1 << 30,
                spoof_check: false,
                core_scheduling: true,
                containers: Containers { default_seccomp: true, root_changes: RootChanges::Auto },
                log_level: LevelFilter::Debug,
            }
        );
    }

    #[test]
    fn an_unknown_key_is_named_in_the_error() {
        let message = chain(&parse("memroy = \"1Gi\"").unwrap_err());
        assert!(message.contains("/c.toml") && message.contains("memroy"), "{message}");
    }

    #[test]
    fn bad_values_are_refused() {
        for text in [
            "memory = 256",
            "memory = \"\"",
            "memory = \"lots\"",
            "memory = \"63Mi\"",
            "memory = \"16777216Ti\"",
            "vcpus = 0",
            "vcpus = 17",
            "vcpus = -1",
            "vcpus = \"2\"",
            "vcpus = 4\nmax_vcpus = 2",
            "max_vcpus = 17",
            "max_memory = \"128Mi\"",
            "annotations = \"yes\"",
            "kernel = \"vmlinux\"",
            "log_level = \"loud\"",
            "kernel_params = \"a\\nb\"",
            "vmm = ",
            "templates = \"on\"",
            "templates = true",
            "spoof_check = \"yes\"",
            "template_dir = \"templates\"",
            "template_limit = \"much\"",
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.code(), Code::INVALID_ARGUMENT, "{text}: {error}");
        }
    }

    #[test]
    fn annotations_override_and_are_parsed_strictly() {
        let config =
            annotated(&[(VCPUS_ANNOTATION, "2"), (MEMORY_ANNOTATION, "512Mi"), ("other", "x")]).unwrap();
        assert_eq!(config.size, Size { vcpus: 2, memory_mib: 512 });
        for (key, value) in [
            (VCPUS_ANNOTATION, ""),
            (VCPUS_ANNOTATION, "+2"),
            (VCPUS_ANNOTATION, "two"),
            (VCPUS_ANNOTATION, "0"),
            (VCPUS_ANNOTATION, "9"),
            (VCPUS_ANNOTATION, "99999999999999999999"),
            (MEMORY_ANNOTATION, "3Gi"),
            ("io.bulkhead.kernel", "/evil"),
            (MEMORY_ANNOTATION, "1Gi; rm"),
            (MEMORY_ANNOTATION, "1Mi"),
            (MEMORY_ANNOTATION, ""),
        ] {
            let message = chain(&annotated(&[(key, value)]).unwrap_err());
            assert!(message.contains(key), "{message}");
        }
    }

    #[test]
    fn annotations_are_off_by_default_and_say_so() {
        let annotations = [(MEMORY_ANNOTATION.to_owned(), "512Mi".to_owned())].into();
        let message = chain(&parse("").unwrap().for_pod(&Demand::default(), &annotations).unwrap_err());
        assert!(message.contains(MEMORY_ANNOTATION) && message.contains("annotations = true"), "{message}");
    }

    #[test]
    fn a_size_by_annotation_goes_before_the_limits() {
        let demand = Demand { memory: Some(1 << 30), cpus: Some(3), ..Demand::default() };
        let annotations = [(MEMORY_ANNOTATION.to_owned(), "512Mi".to_owned())].into();
        let config = parse("annotations = true").unwrap();
        let maxima = Maxima { vcpus: Some(16), ..config.maxima };
        let config = Config { maxima, ..config }.for_pod(&demand, &annotations).unwrap();
        assert_eq!(config.size, Size { vcpus: 4, memory_mib: 512 });
    }

    #[test]
    fn a_named_file_must_exist_and_be_a_file() {
        for path in ["/nonexistent/config.toml", "/dev/zero", "/"] {
            let error = Config::load(&Source::File(path.into())).unwrap_err();
            assert!(matches!(error, ConfigError::Read { .. }), "{error}");
            assert!(error.to_string().contains(path));
        }
    }
}
