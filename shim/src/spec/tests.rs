use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;

use serde_json::{Value, json};

use bulkhead_agent_protocol::POD_PID_NAMESPACE;

use super::*;
use crate::host::mounts::Propagation;
use crate::spec::sandbox::Role;

/// What `ctr run` makes, cut to what matters.
fn minimal() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/",
            "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"]},
            "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "x"
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "h",
        "annotations": {"io.kubernetes.cri.container-type": "sandbox"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}
        ],
        "linux": {
            "cgroupsPath": "/default/c1",
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}], "cpu": {"shares": 512, "cpus": "0-3"},
                "blockIO": {"weight": 10}}
        }
    })
}

fn with(path: &str, value: Value) -> Value {
    let mut spec = minimal();
    *spec.pointer_mut(path).unwrap_or_else(|| panic!("no {path}")) = value;
    spec
}

fn added(object: &str, key: &str, value: Value) -> Value {
    let mut spec = minimal();
    spec.pointer_mut(object).unwrap().as_object_mut().unwrap().insert(key.into(), value);
    spec
}

fn translated_in(spec: Value, pod: &PodNamespaces) -> Result<(Value, GuestSpec), SpecError> {
    let spec = serde_json::from_value(spec).unwrap();
    let guest = translate(spec, "c1", pod)?;
    Ok((serde_json::from_slice(&guest.to_json(&[], None, false).unwrap()).unwrap(), guest))
}

fn translated(spec: Value) -> Result<(Value, GuestSpec), SpecError> {
    translated_in(spec, &PodNamespaces::default())
}

fn refused(spec: Value) -> String {
    let error = translated(spec).unwrap_err();
    crate::error::chain(&error)
}

fn with_mount(mount: Value) -> Value {
    with("/mounts", json!([mount]))
}

#[test]
fn nothing_of_the_host_is_left() {
    let (guest, _) = translated(minimal()).unwrap();
    assert_eq!(guest["root"], json!({"path": "/run/bulkhead/roots/c1/rootfs", "readonly": true}));
    assert_eq!(guest["linux"]["cgroupsPath"], "/c1");
    assert_eq!(guest["hostname"], "h");
    assert_eq!(guest["linux"]["resources"]["cpu"], json!({"shares": 512}));
    for gone in [
        "/annotations",
        "/process/apparmorProfile",
        "/process/selinuxLabel",
        "/linux/resources/blockIO",
        "/linux/mountLabel",
    ] {
        assert_eq!(guest.pointer(gone), None, "{gone}");
    }
    assert_eq!(guest["mounts"].as_array().unwrap().len(), 2);
}

#[test]
fn the_default_filter_is_for_whoever_lacks_sys_admin_and_only_if_configured() {
    let filtered = |spec: Value| -> Value {
        let guest = translated(spec).unwrap().1;
        serde_json::from_slice(&guest.to_json(&[], None, true).unwrap()).unwrap()
    };
    assert_eq!(translated(minimal()).unwrap().0["linux"].get("seccomp"), None);
    assert_eq!(filtered(minimal())["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
    let privileged = with("/process/capabilities/bounding", json!(["CAP_SYS_ADMIN"]));
    assert_eq!(filtered(privileged)["linux"].get("seccomp"), None);
    let allows = |capabilities: Value, call: &str| {
        let guest = filtered(with("/process/capabilities/bounding", capabilities));
        guest["linux"]["seccomp"]["syscalls"].as_array().unwrap().iter().any(|rule| {
            rule["action"] == "SCMP_ACT_ALLOW" && rule["names"].as_array().unwrap().contains(&json!(call))
        })
    };
    assert!(!allows(json!(["CAP_CHOWN"]), "init_module"));
    assert!(allows(json!(["CAP_SYS_MODULE"]), "init_module"));
    assert!(!allows(json!(["CAP_SYS_MODULE"]), "reboot"));
    let own = added("/linux", "seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW"}));
    assert_eq!(filtered(own)["linux"]["seccomp"], json!({"defaultAction": "SCMP_ACT_ALLOW"}));
}

