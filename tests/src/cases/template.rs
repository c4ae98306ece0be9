//! Pods from templates: as unique as booted ones, and booted when there is no template to trust.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::{Case, Container, Environment};
use crate::bundle;
use crate::cleanup::WorkDir;
use crate::failure::{Explain, Outcome};
use crate::layout::Layout;
use crate::process::{self, eventually};
use crate::shim::{CALL_LIMIT, CreateOptions};
use crate::stdio::Streams;
use crate::{ensure, ensure_eq, fail};

/// The cases of this theme.
pub const CASES: &[Case] = &[
    Case::new("template-pods-are-unique", unique).bulkhead_only(),
    Case::new("template-damaged-is-not-used", damaged).bulkhead_only(),
    Case::new("template-refused-by-the-vmm", refused).bulkhead_only(),
    Case::new("template-made-on-first-use", first_use).bulkhead_only(),
    Case::new("template-sizes", sizes).bulkhead_only(),
    Case::new("template-of-another-kernel", another_kernel).bulkhead_only(),
];

/// What is known of the digests of large files, in a store and, for the cases to come, among the fixture's files.
const DIGESTS: &str = "digests.json";

/// How long making a template may take.
const BUILD_LIMIT: Duration = Duration::from_secs(20);

/// How far a pod's wall clock may be from the node's.
const CLOCK_TOLERANCE: f64 = 0.010;

fn bulkhead(layout: &Layout, arguments: &[&str]) -> Outcome<String> {
    let output = process::run(Command::new(layout.bin("bulkhead")).args(arguments), b"", BUILD_LIMIT)?;
    Ok(output.success("bulkhead template")?.stdout)
}

/// A store of the case's own and a configuration that names it.
struct Templates {
    layout: Layout,
    directory: WorkDir,
    known: PathBuf,
}

impl Templates {
    /// An empty store. What is known of the digests of large files is taken over.
    fn new(environment: &Environment, configuration: &str) -> Outcome<Self> {
        let templates = Self {
            layout: environment.layout.clone(),
            directory: WorkDir::new("templates")?,
            known: environment.host()?.path().join(DIGESTS),
        };
        let store = templates.store();
        DirBuilder::new().mode(0o700).create(&store).explain(|| format!("make {}", store.display()))?;
        // Not there before the first template was made.
        let _ = fs::copy(&templates.known, store.join(DIGESTS));
        let text = format!("templates = \"auto\"\ntemplate_dir = \"{}\"\n{configuration}", store.display());
        fs::write(templates.config(), text).explain(|| "write the configuration".into())?;
        Ok(templates)
    }

    /// The same with the template of the default size.
    fn with_default(environment: &Environment) -> Outcome<Self> {
        let templates = Self::new(environment, "")?;
        templates.build(&[])?;
        Ok(templates)
    }

    fn store(&self) -> PathBuf {
        self.directory.path().join("store")
    }

    fn config(&self) -> PathBuf {
        self.directory.path().join("config.toml")
    }

    fn run(&self, action: &str, arguments: &[&str]) -> Outcome<String> {
        let config = self.config().display().to_string();
        let all = [&["template", action, "--config", &config], arguments].concat();
        bulkhead(&self.layout, &all)
    }

    /// Makes a template and returns its directory.
    fn build(&self, arguments: &[&str]) -> Outcome<PathBuf> {
        let output = self.run("build", arguments)?;
        let _ = fs::copy(self.store().join(DIGESTS), &self.known);
        Ok(self.store().join(output.split(' ').next().unwrap_or_default()))
    }

    /// Waits until there are so many templates.
    fn expect(&self, count: usize) -> Outcome {
        eventually("a template is made in the background", BUILD_LIMIT, || {
            let list = self.run("list", &[])?;
            ensure_eq!(list.lines().count(), count, "templates {list:?}");
            Ok(())
        })
    }

    /// Creates and starts a pod.
    fn pod(
        &self,
        environment: &Environment,
        script: &str,
        annotations: &[(&str, &str)],
    ) -> Outcome<Container> {
        let id = environment.id("template");
        let mut spec = bundle::spec(&id, bundle::shell(script));
        spec["hostname"] = id.clone().into();
        for (key, value) in annotations {
            spec["annotations"][key] = (*value).into();
        }
        let host = environment.host()?;
        let bundle = host.bundle(&id, &spec)?;
        let shim = host.start(&bundle)?;
        let stdio = shim.stdio("init", Streams { stdin: true, ..Streams::default() })?;
        shim.create(&stdio, CreateOptions { config: Some(&self.config()), ..CreateOptions::default() })?;
        shim.start("")?;
        Ok(Container { bundle, shim, stdio })
    }

