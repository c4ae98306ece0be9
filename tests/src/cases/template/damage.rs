//! Templates that are not as they were made: pods boot.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::thread;

use serde_json::Value;

use super::{BUILD_LIMIT, LOOK_EVERY, Templates, WORKING_SET};
use crate::cases::Environment;
use crate::failure::{Explain, Outcome};
use crate::process::{self, eventually};
use crate::shim::CALL_LIMIT;
use crate::{ensure, ensure_eq};

fn read(path: &Path) -> Outcome<Vec<u8>> {
    fs::read(path).explain(|| format!("read {}", path.display()))
}

fn write(path: &Path, bytes: &[u8]) -> Outcome {
    fs::write(path, bytes).explain(|| format!("write {}", path.display()))
}

pub(crate) fn damaged(environment: &mut Environment) -> Outcome<String> {
    let templates = Templates::with_default(environment, "")?;
    let template = templates.default();
    let state = template.join("state");
    let mut bytes = read(&state)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    write(&state, &bytes)?;
    templates.run_pod(environment, &[], "booted", Some("state does not have its digest"))?;
    templates.expect(1)?;
    templates.run_pod(environment, &[], "restored", None)?;

    let memory = template.join("memory");
    let file = File::options().write(true).open(&memory).explain(|| format!("open {}", memory.display()))?;
    file.set_len(1 << 20).explain(|| format!("truncate {}", memory.display()))?;
    drop(file);
    ensure!(templates.run("verify", &[]).is_err(), "verify found nothing wrong with a truncated memory file");
    templates.run_pod(environment, &[], "booted", Some("memory has 1048576 bytes"))?;
    // It takes its time, and has been seen once.
    templates.end_makers()?;
    ensure_eq!(templates.run("list", &[])?, "", "templates after the damaged one was found");
    Ok("a changed state and a truncated memory: one warning each, the pod booted, the template was made again".into())
}

/// A state that has its digest and makes no sense.
pub(crate) fn refused(environment: &mut Environment) -> Outcome<String> {
    let templates = Templates::with_default(environment, "")?;
    let template = templates.default();
    let (state, meta) = (template.join("state"), template.join("meta.json"));
    let mut bytes = read(&state)?;
    let middle = bytes.len() / 2;
    bytes[middle..].fill(0xff);
    write(&state, &bytes)?;
    let busybox = environment.layout.rootfs("busybox").join("bin/busybox");
    let mut sum = Command::new(busybox);
    let output =
        process::run(sum.arg("sha256sum").arg(&state), b"", CALL_LIMIT)?.success("sha256sum")?.stdout;
    let digest = output.split(' ').next().unwrap_or_default();
    let mut value: Value =
        serde_json::from_slice(&read(&meta)?).explain(|| format!("parse {}", meta.display()))?;
    value["state_sha256"] = digest.into();
    write(&meta, value.to_string().as_bytes())?;

    templates.run_pod(environment, &[], "booted", Some("can't be restored: the VMM refused"))?;
    templates.run_pod(environment, &[], "booted", Some("can't be restored on this host"))?;
    let list = templates.run("list", &[])?;
    ensure!(list.contains("refused: "), "the list does not say why: {list}");
    templates.expect(1)?;
    templates.build(&["--again"])?;
    templates.run_pod(environment, &[], "restored", None)?;
    Ok(list.split_once("refused: ").map_or("", |(_, reason)| reason).trim().to_owned())
}

/// Only the speed of pods depends on this file.
pub(crate) fn working_set(environment: &mut Environment) -> Outcome<String> {
    let templates = Templates::with_default(environment, "")?;
    let file = templates.default().join(WORKING_SET);
    let whole = read(&file)?;
    ensure!(
        !whole.is_empty() && whole.len().is_multiple_of(8),
        "{} bytes in {} after bulkhead template build",
        whole.len(),
        file.display()
    );
    let (_, with) = templates.run_pod(environment, &[], "restored", None)?;
    for garbage in [&whole[..7], &[0xff; 64]] {
        write(&file, garbage)?;
        templates.run_pod(environment, &[], "restored", Some("working set is of no use"))?;
    }
    // As a maker leaves it that is killed at the end.
    fs::remove_file(&file).explain(|| format!("remove {}", file.display()))?;
    let (_, without) = templates.run_pod(environment, &[], "restored", None)?;
    eventually("the working set is made in the background", BUILD_LIMIT, || {
        thread::sleep(LOOK_EVERY);
        ensure!(file.exists(), "{} is missing", file.display());
        Ok(())
    })?;
    templates.expect(1)?;
    ensure!(!read(&file)?.is_empty(), "the new working set is empty");
    templates.run_pod(environment, &[], "restored", None)?;
    Ok(format!(
        "{} bytes, agents answered after {with} us with them and {without} us without; damaged ones are ignored with a warning, \
         a missing one is made",
        whole.len(),
    ))
}
