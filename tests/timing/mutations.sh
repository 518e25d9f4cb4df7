#!/bin/sh
# SPDX-License-Identifier: MIT
# Would the timing test notice? Breaks hardened merging on purpose, one way at a
# time, in a copy of the tree, and expects the test to fail: with the engine as it is
# it must pass. By hand, on a machine that is idle: minutes.
#
#   sh tests/timing/mutations.sh [NAME...]     from the top of the tree; no names: all
#
# KAGE_TIMING_SAMPLES as for the test. What is broken:
#
#   none       nothing: passes
#   reuse      an access to a page that nobody shares copies next to nothing, as if it took the frame
#   reads      a load from such a page goes through
#   alone      only pages with their like are put out of reach (no "fake merging")
#   drop       the fault looks at the count of the frame that it leaves, and frees it
#   draws      the frame that was given back last is drawn first: what rejects it is a unit test
#   settles    a fault that finds much noted lets go of it: the same; a few accesses among thousands show it, which no sample has
#
# Not among them: frames that stay in the cache after they were read (fused_was_read()). That shows to who accesses a
# page shortly after another guest has read the same frame; here nobody reads a merged frame between the pass, which reads the
# frames of merged and unmerged pages alike, and the one access to each page.
#
# A mutation of code that is not there any more is an error, not a success.
set -u

top=$(pwd)
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
failed=0

# What the last mutation has changed is as it was, and new to ninja.
restore() {
	sort -u "$dir/changed" | while read -r file; do
		cp "$top/$file" "$dir/$file"
	done
	: >"$dir/changed"
}

# change FILE OLD NEW: the text occurs once.
change() {
	echo "$1" >>"$dir/changed"
	python3 - "$dir/$1" "$2" "$3" <<'PY' || { echo "mutations: $1 has changed: correct this script" >&2; exit 1; }
import sys
path, old, new = sys.argv[1:]
text = open(path).read()
if text.count(old) != 1:
    sys.exit(1)
open(path, "w").write(text.replace(old, new))
PY
}

mutate() {
	case $1 in
	none) ;;
	reuse)
		change engine/mm/fault.c 'guest_copy_page(pfn_hva(pool, copy), pfn_hva(pool, from));' \
			'guest_copy(pfn_hva(pool, copy), pfn_hva(pool, from), fused &&
			   READ_ONCE(pfn_frame(pool, from)->refs) == 1 ? CACHE_LINE : PAGE_SIZE);'
		;;
	reads)
		change engine/mm/fault.c 'if (fault_is_spurious(&l, exclusive)) {' 'if (fault_is_spurious(&l, exclusive) ||
	    (!exclusive && entry_is_fused(l.entry) && READ_ONCE(pfn_frame(mm->host->pool, l.pfn)->refs) == 1)) {'
		;;
	alone)
		change engine/merge/hardened.c 'entry_fused(f->into));' 'f->fresh ? entry_leaf(f->into, 0) : entry_fused(f->into));'
		change engine/obs/classify.c 'kind == FRAME_STABLE && entry_is_fused(l->entry) &&' 'kind == FRAME_STABLE &&'
		;;
	drop)
		change engine/mm/fault.c 'fused_gone(w->target.mm->family->tenant, entry_pfn(w->old));' \
			'notes_give_up(w->target.mm->family->tenant->reserve, 1), frame_drop(h, entry_pfn(w->old), &c->dead);'
		;;
	settles)
		change engine/mm/fused.c '		env_due(mm->host->env);' '		mm_reap(mm);'
		;;
	draws)
		change engine/mm/fused.c 'i = random_below(&r->random, n);' 'i = n - 1;'
		;;
	*)
		echo "mutations: no such mutation: $1" >&2
		exit 1
		;;
	esac
}

# Prints what the test found; true: nothing, in a hardened domain. What it finds in one it has to find twice.
try() {
	if [ "$1" = draws ] || [ "$1" = settles ]; then
		ninja -j2 -C "$dir/build" tests/unit/unit-tenant >"$dir/log" 2>&1 || { tail "$dir/log"; exit 1; }
		"$dir/build/tests/unit/unit-tenant" >"$dir/out" 2>&1
		result=$?
		grep ':[FE]:' "$dir/out"
		return $result
	fi
	ninja -j2 -C "$dir/build" tests/timing/timing-merged >"$dir/log" 2>&1 || { tail "$dir/log"; exit 1; }
	"$dir/build/tests/timing/timing-merged" >"$dir/out" 2>&1
	grep hardened "$dir/out"
	for what in loads stores; do
		[ "$(grep -c "hardened $what .*differ" "$dir/out")" -lt 2 ] || return 1
	done
	grep -q 'hardened stores' "$dir/out" || exit 1
}

git -C "$top" ls-files -z engine include backends tests meson.build meson_options.txt README.md |
	(cd "$top" && xargs -0 tar cf -) | tar xf - -C "$dir"
: >"$dir/changed"
meson setup "$dir/build" "$dir" -Dbuildtype=debugoptimized -Dbench=false >"$dir/log" 2>&1 || { tail "$dir/log"; exit 1; }
for name in ${*:-none reuse reads alone drop draws settles}; do
	restore
	mutate "$name"
	echo "mutations: $name"
	if try "$name"; then
		result=passes
	else
		result="is rejected"
	fi
	want="is rejected"
	[ "$name" = none ] && want=passes
	[ "$result" = "$want" ] || failed=1
	echo "mutations: $name $result"
done
exit $failed
