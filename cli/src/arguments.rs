//! The command line's arguments.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::{Arg, Parser, ValueExt};

use crate::containerd::Version;
use crate::{check, install};

/// What `bulkhead --help` prints.
pub(crate) const HELP: &str = "\
usage: bulkhead check [--json] [--prefix DIR] [--config FILE] [--containerd-config FILE] [--kvm DEVICE]
       bulkhead check --kvm-kind [--kvm DEVICE]
       bulkhead install [--from DIR] [--prefix DIR] [--root DIR [--chroot]] [--containerd-config FILE]
                        [--config-version N] [--no-templates] [--restart] [--dry-run]
       bulkhead uninstall [--prefix DIR] [--root DIR [--chroot]] [--containerd-config FILE] [--force] [--restart] [--dry-run]
       bulkhead ps [--json]
       bulkhead logs POD
       bulkhead exec POD QUESTION...
       bulkhead template build [--vcpus N] [--memory SIZE] [--again] [--config FILE]
       bulkhead template list | remove KEY... | remove --all | verify [KEY...] [--config FILE]
       bulkhead --help | --version

check                  Can pods run on this node, and how well are they kept apart? For each thing: what is so, why it
                       matters, and the command that mends it. Exit code 0 only if pods can run.
  --json               The same for programs.
  --prefix             Where Bulkhead is installed (default: where this program is, without its bin/).
  --config             The shim's configuration file (default: what containerd's configuration names, else
                       /etc/bulkhead/config.toml, if there is one).
  --containerd-config  containerd's configuration file (default /etc/containerd/config.toml).
  --kvm                The KVM device (default: as configured).
  --kvm-kind           Print only what kind of KVM this is: hardware, nested, software or none.

install                Puts the parts under a prefix, a drop-in beside containerd's configuration (conf.d/bulkhead.toml, and
                       no other file of containerd's), and builds the template of the default size. What is there
                       already is left alone; what is left to do is said.
  --from               Where the parts are (default: where this program is, without its bin/).
  --prefix             Where they go (default /usr/local).
  --root               Install into the system in DIR; its programs are run only with --chroot.
  --config-version     2, 3 or 4: the version of containerd's configuration, where there is no such file.
  --no-templates       Build no template.
  --restart            Restart containerd if its configuration has changed. Pods live on.
  --dry-run            Only say what would be done.
uninstall              Takes away what install put there, as far as nobody has changed it since.
  --force              Although pods run.

ps                     The pods of this node.
logs                   What is kept of a pod's console and of what its processes said. POD: the beginning of an id or a name.
exec                   Asks a pod's guest, as it is outside of its containers: ps, mounts, network, memory, cgroups, dmesg,
                       version, cat FILE; help says what each shows.

template build    Makes the template that pods of one size start from, unless there is one.
  --vcpus         vCPUs (default: as configured).
  --memory        Guest memory, such as 512Mi (default: as configured).
  --again         Make it even if there is one.
template list     Which templates there are, the most recently used first.
template remove   Removes templates; the beginning of a key is enough. Running pods are not affected.
template verify   Reads templates completely and compares their digests; exit code 0 only if all are sound.
  --config        The shim's configuration file (default /etc/bulkhead/config.toml, if there is one).
";

/// The arguments, checked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// What to do.
    pub command: Command,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Print [`HELP`].
    Help,
    /// Print the version.
    Version,
    /// Say whether pods can run here.
    Check(check::Options),
    /// Install.
    Install(install::Options),
    /// Take an installation away.
    Uninstall {
        /// What was installed where.
        options: install::Options,
        /// Although pods run.
        force: bool,
    },
    /// Print what is kept of a pod's output.
    Logs {
        /// The beginning of its id or name.
        pod: String,
    },
    /// Ask a pod's guest.
    Exec {
        /// The beginning of its id or name.
        pod: String,
        /// What.
        question: String,
    },
    /// Print the pods of this node.
    Pods {
        /// Print JSON.
        json: bool,
    },
    /// Look after templates.
    Template {
        /// The shim's configuration file, if it was given.
        config: Option<PathBuf>,
        /// What to do.
        action: TemplateAction,
    },
    /// Print the kind of KVM in one word.
    KvmKind {
        /// The KVM device.
        device: PathBuf,
    },
}

