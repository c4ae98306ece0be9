//! What the node itself says before and after an attempt. Whether something got out is read off these facts alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::libc::O_NONBLOCK;
use nix::mount::{MntFlags, umount2};

use crate::node;

/// Settings that change by themselves, or say who asks.
const MOVING: [&str; 17] = [
    "fs/aio-nr",
    "fs/binfmt_misc",
    "fs/dentry-state",
    "fs/file-nr",
    "fs/inode-nr",
    "fs/inode-state",
    "fs/quota",
    "kernel/ns_last_pid",
    "kernel/perf_event_max_sample_rate",
    "kernel/pty/nr",
    "kernel/random",
    "net/ipv4/conf",
    "net/ipv4/neigh",
    "net/ipv6/conf",
    "net/ipv6/neigh",
    "net/netfilter/nf_conntrack_count",
    "vm/stat_refresh",
];

/// Settings outside of `/proc/sys` by which whoever writes them has the node.
const SETTINGS: [&str; 7] = [
    "/sys/kernel/uevent_helper",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/kernel/mm/ksm/run",
    "/sys/module/kernel/parameters/panic",
    "/sys/power/image_size",
    "/sys/kernel/kexec_loaded",
    "/sys/kernel/kexec_crash_loaded",
];

/// Words in the node's kernel log that no attempt may cause. ("BUG:" and the like come with a stack.)
const ALARMS: [&str; 9] = [
    "BUG:",
    "WARNING:",
    "Oops",
    "general protection",
    "kernel panic",
    "soft lockup",
    "unregister_netdevice: waiting",
    "Out of memory",
    "I/O error",
];

/// Where facts are read.
#[derive(Debug, Clone)]
pub(crate) struct Watch {
    /// The program in the place of `modprobe` writes a line here for each request of the kernel.
    pub module_log: PathBuf,
    /// Host directories that no pod has been given: each file with its owner, mode and content.
    pub outside: Vec<PathBuf>,
}

/// The node's state.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    modules: BTreeSet<String>,
    requests: Vec<String>,
    mounts: BTreeSet<String>,
    settings: BTreeMap<PathBuf, String>,
    formats: BTreeSet<String>,
    files: BTreeMap<PathBuf, String>,
    alarms: Vec<String>,
    groups: BTreeSet<String>,
    loops: BTreeSet<String>,
    hostname: String,
    clock_offset: i64,
}

