//! What few pods ask for, and what is wrong with others: each as with runc.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use bulkhead_cri::proto;
use protobuf::MessageField;

use super::like_runc::{Question, compare, id, security};
use super::volumes::volume;
use crate::cases::Environment;
use crate::cri::{Handler, Pod, shell};
use crate::failure::{Explain, Outcome};
use crate::{ensure, ensure_eq};

fn variables(config: &mut proto::ContainerConfig, pairs: impl IntoIterator<Item = (String, String)>) {
    let variable = |(key, value)| proto::KeyValue { key, value, ..Default::default() };
    config.envs = pairs.into_iter().map(variable).collect();
}

fn resources(config: &mut proto::ContainerConfig) -> &mut proto::LinuxContainerResources {
    config.linux.mut_or_insert_default().resources.mut_or_insert_default()
}

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|&text| text.to_owned()).collect()
}

/// Settings that few containers have.
pub(crate) fn settings(environment: &mut Environment) -> Outcome<String> {
    let answers = compare(
        environment,
        &[
            Question {
                what: "long arguments and variables",
                script: "echo ${#BIG} $#; env | wc; tr '\\0' '\\n' </proc/1/cmdline | wc",
                configure: |config| {
                    config.args = (0..8).map(|_| "a".repeat(120_000)).collect();
                    let many = (0..3000).map(|number| (format!("VARIABLE_{number}"), "v".repeat(100)));
                    variables(config, many.chain([("BIG".to_owned(), "b".repeat(130_000))]));
                },
            },
            Question {
                what: "odd variables",
                script: "env | sort | od -c",
                configure: |config| {
                    let pairs = [
                        ("A.B", "dot"),
                        ("lines", "one\ntwo"),
                        ("A", "first"),
                        ("A", "second"),
                        ("PATH", "/sbin:/bin"),
                        ("HOME", "/elsewhere"),
                        ("HOSTNAME", "mine"),
                        ("é", "ü"),
                    ];
                    variables(config, pairs.map(|(key, value)| (key.to_owned(), value.to_owned())));
                },
            },
            Question {
                what: "nothing masked (procMount: Unmasked)",
                script: "awk '$2 ~ /^.(proc|sys)/ { print $2, $3, substr($4, 1, 2) }' /proc/mounts; \
                         [ -w /proc/sys/kernel/panic ]; echo $?; ls -d /proc/bus /sys/firmware",
                configure: |config| {
                    security(config).masked_paths.clear();
                    security(config).readonly_paths.clear();
                },
            },
            Question {
                what: "masked and read-only paths of its own",
                script: "cat /proc/version | wc -c; ls /proc/sys/net | wc -l; ls -l /proc/version | cut -c1-10; \
                         cat /etc/passwd | wc -l; echo x >/etc/group; stat -c %F /proc/version /proc/sys/net",
                configure: |config| {
                    let masked = ["/proc/version", "/proc/sys/net", "/no/such", "/etc/passwd"];
                    security(config).masked_paths = texts(&masked);
                    security(config).readonly_paths = texts(&["/etc/group", "/no/such/either", "/proc/fs"]);
                },
            },
            Question {
                what: "unified resources",
                script: "cd /sys/fs/cgroup; cat memory.max memory.high memory.oom.group memory.min",
                configure: |config| {
                    let unified =
                        [("memory.high", "33554432"), ("memory.oom.group", "1"), ("memory.min", "1048576")];
                    resources(config).memory_limit_in_bytes = 64 << 20;
                    resources(config).unified =
                        unified.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
                },
            },
            Question {
                what: "a capability that nobody knows",
                script: "grep Cap /proc/self/status",
                configure: |config| {
                    security(config).capabilities = MessageField::some(proto::Capability {
                        add_capabilities: texts(&["NOSUCH", "NET_ADMIN"]),
                        ..Default::default()
                    });
                },
            },
            Question {
                what: "a terminal",
                script: "env | sort; tty; stty -a; ls -l /dev/console | cut -c1-24; cut -d' ' -f5-8 /proc/1/stat",
                configure: |config| config.tty = true,
            },
            Question {
                what: "a volume in a read-only root",
                script: "ls -ld /new /new/place | cut -c1-10; touch /new/f; [ -w /new/place ] && echo writable; touch /tmp/x",
                configure: |config| {
                    security(config).readonly_rootfs = true;
                    config.mounts = vec![volume(Path::new("/tmp"), "/new/place")];
                },
            },
            Question {
                what: "a working directory that is made, for another user",
                script: "pwd; id -u; touch here; ls -ld . | cut -c1-30",
                configure: |config| {
                    config.working_dir = "/root/deep/down".to_owned();
                    security(config).run_as_user = id(1000);
                },
            },
            Question {
                what: "signals of its own for its first process",
                script: "kill -TERM 1; echo still; kill -9 1; echo still; exec sh -c 'kill -ABRT $$; echo yes'",
                configure: |_| {},
            },
            Question {
                what: "orphans",
                script: "(sleep 0.1; exit 3) & sh -c 'sleep 0.05 & exit 0'; sleep 0.3; ps -o stat,args | grep -c Z",
                configure: |_| {},
            },
            Question {
                what: "output without an end of line",
                script: "printf 'no end'; printf 'err' >&2",
                configure: |_| {},
            },
            Question {
                what: "closed standard streams",
                script: "exec >&- 2>&-; sleep 0.1; exit 7",
                configure: |_| {},
            },
            Question {
                what: "an input that nobody writes to",
                script: "readlink /proc/self/fd/0 | cut -c1-4; timeout 0.2 cat; echo $?",
                configure: |config| config.stdin = true,
            },
        ],
    )?;
    Ok(format!("{} settings as with runc", answers.len()))
}

