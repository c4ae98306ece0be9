//! Attempts to get out of a container, in pods of runc and of Bulkhead, and what the node shows of them afterwards.
//!
//! An [`Attempt`] is a program in the test image and, where it needs one, something on the host's side: a volume to give it, a
//! fact of its own to look at. [`arena`] runs it, [`facts`] judges it, [`report`] writes the table. The attempts themselves are
//! data, a module per theme. What an attempt says is shown and never believed.

use serde_json::Value;

use crate::failure::Outcome;

pub mod arena;
pub(crate) mod escapes;
pub(crate) mod exhaustion;
pub(crate) mod facts;
pub(crate) mod machine;
pub(crate) mod modules;
pub mod report;
mod spec;
pub(crate) mod stage;
pub(crate) mod volumes;

/// Under which circumstances a program is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Profile {
    /// A container as it comes by default.
    Default,
    /// Root with all capabilities, all devices, nothing masked or read-only.
    Privileged,
}

impl Profile {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Default, Self::Privileged];

    /// Its name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Privileged => "privileged",
        }
    }
}

/// What is run in the container.
#[derive(Debug, Clone, Copy)]
pub enum Program {
    /// One of `tests/attack/programs`, by name, with arguments.
    Attack(&'static [&'static str]),
    /// A shell script. Of the environment it has `OUTSIDE`, a directory of the host that was not shared with it, `UPPER`, the
    /// host's directory with what it writes to its root file system, and `NODE`, the process id of the suite on the host.
    Shell(&'static str),
}

/// Whether runc is shown the same.
#[derive(Debug, Clone, Copy)]
pub enum Contrast {
    /// Yes: what it does to the node is undone.
    Runc,
    /// No, for a reason that the table gives.
    Without(&'static str),
}

/// Changes a container's specification and prepares the host.
pub(crate) type Setup = fn(&mut stage::Stage, &mut Value) -> Outcome;

/// Looks for more than the common facts; returns breaches.
pub(crate) type Judge = fn(&stage::Stage, &stage::Said) -> Outcome<Vec<String>>;

/// One attempt.
#[derive(Clone, Copy)]
pub struct Attempt {
    /// `THEME-WHAT`.
    pub name: &'static str,
    /// What is tried, for a person.
    pub what: &'static str,
    /// The program.
    pub program: Program,
    /// Whether it gets a pod of its own; else it is an exec in one that others use too.
    pub alone: bool,
    /// Whether runc is shown the same.
    pub contrast: Contrast,
    /// What is prepared. Needs a pod of its own.
    pub setup: Option<Setup>,
    /// What is looked at beyond the common facts.
    pub judge: Option<Judge>,
    /// How long the program may take before it is killed, seconds.
    pub limit: u64,
    /// Whether it is part of `make test`.
    pub smoke: bool,
    /// Whether it must get out of a privileged container of runc's: shows that the facts would show it.
    pub runc_breaks: bool,
}

impl Attempt {
    /// An attempt in a pod that others use too, with contrast.
    pub(crate) const fn new(name: &'static str, what: &'static str, program: Program) -> Self {
        Self {
            name,
            what,
            program,
            alone: false,
            contrast: Contrast::Runc,
            setup: None,
            judge: None,
            limit: 20,
            smoke: false,
            runc_breaks: false,
        }
    }

    /// The same in a pod of its own.
    pub(crate) const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// The same without runc.
    pub(crate) const fn not_on_runc(mut self, reason: &'static str) -> Self {
        self.contrast = Contrast::Without(reason);
        self
    }

    /// The same with something prepared, in a pod of its own.
    pub(crate) const fn with(mut self, setup: Setup) -> Self {
        self.setup = Some(setup);
        self.alone()
    }

    /// The same with a look at more facts.
    pub(crate) const fn judged(mut self, judge: Judge) -> Self {
        self.judge = Some(judge);
        self
    }

    /// The same with another limit, seconds.
    pub(crate) const fn within(mut self, limit: u64) -> Self {
        self.limit = limit;
        self
    }

    /// The same, to get out of a privileged container of runc's for certain.
    pub(crate) const fn breaks_runc(mut self) -> Self {
        self.runc_breaks = true;
        self
    }

    /// The same as a part of `make test`.
    pub(crate) const fn smoke(mut self) -> Self {
        self.smoke = true;
        self
    }
}

/// Every attempt.
pub fn all() -> Vec<Attempt> {
    [modules::ATTEMPTS, volumes::ATTEMPTS, escapes::ATTEMPTS, machine::ATTEMPTS, exhaustion::ATTEMPTS]
        .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_of_one_theme() {
        let mut names: Vec<&str> = all().iter().map(|attempt| attempt.name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(names.iter().all(|name| name.contains('-')), "{names:?}");
    }
}
