//! The state machine behind the Task API, with a guest that the tests play. (Real guests are for the end-to-end suite.)

pub(crate) mod guest;
mod hostile;

use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bulkhead_vmm_protocol::ExitReason;
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest,
    ResumeRequest, ShutdownRequest, StartRequest, StateRequest, StatsRequest, Status, WaitRequest,
};
use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, Events, TaskClient, create_events};
use containerd_shim_protos::types::mount::Mount;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use tempfile::TempDir;
use ttrpc::asynchronous::{Server, TtrpcContext};
use ttrpc::context;

use self::guest::Guest;
use super::service::services;
use super::shim::Shim;
use super::stdio::DRAIN_IDLE;
use crate::error::Code;
use crate::events::Publisher;
use crate::pod::heartbeat::Heartbeat;

const LIMIT: Duration = Duration::from_secs(10);

/// Notes events as "topic id", with the exit status of exits.
struct Containerd(Arc<Mutex<Vec<String>>>);

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        let topic = envelope.topic.trim_start_matches("/tasks/");
        let note = match topic {
            "exit" => {
                let exit = TaskExit::parse_from_bytes(&envelope.event.value).unwrap();
                format!("exit {} {}", exit.id, exit.exit_status)
            }
            // The container's id is the first field of the others.
            _ => {
                format!("{topic} {}", TaskOOM::parse_from_bytes(&envelope.event.value).unwrap().container_id)
            }
        };
        self.0.lock().unwrap().push(note);
        Ok(Empty::new())
    }
}

/// A shim with a pod `p`, its containerd, and its guest.
struct Stage {
    directory: TempDir,
    shim: Arc<Shim>,
    client: TaskClient,
    guest: Guest,
    events: Arc<Mutex<Vec<String>>>,
    _servers: Vec<Server>,
}

impl Stage {
    async fn new() -> Stage {
        Stage::with_heartbeat(Heartbeat::default()).await
    }

    /// A pod with two containers that run, the first with an exec.
    async fn running() -> Stage {
        let stage = Stage::new().await;
        for id in ["a", "b"] {
            stage.create(id).await;
            stage.start(id, "").await.unwrap();
        }
        stage.exec("a", "e").await.unwrap();
        stage.start("a", "e").await.unwrap();
        stage
    }

    async fn with_heartbeat(heartbeat: Heartbeat) -> Stage {
        let directory = tempfile::tempdir().unwrap();

        let events = Arc::default();
        let socket = |name: &str| format!("unix://{}", directory.path().join(name).display());
        let mut containerd = Server::new()
            .bind(&socket("events"))
            .unwrap()
            .register_service(create_events(Arc::new(Containerd(Arc::clone(&events)))));
        containerd.start().await.unwrap();

        let shim = Arc::new(Shim::new(Publisher::start(&socket("events"), "test"), log::LevelFilter::Off));
        let mut server = Server::new().bind(&socket("task")).unwrap().register_service(services(&shim));
        server.start().await.unwrap();
        let client = TaskClient::new(Client::connect(&socket("task")).await.unwrap());

        let (guest, pod) = Guest::start("p", directory.path().join("pod"), heartbeat).await;
        shim.slot.lock().await.pod = Some(pod.clone());
        shim.note_launched(&pod);
        tokio::spawn(shim.clone().pass_events(pod));
        Stage { directory, shim, client, guest, events, _servers: vec![containerd, server] }
    }

    /// Creates a container of the pod; its standard output goes to a FIFO in its bundle.
    async fn create(&self, id: &str) {
        self.create_on(id, Vec::new()).await.unwrap();
    }

