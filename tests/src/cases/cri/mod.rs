//! Pods as Kubernetes has them: through containerd's CRI plugin, with a pod network.
//!
//! What is right is what a pod of runc does on the same node: [`like_runc`] asks both the same and compares the answers.

use super::{Case, Fixture};

mod changes;
mod conformance;
mod ends;
mod features;
mod host_namespaces;
mod lifecycle;
mod like_runc;
mod network;
mod odd;
mod odd_ends;
mod pod_settings;
mod shared_files;
mod streams;
mod volumes;

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("cri-pod", lifecycle::pod).on(Fixture::Cri),
    Case::new("cri-sandbox-pod", lifecycle::pod).on(Fixture::Cri).sandboxed(),
    Case::new("cri-restart-of-containerd", lifecycle::restart).on(Fixture::Cri),
    Case::new("cri-streaming-pod", lifecycle::pod).on(Fixture::Cri).streamed(),
    Case::new("cri-streaming-restart-of-containerd", lifecycle::restart).on(Fixture::Cri).streamed(),
    Case::new("cri-resources-and-statistics", lifecycle::resources).on(Fixture::Cri),
    Case { limit: 90, ..Case::new("cri-changes-are-counted", changes::counted).on(Fixture::Cri) },
    Case::new("cri-sysctls", pod_settings::sysctls).on(Fixture::Cri),
    Case::new("cri-shared-processes", pod_settings::shared_processes).on(Fixture::Cri),
    Case::new("cri-sandbox-shared-processes", pod_settings::shared_processes).on(Fixture::Cri).sandboxed(),
    Case::new("cri-host-processes", host_namespaces::processes).on(Fixture::Cri),
    Case::new("cri-sandbox-host-processes", host_namespaces::processes).on(Fixture::Cri).sandboxed(),
    Case::new("cri-host-ipc", host_namespaces::ipc).on(Fixture::Cri),
    Case::new("cri-sandbox-host-ipc", host_namespaces::ipc).on(Fixture::Cri).sandboxed(),
    Case::new("cri-privileged", host_namespaces::privileged).on(Fixture::Cri),
    Case::new("cri-sandbox-privileged", host_namespaces::privileged).on(Fixture::Cri).sandboxed(),
    Case::new("cri-features", features::announced).on(Fixture::Cri).bulkhead_only(),
    Case::new("cri-recursive-read-only", features::recursive_read_only).on(Fixture::Cri).bulkhead_only(),
    Case::new("cri-users-of-their-own", features::own_users).on(Fixture::Cri).bulkhead_only(),
    Case::new("cri-sandbox-users-of-their-own", features::own_users).on(Fixture::Cri).sandboxed(),
    Case::new("cri-conformance", conformance::rest).on(Fixture::Cri),
    Case::new("cri-sandbox-conformance", conformance::rest).on(Fixture::Cri).sandboxed(),
    Case::new("cri-refused-containers", conformance::refused).on(Fixture::Cri).bulkhead_only(),
    Case::new("cri-refused-pods", pod_settings::refused).on(Fixture::Cri).bulkhead_only(),
    Case::new("cri-network-host", network::host).on(Fixture::Cri),
    Case::new("cri-network-pods", network::pods).on(Fixture::Cri),
    Case::new("cri-network-host-port", network::host_port).on(Fixture::Cri),
    Case::new("cri-network-port-forward", network::port_forward).on(Fixture::Cri),
    Case::new("cri-vmm-dies", ends::vmm_dies).on(Fixture::Cri).bulkhead_only(),
    Case::new("cri-containers-of-a-pod", lifecycle::containers).on(Fixture::CriPods),
    Case::new("cri-network-addresses", network::addresses).on(Fixture::CriPods),
    Case::new("cri-program", like_runc::program).on(Fixture::CriPods),
    Case::new("cri-users", like_runc::users).on(Fixture::CriPods),
    Case::new("cri-privileges", like_runc::privileges).on(Fixture::CriPods),
    Case::new("cri-file-systems", like_runc::file_systems).on(Fixture::CriPods),
    Case::new("cri-limits", like_runc::limits).on(Fixture::CriPods),
    Case::new("cri-parameters", like_runc::parameters).on(Fixture::CriPods),
    Case::new("cri-seccomp", like_runc::seccomp).on(Fixture::CriPods),
    Case::new("cri-volumes", volumes::kinds).on(Fixture::CriPods),
    Case::new("cri-sandbox-network-addresses", network::addresses).on(Fixture::CriPods).sandboxed(),
    Case::new("cri-sandbox-program", like_runc::program).on(Fixture::CriPods).sandboxed(),
    Case::new("cri-sandbox-users", like_runc::users).on(Fixture::CriPods).sandboxed(),
    Case::new("cri-sandbox-privileges", like_runc::privileges).on(Fixture::CriPods).sandboxed(),
    Case::new("cri-sandbox-file-systems", like_runc::file_systems).on(Fixture::CriPods).sandboxed(),
    Case::new("cri-sandbox-limits", like_runc::limits).on(Fixture::CriPods).sandboxed(),
    Case::new("cri-sandbox-parameters", like_runc::parameters).on(Fixture::CriPods).sandboxed(),
    Case::new("cri-sandbox-seccomp", like_runc::seccomp).on(Fixture::CriPods).sandboxed(),
    Case::new("cri-sandbox-volumes", volumes::kinds).on(Fixture::CriPods).sandboxed(),
    Case::new("cri-sandbox-out-of-memory", ends::out_of_memory).on(Fixture::CriPods).sandboxed(),
    Case::new("cri-sandbox-exec", streams::exec).on(Fixture::CriPods).sandboxed(),
    Case::new("cri-sandbox-logs", streams::logs).on(Fixture::CriPods).sandboxed(),
    Case::new("cri-streaming-exec", streams::exec).on(Fixture::CriPods).streamed(),
    Case::new("cri-streaming-terminal", streams::terminal).on(Fixture::CriPods).streamed(),
    Case::new("cri-streaming-logs", streams::logs).on(Fixture::CriPods).streamed(),
    Case::new("cri-volume-mounted-later", volumes::mounted_later).on(Fixture::CriPods),
    Case::new("cri-volume-of-a-pod", shared_files::of_a_pod).on(Fixture::CriPods),
    Case::new("cri-volume-changed-by-node", shared_files::changed_by_the_node).on(Fixture::CriPods),
    Case::new("cri-volume-room", shared_files::room).on(Fixture::CriPods),
    Case {
        limit: 120,
        ..Case::new("cri-volume-of-many-files", shared_files::many_files).on(Fixture::CriPods)
    },
    Case::new("cri-odd-settings", odd::settings).on(Fixture::CriPods),
    Case::new("cri-odd-refusals", odd::refusals).on(Fixture::CriPods),
    Case::new("cri-odd-execs", odd::execs).on(Fixture::CriPods),
    Case { limit: 240, ..Case::new("cri-odd-many", odd::many).on(Fixture::CriPods) },
    Case::new("cri-odd-out-of-memory", odd_ends::out_of_memory).on(Fixture::CriPods),
    Case::new("cri-odd-sandbox-out-of-memory", odd_ends::out_of_memory).on(Fixture::CriPods).sandboxed(),
    Case::new("cri-odd-left-behind", odd_ends::left_behind).on(Fixture::Cri),
    Case::new("cri-odd-sandbox-left-behind", odd_ends::left_behind).on(Fixture::Cri).sandboxed(),
    Case::new("cri-odd-attached", odd_ends::attached).on(Fixture::CriPods),
    Case::new("cri-odd-figures", odd_ends::figures).on(Fixture::CriPods),
    Case::new("cri-odd-image-volume", odd_ends::image_volume).on(Fixture::Cri),
    Case::new("cri-exit-codes", ends::exit_codes).on(Fixture::CriPods),
    Case::new("cri-no-such-program", ends::no_such_program).on(Fixture::CriPods),
    Case::new("cri-out-of-memory", ends::out_of_memory).on(Fixture::CriPods),
    Case::new("cri-exec", streams::exec).on(Fixture::CriPods),
    Case::new("cri-terminal", streams::terminal).on(Fixture::CriPods),
    Case::new("cri-logs", streams::logs).on(Fixture::CriPods),
];
