#!/bin/sh
# SPDX-License-Identifier: MIT
# Merging against ksmd, with real guests:
#
#   sh bench/merge/run.sh [options and suites of kage-bench-merge]
#
# Builds (release), makes four guests as the demo does if there are none, runs.
# With --prepare it stops before it runs. Without QEMU or a kernel the guests are generated images; it says so. Environment:
#   KAGE_BUILD         build folder, default build-release
#   KAGE_DEMO_MIB      MiB of a guest, default 160
set -u

cd "$(dirname "$0")/../.." || exit 2
build=${KAGE_BUILD:-build-release}
guests=$build/demo-merge

[ -f "$build/build.ninja" ] || meson setup "$build" --buildtype=release >/dev/null || exit 2
ninja -C "$build" kage-demo-programs bench/kage-bench-merge >/dev/null || exit 2
if [ ! -f "$guests/how" ] || [ ! -f "$guests/guest4.ram" ]; then
	KAGE_DEMO_GUESTS=4 sh bench/demo/guests.sh "$build/bench" "$guests" || exit 2
	# generated images are three: the first comes again
	[ -f "$guests/guest4.ram" ] || cp "$guests/guest1.ram" "$guests/guest4.ram" || exit 2
fi
[ "${1:-}" != --prepare ] || exit 0
echo "Guests: $(cat "$guests/how")"
exec "$build/bench/kage-bench-merge" --guests "$guests" "$@"
