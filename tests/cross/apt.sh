#!/bin/sh
# SPDX-License-Identifier: MIT
# Packages of another architecture without telling dpkg about it: an apt of its own.
#
#   apt.sh [-r RELEASE] ARCH STATE [SUITE...]
#
# Makes the folder STATE: sources, lists and cache of an apt that knows packages of ARCH
# (Debian's name: arm64, amd64) only and believes that nothing is installed. The machine's
# mirrors are used; SUITE names further suites of the same archive (bookworm-backports). With -r it is the archive of
# RELEASE (bookworm), whatever the machine itself runs.
# Prints the path of an apt.conf; what uses it sees that archive and changes nothing on this machine:
#
#   APT_CONFIG=$(sh tests/cross/apt.sh arm64 build/apt-arm64) || exit
#   export APT_CONFIG
#   (cd build && apt-get download busybox-static) && dpkg-deb -x build/busybox-static_*_arm64.deb build/root
#
# Needs no root. Lists are fetched again when they are older than a day. Exit: 0, or 1 with the reason.
set -u

die() { echo "apt.sh: $*" >&2; exit 1; }
release=
if [ "${1:-}" = -r ]; then
	release=${2:-}
	shift 2
fi
[ $# -ge 2 ] || die "usage: apt.sh [-r RELEASE] ARCH STATE [SUITE...]"
arch=$1
mkdir -p "$2/lists/partial" "$2/cache/archives/partial" || die "cannot make $2"
state=$(cd "$2" && pwd) || exit 1
shift 2
command -v apt-get >/dev/null 2>&1 || die "no apt-get: packages of Debian are not to be had here"

# The machine's own mirrors, those of Debian only: REPOSITORY SUITE COMPONENT, one a line.
# shellcheck disable=SC2016
mirrors() {
	(unset APT_CONFIG; apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' \
		'Created-By: Packages' 'Origin: Debian' 2>/dev/null) | grep ' main$' | sort -u
}

sources() {
	keys=/usr/share/keyrings/debian-archive-keyring.gpg
	options=
	[ ! -f $keys ] || options="[signed-by=$keys] "
	list=$(mirrors)
	if [ -z "$list" ]; then
		# shellcheck disable=SC1091
		codename=$(. /etc/os-release && [ "$ID" = debian ] && echo "${VERSION_CODENAME:-}")
		[ -n "$codename" ] || die "this is not Debian: no archive to fetch $arch packages from"
		list="http://deb.debian.org/debian $codename main"
	fi
	main=$(echo "$list" | sed -n 's/^\([^ ]*\) .*/\1/p' | grep -v security | head -n 1)
	[ -n "$main" ] || [ -z "$release$*" ] || die "this machine has no mirror of Debian but one of security updates"
	if [ -n "$release" ]; then
		own=$(echo "$list" | grep "^[^ ]* $release\(-security\|-updates\|\) ")
		# Another release than the machine's: what has the same name at the same mirror.
		list=${own:-"$main $release main"}
	fi
	echo "$list" | sed "s|^|deb $options|"
	for suite in "$@"; do
		echo "deb ${options}$main $suite main"
	done
}

list=$(sources "$@") || exit 1
echo "$list" >"$state/sources.new"
cat >"$state/apt.conf" <<EOF
APT::Architecture "$arch";
APT::Architectures { "$arch"; };
APT::Install-Recommends "false";
APT::Sandbox::User "$(id -un)";
Dir::State "$state";
Dir::State::Lists "$state/lists";
Dir::State::status "$state/status";
Dir::Cache "$state/cache";
Dir::Etc::SourceList "$state/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
EOF
: >"$state/status"

if ! cmp -s "$state/sources.new" "$state/sources.list" || [ -z "$(find "$state/updated" -mtime -1 2>/dev/null)" ]; then
	mv "$state/sources.new" "$state/sources.list"
	rm -f "$state/updated"
	APT_CONFIG=$state/apt.conf apt-get -qq update >"$state/log" 2>&1 ||
		die "apt-get update: $(grep '^[EW]:' "$state/log" | head -n 1)"
	: >"$state/updated"
fi
echo "$state/apt.conf"
