//! Resource limits (`linux.resources`) as files of cgroup v2 and what to write to them.

use bulkhead_agent_protocol::weight_of_shares;

use super::super::spec::{self, Resources, items};

use super::{Cgroup, CgroupError, Hierarchy, read};

/// A limit that can't be carried out.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ResourceError {
    #[error("linux.resources.{0} is not supported with cgroup v2")]
    Unsupported(&'static str),
    #[error("linux.resources.{property}: {value} is out of range")]
    Range { property: &'static str, value: String },
    #[error("linux.resources.memory: swap ({swap}) must be at least limit ({limit})")]
    SwapBelowLimit { swap: i64, limit: i64 },
    #[error("linux.resources.memory: swap needs limit")]
    SwapWithoutLimit,
    #[error("linux.resources.hugepageLimits: {0:?} is not a page size")]
    PageSize(String),
    #[error("linux.resources.unified: {0:?} is not a file of a controller")]
    UnifiedName(String),
    #[error("linux.resources.memory: the limit {limit} is below the present use of {usage} bytes")]
    BelowUsage { limit: i64, usage: u64 },
}

/// One file to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    file: String,
    value: String,
    /// Left out where the kernel does not have the file: a tuning that changes no limit.
    optional: bool,
}

/// Checked limits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    settings: Vec<Setting>,
    /// A memory limit that must not be below what is in use.
    checked_limit: Option<i64>,
}

impl Limits {
    /// Translates the specification's limits. Device rules are not among them.
    pub(crate) fn new(resources: &Resources) -> Result<Self, ResourceError> {
        if resources.rdma.as_ref().is_some_and(|rdma| !rdma.is_empty()) {
            return Err(ResourceError::Unsupported("rdma"));
        }
        let mut limits = Self::default();
        if let Some(memory) = &resources.memory {
            limits.add_memory(memory)?;
        }
        if let Some(cpu) = &resources.cpu {
            limits.add_cpu(cpu)?;
        }
        if let Some(limit) = resources.pids.as_ref().and_then(|pids| pids.limit) {
            limits.add("pids.max", if limit > 0 { limit.to_string() } else { "max".to_owned() });
        }
        if let Some(block_io) = &resources.block_io {
            limits.add_block_io(block_io)?;
        }
        for limit in items(&resources.hugepage_limits) {
            let size = &limit.page_size;
            if !size.ends_with('B') || !size.chars().all(|c| c.is_ascii_alphanumeric()) {
                return Err(ResourceError::PageSize(size.clone()));
            }
            limits.add(&format!("hugetlb.{size}.max"), limit.limit.to_string());
        }
        for (file, value) in resources.unified.iter().flatten() {
            let named = file.contains('.') && !file.starts_with('.') && !file.starts_with("cgroup.");
            if !named || file.contains('/') {
                return Err(ResourceError::UnifiedName(file.clone()));
            }
            limits.add(file, value.clone());
        }
        Ok(limits)
    }

    fn add(&mut self, file: &str, value: String) {
        self.settings.push(Setting { file: file.to_owned(), value, optional: false });
    }

    fn add_optional(&mut self, file: &str, value: String) {
        self.settings.push(Setting { file: file.to_owned(), value, optional: true });
    }

    fn add_memory(&mut self, memory: &spec::Memory) -> Result<(), ResourceError> {
        let bytes = |value: i64| if value < 0 { "max".to_owned() } else { value.to_string() };
        // Swap first: a lower memory limit may have to push pages out.
        if let Some(swap) = memory.swap.filter(|&swap| swap != 0) {
            let value = match (swap, memory.limit) {
                (..0, _) => "max".to_owned(),
                (_, None | Some(0)) => return Err(ResourceError::SwapWithoutLimit),
                (_, Some(..0)) => "max".to_owned(),
                (swap, Some(limit)) if swap < limit => {
                    return Err(ResourceError::SwapBelowLimit { swap, limit });
                }
                (swap, Some(limit)) => (swap - limit).to_string(),
            };
            self.add_optional("memory.swap.max", value);
        }
        if let Some(limit) = memory.limit.filter(|&limit| limit != 0) {
            self.add("memory.max", bytes(limit));
            self.checked_limit = Some(limit).filter(|_| memory.check_before_update && limit > 0);
        }
        if let Some(reservation) = memory.reservation.filter(|&reservation| reservation != 0) {
            self.add("memory.low", bytes(reservation));
        }
        Ok(())
    }

