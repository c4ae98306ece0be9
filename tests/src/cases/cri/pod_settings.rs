//! What is set for a whole pod.

use std::time::Instant;

use bulkhead_cri::proto::{self, NamespaceMode};

use super::like_runc::security;
use crate::cases::Environment;
use crate::cri::{Handler, Pod};
use crate::failure::Outcome;
use crate::{ensure, ensure_eq, fail};

/// The pod's own parameters of the kernel.
const SYSCTLS: [(&str, &str); 9] = [
    ("kernel.shm_rmid_forced", "1"),
    ("kernel.shmmax", "67108864"),
    ("kernel.msgmax", "16384"),
    ("kernel.sem", "300\t32000\t32\t128"),
    ("fs.mqueue.msg_max", "20"),
    ("net.ipv4.ip_unprivileged_port_start", "81"),
    ("net.ipv4.ip_local_port_range", "10000\t20000"),
    ("net.core.somaxconn", "777"),
    ("net.ipv4.tcp_keepalive_time", "600"),
];

/// Parameters of namespaces are the pod's own, in all of its containers.
pub(crate) fn sysctls(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    let pod = Pod::run(node, environment.handler(), "sysctls", |config| {
        config.linux.mut_or_insert_default().sysctls =
            SYSCTLS.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
    })?;
    let names: Vec<String> =
        SYSCTLS.iter().map(|(name, _)| format!("/proc/sys/{}", name.replace('.', "/"))).collect();
    for container in ["one", "two"] {
        let said = pod.run_script(container, &format!("cat {}", names.join(" ")), |_| {})?.success()?;
        let said: Vec<&str> = said.lines().collect();
        ensure_eq!(said, SYSCTLS.map(|(_, value)| value), "in container {container}");
    }
    pod.finish()?;
    Ok(format!("{} in both containers", SYSCTLS.len()))
}

fn processes_of(config: &mut proto::ContainerConfig, mode: NamespaceMode, target: &str) {
    let options = security(config).namespace_options.mut_or_insert_default();
    options.pid = mode.into();
    options.target_id = target.to_owned();
}

/// Containers that share the pod's processes see each other's, those of their own do not, and one can be put beside another.
pub(crate) fn shared_processes(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    let ask = |handler: Handler| -> Outcome<String> {
        let pod = Pod::run(node, handler, "processes", |config| {
            let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            context.namespace_options.mut_or_insert_default().pid = NamespaceMode::POD.into();
        })?;
        let pod_wide = |config: &mut proto::ContainerConfig| processes_of(config, NamespaceMode::POD, "");
        let first = pod.start("first", "exec sleep 31415", pod_wide)?;
        let second = pod.run_script(
            "second",
            "ps | grep -c 'sleep 3141[5]'; [ $$ != 1 ] && echo not-first",
            pod_wide,
        )?;
        let own = pod.start("own", "exec sleep 27182", |_| {})?;
        let beside =
            |config: &mut proto::ContainerConfig| processes_of(config, NamespaceMode::TARGET, &own.id);
        let debugger =
            pod.run_script("beside", "ps | grep -c 'sleep 2718[2]'; ps | grep -c 'sleep 3141[5]'", beside)?;
        let alone = own.exec("ps | grep -c 'sleep 3141[5]'")?;
        let kernel = first.exec("ps -o comm | grep -c kthreadd; ps -o pid | grep -c '^ *1 *$'")?;
        let killed = pod.run_script(
            "kills",
            "kill $(ps | awk '/sleep 3141[5]/ { print $1 }') && echo killed",
            pod_wide,
        )?;
        let ended = first.wait()?;
        let answer = format!(
            "{} {} {} {} {} {}",
            second.stdout, debugger.stdout, alone.stdout, kernel.stdout, killed.stdout, ended.code
        );
        pod.finish()?;
        Ok(answer.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let right = ask(Handler::Runc)?;
    ensure_eq!(right, "1 not-first 1 0 0 0 1 killed 143", "with runc");
    ensure_eq!(ask(environment.handler())?, right, "answer, and runc's");
    Ok(right)
}

/// What a pod in a virtual machine can't have is refused for the pod, in words and at once, and nothing is left.
pub(crate) fn refused(environment: &mut Environment) -> Outcome<String> {
    type Change = fn(&mut proto::PodSandboxConfig);
    let cases: [(&str, Change); 1] = [("host network", |config| {
        let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        context.namespace_options.mut_or_insert_default().network = NamespaceMode::NODE.into();
    })];
    let node = environment.node()?;
    let mut words = Vec::new();
    for (what, change) in cases {
        let started = Instant::now();
        match Pod::run(node, environment.handler(), "refused", change) {
            Ok(pod) => {
                pod.finish()?;
                fail!("a pod with {what} was started")
            }
            Err(failure) => {
                let said = failure.0.to_lowercase();
                ensure!(what.split(' ').all(|word| said.contains(word)), "{what}: {failure}");
                ensure!(started.elapsed().as_secs() < 10, "{what}: refused after {:?}", started.elapsed());
                words.push(said.rsplit(": ").next().unwrap_or_default().to_owned());
            }
        }
    }
    Ok(words.join("; "))
}
