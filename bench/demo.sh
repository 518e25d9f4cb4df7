#!/bin/sh
# SPDX-License-Identifier: MIT
# The engine's main job on the memory of three real Linux guests, in about a minute, and on a
# running guest of KVM, where there is KVM:
#
#   sh bench/demo.sh [--corrupt] [--clones N] [--writes N] [--svg FILE]
#
# Installs what is missing (as root; else says what to install), builds into
# build/, boots the guests (bench/demo/guests.sh), runs kage-demo on their memory.
# Exit: 0, 1 if a check failed, 2 if something could not be done. Environment:
#   KAGE_BUILD           build folder, default build
#   KAGE_DEMO_SYNTHETIC  1: generated images instead of guests; never: fail where there are no guests
#   KAGE_DEMO_REUSE      1: use the images of the last run
#   KAGE_DEMO_MIB        MiB of a guest, default 160
set -u

cd "$(dirname "$0")/.." || exit 2
build=${KAGE_BUILD:-build}
begin=$(date +%s)

. tests/packages.sh
# The guests' tools are wanted, the others needed.
find_missing() {
	need_to_build
	needed=$missing
	if [ "${KAGE_DEMO_SYNTHETIC:-}" != 1 ]; then
		need cpio cpio
		need busybox busybox-static
		need qemu-system-x86_64 qemu-system-x86
	fi
}
get_missing

echo "Build ($build/)"
mkdir -p "$build" || exit 2
[ -f "$build/build.ninja" ] || meson setup "$build" >"$build/demo.log" 2>&1 ||
	{ cat "$build/demo.log" >&2; exit 2; }
ninja -C "$build" kage-demo-programs >"$build/demo.log" 2>&1 || { cat "$build/demo.log" >&2; exit 2; }

guests=$build/demo
if [ "${KAGE_DEMO_REUSE:-}" = 1 ] && [ -f "$guests/how" ]; then
	echo "Guests: those of the last run ($guests/)"
else
	echo "Guests"
	sh bench/demo/guests.sh "$build/bench" "$guests" || exit 2
fi

"$build/bench/kage-demo" "$@" "$guests"
status=$?
if [ $status = 0 ]; then
	if [ -x "$build/bench/kage-demo-kvm" ]; then
		"$build/bench/kage-demo-kvm"
		status=$?
		[ $status != 77 ] || status=0
	else
		printf '\nKVM: left out: not built (x86-64, KVM headers, -Dtests=true)\n'
	fi
fi
echo "demo.sh: $(($(date +%s) - begin)) s in all"
exit $status
