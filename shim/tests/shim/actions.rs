//! The binary as containerd runs it: `-v`, `-info`, `start`, `delete`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::common::{Containerd, LIMIT, SHIM, await_gone, connect, ctx, refusal, shut_down};
use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::api::{ConnectRequest, StateRequest};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use protobuf::Message;
use serde_json::json;
use ttrpc::Code;

#[test]
fn version_and_info_are_told() {
    let run = |flag| Command::new(SHIM).arg(flag).stdin(Stdio::null()).output().unwrap();
    for flag in ["-v", "-version", "--v"] {
        let output = run(flag);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.contains(env!("CARGO_PKG_VERSION")), "{flag}: {text}");
    }
    let info = RuntimeInfo::parse_from_bytes(&run("-info").stdout).unwrap();
    assert_eq!(info.name, "io.containerd.bulkhead.v1");
    assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
    let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
    assert_eq!(features["linux"]["cgroup"]["v2"], json!(true));
}

#[test]
fn a_wrong_command_line_is_refused() {
    for arguments in
        [&["-id", "x"][..], &["frobnicate"], &["-nonsense", "start"], &["-id", "../x", "start"], &["serve"]]
    {
        let output = Command::new(SHIM).args(arguments).stdin(Stdio::null()).output().unwrap();
        assert!(!output.status.success(), "{arguments:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?}");
    }
}

#[tokio::test]
async fn start_serves_both_versions_and_shutdown_leaves_nothing() {
    let containerd = Containerd::new().await;
    let bundle = containerd.bundle("c1", |_| {});
    let address = containerd.start(&bundle);
    let socket = Path::new(address.strip_prefix("unix://").unwrap());
    assert_eq!(fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::read_to_string(bundle.path.join("address")).unwrap(), address);

    let client = connect(&address).await;
    let request = StateRequest { id: "c1".into(), ..Default::default() };
    assert_eq!(refusal(client.state(ctx(), &request).await).0, Code::NOT_FOUND);

    // Version 2: the same messages under another name.
    let v2 = containerd_shim_protos::shim_async::Client::connect(&address).await.unwrap();
    let raw = ttrpc::Request {
        service: "containerd.task.v2.Task".into(),
        method: "Connect".into(),
        payload: ConnectRequest { id: "c1".into(), ..Default::default() }.write_to_bytes().unwrap(),
        ..Default::default()
    };
    let answer = v2.request(raw).await.unwrap();
    let answer = containerd_shim_protos::api::ConnectResponse::parse_from_bytes(&answer.payload).unwrap();
    assert_ne!(answer.shim_pid, 0);

    shut_down(&client, "c1", &address).await;
}

#[tokio::test]
async fn a_second_start_finds_the_first_and_a_stale_socket_is_replaced() {
    let containerd = Containerd::new().await;
    let bundle = containerd.bundle("c1", |_| {});
    let address = containerd.start(&bundle);
    let client = connect(&address).await;
    let shim_pid = |client: containerd_shim_protos::shim_async::TaskClient| async move {
        client
            .connect(ctx(), &ConnectRequest { id: "c1".into(), ..Default::default() })
            .await
            .unwrap()
            .shim_pid
    };
    let first = shim_pid(client).await;
    assert_eq!(containerd.start(&bundle), address);
    assert_eq!(shim_pid(connect(&address).await).await, first);

    // Killed, it leaves its socket; the next start takes its place.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(first as i32), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    await_gone(first).await;
    assert_eq!(containerd.start(&bundle), address);
    let client = connect(&address).await;
    assert_ne!(shim_pid(client.clone()).await, first);
    shut_down(&client, "c1", &address).await;
}

#[tokio::test]
async fn bootstrap_parameters_are_answered_in_kind() {
    let containerd = Containerd::new().await;
    let bundle = containerd.bundle("c1", |_| {});
    let sockets = containerd.directory.path().join("s");
    let params = BootstrapParams {
        instance_id: "c1".into(),
        namespace: "test".into(),
        containerd_ttrpc_address: containerd.directory.path().join("c.ttrpc").display().to_string(),
        containerd_grpc_address: containerd.directory.path().join("c.sock").display().to_string(),
        socket_dir: Some(sockets.display().to_string()),
        ..Default::default()
    };
    let output = containerd.start_with(&bundle, &params.write_to_bytes().unwrap());
    assert!(output.stderr.is_empty());
    let result = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    assert!(result.address.starts_with(&format!("unix://{}/", sockets.display())), "{}", result.address);
    shut_down(&connect(&result.address).await, "c1", &result.address).await;
}

