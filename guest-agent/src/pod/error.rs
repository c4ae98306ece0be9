//! What can go wrong with containers and processes, sorted by who has to act.

use std::io;

use crate::container::cgroup::CgroupError;
use crate::container::cgroup::device_filter::DeviceFilterError;
use crate::container::cgroup::resources::{ApplyError, ResourceError};
use crate::container::launch::{FailureKind, LaunchError};
use crate::container::limits::LimitError;
use crate::container::plan::PlanError;
use crate::container::process::ProcessError;
use crate::stdio::StreamError;

/// A request that could not be carried out.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum PodError {
    #[error("{id:?} is not a {what} id: up to 76 of A-Z, a-z, 0-9, '_', '.' and '-'")]
    Id { what: &'static str, id: String },
    #[error("there is no container {0}")]
    NoContainer(String),
    #[error("there is no process {exec_id} in container {id}")]
    NoProcess { id: String, exec_id: String },
    #[error("container {0} exists already")]
    ContainerExists(String),
    #[error("there is a process {exec_id} in container {id} already")]
    ProcessExists { id: String, exec_id: String },
    #[error("container {0} is just being made or removed")]
    Busy(String),
    #[error("process {0} has already ended")]
    Ended(u32),
    #[error("container {id} is {state}")]
    State { id: String, state: &'static str },
    #[error("process {0} has no terminal")]
    NoTerminal(u32),
    #[error("process {0} has been started already")]
    Started(u32),
    #[error("{0} is not a signal")]
    Signal(u32),
    #[error("a signal for all processes names no single one")]
    SignalAll,
    #[error(transparent)]
    Plan(#[from] Box<PlanError>),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("{0} is not valid")]
    Json(&'static str, #[source] serde_json::Error),
    #[error(transparent)]
    Resource(#[from] ResourceError),
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Device(#[from] DeviceFilterError),
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("process {pid} did not end within {seconds} seconds of being killed")]
    Unkillable { pid: u32, seconds: u64 },
    #[error("can't {what}")]
    System { what: &'static str, source: io::Error },
}

/// Who has to act on an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ErrorClass {
    /// What was named does not exist.
    NotFound,
    /// What was to be made exists.
    AlreadyExists,
    /// It can't be done in this state.
    FailedPrecondition,
    /// It can't be done at all as it was asked for.
    InvalidArgument,
    /// Something else failed.
    Internal,
}

impl PodError {
    /// Who has to act.
    pub(crate) fn class(&self) -> ErrorClass {
        match self {
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::Ended(_) => ErrorClass::NotFound,
            Self::ContainerExists(_) | Self::ProcessExists { .. } => ErrorClass::AlreadyExists,
            Self::Busy(_) | Self::State { .. } | Self::NoTerminal(_) | Self::Started(_) => {
                ErrorClass::FailedPrecondition
            }
            Self::Id { .. }
            | Self::Signal(_)
            | Self::SignalAll
            | Self::Plan(_)
            | Self::Process(_)
            | Self::Json(..)
            | Self::Resource(_)
            | Self::Apply(ApplyError::Resource(_))
            | Self::Launch(LaunchError::Child { kind: FailureKind::Specification, .. }) => {
                ErrorClass::InvalidArgument
            }
            Self::Cgroup(error) | Self::Apply(ApplyError::Cgroup(error)) => cgroup_class(error),
            Self::Device(error) => match error {
                DeviceFilterError::Load(_) | DeviceFilterError::Attach(_) => ErrorClass::Internal,
                _ => ErrorClass::InvalidArgument,
            },
            Self::Limit(_)
            | Self::Launch(_)
            | Self::Stream(_)
            | Self::Unkillable { .. }
            | Self::System { .. } => ErrorClass::Internal,
        }
    }
}

fn cgroup_class(error: &CgroupError) -> ErrorClass {
    match error {
        CgroupError::NoController { .. } => ErrorClass::InvalidArgument,
        // The kernel did not like the value.
        CgroupError::Write { source, .. } if source.kind() == io::ErrorKind::InvalidInput => {
            ErrorClass::InvalidArgument
        }
        _ => ErrorClass::Internal,
    }
}
