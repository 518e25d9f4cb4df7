#!/bin/sh
# SPDX-License-Identifier: MIT
# Builds and runs the tests:  sh tests/run.sh [SUITE...]
#
# SUITE is a folder of tests/ (unit, model, flow, stress, lint, abi, ...), demo,
# virt: the KVM suites inside of virtual machines (minutes), asan or tsan: builds
# of their own under a sanitizer, or arm64: a cross build whose tests run under
# QEMU's user-mode emulation. Without one: all of them. Installs what is missing
# (as root, with apt-get; else says what to install). Prints each skip with its
# reason, and as its last line
#     N passed, N failed, N skipped
# A program of Check counts as its cases, any other test as one. Exit: 0, 1 if
# something failed, 2 if nothing could be built. Environment:
#   KAGE_BUILD  build folder, default build; build-asan, build-tsan, build-arm64 and its sysroot
#               build-cross-arm64 lie beside it
#   KAGE_FAST   1: no sanitizer and cross builds unless asked for by name
set -u

cd "$(dirname "$0")/.." || exit 2
build=${KAGE_BUILD:-build}
all=1
plain=
virt=
asan=
tsan=
arm64=
for suite in "$@"; do
	all=
	case $suite in
	asan) asan=1 ;;
	tsan) tsan=1 ;;
	arm64) arm64=1 ;;
	virt) virt=1 ;;
	-*) sed -n '3,/^set/s/^# \{0,1\}//p' tests/run.sh; exit 2 ;;
	*) plain="$plain --suite $suite" ;;
	esac
done
if [ -n "$all" ] && [ "${KAGE_FAST:-}" != 1 ]; then
	asan=1
	tsan=1
	arm64=1
fi
passed=0
failed=0
skipped=0

. tests/packages.sh

# -- what must be there ---------------------------------------------------------

find_missing() {
	need_to_build
	need c++ g++
	need gcc gcc
	need nm binutils
	needed=$missing
	# Without these, tests skip.
	need qemu-system-x86_64 qemu-system-x86
	need qemu-system-aarch64 qemu-system-arm
	need aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu
	need spin spin
	need_lib libvirt libvirt-dev
	need xz xz-utils
	[ -e "/usr/lib/$(uname -m)-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so" ] ||
		missing="$missing libvirt-daemon-driver-qemu"
	getent passwd libvirt-qemu >/dev/null || missing="$missing libvirt-daemon-system"
	have llvm-symbolizer || missing="$missing llvm"
	if ! have clang; then
		missing="$missing clang libclang-rt-dev"
	elif [ -n "$tsan" ] && [ ! -e "$(clang -print-file-name=libclang_rt.tsan-x86_64.a)" ] &&
		[ ! -e "$(clang -print-runtime-dir)/libclang_rt.tsan.a" ]; then
		missing="$missing libclang-rt-dev"
	fi
	if [ -n "$arm64$virt$all" ]; then
		need aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu
		need qemu-aarch64-static qemu-user-static
	fi
}

# -- running --------------------------------------------------------------------

# prepare DIR OPTION... : configures once, builds; log in DIR/run.log
prepare() {
	dir=$1
	shift
	echo "Build ($dir/)"
	mkdir -p "$dir" || return 1
	if [ ! -f "$dir/build.ninja" ]; then
		meson setup "$dir" "$@" >"$dir/run.log" 2>&1 || { cat "$dir/run.log"; return 1; }
	fi
	ninja -C "$dir" >"$dir/run.log" 2>&1 || { tail -n 60 "$dir/run.log"; return 1; }
	rm -f "$dir/run.log"
}

