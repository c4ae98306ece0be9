//! Resource limits and scheduling of a process (`process.rlimits`, `scheduler`, `ioPriority`, `oomScoreAdj`).

use std::fs;
use std::io;

use super::spec;
use crate::sys::check;

/// The kernel's bound of what a process may be allowed to open.
const OPEN_FILES: &str = "/proc/sys/fs/nr_open";

/// Checked limits of a process.
#[derive(Debug, Clone, Default)]
pub struct Limits {
    rlimits: Vec<(libc::c_uint, String, libc::rlimit64)>,
    scheduler: Option<SchedAttr>,
    io_priority: Option<libc::c_int>,
    oom_score_adj: i32,
}

/// Wrong limits, or one that could not be set.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum LimitError {
    #[error("process.rlimits: there is no limit {0:?}")]
    UnknownRlimit(String),
    #[error("process.rlimits: {0} is given twice")]
    DuplicateRlimit(String),
    #[error("process.rlimits: the soft limit of {0} is above the hard one")]
    SoftAboveHard(String),
    #[error("process.scheduler: there is no {what} {name:?}")]
    Scheduler { what: &'static str, name: String },
    #[error("process.ioPriority: class {class:?} with priority {priority} does not exist")]
    IoPriority { class: String, priority: i64 },
    #[error("process.oomScoreAdj: {0} is not between -1000 and 1000")]
    OomScore(i32),
    #[error("can't set the limit {name}")]
    SetRlimit { name: String, source: io::Error },
    #[error("can't set the scheduling policy")]
    SetScheduler(#[source] io::Error),
    #[error("can't set the I/O priority")]
    SetIoPriority(#[source] io::Error),
    #[error("can't set the inclination to be killed for want of memory")]
    SetOomScore(#[source] io::Error),
}

/// `struct sched_attr` of `linux/sched/types.h`, version 0.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

impl Limits {
    /// Reads and checks the parts of a `process` object that limit it.
    pub(crate) fn new(process: &spec::Process) -> Result<Self, LimitError> {
        let mut rlimits: Vec<(libc::c_uint, String, libc::rlimit64)> = Vec::new();
        for limit in spec::items(&process.rlimits) {
            let name = limit.kind.clone();
            let resource = rlimit(&name).ok_or_else(|| LimitError::UnknownRlimit(name.clone()))?;
            if rlimits.iter().any(|(other, ..)| *other == resource) {
                return Err(LimitError::DuplicateRlimit(name));
            }
            if limit.soft > limit.hard {
                return Err(LimitError::SoftAboveHard(name));
            }
            rlimits.push((resource, name, libc::rlimit64 { rlim_cur: limit.soft, rlim_max: limit.hard }));
        }
        let oom_score_adj = process.oom_score_adj.unwrap_or(0);
        if !(-1000..=1000).contains(&oom_score_adj) {
            return Err(LimitError::OomScore(oom_score_adj));
        }
        Ok(Self {
            rlimits,
            scheduler: process.scheduler.as_ref().map(scheduler).transpose()?,
            io_priority: process.io_priority.as_ref().map(io_priority).transpose()?,
            oom_score_adj,
        })
    }

    /// Applies them to a process that has yet to execute its program. The agent does this itself: it has the privileges,
    /// and low limits can't get in the way of setting the process up.
    pub(crate) fn apply(&self, pid: libc::pid_t) -> Result<(), LimitError> {
        // Written even if it is the default: the kernel otherwise lets the process go down to the agent's own value.
        fs::write(format!("/proc/{pid}/oom_score_adj"), self.oom_score_adj.to_string())
            .map_err(LimitError::SetOomScore)?;
        if let Some(attributes) = &self.scheduler {
            // SAFETY: the structure has the kernel's layout and carries its size.
            check(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, std::ptr::from_ref(attributes), 0) })
                .map_err(LimitError::SetScheduler)?;
        }
        if let Some(priority) = self.io_priority {
            const WHO_PROCESS: libc::c_int = 1;
            // SAFETY: takes numbers only.
            check(unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, pid, priority) })
                .map_err(LimitError::SetIoPriority)?;
        }
        for (resource, name, limit) in &self.rlimits {
            if *resource == libc::RLIMIT_NOFILE {
                allow_open_files(limit.rlim_max);
            }
            // SAFETY: the limit is a valid structure; no old one is asked for.
            check(unsafe { libc::prlimit64(pid, *resource, limit, std::ptr::null_mut()) }.into())
                .map_err(|source| LimitError::SetRlimit { name: name.clone(), source })?;
        }
        Ok(())
    }
}

/// The most open files that a limit can be about, unless the kernel is told otherwise.
const DEFAULT_OPEN_FILES: u64 = 1 << 20;

/// The kernel's own bound is raised where a limit is above it. That it can't be shows when the limit is set.
fn allow_open_files(wanted: u64) {
    // The kernel takes multiples of the bits of a word, and ends at i32::MAX.
    let bound = wanted.min(0x7fff_ffc0).next_multiple_of(64);
    if wanted > DEFAULT_OPEN_FILES
        && wanted != libc::RLIM64_INFINITY
        && let Ok(Some(now)) = fs::read_to_string(OPEN_FILES).map(|text| text.trim().parse::<u64>().ok())
        && now < wanted
    {
        let _ = fs::write(OPEN_FILES, bound.to_string());
    }
}

