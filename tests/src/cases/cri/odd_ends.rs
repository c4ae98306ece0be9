//! Ends that few containers come to, and who is with them then: each as with runc.

use std::fs;
use std::time::Duration;

use bulkhead_cri::proto::{self, NamespaceMode};
use bulkhead_cri::stream::{STDIN, STDOUT};
use protobuf::MessageField;

use super::like_runc::security;
use crate::cases::Environment;
use crate::cri::{Container, Handler, Pod, shell};
use crate::ensure_eq;
use crate::failure::{Explain, Outcome};
use crate::process::eventually;

/// Expects the same list of answers of both.
fn alike(environment: &Environment, ask: impl Fn(Handler) -> Outcome<Vec<String>>) -> Outcome<Vec<String>> {
    let (right, ours) = (ask(Handler::Runc)?, ask(environment.handler())?);
    let unlike: Vec<_> = right.iter().zip(&ours).filter(|(right, ours)| right != ours).collect();
    ensure_eq!(unlike, [] as [(&String, &String); 0], "runc's answers and ours");
    ensure_eq!(ours.len(), right.len(), "answers");
    Ok(right)
}

/// Memory runs out in a container's child, in an exec, and where all of the container goes with one.
pub(crate) fn out_of_memory(environment: &mut Environment) -> Outcome<String> {
    let eats = "head -c 200m /dev/zero | tail | wc -c";
    let answers = alike(environment, |handler| {
        let pod = environment.shared_pod(handler)?;
        let limited = |config: &mut proto::ContainerConfig| {
            let resources = config.linux.mut_or_insert_default().resources.mut_or_insert_default();
            resources.memory_limit_in_bytes = 32 << 20;
        };
        let mut answers = Vec::new();
        let ended = pod.run_script("child", &format!("{eats}; echo went on; exit 0"), limited)?;
        answers.push(format!("a child: {} {} {:?}", ended.code, ended.reason, ended.stdout));
        let container =
            pod.start("exec", "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done", limited)?;
        container.wait_for_output("up")?;
        let ended = container.exec(&format!("{eats}; echo went on"))?;
        answers.push(format!("an exec: {} {:?}", ended.code, ended.stdout));
        let state = container.status()?;
        answers.push(format!("{:?} {:?}", state.state.enum_value_or_default(), state.reason));
        container.stop(Duration::from_secs(5))?;
        let ended = container.wait()?;
        answers.push(format!("its container: {} {}", ended.code, ended.reason));
        container.remove()?;
        let ended = pod.run_script("group", &format!("{eats}; echo went on"), |config| {
            limited(config);
            let resources = config.linux.mut_or_insert_default().resources.mut_or_insert_default();
            resources.unified = [("memory.oom.group".to_owned(), "1".to_owned())].into();
        })?;
        answers.push(format!("all at once: {} {} {:?}", ended.code, ended.reason, ended.stdout));
        Ok(answers)
    })?;
    Ok(answers.join("; "))
}

/// What a container leaves running goes with it, also where the pod shares its processes.
pub(crate) fn left_behind(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    let answers = alike(environment, |handler| {
        let pod = Pod::run(node, handler, "left", |config| {
            let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            context.namespace_options.mut_or_insert_default().pid = NamespaceMode::POD.into();
        })?;
        let pod_wide = |config: &mut proto::ContainerConfig| {
            security(config).namespace_options.mut_or_insert_default().pid = NamespaceMode::POD.into();
        };
        let watch = pod.start("watch", "exec sleep 100000", pod_wide)?;
        let count = |what: &str| -> Outcome<String> {
            std::thread::sleep(Duration::from_millis(300));
            Ok(watch.exec(&format!("ps -o args | grep -c '^{what}'"))?.stdout.trim().to_owned())
        };
        let mut answers = Vec::new();
        let ended = pod.run_script("leaves", "sleep 1111 & setsid sleep 1111 & echo left", pod_wide)?;
        answers.push(format!("{} {:?}, left {}", ended.code, ended.stdout, count("sleep 1111")?));
        let killed = pod.start("killed", "sleep 2222 & sleep 2222 & echo up; exec sleep 2222", pod_wide)?;
        killed.wait_for_output("up")?;
        answers.push(format!("running {}", count("sleep 2222")?));
        killed.stop(Duration::ZERO)?;
        answers.push(format!("{} left {}", killed.wait()?.code, count("sleep 2222")?));
        killed.remove()?;
        // An exec whose client leaves.
        for (tty, sleeps) in [(false, "sleep 3333"), (true, "sleep 4444")] {
            let stream = watch.exec_stream(&shell(&format!("{sleeps}; true")), tty)?;
            eventually("the exec runs", Duration::from_secs(10), || {
                ensure_eq!(count(sleeps)?, "1", "execs");
                Ok(())
            })?;
            drop(stream);
            std::thread::sleep(Duration::from_secs(1));
            answers.push(format!("its client is gone, tty {tty}: {}", count(sleeps)?));
        }
        pod.finish()?;
        Ok(answers)
    })?;
    Ok(answers.join("; "))
}

