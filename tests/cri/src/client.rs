//! The calls of the interface.

use std::path::Path;
use std::time::Duration;

use crate::grpc::{Channel, GrpcError};
use crate::proto;

/// A connection to a runtime. Clones share it.
#[derive(Clone)]
pub struct Client {
    channel: Channel,
}

impl Client {
    /// Connects to the runtime behind `socket`; each call may take `limit`.
    ///
    /// # Errors
    /// When nobody answers there.
    pub async fn connect(socket: &Path, limit: Duration) -> Result<Self, GrpcError> {
        Ok(Self { channel: Channel::connect(socket, Vec::new(), limit).await? })
    }
}

/// Defines the calls, once for programs with a tokio runtime and once for those without.
macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident: $method:literal, $request:ident -> $answer:ident;)*) => {
        impl Client {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                /// As for every call: see [`Channel::call`].
                pub async fn $name(&self, request: &proto::$request) -> Result<proto::$answer, GrpcError> {
                    self.channel.call(concat!("runtime.v1.RuntimeService/", $method), request).await
                }
            )*
        }

        impl crate::blocking::Client {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                /// As for every call: see [`Channel::call`].
                pub fn $name(&self, request: &proto::$request) -> Result<proto::$answer, GrpcError> {
                    self.wait(self.client().$name(request))
                }
            )*
        }
    };
}

calls! {
    /// What the runtime is.
    version: "Version", VersionRequest -> VersionResponse;
    /// Whether the runtime and its network are ready, and what its handlers can do.
    status: "Status", StatusRequest -> StatusResponse;
    /// Starts a pod.
    run_pod_sandbox: "RunPodSandbox", RunPodSandboxRequest -> RunPodSandboxResponse;
    /// Ends a pod and gives its network back.
    stop_pod_sandbox: "StopPodSandbox", StopPodSandboxRequest -> StopPodSandboxResponse;
    /// Removes a pod and its containers.
    remove_pod_sandbox: "RemovePodSandbox", RemovePodSandboxRequest -> RemovePodSandboxResponse;
    /// A pod's state and addresses.
    pod_sandbox_status: "PodSandboxStatus", PodSandboxStatusRequest -> PodSandboxStatusResponse;
    /// The pods that a filter lets through.
    list_pod_sandbox: "ListPodSandbox", ListPodSandboxRequest -> ListPodSandboxResponse;
    /// A pod's statistics.
    pod_sandbox_stats: "PodSandboxStats", PodSandboxStatsRequest -> PodSandboxStatsResponse;
    /// Adds a container to a pod.
    create_container: "CreateContainer", CreateContainerRequest -> CreateContainerResponse;
    /// Starts a container.
    start_container: "StartContainer", StartContainerRequest -> StartContainerResponse;
    /// Ends a container.
    stop_container: "StopContainer", StopContainerRequest -> StopContainerResponse;
    /// Removes a container.
    remove_container: "RemoveContainer", RemoveContainerRequest -> RemoveContainerResponse;
    /// The containers that a filter lets through.
    list_containers: "ListContainers", ListContainersRequest -> ListContainersResponse;
    /// A container's state.
    container_status: "ContainerStatus", ContainerStatusRequest -> ContainerStatusResponse;
    /// Changes a container's limits.
    update_container_resources: "UpdateContainerResources",
        UpdateContainerResourcesRequest -> UpdateContainerResourcesResponse;
    /// Opens a container's log anew after its file was moved away.
    reopen_container_log: "ReopenContainerLog", ReopenContainerLogRequest -> ReopenContainerLogResponse;
    /// A container's statistics.
    container_stats: "ContainerStats", ContainerStatsRequest -> ContainerStatsResponse;
    /// The statistics of the containers that a filter lets through.
    list_container_stats: "ListContainerStats", ListContainerStatsRequest -> ListContainerStatsResponse;
    /// Runs a program in a container to its end.
    exec_sync: "ExecSync", ExecSyncRequest -> ExecSyncResponse;
    /// An address that runs a program in a container.
    exec: "Exec", ExecRequest -> ExecResponse;
    /// An address of a container's streams.
    attach: "Attach", AttachRequest -> AttachResponse;
    /// An address of a pod's ports.
    port_forward: "PortForward", PortForwardRequest -> PortForwardResponse;
}
