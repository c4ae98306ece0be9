//! A node as the kubelet sees it: containerd with its CRI plugin and a pod network, both of our own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bulkhead_cri::blocking::Client;
use bulkhead_cri::proto;

use crate::containerd::PrivateContainerd;
use crate::failure::{Explain, Outcome};
use crate::layout::Layout;
use crate::process::{self, eventually};
use crate::{ensure, node};

mod container;
mod http;
mod pod;

pub(crate) use container::{Container, shell};
pub use http::http_get;
pub(crate) use pod::Known;
pub use pod::Pod;

/// How long one call may take.
pub(crate) const CALL_LIMIT: Duration = Duration::from_secs(30);

/// The image of most containers.
pub(crate) const IMAGE: &str = "bulkhead.test/busybox:1";

/// The control group of all pods, as the kubelet's `kubepods`.
pub(crate) const CGROUP: &str = "bulkhead-cri";

/// The bridge of the pod network.
const BRIDGE: &str = "bulkhead0";

/// The host's address on the bridge.
pub(crate) const GATEWAY: &str = "10.88.0.1";

/// Who runs a pod: a runtime handler of containerd's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Handler {
    /// runc, which says what is right.
    Runc,
    /// Ours; containerd takes a pod for a pause container and others beside it.
    Bulkhead,
    /// Ours, by way of the Sandbox API.
    BulkheadSandbox,
    /// The same, with standard streams by containerd's Streaming API instead of FIFOs.
    BulkheadStreaming,
    /// Ours under the name of runc's runtime: containerd up to 2.1 asks no other for its features.
    BulkheadAsRunc,
}

impl Handler {
    /// The handler's name in the configuration.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Bulkhead => "bulkhead",
            Self::BulkheadSandbox => "bulkhead-sandbox",
            Self::BulkheadStreaming => "bulkhead-streaming",
            Self::BulkheadAsRunc => "bulkhead-as-runc",
        }
    }
}

/// The node. Ended, with everything on it, when dropped.
pub struct Node {
    containerd: PrivateContainerd,
    client: Client,
    counter: AtomicU32,
}

impl Node {
    /// Starts containerd, imports the images and runs a pod, so that what the first pod makes for all is there.
    ///
    /// # Errors
    /// When any of that does not work.
    pub fn start(layout: &Layout) -> Outcome<Self> {
        let containerd = PrivateContainerd::start_with_cri(layout, |path| {
            let network = path.join("cni");
            fs::create_dir(&network).explain(|| format!("make {}", network.display()))?;
            let file = network.join("10-pods.conflist");
            fs::write(&file, network_configuration()).explain(|| format!("write {}", file.display()))?;
            let shim = layout.bin("containerd-shim-bulkhead-v1");
            Ok(configuration(&network, &layout.cni_plugins(), &shim))
        })?;
        make_control_group(&Path::new("/sys/fs/cgroup").join(CGROUP))?;
        let client = Client::connect(&containerd.socket(), CALL_LIMIT).explain(|| "the CRI".into())?;
        let node = Self { containerd, client, counter: AtomicU32::new(0) };
        for image in ["pause", "busybox", "custom"] {
            node.containerd.import_for_cri(image)?;
        }
        eventually("the CRI plugin is ready", CALL_LIMIT, || {
            let answer = node.client.status(&proto::StatusRequest::default()).explain(|| "ready".into())?;
            let status = answer.status.unwrap_or_default();
            ensure!(status.conditions.len() > 1, "it names no conditions");
            for condition in &status.conditions {
                let important = ["RuntimeReady", "NetworkReady"].contains(&condition.type_.as_str());
                ensure!(!important || condition.status, "{}: {}", condition.type_, condition.message);
            }
            Ok(())
        })?;
        let first = Pod::run(&node, Handler::Runc, "first", |_| {})?;
        first.run_script("first", "true", |_| {})?;
        first.finish()?;
        Ok(node)
    }

    /// The client.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// containerd.
    pub(crate) fn containerd(&self) -> &PrivateContainerd {
        &self.containerd
    }

    /// Ends containerd and starts it again; pods go on meanwhile.
    ///
    /// # Errors
    /// When either does not work in time.
    pub(crate) fn restart(&mut self) -> Outcome {
        self.containerd.restart()?;
        self.client = Client::connect(&self.containerd.socket(), CALL_LIMIT).explain(|| "the CRI".into())?;
        eventually("the CRI plugin serves", CALL_LIMIT, || {
            self.client.status(&proto::StatusRequest::default()).explain(|| "the CRI".into()).map(drop)
        })
    }

