//! The command line's arguments.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::{Arg, Parser, ValueExt};

/// What `bulkhead --help` prints.
pub const HELP: &str = "\
usage: bulkhead check [--prefix DIR] [--kvm DEVICE]
       bulkhead check --kvm-kind [--kvm DEVICE]
       bulkhead --help | --version

check          Can pods run on this node? One line for each thing they need; exit code 0 only if they can.
  --kvm-kind   Print only what kind of KVM this is: hardware, software or none.
  --kvm        The KVM device (default /dev/kvm).
  --prefix     Where Bulkhead is installed (default: where this program is, without its bin/).
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
    /// Print the kind of KVM in one word.
    KvmKind {
        /// The KVM device.
        device: PathBuf,
    },
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
    fn nonsense_is_refused_by_name() {
        for (arguments, said) in [
            (&[][..], "no command"),
            (&["chekc"][..], "chekc"),
            (&["check", "--fast"][..], "--fast"),
            (&["check", "extra"][..], "extra"),
            (&["check", "--prefix"][..], "--prefix"),
            (&["check", "--kvm-kind", "--prefix", "/opt"][..], "takes no --prefix"),
        ] {
            let error = parse(arguments).unwrap_err();
            assert!(error.contains(said), "{arguments:?}: {error}");
        }
    }
}
