//! What runs inside the containers: `workload NAME` measures one thing with the clock it finds there, and prints a line
//! `SAMPLE UNIT NUMBER` for each sample and `end` at last.
//!
//! It is one static binary without a runtime, so that its start costs next to nothing anywhere.

pub mod files;

use std::io::{self, Write};

/// What keeps a workload from being measured.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// The arguments make no sense.
    #[error("usage: workload idle")]
    Usage,
    /// A step failed.
    #[error("{step}: {source}")]
    Step {
        /// Which one.
        step: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Runs the workload that the arguments (without the program's name) ask for.
///
/// # Errors
/// The step that failed.
pub fn run(arguments: &[String]) -> Result<(), WorkloadError> {
    let mut out = io::stdout().lock();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["idle"] => idle(&mut out),
        _ => Err(WorkloadError::Usage),
    }
}

/// Prints one byte and sleeps until it is killed.
fn idle(out: &mut impl Write) -> Result<(), WorkloadError> {
    out.write_all(b"x").and_then(|()| out.flush()).map_err(step("write to standard output"))?;
    loop {
        std::thread::park();
    }
}

fn step(name: impl Into<String>) -> impl FnOnce(io::Error) -> WorkloadError {
    let step = name.into();
    move |source| WorkloadError::Step { step, source }
}
