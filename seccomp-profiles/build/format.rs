//! The format of our profiles: the JSON files of the crate `seccompiler`.
//!
//! A file maps one name to one profile. All that does not say for certain what it means is an error.

use std::collections::BTreeMap;
use std::fmt;

use bulkhead_seccomp_compiler::{Action, Architecture, CallRules, Comparison, Condition, Profile, Width};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use syscalls::x86_64::Sysno;

/// A file that is not a profile.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FormatError {
    /// Not JSON, or not of the format.
    #[error("not a profile")]
    Json(#[from] serde_json::Error),
    /// Other profiles than the one that is asked for.
    #[error("it must have one profile, named {0}")]
    Name(String),
    /// No call of x86-64.
    #[error("there is no system call {0:?}")]
    UnknownCall(String),
    /// The kernel passes six.
    #[error("system calls have no argument {0}")]
    Argument(u8),
    /// A list of conditions without any: it may have been meant to have some.
    #[error("a rule of {0} has an empty list of conditions")]
    NoConditions(String),
    /// Either the conditional rules are pointless, or the unconditional one allows too much.
    #[error("{0} has a rule without conditions beside others")]
    Pointless(String),
    /// Nothing is told apart.
    #[error("match_action and mismatch_action are the same")]
    SameActions,
}

/// Reads the profile of that name. As with `seccompiler`, what no rule matches gets `mismatch_action`, calls with 32-bit
/// pointers and calls newer than the profile included, and other architectures are killed.
pub(crate) fn parse(text: &str, name: &str) -> Result<Profile, FormatError> {
    let Entries(mut entries) = serde_json::from_str(text)?;
    let file = match (entries.pop(), entries.pop()) {
        (Some((only, file)), None) if only == name => file,
        _ => return Err(FormatError::Name(name.to_owned())),
    };
    let (matched, default) = (file.match_action.action(), file.mismatch_action.action());
    if matched == default {
        return Err(FormatError::SameActions);
    }
    let mut calls = BTreeMap::<u32, CallRules>::new();
    for rule in file.filter {
        let number: Sysno =
            rule.syscall.parse().map_err(|_| FormatError::UnknownCall(rule.syscall.clone()))?;
        let rules = calls.entry(number.id() as u32).or_default();
        let is_first = *rules == CallRules::default();
        match rule.args {
            None if is_first => rules.otherwise = Some(matched),
            None => return Err(FormatError::Pointless(rule.syscall)),
            Some(_) if rules.otherwise.is_some() => return Err(FormatError::Pointless(rule.syscall)),
            Some(args) if args.is_empty() => return Err(FormatError::NoConditions(rule.syscall)),
            Some(args) => {
                let conditions = args.iter().map(FileCondition::condition).collect::<Result<_, _>>()?;
                rules.conditional.push((conditions, matched));
            }
        }
    }
    Ok(Profile { default, newer: None, calls: vec![(Architecture::X86_64, calls)], x32: default })
}

/// What the file maps to what. A map would let a name that comes twice hide its first profile.
struct Entries(Vec<(String, FileProfile)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;

        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a map of profiles")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Entries, M::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(EntriesVisitor)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileProfile {
    mismatch_action: FileAction,
    match_action: FileAction,
    filter: Vec<FileRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRule {
    syscall: String,
    args: Option<Vec<FileCondition>>,
    #[serde(rename = "comment")]
    _comment: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileCondition {
    index: u8,
    #[serde(rename = "type")]
    width: FileWidth,
    op: Operator,
    val: u64,
    #[serde(rename = "comment")]
    _comment: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum FileAction {
    Allow,
    Errno(u16),
    KillThread,
    KillProcess,
    Log,
    Trace(u16),
    Trap,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum FileWidth {
    Dword,
    Qword,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Operator {
    Eq,
    Ge,
    Gt,
    Le,
    Lt,
    MaskedEq(u64),
    Ne,
}

impl FileAction {
    fn action(&self) -> Action {
        match *self {
            Self::Allow => Action::ALLOW,
            Self::Errno(number) => Action::errno(number.into()),
            Self::KillThread => Action(libc::SECCOMP_RET_KILL_THREAD),
            Self::KillProcess => Action::KILL_PROCESS,
            Self::Log => Action(libc::SECCOMP_RET_LOG),
            Self::Trace(number) => Action(libc::SECCOMP_RET_TRACE | u32::from(number)),
            Self::Trap => Action(libc::SECCOMP_RET_TRAP),
        }
    }
}

impl FileCondition {
    fn condition(&self) -> Result<Condition, FormatError> {
        if self.index > 5 {
            return Err(FormatError::Argument(self.index));
        }
        let width = match self.width {
            FileWidth::Dword => Width::Low32,
            FileWidth::Qword => Width::All64,
        };
        let comparison = match self.op {
            Operator::Eq => Comparison::Equal(self.val),
            Operator::Ge => Comparison::GreaterOrEqual(self.val),
            Operator::Gt => Comparison::Greater(self.val),
            Operator::Le => Comparison::LessOrEqual(self.val),
            Operator::Lt => Comparison::Less(self.val),
            // Of both sides only the bits of the mask count.
            Operator::MaskedEq(mask) => Comparison::MaskedEqual { mask, value: self.val & mask },
            Operator::Ne => Comparison::NotEqual(self.val),
        };
        Ok(Condition { argument: self.index, width, comparison })
    }
}
