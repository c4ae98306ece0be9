//! Hooks of the host's administrator: how Docker and nerdctl connect a container, and clean up after it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Case, Container, Environment};
use crate::bundle;
use crate::cleanup::WorkDir;
use crate::failure::{Explain, Outcome};
use crate::node;
use crate::process::{self, eventually};
use crate::shim::{CALL_LIMIT, CreateOptions};
use crate::stdio::Streams;
use crate::{ensure, ensure_eq, fail};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("hooks-around-a-container", around_a_container).bulkhead_only(),
    Case::new("hooks-network-after-the-creation", network_after_the_creation).bulkhead_only(),
    Case::new("hooks-inside-a-container", inside_a_container),
    Case::new("hooks-that-fail", that_fail).bulkhead_only(),
    Case::new("hooks-after-a-killed-shim", after_a_killed_shim).bulkhead_only(),
];

/// What `dockerd` does from its prestart hook `libnetwork-setkey`: finds the network namespace of the process that it is told,
/// and puts one end of a pair of interfaces into it. Its arguments are a directory and a word.
const PROGRAM: &str = r#"#!/bin/sh
cd "$1" || exit 1
state=$(cat)
echo "$2" >>order
echo "$state" >"$2"
pid=$(echo "$state" | sed -n 's/.*"pid":\([0-9]*\).*/\1/p')
case $2 in
prestart)
    [ "$(readlink /proc/$pid/ns/net)" != "$(readlink /proc/self/ns/net)" ] || { echo "not a namespace of its own" >&2; exit 1; }
    ip link add hooktest0 type veth || exit 1
    ip addr add 10.99.0.1/24 dev hooktest0 && ip link set hooktest0 up || exit 1
    peer=$(ip link show hooktest0 | sed -n 's/.*hooktest0@\([a-z0-9]*\):.*/\1/p')
    ip link set "$peer" netns "$pid" || exit 1
    nsenter -t "$pid" -n sh -c "ip link set $peer name eth0; ip addr add 10.99.0.2/24 dev eth0; ip link set eth0 up" ;;
poststop)
    ip link del hooktest0 2>/dev/null
    true ;;
esac
"#;

/// Whether the container has the interface of [`PROGRAM`], and it leads to the host.
const REACH: &str =
    "ip addr show eth0 | grep -q 10.99.0.2/24 && ping -c 1 -W 3 10.99.0.1 >/dev/null && echo reached";

/// A program, and what it was told.
struct Hooks {
    directory: WorkDir,
}

impl Hooks {
    fn new() -> Outcome<Self> {
        let hooks = Self { directory: WorkDir::new("hooks")? };
        let program = hooks.program();
        fs::write(&program, PROGRAM).explain(|| format!("write {}", program.display()))?;
        fs::set_permissions(&program, Permissions::from_mode(0o755))
            .explain(|| format!("make {} executable", program.display()))?;
        Ok(hooks)
    }

    fn program(&self) -> PathBuf {
        self.directory.path().join("hook")
    }

