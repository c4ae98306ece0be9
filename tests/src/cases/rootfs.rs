//! The root file system and bind mounts: what the container sees of the host's files, and the host of the container's writes.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use super::{Case, Environment};
use crate::bundle;
use crate::failure::{Explain, Outcome};
use crate::{ensure, ensure_eq};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("rootfs-writes-land-in-the-snapshot", writes_land),
    Case::new("rootfs-file-operations", file_operations),
    Case::new("cold-rootfs-file-operations", file_operations).cold(),
    Case::new("rootfs-bind-mounts", bind_mounts),
    Case::new("rootfs-bind-mount-of-nothing-is-refused", bind_of_nothing),
];

fn writes_land(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("writes");
    let script = "echo new >/new; echo more >>/etc/group; rm /etc/passwd; mkdir /d; echo x >/d/f; chmod 640 /d/f; chown 1000:1001 /d/f; ln -s /new /l";
    let spec = bundle::spec(&id, bundle::shell(script));
    let container = environment.created(&id, &spec, crate::stdio::Streams::default())?;
    container.shim.start("")?;
    ensure_eq!(container.shim.wait("", crate::shim::CALL_LIMIT)?.exit_status, 0, "exit status");
    container.shim.delete("")?;
    let upper = container.bundle.upper.clone();
    let read =
        |name: &str| fs::read_to_string(upper.join(name)).explain(|| format!("{name} in the snapshot"));
    ensure_eq!(read("new")?, "new\n", "/new");
    ensure!(read("etc/group")?.ends_with("more\n"), "the change of /etc/group is not in the snapshot");
    ensure_eq!(read("d/f")?, "x\n", "/d/f");
    let metadata = fs::metadata(upper.join("d/f")).explain(|| "/d/f".into())?;
    ensure_eq!(
        (metadata.uid(), metadata.gid(), metadata.permissions().mode() & 0o777),
        (1000, 1001, 0o640),
        "owner and mode of /d/f"
    );
    let whiteout =
        fs::symlink_metadata(upper.join("etc/passwd")).explain(|| "whiteout of /etc/passwd".into())?;
    ensure!(whiteout.file_type().is_char_device(), "the removed file has no whiteout in the snapshot");
    ensure_eq!(
        fs::read_link(upper.join("l")).explain(|| "/l".into())?.display().to_string(),
        "/new",
        "the symbolic link"
    );
    container.release()?;
    Ok("new, changed and removed files, owners, modes and links".into())
}

pub(super) fn file_operations(environment: &mut Environment) -> Outcome<String> {
    let script = "set -e; mkdir /w; cd /w; dd if=/dev/urandom of=a bs=64k count=16 2>/dev/null; cp a b; cmp a b; \
                  ln a c; [ $(stat -c %h a) = 2 ]; mv b e; [ ! -e b ]; truncate -s 100 e; [ $(stat -c %s e) = 100 ]; \
                  for i in $(seq 1 200); do echo $i >f$i; done; [ $(ls | wc -l) = 203 ]; rm f*; \
                  mkfifo p; [ -p p ]; (echo through >p &); [ \"$(cat p)\" = through ]; touch -d @1000000000 a; [ $(stat -c %Y a) = 1000000000 ]; \
                  exec 3>held; rm held; echo x >&3; exec 3>&-; cd /; rm -r /w; [ ! -e /w ]; df / >/dev/null; /bin/echo exec";
    let output = environment.run_script("files", script)?.success()?;
    ensure_eq!(output, "exec\n", "file operations");
    Ok("1 MiB copied and compared; links, rename, truncate, 200 files, FIFO, times, removed while open, exec"
        .into())
}

fn bind_mounts(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("binds");
    let host = environment.host()?.path().join(&id);
    for directory in ["rw", "ro/sub"] {
        fs::create_dir_all(host.join(directory)).explain(|| directory.into())?;
    }
    for (file, text) in [("rw/given", "from the host"), ("ro/sub/file", "read only"), ("single", "one file")]
    {
        fs::write(host.join(file), text).explain(|| file.into())?;
    }
    let script = "cat /data/given; echo; echo back >/data/answer; cat /fixed/sub/file; echo; touch /fixed/x 2>&1; cat /etc/single; echo; \
                  echo changed >/etc/single; echo no 2>/dev/null >/etc/locked || echo locked";
    let mut spec = bundle::spec(&id, bundle::shell(script));
    bundle::add(&mut spec["mounts"], bundle::bind(&host.join("rw"), "/data", &["rbind", "rw"]));
    bundle::add(&mut spec["mounts"], bundle::bind(&host.join("ro"), "/fixed", &["rbind", "ro"]));
    bundle::add(&mut spec["mounts"], bundle::bind(&host.join("single"), "/etc/single", &["bind", "rw"]));
    bundle::add(&mut spec["mounts"], bundle::bind(&host.join("ro/sub/file"), "/etc/locked", &["bind", "ro"]));
    let ended = environment.run_to_end(&id, &spec)?;
    let read = |name: &str| fs::read_to_string(host.join(name)).explain(|| format!("{name} on the host"));
    let lines: Vec<&str> = ended.stdout.lines().collect();
    ensure_eq!(
        lines,
        ["from the host", "read only", "touch: /fixed/x: Read-only file system", "one file", "locked"],
        "what the container printed; stderr {:?}",
        ended.stderr
    );
    ensure_eq!(read("rw/answer")?, "back\n", "the file that the container made");
    ensure_eq!(read("single")?, "changed\n", "the single file");
    ensure_eq!(read("ro/sub/file")?, "read only", "the read-only file");
    fs::remove_dir_all(&host).explain(|| "remove the bind mounts' sources".into())?;
    Ok("directory and file, each writable and read-only".into())
}

fn bind_of_nothing(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("nothing");
    let mut spec = bundle::spec(&id, bundle::shell("true"));
    bundle::add(&mut spec["mounts"], bundle::bind("/no/such/source".as_ref(), "/data", &["rbind", "ro"]));
    let host = environment.host()?;
    let bundle = host.bundle(&id, &spec)?;
    let shim = host.start(&bundle)?;
    let stdio = shim.stdio("init", crate::stdio::Streams::default())?;
    let Err(error) = shim.create(&stdio, crate::shim::CreateOptions::default()) else {
        crate::fail!("a bind mount of nothing was created")
    };
    ensure!(error.message.contains("/no/such/source"), "the error does not name the source: {error}");
    super::Container { bundle, shim, stdio }.release()?;
    Ok(error.message)
}
