/* SPDX-License-Identifier: MIT */
/*
 * The snapshot of who is told: one immutable array of listeners and intervals,
 * swapped as a whole.
 *
 * Structures: struct notify_set; n->set is the one in force (NULL: nobody), and
 * n->spare the one before it, kept for its room.
 *
 *  S1  A change (and an age) looks at n->set after it has its slot, and uses
 *      that snapshot until it leaves the slot. So the slots are the hazard
 *      pointers: a snapshot is unused when every change that was in flight
 *      after the swap has left.
 *  S2  While n->set has k entries, n->spare has room for k - 1 (k > 1): it is
 *      the snapshot before, which had at least that many. Leaving out an entry
 *      therefore needs no memory. Entries of both kinds have one size for this.
 *
 *      change                              who swaps (lock held)
 *      use odd                             set = next
 *      fence (a)                           fence (d)
 *      load set                            for each odd use: wait until it is over
 *
 * A change that loads the old set is seen by the swapper (Dekker) and waited
 * for; one that is not seen loads the new set. N6 follows: a listener that was
 * put in is in force only for changes that load the new set, and the call that
 * put it in returns when all others are over; one that was left out gets its
 * end from the changes that loaded the old set, before they leave their slots.
 *
 * Locks: n->lock (RANK_NOTIFY) for all of it; held while waiting.
 *
 * Why not reference counts: a change would write one more shared line, and
 * register would still have to wait for changes that found no set at all. Why
 * not a list: an unregister must not free the entry that a change stands on.
 */
#include "notify/internal.h"

unsigned notify_listening(struct notify *n)
{
	unsigned count;

	lock_take(&n->lock);
	count = set_count(set_current(n));
	lock_drop(&n->lock);
	return count;
}

unsigned set_count(const struct notify_set *s)
{
	return s ? s->listeners + s->intervals : 0;
}

static size_t set_bytes(unsigned capacity)
{
	return sizeof(struct notify_set) + capacity * sizeof(struct set_entry);
}

void set_free(struct notify *n, struct notify_set *s)
{
	if (s)
		env_free(n->env, s, set_bytes(s->capacity));
}

struct notify_set *set_current(struct notify *n)
{
	return atomic_load_explicit(&n->set, memory_order_relaxed);
}

/* A private set with room for `count`: the spare, or a new one in its place. NULL: no memory. */
static struct notify_set *set_next(struct notify *n, unsigned count)
{
	unsigned capacity = 2;
	struct notify_set *s;

	if (n->spare && n->spare->capacity >= count)
		return n->spare;
	while (capacity < count)
		capacity *= 2;
	s = env_alloc(n->env, set_bytes(capacity));
	if (!s)
		return NULL;
	s->capacity = capacity;
	set_free(n, n->spare);
	n->spare = s;
	return s;
}

/* `to` becomes `from` with an entry put in at `pos`, or, if add is NULL, with that one left out. */
static void set_splice(struct notify_set *to, const struct notify_set *from, unsigned pos,
		       const struct set_entry *add)
{
	unsigned count = set_count(from), in = pos, out = pos;

	if (pos)
		memcpy(to->entry, from->entry, pos * sizeof(*add));
	if (add)
		to->entry[out++] = *add;
	else
		in++;
	if (count > in)
		memcpy(to->entry + out, from->entry + in, (count - in) * sizeof(*add));
	to->listeners = from ? from->listeners : 0;
	to->intervals = from ? from->intervals : 0;
}

/* Publishes `next` and waits until nobody uses what was in force; returns that. */
static struct notify_set *set_swap(struct notify *n, struct notify_set *next)
{
	struct notify_set *old = set_current(n);

	atomic_store_explicit(&n->set, next, memory_order_release);
	atomic_thread_fence(memory_order_seq_cst); /* (d): pairs with (a) in change_open() */
	change_drain(n);
	return old;
}

int set_put_in(struct notify *n, unsigned pos, const struct set_entry *e, bool interval)
{
	struct notify_set *old = set_current(n);
	struct notify_set *next = set_next(n, set_count(old) + 1);

	if (!next)
		return -ENOMEM;
	set_splice(next, old, pos, e);
	if (interval)
		next->intervals++;
	else
		next->listeners++;
	intervals_index(next);
	n->spare = NULL;
	n->spare = set_swap(n, next);
	return 0;
}

void set_leave_out(struct notify *n, unsigned pos)
{
	struct notify_set *old = set_current(n);
	struct notify_set *next;

	if (set_count(old) == 1) {
		set_free(n, set_take(n));
		return;
	}
	next = set_next(n, set_count(old) - 1);
	kage_assert(next == n->spare); /* S2 */
	set_splice(next, old, pos, NULL);
	if (pos < old->listeners)
		next->listeners--;
	else
		next->intervals--;
	intervals_index(next);
	n->spare = NULL;
	n->spare = set_swap(n, next);
}

struct notify_set *set_take(struct notify *n)
{
	struct notify_set *old = set_swap(n, NULL);

	set_free(n, n->spare);
	n->spare = NULL;
	return old;
}

int set_find(const struct notify_set *s, unsigned from, unsigned to, const void *who)
{
	for (unsigned i = from; s && i < to; i++)
		if (s->entry[i].who == who)
			return (int)i;
	return -1;
}
