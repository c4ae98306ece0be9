#!/usr/bin/env bash
# software.sh: make target/images/software/rootfs, a Debian 13 with programs as people run them: dpkg, git, SQLite, Python, Node, a JVM,
# PostgreSQL, MariaDB, Redis, nginx, systemd.
#
# The packages are unpacked, not installed: no maintainer script runs, so it takes neither root nor the machine's own Debian release.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=$root/target/images/software
debs=$root/target/debs/software
packages=(base-files base-passwd bash dash coreutils diffutils findutils grep sed tar mawk dpkg util-linux git sqlite3 python3 nodejs
    openjdk-21-jre-headless postgresql-17 mariadb-server redis-server nginx-light curl systemd)
digest=$(sha256sum "$here/software.sh" | cut -d' ' -f1)
[[ $(cat "$out/stamp" 2>/dev/null) != "$digest" ]] || exit 0

echo "images: fetching and unpacking Debian's git, Python, Node, a JVM, PostgreSQL, MariaDB and others (250 MB)"
"$root/guest-image/fetch-debs.sh" trixie "$debs" --with-dependencies "${packages[@]}"
rm -rf "$out" && mkdir -p "$out/new"
new=$out/new
# The first makes the links /bin, /sbin and /lib that the others' files go through.
dpkg-deb -x "$(compgen -G "$debs/base-files_*.deb" | sort -V | tail -n1)" "$new"
for deb in "$debs"/*.deb; do
    case ${deb##*/} in
    # LLVM is for PostgreSQL's compiler of queries, which the cases switch off.
    base-files_* | libllvm* | libz3* | perl-modules-*-doc_*) ;;
    *) dpkg-deb -x "$deb" "$new" ;;
    esac
done
rm -rf "$new"/usr/share/{doc,man,locale,info,lintian}
mkdir -p "$new"/{proc,sys,dev,tmp,run,srv} "$new/var/lib/dpkg"/{info,updates,triggers}
chmod 1777 "$new/tmp"
: >"$new/var/lib/dpkg/status"
cp "$new/usr/share/base-passwd/passwd.master" "$new/etc/passwd"
cp "$new/usr/share/base-passwd/group.master" "$new/etc/group"
echo 'postgres:x:100:100::/srv:/bin/sh' >>"$new/etc/passwd"
echo 'postgres:x:100:' >>"$new/etc/group"
ln -sf mawk "$new/usr/bin/awk"
ln -sf ../lib/jvm/java-21-openjdk-amd64/bin/java "$new/usr/bin/java"
mv "$new" "$out/rootfs"
echo "$digest" >"$out/stamp"
