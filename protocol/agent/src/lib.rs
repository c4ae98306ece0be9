//! The ttrpc API between the shim and the guest agent; `proto/agent.proto` documents it.
#![allow(missing_docs, reason = "the documentation of generated code is in the proto file")]

pub mod forward;
pub mod names;

/// Port on the host side (context id 2) that the agent dials to serve its API.
pub const AGENT_PORT: u32 = 1024;

/// Port in the guest that the host opens stdio streams to.
pub const STDIO_PORT: u32 = 1025;

/// Where the pod's shared tree is mounted in the guest.
pub const SHARED_DIR: &str = "/run/bulkhead/shared";

/// Where the root file systems in it are that are shared as files, in a file system of their own.
pub const ROOTS_DIR: &str = "/run/bulkhead/roots";

/// An option of a bind mount of the guest's `/dev/shm`, followed by a number: how many bytes it has to have room for.
pub const SHM_SIZE_OPTION: &str = "size=";

/// What a specification names as the PID namespace that containers of a pod share where no container's own is it.
pub const POD_PID_NAMESPACE: &str = "/run/bulkhead/pod/ns/pid";

/// Where file systems on disks are mounted in the guest, each in a directory with the number of its slot.
pub const DISKS_DIR: &str = "/run/bulkhead/disks";

/// Where the layers of those are that are overlays, likewise; each in a directory with its number.
pub const LAYERS_DIR: &str = "/run/bulkhead/layers";

pub mod cgroup;

mod agent {
    #![allow(warnings, clippy::all, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

mod agent_ttrpc {
    #![allow(warnings, clippy::all, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

pub use agent::*;
pub use agent_ttrpc::*;

/// The weight of a cgroup (version 2) for CPU shares, which the host and the guest translate alike.
///
/// Shares (2 to 262144, usually 1024) become a weight (1 to 10000, usually 100).
///
/// The logarithms are joined by a parabola through (2, 1), (1024, 100) and (262144, 10000), as current runtimes do, so
/// that the usual share becomes the usual weight.
pub fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            (10f64.powf(exponent).ceil() as u64).clamp(1, 10_000)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_weights() {
        for (shares, weight) in [(1, 1), (2, 1), (1024, 100), (262_144, 10_000), (u64::MAX, 10_000)] {
            assert_eq!(weight_of_shares(shares), weight, "{shares}");
        }
        assert!((2..262_144).step_by(997).all(|n| weight_of_shares(n) <= weight_of_shares(n + 997)));
    }
}
