//! Installing into a directory that stands for another system.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::testing::Directory;

/// A system, and the parts to install into it.
struct Stage {
    root: Directory,
    from: Directory,
}

impl Stage {
    fn set() -> Self {
        let stage = Self { root: Directory::new(), from: Directory::new() };
        for part in [
            "bin/containerd-shim-bulkhead-v1",
            "bin/bulkhead",
            "libexec/bulkhead/bulkhead-vmm",
            "libexec/bulkhead/bulkhead-fs",
            "share/bulkhead/vmlinux",
            "share/bulkhead/guest.erofs",
        ] {
            stage.from.write(part, format!("the {part}"));
        }
        stage.root.write("etc/containerd/config.toml", "version = 3\nimports = ['conf.d/*.toml']\n");
        stage
    }

    fn options(&self) -> Options {
        Options {
            from: Some(self.from.path().to_owned()),
            root: self.root.path().to_owned(),
            ..Options::default()
        }
    }

    fn install(&self) -> Result<String, InstallError> {
        install_with(&self.options())
    }

    fn uninstall(&self) -> Result<String, UninstallError> {
        let mut out = Vec::new();
        uninstall(&self.options(), false, &mut out).map(|()| String::from_utf8(out).unwrap())
    }
}

fn install_with(options: &Options) -> Result<String, InstallError> {
    let mut out = Vec::new();
    install(options, &mut out).map(|()| String::from_utf8(out).unwrap())
}

#[test]
fn what_has_changed_since_is_told() {
    let stage = Stage::set();
    let altered = || altered(stage.root.path(), &Options::default().prefix).unwrap();
    assert_eq!(altered(), None);
    stage.install().unwrap();
    let (count, files) = altered().unwrap();
    assert!(count >= 6 && files.is_empty(), "{count} files, {files:?}");
    let prefix = Options::default().prefix;
    let image = prefix.join("share/bulkhead/guest.erofs");
    fs::write(crate::containerd::in_root(stage.root.path(), &image), "another").unwrap();
    fs::remove_file(crate::containerd::in_root(stage.root.path(), &prefix.join("bin/bulkhead"))).unwrap();
    assert_eq!(altered().unwrap().1, [prefix.join("bin/bulkhead"), image]);
}

#[test]
fn what_is_installed_is_taken_away_again_and_nothing_else() {
    let stage = Stage::set();
    stage.root.write("usr/local/share/other", "somebody else's");
    let before = stage.root.list();
    let said = stage.install().unwrap();
    assert!(said.contains("installed /usr/local/bin/bulkhead\n"), "{said}");
    assert!(said.contains("to do: containerd reads its configuration when it starts"), "{said}");
    assert!(!said.contains("does not import"), "{said}");
    let mode =
        |place: &str| fs::metadata(stage.root.path().join(place)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("usr/local/libexec/bulkhead/bulkhead-vmm"), 0o755);
    assert_eq!(mode("usr/local/share/bulkhead/vmlinux"), 0o644);
    let main = Configuration::load(stage.root.path(), Path::new(containerd::DEFAULT_FILE)).unwrap().unwrap();
    let (_, handler) = main.handler().unwrap().unwrap();
    assert_eq!(
        containerd::find_shim(stage.root.path(), &handler),
        Ok("/usr/local/bin/containerd-shim-bulkhead-v1".into())
    );

    let said = stage.uninstall().unwrap();
    assert!(said.contains("removed /etc/containerd/conf.d/bulkhead.toml\n"), "{said}");
    assert_eq!(stage.root.list(), before);
    assert!(matches!(stage.uninstall(), Err(UninstallError::Nothing(_))));
}

#[test]
fn what_was_there_before_stays() {
    let stage = Stage::set();
    stage.root.write("usr/local/bin/bulkhead", "the bin/bulkhead");
    stage.root.write("usr/local/libexec/bulkhead/bulkhead-vmm", "an older one");
    stage.install().unwrap();
    stage.uninstall().unwrap();
    assert!(stage.root.path().join("usr/local/bin/bulkhead").exists());
    assert!(!stage.root.path().join("usr/local/libexec/bulkhead/bulkhead-vmm").exists());
}

