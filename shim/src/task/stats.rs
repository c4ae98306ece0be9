//! A container's or a pod's figures, as containerd knows them from cgroup version 2.

use bulkhead_agent_protocol as api;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

const TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// Converts the agent's answer.
pub(crate) fn convert(stats: &api::StatsResponse) -> protobuf::Result<Any> {
    let metrics = Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids.current,
            limit: stats.pids.limit,
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu.usage_us,
            user_usec: stats.cpu.user_us,
            system_usec: stats.cpu.system_us,
            nr_periods: stats.cpu.periods,
            nr_throttled: stats.cpu.throttled,
            throttled_usec: stats.cpu.throttled_us,
            nr_bursts: stats.cpu.bursts,
            burst_usec: stats.cpu.burst_us,
            psi: pressure(&stats.cpu.pressure),
            ..Default::default()
        }),
        memory: MessageField::some(memory(&stats.memory)),
        memory_events: MessageField::some(MemoryEvents {
            low: stats.memory.events_low,
            high: stats.memory.events_high,
            max: stats.memory.events_max,
            oom: stats.memory.events_oom,
            oom_kill: stats.memory.events_oom_kill,
            oom_group_kill: stats.memory.events_oom_group_kill,
            ..Default::default()
        }),
        io: MessageField::some(IOStat {
            usage: stats.io.iter().map(io_entry).collect(),
            psi: pressure(&stats.io_pressure),
            ..Default::default()
        }),
        ..Default::default()
    };
    Ok(Any { type_url: TYPE.into(), value: metrics.write_to_bytes()?, ..Default::default() })
}

/// Pressure as far as the kernel that is asked knows it.
fn pressure(stats: &MessageField<api::PressureStats>) -> MessageField<PSIStats> {
    let line = |line: &MessageField<api::PressureLine>| {
        let line = line.as_ref().map(|line| PSIData {
            avg10: line.avg10,
            avg60: line.avg60,
            avg300: line.avg300,
            total: line.total_us,
            ..Default::default()
        });
        MessageField::from_option(line)
    };
    let stats = stats.as_ref().map(|stats| PSIStats {
        some: line(&stats.some),
        full: line(&stats.full),
        ..Default::default()
    });
    MessageField::from_option(stats)
}

fn io_entry(io: &api::IoStats) -> IOEntry {
    IOEntry {
        major: io.major,
        minor: io.minor,
        rbytes: io.read_bytes,
        wbytes: io.write_bytes,
        rios: io.reads,
        wios: io.writes,
        ..Default::default()
    }
}

fn memory(memory: &api::MemoryStats) -> MemoryStat {
    let stat = |key: &str| memory.stat.get(key).copied().unwrap_or_default();
    MemoryStat {
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        anon_thp: stat("anon_thp"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        // The kernel tells the two apart since 5.9; containerd has one field.
        workingset_refault: stat("workingset_refault_anon").saturating_add(stat("workingset_refault_file")),
        workingset_activate: stat("workingset_activate_anon")
            .saturating_add(stat("workingset_activate_file")),
        workingset_nodereclaim: stat("workingset_nodereclaim"),
        pgrefill: stat("pgrefill"),
        pgscan: stat("pgscan"),
        pgsteal: stat("pgsteal"),
        pgactivate: stat("pgactivate"),
        pgdeactivate: stat("pgdeactivate"),
        pglazyfree: stat("pglazyfree"),
        pglazyfreed: stat("pglazyfreed"),
        thp_fault_alloc: stat("thp_fault_alloc"),
        thp_collapse_alloc: stat("thp_collapse_alloc"),
        usage: memory.usage,
        usage_limit: memory.limit,
        swap_usage: memory.swap_usage,
        swap_limit: memory.swap_limit,
        max_usage: memory.max_usage,
        swap_max_usage: memory.max_swap_usage,
        psi: pressure(&memory.pressure),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_arrive_where_containerd_looks_for_them() {
        let mut stats = api::StatsResponse::new();
        stats.cpu.mut_or_insert_default().usage_us = 5;
        let pressure = stats.cpu.mut_or_insert_default().pressure.mut_or_insert_default();
        pressure.some.mut_or_insert_default().total_us = 11;
        stats.pids.mut_or_insert_default().limit = u64::MAX;
        let memory = stats.memory.mut_or_insert_default();
        memory.usage = 7;
        memory.events_oom_kill = 1;
        memory.stat.insert("anon".into(), 9);
        memory.stat.insert("workingset_refault_anon".into(), u64::MAX);
        memory.stat.insert("workingset_refault_file".into(), 1);
        stats.io.push(api::IoStats { major: 254, writes: 3, ..Default::default() });

        let any = convert(&stats).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.psi.some.total), (5, 11));
        assert!(metrics.cpu.psi.full.is_none() && metrics.io.psi.is_none(), "a kernel that knows none");
        assert_eq!(metrics.pids.limit, u64::MAX);
        assert_eq!((metrics.memory.usage, metrics.memory.anon), (7, 9));
        assert_eq!(metrics.memory.workingset_refault, u64::MAX);
        assert_eq!(metrics.memory_events.oom_kill, 1);
        assert_eq!((metrics.io.usage[0].major, metrics.io.usage[0].wios), (254, 3));
    }
}
