//! Everything that can be wrong before a guest runs: a clear error, soon, with the right code, and nothing left behind.

use std::fs;
use std::path::Path;
use std::time::Instant;

use crate::common::{Bundle, Containerd, LIMIT, connect, ctx, refusal, shut_down};
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, ResizePtyRequest, ResumeRequest, StartRequest, StateRequest, StatsRequest,
    UpdateTaskRequest, WaitRequest,
};
use containerd_shim_protos::shim_async::TaskClient;
use containerd_shim_protos::types::mount::Mount;
use serde_json::{Value, json};
use ttrpc::Code;

/// A configuration whose files exist: they need not be what they should, as far as these tests get.
const FILES: &str = "vmm = \"/nonexistent/bulkhead-vmm\"\nfs_server = \"/nonexistent/bulkhead-fs\"\n\
                     kernel = \"/proc/self/exe\"\nimage = \"/proc/self/exe\"\nkvm = \"/dev/null\"\n";

/// Makes something wrong.
type Change<T> = fn(&mut T);

struct Case {
    containerd: Containerd,
    bundle: Bundle,
    address: String,
    client: TaskClient,
}

impl Case {
    async fn new(change: impl FnOnce(&mut Value)) -> Case {
        let containerd = Containerd::new().await;
        let bundle = containerd.bundle("c1", change);
        let address = containerd.start(&bundle);
        let client = connect(&address).await;
        Case { containerd, bundle, address, client }
    }

    /// Creates, which must fail; then does what containerd does after that, and looks for what is left.
    async fn refuse(mut self, request: CreateTaskRequest) -> (Code, String) {
        let before = mounts();
        let started = Instant::now();
        let (code, message) = refusal(self.client.create(ctx(), &request).await);
        assert!(started.elapsed() < LIMIT);

        let delete = DeleteRequest { id: request.id.clone(), ..Default::default() };
        assert_eq!(refusal(self.client.delete(ctx(), &delete).await).0, Code::NOT_FOUND);
        shut_down(&self.client, &request.id, &self.address).await;
        assert_eq!(mounts(), before, "mounts are left");
        assert!(!self.bundle.path.join("bulkhead").exists(), "the pod's directory is left");
        assert!(self.containerd.events.lock().unwrap().is_empty(), "nothing was ever announced");
        let log = self.bundle.log();
        assert!(log.contains("level=error") && log.contains("pod=c1"), "{log}");
        // And containerd's own callback.
        self.containerd.delete(&self.bundle);
        (code, message)
    }
}

fn mounts() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap()
}

async fn refused(config: &str, change: impl FnOnce(&mut Value)) -> (Code, String) {
    let case = Case::new(change).await;
    let request = case.bundle.create(config);
    case.refuse(request).await
}

#[tokio::test]
async fn configurations_that_are_wrong() {
    for (config, said) in [
        ("memroy = \"1Gi\"", "memroy"),
        ("memory = \"1Mi\"", "64 MiB or more"),
        ("memory = \"lots\"", "not a memory size"),
        ("vcpus = 99", "1 to 16"),
        ("kernel = \"relative\"", "absolute path"),
        ("= x", "bulkhead.toml"),
    ] {
        let (code, message) = refused(config, |_| {}).await;
        assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
        assert!(message.contains(said), "{message}");
    }
}

#[tokio::test]
async fn annotations_that_are_wrong() {
    for (key, value) in [("io.bulkhead.memory", "12 parsecs"), ("io.bulkhead.vcpus", "-1")] {
        let (code, message) = refused(&format!("annotations = true\n{FILES}"), |spec| {
            spec["annotations"] = json!({key: value})
        })
        .await;
        assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
        assert!(message.contains(key), "{message}");
    }
}

#[tokio::test]
async fn files_that_are_missing() {
    for (key, value, said) in [
        ("kvm", "/nonexistent/kvm", "virtualization"),
        ("kernel", "/nonexistent/vmlinux", "guest kernel /nonexistent/vmlinux"),
        ("kernel", "/dev/null", "not a regular file"),
        ("image", "/nonexistent/guest.erofs", "guest image /nonexistent/guest.erofs"),
        ("image", "/", "not a regular file"),
        ("fs_server", "/nonexistent/bulkhead-fs", "the program /nonexistent/bulkhead-fs"),
    ] {
        let config: String = FILES
            .lines()
            .map(|line| match line.split_once(" = ") {
                Some((name, _)) if name == key => format!("{key} = {value:?}\n"),
                // Or it would be missed first.
                Some(("vmm", _)) if key == "fs_server" => "vmm = \"/bin/true\"\n".to_owned(),
                _ => format!("{line}\n"),
            })
            .collect();
        let (code, message) = refused(&config, |_| {}).await;
        assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
        assert!(message.contains(said), "{key}: {message}");
    }
}

#[tokio::test]
async fn a_configuration_file_that_is_missing() {
    let case = Case::new(|_| {}).await;
    let mut request = case.bundle.create("");
    request.options =
        protobuf::MessageField::some(crate::common::options(Path::new("/nonexistent/config.toml")));
    let (code, message) = case.refuse(request).await;
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("/nonexistent/config.toml"), "{message}");
}

