//! Using up what there is: of the guest, which may suffer, and of the host, which may not.

use std::fs;

use serde_json::Value;

use super::stage::{Stage, volume};
use super::{Attempt, Program};
use crate::failure::{Explain, Outcome};

const GREED: &str = "without limits it would take what the node has";

/// How much of a guest's words the shim's log may take.
const LOG: usize = 1 << 20;

const fn program(name: &'static str, what: &'static str, arguments: &'static [&'static str]) -> Attempt {
    Attempt::new(name, what, Program::Attack(arguments))
}

/// The attempts of this theme.
pub(crate) const ATTEMPTS: &[Attempt] = &[
    program("exhaust-output", "8 MiB of output on both streams as fast as it goes", &["output", "8"]),
    program(
        "exhaust-disk",
        "a volume filled to the last byte, and the largest files there can be",
        &["fill", "/tree/f", "64"],
    )
    .with(small_disk)
    .judged(|stage, _| {
        // The pod has ended; whoever owns the volume can make room.
        let file = stage.shared("tree").join("f");
        fs::remove_file(&file).explain(|| format!("remove {}", file.display()))?;
        fs::write(&file, vec![0; 1 << 20]).explain(|| "write to the volume after it was full".into())?;
        Ok(Vec::new())
    }),
    program("exhaust-inodes", "files until a volume has no room for one more", &["files", "/tree"])
        .with(small_disk),
    program("exhaust-depth", "500 directories in each other", &["deep", "/tree"]).with(plain),
    program("exhaust-descriptors", "5,000 files of a volume held open", &["descriptors", "/tree", "5000"])
        .with(plain),
    program("exhaust-processes", "a fork bomb", &["fork-bomb", "0.5"]).alone().within(2).not_on_runc(GREED),
    program("exhaust-memory", "more memory than there is", &["hog", "600"]).alone().not_on_runc(GREED),
    program("exhaust-kernel-log", "3,000 lines into the kernel's log", &["kernel-log", "3000"])
        .alone()
        .judged(|_, said| {
            let size = said.log.len();
            Ok((size > LOG).then(|| format!("{size} bytes in the shim's log")).into_iter().collect())
        })
        .not_on_runc("it would flood the node's log"),
];

fn plain(stage: &mut Stage, spec: &mut Value) -> Outcome {
    let directory = stage.share("tree")?;
    volume(spec, &directory, "/tree", &["rbind", "rw"]);
    Ok(())
}

fn small_disk(stage: &mut Stage, spec: &mut Value) -> Outcome {
    let directory = stage.share("tree")?;
    stage.mount(&["-t", "tmpfs", "-o", "size=8m,nr_inodes=500,nodev", "none"], &directory)?;
    volume(spec, &directory, "/tree", &["rbind", "rw"]);
    Ok(())
}
