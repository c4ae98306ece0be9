//! The operator's command line.

mod arguments;
mod check;
mod containerd;
mod install;
mod logger;
mod pods;
mod template;
#[cfg(test)]
mod testing;

use std::io::{self, Write};
use std::process::ExitCode;

use arguments::{Arguments, Command};
use bulkhead_shim::operator::Method;

fn main() -> ExitCode {
    logger::init();
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
    #[error("{}", bulkhead_base::chain(.0))]
    Template(#[from] template::TemplateError),
    #[error("{}", bulkhead_base::chain(.0))]
    Install(#[from] install::InstallError),
    #[error("{}", bulkhead_base::chain(.0))]
    Uninstall(#[from] install::UninstallError),
    #[error("{}", bulkhead_base::chain(.0))]
    Pods(#[from] pods::PodsError),
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
}

fn run() -> Result<ExitCode, CliError> {
    let mut out = io::stdout().lock();
    match Arguments::parse(lexopt::Parser::from_env())?.command {
        Command::Help => out.write_all(arguments::HELP.as_bytes())?,
        Command::Version => writeln!(out, "bulkhead {}", env!("CARGO_PKG_VERSION"))?,
        Command::KvmKind { device } => {
            let evidence = check::kvm::look(&device);
            if let Some(reason) = evidence.reason() {
                writeln!(io::stderr(), "bulkhead: {reason}")?;
            }
            writeln!(out, "{}", evidence.kind())?;
        }
        Command::Template { config, action } => {
            if !template::run(config, &action, &mut out)? {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Install(options) => install::install(&options, &mut out)?,
        Command::Uninstall { options, force } => install::uninstall(&options, force, &mut out)?,
        Command::Pods { json } => pods::list(json, &mut out)?,
        Command::Logs { pod } => pods::ask(&pod, Method::Logs, "", &mut out)?,
        Command::Exec { pod, question } => pods::ask(&pod, Method::Ask, &question, &mut out)?,
        Command::Check(options) => {
            if !check::run(&options, &mut out)? {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
