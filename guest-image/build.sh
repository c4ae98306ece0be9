#!/usr/bin/env bash
# build.sh AGENT OUTPUT: make the guest's root file system, a read-only erofs image with nothing in it but the agent and
# the directories that it mounts on. The same agent gives the same image, byte for byte.
# Does nothing when OUTPUT was made of this very agent by this very script.
set -euo pipefail

fail() {
    echo "guest-image: $*" >&2
    exit 1
}

[[ $# -eq 2 ]] || fail "usage: build.sh AGENT OUTPUT"
agent=$1 output=$2
[[ -f $agent ]] || fail "$agent does not exist; build it with: cargo build --release -p bulkhead-agent"
command -v mkfs.erofs >/dev/null || fail "mkfs.erofs is missing; apt-get install erofs-utils"
if readelf -lW "$agent" 2>/dev/null | grep -q INTERP; then
    fail "$agent is not a static binary, and the image has no libraries"
fi

digest=$(cat "$0" "$agent" | sha256sum | cut -d' ' -f1)
if [[ -s $output && $(cat "$output.stamp" 2>/dev/null) == "$digest" ]]; then
    exit 0
fi

mkdir -p "$(dirname "$output")"
tree=$(mktemp -d)
trap 'rm -rf "$tree" "$output.new"' EXIT
chmod 755 "$tree"
mkdir -m 755 "$tree"/{dev,proc,sys,run,tmp}
install -m 755 "$agent" "$tree/bulkhead-agent"

# Uncompressed: the kernel maps the agent's pages straight from the image instead of unpacking them at every boot.
mkfs.erofs --quiet -T0 -U 00000000-0000-0000-0000-000000000000 --all-root -x-1 "$output.new" "$tree"
mv "$output.new" "$output"
echo "$digest" >"$output.stamp"
echo "guest-image: $output, $(stat -c %s "$output") bytes"
