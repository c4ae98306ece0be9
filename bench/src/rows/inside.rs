//! What the workload measures itself, inside its container: system calls, the root file system, block volumes.

use super::Bench;
use crate::containerd::spec::Container;
use crate::pod::PodError;
use crate::report::Better;
use crate::runtime::Runtime;
use crate::workload::files;

/// Runs `workload NAME` once under each runtime and takes over the samples that it prints.
pub async fn measure(bench: &mut Bench<'_>, name: &str) {
    for runtime in bench.runtimes.clone() {
        if let Err(error) = one(bench, &runtime, name).await {
            bench.fail(name, runtime.kind.name(), &error);
        }
        bench.progress(&format!("{name}: {} done", runtime.kind.name()));
    }
}

async fn one(bench: &mut Bench<'_>, runtime: &Runtime, name: &str) -> Result<(), PodError> {
    let container =
        Container { args: vec![files::PROGRAM.to_owned(), name.to_owned()], ..Default::default() };
    let output = bench.pods.run(runtime, &container).await?;
    add_samples(bench, runtime, name, &output)
}

/// Adds the lines `ROW UNIT NUMBER` of a workload's output.
pub fn add_samples(
    bench: &mut Bench<'_>,
    runtime: &Runtime,
    name: &str,
    output: &str,
) -> Result<(), PodError> {
    for line in output.lines() {
        let Some((row, unit, value)) = sample(line) else {
            return Err(PodError::Output(format!("the line {line:?} of the workload {name}")));
        };
        let better = if unit.ends_with("/s") { Better::Higher } else { Better::Lower };
        bench.results.add(row, runtime.kind.name(), unit, better, value);
    }
    Ok(())
}

fn sample(line: &str) -> Option<(&str, &'static str, f64)> {
    let mut words = line.split(' ');
    let (row, unit, value) = (words.next()?, words.next()?, words.next()?.parse().ok()?);
    let unit = ["ns", "us", "ms", "MB/s", "op/s"].into_iter().find(|known| *known == unit)?;
    Some((row, unit, value)).filter(|_| words.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read() {
        assert_eq!(sample("syscall-getppid ns 45.5"), Some(("syscall-getppid", "ns", 45.5)));
        for line in ["", "a", "a ns", "a ns x", "a miles 4", "a ns 4 5"] {
            assert_eq!(sample(line), None, "{line}");
        }
    }
}