    /// The same with mounts for the root file system.
    async fn create_on(&self, id: &str, rootfs: Vec<Mount>) -> ttrpc::Result<()> {
        let bundle = self.directory.path().join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::write(bundle.join("rootfs/file"), "x").unwrap();
        nix::unistd::mkfifo(&bundle.join("out"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let spec = json!({
            "ociVersion": "1.2.0",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p"},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network"}]}
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let request = CreateTaskRequest {
            id: id.into(),
            stdout: bundle.join("out").display().to_string(),
            bundle: bundle.display().to_string(),
            rootfs,
            ..Default::default()
        };
        self.client.create(ctx(), &request).await.map(drop)
    }

    /// Mounts that make an image in the stage's directory a root file system.
    fn image(&self) -> Vec<Mount> {
        let image = self.directory.path().join("image");
        fs::write(&image, [0; 4096]).unwrap();
        vec![Mount {
            type_: "ext4".into(),
            source: image.display().to_string(),
            options: vec!["rw".into(), "loop".into()],
            ..Default::default()
        }]
    }

    async fn start(&self, id: &str, exec: &str) -> ttrpc::Result<()> {
        let request = StartRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.client.start(ctx(), &request).await.map(drop)
    }

    /// What an exec executes.
    fn process() -> protobuf::MessageField<Any> {
        let process = json!({"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"});
        protobuf::MessageField::some(Any { value: process.to_string().into_bytes(), ..Default::default() })
    }

    async fn exec(&self, id: &str, exec: &str) -> ttrpc::Result<()> {
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec.into(),
            spec: Stage::process(),
            ..Default::default()
        };
        self.client.exec(ctx(), &request).await.map(drop)
    }

    async fn wait(&self, id: &str, exec: &str) -> u32 {
        let request = WaitRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.client.wait(ctx(), &request).await.unwrap().exit_status
    }

    async fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.client.delete(ctx(), &request).await.map(|response| response.exit_status)
    }

    async fn delete_within(&self, id: &str, limit: Duration) -> u32 {
        let request = DeleteRequest { id: id.into(), ..Default::default() };
        self.client.delete(context::with_duration(limit), &request).await.unwrap().exit_status
    }

    async fn kill(&self, id: &str, exec: &str) -> ttrpc::Result<()> {
        let request = KillRequest { id: id.into(), exec_id: exec.into(), signal: 9, ..Default::default() };
        self.client.kill(ctx(), &request).await.map(drop)
    }

    async fn status(&self, id: &str) -> Status {
        let request = StateRequest { id: id.into(), ..Default::default() };
        self.client.state(ctx(), &request).await.unwrap().status()
    }

    async fn events(&self) -> Vec<String> {
        self.shim.publisher.flush(LIMIT).await;
        self.events.lock().unwrap().clone()
    }
}

fn ctx() -> context::Context {
    context::with_duration(LIMIT)
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    refusal(result).0
}

fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other}"),
    }
}

#[tokio::test]
async fn the_events_of_a_container_come_in_order() {
    let stage = Stage::new().await;
    stage.create("c").await;
    assert_eq!(stage.status("c").await, Status::CREATED);
    stage.start("c", "").await.unwrap();
    stage.exec("c", "e").await.unwrap();
    stage.start("c", "e").await.unwrap();

    // The guest tells of the first process before it tells of the exec that died with it.
    stage.guest.exit("c", "", 3);
    tokio::time::sleep(Duration::from_millis(200)).await;
    stage.guest.exit("c", "e", 137);
    assert_eq!((stage.wait("c", "").await, stage.wait("c", "e").await), (3, 137));
    assert_eq!(stage.status("c").await, Status::STOPPED);
    assert_eq!(stage.delete("c", "e").await.unwrap(), 137);
    assert_eq!(stage.delete("c", "").await.unwrap(), 3);

    assert_eq!(
        stage.events().await,
        ["create c", "start c", "exec-added c", "exec-started c", "exit e 137", "exit c 3", "delete c"]
    );
    assert_eq!(stage.guest.calls("Delete"), ["c e", "c "]);
    assert!(!stage.directory.path().join("pod").exists(), "the pod goes with its last container");
}

#[tokio::test]
async fn an_exec_that_cannot_be_set_up_fails_when_it_is_started() {
    let stage = Stage::new().await;
    stage.create("c").await;
    stage.start("c", "").await.unwrap();
    for exec in ["e", "f"] {
        stage.guest.refuse("CreateExec", Code::INVALID_ARGUMENT, "executable file not found in $PATH");
        stage.exec("c", exec).await.unwrap();
    }
    let (code, message) = refusal(stage.start("c", "e").await);
    assert_eq!((code, message.as_str()), (Code::INVALID_ARGUMENT, "executable file not found in $PATH"));
    assert_eq!(stage.wait("c", "e").await, 255, "whoever waits for it is not left waiting");
    assert_eq!(stage.delete("c", "e").await.unwrap(), 255);
    // One that was never started can be deleted as well.
    assert_eq!(stage.delete("c", "f").await.unwrap(), 255);
    // That the container is in no state for an exec is told at once.
    stage.guest.refuse("CreateExec", Code::FAILED_PRECONDITION, "container c is stopped");
    assert_eq!(refusal(stage.exec("c", "g").await).0, Code::FAILED_PRECONDITION);
    stage.guest.exit("c", "", 0);
    stage.wait("c", "").await;
    stage.delete("c", "").await.unwrap();
    assert_eq!(
        stage.events().await,
        ["create c", "start c", "exec-added c", "exec-added c", "exit c 0", "delete c"]
    );
}

