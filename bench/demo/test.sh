#!/bin/sh
# SPDX-License-Identifier: MIT
# Runs the demo on synthetic images: test.sh KAGE-DEMO KAGE-DEMO-SYNTHETIC
# It must pass; with --corrupt, with a wrong digest, and with wrong RAM it must fail in the right place.
set -u

demo=$1
synthetic=$2
dir=$(mktemp -d "${TMPDIR:-/tmp}/kage-demo-test.XXXXXX") || exit 99
trap 'rm -rf "$dir"' EXIT
failed=0

# run STATUS PATTERN ARGUMENTS...: the exit status and a line of the output are as given
run() {
	want=$1
	pattern=$2
	shift 2
	"$demo" --clones 8 --writes 16 "$@" >"$dir/out" 2>&1
	status=$?
	if [ $status -ne "$want" ] || ! grep -q -e "$pattern" "$dir/out"; then
		echo "FAIL: kage-demo $*: status $status, expected $want with '$pattern'"
		cat "$dir/out"
		failed=1
	else
		echo "ok: kage-demo $*: status $status, '$pattern'"
	fi
}

expect() {
	if ! eval "$2"; then
		echo "FAIL: $1"
		cat "$dir/out"
		failed=1
	fi
}

"$synthetic" "$dir" 48 || exit 1
for i in 1 2 3; do sha256sum <"$dir/guest$i.ram" | cut -d' ' -f1 >"$dir/guest$i.sha256"; done
echo "synthetic: test" >"$dir/how"

run 0 'all checks passed' "$dir"
expect "three banners" '[ "$(grep -c "Linux version 0.0.[123]-synthetic" "$dir/out")" = 3 ]'
expect "no failed check" '! grep -q "^   FAIL" "$dir/out"'
expect "merging saved something" 'grep -q "^   saved *[1-9]" "$dir/out"'
expect "a picture with nine panels" '[ "$(grep -c "<g " "$dir/frames.svg")" = 9 ]'

# the SHA-256 without the CPU's help
export KAGE_DEMO_PORTABLE=1
run 0 'all checks passed' "$dir"
unset KAGE_DEMO_PORTABLE

# the merged frame is found to be wrong at the end, and only then
run 1 'FAIL  sha256 proof after everything' --corrupt "$dir"
expect "the proof passed before the corruption" 'grep -q "^   ok *sha256 proof after loading" "$dir/out"'
expect "it names guest 1" 'grep -q "guest 1: sha256 is not that of its RAM file" "$dir/out"'
expect "nothing else failed but what the bit could change" \
	'! grep "^   FAIL" "$dir/out" | grep -v -e "sha256 proof after everything" -e "audit"'

cp "$dir/guest2.sha256" "$dir/keep"
cp "$dir/guest1.sha256" "$dir/guest2.sha256"
run 1 'guest 2: sha256 is not that of its RAM file' "$dir"
cp "$dir/keep" "$dir/guest2.sha256"

printf x | dd of="$dir/guest3.ram" bs=1 seek=30000000 conv=notrunc 2>/dev/null
run 1 'guest 3: sha256 is not that of its RAM file' "$dir"

rm "$dir/guest3.regs"
run 2 'the files of a guest: No such file' "$dir"
run 2 'usage:' --clones 0 "$dir"
exit $failed
