//! Through containerd with the real `ctr`, as its users do.

use std::fs;

use super::{Case, Environment, Fixture, Runtime};
use crate::containerd::PrivateContainerd;
use crate::failure::{Explain, Outcome};
use crate::process::eventually;
use crate::shim::CALL_LIMIT;
use crate::{ensure, ensure_eq};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("ctr-run", run).on(Fixture::Containerd),
    Case::new("cold-ctr-run", run).on(Fixture::Containerd).cold(),
    Case::new("ctr-detached-exec-kill-delete", detached).on(Fixture::Containerd),
    Case::new("ctr-bind-mount-and-limits", mount_and_limits).on(Fixture::Containerd),
    Case::new("ctr-root-file-system-on-a-disk", disk_root).on(Fixture::Containerd),
    Case::new("ctr-users-of-its-own", own_users).on(Fixture::Containerd),
    Case::new("ctr-two-pods-at-once", two_pods).on(Fixture::Containerd),
    Case::new("ctr-containerd-restarts", containerd_restarts).on(Fixture::Containerd),
];

/// The image that the fixture imported.
pub(crate) const IMAGE: &str = "bulkhead.test/busybox:1";

fn run(environment: &mut Environment) -> Outcome<String> {
    let (id, runtime) = (environment.id("run"), environment.runtime.name());
    let config = environment.config()?.map(|file| file.display().to_string());
    let options: Vec<&str> = config.iter().flat_map(|file| ["--runtime-config-path", file]).collect();
    let how = if config.is_some() { "booted" } else { "restored" };
    let ours = environment.runtime == Runtime::Bulkhead;
    let containerd = environment.containerd()?;
    let starts =
        |containerd: &PrivateContainerd| containerd.log().matches(&format!("agent ready, {how}: ")).count();
    let before = starts(containerd);
    let command = ["/bin/sh", "-c", "read line; echo out $line; echo err >&2; exit 42"];
    let arguments = [&["run", "--rm", "--runtime", runtime], &options[..], &[IMAGE, &id], &command].concat();
    let output = containerd.ctr_with_input(&arguments, b"from stdin\n")?;
    ensure_eq!(
        (output.code, output.stdout.as_str(), output.stderr.as_str()),
        (42, "out from stdin\n", "err\n"),
        "ctr run"
    );
    if ours {
        eventually(&format!("a pod that was {how}, in containerd's log"), CALL_LIMIT, || {
            ensure_eq!(starts(containerd), before + 1, "pods");
            Ok(())
        })?;
    }
    Ok(format!("streams and exit code carried, {:.3} s", output.elapsed.as_secs_f64()))
}

fn disk_root(environment: &mut Environment) -> Outcome<String> {
    const SNAPSHOTTER: &str = "blockfile";
    let (id, runtime) = (environment.id("disk"), environment.runtime.name());
    let ours = environment.runtime == Runtime::Bulkhead;
    let containerd = environment.containerd()?;
    containerd.import_for("busybox", SNAPSHOTTER)?;
    let script = "grep ' / ' /proc/mounts | cut -d' ' -f1-3; echo kept >/kept; cat /kept";
    let arguments = [
        "run",
        "--rm",
        "--snapshotter",
        SNAPSHOTTER,
        "--runtime",
        runtime,
        IMAGE,
        &id,
        "/bin/sh",
        "-c",
        script,
    ];
    let output = containerd.ctr(&arguments)?;
    let (elapsed, said) = (output.elapsed, output.success("ctr run")?.stdout);
    let device = if ours { "/dev/vd" } else { "/dev/loop" };
    ensure!(
        said.starts_with(device) && said.ends_with("/ ext4\nkept\n"),
        "root file system and its file: {said:?}"
    );
    Ok(format!("root is {} in {:.3} s", said.lines().next().unwrap_or_default(), elapsed.as_secs_f64()))
}

fn detached(environment: &mut Environment) -> Outcome<String> {
    let (id, runtime) = (environment.id("detached"), environment.runtime.name());
    let containerd = environment.containerd()?;
    containerd
        .ctr(&["run", "-d", "--runtime", runtime, IMAGE, &id, "sleep", "1000"])?
        .success("ctr run -d")?;
    let exec =
        containerd.ctr(&["task", "exec", "--exec-id", "e", &id, "/bin/sh", "-c", "echo inside; exit 3"])?;
    ensure_eq!((exec.code, exec.stdout.as_str()), (3, "inside\n"), "ctr task exec");
    let metrics = containerd.ctr(&["task", "metrics", &id])?.success("ctr task metrics")?.stdout;
    ensure!(metrics.contains("memory.usage "), "ctr task metrics understands nothing: {metrics:?}");
    remove(environment, &id, "137")?;
    Ok("exec, metrics, kill and delete".into())
}

/// Kills a detached container's task, and deletes task and container.
pub(crate) fn remove(environment: &mut Environment, id: &str, status: &str) -> Outcome {
    let containerd = environment.containerd()?;
    containerd.ctr(&["task", "kill", "-s", "SIGKILL", id])?.success("ctr task kill")?;
    eventually("the task stops", CALL_LIMIT, || {
        let list = containerd.ctr(&["task", "ls"])?.stdout;
        ensure!(list.lines().any(|line| line.starts_with(id) && line.contains("STOPPED")), "{list:?}");
        Ok(())
    })?;
    let deleted = containerd.ctr(&["task", "delete", id])?;
    ensure!(
        deleted.code.to_string() == status || deleted.code == 0,
        "ctr task delete: {}, {}",
        deleted.code,
        deleted.said()
    );
    containerd.ctr(&["container", "delete", id])?.success("ctr container delete")?;
    Ok(())
}

