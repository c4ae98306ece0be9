//! How templates come to be, and go.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::Duration;

use super::{BUILD_LIMIT, SCRIPT, Templates, WORKING_SET, ended};
use crate::cases::{Container, Environment};
use crate::cleanup::WorkDir;
use crate::failure::{Explain, Outcome};
use crate::node::{self, Process};
use crate::process::eventually;
use crate::shim::CALL_LIMIT;
use crate::{ensure, ensure_eq, fail};

/// A maker's VMM has to be gone this soon after it.
const ORPHAN_LIMIT: Duration = Duration::from_secs(1);

pub(crate) fn first_use(environment: &mut Environment) -> Outcome<String> {
    let templates = Templates::new(environment, "")?;
    let half = templates.store().join(".new-1-0");
    fs::create_dir(&half).explain(|| format!("make {}", half.display()))?;
    fs::write(half.join("memory"), "half").explain(|| "write half a template".into())?;
    let (_, booted) = templates.run_pod(environment, &[], "booted", None)?;
    templates.expect(1)?;
    let (_, restored) = templates.run_pod(environment, &[], "restored", None)?;
    ensure!(restored < booted, "restored after {restored} us, booted after {booted} us");
    Ok(format!(
        "half a template was ignored and removed; booted in {booted} us, then restored in {restored} us"
    ))
}

pub(crate) fn concurrent_first_use(environment: &mut Environment) -> Outcome<String> {
    const PODS: usize = 3;
    let templates = Templates::new(environment, "memory = \"128Mi\"\n")?;
    let environment = &*environment;
    let at_once = |how: &str| -> Outcome<Vec<u64>> {
        let pods: Vec<Outcome<Container>> = thread::scope(|scope| {
            let start = || templates.pod(environment, SCRIPT, &[]);
            let starting: Vec<_> = (0..PODS).map(|_| scope.spawn(start)).collect();
            starting.into_iter().map(|thread| thread.join().unwrap_or_else(|_| fail!("a panic"))).collect()
        });
        let pods: Vec<Container> = pods.into_iter().collect::<Outcome<_>>()?;
        pods.into_iter().map(|pod| Ok(ended(pod, how, None)?.1)).collect()
    };
    let booted = at_once("booted")?;
    templates.expect(1)?;
    let restored = at_once("restored")?;
    templates.expect(1)?;
    Ok(format!(
        "{PODS} pods booted in {booted:?} us, one template was made, {PODS} restored in {restored:?} us"
    ))
}

/// Waits until the store has a directory whose name begins in a way and the maker has processes with a name, and kills it;
/// returns all its processes.
fn kill_maker_with(templates: &Templates, directory: &str, name: &str) -> Outcome<Vec<Process>> {
    // Cheaper to look for, so the maker is not held up, and the moment is not missed.
    eventually("a maker is at work", BUILD_LIMIT, || {
        let names = templates.names();
        ensure!(names.iter().any(|name| name.starts_with(directory)), "the store has {names:?}");
        Ok(())
    })?;
    eventually(&format!("a maker with a {name}"), BUILD_LIMIT, || {
        let makers = node::template_makers();
        let [maker] = makers.as_slice() else { fail!("makers {makers:?}") };
        let found = node::descendants(maker.pid, name);
        ensure!(!found.is_empty(), "no {name} below the maker");
        let vmms = node::descendants(maker.pid, "bulkhead-vmm");
        node::kill_hard(maker.pid)?;
        Ok([found, vmms, vec![maker.clone()]].concat())
    })
}

