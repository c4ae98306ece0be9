//! Limits and figures of control groups. Most of it needs a machine with cgroup v2 controllers.

#![allow(clippy::unwrap_used, reason = "helpers of tests, which fail by panicking")]

mod common;

use bulkhead_agent_protocol::*;
use common::*;
use serde_json::{Value, json};
use ttrpc::Code;

fn update(id: &str, resources: &Value) -> UpdateRequest {
    UpdateRequest {
        container_id: id.to_owned(),
        resources: serde_json::to_vec(resources).unwrap(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "current_thread")]
async fn limits_are_set_and_changed() {
    let Some(guest) = Guest::start("set").await else { return };
    if !["cpu", "memory", "pids"].into_iter().all(|controller| guest.has_controller(controller)) {
        return;
    }
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    let mut spec = guest.spec(&root, "exec sleep 1000");
    spec["linux"]["resources"] = json!({
        "memory": {"limit": 67_108_864, "swap": 67_108_864, "reservation": 33_554_432},
        "cpu": {"shares": 512, "quota": 20000, "period": 100_000},
        "pids": {"limit": 20},
        "unified": {"memory.high": "60000000"},
    });
    guest.start_container(&id, &spec).await;
    let file = |name: &str| guest.cgroup_file(&id, name);
    assert_eq!((file("memory.max").as_str(), file("memory.low").as_str()), ("67108864", "33554432"));
    assert_eq!((file("cpu.max").as_str(), file("pids.max").as_str()), ("20000 100000", "20"));
    let weight: u32 = file("cpu.weight").parse().unwrap();
    assert!((40..70).contains(&weight), "{weight}");

    let stats = guest.client.stats(limit(), &container(&id)).await.unwrap();
    assert_eq!((stats.memory.limit, stats.pids.limit, stats.pids.current), (67_108_864, 20, 1));
    assert!(
        stats.memory.usage > 0 && stats.cpu.usage_us > 0 && stats.memory.stat.contains_key("anon"),
        "{stats:?}"
    );

    let resources = json!({"memory": {"limit": 50_331_648}, "pids": {"limit": 5}, "cpu": {"quota": -1}});
    guest.client.update(limit(), &update(&id, &resources)).await.unwrap();
    assert_eq!((file("memory.max").as_str(), file("pids.max").as_str()), ("50331648", "5"));
    assert_eq!(file("cpu.max"), "max 100000");

    let (code, message) = failure(
        guest.client.update(limit(), &update(&id, &json!({"unified": {"memory.max": "lots"}}))).await,
    );
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    let low = json!({"memory": {"limit": 4096, "checkBeforeUpdate": true}});
    let (code, message) = failure(guest.client.update(limit(), &update(&id, &low)).await);
    assert_eq!(
        (code, message.contains("below the present use")),
        (Code::INVALID_ARGUMENT, true),
        "{message}"
    );

    // The limit on processes holds, for further ones too.
    let output = guest.exec(&id, "e", &exec_process("for i in 1 2 3 4 5 6; do sleep 3 & done")).await;
    assert!(output.stderr.contains("fork"), "{output:?}");
    guest.remove(&id).await;
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn running_out_of_memory_is_reported() {
    let Some(guest) = Guest::start("oom").await else { return };
    if !guest.has_controller("memory") {
        return;
    }
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    // A variable that doubles until the limit is reached.
    let mut spec = guest.spec(&root, "x=0123456789abcdef; while :; do x=$x$x; done");
    spec["linux"]["resources"] = json!({"memory": {"limit": 16_777_216, "swap": 16_777_216}});
    let events = guest.client.clone();
    let event = tokio::spawn(async move { events.next_event(limit(), &Empty::new()).await.unwrap() });
    guest.start_container(&id, &spec).await;
    let ended = guest.wait(&id, "").await;
    assert_eq!((ended.exit_status, ended.oom_killed), (137, true));
    assert_eq!(event.await.unwrap().oom(), id);
    let stats = guest.client.stats(limit(), &container(&id)).await.unwrap();
    assert_eq!(stats.memory.events_oom_kill, 1, "{stats:?}");
    guest.delete(&id, "").await.unwrap();
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_limit_that_can_not_be_kept_is_refused() {
    let Some(guest) = Guest::start("missing").await else { return };
    let controllers = std::fs::read_to_string(guest.cgroups.join("cgroup.controllers")).unwrap();
    if controllers.contains("memory") {
        skip("every controller is there");
        return;
    }
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    let mut spec = guest.spec(&root, "true");
    spec["linux"]["resources"]["memory"] = json!({"limit": 1_000_000});
    let (code, message) = failure(guest.create(&id, &spec, &Stdio::default()).await);
    assert_eq!(
        (code, message.contains("no cgroup controller \"memory\"")),
        (Code::INVALID_ARGUMENT, true),
        "{message}"
    );
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_manages_groups_of_its_own() {
    let Some(guest) = Guest::start("nested").await else { return };
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    let mut spec = guest.spec(
        &root,
        "mkdir -p /sys/fs/cgroup/own/deep && echo 0 > /sys/fs/cgroup/own/deep/cgroup.procs && cat /proc/self/cgroup; exec sleep 1000",
    );
    let mounts = spec["mounts"].as_array_mut().unwrap();
    for mount in mounts.iter_mut().filter(|mount| mount["type"] == "cgroup" || mount["type"] == "sysfs") {
        mount["options"] = json!(["nosuid", "noexec", "nodev", "rw"]);
    }
    let mut streams = guest.streams();
    guest.create(&id, &spec, &streams.request).await.unwrap();
    guest.start_process(&id, "").await.unwrap();
    // The process in the group below is one of the container's.
    while guest.client.pids(limit(), &container(&id)).await.unwrap().pids.is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let deep = guest.cgroups.join(format!("container-{id}/own/deep"));
    while !deep.exists() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    guest.signal(&id, "", libc::SIGKILL, true).await.unwrap();
    let status = guest.wait(&id, "").await.exit_status;
    assert_eq!(status, 137);
    streams.finish(status).await;
    guest.delete(&id, "").await.unwrap();
    assert!(!deep.exists());
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_can_not_lift_its_own_limits() {
    let Some(guest) = Guest::start("lift").await else { return };
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    if !mounts.lines().any(|line| line.contains(" cgroup2 ") && line.contains("nsdelegate")) {
        return skip("cgroup v2 is mounted without nsdelegate here");
    }
    let root = guest.rootfs("root");
    let script = "cd /sys/fs/cgroup; for f in pids.max cgroup.max.depth; do echo max > $f; cat $f; done";
    let mut spec = guest.spec(&root, script);
    spec["linux"]["resources"]["pids"] = json!({"limit": 30});
    for mount in spec["mounts"].as_array_mut().unwrap() {
        if mount["type"] == "cgroup" || mount["type"] == "sysfs" {
            mount["options"] = json!(["rw"]);
        }
    }
    let output = guest.run(&guest.id("a"), &spec).await;
    assert_eq!(output.stdout, "30\n64\n", "{output:?}");
    assert_eq!(output.stderr.matches("not permitted").count(), 2, "{output:?}");
    guest.finish().await;
}
