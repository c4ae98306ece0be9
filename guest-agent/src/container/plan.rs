//! A container, checked: the specification turned into what the modules here carry out.

use std::collections::BTreeMap;

use super::capabilities::CapabilitySets;
use super::cgroup::device_filter::{DeviceFilter, DeviceFilterError};
use super::cgroup::resources::{Limits, ResourceError};
use super::hooks::GuestHooks;
use super::namespaces::{Kind, NamespaceError, Namespaces};
use super::process::{Inherited, ProcessError, ProcessPlan};
use super::rootfs::{RootError, RootPlan};
use super::seccomp::{Filter, ProfileError};
use super::spec::{Linux, Resources, Spec, items};
use super::sysctl::{self, SysctlError};

/// A checked specification.
#[derive(Debug)]
pub struct ContainerPlan {
    /// Its namespaces.
    pub namespaces: Namespaces,
    /// Its root.
    pub root: RootPlan,
    /// Its first process.
    pub process: ProcessPlan,
    /// What further processes get from it.
    pub inherited: Inherited,
    /// Resource limits.
    pub limits: Limits,
    /// Devices it may use.
    pub devices: DeviceFilter,
    /// Host name.
    pub hostname: Option<String>,
    /// NIS domain name.
    pub domainname: Option<String>,
    /// Kernel parameters.
    pub sysctl: BTreeMap<String, String>,
    /// Programs to run in it.
    pub hooks: GuestHooks,
}

/// A specification that can't be carried out.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum PlanError {
    #[error("the container's specification is not valid")]
    Json(#[from] serde_json::Error),
    #[error("ociVersion {0:?} is not a version 1 of the specification")]
    Version(String),
    #[error("hooks.{kind}: {path:?} can't run: hooks are programs of the host, and this is a guest")]
    Hook { kind: String, path: String },
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("linux.{0} is not supported")]
    Unsupported(&'static str),
    #[error("{0} needs a UTS namespace of the container's own")]
    NoUts(&'static str),
    #[error("linux.personality: there is no domain {0:?} without flags")]
    Personality(String),
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error(transparent)]
    Root(#[from] RootError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Resource(#[from] ResourceError),
    #[error(transparent)]
    Device(#[from] DeviceFilterError),
    #[error(transparent)]
    Seccomp(#[from] ProfileError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
}

impl ContainerPlan {
    /// Reads and checks a `config.json`.
    pub fn new(json: &[u8]) -> Result<Self, PlanError> {
        let spec: Spec = serde_json::from_slice(json)?;
        if !spec.oci_version.starts_with("1.") {
            return Err(PlanError::Version(spec.oci_version));
        }
        let hooks = GuestHooks::new(spec.hooks.as_ref(), &spec.oci_version)
            .map_err(|(kind, path)| PlanError::Hook { kind, path })?;
        let linux = spec.linux.as_ref().ok_or(PlanError::Missing("linux"))?;
        refuse_unsupported(linux)?;
        let namespaces = Namespaces::new(linux)?;
        let named = |name: &Option<String>, property| match name.as_deref() {
            None | Some("") => Ok(None),
            Some(_) if !namespaces.has(Kind::Uts) => Err(PlanError::NoUts(property)),
            Some(name) => Ok(Some(name.to_owned())),
        };
        let (hostname, domainname) =
            (named(&spec.hostname, "hostname")?, named(&spec.domainname, "domainname")?);
        let sysctl = linux.sysctl.clone().unwrap_or_default();
        sysctl::check(sysctl.keys())?;
        let no_resources = Resources::default();
        let resources = linux.resources.as_ref().unwrap_or(&no_resources);
        let process = spec.process.as_ref().ok_or(PlanError::Missing("process"))?;
        let mut inherited = Inherited {
            filter: linux.seccomp.as_ref().map(Filter::new).transpose()?,
            personality: personality(linux)?,
            capabilities: CapabilitySets::default(),
        };
        let process = ProcessPlan::new(process, &inherited)?;
        inherited.capabilities = process.capabilities;
        Ok(Self {
            root: RootPlan::new(&spec, linux)?,
            process,
            inherited,
            limits: Limits::new(resources)?,
            devices: DeviceFilter::new(items(&resources.devices))?,
            namespaces,
            hostname,
            domainname,
            sysctl,
            hooks,
        })
    }
}

fn refuse_unsupported(linux: &Linux) -> Result<(), PlanError> {
    let present = [
        ("intelRdt", linux.intel_rdt.is_some()),
        ("memoryPolicy", linux.memory_policy.is_some()),
        ("netDevices", linux.net_devices.as_ref().is_some_and(|devices| !devices.is_empty())),
    ];
    match present.into_iter().find(|(_, present)| *present) {
        Some((property, _)) => Err(PlanError::Unsupported(property)),
        None => Ok(()),
    }
}

fn personality(linux: &Linux) -> Result<Option<libc::c_ulong>, PlanError> {
    let Some(personality) = &linux.personality else { return Ok(None) };
    match (personality.domain.as_str(), items(&personality.flags)) {
        ("LINUX", []) => Ok(Some(0x0000)),
        ("LINUX32", []) => Ok(Some(0x0008)),
        (domain, _) => Err(PlanError::Personality(domain.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(extra: &str, linux: &str) -> String {
        let json = format!(
            r#"{{"ociVersion": "1.2.0", "root": {{"path": "/r"}}, "process": {{"args": ["a"], "cwd": "/"}} {extra},
                "linux": {{"namespaces": [{{"type": "mount"}}] {linux} }} }}"#
        );
        match ContainerPlan::new(json.as_bytes()) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn what_can_not_be_carried_out_is_refused_by_name() {
        assert_eq!(error("", ""), "");
        assert_eq!(error(r#", "hooks": {"prestart": []}"#, r#", "intelRdt": null"#), "");
        let hook = r#", "hooks": {"createRuntime": [{"path": "/bin/hook"}]}"#;
        assert!(error(hook, "").contains("hooks.createRuntime: \"/bin/hook\""));
        assert!(error(r#", "hostname": "x""#, "").contains("UTS"));
        assert!(error("", r#", "intelRdt": {}"#).contains("intelRdt"));
        assert!(error("", r#", "netDevices": {"eth0": {}}"#).contains("netDevices"));
        assert!(error("", r#", "personality": {"domain": "SOLARIS"}"#).contains("SOLARIS"));
        assert!(error("", r#", "rootfsPropagation": "viral""#).contains("viral"));
        assert!(error("", r#", "sysctl": {"kernel.panic": "1"}"#).contains("kernel.panic"));
    }

    #[test]
    fn incomplete_specifications_are_refused() {
        let parse = |json: &str| ContainerPlan::new(json.as_bytes()).unwrap_err().to_string();
        assert!(parse("{").contains("not valid"));
        assert!(parse(r#"{"ociVersion": "2.0.0"}"#).contains("2.0.0"));
        assert!(parse(r#"{"ociVersion": "1.0.0"}"#).contains("linux is missing"));
        let linux = r#""linux": {"namespaces": [{"type": "mount"}]}"#;
        assert!(parse(&format!(r#"{{"ociVersion": "1.0.0", {linux}}}"#)).contains("process is missing"));
        let process = r#""process": {"args": ["a"], "cwd": "/"}"#;
        assert!(
            parse(&format!(r#"{{"ociVersion": "1.0.0", {linux}, {process}}}"#)).contains("root is missing")
        );
    }
}
