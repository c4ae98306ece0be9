//! Pods from templates: as good as booted ones, and booted when there is no template to trust.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::unistd::{Whence, lseek};

use super::{Case, Container, Environment};
use crate::bundle;
use crate::cleanup::WorkDir;
use crate::failure::{Explain, Outcome};
use crate::layout::Layout;
use crate::node;
use crate::process::{self, eventually};
use crate::shim::{CALL_LIMIT, CreateOptions};
use crate::stdio::Streams;
use crate::{ensure, ensure_eq, fail};

mod damage;
mod making;
mod pods;

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("template-pods-are-unique", pods::unique).bulkhead_only(),
    Case::new("template-sizes", pods::sizes).bulkhead_only(),
    Case::new("template-damaged-is-not-used", damage::damaged).bulkhead_only(),
    Case::new("template-refused-by-the-vmm", damage::refused).bulkhead_only(),
    Case::new("template-working-set", damage::working_set).bulkhead_only(),
    Case::new("template-made-on-first-use", making::first_use).bulkhead_only(),
    Case::new("template-concurrent-first-use", making::concurrent_first_use).bulkhead_only(),
    Case::new("template-killed-maker", making::killed_maker).bulkhead_only(),
    Case::new("template-of-another-kernel", making::another_kernel).bulkhead_only(),
    Case::new("template-limit", making::limit).bulkhead_only(),
];

/// What is known of the digests of large files, in a store.
const DIGESTS: &str = "digests.json";

/// How long making a template may take.
const BUILD_LIMIT: Duration = Duration::from_secs(20);

/// How often makers are looked for. They yield to everybody, so also to whoever looks for them without a pause.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What the pods of [`Templates::run_pod`] do.
const SCRIPT: &str = "nproc; grep -E 'MemTotal|MemAvailable' /proc/meminfo; echo done";

/// What the list of the pages that guests use first is called.
const WORKING_SET: &str = "working-set";

/// A store of the case's own and a configuration that names it.
pub(crate) struct Templates {
    layout: Layout,
    directory: WorkDir,
    configuration: String,
    /// The template of the default size in the default store.
    default: PathBuf,
}

impl Templates {
    /// An empty store. What is known of the digests of large files is taken over from the default store.
    fn new(environment: &Environment, configuration: &str) -> Outcome<Self> {
        let templates = Self {
            layout: environment.layout.clone(),
            directory: WorkDir::new("templates")?,
            configuration: configuration.to_owned(),
            default: environment.template()?.to_owned(),
        };
        let store = templates.store();
        DirBuilder::new().mode(0o700).create(&store).explain(|| format!("make {}", store.display()))?;
        let known = templates.default.with_file_name(DIGESTS);
        fs::copy(&known, store.join(DIGESTS)).explain(|| format!("copy {}", known.display()))?;
        templates.configure("")?;
        Ok(templates)
    }

    /// The same with the store in a file system of its own, which can be filled.
    pub(crate) fn on_a_file_system(environment: &Environment, configuration: &str) -> Outcome<Self> {
        let templates = Self::new(environment, configuration)?;
        let store = templates.store();
        let digests = fs::read(store.join(DIGESTS)).explain(|| "read what is known of digests".into())?;
        mount(Some("store"), &store, Some("tmpfs"), MsFlags::empty(), Some("mode=700,size=512m"))
            .explain(|| format!("mount a file system at {}", store.display()))?;
        fs::write(store.join(DIGESTS), digests).explain(|| "write what is known of digests".into())?;
        Ok(templates)
    }

    /// The same with the template of the default size, which is a copy of the default store's.
    fn with_default(environment: &Environment, configuration: &str) -> Outcome<Self> {
        let templates = Self::new(environment, configuration)?;
        let target = templates.default();
        let copy = || {
            DirBuilder::new().mode(0o700).create(&target)?;
            for entry in fs::read_dir(&templates.default)? {
                let entry = entry?;
                copy_sparse(&entry.path(), &target.join(entry.file_name()))?;
            }
            io::Result::Ok(())
        };
        copy().explain(|| format!("copy {}", templates.default.display()))?;
        Ok(templates)
    }

    /// Writes the configuration, with these lines at its end.
    fn configure(&self, more: &str) -> Outcome {
        let text = format!(
            "annotations = true\ntemplate_dir = \"{}\"\n{}{more}",
            self.store().display(),
            self.configuration
        );
        fs::write(self.config(), text).explain(|| "write the configuration".into())
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.directory.path().join("store")
    }

    fn config(&self) -> PathBuf {
        self.directory.path().join("config.toml")
    }

    /// Where the template of the default size is, if it is.
    fn default(&self) -> PathBuf {
        self.store().join(self.default.file_name().unwrap_or_default())
    }

    fn run(&self, action: &str, arguments: &[&str]) -> Outcome<String> {
        let config = self.config().display().to_string();
        let mut command = Command::new(self.layout.bin("bulkhead"));
        command.args(["template", action, "--config", &config]).args(arguments);
        Ok(process::run(&mut command, b"", BUILD_LIMIT)?.success("bulkhead template")?.stdout)
    }

    /// Makes a template and returns its directory.
    fn build(&self, arguments: &[&str]) -> Outcome<PathBuf> {
        let output = self.run("build", arguments)?;
        Ok(self.store().join(output.split(' ').next().unwrap_or_default()))
    }

    /// Waits for the end of everybody who makes templates, after which there must be so many and nothing half made.
    pub(crate) fn expect(&self, count: usize) -> Outcome {
        self.settled()?;
        let list = self.run("list", &[])?;
        ensure_eq!(list.lines().count(), count, "templates {list:?}");
        let half_made = self.half_made();
        ensure_eq!(half_made.len(), 0, "half-made templates {half_made:?}");
        Ok(())
    }

