#!/usr/bin/env bash
# run.sh demo | e2e | attack | chaos | bench [ARG...]: run the demo, the end-to-end suite, the attack suite, the fault campaign or the
# benchmark where there is a KVM for it.
#
# On hardware KVM they run on this machine, as root; else, or when NESTED_CPU says whose virtualisation extensions it is to have
# (amd, intel), in the nested KVM host (tests/nested), the suites in two of them side by side. Both get the same payload: our release binaries, guest kernel and image, and the test images, as hard links in a
# directory of their own. ARGs go to the suite: `run.sh e2e exec stdin` runs the cases whose names contain one of these; the
# same for `attack`; or to the benchmark: `run.sh bench --rounds 3 start memory` measures these groups of rows.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
release=$root/target/x86_64-unknown-linux-gnu/release
guest=$root/target/guest

fail() {
    echo "run: $*" >&2
    exit 1
}
what=${1:-}
case $what in
demo | e2e | attack | chaos | bench) shift ;;
*) fail "say what to run: demo, e2e, attack, chaos or bench" ;;
esac
program=bulkhead-$what
for file in "$release"/{containerd-shim-bulkhead-v1,bulkhead,bulkhead-vmm,bulkhead-fs,"$program"} "$guest"/{vmlinux,guest.erofs}; do
    [[ -f $file ]] || fail "$file is missing; run make build guest"
done

if [[ -n ${NESTED_CPU:-} ]]; then kind=software; else kind=$("$release/bulkhead" check --kvm-kind) || true; fi
case $kind in
hardware | nested)
    echo "$what: $kind KVM here, so it runs directly on this machine"
    kind=hardware
    ;;
software | none)
    [[ ${NESTED_CPU:-amd} != amd ]] || command -v qemu-system-x86_64 >/dev/null ||
        fail "there is no hardware KVM (kind: $kind) and no QEMU: enable virtualisation, or install qemu-system-x86"
    case ${NESTED_CPU:-}$kind in
    none) why="there is no usable /dev/kvm" ;;
    software) why="this machine's /dev/kvm only emulates" ;;
    *) why="NESTED_CPU is $NESTED_CPU" ;;
    esac
    if [[ ${NESTED_CPU:-} == intel ]]; then emulator=Bochs; else emulator=QEMU; fi
    echo "$what: $why, so it runs in the nested KVM host ($emulator); times are virtual: instructions"
    ;;
*) fail "bulkhead check --kvm-kind says '$kind'" ;;
esac

"$root/tests/images/build.sh"
"$root/tests/attack/build.sh"
mkdir -p "$root/target/payload"
payload=$(mktemp -d "$root/target/payload/$what.XXXXXX")
logs= # of the suite's two halves
pids=()
# shellcheck disable=SC2317 # called by the trap
cleanup() {
    for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    wait
    rm -rf "$payload" ${logs:+"$logs"}
}
trap cleanup EXIT
trap 'exit 130' INT TERM

