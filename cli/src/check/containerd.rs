//! Does containerd know the runtime?

use std::path::{Path, PathBuf};

use toml::Value;

use super::Finding;
use crate::containerd::{Configuration, ContainerdError, HANDLER, find_shim};

const WHAT: &str = "containerd";
const INSTALL: &str = "bulkhead install --restart";

/// What was found, and the shim's configuration file that containerd names.
#[derive(Debug)]
pub(crate) struct Registered {
    /// The findings.
    pub findings: Vec<Finding>,
    /// `ConfigPath` of the runtime's options.
    pub config_path: Option<PathBuf>,
}

/// Looks at the configuration of the containerd of the system in `root`.
pub(crate) fn check(root: &Path, file: &Path) -> Registered {
    match look(root, file) {
        Ok(registered) => registered,
        Err(error) => Registered {
            findings: vec![
                Finding::fail(WHAT, error.to_string())
                    .because("containerd does not start with it, or knows no runtimes in it"),
            ],
            config_path: None,
        },
    }
}

fn look(root: &Path, file: &Path) -> Result<Registered, ContainerdError> {
    let only = |finding| Ok(Registered { findings: vec![finding], config_path: None });
    let unknown = "without an entry there, Kubernetes can't start pods with this runtime (ctr can)";
    let Some(configuration) = Configuration::load(root, file)? else {
        return only(
            Finding::warn(WHAT, format!("there is no {}", file.display()))
                .because(unknown)
                .mended_by(INSTALL),
        );
    };
    let mut findings = Vec::new();
    if configuration.is_cri_disabled() {
        findings.push(
            Finding::warn(WHAT, format!("the CRI plugin is off in {}", file.display()))
                .because("Kubernetes can't use this containerd")
                .mended_by(format!("take \"cri\" out of disabled_plugins in {}", file.display())),
        );
    }
    let Some((place, handler)) = configuration.handler()? else {
        findings.push(
            Finding::warn(
                WHAT,
                format!(
                    "neither {} (version {}) nor what it imports has a runtime {HANDLER:?}",
                    file.display(),
                    configuration.version.number()
                ),
            )
            .because(unknown)
            .mended_by(INSTALL),
        );
        return Ok(Registered { findings, config_path: None });
    };
    match find_shim(root, &handler) {
        Ok(shim) => findings.push(Finding::ok(
            WHAT,
            format!("runtime {HANDLER:?} in {}: {}", place.display(), shim.display()),
        )),
        Err(reason) => findings.push(
            Finding::fail(WHAT, format!("the runtime {HANDLER:?} in {}: {reason}", place.display()))
                .because("containerd can't start the shim")
                .mended_by(INSTALL),
        ),
    }
    let config_path = handler
        .get("options")
        .and_then(|options| options.get("ConfigPath"))
        .and_then(Value::as_str)
        .filter(|path| !path.is_empty())
        .map(PathBuf::from);
    Ok(Registered { findings, config_path })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;
    use crate::containerd::DEFAULT_FILE;
    use crate::testing::Directory;

    fn checked(root: &Directory) -> Registered {
        check(root.path(), Path::new(DEFAULT_FILE))
    }

    #[test]
    fn each_thing_that_is_wrong_has_a_name() {
        let root = Directory::new();
        let verdicts = |registered: &Registered| -> Vec<Verdict> {
            registered.findings.iter().map(|finding| finding.verdict).collect()
        };
        assert_eq!(verdicts(&checked(&root)), [Verdict::Warn]);
        root.write("etc/containerd/config.toml", "version = [");
        assert_eq!(verdicts(&checked(&root)), [Verdict::Fail]);
        root.write("etc/containerd/config.toml", "version = 2\ndisabled_plugins = [\"cri\"]\n");
        assert_eq!(verdicts(&checked(&root)), [Verdict::Warn, Verdict::Warn]);

        let runtime = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.bulkhead]\n\
                       runtime_type = 'io.containerd.bulkhead.v1'\n\
                       [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.bulkhead.options]\n\
                       ConfigPath = '/etc/other.toml'\n";
        root.write("etc/containerd/config.toml", runtime);
        let registered = checked(&root);
        assert_eq!(verdicts(&registered), [Verdict::Fail]);
        assert_eq!(registered.config_path.as_deref(), Some(Path::new("/etc/other.toml")));
        root.write("usr/local/bin/containerd-shim-bulkhead-v1", "");
        assert_eq!(verdicts(&checked(&root)), [Verdict::Ok]);
        root.write("etc/containerd/config.toml", runtime.replace("bulkhead.v1", "runc.v2"));
        assert!(checked(&root).findings[0].evidence.contains("io.containerd.runc.v2"));
    }
}
