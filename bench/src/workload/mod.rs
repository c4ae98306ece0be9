//! What runs inside the containers: `workload NAME` measures one thing with the clock it finds there, and prints a line
//! `ROW UNIT NUMBER` for each sample and `end` at last.
//!
//! It is one static binary without a runtime, so that its start costs next to nothing anywhere.

mod block;
pub(crate) mod files;
pub(crate) mod net;
mod rootfs;
mod syscalls;

use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

/// Between the start and the first measurement.
const SETTLE: Duration = Duration::from_millis(100);

/// The process id of a virtual machine's init, which gets no arguments.
const INIT: u32 = 1;

/// What keeps a workload from being measured.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// The arguments make no sense.
    #[error("usage: workload idle | wait | exit | serve | fetch ADDRESS | syscalls | rootfs | block VOLUME")]
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

/// Where samples go: the workload's output.
pub(crate) struct Samples<'a> {
    out: &'a mut dyn Write,
}

impl Samples<'_> {
    /// Adds one.
    fn add(&mut self, row: &str, unit: &str, value: f64) -> Result<(), WorkloadError> {
        writeln!(self.out, "{row} {unit} {value}").map_err(step("write to standard output"))
    }
}

/// Runs the workload that the arguments (without the program's name) ask for.
///
/// # Errors
/// The step that failed.
pub fn run(arguments: &[String]) -> Result<(), WorkloadError> {
    if !matches!(
        arguments.first().map(String::as_str),
        None | Some("idle" | "wait" | "exit" | "serve" | "fetch")
    ) {
        // The runtime's own processes are still busy with this start.
        std::thread::sleep(SETTLE);
    }
    // Whole, at the end: output during the measurement would be part of it.
    let mut printed = Vec::new();
    let mut samples = Samples { out: &mut printed };
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["idle"] => return idle(b"x"),
        // Logs of the CRI are by line.
        ["wait"] => return idle(b"x\n"),
        [] if std::process::id() == INIT => return idle(files::INIT_READY),
        ["exit"] => return Ok(()),
        ["serve"] => return net::serve(|| print(b"serving\n")).map_err(step("serve")),
        ["fetch", address] => {
            let address = address.parse().map_err(|_| WorkloadError::Usage)?;
            let rate = net::measure_one_stream(address).map_err(step("fetch"))?;
            return print(format!("{rate}\n").as_bytes()).map_err(step("write to standard output"));
        }
        ["syscalls"] => syscalls::measure(&mut samples)?,
        ["rootfs"] => rootfs::measure(&mut samples, Path::new("/"))?,
        ["block", volume] => block::measure(&mut samples, Path::new(volume))?,
        _ => return Err(WorkloadError::Usage),
    }
    printed.extend_from_slice(files::END_MARK);
    let mut out = io::stdout().lock();
    out.write_all(&printed).and_then(|()| out.flush()).map_err(step("write to standard output"))
}

fn print(text: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text)?;
    out.flush()
}

/// Prints something short and sleeps until it is killed.
fn idle(greeting: &[u8]) -> Result<(), WorkloadError> {
    let mut out = io::stdout().lock();
    out.write_all(greeting).and_then(|()| out.flush()).map_err(step("write to standard output"))?;
    loop {
        std::thread::park();
    }
}

fn step(name: impl Into<String>) -> impl FnOnce(io::Error) -> WorkloadError {
    let step = name.into();
    move |source| WorkloadError::Step { step, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_workloads_are_refused() {
        for arguments in [&[][..], &["walk"][..], &["idle", "now"][..]] {
            let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
            assert!(matches!(run(&arguments), Err(WorkloadError::Usage)), "{arguments:?}");
        }
    }
}
