//! What the benchmark reads of the node it runs on: processes, memory, versions.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A process of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    /// Its id.
    pub pid: u32,
    /// Its program's file name; for kernel threads, and programs that can't be looked at, what the kernel calls it.
    pub name: String,
    /// Its arguments, separated by blanks; empty for kernel threads.
    pub command_line: String,
}

/// The processes that run now, kernel threads included.
pub(crate) fn processes() -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let read = |file: &str| fs::read(entry.path().join(file)).ok();
            let command_line = read("cmdline")?
                .split(|byte| *byte == 0)
                .map(String::from_utf8_lossy)
                .collect::<Vec<_>>()
                .join(" ");
            let program = fs::read_link(entry.path().join("exe")).ok();
            let name = match program.as_deref().and_then(Path::file_name) {
                Some(name) => name.to_string_lossy().trim_end_matches(" (deleted)").to_owned(),
                None => String::from_utf8_lossy(&read("comm")?).trim_end().to_owned(),
            };
            Some(Process { pid, name, command_line })
        })
        .collect()
}

/// This process, its parent, its parent's parent and so on.
pub(crate) fn own_ancestry() -> Vec<u32> {
    let parent = |pid: &u32| -> Option<u32> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        value_of(&status, "PPid")?.try_into().ok().filter(|parent| *parent > 0)
    };
    std::iter::successors(Some(std::process::id()), parent).collect()
}

/// Memory that nobody else can have until its users give it back, in bytes: what is neither free nor page cache that can be
/// dropped. Pods pages shared through the page cache (programs, templates) do not count, their own pages do.
///
/// `None` if `/proc/meminfo` has not the lines that it should.
pub(crate) fn used_memory() -> Option<u64> {
    used_memory_of(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn used_memory_of(meminfo: &str) -> Option<u64> {
    let kib = |name: &str| value_of(meminfo, name);
    let cache = (kib("Cached")? + kib("Buffers")?).checked_sub(kib("Shmem")?)?;
    let free = kib("MemFree")? + cache + kib("SReclaimable")?;
    Some(kib("MemTotal")?.checked_sub(free)? * 1024)
}

/// A process's proportional set size in bytes: its own pages, and its share of those that it shares.
///
/// `None` when it has ended.
pub(crate) fn proportional_set_size(pid: u32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    Some(value_of(&rollup, "Pss")? * 1024)
}

/// Pages that a process shares with no other, in bytes.
///
/// `None` when it has ended.
pub(crate) fn unshared_memory(pid: u32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    Some((value_of(&rollup, "Private_Clean")? + value_of(&rollup, "Private_Dirty")?) * 1024)
}

/// Resident memory of a process in bytes, without its mappings of `excluded` bytes and more: for a VMM, its own memory without
/// the guest's. If a file is mapped in pieces that are as large together, all that lies from the first to the last of them is left out.
///
/// `None` when it has ended.
pub(crate) fn resident_without_large_mappings(pid: u32, excluded: u64) -> Option<u64> {
    Some(resident_of(&fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?, excluded))
}

struct Mapping<'a> {
    start: u64,
    end: u64,
    inode: &'a str,
    resident: u64,
}

fn resident_of(smaps: &str, excluded: u64) -> u64 {
    let mappings = mappings_of(smaps);
    let mut files: BTreeMap<&str, (u64, u64, u64)> = BTreeMap::new();
    for mapping in mappings.iter().filter(|mapping| mapping.inode != "0") {
        let (first, last, size) = files.entry(mapping.inode).or_insert((mapping.start, mapping.end, 0));
        (*first, *last) = ((*first).min(mapping.start), (*last).max(mapping.end));
        *size += mapping.end - mapping.start;
    }
    let is_large = |mapping: &&Mapping<'_>| {
        let within = |(first, last, size): &(u64, u64, u64)| {
            *size >= excluded && mapping.start >= *first && mapping.end <= *last
        };
        mapping.end - mapping.start >= excluded || files.values().any(within)
    };
    mappings.iter().filter(|mapping| !is_large(mapping)).map(|mapping| mapping.resident).sum()
}

