//! Warnings and errors for the operator: to the kernel's log, which the host reads on the console, or to stderr.

use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Where messages go.
#[derive(Debug)]
enum Sink {
    /// `/dev/kmsg`.
    Kernel(File),
    Stderr,
}

struct Logger(Sink);

static LOGGER: OnceLock<Logger> = OnceLock::new();

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = if record.level() == Level::Error { "error" } else { "warning" };
        // There is nowhere to report a failure to report.
        let _ = match &self.0 {
            // A priority that a quiet console still shows; a message has to be a single write.
            Sink::Kernel(kmsg) => {
                let line = format!("<3>bulkhead-agent: {level}: {}\n", record.args());
                let mut kmsg = kmsg;
                kmsg.write_all(line.as_bytes())
            }
            Sink::Stderr => writeln!(std::io::stderr(), "bulkhead-agent: {level}: {}", record.args()),
        };
    }

    fn flush(&self) {}
}

/// Sends messages to the kernel's log.
pub(crate) fn to_kernel() -> std::io::Result<()> {
    let kmsg = File::options().write(true).open("/dev/kmsg")?;
    install(Sink::Kernel(kmsg));
    Ok(())
}

/// Sends messages to stderr.
pub fn to_stderr() {
    install(Sink::Stderr);
}

fn install(sink: Sink) {
    // A second logger can't be installed; the first one serves.
    if log::set_logger(LOGGER.get_or_init(|| Logger(sink))).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}