#[test]
fn the_network_is_the_pods_and_the_hosts_is_refused() {
    let (guest, parsed) = translated(minimal()).unwrap();
    let kinds: Vec<_> = guest["linux"]["namespaces"].as_array().unwrap().iter().map(|n| &n["type"]).collect();
    assert_eq!(kinds, ["pid", "ipc", "uts", "mount"]);
    assert!(parsed.own_pid_namespace);
    let host = with("/linux/namespaces", json!([{"type": "pid"}, {"type": "mount"}]));
    assert!(refused(host).contains("host network is not possible"));
}

#[test]
fn containers_of_a_pod_share_its_namespaces() {
    let member = with(
        "/linux/namespaces",
        json!([
            {"type": "network", "path": "/proc/77/ns/net"}, {"type": "ipc", "path": "/proc/77/ns/ipc"},
            {"type": "uts", "path": "/proc/77/ns/uts"}, {"type": "pid", "path": "/proc/77/ns/pid"}, {"type": "mount"}
        ]),
    );
    let members = vec![Member { host_pid: 77, guest_pid: 5 }, Member { host_pid: 78, guest_pid: 9 }];
    let pod = PodNamespaces { members, first_process: Some(5), is_pod: true };
    let (guest, parsed) = translated_in(member.clone(), &pod).unwrap();
    assert_eq!(
        guest["linux"]["namespaces"],
        json!([{"type": "pid", "path": "/proc/5/ns/pid"}, {"type": "mount"}])
    );
    assert_eq!(guest.get("hostname"), None);
    assert!(!parsed.own_pid_namespace);

    let mut debugger = member.clone();
    debugger["linux"]["namespaces"][3]["path"] = json!("/proc/78/ns/pid");
    let (guest, _) = translated_in(debugger, &pod).unwrap();
    assert_eq!(guest["linux"]["namespaces"][0]["path"], "/proc/9/ns/pid");

    let other = PodNamespaces { members: Vec::new(), ..pod };
    let error = translated_in(member, &other).unwrap_err();
    assert!(matches!(error, SpecError::NoSuchContainer { .. }), "{error}");
    let user = |pid: u32| {
        let mut spec =
            with("/linux/namespaces/0", json!({"type": "user", "path": format!("/proc/{pid}/ns/user")}));
        spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
        spec
    };
    assert!(refused(user(1)).contains("namespace /proc/1/ns/user"));
    let pod =
        PodNamespaces { members: vec![Member { host_pid: 77, guest_pid: 5 }], ..PodNamespaces::default() };
    let (guest, _) = translated_in(user(77), &pod).unwrap();
    assert_eq!(guest["linux"]["namespaces"][0], json!({"type": "user", "path": "/proc/5/ns/user"}));
    assert_eq!(guest["linux"].get("uidMappings"), None);
    // containerd makes one for a pod, and a network namespace that belongs to it.
    let mut pinned = user(77);
    pinned["linux"]["namespaces"][0]["path"] = "/run/containerd/pinned-namespaces/user".into();
    assert!(refused(pinned.clone()).contains("pinned-namespaces"), "without a mapping of groups");
    pinned["linux"]["gidMappings"] = pinned["linux"]["uidMappings"].clone();
    let (guest, _) = translated(pinned).unwrap();
    assert_eq!(guest["linux"]["namespaces"][0], json!({"type": "user"}));
    assert_eq!(guest["linux"]["uidMappings"][0]["hostID"], 1000);
}