/// What to do with templates.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum TemplateAction {
    /// Make one.
    Build {
        /// Number of vCPUs, as in the annotation.
        vcpus: Option<String>,
        /// Guest memory, as in the annotation.
        memory: Option<String>,
        /// Even if there is one.
        again: bool,
    },
    /// Print which there are.
    List,
    /// Remove some.
    Remove(Selection),
    /// Check some.
    Verify(Selection),
}

/// Which templates.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Selection {
    /// Every one.
    All,
    /// Those whose keys begin with these.
    Keys(Vec<String>),
}

/// A command line that makes no sense.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArgumentsError {
    /// Nothing was asked for.
    #[error("no command given; bulkhead --help lists them")]
    NoCommand,
    /// Two options that exclude each other.
    #[error("--kvm-kind looks at the KVM device only and takes no option but --kvm")]
    OptionWithKvmKind,
    /// A version of containerd's configuration that does not exist.
    #[error("--config-version is {0:?}: 2, 3 and 4 are possible")]
    ConfigVersion(String),
    /// No pod where one is needed.
    #[error("logs needs a pod, and exec a pod and a question, such as ps; bulkhead ps shows the pods")]
    NoPod,
    /// No key where one is needed.
    #[error("template remove needs keys, or --all; bulkhead template list shows them")]
    NoKey,
    /// Something that `template` can't do.
    #[error("template what? build, list, remove and verify are possible")]
    TemplateAction,
    /// An argument that is not known, or lacks its value.
    #[error("{0}; bulkhead --help says what there is")]
    Unexpected(#[from] lexopt::Error),
    /// A command that is not known.
    #[error("unknown command {0:?}; bulkhead --help lists them")]
    UnknownCommand(OsString),
}

impl Arguments {
    /// Reads the arguments.
    ///
    /// # Errors
    /// Unknown or contradictory arguments.
    pub(crate) fn parse(mut parser: Parser) -> Result<Self, ArgumentsError> {
        let command = match parser.next()? {
            None => return Err(ArgumentsError::NoCommand),
            Some(Arg::Long("help") | Arg::Short('h')) => Command::Help,
            Some(Arg::Long("version") | Arg::Short('V')) => Command::Version,
            Some(Arg::Value(name)) if name == "check" => check(&mut parser)?,
            Some(Arg::Value(name)) if name == "install" => install(&mut parser, false)?,
            Some(Arg::Value(name)) if name == "uninstall" => install(&mut parser, true)?,
            Some(Arg::Value(name)) if name == "ps" => pods(&mut parser)?,
            Some(Arg::Value(name)) if name == "logs" => ask(&mut parser, false)?,
            Some(Arg::Value(name)) if name == "exec" => ask(&mut parser, true)?,
            Some(Arg::Value(name)) if name == "template" => template(&mut parser)?,
            Some(Arg::Value(name)) => return Err(ArgumentsError::UnknownCommand(name)),
            Some(other) => return Err(other.unexpected().into()),
        };
        Ok(Self { command })
    }
}

fn check(parser: &mut Parser) -> Result<Command, ArgumentsError> {
    let mut options = check::Options::default();
    let mut kind_only = false;
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("help") | Arg::Short('h') => return Ok(Command::Help),
            Arg::Long("kvm") => options.device = Some(parser.value()?.parse()?),
            Arg::Long("kvm-kind") => kind_only = true,
            Arg::Long("prefix") => options.prefix = Some(parser.value()?.parse()?),
            Arg::Long("config") => options.config = Some(parser.value()?.parse()?),
            Arg::Long("containerd-config") => options.containerd = parser.value()?.parse()?,
            Arg::Long("json") => options.json = true,
            other => return Err(other.unexpected().into()),
        }
    }
    if !kind_only {
        return Ok(Command::Check(options));
    }
    let device = options.device.take();
    if options != check::Options::default() {
        return Err(ArgumentsError::OptionWithKvmKind);
    }
    Ok(Command::KvmKind { device: device.unwrap_or_else(|| "/dev/kvm".into()) })
}