    /// How many templates there are, after a complete check of all.
    pub(crate) fn sound(&self) -> Outcome<usize> {
        self.run("verify", &[])?;
        Ok(self.run("list", &[])?.lines().count())
    }

    /// Whether each template has its working set.
    pub(crate) fn have_working_sets(&self) -> bool {
        let mut directories =
            fs::read_dir(self.store()).into_iter().flatten().flatten().map(|entry| entry.path());
        directories.all(|path| !path.is_dir() || path.join(WORKING_SET).exists())
    }

    /// Waits for the end of everybody who makes templates.
    pub(crate) fn settled(&self) -> Outcome {
        eventually("templates are made in the background", BUILD_LIMIT, || {
            thread::sleep(LOOK_EVERY);
            let makers = node::template_makers();
            ensure_eq!(makers.len(), 0, "makers {makers:?}");
            Ok(())
        })
    }

    /// Ends everybody who makes templates, when what they make is of no interest.
    fn end_makers(&self) -> Outcome {
        eventually("a maker is ended", BUILD_LIMIT, || {
            thread::sleep(LOOK_EVERY);
            let makers = node::template_makers();
            ensure!(!makers.is_empty(), "there is none");
            makers.iter().try_for_each(|maker| node::kill_hard(maker.pid))
        })?;
        self.settled()
    }

    /// What is on its way into the store, or out of it.
    pub(crate) fn half_made(&self) -> Vec<String> {
        self.names().into_iter().filter(|name| name.starts_with('.')).collect()
    }

    /// What the store's directory holds.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.store()).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Creates and starts a pod.
    pub(crate) fn pod(
        &self,
        environment: &Environment,
        script: &str,
        annotations: &[(&str, &str)],
    ) -> Outcome<Container> {
        let id = environment.id("template");
        let mut spec = bundle::spec(&id, bundle::shell(script));
        spec["hostname"] = id.clone().into();
        for (key, value) in annotations {
            spec["annotations"][key] = (*value).into();
        }
        let host = environment.host()?;
        let bundle = host.bundle(&id, &spec)?;
        let shim = host.start(&bundle)?;
        let stdio = shim.stdio("init", Streams { stdin: true, ..Streams::default() })?;
        shim.create(&stdio, CreateOptions { config: Some(&self.config()), ..CreateOptions::default() })?;
        shim.start("")?;
        Ok(Container { bundle, shim, stdio })
    }

    /// Runs a pod of a size to its end; returns its output and how long its agent took, after checking how it was started and
    /// what the shim's log says.
    pub(crate) fn run_pod(
        &self,
        environment: &Environment,
        annotations: &[(&str, &str)],
        how: &str,
        warning: Option<&str>,
    ) -> Outcome<(String, u64)> {
        let pod = self.pod(environment, SCRIPT, annotations)?;
        ended(pod, how, warning)
    }
}

/// Waits for the end of a pod that runs [`SCRIPT`].
fn ended(pod: Container, how: &str, warning: Option<&str>) -> Outcome<(String, u64)> {
    ensure_eq!(pod.shim.wait("", CALL_LIMIT)?.exit_status, 0, "exit status");
    let output = pod.stdio.stdout.to_end(CALL_LIMIT)?;
    let took = pod.shim.expect_started(how)?;
    let log = pod.shim.log.until("agent ready", CALL_LIMIT)?;
    pod.finish()?;
    let warnings: Vec<&str> = log.lines().filter(|line| line.contains("level=warn")).collect();
    match (warning, warnings.as_slice()) {
        (None, []) => {}
        (Some(expected), [line]) if line.contains(expected) => {}
        (expected, lines) => fail!("warnings in the shim's log: {lines:?}, expected {expected:?}"),
    }
    Ok((output, took))
}

/// Copies a file with its holes, its mode and its modification time, by which the store recognises it.
fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let metadata = source.metadata()?;
    let target = File::create_new(to)?;
    target.set_len(metadata.len())?;
    let mut buffer = vec![0; 1 << 20];
    let mut position = 0;
    while let Some((mut start, end)) = next_data(&source, position)? {
        while start < end {
            let length = (end - start).min(buffer.len() as u64) as usize;
            source.read_exact_at(&mut buffer[..length], start)?;
            target.write_all_at(&buffer[..length], start)?;
            start += length as u64;
        }
        position = end;
    }
    target.set_permissions(metadata.permissions())?;
    target.set_modified(metadata.modified()?)
}

/// The next range at or after `offset` that is not a hole.
fn next_data(file: &File, offset: u64) -> io::Result<Option<(u64, u64)>> {
    let seek = |from: u64, whence| lseek(file, from as i64, whence).map(i64::unsigned_abs);
    match seek(offset, Whence::SeekData) {
        Ok(start) => Ok(Some((start, seek(start, Whence::SeekHole)?))),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_recognised_as_the_same() {
        use std::os::unix::fs::MetadataExt;
        let directory = WorkDir::new("sparse").unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        let file = File::create_new(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"in the middle", 12_345_678).unwrap();
        copy_sparse(&from, &to).unwrap();
        let (before, after) = (fs::metadata(&from).unwrap(), fs::metadata(&to).unwrap());
        assert_eq!((before.len(), before.modified().unwrap()), (after.len(), after.modified().unwrap()));
        assert!(after.blocks() * 512 < 1 << 20, "{} blocks", after.blocks());
        let mut text = [0; 13];
        File::open(&to).unwrap().read_exact_at(&mut text, 12_345_678).unwrap();
        assert_eq!(&text, b"in the middle");
    }
}