#[test]
fn the_hosts_processes_are_those_of_the_pod() {
    let host = with("/linux/namespaces", json!([{"type": "mount"}, {"type": "network"}]));
    let (first, parsed) = translated(host.clone()).unwrap();
    assert_eq!(first["linux"]["namespaces"], json!([{"type": "mount"}, {"type": "pid"}]));
    assert!(parsed.own_pid_namespace);
    let pod = PodNamespaces { first_process: Some(5), is_pod: true, ..PodNamespaces::default() };
    let (next, parsed) = translated_in(host, &pod).unwrap();
    assert_eq!(next["linux"]["namespaces"][1], json!({"type": "pid", "path": "/proc/5/ns/pid"}));
    assert!(!parsed.own_pid_namespace);
    let sandbox = PodNamespaces { first_process: Some(1), is_pod: true, ..PodNamespaces::default() };
    let (next, parsed) =
        translated_in(with("/linux/namespaces", json!([{"type": "mount"}, {"type": "network"}])), &sandbox)
            .unwrap();
    assert_eq!(next["linux"]["namespaces"][1], json!({"type": "pid", "path": POD_PID_NAMESPACE}));
    assert!(!parsed.own_pid_namespace);
}

#[test]
fn a_profile_that_somebody_chose_is_missed() {
    for default in ["", "unconfined", "cri-containerd.apparmor.d", "docker-default"] {
        assert!(translated(with("/process/apparmorProfile", json!(default))).is_ok(), "{default}");
    }
    assert!(refused(with("/process/apparmorProfile", json!("my-profile"))).contains("\"my-profile\""));
}

#[test]
fn hooks_of_the_host_stay_there_and_others_go_into_the_guest() {
    let hook = json!([{"path": "/bin/hook"}]);
    let hooks = json!({"prestart": hook, "poststop": hook, "startContainer": hook});
    let (spec, _) = translated(added("", "hooks", hooks)).unwrap();
    assert_eq!(spec["hooks"], json!({"startContainer": hook}));
    let (spec, _) = translated(added("", "hooks", json!({"prestart": hook, "createContainer": []}))).unwrap();
    assert_eq!(spec.get("hooks"), None);
}

#[test]
fn bind_mounts_move_into_the_shared_tree() {
    let spec = with(
        "/mounts",
        json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/etc/hosts", "type": "bind", "source": "/etc/passwd", "options": ["rbind", "ro"]},
            {"destination": "/data", "source": "/tmp", "options": ["bind", "rslave", "rro"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/nonexistent/shm", "options": ["rbind"]}
        ]),
    );
    let (guest, parsed) = translated(spec).unwrap();
    let sources: Vec<_> =
        guest["mounts"].as_array().unwrap().iter().map(|mount| mount["source"].as_str().unwrap()).collect();
    let view = |path: &str| {
        let device = fs::metadata(path).unwrap().dev();
        bulkhead_vmm_protocol::view_name(libc::major(device), libc::minor(device))
    };
    assert_eq!(
        sources,
        [
            "proc",
            &format!("/run/bulkhead/shared/{}/c1/mounts/0", view("/etc/passwd")),
            &format!("/run/bulkhead/shared/{}/c1/mounts/1", view("/tmp")),
            "/dev/shm"
        ]
    );
    assert_eq!(guest["mounts"][1]["options"], json!(["rbind", "ro"]), "nothing can be mounted below a file");
    assert_eq!(
        parsed.mounts,
        [
            HostMount {
                source: "/etc/passwd".into(),
                recursive: true,
                read_only: Some(false),
                propagation: Propagation::Private,
                id_map: None,
                maps_below: false,
            },
            HostMount {
                source: "/tmp".into(),
                recursive: false,
                read_only: Some(true),
                propagation: Propagation::Slave,
                id_map: None,
                maps_below: false,
            },
        ]
    );
}

#[test]
fn a_read_only_volume_leaves_what_is_mounted_below_it_alone() {
    let options = |source: &str, options: &[&str]| {
        let mount = json!({"destination": "/x", "type": "bind", "source": source, "options": options});
        translated(with_mount(mount)).unwrap().0["mounts"][0]["options"].clone()
    };
    let directory = tempfile::tempdir().unwrap();
    let empty = directory.path().to_str().unwrap();
    assert_eq!(options(empty, &["rbind", "ro"]), json!(["rbind", "ro"]));
    // The host may mount something there later.
    assert_eq!(options(empty, &["rbind", "ro", "rslave"]), json!(["rbind", "rslave"]));
    assert_eq!(options("/", &["bind", "ro"]), json!(["bind", "ro"]));
    assert_eq!(options("/", &["rbind", "rro"]), json!(["rbind", "rro"]));
}

