//! Are the installed parts there and of the right kind?

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use super::Finding;

const PROGRAMS: [(&str, &str); 3] = [
    ("shim", "bin/containerd-shim-bulkhead-v1"),
    ("VMM", "libexec/bulkhead/bulkhead-vmm"),
    ("file server", "libexec/bulkhead/bulkhead-fs"),
];
const KERNEL: &str = "share/bulkhead/vmlinux";
const IMAGE: &str = "share/bulkhead/guest.erofs";

/// A magic number: where it is in the file, and its bytes.
type Magic = (u64, &'static [u8]);
const ELF: Magic = (0, b"\x7fELF");
/// "HdrS" of the x86 boot protocol.
const BZIMAGE: Magic = (0x202, b"HdrS");
const EROFS: Magic = (1024, &0xe0f5_e1e2_u32.to_le_bytes());

/// Looks at what is installed under `prefix`.
pub fn check(prefix: &Path) -> Vec<Finding> {
    let mut findings: Vec<Finding> =
        PROGRAMS.iter().map(|(what, place)| program(what, &prefix.join(place))).collect();
    findings.push(data("guest kernel", &prefix.join(KERNEL), &[ELF, BZIMAGE], "an ELF vmlinux or a bzImage"));
    findings.push(data("guest image", &prefix.join(IMAGE), &[EROFS], "an erofs image"));
    findings
}

fn program(what: &'static str, path: &Path) -> Finding {
    let usable = if path.is_file() {
        access(path, AccessFlags::X_OK).map_err(io::Error::from)
    } else {
        Err(io::Error::from(Errno::ENOENT))
    };
    match usable {
        Ok(()) => Finding::ok(what, path.display().to_string()),
        Err(error) => Finding::fail(what, not_usable("execute", path, &error)),
    }
}

fn data(what: &'static str, path: &Path, kinds: &[Magic], expected: &str) -> Finding {
    match has_magic(path, kinds) {
        Ok(true) => Finding::ok(what, path.display().to_string()),
        Ok(false) => Finding::fail(what, format!("{} is not {expected}; install it again", path.display())),
        Err(error) => Finding::fail(what, not_usable("read", path, &error)),
    }
}

fn not_usable(verb: &str, path: &Path, error: &io::Error) -> String {
    format!("cannot {verb} {}: {error}; install it, or name another place with --prefix", path.display())
}

fn has_magic(path: &Path, kinds: &[Magic]) -> io::Result<bool> {
    let mut file = File::open(path)?;
    for (offset, magic) in kinds {
        let mut found = Vec::with_capacity(magic.len());
        file.seek(SeekFrom::Start(*offset))?;
        file.by_ref().take(magic.len() as u64).read_to_end(&mut found)?;
        if found == *magic {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;
    use crate::check::Verdict;

    /// A directory that is removed again.
    struct Prefix(PathBuf);

    impl Prefix {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("bulkhead-check-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn install(&self, place: &str, content: &[u8], mode: u32) {
            let path = self.0.join(place);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }

        fn verdicts(&self) -> Vec<Verdict> {
            check(&self.0).into_iter().map(|finding| finding.verdict).collect()
        }
    }

    impl Drop for Prefix {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn erofs() -> Vec<u8> {
        let mut image = vec![0; 4096];
        image[1024..1028].copy_from_slice(EROFS.1);
        image
    }

    #[test]
    fn nothing_installed() {
        let prefix = Prefix::new("nothing");
        assert_eq!(prefix.verdicts(), [Verdict::Fail; 5]);
        assert!(check(&prefix.0)[0].evidence.contains("bin/containerd-shim-bulkhead-v1"));
    }

    #[test]
    fn everything_installed() {
        let prefix = Prefix::new("everything");
        for (_, place) in PROGRAMS {
            prefix.install(place, b"#!", 0o755);
        }
        prefix.install(KERNEL, b"\x7fELF rest", 0o644);
        prefix.install(IMAGE, &erofs(), 0o644);
        assert_eq!(prefix.verdicts(), [Verdict::Ok; 5]);
    }

    #[test]
    fn wrong_and_truncated_parts() {
        let prefix = Prefix::new("wrong");
        for (_, place) in PROGRAMS {
            prefix.install(place, b"#!", 0o644);
        }
        prefix.install(KERNEL, b"\x7fEL", 0o644);
        prefix.install(IMAGE, &erofs()[..1026], 0o644);
        // Root may read anything, but executes only what has an executable bit.
        assert_eq!(prefix.verdicts(), [Verdict::Fail; 5]);
        assert!(check(&prefix.0)[4].evidence.contains("not an erofs image"));
    }
}