pub(crate) fn killed_maker(environment: &mut Environment) -> Outcome<String> {
    let templates = Templates::new(environment, "")?;
    let mut evidence = Vec::new();
    // The first of them is booting the template, the second has published it and rehearses a pod.
    let key = templates.default().file_name().unwrap_or_default().to_string_lossy().into_owned();
    for (directory, helper, made) in [(".new-", "bulkhead-vmm", 0), (&key, "bulkhead-fs", 1)] {
        let pod = templates.pod(environment, "echo up; read go", &[])?;
        pod.shim.expect_started("booted")?;
        let processes = kill_maker_with(&templates, directory, helper)?;
        eventually("what a killed maker had started is gone", ORPHAN_LIMIT, || {
            let gone = |process: &Process| {
                node::process(process.pid)
                    .is_none_or(|now| now.started != process.started || now.state == 'Z')
            };
            let left: Vec<&Process> = processes.iter().filter(|process| !gone(process)).collect();
            ensure!(left.is_empty(), "still there: {left:?}");
            Ok(())
        })?;
        pod.shim.log.until("no template could be made: its maker ended early", CALL_LIMIT)?;
        ensure_eq!(templates.run("list", &[])?.lines().count(), made, "templates");
        eventually("what was half made is removed", CALL_LIMIT, || {
            let half_made = templates.half_made();
            ensure_eq!(half_made.len(), 0, "half made {half_made:?}");
            Ok(())
        })?;
        evidence.push(format!("killed with {helper}: {} processes went", processes.len()));
        // The pod has nothing to do with it.
        pod.finish()?;
    }
    templates.run_pod(environment, &[], "restored", None)?;
    // That pod has what the second one left out made.
    templates.expect(1)?;
    ensure!(templates.default().join(WORKING_SET).exists(), "the template has no working set");
    Ok(evidence.join("; "))
}

pub(crate) fn another_kernel(environment: &mut Environment) -> Outcome<String> {
    let kernel = WorkDir::new("kernel")?;
    let copy = kernel.path().join("vmlinux");
    fs::copy(environment.layout.share("vmlinux"), &copy).explain(|| "copy the kernel".into())?;
    let templates = Templates::with_default(environment, &format!("kernel = \"{}\"\n", copy.display()))?;
    // Another file with the same contents: nothing to be made.
    let first = templates.build(&[])?;
    ensure_eq!(first, templates.default(), "template of a copy of the kernel");
    templates.run_pod(environment, &[], "restored", None)?;
    // Behind the last segment: another file, the same kernel.
    let mut file = File::options().append(true).open(&copy).explain(|| "open the kernel".into())?;
    file.write_all(b"more").explain(|| "append to the kernel".into())?;
    drop(file);
    templates.run_pod(environment, &[], "booted", None)?;
    templates.expect(2)?;
    ensure!(first.exists(), "the template of the kernel before is gone");
    templates.run_pod(environment, &[], "restored", None)?;
    Ok("a kernel that changed by four bytes was booted, and got a template of its own".into())
}

pub(crate) fn limit(environment: &mut Environment) -> Outcome<String> {
    let templates = Templates::with_default(environment, "")?;
    let memory = templates.default().join("memory");
    let size = fs::metadata(&memory).explain(|| format!("look at {}", memory.display()))?.blocks() * 512;
    templates.configure(&format!("template_limit = \"{}\"\n", size * 3 / 2))?;
    let mut pod =
        templates.pod(environment, "echo up; read go; sha256sum /bin/busybox; echo still up", &[])?;
    pod.shim.expect_started("restored")?;
    let other = templates.build(&["--memory", "128Mi"])?;
    templates.expect(1)?;
    ensure!(!templates.default().exists(), "the template that was used before stays");
    ensure!(other.exists(), "the new template is not there");
    // What it has not touched yet is in a file without a name now.
    pod.stdio.write(b"go\n")?;
    pod.stdio.stdout.until("still up", CALL_LIMIT)?;
    ensure_eq!(pod.shim.wait("", CALL_LIMIT)?.exit_status, 0, "exit status");
    pod.finish()?;
    templates.run_pod(environment, &[("io.bulkhead.memory", "128Mi")], "restored", None)?;
    Ok(format!("of two templates with {} KiB the older one went, and its pod went on", size / 1024))
}
