//! The fault campaign: pods whose parts are killed, or run out of what they need, at random moments of their lives. After each
//! round the reason was told, nothing is left on the node, and another pod has not noticed.

pub(crate) mod harm;
pub(crate) mod round;
pub(crate) mod schedule;

use std::collections::BTreeMap;
use std::time::Instant;

use round::Played;
use schedule::{Harm, Schedule, Step};

use crate::bundle;
use crate::cases::{Container, Environment};
use crate::failure::{Failure, Outcome};
use crate::leaks::Snapshot;
use crate::stdio::Streams;
use crate::{ensure, ensure_eq};

/// Which rounds.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What they are drawn from.
    pub seed: u64,
    /// Their numbers.
    pub rounds: std::ops::Range<u64>,
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

/// Plays the rounds of a plan in an environment that has been prepared for a shim's case. `tell` is told of each.
///
/// # Errors
/// When not even the pod beside it can be had.
pub fn run(environment: &Environment, plan: &Plan, mut tell: impl FnMut(&str)) -> Outcome<Summary> {
    let beside = environment.started("beside", bundle::process(&["sleep", "100000"]), Streams::default())?;
    let mut summary = Summary::default();
    for number in plan.rounds.clone() {
        let schedule = Schedule::of(plan.seed, number);
        if schedule.has(Harm::DiskFull) && !harm::can_fill() {
            tell(&format!("skip round {number}: {schedule}: /run is no file system of its own"));
            continue;
        }
        let began = Instant::now();
        summary.rounds += 1;
        match checked(environment, &beside, &format!("chaos-{}-{number}", plan.seed), &schedule) {
            Ok(played) => {
                let seconds = began.elapsed().as_secs_f64();
                let reason = played.reason.as_deref().unwrap_or("came through");
                tell(&format!("ok   round {number} ({seconds:.3} s): {schedule}: {reason}"));
                summary.unharmed += u64::from(played.reason.is_none());
                for (hit, count) in played.hits {
                    *summary.hits.entry(hit).or_default() += count;
                }
            }
            Err(Failure(reason)) => {
                let found = format!("round {number} of seed {}: {schedule}: {reason}", plan.seed);
                tell(&format!("FAIL {found}"));
                for (part, smaller) in schedule.smaller().iter().enumerate() {
                    let id = format!("chaos-{}-{number}-{part}", plan.seed);
                    match checked(environment, &beside, &id, smaller) {
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
    beside.finish()?;
    Ok(summary)
}

/// A round, and the node afterwards.
fn checked(environment: &Environment, beside: &Container, id: &str, schedule: &Schedule) -> Outcome<Played> {
    let host = environment.host()?;
    let bundles = host.path().join("bundles");
    let before = Snapshot::take(&[&bundles]);
    let played = round::play(host, id, schedule);
    harm::relieve();
    let played = played?;
    before.expect_nothing_left()?;
    let output = beside.exec_script(&format!("probe-{id}"), "echo unharmed")?;
    ensure_eq!(output.stdout, "unharmed\n", "the pod beside it");
    ensure!(environment.template()?.exists(), "the template that all pods start from is gone");
    Ok(played)
}
