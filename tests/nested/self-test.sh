#!/usr/bin/env bash
# self-test.sh: does the nested KVM host do what the tests rely on? Prints a line for each check.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/payload"
cp "$here/self-test/run" "$work/payload/run"
cc -O1 -static -o "$work/payload/kvm-probe" "$here/self-test/kvm-probe.c"

"$here/run.sh" --timeout 600 --results "$work/results" "$work/payload" "a b" "c'd"
[[ $(cat "$work/results/result") == result ]] || { echo "FAIL results: not copied out"; exit 1; }
echo "ok  results: copied out"

# A payload that hangs must end by virtual time, long before the wall time does; exit codes must be carried.
printf '#!/bin/sh\n[ "$1" = hang ] && sleep 100000\nexit "$1"\n' >"$work/payload/run"
for case in "hang 143" "77 77"; do
    read -r argument expected <<<"$case"
    code=0
    "$here/run.sh" --timeout 120 --virtual-timeout 30 "$work/payload" "$argument" >"$work/log" 2>&1 || code=$?
    ((code == expected)) || { cat "$work/log"; echo "FAIL $argument: exit code $code, expected $expected"; exit 1; }
    echo "ok  $argument: exit code $code, $(tail -n1 "$work/log")"
done
