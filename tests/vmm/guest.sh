#!/bin/sh
# SPDX-License-Identifier: MIT
# The code that payload.c copies into guests needs nothing outside of its section (guest.c, G1).
# usage: guest.sh OBJECT-OR-ARCHIVE [OBJDUMP]
#
# Every relocation of section vmm_guest must name a symbol of that section, and no instruction may
# use a vector register. Prints each violation; exits 1 if any, 77 without binutils.
set -u
object=$1
objdump=${2:-objdump}

command -v "$objdump" >/dev/null || { echo "SKIP: $objdump is missing"; exit 77; }
inside=$("$objdump" -t "$object" | awk '/[ \t]vmm_guest[ \t]/ { print $NF }')
[ -n "$inside" ] || { echo "no section vmm_guest in $object"; exit 1; }

"$objdump" -r -j vmm_guest "$object" | awk -v inside="$inside" '
BEGIN {
	n = split(inside, names, "\n")
	for (i = 1; i <= n; i++)
		known[names[i]] = 1
}
$2 ~ /^R_/ {
	symbol = $3
	sub(/[-+]0x[0-9a-f]*$/, "", symbol)
	if (!(symbol in known)) {
		print "needs " symbol " at " $1
		bad = 1
	}
}
END { exit bad }' || exit 1
# x86: xmm0 ... st(0); arm64: q0, d0, s0, v0 as an operand.
if "$objdump" -d --no-show-raw-insn -j vmm_guest "$object" | grep -E '%([xyz]mm|st\()|[[:blank:]{,][qdsv][0-9]+[].,}]'; then
	echo "vector registers in $object"
	exit 1
fi
echo "guest: $(echo "$inside" | wc -l) symbols, all inside"
