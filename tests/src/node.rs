//! What the node's kernel says about processes, mounts, devices and control groups.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::ensure;
use crate::failure::{Explain, Outcome};
use crate::process::eventually;

/// One process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// Parent's process id.
    pub parent: i32,
    /// State letter of `/proc/PID/stat`; `Z` is a zombie.
    pub state: char,
    /// Start time in clock ticks since boot: with the id it names a process for good.
    pub started: u64,
    /// The program's name as the kernel has it, at most 15 bytes.
    pub name: String,
    /// Arguments, joined by spaces; empty for kernel threads and zombies.
    pub command: String,
}

/// Whether the node runs this version of Linux or a later one.
///
/// # Errors
/// When the kernel's release does not begin with two numbers.
pub(crate) fn kernel_is_at_least(major: u32, minor: u32) -> Outcome<bool> {
    let release =
        fs::read_to_string("/proc/sys/kernel/osrelease").explain(|| "the kernel's release".into())?;
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    let version = numbers.next().zip(numbers.next()).explain(|| format!("the kernel's release {release}"))?;
    Ok(version >= (major, minor))
}

/// Every process that is not a kernel thread.
pub(crate) fn processes() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| process(entry.file_name().to_str()?.parse().ok()?))
        .filter(|process| process.pid != 2 && process.parent != 2)
        .collect()
}

/// One process, unless it is gone.
pub(crate) fn process(pid: i32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(Process {
        pid,
        parent: fields.get(1)?.parse().ok()?,
        state: fields.first()?.chars().next()?,
        started: fields.get(19)?.parse().ok()?,
        name: name.to_owned(),
        command: String::from_utf8_lossy(&command).replace('\0', " ").trim_end().to_owned(),
    })
}

/// The processes below `ancestor`, children and children's children, whose name (cut to 15 bytes as the kernel does) is `name`.
pub fn descendants(ancestor: i32, name: &str) -> Vec<Process> {
    let all: BTreeMap<i32, Process> = processes().into_iter().map(|process| (process.pid, process)).collect();
    let below = |process: &Process| {
        let mut parent = process.parent;
        while parent > 1 && parent != ancestor {
            parent = all.get(&parent).map_or(0, |process| process.parent);
        }
        parent == ancestor
    };
    let name: String = name.chars().take(15).collect();
    all.values()
        .filter(|process| process.name == name && process.state != 'Z' && below(process))
        .cloned()
        .collect()
}

/// The shims that the containerd with a socket started for a container.
pub fn shims(address: &str, container: &str) -> Vec<Process> {
    let id = format!(" -id {container} ");
    let ours = |command: &str| command.contains(address) && format!("{command} ").contains(&id);
    processes().into_iter().filter(|process| ours(&process.command)).collect()
}

/// Shims' processes that make a template.
pub(crate) fn template_makers() -> Vec<Process> {
    processes()
        .into_iter()
        .filter(|process| process.state != 'Z' && makes_template(&process.command))
        .collect()
}

/// Whether a process with these arguments makes a template.
pub(crate) fn makes_template(command: &str) -> bool {
    command.ends_with(" make-template")
}

/// Sends SIGKILL.
///
/// # Errors
/// When there is no such process.
pub(crate) fn kill_hard(pid: i32) -> Outcome {
    kill(Pid::from_raw(pid), Signal::SIGKILL).explain(|| format!("kill process {pid}"))
}

/// Waits until a process is over; a parent that takes no notice of it is no matter.
///
/// # Errors
/// When it is there at the end of the limit.
pub(crate) fn wait_for_end(what: &str, pid: i32, limit: Duration) -> Outcome {
    eventually(&format!("{what} ends"), limit, || {
        ensure!(process(pid).is_none_or(|process| process.state == 'Z'), "process {pid} is still there");
        Ok(())
    })
}

/// Where something is mounted, in mount order.
pub(crate) fn mount_points() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|path| PathBuf::from(unescape(path)))
        .collect()
}

/// The kernel writes blanks and the like in octal.
fn unescape(path: &str) -> String {
    path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// Network interfaces of this network namespace. (`/sys/class/net` has those of the namespace that it was mounted in.)
pub(crate) fn interfaces() -> Vec<String> {
    let table = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    table.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect()
}

/// Paths of bound Unix sockets, abstract ones with an `@`.
pub(crate) fn unix_sockets() -> Vec<String> {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(7)).map(str::to_owned).collect()
}

