//! The attack suite: what gets out of a container with runc and with Bulkhead, read off the host's facts.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use bulkhead_tests::attack::arena::Arena;
use bulkhead_tests::attack::report::{self, Row};
use bulkhead_tests::attack::{self, Contrast, Profile};
use bulkhead_tests::cases::{Environment, Runtime};
use bulkhead_tests::failure::{Failure, Outcome};
use bulkhead_tests::layout::Layout;
use bulkhead_tests::runner::Selection;
use bulkhead_tests::{cleanup, cri};

const USAGE: &str = "usage: bulkhead-attack [--list] [--results DIR] [--shard I/N] [NAME...]
       bulkhead-attack --results DIR --merge DIR...

Makes the attempts whose names contain one of the NAMEs; without any, all. Writes attack.md and attack.json into DIR
(/results). Fails if Bulkhead did not contain one, or if runc contained one that is there to show that the suite can see.
--shard 1/2 makes one half of them; --merge puts the tables of such runs together.";

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(Failure(reason)) => {
            println!("FAIL attack: {reason}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Outcome<bool> {
    let mut results = PathBuf::from("/results");
    let mut selection = Selection::default();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--help" => {
                println!("{USAGE}");
                return Ok(true);
            }
            "--list" => {
                attack::all().iter().for_each(|attempt| println!("{}: {}", attempt.name, attempt.what));
                return Ok(true);
            }
            "--results" => results = arguments.next().unwrap_or_default().into(),
            "--shard" => selection.set_shard(&arguments.next().unwrap_or_default())?,
            "--merge" => {
                let parts: Vec<PathBuf> = arguments.map(PathBuf::from).collect();
                return report::merge(&results, &parts).map(|()| true);
            }
            option if option.starts_with('-') => {
                return Err(Failure(format!("unknown option {option}\n{USAGE}")));
            }
            name => selection.names.push(name.to_owned()),
        }
    }
    cri::enter_own_network()?;
    cleanup::guard()?;
    let layout = Layout::locate()?;
    Environment::new(layout.clone(), Runtime::Bulkhead).prepare_template()?;
    let started = Instant::now();
    let mut arena = Arena::new(layout)?;
    let mut rows = Vec::new();
    let mut failed = Vec::new();
    let named = attack::all().into_iter().enumerate().filter(|(_, attempt)| selection.has_name(attempt.name));
    for (number, attempt) in selection.share(named) {
        let attempt_started = Instant::now();
        let mut row = Row { number, attempt, results: Vec::new() };
        for runtime in [Runtime::Runc, Runtime::Bulkhead] {
            if runtime == Runtime::Runc && matches!(attempt.contrast, Contrast::Without(_)) {
                continue;
            }
            for profile in Profile::ALL {
                match arena.attempt(&attempt, runtime, profile) {
                    Ok(verdict) => row.results.push(verdict),
                    Err(Failure(reason)) => {
                        failed.push(attempt.name);
                        println!("FAIL {} ({}, {}): {reason}", attempt.name, runtime.name(), profile.name());
                    }
                }
            }
        }
        let seconds = attempt_started.elapsed().as_secs_f64();
        failed.extend(row.failures().map(|_| attempt.name));
        let word = if failed.contains(&attempt.name) { "FAIL" } else { "ok  " };
        println!("{word} {} ({seconds:.3} s): {}", attempt.name, attempt.what);
        for line in row.lines() {
            println!("     | {line}");
        }
        rows.push(row);
    }
    report::write(&results, &rows)?;
    if let Err(Failure(reason)) = arena.finish() {
        println!("FAIL the end: {reason}");
        failed.push("the end");
    }
    failed.dedup();
    if !failed.is_empty() {
        println!("failed: {}", failed.join(" "));
    }
    println!("attack: {:.2} s", started.elapsed().as_secs_f64());
    for runtime in [Runtime::Runc, Runtime::Bulkhead] {
        let (tried, contained) = report::count(&rows, runtime);
        println!("{}: {contained} of {tried} contained", runtime.name());
    }
    println!("{} attempts, {} failed", rows.len(), failed.len());
    Ok(failed.is_empty())
}
