//! Docker itself, Debian's: what its users type, under our runtime and under runc, and the same comes of it.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::{Case, Environment, Fixture, Runtime};
use crate::docker::{Docker, IMAGE};
use crate::failure::{Explain, Outcome};
use crate::process::eventually;
use crate::{ensure, ensure_eq};

/// The cases of this theme. Each runs its containers under both runtimes.
pub(crate) const CASES: &[Case] = &[
    case("docker-options", options),
    case("docker-life", life),
    case("docker-network", network),
    case("docker-names", names),
    case("docker-build", build),
];

const fn case(name: &'static str, run: fn(&mut Environment) -> Outcome<String>) -> Case {
    Case::new(name, run).on(Fixture::Docker).bulkhead_only().within(90)
}

const BOTH: [Runtime; 2] = [Runtime::Runc, Runtime::Bulkhead];

/// How long a container may take to be as it is to be.
const LIMIT: Duration = Duration::from_secs(10);

/// Runs a container to its end under both runtimes, and has them say the same.
fn same(docker: &Docker, options: &[&str], script: &str) -> Outcome<String> {
    let said = |runtime: Runtime| -> Outcome<String> {
        let before = ["run", "--rm", "--runtime", runtime.name()];
        let output = docker.run(&[&before, options, &[IMAGE, "sh", "-c", script]].concat())?;
        // What Docker says of the node is not the container's.
        let stderr: Vec<&str> = output.stderr.lines().filter(|line| !line.starts_with("WARNING")).collect();
        Ok(format!("{}{}\nexit code {}", output.stdout, stderr.join("\n"), output.code))
    };
    let (expected, found) = (said(Runtime::Runc)?, said(Runtime::Bulkhead)?);
    ensure!(
        found == expected,
        "docker run {}: under runc\n{expected}\nunder bulkhead\n{found}",
        options.join(" ")
    );
    Ok(found)
}

fn options(environment: &mut Environment) -> Outcome<String> {
    let docker = environment.docker()?;
    let shared = docker.path().join("shared");
    fs::create_dir_all(&shared).explain(|| "make a shared directory".into())?;
    fs::write(shared.join("file"), "from the host\n").explain(|| "write a shared file".into())?;
    let volume = format!("{}:/data:ro", shared.display());
    #[rustfmt::skip]
    let many = [
        "--read-only", "--tmpfs", "/scratch:size=1m,mode=1777", "--init", "--user", "1000:2000", "--hostname", "box",
        "--dns", "192.0.2.9", "--add-host", "peer:10.1.2.3", "-e", "COLOUR=green", "-v", &volume, "-v", "named:/volume",
        "--ulimit", "nofile=100:200", "--shm-size", "8m", "--cap-add", "NET_ADMIN", "--cap-drop", "CHOWN", "--memory", "160m",
        "--cpus", "0.5", "--pids-limit", "50", "-w", "/tmp", "--sysctl", "net.ipv4.ip_forward=0",
        "--security-opt", "no-new-privileges", "--device", "/dev/fuse",
    ];
    let script = "id; hostname; pwd; grep peer /etc/hosts; grep ^nameserver /etc/resolv.conf; echo $COLOUR; ulimit -n; ulimit -Hn
        df -k /dev/shm /scratch | awk 'NR > 1 { print $1, $2 }'; stat -c '%a %n' /scratch /volume /dev/fuse
        cut -d ' ' -f 1 /proc/1/cmdline | tr '\\0' ' ' | cut -c 1-20; grep -E '^(Cap|Seccomp:|NoNewPrivs)' /proc/self/status
        touch /x; touch /data/x; touch /scratch/x && echo scratch; cat /data/file
        cd /sys/fs/cgroup; cat memory.max cpu.max pids.max /proc/sys/net/ipv4/ip_forward";
    let found = same(docker, &many, script)?;
    for part in [
        "uid=1000(user) gid=2000(extra)",
        "box\n",
        "10.1.2.3",
        "192.0.2.9",
        "green",
        "scratch\n",
        "from the host",
        "167772160\n50000 100000\n50\n",
    ] {
        ensure!(found.contains(part), "there is no {part:?} in {found}");
    }
    same(
        docker,
        &["--privileged", "--network", "none"],
        "grep CapEff /proc/self/status | sed s/0000//; mkdir /m; mount -t tmpfs none /m && echo mounted; ip -o addr",
    )?;
    same(docker, &[], "exit 42")?;
    let missing = docker.run(&["run", "--rm", IMAGE, "/nonexistent"])?;
    ensure_eq!(missing.code, 127, "exit code for a program that is not there");
    let refused = docker.run(&["run", "--rm", "--network", "host", IMAGE, "true"])?;
    ensure!(refused.stderr.contains("host network"), "--network host: {}", refused.said());
    docker.ok(&["volume", "rm", "named"])?;
    Ok(format!("{} options and a privileged container do the same as under runc", many.len()))
}

