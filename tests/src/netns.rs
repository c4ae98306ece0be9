//! Network namespaces with interfaces that Debian's CNI plugins make, as a node has them for its pods.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use serde_json::{Value, json};

use crate::failure::{Explain, Outcome};
use crate::process;

/// Where Debian has the plugins, unless they came with us.
const PLUGINS: &str = "/usr/lib/cni";

/// How long a plugin or a command may take.
const LIMIT: Duration = Duration::from_secs(20);

fn plugins() -> PathBuf {
    let ours = std::env::current_exe().ok().and_then(|program| Some(program.parent()?.parent()?.join("cni")));
    ours.filter(|ours| ours.is_dir()).unwrap_or_else(|| PathBuf::from(PLUGINS))
}

/// A network that the plugins know: its configuration.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    config: Value,
    /// The node's link that ends with it: its bridge, or what its interfaces lie above.
    link: Option<String>,
}

impl Network {
    /// A bridge with addresses of both families; `number` tells networks apart. Records go below `directory`.
    pub(crate) fn bridge(directory: &Path, number: u8, mtu: u32) -> Network {
        let name = format!("bhtest{number}");
        let config = json!({
            "cniVersion": "1.0.0", "name": name, "type": "bridge", "bridge": name, "isGateway": true, "mtu": mtu,
            "ipam": ipam(directory, number)
        });
        Network { config, link: Some(name) }
    }

    /// Interfaces of the kind `macvlan` or `ipvlan` above one link of the node.
    ///
    /// # Errors
    /// When the link can't be made.
    pub(crate) fn above_a_link(directory: &Path, number: u8, kind: &str, mode: &str) -> Outcome<Network> {
        let name = format!("bhtest{number}");
        let script = format!("ip link add {name} type dummy && ip link set {name} up");
        process::run(Command::new("sh").args(["-c", &script]), b"", LIMIT)?.success(&script)?;
        let config = json!({
            "cniVersion": "1.0.0", "name": name, "type": kind, "master": name, "mode": mode, "ipam": ipam(directory, number)
        });
        Ok(Network { config, link: Some(name) })
    }

    /// A pair of links whose other end routes.
    pub(crate) fn ptp(directory: &Path, number: u8) -> Network {
        let config = json!({
            "cniVersion": "1.0.0", "name": format!("bhtest{number}"), "type": "ptp", "ipam": ipam(directory, number)
        });
        Network { config, link: None }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some(link) = &self.link {
            let _ = process::run(Command::new("ip").args(["link", "del", link]), b"", LIMIT);
        }
    }
}

fn ipam(directory: &Path, number: u8) -> Value {
    json!({
        "type": "host-local", "dataDir": directory.join("cni"),
        "ranges": [[{ "subnet": format!("10.{number}.0.0/24") }], [{ "subnet": format!("fd00:{number}::/64") }]],
        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]
    })
}

/// A network namespace; it ends with this.
#[derive(Debug)]
pub(crate) struct Namespace {
    holder: Child,
    /// What it is called to the plugins.
    id: String,
    /// What has been added, to be taken back.
    added: Vec<(Value, String)>,
}

impl Namespace {
    /// A new one, with loopback only.
    ///
    /// # Errors
    /// When it can't be made.
    pub(crate) fn new(id: &str) -> Outcome<Namespace> {
        let holder = Command::new("unshare").args(["-n", "sleep", "100000"]).spawn();
        let holder = holder.explain(|| "start unshare".into())?;
        let namespace = Namespace { holder, id: id.to_owned(), added: Vec::new() };
        process::eventually("the namespace is there", LIMIT, || {
            let own = std::fs::read_link("/proc/self/ns/net").explain(|| "own namespace".into())?;
            let its = std::fs::read_link(namespace.path()).explain(|| "its namespace".into())?;
            crate::ensure!(own != its, "still the node's own");
            Ok(())
        })?;
        namespace.run("ip link set lo up")?;
        Ok(namespace)
    }

    /// Its path.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.holder.id()))
    }

    /// Adds an interface of a network; gives its addresses, IPv4 first.
    ///
    /// # Errors
    /// What the plugin says.
    pub(crate) fn add(&mut self, network: &Network, interface: &str) -> Outcome<[String; 2]> {
        self.added.push((network.config.clone(), interface.to_owned()));
        let said = self.plugin("ADD", &network.config, interface)?;
        let result: Value = serde_json::from_str(&said).explain(|| format!("the plugin's answer {said}"))?;
        let address = |number: usize| {
            let text = result["ips"][number]["address"].as_str().unwrap_or_default();
            text.split('/').next().unwrap_or_default().to_owned()
        };
        Ok([address(0), address(1)])
    }

    fn plugin(&self, command: &str, config: &Value, interface: &str) -> Outcome<String> {
        let plugin = plugins().join(config["type"].as_str().unwrap_or_default());
        let mut run = Command::new(&plugin);
        run.env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.id)
            .env("CNI_NETNS", self.path())
            .env("CNI_IFNAME", interface)
            .env("CNI_PATH", plugins());
        let output = process::run(&mut run, config.to_string().as_bytes(), LIMIT)?;
        let said = output.said();
        output.success(&format!("{command} of {}: {said}", plugin.display())).map(|output| output.stdout)
    }

    /// Runs a shell script in it, with the node's programs.
    ///
    /// # Errors
    /// When it fails.
    pub(crate) fn run(&self, script: &str) -> Outcome<String> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).args(["sh", "-c", script]);
        let output = process::run(&mut command, b"", LIMIT)?;
        output.success(script).map(|output| output.stdout)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        while let Some((config, interface)) = self.added.pop() {
            let _ = self.plugin("DEL", &config, &interface);
        }
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