    /// Runs a pod to its end; returns its output and how long its agent took, after checking how it was started and what
    /// the shim's log says.
    fn run_pod(
        &self,
        environment: &Environment,
        annotations: &[(&str, &str)],
        how: &str,
        warning: Option<&str>,
    ) -> Outcome<(String, u64)> {
        let script = "nproc; grep MemTotal /proc/meminfo; echo done";
        let pod = self.pod(environment, script, annotations)?;
        ensure_eq!(pod.shim.wait("", CALL_LIMIT)?.exit_status, 0, "exit status");
        let output = pod.stdio.stdout.to_end(CALL_LIMIT)?;
        let log = pod.shim.log.until("agent ready", CALL_LIMIT)?;
        pod.finish()?;
        let took = started(&log, how)?;
        let warnings: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("level=warning") || line.contains("level=warn"))
            .collect();
        match (warning, warnings.as_slice()) {
            (None, []) => {}
            (Some(expected), [line]) if line.contains(expected) => {}
            (expected, lines) => fail!("warnings in the shim's log: {lines:?}, expected {expected:?}"),
        }
        Ok((output, took))
    }
}

/// Microseconds from the start of the VMM to the agent's first answer in a pod that was started as `how` says.
fn started(log: &str, how: &str) -> Outcome<u64> {
    let line = log.lines().find(|line| line.contains("agent ready")).unwrap_or_default();
    let expected = format!("agent ready, {how}: ");
    let (_, rest) = line.split_once(&expected).explain(|| format!("a pod that was not {how}: {log:?}"))?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().explain(|| format!("no time in {line:?}"))
}

fn unique(environment: &mut Environment) -> Outcome<String> {
    const SCRIPT: &str = "\
        cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; head -c 32 /dev/urandom | sha256sum; \
        grep stack /proc/self/maps; hostname; cut -d' ' -f1 /proc/uptime; \
        dd if=/dev/urandom of=/dev/shm/mine bs=64k count=16 2>/dev/null; sha256sum </dev/shm/mine; echo ready; \
        read go; adjtimex | sed -n 's/.*tv_u*sec: *//p'; cut -d' ' -f1 /proc/uptime; sha256sum </dev/shm/mine";
    const LINES: usize = 7;
    let templates = Templates::with_default(environment)?;
    let mut pods = vec![templates.pod(environment, SCRIPT, &[])?, templates.pod(environment, SCRIPT, &[])?];
    for pod in &pods {
        pod.stdio.stdout.until("ready\n", CALL_LIMIT)?;
    }
    let mut outputs = Vec::new();
    let mut offsets = Vec::new();
    let mut times = Vec::new();
    for pod in &mut pods {
        let before = now();
        pod.stdio.write(b"go\n")?;
        let output = pod.stdio.stdout.to_end(CALL_LIMIT)?;
        let after = now();
        let lines: Vec<String> = output.lines().map(|line| line.trim().to_owned()).collect();
        ensure_eq!(lines.len(), LINES + 5, "lines of {output:?}");
        let number =
            |index: usize| lines[index].parse::<f64>().explain(|| format!("line {index} of {output:?}"));
        let clock = number(LINES + 1)? + number(LINES + 2)? / 1e6;
        // It was read somewhen between the two: what lies outside is certainly wrong.
        let wrong = (before - clock).max(clock - after).max(0.0);
        ensure!(
            wrong <= CLOCK_TOLERANCE,
            "the wall clock is wrong by {:.1} ms (node {before:.6} to {after:.6}, pod {clock:.6})",
            wrong * 1e3
        );
        offsets.push(wrong * 1e3);
        ensure!(number(LINES + 3)? >= number(5)?, "monotonic time went back: {output:?}");
        ensure_eq!(lines[LINES - 1], lines[LINES + 4], "the pod's own file");
        ensure_eq!(lines[4], pod.bundle.id, "host name");
        times.push(started(&pod.shim.log.until("agent ready", CALL_LIMIT)?, "restored")?);
        outputs.push(lines);
    }
    for (index, what) in [
        (0, "boot id"),
        (1, "UUID"),
        (2, "random bytes"),
        (3, "address of the stack"),
        (LINES - 1, "random file"),
    ] {
        let distinct: BTreeSet<&String> = outputs.iter().map(|lines| &lines[index]).collect();
        ensure_eq!(distinct.len(), outputs.len(), "distinct values of the {what} in {outputs:?}");
    }
    for pod in pods {
        ensure_eq!(pod.shim.wait("", CALL_LIMIT)?.exit_status, 0, "exit status");
        pod.finish()?;
    }
    // Whatever pods do, the template stays as it was.
    templates.run("verify", &[])?;
    Ok(format!("agents answered after {times:?} us, clocks wrong by at most {offsets:.1?} ms, nothing equal"))
}

fn damaged(environment: &mut Environment) -> Outcome<String> {
    let templates = Templates::with_default(environment)?;
    let template = templates.build(&[])?;
    let state = template.join("state");
    let mut bytes = fs::read(&state).explain(|| format!("read {}", state.display()))?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&state, bytes).explain(|| format!("write {}", state.display()))?;
    templates.run_pod(environment, &[], "booted", Some("state does not have its digest"))?;
    templates.expect(1)?;
    templates.run_pod(environment, &[], "restored", None)?;

    let memory = template.join("memory");
    let file = File::options().write(true).open(&memory).explain(|| format!("open {}", memory.display()))?;
    file.set_len(1 << 20).explain(|| format!("truncate {}", memory.display()))?;
    drop(file);
    ensure!(templates.run("verify", &[]).is_err(), "verify found nothing wrong with a truncated memory file");
    templates.run_pod(environment, &[], "booted", Some("memory has 1048576 bytes"))?;
    templates.expect(1)?;
    templates.run("verify", &[])?;
    Ok("a changed state and a truncated memory: one warning each, the pod booted, the template was made again".into())
}

