//! What the operator wants to know of the guest: `bulkhead exec`.
//!
//! The guest has no shell and no tools, and a container's are the workload's. So the agent itself shows what they would. It does
//! so in a process of its own, because some of it may wait for what the workload has brought to a stop.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use bulkhead_agent_protocol::forward::MAX_QUESTION;
use tokio::time::timeout;

use super::Connection;
use crate::sys::check;
use crate::sys::process::{CloneOptions, clone_process, exit_now};

/// How long the host may take to send its question.
const QUESTION_LIMIT: Duration = Duration::from_secs(5);

/// How long the answer may take, seconds.
const ANSWER_LIMIT: libc::c_uint = 10;

/// What `help` answers.
const HELP: &str = "\
ps          processes of the whole guest: id, parent, state, resident KiB, name
mounts      the agent's mount table
network     interfaces, addresses, routes, neighbours and listening sockets, as the kernel's tables have them
memory      memory, pressure and load
cgroups     the containers' control groups: memory, processes, CPU time
dmesg       the kernel's log
version     the guest's kernel
cat FILE    a file below /proc, /sys, or /etc of the guest
";

/// Reads the question and has it answered.
pub(super) async fn serve(host: Connection) {
    let question = match timeout(QUESTION_LIMIT, read(&host)).await {
        Ok(Ok(question)) => question,
        Ok(Err(error)) => return log::debug!("a question was not understood: {error}"),
        Err(_) => return,
    };
    // SAFETY: the agent runs on one thread.
    match unsafe { clone_process(CloneOptions::default()) } {
        Ok(0) => {
            // SAFETY: takes a number; the signal's default is to end the process.
            unsafe { libc::alarm(ANSWER_LIMIT) };
            // SAFETY: takes numbers only. From here on the connection is this process's alone.
            let waiting = check(unsafe { libc::fcntl(host.fd().as_raw_fd(), libc::F_SETFL, 0) }.into());
            let answered = waiting.and_then(|_| answer(&question, &mut Host(&host)));
            exit_now(i32::from(answered.is_err()))
        }
        // The reaper collects it; the connection ends when it does.
        Ok(_) => {}
        Err(error) => log::warn!("a question can't be answered: {error}"),
    }
}

async fn read(host: &Connection) -> io::Result<String> {
    let mut question = Vec::new();
    let mut byte = [0];
    loop {
        host.read_exact(&mut byte).await?;
        match byte {
            [b'\n'] => break,
            _ if question.len() == MAX_QUESTION => return Err(io::ErrorKind::InvalidData.into()),
            [byte] => question.push(byte),
        }
    }
    String::from_utf8(question).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// The connection, written to as long as it takes.
struct Host<'a>(&'a Connection);

impl Write for Host<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: the bytes are readable for their whole length.
        let length =
            check(unsafe { libc::write(self.0.fd().as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) } as _)?;
        Ok(usize::try_from(length).unwrap_or_default())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn answer(question: &str, out: &mut impl Write) -> io::Result<()> {
    let (word, rest) = question.split_once(' ').unwrap_or((question, ""));
    match (word, rest) {
        ("ps", "") => processes(out),
        ("mounts", "") => show(out, &["/proc/self/mounts"]),
        ("network", "") => show(
            out,
            &[
                "/proc/net/dev",
                "/proc/net/fib_trie",
                "/proc/net/if_inet6",
                "/proc/net/route",
                "/proc/net/ipv6_route",
                "/proc/net/arp",
                "/proc/net/tcp",
                "/proc/net/tcp6",
                "/proc/net/udp",
                "/proc/net/udp6",
            ],
        ),
        ("memory", "") => show(
            out,
            &[
                "/proc/meminfo",
                "/proc/pressure/memory",
                "/proc/pressure/cpu",
                "/proc/pressure/io",
                "/proc/loadavg",
                "/proc/uptime",
            ],
        ),
        ("cgroups", "") => cgroups(out),
        ("dmesg", "") => kernel_log(out),
        ("version", "") => show(out, &["/proc/version", "/proc/cmdline"]),
        ("cat", path) => match own_file(Path::new(path)) {
            Some(file) => copy(&file, out),
            None => writeln!(out, "cat shows files below /proc, /sys and /etc, by their whole path"),
        },
        ("help", "") => out.write_all(HELP.as_bytes()),
        _ => write!(out, "{question:?} can't be answered; what can:\n{HELP}"),
    }
}

