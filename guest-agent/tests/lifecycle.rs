//! The life of containers and processes through the agent's API.

mod common;

use std::time::Duration;

use bulkhead_agent_protocol::*;
use common::*;
use serde_json::json;
use ttrpc::Code;

#[tokio::test(flavor = "current_thread")]
async fn a_container_runs_and_reports_its_end() {
    let Some(guest) = Guest::start("runs").await else { return };
    let root = guest.rootfs("root");
    let spec = guest.spec(&root, "echo out; echo err >&2; cat; exit 7");
    let output = guest.run_with_input(&guest.id("a"), &spec, b"from stdin").await;
    assert_eq!(
        (output.status, output.stdout.as_str(), output.stderr.as_str()),
        (7, "out\nfrom stdin", "err\n")
    );
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn large_output_arrives_whole_although_the_process_has_ended() {
    let Some(guest) = Guest::start("large").await else { return };
    let root = guest.rootfs("root");
    let output = guest.run(&guest.id("a"), &guest.spec(&root, "seq 1 400000")).await;
    let expected: String = (1..=400_000).map(|n| format!("{n}\n")).collect();
    assert!(output.stdout == expected, "{} of {} bytes", output.stdout.len(), expected.len());
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn the_program_runs_only_when_it_is_started() {
    let Some(guest) = Guest::start("gate").await else { return };
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    let spec = guest.spec(&root, "touch /started; sleep 1000");
    let pid = guest.create(&id, &spec, &Stdio::default()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!root.join("started").exists());
    assert_eq!(guest.client.pids(limit(), &container(&id)).await.unwrap().pids, [pid]);
    guest.start_process(&id, "").await.unwrap();
    let (code, message) = failure(guest.start_process(&id, "").await);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
    let (code, message) = failure(guest.delete(&id, "").await);
    assert_eq!((code, message.contains("running")), (Code::FAILED_PRECONDITION, true), "{message}");
    while !root.join("started").exists() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    guest.remove(&id).await;
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_that_was_never_started_can_be_deleted() {
    let Some(guest) = Guest::start("never").await else { return };
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    guest.create(&id, &guest.spec(&root, "true"), &Stdio::default()).await.unwrap();
    guest.delete(&id, "").await.unwrap();
    assert_eq!(failure(guest.delete(&id, "").await).0, Code::NOT_FOUND);
    // The id is free again.
    let output = guest.run(&id, &guest.spec(&root, "echo again")).await;
    assert_eq!(output.stdout, "again\n");
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn signals_reach_processes() {
    let Some(guest) = Guest::start("signals").await else { return };
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    let spec = guest.spec(&root, "trap 'exit 5' TERM; touch /ready; while :; do sleep 0.01; done");
    guest.start_container(&id, &spec).await;
    while !root.join("ready").exists() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(failure(guest.signal(&id, "", 65, false).await).0, Code::INVALID_ARGUMENT);
    assert_eq!(failure(guest.signal(&id, "x", 15, true).await).0, Code::INVALID_ARGUMENT);
    guest.signal(&id, "", libc::SIGTERM, false).await.unwrap();
    assert_eq!(guest.wait(&id, "").await.exit_status, 5);
    let (code, message) = failure(guest.signal(&id, "", libc::SIGTERM, false).await);
    assert_eq!((code, message.contains("ended")), (Code::NOT_FOUND, true), "{message}");
    guest.delete(&id, "").await.unwrap();

    guest.start_container(&id, &guest.spec(&root, "sleep 1000 & sleep 1000 & wait")).await;
    guest.signal(&id, "", libc::SIGKILL, true).await.unwrap();
    let ended = guest.wait(&id, "").await;
    assert_eq!((ended.exit_status, ended.oom_killed), (137, false));
    assert!(ended.exited_at_ns > 1_600_000_000_000_000_000);
    guest.delete(&id, "").await.unwrap();
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn further_processes_join_the_container() {
    let Some(guest) = Guest::start("exec").await else { return };
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    let mut spec = guest.spec(&root, "touch /ready; exec sleep 1000");
    spec["hostname"] = json!("inside");
    guest.start_container(&id, &spec).await;

    let links =
        "for n in pid mnt uts ipc net cgroup; do readlink /proc/1/ns/$n; readlink /proc/self/ns/$n; done";
    let script = format!("hostname; {links}; cat; echo err >&2; ps -o pid,comm | grep sleep; exit 3");
    let output = guest.exec(&id, "e1", &exec_process(&script)).await;
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!((output.status, lines[0]), (3, "inside"));
    for pair in lines[1..13].chunks(2) {
        assert_eq!(pair[0], pair[1]);
    }
    assert!(lines[13].trim().starts_with("1 "), "{lines:?}");
    assert_eq!(output.stderr, "err\n");

    // With a user, groups and capabilities of its own.
    let mut process = exec_process("id -u; id -G; grep CapEff /proc/self/status; pwd; echo $HOME");
    process["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [7]});
    process["cwd"] = json!("/tmp");
    let output = guest.exec(&id, "e2", &process).await;
    assert_eq!(output.stdout, "1000\n1000 7\nCapEff:\t0000000000000000\n/tmp\n/home/user\n");

    let (code, message) = failure(
        guest.create_exec(&id, "e3", &json!({"args": ["nope"], "cwd": "/"}), &Stdio::default()).await,
    );
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.ends_with("exec: \"nope\": executable file not found in $PATH"), "{message}");

    // One that was never started goes with a delete; one that runs does not.
    guest.create_exec(&id, "e4", &exec_process("true"), &Stdio::default()).await.unwrap();
    let taken = guest.create_exec(&id, "e4", &exec_process("true"), &Stdio::default()).await;
    assert_eq!(failure(taken).0, Code::ALREADY_EXISTS);
    guest.delete(&id, "e4").await.unwrap();
    guest.create_exec(&id, "e5", &exec_process("exec sleep 1000"), &Stdio::default()).await.unwrap();
    guest.start_process(&id, "e5").await.unwrap();
    assert_eq!(failure(guest.delete(&id, "e5").await).0, Code::FAILED_PRECONDITION);
    guest.signal(&id, "e5", libc::SIGKILL, false).await.unwrap();
    assert_eq!(guest.wait(&id, "e5").await.exit_status, 137);

    // The end of the container ends them too.
    guest.create_exec(&id, "e6", &exec_process("exec sleep 1000"), &Stdio::default()).await.unwrap();
    guest.start_process(&id, "e6").await.unwrap();
    guest.signal(&id, "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(guest.wait(&id, "e6").await.exit_status, 137);
    assert_eq!(guest.wait(&id, "").await.exit_status, 137);
    let late = guest.create_exec(&id, "e7", &exec_process("true"), &Stdio::default()).await;
    let (code, message) = failure(late);
    assert_eq!((code, message.contains("stopped")), (Code::FAILED_PRECONDITION, true), "{message}");
    guest.delete(&id, "").await.unwrap();
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_terminal_is_the_containers_own() {
    let Some(guest) = Guest::start("tty").await else { return };
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    let script = "tty; ls -l /dev/console | head -c 1; echo; stty size; touch /asked; read line; echo got $line; stty size; exit 4";
    let mut spec = guest.spec(&root, script);
    spec["process"]["terminal"] = json!(true);
    let mut streams = guest.terminal_streams();
    (streams.request.columns, streams.request.rows) = (91, 32);
    guest.create(&id, &spec, &streams.request).await.unwrap();
    guest.start_process(&id, "").await.unwrap();
    while !root.join("asked").exists() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let resize = ResizePtyRequest { container_id: id.clone(), columns: 50, rows: 20, ..Default::default() };
    guest.client.resize_pty(limit(), &resize).await.unwrap();
    std::io::Write::write_all(streams.stdin.as_mut().unwrap(), b"hello\n").unwrap();
    let status = guest.wait(&id, "").await.exit_status;
    let output = streams.finish(status).await;
    let lines: Vec<&str> = output.stdout.lines().map(|line| line.trim_end()).collect();
    assert_eq!(lines, ["/dev/pts/0", "c", "32 91", "hello", "got hello", "20 50"], "{output:?}");
    assert_eq!(output.status, 4);
    guest.delete(&id, "").await.unwrap();

    // A further process may have one where the first has none.
    guest.start_container(&id, &guest.spec(&root, "exec sleep 1000")).await;
    let (code, _) = failure(guest.client.resize_pty(limit(), &resize).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    let mut streams = guest.terminal_streams();
    guest
        .create_exec(&id, "t", &exec_process("tty; kill -INT $$; sleep 1000"), &streams.request)
        .await
        .unwrap();
    guest.start_process(&id, "t").await.unwrap();
    let status = guest.wait(&id, "t").await.exit_status;
    assert_eq!(streams.finish(status).await.stdout.trim_end(), "/dev/pts/0");
    assert_eq!(status, 130);
    guest.remove(&id).await;
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_terminal_that_no_one_reads_does_not_stop_its_process() {
    let Some(guest) = Guest::start("unread").await else { return };
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    let mut spec = guest.spec(&root, "stty size > /size; seq 1 100000; touch /done");
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({"height": 12, "width": 34});
    guest.create(&id, &spec, &Stdio { terminal: true, ..Default::default() }).await.unwrap();
    guest.start_process(&id, "").await.unwrap();
    assert_eq!(guest.wait(&id, "").await.exit_status, 0);
    assert!(root.join("done").exists());
    assert_eq!(std::fs::read_to_string(root.join("size")).unwrap(), "12 34\n");
    guest.delete(&id, "").await.unwrap();
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn closing_stdin_ends_the_input() {
    let Some(guest) = Guest::start("close").await else { return };
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    let mut streams = guest.streams();
    guest.create(&id, &guest.spec(&root, "cat; echo end"), &streams.request).await.unwrap();
    guest.start_process(&id, "").await.unwrap();
    // The connection stays open: only the request says that the input is over.
    let mut stdin = streams.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, b"sent before\n").unwrap();
    guest.client.close_stdin(limit(), &process(&id, "")).await.unwrap();
    let status = guest.wait(&id, "").await.exit_status;
    assert_eq!(streams.finish(status).await.stdout, "sent before\nend\n");
    guest.delete(&id, "").await.unwrap();
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn output_can_be_opened_again_also_by_another_user() {
    let Some(guest) = Guest::start("reopen").await else { return };
    let root = guest.rootfs("root");
    let mut spec = guest.spec(&root, "echo a > /dev/stdout; echo b > /dev/stderr; echo c > /proc/self/fd/1");
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let output = guest.run(&guest.id("a"), &spec).await;
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("a\nc\n", "b\n"));
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_daemon_that_keeps_the_output_open_does_not_hold_it() {
    let Some(guest) = Guest::start("daemon").await else { return };
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    guest.start_container(&id, &guest.spec(&root, "exec sleep 1000")).await;
    let mut streams = guest.streams();
    guest.create_exec(&id, "d", &exec_process("echo started; sleep 1000 &"), &streams.request).await.unwrap();
    guest.start_process(&id, "d").await.unwrap();
    let status = guest.wait(&id, "d").await.exit_status;
    assert_eq!(streams.finish(status).await.stdout, "started\n");
    guest.delete(&id, "d").await.unwrap();
    guest.remove(&id).await;
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn pausing_stops_every_process() {
    let Some(guest) = Guest::start("pause").await else { return };
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    guest.start_container(&id, &guest.spec(&root, "while :; do echo x >> /log; sleep 0.01; done")).await;
    let size = || std::fs::metadata(root.join("log")).map_or(0, |metadata| metadata.len());
    while size() == 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    guest.client.pause(limit(), &container(&id)).await.unwrap();
    let before = size();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(size(), before);
    let exec = guest.create_exec(&id, "e", &exec_process("true"), &Stdio::default()).await;
    let (code, message) = failure(exec);
    assert_eq!((code, message.contains("paused")), (Code::FAILED_PRECONDITION, true), "{message}");
    guest.client.resume(limit(), &container(&id)).await.unwrap();
    while size() == before {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    // A frozen container can be killed.
    guest.client.pause(limit(), &container(&id)).await.unwrap();
    guest.remove(&id).await;
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn what_does_not_exist_is_not_found() {
    let Some(guest) = Guest::start("unknown").await else { return };
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    assert_eq!(failure(guest.start_process(&id, "").await).0, Code::NOT_FOUND);
    assert_eq!(failure(guest.delete(&id, "").await).0, Code::NOT_FOUND);
    assert_eq!(failure(guest.client.stats(limit(), &container(&id)).await).0, Code::NOT_FOUND);
    let spec = guest.spec(&root, "sleep 1000");
    assert_eq!(failure(guest.create("../x", &spec, &Stdio::default()).await).0, Code::INVALID_ARGUMENT);
    guest.start_container(&id, &spec).await;
    assert_eq!(failure(guest.create(&id, &spec, &Stdio::default()).await).0, Code::ALREADY_EXISTS);
    assert_eq!(failure(guest.start_process(&id, "nope").await).0, Code::NOT_FOUND);
    guest.remove(&id).await;
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn failed_containers_leave_nothing() {
    let Some(guest) = Guest::start("failed").await else { return };
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    let good = guest.spec(&root, "true");
    let change = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut spec = good.clone();
        change(&mut spec);
        spec
    };
    let args = |args: &[&str]| change(&|spec| spec["process"]["args"] = json!(args));
    let cases = [
        (args(&["nope"]), "exec: \"nope\": executable file not found in $PATH"),
        (args(&["/nope"]), "exec: \"/nope\": stat /nope: no such file or directory"),
        (args(&["/etc"]), "exec: \"/etc\": is a directory"),
        (args(&["/etc/passwd"]), "exec: \"/etc/passwd\": permission denied"),
        (change(&|spec| spec["root"]["path"] = json!("/nowhere")), "\"/nowhere\""),
        (
            change(&|spec| {
                let mount = json!({"destination": "/x", "type": "bind", "source": "/nowhere/x"});
                spec["mounts"].as_array_mut().unwrap().push(mount);
            }),
            "\"/nowhere/x\"",
        ),
        (change(&|spec| spec["hooks"] = json!({"poststop": [{"path": "/h"}]})), "hooks.poststop"),
        (
            change(&|spec| spec["linux"]["resources"]["cpu"] = json!({"realtimeRuntime": 1})),
            "realtimeRuntime",
        ),
        (
            change(&|spec| spec["process"]["rlimits"] = json!([{"type": "RLIMIT_X", "soft": 1, "hard": 1}])),
            "RLIMIT_X",
        ),
        (change(&|spec| spec["mounts"][0]["options"] = json!(["nonsense"])), "nonsense"),
    ];
    for (spec, expected) in cases {
        let (code, message) = failure(guest.create(&id, &spec, &Stdio::default()).await);
        assert_eq!(message.matches(expected).count(), 1, "{expected}: {message}");
        let invalid = !expected.contains("nonsense");
        assert_eq!(code == Code::INVALID_ARGUMENT, invalid, "{code:?} {message}");
    }
    // What is quoted of a specification is cut: the host takes no long answers.
    let long = change(&|spec| spec["process"]["env"] = json!(["x".repeat(100_000)]));
    let (code, message) = failure(guest.create(&id, &long, &Stdio::default()).await);
    assert_eq!((code, message.len()), (Code::INVALID_ARGUMENT, 2048));
    // A program that is one only in name starts, and says so itself.
    std::fs::write(root.join("bin/broken"), "not a program").unwrap();
    std::fs::set_permissions(root.join("bin/broken"), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    let ended = guest.run(&id, &args(&["broken"])).await;
    assert_eq!((ended.status, ended.stderr.as_str()), (1, "exec /bin/broken: exec format error\n"));
    assert_eq!(guest.run(&id, &guest.spec(&root, "echo fine")).await.stdout, "fine\n");
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn descriptors_do_not_pile_up() {
    let Some(guest) = Guest::start("fds").await else { return };
    let root = guest.rootfs("root");
    let open = || std::fs::read_dir(format!("/proc/{}/fd", guest.agent_pid())).unwrap().count();
    let spec = guest.spec(&root, "ls -l /proc/self/fd | wc -l");
    guest.run(&guest.id("first"), &spec).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let before = open();
    for round in 0..10 {
        let output = guest.run(&guest.id(&format!("c{round}")), &spec).await;
        // Three streams, the directory itself and the line with the total.
        assert_eq!(output.stdout.trim(), "5", "descriptors of the agent reach the container");
    }
    // The agent closes what the last one had when it gets to it.
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while open() > before && std::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert!(open() <= before, "{} descriptors, and {before} after the first container", open());
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn hooks_inside_run_before_the_program_and_their_failure_is_the_containers() {
    let Some(guest) = Guest::start("hooks").await else { return };
    let root = guest.rootfs("root");
    let hook = |script: &str| json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"], "timeout": 2});
    let mut spec = guest.spec(&root, "echo program >>/order; cat /order");
    spec["hooks"] = json!({
        "createContainer": [hook("echo createContainer >>/order")],
        "startContainer": [hook("echo startContainer >>/order; cat >/state")],
    });
    let id = guest.id("a");
    let output = guest.run(&id, &spec).await;
    assert_eq!(output.stdout, "createContainer\nstartContainer\nprogram\n", "{}", output.stderr);
    let state: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(root.join("state")).unwrap()).unwrap();
    assert_eq!((&state["id"], &state["status"]), (&json!(id), &json!("created")));

    spec["hooks"] = json!({"createContainer": [hook("echo no luck >&2; exit 3")]});
    let (_, message) = failure(guest.create(&guest.id("b"), &spec, &Stdio::default()).await);
    assert!(message.contains("exited with code 3: no luck"), "{message}");
    spec["hooks"] = json!({"startContainer": [hook("sleep 1000")]});
    let id = guest.id("c");
    guest.create(&id, &spec, &Stdio::default()).await.unwrap();
    let (_, message) = failure(guest.start_process(&id, "").await);
    assert!(message.contains("did not end within 2 s"), "{message}");
    guest.remove(&id).await;
    guest.finish().await;
}
