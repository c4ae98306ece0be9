//! The last lines that a process or a guest console wrote: read as they come, bounded, for diagnosis.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use log::Level;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::error::untrusted;
use crate::limit::RateLimit;

/// One line in the log, at most.
const MAX_LINE: usize = 512;

/// A reader that drains a pipe and keeps its end.
#[derive(Debug, Clone)]
pub(crate) struct Tail {
    kept: Arc<Mutex<VecDeque<u8>>>,
}

impl Tail {
    /// Drains `reader` in the background, keeps the last `capacity` bytes, and logs each line as one of `name`'s.
    ///
    /// Whoever writes faster than a person could read is slowed down, and most of it does not reach the log.
    pub(crate) fn start(
        reader: OwnedFd,
        capacity: usize,
        name: &'static str,
        level: Level,
    ) -> io::Result<Tail> {
        let mut reader = pipe::Receiver::from_owned_fd(reader)?;
        let tail = Tail { kept: Arc::default() };
        let kept = tail.kept.clone();
        tokio::spawn(async move {
            let mut limit = RateLimit::new(50, Duration::from_millis(500));
            let mut line = Vec::new();
            let mut buffer = vec![0; 2048];
            while let Ok(length @ 1..) = reader.read(&mut buffer).await {
                let bytes = &buffer[..length];
                keep(&kept, bytes, capacity);
                for &byte in bytes {
                    if byte != b'\n' {
                        if line.len() < MAX_LINE {
                            line.push(byte);
                        }
                        continue;
                    }
                    log_line(&mut limit, level, name, &line);
                    line.clear();
                }
                if length == buffer.len() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            log_line(&mut limit, level, name, &line);
        });
        Ok(tail)
    }

    /// All that is kept, cleaned, line by line.
    pub(crate) fn all(&self) -> String {
        let bytes: Vec<u8> = match self.kept.lock() {
            Ok(kept) => kept.iter().copied().collect(),
            Err(_) => return String::new(),
        };
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<String> = text.lines().map(|line| untrusted(line, MAX_LINE)).collect();
        lines.join("\n").trim().to_owned()
    }

    /// The last lines, cleaned, joined with " | ", at most `limit` bytes; empty if there was nothing.
    pub(crate) fn last_lines(&self, count: usize, limit: usize) -> String {
        let bytes: Vec<u8> = match self.kept.lock() {
            Ok(kept) => kept.iter().copied().collect(),
            Err(_) => return String::new(),
        };
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let lines = &lines[lines.len().saturating_sub(count)..];
        untrusted(&lines.join(" | "), limit)
    }
}

fn keep(kept: &Mutex<VecDeque<u8>>, bytes: &[u8], capacity: usize) {
    if let Ok(mut kept) = kept.lock() {
        let bytes = &bytes[bytes.len().saturating_sub(capacity)..];
        let excess = (kept.len() + bytes.len()).saturating_sub(capacity);
        kept.drain(..excess);
        kept.extend(bytes);
    }
}

fn log_line(limit: &mut RateLimit, level: Level, name: &str, line: &[u8]) {
    if level > log::max_level() || line.is_empty() {
        return;
    }
    if limit.allow() {
        let dropped = match limit.take_refused() {
            0 => String::new(),
            count => format!(" ({count} lines before this one were dropped)"),
        };
        log::log!(level, "{name}: {}{dropped}", untrusted(&String::from_utf8_lossy(line), MAX_LINE));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn the_end_is_kept_and_no_more() {
        let (reader, mut writer) = io::pipe().unwrap();
        let tail = Tail::start(reader.into(), 64, "test", Level::Trace).unwrap();
        for number in 0..100 {
            writeln!(writer, "line {number}\x1b").unwrap();
        }
        drop(writer);
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            if tail.last_lines(1, 100) == "line 99" {
                break;
            }
        }
        assert_eq!(tail.last_lines(2, 100), "line 98  | line 99");
        assert!(tail.kept.lock().unwrap().len() <= 64);
    }
}
