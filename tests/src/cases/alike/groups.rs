//! The groups.

use bulkhead_base::capabilities::NAMES;
use serde_json::{Value, json};

use super::{Case, Environment, Group, compare, files, system};
use crate::bundle;
use crate::failure::Outcome;

/// Each is a case.
pub(crate) const CASES: &[Case] = &[
    case("alike-files", |environment| compare(environment, &FILES)),
    case("alike-mounts", |environment| compare(environment, &MOUNTS)),
    case("alike-system", |environment| compare(environment, &SYSTEM)),
    case("alike-limits", |environment| compare(environment, &LIMITS)),
    case("alike-privileged", |environment| compare(environment, &PRIVILEGED)),
];

const FILES: Group =
    Group { name: "files", places: &["/", "/v", "/m"], rows: &[files::ANYWHERE], configure: |_| {} };

const MOUNTS: Group = Group {
    name: "mounts",
    places: &["/tmp"],
    rows: &[files::MOUNTS],
    configure: |spec| {
        spec["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "hard": 11000, "soft": 1024 }]);
    },
};

const SYSTEM: Group = Group { name: "system", places: &["/tmp"], rows: &[system::ROWS], configure: |_| {} };

const LIMITS: Group = Group {
    name: "limits",
    places: &["/tmp"],
    rows: &[system::LIMITS],
    configure: |spec| {
        add_cgroups(spec, &["ro"]);
        let resources = &mut spec["linux"]["resources"];
        resources["memory"] = json!({ "limit": 128 << 20, "reservation": 64 << 20, "swap": 128 << 20 });
        resources["cpu"] = json!({ "quota": 90_000, "period": 100_000, "shares": 512 });
        resources["pids"] = json!({ "limit": 100 });
        resources["unified"] = json!({ "memory.high": "130000000" });
        bundle::add(&mut spec["linux"]["namespaces"], json!({ "type": "cgroup" }));
    },
};

const PRIVILEGED: Group = Group {
    name: "privileged",
    places: &["/tmp"],
    rows: &[system::PRIVILEGED],
    configure: |spec| {
        spec["process"]["capabilities"] = bundle::capabilities(&NAMES);
        spec["process"]["noNewPrivileges"] = false.into();
        spec["linux"]["maskedPaths"] = json!([]);
        spec["linux"]["readonlyPaths"] = json!([]);
        spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
    },
};

fn add_cgroups(spec: &mut Value, options: &[&str]) {
    bundle::add(
        &mut spec["mounts"],
        json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options }),
    );
}

/// What differs depends on what the guest's kernel has.
const fn case(name: &'static str, run: fn(&mut Environment) -> Outcome<String>) -> Case {
    Case::new(name, run).bulkhead_only().own_kernel().within(300)
}