impl Facts {
    /// Reads all of it.
    pub(crate) fn take(watch: &Watch) -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let mut settings = BTreeMap::new();
        read_settings(Path::new("/proc/sys"), &mut settings);
        for path in SETTINGS {
            if let Ok(value) = fs::read_to_string(path) {
                settings.insert(path.into(), value);
            }
        }
        let mut files = BTreeMap::new();
        for directory in &watch.outside {
            files.insert(directory.clone(), describe(directory));
            files.extend(node::tree(directory).into_iter().map(|path| (path.clone(), describe(&path))));
        }
        Self {
            modules: text("/proc/modules")
                .lines()
                .filter_map(|line| Some(line.split_once(' ')?.0.to_owned()))
                .collect(),
            requests: fs::read_to_string(&watch.module_log)
                .unwrap_or_default()
                .lines()
                .map(str::to_owned)
                .collect(),
            mounts: text("/proc/1/mountinfo")
                .lines()
                // Pods' own mounts are in bundles and in the shims' directories; what stays there is a leak, not a breach.
                .filter(|line| !["/bundles/", "/run/bulkhead"].iter().any(|own| line.contains(own)))
                .map(|line| line.split(' ').skip(3).take(3).collect::<Vec<_>>().join(" "))
                .collect(),
            settings,
            formats: names("/proc/sys/fs/binfmt_misc"),
            files,
            alarms: alarms(),
            groups: names("/sys/fs/cgroup").into_iter().filter(|name| !name.contains('.')).collect(),
            loops: names("/sys/block").into_iter().filter(|name| is_bound(name)).collect(),
            hostname: text("/proc/sys/kernel/hostname"),
            clock_offset: clock_offset(),
        }
    }

    /// What differs in `after`, a line for each thing.
    pub(crate) fn breaches(&self, after: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let new = |before: &BTreeSet<String>, after: &BTreeSet<String>| -> Vec<String> {
            after.difference(before).cloned().collect()
        };
        let loaded = new(&self.modules, &after.modules);
        if !loaded.is_empty() {
            found.push(format!("loaded on the host: {}", loaded.join(" ")));
        }
        let unloaded = new(&after.modules, &self.modules);
        if !unloaded.is_empty() {
            found.push(format!("unloaded on the host: {}", unloaded.join(" ")));
        }
        let asked: Vec<&str> =
            after.requests.iter().skip(self.requests.len()).map(|line| asked_for(line)).collect();
        if !asked.is_empty() {
            let some: Vec<&str> = asked.iter().copied().take(4).collect();
            found.push(format!("the host's kernel asked modprobe for {}: {} …", asked.len(), some.join(" ")));
        }
        found.extend(new(&self.mounts, &after.mounts).iter().map(|mount| format!("mounted: {mount}")));
        found.extend(new(&after.mounts, &self.mounts).iter().map(|mount| format!("unmounted: {mount}")));
        found.extend(new(&self.formats, &after.formats).iter().map(|name| format!("binary format {name}")));
        found.extend(new(&self.groups, &after.groups).iter().map(|name| format!("control group {name}")));
        found.extend(new(&self.loops, &after.loops).iter().map(|name| format!("bound on the host: {name}")));
        found.extend(changed("setting", &self.settings, &after.settings));
        found.extend(changed("file", &self.files, &after.files));
        let alarms = after.alarms.iter().filter(|alarm| !self.alarms.contains(alarm));
        found.extend(alarms.map(|alarm| format!("kernel log: {alarm}")));
        if self.hostname != after.hostname {
            found.push(format!("the host's name is {}", after.hostname.trim()));
        }
        if (self.clock_offset - after.clock_offset).abs() > 5 {
            found.push("the host's clock was set".into());
        }
        found
    }

    /// Brings back what an attempt changed, as far as that can be done, for the next one.
    pub(crate) fn restore(&self, after: &Self) {
        for (path, value) in &self.settings {
            if after.settings.get(path) != Some(value) {
                let _ = fs::write(path, value);
            }
        }
        for name in after.formats.difference(&self.formats) {
            let _ = fs::write(Path::new("/proc/sys/fs/binfmt_misc").join(name), "-1");
        }
        for name in after.groups.difference(&self.groups) {
            let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(name));
        }
        for name in after.loops.difference(&self.loops) {
            let _ = Command::new("losetup").arg("-d").arg(Path::new("/dev").join(name)).output();
        }
        for mount in after.mounts.difference(&self.mounts) {
            if let Some(target) = mount.split(' ').nth(1) {
                let _ = umount2(target, MntFlags::MNT_DETACH);
            }
        }
        for path in after.files.keys().rev().filter(|path| !self.files.contains_key(*path)) {
            let _ = fs::remove_file(path).or_else(|_| fs::remove_dir_all(path));
        }
        // Modules that others need go last.
        for _ in 0..3 {
            for name in after.modules.difference(&self.modules) {
                let _ = Command::new("rmmod").arg(name).output();
            }
        }
    }
}