fn mount_and_limits(environment: &mut Environment) -> Outcome<String> {
    let (id, runtime) = (environment.id("mount"), environment.runtime.name());
    let containerd = environment.containerd()?;
    let shared = containerd.path().join(&id);
    fs::create_dir(&shared).explain(|| "make the shared directory".into())?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", shared.display());
    let script = "echo written >/data/file; cat /proc/self/cgroup; id -u";
    let arguments = [
        "run",
        "--rm",
        "--runtime",
        runtime,
        "--mount",
        &mount,
        "--memory-limit",
        "67108864",
        "--user",
        "1000",
        IMAGE,
        &id,
    ];
    fs::set_permissions(&shared, std::os::unix::fs::PermissionsExt::from_mode(0o777))
        .explain(|| "open the directory to all".into())?;
    let output =
        containerd.ctr(&[&arguments[..], &["/bin/sh", "-c", script]].concat())?.success("ctr run")?;
    ensure!(output.stdout.ends_with("1000\n"), "user: {}", output.said());
    let written = fs::read_to_string(shared.join("file")).explain(|| "the written file".into())?;
    ensure_eq!(written, "written\n", "what the container wrote");
    fs::remove_dir_all(&shared).explain(|| "remove the shared directory".into())?;
    Ok("written through a bind mount as user 1000".into())
}

/// `--uidmap` and `--gidmap`: containerd makes a copy of the image that has other owners.
fn own_users(environment: &mut Environment) -> Outcome<String> {
    let script = "tr -s ' ' </proc/self/uid_map; id -u; stat -c %u / /bin/busybox; touch /new && stat -c %u /new; ls -d /sys/class";
    let map = "0:100000:65536";
    let (id, runtime) = (environment.id("users"), environment.runtime.name());
    let containerd = environment.containerd()?;
    let run = ["run", "--rm", "--runtime", runtime, "--uidmap", map, "--gidmap", map];
    let arguments = [&run[..], &[IMAGE, id.as_str(), "/bin/sh", "-c", script]].concat();
    let output = containerd.ctr(&arguments)?.success("ctr run --uidmap")?;
    ensure_eq!(output.stdout, " 0 100000 65536\n0\n0\n0\n0\n/sys/class\n", "inside");
    Ok("root is 100000 outside of it".into())
}

fn two_pods(environment: &mut Environment) -> Outcome<String> {
    let (first, second, runtime) =
        (environment.id("first"), environment.id("second"), environment.runtime.name());
    let containerd = environment.containerd()?;
    containerd
        .ctr(&["run", "-d", "--runtime", runtime, IMAGE, &first, "sleep", "1000"])?
        .success("first ctr run")?;
    let output = containerd.ctr(&[
        "run",
        "--rm",
        "--runtime",
        runtime,
        IMAGE,
        &second,
        "cat",
        "/proc/sys/kernel/random/boot_id",
    ])?;
    let second_boot = output.success("second ctr run")?.stdout;
    let exec = containerd.ctr(&[
        "task",
        "exec",
        "--exec-id",
        "e",
        &first,
        "cat",
        "/proc/sys/kernel/random/boot_id",
    ])?;
    let first_boot = exec.success("exec in the first")?.stdout;
    if environment.runtime == Runtime::Bulkhead {
        ensure!(
            first_boot != second_boot && first_boot.len() == 37,
            "both pods run in one kernel, boot id {first_boot:?}"
        );
    }
    remove(environment, &first, "137")?;
    Ok(format!("boot ids {} and {}", first_boot.trim(), second_boot.trim()))
}

fn containerd_restarts(environment: &mut Environment) -> Outcome<String> {
    let (id, runtime) = (environment.id("restart"), environment.runtime.name());
    let containerd = environment.containerd()?;
    let script =
        "trap 'exit 9' TERM; i=0; while :; do i=$((i+1)); echo $i >/next; mv /next /count; sleep 0.05; done";
    containerd
        .ctr(&["run", "-d", "--runtime", runtime, IMAGE, &id, "/bin/sh", "-c", script])?
        .success("ctr run -d")?;
    let count = |containerd: &PrivateContainerd, exec: &str| -> Outcome<u64> {
        let output = containerd
            .ctr(&["task", "exec", "--exec-id", exec, &id, "cat", "/count"])?
            .success("ctr task exec")?;
        output.stdout.trim().parse().explain(|| format!("count {:?}", output.stdout))
    };
    let before = eventually("the container counts", CALL_LIMIT, || count(containerd, "a"))?;
    containerd.restart()?;
    let after = count(containerd, "b")?;
    ensure!(after >= before, "the container was started anew: it counted {before}, then {after}");
    let attached = containerd.ctr_running(&["task", "attach", &id])?;
    containerd.ctr(&["task", "kill", "-s", "SIGTERM", &id])?.success("ctr task kill")?;
    let ended = attached.finish(CALL_LIMIT * 2)?;
    ensure_eq!(ended.code, 9, "exit code that ctr task attach waited for, {}", ended.said());
    let _ = containerd.ctr(&["task", "delete", &id])?;
    containerd.ctr(&["container", "delete", &id])?.success("ctr container delete")?;
    Ok(format!("it went on from {before} to {after}, was exec'd into, waited for and deleted"))
}