/// A program that says what it is told, and ends in its own way.
const TRAP: &str = "trap 'echo got; exit 7' TERM; echo out; echo err >&2; while :; do sleep 0.1; done";

fn life(environment: &mut Environment) -> Outcome<String> {
    let docker = environment.docker()?;
    let mut stories = Vec::new();
    for runtime in BOTH {
        let id = environment.id("life");
        stories.push(live(docker, runtime, &id)?);
    }
    ensure!(stories[0] == stories[1], "under runc\n{}\nunder bulkhead\n{}", stories[0], stories[1]);
    let killed = ["run", "--name", "oom", "--memory", "64m", IMAGE, "sh", "-c"];
    let killed =
        docker.run(&[&killed[..], &["head -c 120m /dev/zero | tail >/dev/null; exit 5"]].concat())?;
    ensure_eq!(killed.code, 5, "exit code of a container in which a process was killed for want of memory");
    ensure_eq!(docker.ok(&["inspect", "-f", "{{.State.OOMKilled}}", "oom"])?, "true\n", "OOMKilled");
    docker.ok(&["rm", "oom"])?;
    Ok("run -d, health, exec (stdin, terminal, user), logs, stats, cp, update, pause, stop, start, restart, kill, wait, diff, \
        commit, rm"
        .into())
}

