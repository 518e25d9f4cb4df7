#!/bin/sh
# SPDX-License-Identifier: MIT
# What a compiler does not check.
# usage: style.sh ROOT
#
# All text: no trailing blanks, no marks of unfinished work, no path of a
# developer's machine. Sources and scripts: an SPDX line first (second after #!).
# C: no function over 80 lines. engine/ and backends/: memory only from
# env_alloc(), nothing that prints or ends the process, assertions only through
# kage_assert(). Prints each violation; exits 1 if any.
set -u
code=$(cat "$(dirname "$0")/code.awk") || exit 2
root=$1

cd "$root" || exit 2
find . \( -name '.git' -o -name 'build*' -o -name '.cache' \) -prune -o -type f \
	\( -name '*.[ch]' -o -name '*.cpp' -o -name '*.cc' -o -name '*.sh' -o -name '*.awk' -o -name '*.md' \
	-o -name 'meson*' -o -name '*.txt' -o -name '*.map' -o -name '*.S' -o -name '*.pml' -o -path './.ci/*' \) -print |
	sed 's,^\./,,' | LC_ALL=C sort | xargs awk "$code"'
function bad(text) {
	printf "%s:%d: %s\n", FILENAME, FNR, text
	failures++
}
function close_file() {
	if (needs_spdx && !spdx) {
		printf "%s:1: no SPDX-License-Identifier line\n", last
		failures++
	}
}
FNR == 1 {
	close_file()
	last = FILENAME
	files++
	is_c = FILENAME ~ /\.([ch]|cc|cpp)$/
	is_library = is_c && FILENAME ~ /^(engine|backends)\//
	needs_spdx = is_c || FILENAME ~ /\.(sh|awk|S|pml)$/ || FILENAME ~ /^\.ci\//
	spdx = in_comment = body = 0
}
FNR <= 2 && /SPDX-License-Identifier: / { spdx = 1 }
/[ \t\r]$/ { bad("trailing blanks") }
/(^|[^A-Za-z0-9_])(T[O]DO|FIX[M]E|X[X]X)([^A-Za-z0-9_]|$)/ || tolower($0) ~ /(^|[^a-z])for no[w]([^a-z]|$)/ {
	bad("a mark of unfinished work")
}
/(^|[ \t"(=<:`])\/(home|work)\// || /(^|[ \t(=<:`])\/roo[t]\// { bad("a path of a developer machine") }
is_c && /^\{[ \t]*$/ { body = FNR }
is_c && /^\}/ {
	if (body && FNR - body + 1 > 80)
		bad("a function of " FNR - body + 1 " lines")
	body = 0
}
is_library {
	text = code($0)
	if (text ~ /(^|[^A-Za-z0-9_])(malloc|calloc|realloc|reallocarray|strdup|strndup|asprintf|posix_memalign|aligned_alloc)[ \t]*\(/ &&
	    FILENAME != "engine/base/env.c")
		bad("memory that is not from env_alloc()")
	if (text ~ /(^|[^A-Za-z0-9_])(printf|fprintf|vprintf|vfprintf|puts|fputs|perror)[ \t]*\(/)
		bad("the library prints nothing")
	if (text ~ /(^|[^A-Za-z0-9_])(abort|exit|_exit)[ \t]*\(/)
		bad("the library does not end the process")
	if (text ~ /(^|[^A-Za-z0-9_])assert[ \t]*\(/ && !(FILENAME == "engine/base/base.h" && text ~ /kage_assert/))
		bad("assert() outside kage_assert()")
}
END {
	close_file()
	if (failures)
		exit 1
	printf "style: %d files\n", files
}'
status=$?
[ $status = 123 ] && status=1
exit $status
