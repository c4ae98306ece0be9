//! The pod's configuration as the kubelet wrote it: `runtime.v1.PodSandboxConfig` of the CRI, as far as it concerns us.
//!
//! A handful of its fields is needed, so they are taken out of the message by their numbers instead of generating code for
//! the whole CRI.

use std::collections::BTreeMap;

use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::empty::Empty;
use protobuf::{Message, UnknownValueRef};

use crate::error::{Classify, Code};

/// The type of the options that containerd's CRI plugin sends.
const TYPE: &str = "runtime.v1.PodSandboxConfig";

/// What is read of one message, so that a configuration of any size costs a bounded time and space.
const MAX_CONFIG: usize = 1 << 20;

/// A configuration that can't be understood, or asks for what no pod can have.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not what the CRI plugin sends.
    #[error("a sandbox with options of the type {0:?} can't be made: {TYPE} is possible")]
    UnknownType(String),
    /// Broken.
    #[error("the pod's configuration can't be decoded")]
    Malformed(#[source] protobuf::Error),
    /// Too large.
    #[error("the pod's configuration is {0} bytes long: {MAX_CONFIG} are allowed")]
    TooLarge(usize),
}

impl Classify for ConfigError {
    fn code(&self) -> Code {
        Code::INVALID_ARGUMENT
    }
}

/// The node's namespace, in the numbers of `runtime.v1.NamespaceMode`.
const NODE: u64 = 2;

/// How names are resolved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of servers.
    pub servers: Vec<String>,
    /// Domains to search in.
    pub searches: Vec<String>,
    /// Options of the resolver.
    pub options: Vec<String>,
}

/// Limits of all containers together; 0 stands for none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resources {
    /// Microseconds.
    pub cpu_period: i64,
    /// Microseconds in each period.
    pub cpu_quota: i64,
    /// Relative weight.
    pub cpu_shares: i64,
    /// Bytes.
    pub memory: i64,
}

/// What containerd's CRI plugin sets in every pod of its own by default (`enable_unprivileged_ports`, `enable_unprivileged_icmp`).
const PARAMETERS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

/// The configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodConfig {
    /// The pod's name in Kubernetes.
    pub name: String,
    /// The pod's unique id in Kubernetes.
    pub uid: String,
    /// The pod's namespace in Kubernetes.
    pub namespace: String,
    /// Host name; empty for the node's choice.
    pub hostname: String,
    /// Where containers' logs go on the host.
    pub log_directory: String,
    /// `None` for the node's.
    pub dns: Option<Dns>,
    /// For the runtime.
    pub annotations: BTreeMap<String, String>,
    /// The pod's cgroup; empty for none.
    pub cgroup_parent: String,
    /// Kernel parameters: the pod's, and the plugin's for every pod.
    pub sysctls: BTreeMap<String, String>,
    /// What the containers may use, if the kubelet says.
    pub resources: Option<Resources>,
    /// Whether the pod is to be in the node's network.
    pub host_network: bool,
}

impl PodConfig {
    /// Reads the options of a request to create a sandbox; an empty message stands for a pod without wishes.
    pub fn from_any(any: &Any) -> Result<PodConfig, ConfigError> {
        if any.type_url.is_empty() {
            return Ok(PodConfig::default());
        }
        // Go writes bare names, protobuf elsewhere puts a host in front of them.
        if any.type_url.rsplit('/').next() != Some(TYPE) {
            return Err(ConfigError::UnknownType(any.type_url.chars().take(128).collect()));
        }
        if any.value.len() > MAX_CONFIG {
            return Err(ConfigError::TooLarge(any.value.len()));
        }
        let mut config = PodConfig::default();
        each_field(&any.value, |number, value| {
            match (number, value) {
                (1, Value::Bytes(bytes)) => config.read_metadata(bytes)?,
                (2, value) => config.hostname = value.text(),
                (3, value) => config.log_directory = value.text(),
                (4, Value::Bytes(bytes)) => config.dns = Some(dns(bytes)?),
                (7, Value::Bytes(bytes)) => config.annotations.extend(entry(bytes)?),
                (8, Value::Bytes(bytes)) => config.read_linux(bytes)?,
                _ => {}
            }
            Ok(())
        })?;
        for (name, value) in PARAMETERS {
            config.sysctls.entry(name.to_owned()).or_insert_with(|| value.to_owned());
        }
        Ok(config)
    }

