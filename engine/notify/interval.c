/* SPDX-License-Identifier: MIT */
/*
 * Interval notifiers: a device that mirrors a part of a guest and reads with
 * begin and retry. Model: Linux mm/mmu_notifier.c, mmu_interval_read_begin()
 * and mn_itree_invalidate(); but the sequence is the interval's own, so only
 * changes that overlap it make a reader retry.
 *
 * Structures: struct interval_priv in the embedder's struct kage_interval. The
 * snapshot (set.c) holds the intervals sorted by start. The sorted array is
 * an interval tree without pointers: the root of [lo, hi) is its middle entry,
 * whose `reach` is the largest end of all of [lo, hi).
 *
 *  I1  seq moves, then invalidate is called; both while the change is in
 *      flight and before it commits. So a reader that checks under the lock
 *      that invalidate takes sees the new seq, or installs before invalidate
 *      drops it (N1).
 *  I2  read_begin takes seq first and looks for changes second:
 *
 *      change                              reader
 *      use odd                             load seq
 *      fence (a)                           fence (e)
 *      seq + 1; invalidate                 overlapping change? wait, again
 *      commit; leave the slot
 *
 *      A change that the reader does not see moves seq after it was loaded
 *      (retry), or left its slot before the look (what it committed is seen).
 *  I3  A change tells an interval once: an error from one stops the walk, and
 *      intervals that were told have just dropped entries they need not have.
 *
 * Locks: n->lock in insert and remove; none in read_begin and read_retry.
 *
 * Why not a balanced tree: the snapshot would then need copy-on-write nodes,
 * and devices come and go seldom; an insert copies 32 bytes for each other one.
 */
#include "base/trace.h"
#include "notify/internal.h"

struct interval_priv {
	struct notify *notify; /* NULL: not inserted */
	_Atomic uint64_t seq;
	uint64_t start, end; /* gfn */
};

static_assert(sizeof(struct interval_priv) <= sizeof(((struct kage_interval *)0)->priv), "lives in priv");

static struct interval_priv *priv_of(struct kage_interval *i)
{
	return (struct interval_priv *)i->priv;
}

static struct notify *home_of(struct kage_interval *i)
{
	return load_acquire(&priv_of(i)->notify);
}

static void home_set(struct kage_interval *i, struct notify *n)
{
	store_release(&priv_of(i)->notify, n);
}

/* --- the tree --- */

static uint64_t index_part(struct set_entry *e, unsigned lo, unsigned hi)
{
	unsigned mid = lo + (hi - lo) / 2;
	uint64_t left, right;

	if (lo >= hi)
		return 0;
	left = index_part(e, lo, mid);
	right = index_part(e, mid + 1, hi);
	e[mid].reach = MAX(e[mid].end, MAX(left, right));
	return e[mid].reach;
}

void intervals_index(struct notify_set *s)
{
	index_part(s->entry + s->listeners, 0, s->intervals);
}

struct walk {
	struct notify *n;
	struct set_entry *e;
	const struct kage_range *range;
};

static int tell(const struct walk *w, struct kage_interval *i)
{
	int rc;

	atomic_fetch_add_explicit(&priv_of(i)->seq, 1, memory_order_acq_rel);
	callback_enter();
	rc = i->invalidate(i, w->range);
	callback_leave();
	return listener_answer(w->n, w->range, rc);
}

static int walk_part(const struct walk *w, unsigned lo, unsigned hi)
{
	unsigned mid = lo + (hi - lo) / 2;
	const struct set_entry *e = &w->e[mid];
	int err;

	if (lo >= hi || e->reach <= w->range->start)
		return 0;
	err = walk_part(w, lo, mid);
	if (err || e->start >= w->range->end)
		return err;
	if (e->end > w->range->start)
		err = tell(w, e->who);
	return err ? err : walk_part(w, mid + 1, hi);
}

int intervals_invalidate(struct notify *n, struct notify_set *s, const struct kage_range *range)
{
	struct walk w = { n, s->entry + s->listeners, range };

	return walk_part(&w, 0, s->intervals);
}

/* --- coming and going --- */

void intervals_forget(struct notify_set *s)
{
	for (unsigned i = 0; i < s->intervals; i++)
		home_set(s->entry[s->listeners + i].who, NULL);
}

/* Where an interval that starts at `start` goes: after those that start there already. */
static unsigned place_of(const struct notify_set *s, uint64_t start)
{
	unsigned lo = s ? s->listeners : 0, hi = s ? s->listeners + s->intervals : 0;

	while (lo < hi) {
		unsigned mid = lo + (hi - lo) / 2;

		if (s->entry[mid].start <= start)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

static bool range_ok(const struct kage_interval *i)
{
	return i->start < i->end && i->end <= (uint64_t)1 << KAGE_GPA_BITS &&
	       !((i->start | i->end) & (PAGE_SIZE - 1));
}

int notify_interval_insert(struct notify *n, struct kage_interval *i)
{
	struct interval_priv *p;
	int err = -EBUSY;

	if (!i || !i->invalidate || !range_ok(i))
		return -EINVAL;
	kage_assert(!callback_inside());
	p = priv_of(i);
	lock_take(&n->lock);
	if (!home_of(i)) {
		struct set_entry e = { .who = i, .start = i->start, .end = i->end };

		p->start = gpa_gfn(GPA(i->start)).v;
		p->end = gpa_gfn(GPA(i->end)).v;
		home_set(i, n);
		err = set_put_in(n, place_of(set_current(n), i->start), &e, true);
		if (err)
			home_set(i, NULL);
	}
	lock_drop(&n->lock);
	return err;
}

int notify_interval_remove(struct kage_interval *i)
{
	struct notify_set *s;
	struct notify *n;
	int pos;

	if (!i)
		return -EINVAL;
	kage_assert(!callback_inside());
	n = home_of(i);
	if (!n)
		return -ENOENT;
	lock_take(&n->lock);
	s = set_current(n);
	pos = set_find(s, s ? s->listeners : 0, set_count(s), i);
	if (pos >= 0) {
		set_leave_out(n, (unsigned)pos);
		home_set(i, NULL);
	}
	lock_drop(&n->lock);
	return pos >= 0 ? 0 : -ENOENT;
}

/* --- readers --- */

KAGE_API uint64_t kage_interval_read_begin(struct kage_interval *i)
{
	struct interval_priv *p = priv_of(i);
	struct notify *n = home_of(i);
	struct in_flight f;
	uint64_t seq = 0;

	while (n) {
		seq = get(&p->seq);
		atomic_thread_fence(memory_order_seq_cst); /* (e): pairs with (a) in change_open() */
		if (!change_find(n, p->start, p->end, 0, &f))
			break;
		trace(n->env, reader_wait, n->mm_id, p->start, 0);
		change_wait(n, &f);
	}
	return seq;
}

/* An interval that was removed, or whose guest is gone, has nothing that may be installed. */
KAGE_API bool kage_interval_read_retry(struct kage_interval *i, uint64_t seq)
{
	struct interval_priv *p = priv_of(i);
	struct notify *n = home_of(i);
	struct in_flight f;

	if (!n)
		return true;
	if (get(&p->seq) == seq && !change_find(n, p->start, p->end, 0, &f))
		return false;
	atomic_fetch_add_explicit(&n->retried, 1, memory_order_relaxed);
	trace(n->env, reader_hit, n->mm_id, p->start, 0);
	return true;
}
