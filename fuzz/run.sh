#!/usr/bin/env bash
# run.sh [SECONDS [NAME...]]: run fuzz targets, each for SECONDS (20), all of them or those of these names.
# run.sh --keep [NAME...]: put what the last runs found worth keeping into fuzz/corpus, a sample of it.
#
# Needs a stable compiler and g++. Inputs that a run found go to target/fuzz/corpus and serve the next one; a finding goes to
# target/fuzz/findings, with the command that replays it. The exit status is 1 if there is one.
set -euo pipefail
cd "$(dirname "$0")/.."

# Bytes of inputs that are kept for a target.
KEPT=4096
programs=target/fuzz/x86_64-unknown-linux-gnu/fuzz
# What LLVM's libFuzzer wants: counters for edges, and what is compared with what.
coverage=(-sanitizer-coverage-level=4 -sanitizer-coverage-inline-8bit-counters -sanitizer-coverage-pc-table
    -sanitizer-coverage-trace-compares)
flags="-C passes=sancov-module"
for flag in "${coverage[@]}"; do flags+=" -C llvm-args=$flag"; done

fail() {
    echo "fuzz: $*" >&2
    exit 1
}

keep= seconds=20
case ${1:-} in
    --keep) keep=1; shift ;;
    '') ;;
    *[!0-9]*) fail "usage: run.sh [SECONDS [NAME...]] | --keep [NAME...]" ;;
    *) seconds=$1; shift ;;
esac
mapfile -t all < <(find fuzz/src/bin -name '*.rs' -printf '%f\n' | sed 's/\.rs$//' | sort)
names=("$@")
((${#names[@]})) || names=("${all[@]}")
for name in "${names[@]}"; do
    [[ " ${all[*]} " == *" $name "* ]] || fail "there is no target $name; there are: ${all[*]}"
done
command -v g++ >/dev/null || fail "g++ is missing, which libFuzzer is built with; apt-get install g++"

echo "fuzz: building ${#names[@]} targets (the first time takes some minutes)"
log=target/fuzz/build.log
mkdir -p target/fuzz
if ! RUSTFLAGS=$flags CARGO_INCREMENTAL=0 CARGO_TARGET_DIR=target/fuzz cargo build --locked --profile fuzz -p bulkhead-fuzz \
    --features engine "${names[@]/#/--bin=}" 2>&1 | tee "$log"; then
    fail "the targets can't be built; all of it is in $log"
fi

# The kept inputs as files: a line of the corpus is one input in Base64, as libFuzzer prints a finding.
unpack() {
    local seeds=$1 line number=0
    rm -rf "$seeds"
    mkdir -p "$seeds"
    while read -r line; do
        number=$((number + 1))
        base64 -d <<<"$line" >"$seeds/$number"
    done <"fuzz/corpus/$name.b64"
}

# A sample that is the same for the same inputs.
pack() {
    local kept=0 size file
    while read -r size file; do
        kept=$((kept + size))
        ((kept <= KEPT)) || break
        base64 -w0 "$file"
        echo
    done < <(find "$1" -type f -size -1025c -printf '%s %p\n' | sort -R --random-source=<(yes)) | sort -u >"fuzz/corpus/$name.b64"
}

findings=0
((keep)) || printf '%-14s %12s %9s %8s %8s\n' target executions "a second" edges inputs
for name in "${names[@]}"; do
    grown=target/fuzz/corpus/$name seeds=target/fuzz/seeds/$name log=target/fuzz/$name.log
    mkdir -p "$grown" target/fuzz/findings
    [[ ! -e fuzz/corpus/$name.b64 ]] || unpack "$seeds"
    mkdir -p "$seeds"
    # Words of the kept inputs: names of fields are not found by chance.
    cat "$seeds"/* "$grown"/seed-* 2>/dev/null | grep -aohE '"[A-Za-z0-9_./-]{3,40}"' | sort -u >"target/fuzz/$name.words" || true
    common=(-timeout=20 -rss_limit_mb=1024 -max_len=4096 -verbosity=1)
    [[ ! -s target/fuzz/$name.words ]] || common+=(-dict="target/fuzz/$name.words")
    if [[ $keep ]]; then
        merged=target/fuzz/merged/$name
        rm -rf "$merged"
        mkdir -p "$merged"
        "$programs/$name" "${common[@]}" -set_cover_merge=1 "$merged" "$grown" "$seeds" >"$log" 2>&1 || { tail -n 5 "$log" >&2; fail "$name: can't merge"; }
        pack "$merged"
        echo "fuzz: $name: $(wc -l <"fuzz/corpus/$name.b64") of $(find "$merged" -type f | wc -l) inputs kept"
        continue
    fi
    found=0
    "$programs/$name" "${common[@]}" -max_total_time="$seconds" -print_final_stats=1 -artifact_prefix="target/fuzz/findings/$name-" \
        "$grown" "$seeds" >"$log" 2>&1 || found=1
    edges= inputs=
    read -r edges inputs < <(sed -n 's/^#.* cov: \([0-9]*\) .* corp: \([0-9]*\)\/.*/\1 \2/p' "$log" | tail -n 1) || true
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -n 1)
    rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' "$log" | tail -n 1)
    printf '%-14s %12s %9s %8s %8s\n' "$name" "${executions:-?}" "${rate:-?}" "${edges:-?}" "${inputs:-?}"
    if ((found)); then
        findings=$((findings + 1))
        grep -m 3 -E "panicked at|ERROR: libFuzzer|^thread" -A 1 "$log" >&2 || tail -n 5 "$log" >&2
        file=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
        echo "fuzz: $name: FOUND, more in $log; again with: $programs/$name ${file:-INPUT}" >&2
    fi
done
((findings == 0)) || fail "$findings of ${#names[@]} targets found something"
