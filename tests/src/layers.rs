//! Layers of images as containerd's snapshotter `erofs` keeps them: files, and mounts of them on the node. They are on a file
//! system of their own, an ext4: what the node keeps temporary files in (tmpfs before Linux 6.6) may have no attributes of users.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use containerd_shim_protos::api::Mount;
use nix::mount::{MntFlags, umount2};

use crate::failure::{Explain, Outcome};
use crate::layout::Layout;
use crate::{fail, process};

const LIMIT: Duration = Duration::from_secs(30);

/// Says in an attribute that a directory hides what is below it.
const OPAQUE: &std::ffi::CStr = c"trusted.overlay.opaque";

/// Layers of one image, each mounted on the node. Dropping it unmounts and removes them.
#[derive(Debug)]
pub(crate) struct Layers {
    file_system: Ext4,
    mkfs: PathBuf,
    search_path: std::ffi::OsString,
    count: usize,
}

/// Mounts an empty ext4 on a directory, which is made, from a file beside it; gives the file.
///
/// # Errors
/// When it can't be had.
pub(crate) fn mount_ext4(layout: &Layout, directory: &Path) -> Outcome<PathBuf> {
    fs::create_dir_all(directory).explain(|| format!("make {}", directory.display()))?;
    let image = directory.with_extension("ext4");
    let empty = layout.rootfs("busybox").with_file_name("scratch.ext4");
    fs::copy(&empty, &image).explain(|| format!("copy {}", empty.display()))?;
    let mut command = Command::new("mount");
    command.args(["-t", "ext4", "-o", "loop"]).arg(&image).arg(directory).env("PATH", layout.search_path());
    process::run(&mut command, b"", LIMIT)?.success("mount an ext4")?;
    Ok(image)
}

/// An ext4 mounted on a directory of its own. Dropping it unmounts and removes both.
#[derive(Debug)]
pub(crate) struct Ext4(PathBuf);

impl Ext4 {
    /// As [`mount_ext4`].
    ///
    /// # Errors
    /// When it can't be had.
    pub(crate) fn new(layout: &Layout, directory: PathBuf) -> Outcome<Self> {
        mount_ext4(layout, &directory)?;
        Ok(Self(directory))
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.0);
        let _ = fs::remove_file(self.0.with_extension("ext4"));
    }
}

impl Layers {
    /// An image without layers, in a directory that is made.
    ///
    /// # Errors
    /// When there is no `mkfs.erofs`, or no directory.
    pub(crate) fn new(layout: &Layout, directory: PathBuf) -> Outcome<Self> {
        let file_system = Ext4::new(layout, directory)?;
        let (mkfs, search_path) = (layout.find("mkfs.erofs")?, layout.search_path());
        Ok(Self { file_system, mkfs, search_path, count: 0 })
    }

    /// Adds a layer with what is in `source`, on top of the others.
    ///
    /// # Errors
    /// When it can't be made or mounted.
    pub(crate) fn add(&mut self, source: &Path) -> Outcome {
        let layer = self.file_system.path().join(self.count.to_string());
        let point = layer.join("fs");
        fs::create_dir_all(&point).explain(|| format!("make {}", point.display()))?;
        let blob = layer.join("layer.erofs");
        self.run(Command::new(&self.mkfs).args(["--quiet", "-Enoinline_data"]).arg(&blob).arg(source))?;
        self.run(Command::new("mount").args(["-t", "erofs", "-o", "ro,loop"]).arg(&blob).arg(&point))?;
        self.count += 1;
        Ok(())
    }

    /// Where they are; there is room for other things.
    pub(crate) fn directory(&self) -> &Path {
        self.file_system.path()
    }

    /// The file with a layer, counted from the lowest.
    pub(crate) fn blob(&self, number: usize) -> PathBuf {
        self.file_system.path().join(number.to_string()).join("layer.erofs")
    }

    /// The overlay that the snapshotter asks for, with these directories for changes.
    pub(crate) fn mounts(&self, upper: &Path, work: &Path) -> Vec<Mount> {
        let lower: Vec<String> = (0..self.count)
            .rev()
            .map(|number| self.file_system.path().join(number.to_string()).join("fs").display().to_string())
            .collect();
        vec![Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                format!("workdir={}", work.display()),
                format!("upperdir={}", upper.display()),
                format!("lowerdir={}", lower.join(":")),
                "index=off".into(),
            ],
            ..Mount::default()
        }]
    }

    fn run(&self, command: &mut Command) -> Outcome {
        command.env("PATH", &self.search_path);
        process::run(command, b"", LIMIT)?.success("make a layer").map(drop)
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        for number in 0..self.count {
            let _ = umount2(&self.file_system.path().join(number.to_string()).join("fs"), MntFlags::empty());
        }
    }
}

/// Makes a directory hide what is below it.
///
/// # Errors
/// When the file system does not take it.
pub(crate) fn make_opaque(directory: &Path) -> Outcome {
    let path = CString::new(directory.as_os_str().as_bytes()).explain(|| "a path".into())?;
    // SAFETY: both strings end with NUL, and the value has the length that is said.
    let result = unsafe { nix::libc::lsetxattr(path.as_ptr(), OPAQUE.as_ptr(), c"y".as_ptr().cast(), 1, 0) };
    if result != 0 {
        fail!("set {OPAQUE:?} of {}: {}", directory.display(), std::io::Error::last_os_error());
    }
    Ok(())
}

/// Whether a directory hides what is below it, to the node's kernel.
///
/// # Errors
/// When it can't be asked.
pub(crate) fn is_opaque(directory: &Path) -> Outcome<bool> {
    let path = CString::new(directory.as_os_str().as_bytes()).explain(|| "a path".into())?;
    let mut value = [0u8; 2];
    // SAFETY: both strings end with NUL, and the buffer has the length that is said.
    let length = unsafe {
        nix::libc::lgetxattr(path.as_ptr(), OPAQUE.as_ptr(), value.as_mut_ptr().cast(), value.len())
    };
    Ok(length == 1 && value[0] == b'y')
}
