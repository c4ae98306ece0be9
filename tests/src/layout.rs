//! Where the parts under test are: the installation prefix that this program was started from.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::failure::{Explain, Outcome};

/// An installation prefix: `bin/`, `libexec/bulkhead/`, `share/bulkhead/`, and the test images in `images/`.
#[derive(Debug, Clone)]
pub struct Layout {
    prefix: PathBuf,
}

impl Layout {
    /// The prefix whose `bin/` this program is in.
    ///
    /// # Errors
    /// When the program's own path can't be told.
    pub fn locate() -> Outcome<Self> {
        let program = env::current_exe().explain(|| "own path".into())?;
        let prefix = program
            .parent()
            .and_then(Path::parent)
            .explain(|| format!("{} is in no bin/", program.display()))?;
        Ok(Self { prefix: prefix.to_owned() })
    }

    /// A program in `bin/`.
    pub fn bin(&self, name: &str) -> PathBuf {
        self.prefix.join("bin").join(name)
    }

    /// The guest kernel or the guest image.
    pub(crate) fn share(&self, name: &str) -> PathBuf {
        self.prefix.join("share/bulkhead").join(name)
    }

    /// Whether the guest kernel is Bulkhead's own: its version says so.
    pub(crate) fn has_own_kernel(&self) -> bool {
        const NAME: &[u8] = b"-bulkhead (bulkhead@bulkhead)";
        let kernel = fs::read(self.share("vmlinux")).unwrap_or_default();
        kernel.windows(NAME.len()).any(|window| window == NAME)
    }

    /// The OCI archive of a test image.
    pub(crate) fn image(&self, name: &str) -> PathBuf {
        self.prefix.join("images").join(format!("{name}.tar"))
    }

    /// The unpacked root file system of a test image.
    pub(crate) fn rootfs(&self, name: &str) -> PathBuf {
        self.prefix.join("images").join(name).join("rootfs")
    }

    /// The directory of the CNI plugins: ours, or else where Debian has them.
    pub(crate) fn cni_plugins(&self) -> PathBuf {
        let ours = self.prefix.join("cni");
        if ours.is_dir() { ours } else { PathBuf::from("/usr/lib/cni") }
    }

    /// A search path that finds our programs first.
    pub(crate) fn search_path(&self) -> OsString {
        let mut path = OsString::from(self.prefix.join("bin"));
        path.push(":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        path
    }

    /// The program that [`search_path`](Self::search_path) finds for a name.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn find(&self, name: &str) -> Outcome<PathBuf> {
        env::split_paths(&self.search_path())
            .map(|directory| directory.join(name))
            .find(|candidate| candidate.is_file())
            .explain(|| format!("no program {name} in {}", self.search_path().display()))
    }
}