fn names(directory: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Whether a loop device has a file.
fn is_bound(name: &str) -> bool {
    Path::new("/sys/block").join(name).join("loop/backing_file").exists()
}

fn changed(kind: &str, before: &BTreeMap<PathBuf, String>, after: &BTreeMap<PathBuf, String>) -> Vec<String> {
    let mut found = Vec::new();
    for (path, value) in before {
        match after.get(path) {
            None => found.push(format!("{kind} {} is gone", path.display())),
            Some(now) if now != value => {
                found.push(format!("{kind} {} is {:?}, was {:?}", path.display(), now.trim(), value.trim()));
            }
            Some(_) => {}
        }
    }
    let new = after.keys().filter(|path| !before.contains_key(*path));
    // A module brings settings of its own: told by the module.
    found.extend(new.filter(|_| kind == "file").map(|path| format!("{kind} {} is new", path.display())));
    found
}

/// `-q -- NAME` is how the kernel asks.
fn asked_for(line: &str) -> &str {
    line.rsplit(' ').next().unwrap_or(line)
}

fn read_settings(directory: &Path, found: &mut BTreeMap<PathBuf, String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = path.strip_prefix("/proc/sys").unwrap_or(&path);
        if MOVING.iter().any(|moving| name.starts_with(moving)) {
            continue;
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            read_settings(&path, found);
        } else if let Ok(value) = fs::read_to_string(&path) {
            found.insert(path, value);
        }
    }
}

/// Type, mode, owner, links, size and content of a file in one line.
fn describe(path: &Path) -> String {
    let Ok(status) = fs::symlink_metadata(path) else { return "gone".into() };
    let content = match status.is_file() && status.size() <= 1 << 16 {
        true => fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default(),
        false if status.is_file() => format!("{} bytes of {}", status.size(), status.mtime()),
        false => String::new(),
    };
    let links = if status.is_dir() { 0 } else { status.nlink() };
    format!("{:o} {}:{} {links} {content}", status.mode(), status.uid(), status.gid())
}

/// Lines of the kernel's log that say that something went wrong.
fn alarms() -> Vec<String> {
    let Ok(mut file) = fs::OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open("/dev/kmsg") else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let mut record = [0; 8192];
    // A record overwritten meanwhile is an error; the next one is there.
    loop {
        match file.read(&mut record) {
            Ok(0) => break,
            Ok(length) => {
                let line = String::from_utf8_lossy(&record[..length]);
                if ALARMS.iter().any(|alarm| line.contains(alarm)) {
                    found.push(line.lines().next().unwrap_or_default().to_owned());
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            Err(_) => break,
        }
    }
    found
}

/// Wall clock minus time since boot, seconds.
fn clock_offset() -> i64 {
    let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    wall.as_secs().cast_signed() - node::uptime().as_secs().cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cleanup::WorkDir;

    fn watch(directory: &Path) -> Watch {
        Watch { module_log: directory.join("log"), outside: vec![directory.join("outside")] }
    }

    /// Other things may happen on this machine meanwhile.
    fn of_files(breaches: Vec<String>) -> Vec<String> {
        breaches.into_iter().filter(|breach| breach.contains("outside")).collect()
    }

    #[test]
    fn what_changes_is_a_breach() {
        let directory = WorkDir::new("facts").unwrap();
        let outside = directory.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "a").unwrap();
        fs::write(outside.join("gone"), "a").unwrap();
        let watch = watch(directory.path());
        let before = Facts::take(&watch);
        assert_eq!(of_files(before.breaches(&Facts::take(&watch))), Vec::<String>::new());

        fs::write(outside.join("kept"), "b").unwrap();
        fs::remove_file(outside.join("gone")).unwrap();
        fs::write(outside.join("new"), "").unwrap();
        fs::write(&watch.module_log, "-q -- net-pf-9\n").unwrap();
        let mut after = Facts::take(&watch);
        after.modules.insert("rose".into());
        after.formats.insert("x".into());
        let breaches = before.breaches(&after).join("\n");
        for part in
            ["kept is", "gone is gone", "new is new", "modprobe for 1: net-pf-9", "host: rose", "format x"]
        {
            assert!(breaches.contains(part), "{part} in {breaches}");
        }
    }

    #[test]
    fn files_that_appeared_are_removed() {
        let directory = WorkDir::new("facts").unwrap();
        let outside = directory.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let watch = watch(directory.path());
        let before = Facts::take(&watch);
        fs::create_dir(outside.join("d")).unwrap();
        fs::write(outside.join("d/new"), "").unwrap();
        before.restore(&Facts::take(&watch));
        assert_eq!(of_files(before.breaches(&Facts::take(&watch))), Vec::<String>::new());
    }
}
