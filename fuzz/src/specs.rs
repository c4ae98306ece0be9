//! What containerd hands over: specifications, options and annotations, through the shim and on into the guest's agent.

use std::collections::HashMap;

use bulkhead_agent::container::plan::ContainerPlan;
use bulkhead_agent::container::seccomp::{KernelSupport, OciProfile};
use bulkhead_agent::container::spec as guest_spec;
use bulkhead_seccomp_compiler::compile;
use bulkhead_shim::config::{Config, Source};
use bulkhead_shim::options::RuntimeOptions;
use bulkhead_shim::sandbox::config::PodConfig;
use bulkhead_shim::sizing::Demand;
use bulkhead_shim::spec::sandbox::Role;
use bulkhead_shim::spec::{self, Member, PodNamespaces};
use bulkhead_shim::{id, quantity};
use oci_spec::runtime::Spec;
use protobuf::well_known_types::any::Any;

use crate::input::Input;
use crate::seccomp::check_form;

/// A specification, its annotations and its limits in the shim; what it makes of it in the agent.
pub fn oci(data: &[u8]) {
    if let Ok(resources) = spec::read_resources(data) {
        let _ = Demand::of_resources(&resources).memory;
        let _ = spec::translate_resources(resources, &[]);
    }
    let _ = spec::read_process(data);
    let Ok(spec) = serde_json::from_slice::<Spec>(data) else { return };
    if let Ok(role) = Role::of(&spec) {
        let _ = Demand::of(&spec, &role);
    }
    let _ = spec::network_namespace(&spec);
    let member = Member { host_pid: 77, guest_pid: 3 };
    let pod = PodNamespaces { members: vec![member], first_process: Some(2), is_pod: data.len() & 1 != 0 };
    let Ok(translated) = spec::translate(spec, "fuzz", &pod) else { return };
    let json =
        translated.to_json(&[], None, data.len() & 2 != 0).expect("what was translated can be written");
    let _ = ContainerPlan::new(&json);
}

/// A specification as the agent gets it: the shim is not believed either.
pub fn plan(data: &[u8]) {
    let _ = ContainerPlan::new(data);
}

/// A seccomp profile of the specification, compiled.
pub fn filter(data: &[u8]) {
    let Ok(seccomp) = serde_json::from_slice::<guest_spec::Seccomp>(data) else { return };
    if let Ok(OciProfile { profile, .. }) = OciProfile::new(&seccomp, KernelSupport { x86: true }) {
        check_form(&compile(&profile));
    }
}

/// Runtime options, the pod's description of the Sandbox API, annotations, the configuration, and what is in their fields.
pub fn options(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.u8();
    let bytes = input.rest();
    let any = |type_url: &str| Any { type_url: type_url.into(), value: bytes.to_vec(), ..Any::default() };
    match kind % 6 {
        0 => drop(RuntimeOptions::from_any(&any("runtimeoptions.v1.Options"))),
        1 => drop(RuntimeOptions::from_any(&any("containerd.runc.v1.Options"))),
        2 => drop(PodConfig::from_any(&any("runtime.v1.PodSandboxConfig"))),
        3 => drop(Config::load(&Source::Inline(String::from_utf8_lossy(bytes).into_owned()))),
        4 => {
            let text = String::from_utf8_lossy(bytes);
            let _ = quantity::parse_bytes(&text);
            let _ = quantity::parse_mib(&text);
            let _ = id::check(&text);
        }
        _ => {
            let text = String::from_utf8_lossy(bytes);
            let pairs = text.lines().filter_map(|line| line.split_once('='));
            let annotations: HashMap<String, String> =
                pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
            if let Ok(demand) = Demand::of_sandbox(&annotations)
                && let Ok(config) = Config::load(&Source::Inline("annotations = true".into()))
            {
                let _ = config.for_pod(&demand, &annotations);
            }
        }
    }
}
