//! What a container is within its pod, by the annotations of containerd's CRI plugin.

use oci_spec::runtime::Spec;

use crate::error::{Classify, Code};
use crate::id::{self, IdError};

const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// A container's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// A pod of its own: `ctr`, `nerdctl`, Docker.
    Single,
    /// The sandbox of a Kubernetes pod.
    Sandbox,
    /// A container in the Kubernetes pod with this sandbox.
    Member(String),
}

/// Whether a container is one that the kubelet has asked for.
pub(crate) fn is_of_cri(spec: &Spec) -> bool {
    let kind = spec.annotations().as_ref().and_then(|annotations| annotations.get(CONTAINER_TYPE));
    kind.is_some_and(|kind| kind == "container")
}

/// Annotations that contradict each other.
#[derive(Debug, thiserror::Error)]
pub enum RoleError {
    /// A container of a pod without a pod.
    #[error("the container is part of a pod, but the annotation {SANDBOX_ID} is missing")]
    NoSandbox,
    /// Not an id.
    #[error("the annotation {SANDBOX_ID} is wrong")]
    SandboxId(#[source] IdError),
    /// A type that nobody knows.
    #[error("the annotation {CONTAINER_TYPE} is {0:?}: it must be \"sandbox\" or \"container\"")]
    Type(String),
}

impl Classify for RoleError {
    fn code(&self) -> Code {
        Code::INVALID_ARGUMENT
    }
}

impl Role {
    /// Reads a container's role from its specification.
    pub fn of(spec: &Spec) -> Result<Role, RoleError> {
        let annotation = |key| {
            spec.annotations().as_ref().and_then(|annotations| annotations.get(key)).map(String::as_str)
        };
        match annotation(CONTAINER_TYPE) {
            None => Ok(Role::Single),
            Some("sandbox") => Ok(Role::Sandbox),
            Some("container") => {
                let sandbox = annotation(SANDBOX_ID).ok_or(RoleError::NoSandbox)?;
                id::check(sandbox).map_err(RoleError::SandboxId)?;
                Ok(Role::Member(sandbox.to_owned()))
            }
            Some(other) => Err(RoleError::Type(other.chars().take(64).collect())),
        }
    }
}