/// The whole life of a container; tells it.
fn live(docker: &Docker, runtime: Runtime, id: &str) -> Outcome<String> {
    let mut story = String::new();
    let mut tell = |what: &str, said: String| story += &format!("{what}: {said}\n");
    let inspect = |format: &str| docker.ok(&["inspect", "-f", format, id]);
    #[rustfmt::skip]
    docker.ok(&["run", "-d", "--name", id, "--runtime", runtime.name(), "--health-cmd", "test -e /ok", "--health-interval", "1s",
        IMAGE, "sh", "-c", TRAP])?;
    docker.ok(&["exec", id, "touch", "/ok"])?;
    let echoed = docker.run_with_input(&["exec", "-i", id, "cat"], b"through stdin\n")?;
    tell("exec -i", echoed.success("exec -i")?.stdout);
    tell("exec -t", docker.ok(&["exec", "-t", id, "tty"])?);
    let other = docker.run(&[
        "exec",
        "-u",
        "1000",
        "-e",
        "X=y",
        "-w",
        "/tmp",
        id,
        "sh",
        "-c",
        "id -u; echo $X; pwd; exit 3",
    ])?;
    tell("exec -u", format!("{} {}", other.stdout, other.code));
    let logs = docker.run(&["logs", id])?;
    tell("logs", format!("{}{}", logs.stdout, logs.stderr));

    let stats = docker.ok(&["stats", "--no-stream", "--format", "{{.MemUsage}} {{.PIDs}} {{.NetIO}}", id])?;
    let pids: u32 = stats.split_whitespace().nth(3).and_then(|word| word.parse().ok()).unwrap_or_default();
    ensure!(pids > 0 && !stats.starts_with("0B"), "docker stats: {stats}");

    let file = docker.path().join(id);
    fs::write(&file, "copied\n").explain(|| format!("write {}", file.display()))?;
    docker.ok(&["cp", &file.display().to_string(), &format!("{id}:/copied")])?;
    tell("cp in", docker.ok(&["exec", id, "cat", "/copied"])?);
    docker.ok(&["exec", id, "sh", "-c", "echo back >/out"])?;
    docker.ok(&["cp", &format!("{id}:/out"), &file.display().to_string()])?;
    tell("cp out", fs::read_to_string(&file).explain(|| "what was copied out".into())?);

    #[rustfmt::skip]
    docker.ok(&["update", "--memory", "100m", "--memory-swap", "200m", "--cpus", "0.25", "--pids-limit", "40", id])?;
    let limits = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max";
    tell("update", docker.ok(&["exec", id, "sh", "-c", limits])?);
    docker.ok(&["pause", id])?;
    tell("paused", inspect("{{.State.Status}}")?);
    docker.ok(&["unpause", id])?;
    let healthy = || {
        let health = inspect("{{.State.Health.Status}}")?;
        ensure!(health == "healthy\n", "it is {health}");
        Ok(())
    };
    eventually("the health check passes", LIMIT, healthy)?;

    docker.ok(&["stop", id])?;
    tell("stop", inspect("{{.State.Status}} {{.State.ExitCode}}")?);
    docker.ok(&["start", id])?;
    tell("start", docker.ok(&["exec", id, "cat", "/copied"])?);
    docker.ok(&["restart", "-t", "5", id])?;
    tell("restart", inspect("{{.State.Status}}")?);
    let started = || {
        let logs = docker.ok(&["logs", id])?;
        ensure!(logs.matches("out\n").count() == 3, "the logs are {logs:?}");
        Ok(())
    };
    eventually("the program runs again", LIMIT, started)?;
    docker.ok(&["kill", "-s", "TERM", id])?;
    tell("wait", docker.ok(&["wait", id])?);
    tell("logs", docker.ok(&["logs", id])?);
    let diff = docker.ok(&["diff", id])?;
    let mut changes: Vec<&str> = diff.lines().collect();
    changes.sort_unstable();
    tell("diff", changes.join(" "));
    docker.ok(&["commit", id, id])?;
    tell("commit", docker.ok(&["run", "--rm", "--runtime", runtime.name(), id, "cat", "/copied"])?);
    docker.ok(&["rm", id])?;
    docker.ok(&["rmi", id])?;
    Ok(story)
}

/// A server that answers every connection with a word.
const SERVER: &str = "while :; do echo here | nc -l -p 80; done";

fn network(environment: &mut Environment) -> Outcome<String> {
    let docker = environment.docker()?;
    let mut evidence = String::new();
    for runtime in BOTH {
        let id = environment.id("web");
        #[rustfmt::skip]
        docker.ok(&["run", "-d", "--name", &id, "-p", "18080:80", "--runtime", runtime.name(), IMAGE, "sh", "-c", SERVER])?;
        let address = docker.ok(&["inspect", "-f", "{{.NetworkSettings.IPAddress}}", &id])?;
        for to in [format!("{}:80", address.trim()), "172.17.0.1:18080".into(), "127.0.0.1:18080".into()] {
            let to: SocketAddr = to.parse().explain(|| format!("the address {to:?}"))?;
            let said =
                eventually("the server answers", LIMIT, || docker.network().within(move || ask(to))?)?;
            ensure_eq!(said, "here\n", "what is heard at the address");
        }
        let peer = docker.ok(&[
            "run",
            "--rm",
            "--runtime",
            runtime.name(),
            IMAGE,
            "ping",
            "-c",
            "1",
            address.trim(),
        ])?;
        ensure!(peer.contains(" 0% packet loss"), "from another container: {peer}");
        evidence = docker.ok(&["exec", &id, "sh", "-c", "ip route; ip -o -4 addr show eth0"])?;
        docker.ok(&["rm", "-f", &id])?;
    }
    Ok(format!("reached at its address, by -p and from another container; in it: {}", evidence.trim()))
}