/// Whether what is told has to be what runc tells, word by word.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Words {
    Same,
    Own,
}

/// Containers whose program can't be had or whose settings are wrong: what becomes of them, and how it is told.
pub(crate) fn refusals(environment: &mut Environment) -> Outcome<String> {
    type Change<'a> = Box<dyn Fn(&mut proto::ContainerConfig) + 'a>;
    let directory = environment.node()?.directory("programs")?;
    for (name, contents) in [("broken", "no program"), ("lost", "#!/no/such/interpreter\n"), ("list", "")] {
        let file = directory.join(name);
        fs::write(&file, contents).explain(|| format!("write {}", file.display()))?;
        let mode = if name == "list" { 0o644 } else { 0o755 };
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).explain(|| "set a mode".into())?;
    }
    let command = |command: &'static str| -> Change<'_> {
        let directory = &directory;
        Box::new(move |config| {
            config.command = vec![command.to_owned()];
            config.mounts = vec![volume(directory, "/programs")];
        })
    };
    let changes: Vec<(&str, Words, Change<'_>)> = vec![
        ("a program that is not in the path", Words::Same, command("nosuch")),
        (
            "a path that it is not in",
            Words::Same,
            Box::new(|config| {
                config.command = vec!["ls".to_owned()];
                variables(config, [("PATH".to_owned(), "/none".to_owned())]);
            }),
        ),
        ("a program that is not there", Words::Same, command("/no/such")),
        ("a program that nobody may execute", Words::Same, command("/programs/list")),
        ("a directory", Words::Same, command("/etc")),
        ("a program in a file", Words::Same, command("/etc/passwd/x")),
        ("a program that is none", Words::Same, command("/programs/broken")),
        ("a script without its interpreter", Words::Same, command("/programs/lost")),
        (
            "too many arguments",
            Words::Same,
            Box::new(|config| config.args = (0..20).map(|_| "a".repeat(120_000)).collect()),
        ),
        ("too long an argument", Words::Same, Box::new(|config| config.args = vec!["a".repeat(140_000)])),
        (
            "a working directory that is a file",
            Words::Own,
            Box::new(|config| config.working_dir = "/etc/passwd".to_owned()),
        ),
        (
            "a relative working directory",
            Words::Own,
            Box::new(|config| config.working_dir = "etc".to_owned()),
        ),
        (
            "a volume among the kernel's files",
            Words::Own,
            Box::new(|config| config.mounts = vec![volume(&directory, "/proc/foo")]),
        ),
        (
            "a directory over a file",
            Words::Own,
            Box::new(|config| config.mounts = vec![volume(&directory, "/etc/passwd")]),
        ),
        (
            "a resource that nobody knows",
            Words::Own,
            Box::new(|config| {
                resources(config).unified = [("nosuch.max".to_owned(), "1".to_owned())].into();
            }),
        ),
        (
            "a value that a resource can't have",
            Words::Own,
            Box::new(|config| {
                resources(config).unified = [("memory.high".to_owned(), "lots".to_owned())].into();
            }),
        ),
        ("too little memory", Words::Same, Box::new(|config| resources(config).memory_limit_in_bytes = 4096)),
    ];
    let mut unlike = Vec::new();
    for (what, words, change) in &changes {
        let ask = |handler: Handler| -> Outcome<(String, String)> {
            let pod = environment.shared_pod(handler)?;
            let container = pod.create("odd", "echo ran", |config| change(config))?;
            let told = match container.start() {
                Ok(()) => {
                    let ended = container.wait()?;
                    (format!("ended: {} {}", ended.code, ended.reason), ended.stdout + &ended.stderr)
                }
                Err(failure) => {
                    let status = container.status()?;
                    let state = status.state.enum_value_or_default();
                    (format!("{state:?} {} {}", status.exit_code, status.reason), reason(&failure.0))
                }
            };
            container.remove()?;
            Ok(told)
        };
        let (right, ours) = (ask(Handler::Runc)?, ask(environment.handler())?);
        if ours.0 != right.0 || *words == Words::Same && ours.1 != right.1 {
            unlike.push(format!("{what}: {ours:?}, runc has {right:?}"));
        }
    }
    let _ = fs::remove_dir_all(&directory);
    ensure_eq!(unlike, [] as [String; 0], "what becomes of containers, and with runc");
    Ok(format!("{} containers end as with runc", changes.len()))
}

