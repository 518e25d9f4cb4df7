#!/bin/sh
# SPDX-License-Identifier: MIT
# Runs the spin model of the notifier protocol: the model must hold, and each
# of its mutations (a missing fence, a missing hit ...) must break it.
# Usage: notify_spin.sh engine/notify/notify.pml [full]        exit 77: skipped
# full: both readers install and hold (twice the states and memory).
set -u
unset MALLOC_PERTURB_ # meson sets it; pan's tables are large

cc=${CC:-gcc}
for tool in spin "${cc%% *}" timeout; do
	command -v "$tool" >/dev/null 2>&1 || { echo "skipped: no $tool"; exit 77; }
done
model=$(realpath "$1") || exit 1
full=${2-}
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
cd "$dir" || exit 1

# run <name> <-D...>: result in $errors
run()
{
	name=$1
	shift
	rm -f pan pan.*
	spin -a "$@" "$model" >spin.out 2>&1 || { cat spin.out; exit 1; }
	$cc -O2 -w -DSAFETY -DCOLLAPSE -DMEMLIM=1500 -o pan pan.c || exit 1
	timeout 300 ./pan -m10000 >pan.out 2>&1
	errors=$(sed -n 's/.*errors: \([0-9]*\).*/\1/p' pan.out)
	states=$(sed -n 's/^ *\([0-9.e+]*\) states, stored.*/\1/p' pan.out)
	# an error that is not a violated assertion, or a search that was cut short, is no answer
	if [ -z "$errors" ] || grep -q 'out of memory\|-DMEMLIM bound\|max search depth too small' pan.out; then
		echo "$name: no answer"
		cat pan.out
		exit 1
	fi
	echo "$name: errors $errors, states $states"
}

holds()
{
	run "$@"
	[ "$errors" = 0 ] || { cat pan.out; exit 1; }
}

breaks()
{
	run "$@"
	[ "$errors" != 0 ] && grep -q 'assertion violated' pan.out || { echo "$name: not noticed"; exit 1; }
}

if [ "$full" = full ]; then
	holds two-by-two
else
	holds two-by-two-roles -DROLES
fi
holds torn-looks -DTORN -DCHANGERS=1 -DREADERS=1 -DCHANGES=3 -DSECTIONS=3
holds one-reader -DREADERS=1 -DSECTIONS=2 -DCHANGES=2
holds quiet -DQUIET -DSECTIONS=2 -DCHANGES=2 -DNO_FENCE_A -DNO_HIT
breaks QUIET_EARLY -DQUIET -DQUIET_EARLY -DREADERS=1 -DSECTIONS=2
for m in NO_FENCE_A NO_FENCE_B NO_HIT PLAIN_HIT VALID_EARLY; do
	breaks "$m-install" -D$m -DREADERS=1 -DSECTIONS=2 -DROLES
done
for m in NO_FENCE_A NO_FENCE_B NO_FENCE_C NO_HIT PLAIN_HIT NO_HOLD_WAIT; do
	breaks "$m-any" -D$m -DREADERS=1 -DSECTIONS=2
done