#[tokio::test]
async fn a_root_file_system_on_a_disk_comes_and_goes_with_its_container() {
    let stage = Stage::new().await;
    stage.create("shared").await;
    stage.create_on("c", stage.image()).await.unwrap();
    assert_eq!(stage.guest.calls("AttachDisk"), ["0 false 1"]);
    assert_eq!(stage.guest.calls("AddDisk"), ["0 ext4 rw,loop"]);
    assert_eq!(stage.guest.calls("Root"), ["/run/bulkhead/roots/shared/rootfs", "/run/bulkhead/disks/0"]);
    assert_eq!(stage.delete("c", "").await.unwrap(), 137);
    assert_eq!(
        (stage.guest.calls("RemoveDisk"), stage.guest.calls("DetachDevice")),
        (vec!["0".into()], vec!["0".into()])
    );
    let order = stage.guest.order(&["Delete", "RemoveDisk", "DetachDevice"]);
    assert_eq!(order, ["Delete", "RemoveDisk", "DetachDevice"]);
}

#[tokio::test]
async fn layers_are_one_disk_and_leave_slots_to_others() {
    let stage = Stage::new().await;
    stage.create("shared").await;
    let mut view = stage.image();
    view[0].type_ = "erofs".into();
    view[0].options = vec!["ro".into(), "loop".into()];
    for number in 0..6 {
        stage.create_on(&format!("c{number}"), view.clone()).await.unwrap();
        assert_eq!(stage.guest.calls("AddDisk").last().unwrap(), &format!("{number} erofs ro,noacl"));
    }
    assert_eq!(stage.guest.calls("AttachDisk").last().unwrap(), "5 true 1");
    // The next one is mounted on the host, which finds nothing in it.
    let (_, message) = refusal(stage.create_on("late", view).await);
    assert!(message.contains("can't mount"), "{message}");
    assert_eq!(stage.guest.calls("AttachDisk").len(), 6);
}

#[tokio::test]
async fn a_disk_that_the_guest_refuses_is_taken_back() {
    let stage = Stage::new().await;
    stage.create("shared").await;
    stage.guest.refuse("AddDisk", Code::INTERNAL, "no ext4 there");
    let (_, message) = refusal(stage.create_on("c", stage.image()).await);
    assert!(message.contains("image: no ext4 there"), "{message}");
    assert_eq!(stage.guest.calls("DetachDevice"), ["0"]);
    assert_eq!(stage.guest.calls("CreateContainer"), ["shared"]);
    // Its slot is free again, also when it is the container that fails.
    stage.guest.refuse("CreateContainer", Code::INVALID_ARGUMENT, "not that");
    stage.create_on("d", stage.image()).await.unwrap_err();
    assert_eq!(stage.guest.calls("AttachDisk"), ["0 false 1", "0 false 1"]);
    assert_eq!(stage.guest.calls("DetachDevice"), ["0", "0"]);
}

#[tokio::test]
async fn an_exit_that_overtakes_the_answer_to_start_is_announced_after_it() {
    let stage = Stage::new().await;
    stage.create("c").await;
    stage.guest.delay("Start", Duration::from_millis(500));
    let exit = async {
        while stage.guest.calls("Start").is_empty() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        stage.guest.exit("c", "", 0);
    };
    tokio::join!(stage.start("c", ""), exit).0.unwrap();
    assert_eq!(stage.wait("c", "").await, 0);
    assert_eq!(stage.events().await, ["create c", "start c", "exit c 0"]);
}

