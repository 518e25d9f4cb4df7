#!/bin/sh
# SPDX-License-Identifier: MIT
# Plants one violation of each kind in a small tree and sees that it is caught,
# and that the tree without it is clean.
# usage: selftest.sh CC
set -u
cc=$1
here=$(cd "$(dirname "$0")" && pwd)
graph=$here/graph.txt
tmp=$(mktemp -d) || exit 2
trap 'rm -rf "$tmp"' EXIT
checks=0
failures=0

spdx='/* SPDX-License-Identifier: MIT */'

fresh() {
	rm -rf "$tmp/tree"
	mkdir -p "$tmp/tree/engine/base" "$tmp/tree/engine/frame" "$tmp/tree/engine/mm" "$tmp/tree/backends/soft"
	printf '%s\n#include "base/base.h"\nint frame_f(void);\n' "$spdx" >"$tmp/tree/engine/frame/f.h"
	printf '%s\n#include <stdint.h>\n' "$spdx" >"$tmp/tree/engine/base/base.h"
	printf '%s\n#include "frame/f.h"\nint mm_f(void);\n\nint mm_f(void)\n{\n\treturn frame_f();\n}\n' "$spdx" \
		>"$tmp/tree/engine/mm/m.c"
	printf '%s\n#include "frame/f.h"\n\nint frame_f(void)\n{\n\treturn 1;\n}\n' "$spdx" >"$tmp/tree/engine/frame/f.c"
	printf '%s\n#include "base/base.h"\nint soft_f(void);\n\nint soft_f(void)\n{\n\treturn 2;\n}\n' "$spdx" >"$tmp/tree/backends/soft/s.c"
}