    fn add_cpu(&mut self, cpu: &spec::Cpu) -> Result<(), ResourceError> {
        if cpu.realtime_runtime.is_some_and(|value| value != 0)
            || cpu.realtime_period.is_some_and(|value| value != 0)
        {
            return Err(ResourceError::Unsupported("cpu.realtimeRuntime"));
        }
        if let Some(idle) = cpu.idle {
            self.add("cpu.idle", idle.to_string());
        }
        // A group that runs only when nothing else does has no weight.
        if let (Some(shares @ 1..), false) = (cpu.shares, cpu.idle == Some(1)) {
            self.add("cpu.weight", weight_of_shares(shares).to_string());
        }
        let quota = cpu.quota.filter(|&quota| quota != 0);
        let period = cpu.period.filter(|&period| period != 0);
        if quota.is_some() || period.is_some() {
            let quota = quota.filter(|&quota| quota > 0).map_or("max".to_owned(), |quota| quota.to_string());
            self.add("cpu.max", format!("{quota} {}", period.unwrap_or(100_000)));
        }
        if let Some(burst) = cpu.burst {
            self.add("cpu.max.burst", burst.to_string());
        }
        for (file, list) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
            if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
                self.add(file, list.clone());
            }
        }
        Ok(())
    }

    fn add_block_io(&mut self, io: &spec::BlockIo) -> Result<(), ResourceError> {
        let weight = |weight: u16| match weight {
            // Weights from 10 to 1000 become weights from 1 to 10000.
            10..=1000 => Ok(1 + (u32::from(weight) - 10) * 9999 / 990),
            _ => Err(ResourceError::Range { property: "blockIO.weight", value: weight.to_string() }),
        };
        if let Some(own) = io.weight.filter(|&own| own != 0) {
            self.add_optional("io.weight", weight(own)?.to_string());
        }
        for device in items(&io.weight_device) {
            if let Some(own) = device.weight.filter(|&own| own != 0) {
                self.add_optional("io.weight", format!("{}:{} {}", device.major, device.minor, weight(own)?));
            }
        }
        let throttles = [
            ("rbps", &io.throttle_read_bps_device),
            ("wbps", &io.throttle_write_bps_device),
            ("riops", &io.throttle_read_iops_device),
            ("wiops", &io.throttle_write_iops_device),
        ];
        for (key, devices) in throttles {
            for device in items(devices) {
                let rate = if device.rate == 0 { "max".to_owned() } else { device.rate.to_string() };
                self.add("io.max", format!("{}:{} {key}={rate}", device.major, device.minor));
            }
        }
        Ok(())
    }

    /// Writes the limits to a group.
    pub(crate) fn apply(&self, hierarchy: &Hierarchy, cgroup: &Cgroup) -> Result<(), ApplyError> {
        if let Some(limit) = self.checked_limit {
            let usage = read(&cgroup.file("memory.current"))?.trim().parse().unwrap_or(0);
            if u64::try_from(limit).is_ok_and(|limit| limit < usage) {
                return Err(ResourceError::BelowUsage { limit, usage }.into());
            }
        }
        for Setting { file, value, optional } in &self.settings {
            let controller = file.split('.').next().unwrap_or_default();
            if !hierarchy.has(controller) {
                if *optional {
                    continue;
                }
                let property = file.clone();
                return Err(CgroupError::NoController { controller: controller.to_owned(), property }.into());
            }
            if *optional && !cgroup.file(file).exists() {
                continue;
            }
            cgroup.write(file, value)?;
        }
        Ok(())
    }
}

/// Limits that could not be applied.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages are those of the sources")]
pub enum ApplyError {
    #[error(transparent)]
    Resource(#[from] ResourceError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(json: &str) -> Result<Vec<(String, String)>, ResourceError> {
        let limits = Limits::new(&serde_json::from_str(json).unwrap())?;
        Ok(limits.settings.into_iter().map(|setting| (setting.file, setting.value)).collect())
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|&(file, value)| (file.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn limits_become_files() {
        let json = r#"{
            "memory": {"limit": 1000, "swap": 1500, "reservation": 500},
            "cpu": {"shares": 1024, "quota": 50000, "period": 100000, "cpus": "0-1", "burst": 10},
            "pids": {"limit": 7},
            "blockIO": {"weight": 10, "throttleReadBpsDevice": [{"major": 254, "minor": 0, "rate": 99}],
                        "throttleWriteIOPSDevice": [{"major": 254, "minor": 16, "rate": 0}]},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            "unified": {"memory.oom.group": "1"}}"#;
        assert_eq!(
            limits(json).unwrap(),
            pairs(&[
                ("memory.swap.max", "500"),
                ("memory.max", "1000"),
                ("memory.low", "500"),
                ("cpu.weight", "100"),
                ("cpu.max", "50000 100000"),
                ("cpu.max.burst", "10"),
                ("cpuset.cpus", "0-1"),
                ("pids.max", "7"),
                ("io.weight", "1"),
                ("io.max", "254:0 rbps=99"),
                ("io.max", "254:16 wiops=max"),
                ("hugetlb.2MB.max", "0"),
                ("memory.oom.group", "1"),
            ])
        );
    }

    #[test]
    fn no_limit_is_max_and_zero_is_nothing() {
        let json = r#"{"memory": {"limit": -1, "swap": -1}, "cpu": {"quota": -1, "shares": 0}, "pids": {"limit": -1}}"#;
        let expected = [
            ("memory.swap.max", "max"),
            ("memory.max", "max"),
            ("cpu.max", "max 100000"),
            ("pids.max", "max"),
        ];
        assert_eq!(limits(json).unwrap(), pairs(&expected));
        assert_eq!(limits(r#"{"memory": {"limit": 0}, "cpu": {"quota": 0}}"#).unwrap(), []);
    }

    #[test]
    fn wrong_limits_are_refused() {
        for (json, text) in [
            (r#"{"memory": {"limit": 10, "swap": 5}}"#, "at least"),
            (r#"{"memory": {"swap": 5}}"#, "needs limit"),
            (r#"{"cpu": {"realtimeRuntime": 5}}"#, "cgroup v2"),
            (r#"{"rdma": {"mlx": {}}}"#, "rdma"),
            (r#"{"blockIO": {"weight": 5}}"#, "out of range"),
            (r#"{"hugepageLimits": [{"pageSize": "../x", "limit": 1}]}"#, "page size"),
            (r#"{"unified": {"../x.y": "1"}}"#, "not a file"),
            (r#"{"unified": {"cgroup.procs": "1"}}"#, "not a file"),
        ] {
            let error = limits(json).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }
}
