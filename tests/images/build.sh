#!/usr/bin/env bash
# build.sh: make the test images under target/images/, out of Debian's busybox-static and without a container engine.
#
#   NAME.tar     an OCI layout with one uncompressed layer, for `ctr image import`; the same bytes from every build
#   NAME/rootfs  the same root file system as a directory
#   NAME/rootfs.ext4, NAME/scratch.ext4  the same on a disk, and a disk with an empty file system (of busybox only)
#
#   busybox   the applets as hard links (sh, echo, true, ...), no user, default command sh       bulkhead.test/busybox:1
#   pause     a program that waits, for the pods of runtimes that need one                       bulkhead.test/pause:1
#   custom    busybox with user 1000:1000, an extra group, a working directory and variables     bulkhead.test/custom:1
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=$root/target/images
digest=$(sha256sum "$here/build.sh" | cut -d' ' -f1)
[[ $(cat "$out/stamp" 2>/dev/null) != "$digest" ]] || exit 0

echo "images: building the test images"
"$root/guest-image/fetch-debs.sh" bookworm "$root/target/debs/bookworm" busybox-static
mkdir -p "$out"
rm -f "$out/stamp"
work=$(mktemp -d "$out/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
dpkg-deb -x "$(compgen -G "$root/target/debs/bookworm/busybox-static_*.deb" | sort -V | tail -n1)" "$work/deb"
tar_options=(--sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --format=gnu)

# blob FILE: moves FILE into the layout and prints its descriptor's digest and size members.
blob() {
    local digest size
    digest=$(sha256sum "$1" | cut -d' ' -f1)
    size=$(stat -c %s "$1")
    mv "$1" "$work/layout/blobs/sha256/$digest"
    printf '"digest":"sha256:%s","size":%d' "$digest" "$size"
}

# image NAME CONFIG: packs $work/rootfs as NAME with the JSON members CONFIG as the image's config.
image() {
    local name=$1 config=$2 layer diff_id
    rm -rf "$work/layout" "${out:?}/$name" "$out/$name.tar"
    mkdir -p "$work/layout/blobs/sha256" "$out/$name"
    tar -c "${tar_options[@]}" -f "$work/layer" -C "$work/rootfs" .
    diff_id=$(sha256sum "$work/layer" | cut -d' ' -f1)
    layer=$(blob "$work/layer")
    printf '{"architecture":"amd64","os":"linux","config":{%s},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
        "$config" "$diff_id" >"$work/config"
    printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json",%s},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar",%s}]}' \
        "$(blob "$work/config")" "$layer" >"$work/manifest"
    printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json",%s,"platform":{"architecture":"amd64","os":"linux"},"annotations":{"io.containerd.image.name":"bulkhead.test/%s:1","org.opencontainers.image.ref.name":"1"}}]}' \
        "$(blob "$work/manifest")" "$name" >"$work/layout/index.json"
    printf '{"imageLayoutVersion":"1.0.0"}' >"$work/layout/oci-layout"
    tar -c "${tar_options[@]}" -f "$out/$name.tar" -C "$work/layout" blobs index.json oci-layout
    cp -a "$work/rootfs" "$out/$name/rootfs"
}

r=$work/rootfs
mkdir -p "$r"/{bin,dev,etc,home,proc,root,sys,tmp,var/tmp}
chmod 1777 "$r/tmp" "$r/var/tmp"
cp "$work/deb/bin/busybox" "$r/bin/busybox"
"$r/bin/busybox" --list | while read -r applet; do
    [[ $applet == busybox ]] || ln "$r/bin/busybox" "$r/bin/$applet"
done
printf 'root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' >"$r/etc/passwd"
printf 'root:x:0:\nuser:x:1000:\nextra:x:2000:user\nnogroup:x:65534:\n' >"$r/etc/group"
image busybox '"Cmd":["/bin/sh"],"Env":["PATH=/bin"]'
mkfs=$(PATH=$PATH:/usr/sbin:/sbin command -v mkfs.ext4) || { echo "images: mkfs.ext4 is missing; run tests/install-packages.sh" >&2; exit 1; }
"$mkfs" -q -m 0 -d "$r" "$out/busybox/rootfs.ext4" 16M >/dev/null
"$mkfs" -q -m 0 "$out/busybox/scratch.ext4" 16M >/dev/null

mv "$r" "$work/busybox"
mkdir -p "$r"
cp "$work/deb/bin/busybox" "$r/sleep"
image pause '"Entrypoint":["/sleep","2147483647"]'
rm -r "$r"
mv "$work/busybox" "$r"

mkdir "$r/work"
echo "from the image" >"$r/work/file"
image custom '"User":"user","WorkingDir":"/work","Env":["PATH=/bin","COLOUR=green"],"Entrypoint":["/bin/sh","-c"],"Cmd":["id"]'

echo "$digest" >"$out/stamp"
echo "images: $(cd "$out" && du -h --apparent-size ./*.tar | awk '{ printf "%s %s  ", $2, $1 }')"
