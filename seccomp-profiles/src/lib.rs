//! The seccomp filters of every thread Bulkhead runs, and the default one for workloads.
//!
//! The filters are data: one JSON file each beside this crate's `Cargo.toml`, with the reason of every rule in its
//! `comment`. The build compiles them, so that no process parses anything when it locks itself up, into programs that are
//! short to run: the kernel runs one for each call number when it is installed. A call that no rule allows kills the whole
//! process.

use seccompiler::{BpfProgram, sock_filter};

/// The filter of one kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// The VMM's main thread: serves the control socket.
    VmmControl,
    /// The VMM's main thread when the machine is one that can be saved: reads vCPU state as well.
    VmmTemplate,
    /// The VMM's thread for devices that never wait for the node's storage: network, sockets, console and others.
    VmmDevice,
    /// The VMM's thread for disks and file systems.
    VmmStorage,
    /// A VMM thread that runs a vCPU.
    VmmVcpu,
    /// The file server, all threads.
    FsServer,
}

/// A filter that could not be installed.
#[derive(Debug, thiserror::Error)]
#[error("can't install the {filter:?} seccomp filter")]
pub struct FilterError {
    filter: Filter,
    #[source]
    source: seccompiler::Error,
}

impl Filter {
    /// Installs the filter on the calling thread, for good; sets `no_new_privs` first.
    ///
    /// Threads created later inherit it and can only add to it.
    pub fn install(self) -> Result<(), FilterError> {
        seccompiler::apply_filter(&self.program()).map_err(|source| FilterError { filter: self, source })
    }

    /// Installs the filter on all threads that the process has now, for good; sets their `no_new_privs` first.
    ///
    /// Fails, on all of them, if one has a filter that the calling thread has not. A thread that is just being made may
    /// make calls of the C library that the filter does not know: let each say that it runs before this is called.
    pub fn install_on_all_threads(self) -> Result<(), FilterError> {
        seccompiler::apply_filter_all_threads(&self.program())
            .map_err(|source| FilterError { filter: self, source })
    }

    fn program(self) -> BpfProgram {
        let bytes: &[u8] = match self {
            Filter::VmmControl => include_bytes!(concat!(env!("OUT_DIR"), "/vmm-control.bpf")),
            Filter::VmmTemplate => include_bytes!(concat!(env!("OUT_DIR"), "/vmm-template.bpf")),
            Filter::VmmDevice => include_bytes!(concat!(env!("OUT_DIR"), "/vmm-device.bpf")),
            Filter::VmmStorage => include_bytes!(concat!(env!("OUT_DIR"), "/vmm-storage.bpf")),
            Filter::VmmVcpu => include_bytes!(concat!(env!("OUT_DIR"), "/vmm-vcpu.bpf")),
            Filter::FsServer => include_bytes!(concat!(env!("OUT_DIR"), "/fs-server.bpf")),
        };
        bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|&[code0, code1, jt, jf, k0, k1, k2, k3]| sock_filter {
                code: u16::from_le_bytes([code0, code1]),
                jt,
                jf,
                k: u32::from_le_bytes([k0, k1, k2, k3]),
            })
            .collect()
    }
}

/// The default filter for workloads: an OCI `linux.seccomp` object (runtime specification, section "Seccomp") as JSON.
pub fn workload_default() -> &'static str {
    include_str!("../workload-default.json")
}