#[tokio::test]
async fn states_decide_what_is_possible() {
    let stage = Stage::new().await;
    stage.create("c").await;
    assert_eq!(code(stage.exec("c", "e").await), Code::FAILED_PRECONDITION);
    stage.start("c", "").await.unwrap();
    assert_eq!(code(stage.start("c", "").await), Code::FAILED_PRECONDITION);
    assert_eq!(code(stage.delete("c", "").await), Code::FAILED_PRECONDITION);
    assert_eq!(code(stage.exec("c", "../e").await), Code::INVALID_ARGUMENT);
    stage.exec("c", "e").await.unwrap();
    assert_eq!(code(stage.exec("c", "e").await), Code::ALREADY_EXISTS);

    let id = || "c".to_owned();
    stage.client.pause(ctx(), &PauseRequest { id: id(), ..Default::default() }).await.unwrap();
    assert_eq!(stage.status("c").await, Status::PAUSED);
    stage.client.resume(ctx(), &ResumeRequest { id: id(), ..Default::default() }).await.unwrap();
    assert_eq!(stage.status("c").await, Status::RUNNING);

    stage.kill("c", "").await.unwrap();
    assert_eq!(stage.wait("c", "").await, 137);
    assert_eq!(code(stage.kill("c", "").await), Code::NOT_FOUND);
    assert_eq!(code(stage.start("c", "").await), Code::NOT_FOUND);
    assert_eq!(
        code(stage.client.stats(ctx(), &StatsRequest { id: id(), ..Default::default() }).await),
        Code::NOT_FOUND
    );
    // Still listed, so that a containerd that comes back finds the exit status.
    let pids = stage.client.pids(ctx(), &PidsRequest { id: id(), ..Default::default() }).await.unwrap();
    assert_eq!(pids.processes.len(), 1);
    // Asked for again, it is the same.
    assert_eq!(stage.wait("c", "").await, 137);
}

#[tokio::test]
async fn a_container_that_was_never_started_can_be_deleted() {
    let stage = Stage::new().await;
    stage.create("c").await;
    assert_eq!(stage.delete("c", "").await.unwrap(), 137);
    assert_eq!(stage.events().await, ["create c", "exit c 137", "delete c"]);
    assert_eq!(stage.guest.calls("Signal"), ["c  9 all"]);
}

#[tokio::test]
async fn a_container_that_fails_leaves_nothing_in_a_pod_that_lives() {
    let stage = Stage::new().await;
    stage.create("first").await;
    stage.guest.refuse(
        "CreateContainer",
        Code::INVALID_ARGUMENT,
        "exec: \"nothing\": not found in $PATH\x07",
    );
    let bundle = stage.directory.path().join("second");
    fs::create_dir_all(bundle.join("rootfs/dir")).unwrap();
    fs::copy(stage.directory.path().join("first/config.json"), bundle.join("config.json")).unwrap();
    let request =
        CreateTaskRequest { id: "second".into(), bundle: bundle.display().to_string(), ..Default::default() };
    let (code, message) = refusal(stage.client.create(ctx(), &request).await);
    assert_eq!((code, message.as_str()), (Code::INVALID_ARGUMENT, "exec: \"nothing\": not found in $PATH"));
    assert!(!stage.directory.path().join("pod/shared/second").exists());
    assert!(stage.directory.path().join("pod/shared/first").exists());
    assert_eq!(stage.events().await, ["create first"]);
    stage.start("first", "").await.unwrap();
}

#[tokio::test]
async fn a_dead_vmm_is_a_dead_pod() {
    let stage = Stage::running().await;
    stage.create("c").await;

    let waiting = (stage.wait("a", ""), stage.wait("a", "e"), stage.wait("b", ""), stage.wait("c", ""));
    stage.guest.end(ExitReason::Panic);
    let (a, e, b, c) = tokio::join!(waiting.0, waiting.1, waiting.2, waiting.3);
    assert_eq!((a, e, b, c), (137, 137, 137, 137));

    let (_, message) = refusal(stage.kill("b", "").await);
    assert!(message.contains("the guest kernel panicked"), "{message}");
    let (_, message) = refusal(stage.exec("b", "late").await);
    assert!(message.contains("the guest kernel panicked"), "{message}");

    // As long as a container is there, so is the shim; then it goes.
    let shutdown = ShutdownRequest { id: "p".into(), ..Default::default() };
    stage.client.shutdown(ctx(), &shutdown).await.unwrap();
    for id in ["a", "b", "c"] {
        assert_eq!(stage.delete(id, "").await.unwrap(), 137);
    }
    let early = tokio::time::timeout(Duration::from_millis(100), stage.shim.exiting()).await;
    assert!(early.is_err(), "containers were left at the shutdown");
    stage.client.shutdown(ctx(), &shutdown).await.unwrap();
    tokio::time::timeout(LIMIT, stage.shim.exiting()).await.unwrap();

    let events = stage.events().await;
    let position =
        |event: &str| events.iter().position(|found| found == event).unwrap_or_else(|| panic!("{event}"));
    assert!(position("exit e 137") < position("exit a 137"));
    assert!(position("exit b 137") < position("delete b"));
    assert!(!stage.directory.path().join("pod").exists());
}