mkdir -p "$payload"/{bin,libexec/bulkhead,share/bulkhead,images}
ln "$release"/{containerd-shim-bulkhead-v1,bulkhead,"$program"} "$payload/bin/"
ln "$release"/{bulkhead-vmm,bulkhead-fs} "$payload/libexec/bulkhead/"
ln "$guest"/{vmlinux,guest.erofs} "$payload/share/bulkhead/"
ln "$root"/target/images/{busybox,custom,pause}.tar "$payload/images/"
cp -al "$root"/target/images/{attack,busybox} "$payload/images/"
printf '#!/bin/sh\nexec "$(dirname "$0")/bin/%s" "$@"\n' "$program" >"$payload/run"
chmod 755 "$payload" "$payload/run"
# Docker's programs, for the cases that ask for them.
if [[ $what == e2e && ($# -eq 0 || " $*" == *docker* || "$*" == *kernel*) ]]; then
    "$root/tests/docker.sh" "$root/target/docker"
    ln "$root"/target/docker/* "$payload/bin/"
fi
# And mkfs.erofs, for containerd's erofs snapshotter and the cases about layers.
[[ $what != e2e ]] || "$root/tests/images/erofs.sh" "$payload" "$kind"
# And the tools for the cases about the guest's kernel, and a Debian for those with programs as people run them.
for image in tools:kernel software:software; do
    if [[ $what == e2e && ($# -eq 0 || " $*" == *" ${image#*:}"*) ]]; then
        "$root/tests/images/${image%:*}.sh"
        cp -al "$root/target/images/${image%:*}" "$payload/images/"
    fi
done
results=$root/target/$what
[[ $what != bench ]] || "$root/bench/payload.sh" "$payload" "$kind"

if [[ $kind == hardware ]]; then
    sudo=()
    if ((EUID != 0)); then
        command -v sudo >/dev/null || fail "root is needed: mounts, control groups and a containerd of our own"
        sudo=(sudo)
    fi
    "$root/guest-image/fetch-debs.sh" sid "$root/target/debs/sid" containerd
    dpkg-deb -x "$(compgen -G "$root/target/debs/sid/containerd_*.deb" | sort -V | tail -n1)" "$payload/containerd"
    ln "$payload"/containerd/usr/bin/{containerd,ctr} "$payload/bin/"
    # The CNI plugins as in the nested host, where they are part of its root disk.
    "$root/guest-image/fetch-debs.sh" sid "$root/target/debs/sid" containernetworking-plugins
    dpkg-deb -x "$(compgen -G "$root/target/debs/sid/containernetworking-plugins_*.deb" | sort -V | tail -n1)" "$payload/containerd"
    ln -s containerd/usr/lib/cni "$payload/cni"
    [[ $what != attack ]] || set -- --results "$results" "$@"
    "${sudo[@]}" "$payload/run" "$@"
    exit
fi

nested=$root/tests/nested/run.sh
"$root/tests/nested/build.sh"
if [[ $what == demo || $what == chaos || ($what != bench && $# -gt 0) ]]; then
    mkdir -p "$results"
    "$nested" --timeout 3000 --results "$results" "$payload" "$@"
    exit
fi
if [[ $what == bench ]]; then
    "$nested" --timeout 7200 --results "$results" "$payload" "$@"
    echo "bench: report in ${results#"$root/"}/report.html"
    exit
fi

# One nested host per core; a shard's lines come as they are, its own summary is replaced by that of both.
logs=$(mktemp -d "$root/target/payload/logs.XXXXXX")
for shard in 1 2; do
    : >"$logs/$shard.log" # there before its reader looks for it
    "$nested" --timeout 3000 --results "$logs/$shard" "$payload" --shard "$shard/2" >>"$logs/$shard.log" 2>&1 &
    pids+=($!)
    tail -q -n +1 -f --pid=$! "$logs/$shard.log" | grep -a --line-buffered -E '^(prep|ok|FAIL|skip|     \|) ' &
done
codes=()
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    codes+=("$code")
done
wait
pids=()
grep -ah '^nested: .*virtual' "$logs"/*.log || true
mkdir -p "$results" && cp -r "$logs/." "$results" # for a closer look
if [[ $what == attack ]]; then
    "$release/bulkhead-attack" --results "$results" --merge "$logs/1" "$logs/2"
    sed -n '/contained$/p' "$results/attack.md"
    echo "attack: the table is in ${results#"$root/"}/attack.md"
    [[ ${codes[*]} == "0 0" ]]
    exit
fi
for shard in 1 2; do
    # A shard that did not come to its summary has said why.
    grep -q '^[0-9]* passed' "$logs/$shard.log" || { tail -n 30 "$logs/$shard.log" >&2 && fail "shard $shard ended early with exit code ${codes[shard - 1]}"; }
done
awk '/^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$/ { passed += $1; failed += $3; skipped += $5 }
     END { printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped; exit failed > 0 }' "$logs"/*.log
[[ ${codes[*]} == "0 0" ]]
