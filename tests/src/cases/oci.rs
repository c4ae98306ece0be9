//! What the OCI specification asks for inside a container.

use std::fs;

use serde_json::json;

use super::{Case, Environment, Fixture};
use crate::bundle;
use crate::failure::{Explain, Outcome};
use crate::shim::{CALL_LIMIT, CreateOptions};
use crate::stdio::Streams;
use crate::{ensure, ensure_eq};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("oci-process-attributes", process_attributes),
    Case::new("oci-seccomp-filter", seccomp),
    Case::new("oci-masked-and-read-only-paths", paths).on(Fixture::Pod),
    Case::new("oci-devices", devices).on(Fixture::Pod),
    Case::new("oci-limits", limits),
    Case::new("oci-memory-limit-kills", memory_limit_kills),
    Case::new("oci-read-only-root", read_only_root),
    Case::new("oci-no-modules", no_modules).bulkhead_only(),
    Case::new("oci-default-seccomp-filter", default_filter).bulkhead_only(),
];

fn process_attributes(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("attributes");
    let script = "id -u; id -g; id -G; umask; pwd; hostname; echo $$; echo $COLOUR; ulimit -n; ulimit -Hn; \
                  grep -E '^(CapEff|CapBnd|CapAmb|NoNewPrivs):' /proc/self/status | tr -d '\\t'; cat /proc/self/oom_score_adj; cat /proc/sys/net/ipv4/ip_forward";
    let mut process = bundle::shell(script);
    process["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [2000], "umask": 0o27 });
    process["cwd"] = "/tmp".into();
    process["env"] = json!(["PATH=/bin", "COLOUR=green"]);
    process["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 }]);
    process["capabilities"] = json!({ "bounding": ["CAP_NET_RAW", "CAP_KILL"], "permitted": ["CAP_NET_RAW"], "effective": ["CAP_NET_RAW"],
                                      "inheritable": ["CAP_NET_RAW"], "ambient": ["CAP_NET_RAW"] });
    process["oomScoreAdj"] = 500.into();
    let mut spec = bundle::spec(&id, process);
    spec["hostname"] = "inside".into();
    spec["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": "1" });
    let output = environment.run_to_end(&id, &spec)?.success()?;
    let expected = "1000\n1001\n1001 2000\n0027\n/tmp\ninside\n1\ngreen\n100\n200\n\
                    CapEff:0000000000002000\nCapBnd:0000000000002020\nCapAmb:0000000000002000\nNoNewPrivs:1\n500\n1\n";
    ensure_eq!(output, expected, "what the process sees");
    Ok("user, groups, umask, directory, host name, pid 1, environment, rlimits, capabilities, no_new_privs, oom score, sysctl".into())
}

fn seccomp(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("seccomp");
    let mut spec = bundle::spec(
        &id,
        bundle::shell(
            "mkdir /tmp/a 2>&1; echo $?; chmod 700 /tmp 2>&1; echo $?; grep ^Seccomp: /proc/self/status | tr -d '\\t'",
        ),
    );
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 },
            { "names": ["chmod", "fchmodat", "no_such_call"], "action": "SCMP_ACT_ERRNO",
              "args": [{ "index": 1, "value": 0o700, "op": "SCMP_CMP_EQ" }] }
        ]
    });
    let output = environment.run_to_end(&id, &spec)?.success()?;
    ensure!(
        output.contains("mkdir") && output.contains("not supported"),
        "mkdir was to fail with EOPNOTSUPP: {output:?}"
    );
    ensure!(
        output.contains("chmod") && output.contains("not permitted"),
        "chmod 700 was to fail with EPERM: {output:?}"
    );
    ensure!(output.ends_with("Seccomp:2\n"), "no filter is installed: {output:?}");
    Ok("refused with the given and with the default error".into())
}

fn paths(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let script = "wc -c </proc/keys; ls /sys/firmware 2>/dev/null | wc -l; echo 1 2>/dev/null >/proc/sys/kernel/panic || echo ro; \
                  echo h 2>/dev/null >/proc/sysrq-trigger || echo ro; touch /sys/x 2>/dev/null || echo ro";
    let output = pod.exec_script(&name, script)?.success()?;
    ensure_eq!(output, "0\n0\nro\nro\nro\n", "masked and read-only paths");
    Ok("/proc/keys and /sys/firmware are empty, /proc/sys, sysrq-trigger and /sys read-only".into())
}

fn devices(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let script = "cd /dev; for d in null zero full random urandom tty; do [ -c $d ] || echo no $d; done; head -c 4 /dev/zero | wc -c; \
                  echo x >/dev/null && echo null; [ $(head -c 8 /dev/urandom | wc -c) = 8 ] && echo random; readlink ptmx; readlink fd; readlink stdin; ls -d shm pts; \
                  mknod /tmp/mem c 1 1 && head -c 1 /tmp/mem >/dev/null 2>&1 && echo mem opened; rm -f /tmp/mem";
    let output = pod.exec_script(&name, script)?.stdout;
    ensure_eq!(output, "4\nnull\nrandom\npts/ptmx\n/proc/self/fd\n/proc/self/fd/0\npts\nshm\n", "devices");
    Ok("the standard ones, and no other can be opened".into())
}

