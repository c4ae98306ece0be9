//! What a group uses, from the files of cgroup v2: a container's in the guest, a pod's on the host.

use crate::{CpuStats, IoStats, MemoryStats, PidsStats, PressureLine, PressureStats, StatsResponse};

/// A limit that is "max".
const NO_LIMIT: u64 = u64::MAX;

/// Most devices and memory figures that are reported.
const MAX_ENTRIES: usize = 256;

/// Reads the figures of a group whose files `file` gives, empty where there is none. What a kernel does not have stays zero.
pub fn read(file: &dyn Fn(&'static str) -> String) -> StatsResponse {
    let mut response = StatsResponse::new();
    let mut cpu = cpu(&file("cpu.stat"));
    cpu.pressure = pressure(&file("cpu.pressure")).into();
    response.cpu = Some(cpu).into();
    response.memory = Some(memory(file)).into();
    response.pids = Some(PidsStats {
        current: number(&file("pids.current")),
        limit: limit(&file("pids.max")),
        ..Default::default()
    })
    .into();
    response.io = io(&file("io.stat"));
    response.io_pressure = pressure(&file("io.pressure")).into();
    response
}

/// The value of a key in a file of lines `key value`; 0 if it is missing.
pub fn flat_value(text: &str, key: &str) -> u64 {
    flat_lines(text).find(|(name, _)| *name == key).map_or(0, |(_, value)| value)
}

fn flat_lines(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

fn cpu(text: &str) -> CpuStats {
    CpuStats {
        usage_us: flat_value(text, "usage_usec"),
        user_us: flat_value(text, "user_usec"),
        system_us: flat_value(text, "system_usec"),
        periods: flat_value(text, "nr_periods"),
        throttled: flat_value(text, "nr_throttled"),
        throttled_us: flat_value(text, "throttled_usec"),
        bursts: flat_value(text, "nr_bursts"),
        burst_us: flat_value(text, "burst_usec"),
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
        max_usage: number(&file("memory.peak")),
        max_swap_usage: number(&file("memory.swap.peak")),
        stat: flat_lines(&stat).take(MAX_ENTRIES).map(|(key, value)| (key.to_owned(), value)).collect(),
        events_low: flat_value(&events, "low"),
        events_high: flat_value(&events, "high"),
        events_max: flat_value(&events, "max"),
        events_oom: flat_value(&events, "oom"),
        events_oom_kill: flat_value(&events, "oom_kill"),
        events_oom_group_kill: flat_value(&events, "oom_group_kill"),
        pressure: pressure(&file("memory.pressure")).into(),
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

/// Lines such as `some avg10=0.12 avg60=0.00 avg300=0.00 total=345`; `None` from a kernel without pressure information.
fn pressure(text: &str) -> Option<PressureStats> {
    let line = |name: &str| {
        let fields = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        let mut pressure = PressureLine::new();
        for (key, value) in fields.split_whitespace().filter_map(|field| field.split_once('=')) {
            // A share of time, in percent.
            let share = value.parse().ok().filter(|share| (0.0..=100.0).contains(share)).unwrap_or_default();
            match key {
                "avg10" => pressure.avg10 = share,
                "avg60" => pressure.avg60 = share,
                "avg300" => pressure.avg300 = share,
                "total" => pressure.total_us = number(value),
                _ => {}
            }
        }
        Some(pressure)
    };
    let some = line("some")?;
    Some(PressureStats { some: Some(some).into(), full: line("full").into(), ..Default::default() })
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
    fn pressure_is_told_where_the_kernel_knows_it() {
        assert_eq!(pressure(""), None);
        let both = pressure(
            "some avg10=0.12 avg60=99.99 avg300=0.00 total=345\nfull avg10=0.00 avg60=-1 avg300=nan total=6\n",
        )
        .unwrap();
        assert_eq!((both.some.avg10, both.some.avg60, both.some.total_us), (0.12, 99.99, 345));
        assert_eq!((both.full.avg60, both.full.avg300, both.full.total_us), (0.0, 0.0, 6));
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