fn ask(address: SocketAddr) -> Outcome<String> {
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(1));
    let mut stream = stream.explain(|| format!("connect to {address}"))?;
    let mut said = String::new();
    let asked = stream
        .set_read_timeout(Some(Duration::from_secs(2)))
        .and_then(|()| stream.write_all(b"\n"))
        .and_then(|()| stream.read_to_string(&mut said));
    asked.explain(|| format!("ask {address}"))?;
    ensure!(!said.is_empty(), "{address} ends the connection");
    Ok(said)
}

/// What finds a server by its name, asks it, and binds the port on which it asks for names. A question that Docker does not
/// answer itself goes to a name server that is a container as well.
const LOOK_UP: &str = "grep ^nameserver /etc/resolv.conf
    timeout 1 nc -l -u -p 53 </dev/null >/dev/null & sleep 0.1
    nslookup -type=a server. 127.0.0.11 | grep -v '^;;'
    address=$(nslookup -type=a server. 127.0.0.11 | sed -n '/^Name/,$s/^Address: //p'); echo there | nc -w 3 $address 80
    wait";

fn names(environment: &mut Environment) -> Outcome<String> {
    let docker = environment.docker()?;
    docker.ok(&["network", "create", "--subnet", "10.77.0.0/24", "pair"])?;
    let mut found = Vec::new();
    for runtime in BOTH {
        #[rustfmt::skip]
        docker.ok(&["run", "-d", "--name", "server", "--network", "pair", "--ip", "10.77.0.9", "--runtime", runtime.name(), IMAGE,
            "sh", "-c", SERVER])?;
        let client =
            ["run", "--rm", "--network", "pair", "--runtime", runtime.name(), IMAGE, "sh", "-c", LOOK_UP];
        let output = docker.run(&client)?;
        found.push(format!("{}{}", output.stdout, output.stderr));
        if runtime == Runtime::Bulkhead {
            // Its network is its own, and stays so.
            let shared = docker.run(&["run", "--rm", "--network", "container:server", IMAGE, "true"])?;
            ensure!(shared.stderr.contains("is another pod's"), "--network container: {}", shared.said());
            let still = docker.run(&client)?;
            ensure!(still.stdout.contains("here"), "afterwards: {}", still.said());
        }
        docker.ok(&["rm", "-f", "server"])?;
    }
    docker.ok(&["network", "rm", "pair"])?;
    ensure!(found[0] == found[1], "under runc\n{}\nunder bulkhead\n{}", found[0], found[1]);
    for part in ["nameserver 127.0.0.11", "10.77.0.9", "here\n"] {
        ensure!(found[1].contains(part), "there is no {part:?} in {}", found[1]);
    }
    Ok("a container in a user's network finds another one by its name, and has port 53 to itself".into())
}

fn build(environment: &mut Environment) -> Outcome<String> {
    let docker = environment.docker()?;
    let context = docker.path().join("context");
    fs::create_dir_all(&context).explain(|| "make a build's directory".into())?;
    let file = "FROM busybox\nRUN uname -r >/kernel && echo $((6 * 7)) >/sum\nRUN cat /kernel /sum\nCMD [\"cat\", \"/sum\"]\n";
    fs::write(context.join("Dockerfile"), file).explain(|| "write a Dockerfile".into())?;
    let built = docker.ok(&["build", "-t", "built", &context.display().to_string()])?;
    let kernel = docker.ok(&["run", "--rm", "--network", "none", IMAGE, "uname", "-r"])?;
    let nodes = nix::sys::utsname::uname().explain(|| "the node's kernel".into())?;
    ensure!(built.contains(&kernel), "the build's commands did not run in a microVM ({kernel}): {built}");
    ensure!(nodes.release().to_string_lossy() != kernel.trim(), "the microVM has the node's kernel {kernel}");
    ensure_eq!(docker.ok(&["run", "--rm", "built"])?, "42\n", "what the built image says");
    docker.ok(&["rmi", "built"])?;
    Ok(format!("docker build's commands run in microVMs with Linux {}", kernel.trim()))
}