fn limits(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("limits");
    let mut spec = bundle::spec(
        &id,
        bundle::shell(
            "cd /sys/fs/cgroup; cat memory.max memory.low cpu.max cpu.weight pids.max; cat /proc/self/cgroup",
        ),
    );
    spec["linux"]["resources"]["memory"] = json!({ "limit": 50 << 20, "reservation": 10 << 20 });
    spec["linux"]["resources"]["cpu"] = json!({ "quota": 20_000, "period": 100_000, "shares": 512 });
    spec["linux"]["resources"]["pids"] = json!({ "limit": 64 });
    spec["linux"]["namespaces"] = json!([{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                                         { "type": "network" }, { "type": "cgroup" }]);
    bundle::add(
        &mut spec["mounts"],
        json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid", "noexec", "nodev"] }),
    );
    let output = environment.run_to_end(&id, &spec)?.success()?;
    // 512 shares are weight 20 by the old formula of OCI runtimes and 59 by the present one.
    let expected =
        ["20", "59"].map(|weight| format!("52428800\n10485760\n20000 100000\n{weight}\n64\n0::/\n"));
    ensure!(expected.contains(&output), "limits in the container's control group: {output:?}");
    Ok("memory 50 MiB, protected 10 MiB, CPU 20 %, weight of 512 shares, 64 processes".into())
}

fn memory_limit_kills(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("oom");
    let mut spec = bundle::spec(&id, bundle::shell("head -c 40000000 /dev/zero | tail; echo survived $?"));
    spec["linux"]["resources"]["memory"] = json!({ "limit": 16 << 20, "swap": 16 << 20 });
    let ended = environment.run_to_end(&id, &spec)?;
    ensure!(
        ended.exit_status == 137 || ended.stdout.contains("137"),
        "a process over its limit was not killed: {ended:?}"
    );
    environment.host()?.events.wait_for(&id, "/tasks/oom", "", crate::shim::CALL_LIMIT)?;
    Ok("killed, and an OOM event was sent".into())
}

fn read_only_root(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("readonly");
    let mut spec = bundle::spec(
        &id,
        bundle::shell("touch /file 2>&1; touch /run/file && echo run; touch /dev/shm/file && echo shm"),
    );
    spec["root"]["readonly"] = true.into();
    let output = environment.run_to_end(&id, &spec)?.success()?;
    ensure_eq!(output, "touch: /file: Read-only file system\nrun\nshm\n", "writes");
    Ok("the root refuses writes, tmpfs mounts take them".into())
}

fn no_modules(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("modules");
    let script = "echo module >/tmp/m.ko; insmod /tmp/m.ko 2>&1; ls /proc/modules 2>&1; true";
    let mut process = bundle::shell(script);
    let all = ["CAP_SYS_MODULE", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"];
    process["capabilities"] = json!({ "bounding": all, "effective": all, "permitted": all });
    let spec = bundle::spec(&id, process);
    let output = environment.run_to_end(&id, &spec)?.success()?;
    ensure!(
        output.contains("kernel does not support requested operation"),
        "init_module with CAP_SYS_MODULE was to be unknown: {output:?}"
    );
    ensure!(output.contains("No such file"), "there is a /proc/modules: {output:?}");
    Ok(output.lines().collect::<Vec<_>>().join("; "))
}

fn default_filter(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("filter");
    let host = environment.host()?;
    let config = host.path().join("filter.toml");
    fs::write(&config, "default_seccomp = true\n").explain(|| format!("write {}", config.display()))?;
    let script = "grep ^Seccomp: /proc/self/status; unshare -U true 2>&1; true";
    let bundle = host.bundle(&id, &bundle::spec(&id, bundle::shell(script)))?;
    let shim = host.start(&bundle)?;
    let stdio = shim.stdio("init", Streams::default())?;
    shim.create(&stdio, CreateOptions { config: Some(&config), ..CreateOptions::default() })?;
    shim.start("")?;
    shim.wait("", CALL_LIMIT)?;
    let output = stdio.stdout.to_end(CALL_LIMIT)?;
    super::Container { bundle, shim, stdio }.finish()?;
    fs::remove_file(&config).explain(|| format!("remove {}", config.display()))?;
    ensure!(output.contains("Seccomp:\t2"), "a container without a filter of its own got none: {output:?}");
    ensure!(output.contains("not permitted"), "a new user namespace was not refused: {output:?}");
    Ok("where it is configured, a container whose specification has no filter gets the default one".into())
}
