//! The command line's arguments.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::{Arg, Parser, ValueExt};

/// What `bulkhead --help` prints.
pub const HELP: &str = "\
usage: bulkhead check [--prefix DIR] [--kvm DEVICE]
       bulkhead check --kvm-kind [--kvm DEVICE]
       bulkhead template build [--vcpus N] [--memory SIZE] [--again] [--config FILE]
       bulkhead template list | remove KEY... | remove --all | verify [KEY...] [--config FILE]
       bulkhead --help | --version

check          Can pods run on this node? One line for each thing they need; exit code 0 only if they can.
  --kvm-kind   Print only what kind of KVM this is: hardware, software or none.
  --kvm        The KVM device (default /dev/kvm).
  --prefix     Where Bulkhead is installed (default: where this program is, without its bin/).

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
pub struct Arguments {
    /// What to do.
    pub command: Command,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Print [`HELP`].
    Help,
    /// Print the version.
    Version,
    /// Say whether pods can run here.
    Check {
        /// The KVM device.
        device: PathBuf,
        /// Where Bulkhead is installed, if it was given.
        prefix: Option<PathBuf>,
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
pub enum TemplateAction {
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
pub enum Selection {
    /// Every one.
    All,
    /// Those whose keys begin with these.
    Keys(Vec<String>),
}

/// A command line that makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum ArgumentsError {
    /// Nothing was asked for.
    #[error("no command given; bulkhead --help lists them")]
    NoCommand,
    /// Two options that exclude each other.
    #[error("--kvm-kind looks at the KVM device only and takes no --prefix")]
    PrefixWithKvmKind,
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
    pub fn parse(mut parser: Parser) -> Result<Self, ArgumentsError> {
        let command = match parser.next()? {
            None => return Err(ArgumentsError::NoCommand),
            Some(Arg::Long("help") | Arg::Short('h')) => Command::Help,
            Some(Arg::Long("version") | Arg::Short('V')) => Command::Version,
            Some(Arg::Value(name)) if name == "check" => check(&mut parser)?,
            Some(Arg::Value(name)) if name == "template" => template(&mut parser)?,
            Some(Arg::Value(name)) => return Err(ArgumentsError::UnknownCommand(name)),
            Some(other) => return Err(other.unexpected().into()),
        };
        Ok(Self { command })
    }
}

fn check(parser: &mut Parser) -> Result<Command, ArgumentsError> {
    let mut device = PathBuf::from("/dev/kvm");
    let mut prefix = None;
    let mut kind_only = false;
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("help") | Arg::Short('h') => return Ok(Command::Help),
            Arg::Long("kvm") => device = parser.value()?.parse()?,
            Arg::Long("kvm-kind") => kind_only = true,
            Arg::Long("prefix") => prefix = Some(parser.value()?.parse()?),
            other => return Err(other.unexpected().into()),
        }
    }
    match (kind_only, prefix) {
        (true, Some(_)) => Err(ArgumentsError::PrefixWithKvmKind),
        (true, None) => Ok(Command::KvmKind { device }),
        (false, prefix) => Ok(Command::Check { device, prefix }),
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
        assert_eq!(parse(&["check"]), Ok(Command::Check { device: "/dev/kvm".into(), prefix: None }));
    }

    #[test]
    fn options_are_read() {
        assert_eq!(
            parse(&["check", "--prefix", "/opt/b", "--kvm=/dev/other"]),
            Ok(Command::Check { device: "/dev/other".into(), prefix: Some("/opt/b".into()) })
        );
        assert_eq!(parse(&["check", "--kvm-kind"]), Ok(Command::KvmKind { device: "/dev/kvm".into() }));
        assert_eq!(parse(&["check", "--help"]), Ok(Command::Help));
        assert_eq!(parse(&["--version"]), Ok(Command::Version));
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
            (&["check", "--kvm-kind", "--prefix", "/opt"][..], "takes no --prefix"),
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
