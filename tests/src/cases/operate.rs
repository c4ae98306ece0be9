//! What an operator does on a node: `bulkhead install`, `check`, `ps`, `exec`, `logs`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::{Case, Environment};
use crate::bundle;
use crate::cleanup::WorkDir;
use crate::failure::{Explain, Outcome};
use crate::node;
use crate::process::{self, Output, eventually};
use crate::stdio::Streams;
use crate::{ensure, ensure_eq};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    // Every part is read several times for its digest, which takes long in virtual time.
    Case { limit: 90, ..Case::new("operate-install-and-uninstall", install).bulkhead_only() },
    Case::new("operate-check", check).bulkhead_only(),
    Case::new("operate-ps-exec-logs", ps).bulkhead_only(),
];

const LIMIT: Duration = Duration::from_secs(20);

fn bulkhead(environment: &Environment, arguments: &[&str]) -> Outcome<Output> {
    process::run(Command::new(environment.layout.bin("bulkhead")).args(arguments), b"", LIMIT)
}

/// What containerd makes of its configuration.
fn dump(environment: &Environment, config: &Path) -> Outcome<String> {
    let mut command = Command::new(environment.layout.find("containerd")?);
    let output = process::run(command.arg("--config").arg(config).args(["config", "dump"]), b"", LIMIT)?;
    Ok(output.success("containerd config dump")?.stdout)
}

fn install(environment: &mut Environment) -> Outcome<String> {
    let main = |version: u32| match version {
        2 => {
            "version = 2\nimports = ['conf.d/*.toml']\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.other]\nruntime_type = 'io.containerd.other.v1'\n"
        }
        _ => {
            "version = 3\nimports = ['conf.d/*.toml']\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.other]\nruntime_type = 'io.containerd.other.v1'\n"
        }
    };
    for version in [2, 3] {
        let work = WorkDir::new("install")?;
        let (config, prefix) = (work.path().join("config.toml"), work.path().join("prefix"));
        fs::write(&config, main(version)).explain(|| format!("write {}", config.display()))?;
        let before = node::tree(work.path());
        let (config_text, prefix_text) = (config.display().to_string(), prefix.display().to_string());
        let places = ["--prefix", &prefix_text, "--containerd-config", &config_text];

        let install = [&["install", "--no-templates"][..], &places].concat();
        let said = bulkhead(environment, &install)?.success("bulkhead install")?.stdout;
        ensure!(said.contains("systemctl restart containerd"), "the restart is not offered: {said}");
        let dumped = dump(environment, &config)?;
        ensure!(
            dumped.contains("runtimes.bulkhead]") && dumped.contains("runtimes.other]"),
            "version {version}: containerd's configuration lacks a runtime: {dumped}"
        );
        let shim = format!("{prefix_text}/bin/containerd-shim-bulkhead-v1");
        ensure!(dumped.contains(&shim), "version {version}: containerd does not know {shim}: {dumped}");
        let again = bulkhead(environment, &install)?.success("bulkhead install, again")?.stdout;
        ensure!(
            again.lines().all(|line| line.starts_with("unchanged")),
            "the second installation changes something: {again}"
        );

        let uninstall = [&["uninstall", "--force"][..], &places].concat();
        bulkhead(environment, &uninstall)?.success("bulkhead uninstall")?;
        ensure_eq!(node::tree(work.path()), before, "what is there after the uninstallation");
        ensure!(
            !dump(environment, &config)?.contains("runtimes.bulkhead]"),
            "containerd still knows the runtime"
        );
    }
    Ok("containerd has both its runtimes with versions 2 and 3; nothing is left afterwards".into())
}

fn check(environment: &mut Environment) -> Outcome<String> {
    let output = bulkhead(environment, &["check", "--json"])?.success("bulkhead check")?;
    let report: Value = serde_json::from_str(&output.stdout).explain(|| "the report".into())?;
    ensure_eq!(report["pods_can_run"], true, "pods_can_run");
    let checks = report["checks"].as_array().explain(|| "no checks in the report".into())?;
    let warnings: Vec<&str> = checks
        .iter()
        .filter(|check| check["verdict"] == "warning")
        .filter_map(|check| check["check"].as_str())
        .collect();
    for check in
        checks.iter().filter(|check| check["verdict"] != "ok" && check["check"] != "creation of a VM")
    {
        ensure!(check["why"].is_string(), "it is not said why that matters: {check}");
    }
    ensure!(warnings.contains(&"processor's weaknesses"), "mitigations=off is not noticed: {warnings:?}");
    Ok(format!("{} checks, warnings: {}", checks.len(), warnings.join(", ")))
}

fn ps(environment: &mut Environment) -> Outcome<String> {
    let container =
        environment.started("operate", bundle::process(&["sleep", "100000"]), Streams::default())?;
    let id = container.bundle.id.clone();
    let pod = |environment: &Environment| -> Outcome<Value> {
        let output = bulkhead(environment, &["ps", "--json"])?.success("bulkhead ps")?;
        let pods: Value = serde_json::from_str(&output.stdout).explain(|| "the list of pods".into())?;
        let mut pods = pods.as_array().cloned().unwrap_or_default().into_iter();
        pods.find(|pod| pod["id"] == id.as_str()).explain(|| format!("no pod {id} in {}", output.stdout))
    };
    let running = pod(environment)?;
    ensure_eq!(running["state"], "running", "state");
    let vmm = running["vmm"].as_i64().and_then(|pid| i32::try_from(pid).ok()).explain(|| "no VMM".into())?;
    let below = node::descendants(container.shim.pid()?, "bulkhead-vmm");
    ensure!(below.iter().any(|process| process.pid == vmm), "{vmm} is none of {below:?}");
    let memory = running["memory"].as_u64().unwrap_or_default();
    ensure!(memory > 1 << 20, "{memory} bytes of memory");

    let ask = |question: &str| -> Outcome<String> {
        let words: Vec<&str> = ["exec", &id].into_iter().chain(question.split(' ')).collect();
        Ok(bulkhead(environment, &words)?.success("bulkhead exec")?.stdout)
    };
    let processes = ask("ps")?;
    ensure!(
        processes.contains(" sleep\n"),
        "the container's process is not in the guest's list: {processes}"
    );
    ensure!(ask("mounts")?.contains("/run/bulkhead/shared"), "the shared tree is not among the mounts");
    ensure!(ask("version")?.contains("Linux version"), "no version");
    ensure!(ask("dmesg")?.contains("] "), "the kernel's log is empty");
    ensure!(ask("memory")?.contains("MemTotal"), "no memory");
    ensure!(ask("rm /etc")?.contains("can't be answered"), "something else was done");
    let logs = bulkhead(environment, &["logs", &id])?.success("bulkhead logs")?.stdout;

    node::kill_hard(vmm)?;
    eventually("the pod is seen to be dead", LIMIT, || {
        ensure_eq!(pod(environment)?["state"], "dead", "state");
        Ok(())
    })?;
    let end = bulkhead(environment, &["logs", &id])?.success("bulkhead logs of a dead pod")?.stdout;
    ensure!(end.contains("== end"), "the reason of the end is not in the logs: {end:?}");
    container.finish()?;
    let lines = processes.lines().count();
    Ok(format!(
        "{:.1} MiB, {lines} processes in the guest, {} bytes of logs",
        memory as f64 / f64::from(1 << 20),
        logs.len()
    ))
}