/// Every control group below the mount point, version 2 or, on a hybrid node, of every hierarchy.
pub(crate) fn control_groups() -> Vec<PathBuf> {
    let mut groups = Vec::new();
    let mut pending = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(directory) = pending.pop() {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        let below = entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path());
        pending.extend(below);
        groups.push(directory);
    }
    groups
}

/// Removes a control group of the top level, and empty ones in it, from every hierarchy.
pub(crate) fn remove_control_group(name: &str) {
    let mut groups = control_groups();
    groups.retain(|path| path.iter().any(|part| part == name));
    for group in groups.iter().rev() {
        let _ = fs::remove_dir(group);
    }
}

/// Every file and directory below a directory, without crossing into what is mounted there.
pub(crate) fn tree(directory: &Path) -> Vec<PathBuf> {
    let mounts = mount_points();
    let mut found = Vec::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !mounts.contains(&path) {
                pending.push(path.clone());
            }
            found.push(path);
        }
    }
    found
}

/// Resident memory of a process without its largest mapping, bytes: for a VMM, without guest memory. If a file is mapped there
/// in pieces, all that lies from the first to the last of them belongs to it.
///
/// # Errors
/// When it is gone.
pub fn resident_but_largest_mapping(pid: i32) -> Outcome<u64> {
    let path = format!("/proc/{pid}/smaps");
    let smaps = fs::read_to_string(&path).explain(|| format!("read {path}"))?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    // Start, end, inode, resident KiB.
    let mut mappings: Vec<(u64, u64, &str, u64)> = Vec::new();
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let Some((start, end)) = words.first().and_then(|range| range.split_once('-'))
            && let (Some(start), Some(end), Some(inode)) = (address(start), address(end), words.get(4))
        {
            mappings.push((start, end, inode, 0));
        } else if let (["Rss:", kib, "kB"], Some(mapping)) = (words.as_slice(), mappings.last_mut()) {
            mapping.3 = kib.parse().unwrap_or(0);
        }
    }
    let size = |inode: &str| -> u64 {
        mappings.iter().filter(|mapping| mapping.2 == inode).map(|mapping| mapping.1 - mapping.0).sum()
    };
    let largest = mappings.iter().max_by_key(|(start, end, ..)| end - start).copied();
    let (start, end, ..) = largest.explain(|| format!("{path} is empty"))?;
    let files = mappings.iter().map(|mapping| mapping.2).filter(|inode| *inode != "0");
    let file = files.max_by_key(|inode| size(inode)).unwrap_or("0");
    let pieces = mappings.iter().filter(|mapping| mapping.2 == file && file != "0");
    let first = pieces.clone().map(|piece| piece.0).min().unwrap_or(start).min(start);
    let last = pieces.map(|piece| piece.1).max().unwrap_or(end).max(end);
    let own = mappings.iter().filter(|mapping| mapping.1 <= first || mapping.0 >= last);
    Ok(own.map(|mapping| mapping.3).sum::<u64>() * 1024)
}

/// Time since boot: in the nested host, the virtual time.
pub(crate) fn uptime() -> Duration {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split(' ').next().and_then(|seconds| seconds.parse().ok()).unwrap_or(0.0);
    Duration::from_secs_f64(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found_and_named() {
        let pid = std::process::id() as i32;
        let own = processes().into_iter().find(|process| process.pid == pid).unwrap();
        assert!(own.command.contains("bulkhead") && own.started > 0, "{own:?}");
        assert!(resident_but_largest_mapping(pid).unwrap() > 0);
    }

    #[test]
    fn a_child_is_a_descendant() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let found = descendants(std::process::id() as i32, "sleep");
        kill_hard(child.id() as i32).unwrap();
        child.wait().unwrap();
        assert!(found.iter().any(|process| process.pid == child.id() as i32), "{found:?}");
    }

    #[test]
    fn the_root_is_a_mount_point() {
        assert!(mount_points().contains(&PathBuf::from("/")));
        assert_eq!(unescape(r"/a\040b\134c"), r"/a b\c");
    }
}
