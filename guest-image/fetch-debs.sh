#!/usr/bin/env bash
# fetch-debs.sh SUITE DIR [--with-dependencies | --source] PACKAGE...: download PACKAGEs of a Debian suite (for instance sid) into
# DIR, or them and all that they depend on, or the archives of their source as its authors published it.
#
# The suite is read from this machine's own Debian mirror through a private apt configuration under target/apt/:
# the system's sources, lists and cache are neither used nor changed, and signatures are checked as always.
# A package that DIR already has is not fetched again.
set -euo pipefail

if (($# < 3)); then
    echo "usage: $0 SUITE DIR [--with-dependencies] PACKAGE..." >&2
    exit 2
fi
suite=$1 dir=$2
shift 2
whole='' type=deb pattern='_*.deb'
case $1 in
--with-dependencies) whole=yes && shift ;;
--source) type=deb-src pattern='_*.orig.tar.*' && shift ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
apt=$root/target/apt/$suite${type#deb}
mkdir -p "$apt"/{lists/partial,cache/archives/partial} "$dir"
dir=$(cd "$dir" && pwd)

missing=()
for package in "$@"; do
    compgen -G "$dir/$package$pattern" >/dev/null || missing+=("$package")
done
((${#missing[@]})) || exit 0
[[ -z $whole ]] || missing=("$@")

codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
mirror=$(apt-get indextargets --format '$(RELEASE) $(ORIGIN) $(REPO_URI)' 'Created-By: Packages' |
    awk -v codename="$codename" '$1 == codename && $2 == "Debian" { print $3; exit }')
if [[ -z $mirror ]]; then
    echo "fetch-debs: apt knows no Debian mirror for '$codename'; add one to /etc/apt/sources.list and run apt-get update" >&2
    exit 1
fi
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
if [[ ! -r $keyring ]]; then
    echo "fetch-debs: $keyring is missing; apt-get install debian-archive-keyring" >&2
    exit 1
fi
echo "$type [signed-by=$keyring arch=amd64] $mirror $suite main" >"$apt/sources.list"

# An empty dpkg status: what is installed here must not influence what is chosen.
: >"$apt/status"
options=(
    -q -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
    -o Dir::State::Lists="$apt/lists" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache"
    -o APT::Architecture=amd64 -o APT::Sandbox::User=root -o Acquire::Languages=none
    -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false -o Acquire::Retries=3 -o Acquire::http::Timeout=30
    -o APT::Get::AllowUnauthenticated=false -o Acquire::AllowInsecureRepositories=false
)
log=$apt/fetch.log
# Two fetches of one suite at the same time would disturb each other's lists.
exec 9>"$apt/lock"
flock 9
echo "fetch-debs: $suite: ${missing[*]}"
# What is to be downloaded, of what was asked for.
chosen() {
    [[ -n $whole ]] || { printf '%s\n' "${missing[@]}" && return; }
    apt-get "${options[@]}" --simulate --no-install-recommends install "${missing[@]}" | awk '$1 == "Inst" { print $2 }'
}
# Without what Debian changes, which nobody here builds with.
download_source() {
    local package uri name size sum
    for package in "${missing[@]}"; do
        read -r uri name size sum < <(apt-get "${options[@]}" --print-uris source "$package" | tr -d "'" | grep '\.orig\.tar\.[^.]* ') &&
            /usr/lib/apt/apt-helper "${options[@]}" download-file "$uri" "$name" "$sum" || return
    done
}
download() {
    if [[ $type == deb-src ]]; then
        download_source
    else
        chosen >"$apt/chosen" && xargs apt-get "${options[@]}" download <"$apt/chosen"
    fi
}
if ! { apt-get "${options[@]}" update && cd "$dir" && download; } >"$log" 2>&1; then
    echo "fetch-debs: cannot fetch ${missing[*]} of suite $suite; the end of $log:" >&2
    tail -n 5 "$log" >&2
    exit 1
fi
for package in "${missing[@]}"; do
    compgen -G "$dir/$package$pattern" >/dev/null || {
        echo "fetch-debs: apt reported success but $dir has no $package$pattern" >&2
        exit 1
    }
done
