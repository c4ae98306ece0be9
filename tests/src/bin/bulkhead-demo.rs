//! Runs real containers in microVMs through a private containerd and shows, a line each, that what is promised holds.

use std::fs;
use std::process::{Command, ExitCode};
use std::time::Duration;

use bulkhead_tests::cleanup;
use bulkhead_tests::containerd::PrivateContainerd;
use bulkhead_tests::cri::{self, Handler, Node, Pod, http_get};
use bulkhead_tests::failure::{Explain, Failure, Outcome};
use bulkhead_tests::layout::Layout;
use bulkhead_tests::leaks::Snapshot;
use bulkhead_tests::node;
use bulkhead_tests::process::{self, eventually};
use bulkhead_tests::{ensure, ensure_eq, fail};

const RUNTIME: &str = "io.containerd.bulkhead.v1";
/// What busybox's insmod says when the kernel has no such system call.
const ENOSYS: &str = "kernel does not support requested operation";
const LIMIT: Duration = Duration::from_secs(10);
/// How long making a template may take.
const TEMPLATE_LIMIT: Duration = Duration::from_secs(60);

/// What the checks share.
struct Demo {
    containerd: PrivateContainerd,
    image: String,
    /// The configuration with which pods boot.
    cold: String,
    passed: usize,
    total: usize,
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(Failure(reason)) => {
            println!("FAIL demo: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Outcome<bool> {
    cri::enter_own_network()?;
    cleanup::guard()?;
    let layout = Layout::locate()?;
    println!("demo: starting a private containerd and importing the image");
    let containerd = PrivateContainerd::start(&layout)?;
    let image = containerd.import("busybox")?;
    let state = containerd.path().join("state");
    let cold = containerd.path().join("cold.toml");
    fs::write(&cold, "templates = \"off\"\n").explain(|| format!("write {}", cold.display()))?;
    let before = Snapshot::take(&[&state]);
    let cold = cold.display().to_string();
    let mut demo = Demo { containerd, image, cold, passed: 0, total: 0 };

    demo.check("guest kernel beside the host's, in a pod that boots", guest_kernel);
    println!("demo: making the template that all other pods start from");
    demo.check("template", |_| template(&layout));
    demo.check("pod from the template", from_template);
    demo.check("stdout, stderr and stdin", streams);
    demo.check("exit code", exit_code);
    println!("demo: starting a container that stays");
    if demo.check("long-running container", start_first) {
        demo.check("exec into a running container", exec);
        demo.check("init_module refused in the guest", init_module);
        demo.check("second pod at the same time", second_pod);
        demo.check("VMM's own memory", vmm_memory);
        demo.check("delete", delete_first);
    }
    demo.check("start to agent ready", start_time);
    demo.check("nothing left behind", |_| {
        before.expect_nothing_left()?;
        Ok(format!("as before: {}", before.summary()))
    });
    println!("demo: starting a containerd as Kubernetes uses it, with a pod network");
    demo.check("a pod serves HTTP to the host and to another pod", |_| served(&layout));
    println!("demo: {} of {} checks passed", demo.passed, demo.total);
    if demo.passed < demo.total {
        println!("the end of containerd's log:\n{}", tail(&demo.containerd.log(), 15));
    }
    Ok(demo.passed == demo.total)
}

impl Demo {
    fn check(&mut self, what: &str, check: impl FnOnce(&Self) -> Outcome<String>) -> bool {
        self.total += 1;
        match check(self) {
            Ok(evidence) => {
                println!("ok  {what}: {evidence}");
                self.passed += 1;
                true
            }
            Err(Failure(reason)) => {
                println!("FAIL {what}: {reason}");
                false
            }
        }
    }

    /// Checks how the last pod was started; the shims' log lines come by way of containerd.
    fn expect_last_start(&self, how: &str) -> Outcome {
        eventually("the shim logs the pod's start", LIMIT, || {
            let log = self.containerd.log();
            let last = log.lines().rfind(|line| line.contains("agent ready, ")).unwrap_or_default();
            ensure!(last.contains(&format!("agent ready, {how}: ")), "a pod that was not {how}: {last:?}");
            Ok(())
        })
    }

    /// The arguments of a `ctr run` to the end.
    fn run_arguments<'a>(&'a self, id: &'a str, command: &[&'a str]) -> Vec<&'a str> {
        [&["run", "--rm", "--runtime", RUNTIME, &self.image, id], command].concat()
    }
}

