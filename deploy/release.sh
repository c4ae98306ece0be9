#!/usr/bin/env bash
# release.sh: make what is released, under target/dist/: an archive of everything that is installed, a list of what is in it (SBOM,
# CycloneDX) and SHA-256 sums. The same commit gives the same bytes in whatever directory, by the same compiler and C library.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "release: $*" >&2
    exit 1
}

[[ -z $(git status --porcelain) || ${RELEASE_DIRTY:-} == 1 ]] ||
    fail "there are changes that are not committed: nobody could make this release again (RELEASE_DIRTY=1 to try it out)"
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
[[ $version ]] || fail "Cargo.toml has no version"
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH

# The kernel must be the pinned one: the ready-made, or our own with BULKHEAD_KERNEL=own.
export BULKHEAD_KERNEL=${BULKHEAD_KERNEL:-ready-made}
KERNEL_LOCK=strict make --no-print-directory -o packages target/guest/vmlinux

echo "release: building (takes some minutes)"
root=$PWD dist=target/dist
# No path of this machine gets into a program, and nothing that was built with other flags.
export RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=$root=/bulkhead --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo"
export CARGO_TARGET_DIR=$dist/build CARGO_INCREMENTAL=0
unset CARGO_PROFILE_RELEASE_LTO CARGO_PROFILE_RELEASE_CODEGEN_UNITS CARGO_PROFILE_RELEASE_INCREMENTAL
cargo build --quiet --release --locked --bins -p containerd-shim-bulkhead-v1 -p bulkhead -p bulkhead-vmm -p bulkhead-fs -p bulkhead-agent
built=$dist/build/x86_64-unknown-linux-gnu/release
guest-image/build.sh "$built/bulkhead-agent" "$dist/guest.erofs"

name=bulkhead-$version-x86_64 tree=$dist/bulkhead-$version-x86_64
rm -rf "$tree" "$dist/$name".* "$dist/SHA256SUMS"
install -D -m 755 -t "$tree/bin" "$built/containerd-shim-bulkhead-v1" "$built/bulkhead"
install -D -m 755 -t "$tree/libexec/bulkhead" "$built/bulkhead-vmm" "$built/bulkhead-fs"
install -D -m 644 -t "$tree/share/bulkhead" target/guest/vmlinux "$dist/guest.erofs"
install -m 644 -t "$tree" README.md CHANGELOG.md LICENSE
if grep -rqF "$root/" "$tree"; then
    fail "a path of this machine is in $(grep -rlF "$root/" "$tree" | tr '\n' ' ')"
fi

# A tool of this machine, so built as usual.
env -u RUSTFLAGS -u CARGO_TARGET_DIR cargo build --quiet --release --locked -p bulkhead-tests --bin bulkhead-sbom
(cd "$tree" && find . -type f -printf '%P\n' | sort | xargs -d '\n' sha256sum) >"$dist/files"
cargo metadata --format-version 1 --locked --filter-platform x86_64-unknown-linux-gnu |
    target/x86_64-unknown-linux-gnu/release/bulkhead-sbom "$dist/files" \
        containerd-shim-bulkhead-v1 bulkhead bulkhead-vmm bulkhead-fs bulkhead-agent >"$dist/$name.cdx.json"

tar --sort=name --owner=0 --group=0 --numeric-owner --mode=go=rX,u+rw --mtime="@$SOURCE_DATE_EPOCH" --format=gnu \
    -C "$dist" -cf - "$name" | gzip -n9 >"$dist/$name.tar.gz"
(cd "$dist" && sha256sum "$name.tar.gz" "$name.cdx.json" >SHA256SUMS)
rm -rf "$tree" "$dist/files"
echo "release: $dist/$name.tar.gz, $(stat -c %s "$dist/$name.tar.gz") bytes"
cat "$dist/SHA256SUMS"
