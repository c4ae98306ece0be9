#!/usr/bin/env bash
# build.sh: compile the attack programs into target/images/attack/rootfs/bin/attack, a layer over the busybox image.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=$root/target/images/attack
digest=$(cat "$here"/build.sh "$here"/programs/* | sha256sum | cut -d' ' -f1)
[[ $(cat "$out/stamp" 2>/dev/null) != "$digest" ]] || exit 0

mkdir -p "$out/rootfs/bin"
rm -f "$out/stamp"
# The compiler is the one that Rust links with.
cc -O2 -std=gnu17 -Wall -Wextra -Werror -static -s -o "$out/rootfs/bin/attack" "$here"/programs/*.c
echo "$digest" >"$out/stamp"
