#!/bin/sh
# SPDX-License-Identifier: MIT
# All benchmarks, against their peers, in one table:
#
#   sh bench/run.sh [--quick] [--json FILE] [--plots DIR] [SUITE...]
#
# SUITE is translate, fault, clone, notify, dirty, merge, kvm, memory or scale; without one: all.
# Builds (release), installs what is missing (as root, with apt-get; else says what to install), runs
# the programs one after the other. --quick: fewer repetitions, smaller guests. --json: every row as
# {suite, case, value, unit, spread, peer, peer_value, ratio, note}, an array. --plots: pictures, by
# gnuplot. What a row means: bench/README.md. Exit: 0; 1 if a row was void, or the rows are not those
# of bench/cases.txt; 2 if it could not run. Environment:
#   KAGE_BUILD      build folder, default build-release
#   KAGE_DEMO_MIB   MiB of a guest that is booted for suite merge, default 160
set -u

all="translate fault clone notify dirty merge kvm memory scale"
quick=
json=
plots=
suites=
usage() { sed -n '3,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
while [ $# -gt 0 ]; do
	case $1 in
	--quick) quick=--quick ;;
	--json) [ $# -gt 1 ] || usage; json=$(absolute "$2"); shift ;;
	--plots) [ $# -gt 1 ] || usage; plots=$(absolute "$2"); shift ;;
	*) case " $all " in *" $1 "*) suites="$suites $1" ;; *) usage ;; esac ;;
	esac
	shift
done
[ -n "$suites" ] || suites=$all
cd "$(dirname "$0")/.." || exit 2
build=${KAGE_BUILD:-build-release}

. tests/packages.sh
wants() { case " $suites " in *" $1 "*) return 0 ;; esac; return 1; }

# Peers and tools of the guests are wanted, and rows are skipped without them; the rest is needed.
find_missing() {
	need_to_build
	needed=$missing
	if wants translate || wants fault; then need_lib unicorn libunicorn-dev; fi
	[ -z "$plots" ] || need gnuplot gnuplot-nox
	if wants merge; then
		need cpio cpio
		need busybox busybox-static
		need qemu-system-x86_64 qemu-system-x86
	fi
}
get_missing

# -- building ----------------------------------------------------------------------------------------

mkdir -p "$build" || exit 2
log=$build/bench.log
rows=$build/bench.rows
rm -f "$rows"
echo "Build ($build/)"
if [ ! -f "$build/build.ninja" ]; then
	meson setup "$build" --buildtype=release >"$log" 2>&1 || { cat "$log" >&2; exit 2; }
elif [ -n "$installed" ]; then
	meson setup --reconfigure "$build" >"$log" 2>&1 || { cat "$log" >&2; exit 2; }
fi
ninja -C "$build" kage-bench-programs >"$log" 2>&1 || { tail -n 40 "$log" >&2; exit 2; }

# -- running -----------------------------------------------------------------------------------------

void=
load() { cut -d ' ' -f 1-3 /proc/loadavg; }

# Rows of a suite that its program could not report.
skip() {
	sed -n "s,^$1/,,p" bench/cases.txt | while read -r name; do
		printf '%-40s %11s %9s %-6s %s\n' "$1/$name" skipped "" - "$2"
		printf '{"suite":"%s","case":"%s","value":null,"unit":"-","spread":null,"peer":null,"peer_value":null,' \
			"$1" "$name" >>"$rows"
		printf '"ratio":null,"note":"skipped: %s"}\n' "$2" >>"$rows"
	done
}

# run SUITE PROGRAM [ARG...]
run() {
	suite=$1
	shift
	start=$(date +%s)
	"$@" --rows "$rows" $quick
	status=$?
	took="$took $suite $(($(date +%s) - start)),"
	case $status in
	0) ;;
	1) void=1 ;;
	77) skip "$suite" "the machine has no KVM that runs the benchmark's guests" ;;
	*) echo "run.sh: $suite: the program gave up" >&2; void=1 ;;
	esac
}

# Guests that are booted for suite merge are there before the clock runs.
if wants merge; then KAGE_BUILD=$build sh bench/merge/run.sh --prepare; fi
machine=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
echo "Machine: $(nproc) CPUs, ${machine:-unknown}, Linux $(uname -r); load $(load)"
begin=$(date +%s)
took=
for suite in $suites; do
	case $suite in
	merge) KAGE_BUILD=$build run merge sh bench/merge/run.sh ${plots:+--plots "$plots"} ;;
	kvm)
		if [ -x "$build/bench/kage-bench-kvm" ]; then
			run kvm "$build/bench/kage-bench-kvm"
		else
			skip kvm "not built: x86-64 with KVM headers and -Dtests=true"
		fi
		;;
	notify) run notify "$build/bench/kage-bench-notify" ;;
	# In one process: the largest guests are the same.
	clone) run clone "$build/bench/kage-bench-core" clone $(if wants memory; then echo memory; fi) ;;
	memory) wants clone || run memory "$build/bench/kage-bench-core" memory ;;
	*) run "$suite" "$build/bench/kage-bench-core" "$suite" ;;
	esac
done
echo

# -- what came out --------------------------------------------------------------------------------------

[ -s "$rows" ] || { echo "run.sh: no rows" >&2; exit 2; }
sed -n 's,^{"suite":"\([^"]*\)"\,"case":"\([^"]*\)".*,\1/\2,p' "$rows" | LC_ALL=C sort >"$log"
for suite in $suites; do sed -n "s,^$suite/,&,p" bench/cases.txt; done | LC_ALL=C sort |
	diff - "$log" || { echo "run.sh: rows (>) are not those of bench/cases.txt (<)" >&2; void=1; }
if [ -n "$json" ]; then
	{ echo '['; sed '$!s/$/,/' "$rows"; echo ']'; } >"$json" || exit 2
	echo "Rows: $json"
fi
[ -z "$plots" ] || sh bench/plots.sh "$rows" "$plots" || void=1
echo "Load $(load); seconds:$took $(($(date +%s) - begin)) in all"
[ -z "$void" ]