#[test]
fn devices_as_sources_are_the_guests_own() {
    let bind =
        with_mount(json!({"destination": "/x", "type": "bind", "source": "/dev/null", "options": ["rbind"]}));
    let (guest, parsed) = translated(bind).unwrap();
    assert_eq!(guest["mounts"][0]["source"], "/dev/null");
    assert!(parsed.mounts.is_empty());
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let bind = |source: &str| {
        with_mount(json!({"destination": "/x", "type": "bind", "source": source, "options": ["rbind"]}))
    };
    assert!(refused(bind("relative")).contains("no absolute source"));
    let shared = with_mount(
        json!({"destination": "/x", "type": "bind", "source": "/tmp", "options": ["rbind", "rshared"]}),
    );
    assert!(refused(shared).contains("rshared (Bidirectional)"));
    let overlay = with_mount(json!({"destination": "/x", "type": "overlay", "source": "overlay"}));
    assert!(refused(overlay).contains("\"overlay\""));
}

#[test]
fn devices_of_the_host_are_refused_or_left_out() {
    let kvm = json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]);
    assert!(refused(added("/linux", "devices", kvm.clone())).contains("/dev/kvm"));
    // Right name, wrong number.
    let fake = json!([{"path": "/dev/null", "type": "c", "major": 4, "minor": 64}]);
    assert!(refused(added("/linux", "devices", fake)).contains("/dev/null"));
    let fuse = json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]);
    assert_eq!(translated(added("/linux", "devices", fuse)).unwrap().0["linux"]["devices"][0]["minor"], 229);

    let mut privileged = added("/linux", "devices", kvm);
    privileged["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    assert_eq!(translated(privileged).unwrap().0["linux"]["devices"], json!([]));

    let default = json!([{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}]);
    assert_eq!(
        translated(added("/linux", "devices", default)).unwrap().0["linux"]["devices"][0]["path"],
        "/dev/null"
    );
}

#[test]
fn block_devices_become_disks_of_the_guest() {
    let number = |major, minor| DeviceNumber { major, minor };
    let mut spec = added(
        "/linux",
        "devices",
        json!([
            {"path": "/dev/data", "type": "b", "major": 8, "minor": 16, "fileMode": 0o600},
            {"path": "/dev/again", "type": "b", "major": 8, "minor": 16},
            {"path": "/dev/archive", "type": "b", "major": 7, "minor": 1},
        ]),
    );
    spec["linux"]["resources"]["devices"] = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
        {"allow": true, "type": "b", "major": 8, "minor": 16, "access": "rwm"},
        {"allow": true, "type": "b", "major": 7, "access": "r"},
    ]);
    let guest = translated(spec.clone()).unwrap().1;
    assert_eq!(
        guest.disks,
        [
            HostDisk { number: number(8, 16), read_only: false },
            HostDisk { number: number(7, 1), read_only: true }
        ]
    );

    let places = [
        DiskPlace { host: number(8, 16), guest: number(254, 16) },
        DiskPlace { host: number(7, 1), guest: number(254, 32) },
    ];
    let root = Some("/run/bulkhead/disks/2".into());
    let placed: Value = serde_json::from_slice(&guest.to_json(&places, root, false).unwrap()).unwrap();
    assert_eq!(placed["root"], json!({"path": "/run/bulkhead/disks/2", "readonly": true}));
    let nodes: Vec<_> =
        placed["linux"]["devices"].as_array().unwrap().iter().map(|node| &node["minor"]).collect();
    assert_eq!(nodes, [16, 16, 32]);
    let rules = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
        {"allow": true, "type": "b", "major": 254, "minor": 16, "access": "rwm"},
        {"allow": true, "type": "b", "major": 254, "minor": 32, "access": "r"},
    ]);
    assert_eq!(placed["linux"]["resources"]["devices"], rules);
    let update = serde_json::to_vec(&spec["linux"]["resources"]).unwrap();
    let update: Value = serde_json::from_slice(&resources_for_guest(&update, &places).unwrap()).unwrap();
    assert_eq!(update["devices"], rules);
}