# expect NAME STATUS PATTERN COMMAND...
expect() {
	name=$1 want=$2 pattern=$3
	shift 3
	checks=$((checks + 1))
	"$@" >"$tmp/out" 2>&1
	status=$?
	if [ $status != "$want" ] || ! grep -q -- "$pattern" "$tmp/out"; then
		failures=$((failures + 1))
		echo "$name: exit $status, wanted $want and a line with: $pattern"
		sed 's/^/    /' "$tmp/out"
	fi
}
layers() { expect "$1" "$2" "$3" sh "$here/layers.sh" "$graph" "$tmp/tree"; }
style() { expect "$1" "$2" "$3" sh "$here/style.sh" "$tmp/tree"; }
calls() {
	rm -f "$tmp"/*.o "$tmp/core.a"
	for f in engine/frame/f engine/mm/m backends/soft/s; do
		"$cc" -std=gnu11 -w -I"$tmp/tree/engine" -I"$tmp/tree/backends" -c "$tmp/tree/$f.c" \
			-o "$tmp/$(echo $f | tr / _).c.o" || exit 2
	done
	ar crs "$tmp/core.a" "$tmp"/*.o
	expect "$1" "$2" "$3" sh "$here/calls.sh" "$graph" "$tmp/core.a"
}
atomics() { expect "$1" "$2" "$3" sh "$here/atomics.sh" "$tmp/tree"; }
fresh_atomics() {
	fresh
	mkdir -p "$tmp/tree/include"
	printf 'int mm_g(int *p)\n{\n\treturn load_acquire(p);\n}\n' >>"$tmp/tree/engine/mm/m.c"
	printf '## Memory ordering\n| where | partner | what breaks |\n|---|---|---|\n| mm/m.c `mm_g()` | frame/f.c `frame_f()` | x |\n' \
		>"$tmp/tree/engine/README.md"
	mkdir -p "$tmp/tree/tests/lint"
	printf 'frame/f.c frame_f(): none\nmm/m.c mm_g(): acquire 1\n' >"$tmp/tree/tests/lint/orders.txt"
}
plant() { printf '%s\n' "$2" >>"$tmp/tree/$1"; }

fresh
layers "clean tree" 0 "5 files obey"
style "clean tree" 0 "5 files"
calls "clean tree" 0 "3 objects obey"

plant engine/frame/f.c '#include "mm/m.h"'
layers "frame includes mm" 1 "engine/frame/f.c:8: frame may not include mm"
fresh
plant engine/mm/m.c '#include "soft/s.h"'
layers "engine includes a backend" 1 "not a folder that it may see"
fresh
plant engine/mm/m.c '#include "../frame/f.h"'
layers "a path with dots" 1 "not rooted"
fresh
plant engine/mm/m.c '#include "frame/private.h"'
layers "a private header" 1 "for frame alone"
fresh
plant engine/mm/m.c '#include <kage/backend.h>'
layers "backend.h in mm" 1 "is for backends"
fresh
mkdir "$tmp/tree/engine/attic"
plant engine/attic/a.c "$spdx"
layers "a folder that the graph does not know" 1 '"attic" is not in the layer graph'

fresh_atomics
atomics "clean tree" 0 "1 places are in the table"
plant engine/mm/m.c 'int mm_h(int *p) { return atomic_load_explicit(p, memory_order_acquire); }'
atomics "a place that is not in the table" 1 "engine/mm/m.c:13: mm_h() orders memory"
fresh_atomics
plant engine/README.md '| mm/m.c `mm_gone()` | - | x |'
atomics "a row for a place that is gone" 1 "engine/README.md: mm/m.c has no mm_gone()"
fresh_atomics
sed 's/load_acquire(p)/READ_ONCE(*p)/' "$tmp/tree/engine/mm/m.c" >"$tmp/weak" && cp "$tmp/weak" "$tmp/tree/engine/mm/m.c"
atomics "an order that is weakened" 1 "mm/m.c mm_g() has none; the list says acquire 1"
fresh_atomics
sed 's/return load_acquire(p)/atomic_thread_fence(memory_order_release); &/' "$tmp/tree/engine/mm/m.c" >"$tmp/more" &&
	cp "$tmp/more" "$tmp/tree/engine/mm/m.c"
atomics "one more fence" 1 "mm/m.c mm_g() has fence 1, acquire 1, release 1; the list says acquire 1"
fresh_atomics
plant engine/mm/m.c 'static volatile int mm_word; /* volatile */'
atomics "volatile" 1 "m.c:13: volatile is no atomic"
fresh_atomics
plant engine/mm/m.c 'int mm_h(int *p) { return __sync_fetch_and_add(p, 1); }'
atomics "an old builtin" 1 "m.c:13: a builtin in place"
fresh_atomics
plant backends/soft/s.c 'int soft_h(int *p) { return __atomic_load_n(p, 0); }'
atomics "a builtin" 1 "s.c:9: a builtin in place"
fresh_atomics
plant engine/mm/m.c 'void mm_h(void) { __asm__("nop"); }'
atomics "assembly" 1 "m.c:13: assembly"

fresh
plant engine/frame/f.c 'int mm_f(void); int frame_g(void) { return mm_f(); }'
calls "frame calls mm" 1 "engine_frame_f.c.o: frame may not call mm (mm_f)"
fresh
plant engine/mm/m.c 'int soft_f(void); int mm_g(void) { return soft_f(); }'
calls "engine calls a backend" 1 "mm may not call backends (soft_f)"
fresh
plant engine/mm/m.c 'extern void abort(void); void mm_g(void) { abort(); }'
calls "abort" 1 "must not use abort"
fresh
plant backends/soft/s.c 'int soft_count; int soft_next(void) { return ++soft_count; }'
calls "global state" 1 "writable static data: soft_count"
fresh
plant backends/soft/s.c 'static const char *const names[] = { "a" }; const char *soft_name(int i) { return names[i]; }'
calls "constant tables are no state" 0 "3 objects obey"

for word in T''ODO FIX''ME X''XX "for"" now"; do
	fresh
	plant engine/mm/m.c "/* $word */"
	style "$word" 1 "engine/mm/m.c:9: a mark of unfinished work"
done
fresh
plant engine/mm/m.c 'int x; '
style "trailing blank" 1 "m.c:9: trailing blanks"
fresh
echo 'int x;' >"$tmp/tree/engine/mm/n.c"
style "no SPDX line" 1 "engine/mm/n.c:1: no SPDX"
fresh
plant engine/mm/m.c "/* see /wo""rk/x */"
style "a machine's path" 1 "m.c:9: a path"
fresh
{ printf 'int f(void)\n{\n'; yes '	;' | head -n 78; printf '}\n'; } >>"$tmp/tree/engine/mm/m.c"
style "80 lines are fine" 0 "5 files"
fresh
{ printf 'int f(void)\n{\n'; yes '	;' | head -n 79; printf '}\n'; } >>"$tmp/tree/engine/mm/m.c"
style "81 lines" 1 "a function of 81 lines"
for call in 'malloc(1)' 'printf("")' 'abort()' 'exit(1)' 'assert(1)'; do
	fresh
	plant engine/mm/m.c "void f(void) { $call; }"
	style "$call" 1 "engine/mm/m.c:9: "
	fresh
	plant engine/mm/m.c "/* $call */ void f(void) { kage_$call; g(\"$call\"); /*"
	plant engine/mm/m.c " * $call"
	plant engine/mm/m.c " */ }"
	style "$call in a comment" 0 "5 files"
done

echo "lint self test: $checks checks, $failures failed"
[ $failures = 0 ]
