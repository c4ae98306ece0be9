//! What workloads ask of the guest's kernel, with the tools that they ask with; much of it Bulkhead's own kernel has and the ready-made
//! one has not.

use std::time::Duration;

use bulkhead_base::capabilities::NAMES;
use serde_json::{Value, json};

use super::{Case, Ended, Environment};
use crate::bundle::{self, Bundle};
use crate::failure::{Explain, Outcome};
use crate::{ensure, ensure_eq, fail};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("kernel-user-namespaces", user_namespaces).with_image("tools"),
    Case::new("kernel-message-queues", message_queues).with_image("tools"),
    Case::new("kernel-real-time", real_time).with_image("tools").own_kernel(),
    Case::new("kernel-interfaces", interfaces).with_image("tools").own_kernel(),
    Case::new("kernel-mesh-iptables-legacy", |environment| mesh(environment, "legacy"))
        .with_image("tools")
        .own_kernel(),
    Case::new("kernel-mesh-iptables-nft", |environment| mesh(environment, "nft"))
        .with_image("tools")
        .own_kernel(),
    Case::new("kernel-services-nft", services).with_image("tools").own_kernel(),
    Case::new("kernel-wireguard", wireguard).with_image("tools").own_kernel(),
    Case::new("kernel-sets", sets).with_image("tools").own_kernel(),
    Case::new("kernel-facilities", facilities).with_image("tools").own_kernel(),
    Case::new("kernel-options", options).with_image("tools").own_kernel().bulkhead_only(),
    Case::new("kernel-buildah", buildah).with_image("tools"),
    Case::new("kernel-docker", docker).with_image("tools").own_kernel().cold().within(90),
];

/// How long one container may take: a daemon has to start in the largest.
const LIMIT: Duration = Duration::from_secs(60);

/// Capabilities that the cases need beyond a container's own.
const CAPABILITIES: [&str; 5] =
    ["CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_PTRACE"];

/// The specification of a container that may change its network, its mounts and its priorities.
fn able(id: &str, script: &str) -> Value {
    let mut process = bundle::shell(script);
    for set in ["bounding", "effective", "permitted"] {
        if let Some(list) = process["capabilities"][set].as_array_mut() {
            list.extend(CAPABILITIES.map(Value::from));
        }
    }
    let mut spec = bundle::spec(id, process);
    spec["linux"]["readonlyPaths"] = json!([]);
    spec
}

/// Runs a container with the tools to its end.
fn run(environment: &Environment, id: &str, spec: &Value) -> Outcome<Ended> {
    let bundle = Bundle::new(environment.host()?.path(), id, &environment.layout.rootfs("tools"), spec)?;
    environment.run_bundle(bundle, LIMIT)
}

/// Runs a script in a container of its own that may change its network, and expects its success.
fn run_script(environment: &Environment, name: &str, script: &str) -> Outcome<String> {
    let id = environment.id(name);
    run(environment, &id, &able(&id, script))?.success()
}

