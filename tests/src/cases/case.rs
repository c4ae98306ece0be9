//! A case, and what it asks for.

use super::Environment;
use crate::failure::Outcome;

/// What has to be there before a case starts, cheapest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fixture {
    /// A [`ShimHost`](crate::shim::ShimHost).
    Shim,
    /// A container that runs and is shared by the cases that only look at it or exec into it.
    Pod,
    /// A [`PrivateContainerd`](crate::containerd::PrivateContainerd) with the busybox image.
    Containerd,
    /// A [`Docker`](crate::docker::Docker).
    Docker,
    /// A [`Node`](crate::cri::Node).
    Cri,
    /// The same with two pods that are shared by the cases that only add containers to them: one of the handler under test,
    /// and one of runc, which says what is right.
    CriPods,
    /// An [`Arena`](crate::attack::arena::Arena). The last, as it changes the node's settings while it is there.
    Attack,
}

/// The runtime under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// Ours.
    Bulkhead,
    /// containerd's own for runc: shows that the suite asks for what containerd's users are used to.
    Runc,
}

impl Runtime {
    /// containerd's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bulkhead => "io.containerd.bulkhead.v1",
            Self::Runc => "io.containerd.runc.v2",
        }
    }

    /// The file name of its shim.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Bulkhead => "containerd-shim-bulkhead-v1",
            Self::Runc => "containerd-shim-runc-v2",
        }
    }
}

/// One case.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// `THEME-WHAT`.
    pub name: &'static str,
    /// What has to be there.
    pub fixture: Fixture,
    /// Whether it is about what only our runtime has.
    pub bulkhead_only: bool,
    /// Whether its pods boot; else they start from the template of the default size.
    pub cold: bool,
    /// Whether what its containers change of their root file systems is on a disk.
    pub changes_on_disk: bool,
    /// Whether its pods come by way of the Sandbox API.
    pub sandboxed: bool,
    /// Whether containerd opens its processes' standard streams by its Streaming API.
    pub streamed: bool,
    /// The larger test image that it asks for.
    pub image: Option<&'static str>,
    /// Whether it asks for Bulkhead's own guest kernel.
    pub own_kernel: bool,
    /// How long it may take, seconds.
    pub limit: u64,
    /// The case itself; returns its evidence.
    pub run: fn(&mut Environment) -> Outcome<String>,
}

impl Case {
    /// A case on a [`ShimHost`](crate::shim::ShimHost) that any runtime should pass.
    pub const fn new(name: &'static str, run: fn(&mut Environment) -> Outcome<String>) -> Self {
        Self {
            name,
            fixture: Fixture::Shim,
            bulkhead_only: false,
            cold: false,
            changes_on_disk: false,
            sandboxed: false,
            streamed: false,
            image: None,
            own_kernel: false,
            limit: 30,
            run,
        }
    }

    /// The same on another fixture.
    pub(crate) const fn on(mut self, fixture: Fixture) -> Self {
        self.fixture = fixture;
        self
    }

    /// The same for our runtime only.
    pub(crate) const fn bulkhead_only(mut self) -> Self {
        self.bulkhead_only = true;
        self
    }

    /// The same with the configuration by which all changes of root file systems go onto a disk.
    pub(crate) const fn with_changes_on_disk(mut self) -> Self {
        self.changes_on_disk = true;
        self
    }

    /// The same in pods that come by way of the Sandbox API.
    pub(crate) const fn sandboxed(mut self) -> Self {
        self.sandboxed = true;
        self.bulkhead_only()
    }

    /// The same, and standard streams by containerd's Streaming API instead of FIFOs.
    pub(crate) const fn streamed(mut self) -> Self {
        self.streamed = true;
        self.sandboxed()
    }

    /// The same with so many seconds.
    pub(crate) const fn within(mut self, seconds: u64) -> Self {
        self.limit = seconds;
        self
    }

    /// The same with one of the larger test images.
    pub(crate) const fn with_image(mut self, name: &'static str) -> Self {
        self.image = Some(name);
        self
    }

    /// The same about what only Bulkhead's own guest kernel has.
    pub(crate) const fn own_kernel(mut self) -> Self {
        self.own_kernel = true;
        self
    }

    /// The same in pods that boot.
    pub(crate) const fn cold(mut self) -> Self {
        self.cold = true;
        self.bulkhead_only()
    }
}
