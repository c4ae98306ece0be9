#!/usr/bin/env bash
# nested.sh [FILTER...]: run the agent's API tests as root in the nested KVM host, where cgroup v2 has all its controllers
# and is delegated by namespaces, as in a guest. On a machine with plain cgroup v2 `cargo nextest run` does as much.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
mkdir -p "$root/target/payload"
payload=$(mktemp -d "$root/target/payload/agent.XXXXXX")
trap 'rm -rf "$payload"' EXIT

cd "$root"
tests=()
while read -r executable; do
    name=$(basename "$executable")
    case $name in
    bulkhead-agent) strip -o "$payload/$name" "$executable" ;;
    lifecycle-* | isolation-* | resources-*)
        tests+=("${name%-*}")
        strip -o "$payload/${name%-*}" "$executable"
        ;;
    esac
done < <(cargo test --no-run --quiet -p bulkhead-agent --message-format=json | grep -o '"executable":"[^"]*"' | cut -d'"' -f4)

cat >"$payload/run" <<END
#!/bin/sh
export BULKHEAD_TEST_AGENT=/payload/bulkhead-agent BULKHEAD_TEST_DIR=/tmp
code=0
for test in ${tests[*]}; do
    /payload/\$test --nocapture --test-threads=1 "\$@" 2>&1 || code=1
done
exit \$code
END
chmod 755 "$payload" "$payload/run"
"$root/tests/nested/run.sh" --virtual-timeout 120 -- "$payload" "$@"