/// Begins a script with a neighbour: a network namespace of its own at 10.9.0.2, reached by `near` and entered by `$there`.
const NEIGHBOUR: &str = "set -e
    /bin/ip link set lo up
    unshare -n sleep 1000 & neighbour=$!
    until [ \"$(readlink /proc/$neighbour/ns/net)\" != \"$(readlink /proc/self/ns/net)\" ]; do sleep 0.05; done
    there=\"nsenter -t $neighbour -n\"
    /bin/ip link add name near type veth peer name far netns $neighbour
    /bin/ip addr add 10.9.0.1/24 dev near
    /bin/ip link set near up
    $there /bin/ip addr add 10.9.0.2/24 dev far
    $there /bin/ip link set far up
    $there /bin/ip link set lo up
    ";

fn user_namespaces(environment: &mut Environment) -> Outcome<String> {
    // As rootless builders do it: root in a user namespace, mounts of its own, a root file system put together by overlay.
    let script = "exec 2>&1; cd /tmp; su user -c 'unshare -U -r -m -p -f --propagation slave sh -ec \"
        mkdir /tmp/b; mount -t tmpfs none /tmp/b; cd /tmp/b; mkdir -p l/bin u w m
        cp /bin/busybox l/bin/; ln -s busybox l/bin/sh
        mount -t overlay -o lowerdir=l,upperdir=u,workdir=w,userxattr none m
        chroot m /bin/busybox sh -c \\\"echo built >/made; echo \\\\\\$\\\\\\$\\\"
        cat u/made; id -u\"'";
    let id = environment.id("users");
    let mut spec = able(&id, script);
    spec["process"]["noNewPrivileges"] = json!(false);
    let said = run(environment, &id, &spec)?.success()?;
    ensure_eq!(said.lines().skip(1).collect::<Vec<_>>(), ["built", "0"], "what the build said ({said:?})");
    Ok("a user builds in namespaces of its own: mounts, overlay, chroot, root's id".into())
}

fn message_queues(environment: &mut Environment) -> Outcome<String> {
    let script = "set -e
        touch /dev/mqueue/q && cut -d ' ' -f 1 /dev/mqueue/q; cat /proc/sys/fs/mqueue/queues_max
        ipcmk -Q | grep -o id:; ipcmk -M 4096 | grep -o id:; ipcmk -S 2 | grep -o id:";
    let said = run_script(environment, "queues", script)?;
    ensure_eq!(said, "QSIZE:0\n256\nid:\nid:\nid:\n", "message queues of POSIX and System V");
    Ok("queues of POSIX; queues, memory and semaphores of System V".into())
}

fn real_time(environment: &mut Environment) -> Outcome<String> {
    let script = "chrt -f 10 chrt -p 0 | cut -d: -f 2; chrt -r 5 chrt -p 0 | cut -d: -f 2; chrt -i 0 true && echo idle";
    let said = run_script(environment, "real-time", script)?;
    ensure_eq!(said, " SCHED_FIFO\n 10\n SCHED_RR\n 5\nidle\n", "policies and priorities");
    Ok("chrt -f, -r and -i".into())
}

fn interfaces(environment: &mut Environment) -> Outcome<String> {
    let script = "set -e
        /bin/ip link add name v1 type veth peer name v2; /bin/ip link set v1 up; /bin/ip link set v2 up
        /bin/ip link add name br1 type bridge vlan_filtering 1; /bin/ip link set v2 master br1
        /bin/ip link add link v1 name vl1 type vlan id 7
        /bin/ip link add name vx1 type vxlan id 9 dstport 4789 dev v1
        /bin/ip link add link v1 name mv1 type macvlan mode bridge
        /bin/ip link add name du1 type dummy
        /bin/ip link add link du1 name iv1 type ipvlan mode l2
        /bin/ip link add name wg1 type wireguard
        mknod /run/tun c 10 200; : <>/run/tun; /bin/ip -o link | wc -l";
    let id = environment.id("interfaces");
    let mut spec = able(&id, script);
    spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
    let said = run(environment, &id, &spec)?.success()?;
    ensure_eq!(said, "10\n", "the number of interfaces with lo");
    Ok("veth, bridge, vlan, vxlan, macvlan, dummy, ipvlan, wireguard, tun".into())
}

/// What Istio's init container loads, with the proxy's user called 1000: everything goes to the proxy but what the proxy sends; names
/// are captured by zones of connection tracking.
const MESH: &str = "*nat
:ISTIO_INBOUND - [0:0]
:ISTIO_REDIRECT - [0:0]
:ISTIO_IN_REDIRECT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A ISTIO_INBOUND -p tcp --dport 15008 -j RETURN
-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
-A OUTPUT -p tcp -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -s 127.0.0.6/32 -o lo -j RETURN
-A ISTIO_OUTPUT -o lo ! -d 127.0.0.1/32 -m owner --uid-owner 1000 -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --uid-owner 1000 -j RETURN
-A ISTIO_OUTPUT -m owner --uid-owner 1000 -j RETURN
-A ISTIO_OUTPUT -m owner --gid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN
-A ISTIO_OUTPUT -j ISTIO_REDIRECT
COMMIT
*mangle
:ISTIO_DIVERT - [0:0]
:ISTIO_TPROXY - [0:0]
-A ISTIO_DIVERT -j MARK --set-mark 1337
-A ISTIO_DIVERT -j ACCEPT
-A ISTIO_TPROXY ! -d 127.0.0.1/32 -p tcp -j TPROXY --on-port 15006 --tproxy-mark 1337
-A PREROUTING -p tcp --dport 15020 -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT
-A PREROUTING -p tcp --dport 15021 -m socket --transparent -j ISTIO_DIVERT
-A OUTPUT -m connmark --mark 1337 -j CONNMARK --restore-mark
COMMIT
*raw
-A OUTPUT -p udp --dport 53 -m owner --uid-owner 1000 -j CT --zone 1
-A PREROUTING -p udp --sport 53 -j CT --zone 1
COMMIT
*filter
-A INPUT -m state --state INVALID -j DROP
-A FORWARD -m comment --comment \"odd services\" -m statistic --mode nth --every 2 --packet 0 -j ACCEPT
-A INPUT -m addrtype --dst-type BROADCAST -m limit --limit 5/min -j REJECT
COMMIT
";

fn mesh(environment: &mut Environment, kind: &str) -> Outcome<String> {
    let script = format!(
        "{NEIGHBOUR}
        for who in proxy inbound; do mkdir /run/$who; echo $who >/run/$who/index.html; done
        mkdir /run/direct; echo direct >/run/direct/index.html
        httpd -p 15001 -h /run/proxy; httpd -p 15006 -h /run/inbound; $there httpd -p 80 -h /run/direct
        wget -T 5 -qO- http://10.9.0.2/
        iptables-{kind}-restore <<EOF\n{MESH}EOF
        wget -T 5 -qO- http://10.9.0.2/
        su user -c 'wget -T 5 -qO- http://10.9.0.2/'
        $there wget -T 5 -qO- http://10.9.0.1/
        iptables-{kind}-save -t nat | grep -c ISTIO
        ip6tables-{kind} -t nat -A OUTPUT -p tcp -j REDIRECT --to-ports 15001
        ip6tables-{kind}-save | grep -c REDIRECT"
    );
    let id = environment.id("mesh");
    let mut spec = able(&id, &script);
    spec["process"]["noNewPrivileges"] = json!(false);
    let said = run(environment, &id, &spec)?.success()?;
    ensure_eq!(
        said,
        "direct\nproxy\ndirect\ninbound\n17\n1\n",
        "without rules, with rules, as the proxy's user, from outside; numbers of rules"
    );
    Ok(format!("iptables-{kind}: REDIRECT by owner, TPROXY, zones, marks, statistic, reject; IPv6"))
}

/// What kube-proxy does for a service, in nftables.
const SERVICES: &str = "table ip services {
    set endpoints { type ipv4_addr . inet_service; elements = { 10.9.0.2 . 80, 10.9.0.3 . 80 }; }
    map verdicts { type ipv4_addr . inet_proto . inet_service : verdict; elements = { 10.96.0.1 . tcp . 80 : goto service }; }
    chain service { numgen random mod 2 vmap { 0 : goto first, 1 : goto other }; }
    chain first { ip saddr 10.9.0.2 jump marked; meta l4proto tcp dnat to 10.9.0.2:80; }
    chain other { meta l4proto tcp dnat to 10.9.0.3:80; }
    chain marked { meta mark set mark or 0x4000; }
    chain output { type nat hook output priority -100; ip daddr . meta l4proto . th dport vmap @verdicts; }
    chain postrouting { type nat hook postrouting priority srcnat; ct state new counter masquerade; }
}
table inet guard {
    chain input { type filter hook input priority filter; ct state established,related accept; tcp dport 81 reject with tcp reset
        fib daddr type broadcast drop; limit rate 5/second accept; log prefix \"guard \" level debug; }
    chain redirected { type nat hook prerouting priority dstnat; tcp dport 82 redirect to :80; }
}
";

fn services(environment: &mut Environment) -> Outcome<String> {
    let script = format!(
        "{NEIGHBOUR}
        $there /bin/ip addr add 10.9.0.3/24 dev far
        /bin/ip route add 10.96.0.0/16 via 10.9.0.2
        mkdir /run/w; echo endpoint >/run/w/index.html; $there httpd -p 80 -h /run/w; httpd -p 80 -h /run/w
        nft -f - <<EOF\n{SERVICES}EOF
        for i in 1 2 3 4 5 6 7 8; do wget -T 5 -qO- http://10.96.0.1/; done | sort | uniq -c | tr -s ' '
        $there wget -T 5 -qO- http://10.9.0.1:82/
        $there wget -T 5 -qO- http://10.9.0.1:81/ 2>&1 | grep -o refused
        conntrack -L -d 10.96.0.1 2>/dev/null | grep -c ASSURED
        nft list ruleset | grep -c chain"
    );
    let said = run_script(environment, "services", &script)?;
    let lines: Vec<&str> = said.lines().map(str::trim).collect();
    ensure!(
        lines.first() == Some(&"8 endpoint")
            && lines.get(1..) == Some(&["endpoint", "refused", "8", "8"][..]),
        "eight requests to a service, a redirect, a reject, tracked connections, chains: {said:?}"
    );
    Ok("nft: a service's endpoints by numgen and dnat, masquerade, redirect, reject, fib, limit; conntrack"
        .into())
}

fn wireguard(environment: &mut Environment) -> Outcome<String> {
    let script = format!(
        "{NEIGHBOUR}
        umask 77; wg genkey >/run/a; wg genkey >/run/b
        /bin/ip link add name wg0 type wireguard; $there /bin/ip link add name wg0 type wireguard
        wg set wg0 private-key /run/a listen-port 5000 peer $(wg pubkey </run/b) endpoint 10.9.0.2:5001 allowed-ips 10.8.0.2/32
        $there wg set wg0 private-key /run/b listen-port 5001 peer $(wg pubkey </run/a) allowed-ips 10.8.0.1/32
        /bin/ip addr add 10.8.0.1/24 dev wg0; $there /bin/ip addr add 10.8.0.2/24 dev wg0
        /bin/ip link set wg0 up; $there /bin/ip link set wg0 up
        ping -c 2 -i 0.2 -W 5 10.8.0.2 | grep received; wg show wg0 latest-handshakes | awk '$2 > 0' | wc -l"
    );
    let said = run_script(environment, "wireguard", &script)?;
    ensure!(
        said.starts_with("2 packets transmitted, 2 packets received") && said.ends_with("\n1\n"),
        "through the tunnel: {said:?}"
    );
    Ok("a tunnel between two namespaces".into())
}

fn sets(environment: &mut Environment) -> Outcome<String> {
    let script = format!(
        "{NEIGHBOUR}
        mkdir /run/w; echo there >/run/w/index.html; $there httpd -p 80 -h /run/w
        ipset create refused hash:ip; ipset create ports hash:ip,port; ipset create nets hash:net
        wget -T 5 -qO- http://10.9.0.2/
        for kind in legacy nft; do
            ipset add refused 10.9.0.2
            iptables-$kind -A OUTPUT -m set --match-set refused dst -p tcp -j REJECT --reject-with tcp-reset
            wget -T 5 -qO- http://10.9.0.2/ 2>&1 | grep -o refused
            ipset del refused 10.9.0.2
            wget -T 5 -qO- http://10.9.0.2/
        done
        ipset list -n | wc -l"
    );
    let said = run_script(environment, "sets", &script)?;
    ensure_eq!(said, "there\nrefused\nthere\nrefused\nthere\n3\n", "an address in the set and out of it");
    Ok("ipset: addresses, with ports, networks; a match on one with iptables of both kinds".into())
}

fn facilities(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("facilities");
    let mut spec = able(&id, "/facilities --facilities");
    let program = std::env::current_exe().explain(|| "the program that this is".into())?;
    bundle::add(&mut spec["mounts"], bundle::bind(&program, "/facilities", &["rbind", "ro"]));
    let said = run(environment, &id, &spec)?.success()?;
    let names = crate::facilities::names();
    let expected: String = names.iter().map(|name| format!("{name} yes\n")).collect();
    ensure_eq!(said, expected, "what the kernel was asked for");
    Ok(names.join(", "))
}

/// A build without root, by buildah as a user calls it: with a range of ids of the user's, and a root file system of its own.
const BUILD: &str = "exec 2>&1; set -e
    echo user:100000:65536 | tee /etc/subuid >/etc/subgid
    mkdir -p /usr/libexec/podman; ln -sf /bin/true /usr/libexec/podman/netavark # looked for, and of no use without networks
    mkdir -p /etc/containers /home/.config /tmp/run; chown -R user /home /tmp/run; chmod 700 /tmp/run
    echo '{\"default\":[{\"type\":\"insecureAcceptAnything\"}]}' >/etc/containers/policy.json
    cd /home; cp /bin/busybox .
    printf 'FROM scratch\\nCOPY busybox /bin/busybox\\nRUN [\"/bin/busybox\", \"sh\", \"-c\", \"echo ran as $(busybox id -u) >/made; busybox chown 5:6 /made\"]\\n' >Dockerfile
    su user -c 'set -e; export HOME=/home XDG_RUNTIME_DIR=/tmp/run TMPDIR=/tmp
        buildah --storage-driver vfs build --isolation chroot --quiet -t built . >/tmp/id
        buildah --storage-driver vfs from --name there built
        buildah --storage-driver vfs unshare sh -c \"cat \\$(buildah --storage-driver vfs mount there)/made; stat -c %u:%g \\$(buildah --storage-driver vfs mount there)/made\"'";

fn buildah(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("buildah");
    let mut spec = able(&id, BUILD);
    spec["process"]["noNewPrivileges"] = json!(false);
    let said = run(environment, &id, &spec)?.success()?;
    ensure_eq!(said, "there\nran as 0\n5:6\n", "what buildah built");
    Ok("Debian's buildah builds from a Dockerfile as a user, with owners of its own".into())
}

/// Options that no other case shows, by their use or their absence.
const ON: &str = "EROFS_FS_ZIP EROFS_FS_ZIP_ZSTD SQUASHFS SQUASHFS_ZSTD EXT4_FS FUSE_FS PTP_1588_CLOCK_KVM PAGE_REPORTING BINFMT_MISC PSI \
    MEMCG BLK_CGROUP CPUSETS CGROUP_PIDS CGROUP_HUGETLB CGROUP_MISC CFS_BANDWIDTH TIME_NS HUGETLBFS BPF_JIT_ALWAYS_ON SYSVIPC";
const OFF: &str = "MODULES PCI ACPI USB_SUPPORT DRM SOUND KEXEC HIBERNATION DEBUG_FS DEVMEM KPROBES FTRACE MAGIC_SYSRQ NFS_FS CIFS XFS_FS \
    BTRFS_FS N_GSM SCTP RDS TIPC CRYPTO_USER_API NET_KEY NET_CLS";

fn options(environment: &mut Environment) -> Outcome<String> {
    // binfmt_misc of a user namespace: a format that a user registers for itself.
    let script = "exec 2>&1; zcat /proc/config.gz | grep '=y' | cut -d= -f1 | sed s/CONFIG_// >/tmp/on
        for name in $ON; do grep -qx $name /tmp/on || echo lacks $name; done
        for name in $OFF; do ! grep -qx $name /tmp/on || echo has $name; done
        grep -c . /tmp/on
        su user -c 'unshare -U -r -m sh -ec \"
            mount -t binfmt_misc none /proc/sys/fs/binfmt_misc; cd /tmp
            echo :own:M::OWN::/bin/cat: >/proc/sys/fs/binfmt_misc/register
            printf \\\"OWN format\\n\\\" >own; chmod 755 own; ./own\"'";
    let id = environment.id("options");
    let mut spec = able(&id, &format!("ON='{ON}' OFF='{OFF}'\n{script}"));
    spec["process"]["noNewPrivileges"] = json!(false);
    spec["linux"]["maskedPaths"] = json!([]);
    let said = run(environment, &id, &spec)?.success()?;
    let Some((count, "OWN format")) = said.trim_end().split_once('\n') else {
        fail!("options, and a format of a user's: {said:?}")
    };
    Ok(format!("{count} options on; a user's own binary format"))
}

/// A daemon of Docker in the container, prepared like Docker's own image of it, and a container in its container.
const DAEMON: &str = "set -e
    mkdir -p /sys/fs/cgroup/init; cat /sys/fs/cgroup/cgroup.procs | while read p; do echo $p >/sys/fs/cgroup/init/cgroup.procs || true; done
    sed -e 's/ / +/g' -e 's/^/+/' /sys/fs/cgroup/cgroup.controllers >/sys/fs/cgroup/cgroup.subtree_control
    ln -s iptables-nft /bin/iptables; ln -s ip6tables-nft /bin/ip6tables
    export PATH=/bin:/host/bin:/node/bin:/node/sbin
    cp /node/lib/x86_64-linux-gnu/lib*.so.* /lib/x86_64-linux-gnu/ # runc's own child has no search path
    dockerd -l warn --exec-root /run/docker --init-path /host/bin/docker-init --userland-proxy-path /host/bin/docker-proxy >/run/log 2>&1 &
    i=0; until docker version >/dev/null 2>&1; do i=$((i + 1)); [ $i -lt 100 ] || { tail -n 20 /run/log; exit 1; }; sleep 0.2; done
    tar -c -C / bin/busybox bin/sh bin/ip bin/ping | docker import - image >/dev/null
    docker info -f '{{.Driver}} {{.CgroupVersion}}'
    docker run -d --name server --memory 32m image busybox httpd -f -p 80 >/dev/null
    docker run --rm -p 8080:80 image busybox sh -c 'echo inner; busybox ping -c 1 -W 5 172.17.0.2 | busybox grep -o \"1 packets received\"' || { tail -n 20 /run/log; exit 1; }
    cat /sys/fs/cgroup/docker/*/memory.max
    iptables-nft-save -t nat | grep -c MASQUERADE";

fn docker(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("docker");
    let mut spec = able(&id, DAEMON);
    let mut all = bundle::capabilities(&NAMES);
    all["inheritable"] = all["permitted"].clone();
    spec["process"]["capabilities"] = all;
    spec["process"]["noNewPrivileges"] = json!(false);
    spec["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "hard": 65536, "soft": 65536 }]);
    spec["linux"]["maskedPaths"] = json!([]);
    spec["linux"]["resources"] =
        json!({ "devices": [{ "allow": true, "access": "rwm" }], "memory": { "limit": 1 << 30 } });
    bundle::add(&mut spec["linux"]["namespaces"], json!({ "type": "cgroup" }));
    let programs = environment.layout.bin("");
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        for mount in mounts.iter_mut().filter(|mount| mount["type"] == "sysfs") {
            mount["options"] = json!(["nosuid", "noexec", "nodev"]);
        }
        let on = |kind: &str, to: &str| json!({ "destination": to, "type": kind, "source": kind, "options": ["rw"] });
        mounts.push(on("cgroup", "/sys/fs/cgroup"));
        mounts.push(on("tmpfs", "/var/lib/docker"));
        mounts.push(bundle::bind(&programs, "/host/bin", &["rbind", "ro"]));
        mounts.push(bundle::bind("/usr".as_ref(), "/node", &["rbind", "ro"]));
    }
    let said = run(environment, &id, &spec)?;
    let said = said.success().explain(|| "Docker in a pod".into())?;
    ensure_eq!(said, "overlay2 2\ninner\n1 packets received\n33554432\n1\n", "Docker in a pod");
    Ok("Debian's dockerd: overlay2, a network with iptables-nft, limits, one container that pings another"
        .into())
}
