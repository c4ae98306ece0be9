//! The host's side of a pod's network: what CNI has put into the pod's network namespace, carried to the guest.
//!
//! Each interface of the namespace is joined to a tap device beside it, whose other end is the VMM's: what the interface
//! receives goes to the tap, and what the guest sends through the tap leaves by the interface, if it comes from an address
//! that the interface has been given. The host's own network stack in the namespace sees none of it. The taps live as long
//! as the VMM has them open; what is put on the interfaces themselves is removed with the pod.

pub(crate) mod bpf;
mod filter;
mod interface;
mod join;
mod namespace;
mod parameters;
mod tap;

use std::io;
use std::path::PathBuf;

pub(crate) use interface::Interface;
pub(crate) use join::{Joined, join_all, release};
pub(crate) use namespace::{Namespace, Record};
pub(crate) use tap::Tap;

use crate::error::{Classify, Code};

/// Why a pod's network can't be carried to its guest.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// There is no such namespace.
    #[error("can't open the pod's network namespace {path}")]
    Open {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("{0} is no network namespace")]
    NotANamespace(PathBuf),
    /// It is the host's own.
    #[error(
        "{0} is the host's network namespace: host network is not possible, a pod has a kernel of its own"
    )]
    Host(PathBuf),
    /// It can't be entered.
    #[error("can't enter the pod's network namespace: {step}")]
    Enter {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The kernel does not answer.
    #[error("the kernel did not carry out a change in the pod's network namespace within {} s", namespace::LIMIT.as_secs())]
    TimedOut,
    /// The interfaces can't be read.
    #[error("can't read the {what} of the pod's network namespace")]
    Read {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An interface whose packets can't be carried.
    #[error("the pod's network interface {name} can't be carried into it: {reason}")]
    Unsupported {
        /// Its name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// No tap device.
    #[error("can't make a tap device for the pod's network interface {name}: {step}")]
    Tap {
        /// The interface's name.
        name: String,
        /// What was tried, and what may be wrong.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The two can't be joined.
    #[error("can't join the pod's network interface {name} to its tap device: {step}")]
    Join {
        /// The interface's name.
        name: String,
        /// What was tried, and what may be wrong.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl Classify for NetError {
    fn code(&self) -> Code {
        match self {
            NetError::Open { .. } | NetError::Unsupported { .. } => Code::FAILED_PRECONDITION,
            NetError::NotANamespace(_) | NetError::Host(_) => Code::INVALID_ARGUMENT,
            _ => Code::INTERNAL,
        }
    }
}
