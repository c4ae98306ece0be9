//! The fault campaign.

use std::process::ExitCode;

use bulkhead_tests::cases::{Environment, Runtime};
use bulkhead_tests::chaos::{self, Plan, Scene};
use bulkhead_tests::failure::{Failure, Outcome};
use bulkhead_tests::layout::Layout;
use bulkhead_tests::{cleanup, cri};

const USAGE: &str = "usage: bulkhead-chaos [--seed N] [--rounds N] [--round N] [--scene shim|containerd|making]

Plays rounds 0 to N-1 (100) of a seed (1), or one of them alone: what failed comes again with the same seed and number. A scene leaves
out the rounds of others: shims alone, with a containerd that is killed, templates that are made.";

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(Failure(reason)) => {
            println!("FAIL chaos: {reason}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Outcome<bool> {
    let mut plan = Plan { seed: 1, rounds: 0..100, scene: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || {
            let text = arguments.next().unwrap_or_default();
            text.parse::<u64>()
                .map_err(|_| Failure(format!("{argument} {text:?}: expected a number\n{USAGE}")))
        };
        match argument.as_str() {
            "--help" => {
                println!("{USAGE}");
                return Ok(true);
            }
            "--seed" => plan.seed = number()?,
            "--rounds" => plan.rounds = 0..number()?,
            "--round" => plan.rounds = number().map(|round| round..round + 1)?,
            "--scene" => {
                plan.scene = Some(match arguments.next().unwrap_or_default().as_str() {
                    "shim" => Scene::Shim,
                    "containerd" => Scene::Containerd,
                    "making" => Scene::Making,
                    other => return Err(Failure(format!("unknown scene {other:?}\n{USAGE}"))),
                });
            }
            other => return Err(Failure(format!("unknown option {other}\n{USAGE}"))),
        }
    }
    cri::enter_own_network()?;
    cleanup::guard()?;
    let mut environment = Environment::new(Layout::locate()?, Runtime::Bulkhead);
    let summary = chaos::run(&mut environment, &plan, |line| println!("{line}"))?;
    environment.reset();
    for line in summary.lines() {
        println!("{line}");
    }
    Ok(summary.failures.is_empty())
}
