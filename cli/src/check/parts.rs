//! Are the installed parts there and of the right kind?

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use bulkhead_base::{chain, parts};
use bulkhead_shim::config::Config;
use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use super::Finding;
use crate::install;

/// A magic number: where it is in the file, and its bytes.
type Magic = (u64, &'static [u8]);
const ELF: Magic = (0, b"\x7fELF");
/// "HdrS" of the x86 boot protocol.
const BZIMAGE: Magic = (0x202, b"HdrS");
const EROFS: Magic = (1024, &0xe0f5_e1e2_u32.to_le_bytes());

/// Looks at what is installed under `prefix`, and at what the configuration names.
pub(crate) fn check(prefix: &Path, config: &Config) -> Vec<Finding> {
    vec![
        program("shim", &prefix.join(parts::SHIM)),
        program("VMM", &config.vmm),
        program("file server", &config.fs_server),
        data("guest kernel", &config.kernel, &[ELF, BZIMAGE], "an ELF vmlinux or a bzImage"),
        data("guest image", &config.image, &[EROFS], "an erofs image"),
    ]
}

/// Whether what was installed is still what it was. The prefix is one of the system in `root`.
pub(crate) fn unaltered(root: &Path, prefix: &Path) -> Finding {
    const WHAT: &str = "installed files";
    match install::altered(root, prefix) {
        Ok(None) => Finding::ok(WHAT, "not put there by bulkhead install: nothing to compare with"),
        Ok(Some((count, altered))) if altered.is_empty() => {
            Finding::ok(WHAT, format!("{count}, each with the digest that was recorded"))
        }
        Ok(Some((_, altered))) => {
            let paths: Vec<_> = altered.iter().map(|path| path.display().to_string()).collect();
            Finding::warn(WHAT, format!("changed or gone since they were installed: {}", paths.join(", ")))
                .because("pods run with programs, a kernel or an image that nobody has installed here, or not at all")
                .mended_by("find out who changed them; then bulkhead install --from DIR")
        }
        Err(error) => {
            Finding::warn(WHAT, chain(&error)).because("it can't be told whether they are what was installed")
        }
    }
}

fn program(what: &'static str, path: &Path) -> Finding {
    let usable = if path.is_file() {
        access(path, AccessFlags::X_OK).map_err(io::Error::from)
    } else {
        Err(io::Error::from(Errno::ENOENT))
    };
    match usable {
        Ok(()) => Finding::ok(what, path.display().to_string()),
        Err(error) => incomplete(what, format!("cannot execute {}: {error}", path.display())),
    }
}

fn data(what: &'static str, path: &Path, kinds: &[Magic], expected: &str) -> Finding {
    match has_magic(path, kinds) {
        Ok(true) => Finding::ok(what, path.display().to_string()),
        Ok(false) => incomplete(what, format!("{} is not {expected}", path.display())),
        Err(error) => incomplete(what, format!("cannot read {}: {error}", path.display())),
    }
}

fn incomplete(what: &'static str, evidence: String) -> Finding {
    Finding::fail(what, evidence).because("no pod starts without it").mended_by(
        "bulkhead install --from DIR; or name its place in /etc/bulkhead/config.toml, or with --prefix",
    )
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
    use bulkhead_shim::config::Source;

    use super::*;
    use crate::check::Verdict;
    use crate::testing::Directory;

    use bulkhead_base::parts::{FS_SERVER, IMAGE, KERNEL, SHIM, VMM};

    const PROGRAMS: [&str; 3] = [SHIM, VMM, FS_SERVER];

    fn checked(prefix: &Directory, configuration: &str) -> Vec<Finding> {
        let config = Config::load_for(&Source::Inline(configuration.into()), prefix.path()).unwrap();
        check(prefix.path(), &config)
    }

    fn verdicts(prefix: &Directory) -> Vec<Verdict> {
        checked(prefix, "").into_iter().map(|finding| finding.verdict).collect()
    }

    fn erofs() -> Vec<u8> {
        let mut image = vec![0; 4096];
        image[1024..1028].copy_from_slice(EROFS.1);
        image
    }

    #[test]
    fn files_that_were_changed_are_named() {
        let root = Directory::new();
        let prefix = Path::new("/usr/local");
        assert_eq!(unaltered(root.path(), prefix).verdict, Verdict::Ok);
        let digest = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae";
        let record = format!(
            r#"{{"files": {{"/usr/local/bin/bulkhead": ["{digest}"]}}, "directories": [], "templates": []}}"#
        );
        root.write("usr/local/share/bulkhead/installed.json", record);
        root.write("usr/local/bin/bulkhead", "foo");
        assert_eq!(unaltered(root.path(), prefix).verdict, Verdict::Ok);
        root.write("usr/local/bin/bulkhead", "bar");
        let finding = unaltered(root.path(), prefix);
        assert_eq!(finding.verdict, Verdict::Warn);
        assert!(finding.evidence.contains("/usr/local/bin/bulkhead"));
        root.write("usr/local/share/bulkhead/installed.json", "{");
        assert_eq!(unaltered(root.path(), prefix).verdict, Verdict::Warn);
    }

    #[test]
    fn nothing_installed() {
        let prefix = Directory::new();
        assert_eq!(verdicts(&prefix), [Verdict::Fail; 5]);
        assert!(checked(&prefix, "")[0].evidence.contains("bin/containerd-shim-bulkhead-v1"));
    }

    #[test]
    fn what_the_configuration_names_is_looked_at() {
        let prefix = Directory::new();
        let elsewhere = Directory::new();
        elsewhere.write("vmlinux", b"\x7fELF");
        let kernel = elsewhere.path().join("vmlinux");
        let findings = checked(&prefix, &format!("kernel = {kernel:?}"));
        assert_eq!(findings[3].verdict, Verdict::Ok, "{}", findings[3]);
    }

    #[test]
    fn everything_installed() {
        let prefix = Directory::new();
        for place in PROGRAMS {
            prefix.write_program(place, "#!");
        }
        prefix.write(KERNEL, b"\x7fELF rest");
        prefix.write(IMAGE, erofs());
        assert_eq!(verdicts(&prefix), [Verdict::Ok; 5]);
    }

    #[test]
    fn wrong_and_truncated_parts() {
        let prefix = Directory::new();
        for place in PROGRAMS {
            prefix.write(place, "#!");
        }
        prefix.write(KERNEL, b"\x7fEL");
        prefix.write(IMAGE, &erofs()[..1026]);
        // Root may read anything, but executes only what has an executable bit.
        assert_eq!(verdicts(&prefix), [Verdict::Fail; 5]);
        assert!(checked(&prefix, "")[4].evidence.contains("not an erofs image"));
    }
}
