#!/bin/sh
# SPDX-License-Identifier: MIT
# The C sample of README.md compiles without a warning, runs, and prints what
# the README says it prints.
# usage: readme.sh SOURCE_DIR BUILD_DIR CC
set -u
source=$1
build=$2
cc=$3
tmp=$(mktemp -d) || exit 2
trap 'rm -rf "$tmp"' EXIT

sed -n '/^```c$/,/^```$/p' "$source/README.md" | sed '/^```/d' >"$tmp/sample.c"
lines=$(wc -l <"$tmp/sample.c")
[ "$lines" -gt 15 ] && [ "$lines" -le 25 ] || { echo "the sample has $lines lines, wanted 16 to 25"; exit 1; }
want=$(sed -n 's/^It prints `\(.*\)`\..*/\1/p' "$source/README.md")
[ -n "$want" ] || { echo "README.md does not say what the sample prints"; exit 1; }

for o in -O0 -O2; do
	"$cc" -std=gnu11 -Wall -Wextra -Werror $o -I "$source/include" "$tmp/sample.c" \
		-L "$build" -lkage -Wl,-rpath,"$build" -o "$tmp/sample" || exit 1
	got=$("$tmp/sample") || { echo "the sample exits with $?"; exit 1; }
	[ "$got" = "$want" ] || { echo "the sample prints \"$got\", README.md says \"$want\""; exit 1; }
done
echo "readme: $lines lines, prints: $got"
