#!/bin/sh
# SPDX-License-Identifier: MIT
# A machine that hangs is destroyed, its console is shown, and the leg fails; nothing of it is left.
#
#   hang.sh VIRT-LEG SOURCE PROGRAMS OUT
#
# Its first process sleeps instead of testing.
set -u

tmp=$(mktemp -d) || exit 1
name=hang
out=$4/$name
trap 'rm -rf "$tmp"' EXIT
fail() { echo "FAIL: $*; it said:"; cat "$tmp/said"; exit 1; }

cat >"$tmp/$name" <<END
machine x86_64
cpu qemu64
suite bookworm
memory 256
mode none
boot 20
cmdline loglevel=7 rdinit=/bin/busybox -- sleep 100000
test nothing 10 tests/virt/virt-hold
END
"$1" "$2" "$3" "$4" "$tmp/$name" >"$tmp/said" 2>&1
status=$?
[ $status != 77 ] || { cat "$tmp/said"; exit 77; }
[ $status = 1 ] || fail "exit $status, wanted 1"
grep -q 'the machine hung, and was destroyed' "$tmp/said" || fail "the leg did not say why"
grep -q "^LEG $name: 0 passed, [1-9][0-9]* failed" "$tmp/said" || fail "the leg did not say that it failed"
grep -q '^  | \[ ' "$tmp/said" || fail "the console was not shown"
grep -q 'Linux version' "$out/console" || fail "the console was not kept"
! grep -qs "guest=kage-$name," /proc/[0-9]*/cmdline || fail "its QEMU lives on"