fn mappings_of(smaps: &str) -> Vec<Mapping<'_>> {
    let address = |text| u64::from_str_radix(text, 16).ok();
    let mut mappings: Vec<Mapping<'_>> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let range = words.next().and_then(|range| range.split_once('-'));
        if let Some((start, end)) = range
            && let (Some(start), Some(end), Some(inode)) = (address(start), address(end), words.nth(3))
        {
            mappings.push(Mapping { start, end, inode, resident: 0 });
        } else if let (Some(kib), Some(mapping)) = (value_of(line, "Rss"), mappings.last_mut()) {
            mapping.resident = kib * 1024;
        }
    }
    mappings
}

/// The number in the line `NAME: NUMBER ...`.
fn value_of(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
}

/// Where a part is that was installed beside us, as `PREFIX/PLACE`.
pub(crate) fn installed(place: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    own.parent().and_then(Path::parent).unwrap_or(Path::new("/")).join(place)
}

/// Where a program is, by the PATH.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|program| program.is_file())
}

/// The first line that a program prints with `arguments`.
pub fn first_line_of(program: &Path, arguments: &[&str]) -> Option<String> {
    let output = std::process::Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(|line| line.trim().to_owned())
}

/// The options that the control groups' file system is mounted with; empty without one of version 2.
pub fn cgroup_options() -> String {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let options = mounts.lines().find_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        (words.get(2) == Some(&"cgroup2")).then(|| words.get(3).copied().unwrap_or_default().to_owned())
    });
    options.unwrap_or_default()
}

/// The kernel's release.
pub fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

/// The CPU's model name and how many there are.
pub fn cpus() -> (String, usize) {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let models: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map(|(_, model)| model.trim())
        .collect();
    (models.first().map_or("unknown", |model| *model).to_owned(), models.len())
}

/// The node's memory in bytes.
pub fn total_memory() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    value_of(&meminfo, "MemTotal").unwrap_or_default() * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal: 1000 kB\nMemFree: 300 kB\nBuffers: 10 kB\nCached: 200 kB\nShmem: 50 kB\n\
                           SReclaimable: 40 kB\n";

    #[test]
    fn used_memory_leaves_out_what_can_be_dropped() {
        // Shared memory is in Cached, but cannot be dropped.
        assert_eq!(used_memory_of(MEMINFO), Some((1000 - 300 - 10 - 150 - 40) * 1024));
        assert_eq!(used_memory_of("MemTotal: 1000 kB\n"), None);
        assert!(used_memory().unwrap() < total_memory());
    }

    #[test]
    fn our_own_process_is_there() {
        let own = processes().into_iter().find(|process| process.pid == std::process::id()).unwrap();
        assert!(!own.command_line.is_empty());
        assert!(proportional_set_size(own.pid).unwrap() > 0);
        assert!(unshared_memory(own.pid).unwrap() > 0);
        assert!(resident_without_large_mappings(own.pid, u64::MAX).unwrap() > 0);
        assert_eq!(resident_without_large_mappings(own.pid, 0), Some(0));
    }

    #[test]
    fn our_ancestry_begins_with_us_and_leads_up() {
        let ancestry = own_ancestry();
        assert_eq!(ancestry[0], std::process::id());
        assert_eq!(ancestry[1], std::os::unix::process::parent_id());
    }

    #[test]
    fn large_mappings_are_left_out() {
        let anonymous =
            "00000-40000 rw-p 0 00:00 0\nRss:    100 kB\n40000-42000 rw-p 0 00:00 0\nRss:   4 kB\n";
        assert_eq!(resident_of(anonymous, 256 * 1024), 4 * 1024);
        assert_eq!(resident_of(anonymous, 1 << 30), 104 * 1024);
        // A file in two pieces, something else between them, and something after them.
        let pieces = "10000-30000 rw-p 0 00:05 7 /memory\nRss: 1 kB\n30000-31000 rw-p 0 00:00 0\nRss: 2 kB\n\
                      31000-51000 rw-p 0 00:05 7 /memory\nRss: 4 kB\n51000-52000 rw-p 0 00:05 8 /lib\nRss: 8 kB\n";
        assert_eq!(resident_of(pieces, 256 * 1024), 8 * 1024);
        assert_eq!(resident_of(pieces, 1 << 30), 15 * 1024);
    }

    #[test]
    fn programs_are_found_by_the_path() {
        assert!(find_program("sh").unwrap().ends_with("sh"));
        assert_eq!(find_program("no-such-program-here"), None);
    }
}