# Adds the results of the last run in DIR: name, reason of each skip and failure.
tally() {
	counts=$(awk -v build="$1" '
	# Escapes inside of strings keep these patterns unambiguous: a quote there has a backslash before it.
	{
		name = $0
		sub(/^\{"name": "/, "", name)
		sub(/", ".*/, "", name)
		result = "ERROR"
		if (match($0, /"result": "[A-Z]+"/))
			result = substr($0, RSTART + 11, RLENGTH - 12)
		cases = bad = skips = 0
		rest = $0
		while (match(rest, /Checks: [0-9]+, Failures: [0-9]+, Errors: [0-9]+/)) {
			split(substr(rest, RSTART, RLENGTH), part, /[^0-9]+/)
			cases += part[2]
			bad += part[3] + part[4]
			rest = substr(rest, RSTART + RLENGTH)
		}
		rest = $0
		gsub(/\\n/, "\n", rest)
		gsub(/"std(out|err)": "/, "\n", rest)
		count = split(rest, line, "\n")
		reason = "(no reason given)"
		for (i = 1; i <= count; i++) {
			# A leg of the virt suite: its skips are those of its list, or it fails.
			if (line[i] ~ /^LEG [^:]*: [0-9]+ passed, [0-9]+ failed, [0-9]+ skipped/) {
				split(line[i], part, /[ ,]+/)
				cases = part[3] + part[5]
				bad = part[5]
				skips += part[7]
			}
			if (line[i] ~ /^(LEG| *REPEATED:) /)
				print substr(line[i], 1, 200) > "/dev/stderr"
			if (line[i] !~ /^(SKIP|skipped): /)
				continue
			reason = line[i]
			sub(/^[^:]*: /, "", reason)
			sub(/".*/, "", reason)
			print "skipped: " name ": " reason > "/dev/stderr"
			skips++
		}
		if (result == "SKIP") {
			if (!skips)
				print "skipped: " name ": " reason > "/dev/stderr"
			skips = skips ? skips : 1
			skipped += skips
			next
		}
		skipped += skips
		if (result == "OK" || result == "EXPECTEDFAIL") {
			passed += cases ? cases : 1
			next
		}
		bad = bad ? bad : 1
		failed += bad
		passed += cases > bad ? cases - bad : 0
		print "FAILED: " name " (" result "), see " build "/meson-logs/testlog.txt" > "/dev/stderr"
		# What it said last of the why: assertions of Check, findings of the audit, lines of scripts.
		for (i = count; i > 0 && said < 12; i--)
			if (line[i] ~ /:[FE]:[A-Za-z_0-9]+:|^(FAIL|FAILED|audit|engine|  BAD|  FAIL)(:| )|Sanitizer/)
				why[++said] = substr(line[i], 1, 300)
		for (; said > 0; said--)
			print "    " why[said] > "/dev/stderr"
	}
	END { print passed + 0, failed + 0, skipped + 0 }' "$1/meson-logs/testlog.json" 2>"$build/run.tally")
	grep -A 12 '^FAILED: ' "$build/run.tally"
	sed "s/^/  /" "$build/run.tally" >>"$build/run.notes"
	rm -f "$build/run.tally"
	# shellcheck disable=SC2086
	set -- $counts
	passed=$((passed + $1))
	failed=$((failed + $2))
	skipped=$((skipped + $3))
}

# run DIR ARGUMENT... : meson test
run() {
	dir=$1
	shift
	rm -f "$dir/meson-logs/testlog.json"
	meson test -C "$dir" --no-rebuild --print-errorlogs "$@" || :
	if [ -s "$dir/meson-logs/testlog.json" ]; then
		tally "$dir"
	else
		could_not "$dir: meson test ran nothing"
	fi
}

could_not() {
	failed=$((failed + 1))
	echo "  FAILED: $*" >>"$build/run.notes"
}
left_out() {
	skipped=$((skipped + 1))
	echo "  skipped: $*" >>"$build/run.notes"
}

# Can CC build and run a program with -fsanitize=WHAT?
sanitizer_works() {
	dir=$(mktemp -d) || return 1
	echo 'int main(void) { return 0; }' >"$dir/t.c"
	"$1" "-fsanitize=$2" "$dir/t.c" -o "$dir/t" >/dev/null 2>&1 && "$dir/t" >/dev/null 2>&1
	works=$?
	rm -rf "$dir"
	return $works
}

run_asan() {
	if ! sanitizer_works gcc address,undefined; then
		left_out "asan: gcc cannot build or run a program with -fsanitize=address,undefined"
		return
	fi
	prepare "$build-asan" -Db_sanitize=address,undefined -Db_lundef=false -Dbench=false ||
		{ could_not "$build-asan does not build"; return; }
	echo "Tests under ASan and UBSan, short forms"
	ASAN_OPTIONS=detect_stack_use_after_return=0:abort_on_error=0 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	KAGE_STEPS=500 \
		run "$build-asan" --suite unit --suite model --suite flow --suite stress -t 3
}

run_tsan() {
	if ! have clang || ! sanitizer_works clang thread; then
		left_out "tsan: no clang that can build and run a program with -fsanitize=thread"
		return
	fi
	CC=clang prepare "$build-tsan" -Db_sanitize=thread -Db_lundef=false -Dbench=false ||
		{ could_not "$build-tsan does not build"; return; }
	echo "Tests under TSan, short forms"
	TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 \
		run "$build-tsan" --suite unit --suite stress -t 3
}

# run_arm64 and the arm64 legs of the virt suite need it. Says why not.
prepare_arm64() {
	echo "Build ($build-arm64/)"
	sh tests/cross/build.sh "$build-arm64" "$build-cross-arm64" >"$build/run.log" 2>&1
	case $? in
	0) rm -f "$build/run.log"; return 0 ;;
	77) left_out "arm64: $(sed -n 's/^SKIP: //p' "$build/run.log")" ;;
	*) cat "$build/run.log"; could_not "$build-arm64 does not build" ;;
	esac
	return 1
}

# The engine as an arm64 host has it, short forms: emulation is slow.
run_arm64() {
	prepare_arm64 || return
	echo "Tests on arm64, under QEMU's user-mode emulation, short forms"
	KAGE_SEQUENCES=5 KAGE_STEPS=300 KAGE_ROUNDS=2 KAGE_SHORT=1 \
		run "$build-arm64" --suite unit --suite model --suite flow -t 4
}

# Legs run beside each other, one more than there are CPUs: an emulated machine often waits.
run_virt() {
	prepare "$build" || { could_not "$build does not build"; return; }
	prepare_arm64 # without it legs skip, and say what is missing
	echo "The KVM suites inside of virtual machines"
	run "$build" --suite virt --num-processes "$(($(nproc) + 1))"
}

begin=$(date +%s)
mkdir -p "$build" && : >"$build/run.notes" || exit 2
get_missing

if [ -n "$all" ] || [ -n "$plain" ]; then
	if prepare "$build"; then
		echo "Tests"
		# shellcheck disable=SC2086
		run "$build" ${plain:---no-suite virt}
	else
		could_not "$build does not build"
	fi
fi
[ -z "$asan" ] || run_asan
[ -z "$tsan" ] || run_tsan
[ -z "$arm64" ] || run_arm64
[ -z "$all$virt" ] || run_virt

echo
echo "tests/run.sh: $(($(date +%s) - begin)) s"
cat "$build/run.notes"
rm -f "$build/run.notes"
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
