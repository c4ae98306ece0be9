#!/usr/bin/env bash
# audit.sh: what deny.toml asks of the dependencies. Known vulnerabilities need the advisory database, which is
# fetched: without a way to it that part is skipped, loudly.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! cargo deny --version >/dev/null 2>&1; then
    echo "audit: installing cargo-deny (takes some minutes, once)"
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    # Built quickly rather than to be quick: it runs for a second.
    CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --debug --no-default-features cargo-deny >"$log" 2>&1 ||
        { tail -n 20 "$log" >&2; echo "audit: cargo-deny could not be installed" >&2; exit 1; }
fi
cargo deny --log-level error check bans licenses sources

if timeout 120 cargo deny --log-level error fetch db >/dev/null 2>&1; then
    cargo deny --log-level error check advisories
else
    echo "audit: SKIPPED LOUDLY: the advisory database can't be fetched here, so known vulnerabilities were not looked up"
fi
