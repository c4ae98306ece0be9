//! The network of a pod: the interfaces of its namespace on the host become the guest's.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use bulkhead_vmm_protocol::{AttachNet, DEVICE_SLOTS, MAX_QUEUE_PAIRS, Request};
use tokio::task::JoinHandle;

use super::Pod;
use super::agent::AgentError;
use super::machine::MachineError;
use crate::config::Config;
use crate::error::{Classify, Code, chain};
use crate::net::{Interface, Joined, Namespace, NetError, Record, join_all, release};

/// Why a pod does not get its network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The host's side.
    #[error(transparent)]
    Host(#[from] NetError),
    /// The interfaces were being prepared by a task that is gone.
    #[error("the preparation of the pod's network interfaces was given up")]
    Lost,
    /// More interfaces than there is room for.
    #[error(
        "there is no slot left for the pod's network interface {0}: disks and interfaces together can be {DEVICE_SLOTS}"
    )]
    NoSlot(String),
    /// The VMM does not take one.
    #[error("can't give the network interface {name} to the pod")]
    Machine {
        /// Its name.
        name: String,
        /// Why not.
        #[source]
        source: MachineError,
    },
    /// The guest does not take one.
    #[error("the guest does not take the network interface {name}")]
    Guest {
        /// Its name.
        name: String,
        /// Why not.
        #[source]
        source: AgentError,
    },
}

impl Classify for NetworkError {
    fn code(&self) -> Code {
        match self {
            NetworkError::Host(error) => error.code(),
            NetworkError::Lost => Code::INTERNAL,
            NetworkError::NoSlot(_) => Code::RESOURCE_EXHAUSTED,
            NetworkError::Machine { source, .. } => source.code(),
            NetworkError::Guest { source, .. } => source.code(),
        }
    }
}

type Joining = JoinHandle<Result<Vec<Joined>, NetError>>;

/// A pod's network namespace and what has come of it.
#[derive(Debug)]
pub(crate) struct Network {
    namespace: Namespace,
    queue_pairs: u8,
    spoof_check: bool,
    /// The interfaces that were there when the pod began to start.
    joining: Mutex<Option<Joining>>,
    /// The numbers of interfaces that need no looking at any more: those that are the guest's, and their taps.
    known: tokio::sync::Mutex<Vec<u32>>,
}

impl Network {
    /// Opens the namespace at a path for a pod of this configuration.
    pub(crate) fn open(path: &Path, config: &Config) -> Result<Network, NetError> {
        Ok(Network {
            namespace: Namespace::open(path)?,
            // A queue pair for each vCPU.
            queue_pairs: config.size.vcpus.clamp(1, MAX_QUEUE_PAIRS),
            spoof_check: config.spoof_check,
            joining: Mutex::default(),
            known: tokio::sync::Mutex::default(),
        })
    }

    /// What the namespace is found by again.
    pub(crate) fn record(&self) -> &Record {
        self.namespace.record()
    }

    /// The namespace.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.namespace.fd()
    }

    /// Begins to join the interfaces to taps, which takes the kernel its time.
    pub(crate) fn begin(&self) {
        let joining = tokio::spawn(self.join(Vec::new()));
        *self.joining.lock().unwrap_or_else(PoisonError::into_inner) = Some(joining);
    }

    fn join(&self, known: Vec<u32>) -> impl Future<Output = Result<Vec<Joined>, NetError>> + use<> {
        let (namespace, queues, check) = (self.namespace.clone(), self.queue_pairs, self.spoof_check);
        async move { namespace.inside(move |socket| join_all(socket, &known, queues, check)).await }
    }

    /// The interfaces that are not the guest's yet.
    async fn new_ones(&self, known: &[u32]) -> Result<Vec<Joined>, NetworkError> {
        let begun = self.joining.lock().unwrap_or_else(PoisonError::into_inner).take();
        match begun {
            Some(joining) => Ok(joining.await.map_err(|_| NetworkError::Lost)??),
            None => Ok(self.join(known.to_vec()).await?),
        }
    }

    /// Takes from the namespace what was put into it. The taps are gone already, with the VMM.
    pub(crate) async fn release(&self) {
        let begun = self.joining.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(joining) = begun {
            // Nothing is to be joined behind us.
            let _ = joining.await;
        }
        if let Err(error) = self.namespace.inside(release).await {
            log::error!("the pod's network interfaces stay joined: {}", chain(&error));
        }
    }
}

/// An interface that the machine has in a slot, and the guest does not know of yet.
#[derive(Debug)]
pub(super) struct Attached {
    slot: u8,
    interface: Interface,
}

impl Pod {
    /// Gives the guest the interfaces of the pod's network namespace that it does not have yet: whenever there may be others
    /// than at its start. Parameters that were `chosen` stay as they are.
    pub(crate) async fn connect_network(&self, chosen: &HashMap<String, String>) -> Result<(), NetworkError> {
        let attached = self.attach_interfaces().await?;
        self.introduce_interfaces(attached, chosen).await
    }

    /// Puts interfaces into the machine, which needs no guest that listens.
    pub(super) async fn attach_interfaces(&self) -> Result<Vec<Attached>, NetworkError> {
        let Some(network) = &self.network else { return Ok(Vec::new()) };
        let mut known = network.known.lock().await;
        let mut attached = Vec::new();
        for joined in network.new_ones(&known).await? {
            known.extend([joined.interface.index, joined.tap.index]);
            attached.push(self.attach_interface(joined).await?);
        }
        Ok(attached)
    }

    async fn attach_interface(&self, joined: Joined) -> Result<Attached, NetworkError> {
        let Joined { interface, tap } = joined;
        let name = || interface.name.clone();
        let slot = self.slots.take_for_interface().ok_or_else(|| NetworkError::NoSlot(name()))?;
        let request = Request::AttachNet(AttachNet {
            slot,
            mac: interface.mac,
            mtu: interface.mtu,
            // Bounded by MAX_QUEUE_PAIRS.
            queue_pairs: tap.queues.len() as u8,
            offloads: tap.offloads,
        });
        let queues: Vec<_> = tap.queues.iter().map(AsFd::as_fd).collect();
        if let Err(source) = self.control.request("AttachNet", &request, &queues).await {
            self.slots.give_back(slot);
            return Err(NetworkError::Machine { name: name(), source });
        }
        log::info!(
            "the pod has the network interface {}: {} queue pairs, UDP segmentation {}",
            interface.name,
            queues.len(),
            if tap.offloads.uso { "on" } else { "off" }
        );
        Ok(Attached { slot, interface })
    }

    /// Has the guest take interfaces up, without the parameters that were `chosen` for it.
    pub(super) async fn introduce_interfaces(
        &self,
        attached: Vec<Attached>,
        chosen: &HashMap<String, String>,
    ) -> Result<(), NetworkError> {
        for Attached { slot, mut interface } in attached {
            interface.leave_out(chosen);
            if let Err(source) = self.agent.add_interface(&interface.request(slot)).await {
                self.take_out(slot).await;
                return Err(NetworkError::Guest { name: interface.name, source });
            }
        }
        if self.network.is_some() {
            self.timeline.stamp("network");
        }
        Ok(())
    }
}
