#!/bin/sh
# SPDX-License-Identifier: MIT
# Words that threads share.
# usage: atomics.sh ROOT [list|counts]
#
# They are C11 atomics, or go through the macros of engine/base/base.h: no volatile,
# no __sync_ or __atomic_ builtins, no assembly elsewhere. include/kage/vcpu.h may
# use builtins (C++ compiles it, and has no _Atomic) and volatile for guest memory.
#
# Every place that asks for an order (fence, acquire, release, seq_cst, membarrier) is
# named by file and function in the table "Memory ordering" of engine/README.md, with its
# partner; and what the table names is there. Default seq_cst operations
# (atomic_load() and so on) ask for nothing weaker than x86 has, and need no row.
# tests/lint/orders.txt says how many orders of each kind a named function has: one that goes, comes
# or is weakened is seen. "none": it is named for what the functions that it calls do.
# list: prints the places; counts: what orders.txt should say. Prints each violation; exits 1 if any.
set -u
code=$(cat "$(dirname "$0")/code.awk") || exit 2
cd "$1" || exit 2
mode=${2:-check}

find engine backends include -name '*.[ch]' | LC_ALL=C sort | xargs awk -v readme=engine/README.md -v mode="$mode" -v counts=tests/lint/orders.txt "$code"'
function bad(text) {
	print text
	failures++
}
# engine/notify/range.c: notify/range.c
function short(path) {
	sub(/^[a-z]+\//, "", path)
	return path
}
function count(kind, n) {
	if (n)
		orders[file, fn, kind] += n
}
# How many of each kind the line asks for. Weaker or fewer ones pass on x86 and in an emulator: only this sees them.
function tally(text) {
	count("fence", gsub(/atomic_(thread|signal)_fence|KAGE_WINDOW_FENCE|SYS_membarrier/, "&", text))
	count("acquire", gsub(/load_acquire|memory_order_(acquire|consume)|__ATOMIC_(ACQUIRE|CONSUME)/, "&", text))
	count("release", gsub(/store_release|memory_order_release|__ATOMIC_RELEASE/, "&", text))
	count("acq_rel", gsub(/cas_acq_rel|memory_order_acq_rel|__ATOMIC_ACQ_REL/, "&", text))
	count("seq_cst", gsub(/memory_order_seq_cst|__ATOMIC_SEQ_CST/, "&", text))
	gsub(/atomic_[a-z_]*_explicit|atomic_(thread|signal)_fence|atomic_init/, "", text)
	count("default", gsub(/atomic_(load|store|exchange|compare_exchange|fetch)[a-z_]*\(/, "&", text))
}
# "acquire 2, release 1", or nothing.
function orders_of(file, fn,    i, text) {
	for (i = 1; i <= kinds; i++)
		if ((file, fn, kind_at[i]) in orders)
			text = text (text == "" ? "" : ", ") kind_at[i] " " orders[file, fn, kind_at[i]]
	return text
}
# The first two cells of a row: a file, then functions of it in backquotes, and so on.
function take_row(row,    cell, text, file, token) {
	split(row, cell, "|")
	text = cell[2] " " cell[3]
	file = ""
	while (match(text, /[a-z0-9_]+\/[a-z0-9_]+\.[ch]|`[A-Za-z0-9_]+\(\)`/)) {
		token = substr(text, RSTART, RLENGTH)
		text = substr(text, RSTART + RLENGTH)
		if (token !~ /^`/)
			file = token
		else if (file == "")
			bad(readme ": " token " is named before a file")
		else {
			gsub(/[`()]/, "", token)
			named[file, token] = 1
		}
	}
}
BEGIN {
	kinds = split("fence acquire release acq_rel seq_cst default", kind_at, " ")
	while ((getline line < counts) > 0)
		if (line !~ /^(#|$)/) {
			at = index(line, "(): ")
			split(substr(line, 1, at - 1), part, " ")
			listed[part[1], part[2]] = substr(line, at + 4)
		}
	while ((getline line < readme) > 0) {
		if (line ~ /^## /)
			table = line ~ /^## Memory ordering/
		else if (table && line ~ /^\| / && line !~ /^\| *(-|where)/)
			take_row(line)
	}
}
FNR == 1 {
	in_comment = 0
	fn = ""
	file = short(FILENAME)
	is_base = FILENAME == "engine/base/base.h" || FILENAME == "engine/base/cache.h" # orders accesses; empties caches
	is_inline = FILENAME == "include/kage/vcpu.h"
}
{
	text = code($0)
	if (text ~ /^#[ \t]*define[ \t]+[A-Za-z0-9_]+\(/ || (text ~ /^[A-Za-z_].*\(/ && text !~ /^(typedef|_Static_assert)/)) {
		fn = text
		sub(/^#[ \t]*define[ \t]+/, "", fn)
		sub(/\(.*/, "", fn)
		sub(/.*[^A-Za-z0-9_]/, "", fn)
	}
	there[file, fn] = 1
	place = FILENAME ":" FNR
	if (!is_base && !is_inline && text ~ /(^|[^A-Za-z0-9_])volatile([^A-Za-z0-9_]|$)/)
		bad(place ": volatile is no atomic")
	if (text ~ /__sync_/ || (!is_base && !is_inline && text ~ /__atomic_/))
		bad(place ": a builtin in place of a C11 atomic")
	if (!is_base && text ~ /(^|[^A-Za-z0-9_])(__asm__|__asm|asm)([^A-Za-z0-9_]|$)/)
		bad(place ": assembly")
	if (!is_base && text ~ /atomic_(thread|signal)_fence|memory_order_(acquire|release|acq_rel|seq_cst|consume)|__ATOMIC_(ACQUIRE|RELEASE|ACQ_REL|SEQ_CST|CONSUME)|load_acquire|store_release|cas_acq_rel|KAGE_WINDOW_FENCE|SYS_membarrier/ &&
	    !((file, fn) in site)) {
		site[file, fn] = place
		order[++sites] = file SUBSEP fn
	}
	if (!is_base)
		tally(text)
}
END {
	for (i = 1; i <= sites; i++) {
		split(order[i], part, SUBSEP)
		if (mode == "list")
			print part[1] " " part[2] "()"
		else if (!((part[1], part[2]) in named))
			bad(site[part[1], part[2]] ": " part[2] "() orders memory and is not in the table \"Memory ordering\" of " readme)
	}
	for (key in named) {
		split(key, part, SUBSEP)
		if (!((part[1], part[2]) in there))
			bad(readme ": " part[1] " has no " part[2] "()")
		else if ((text = orders_of(part[1], part[2])) == "")
			text = "none"
		if (mode == "counts")
			print part[1] " " part[2] "(): " text
		else if (mode == "check" && (part[1], part[2]) in there && text != listed[part[1], part[2]])
			bad(counts ": " part[1] " " part[2] "() has " text "; the list says " \
			    (listed[part[1], part[2]] == "" ? "nothing" : listed[part[1], part[2]]))
	}
	for (key in listed) {
		split(key, part, SUBSEP)
		if (!(key in named))
			bad(counts ": " part[1] " " part[2] "() is not in the table")
	}
	if (failures)
		exit 1
	if (mode == "check")
		printf "atomics: %d places are in the table\n", sites
}'
status=$?
[ $status = 123 ] && status=1
exit $status
