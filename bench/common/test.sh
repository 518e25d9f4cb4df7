#!/bin/sh
# SPDX-License-Identifier: MIT
# test.sh LIST SUITE PROGRAM [ARG...]: the program, in the form that the arguments ask for, passes
# its own checks and reports exactly the rows that LIST has for SUITE. It judges no time.
set -u
list=$1
suite=$2
shift 2
tmp=$(mktemp -d "${TMPDIR:-/tmp}/kage-bench.XXXXXX") || exit 2
trap 'rm -rf "$tmp"' EXIT

"$@" --json "$tmp/rows.json"
status=$?
[ $status != 77 ] || exit 77
[ $status = 0 ] || { echo "test.sh: exit status $status" >&2; exit 1; }
sed -n 's,.*"suite":"\([^"]*\)"\,"case":"\([^"]*\)".*,\1/\2,p' "$tmp/rows.json" | LC_ALL=C sort >"$tmp/rows"
sed -n "s,^$suite/,&,p" "$list" | LC_ALL=C sort >"$tmp/wanted"
[ -s "$tmp/wanted" ] || { echo "test.sh: no $suite/ in $list" >&2; exit 1; }
diff "$tmp/wanted" "$tmp/rows" || { echo "test.sh: rows (>) are not those of $list (<)" >&2; exit 1; }
