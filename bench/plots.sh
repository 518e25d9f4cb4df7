#!/bin/sh
# SPDX-License-Identifier: MIT
# plots.sh ROWS DIR: pictures of what bench/run.sh wrote, by gnuplot, with their data and scripts.
#
#   ratio-SUITE.svg       how many times better than its peer each row is
#   translate-load.svg    ns of a load over the working set: raw, through Kage, through Unicorn
#   translate-store.svg   the same of a store
#
# Suite merge makes its own (bench/README.md).
set -u
rows=$1
dir=$2
mkdir -p "$dir" || exit 1
command -v gnuplot >/dev/null 2>&1 || { echo "plots: gnuplot is missing: apt-get install gnuplot-nox" >&2; exit 1; }

# suite case value unit spread peer_value ratio, without the skipped and the void ones
string='"([^"]*)"'
sed -nE 's/^\{"suite":'$string',"case":'$string',"value":([0-9][^,]*),"unit":'$string',"spread":([^,]*),"peer":'"(null|$string)"',"peer_value":([^,]*),"ratio":([^,]*),.*/\1 \2 \3 \4 \5 \8 \9/p' "$rows" |
	sed 's/ null/ -/g' >"$dir/rows.dat"
cd "$dir" || exit 1
drawn=

# ratios SUITE: one line a row, from the top
ratios() {
	awk -v suite="$1" '$1 == suite && $7 != "-" { print $2, $7 }' rows.dat >"ratio-$1.dat"
	lines=$(wc -l <"ratio-$1.dat")
	[ "$lines" -gt 0 ] || return 0
	{
		echo "set terminal svg size 760,$((100 + 16 * lines)) dynamic background rgb 'white' font ',11'"
		echo "set output 'ratio-$1.svg'"
		echo "set title '$1: times better than the peer'"
		echo "set logscale x; set yrange [$lines-0.5:-0.5] noreverse; set grid xtics; set key off"
		echo "set arrow from 1,graph 0 to 1,graph 1 nohead lc rgb 'black'"
		echo "plot 'ratio-$1.dat' using (1):0:(\$2-1):(0):ytic(1) with vectors nohead lw 9 lc rgb '#4070b0', \\"
		echo "  '' using (\$2 > 1 ? \$2 : 1):0:(sprintf(' %.3g', \$2)) with labels left font ',9'"
	} >"ratio-$1.gp"
	gnuplot "ratio-$1.gp" && drawn="$drawn ratio-$1.svg"
}

# sets OP: the rows of one kind of access, by working set
sets() {
	awk -v op="$1" '
	function size(s) {
		if (s == "") return 16
		return substr(s, 2) * (s ~ /g$/ ? 1048576 : s ~ /m$/ ? 1024 : 1)
	}
	$1 != "translate" || $4 != "ns" { next }
	match($2, "^hit-" op "(-[0-9]+[kmg])?$") { print size(substr($2, length("hit-" op) + 1)), $3, $6 }
	' rows.dat | sort -n >"translate-$1.dat"
	[ -s "translate-$1.dat" ] || return 0
	{
		echo "set terminal svg size 720,420 dynamic background rgb 'white'"
		echo "set output 'translate-$1.svg'"
		echo "set title 'A $1 of 8 bytes that the TLB answers (throughput)'"
		echo "set xlabel 'working set, KiB'; set ylabel 'ns'; set logscale xy; set grid; set key top left"
		echo "plot 'translate-$1.dat' using 1:3 with linespoints lw 2 title 'raw', \\"
		echo "  '' using 1:2 with linespoints lw 2 title 'Kage'"
	} >"translate-$1.gp"
	gnuplot "translate-$1.gp" && drawn="$drawn translate-$1.svg"
}

for suite in $(cut -d ' ' -f 1 rows.dat | sort -u); do ratios "$suite"; done
sets load
sets store
echo "Plots in $dir:$drawn"
[ -n "$drawn" ]
