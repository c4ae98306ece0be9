//! A mount as containerd asks for it, and what its options mean.

use nix::mount::MsFlags;

use super::mounts::MountError;

/// A mount as containerd asks for it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct MountRequest {
    /// File system type.
    pub kind: String,
    /// Device, directory, or whatever the type takes.
    pub source: String,
    /// Directory below the root to mount on; empty for the root itself.
    pub target: String,
    /// Options as in fstab(5).
    pub options: Vec<String>,
}

/// A mount's options, taken apart.
pub(super) struct ParsedOptions {
    /// Those that the kernel takes as flags.
    pub flags: MsFlags,
    /// The others, for the file system.
    pub data: Vec<String>,
}

pub(super) fn parse_options(options: &[String]) -> Result<ParsedOptions, MountError> {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        let (flag, set) = match option.as_str() {
            "" | "defaults" => (MsFlags::empty(), true),
            "ro" => (MsFlags::MS_RDONLY, true),
            "rw" => (MsFlags::MS_RDONLY, false),
            "bind" => (MsFlags::MS_BIND, true),
            "rbind" => (MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
            "nosuid" => (MsFlags::MS_NOSUID, true),
            "suid" => (MsFlags::MS_NOSUID, false),
            "nodev" => (MsFlags::MS_NODEV, true),
            "dev" => (MsFlags::MS_NODEV, false),
            "noexec" => (MsFlags::MS_NOEXEC, true),
            "exec" => (MsFlags::MS_NOEXEC, false),
            "sync" => (MsFlags::MS_SYNCHRONOUS, true),
            "async" => (MsFlags::MS_SYNCHRONOUS, false),
            "dirsync" => (MsFlags::MS_DIRSYNC, true),
            "noatime" => (MsFlags::MS_NOATIME, true),
            "atime" => (MsFlags::MS_NOATIME, false),
            "nodiratime" => (MsFlags::MS_NODIRATIME, true),
            "diratime" => (MsFlags::MS_NODIRATIME, false),
            "relatime" => (MsFlags::MS_RELATIME, true),
            "norelatime" => (MsFlags::MS_RELATIME, false),
            "strictatime" => (MsFlags::MS_STRICTATIME, true),
            "nostrictatime" => (MsFlags::MS_STRICTATIME, false),
            "loop" | "remount" => return Err(MountError::Unsupported(option.clone())),
            // They could only let more in or out of a namespace that exists for a moment.
            "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared" => (MsFlags::empty(), true),
            _ => {
                data.push(option.clone());
                continue;
            }
        };
        flags.set(flag, set);
    }
    Ok(ParsedOptions { flags, data })
}

/// The longest directory, with its trailing slash, that all paths are below.
pub(super) fn common_directory(paths: &[&str]) -> Option<String> {
    let (first, rest) = paths.split_first()?;
    let mut end = first.rfind('/')? + 1;
    while !rest.iter().all(|path| path.starts_with(&first[..end])) {
        end = first[..end - 1].rfind('/')? + 1;
    }
    (end > 1).then(|| first[..end].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(list: &[&str]) -> Vec<String> {
        list.iter().map(|&option| option.to_owned()).collect()
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let parsed = parse_options(&options(&["ro", "nosuid", "index=off", "rw", "lowerdir=/a:/b"])).unwrap();
        assert_eq!(parsed.flags, MsFlags::MS_NOSUID);
        assert_eq!(parsed.data, ["index=off", "lowerdir=/a:/b"]);
        assert!(matches!(parse_options(&options(&["loop"])), Err(MountError::Unsupported(_))));
    }

    #[test]
    fn directories_without_anything_in_common_are_left() {
        assert_eq!(common_directory(&["/a/x", "/b/x"]), None);
        assert_eq!(common_directory(&["/s/1/fs", "/s/12/fs"]).as_deref(), Some("/s/"));
        assert_eq!(common_directory(&["relative"]), None);
    }
}