/// A pod's server is reached by its address, as services reach it.
fn served(layout: &Layout) -> Outcome<String> {
    let node = Node::start(layout)?;
    let server = Pod::run(&node, Handler::Bulkhead, "server", |_| {})?;
    let script = "mkdir /www; echo \"from $(hostname), kernel $(uname -r)\" >/www/index.html; echo up; exec httpd -f -p 80 -h /www";
    server.start("httpd", script, |_| {})?.wait_for_output("up")?;
    let address = server.address()?;
    let to_host = http_get(&format!("{address}:80"), "/")?;
    let to_host = String::from_utf8_lossy(&to_host).trim().to_owned();
    let client = Pod::run(&node, Handler::Bulkhead, "client", |_| {})?;
    let to_pod = client.run_script("wget", &format!("wget -qO- http://{address}/"), |_| {})?.success()?;
    ensure!(
        to_host.starts_with("from server, kernel ") && to_pod.trim() == to_host,
        "{to_host:?}, {to_pod:?}"
    );
    client.finish()?;
    server.finish()?;
    Ok(format!("http://{address}/: {to_host:?}, to both"))
}

fn guest_kernel(demo: &Demo) -> Outcome<String> {
    let host =
        fs::read_to_string("/proc/sys/kernel/osrelease").explain(|| "the host's kernel release".into())?;
    let arguments = ["run", "--rm", "--runtime", RUNTIME, "--runtime-config-path", &demo.cold, &demo.image];
    let arguments = [&arguments[..], &["kernel", "uname", "-r"]].concat();
    let output = demo.containerd.ctr(&arguments)?.success("ctr run")?;
    demo.expect_last_start("booted")?;
    let (guest, host) = (output.stdout.trim(), host.trim());
    ensure!(!guest.is_empty() && guest != host, "the guest's kernel is {guest:?}, the host's {host:?}");
    Ok(format!("guest {guest}, host {host}; ctr run took {:.3} s", output.elapsed.as_secs_f64()))
}

fn template(layout: &Layout) -> Outcome<String> {
    let mut command = Command::new(layout.bin("bulkhead"));
    let output = process::run(command.args(["template", "build"]), b"", TEMPLATE_LIMIT)?;
    Ok(output.success("bulkhead template build")?.stdout.trim().to_owned())
}

fn from_template(demo: &Demo) -> Outcome<String> {
    let output =
        demo.containerd.ctr(&demo.run_arguments("restored", &["uname", "-r"]))?.success("ctr run")?;
    demo.expect_last_start("restored")?;
    Ok(format!("guest {}; ctr run took {:.3} s", output.stdout.trim(), output.elapsed.as_secs_f64()))
}

fn streams(demo: &Demo) -> Outcome<String> {
    let command = ["/bin/sh", "-c", "read line; echo \"out: $line\"; echo \"err: $line\" >&2"];
    let output = demo
        .containerd
        .ctr_with_input(&demo.run_arguments("streams", &command), b"from stdin\n")?
        .success("ctr run")?;
    ensure_eq!(
        (output.stdout.as_str(), output.stderr.as_str()),
        ("out: from stdin\n", "err: from stdin\n"),
        "streams"
    );
    Ok(output.said())
}

fn exit_code(demo: &Demo) -> Outcome<String> {
    let output = demo.containerd.ctr(&demo.run_arguments("code", &["/bin/sh", "-c", "exit 42"]))?;
    ensure_eq!(output.code, 42, "exit code of ctr run, {}", output.said());
    Ok("42 inside, 42 from ctr".into())
}

fn start_first(demo: &Demo) -> Outcome<String> {
    let output =
        demo.containerd.ctr(&["run", "-d", "--runtime", RUNTIME, &demo.image, "first", "sleep", "100000"])?;
    let output = output.success("ctr run -d")?;
    Ok(format!("started in {:.3} s", output.elapsed.as_secs_f64()))
}

fn exec_in_first(demo: &Demo, id: &str, script: &str) -> Outcome<bulkhead_tests::process::Output> {
    demo.containerd.ctr(&["task", "exec", "--exec-id", id, "first", "/bin/sh", "-c", script])
}

