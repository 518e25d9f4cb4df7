#!/bin/sh
# SPDX-License-Identifier: MIT
# test.sh PROGRAM SYNTHETIC LIST: the smallest form of kage-bench-merge, as ../common/test.sh judges
# it. The guests are those that kage-demo-synthetic makes; the fourth is the first again.
set -u
program=$1
synthetic=$2
list=$3
guests=$(mktemp -d "${TMPDIR:-/tmp}/kage-guests.XXXXXX") || exit 2
trap 'rm -rf "$guests"' EXIT

"$synthetic" "$guests" 32 >"$guests/log" && cp "$guests/guest1.ram" "$guests/guest4.ram" ||
	{ cat "$guests/log" >&2; exit 2; }
sh "$(dirname "$0")/../common/test.sh" "$list" merge "$program" --smoke --guests "$guests"
