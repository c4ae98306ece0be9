//! Guests that don't do what they are told: the host ends them all the same.

use std::time::{Duration, Instant};

use containerd_shim_protos::api::{ExecProcessRequest, KillRequest, ShutdownRequest, Status};

use super::{LIMIT, Stage, code, ctx, refusal};
use crate::error::Code;
use crate::pod::heartbeat::Heartbeat;
use crate::task::kill::KILL_LIMIT;

/// containerd is to know within this time that what it killed has ended.
const PROMISED: Duration = Duration::from_secs(10);

/// Everything in the pod has ended as killed, is told so with a reason, and can be deleted; then nothing of it is left.
async fn expect_ended(stage: &Stage, reason: &str) {
    let all = async { (stage.wait("a", "e").await, stage.wait("a", "").await, stage.wait("b", "").await) };
    let ended = tokio::time::timeout(LIMIT, all).await.expect("something in the pod has not ended");
    assert_eq!(ended, (137, 137, 137));
    let (code, message) = refusal(stage.kill("b", "").await);
    assert_eq!(code, Code::NOT_FOUND);
    assert!(message.contains(reason), "{message}");
    for (id, exec) in [("a", "e"), ("a", ""), ("b", "")] {
        assert_eq!(stage.delete(id, exec).await.unwrap(), 137);
    }
    let events = stage.events().await;
    for event in ["exit e 137", "exit a 137", "exit b 137", "delete a", "delete b"] {
        assert_eq!(events.iter().filter(|found| *found == event).count(), 1, "{event}: {events:?}");
    }
    assert!(!stage.directory.path().join("pod").exists());
}

#[tokio::test]
async fn a_silent_guest_ends_within_the_time_of_one_kill() {
    let stage = Stage::running().await;
    stage.guest.fall_silent();
    let killed = Instant::now();
    stage.kill("a", "").await.unwrap();
    assert_eq!(stage.wait("a", "").await, 137);
    assert!(killed.elapsed() < PROMISED, "{:?}", killed.elapsed());
    expect_ended(&stage, "did not end a within").await;
}

#[tokio::test]
async fn a_guest_that_says_it_has_killed_is_held_to_it() {
    let stage = Stage::running().await;
    stage.guest.lie();
    let killed = Instant::now();
    let all = KillRequest { id: "b".into(), signal: 9, all: true, ..Default::default() };
    stage.client.kill(ctx(), &all).await.unwrap();
    assert!(killed.elapsed() < KILL_LIMIT, "an answered kill returns");
    assert_eq!(stage.status("b").await, Status::RUNNING);
    assert_eq!(stage.wait("b", "").await, 137);
    let took = killed.elapsed();
    assert!((KILL_LIMIT..PROMISED).contains(&took), "{took:?}");
    expect_ended(&stage, "did not end b within").await;
}

#[tokio::test]
async fn a_guest_that_knows_nothing_of_the_process_is_held_to_the_same() {
    let stage = Stage::running().await;
    stage.guest.lie();
    stage.guest.refuse("Signal", Code::NOT_FOUND, "no such process");
    assert_eq!(code(stage.kill("a", "").await), Code::NOT_FOUND);
    let wait = tokio::time::timeout(PROMISED, stage.wait("a", "")).await;
    assert_eq!(wait.expect("it still runs"), 137);
    expect_ended(&stage, "did not end a within").await;
}

#[tokio::test]
async fn an_exec_that_does_not_end_is_given_up_and_the_pod_lives() {
    let stage = Stage::running().await;
    stage.guest.lie();
    stage.kill("a", "e").await.unwrap();
    let wait = tokio::time::timeout(PROMISED, stage.wait("a", "e")).await;
    assert_eq!(wait.expect("it still runs"), 137);
    assert_eq!(stage.delete("a", "e").await.unwrap(), 137);
    assert_eq!((stage.status("a").await, stage.status("b").await), (Status::RUNNING, Status::RUNNING));
    assert_eq!(stage.events().await.iter().filter(|event| *event == "exit e 137").count(), 1);
}

