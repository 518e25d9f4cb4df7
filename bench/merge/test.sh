#!/bin/sh
# SPDX-License-Identifier: MIT
# test.sh PROGRAM SYNTHETIC LIST: the smallest form of kage-bench-merge passes its own checks and
# reports exactly the rows of the list. It judges no time. The guests are those that
# kage-demo-synthetic makes; the fourth is the first again.
set -u
program=$1
synthetic=$2
list=$3
tmp=$(mktemp -d "${TMPDIR:-/tmp}/kage-bench.XXXXXX") || exit 2
trap 'rm -rf "$tmp"' EXIT

"$synthetic" "$tmp" 32 >"$tmp/log" && cp "$tmp/guest1.ram" "$tmp/guest4.ram" || { cat "$tmp/log" >&2; exit 2; }
"$program" --smoke --guests "$tmp" --json "$tmp/rows.json" || { echo "test.sh: exit status $?" >&2; exit 1; }
sed -n 's,.*"suite":"\([^"]*\)"\,"case":"\([^"]*\)".*,\1/\2,p' "$tmp/rows.json" | LC_ALL=C sort >"$tmp/rows"
sed -n 's,^merge/,&,p' "$list" | LC_ALL=C sort >"$tmp/wanted"
[ -s "$tmp/wanted" ] || { echo "test.sh: no merge/ in $list" >&2; exit 1; }
diff "$tmp/wanted" "$tmp/rows" || { echo "test.sh: rows (>) are not those of $list (<)" >&2; exit 1; }
