/* SPDX-License-Identifier: MIT */
/*
 * The event ring: the last `size` events. Writers claim a record by a counter
 * and fill it with relaxed stores; a reader that wants whole records reads when
 * the writers are quiet (tests), or accepts a torn one at the head.
 */
#include "base/trace.h"

const char *trace_name(enum trace_event ev)
{
	static const char *const names[] = {
#define X(name) #name,
	    TRACE_EVENTS(X)
#undef X
	};

	_Static_assert(ARRAY_SIZE(names) == TRACE_COUNT, "one name an event");
	return (unsigned)ev < TRACE_COUNT ? names[ev] : "?";
}

void trace_put(struct trace_ring *ring, enum trace_event ev, uint64_t a, uint64_t b, uint64_t c)
{
	uint64_t at = atomic_fetch_add_explicit(&ring->head, 1, memory_order_relaxed);
	struct trace_record *r = &ring->rec[at & (ring->size - 1)];

	WRITE_ONCE(r->event, (uint32_t)ev);
	WRITE_ONCE(r->a, a);
	WRITE_ONCE(r->b, b);
	WRITE_ONCE(r->c, c);
}