    fn read_metadata(&mut self, bytes: &[u8]) -> Result<(), ConfigError> {
        each_field(bytes, |number, value| {
            match number {
                1 => self.name = value.text(),
                2 => self.uid = value.text(),
                3 => self.namespace = value.text(),
                _ => {}
            }
            Ok(())
        })
    }

    fn read_linux(&mut self, bytes: &[u8]) -> Result<(), ConfigError> {
        each_field(bytes, |number, value| {
            match (number, value) {
                (1, value) => self.cgroup_parent = value.text(),
                (2, Value::Bytes(bytes)) => self.read_security(bytes)?,
                (3, Value::Bytes(bytes)) => self.sysctls.extend(entry(bytes)?),
                (5, Value::Bytes(bytes)) => self.resources = Some(resources(bytes)?),
                _ => {}
            }
            Ok(())
        })
    }

    fn read_security(&mut self, bytes: &[u8]) -> Result<(), ConfigError> {
        each_field(bytes, |number, value| match (number, value) {
            (1, Value::Bytes(bytes)) => self.read_namespaces(bytes),
            _ => Ok(()),
        })
    }

    fn read_namespaces(&mut self, bytes: &[u8]) -> Result<(), ConfigError> {
        each_field(bytes, |number, value| {
            if number == 1 {
                self.host_network = value.number() == NODE;
            }
            Ok(())
        })
    }
}

fn dns(bytes: &[u8]) -> Result<Dns, ConfigError> {
    let mut dns = Dns::default();
    each_field(bytes, |number, value| {
        match number {
            1 => dns.servers.push(value.text()),
            2 => dns.searches.push(value.text()),
            3 => dns.options.push(value.text()),
            _ => {}
        }
        Ok(())
    })?;
    Ok(dns)
}

fn resources(bytes: &[u8]) -> Result<Resources, ConfigError> {
    let mut resources = Resources::default();
    each_field(bytes, |number, value| {
        // An int64 is on the wire as its two's complement.
        let value = value.number().cast_signed();
        match number {
            1 => resources.cpu_period = value,
            2 => resources.cpu_quota = value,
            3 => resources.cpu_shares = value,
            4 => resources.memory = value,
            _ => {}
        }
        Ok(())
    })?;
    Ok(resources)
}

/// An entry of a map of strings.
fn entry(bytes: &[u8]) -> Result<Option<(String, String)>, ConfigError> {
    let (mut key, mut text) = (String::new(), String::new());
    each_field(bytes, |number, value| {
        match number {
            1 => key = value.text(),
            2 => text = value.text(),
            _ => {}
        }
        Ok(())
    })?;
    Ok(if key.is_empty() { None } else { Some((key, text)) })
}

/// The value of a field.
#[derive(Clone, Copy)]
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

impl Value<'_> {
    fn text(self) -> String {
        match self {
            Value::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Value::Number(_) => String::new(),
        }
    }

    fn number(self) -> u64 {
        match self {
            Value::Number(number) => number,
            Value::Bytes(_) => 0,
        }
    }
}

/// Hands out the fields of a message: a message without fields takes each for an unknown one.
fn each_field(
    bytes: &[u8],
    mut take: impl FnMut(u32, Value<'_>) -> Result<(), ConfigError>,
) -> Result<(), ConfigError> {
    let message = Empty::parse_from_bytes(bytes).map_err(ConfigError::Malformed)?;
    for (number, value) in message.special_fields.unknown_fields().iter() {
        match value {
            UnknownValueRef::Varint(value) => take(number, Value::Number(value))?,
            UnknownValueRef::LengthDelimited(bytes) => take(number, Value::Bytes(bytes))?,
            _ => {}
        }
    }
    Ok(())
}
