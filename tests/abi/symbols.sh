#!/bin/sh
# SPDX-License-Identifier: MIT
# The library exports what the headers declare, what symbols.txt lists, and no more.
# usage: symbols.sh INCLUDE_DIR LIBKAGE.so LIBKAGE.a
set -u
include=$1
shared=$2
static=$3
here=$(cd "$(dirname "$0")" && pwd)
tmp=$(mktemp -d) || exit 2
trap 'rm -rf "$tmp"' EXIT
failures=0

same() {
	if ! diff -u "$here/symbols.txt" "$2" >"$tmp/diff"; then
		failures=$((failures + 1))
		echo "$1: not what tests/abi/symbols.txt says"
		cat "$tmp/diff"
	fi
}

sh "$here/names.sh" "$include" >"$tmp/headers" || exit 2
if [ "$(cat "$include"/kage/*.h | grep -c "^KAGE_API")" != "$(wc -l <"$tmp/headers")" ]; then
	failures=1
	echo "a KAGE_API line whose name tests/abi/names.sh does not find"
fi
same "headers" "$tmp/headers"

# The version node itself is an absolute symbol.
nm -D --defined-only "$shared" | awk '$2 != "A" { sub(/@.*/, "", $3); print $3 }' | LC_ALL=C sort >"$tmp/shared"
same "$shared" "$tmp/shared"

nm -D --defined-only --with-symbol-versions "$shared" | awk '$2 != "A" && $3 !~ /@@KAGE_0\.1$/' >"$tmp/unversioned"
if [ -s "$tmp/unversioned" ]; then
	failures=$((failures + 1))
	echo "$shared: symbols without the version KAGE_0.1:"
	cat "$tmp/unversioned"
fi

nm -g --defined-only "$static" | awk 'NF == 3 { print $3 }' | LC_ALL=C sort >"$tmp/static"
same "$static" "$tmp/static"

echo "symbols: $(wc -l <"$here/symbols.txt") functions"
[ $failures = 0 ]
