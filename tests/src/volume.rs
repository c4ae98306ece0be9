//! Block devices of the node for tests: loop devices over files.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::libc::{major, minor};
use serde_json::{Value, json};

use crate::failure::{Explain, Outcome};
use crate::process;

/// Bytes of a volume.
pub(crate) const SIZE: u64 = 1 << 20;

/// Bytes that are written alike.
pub(crate) const SECTOR: u64 = 512;

const LIMIT: Duration = Duration::from_secs(10);

/// A loop device. Dropping it detaches and removes the file.
#[derive(Debug)]
pub(crate) struct Volume {
    /// The device.
    pub device: PathBuf,
    file: PathBuf,
    major: u64,
    minor: u64,
}

impl Volume {
    /// A volume on whose every sector its number is written, as 16 digits.
    ///
    /// # Errors
    /// When it can't be had.
    pub(crate) fn new(directory: &Path, name: &str) -> Outcome<Self> {
        let file = directory.join(name);
        let contents = File::create(&file).explain(|| format!("make {}", file.display()))?;
        for sector in 0..SIZE / SECTOR {
            let text = format!("{sector:016}{}", " ".repeat(SECTOR as usize - 16));
            contents
                .write_all_at(text.as_bytes(), sector * SECTOR)
                .explain(|| format!("fill {}", file.display()))?;
        }
        let free = losetup(&["-f"])?;
        let device = PathBuf::from(free.trim());
        losetup(&[&free, &file.display().to_string()].map(|argument| argument.trim()))?;
        let number = fs::metadata(&device).explain(|| format!("look at {}", device.display()))?.rdev();
        Ok(Self { device, file, major: major(number).into(), minor: minor(number).into() })
    }

    /// Adds it to a specification as `path`, with a rule that allows `access`.
    pub(crate) fn add_to(&self, spec: &mut Value, path: &str, access: &str) {
        let device =
            json!({ "path": path, "type": "b", "major": self.major, "minor": self.minor, "fileMode": 0o660 });
        let rule =
            json!({ "allow": true, "type": "b", "major": self.major, "minor": self.minor, "access": access });
        for (list, value) in [("/linux/devices", device), ("/linux/resources/devices", rule)] {
            match spec.pointer_mut(list).and_then(Value::as_array_mut) {
                Some(list) => list.push(value),
                None => spec["linux"]["devices"] = json!([value]),
            }
        }
    }

    /// The text at the beginning of a sector, up to the first space.
    ///
    /// # Errors
    /// When the file can't be read.
    pub(crate) fn sector(&self, number: u64) -> Outcome<String> {
        let mut bytes = [0; SECTOR as usize];
        File::open(&self.file)
            .and_then(|file| file.read_exact_at(&mut bytes, number * SECTOR))
            .explain(|| format!("read {}", self.file.display()))?;
        Ok(String::from_utf8_lossy(&bytes).split(' ').next().unwrap_or_default().to_owned())
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = losetup(&["-d", &self.device.display().to_string()]);
        let _ = fs::remove_file(&self.file);
    }
}

fn losetup(arguments: &[&str]) -> Outcome<String> {
    Ok(process::run(Command::new("losetup").args(arguments), b"", LIMIT)?.success("losetup")?.stdout)
}
