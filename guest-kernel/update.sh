#!/usr/bin/env bash
# update.sh: pin the newest version of the kernel's source that Debian's security archive has, and say what is new in it: the
# changelog, and the options that nobody has decided on yet.
set -euo pipefail

. "$(dirname "$0")/common.sh"
set_architecture x86_64
package=$(locked package) old=$(locked version)
mkdir -p "$work"
security_apt apt-get update >"$work/fetch.log" 2>&1 || fail "can't read Debian's archive: $(tail -n1 "$work/fetch.log")"
new=$(security_apt apt-cache madison "$package" 2>>"$work/fetch.log" | awk -F '|' '{ gsub(/ /, "", $2); print $2 }' | sort -V | tail -n1)
[[ -n $new ]] || fail "$suite has no $package; look for its successor, and name that in $lock"
if [[ $new == "$old" ]]; then
    echo "kernel: $package $old is the newest that $suite has"
    exit 0
fi
dpkg --compare-versions "$new" gt "$old" ||
    fail "$suite has $package $new, older than $old, which is pinned; edit $lock if that is what you want"

"$root/tests/install-packages.sh" bison flex gcc make xz-utils
fetch_source "$new" || fail "the archive lists $package $new and does not have it"
read -r sha256 _ < <(sha256sum "$deb")
echo "kernel: from $old to $new: what Debian's changelog says"
dpkg-deb --fsys-tarfile "$deb" | tar -xO "./usr/share/doc/$package/changelog.Debian.gz" | zcat |
    awk -v old="${old%~*}" '/^linux[^ ]* \(/ && index($0, "(" old) { known = 1 } !known { print "    " $0 }' >"$work/changes.txt"
head -n 40 "$work/changes.txt"
lines=$(wc -l <"$work/changes.txt")
((lines <= 40)) || echo "    ... $lines lines in all, with $(grep -c 'CVE-' "$work/changes.txt" || true) CVEs: target/kernel/changes.txt"

unpack "$deb" "$work/update"
trap 'rm -rf "$work/update" "$work/update.out"' EXIT
make=(make -s -C "$work/update" "O=$work/update.out" "ARCH=$arch")
mkdir -p "$work/update.out"
cat "${fragments[@]}" >"$work/update.out/asked.config"
"${make[@]}" "KCONFIG_ALLCONFIG=$work/update.out/asked.config" allnoconfig >"$work/update.log" 2>&1 || fail "the configuration is refused: $work/update.log"
"$here/check-config.sh" "$work/update.out/.config" "${fragments[@]}" || fail "$new does not have an option any more: decide what becomes of it, then run this again"
key=$(kernel_key) || key=
if [[ -s $cache/$key/config ]]; then
    known() { grep -oE '^(# )?CONFIG_[A-Za-z0-9_]+' "$1" | sed 's/^# //' | sort -u; }
    echo "kernel: options that $old did not have (they are off unless a fragment says otherwise):"
    comm -13 <(known "$cache/$key/config") <(known "$work/update.out/.config") | sed 's/^/    /'
else
    echo "kernel: $old has not been built here, so there is no list of options that are new"
fi

sed -i "s/^version=.*/version=$new/; s/^sha256=.*/sha256=$sha256/" "$lock"
echo "kernel: kernel.lock pins $new, $sha256; now: make kernel e2e"
