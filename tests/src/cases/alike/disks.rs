//! What the containers share with the node.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::Value;

use crate::bundle;
use crate::failure::{Explain, Outcome};
use crate::layout::Layout;
use crate::process;
use crate::shim::CALL_LIMIT;

/// Directories of the node:
///
/// | in the container | |
/// |---|---|
/// | `/v` | an ext4 |
/// | `/ro` | the same, read-only |
/// | `/m` | a tmpfs of the node |
/// | `/below`, `/below-ro` | a directory of it with another tmpfs mounted below, at `inner`; the same read-only |
/// | `/f` | a single file of the ext4 |
/// | `/node` | a directory of the ext4 where the node answers: once `ask` is there, `answer` is made |
pub(crate) struct Disks {
    directory: PathBuf,
    mounted: Vec<PathBuf>,
    answering: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

impl Disks {
    /// Makes and mounts them, below `directory`.
    pub(crate) fn new(layout: &Layout, directory: &Path, name: &str) -> Outcome<Disks> {
        let directory = directory.join(format!("{name}-disks"));
        let mut disks = Disks { directory, mounted: Vec::new(), answering: None };
        let make = |path: PathBuf| fs::create_dir_all(&path).explain(|| format!("make {}", path.display()));
        make(disks.directory.clone())?;
        let image = disks.directory.join("image");
        let empty = layout.rootfs("busybox").with_file_name("scratch.ext4");
        fs::copy(&empty, &image).explain(|| format!("copy {}", empty.display()))?;
        disks.mount(&["-o", "loop", "-t", "ext4", &image.display().to_string()], "v")?;
        disks.mount(&["-t", "tmpfs", "-o", "size=64m", "tmpfs"], "m")?;
        make(disks.directory.join("m/below/inner"))?;
        disks.mount(&["-t", "tmpfs", "-o", "size=1m,nodev", "tmpfs"], "m/below/inner")?;
        let file = disks.directory.join("v/single");
        fs::write(&file, "a single file\n").explain(|| format!("write {}", file.display()))?;
        let node = disks.directory.join("v/node");
        make(node.clone())?;
        let ended = Arc::new(AtomicBool::new(false));
        let until = ended.clone();
        let thread = thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                if fs::remove_file(node.join("ask")).is_ok() {
                    let _ = fs::write(node.join("answer"), "from the node\n");
                }
                thread::sleep(Duration::from_millis(20));
            }
        });
        disks.answering = Some((ended, thread));
        Ok(disks)
    }

    fn mount(&mut self, arguments: &[&str], place: &str) -> Outcome {
        let target = self.directory.join(place);
        fs::create_dir_all(&target).explain(|| format!("make {}", target.display()))?;
        process::run(Command::new("mount").args(arguments).arg(&target), b"", CALL_LIMIT)?
            .success("mount")?;
        self.mounted.push(target);
        Ok(())
    }

    /// The container's mounts.
    pub(crate) fn mounts(&self) -> impl Iterator<Item = Value> {
        const ALL: [(&str, &str, &str); 7] = [
            ("v", "/v", "rw"),
            ("v", "/ro", "ro"),
            ("m", "/m", "rw"),
            ("m/below", "/below", "rw"),
            ("m/below", "/below-ro", "ro"),
            ("v/single", "/f", "rw"),
            ("v/node", "/node", "rw"),
        ];
        ALL.iter().map(|(source, destination, access)| {
            bundle::bind(&self.directory.join(source), destination, &["rbind", "rprivate", access])
        })
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        if let Some((ended, thread)) = self.answering.take() {
            ended.store(true, Ordering::Relaxed);
            let _ = thread.join();
        }
        for target in self.mounted.iter().rev() {
            let _ = process::run(Command::new("umount").arg(target), b"", CALL_LIMIT);
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}