fn exec(demo: &Demo) -> Outcome<String> {
    let output = exec_in_first(demo, "look", "cat /proc/1/cmdline | tr '\\0' ' '; exit 7")?;
    ensure_eq!(output.code, 7, "exit code of ctr task exec, {}", output.said());
    ensure!(
        output.stdout.starts_with("sleep 100000"),
        "the exec does not see the container's process: {}",
        output.said()
    );
    Ok(format!(
        "sees pid 1 = {:?}, exit code 7 carried",
        output.stdout.lines().next().unwrap_or_default().trim()
    ))
}

fn init_module(demo: &Demo) -> Outcome<String> {
    let script = "echo module >/tmp/m.ko && insmod /tmp/m.ko";
    let arguments =
        ["run", "--rm", "--privileged", "--runtime", RUNTIME, &demo.image, "module", "/bin/sh", "-c", script];
    let output = demo.containerd.ctr(&arguments)?;
    ensure!(output.code != 0, "a module was accepted: {}", output.said());
    ensure!(output.stderr.contains(ENOSYS), "not the kernel's ENOSYS: {}", output.said());
    Ok(format!("even to a privileged container: {:?}", output.stderr.trim()))
}

fn second_pod(demo: &Demo) -> Outcome<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let first = exec_in_first(demo, "boot", &format!("cat {path}"))?.success("exec in the first pod")?.stdout;
    let second =
        demo.containerd.ctr(&demo.run_arguments("second", &["cat", path]))?.success("second pod")?.stdout;
    ensure!(first != second && first.len() == 37 && second.len() == 37, "boot ids {first:?} and {second:?}");
    Ok(format!("two kernels, boot ids {} and {}", first.trim(), second.trim()))
}

fn vmm_memory(demo: &Demo) -> Outcome<String> {
    let shim = *demo.containerd.shims("first").first().explain(|| "no shim of the first pod".into())?;
    let vmm = node::descendants(shim, "bulkhead-vmm")
        .into_iter()
        .next()
        .explain(|| "no VMM below the shim".into())?;
    let own = node::resident_but_largest_mapping(vmm.pid)?;
    ensure!(own <= 8 << 20, "{own} bytes resident without guest memory, at most 8 MiB are allowed");
    Ok(format!("{:.1} MiB resident without guest memory", own as f64 / f64::from(1 << 20)))
}

fn delete_first(demo: &Demo) -> Outcome<String> {
    let containerd = &demo.containerd;
    containerd.ctr(&["task", "kill", "-s", "SIGKILL", "first"])?.success("ctr task kill")?;
    eventually("the task stops", LIMIT, || {
        let list = containerd.ctr(&["task", "ls"])?.stdout;
        ensure!(list.contains("STOPPED"), "{list:?}");
        Ok(())
    })?;
    let deleted = containerd.ctr(&["task", "delete", "first"])?;
    ensure!([0, 137].contains(&deleted.code), "ctr task delete: {}, {}", deleted.code, deleted.said());
    containerd.ctr(&["container", "delete", "first"])?.success("ctr container delete")?;
    Ok("killed, task and container deleted".into())
}

/// The shim logs for each pod how it was started, and how long that took from the VMM's start to the agent's first answer.
fn start_time(demo: &Demo) -> Outcome<String> {
    let log = demo.containerd.log();
    let mut evidence = Vec::new();
    for how in ["booted", "restored"] {
        let times: Vec<u64> = log.lines().filter_map(|line| microseconds(line, how)).collect();
        let (Some(fastest), Some(slowest)) = (times.iter().min(), times.iter().max()) else {
            fail!("the shims logged no pod that was {how}")
        };
        let (fastest, slowest) = (*fastest as f64 / 1000.0, *slowest as f64 / 1000.0);
        evidence.push(format!("{fastest:.1} ms to {slowest:.1} ms in {} pods that were {how}", times.len()));
    }
    Ok(evidence.join(", "))
}

/// The number in the log line of a pod that was started in this way.
fn microseconds(line: &str, how: &str) -> Option<u64> {
    let (_, after) = line.split_once(&format!("agent ready, {how}: "))?;
    after.split(' ').next()?.parse().ok()
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
