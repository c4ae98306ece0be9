# Sourced by the scripts beside it: where things are, and what a kernel is known by.
# shellcheck shell=bash disable=SC2034 # used by those

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/.." && pwd)
work=$root/target/kernel
lock=$here/kernel.lock
cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/bulkhead/kernels
# bookworm's security updates: where the version that is pinned comes from.
suite=bookworm-security
# Another number whenever build.sh makes something else of the same source and configuration.
recipe=1

fail() {
    echo "kernel: $*" >&2
    exit 1
}

# locked NAME: a value of the lock.
locked() {
    sed -n "s/^$1=//p" "$lock"
}

# set_architecture ARCH: sets what depends on it.
set_architecture() {
    arch=$1
    case $arch in
    x86_64) cross='' target=vmlinux image=vmlinux ;;
    arm64) cross=aarch64-linux-gnu- target=Image image=arch/arm64/boot/Image ;;
    *) fail "there is no configuration for the architecture '$arch': x86_64 and arm64 have one" ;;
    esac
    fragments=("$here/common.config" "$here/$arch.config")
}

# kernel_key: the digest of all that the kernel is made of; fails without a compiler.
kernel_key() {
    local compiler linker
    compiler=$("${cross}gcc" --version 2>/dev/null | head -n1) && [[ -n $compiler ]] || return 1
    linker=$("${cross}ld" --version 2>/dev/null | head -n1) && [[ -n $linker ]] || return 1
    {
        echo "$recipe" "$arch" "$compiler" "$linker"
        locked sha256
        grep -h '^CONFIG_' "${fragments[@]}"
    } | sha256sum | cut -d' ' -f1
}

# security_apt COMMAND...: apt-get or apt-cache on the security suite alone, by a private configuration under target/apt: the
# system's sources, lists and cache are neither used nor changed, and signatures are checked as always.
security_apt() {
    local apt=$root/target/apt/$suite keyring=/usr/share/keyrings/debian-archive-keyring.gpg mirror
    mkdir -p "$apt"/{lists/partial,cache/archives/partial}
    [[ -r $keyring ]] || fail "$keyring is missing; apt-get install debian-archive-keyring"
    # The machine's own mirror of it, if it has one.
    mirror=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk -v suite="$suite" '$1 == suite { print $2; exit }')
    echo "deb [signed-by=$keyring arch=amd64] ${mirror:-http://security.debian.org/debian-security} $suite main" >"$apt/sources.list"
    : >"$apt/status"
    local command=$1
    shift
    "$command" -q -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
        -o Dir::State::Lists="$apt/lists" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache" \
        -o APT::Architecture=amd64 -o APT::Sandbox::User=root -o Acquire::Languages=none \
        -o Acquire::Retries=3 -o Acquire::http::Timeout=30 -o Acquire::AllowInsecureRepositories=false "$@"
}

# fetch_source VERSION: sets `deb` to the source package of that version, fetched unless it is there. 1: the archive has it no more.
fetch_source() {
    local package log=$work/fetch.log
    package=$(locked package)
    deb=$work/${package}_${1//:/%3a}_all.deb
    mkdir -p "$work"
    [[ ! -s $deb ]] || return 0
    echo "kernel: fetching $package $1 (150 MB)"
    security_apt apt-get update >"$log" 2>&1 ||
        fail "can't read Debian's archive: $(tail -n1 "$log")"
    security_apt apt-cache madison "$package" 2>>"$log" | awk -F '|' -v v="$1" '{ gsub(/ /, "", $2) } $2 == v { found = 1 } END { exit !found }' ||
        return 1
    (cd "$work" && security_apt apt-get download "$package=$1") >>"$log" 2>&1 && [[ -s $deb ]] ||
        fail "can't fetch $package $1: $(tail -n1 "$log")"
}

# unpack DEB DIRECTORY: puts the kernel's source into DIRECTORY, without the bulk of what is never compiled here.
unpack() {
    rm -rf "$2" "$2.new"
    mkdir -p "$2.new"
    # What is left out are bodies of drivers and texts; whatever describes options stays.
    dpkg-deb --fsys-tarfile "$1" | tar -xO --wildcards './usr/src/linux-source-*.tar.xz' |
        tar -xJ -C "$2.new" --strip-components=1 --exclude='*/arch/*.dts' --exclude='*/arch/*.dtsi' --exclude='*/Documentation/*.rst' \
            --exclude='*/drivers/gpu/drm/*.[ch]' --exclude='*/drivers/media/*.[ch]' --exclude='*/drivers/net/ethernet/*.[ch]' \
            --exclude='*/drivers/net/wireless/*.[ch]' --exclude='*/drivers/staging/*.[ch]' --exclude='linux-source-*/sound/*.[ch]' \
            --exclude='*/tools/testing/*' || fail "$1 is damaged; remove it and run this again"
    mv "$2.new" "$2"
}