/// A file of the guest's own. Links in /proc/PID lead into containers: what they name is what counts.
fn own_file(path: &Path) -> Option<PathBuf> {
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return None;
    }
    let file = fs::canonicalize(path).ok()?;
    let is_own = ["/proc", "/sys", "/etc"]
        .iter()
        .any(|directory| path.starts_with(directory) && file.starts_with(directory));
    (is_own && file.is_file()).then_some(file)
}

fn copy(path: &Path, out: &mut impl Write) -> io::Result<()> {
    // Read whole pieces: some files of the kernel's give nothing sensible in small ones.
    let mut buffer = vec![0; 64 * 1024];
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) => return writeln!(out, "can't open {}: {error}", path.display()),
    };
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => out.write_all(buffer.get(..length).unwrap_or_default())?,
            Err(error) => return writeln!(out, "can't read {}: {error}", path.display()),
        }
    }
}

/// Several files, each under its name; what the kernel does not have is left out.
fn show(out: &mut impl Write, paths: &[&str]) -> io::Result<()> {
    for path in paths.iter().map(Path::new).filter(|path| path.exists()) {
        if paths.len() > 1 {
            writeln!(out, "== {}", path.display())?;
        }
        copy(path, out)?;
    }
    Ok(())
}

/// From `stat` only: other files of a process wait for its memory map, which the workload can hold.
fn processes(out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "{:>7} {:>7} S {:>9} NAME", "PID", "PPID", "RSS")?;
    let mut ids: Vec<u32> = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    ids.sort_unstable();
    for id in ids {
        let Ok(stat) = fs::read(format!("/proc/{id}/stat")) else { continue };
        let stat = String::from_utf8_lossy(&stat);
        // The name may have anything in it, parentheses included.
        let Some((start, rest)) = stat.rsplit_once(')') else { continue };
        let name = start.split_once('(').map_or("", |(_, name)| name);
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let field = |number: usize| fields.get(number).copied().unwrap_or("?");
        let resident = field(21).parse::<u64>().unwrap_or_default() * 4;
        writeln!(out, "{id:>7} {:>7} {} {resident:>9} {}", field(1), field(0), name.escape_default())?;
    }
    Ok(())
}

fn cgroups(out: &mut impl Write) -> io::Result<()> {
    let mut pending = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(directory) = pending.pop() {
        writeln!(out, "== {}", directory.display())?;
        for name in [
            "memory.current",
            "memory.max",
            "memory.events",
            "pids.current",
            "pids.max",
            "cpu.stat",
            "cpu.max",
        ] {
            if let Ok(text) = fs::read_to_string(directory.join(name)) {
                let lines: Vec<&str> = text.lines().collect();
                writeln!(out, "{name} {}", lines.join("; "))?;
            }
        }
        let below = fs::read_dir(&directory)?.flatten().map(|entry| entry.path());
        pending.extend(below.filter(|path| path.is_dir()));
    }
    Ok(())
}

fn kernel_log(out: &mut impl Write) -> io::Result<()> {
    /// `SYSLOG_ACTION_READ_ALL`.
    const READ_ALL: libc::c_int = 3;
    let mut buffer = vec![0_u8; 128 * 1024];
    // SAFETY: the buffer is writable for the length that is passed.
    let length = unsafe { libc::klogctl(READ_ALL, buffer.as_mut_ptr().cast(), buffer.len() as libc::c_int) };
    let length = check(length.into())?;
    out.write_all(buffer.get(..usize::try_from(length).unwrap_or_default()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(question: &str) -> String {
        let mut out = Vec::new();
        answer(question, &mut out).unwrap();
        String::from_utf8_lossy(&out).into_owned()
    }

    #[test]
    fn what_there_is_to_know_is_told() {
        assert!(answered("ps").lines().any(|line| line.trim_start().starts_with("1 ")));
        assert!(answered("mounts").contains(" /proc "));
        assert!(answered("network").contains("== /proc/net/dev"));
        assert!(answered("memory").contains("MemTotal"));
        assert!(answered("version").contains("Linux version"));
        assert!(answered("cat /proc/self/comm").len() > 1);
        assert!(answered("help").contains("dmesg"));
    }

    #[test]
    fn nothing_leads_out_of_the_guests_own_files() {
        for question in [
            "cat /root/x",
            "cat /proc/../root/x",
            "cat /proc/self/root/bin/sh",
            "cat /proc/self/exe",
            "cat /proc",
            "cat proc/self/comm",
            "cat ",
        ] {
            assert!(answered(question).starts_with("cat shows"), "{question}");
        }
        for question in ["", "rm -rf /", "ps aux", "sh"] {
            assert!(answered(question).contains("can't be answered"), "{question}");
        }
    }
}
