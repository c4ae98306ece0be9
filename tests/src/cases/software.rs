//! Programs as people run them, on an overlay as containerd's default snapshotter makes it: what each one says in the end is known.

use std::fs;
use std::time::{Duration, Instant};

use bulkhead_base::capabilities::NAMES;
use serde_json::json;

use super::{Case, Environment};
use crate::bundle::{self, Bundle};
use crate::ensure_eq;
use crate::failure::{Explain, Outcome};

/// Where a script runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the root file system.
    Root,
    /// With a directory of the host at `/srv`.
    Volume,
    /// The same, as what a privileged container is booted with: what it says is in `/srv/said`.
    Init,
}

/// A case that runs the script of its name and expects what it says, in its [`Place`]; `on a disk`: where Kubernetes pods have it.
macro_rules! software {
    ($case:expr, $name:literal, $place:expr, $said:expr) => {
        Case::new($case, |environment| {
            run(environment, $case, include_str!(concat!("software/", $name, ".sh")), $place, $said)
        })
        .with_image("software")
        .within(120)
    };
    ($name:literal, $said:expr) => {
        software!(concat!("software-", $name), $name, Place::Root, $said)
    };
    ($name:literal on a volume, $said:expr) => {
        software!(concat!("software-", $name, "-on-a-volume"), $name, Place::Volume, $said)
    };
    ($name:literal as init, $said:expr) => {
        software!(concat!("software-", $name), $name, Place::Init, $said)
    };
    ($name:literal on a disk, $said:expr) => {
        software!(concat!("software-", $name, "-on-a-disk"), $name, Place::Root, $said).with_changes_on_disk()
    };
}

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    software!("dpkg", DPKG),
    software!("dpkg" on a disk, DPKG),
    software!("git", GIT),
    software!("git" on a volume, GIT),
    software!("git" on a disk, GIT),
    software!("sqlite", SQLITE),
    software!("sqlite" on a volume, SQLITE),
    software!("sqlite" on a disk, SQLITE),
    software!("python", PYTHON),
    software!("python" on a volume, PYTHON),
    software!("python" on a disk, PYTHON),
    software!("node", "http ok\nwatch rename x\nworker 42\n"),
    software!("java", "1\n500500\n8192 true\n77\n200000000\n"),
    software!("postgres", POSTGRES),
    software!("postgres" on a volume, POSTGRES),
    software!("postgres" on a disk, POSTGRES),
    software!("redis", "OK\n1\nbench 0\nv\n"),
    software!("nginx", "hello\nsame\nproxied\n100\ntogether\nhello\n"),
    software!("mariadb", MARIADB),
    software!("mariadb" on a volume, MARIADB),
    software!("mariadb" on a disk, MARIADB),
    software!("systemd" as init, "active\n31457280\ncontainer-other\n"),
    software!("trees", TREES),
    software!("trees" on a volume, TREES),
    software!("trees" on a disk, TREES),
];

const DPKG: &str = "configured\n202\n2\n??5??????   /usr/share/p/f9\n\
    ls: cannot access '/usr/share/p': No such file or directory\n/etc/p.conf\n\
    ls: cannot access '/etc/p.conf': No such file or directory\n";
const GIT: &str = "two\none\n0\n300\n1\n2\nsame\n";
const SQLITE: &str = "wal\n60|60\nok\ndelete\n60\na.db\n";
const PYTHON: &str = "5050\n100\n7 b'fork'\n5000\n5050\n101\nvalue = 9\n";
const POSTGRES: &str = "1\nserver started\n1\nnumber of transactions actually processed: 100/100\n\
    number of failed transactions: 0 (0.000%)\n100\nposix\nserver stopped\nserver started\n100|t\n\
    server stopped\ndatabase system is shut down\n";
const MARIADB: &str =
    "install 0\n3000\n125250\nd.t\tcheck\tstatus\tOK\nd.a\tcheck\tstatus\tOK\n3000\nended 0\n";
const TREES: &str = "same\ncomplete\n0\nb\nt.tar\nlinked\nt.tar\n0\n";

/// How long one of them may take.
const LIMIT: Duration = Duration::from_secs(100);

fn run(environment: &mut Environment, name: &str, script: &str, place: Place, said: &str) -> Outcome<String> {
    let id = environment.id(name);
    let mut process = bundle::shell(&format!("exec 2>&1\n{script}"));
    process["env"] =
        json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]);
    let mut spec = bundle::spec(&id, process);
    let directory = environment.host()?.path().join("volumes").join(&id);
    if place != Place::Root {
        fs::create_dir_all(&directory).explain(|| format!("make {}", directory.display()))?;
        bundle::add(&mut spec["mounts"], bundle::bind(&directory, "/srv", &["rbind", "rw"]));
    }
    if place == Place::Init {
        let options = ["nosuid", "noexec", "nodev", "rw"];
        bundle::add(
            &mut spec["mounts"],
            json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options }),
        );
        bundle::add(&mut spec["linux"]["namespaces"], json!({ "type": "cgroup" }));
        spec["process"]["capabilities"] = bundle::capabilities(&NAMES);
        spec["process"]["noNewPrivileges"] = json!(false);
        spec["linux"]["maskedPaths"] = json!([]);
        spec["linux"]["readonlyPaths"] = json!([]);
        spec["linux"]["resources"] = json!({ "devices": [{ "allow": true, "access": "rwm" }] });
    }
    let bundle = Bundle::new(environment.host()?.path(), &id, &environment.layout.rootfs("software"), &spec)?;
    // With what it takes to make the container and to remove it.
    let since = Instant::now();
    let mut ended = environment.run_bundle(bundle, LIMIT)?;
    let took = since.elapsed();
    if place == Place::Init {
        ended.stdout += &fs::read_to_string(directory.join("said")).unwrap_or_default();
    }
    if place != Place::Root {
        fs::remove_dir_all(&directory).explain(|| format!("remove {}", directory.display()))?;
    }
    ensure_eq!((ended.exit_status, ended.stdout.as_str()), (0, said), "exit code and output");
    Ok(format!("{:.2} s", took.as_secs_f64()))
}
