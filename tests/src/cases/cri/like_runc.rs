//! What a container finds is what it finds in a pod of runc on the same node.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use bulkhead_cri::proto;
use protobuf::MessageField;

use crate::cases::Environment;
use crate::cri::{Handler, shell};
use crate::failure::{Explain, Outcome};
use crate::{ensure, ensure_eq};

/// What is asked of a container of each runtime.
pub(crate) struct Question {
    /// What it is about.
    pub what: &'static str,
    /// The script whose output is compared.
    pub script: &'static str,
    /// How the container is set up.
    pub configure: fn(&mut proto::ContainerConfig),
}

/// Asks containers in the shared pods of runc and of the handler under test, and expects the same answers.
pub(crate) fn compare(environment: &Environment, questions: &[Question]) -> Outcome<Vec<String>> {
    let mut failures = Vec::new();
    let mut answers = Vec::new();
    for question in questions {
        let ask = |handler: Handler| -> Outcome<String> {
            let pod = environment.shared_pod(handler)?;
            let ended = pod.run_script("asked", question.script, question.configure)?;
            Ok(format!("{}{}exit code {}", ended.stdout, ended.stderr, ended.code))
        };
        let right = ask(Handler::Runc)?;
        let answer = ask(environment.handler());
        match answer {
            Ok(answer) if answer == right => answers.push(right),
            Ok(answer) => failures.push(format!("{}: {answer:?}, runc has {right:?}", question.what)),
            Err(failure) => failures.push(format!("{}: {failure}, runc has {right:?}", question.what)),
        }
    }
    // All of them: that one question fails says nothing about the others.
    ensure_eq!(failures, [] as [String; 0], "answers unlike runc's");
    Ok(answers)
}

/// The security settings of a container.
pub(crate) fn security(config: &mut proto::ContainerConfig) -> &mut proto::LinuxContainerSecurityContext {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default()
}

/// A user or group id.
pub(crate) fn id(value: i64) -> MessageField<proto::Int64Value> {
    MessageField::some(proto::Int64Value { value, ..Default::default() })
}

fn custom_image(config: &mut proto::ContainerConfig) {
    config.image.mut_or_insert_default().image = "bulkhead.test/custom:1".to_owned();
}

/// Arguments, variables, working directory, host name, from the image and from the pod.
pub(crate) fn program(environment: &mut Environment) -> Outcome<String> {
    const SHOW: &str = "tr '\\0' '|' </proc/self/cmdline; echo; env | sort; pwd; id; hostname; umask";
    let answers = compare(
        environment,
        &[
            Question { what: "defaults", script: SHOW, configure: |_| {} },
            Question {
                what: "the pod's own",
                script: SHOW,
                configure: |config| {
                    config.working_dir = "/made/for/it".to_owned();
                    config.args = vec!["name".to_owned(), "two words".to_owned()];
                    for (key, value) in [("COLOUR", "blue"), ("EMPTY", ""), ("SPACES", " a  b ")] {
                        config.envs.push(proto::KeyValue {
                            key: key.to_owned(),
                            value: value.to_owned(),
                            ..Default::default()
                        });
                    }
                },
            },
            Question {
                what: "the image's",
                script: "",
                configure: |config| {
                    custom_image(config);
                    config.command.clear();
                    config.args = vec!["id; pwd; echo $COLOUR; cat file".to_owned()];
                },
            },
            Question {
                what: "standard streams",
                script: "readlink /proc/self/fd/0; cat; ls /proc/self/fd | wc -l",
                configure: |_| {},
            },
        ],
    )?;
    Ok(answers[2].replace('\n', " "))
}

/// Users, groups and privileges of processes.
pub(crate) fn users(environment: &mut Environment) -> Outcome<String> {
    const SHOW: &str = "id; grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs)' /proc/self/status; \
                        touch /tmp/mine && stat -c '%u %g %a' /tmp/mine; echo $HOME";
    let answers = compare(
        environment,
        &[
            Question {
                what: "a number of the image",
                script: SHOW,
                configure: |config| security(config).run_as_user = id(1000),
            },
            Question {
                what: "a number that the image has not",
                script: SHOW,
                configure: |config| {
                    security(config).run_as_user = id(4711);
                    security(config).run_as_group = id(4712);
                },
            },
            Question {
                what: "a name, with more groups",
                script: SHOW,
                configure: |config| {
                    security(config).run_as_username = "user".to_owned();
                    security(config).supplemental_groups = vec![5000, 5001];
                },
            },
            Question {
                what: "no groups of the image",
                script: SHOW,
                configure: |config| {
                    security(config).run_as_user = id(1000);
                    security(config).supplemental_groups = vec![5000];
                    security(config).supplemental_groups_policy =
                        proto::SupplementalGroupsPolicy::Strict.into();
                },
            },
            Question { what: "the image's user", script: SHOW, configure: custom_image },
        ],
    )?;
    Ok(answers[2].lines().next().unwrap_or_default().to_owned())
}

