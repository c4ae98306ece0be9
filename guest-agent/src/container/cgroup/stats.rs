//! What a group uses, from the files of cgroup v2.

use bulkhead_agent_protocol::{CpuStats, IoStats, MemoryStats, PidsStats, StatsResponse};

use super::{Cgroup, flat_lines, flat_value};

/// A limit that is "max".
const NO_LIMIT: u64 = u64::MAX;

/// Most devices and memory figures that are reported.
const MAX_ENTRIES: usize = 256;

/// Reads the figures of a group. What a kernel does not have stays zero.
pub fn read(cgroup: &Cgroup) -> StatsResponse {
    let file = |name| cgroup.read(name).unwrap_or_default();
    let mut response = StatsResponse::new();
    response.cpu = Some(cpu(&file("cpu.stat"))).into();
    response.memory = Some(memory(&file)).into();
    response.pids = Some(PidsStats {
        current: number(&file("pids.current")),
        limit: limit(&file("pids.max")),
        ..Default::default()
    })
    .into();
    response.io = io(&file("io.stat"));
    response
}

fn cpu(text: &str) -> CpuStats {
    CpuStats {
        usage_us: flat_value(text, "usage_usec"),
        user_us: flat_value(text, "user_usec"),
        system_us: flat_value(text, "system_usec"),
        periods: flat_value(text, "nr_periods"),
        throttled: flat_value(text, "nr_throttled"),
        throttled_us: flat_value(text, "throttled_usec"),
        ..Default::default()
    }
}

fn memory(file: &dyn Fn(&'static str) -> String) -> MemoryStats {
    let events = file("memory.events");
    let stat = file("memory.stat");
    MemoryStats {
        usage: number(&file("memory.current")),
        limit: limit(&file("memory.max")),
        swap_usage: number(&file("memory.swap.current")),
        swap_limit: limit(&file("memory.swap.max")),
        stat: flat_lines(&stat).take(MAX_ENTRIES).map(|(key, value)| (key.to_owned(), value)).collect(),
        events_low: flat_value(&events, "low"),
        events_high: flat_value(&events, "high"),
        events_max: flat_value(&events, "max"),
        events_oom: flat_value(&events, "oom"),
        events_oom_kill: flat_value(&events, "oom_kill"),
        ..Default::default()
    }
}

/// Lines such as `254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`.
fn io(text: &str) -> Vec<IoStats> {
    let line = |line: &str| {
        let mut fields = line.split_whitespace();
        let (major, minor) = fields.next()?.split_once(':')?;
        let mut stats =
            IoStats { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Default::default() };
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            let value = number(value);
            match key {
                "rbytes" => stats.read_bytes = value,
                "wbytes" => stats.write_bytes = value,
                "rios" => stats.reads = value,
                "wios" => stats.writes = value,
                _ => {}
            }
        }
        Some(stats)
    };
    text.lines().filter_map(line).take(MAX_ENTRIES).collect()
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// A limit file that a kernel does not have limits nothing.
fn limit(text: &str) -> u64 {
    text.trim().parse().unwrap_or(NO_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read() {
        let cpu = cpu(
            "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 5\nnr_throttled 2\nthrottled_usec 7\n",
        );
        assert_eq!((cpu.usage_us, cpu.user_us, cpu.system_us), (30, 20, 10));
        assert_eq!((cpu.periods, cpu.throttled, cpu.throttled_us), (5, 2, 7));
        let io = io("254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\nbroken\n7:1 \n");
        assert_eq!(io.len(), 2);
        assert_eq!(
            (io[0].major, io[0].read_bytes, io[0].write_bytes, io[0].reads, io[0].writes),
            (254, 1, 2, 3, 4)
        );
        assert_eq!((limit("max\n"), limit("12\n"), number("34\n")), (u64::MAX, 12, 34));
    }

    #[test]
    fn memory_figures_come_from_their_files() {
        let memory = memory(&|name| {
            match name {
                "memory.current" => "100\n",
                "memory.max" => "max\n",
                "memory.stat" => "anon 7\nfile 8\n",
                "memory.events" => "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\n",
                _ => "",
            }
            .to_owned()
        });
        assert_eq!((memory.usage, memory.limit, memory.swap_usage), (100, u64::MAX, 0));
        assert_eq!(memory.stat["file"], 8);
        assert_eq!(
            (memory.events_high, memory.events_max, memory.events_oom, memory.events_oom_kill),
            (1, 2, 3, 4)
        );
    }
}