/// `install`, and `uninstall`, which takes fewer options.
fn install(parser: &mut Parser, undo: bool) -> Result<Command, ArgumentsError> {
    let mut options = install::Options::default();
    let mut force = false;
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("help") | Arg::Short('h') => return Ok(Command::Help),
            Arg::Long("prefix") => options.prefix = parser.value()?.parse()?,
            Arg::Long("root") => options.root = parser.value()?.parse()?,
            Arg::Long("chroot") => options.chroot = true,
            Arg::Long("containerd-config") => options.config = parser.value()?.parse()?,
            Arg::Long("restart") => options.restart = true,
            Arg::Long("dry-run") => options.dry_run = true,
            Arg::Long("force") if undo => force = true,
            Arg::Long("from") if !undo => options.from = Some(parser.value()?.parse()?),
            Arg::Long("no-templates") if !undo => options.templates = false,
            Arg::Long("config-version") if !undo => {
                let text = parser.value()?.string()?;
                let version = text.parse().ok().and_then(Version::from_number);
                options.version = Some(version.ok_or(ArgumentsError::ConfigVersion(text))?);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(if undo { Command::Uninstall { options, force } } else { Command::Install(options) })
}

fn pods(parser: &mut Parser) -> Result<Command, ArgumentsError> {
    let mut json = false;
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("help") | Arg::Short('h') => return Ok(Command::Help),
            Arg::Long("json") => json = true,
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Command::Pods { json })
}

/// `logs POD`, and `exec POD QUESTION...`.
fn ask(parser: &mut Parser, exec: bool) -> Result<Command, ArgumentsError> {
    let mut words = Vec::new();
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("help") | Arg::Short('h') => return Ok(Command::Help),
            Arg::Value(word) if exec || words.is_empty() => words.push(word.string()?),
            other => return Err(other.unexpected().into()),
        }
    }
    match words.split_first() {
        Some((pod, [])) if !exec => Ok(Command::Logs { pod: pod.clone() }),
        Some((pod, question @ [_, ..])) => {
            Ok(Command::Exec { pod: pod.clone(), question: question.join(" ") })
        }
        _ => Err(ArgumentsError::NoPod),
    }
}

