//! A part of the attack suite, so that each run of the tests has some of it. The whole is `make attack`.

use super::{Case, Environment, Fixture, Runtime};
use crate::attack::{self, Profile};
use crate::ensure;
use crate::failure::Outcome;

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[Case::new("attack-smoke", smoke).on(Fixture::Attack).bulkhead_only()];

fn smoke(environment: &mut Environment) -> Outcome<String> {
    let arena = environment.arena()?;
    let (mut tried, mut breaches) = (0, Vec::new());
    for attempt in attack::all().iter().filter(|attempt| attempt.smoke) {
        for profile in Profile::ALL {
            let verdict = arena.attempt(attempt, Runtime::Bulkhead, profile)?;
            tried += 1;
            breaches.extend(verdict.breaches.iter().map(|breach| format!("{}: {breach}", attempt.name)));
        }
    }
    arena.clear()?;
    ensure!(breaches.is_empty(), "not contained: {}", breaches.join("; "));
    Ok(format!("{tried} attempts contained"))
}
