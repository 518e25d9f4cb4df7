#!/bin/sh
# SPDX-License-Identifier: MIT
# What each Linux guest wrote is a function of its identity and of its family's random data, and nobody else's:
# computes the digests of the KAGE-PROOF lines in a console again (tests/vmm/linux_init.sh makes them).
#
#   proofs.sh CONSOLE WANTED     WANTED: so many guests at least
set -u

tmp=$(mktemp) || exit 1
trap 'rm -f "$tmp"' EXIT
tr -d '\r' <"$1" |
	sed -n 's/.*KAGE-PROOF id \(0x[0-9A-F]*\) .* common \([0-9a-f]*\) own \([0-9a-f]*\)$/\1 \2 \3/p' | sort -u >"$tmp"
checked=0
while read -r id common own; do
	want=$(yes "I am guest $id of $common" 2>/dev/null | head -c $((4 << 20)) | sha256sum | cut -c1-64)
	if [ "$want" != "$own" ]; then
		echo "  guest $id wrote something else: $own, not $want"
		exit 1
	fi
	checked=$((checked + 1))
done <"$tmp"
if [ $checked -lt "$2" ]; then
	echo "  $checked Linux guests proved who they are, $2 should have"
	exit 1
fi
[ $checked = 0 ] || echo "  $checked Linux guests on Kage's memory proved who they are"
