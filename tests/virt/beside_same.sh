#!/bin/sh
# SPDX-License-Identifier: MIT
# How much of some files is the same, page by page, as coreutils see it: beside_same.sh TMPDIR FILE...
# Prints "PAGES DISTINCT ZERO COMMON": see struct kage_census (include/kage/stats.h). TMPDIR has room for one file.
set -eu

dir=$(mktemp -d "$1/same.XXXXXX")
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
shift
number=0
for file; do
	number=$((number + 1))
	mkdir "$dir/pages"
	(cd "$dir/pages" && split -b 4096 -a 5 "$file" && find . -type f | xargs sha256sum) |
		sed "s/ .*/ $number/" >>"$dir/sums"
	rm -rf "$dir/pages"
done
zero=$(head -c 4096 /dev/zero | sha256sum | cut -d' ' -f1)
echo "$(wc -l <"$dir/sums") $(cut -d' ' -f1 "$dir/sums" | sort -u | wc -l) $(grep -c "^$zero" "$dir/sums")" \
	"$(awk '
	!($1 in first) { first[$1] = $2 }
	first[$1] != $2 { both[$1] = 1 }
	{ count[$1]++ }
	END { for (sum in both) common += count[sum]; print common + 0 }' "$dir/sums")"
