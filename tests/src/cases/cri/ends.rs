//! How containers and pods end, and what is told about it.

use std::time::Duration;

use bulkhead_cri::proto::{self, ContainerState, PodSandboxState};
use protobuf::MessageField;

use crate::cases::Environment;
use crate::cri::{CALL_LIMIT, Pod};
use crate::failure::{Explain, Outcome};
use crate::node;
use crate::process::eventually;
use crate::{ensure, ensure_eq, fail};

/// Exit codes, signals, and what SIGTERM and the grace time do.
pub(crate) fn exit_codes(environment: &mut Environment) -> Outcome<String> {
    let pod = environment.shared_pod(environment.handler())?;
    for (script, code, reason) in
        [("exit 0", 0, "Completed"), ("exit 42", 42, "Error"), ("kill -SEGV $$; sleep 1", 0, "Completed")]
    {
        // The first process of a PID namespace is not ended by a signal of its own.
        let ended = pod.run_script("ends", script, |_| {})?;
        ensure_eq!((ended.code, ended.reason.as_str()), (code, reason), "{script}");
    }
    let ended = pod.run_script("ends", "sh -c 'kill -SEGV $$'; exit $?", |_| {})?;
    ensure_eq!(ended.code, 139, "a child that was ended by a signal");
    let container =
        pod.start("ends", "trap 'echo asked; exit 3' TERM; echo up; while :; do sleep 0.02; done", |_| {})?;
    container.wait_for_output("up")?;
    container.stop(Duration::from_secs(20))?;
    let ended = container.wait()?;
    ensure_eq!((ended.code, ended.stdout.as_str()), (3, "up\nasked\n"), "SIGTERM");
    container.stop(Duration::from_secs(1)).explain(|| "stop once more".into())?;
    container.remove()?;
    let container = pod.start("ends", "trap '' TERM; echo up; while :; do sleep 0.02; done", |_| {})?;
    container.wait_for_output("up")?;
    container.stop(Duration::from_secs(1))?;
    ensure_eq!(container.wait()?.code, 137, "a container that ignores SIGTERM");
    container.remove()?;
    Ok("0, 42, 139, SIGTERM's own 3, and 137 after the grace time".into())
}

/// A program that is not there is refused by `StartContainer`, and told as the kubelet expects it.
pub(crate) fn no_such_program(environment: &mut Environment) -> Outcome<String> {
    let pod = environment.shared_pod(environment.handler())?;
    let mut words = String::new();
    for (command, expected) in [("/no/such/program", "no such file"), ("/etc/passwd", "permission denied")] {
        let container = pod.create("none", "", |config| config.command = vec![command.to_owned()])?;
        let Err(failure) = container.start() else { fail!("{command} was started") };
        ensure!(
            failure.0.to_lowercase().contains(expected) && failure.0.contains(command),
            "{command}: {failure}"
        );
        let status = container.status()?;
        let told = (status.state.enum_value_or_default(), status.exit_code, status.reason.as_str());
        ensure_eq!(told, (ContainerState::CONTAINER_EXITED, 128, "StartError"), "{command}");
        container.remove()?;
        words = failure.0;
    }
    pod.run_script("after", "true", |_| {})?.success()?;
    Ok(words)
}

/// A container that takes more memory than it may is ended and says so; its pod and the others go on.
pub(crate) fn out_of_memory(environment: &mut Environment) -> Outcome<String> {
    let pod = environment.shared_pod(environment.handler())?;
    let beside = pod.start("beside", "sleep 100000", |_| {})?;
    let ended = pod.run_script("eats", "echo begin; head -c 200m /dev/zero | tail", |config| {
        config.linux.mut_or_insert_default().resources.mut_or_insert_default().memory_limit_in_bytes =
            32 << 20;
    })?;
    // The shell lives on where only its child was killed, which the kernel decides.
    ensure_eq!((ended.reason.as_str(), ended.stdout.as_str()), ("OOMKilled", "begin\n"), "{ended:?}");
    ensure_eq!(ended.code, 137, "exit code");
    ensure_eq!(pod.status()?.state.enum_value_or_default(), PodSandboxState::SANDBOX_READY, "pod");
    beside.exec("true")?.success()?;
    beside.stop(Duration::ZERO)?;
    beside.remove()?;
    Ok("OOMKilled, 137, the pod is ready and the container beside it runs".into())
}

/// A pod whose virtual machine is gone is not ready, its containers have ended, and it can be removed.
pub(crate) fn vmm_dies(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    let before: Vec<i32> = vmms();
    let pod = Pod::run(node, environment.handler(), "dies", |_| {})?;
    let container = pod.start("runs", "sleep 100000", |_| {})?;
    let vmm = vmms().into_iter().find(|pid| !before.contains(pid)).explain(|| "no VMM".into())?;
    node::kill_hard(vmm)?;
    let ended = container.wait()?;
    ensure_eq!(ended.code, 137, "exit code");
    pod.wait_for(PodSandboxState::SANDBOX_NOTREADY)?;
    let request = proto::CreateContainerRequest {
        pod_sandbox_id: pod.known.id.clone(),
        config: MessageField::some(proto::ContainerConfig::default()),
        ..Default::default()
    };
    ensure!(node.client().create_container(&request).is_err(), "a dead pod took a container");
    pod.finish()?;
    eventually("the VMM is gone", CALL_LIMIT, || {
        ensure!(!vmms().contains(&vmm), "process {vmm} is there");
        Ok(())
    })?;
    Ok("container 137, pod not ready, both removed".into())
}

fn vmms() -> Vec<i32> {
    let all = node::processes().into_iter();
    all.filter(|process| process.name == "bulkhead-vmm" && process.state != 'Z')
        .map(|process| process.pid)
        .collect()
}
