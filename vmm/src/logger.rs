//! Diagnostics on standard error: one line per message, and never more than its reader must be able to hold.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

use log::{LevelFilter, Log, Metadata, Record};

/// Bytes written in a process's life. A pipe holds this much without a reader, so that writing never blocks.
const LIMIT: usize = 32 * 1024;
/// Bytes of one line.
const LINE: usize = 512;

#[derive(Debug)]
struct Logger {
    written: AtomicUsize,
}

static LOGGER: Logger = Logger { written: AtomicUsize::new(0) };

/// Sends the `log` crate's messages to standard error.
pub fn init() {
    // The only failure is a logger that is set already.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

impl Log for Logger {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let line = format_line(record);
        let before = self.written.fetch_add(line.len(), Ordering::Relaxed);
        if before.saturating_add(line.len()) <= LIMIT {
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

fn format_line(record: &Record<'_>) -> String {
    let mut line = format!("{}: {}", record.level().as_str().to_lowercase(), record.args());
    truncate(&mut line, LINE - 1);
    let mut line = line.replace('\n', " ");
    line.push('\n');
    line
}

/// Cuts a text to at most `limit` bytes, at the end of a character.
pub(crate) fn truncate(text: &mut String, limit: usize) {
    let mut end = limit.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

#[cfg(test)]
mod tests {
    use log::Level;

    use super::*;

    #[test]
    fn a_message_is_one_bounded_line() {
        let text = "é\n".repeat(1000);
        let line = format_line(&Record::builder().level(Level::Warn).args(format_args!("{text}")).build());
        assert!(line.starts_with("warn: é é"));
        assert!(line.len() <= LINE);
        assert_eq!(line.matches('\n').count(), 1);
    }
}
