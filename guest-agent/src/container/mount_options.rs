//! The options of an OCI mount (`mounts[].options`, runtime specification 1.2, "Linux mount options").

use crate::sys::mount::{AttrChange, attr};

/// Options, sorted by what they apply to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MountOptions {
    /// `Some(recursive)` for a bind mount.
    pub bind: Option<bool>,
    /// Attributes of the mount itself.
    pub attributes: AttrChange,
    /// Attributes of the mount and everything mounted below it.
    pub recursive_attributes: AttrChange,
    /// Propagation types to set, in order, and whether for everything below too.
    pub propagation: Vec<(u64, bool)>,
    /// Whether a tmpfs starts with what it hides.
    pub copy_up: bool,
    /// Options for the file system.
    pub data: Vec<String>,
}

/// An option that can't be carried out.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum OptionError {
    #[error("the option {0:?} is not supported")]
    Unsupported(String),
    #[error("a bind mount has no option {0:?}")]
    UnknownForBind(String),
}

impl MountOptions {
    /// Sorts `options`; `bind` says whether the mount's type makes it a bind mount already.
    pub(crate) fn parse(options: &[String], bind: bool) -> Result<Self, OptionError> {
        let mut parsed = Self { bind: bind.then_some(false), ..Self::default() };
        for option in options {
            parsed.add(option)?;
        }
        if let (Some(_), Some(unknown)) = (parsed.bind, parsed.data.first()) {
            return Err(OptionError::UnknownForBind(unknown.clone()));
        }
        Ok(parsed)
    }

    fn add(&mut self, option: &str) -> Result<(), OptionError> {
        if let Some((set, clear)) = attribute(option) {
            merge(&mut self.attributes, set, clear);
            return Ok(());
        }
        // The recursive form of an attribute is its name after an `r`.
        if let Some((set, clear)) = option.strip_prefix('r').and_then(attribute) {
            merge(&mut self.recursive_attributes, set, clear);
            return Ok(());
        }
        if let Some(propagation) = propagation(option) {
            self.propagation.push(propagation);
            return Ok(());
        }
        match option {
            "bind" => self.bind = self.bind.or(Some(false)),
            "rbind" => self.bind = Some(true),
            "tmpcopyup" => self.copy_up = true,
            "remount" | "idmap" | "ridmap" => return Err(OptionError::Unsupported(option.to_owned())),
            // The kernel's defaults.
            "" | "defaults" | "async" | "loud" | "nomand" | "nolazytime" | "noiversion" => {}
            // Properties of a whole file system, which a bind mount does not make.
            "sync" | "dirsync" | "mand" | "lazytime" | "iversion" | "silent" if self.bind.is_some() => {}
            _ => self.data.push(option.to_owned()),
        }
        Ok(())
    }

    /// Whether the mount itself is to be read-only.
    pub(crate) fn read_only(&self) -> bool {
        self.attributes.set & attr::RDONLY != 0
    }
}

/// The latest of contradicting options counts.
fn merge(change: &mut AttrChange, set: u64, clear: u64) {
    change.set = change.set & !clear | set;
    change.clear = change.clear & !set | clear;
}

/// The attributes that an option sets and clears.
fn attribute(option: &str) -> Option<(u64, u64)> {
    Some(match option {
        "ro" => (attr::RDONLY, 0),
        "rw" => (0, attr::RDONLY),
        "nosuid" => (attr::NOSUID, 0),
        "suid" => (0, attr::NOSUID),
        "nodev" => (attr::NODEV, 0),
        "dev" => (0, attr::NODEV),
        "noexec" => (attr::NOEXEC, 0),
        "exec" => (0, attr::NOEXEC),
        "nodiratime" => (attr::NODIRATIME, 0),
        "diratime" => (0, attr::NODIRATIME),
        "nosymfollow" => (attr::NOSYMFOLLOW, 0),
        "symfollow" => (0, attr::NOSYMFOLLOW),
        // The access time policy is one field, which the kernel wants cleared as a whole before any value.
        "relatime" | "atime" | "nostrictatime" => (attr::RELATIME, attr::ATIME_MASK),
        "noatime" => (attr::NOATIME, attr::ATIME_MASK),
        "strictatime" | "norelatime" => (attr::STRICTATIME, attr::ATIME_MASK),
        _ => return None,
    })
}

/// The propagation type of an option's name, and whether it goes for all mounts below too.
pub(crate) fn propagation(option: &str) -> Option<(u64, bool)> {
    let kind = match option.strip_prefix('r').unwrap_or(option) {
        "private" => libc::MS_PRIVATE,
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some((kind, option.starts_with('r')))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str], bind: bool) -> Result<MountOptions, OptionError> {
        let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        MountOptions::parse(&options, bind)
    }

    #[test]
    fn usual_options_of_a_tmpfs() {
        let options = parse(&["nosuid", "strictatime", "mode=755", "size=65536k"], false).unwrap();
        assert_eq!(options.attributes, AttrChange::new(attr::NOSUID | attr::STRICTATIME, attr::ATIME_MASK));
        assert_eq!(options.data, ["mode=755", "size=65536k"]);
        assert_eq!(options.bind, None);
    }

    #[test]
    fn the_last_of_contradicting_options_counts() {
        let options = parse(&["ro", "nosuid", "rw"], true).unwrap();
        assert_eq!(options.attributes, AttrChange::new(attr::NOSUID, attr::RDONLY));
        assert!(!options.read_only());
    }

    #[test]
    fn recursive_attributes_are_apart() {
        let options = parse(&["rbind", "rro", "rnosuid", "nodev", "rslave"], false).unwrap();
        assert_eq!(options.bind, Some(true));
        assert_eq!(options.recursive_attributes, AttrChange::new(attr::RDONLY | attr::NOSUID, 0));
        assert_eq!(options.attributes, AttrChange::new(attr::NODEV, 0));
        assert_eq!(options.propagation, [(libc::MS_SLAVE, true)]);
        // `relatime`, `rw` and `ro` begin with an r of their own.
        let options = parse(&["relatime", "rw"], true).unwrap();
        assert!(options.recursive_attributes.is_empty());
    }

    #[test]
    fn what_would_be_lost_silently_is_refused() {
        assert_eq!(parse(&["r0"], true), Err(OptionError::UnknownForBind("r0".into())));
        assert_eq!(parse(&["idmap"], true), Err(OptionError::Unsupported("idmap".into())));
        assert_eq!(parse(&["remount", "ro"], true), Err(OptionError::Unsupported("remount".into())));
    }
}
