#!/usr/bin/env bash
# build.sh [ARCH]: build the guest kernel, or take it from the cache, and say where it is. ARCH is x86_64 or arm64.
#
# Source, configuration and tools decide all of it: the same ones give the same kernel, byte for byte. It is kept outside of this
# tree, by their digest, so that a clean clone does not build it again.
set -euo pipefail

. "$(dirname "$0")/common.sh"
set_architecture "${1:-x86_64}"
packages=(bc bison flex gcc libelf-dev make xz-utils)
[[ -z $cross ]] || packages+=("gcc-${cross%-}")
"$root/tests/install-packages.sh" "${packages[@]}"

key=$(kernel_key) || fail "${cross}gcc or ${cross}ld does not run"
kept=$cache/$key
report() {
    local version
    version=$(cat "$kept/version")
    echo "kernel: $version for $arch, $(stat -c %s "$kept/kernel") bytes, $(grep -c '=y$' "$kept/config") options on: $kept/kernel"
}
if [[ -s $kept/kernel ]]; then
    report
    exit 0
fi

mkdir -p "$work" "$cache"
exec 9>"$work/lock"
flock -n 9 || { echo "kernel: waiting for another build in this tree" && flock 9; }
version=$(locked version) sha256=$(locked sha256)
fetch_source "$version" ||
    fail "Debian's archive no longer has $(locked package) $version: run 'make kernel-update', which pins the version that it has now"
read -r found _ < <(sha256sum "$deb")
[[ $found == "$sha256" ]] || fail "$deb has the SHA-256 $found, and kernel.lock pins $sha256: remove it and run this again"

tree=$work/source out=$work/$arch
if [[ $(cat "$work/source.sha256" 2>/dev/null) != "$sha256" ]]; then
    echo "kernel: unpacking $(basename "$deb")"
    rm -rf "$work/source.sha256" "$work"/{x86_64,arm64}
    unpack "$deb" "$tree"
    echo "$sha256" >"$work/source.sha256"
fi

# Nothing of this machine, this user or this day.
export KBUILD_BUILD_USER=bulkhead KBUILD_BUILD_HOST=bulkhead KBUILD_BUILD_VERSION=1 LC_ALL=C TZ=UTC
KBUILD_BUILD_TIMESTAMP=$(dpkg-deb --fsys-tarfile "$deb" | tar -tv --full-time --wildcards './usr/src/linux-source-*' | awk 'NR == 1 { print $4 }')
export KBUILD_BUILD_TIMESTAMP
unset KBUILD_EXTMOD KCFLAGS KAFLAGS MAKEFLAGS MFLAGS MAKELEVEL CROSS_COMPILE ARCH
make=(nice -n 19 make -C "$tree" "O=$out" "ARCH=$arch" "CROSS_COMPILE=$cross" "-j$(($(nproc) + 1))")
mkdir -p "$out"
cat "${fragments[@]}" >"$out/asked.config"
"${make[@]}" -s "KCONFIG_ALLCONFIG=$out/asked.config" allnoconfig >"$work/build.log" 2>&1 ||
    { tail -n 15 "$work/build.log" >&2; fail "the configuration is refused; see $work/build.log"; }
"$here/check-config.sh" "$out/.config" "${fragments[@]}" || fail "the configuration is not what was asked for"

echo "kernel: building $version for $arch with $(grep -c '=y$' "$out/.config") options on; the first time takes a quarter of an hour on two CPUs"
begun=$SECONDS
# About as many steps as there are: a line for each tenth of them.
"${make[@]}" "$target" 2>&1 | tee "$work/build.log" |
    awk '/^  (CC|AS|LD|AR) / { if (++done % 200 == 0) { printf "kernel: %d of about 2000 steps\n", done; fflush() } }' ||
    { grep -E -B 2 -A 8 'error|Error' "$work/build.log" | tail -n 30 >&2; fail "the build failed; all of its output is in $work/build.log"; }
elapsed=$((SECONDS - begun))

mkdir -p "$cache/$key.$$"
trap 'rm -rf "$cache/$key.$$"' EXIT
if [[ $target == vmlinux ]]; then
    "${cross}strip" --strip-all -o "$cache/$key.$$/kernel" "$out/$image"
else
    cp "$out/$image" "$cache/$key.$$/kernel"
fi
cp "$out/.config" "$cache/$key.$$/config"
"${make[@]}" -s kernelrelease >"$cache/$key.$$/version"
rm -rf "$kept"
mv "$cache/$key.$$" "$kept"
# Nearly a gigabyte that no later build of this kernel reads; another one begins with its source.
rm -rf "$work/source.sha256" "$tree" "$out"
echo "kernel: built in $((elapsed / 60)) min $((elapsed % 60)) s"
report
