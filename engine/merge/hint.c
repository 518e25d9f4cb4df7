/* SPDX-License-Identifier: MIT */
/*
 * What is looked at before the pass: memory that is new, and what the embedder
 * points at.
 *
 * A pass over everything takes as long as the embedder wants it to; a guest that is new, or has
 * been restored, should find its family at once. So new memory is visited twice at the head of steps: one
 * notes what has been written, a later one looks at what has been quiet since. What has not been waits for
 * passes like all else. Memory whose contents are final (a hint says so) is looked at in the next step: KSM waits
 * for a checksum to stay the same, since a page that changes would spoil its tree; here a frame is protected and
 * compared before it is merged, and all that a page that is written after all costs is a COW break.
 *
 * A clone needs none of this: what it shares is known, as its parent's.
 *
 * Invariants:
 *  J1  a hint is armed in one step and looked at in one that has begun since. The pass leaves a chunk alone in all steps that
 *      had begun when a hint was at it, and a hint that waits for it to be quiet leaves it alone in those that had when the
 *      pass was, or it was armed: what was written until a moment ago is no longer in the log, and would pass for quiet.
 *  J2  a hint ends when all its chunks have been visited and none of them is open.
 *  J3  there are HINTS_MOST at once at most, whoever gives them: what does not fit waits for a pass, as without a hint.
 *  J4  a hint for which there is no memory waits for the next step, and nothing else does.
 *
 * Locks: merge->lock for the list.
 */
#include "merge/scan.h"

#define HINTS_MOST 1024

static void hint_free(struct merge *m, struct merge_hint *h)
{
	m->hinted--;
	list_del(&h->node);
	env_free(m->host->env, h, sizeof(*h));
}

/* Nothing has been done about it yet. */
static bool hint_waits(const struct merge_hint *h)
{
	return !h->armed && !h->chunk && h->at.v == h->start.v;
}

/* Another one says the same already, or becomes longer instead. merge->lock held. */
static bool joined(struct merge *m, struct mm *mm, gfn_t start, gfn_t end, bool final)
{
	struct merge_hint *last;

	list_for_each(pos, &m->hints) {
		last = container_of(pos, struct merge_hint, node);
		if (last->mm == mm && last->final == final && hint_waits(last) && last->start.v <= start.v && end.v <= last->end.v)
			return true;
	}
	if (list_empty(&m->hints))
		return false;
	last = container_of(m->hints.prev, struct merge_hint, node);
	if (last->mm != mm || last->final != final || last->armed || last->end.v != start.v)
		return false;
	last->end = end;
	return true;
}

int merge_hint(struct merge *m, struct mm *mm, gfn_t start, uint64_t npages, bool final)
{
	struct merge_hint *h;
	int r = 0;

	if (!atomic_load(&m->on))
		return 0;
	h = env_alloc(m->host->env, sizeof(*h));
	if (!h)
		return -ENOMEM;
	*h = (struct merge_hint){ .mm = mm, .final = final, .start = start, .end = gfn_add(start, npages), .at = start };
	lock_take(&m->lock);
	if (joined(m, mm, start, h->end, final)) {
		;
	} else if (m->hinted == HINTS_MOST) {
		r = -ENOMEM;
	} else {
		list_add_tail(&m->hints, &h->node);
		m->hinted++;
		h = NULL;
	}
	lock_drop(&m->lock);
	env_free(m->host->env, h, sizeof(*h));
	return r;
}

void hints_forget(struct merge *m, const struct mm *mm)
{
	lock_take(&m->lock);
	list_for_each_safe(pos, next, &m->hints) {
		struct merge_hint *h = container_of(pos, struct merge_hint, node);

		if (!mm || h->mm == mm)
			hint_free(m, h);
	}
	lock_drop(&m->lock);
}

uint64_t merge_urgent(struct merge *m, bool *ready)
{
	uint64_t pages = 0;

	*ready = false;
	if (!atomic_load(&m->on))
		return 0;
	lock_take(&m->lock);
	list_for_each(pos, &m->hints) {
		const struct merge_hint *h = container_of(pos, struct merge_hint, node);

		pages += h->end.v - h->start.v;
		*ready |= !h->armed || h->step != atomic_load(&m->steps);
	}
	lock_drop(&m->lock);
	return pages;
}

/* -- the next chunk ---------------------------------------------------------------------- */

static void take(struct merge *m, struct merge_hint *h, struct merge_chunk *c, struct work *w)
{
	chunk_take(m, h->mm->merge, c, w);
	w->mm = h->mm;
	w->visit = h->final ? VISIT_FINAL : h->armed ? VISIT_YOUNG : VISIT_ARM;
	h->chunk = w->visit == VISIT_ARM ? NULL : c;
}

/* 1: it is taken, or somebody else has it, or it is too early (J1); 0: the hint has no more. -ENOMEM. */
static int hint_next(struct merge *m, struct merge_hint *h, struct work *w)
{
	struct merge_chunk *c = h->chunk;

	if (c && (c->taken || c->open)) {
		if (!c->taken) {
			chunk_take(m, h->mm->merge, c, w);
			w->mm = h->mm;
		}
		return 1;
	}
	h->chunk = NULL;
	while (h->at.v < h->end.v) {
		gfn_t base = GFN(ALIGN_DOWN(h->at.v, MERGE_CHUNK_PAGES)), next = gfn_add(base, MERGE_CHUNK_PAGES);

		w->start = GFN(MAX(h->start.v, base.v));
		w->end = GFN(MIN(h->end.v, next.v));
		if (mergeable_next(h->mm, base.v >> MERGE_CHUNK_SHIFT) == base.v >> MERGE_CHUNK_SHIFT) {
			c = chunk_have(m, h->mm->merge, base.v >> MERGE_CHUNK_SHIFT);
			if (!c)
				return -ENOMEM;
			if (!c->taken && (!h->armed || c->armed < w->step)) {
				h->at = next;
				take(m, h, c, w);
			}
			return 1;
		}
		h->at = next;
	}
	return 0;
}

static void hint_over(struct merge *m, struct merge_hint *h)
{
	if (h->final || h->armed) {
		hint_free(m, h);
		return;
	}
	h->armed = true;
	h->fetched = false;
	h->step = atomic_load(&m->steps);
	h->at = h->start;
}

int hint_take(struct merge *m, struct work *w)
{
	list_for_each_safe(pos, next, &m->hints) {
		struct merge_hint *h = container_of(pos, struct merge_hint, node);
		int r = 0;

		if ((h->armed && h->step >= w->step) || h->starved == w->step)
			continue;
		if (!guest_enter(h->mm, w))
			return 0;
		if (!h->mm->merge)
			r = merge_attach(m, h->mm);
		if (r == 0 && !h->fetched) {
			r = merge_fetch(m, h->mm->merge);
			h->fetched = r == 0;
		}
		if (r == 0)
			r = hint_next(m, h, w);
		if (w->mm)
			return 0;
		brlock_read_drop(&h->mm->family->lock, w->held);
		if (r == -ENOMEM) {
			h->starved = w->step;
			w->starved = true;
			continue;
		}
		if (r < 0)
			return r;
		if (r == 0)
			hint_over(m, h);
	}
	return 0;
}
