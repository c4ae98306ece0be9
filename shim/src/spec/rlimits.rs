//! Limits of processes whose specification names none: those that containerd has given the shim, as a container of runc
//! inherits them from it. The guest's kernel would give others, by the size of its memory.

use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit};
use oci_spec::runtime::{PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process};

const ALL: [(Resource, PosixRlimitType); 16] = [
    (Resource::RLIMIT_AS, PosixRlimitType::RlimitAs),
    (Resource::RLIMIT_CORE, PosixRlimitType::RlimitCore),
    (Resource::RLIMIT_CPU, PosixRlimitType::RlimitCpu),
    (Resource::RLIMIT_DATA, PosixRlimitType::RlimitData),
    (Resource::RLIMIT_FSIZE, PosixRlimitType::RlimitFsize),
    (Resource::RLIMIT_LOCKS, PosixRlimitType::RlimitLocks),
    (Resource::RLIMIT_MEMLOCK, PosixRlimitType::RlimitMemlock),
    (Resource::RLIMIT_MSGQUEUE, PosixRlimitType::RlimitMsgqueue),
    (Resource::RLIMIT_NICE, PosixRlimitType::RlimitNice),
    (Resource::RLIMIT_NOFILE, PosixRlimitType::RlimitNofile),
    (Resource::RLIMIT_NPROC, PosixRlimitType::RlimitNproc),
    (Resource::RLIMIT_RSS, PosixRlimitType::RlimitRss),
    (Resource::RLIMIT_RTPRIO, PosixRlimitType::RlimitRtprio),
    (Resource::RLIMIT_RTTIME, PosixRlimitType::RlimitRttime),
    (Resource::RLIMIT_SIGPENDING, PosixRlimitType::RlimitSigpending),
    (Resource::RLIMIT_STACK, PosixRlimitType::RlimitStack),
];

/// The shim's own limits as they were when this was called first: before it raises any.
pub(crate) fn inherited() -> &'static [PosixRlimit] {
    static LIMITS: OnceLock<Vec<PosixRlimit>> = OnceLock::new();
    LIMITS.get_or_init(|| {
        let read = |&(resource, kind): &(Resource, PosixRlimitType)| {
            let (soft, hard) = getrlimit(resource).ok()?;
            PosixRlimitBuilder::default().typ(kind).soft(soft).hard(hard).build().ok()
        };
        ALL.iter().filter_map(read).collect()
    })
}

/// Adds the limits that the specification of a process does not name.
pub(super) fn complete(process: &mut Process, inherited: &[PosixRlimit]) {
    let mut limits = process.rlimits().clone().unwrap_or_default();
    let named: Vec<_> = limits.iter().map(PosixRlimit::typ).collect();
    limits.extend(inherited.iter().filter(|limit| !named.contains(&limit.typ())).cloned());
    process.set_rlimits(Some(limits));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_stays() {
        let json = r#"{"cwd": "/", "user": {"uid": 0, "gid": 0}, "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}]}"#;
        let mut process: Process = serde_json::from_str(json).unwrap();
        complete(&mut process, inherited());
        let limits = process.rlimits().clone().unwrap();
        assert_eq!(limits.len(), ALL.len());
        let files: Vec<_> =
            limits.iter().filter(|limit| limit.typ() == PosixRlimitType::RlimitNofile).collect();
        assert_eq!(files.iter().map(|limit| (limit.soft(), limit.hard())).collect::<Vec<_>>(), [(5, 6)]);
        let stack = limits.iter().find(|limit| limit.typ() == PosixRlimitType::RlimitStack).unwrap();
        assert_eq!((stack.soft(), stack.hard()), getrlimit(Resource::RLIMIT_STACK).unwrap());
    }
}
