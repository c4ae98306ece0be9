//! What containerd passes to `start`: since 2.3 a `BootstrapParams` message on standard input, before that flags, the
//! environment, and the runtime options on standard input.

use std::io::{self, Read};

use containerd_shim::Flags;
use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

use crate::options::{OptionsError, RuntimeOptions};

/// containerd's own limit on what it passes.
const MAX_INPUT: u64 = 10 << 20;

/// How containerd wants the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    /// 2.3 and later: a `BootstrapResult` message.
    Bootstrap,
    /// 2.0 to 2.2: JSON.
    Json,
    /// 1.x: the bare address, which stands for version 2 of the Task API.
    Address,
}

/// What containerd asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StartRequest {
    pub protocol: Protocol,
    /// Where events go; empty for nowhere.
    pub ttrpc_address: String,
    pub grpc_address: String,
    pub socket_dir: Option<String>,
    pub debug: bool,
    pub options: RuntimeOptions,
}

/// A request that can't be understood.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error("can't read what containerd passes on standard input")]
    Input(#[source] io::Error),
    #[error("what containerd passes on standard input is for {0:?}, not for this container")]
    OtherContainer(String),
    #[error(transparent)]
    Options(#[from] OptionsError),
}

/// What the environment says.
#[derive(Debug, Default)]
pub(super) struct Environment {
    pub ttrpc_address: String,
    pub grpc_address: String,
}

impl Environment {
    fn read() -> Environment {
        let get = |name| std::env::var(name).unwrap_or_default();
        Environment { ttrpc_address: get("TTRPC_ADDRESS"), grpc_address: get("GRPC_ADDRESS") }
    }
}

impl StartRequest {
    /// Reads the request of this process; `speaks_v3` tells whether containerd knows version 3 of the Task API.
    pub(super) fn read(
        flags: &Flags,
        speaks_v3: impl FnOnce() -> bool,
    ) -> Result<StartRequest, RequestError> {
        let mut input = Vec::new();
        io::stdin().lock().take(MAX_INPUT).read_to_end(&mut input).map_err(RequestError::Input)?;
        StartRequest::parse(&input, flags, Environment::read(), speaks_v3)
    }

    fn parse(
        input: &[u8],
        flags: &Flags,
        environment: Environment,
        speaks_v3: impl FnOnce() -> bool,
    ) -> Result<StartRequest, RequestError> {
        match bootstrap_params(input, flags)? {
            Some(params) => from_bootstrap(params, flags, environment),
            None => Ok(StartRequest {
                protocol: if speaks_v3() { Protocol::Json } else { Protocol::Address },
                ttrpc_address: environment.ttrpc_address,
                grpc_address: first(&[&flags.address, &environment.grpc_address]),
                socket_dir: None,
                debug: flags.debug,
                options: RuntimeOptions::from_any(&Any::parse_from_bytes(input).unwrap_or_default())?,
            }),
        }
    }

    /// The answer: where the Task API is served.
    pub(super) fn reply(&self, address: &str) -> Vec<u8> {
        match self.protocol {
            Protocol::Bootstrap => BootstrapResult {
                version: 3,
                address: address.into(),
                protocol: "ttrpc".into(),
                ..Default::default()
            }
            .write_to_bytes()
            .unwrap_or_default(),
            Protocol::Json => serde_json::json!({ "version": 3, "address": address, "protocol": "ttrpc" })
                .to_string()
                .into_bytes(),
            Protocol::Address => address.into(),
        }
    }
}

/// Tells a `BootstrapParams` from the options that older versions pass in its place: both begin with two strings.
fn bootstrap_params(input: &[u8], flags: &Flags) -> Result<Option<BootstrapParams>, RequestError> {
    let Ok(params) = BootstrapParams::parse_from_bytes(input) else { return Ok(None) };
    if params.instance_id == flags.id && params.namespace == flags.namespace && !flags.id.is_empty() {
        return Ok(Some(params));
    }
    let nothing_else = params.containerd_ttrpc_address.is_empty()
        && params.containerd_grpc_address.is_empty()
        && params.containerd_version.is_empty();
    if nothing_else { Ok(None) } else { Err(RequestError::OtherContainer(params.instance_id)) }
}

/// The first that says something.
fn first(candidates: &[&str]) -> String {
    candidates.iter().find(|candidate| !candidate.is_empty()).copied().unwrap_or_default().to_owned()
}

fn from_bootstrap(
    params: BootstrapParams,
    flags: &Flags,
    environment: Environment,
) -> Result<StartRequest, RequestError> {
    let mut options = RuntimeOptions::default();
    for extension in params.extensions {
        let any = extension.value.into_option().unwrap_or_default();
        match RuntimeOptions::from_any(&any) {
            Ok(found) => options = found,
            // Extensions are for whoever knows them.
            Err(OptionsError::UnknownType(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(StartRequest {
        protocol: Protocol::Bootstrap,
        ttrpc_address: first(&[&params.containerd_ttrpc_address, &environment.ttrpc_address]),
        grpc_address: first(&[&params.containerd_grpc_address, &flags.address, &environment.grpc_address]),
        socket_dir: params.socket_dir.filter(|directory| !directory.is_empty()),
        // The more negative, the more is wanted; debug is -4.
        debug: flags.debug || params.log_level.value() <= -4,
        options,
    })
}

#[cfg(test)]
mod tests {
    use containerd_shim::bootstrap::Extension;
    use protobuf::MessageField;

    use super::*;
    use crate::config::Source;

    fn flags() -> Flags {
        Flags {
            id: "c1".into(),
            namespace: "default".into(),
            address: "/run/c.sock".into(),
            ..Default::default()
        }
    }

    fn environment() -> Environment {
        Environment { ttrpc_address: "/run/c.sock.ttrpc".into(), grpc_address: "/other".into() }
    }

    fn options() -> Any {
        Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"\x12\x07/c.toml".into(),
            ..Default::default()
        }
    }

    #[test]
    fn flags_and_options_of_containerd_2_1() {
        let input = options().write_to_bytes().unwrap();
        let request = StartRequest::parse(&input, &flags(), environment(), || true).unwrap();
        assert_eq!(request.protocol, Protocol::Json);
        assert_eq!(request.ttrpc_address, "/run/c.sock.ttrpc");
        assert_eq!(request.grpc_address, "/run/c.sock");
        assert_eq!(request.options.config, Source::File("/c.toml".into()));
        assert_eq!(
            serde_json::from_slice::<serde_json::Value>(&request.reply("unix:///s")).unwrap(),
            serde_json::json!({"version": 3, "address": "unix:///s", "protocol": "ttrpc"})
        );
    }

    #[test]
    fn containerd_1_gets_the_bare_address() {
        let request = StartRequest::parse(b"", &flags(), environment(), || false).unwrap();
        assert_eq!(request.reply("unix:///s"), b"unix:///s");
        assert_eq!(request.options, RuntimeOptions::default());
    }

    #[test]
    fn bootstrap_parameters_of_containerd_2_3() {
        let params = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "default".into(),
            containerd_ttrpc_address: "/run/t".into(),
            containerd_grpc_address: "/run/g".into(),
            socket_dir: Some("/run/sockets".into()),
            extensions: vec![
                Extension {
                    value: MessageField::some(Any { type_url: "example.com/X".into(), ..Default::default() }),
                    ..Default::default()
                },
                Extension { value: MessageField::some(options()), ..Default::default() },
            ],
            ..Default::default()
        };
        let input = params.write_to_bytes().unwrap();
        let request =
            StartRequest::parse(&input, &flags(), Environment::default(), || panic!("not asked")).unwrap();
        assert_eq!(request.protocol, Protocol::Bootstrap);
        assert_eq!((request.ttrpc_address.as_str(), request.grpc_address.as_str()), ("/run/t", "/run/g"));
        assert_eq!(request.socket_dir.as_deref(), Some("/run/sockets"));
        assert_eq!(request.options.config, Source::File("/c.toml".into()));
        let reply = BootstrapResult::parse_from_bytes(&request.reply("unix:///s")).unwrap();
        assert_eq!(
            (reply.version, reply.address.as_str(), reply.protocol.as_str()),
            (3, "unix:///s", "ttrpc")
        );

        let other = Flags { id: "c2".into(), ..flags() };
        assert!(matches!(
            StartRequest::parse(&input, &other, environment(), || true),
            Err(RequestError::OtherContainer(_))
        ));
    }

    #[test]
    fn addresses_that_the_parameters_lack_are_the_environments() {
        let params =
            BootstrapParams { instance_id: "c1".into(), namespace: "default".into(), ..Default::default() };
        let input = params.write_to_bytes().unwrap();
        let request = StartRequest::parse(&input, &flags(), environment(), || false).unwrap();
        assert_eq!(request.protocol, Protocol::Bootstrap);
        assert_eq!(request.ttrpc_address, "/run/c.sock.ttrpc");
        assert_eq!(request.grpc_address, "/run/c.sock");
    }

    #[test]
    fn without_any_address_there_is_nobody_to_publish_to() {
        let nobody = Flags { address: String::new(), ..flags() };
        let request = StartRequest::parse(b"", &nobody, Environment::default(), || true).unwrap();
        assert_eq!((request.ttrpc_address.as_str(), request.grpc_address.as_str()), ("", ""));
    }
}