/// Capabilities, no new privileges, privileged containers.
pub(crate) fn privileges(environment: &mut Environment) -> Outcome<String> {
    const SHOW: &str = "grep -E '^(Cap...|NoNewPrivs)' /proc/self/status";
    let answers = compare(
        environment,
        &[
            Question { what: "defaults", script: SHOW, configure: |_| {} },
            Question {
                what: "added and dropped",
                script: "grep Cap /proc/self/status; chown 1 /tmp; mknod /dev/x c 1 3; ls -l /dev/x | cut -c1-10",
                configure: |config| {
                    security(config).capabilities = MessageField::some(proto::Capability {
                        add_capabilities: vec!["NET_ADMIN".to_owned(), "SYS_TIME".to_owned()],
                        drop_capabilities: vec!["CHOWN".to_owned()],
                        ..Default::default()
                    });
                },
            },
            Question {
                what: "all dropped",
                script: SHOW,
                configure: |config| {
                    security(config).capabilities = MessageField::some(proto::Capability {
                        drop_capabilities: vec!["ALL".to_owned()],
                        ..Default::default()
                    });
                },
            },
            Question {
                what: "all added",
                script: SHOW,
                configure: |config| {
                    security(config).capabilities = MessageField::some(proto::Capability {
                        add_capabilities: vec!["ALL".to_owned()],
                        ..Default::default()
                    });
                },
            },
            Question {
                what: "no new privileges",
                script: SHOW,
                configure: |config| security(config).no_new_privs = true,
            },
        ],
    )?;
    Ok(answers[1].lines().nth(3).unwrap_or_default().to_owned())
}

/// What processes are limited by, and what they inherit, without anybody's asking.
pub(crate) fn limits(environment: &mut Environment) -> Outcome<String> {
    const SHOW: &str = "tr -s ' ' </proc/self/limits; cd /proc/self; cat oom_score_adj coredump_filter timerslack_ns \
                        personality; umask; grep -E '^(Sig(Pnd|Blk|Cgt)|ShdPnd|Umask|Groups|THP|CoreD)' status";
    let answers = compare(
        environment,
        &[
            Question { what: "defaults", script: SHOW, configure: |_| {} },
            Question {
                what: "an inclination to be killed",
                script: "cat /proc/self/oom_score_adj; echo 0 >/proc/self/oom_score_adj; cat /proc/self/oom_score_adj",
                configure: |config| {
                    let linux = config.linux.mut_or_insert_default();
                    linux.resources.mut_or_insert_default().oom_score_adj = 300;
                },
            },
        ],
    )?;
    let ask = |handler: Handler| -> Outcome<String> {
        let container = environment.shared_pod(handler)?.start("idle", "exec sleep 100000", |_| {})?;
        let said = container.exec(SHOW)?.success()?;
        container.stop(Duration::ZERO)?;
        container.remove()?;
        Ok(said)
    };
    ensure_eq!(ask(environment.handler())?, ask(Handler::Runc)?, "what an exec inherits, and runc's");
    let files = answers[0].lines().find(|line| line.starts_with("Max open files"));
    Ok(files.unwrap_or_default().to_owned())
}

/// Parameters of the network that are the kernel's own business: they go by the size of the memory, or are of parts that one
/// kernel has and the other has not; an interface's that the agent sets as it takes the addresses over from the host.
const OWN_PARAMETERS: &str = "net/netfilter/|net/bridge/|net/nf_|net/mptcp/|ipv4/tcp_(mem|ehash_entries|max_|child_ehash)|\
     ipv4/tcp_(available|allowed)_congestion|ipv4/udp_(mem|hash_entries)|ipv4/(neigh|route|inet_peer)|ipv6/neigh|ipv6/conf/eth0/(accept_dad|accept_ra|addr_gen_mode|autoconf)=|xfrm|_next_id";

