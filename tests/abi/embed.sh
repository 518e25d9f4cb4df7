#!/bin/sh
# SPDX-License-Identifier: MIT
# Programs outside the tree: installs the library into an empty prefix, copies
# tests/abi/embed away from the sources, and builds there with what pkg-config
# says: C and C++, shared and static, with and without optimisation; and once
# against the build folder. Runs all of them.
# usage: embed.sh SOURCE_DIR BUILD_DIR CC CXX   (CXX may be empty)
set -u
source=$1
build=$2
cc=$3
cxx=$4
tmp=$(mktemp -d) || exit 2
trap 'rm -rf "$tmp"' EXIT
checks=0
failures=0

fail() {
	failures=$((failures + 1))
	echo "FAILED: $*"
}

meson install -C "$build" --no-rebuild --quiet --destdir "$tmp/root" >"$tmp/log" 2>&1 ||
	{ cat "$tmp/log"; echo "meson install failed"; exit 1; }
pc=$(find "$tmp/root" -name kage.pc)
[ -n "$pc" ] || { echo "no kage.pc was installed"; exit 1; }
prefix=$tmp/root$(sed -n 's/^prefix=//p' "$pc")
PKG_CONFIG_PATH=$(dirname "$pc")
export PKG_CONFIG_PATH
pkg() { pkg-config --define-variable=prefix="$prefix" "$@" kage; }
libdir=$(pkg --variable=libdir)

# Exactly the headers of include/kage are installed.
checks=$((checks + 1))
ls "$source/include/kage" >"$tmp/want"
ls "$prefix/include/kage" >"$tmp/got"
diff "$tmp/want" "$tmp/got" || fail "the installed headers are not those of include/kage"
checks=$((checks + 1))
[ "$(pkg --modversion)" = "$(sed -n "s/^ *version: '\(.*\)',$/\1/p" "$source/meson.build" | head -n 1)" ] ||
	fail "kage.pc has another version than meson.build"

mkdir "$tmp/out"
cp "$source"/tests/abi/embed/* "$source/tests/common/leak.h" "$tmp/out/"
cd "$tmp/out" || exit 2

# attempt NAME COMPILER... : builds the program and runs it
attempt() {
	name=$1
	shift
	checks=$((checks + 1))
	rm -f ./program
	if ! "$@" -o program >"$tmp/log" 2>&1; then
		fail "$name does not build: $*"
		cat "$tmp/log"
	elif timeout 120 ./program >"$tmp/log" 2>&1; then
		echo "$name: $(tail -n 1 "$tmp/log")"
	else
		fail "$name: exit status $?"
		cat "$tmp/log"
	fi
}

strict='-Wall -Wextra -Werror'
LD_LIBRARY_PATH=$libdir
export LD_LIBRARY_PATH
# What pkg-config prints is meant to be split.
# shellcheck disable=SC2046,SC2086
{
	for o in -O0 -O2; do
		attempt "C $o shared" $cc -std=gnu11 $strict $o -pthread embed.c $(pkg --cflags --libs)
		attempt "backend $o shared" $cc -std=gnu11 $strict $o -pthread backend.c $(pkg --cflags --libs)
		[ -z "$cxx" ] ||
			attempt "C++ $o shared" $cxx -std=c++17 $strict $o -pthread embed.cpp $(pkg --cflags --libs)
	done
	unset LD_LIBRARY_PATH
	attempt "C static" $cc -std=gnu11 $strict -O2 -static -pthread embed.c $(pkg --static --cflags --libs)
	attempt "backend static" $cc -std=gnu11 $strict -O2 -static -pthread backend.c $(pkg --static --cflags --libs)
	[ -z "$cxx" ] ||
		attempt "C++ static" $cxx -std=c++17 $strict -O2 -static -pthread embed.cpp $(pkg --static --cflags --libs)
	attempt "C, libkage.a, the rest shared" $cc -std=gnu11 $strict -O2 -pthread embed.c $(pkg --cflags) \
		"$libdir/libkage.a" $(pkg-config --libs liburcu-memb libxxhash)

	PKG_CONFIG_PATH=$build/meson-uninstalled
	LD_LIBRARY_PATH=$build
	export LD_LIBRARY_PATH
	attempt "C, not installed" $cc -std=gnu11 $strict -O2 -pthread embed.c $(pkg-config --cflags --libs kage)
}
[ -n "$cxx" ] || echo "SKIP: the C++ program: no C++ compiler"

echo "embed: $checks checks, $failures failed"
[ $failures = 0 ]