fn template(parser: &mut Parser) -> Result<Command, ArgumentsError> {
    let action = match parser.next()? {
        Some(Arg::Long("help") | Arg::Short('h')) => return Ok(Command::Help),
        Some(Arg::Value(action)) => action,
        _ => return Err(ArgumentsError::TemplateAction),
    };
    let action = action.to_str().unwrap_or_default().to_owned();
    if !["build", "list", "remove", "verify"].contains(&action.as_str()) {
        return Err(ArgumentsError::TemplateAction);
    }
    let (mut config, mut vcpus, mut memory, mut again, mut all) = (None, None, None, false, false);
    let mut keys = Vec::new();
    while let Some(argument) = parser.next()? {
        match (action.as_str(), argument) {
            (_, Arg::Long("help") | Arg::Short('h')) => return Ok(Command::Help),
            (_, Arg::Long("config")) => config = Some(parser.value()?.parse()?),
            ("build", Arg::Long("vcpus")) => vcpus = Some(parser.value()?.string()?),
            ("build", Arg::Long("memory")) => memory = Some(parser.value()?.string()?),
            ("build", Arg::Long("again")) => again = true,
            ("remove", Arg::Long("all")) => all = true,
            ("remove" | "verify", Arg::Value(key)) => keys.push(key.string()?),
            (_, other) => return Err(other.unexpected().into()),
        }
    }
    let action = match action.as_str() {
        "build" => TemplateAction::Build { vcpus, memory, again },
        "list" => TemplateAction::List,
        "remove" if all => TemplateAction::Remove(Selection::All),
        "remove" if keys.is_empty() => return Err(ArgumentsError::NoKey),
        "remove" => TemplateAction::Remove(Selection::Keys(keys)),
        _ if keys.is_empty() => TemplateAction::Verify(Selection::All),
        _ => TemplateAction::Verify(Selection::Keys(keys)),
    };
    Ok(Command::Template { config, action })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Command, String> {
        Arguments::parse(Parser::from_args(arguments))
            .map(|arguments| arguments.command)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn check_has_defaults() {
        assert_eq!(parse(&["check"]), Ok(Command::Check(check::Options::default())));
    }

    #[test]
    fn options_are_read() {
        let expected = check::Options {
            device: Some("/dev/other".into()),
            prefix: Some("/opt/b".into()),
            json: true,
            ..check::Options::default()
        };
        assert_eq!(
            parse(&["check", "--prefix", "/opt/b", "--kvm=/dev/other", "--json"]),
            Ok(Command::Check(expected))
        );
        assert_eq!(parse(&["check", "--kvm-kind"]), Ok(Command::KvmKind { device: "/dev/kvm".into() }));
        assert_eq!(parse(&["check", "--help"]), Ok(Command::Help));
        assert_eq!(parse(&["--version"]), Ok(Command::Version));
        assert_eq!(parse(&["ps", "--json"]), Ok(Command::Pods { json: true }));
        assert_eq!(parse(&["logs", "web"]), Ok(Command::Logs { pod: "web".into() }));
        assert_eq!(
            parse(&["exec", "web", "cat", "/proc/stat"]),
            Ok(Command::Exec { pod: "web".into(), question: "cat /proc/stat".into() })
        );
    }

    #[test]
    fn installing_and_its_undoing() {
        let options = install::Options {
            root: "/host".into(),
            chroot: true,
            version: Some(Version::Two),
            templates: false,
            dry_run: true,
            ..install::Options::default()
        };
        assert_eq!(
            parse(&[
                "install",
                "--root",
                "/host",
                "--chroot",
                "--config-version=2",
                "--no-templates",
                "--dry-run"
            ]),
            Ok(Command::Install(options))
        );
        assert_eq!(
            parse(&["uninstall", "--force"]),
            Ok(Command::Uninstall { options: install::Options::default(), force: true })
        );
    }

    #[test]
    fn templates_are_looked_after() {
        let template = |action| Ok(Command::Template { config: None, action });
        let keys = |keys: &[&str]| Selection::Keys(keys.iter().map(|&key| key.to_owned()).collect());
        assert_eq!(parse(&["template", "list"]), template(TemplateAction::List));
        assert_eq!(
            parse(&["template", "build", "--vcpus", "2", "--again"]),
            template(TemplateAction::Build { vcpus: Some("2".into()), memory: None, again: true })
        );
        assert_eq!(parse(&["template", "remove", "--all"]), template(TemplateAction::Remove(Selection::All)));
        assert_eq!(
            parse(&["template", "remove", "a", "b"]),
            template(TemplateAction::Remove(keys(&["a", "b"])))
        );
        assert_eq!(
            parse(&["template", "verify", "--config", "/c"]),
            Ok(Command::Template {
                config: Some("/c".into()),
                action: TemplateAction::Verify(Selection::All)
            })
        );
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (arguments, said) in [
            (&[][..], "no command"),
            (&["chekc"][..], "chekc"),
            (&["check", "--fast"][..], "--fast"),
            (&["check", "extra"][..], "extra"),
            (&["check", "--prefix"][..], "--prefix"),
            (&["check", "--kvm-kind", "--prefix", "/opt"][..], "no option but --kvm"),
            (&["install", "--force"][..], "--force"),
            (&["install", "--config-version", "1"][..], "2, 3 and 4"),
            (&["uninstall", "--from", "/x"][..], "--from"),
            (&["ps", "x"][..], "x"),
            (&["logs"][..], "needs a pod"),
            (&["logs", "a", "b"][..], "b"),
            (&["exec", "a"][..], "a question"),
            (&["template"][..], "template what"),
            (&["template", "boil"][..], "template what"),
            (&["template", "remove"][..], "needs keys"),
            (&["template", "list", "--all"][..], "--all"),
            (&["template", "build", "abc"][..], "abc"),
        ] {
            let error = parse(arguments).unwrap_err();
            assert!(error.contains(said), "{arguments:?}: {error}");
        }
    }
}
