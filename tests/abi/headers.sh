#!/bin/sh
# SPDX-License-Identifier: MIT
# Every installed header compiles alone, as C and as C++, and twice in a file.
# usage: headers.sh INCLUDE_DIR
set -u
include=$1
tmp=$(mktemp -d) || exit 2
trap 'rm -rf "$tmp"' EXIT
checks=0
failures=0

try() {
	checks=$((checks + 1))
	if ! "$@" -Wall -Wextra -Wpedantic -Werror -I "$include" -c -o /dev/null; then
		failures=$((failures + 1))
		echo "failed: $*"
	fi
}

found=
for cc in gcc clang; do
	command -v $cc >/dev/null || { echo "SKIP: headers with $cc: it is not installed"; continue; }
	found=1
	for header in "$include"/kage/*.h; do
		name=kage/$(basename "$header")
		printf '#include <%s>\n#include <%s>\nextern int done;\n' "$name" "$name" >"$tmp/alone.c"
		for std in c99 gnu11 gnu17; do
			try $cc -std=$std "$tmp/alone.c"
		done
	done
done
for cxx in g++ clang++; do
	command -v $cxx >/dev/null || { echo "SKIP: headers with $cxx: it is not installed"; continue; }
	found=1
	for header in "$include"/kage/*.h; do
		name=kage/$(basename "$header")
		printf '#include <%s>\n#include <%s>\nextern int done;\n' "$name" "$name" >"$tmp/alone.cpp"
		for std in c++11 c++17 c++20; do
			try $cxx -std=$std "$tmp/alone.cpp"
		done
	done
done
[ -n "$found" ] || { echo "SKIP: no gcc, clang, g++ or clang++"; exit 77; }
echo "headers: $checks compiled, $failures failed"
[ $failures = 0 ]
