//! What pods from templates are like.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Templates;
use crate::cases::{Container, Environment};
use crate::failure::{Explain, Outcome};
use crate::shim::CALL_LIMIT;
use crate::{ensure, ensure_eq, fail};

/// How far a pod's clock may be off, seconds: it is set by a request, which waits for its turn on a busy node. A clock that nobody set would be
/// off by the age of the template.
const CLOCK_TOLERANCE: f64 = 0.050;

/// How much a pod's monotonic clock may go ahead of the node's or stay behind it from when it was saved. `/proc/uptime` has
/// hundredths of a second, and saving comes some milliseconds after what the guest says of its time.
const UPTIME_TOLERANCE: f64 = 0.050;

/// The first output comes this soon after the agent's answer, by the node's clock, seconds. Where the guest's clock is not read
/// from the time stamp counter, a counter that was set back by a restore shows only here: timers are late by as much,
/// and making a container waits for some.
const FIRST_OUTPUT_LIMIT: f64 = 0.2;

/// The second look at the clocks comes this much after the request for the pod: a clock that stands still at first has
/// no time to be unnoticed.
const SECOND_LOOK: Duration = Duration::from_millis(600);

/// Says one `name=value` a line. Times come first, everything about uniqueness afterwards.
const VALUES: &str = "\
    up() { read seconds rest </proc/uptime; echo uptime-$1=$seconds; }; up first; \
    for name in boot_id uuid; do echo $name=$(cat /proc/sys/kernel/random/$name); done; \
    echo stack=$(grep stack /proc/self/maps); echo hostname=$(hostname); \
    [ ! -e /etc/machine-id ] || echo machine-id=$(cat /etc/machine-id); \
    cpu=0; while [ $cpu -lt $(nproc) ]; do mask=$((1 << cpu)); \
    echo cpu-$cpu=$(taskset $mask cut -d' ' -f39 /proc/self/stat); \
    echo random-$cpu=$(taskset $mask head -c 32 /dev/urandom | sha256sum); cpu=$((cpu + 1)); done; \
    echo features=$(grep ^flags /proc/cpuinfo | sort -u | wc -l); \
    dd if=/dev/urandom of=/dev/shm/mine bs=64k count=16 2>/dev/null; echo file=$(sha256sum </dev/shm/mine); echo ready=; \
    read go; up second; echo clock=$(adjtimex | sed -n 's/.*tv_u*sec: *//p'); echo file-after=$(sha256sum </dev/shm/mine)";

/// A pod that says [`VALUES`], and when it said what.
struct Saying {
    pod: Container,
    /// When the pod was asked for.
    asked: Instant,
    /// When its first line was there.
    first: Instant,
}

impl Saying {
    fn start(templates: &Templates, environment: &Environment, size: &[(&str, &str)]) -> Outcome<Self> {
        let asked = Instant::now();
        let pod = templates.pod(environment, VALUES, size)?;
        pod.stdio.stdout.until("\n", CALL_LIMIT)?;
        Ok(Self { pod, asked, first: Instant::now() })
    }

    /// Has the pod say the rest, and checks its clocks; returns all that it said.
    fn finish(mut self) -> Outcome<(BTreeMap<String, String>, String)> {
        self.pod.stdio.stdout.until("ready=\n", CALL_LIMIT)?;
        std::thread::sleep(SECOND_LOOK.saturating_sub(self.asked.elapsed()));
        let (before, second_from) = (now(), Instant::now());
        self.pod.stdio.write(b"go\n")?;
        let output = self.pod.stdio.stdout.to_end(CALL_LIMIT)?;
        let (after, second_to) = (now(), Instant::now());
        let values: BTreeMap<String, String> = output
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect();
        let value = |name: &str| values.get(name).explain(|| format!("no {name} in {output:?}"));
        let number = |name: &str| value(name)?.parse::<f64>().explain(|| format!("{name} in {output:?}"));

        let (seconds, micros) = value("clock")?.split_once(' ').explain(|| format!("clock in {output:?}"))?;
        let parse = |text: &str| text.trim().parse::<f64>().explain(|| format!("clock in {output:?}"));
        let clock = parse(seconds)? + parse(micros)? / 1e6;
        // It was read somewhen between the two: what lies outside is certainly wrong.
        let wrong = (before - clock).max(clock - after).max(0.0);
        ensure!(
            wrong <= CLOCK_TOLERANCE,
            "the wall clock is wrong by {:.1} ms (node {before:.6} to {after:.6}, pod {clock:.6})",
            wrong * 1e3
        );
        let took = self.pod.shim.expect_started("restored")?;
        let log = self.pod.shim.log.until("timeline id=", CALL_LIMIT)?;
        let told = log_number(&log, "after the start of the VMM, ")? / 1e6;
        let answered = (log_number(&log, " agent=")? - log_number(&log, " containerd=")?) / 1e6;
        let at = |moment: Instant| (moment - self.asked).as_secs_f64();
        let mut passed = Vec::new();
        for (name, from, to) in
            [("uptime-first", self.first, self.first), ("uptime-second", second_from, second_to)]
        {
            let guest = number(name)? - told;
            // What the guest may not have seen pass: the time until the agent had answered.
            let (least, most) = (at(from) - answered, at(to));
            ensure!(
                guest >= least - UPTIME_TOLERANCE && guest <= most + UPTIME_TOLERANCE,
                "{guest:.3} s have passed in the guest since it answered, on the node {most:.3} s since the pod was asked for \
                 and {least:.3} s since the agent answered ({name})"
            );
            passed.push(format!("{guest:.2} of {least:.2} to {most:.2}"));
        }
        let waited = at(self.first) - answered;
        ensure!(
            waited <= FIRST_OUTPUT_LIMIT,
            "the first output came {waited:.3} s after the agent's answer: are the guest's timers late?"
        );
        ensure_eq!(value("file")?, value("file-after")?, "the pod's own file");
        ensure_eq!(value("hostname")?, &self.pod.bundle.id, "host name");
        ensure_eq!(self.pod.shim.wait("", CALL_LIMIT)?.exit_status, 0, "exit status");
        self.pod.finish()?;
        let evidence = format!(
            "agent after {took} us, wall clock wrong by {:.1} ms, seconds passed {}",
            wrong * 1e3,
            passed.join(", ")
        );
        Ok((values, evidence))
    }
}

