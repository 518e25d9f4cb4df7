#!/bin/sh
# SPDX-License-Identifier: MIT
# What a run that was killed leaves is ended by the next one, wherever that one writes to; what a live run has is not.
#
#   leftovers.sh VIRT-LEG
#
# QEMU is played by a shell of another name that waits. Its arguments name a file of its run's folder, as QEMU's do.
set -u

leg=$1
id=$(id -u)-test$$
tmp=$(mktemp -d) || exit 1
dead=/tmp/kage-virt-$id-dead
live=/tmp/kage-virt-$id-live
gone=/tmp/kage-virt-$id-gone
pids=
end() {
	# shellcheck disable=SC2086
	kill $pids 2>/dev/null
	rm -rf "$tmp" "$dead" "$live" "$gone"
}
trap end EXIT
trap 'exit 1' HUP INT TERM
fail() { echo "FAIL: $*"; exit 1; }

ln -s "$(command -v sh)" "$tmp/qemu-system-fake"
mkfifo "$tmp/fifo"
mkdir "$dead" "$live" "$gone" "$tmp/out"
# Open at both ends: nothing ever comes, and it does not end.
exec 3<>"$tmp/fifo"

# shellcheck disable=SC2016
for root in "$dead" "$live" "$gone"; do
	"$tmp/qemu-system-fake" -c 'read -r _ <&3' sh "$root/lib/monitor" &
	pids="$pids $!"
done
# shellcheck disable=SC2086
set -- $pids
echo "$tmp/out" >"$dead/of"
printf %s "$tmp/nowhere" >"$gone/of"
printf %s "$tmp/nowhere" >"$live/of"
(flock 9 && echo held >"$tmp/held" && read -r _ <&3) 9>"$live/lock" &
pids="$pids $!"
for _ in 1 2 3 4 5 6 7 8 9 10; do
	[ -s "$tmp/held" ] || sleep 1
done
[ -s "$tmp/held" ] || fail "the live run's lock could not be taken"

said=$("$leg" -k) || fail "virt-leg -k"
echo "$said"
wait "$1"
[ $? = 137 ] || fail "the machine of a run that was killed lives on"
wait "$3"
[ $? = 137 ] || fail "the machine of a run whose folder has gone lives on"
kill -0 "$2" || fail "the machine of a live run was killed"
[ -e "$dead/lock" ] || fail "a folder was removed whose owner may come back"
[ ! -e "$gone" ] || fail "a folder was left that nobody comes back to"
[ -e "$live/of" ] || fail "a live run's folder was removed"

