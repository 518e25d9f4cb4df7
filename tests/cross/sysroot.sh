#!/bin/sh
# SPDX-License-Identifier: MIT
# A sysroot of another architecture to build and run Kage's tests in, and meson's cross file for it.
#
#   sysroot.sh DIR [ARCH]         ARCH: arm64 (default)
#
# Fetches the C library and the libraries that Kage and its tests use, with what they depend on,
# through apt.sh, and unpacks them into DIR/sysroot: shared and static libraries, headers. Installs
# nothing and needs no root. Writes DIR/cross.ini out of aarch64.ini, so that
#
#   sh tests/cross/sysroot.sh build/cross-arm64
#   meson setup --cross-file build/cross-arm64/cross.ini build-arm64
#   meson test -C build-arm64 --suite unit
#
# builds with aarch64-linux-gnu-gcc and runs the tests under qemu-aarch64-static. What it has fetched once
# it does not fetch again. Exit: 0; 77 with "SKIP: reason and remedy" where something is missing.
#   KAGE_CROSS_PACKAGES   further packages for the sysroot
set -u

skip() { echo "SKIP: $*"; exit 77; }
[ $# -ge 1 ] || { echo "usage: sysroot.sh DIR [ARCH]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
arch=${2:-arm64}
case $arch in
arm64) cpu=aarch64 ;;
*) skip "no cross file for $arch, only for arm64" ;;
esac
mkdir -p "$1" || exit 2
dir=$(cd "$1" && pwd)
packages="libc6-dev linux-libc-dev check liburcu-dev libxxhash-dev liblz4-dev ${KAGE_CROSS_PACKAGES:-}"

have() { command -v "$1" >/dev/null 2>&1; }
have $cpu-linux-gnu-gcc || skip "no $cpu-linux-gnu-gcc; as root: apt-get install gcc-$cpu-linux-gnu"
have qemu-$cpu-static || skip "no qemu-$cpu-static to run $arch programs; as root: apt-get install qemu-user-static"
have dpkg-deb || skip "no dpkg-deb to unpack packages with"

fetch() {
	APT_CONFIG=$(sh "$here/apt.sh" "$arch" "$dir/apt" 2>"$dir/log") || skip "$(cat "$dir/log")"
	export APT_CONFIG
	# mawk: one of the awks that check depends on, the smallest.
	# shellcheck disable=SC2086
	apt-get -qq -y --download-only install mawk $packages >"$dir/log" 2>&1 ||
		skip "cannot fetch $arch packages (network?): $(grep '^E:' "$dir/log" | head -n 1)"
	rm -rf "$dir/sysroot"
	mkdir -p "$dir/sysroot"
	for deb in "$dir"/apt/cache/archives/*.deb; do
		dpkg-deb -x "$deb" "$dir/sysroot" || skip "cannot unpack $deb"
	done
}

# An absolute link would lead out of the sysroot.
mend_links() {
	find "$dir/sysroot" -type l | while read -r link; do
		to=$(readlink "$link")
		case $to in
		/*) ln -sfn "$dir/sysroot$to" "$link" ;;
		esac
	done
}

if [ "$(cat "$dir/packages" 2>/dev/null)" != "$packages" ]; then
	rm -f "$dir/packages"
	fetch
	mend_links
	echo "$packages" >"$dir/packages"
fi
sed -e "s|@SYSROOT@|$dir/sysroot|g" -e "s|@QEMU@|$(command -v qemu-$cpu-static)|g" "$here/$cpu.ini" >"$dir/cross.ini"
