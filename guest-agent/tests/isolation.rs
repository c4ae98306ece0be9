//! What a container sees and what it may do: the OCI specification, property by property.

#![allow(clippy::unwrap_used, reason = "helpers of tests, which fail by panicking")]

mod common;

use std::fs;
use std::os::unix::fs::symlink;

use bulkhead_agent_protocol::*;
use common::*;
use serde_json::{Value, json};
use ttrpc::Code;

fn add_mount(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

fn namespaces(spec: &mut Value, change: impl Fn(&mut Vec<Value>)) {
    change(spec["linux"]["namespaces"].as_array_mut().unwrap());
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_sees_only_its_own() {
    let Some(guest) = Guest::start("own").await else { return };
    let root = guest.rootfs("root");
    let mut spec = guest.spec(
        &root,
        "hostname; ps -o pid,comm; ls /; cat /proc/self/cgroup; cat /proc/1/sched > /dev/null; ls /sys/class/net;
         ifconfig lo | grep -c UP; pwd; readlink /dev/fd; readlink /dev/ptmx",
    );
    spec["domainname"] = json!("example");
    let output = guest.run(&guest.id("a"), &spec).await;
    let stdout = output.stdout;
    assert!(stdout.starts_with("pod\n"), "{stdout}");
    assert!(stdout.contains("    1 sh\n"), "{stdout}");
    assert!(!stdout.contains("bulkhead"), "{stdout}");
    assert!(stdout.contains("bin\ndev\netc\nhome\nproc\nroot\nrun\nsys\ntmp\n"), "{stdout}");
    assert!(stdout.contains("0::/\n"), "its group is the root of its view: {stdout}");
    assert!(stdout.ends_with("\nlo\n1\n/\n/proc/self/fd\npts/ptmx\n"), "{stdout}");
    assert_eq!(output.stderr, "");
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn the_root_can_be_read_only() {
    let Some(guest) = Guest::start("ro").await else { return };
    let root = guest.rootfs("root");
    let mut spec = guest
        .spec(&root, "touch /x; touch /run/y && touch /dev/shm/z && echo fine; touch /proc/sys/x /sys/x");
    spec["root"]["readonly"] = json!(true);
    let output = guest.run(&guest.id("a"), &spec).await;
    assert!(output.stderr.contains("/x: Read-only file system"), "{output:?}");
    assert_eq!(output.stdout, "fine\n");
    assert!(!root.join("x").exists());
    // The snapshot's own directory stays writable for others.
    fs::write(root.join("x"), "").unwrap();
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn bind_mounts_of_files_and_directories() {
    let Some(guest) = Guest::start("bind").await else { return };
    let root = guest.rootfs("root");
    let source = guest.directory.join("source");
    fs::create_dir_all(source.join("directory/sub")).unwrap();
    fs::write(source.join("file"), "contents\n").unwrap();
    let mut spec = guest.spec(
        &root,
        "cat /etc/new/file; echo w > /data/w; echo x > /fixed/x; echo y > /etc/new/file; ls /data /fixed;
         /data/program; cat /run/over/file",
    );
    fs::copy("/bin/busybox", source.join("directory/program")).unwrap();
    for (destination, path, options) in [
        ("/etc/new/file", "file", vec!["bind", "ro"]),
        ("/data", "directory", vec!["rbind", "rw", "noexec", "nosuid"]),
        ("/fixed", "directory", vec!["rbind", "rro"]),
        // Inside another mount of the same container.
        ("/run/over/file", "file", vec!["bind"]),
    ] {
        add_mount(
            &mut spec,
            json!({"destination": destination, "type": "bind", "source": source.join(path), "options": options}),
        );
    }
    let output = guest.run(&guest.id("a"), &spec).await;
    assert_eq!(
        output.stdout, "contents\n/data:\nprogram\nsub\nw\n\n/fixed:\nprogram\nsub\nw\ncontents\n",
        "{output:?}"
    );
    assert_eq!(output.stderr.matches("Read-only file system").count(), 2, "{output:?}");
    assert!(output.stderr.contains("/data/program: Permission denied"), "{output:?}");
    assert_eq!(fs::read_to_string(source.join("directory/w")).unwrap(), "w\n");
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn mount_options_reach_the_mounts() {
    let Some(guest) = Guest::start("options").await else { return };
    let root = guest.rootfs("root");
    fs::create_dir(root.join("seed")).unwrap();
    fs::write(root.join("seed/file"), "copied up\n").unwrap();
    let mut spec = guest.spec(&root, "cat /proc/self/mounts; cat /seed/file; stat -c %a /t");
    let tmpfs = json!({"destination": "/t", "type": "tmpfs", "source": "tmpfs",
                       "options": ["ro", "noatime", "size=8k", "mode=0711"]});
    add_mount(&mut spec, tmpfs);
    add_mount(
        &mut spec,
        json!({"destination": "/seed", "type": "tmpfs", "options": ["tmpcopyup", "nodiratime"]}),
    );
    let output = guest.run(&guest.id("a"), &spec).await;
    let mount = |at: &str| {
        let line = output.stdout.lines().find(|line| line.split(' ').nth(1) == Some(at));
        line.unwrap_or_else(|| panic!("{at}: {output:?}")).split(' ').nth(3).unwrap().to_owned()
    };
    let has = |at: &str, options: &[&str]| {
        let actual = mount(at);
        for option in options {
            assert!(actual.split(',').any(|actual| actual == *option), "{at}: {option} not in {actual}");
        }
    };
    has("/t", &["ro", "noatime", "size=8k"]);
    has("/proc", &["rw", "nosuid", "nodev", "noexec"]);
    has("/sys", &["ro", "nosuid"]);
    has("/dev", &["rw", "nosuid", "size=65536k"]);
    assert!(!mount("/dev").contains("relatime"), "strictatime: {}", mount("/dev"));
    has("/seed", &["nodiratime"]);
    has("/sys/fs/cgroup", &["ro"]);
    assert!(output.stdout.ends_with("copied up\n711\n"), "{output:?}");
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn masked_and_read_only_paths() {
    let Some(guest) = Guest::start("masked").await else { return };
    let root = guest.rootfs("root");
    fs::create_dir(root.join("secret")).unwrap();
    fs::write(root.join("secret/file"), "hidden").unwrap();
    fs::write(root.join("key"), "hidden").unwrap();
    fs::create_dir(root.join("fixed")).unwrap();
    let mut spec = guest.spec(
        &root,
        "ls /secret; cat /key /proc/kcore; touch /secret/x /fixed/x; echo 1 > /proc/sys/kernel/panic",
    );
    spec["linux"]["maskedPaths"] = json!(["/secret", "/key", "/proc/kcore", "/does/not/exist"]);
    spec["linux"]["readonlyPaths"] = json!(["/fixed", "/proc/sys", "/no/such/path"]);
    let output = guest.run(&guest.id("a"), &spec).await;
    assert_eq!(output.stdout, "", "{output:?}");
    assert_eq!(output.stderr.matches("Read-only file system").count(), 3, "{output:?}");
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn links_in_the_image_lead_nowhere_else() {
    let Some(guest) = Guest::start("links").await else { return };
    let root = guest.rootfs("root");
    let outside = guest.directory.join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "outside").unwrap();
    // Every place that the agent makes something at is a link out of the image.
    symlink(&outside, root.join("absolute")).unwrap();
    symlink("../../../../../../../../../../tmp", root.join("relative")).unwrap();
    symlink(outside.join("file"), root.join("masked")).unwrap();
    fs::remove_dir(root.join("tmp")).unwrap();
    let source = guest.directory.join("source");
    fs::create_dir(&source).unwrap();
    let mut spec = guest.spec(&root, "pwd; ls -d /tmp/cwd /tmp/made");
    add_mount(
        &mut spec,
        json!({"destination": "/absolute/new", "type": "bind", "source": source, "options": ["bind"]}),
    );
    add_mount(&mut spec, json!({"destination": "/relative/made", "type": "tmpfs"}));
    spec["linux"]["maskedPaths"] = json!(["/masked"]);
    spec["linux"]["devices"] = json!([{"type": "c", "path": "/absolute/null", "major": 1, "minor": 3}]);
    spec["process"]["cwd"] = json!("/relative/cwd");
    let output = guest.run(&guest.id("a"), &spec).await;
    assert_eq!(output.stdout, "/tmp/cwd\n/tmp/cwd\n/tmp/made\n", "{output:?}");
    let names: Vec<_> = fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["file"], "nothing was made outside");

    // A link in the place of /proc would have the agent's own writes end up in the image.
    fs::remove_dir(root.join("proc")).unwrap();
    symlink("/etc", root.join("proc")).unwrap();
    let (code, message) =
        failure(guest.create(&guest.id("b"), &guest.spec(&root, "true"), &Stdio::default()).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("\"/proc\" must be an ordinary directory"), "{message}");
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn devices_are_made_and_filtered() {
    let Some(guest) = Guest::start("devices").await else { return };
    if fs::File::open("/dev/fuse").is_err() {
        return skip("no /dev/fuse to try device rules with");
    }
    let root = guest.rootfs("root");
    let script = "for d in null zero full random urandom tty; do stat -c '%n %t,%T %a' /dev/$d; done
        head -c 4 /dev/zero | wc -c; echo x > /dev/null && echo null
        stat -c '%n %F %t,%T %a %u' /dev/extra; true < /dev/extra && echo open
        mknod /run/fuse c 10 229 && echo made; true < /run/fuse && echo open";
    let mut spec = guest.spec(&root, script);
    spec["mounts"][1]["options"] = json!(["nosuid", "mode=755"]);
    spec["linux"]["devices"] = json!([
        {"type": "c", "path": "/dev/extra", "major": 10, "minor": 229, "fileMode": 384, "uid": 5},
        {"type": "c", "path": "/dev/allowed", "major": 10, "minor": 229},
    ]);
    spec["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}]);
    let output = guest.run(&guest.id("a"), &spec).await;
    let expected = "/dev/null 1,3 666\n/dev/zero 1,5 666\n/dev/full 1,7 666\n/dev/random 1,8 666\n/dev/urandom 1,9 666\n\
                    /dev/tty 5,0 666\n4\nnull\n/dev/extra character special file a,e5 600 5\nmade\n";
    assert_eq!(output.stdout, expected, "{output:?}");
    assert_eq!(output.stderr.matches("Operation not permitted").count(), 2, "{output:?}");

    spec["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "r"}]);
    spec["process"]["args"] = json!(["sh", "-c", "true < /dev/allowed && echo open; true > /dev/allowed"]);
    let output = guest.run(&guest.id("b"), &spec).await;
    assert_eq!(output.stdout, "open\n", "{output:?}");
    assert!(output.stderr.contains("Operation not permitted"), "{output:?}");

    // What a container may use can change.
    let id = guest.id("c");
    guest.start_container(&id, &guest.spec(&root, "exec sleep 1000")).await;
    let try_it = exec_process("mknod /run/fuse c 10 229; true < /run/fuse && echo open");
    assert_eq!(guest.exec(&id, "e1", &try_it).await.stdout, "");
    let resources =
        json!({"devices": [{"allow": false}, {"allow": true, "type": "c", "major": 10, "access": "rwm"}]});
    let update = UpdateRequest {
        container_id: id.clone(),
        resources: serde_json::to_vec(&resources).unwrap(),
        ..Default::default()
    };
    guest.client.update(limit(), &update).await.unwrap();
    assert_eq!(guest.exec(&id, "e2", &try_it).await.stdout, "open\n");
    guest.remove(&id).await;
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn the_identity_of_a_process() {
    let Some(guest) = Guest::start("identity").await else { return };
    let root = guest.rootfs("root");
    let mut spec = guest.spec(
        &root,
        "id -u; id -g; id -G; touch /tmp/f; stat -c %a /tmp/f; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status;
         echo $HOME; env | grep -c =; cat /proc/self/oom_score_adj; cat /proc/self/personality; pwd",
    );
    fs::set_permissions(root.join("tmp"), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    spec["process"]["user"] = json!({"uid": 1000, "gid": 100, "umask": 0o077, "additionalGids": [5, 6]});
    spec["process"]["capabilities"] = json!({
        "bounding": ["CAP_KILL", "CAP_NET_RAW", "CAP_CHOWN"], "permitted": ["CAP_KILL", "CAP_NET_RAW"],
        "effective": ["CAP_KILL"], "inheritable": ["CAP_NET_RAW"], "ambient": ["CAP_NET_RAW"]
    });
    spec["process"]["oomScoreAdj"] = json!(321);
    spec["process"]["cwd"] = json!("/made/for/it");
    spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    let output = guest.run(&guest.id("a"), &spec).await;
    // A program without privileges of its own keeps the ambient set.
    let expected = "1000\n100\n100 5 6\n600\nCapInh:\t0000000000002000\nCapPrm:\t0000000000002000\n\
                    CapEff:\t0000000000002000\nCapBnd:\t0000000000002021\nCapAmb:\t0000000000002000\nNoNewPrivs:\t1\n\
                    Seccomp:\t0\n/home/user\n";
    assert!(output.stdout.starts_with(expected), "{output:?}");
    assert!(output.stdout.ends_with("321\n00000008\n/made/for/it\n"), "{output:?}");

    // Root gets from execve what the bounding set has, unless it may get no new privileges.
    spec["process"]["user"] = json!({"uid": 0, "gid": 0});
    let output = guest.run(&guest.id("b"), &spec).await;
    assert!(output.stdout.contains("CapEff:\t0000000000002020\n"), "{output:?}");
    spec["process"]["noNewPrivileges"] = json!(false);
    let output = guest.run(&guest.id("c"), &spec).await;
    assert!(output.stdout.contains("CapEff:\t0000000000002021\n"), "{output:?}");
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn limits_of_a_process() {
    let Some(guest) = Guest::start("limits").await else { return };
    let root = guest.rootfs("root");
    let mut spec = guest.spec(
        &root,
        "grep -E 'open files|core file' /proc/self/limits | tr -s ' '; cat /proc/self/oom_score_adj",
    );
    spec["process"]["rlimits"] = json!([
        {"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}
    ]);
    let output = guest.run(&guest.id("a"), &spec).await;
    assert_eq!(
        output.stdout, "Max core file size 0 0 bytes \nMax open files 77 99 files \n0\n",
        "{output:?}"
    );
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn system_calls_are_filtered() {
    let Some(guest) = Guest::start("seccomp").await else { return };
    let root = guest.rootfs("root");
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
            {"names": ["sethostname"], "action": "SCMP_ACT_KILL_PROCESS"},
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO",
             "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]},
        ]
    });
    let script = "mkdir /x; hostname y; echo $?; kill -0 $$ && echo alive; kill -10 $$; grep Seccomp: /proc/self/status; id -u;
                  grep CapEff /proc/self/status";
    for no_new_privileges in [true, false] {
        let mut spec = guest.spec(&root, script);
        spec["linux"]["seccomp"] = profile.clone();
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let output = guest.run(&guest.id("a"), &spec).await;
        let expected = "159\nalive\nSeccomp:\t2\n1000\nCapEff:\t0000000000000000\n";
        assert_eq!(output.stdout, expected, "{output:?}");
        assert!(output.stderr.contains("No space left on device"), "{output:?}");
    }
    // An allow list as strict as possible: the agent needs nothing from it but the execution itself.
    let mut spec = guest.spec(&root, "");
    spec["process"]["args"] = json!(["true"]);
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_KILL_PROCESS",
        "syscalls": [{"names": ["execve", "exit_group", "brk", "arch_prctl", "set_tid_address", "set_robust_list", "rseq",
                                "uname", "prlimit64", "readlink", "readlinkat", "getrandom", "mprotect", "getuid", "setuid",
                                "getgid", "setgid", "prctl", "newfstatat", "fstat", "mmap"],
                      "action": "SCMP_ACT_ALLOW"}]
    });
    assert_eq!(guest.run(&guest.id("b"), &spec).await.status, 0);
    // A further process is filtered too.
    let mut spec = guest.spec(&root, "exec sleep 1000");
    spec["linux"]["seccomp"] = profile;
    let id = guest.id("c");
    guest.start_container(&id, &spec).await;
    let output = guest.exec(&id, "e", &exec_process("mkdir /x")).await;
    assert!(output.stderr.contains("No space left on device"), "{output:?}");
    guest.remove(&id).await;
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn the_default_profile_lets_ordinary_programs_work() {
    let Some(guest) = Guest::start("default").await else { return };
    let root = guest.rootfs("root");
    let script =
        "mkdir /d && touch /d/f && ls /d; seq 1 3 | wc -l; (exit 3) || echo child; sleep 0.01; hostname;
                  mount -t tmpfs x /tmp; umount /proc; hostname other; grep Seccomp: /proc/self/status";
    let mut spec = guest.spec(&root, script);
    // Privileges are not what holds it back.
    spec["linux"]["seccomp"] = serde_json::from_str(bulkhead_seccomp::workload_default()).unwrap();
    let all = json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_CHOWN"]);
    spec["process"]["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
    let output = guest.run(&guest.id("a"), &spec).await;
    assert_eq!(output.stdout, "f\n3\nchild\npod\nSeccomp:\t2\n", "{output:?}");
    assert_eq!(
        output.stderr.matches("ermission denied").count() + output.stderr.matches("not permitted").count(),
        3,
        "{output:?}"
    );
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn kernel_parameters_of_namespaces() {
    let Some(guest) = Guest::start("sysctl").await else { return };
    let root = guest.rootfs("root");
    let mut spec =
        guest.spec(&root, "cat /proc/sys/kernel/shmmni /proc/sys/net/ipv4/ip_unprivileged_port_start");
    spec["linux"]["sysctl"] = json!({"kernel.shmmni": "77", "net.ipv4.ip_unprivileged_port_start": "55"});
    assert_eq!(guest.run(&guest.id("a"), &spec).await.stdout, "77\n55\n");
    spec["linux"]["sysctl"] = json!({"net.no.such": "1"});
    let (_, message) = failure(guest.create(&guest.id("b"), &spec, &Stdio::default()).await);
    assert!(message.contains("net.no.such"), "{message}");
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn containers_share_the_namespaces_of_a_sandbox() {
    let Some(guest) = Guest::start("sandbox").await else { return };
    let (root, sandbox) = (guest.rootfs("root"), guest.id("sandbox"));
    let mut spec = guest.spec(&root, "exec sleep 1000");
    spec["hostname"] = json!("sandbox");
    let pid = guest.start_container(&sandbox, &spec).await;

    let mut spec = guest.spec(
        &root,
        "hostname; ps -o comm; for n in pid net ipc uts mnt; do readlink /proc/self/ns/$n; done",
    );
    spec["hostname"] = json!("");
    namespaces(&mut spec, |namespaces| {
        for (kind, name) in [("pid", "pid"), ("network", "net"), ("ipc", "ipc"), ("uts", "uts")] {
            let entry = namespaces.iter_mut().find(|entry| entry["type"] == kind).unwrap();
            entry["path"] = json!(format!("/proc/{pid}/ns/{name}"));
        }
    });
    let id = guest.id("app");
    let output = guest.run(&id, &spec).await;
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(lines[0], "sandbox", "{output:?}");
    assert!(lines.contains(&"sleep") && lines.contains(&"sh"), "{output:?}");
    let links = &lines[lines.len() - 5..];
    for (link, name) in links.iter().zip(["pid", "net", "ipc", "uts", "mnt"]) {
        let sandbox = fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
        assert_eq!(sandbox.to_str() == Some(link), name != "mnt", "{name}");
    }

    // In a shared process id namespace the end of the first process ends the container's others, and no more.
    let mut spec = spec.clone();
    spec["process"]["args"] = json!(["sh", "-c", "sleep 2000 & exit 3"]);
    guest.start_container(&id, &spec).await;
    assert_eq!(guest.wait(&id, "").await.exit_status, 3);
    guest.delete(&id, "").await.unwrap();
    let left = guest.exec(&sandbox, "ps", &exec_process("ps -o args")).await.stdout;
    assert!(!left.contains("2000") && left.contains("1000"), "{left}");
    guest.remove(&sandbox).await;

    // What is shared with the guest, because the specification does not name it.
    let mut spec = guest.spec(&root, "readlink /proc/self/ns/net; readlink /proc/self/ns/uts");
    spec["hostname"] = json!("");
    namespaces(&mut spec, |namespaces| {
        namespaces.retain(|entry| entry["type"] != "network" && entry["type"] != "uts")
    });
    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|mount| mount["type"] != "sysfs" && mount["type"] != "cgroup");
    let output = guest.run(&guest.id("shared"), &spec).await;
    let own =
        |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).unwrap().to_str().unwrap().to_owned();
    assert_eq!(output.stdout, format!("{}\n{}\n", own("net"), own("uts")), "{output:?}");
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_with_its_own_users() {
    let Some(guest) = Guest::start("userns").await else { return };
    let (root, id) = (guest.rootfs("root"), guest.id("a"));
    let own = |path: &std::path::Path| std::os::unix::fs::chown(path, Some(100_000), Some(200_000)).unwrap();
    for path in ["", "tmp", "dev", "etc", "home", "home/user", "root"] {
        own(&root.join(path));
    }
    // No one but root may walk to the sources: the agent opens them.
    let source = guest.directory.join("private/source");
    fs::create_dir_all(&source).unwrap();
    own(&source);
    fs::write(source.join("file"), "bound\n").unwrap();
    fs::set_permissions(source.parent().unwrap(), std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .unwrap();
    let script = "id -u; cat /proc/self/uid_map | tr -s ' '; touch /tmp/f; stat -c %u /tmp/f; cat /data/file; echo x > /dev/null;
                  head -c 1 /dev/zero | wc -c; mount -t tmpfs x /tmp && echo mounted; touch /home/user/done; exec sleep 1000";
    let mut spec = guest.spec(&root, script);
    namespaces(&mut spec, |namespaces| namespaces.push(json!({"type": "user"})));
    let map = |host: u32| json!([{"containerID": 0, "hostID": host, "size": 65536}]);
    spec["linux"]["uidMappings"] = map(100_000);
    spec["linux"]["gidMappings"] = map(200_000);
    spec["process"]["user"] = json!({"uid": 0, "gid": 0});
    let all = json!(["CAP_SYS_ADMIN", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_SETUID", "CAP_SETGID"]);
    spec["process"]["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
    add_mount(
        &mut spec,
        json!({"destination": "/data", "type": "bind", "source": source, "options": ["bind"]}),
    );
    let mut streams = guest.streams();
    let pid = guest.create(&id, &spec, &streams.request).await.unwrap();
    guest.start_process(&id, "").await.unwrap();
    while !root.join("home/user/done").exists() {
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    // From outside its root is an ordinary user.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("Uid:\t100000\t100000\t100000\t100000"), "{status}");
    assert!(status.contains("Gid:\t200000"), "{status}");
    let output = guest.exec(&id, "e", &exec_process("id -u; readlink /proc/self/ns/user")).await;
    let users = fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    assert_eq!(output.stdout, format!("0\n{}\n", users.display()), "{output:?}");

    // Another container of the pod may join its users.
    let mut second = guest.spec(&root, "id -u; cat /proc/self/uid_map | tr -s ' '");
    namespaces(&mut second, |namespaces| {
        namespaces.push(json!({"type": "user", "path": format!("/proc/{pid}/ns/user")}))
    });
    second["process"]["user"] = json!({"uid": 0, "gid": 0});
    let output = guest.run(&guest.id("b"), &second).await;
    assert_eq!(output.stdout, "0\n 0 100000 65536\n", "{output:?}");

    guest.signal(&id, "", libc::SIGKILL, true).await.unwrap();
    let status = guest.wait(&id, "").await.exit_status;
    let output = streams.finish(status).await;
    assert_eq!(output.stdout, "0\n 0 100000 65536\n0\nbound\n1\nmounted\n", "{output:?}");
    guest.delete(&id, "").await.unwrap();
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_time_namespace_has_its_own_clocks() {
    let Some(guest) = Guest::start("time").await else { return };
    let root = guest.rootfs("root");
    let mut spec = guest.spec(&root, "cat /proc/uptime");
    namespaces(&mut spec, |namespaces| namespaces.push(json!({"type": "time"})));
    spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000, "nanosecs": 0}});
    let output = guest.run(&guest.id("a"), &spec).await;
    let uptime: f64 = output.stdout.split(' ').next().unwrap().parse().unwrap();
    assert!(uptime > 1_000_000.0, "{output:?}");
    guest.finish().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_privileged_container() {
    let Some(guest) = Guest::start("privileged").await else { return };
    let root = guest.rootfs("root");
    let mut spec = guest.spec(
        &root,
        "mount -t tmpfs x /tmp && echo mounted; mknod /tmp/fuse c 10 229 && true < /tmp/fuse && echo opened;
         echo 5 > /proc/sys/net/ipv4/ip_default_ttl && echo written",
    );
    let all: Vec<String> =
        ["SYS_ADMIN", "MKNOD", "SYSLOG", "NET_ADMIN", "DAC_OVERRIDE", "SYS_MODULE", "SYS_RAWIO"]
            .iter()
            .map(|name| format!("CAP_{name}"))
            .collect();
    spec["process"]["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
    spec["process"]["noNewPrivileges"] = json!(false);
    spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    spec["linux"]["maskedPaths"] = json!(null);
    spec["linux"]["readonlyPaths"] = json!(null);
    let output = guest.run(&guest.id("a"), &spec).await;
    assert_eq!(output.stdout, "mounted\nopened\nwritten\n", "{output:?}");
    guest.finish().await;
}
