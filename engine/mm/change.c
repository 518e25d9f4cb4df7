/* SPDX-License-Identifier: MIT */
/*
 * The change funnel. See change.h for the phases.
 *
 * Invariants:
 *  C1  commit runs between the start and the end of every target, under the
 *      locks that ops->lock takes (or the caller holds).
 *  C2  a frame goes to the pool's pending list only after the end: readers of
 *      secondary MMUs may use it until then, lock-free readers until the grace
 *      period is over.
 *  C3  every start that succeeded gets its end, also on error.
 */
#include "mm/change.h"
#include "mm/mirror.h"

static int change_start(struct change *c)
{
	for (unsigned i = 0; i < c->targets; i++) {
		struct change_target *t = &c->target[i];
		int r;

		t->notify.reason = c->reason;
		t->notify.flags = c->flags | KAGE_RANGE_BLOCKABLE;
		t->notify.lost = c->lost ? c->lost : KAGE_RWX;
		t->notify.owner = c->owner;
		t->notify.self = i == 0 ? c->self : NULL;
		trace(t->mm->host->env, change_start, t->mm->id, t->notify.start.v, c->reason);
		r = notify_start(&t->mm->notify, &t->notify);
		if (r == 0)
			continue;
		trace(t->mm->host->env, change_abandon, t->mm->id, t->notify.start.v, -r);
		while (i-- > 0)
			notify_end(&c->target[i].mm->notify, &c->target[i].notify);
		return r;
	}
	return 0;
}

static void change_end(struct change *c)
{
	for (unsigned i = c->targets; i-- > 0;) {
		struct change_target *t = &c->target[i];

		notify_end(&t->mm->notify, &t->notify);
		trace(t->mm->host->env, change_end, t->mm->id, t->notify.start.v, c->reason);
	}
}

/*
 * A change that puts equal contents in the place of others relies on what entries
 * say. Of a mirrored guest that is only true of pages which have not diverged, and
 * with writes blocked, as they are now, none can begin to.
 */
static int change_settled(struct change *c)
{
	if (c->adopts || !(c->flags & KAGE_RANGE_SAME_CONTENT))
		return 0;
	for (unsigned i = 0; i < c->targets; i++) {
		const struct change_target *t = &c->target[i];
		struct mirror *m = t->mm->mirror;
		uint64_t map[MIRROR_WORDS], any = 0;

		if (!m)
			continue;
		kage_assert(t->notify.end.v - t->notify.start.v <= BLOCK_PAGES);
		m->ops->diverged(m, t->notify.start, (unsigned)(t->notify.end.v - t->notify.start.v), map);
		for (unsigned w = 0; w < MIRROR_WORDS; w++)
			any |= map[w];
		if (any && !c->ops->diverged)
			return -ESTALE;
		if (any)
			c->ops->diverged(c, t, map);
	}
	return 0;
}

static int change_commit(struct change *c)
{
	int r = change_settled(c);

	if (r == 0 && c->ops->inspect)
		r = c->ops->inspect(c);
	if (r)
		return r;
	if (c->ops->lock)
		c->ops->lock(c);
	if (c->ops->recheck)
		r = c->ops->recheck(c);
	if (r == 0) {
		c->ops->commit(c);
		for (unsigned i = 0; i < c->targets; i++)
			trace(c->target[i].mm->host->env, change_commit, c->target[i].mm->id,
			      c->target[i].notify.start.v, c->reason);
	}
	if (c->ops->unlock)
		c->ops->unlock(c);
	return r;
}

/* Only merging puts shared frames in place under a running guest; its callers hold no mm->range. */
static void change_settle(const struct change *c)
{
	if (c->adopts || !(c->flags & KAGE_RANGE_SAME_CONTENT))
		return;
	for (unsigned i = 0; i < c->targets; i++) {
		const struct change_target *t = &c->target[i];

		if (t->mm->mirror && atomic_load(&t->mm->mirror->unsettled))
			mm_settle(t->mm, t->notify.start, t->notify.end);
	}
}

int change_run(struct change *c)
{
	int r = c->ops->prepare ? c->ops->prepare(c) : 0;

	if (r == 0)
		r = change_start(c);
	if (r == 0) {
		mm_count(c->target[0].mm, changes);
		r = change_commit(c);
		change_end(c);
		if (r == 0 && c->ops->after)
			c->ops->after(c);
		dead_release(c->target[0].mm->host->pool, &c->dead);
		if (r == -EAGAIN)
			mm_count(c->target[0].mm, changes_raced);
		change_settle(c);
	}
	if (r && c->ops->cancel)
		c->ops->cancel(c);
	return r;
}
