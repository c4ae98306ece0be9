//! The runtime options that containerd passes along: which configuration file, and the shim's own cgroup.

use std::ffi::OsString;
use std::path::PathBuf;

use containerd_shim_protos::shim::oci::Options as RuncOptions;
use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, Message};

use crate::config::Source;
use crate::error::{Classify, Code};

/// Type of the options that containerd's CRI plugin and `ctr --runtime-config-path` send for runtimes they don't know.
const GENERIC: &str = "runtimeoptions.v1.Options";

/// Type of runc's options, which containerd sends when a runtime class was copied from runc's.
const RUNC: &str = "containerd.runc.v1.Options";

/// What the options ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeOptions {
    /// The configuration.
    pub config: Source,
    /// Cgroup (below the cgroup mount) to put the shim into; empty for none.
    pub shim_cgroup: String,
}

impl Default for RuntimeOptions {
    fn default() -> RuntimeOptions {
        RuntimeOptions { config: Source::Default, shim_cgroup: String::new() }
    }
}

/// Environment variables in which the shim's server finds what `start` was passed.
const ENVIRONMENT: [&str; 2] = ["BULKHEAD_CONFIG_FILE", "BULKHEAD_CONFIG_BODY"];

/// Options that can't be understood.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Neither ours nor a well known type.
    #[error("runtime options of the type {0:?} mean nothing to Bulkhead: use {GENERIC} with ConfigPath")]
    UnknownType(String),
    /// Broken.
    #[error("the runtime options can't be decoded")]
    Malformed(#[source] protobuf::Error),
    /// A relative path.
    #[error("ConfigPath is {0:?}: write an absolute path")]
    RelativePath(String),
}

impl Classify for OptionsError {
    fn code(&self) -> Code {
        Code::INVALID_ARGUMENT
    }
}

impl RuntimeOptions {
    /// The environment of the shim's server that hands the configuration on to it. The cgroup is dealt with by then.
    pub(crate) fn to_environment(&self) -> [(&'static str, Option<OsString>); 2] {
        let (file, body) = match &self.config {
            Source::Default => (None, None),
            Source::File(path) => (Some(path.clone().into_os_string()), None),
            Source::Inline(body) => (None, Some(OsString::from(body))),
        };
        [(ENVIRONMENT[0], file), (ENVIRONMENT[1], body)]
    }

    /// What [`RuntimeOptions::to_environment`] has made.
    pub(crate) fn from_environment() -> RuntimeOptions {
        let [file, body] = ENVIRONMENT.map(std::env::var_os);
        let config = match (file, body) {
            (Some(path), _) => Source::File(PathBuf::from(path)),
            (None, Some(body)) => Source::Inline(body.to_string_lossy().into_owned()),
            (None, None) => Source::Default,
        };
        RuntimeOptions { config, shim_cgroup: String::new() }
    }

    /// Reads the options of a request; an empty message stands for none.
    pub fn from_any(any: &Any) -> Result<RuntimeOptions, OptionsError> {
        if any.type_url.is_empty() {
            return Ok(RuntimeOptions::default());
        }
        // Go writes bare names, protobuf elsewhere puts a host in front of them.
        let name = any.type_url.rsplit('/').next().unwrap_or_default();
        if name == RUNC {
            let options = RuncOptions::parse_from_bytes(&any.value).map_err(OptionsError::Malformed)?;
            return Ok(RuntimeOptions { config: Source::Default, shim_cgroup: options.shim_cgroup });
        }
        if name != GENERIC {
            return Err(OptionsError::UnknownType(any.type_url.chars().take(128).collect()));
        }
        let (path, body) = decode_generic(&any.value).map_err(OptionsError::Malformed)?;
        let config = if !path.is_empty() {
            if !path.starts_with('/') {
                return Err(OptionsError::RelativePath(path));
            }
            Source::File(PathBuf::from(path))
        } else if !body.is_empty() {
            Source::Inline(body)
        } else {
            Source::Default
        };
        Ok(RuntimeOptions { config, shim_cgroup: String::new() })
    }
}

/// `config_path` (2) and `config_body` (3) of a `runtimeoptions.v1.Options`; `type_url` (1) repeats what is known.
fn decode_generic(bytes: &[u8]) -> Result<(String, String), protobuf::Error> {
    let mut path = String::new();
    let mut body = String::new();
    let mut input = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match tag {
            0x12 => path = input.read_string()?,
            // The protocol says bytes; TOML is text.
            0x1a => body = String::from_utf8_lossy(&input.read_bytes()?).into_owned(),
            other => match protobuf::rt::WireType::new(other & 7) {
                Some(wire_type) => input.skip_field(wire_type)?,
                None => return Err(std::io::Error::from(std::io::ErrorKind::InvalidData).into()),
            },
        }
    }
    Ok((path, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(fields: &[(u8, &str)]) -> Any {
        let mut value = Vec::new();
        for (field, text) in fields {
            value.extend([field << 3 | 2, text.len() as u8]);
            value.extend(text.as_bytes());
        }
        Any { type_url: GENERIC.into(), value, ..Default::default() }
    }

    #[test]
    fn the_config_path_is_found() {
        let options =
            RuntimeOptions::from_any(&generic(&[(1, "ignored"), (2, "/c.toml"), (9, "new")])).unwrap();
        assert_eq!(options.config, Source::File("/c.toml".into()));
    }

    #[test]
    fn a_body_stands_for_a_file() {
        let options = RuntimeOptions::from_any(&generic(&[(3, "vcpus = 2")])).unwrap();
        assert_eq!(options.config, Source::Inline("vcpus = 2".into()));
    }

    #[test]
    fn nothing_means_defaults() {
        assert_eq!(RuntimeOptions::from_any(&Any::new()).unwrap(), RuntimeOptions::default());
        assert_eq!(RuntimeOptions::from_any(&generic(&[])).unwrap(), RuntimeOptions::default());
    }

    #[test]
    fn the_shim_cgroup_of_runc_options_counts() {
        let runc = RuncOptions { shim_cgroup: "/shims".into(), ..Default::default() };
        let any = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: runc.write_to_bytes().unwrap(),
            ..Default::default()
        };
        assert_eq!(RuntimeOptions::from_any(&any).unwrap().shim_cgroup, "/shims");
    }

    #[test]
    fn the_rest_is_refused() {
        assert!(matches!(
            RuntimeOptions::from_any(&generic(&[(2, "c.toml")])),
            Err(OptionsError::RelativePath(_))
        ));
        let unknown = Any { type_url: "example.com/Other".into(), ..Default::default() };
        assert!(matches!(RuntimeOptions::from_any(&unknown), Err(OptionsError::UnknownType(_))));
        let cut = Any { value: vec![0x12, 200], ..generic(&[]) };
        assert!(matches!(RuntimeOptions::from_any(&cut), Err(OptionsError::Malformed(_))));
    }
}