/// The parameters of the network and of IPC: those of a new namespace, which takes some from the node, with what CNI has set.
pub(crate) fn parameters(environment: &mut Environment) -> Outcome<String> {
    let script = format!(
        "cd /proc/sys; find net kernel/shm* kernel/msg* kernel/sem fs/mqueue -type f 2>/dev/null | sort | while read f; do \
         v=$(tr '\\t' ' ' <$f 2>/dev/null) && echo $f=$v; done | grep -Ev '{OWN_PARAMETERS}'"
    );
    let ask = |handler: Handler| -> Outcome<BTreeMap<String, String>> {
        let pod = environment.shared_pod(handler)?;
        let said = pod.run_script("parameters", &script, |_| {})?.success()?;
        Ok(said
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.into(), value.into()))
            .collect())
    };
    let (right, ours) = (ask(Handler::Runc)?, ask(environment.handler())?);
    let both: Vec<_> =
        right.iter().filter_map(|(name, value)| Some((name, value, ours.get(name)?))).collect();
    ensure!(both.len() > 300, "only {} parameters that both have", both.len());
    let unlike: Vec<_> = both.iter().filter(|(_, right, ours)| right != ours).collect();
    ensure!(unlike.is_empty(), "name, runc's value and ours: {unlike:?}");
    ensure_eq!(ours.get("net/ipv4/ip_forward").map(String::as_str), Some("1"), "the node forwards");
    Ok(format!("{} parameters as with runc", both.len()))
}

/// The file systems that every container has, and the root.
pub(crate) fn file_systems(environment: &mut Environment) -> Outcome<String> {
    let answers = compare(
        environment,
        &[
            Question {
                what: "what is mounted",
                script: "awk '{ print $2, $3 }' /proc/mounts | grep -Ev '^/( |etc|proc/)' | sort",
                configure: |_| {},
            },
            Question {
                what: "shared memory",
                script: "df -k /dev/shm | awk 'END { print $2 }'; stat -c '%a %U' /dev/shm; \
                         grep -c '/dev/shm.*nosuid.*nodev.*noexec' /proc/mounts",
                configure: |_| {},
            },
            Question {
                what: "masked and read-only paths",
                // A guest kernel need not have all of them.
                script: "for f in kcore timer_list keys; do [ ! -e /proc/$f ] || cat /proc/$f; done | wc -c; ls /sys/firmware | wc -l; \
                         echo x >/proc/sys/kernel/domainname; echo x >/proc/irq/default_smp_affinity",
                configure: |_| {},
            },
            Question {
                what: "a read-only root",
                script: "touch /new; touch /tmp/new; touch /dev/shm/new && echo shm; mkdir /dev/new && echo dev",
                configure: |config| security(config).readonly_rootfs = true,
            },
            Question {
                what: "devices",
                script: "cd /dev; ls | sort | grep -v core; ls -l null zero full random urandom tty ptmx | cut -c1-10,24-200 | \
                         awk '{ print $1, $NF }'; echo x >null; head -c 3 zero | wc -c; echo x >full",
                configure: |_| {},
            },
            Question {
                what: "the node's files about names",
                script: "cat /etc/hostname /etc/resolv.conf; touch /etc/hosts /etc/resolv.conf && echo writable",
                configure: |_| {},
            },
        ],
    )?;
    Ok(answers[1].replace('\n', " "))
}

/// Filters of system calls: none, the default one, one of the node's.
pub(crate) fn seccomp(environment: &mut Environment) -> Outcome<String> {
    let profile = environment.node()?.containerd().path().join("no-mkdir.json");
    let contents = r#"{ "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 }] }"#;
    fs::write(&profile, contents).explain(|| format!("write {}", profile.display()))?;
    const SHOW: &str =
        "grep -E '^Seccomp:' /proc/self/status; unshare -m true && echo unshared; mkdir /made && echo made";
    let of = |kind: proto::ProfileType, reference: &str| {
        MessageField::some(proto::SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: reference.to_owned(),
            ..Default::default()
        })
    };
    let mut answers = Vec::new();
    for (what, profile) in [
        ("none given", MessageField::none()),
        ("unconfined", of(proto::ProfileType::Unconfined, "")),
        ("the default", of(proto::ProfileType::RuntimeDefault, "")),
        ("one of the node's", of(proto::ProfileType::Localhost, &profile.display().to_string())),
    ] {
        let ask = |handler: Handler| -> Outcome<String> {
            let pod = environment.shared_pod(handler)?;
            let ended = pod.run_script("filtered", SHOW, |config| {
                config.command = shell(SHOW);
                security(config).seccomp = profile.clone();
                security(config).capabilities = MessageField::some(proto::Capability {
                    add_capabilities: vec!["SYS_ADMIN".to_owned()],
                    ..Default::default()
                });
            })?;
            Ok(ended.stdout + &ended.stderr)
        };
        let right = ask(Handler::Runc)?;
        ensure_eq!(ask(environment.handler())?, right, "{what}");
        answers.push(right.lines().next().unwrap_or_default().replace('\t', " "));
    }
    Ok(answers.join(", "))
}
