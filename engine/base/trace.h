/* SPDX-License-Identifier: MIT */
/*
 * Events: what happened, in order. Each is a systemtap probe (meson option
 * `probes`) and, when a ring is attached to the env, a record in it: golden
 * traces in tests/flow are such records.
 */
#ifndef KAGE_BASE_TRACE_H
#define KAGE_BASE_TRACE_H

#include "base/env.h"

/* name, meaning of a, b, c */
#define TRACE_EVENTS(X)                                                              \
	X(fault)          /* mm id, gfn, access */                                   \
	X(fault_done)     /* mm id, gfn, outcome */                                  \
	X(change_start)   /* mm id, start gfn, reason */                             \
	X(change_commit)  /* mm id, start gfn, reason */                             \
	X(change_abandon) /* mm id, start gfn, error */                              \
	X(change_end)     /* mm id, start gfn, reason */                             \
	X(cow_break)      /* mm id, gfn, new pfn is not recorded: 0 */               \
	X(cow_reuse)      /* mm id, gfn, 0 */                                        \
	X(unshare)        /* mm id, gfn, level */                                    \
	X(split)          /* mm id, gfn, level */                                    \
	X(clone)          /* parent mm id, child mm id, 0 */                         \
	X(map)            /* mm id, gfn, pages */                                    \
	X(unmap)          /* mm id, gfn, pages */                                    \
	X(discard)        /* mm id, gfn, pages */                                    \
	X(merge)          /* mm id, gfn, 0: stable, 1: zero */                       \
	X(reader_wait)    /* mm id, gfn, 0 */                                        \
	X(reader_hit)     /* mm id, gfn, 0 */                                        \
	X(shadow_install) /* mm id, gfn, level */                                    \
	X(shadow_drop)    /* mm id, start gfn, end gfn */                            \
	X(shootdown)      /* mm id, running vCPUs, 0 */

enum trace_event {
#define X(name) TRACE_##name,
	TRACE_EVENTS(X)
#undef X
	TRACE_COUNT
};

struct trace_record {
	uint32_t event;
	uint32_t reserved;
	uint64_t a, b, c;
};

struct trace_ring {
	_Atomic uint64_t head;
	uint64_t size; /* power of two */
	struct trace_record rec[];
};

const char *trace_name(enum trace_event ev);
void trace_put(struct trace_ring *ring, enum trace_event ev, uint64_t a, uint64_t b, uint64_t c);

#ifdef KAGE_PROBES
#include <sys/sdt.h>
#define TRACE_PROBE(name, a, b, c) DTRACE_PROBE3(kage, name, a, b, c)
#else
#define TRACE_PROBE(name, a, b, c) ((void)0)
#endif

#define trace(env, name, a, b, c)                                                                \
	do {                                                                                     \
		TRACE_PROBE(name, (uint64_t)(a), (uint64_t)(b), (uint64_t)(c));                  \
		struct trace_ring *ring_ = READ_ONCE((env)->trace);                              \
		if (unlikely(ring_ != NULL))                                                     \
			trace_put(ring_, TRACE_##name, (uint64_t)(a), (uint64_t)(b), (uint64_t)(c)); \
	} while (0)

#endif
