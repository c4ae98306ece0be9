//! Runs cases one after the other and checks after each that nothing is left behind.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::cases::{Case, Environment};
use crate::failure::{Failure, Outcome};
use crate::leaks::Snapshot;

/// Which cases to run.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Parts of names; a case runs if it has any of them. Empty means all.
    pub names: Vec<String>,
    /// `(i, n)`: every n-th case, the i-th of them first, counted from 1.
    pub shard: Option<(usize, usize)>,
}

impl Selection {
    /// Takes the shard that an argument `I/N` names.
    ///
    /// # Errors
    /// When it names none.
    pub fn set_shard(&mut self, text: &str) -> Outcome<()> {
        let parsed =
            text.split_once('/').and_then(|(index, count)| Some((index.parse().ok()?, count.parse().ok()?)));
        match parsed {
            Some((index, count)) if (1..=count).contains(&index) => self.shard = Some((index, count)),
            _ => return Err(Failure(format!("--shard {text:?}: expected I/N with I from 1 to N"))),
        }
        Ok(())
    }

    /// Whether what has this name is asked for.
    pub fn has_name(&self, found: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|name| found.contains(name.as_str()))
    }

    /// What is selected of what is named.
    pub fn share<T>(&self, named: impl Iterator<Item = T>) -> impl Iterator<Item = T> {
        let (index, count) = self.shard.unwrap_or((1, 1));
        named.skip(index - 1).step_by(count)
    }

    /// The selected ones of `cases`, in order. Cases of one fixture stay together, so a fixture is started once.
    fn of<'a>(&self, cases: &'a [Case]) -> Vec<&'a Case> {
        let mut named: Vec<&Case> = cases.iter().filter(|case| self.has_name(case.name)).collect();
        named.sort_by_key(|case| case.fixture);
        self.share(named.into_iter()).collect()
    }
}

/// Runs the selected cases and prints a line for each and a summary; returns whether all passed.
pub fn run(cases: &[Case], selection: &Selection, environment: &mut Environment) -> bool {
    let started = Instant::now();
    let (mut passed, mut failed, mut skipped) = (0, Vec::new(), 0);
    for case in selection.of(cases) {
        if let Some(reason) = environment.skip_reason(case) {
            println!("skip {}: {reason}", case.name);
            skipped += 1;
            continue;
        }
        // Not on the case's time; a failure comes again, and is the case's then.
        let _ = environment.prepare_template();
        let case_started = Instant::now();
        let result = run_one(case, environment);
        let seconds = case_started.elapsed().as_secs_f64();
        match result {
            Ok(evidence) => {
                println!("ok   {} ({seconds:.3} s): {evidence}", case.name);
                passed += 1;
            }
            Err(Failure(reason)) => {
                println!("FAIL {} ({seconds:.3} s): {reason}", case.name);
                print_logs(environment);
                failed.push(case.name);
                environment.reset();
            }
        }
    }
    environment.reset();
    if !failed.is_empty() {
        println!("failed: {}", failed.join(" "));
    }
    println!("e2e: {:.2} s", started.elapsed().as_secs_f64());
    println!("{passed} passed, {} failed, {skipped} skipped", failed.len());
    failed.is_empty()
}

fn run_one(case: &Case, environment: &mut Environment) -> Outcome<String> {
    let watched = environment.prepare(case)?;
    let directories: Vec<&Path> = watched.iter().map(|path| path.as_path()).collect();
    let before = Snapshot::take(&directories);
    let case_started = Instant::now();
    let evidence = (case.run)(environment)?;
    before.expect_nothing_left()?;
    let limit = Duration::from_secs(case.limit);
    match case_started.elapsed() {
        elapsed if elapsed <= limit => Ok(evidence),
        elapsed => Err(Failure(format!(
            "took {:.1} s, at most {} s are allowed",
            elapsed.as_secs_f64(),
            limit.as_secs()
        ))),
    }
}

fn print_logs(environment: &Environment) {
    let log = environment.logs();
    let lines: Vec<&str> = log.lines().collect();
    for line in &lines[lines.len().saturating_sub(25)..] {
        println!("     | {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::Fixture;

    fn case(name: &'static str, fixture: Fixture) -> Case {
        Case { name, fixture, ..Case::new(name, |_| Ok(String::new())) }
    }

    #[test]
    fn shards_cover_all_cases_once() {
        let cases = [
            case("a", Fixture::Shim),
            case("b", Fixture::Containerd),
            case("c", Fixture::Shim),
            case("d", Fixture::Pod),
        ];
        let shard = |index| Selection { names: Vec::new(), shard: Some((index, 2)) }.of(&cases);
        let mut names: Vec<&str> = shard(1).into_iter().chain(shard(2)).map(|case| case.name).collect();
        names.sort_unstable();
        assert_eq!(names, ["a", "b", "c", "d"]);
    }

    #[test]
    fn names_select_by_part() {
        let cases = [case("exec-a", Fixture::Shim), case("io-b", Fixture::Shim)];
        let selection = Selection { names: vec!["exec".into()], shard: None };
        assert_eq!(selection.of(&cases).len(), 1);
    }
}