    /// A directory of the node for volumes and the like, which the caller removes.
    ///
    /// # Errors
    /// When it can't be made.
    pub(crate) fn directory(&self, name: &str) -> Outcome<PathBuf> {
        let path = self.containerd.path().join(format!("{name}-{}", self.number()));
        fs::create_dir(&path).explain(|| format!("make {}", path.display()))?;
        Ok(path)
    }

    /// The directories in which pods must leave nothing.
    pub(crate) fn watched(&self) -> Vec<PathBuf> {
        let path = self.containerd.path();
        let plugin = "root/io.containerd.grpc.v1.cri";
        vec![path.join("state"), path.join(plugin), PathBuf::from("/var/lib/cni"), "/run/netns".into()]
    }

    fn number(&self) -> u32 {
        self.counter.fetch_add(1, Ordering::Relaxed)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // What is left of pods after a failure goes with containerd's directory; the rest is here.
        let _ = Command::new("ip").args(["link", "del", BRIDGE]).status();
        node::remove_control_group(CGROUP);
        node::remove_control_group("k8s.io");
    }
}

/// Brings up a network namespace of this process's own, so that no test touches the node's network. To be called before any
/// thread is started.
///
/// # Errors
/// When the kernel refuses.
pub fn enter_own_network() -> Outcome {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
        .explain(|| "make a network namespace".into())?;
    let mut command = Command::new("ip");
    process::run(command.args(["link", "set", "lo", "up"]), b"", CALL_LIMIT)?.success("ip link set lo up")?;
    Ok(())
}

/// Makes a control group whose children can have limits.
fn make_control_group(path: &Path) -> Outcome {
    fs::create_dir_all(path).explain(|| format!("make {}", path.display()))?;
    let controllers = path.join("cgroup.controllers");
    let controllers =
        fs::read_to_string(&controllers).explain(|| format!("read {}", controllers.display()))?;
    let file = path.join("cgroup.subtree_control");
    for controller in controllers.split_whitespace() {
        fs::write(&file, format!("+{controller}")).explain(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

/// The part of containerd's configuration for the CRI. `network` is the directory of the pod network's configuration.
fn configuration(network: &Path, cni_plugins: &Path, shim: &Path) -> String {
    let runtime = "plugins.'io.containerd.cri.v1.runtime'";
    let handler = |name: &str, runtime_type: &str, sandboxer: &str| {
        format!(
            "[{runtime}.containerd.runtimes.{name}]\nruntime_type = \"{runtime_type}\"\nsandboxer = \"{sandboxer}\"\n\
             pod_annotations = [\"io.bulkhead.*\"]\n"
        )
    };
    let ours = "io.containerd.bulkhead.v1";
    [
        "[plugins.'io.containerd.nri.v1.nri']\ndisable = true\n\
         [plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = \"bulkhead.test/pause:1\"\n\
         [plugins.'io.containerd.grpc.v1.cri']\ndisable_tcp_service = true\nstream_server_address = \"127.0.0.1\"\n\
         stream_server_port = \"0\"\n"
            .to_owned(),
        format!("[{runtime}]\nnetns_mounts_under_state_dir = true\n"),
        format!(
            "[{runtime}.cni]\nbin_dirs = [\"{}\"]\nconf_dir = \"{}\"\n",
            cni_plugins.display(),
            network.display()
        ),
        format!("[{runtime}.containerd]\ndefault_runtime_name = \"bulkhead\"\n"),
        handler(Handler::Runc.name(), "io.containerd.runc.v2", "podsandbox"),
        handler(Handler::Bulkhead.name(), ours, "podsandbox"),
        handler(Handler::BulkheadSandbox.name(), ours, "shim"),
        handler(Handler::BulkheadStreaming.name(), ours, "shim"),
        "io_type = \"streaming\"\n".to_owned(),
        handler(Handler::BulkheadAsRunc.name(), "io.containerd.runc.v2", "podsandbox"),
        format!("runtime_path = \"{}\"\n", shim.display()),
    ]
    .concat()
}

/// The pod network: a bridge with both kinds of addresses, and host ports.
fn network_configuration() -> String {
    format!(
        r#"{{
            "cniVersion": "1.0.0", "name": "bulkhead-pods", "plugins": [
                {{ "type": "bridge", "bridge": "{BRIDGE}", "isGateway": true, "ipMasq": false, "hairpinMode": true,
                   "ipam": {{ "type": "host-local",
                              "ranges": [[{{ "subnet": "10.88.0.0/16" }}], [{{ "subnet": "fd00:88::/64" }}]],
                              "routes": [{{ "dst": "0.0.0.0/0" }}, {{ "dst": "::/0" }}] }} }},
                {{ "type": "portmap", "capabilities": {{ "portMappings": true }}, "snat": true }}
            ] }}"#
    )
}