#[tokio::test]
async fn a_container_that_was_never_started_is_deleted_without_the_guest() {
    let stage = Stage::new().await;
    stage.create("c").await;
    stage.guest.fall_silent();
    let started = Instant::now();
    assert_eq!(stage.delete_within("c", Duration::from_secs(20)).await, 137);
    assert!(started.elapsed() < PROMISED + Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(!stage.directory.path().join("pod").exists());
}

#[tokio::test]
async fn signals_that_the_guest_does_not_take_are_no_failure() {
    let stage = Stage::running().await;
    let term = |exec: &str, all| KillRequest {
        id: "a".into(),
        exec_id: exec.into(),
        signal: 15,
        all,
        ..Default::default()
    };
    stage.guest.lie();
    stage.guest.refuse("Signal", Code::INTERNAL, "I'd rather not");
    stage.client.kill(ctx(), &term("", false)).await.unwrap();
    stage.guest.fall_silent();
    stage.client.kill(ctx(), &term("", true)).await.unwrap();
    // What is the caller's own mistake stays one.
    let unknown = KillRequest { signal: 65, ..term("", false) };
    assert_eq!(code(stage.client.kill(ctx(), &unknown).await), Code::INVALID_ARGUMENT);
    assert_eq!(code(stage.client.kill(ctx(), &term("e", true)).await), Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn a_shutdown_that_is_now_asks_nobody() {
    let stage = Stage::running().await;
    stage.guest.fall_silent();
    let started = Instant::now();
    let now = ShutdownRequest { id: "p".into(), now: true, ..Default::default() };
    stage.client.shutdown(ctx(), &now).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    let exiting = tokio::time::timeout(LIMIT, stage.shim.exiting()).await;
    assert!(exiting.is_ok(), "the shim stays");
    let events = stage.events().await;
    for event in ["exit e 137", "exit a 137", "exit b 137"] {
        assert!(events.iter().any(|found| found == event), "{event}: {events:?}");
    }
    assert!(!stage.directory.path().join("pod").exists());
}

#[tokio::test]
async fn calls_that_hang_end_with_the_pod() {
    let stage = Stage::running().await;
    stage.guest.fall_silent();
    let exec = ExecProcessRequest {
        id: "a".into(),
        exec_id: "late".into(),
        spec: Stage::process(),
        ..Default::default()
    };
    let long = ttrpc::context::with_duration(Duration::from_secs(30));
    let started = Instant::now();
    let (exec, kill) = tokio::join!(stage.client.exec(long, &exec), stage.kill("a", ""));
    kill.unwrap();
    let (_, message) = refusal(exec);
    assert!(message.contains("did not end a within"), "{message}");
    assert!(started.elapsed() < PROMISED, "{:?}", started.elapsed());
}

const FAST: Heartbeat =
    Heartbeat { interval: Duration::from_millis(50), limit: Duration::from_millis(300), misses: 3 };

#[tokio::test]
async fn a_guest_that_is_silent_for_long_is_dead() {
    let stage = Stage::with_heartbeat(FAST).await;
    stage.create("c").await;
    stage.start("c", "").await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.status("c").await, Status::RUNNING, "one that answers lives");
    assert!(stage.guest.calls("Ready").len() > 3);

    stage.guest.fall_silent();
    let wait = tokio::time::timeout(Duration::from_secs(5), stage.wait("c", "")).await;
    assert_eq!(wait.expect("it is still taken to live"), 137);
    let (_, message) = refusal(stage.kill("c", "").await);
    assert!(message.contains("the agent in the guest has not answered for"), "{message}");
}

#[tokio::test]
async fn a_guest_that_answers_late_or_with_a_refusal_lives() {
    let stage = Stage::with_heartbeat(FAST).await;
    stage.create("c").await;
    // Two missed answers at most, then some in time.
    let asked = async |times: usize| {
        let before = stage.guest.calls("Ready").len();
        while stage.guest.calls("Ready").len() < before + times {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    for _ in 0..2 {
        stage.guest.delay("Ready", Duration::from_millis(400));
        asked(2).await;
        stage.guest.delay("Ready", Duration::ZERO);
        asked(4).await;
    }
    stage.guest.refuse("Ready", Code::INTERNAL, "not now");
    asked(4).await;
    assert_eq!(stage.status("c").await, Status::CREATED);
}
