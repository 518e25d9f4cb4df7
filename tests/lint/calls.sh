#!/bin/sh
# SPDX-License-Identifier: MIT
# Holds what the objects of the core library call to the layer graph, and
# what they take from libc to the rules of the library.
# usage: calls.sh GRAPH LIBKAGE_CORE.a [debug]
#
# Objects are named as meson names them: engine_FOLDER_FILE.c.o,
# backends_FOLDER_FILE.c.o. Besides the graph: nothing that ends the process,
# prints, starts threads, or touches signals ("debug": __assert_fail is fine);
# no writable static data except where `state` below says why.
set -u
graph=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
archive=$2
debug=${3:-}
tmp=$(mktemp) || exit 2
trap 'rm -f "$tmp"' EXIT

nm -A "$archive" >"$tmp" || exit 2
nm -A -f sysv "$archive" 2>/dev/null | sed 's/^/sysv /' >>"$tmp" || exit 2

awk -v graph="$graph" -v debug="$debug" '
function bad(text) {
	print text
	failures++
}
# Sets object, self (node of the graph) and rest (what follows the object name); false if it is no such line.
function parse(line,    part) {
	if (!match(line, /(engine|backends)_[a-z0-9]+_[^\/: ]*\.o:/))
		return 0
	object = substr(line, RSTART, RLENGTH - 1)
	rest = substr(line, RSTART + RLENGTH)
	split(object, part, "_")
	self = part[1] == "backends" ? "backends" : part[2]
	return 1
}
BEGIN {
	while ((getline line < graph) > 0) {
		if (line ~ /^#/ || line !~ /:/)
			continue
		name = line
		sub(/:.*/, "", name)
		sub(/^[^:]*:/, "", line)
		known[name] = 1
		count = split(line, part, " ")
		for (i = 1; i <= count; i++)
			may[name, part[i]] = 1
	}
	count = split("abort exit _exit _Exit quick_exit printf vprintf puts putchar fprintf vfprintf fputs fwrite " \
		"perror __printf_chk __fprintf_chk __vfprintf_chk psignal stdout stderr pthread_create thrd_create " \
		"clone fork vfork system execve signal sigaction sigprocmask pthread_sigmask raise kill " \
		"pthread_kill setitimer alarm timer_create atexit setlocale", part, " ")
	for (i = 1; i <= count; i++)
		forbidden[part[i]] = 1
	if (debug == "")
		forbidden["__assert_fail"] = 1
	# Signals held back around one ioctl, whose interruption would leave pages unlogged.
	except["backends_kvm_ring.c.o", "pthread_sigmask"] = 1
	# The helper thread of kage_kvm_helper_start(): the only threads the library ever starts, and only when asked.
	except["backends_kvm_helper.c.o", "pthread_create"] = 1
	# liburcu registers threads, and a thread that ends must be unregistered: one pthread key for the process.
	state["engine_base_rcu.c.o"] = 1
}
/^sysv / {
	if (!parse($0) || split(rest, column, "|") < 7)
		next
	section = column[7]
	symbol = column[1]
	gsub(/ /, "", symbol)
	if (section ~ /^\.(data|bss)/ && section !~ /^\.data\.rel\.ro/ && !(object in state))
		bad(object ": writable static data: " symbol)
	next
}
parse($0) {
	if (!(object in seen)) {
		seen[object] = self
		objects++
		if (!(self in known))
			bad(object ": folder \"" self "\" is not in the layer graph")
	}
	count = split(rest, part, " ")
	type = part[count - 1]
	symbol = part[count]
	if (type == "U" || type == "w")
		wants[object, symbol] = 1
	else if (type ~ /^[TDBRVWC]$/)
		home[symbol] = self
}
END {
	for (key in wants) {
		split(key, part, SUBSEP)
		object = part[1]
		symbol = part[2]
		self = seen[object]
		if (symbol in home) {
			target = home[symbol]
			if (target != self && !((self, target) in may))
				bad(object ": " self " may not call " target " (" symbol ")")
		} else if (symbol in forbidden && !((object, symbol) in except)) {
			bad(object ": the library must not use " symbol)
		}
	}
	if (!objects) {
		print "no object of the core library in the archive"
		exit 2
	}
	if (failures)
		exit 1
	printf "calls: %d objects obey the graph\n", objects
}' "$tmp"