#[test]
fn again_changes_nothing_and_an_update_replaces() {
    let stage = Stage::set();
    stage.install().unwrap();
    let said = stage.install().unwrap();
    assert!(said.lines().all(|line| line.starts_with("unchanged")), "{said}");

    stage.from.write("bin/bulkhead", "a newer one");
    let said = stage.install().unwrap();
    assert!(said.contains("replaced /usr/local/bin/bulkhead\n"), "{said}");
    assert_eq!(said.matches("unchanged").count(), 6, "{said}");
    stage.uninstall().unwrap();
    assert!(!stage.root.path().join("usr/local/bin").exists());
}

#[test]
fn a_dry_run_does_nothing() {
    let stage = Stage::set();
    let before = stage.root.list();
    let said = install_with(&Options { dry_run: true, ..stage.options() }).unwrap();
    assert_eq!(said.matches("would install").count(), 7, "{said}");
    assert_eq!(stage.root.list(), before);

    stage.install().unwrap();
    let before = stage.root.list();
    let mut out = Vec::new();
    uninstall(&Options { dry_run: true, ..stage.options() }, false, &mut out).unwrap();
    assert_eq!(String::from_utf8(out).unwrap().matches("would remove").count(), 7);
    assert_eq!(stage.root.list(), before);
}

#[test]
fn what_others_have_changed_stays() {
    let stage = Stage::set();
    stage.install().unwrap();
    stage.root.write("usr/local/bin/bulkhead", "somebody's own");
    let said = stage.uninstall().unwrap();
    assert!(said.contains("left /usr/local/bin/bulkhead"), "{said}");
    assert!(stage.root.path().join("usr/local/bin/bulkhead").exists());
    assert!(!stage.root.path().join("usr/local/libexec").exists());

    stage.root.write("etc/containerd/conf.d/bulkhead.toml", "version = 3 # mine");
    assert!(matches!(stage.install(), Err(InstallError::Foreign(_))));
}

#[test]
fn an_installation_that_was_cut_off_is_taken_away_whole() {
    let stage = Stage::set();
    stage.install().unwrap();
    stage.from.write("bin/bulkhead", "a newer one");
    // It ends after the record and before that file.
    let options = stage.options();
    let parts = files::parts(stage.from.path(), &options).unwrap();
    let place = options.place(&options.record_path());
    Record::load(&place).unwrap().unwrap().with(&parts).unwrap().save(&place).unwrap();
    let said = stage.uninstall().unwrap();
    assert!(said.contains("removed /usr/local/bin/bulkhead\n"), "{said}");
}

#[test]
fn what_is_left_to_do_is_said() {
    let stage = Stage::set();
    stage.root.write("etc/containerd/config.toml", "version = 2\n");
    let said = stage.install().unwrap();
    assert!(said.contains("imports = ['/etc/containerd/conf.d/*.toml']"), "{said}");
    fs::remove_file(stage.root.path().join("etc/containerd/config.toml")).unwrap();
    let said = install_with(&Options { version: Some(Version::Four), ..stage.options() }).unwrap();
    assert!(said.contains("    version = 4\n"), "{said}");
}

#[test]
fn what_can_not_be_installed_is_told_before_anything_is_touched() {
    let stage = Stage::set();
    let before = stage.root.list();
    fs::remove_file(stage.from.path().join("share/bulkhead/guest.erofs")).unwrap();
    assert!(matches!(stage.install(), Err(InstallError::File(FileError::Missing(_)))));
    let relative = Options { prefix: "opt".into(), ..stage.options() };
    assert!(matches!(install_with(&relative), Err(InstallError::Relative { .. })));
    assert_eq!(stage.root.list(), before);
}