#[tokio::test]
async fn an_agent_that_hangs_up_is_a_dead_pod() {
    let stage = Stage::new().await;
    stage.create("c").await;
    stage.start("c", "").await.unwrap();
    stage.guest.hang_up();
    assert_eq!(stage.wait("c", "").await, 137);
    let (_, message) = refusal(stage.kill("c", "").await);
    assert!(message.contains("the agent closed its connection"), "{message}");
}

#[tokio::test]
async fn an_exit_is_reported_while_nobody_takes_the_output() {
    let stage = Stage::new().await;
    stage.create("c").await;
    stage.start("c", "").await.unwrap();
    let flood = stage.guest.write_endlessly();
    tokio::time::sleep(Duration::from_millis(100)).await;
    stage.kill("c", "").await.unwrap();
    let started = std::time::Instant::now();
    assert_eq!(stage.wait("c", "").await, 137);
    assert!(started.elapsed() < DRAIN_IDLE, "it has waited for the output");
    assert_eq!(stage.events().await.last().unwrap(), "exit c 137");
    flood.abort();
}

#[tokio::test]
async fn an_agent_that_does_not_answer_holds_up_nobody_else() {
    let stage = Stage::new().await;
    stage.create("c").await;
    stage.start("c", "").await.unwrap();
    stage.guest.delay("Pids", Duration::from_secs(60));
    let started = std::time::Instant::now();
    let request = PidsRequest { id: "c".into(), ..Default::default() };
    let pids = stage.client.pids(ctx(), &request);
    let (pids, status) = tokio::join!(pids, stage.status("c"));
    assert_eq!(status, Status::RUNNING);
    let pid = pids.unwrap().processes[0].pid;
    assert!(fs::exists(format!("/proc/self/task/{pid}")).unwrap(), "{pid} is none of the pod's threads");
    // containerd gives up after five seconds.
    assert!(started.elapsed() < Duration::from_secs(4));
}

#[tokio::test]
async fn a_flood_of_events_is_cut_and_unknown_containers_are_ignored() {
    let stage = Stage::new().await;
    stage.create("c").await;
    stage.guest.flood_with_oom(&["ghost", "c"]);
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while !stage.events().await.iter().any(|event| event == "oom c") {
        assert!(std::time::Instant::now() < deadline, "nothing of the flood was told");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let events = stage.events().await;
    assert!(!events.iter().any(|event| event == "oom ghost"));
    assert!(events.len() < 40, "{}", events.len());
    assert_eq!(stage.status("c").await, Status::CREATED);
}

#[tokio::test]
async fn an_exit_for_want_of_memory_is_explained_before_it_is_told() {
    let stage = Stage::new().await;
    stage.create("c").await;
    stage.start("c", "").await.unwrap();
    // The agent's own event has not come, and never will.
    stage.guest.exit_without_memory("c");
    assert_eq!(stage.wait("c", "").await, 137);
    assert_eq!(stage.events().await, ["create c", "start c", "oom c", "exit c 137"]);
}

#[tokio::test]
async fn a_caller_that_leaves_does_not_leave_things_half_done() {
    let stage = Stage::new().await;
    stage.create("c").await;
    stage.guest.delay("Start", Duration::from_millis(300));
    let impatient = StartRequest { id: "c".into(), ..Default::default() };
    let short = context::with_duration(Duration::from_millis(50));
    assert!(stage.client.start(short, &impatient).await.is_err());
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while stage.status("c").await != Status::RUNNING && std::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(stage.status("c").await, Status::RUNNING);
    assert_eq!(stage.events().await, ["create c", "start c"]);
}
