#!/bin/sh
# SPDX-License-Identifier: MIT
# Builds Kage and its tests for another architecture, or what has changed of them.
#
#   build.sh BUILD CROSS [ARCH]      ARCH: arm64 (default)
#
# BUILD is the build folder, CROSS the folder of sysroot.sh, which makes it. Several may call this at once.
# Exit: 0; 77 with "SKIP: reason and remedy" where something is missing; 1 with what the compiler said.
set -u

[ $# -ge 2 ] || { echo "usage: build.sh BUILD CROSS [ARCH]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
build=$1
cross=$2
for tool in meson ninja flock; do
	command -v $tool >/dev/null 2>&1 || { echo "SKIP: $tool is missing; as root: apt-get install meson ninja-build util-linux"; exit 77; }
done
mkdir -p "$build" || exit 1
exec 9>"$build/lock" && flock 9 || exit 1
sh "$here/sysroot.sh" "$cross" "${3:-arm64}" 9>&- || exit
if [ ! -f "$build/build.ninja" ]; then
	meson setup "$build" "$here/../.." --cross-file "$cross/cross.ini" -Dbench=false >"$build/run.log" 2>&1 9>&- ||
		{ cat "$build/run.log"; exit 1; }
fi
ninja -C "$build" >"$build/run.log" 2>&1 9>&- || { tail -n 60 "$build/run.log"; exit 1; }
rm -f "$build/run.log"
