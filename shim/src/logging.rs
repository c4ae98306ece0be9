//! The shim's log: containerd's FIFO `log` in the bundle.
//!
//! The shim opens the FIFO for reading and writing: the open never waits, writes never fail while containerd restarts,
//! and what does not fit is dropped rather than waited for.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Lines are cut here, well below a pipe's atomic write of 4096 bytes, so that shims' lines never mix.
const MAX_LINE: usize = 3 * 1024;

struct FifoLog {
    file: Mutex<std::fs::File>,
    pod: String,
}

/// Sends the log of this process to the FIFO at `path`, and panics and the like on standard error with it.
///
/// Without a FIFO (no containerd: tests and people) the log stays on standard error.
pub(crate) fn init(path: &Path, pod: &str, level: LevelFilter) -> io::Result<()> {
    let opened =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = match opened {
        Ok(file) => {
            // SAFETY: dup2 takes two descriptor numbers; standard error is nobody's private property.
            if unsafe { libc::dup2(file.as_raw_fd(), libc::STDERR_FILENO) } < 0 {
                return Err(io::Error::last_os_error());
            }
            file
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            use std::os::fd::AsFd;
            let stderr: OwnedFd = io::stderr().as_fd().try_clone_to_owned()?;
            std::fs::File::from(stderr)
        }
        Err(error) => return Err(error),
    };
    log::set_max_level(level);
    let log = FifoLog { file: Mutex::new(file), pod: pod.to_owned() };
    log::set_boxed_logger(Box::new(log)).map_err(io::Error::other)
}

impl Log for FifoLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The ttrpc crate logs what peers send; ours may be hostile.
        let library = metadata.target().starts_with("ttrpc");
        metadata.level() <= log::max_level() && !(library && metadata.level() > Level::Warn)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = format_line(SystemTime::now(), &self.pod, record);
        // A full pipe means that nobody reads: the line is dropped, the pod goes on.
        if let Ok(mut file) = self.file.lock() {
            let _ = file.write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

fn format_line(now: SystemTime, pod: &str, record: &Record<'_>) -> String {
    let mut message = record.args().to_string();
    if message.len() > MAX_LINE {
        let end = (0..=MAX_LINE).rev().find(|&end| message.is_char_boundary(end)).unwrap_or(0);
        message.truncate(end);
        message.push('…');
    }
    let quoted = serde_json::to_string(&message).unwrap_or_default();
    let level = record.level().as_str().to_ascii_lowercase();
    format!("time=\"{}\" level={level} msg={quoted} runtime=bulkhead pod={pod}\n", rfc3339(now))
}

/// A point in time in UTC with microseconds.
fn rfc3339(time: SystemTime) -> String {
    let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seconds = since_epoch.as_secs();
    let (year, month, day) = civil_from_days(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let micros = since_epoch.subsec_micros();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

/// Year, month and day of a day since 1970-01-01 (proleptic Gregorian calendar; days are counted from a 1st of March,
/// so that the leap day is the last of its year).
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339() {
        let cases = [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (4_102_444_799, "2099-12-31T23:59:59.000000Z"),
        ];
        for (seconds, text) in cases {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_message_can_neither_forge_a_line_nor_split_one() {
        let message = format!("a\"\nlevel=fatal{}", "x".repeat(2 * MAX_LINE));
        let line = format_line(
            UNIX_EPOCH,
            "pod-1",
            &Record::builder().level(Level::Warn).args(format_args!("{message}")).build(),
        );
        assert_eq!(line.matches('\n').count(), 1);
        assert!(
            line.starts_with("time=\"1970-01-01T00:00:00.000000Z\" level=warn msg=\"a\\\"\\nlevel=fatalx")
        );
        assert!(line.ends_with("…\" runtime=bulkhead pod=pod-1\n"));
        assert!(line.len() < 4096);
    }
}
