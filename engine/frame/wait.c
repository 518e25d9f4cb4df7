/* SPDX-License-Identifier: MIT */
/*
 * A frame's lock: a bit of its bits word, and a hashed wait table for those who
 * must sleep.
 *
 * A bucket holds the waiters of all frames that hash to it, each with a futex
 * word of its own on its stack, so that an unlock wakes one waiter of just that frame (Linux's page
 * wait queues).
 *
 * Invariants:
 *  1. a waiter is on a bucket's list only if WAITERS is set in its frame;
 *     WAITERS changes only under the bucket's lock.
 *  2. an unlock that finds WAITERS clear has no waiter to wake: LOCKED and
 *     WAITERS are tested and cleared in one atomic step.
 *  3. the waker takes the waiter off the list before it sets its word; after
 *     that it touches only the address.
 *
 * Locks: a bucket's, a leaf: nothing is taken under it.
 */
#include <limits.h>

#include "frame/private.h"

struct waiter {
	struct list node;
	uint64_t pfn;
	_Atomic uint32_t woken;
};

static struct bucket *bucket_of(struct pool *pool, pfn_t pfn)
{
	/* Fibonacci hashing: neighbours go to different buckets. */
	return &pool->priv->bucket[(pfn.v * 0x9e3779b97f4a7c15ull) >> 56];
}
_Static_assert(WAIT_BUCKETS == 256, "the hash has 8 bits");

bool frame_trylock(struct pool *pool, pfn_t pfn)
{
	return !(atomic_fetch_or_explicit(&pfn_frame(pool, pfn)->bits, FRAME_LOCKED, memory_order_acquire) &
		 FRAME_LOCKED);
}

/* True: locked. False: WAITERS is set, and the unlock will come to the bucket. The bucket's lock is held. */
static bool lock_or_announce(struct frame *f)
{
	uint32_t old = READ_ONCE(f->bits);

	while (!atomic_compare_exchange_weak_explicit(
	    &f->bits, &old, old | (old & FRAME_LOCKED ? FRAME_WAITERS : FRAME_LOCKED), memory_order_acquire,
	    memory_order_relaxed))
		;
	return !(old & FRAME_LOCKED);
}

void frame_lock(struct pool *pool, pfn_t pfn)
{
	struct bucket *b = bucket_of(pool, pfn);
	struct waiter w = {.pfn = pfn.v};
	bool waited = false;

	if (likely(frame_trylock(pool, pfn)))
		return;
	for (;;) {
		lock_take(&b->lock);
		if (lock_or_announce(pfn_frame(pool, pfn))) {
			lock_drop(&b->lock);
			return;
		}
		atomic_store_explicit(&w.woken, 0, memory_order_relaxed);
		/* Who was woken and lost to a newcomer goes first the next time. */
		if (waited)
			list_add(&b->waiters, &w.node);
		else
			list_add_tail(&b->waiters, &w.node);
		lock_drop(&b->lock);
		word_wait(&w.woken, 0, UINT_MAX);
		waited = true;
	}
}

/* First waiter of a frame, taken off the list; *more: there are others. */
static struct waiter *take_waiter(struct bucket *b, pfn_t pfn, bool *more)
{
	struct waiter *first = NULL;

	*more = false;
	list_for_each_safe(l, tmp, &b->waiters) {
		struct waiter *w = container_of(l, struct waiter, node);

		if (w->pfn != pfn.v)
			continue;
		if (first) {
			*more = true;
			break;
		}
		first = w;
		list_del(l);
	}
	return first;
}

static void unlock_slow(struct pool *pool, pfn_t pfn)
{
	struct bucket *b = bucket_of(pool, pfn);
	struct waiter *w;
	bool more;

	lock_take(&b->lock);
	w = take_waiter(b, pfn, &more);
	atomic_fetch_and_explicit(&pfn_frame(pool, pfn)->bits, ~(FRAME_LOCKED | (more ? 0 : FRAME_WAITERS)),
				  memory_order_release);
	lock_drop(&b->lock);
	if (!w)
		return;
	atomic_store_explicit(&w->woken, 1, memory_order_release);
	word_wake(&w->woken);
}

void frame_unlock(struct pool *pool, pfn_t pfn)
{
	struct frame *f = pfn_frame(pool, pfn);
	uint32_t old = READ_ONCE(f->bits);

	kage_assert(old & FRAME_LOCKED);
	while (!(old & FRAME_WAITERS))
		if (atomic_compare_exchange_weak_explicit(&f->bits, &old, old & ~FRAME_LOCKED,
							  memory_order_release, memory_order_relaxed))
			return;
	unlock_slow(pool, pfn);
}
