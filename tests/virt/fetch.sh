#!/bin/sh
# SPDX-License-Identifier: MIT
# Fetches what a machine of the virt suite boots: Debian's cloud kernel and a static busybox.
#
#   fetch.sh ARCH SUITE DIR      ARCH: amd64, arm64; SUITE: a release of Debian or its backports, by codename
#
# The release is named, so that it is the same kernel whatever release this machine runs: skips stand in lists.
# Leaves in DIR: vmlinuz, vmlinux (if there is a tool to unpack it), modules/*.ko (of KVM), busybox, and
# release, the kernel's name, last. Nothing is installed; what is there is not fetched again.
# Exit: 0; 77 with "SKIP: reason and remedy".
set -u

skip() { echo "SKIP: $*"; exit 77; }
[ $# = 3 ] || { echo "usage: fetch.sh ARCH SUITE DIR" >&2; exit 2; }
arch=$1
suite=$2
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$3" || exit 1
dir=$(cd "$3" && pwd)
command -v flock >/dev/null 2>&1 || skip "flock is missing; as root: apt-get install util-linux"
command -v dpkg-deb >/dev/null 2>&1 || skip "dpkg-deb is missing: kernels are taken out of Debian's packages"

# Several legs may want the same kernel at once.
exec 9>"$dir/lock" && flock 9 || exit 1
[ ! -f "$dir/release" ] || exit 0
tmp=$dir/tmp
rm -rf "$tmp" "$dir/modules"
mkdir -p "$tmp/deb" "$dir/modules" || exit 1
trap 'rm -rf "$tmp"' EXIT

number() { od -An -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' '; }

# vmlinux, out of a bzImage: payload_offset and payload_length of the setup header
# (Documentation/arch/x86/boot.rst); a length of 4 bytes follows the stream.
unpack_vmlinux() {
	at=$((($(number "$1" $((0x1f1)) 1) + 1) * 512 + $(number "$1" $((0x248)) 4)))
	len=$(number "$1" $((0x24c)) 4)
	tail -c +$((at + 1)) "$1" | head -c $((len - 4)) >"$tmp/payload"
	case $(od -An -t x1 -N 4 "$tmp/payload" | tr -d ' ') in
	02214c18) tool=lz4 ;;
	1f8b*) tool=gzip ;;
	fd377a58) tool=xz ;;
	28b52ffd) tool=zstd ;;
	*) return 1 ;;
	esac
	command -v $tool >/dev/null 2>&1 && $tool -dc <"$tmp/payload" >"$2" 2>/dev/null
}

release=${suite%-backports}
meta=linux-image-cloud-$arch
set -- -r "$release" "$arch" "$dir/apt"
if [ "$suite" != "$release" ]; then
	meta=$meta/$suite
	set -- "$@" "$suite"
fi
APT_CONFIG=$(sh "$here/../cross/apt.sh" "$@" 2>"$tmp/log") ||
	skip "$(head -n 1 "$tmp/log"); the virt suite needs a mirror of Debian that has $suite"
export APT_CONFIG
# The version first: `apt-cache depends` knows no suites.
version=$(apt-cache show "$meta" 2>/dev/null | sed -n 's/^Version: //p' | head -n 1)
package=$(apt-cache show "${meta%/*}=$version" 2>/dev/null |
	sed -n 's/^Depends:.*\(linux-image-[0-9][^ ,]*\).*/\1/p' | head -n 1)
[ -n "$package" ] || skip "no package $meta in the archive that this machine uses"
(cd "$tmp/deb" && apt-get -qq download "$package" busybox-static) >"$tmp/log" 2>&1 ||
	skip "cannot download $package and busybox-static for $arch: $(grep -m 1 '^E:' "$tmp/log")"
for deb in "$tmp"/deb/*.deb; do
	dpkg-deb -x "$deb" "$tmp/root" || skip "cannot unpack $deb"
done
release=$(basename "$tmp"/root/boot/vmlinuz-* | sed 's/^vmlinuz-//')
cp "$tmp/root/boot/vmlinuz-$release" "$dir/vmlinuz" || exit 1
rm -f "$dir/vmlinux"
[ "$arch" != amd64 ] || unpack_vmlinux "$dir/vmlinuz" "$dir/vmlinux" || rm -f "$dir/vmlinux"
cp "$tmp/root/bin/busybox" "$dir/busybox" || cp "$tmp/root/usr/bin/busybox" "$dir/busybox" || exit 1
find "$tmp/root" \( -path '*/arch/x86/kvm/*.ko*' -o -name 'irqbypass.ko*' \) -exec cp {} "$dir/modules/" \;
for module in "$dir"/modules/*.ko.xz; do
	[ ! -e "$module" ] || xz -d "$module" || skip "xz is missing; as root: apt-get install xz-utils"
done
echo "$release" >"$dir/release"