fn rlimit(name: &str) -> Option<libc::c_uint> {
    Some(match name.strip_prefix("RLIMIT_")? {
        "AS" => libc::RLIMIT_AS,
        "CORE" => libc::RLIMIT_CORE,
        "CPU" => libc::RLIMIT_CPU,
        "DATA" => libc::RLIMIT_DATA,
        "FSIZE" => libc::RLIMIT_FSIZE,
        "LOCKS" => libc::RLIMIT_LOCKS,
        "MEMLOCK" => libc::RLIMIT_MEMLOCK,
        "MSGQUEUE" => libc::RLIMIT_MSGQUEUE,
        "NICE" => libc::RLIMIT_NICE,
        "NOFILE" => libc::RLIMIT_NOFILE,
        "NPROC" => libc::RLIMIT_NPROC,
        "RSS" => libc::RLIMIT_RSS,
        "RTPRIO" => libc::RLIMIT_RTPRIO,
        "RTTIME" => libc::RLIMIT_RTTIME,
        "SIGPENDING" => libc::RLIMIT_SIGPENDING,
        "STACK" => libc::RLIMIT_STACK,
        _ => return None,
    })
}

fn scheduler(scheduler: &spec::Scheduler) -> Result<SchedAttr, LimitError> {
    let policy = match scheduler.policy.as_str() {
        "SCHED_OTHER" => 0,
        "SCHED_FIFO" => 1,
        "SCHED_RR" => 2,
        "SCHED_BATCH" => 3,
        "SCHED_ISO" => 4,
        "SCHED_IDLE" => 5,
        "SCHED_DEADLINE" => 6,
        other => return Err(LimitError::Scheduler { what: "policy", name: other.to_owned() }),
    };
    let mut flags = 0;
    for flag in spec::items(&scheduler.flags) {
        flags |= match flag.as_str() {
            "SCHED_FLAG_RESET_ON_FORK" => 0x01,
            "SCHED_FLAG_RECLAIM" => 0x02,
            "SCHED_FLAG_DL_OVERRUN" => 0x04,
            "SCHED_FLAG_KEEP_POLICY" => 0x08,
            "SCHED_FLAG_KEEP_PARAMS" => 0x10,
            "SCHED_FLAG_UTIL_CLAMP_MIN" => 0x20,
            "SCHED_FLAG_UTIL_CLAMP_MAX" => 0x40,
            other => return Err(LimitError::Scheduler { what: "flag", name: other.to_owned() }),
        };
    }
    Ok(SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy,
        flags,
        nice: scheduler.nice,
        priority: u32::try_from(scheduler.priority).unwrap_or_default(),
        runtime: scheduler.runtime,
        deadline: scheduler.deadline,
        period: scheduler.period,
    })
}

fn io_priority(priority: &spec::IoPriority) -> Result<libc::c_int, LimitError> {
    let class = match priority.class.as_str() {
        "IOPRIO_CLASS_RT" => 1,
        "IOPRIO_CLASS_BE" => 2,
        "IOPRIO_CLASS_IDLE" => 3,
        _ => 0,
    };
    match libc::c_int::try_from(priority.priority) {
        Ok(level @ 0..=7) if class != 0 => Ok(class << 13 | level),
        _ => Err(LimitError::IoPriority { class: priority.class.clone(), priority: priority.priority }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(json: &str) -> Result<Limits, LimitError> {
        Limits::new(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn limits_are_read() {
        let limits = limits(
            r#"{"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}], "oomScoreAdj": -5,
                "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4},
                "scheduler": {"policy": "SCHED_BATCH", "nice": 3, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}}"#,
        )
        .unwrap();
        assert_eq!(limits.rlimits[0].0, libc::RLIMIT_NOFILE);
        assert_eq!((limits.rlimits[0].2.rlim_cur, limits.rlimits[0].2.rlim_max), (100, 200));
        assert_eq!(limits.io_priority, Some(2 << 13 | 4));
        assert_eq!(limits.scheduler.map(|attr| (attr.policy, attr.nice, attr.flags)), Some((3, 3, 1)));
        assert_eq!(limits.oom_score_adj, -5);
    }

    #[test]
    fn wrong_limits_are_refused() {
        for (json, text) in [
            (r#"{"rlimits": [{"type": "RLIMIT_FUN", "soft": 1, "hard": 1}]}"#, "RLIMIT_FUN"),
            (r#"{"rlimits": [{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}]}"#, "above the hard"),
            (r#"{"oomScoreAdj": 1001}"#, "1001"),
            (r#"{"scheduler": {"policy": "SCHED_MAGIC"}}"#, "SCHED_MAGIC"),
            (r#"{"ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 9}}"#, "9"),
        ] {
            let error = limits(json).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        let twice = r#"{"rlimits": [{"type": "RLIMIT_CPU", "soft": 1, "hard": 1}, {"type": "RLIMIT_CPU", "soft": 1, "hard": 1}]}"#;
        assert!(matches!(limits(twice), Err(LimitError::DuplicateRlimit(_))));
    }
}
