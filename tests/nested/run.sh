#!/usr/bin/env bash
# run.sh [--timeout SECS] [--virtual-timeout SECS] [--results DIR] [--] PAYLOAD_DIR [ARG...]
#
# Runs PAYLOAD_DIR/run with ARGs as root in the nested KVM host (built first if need be), where the directory is mounted
# read-only at /payload and is the working directory. Its output goes to our stdout as it comes, its exit code is ours, and
# what it leaves in /results, with the node's kernel log as nested-dmesg.txt, is put into DIR.
# --timeout is wall time (default 1800); --virtual-timeout is the node's own time (default 600) and ends a hung payload
# early, as idle virtual time costs next to nothing.
# NESTED_KVM has parameters for the module kvm_amd or kvm_intel, such as npt=0.
# Own exit codes: 124 wall time over, 125 the nested host itself failed, 143 virtual time over. Several may run at once.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
. "$here/machine.sh"
cache=$(cd "$here/../.." && pwd)/target/$nested_directory
wall_limit=1800 virtual_limit=600 results=

fail() {
    echo "nested: $*" >&2
    exit 125
}
while (($#)); do
    case $1 in
    --timeout) wall_limit=${2:?--timeout needs seconds} && shift 2 ;;
    --virtual-timeout) virtual_limit=${2:?--virtual-timeout needs seconds} && shift 2 ;;
    --results) results=${2:?--results needs a directory} && shift 2 ;;
    --) shift && break ;;
    -*) fail "unknown option $1; the head of $0 says how to use it" ;;
    *) break ;;
    esac
done
(($#)) || fail "no payload directory given; the head of $0 says how to use it"
payload=$1
shift
[[ -x $payload/run ]] || fail "$payload/run is not there or not executable"
"$here/build.sh" || exit 125
PATH=$PATH:/usr/sbin:/sbin

begun=$EPOCHREALTIME
work=$(mktemp -d "$cache/run.XXXXXX")
cleanup() {
    host_stop
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

mke2fs -q -t ext4 -b 4096 -O ^has_journal,^resize_inode -m 0 -E root_owner=0:0,nodiscard,assume_storage_prezeroed=1 \
    -d "$payload" "$work/payload.img" "$((nested_payload_bytes / 4096))" >"$work/mke2fs.log" 2>&1 ||
    fail "$payload does not fit the payload disk of $nested_payload_bytes bytes: $(tail -n1 "$work/mke2fs.log")"
nested_arguments=
(($# == 0)) || printf -v nested_arguments '%q ' "$@"
printf -v nested_arguments 'virtual_limit=%q; kvm_parameters=%q; set -- %s' "$virtual_limit" "${NESTED_KVM:-}" "$nested_arguments"
host_run "$work"

read -r word code started ended < <(cat "$work/status" 2>/dev/null) || true
if [[ $word != exit ]]; then
    cat "$work/emulator.log" >&2 2>/dev/null || true
    tail -n 40 "$work/console.log" 2>/dev/null | tr -d '\r' >&2 || true
    if ((host_code == 124 || SECONDS >= wall_limit)); then
        echo "nested: ended after $wall_limit s of wall time" >&2
        exit 124
    fi
    fail "the nested host ended early (the emulator's exit code $host_code); its last words are above"
fi
mkdir "$work/results"
tar -x -m -f "$work/results.tar" -C "$work/results" --no-same-owner || fail "the nested host's results disk holds no archive"
if [[ -n $results ]]; then
    mkdir -p "$results"
    cp -R "$work/results/." "$results/"
fi
if ((code != 0)); then
    echo "nested: exit code $code; the end of the nested host's kernel log:" >&2
    tail -n 15 "$work/results/nested-dmesg.txt" >&2 || true
fi
awk -v s="$started" -v e="$ended" -v b="$begun" -v n="$EPOCHREALTIME" \
    'BEGIN { printf "nested: %.2f virtual seconds, %.1f wall seconds\n", e - s, n - b }'
exit "$code"
