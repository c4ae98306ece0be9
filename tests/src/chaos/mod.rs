//! The fault campaign: pods whose parts are killed, or run out of what they need, at random moments of their lives. After each
//! round the reason was told, nothing is left on the node, and another pod has not noticed.

pub(crate) mod daemon;
pub(crate) mod harm;
pub(crate) mod making;
pub(crate) mod round;
pub(crate) mod schedule;

use std::collections::BTreeMap;
use std::time::Instant;

use daemon::Daemon;
use schedule::{Harm, Schedule, Step};

pub use schedule::Scene;

use crate::bundle;
use crate::cases::{Case, Container, Environment, Fixture};
use crate::failure::{Failure, Outcome};
use crate::leaks::Snapshot;
use crate::stdio::Streams;
use crate::{ensure, ensure_eq};

/// How much of containerd's log is told with a failure.
const LOG_LINES: usize = 30;

/// Which rounds.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What they are drawn from.
    pub seed: u64,
    /// Their numbers.
    pub rounds: std::ops::Range<u64>,
    /// Those of one scene only.
    pub scene: Option<Scene>,
}

/// Faults that met somebody.
pub(crate) type Hits = Vec<(Harm, Step)>;

/// How a round went that left nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Played {
    /// What met somebody.
    pub hits: Hits,
    /// What whoever leads the pod would have been told: the first error.
    pub reason: Option<String>,
}

/// What came of a campaign.
#[derive(Debug, Default)]
pub struct Summary {
    /// Rounds.
    pub rounds: u64,
    /// Rounds in which the pod did all that it was asked to.
    pub unharmed: u64,
    /// Faults that met somebody, by kind and step.
    pub hits: BTreeMap<(Harm, Step), u32>,
    /// What was wrong, with the round's number and schedule.
    pub failures: Vec<String>,
}

impl Summary {
    /// The summary for people.
    pub fn lines(&self) -> Vec<String> {
        let mut harms: BTreeMap<Harm, Vec<String>> = BTreeMap::new();
        for ((harm, step), count) in &self.hits {
            harms.entry(*harm).or_default().push(format!("{step:?} {count}"));
        }
        let mut lines: Vec<String> =
            harms.iter().map(|(harm, steps)| format!("{harm:?}: {}", steps.join(", "))).collect();
        let faults: u32 = self.hits.values().sum();
        lines.push(format!(
            "{} rounds, {faults} faults, {} pods that came through, {} failures",
            self.rounds,
            self.unharmed,
            self.failures.len()
        ));
        lines
    }
}

/// Plays the rounds of a plan. `tell` is told of each.
///
/// # Errors
/// When not even the pod beside it can be had.
pub fn run(environment: &mut Environment, plan: &Plan, mut tell: impl FnMut(&str)) -> Outcome<Summary> {
    environment.prepare(&Case::new("chaos", |_| Ok(String::new())))?;
    let beside = environment.started("beside", bundle::process(&["sleep", "100000"]), Streams::default())?;
    let mut stage = Stage { environment, beside, daemon: None };
    let mut summary = Summary::default();
    for number in plan.rounds.clone() {
        let schedule = Schedule::of(plan.seed, number);
        if plan.scene.is_some_and(|scene| scene != schedule.scene) {
            continue;
        }
        if schedule.scene == Scene::Shim && schedule.has(Harm::DiskFull) && !harm::can_fill() {
            tell(&format!("skip round {number}: {schedule}: /run is no file system of its own"));
            continue;
        }
        let began = Instant::now();
        summary.rounds += 1;
        match stage.play(&format!("chaos-{}-{number}", plan.seed), &schedule) {
            Ok(played) => {
                let seconds = began.elapsed().as_secs_f64();
                let reason = played.reason.as_deref().unwrap_or("came through");
                tell(&format!("ok   round {number} ({seconds:.3} s): {schedule}: {reason}"));
                summary.unharmed += u64::from(played.reason.is_none());
                for hit in played.hits {
                    *summary.hits.entry(hit).or_default() += 1;
                }
            }
            Err(Failure(reason)) => {
                let found = format!("round {number} of seed {}: {schedule}: {reason}", plan.seed);
                tell(&format!("FAIL {found}"));
                for line in stage.logs().lines() {
                    tell(&format!("     | {line}"));
                }
                for (part, smaller) in schedule.smaller().iter().enumerate() {
                    let id = format!("chaos-{}-{number}-{part}", plan.seed);
                    match stage.play(&id, smaller) {
                        Ok(_) => tell(&format!("     | not with {smaller} alone")),
                        Err(Failure(reason)) => {
                            tell(&format!("     | already with {smaller} alone: {reason}"))
                        }
                    }
                }
                summary.failures.push(found);
            }
        }
    }
    stage.finish()?;
    Ok(summary)
}

/// Where rounds are played.
struct Stage<'a> {
    environment: &'a mut Environment,
    /// A pod that has nothing to do with them.
    beside: Container,
    /// What rounds with containerd need, once there was one.
    daemon: Option<Daemon>,
}

impl Stage<'_> {
    /// A round, and the node afterwards.
    fn play(&mut self, id: &str, schedule: &Schedule) -> Outcome<Played> {
        if schedule.scene == Scene::Containerd && self.daemon.is_none() {
            let case = Case::new("chaos", |_| Ok(String::new())).on(Fixture::Containerd);
            self.environment.prepare(&case)?;
            self.daemon = Some(Daemon::new(self.environment)?);
        }
        let mut watched = vec![self.environment.host()?.path().join("bundles")];
        watched.extend(self.daemon.as_ref().map(|daemon| daemon.state()));
        let watched: Vec<_> = watched.iter().map(|path| path.as_path()).collect();
        let before = Snapshot::take(&watched);
        let played = match (schedule.scene, &self.daemon) {
            (Scene::Containerd, Some(daemon)) => daemon.play(self.environment.containerd()?, id, schedule),
            (Scene::Making, _) => making::play(self.environment, schedule),
            _ => round::play(self.environment.host()?, id, schedule),
        };
        harm::relieve();
        let played = played?;
        before.expect_nothing_left()?;
        let output = self.beside.exec_script(&format!("probe-{id}"), "echo unharmed")?;
        ensure_eq!(output.stdout, "unharmed\n", "the pod beside it");
        ensure!(self.environment.template()?.exists(), "the template that all pods start from is gone");
        Ok(played)
    }

    /// The end of containerd's log.
    fn logs(&mut self) -> String {
        let (Some(_), Ok(containerd)) = (&self.daemon, self.environment.containerd()) else {
            return String::new();
        };
        let log = containerd.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }

    fn finish(self) -> Outcome {
        if let Some(daemon) = self.daemon {
            daemon.finish(self.environment)?;
        }
        self.beside.finish()
    }
}