/// A state that has its digest and makes no sense.
fn refused(environment: &mut Environment) -> Outcome<String> {
    let templates = Templates::with_default(environment)?;
    let template = templates.build(&[])?;
    let (state, meta) = (template.join("state"), template.join("meta.json"));
    let mut bytes = fs::read(&state).explain(|| format!("read {}", state.display()))?;
    let middle = bytes.len() / 2;
    bytes[middle..].fill(0xff);
    fs::write(&state, bytes).explain(|| format!("write {}", state.display()))?;
    let busybox = environment.layout.rootfs("busybox").join("bin/busybox");
    let mut sum = Command::new(busybox);
    let output =
        process::run(sum.arg("sha256sum").arg(&state), b"", CALL_LIMIT)?.success("sha256sum")?.stdout;
    let digest = output.split(' ').next().unwrap_or_default();
    let text = fs::read_to_string(&meta).explain(|| format!("read {}", meta.display()))?;
    let mut value: Value = serde_json::from_str(&text).explain(|| format!("parse {}", meta.display()))?;
    value["state_sha256"] = digest.into();
    fs::write(&meta, value.to_string()).explain(|| format!("write {}", meta.display()))?;

    templates.run_pod(environment, &[], "booted", Some("can't be restored: the VMM refused"))?;
    templates.run_pod(environment, &[], "booted", Some("can't be restored on this host"))?;
    let list = templates.run("list", &[])?;
    ensure!(list.contains("refused: "), "the list does not say why: {list}");
    templates.build(&["--again"])?;
    templates.run_pod(environment, &[], "restored", None)?;
    Ok(list.split_once("refused: ").map_or("", |(_, reason)| reason).trim().to_owned())
}

fn first_use(environment: &mut Environment) -> Outcome<String> {
    let templates = Templates::new(environment, "")?;
    let half = templates.store().join(".new-1-0");
    fs::create_dir(&half).explain(|| format!("make {}", half.display()))?;
    fs::write(half.join("memory"), "half").explain(|| "write half a template".into())?;
    let (_, booted) = templates.run_pod(environment, &[], "booted", None)?;
    templates.expect(1)?;
    ensure!(!half.exists(), "half a template stays: {}", half.display());
    let (_, restored) = templates.run_pod(environment, &[], "restored", None)?;
    ensure!(restored < booted, "restored after {restored} us, booted after {booted} us");
    Ok(format!(
        "half a template was ignored and removed; booted in {booted} us, then restored in {restored} us"
    ))
}

fn sizes(environment: &mut Environment) -> Outcome<String> {
    let templates = Templates::new(environment, "")?;
    let mut evidence = Vec::new();
    for (vcpus, memory, mib) in [("1", "128Mi", 128), ("2", "512Mi", 512)] {
        templates.build(&["--vcpus", vcpus, "--memory", memory])?;
        let annotations = [("io.bulkhead.vcpus", vcpus), ("io.bulkhead.memory", memory)];
        let (output, took) = templates.run_pod(environment, &annotations, "restored", None)?;
        let words: Vec<&str> = output.split_whitespace().collect();
        let (cpus, kib) = (words[0], words[2].parse::<u64>().explain(|| format!("memory in {output:?}"))?);
        ensure_eq!(cpus, vcpus, "CPUs");
        ensure!(kib <= mib * 1024 && kib > mib * 1024 * 7 / 10, "{kib} KiB of memory in a pod of {mib} MiB");
        evidence.push(format!("{cpus} vCPU, {kib} KiB in {took} us"));
    }
    ensure_eq!(templates.run("list", &[])?.lines().count(), 2, "templates");
    Ok(evidence.join("; "))
}

fn another_kernel(environment: &mut Environment) -> Outcome<String> {
    let kernel = WorkDir::new("kernel")?;
    let copy = kernel.path().join("vmlinux");
    fs::copy(environment.layout.share("vmlinux"), &copy).explain(|| "copy the kernel".into())?;
    let templates = Templates::new(environment, &format!("kernel = \"{}\"\n", copy.display()))?;
    let first = templates.build(&[])?;
    templates.run_pod(environment, &[], "restored", None)?;
    // Behind the last segment: another file, the same kernel.
    let mut file = File::options().append(true).open(&copy).explain(|| "open the kernel".into())?;
    std::io::Write::write_all(&mut file, b"more").explain(|| "append to the kernel".into())?;
    drop(file);
    templates.run_pod(environment, &[], "booted", None)?;
    templates.expect(2)?;
    ensure!(first.exists(), "the template of the kernel before is gone");
    templates.run_pod(environment, &[], "restored", None)?;
    Ok("a kernel that changed by four bytes was booted, and got a template of its own".into())
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
