#!/bin/sh
# SPDX-License-Identifier: MIT
# Holds the #includes of engine/ and backends/ to the layer graph.
# usage: layers.sh GRAPH ROOT
#
# Rules: a quoted include is "folder/file.h", rooted at engine/ or backends/,
# or "file.h" beside the including file; its folder is one that the graph lets
# the including folder see; private.h and internal.h are for their own folder;
# kage/backend.h is for api and backends. Prints each violation; exits 1 if any.
set -u
graph=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
root=$2

cd "$root" || exit 2
find engine backends -type f \( -name '*.c' -o -name '*.h' \) 2>/dev/null | LC_ALL=C sort |
	xargs awk -v graph="$graph" '
function bad(text) {
	printf "%s:%d: %s\n", FILENAME, FNR, text
	failures++
}
# The node of the graph that a file below engine/ or backends/ belongs to.
function node(file,    part) {
	split(file, part, "/")
	return part[1] == "backends" ? "backends" : part[2]
}
BEGIN {
	while ((getline line < graph) > 0) {
		if (line ~ /^#/ || line !~ /:/)
			continue
		name = line
		sub(/:.*/, "", name)
		sub(/^[^:]*:/, "", line)
		known[name] = 1
		count = split(line, part, " ")
		for (i = 1; i <= count; i++)
			may[name, part[i]] = 1
	}
}
FNR == 1 {
	files++
	self = node(FILENAME)
	split(FILENAME, part, "/")
	folder = part[2]
	if (!(self in known))
		bad("folder \"" self "\" is not in the layer graph")
}
/^[ \t]*#[ \t]*include[ \t]*<kage\/backend\.h>/ && self != "api" && self != "backends" {
	bad("kage/backend.h is for backends")
}
/^[ \t]*#[ \t]*include[ \t]*"/ {
	header = $0
	sub(/^[^"]*"/, "", header)
	sub(/".*/, "", header)
	if (header ~ /^\// || header ~ /\.\./) {
		bad("include \"" header "\" is not rooted at engine/ or backends/")
		next
	}
	if (header !~ /\//)
		next
	target = header
	sub(/\/.*/, "", target)
	if (target == folder)
		next
	if (!(target in known)) {
		bad(self " includes \"" header "\": not a folder that it may see")
		next
	}
	if (!((self, target) in may))
		bad(self " may not include " target " (\"" header "\")")
	else if (header ~ /\/(private|internal)\.h$/)
		bad("\"" header "\" is for " target " alone")
}
END {
	if (failures)
		exit 1
	printf "layers: %d files obey the graph\n", files
}'
status=$?
[ $status = 123 ] && status=1
exit $status