#[test]
fn sizes_are_limited() {
    let many: Vec<_> = (0..=MAX_MOUNTS).map(|_| json!({"destination": "/p", "type": "proc"})).collect();
    assert!(refused(with("/mounts", Value::Array(many))).contains("513 mounts"));
    let large = vec![b' '; MAX_SPEC + 1];
    assert!(matches!(read_process(&large), Err(SpecError::TooLarge { .. })));
    assert!(matches!(read_resources(b"{"), Err(SpecError::Parse { .. })));
}

#[test]
fn processes_and_resources_lose_what_is_the_hosts() {
    let process = json!({"user": {"uid": 1, "gid": 1}, "cwd": "/", "args": ["true"], "apparmorProfile": "docker-default",
        "consoleSize": {"height": 24, "width": 80}});
    let read = read_process(&serde_json::to_vec(&process).unwrap()).unwrap();
    let guest: Value = serde_json::from_slice(&read.json).unwrap();
    assert_eq!(guest.get("apparmorProfile"), None);
    assert_eq!(read.console_size, Some(ConsoleSize { columns: 80, rows: 24 }));
    let resources = br#"{"memory": {"limit": 5}, "cpu": {"cpus": "0"}, "network": {},
                         "hugepageLimits": [{"pageSize": "2MB", "limit": 0}]}"#;
    let resources: Value = serde_json::from_slice(&resources_for_guest(resources, &[]).unwrap()).unwrap();
    assert_eq!(resources, json!({"memory": {"limit": 5}, "cpu": {}}));
}

#[test]
fn huge_pages_are_refused_with_their_number() {
    let limits = json!([{"pageSize": "1GB", "limit": 0}, {"pageSize": "2MB", "limit": 4_194_304}]);
    let message = refused(with("/linux/resources", json!({"hugepageLimits": limits})));
    assert!(message.contains("2MB") && message.contains("4194304"), "{message}");
}

fn resources_for_guest(json: &[u8], places: &[DiskPlace]) -> Result<Vec<u8>, SpecError> {
    translate_resources(read_resources(json)?, places)
}

#[test]
fn roles_follow_the_annotations() {
    let role = |pairs: &[(&str, &str)]| {
        let mut spec: Spec = serde_json::from_value(minimal()).unwrap();
        let annotations: HashMap<_, _> = pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        spec.set_annotations(Some(annotations));
        Role::of(&spec)
    };
    const TYPE: &str = "io.kubernetes.cri.container-type";
    const ID: &str = "io.kubernetes.cri.sandbox-id";
    assert_eq!(role(&[]).unwrap(), Role::Single);
    assert_eq!(role(&[(TYPE, "sandbox"), (ID, "p")]).unwrap(), Role::Sandbox);
    assert_eq!(role(&[(TYPE, "container"), (ID, "p")]).unwrap(), Role::Member("p".into()));
    for wrong in [&[(TYPE, "container")][..], &[(TYPE, "container"), (ID, "../p")], &[(TYPE, "other")]] {
        assert!(role(wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn owners_of_volumes_are_mapped_on_the_host() {
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let mount = json!({"destination": "/x", "type": "bind", "source": "/tmp", "options": ["rbind", "ridmap"],
        "uidMappings": map, "gidMappings": map});
    let (guest, parsed) = translated(with_mount(mount)).unwrap();
    assert!(parsed.mounts[0].id_map.is_some() && parsed.mounts[0].maps_below);
    let left = &guest["mounts"][0];
    assert_eq!(left["options"], json!(["rbind"]));
    assert!(left.get("uidMappings").is_none() && left.get("gidMappings").is_none(), "{left}");
}
