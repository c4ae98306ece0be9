//! Warnings of what a command does on standard error: a pod that is started to try a template says there what became of it.

use std::io::{self, Write};

use log::{LevelFilter, Log, Metadata, Record};

#[derive(Debug)]
struct Logger;

static LOGGER: Logger = Logger;

/// Sends warnings and errors of the `log` crate to standard error.
pub(crate) fn init() {
    // The only failure is a logger that is set already.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

impl Log for Logger {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let level = record.level().as_str().to_lowercase();
        // Nothing is left to tell the user with when standard error is closed.
        let _ = writeln!(io::stderr(), "bulkhead: {level}: {}", record.args());
    }

    fn flush(&self) {}
}
