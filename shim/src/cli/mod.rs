//! The actions that containerd runs the binary with, and the server that `start` leaves behind.

mod containerd;
mod delete;
mod info;
mod request;
mod serve;
mod start;

use std::process::ExitCode;

use containerd_shim::Flags;

use crate::builder::background;
use crate::error::chain;

/// Name of the runtime, as containerd's configuration has it.
pub(crate) const RUNTIME: &str = "io.containerd.bulkhead.v1";

/// The action by which `start` runs the server.
pub const SERVE: &str = "serve";

pub use self::containerd::is_version_2 as is_containerd_2;

/// Does what the command line asks for.
pub fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let flags = match containerd_shim::parse(&arguments) {
        Ok(flags) => flags,
        Err(error) => return fail(&error.to_string()),
    };
    let outcome = match flags {
        Flags { version: true, .. } => info::print_version(),
        Flags { info: true, .. } => info::print_info(),
        _ => match flags.action.as_str() {
            "start" => start::run(&flags).map_err(|error| chain(&error)),
            "delete" => delete::run(&flags).map_err(|error| chain(&error)),
            background::ACTION => background::run().map_err(|error| chain(&error)),
            SERVE => serve::run(&flags).map_err(|error| chain(&error)),
            "" => Err("no action: containerd runs this program, with start or delete".to_owned()),
            other => Err(format!("unknown action {other:?}: start and delete are possible")),
        },
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => fail(&message),
    }
}

fn fail(message: &str) -> ExitCode {
    // containerd shows standard error to the user.
    eprintln!("{RUNTIME}: {message}");
    ExitCode::FAILURE
}