/// An input that ends with its first client, and several who watch.
pub(crate) fn attached(environment: &mut Environment) -> Outcome<String> {
    let answers = alike(environment, |handler| {
        let pod = environment.shared_pod(handler)?;
        let once = |config: &mut proto::ContainerConfig| {
            config.stdin = true;
            config.stdin_once = true;
        };
        let mut answers = Vec::new();
        let container = pod.start("once", "echo up; cat; echo end", once)?;
        container.wait_for_output("up")?;
        let mut stream = container.attach(false)?;
        let mut watching = container.attach(false)?;
        stream.send(STDIN, b"line\n")?;
        let read = |stream: &mut bulkhead_cri::stream::Stream| -> Outcome<String> {
            let said = stream.receive_until(STDOUT, |said| said.ends_with(b"line\n"))?;
            Ok(String::from_utf8_lossy(&said).into_owned())
        };
        answers.push(format!("{:?} {:?}", read(&mut stream)?, read(&mut watching)?));
        drop(stream);
        let ended = container.wait()?;
        answers.push(format!("{} {:?}", ended.code, ended.stdout));
        container.remove()?;
        Ok(answers)
    })?;
    Ok(answers.join("; "))
}

/// Which figures there are of a container.
pub(crate) fn figures(environment: &mut Environment) -> Outcome<String> {
    let answers = alike(environment, |handler| {
        let pod = environment.shared_pod(handler)?;
        let mut answers = Vec::new();
        for limit in [0, 64 << 20] {
            let container = pod.start("counted", "echo up; exec sleep 100000", |config| {
                let resources = config.linux.mut_or_insert_default().resources.mut_or_insert_default();
                resources.memory_limit_in_bytes = limit;
            })?;
            container.wait_for_output("up")?;
            answers.push(of(&container)?);
            container.stop(Duration::ZERO)?;
            container.remove()?;
        }
        Ok(answers)
    })?;
    Ok(answers.join("; "))
}

fn of(container: &Container<'_>) -> Outcome<String> {
    let request = proto::ContainerStatsRequest { container_id: container.id.clone(), ..Default::default() };
    let answer = container.node.client().container_stats(&request).explain(|| "statistics".into())?;
    let stats = answer.stats.unwrap_or_default();
    let (cpu, memory) = (&stats.cpu, &stats.memory);
    let figures = [
        ("CPU", cpu.usage_core_nano_seconds.is_some()),
        ("working set", memory.working_set_bytes.is_some()),
        ("available", memory.available_bytes.is_some()),
        ("usage", memory.usage_bytes.is_some()),
        ("RSS", memory.rss_bytes.is_some()),
        ("faults", memory.page_faults.is_some() && memory.major_page_faults.is_some()),
        ("written", stats.writable_layer.used_bytes.is_some()),
        ("room", memory.available_bytes.value > 0),
        ("touched", memory.page_faults.value > 0),
    ];
    let there = figures.iter().filter(|(_, is_there)| *is_there).map(|(name, _)| *name);
    Ok(there.collect::<Vec<_>>().join(", "))
}

/// An image as a volume. containerd 2.1 takes all of it where a part is asked for.
pub(crate) fn image_volume(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    let answers = alike(environment, |handler| {
        let pod = Pod::run(node, handler, "image", |_| {})?;
        let script = "cat /image/work/file; ls /image; touch /image/x; stat -c '%u %a' /image/tmp; /image/bin/echo ran; cat /part/file";
        let ended = pod.run_script("image", script, |config| {
            let image = |inside: &str, part: &str| proto::Mount {
                container_path: inside.to_owned(),
                readonly: true,
                image: MessageField::some(proto::ImageSpec {
                    image: "bulkhead.test/custom:1".to_owned(),
                    ..Default::default()
                }),
                image_sub_path: part.to_owned(),
                ..Default::default()
            };
            config.mounts = vec![image("/image", ""), image("/part", "work")];
        });
        let ended = ended?;
        // containerd releases it with the pod, but for a directory that is empty then.
        pod.finish()?;
        let volumes = node.containerd().path().join("state/io.containerd.grpc.v1.cri/image-volumes");
        fs::remove_dir(&volumes).explain(|| format!("remove {}", volumes.display()))?;
        Ok(vec![format!("{} {} {}", ended.code, ended.stdout, ended.stderr)])
    })?;
    Ok(answers[0].replace('\n', " "))
}
