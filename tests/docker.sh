#!/usr/bin/env bash
# docker.sh DIR: put the programs of Debian 13's Docker into DIR. They need no library that the nested host lacks.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?usage: docker.sh DIR}
packages=(docker.io docker-cli tini)
"$root/guest-image/fetch-debs.sh" trixie "$root/target/debs/trixie" "${packages[@]}"
[[ ! -x $out/dockerd ]] || exit 0
mkdir -p "$out"
work=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$work"' EXIT
for package in "${packages[@]}"; do
    dpkg-deb -x "$(compgen -G "$root/target/debs/trixie/${package}_*.deb" | sort -V | tail -n1)" "$work"
done
mv "$work/usr/bin/docker" "$work/usr/sbin/docker-proxy" "$out/"
mv "$work/usr/bin/tini-static" "$out/docker-init"
mv "$work/usr/sbin/dockerd" "$out/" # last: it says that the others are there
