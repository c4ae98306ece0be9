//! The end-to-end suite: real containers in real microVMs, through the shim's API and through containerd.

use std::process::ExitCode;

use bulkhead_tests::cases::{self, Environment, Runtime};
use bulkhead_tests::cleanup;
use bulkhead_tests::cri;
use bulkhead_tests::facilities;
use bulkhead_tests::failure::{Failure, Outcome};
use bulkhead_tests::layout::Layout;
use bulkhead_tests::runner::{self, Selection};
use bulkhead_tests::segments;

const USAGE: &str = "usage: bulkhead-e2e [--list] [--shard I/N] [--reference] [NAME...]

Runs the cases whose names contain one of the NAMEs; without any, all. --shard 1/2 runs one half of them.
--reference runs the suite against runc's shim: the cases that are not about Bulkhead alone have to pass there too.";

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(Failure(reason)) => {
            eprintln!("bulkhead-e2e: {reason}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Outcome<bool> {
    let mut selection = Selection::default();
    let mut runtime = Runtime::Bulkhead;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--help" => {
                println!("{USAGE}");
                return Ok(true);
            }
            "--list" => {
                cases::all().iter().for_each(|case| println!("{}", case.name));
                return Ok(true);
            }
            // What it does in a container; see the module.
            "--facilities" => {
                facilities::command();
                return Ok(true);
            }
            "--segments" => return segments::command(&arguments.collect::<Vec<_>>()).map(|()| true),
            "--reference" => runtime = Runtime::Runc,
            "--shard" => selection.set_shard(&arguments.next().unwrap_or_default())?,
            option if option.starts_with('-') => {
                return Err(Failure(format!("unknown option {option}\n{USAGE}")));
            }
            name => selection.names.push(name.to_owned()),
        }
    }
    cri::enter_own_network()?;
    cleanup::guard()?;
    let mut environment = Environment::new(Layout::locate()?, runtime);
    Ok(runner::run(&cases::all(), &selection, &mut environment))
}
