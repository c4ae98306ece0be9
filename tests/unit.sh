#!/usr/bin/env bash
# unit.sh: the tests that need no guest kernel. Root is wanted (jail, mounts, namespaces) and /dev/kvm (device tests).
set -euo pipefail
cd "$(dirname "$0")/.."

((EUID == 0)) || echo "unit: SKIPPED LOUDLY: not root, so the tests of jail, file server, agent and shim that need it are skipped"
[[ -w /dev/kvm ]] || echo "unit: SKIPPED LOUDLY: no writable /dev/kvm, so the VMM's tests that run guests are skipped"

if cargo nextest --version >/dev/null 2>&1; then
    exec cargo nextest run --locked --workspace --no-fail-fast "$@"
fi
exec cargo test --locked --workspace --no-fail-fast "$@"
