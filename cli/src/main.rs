//! The operator's command line.

mod arguments;
mod check;
mod template;

use std::io::{self, Write};
use std::process::ExitCode;

use arguments::{Arguments, Command};

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            // Nothing is left to tell the user with when standard error is closed.
            let _ = writeln!(io::stderr(), "bulkhead: {error}");
            ExitCode::from(2)
        }
    }
}

/// What keeps a command from being carried out at all.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error("{0}")]
    Arguments(#[from] arguments::ArgumentsError),
    #[error("{0}")]
    Check(#[from] check::CheckError),
    #[error("{}", bulkhead_shim::error::chain(.0))]
    Template(#[from] template::TemplateError),
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
}

fn run() -> Result<ExitCode, CliError> {
    let mut out = io::stdout().lock();
    match Arguments::parse(lexopt::Parser::from_env())?.command {
        Command::Help => out.write_all(arguments::HELP.as_bytes())?,
        Command::Version => writeln!(out, "bulkhead {}", env!("CARGO_PKG_VERSION"))?,
        Command::KvmKind { device } => {
            let kind = check::kvm::kind(&device);
            if let Some(reason) = &kind.reason {
                writeln!(io::stderr(), "bulkhead: {reason}")?;
            }
            writeln!(out, "{}", kind.name())?;
        }
        Command::Template { config, action } => {
            if !template::run(config, &action, &mut out)? {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Check { device, prefix } => {
            if !check::run(&device, prefix.as_deref(), &mut out)? {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
