//! The root file system: metadata, many small files, large sequential transfers.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Samples, WorkloadError, files, step};
use crate::containerd::tar::{Entry, entries};

/// Samples of each quantity.
const SAMPLES: usize = 3;
const SMALL_FILES: usize = 100;
const LARGE_FILE_BYTES: usize = 8 << 20;
const TRANSFER_BYTES: usize = 128 << 10;

/// Measures them all below `root`, where the image's files are.
pub(crate) fn measure(samples: &mut Samples<'_>, root: &Path) -> Result<(), WorkloadError> {
    let below = |path: &str| root.join(path.trim_start_matches('/'));
    for _ in 0..SAMPLES {
        let elapsed = timed(|| walk(&below(files::TREE)).map(drop)).map_err(step("walk the tree"))?;
        samples.add("rootfs-walk", "ms", milliseconds(elapsed))?;
    }
    for number in 0..SAMPLES {
        let target = root.join(format!("unpack-{number}"));
        let elapsed =
            timed(|| unpack(&below(files::ARCHIVE), &target)).map_err(step("unpack the archive"))?;
        samples.add("rootfs-untar", "ms", milliseconds(elapsed))?;
    }
    for number in 0..SAMPLES {
        let directory = root.join(format!("small-{number}"));
        let elapsed = timed(|| small_files(&directory)).map_err(step("make small files"))?;
        samples.add("rootfs-small-files", "ms", milliseconds(elapsed))?;
    }
    let large = root.join("large");
    for _ in 0..SAMPLES {
        let elapsed = timed(|| write_large(&large)).map_err(step("write a large file"))?;
        samples.add("rootfs-write", "MB/s", rate(elapsed))?;
        let elapsed = timed(|| read_large(&large)).map_err(step("read a large file"))?;
        samples.add("rootfs-read", "MB/s", rate(elapsed))?;
        fs::remove_file(&large).map_err(step("remove a large file"))?;
    }
    Ok(())
}

fn timed(work: impl FnOnce() -> io::Result<()>) -> io::Result<Duration> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed())
}

fn milliseconds(elapsed: Duration) -> f64 {
    elapsed.as_secs_f64() * 1e3
}

fn rate(elapsed: Duration) -> f64 {
    LARGE_FILE_BYTES as f64 / 1e6 / elapsed.as_secs_f64()
}

/// Looks at every file of a tree; gives their number.
fn walk(directory: &Path) -> io::Result<usize> {
    let mut files = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if fs::symlink_metadata(entry.path())?.is_dir() {
            files += walk(&entry.path())?;
        } else {
            files += 1;
        }
    }
    Ok(files)
}

fn unpack(archive: &Path, target: &Path) -> io::Result<()> {
    let archive = fs::read(archive)?;
    fs::create_dir(target)?;
    let mut unpacked = 0;
    for entry in entries(&archive) {
        match entry {
            Entry::Directory { name } => fs::create_dir(target.join(name))?,
            Entry::File { name, content } => {
                fs::write(target.join(name), content)?;
                unpacked += 1;
            }
        }
    }
    if unpacked == files::ARCHIVE_FILES {
        Ok(())
    } else {
        Err(io::Error::other(format!("{unpacked} files in the archive")))
    }
}

/// Creates, writes, renames and removes files of one byte.
fn small_files(directory: &Path) -> io::Result<()> {
    fs::create_dir(directory)?;
    for number in 0..SMALL_FILES {
        let (first, second) = (directory.join(format!("a{number}")), directory.join(format!("b{number}")));
        fs::write(&first, b"1")?;
        fs::rename(&first, &second)?;
    }
    fs::remove_dir_all(directory)
}

fn write_large(path: &Path) -> io::Result<()> {
    let block = vec![0x5a; TRANSFER_BYTES];
    let mut file = File::create(path)?;
    for _ in 0..LARGE_FILE_BYTES / TRANSFER_BYTES {
        file.write_all(&block)?;
    }
    file.sync_all()
}

/// Reads what was just written: from some cache, which is the point of having one.
fn read_large(path: &Path) -> io::Result<()> {
    let mut block = vec![0; TRANSFER_BYTES];
    let mut file = File::open(path)?;
    for _ in 0..LARGE_FILE_BYTES / TRANSFER_BYTES {
        file.read_exact(&mut block)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containerd::tar::Archive;

    #[test]
    fn every_quantity_is_measured() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let mut layer = Archive::default();
        files::add_tree(&mut layer).unwrap();
        let layer = layer.finish();
        for entry in entries(&layer) {
            match entry {
                Entry::Directory { name } => fs::create_dir(root.join(name)).unwrap(),
                Entry::File { name, content } => fs::write(root.join(name), content).unwrap(),
            }
        }
        fs::write(root.join("files.tar"), files::archive().unwrap()).unwrap();
        assert_eq!(walk(&root.join("tree")).unwrap(), files::TREE_DIRECTORIES * files::TREE_FILES);

        let mut printed = Vec::new();
        measure(&mut Samples { out: &mut printed }, root).unwrap();
        let printed = String::from_utf8(printed).unwrap();
        for row in [
            "rootfs-walk ms",
            "rootfs-untar ms",
            "rootfs-small-files ms",
            "rootfs-write MB/s",
            "rootfs-read MB/s",
        ] {
            assert_eq!(printed.lines().filter(|line| line.starts_with(row)).count(), SAMPLES, "{printed}");
        }
    }
}