#[tokio::test]
async fn bundles_without_a_root_file_system() {
    for (path, said) in
        [("nothing", "does not exist"), ("config.json", "not a directory"), ("empty", "is empty")]
    {
        let case = Case::new(|spec| spec["root"]["path"] = json!(path)).await;
        fs::create_dir(case.bundle.path.join("empty")).unwrap();
        let request = case.bundle.create(FILES);
        let (code, message) = case.refuse(request).await;
        assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
        assert!(message.contains("no root file system") && message.contains(said), "{message}");
    }
}

#[tokio::test]
async fn root_file_systems_that_cannot_be_mounted() {
    for (kind, options, said) in [
        ("overlay", vec!["lowerdir=/nonexistent/a:/nonexistent/b"], "does not exist"),
        ("nosuchfs", vec![], "lacks this file system"),
        ("ext4", vec!["loop"], "\"loop\""),
    ] {
        let case = Case::new(|_| {}).await;
        let mut request = case.bundle.create(FILES);
        request.rootfs.push(Mount {
            type_: kind.into(),
            source: "source".into(),
            options: options.into_iter().map(str::to_owned).collect(),
            ..Default::default()
        });
        let (code, message) = case.refuse(request).await;
        assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
        assert!(message.contains(said), "{message}");
    }
}

#[tokio::test]
async fn specifications_that_need_the_host() {
    let cases: [(Change<Value>, &str); 5] = [
        (|spec| spec["linux"]["namespaces"] = json!([{"type": "mount"}]), "host network"),
        (
            |spec| {
                spec["linux"]["resources"] = json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4096}]})
            },
            "4096 bytes in huge pages",
        ),
        (
            |spec| {
                spec["linux"]["devices"] =
                    json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}])
            },
            "/dev/kvm",
        ),
        (
            |spec| {
                spec["mounts"] =
                    json!([{"destination": "/x", "type": "bind", "source": "/sys", "options": ["rbind"]}]);
            },
            "sysfs",
        ),
        (
            |spec| {
                spec["mounts"] = json!([{"destination": "/x", "type": "bind", "source": "/nonexistent/volume", "options": ["bind"]}]);
            },
            "/nonexistent/volume",
        ),
    ];
    for (change, said) in cases {
        let (_, message) = refused(FILES, change).await;
        assert!(message.contains(said), "{message}");
    }
}

#[tokio::test]
async fn requests_that_are_wrong() {
    let changes: [(Change<CreateTaskRequest>, &str); 5] = [
        (|request| request.id = "../c1".into(), "can't be used as an id"),
        (|request| request.checkpoint = "/checkpoint".into(), "checkpoint"),
        (|request| request.bundle = "relative".into(), "not an absolute path"),
        (|request| request.stdout = "binary:///usr/bin/logger".into(), "binary:///usr/bin/logger"),
        (|request| request.stdin = "/nonexistent/fifo".into(), "/nonexistent/fifo"),
    ];
    for (change, said) in changes {
        let case = Case::new(|_| {}).await;
        let mut request = case.bundle.create(FILES);
        change(&mut request);
        let (code, message) = refusal(case.client.create(ctx(), &request).await);
        assert!(matches!(code, Code::INVALID_ARGUMENT | Code::FAILED_PRECONDITION), "{code:?}: {message}");
        assert!(message.contains(said), "{message}");
        shut_down(&case.client, "c1", &case.address).await;
    }
}

#[tokio::test]
async fn a_member_without_its_pod() {
    let case = Case::new(|_| {}).await;
    let member = case.containerd.bundle("member", |spec| {
        spec["annotations"] =
            json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"});
    });
    let (code, message) = refusal(case.client.create(ctx(), &member.create(FILES)).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("\"pod\""), "{message}");
    shut_down(&case.client, "c1", &case.address).await;
}

#[tokio::test]
async fn calls_about_containers_that_are_not_there() {
    let case = Case::new(|_| {}).await;
    let client = &case.client;
    macro_rules! not_found {
        ($($method:ident $request:ident),* $(,)?) => {
            $(
                let request = $request { id: "ghost".into(), ..Default::default() };
                assert_eq!(refusal(client.$method(ctx(), &request).await).0, Code::NOT_FOUND, stringify!($method));
            )*
        };
    }
    not_found!(
        state StateRequest, start StartRequest, delete DeleteRequest, pids PidsRequest, pause PauseRequest,
        resume ResumeRequest, kill KillRequest, resize_pty ResizePtyRequest, close_io CloseIORequest,
        update UpdateTaskRequest, wait WaitRequest, stats StatsRequest,
    );
    let exec = ExecProcessRequest { id: "ghost".into(), exec_id: "e".into(), ..Default::default() };
    assert_eq!(refusal(client.exec(ctx(), &exec).await).0, Code::NOT_FOUND);
    let checkpoint = CheckpointTaskRequest { id: "ghost".into(), ..Default::default() };
    let (code, message) = refusal(client.checkpoint(ctx(), &checkpoint).await);
    assert_eq!((code, message.as_str()), (Code::UNIMPLEMENTED, "checkpoints are not supported"));
    shut_down(client, "c1", &case.address).await;
}

#[tokio::test]
async fn sigterm_ends_the_shim() {
    let case = Case::new(|_| {}).await;
    let request = containerd_shim_protos::api::ConnectRequest { id: "c1".into(), ..Default::default() };
    let pid = case.client.connect(ctx(), &request).await.unwrap().shim_pid;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGTERM)
        .unwrap();
    crate::common::await_gone(pid).await;
    assert!(!Path::new(case.address.strip_prefix("unix://").unwrap()).exists());
}
