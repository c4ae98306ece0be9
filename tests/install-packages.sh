#!/usr/bin/env bash
# install-packages.sh [PACKAGE...]: install the Debian packages that are not there yet: those that the tests need, or the ones named.
set -euo pipefail

# What each is for: the nested KVM host (qemu; with NESTED_CPU=intel xorriso, for what Bochs boots from), its images (cpio, e2fsprogs, kmod), the guest image (erofs-utils), and taking
# the guest kernel out of its library (binutils), and libFuzzer (g++).
packages=(binutils cpio e2fsprogs erofs-utils g++ kmod qemu-system-x86)
[[ ${NESTED_CPU:-} != intel ]] || packages+=(make patch xorriso)
(($# == 0)) || packages=("$@")

missing=()
for package in "${packages[@]}"; do
    [[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) == "install ok installed" ]] || missing+=("$package")
done
((${#missing[@]})) || exit 0

sudo=()
if ((EUID != 0)); then
    command -v sudo >/dev/null || { echo "install-packages: run as root, or install sudo; needed: ${missing[*]}" >&2; exit 1; }
    sudo=(sudo)
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "install-packages: installing ${missing[*]}"
if ! { "${sudo[@]}" apt-get -q update &&
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 10 "$log" >&2
    echo "install-packages: apt-get could not install ${missing[*]}" >&2
    exit 1
fi
