# SPDX-License-Identifier: MIT
# To be sourced: what a script needs of the system, and installing it. tests/run.sh, bench/run.sh and bench/demo.sh do.
#
#   have COMMAND            whether it is there
#   need COMMAND PACKAGE    adds the package to $missing unless it is
#   need_lib MODULE PACKAGE the same of a library, as pkg-config knows it
#   need_to_build           the same of all that every build needs
#   get_missing             installs what is missing: as root, with apt-get; else says what to install
#
# The script defines find_missing, which collects in $missing the names of Debian's packages, and leaves in $needed those
# without which it cannot go on: get_missing ends it with 2 then. What else cannot be had the script does without.
# $installed is not empty afterwards if something was installed.

missing=
needed=
installed=

have() { command -v "$1" >/dev/null 2>&1; }
need() { have "$1" || missing="$missing $2"; }
need_lib() { pkg-config --exists "$1" 2>/dev/null || missing="$missing $2"; }

need_to_build() {
	{ have gcc || have cc; } && [ -e /usr/include/stdio.h ] || missing="$missing gcc libc6-dev"
	need meson meson
	need ninja ninja-build
	need pkg-config pkg-config
	need_lib liburcu-memb liburcu-dev
	need_lib libxxhash libxxhash-dev
	need_lib check check
}

# One by one: what a script can do without must not hold up the rest. No daemon is started, and what says so to apt-get
# goes with the script, however it ends.
install_missing() {
	echo "Installing:$missing"
	apt-get -qq update >/dev/null
	policy=/usr/sbin/policy-rc.d
	if [ ! -e $policy ]; then
		trap 'rm -f /usr/sbin/policy-rc.d' EXIT
		trap 'exit 129' HUP
		trap 'exit 130' INT
		trap 'exit 143' TERM
		printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy
	else
		policy=
	fi
	for package in $missing; do
		said=$(DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "$package" 2>&1) ||
			{ echo "  cannot install $package:"; printf '%s\n' "$said" | tail -n 3; } >&2
	done
	if [ -n "$policy" ]; then
		rm -f $policy
		trap - EXIT HUP INT TERM
	fi
}

get_missing() {
	missing=
	find_missing
	if [ -n "$missing" ] && [ "$(id -u)" = 0 ] && have apt-get; then
		install_missing
		installed=1
		missing=
		find_missing
	elif [ -n "$missing" ]; then
		echo "Missing; as root: apt-get install$missing" >&2
	fi
	[ -z "$needed" ] || { echo "$0: cannot build without:$needed" >&2; exit 2; }
}
