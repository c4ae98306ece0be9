#!/usr/bin/env bash
# use.sh: put the guest kernel into target/guest/vmlinux: our own where it has been built (`make kernel`), else the ready-made one.
# BULKHEAD_KERNEL=ready-made takes that one in any case, BULKHEAD_KERNEL=own fails without ours.
set -euo pipefail

. "$(dirname "$0")/common.sh"
set_architecture x86_64
guest=$root/target/guest
wanted=${BULKHEAD_KERNEL:-}
case $wanted in
'' | own | ready-made) ;;
*) fail "BULKHEAD_KERNEL=$wanted: it is own or ready-made" ;;
esac

if [[ $wanted != ready-made ]] && key=$(kernel_key) && [[ -s $cache/$key/kernel ]]; then
    [[ ! -s $guest/vmlinux || $(cat "$guest/vmlinux.stamp" 2>/dev/null) != "$key" ]] || exit 0
    mkdir -p "$guest"
    rm -f "$guest/vmlinux.stamp"
    cp "$cache/$key/kernel" "$guest/vmlinux.new"
    mv "$guest/vmlinux.new" "$guest/vmlinux"
    echo "$key" >"$guest/vmlinux.stamp"
    echo "kernel: target/guest/vmlinux is Bulkhead's own, $(cat "$cache/$key/version")"
    exit 0
fi
[[ $wanted != own ]] || fail "Bulkhead's own kernel has not been built: run 'make kernel'"
"$root/guest-image/fetch-kernel.sh"
[[ $wanted == ready-made ]] ||
    echo "kernel: this is a ready-made guest kernel: pods have no iptables, nft, WireGuard or message queues, and real-time scheduling" \
        "fails; 'make kernel' builds Bulkhead's own, once"