#[tokio::test]
async fn a_container_of_a_pod_joins_its_pods_shim() {
    let containerd = Containerd::new().await;
    let annotated = |kind: &'static str| {
        move |spec: &mut serde_json::Value| {
            spec["annotations"] =
                json!({"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": "pod"});
        }
    };
    let member = containerd.bundle("member", annotated("container"));
    let output = containerd.start_with(&member, b"");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("\"pod\""), "names the pod that is missing");

    let sandbox = containerd.bundle("pod", annotated("sandbox"));
    let address = containerd.start(&sandbox);
    assert_eq!(containerd.start(&member), address);
    shut_down(&connect(&address).await, "pod", &address).await;
}

#[tokio::test]
async fn a_server_that_dies_at_once_is_reported() {
    let containerd = Containerd::new().await;
    let bundle = containerd.bundle("c1", |_| {});
    // The server's log can't be opened: a directory is in its place.
    fs::remove_file(bundle.path.join("log")).unwrap();
    fs::create_dir(bundle.path.join("log")).unwrap();
    let output = containerd.start_with(&bundle, b"");
    assert!(!output.status.success() && output.stdout.is_empty());
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("open the log"), "{message}");
}

#[tokio::test]
async fn nonsense_on_standard_input_is_refused() {
    let containerd = Containerd::new().await;
    let bundle = containerd.bundle("c1", |_| {});
    let other = BootstrapParams {
        instance_id: "other".into(),
        namespace: "test".into(),
        containerd_ttrpc_address: "/x".into(),
        ..Default::default()
    };
    let output = containerd.start_with(&bundle, &other.write_to_bytes().unwrap());
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("other"));
}

#[tokio::test]
async fn delete_is_idempotent_and_ends_only_what_the_bundle_records() {
    let containerd = Containerd::new().await;
    let bundle = containerd.bundle("c1", |_| {});

    // Nothing was ever there.
    let response = containerd.delete(&bundle);
    assert_eq!(response.exit_status, 137);

    // A pod's record: a process that stands for its VMM, and one whose number was reused.
    let mut victim = Command::new("sleep").arg("100").spawn().unwrap();
    let mut bystander = Command::new("sleep").arg("100").spawn().unwrap();
    let start_time = |pid: u32| -> u64 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap()
    };
    let directory = bundle.path.join("bulkhead");
    fs::create_dir_all(directory.join("shared/c1/rootfs")).unwrap();
    let state = json!({
        "shim": null,
        "vmm": {"pid": victim.id(), "start_time": start_time(victim.id())},
        "fs_server": {"pid": bystander.id(), "start_time": start_time(bystander.id()) - 1},
        "cgroup": null,
        "cgroup_parents": [],
    });
    fs::write(directory.join("state.json"), state.to_string()).unwrap();
    fs::write(
        bundle.path.join("bulkhead-exit.json"),
        json!({"pid": 7, "status": 3, "exited_at_ns": 1_500_000_000}).to_string(),
    )
    .unwrap();

    let started = Instant::now();
    let response = containerd.delete(&bundle);
    assert!(started.elapsed() < LIMIT);
    assert_eq!((response.pid, response.exit_status), (7, 3));
    assert_eq!((response.exited_at.seconds, response.exited_at.nanos), (1, 500_000_000));
    assert!(!victim.wait().unwrap().success());
    assert!(bystander.try_wait().unwrap().is_none(), "a process that only has the number must live");
    assert!(!directory.exists());

    containerd.delete(&bundle);
    bystander.kill().unwrap();
    bystander.wait().unwrap();
}

#[tokio::test]
async fn a_damaged_record_is_an_error_that_names_it() {
    let containerd = Containerd::new().await;
    let bundle = containerd.bundle("c1", |_| {});
    fs::create_dir(bundle.path.join("bulkhead")).unwrap();
    fs::write(bundle.path.join("bulkhead/state.json"), "{").unwrap();
    let output = Command::new(SHIM)
        .args(["-namespace", "test", "-id", "c1", "-bundle"])
        .arg(&bundle.path)
        .arg("delete")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("state.json"));
}
