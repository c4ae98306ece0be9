//! Programs as people run them, on an overlay as containerd's default snapshotter makes it: what each one says in the end is known.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Case, Environment};
use crate::bundle::{self, Bundle};
use crate::ensure_eq;
use crate::failure::{Explain, Outcome};

/// A case that runs the script of its name and expects what it says; `volume`: in a directory of the host; `on a disk`: where
/// Kubernetes pods have it.
macro_rules! software {
    ($case:expr, $name:literal, $volume:literal, $said:expr) => {
        Case::new($case, |environment| {
            run(environment, $case, include_str!(concat!("software/", $name, ".sh")), $volume, $said)
        })
        .with_image("software")
        .within(120)
    };
    ($name:literal, $said:expr) => {
        software!(concat!("software-", $name), $name, false, $said)
    };
    ($name:literal on a volume, $said:expr) => {
        software!(concat!("software-", $name, "-on-a-volume"), $name, true, $said)
    };
    ($name:literal on a disk, $said:expr) => {
        software!(concat!("software-", $name, "-on-a-disk"), $name, false, $said).with_changes_on_disk()
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
const TREES: &str = "same\ncomplete\n0\nb\nt.tar\nlinked\nt.tar\n0\n";

/// How long one of them may take.
const LIMIT: Duration = Duration::from_secs(100);

fn run(environment: &mut Environment, name: &str, script: &str, volume: bool, said: &str) -> Outcome<String> {
    let id = environment.id(name);
    let mut process = bundle::shell(&format!("exec 2>&1\n{script}"));
    process["env"] =
        json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]);
    let mut spec = bundle::spec(&id, process);
    let directory = environment.host()?.path().join("volumes").join(&id);
    if volume {
        fs::create_dir_all(&directory).explain(|| format!("make {}", directory.display()))?;
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.push(bundle::bind(&directory, "/srv", &["rbind", "rw"]));
        }
    }
    let bundle = Bundle::new(environment.host()?.path(), &id, &environment.layout.rootfs("software"), &spec)?;
    // With what it takes to make the container and to remove it.
    let since = Instant::now();
    let ended = environment.run_bundle(bundle, LIMIT)?;
    let took = since.elapsed();
    if volume {
        fs::remove_dir_all(&directory).explain(|| format!("remove {}", directory.display()))?;
    }
    ensure_eq!((ended.exit_status, ended.stdout.as_str()), (0, said), "exit code and output");
    Ok(format!("{:.2} s", took.as_secs_f64()))
}