/// The number in a log after some words.
fn log_number(log: &str, words: &str) -> Outcome<f64> {
    let (_, after) = log.split_once(words).explain(|| format!("no {words:?} in the shim's log {log:?}"))?;
    let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().explain(|| format!("no number after {words:?} in the shim's log {log:?}"))
}

/// Two pods of each of two sizes: nothing in one is as in the other, on whichever CPU, and their clocks are right.
pub(crate) fn unique(environment: &mut Environment) -> Outcome<String> {
    let templates = Templates::with_default(environment, "")?;
    let template = templates.build(&["--vcpus", "2"])?;
    let mut evidence = Vec::new();
    for vcpus in ["1", "2"] {
        let size = [("io.bulkhead.vcpus", vcpus)];
        let mut pods = Vec::new();
        for _ in 0..2 {
            pods.push(Saying::start(&templates, environment, &size)?);
        }
        let mut said = Vec::new();
        for pod in pods {
            let (values, about) = pod.finish()?;
            said.push(values);
            evidence.push(about);
        }
        expect_distinct(&said)?;
        for (values, cpu) in said.iter().flat_map(|values| ["0", "1"].map(|cpu| (values, cpu))) {
            let expected = (cpu < vcpus).then(|| cpu.to_owned());
            ensure_eq!(values.get(&format!("cpu-{cpu}")), expected.as_ref(), "the CPU that was read on");
        }
        for values in &said {
            let sets = values.get("features").map(String::as_str);
            ensure_eq!(sets, Some("1"), "sets of features that the pod's CPUs have");
        }
    }
    // Whatever pods do, the template stays as it was.
    let key = template.file_name().unwrap_or_default().to_string_lossy().into_owned();
    templates.run("verify", &[&key])?;
    Ok(format!("nothing equal; {}", evidence.join("; ")))
}

/// Checks that what each pod said differs from what the other pods said under the same name, and random values from all.
fn expect_distinct(said: &[BTreeMap<String, String>]) -> Outcome {
    for name in ["boot_id", "uuid", "stack", "file", "machine-id"] {
        let all: Vec<&String> = said.iter().filter_map(|values| values.get(name)).collect();
        // Not every image has a machine id.
        ensure!(name == "machine-id" || all.len() == said.len(), "a pod has no {name}: {said:?}");
        ensure_eq!(BTreeSet::from_iter(&all).len(), all.len(), "distinct values of {name} in {said:?}");
    }
    let random = said.iter().flatten().filter(|(name, _)| name.starts_with("random-"));
    let random: Vec<&String> = random.map(|(_, value)| value).collect();
    ensure!(random.len() >= said.len(), "no random bytes in {said:?}");
    ensure_eq!(BTreeSet::from_iter(&random).len(), random.len(), "distinct random bytes in {said:?}");
    Ok(())
}

/// The largest has as much memory as the nested host: what pods do not use takes no time, and no place.
pub(crate) fn sizes(environment: &mut Environment) -> Outcome<String> {
    let templates = Templates::new(environment, "")?;
    let mut evidence = Vec::new();
    for (vcpus, memory, mib) in [("1", "128Mi", 128), ("2", "512Mi", 512), ("4", "4Gi", 4096)] {
        let started = Instant::now();
        templates.build(&["--vcpus", vcpus, "--memory", memory])?;
        let made = started.elapsed().as_secs_f64();
        let annotations = [("io.bulkhead.vcpus", vcpus), ("io.bulkhead.memory", memory)];
        let (output, took) = templates.run_pod(environment, &annotations, "restored", None)?;
        let words: Vec<&str> = output.split_whitespace().collect();
        let [cpus, "MemTotal:", kib, "kB", "MemAvailable:", available, "kB", "done"] = words[..] else {
            fail!("output {output:?}")
        };
        ensure_eq!(cpus, vcpus, "CPUs");
        let kib: u64 = kib.parse().explain(|| format!("memory in {output:?}"))?;
        ensure!(kib <= mib * 1024 && kib > mib * 1024 * 7 / 10, "{kib} KiB of memory in a pod of {mib} MiB");
        evidence.push(format!("{cpus} vCPU, {kib} KiB, {available} KiB of them available: made in {made:.1} s, restored in {took} us"));
    }
    ensure_eq!(templates.run("list", &[])?.lines().count(), 3, "templates");
    Ok(evidence.join("; "))
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
