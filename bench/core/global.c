/* SPDX-License-Identifier: MIT */
/*
 * kage-bench-notify-global: the engine with one sequence for all changes of a
 * guest (sequence.h) in addition to what is exact by range.
 *
 * It is the same code: this file contains engine/notify/range.c, whose object the
 * linker then has no use for, and gives readers one more reason to repeat. So the
 * two programs differ in how often a fault repeats, and in the counting itself.
 *
 *  - A change counts for readers from before it looks for them until its slot is
 *    free, which is as long as in KVM from start to end.
 *  - A reader's own change does not hit it; in KVM it does.
 *  - There is one sequence in the process, which has one guest. KVM has one for each guest.
 */
#include "notify/internal.h"
#include "sequence.h"

int exact_start(struct notify *n, struct notify_change *c);
void exact_end(struct notify *n, struct notify_change *c);
void exact_read_begin(struct notify_reader *r, gfn_t start, gfn_t end);
bool exact_read_valid(struct notify_reader *r);

#define notify_start	  exact_start
#define notify_end	  exact_end
#define notify_read_begin exact_read_begin
#define notify_read_valid exact_read_valid
#include "notify/range.c"
#undef notify_start
#undef notify_end
#undef notify_read_begin
#undef notify_read_valid

static struct sequence sequence;
static uint64_t sampled[NOTIFY_READERS]; /* by reader slot; its owner's */

static void change_over_for_all(struct notify *n, struct notify_change *c)
{
	sequence_end(&sequence);
	if (c->self && c->self->notify == n && c->self->slot >= 0)
		sampled[c->self->slot]++;
}

int notify_start(struct notify *n, struct notify_change *c)
{
	int r;

	sequence_begin(&sequence, c->start.v, c->end.v);
	r = exact_start(n, c);
	if (r)
		change_over_for_all(n, c);
	return r;
}

void notify_end(struct notify *n, struct notify_change *c)
{
	exact_end(n, c);
	change_over_for_all(n, c);
}

void notify_read_begin(struct notify_reader *r, gfn_t start, gfn_t end)
{
	exact_read_begin(r, start, end);
	sampled[r->slot] = sequence.number;
}

bool notify_read_valid(struct notify_reader *r)
{
	const struct notify_reader_slot *s = r->at;

	if (!exact_read_valid(r))
		return false;
	return sequence_valid(&sequence, sampled[r->slot], s->start, s->end) || section_failed(r);
}
