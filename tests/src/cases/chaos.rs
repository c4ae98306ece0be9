//! A part of the fault campaign, so that each run of the tests has some of it. The whole is `make chaos`.

use super::{Case, Environment, Fixture};
use crate::chaos::{self, Plan};
use crate::ensure;
use crate::failure::Outcome;

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[Case::new("chaos-smoke", smoke).on(Fixture::Containerd).bulkhead_only()];

/// Rounds of which most kinds of faults have one.
const PLAN: Plan = Plan { seed: 1, rounds: 0..10, scene: None };

fn smoke(environment: &mut Environment) -> Outcome<String> {
    let summary = chaos::run(environment, &PLAN, |_| {})?;
    ensure!(summary.failures.is_empty(), "{}", summary.failures.join("; "));
    Ok(summary.lines().join("; "))
}
