//! The benchmark's command line: see `bulkhead_bench`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use bulkhead_bench::arguments::{self, Command, Run};
use bulkhead_bench::containerd::Containerd;
use bulkhead_bench::containerd::image::{Image, ImageError};
use bulkhead_bench::pod::{Pods, SNAPSHOTTER};
use bulkhead_bench::report::{self, Host, Report, table};
use bulkhead_bench::rows::{Bench, GROUPS, Results};
use bulkhead_bench::runtime::{RunscOptions, Runtime};
use bulkhead_bench::{compare, containerd, node};
use bulkhead_cri::grpc::GrpcError;

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            // Nothing is left to tell the user with when standard error is closed.
            let _ = writeln!(io::stderr(), "bulkhead-bench: {error}");
            ExitCode::from(2)
        }
    }
}

/// What keeps a command from being carried out.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    #[error(transparent)]
    Arguments(#[from] arguments::ArgumentsError),
    #[error(transparent)]
    Report(#[from] report::ReportError),
    #[error(transparent)]
    Containerd(#[from] containerd::ContainerdError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("cannot unpack the image: {0}")]
    Unpack(#[from] GrpcError),
    #[error("no runtime to measure: {0}")]
    NoRuntime(String),
    #[error("cannot use {path}: {source}")]
    Directory { path: PathBuf, source: io::Error },
    #[error("cannot find the workload beside this program: {0}")]
    Workload(#[source] io::Error),
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
}

fn run() -> Result<ExitCode, BenchError> {
    let mut out = io::stdout();
    match arguments::parse(lexopt::Parser::from_env())? {
        Command::Help => {
            write!(out, "{}\ngroups of rows:\n", arguments::HELP)?;
            for group in GROUPS {
                writeln!(out, "  {:<12} {}", group.name(), group.explanation())?;
            }
        }
        Command::Compare { before, after } => {
            let comparison = compare::compare(&Report::read(&before)?, &Report::read(&after)?);
            write!(out, "{}", comparison.text())?;
            if comparison.is_worse() {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Render { report } => {
            let content = Report::read(&report)?;
            content.write(report.parent().unwrap_or(Path::new(".")))?;
            write!(out, "{}", table::table(&content))?;
        }
        Command::Run(options) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let report = runtime.block_on(measure(&options))?;
            report.write(&options.out)?;
            write!(out, "{}", table::table(&report))?;
            writeln!(out, "report: {}", options.out.join("report.html").display())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn measure(options: &Run) -> Result<Report, BenchError> {
    let started = Instant::now();
    let progress = |text: &str| {
        // A closed standard output shows when the table is printed.
        let _ = writeln!(io::stdout(), "[{:7.2} s] {text}", started.elapsed().as_secs_f64());
    };
    // Left-overs are somebody else's: never removed, never reused.
    std::fs::create_dir(&options.work)
        .map_err(|source| BenchError::Directory { path: options.work.clone(), source })?;
    let image = Image::build(&beside_us("bulkhead-bench-workload")?)?;
    let (containerd, client) = Containerd::start(&options.work).await?;
    progress("containerd is up");
    image.import(&client).await?;
    image.unpack(&client, SNAPSHOTTER, image.snapshot()).await?;
    progress("image is imported and unpacked");

    let mut results = Results::default();
    let runsc = RunscOptions { platform: options.runsc_platform.clone() };
    let mut runtimes = Vec::new();
    for kind in &options.runtimes {
        match Runtime::find(*kind, &options.work, &runsc) {
            Ok(runtime) => runtimes.push(runtime),
            Err(absent) => {
                progress(&format!("SKIPPED everything under {}: {absent}", kind.name()));
                results.skip("all", kind.name(), absent.to_string());
            }
        }
    }
    if runtimes.is_empty() {
        return Err(BenchError::NoRuntime(format!("none of {:?} is installed", options.runtimes)));
    }
    let host = host(options, &client.version().await?, &runtimes);
    let mut bench = Bench {
        containerd: &containerd,
        pods: Pods::new(client.clone(), options.work.clone(), image.snapshot().to_owned()),
        client,
        image: &image,
        runtimes,
        directory: &options.work,
        rounds: options.rounds,
        progress: &progress,
        results,
    };
    for group in &options.groups {
        group.measure(&mut bench).await;
    }
    let (rows, skipped) = bench.results.finish();
    // What the shims said goes with the report, for whoever wonders about a figure.
    let log = options.out.join("containerd.log");
    std::fs::copy(containerd.log_path(), &log)
        .map_err(|source| BenchError::Directory { path: log.clone(), source })?;
    Ok(Report { format: report::FORMAT, host, rows, skipped })
}

fn beside_us(name: &str) -> Result<PathBuf, BenchError> {
    Ok(std::env::current_exe().map_err(BenchError::Workload)?.with_file_name(name))
}

fn host(options: &Run, containerd: &str, runtimes: &[Runtime]) -> Host {
    let (cpu, cpus) = node::cpus();
    let mut versions = BTreeMap::from([
        ("bulkhead".to_owned(), options.revision.clone()),
        ("containerd".to_owned(), containerd.to_owned()),
    ]);
    for runtime in runtimes.iter().filter(|runtime| !runtime.kind.is_bulkhead()) {
        if let Some(version) = node::first_line_of(&runtime.program, &["--version"]) {
            versions.insert(runtime.kind.name().to_owned(), version);
        }
    }
    let settings = BTreeMap::from([
        ("rounds".to_owned(), options.rounds.to_string()),
        ("runsc platform".to_owned(), options.runsc_platform.clone()),
        ("snapshotter".to_owned(), SNAPSHOTTER.to_owned()),
        ("cgroup2 options".to_owned(), node::cgroup_options()),
    ]);
    Host {
        clock: options.clock,
        kernel: node::kernel_release(),
        cpu,
        cpus,
        memory: node::total_memory(),
        versions,
        settings,
    }
}