/// The part of an error that is about the program, without the number of the gRPC status behind it.
fn reason(failure: &str) -> String {
    let reason =
        failure.split_once("unable to start container process: ").map_or(failure, |(_, reason)| reason);
    reason.split(" (gRPC").next().unwrap_or(reason).to_owned()
}

/// Programs that are started in a container later: what they find, and what becomes of those that can't be.
pub(crate) fn execs(environment: &mut Environment) -> Outcome<String> {
    let directory = environment.node()?.directory("programs")?;
    let broken = directory.join("broken");
    fs::write(&broken, "no program").explain(|| "write a program".into())?;
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755)).explain(|| "set a mode".into())?;
    let ask = |handler: Handler| -> Outcome<Vec<String>> {
        let pod = environment.shared_pod(handler)?;
        let waits = "echo up; trap 'exit 0' TERM; while :; do sleep 0.05; done";
        let container = pod.start("odd", waits, |config| {
            security(config).run_as_user = id(1000);
            security(config).no_new_privs = true;
            config.working_dir = "/home".to_owned();
            config.mounts = vec![volume(&directory, "/programs")];
            variables(config, [("A".to_owned(), "b".to_owned())]);
        })?;
        container.wait_for_output("up")?;
        let mut answers = Vec::new();
        for script in [
            "id; pwd; env | sort; umask; grep -E 'Cap|NoNew|Seccomp:' /proc/self/status; cat /proc/self/oom_score_adj",
            "readlink /proc/self/fd/0 | cut -c1-4; ls /dev/fd/ | wc -l; for f in 0 1 2; do [ -t $f ]; echo $?; done",
            "cat /proc/self/cgroup; ls -l /proc/self/ns/* | sed 's/.*ns.//' | cut -d: -f1 | sort",
            "sleep 0.3 & echo left",
            "kill -9 $$",
            "exit 255",
            "head -c 100000 /dev/zero | tr '\\0' x | wc -c; printf noend",
            "exec 1>&-; exit 3",
        ] {
            let ended = container.exec(script)?;
            answers.push(format!("{script}: {} {} {}", ended.code, ended.stdout, ended.stderr));
        }
        let commands: [&[&str]; 7] = [
            &["/no/such"],
            &["nosuch"],
            &["/etc"],
            &["/etc/passwd"],
            &["/programs/broken"],
            &[""],
            &["sh", "-c", "echo $0 $1", "a b", "c"],
        ];
        for command in commands {
            let said = match container.exec_command(&texts(command), Duration::ZERO) {
                Ok(ended) => format!("{} {}{}", ended.code, ended.stdout, ended.stderr),
                Err(failure) => format!("refused: {}", reason(&failure.0)),
            };
            answers.push(format!("{command:?}: {said}"));
        }
        let stopped = shell("exit 0");
        ensure!(container.exec_command(&stopped, Duration::ZERO)?.code == 0, "the container has ended");
        container.stop(Duration::from_secs(5))?;
        answers.push(format!("{:?}", container.wait()?));
        container.remove()?;
        Ok(answers)
    };
    let (right, ours) = (ask(Handler::Runc)?, ask(environment.handler())?);
    let _ = fs::remove_dir_all(&directory);
    let unlike: Vec<_> = right.iter().zip(&ours).filter(|(right, ours)| right != ours).collect();
    ensure!(unlike.is_empty(), "runc's and ours: {unlike:#?}");
    Ok(format!("{} programs as with runc", right.len()))
}

/// A pod of many containers.
pub(crate) fn many(environment: &mut Environment) -> Outcome<String> {
    const COUNT: usize = 100;
    let pod = Pod::run(environment.node()?, environment.handler(), "many", |_| {})?;
    let mut containers = Vec::new();
    for number in 0..COUNT {
        let container = pod.start("one", "echo up; exec sleep 100000", |_| {});
        containers.push(container.explain(|| format!("container {number}"))?);
    }
    for container in &containers {
        container.wait_for_output("up")?;
    }
    for container in [&containers[0], &containers[COUNT - 1]] {
        container.exec("true")?.success()?;
    }
    for container in containers {
        container.stop(Duration::ZERO)?;
        ensure_eq!(container.wait()?.code, 137, "exit code");
        container.remove()?;
    }
    pod.finish()?;
    Ok(format!("{COUNT} containers side by side"))
}