    fn hook(&self, moment: &str) -> Value {
        json!({ "path": self.program(), "args": ["hook", self.directory.path(), moment],
                "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] })
    }

    fn spec(&self, id: &str, script: &str) -> Value {
        let mut spec = bundle::spec(id, bundle::shell(script));
        for moment in ["prestart", "createRuntime", "poststart", "poststop"] {
            spec["hooks"][moment] = json!([self.hook(moment)]);
        }
        spec
    }

    fn read(&self, name: &str) -> Outcome<String> {
        let path = self.directory.path().join(name);
        fs::read_to_string(&path).explain(|| format!("read {}", path.display()))
    }

    fn state(&self, moment: &str) -> Outcome<Value> {
        serde_json::from_str(&self.read(moment)?).explain(|| format!("what the {moment} hook was told"))
    }
}

fn around_a_container(environment: &mut Environment) -> Outcome<String> {
    let hooks = Hooks::new()?;
    let id = environment.id("hooks");
    let container = environment.created(&id, &hooks.spec(&id, "sleep 1000"), Streams::default())?;
    ensure_eq!(hooks.read("order")?, "prestart\ncreateRuntime\n", "hooks that ran before the start");
    let state = hooks.state("prestart")?;
    let pid = container.shim.start("")?;
    ensure_eq!(
        (&state["id"], &state["status"], &state["pid"], &state["bundle"]),
        (&json!(id), &json!("creating"), &json!(pid), &json!(container.bundle.path)),
        "what the prestart hook was told"
    );
    ensure!(node::interfaces().contains(&"hooktest0".to_owned()), "the host's end of the pair is not there");
    let reached = container.exec_script("network", REACH);
    container.finish()?;
    ensure_eq!(reached?.success()?, "reached\n", "the host, by the interface that the hook made");
    ensure_eq!(hooks.read("order")?, "prestart\ncreateRuntime\npoststart\npoststop\n", "hooks that ran");
    ensure_eq!(hooks.state("poststop")?["status"], "stopped", "what the poststop hook was told");
    ensure!(
        !node::interfaces().contains(&"hooktest0".to_owned()),
        "the host's end of the pair is still there"
    );
    Ok(format!(
        "prestart put an interface into the namespace of process {pid}; all four ran in order, once each"
    ))
}

/// What `dockerd` does since version 26: no hook, but the same once the container has been created.
fn network_after_the_creation(environment: &mut Environment) -> Outcome<String> {
    let hooks = Hooks::new()?;
    let id = environment.id("hooks");
    let spec = bundle::spec(&id, bundle::shell("sleep 1000"));
    let container = environment.created(&id, &spec, Streams::default())?;
    let pid = container.shim.state("")?.pid;
    let run = |moment: &str| {
        let mut command = Command::new(hooks.program());
        command.arg(hooks.directory.path()).arg(moment);
        let state = format!("{{\"pid\":{pid}}}");
        process::run(&mut command, state.as_bytes(), CALL_LIMIT)?.success("the program")
    };
    run("prestart")?;
    container.shim.start("")?;
    let reached = container.exec_script("network", REACH);
    container.finish()?;
    run("poststop")?;
    ensure_eq!(
        reached?.success()?,
        "reached\n",
        "the host, by the interface that was made after the creation"
    );
    Ok(format!("an interface that came into the namespace of process {pid} before the start works"))
}

fn inside_a_container(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("hooks");
    let mut spec = bundle::spec(&id, bundle::shell("cat /order"));
    spec["hooks"]["startContainer"] = json!([{ "path": "/bin/sh", "args": ["sh", "-c", "echo $0 $WORD >/order"], "env": ["WORD=here", "PATH=/bin"] }]);
    ensure_eq!(environment.run_to_end(&id, &spec)?.success()?, "sh here\n", "what the program found");
    Ok("startContainer ran in the container, before its program".into())
}

/// Expects a container to be refused; gives the words.
fn refused(environment: &Environment, id: &str, spec: &Value) -> Outcome<String> {
    let host = environment.host()?;
    let bundle = host.bundle(id, spec)?;
    let shim = host.start(&bundle)?;
    let stdio = shim.stdio("init", Streams::default())?;
    let Err(error) = shim.create(&stdio, CreateOptions::default()) else {
        fail!("the container was created")
    };
    Container { bundle, shim, stdio }.release()?;
    Ok(error.message)
}

fn that_fail(environment: &mut Environment) -> Outcome<String> {
    let hooks = Hooks::new()?;
    let shell = |script: &str| json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"], "timeout": 2 });
    let mut evidence = Vec::new();
    for (hook, words) in [
        (shell("echo no address left >&2; exit 4"), ["exited with code 4", "no address left"]),
        (shell("echo waiting; sleep 1000"), ["did not end within 2 s", "waiting"]),
        (json!({ "path": "/nonexistent/hook" }), ["/nonexistent/hook", "No such file"]),
    ] {
        let id = environment.id("hooks");
        let mut spec = hooks.spec(&id, "true");
        spec["hooks"]["createRuntime"] = json!([hook]);
        let message = refused(environment, &id, &spec)?;
        ensure!(words.iter().all(|word| message.contains(word)), "the error is {message}");
        ensure!(!node::interfaces().contains(&"hooktest0".to_owned()), "the poststop hook did not run");
        evidence.push(message);
    }
    let id = environment.id("hooks");
    let mut spec = hooks.spec(&id, "true");
    spec["hooks"]["createContainer"] = json!([shell("echo inside; exit 5")]);
    let message = refused(environment, &id, &spec)?;
    ensure!(message.contains("exited with code 5: inside"), "the error is {message}");
    evidence.push(message);
    Ok(evidence.join("; "))
}

fn after_a_killed_shim(environment: &mut Environment) -> Outcome<String> {
    let hooks = Hooks::new()?;
    let id = environment.id("hooks");
    let container = environment.created(&id, &hooks.spec(&id, "sleep 1000"), Streams::default())?;
    container.shim.start("")?;
    node::kill_hard(container.shim.pid()?)?;
    environment.host()?.delete(&container.bundle)?;
    ensure!(hooks.read("order")?.ends_with("poststart\npoststop\n"), "the poststop hook did not run");
    // Again, as containerd may.
    environment.host()?.delete(&container.bundle)?;
    ensure_eq!(hooks.read("order")?.matches("poststop").count(), 1, "runs of the poststop hook");
    eventually("the pair of interfaces is gone", Duration::from_secs(2), || {
        ensure!(!node::interfaces().contains(&"hooktest0".to_owned()), "it is there");
        Ok(())
    })?;
    container.bundle.remove()?;
    Ok("poststop ran once, from the shim's delete".into())
}
