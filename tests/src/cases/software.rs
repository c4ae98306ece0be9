//! Programs as people run them, on an overlay as containerd's default snapshotter makes it: what each one says in the end is known.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{Case, Environment};
use crate::bundle::{self, Bundle};
use crate::ensure_eq;
use crate::failure::Outcome;
use crate::stdio::Streams;

/// A case that runs the script of its name and expects what it says.
macro_rules! software {
    ($name:literal, $said:expr) => {{
        let mut case = Case::new(concat!("software-", $name), |environment| {
            run(environment, $name, include_str!(concat!("software/", $name, ".sh")), $said)
        })
        .with_image("software");
        case.limit = 120;
        case
    }};
}

/// The cases of this theme.
pub const CASES: &[Case] = &[
    software!(
        "dpkg",
        "configured\n202\n2\n??5??????   /usr/share/p/f9\n\
         ls: cannot access '/usr/share/p': No such file or directory\n/etc/p.conf\n\
         ls: cannot access '/etc/p.conf': No such file or directory\n"
    ),
    software!("git", "two\none\n0\n300\n1\n2\nsame\n"),
    software!("sqlite", "wal\n60|60\nok\ndelete\n60\na.db\n"),
    software!("python", "5050\n100\n7 b'fork'\n5000\n5050\n101\nvalue = 9\n"),
    software!("node", "http ok\nwatch rename x\nworker 42\n"),
    software!("java", "1\n500500\n8192 true\n77\n200000000\n"),
    software!(
        "postgres",
        "1\nserver started\n1\nnumber of transactions actually processed: 100/100\n\
         number of failed transactions: 0 (0.000%)\n100\nposix\nserver stopped\nserver started\n100|t\n\
         server stopped\ndatabase system is shut down\n"
    ),
    software!("trees", "same\ncomplete\n0\nb\nt.tar\nlinked\nt.tar\n0\n"),
];

/// How long one of them may take.
const LIMIT: Duration = Duration::from_secs(100);

fn run(environment: &mut Environment, name: &str, script: &str, said: &str) -> Outcome<String> {
    let id = environment.id(name);
    let mut process = bundle::shell(&format!("exec 2>&1\n{script}"));
    process["env"] =
        json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]);
    let spec = bundle::spec(&id, process);
    let bundle = Bundle::new(environment.host()?.path(), &id, &environment.layout.rootfs("software"), &spec)?;
    let container = environment.created_from(bundle, Streams::default())?;
    let since = Instant::now();
    container.shim.start("")?;
    let exit = container.shim.wait("", LIMIT)?;
    let took = since.elapsed();
    let stdout = container.stdio.stdout.to_end(LIMIT)?;
    container.finish()?;
    ensure_eq!((exit.exit_status, stdout.as_str()), (0, said), "exit code and output");
    Ok(format!("{:.2} s", took.as_secs_f64()))
}
