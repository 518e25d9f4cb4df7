/* SPDX-License-Identifier: MIT */
/*
 * Allocation from an arena, and its per-CPU caches of single frames.
 *
 * A magazine holds up to 64 frames of the CPU that a thread happens to run on; it moves 32
 * at a time from and to the buddy. Its lock is only ever tried, except
 * by the drain, and the buddy is never called under it: batches travel in a local
 * array.
 *
 * Invariants:
 *  1. a frame in a magazine, or on its way to or from one, is CACHED with
 *     order 0 and no references.
 *  2. FRAME_CLEAN in a CACHED frame means that it is zero; whoever frees a
 *     frame that was in use drops the flag.
 *  3. the charge for an allocation is taken before the frame, and given back
 *     after it.
 *
 * Locks: a magazine's (RANK_MAGAZINE), the buddy's through buddy.c; never both.
 */
#include <sched.h>

#include "frame/private.h"

static struct magazine *mag_here(struct arena *a)
{
	unsigned cpu = (unsigned)sched_getcpu();

	return &a->mag[likely(cpu < a->nmag) ? cpu : cpu % a->nmag];
}

/*
 * Takes what of `pfn` fits; the rest goes back to the buddy. They will leave in the order in which they stand there,
 * which is mostly that of memory: neighbours are copied to faster one after the other.
 */
static void mag_stock(struct arena *a, const uint32_t *pfn, unsigned n)
{
	struct magazine *m = mag_here(a);
	unsigned kept = 0;

	if (lock_try(&m->lock)) {
		kept = MIN(n, MAG_SIZE - m->count);
		for (unsigned i = kept; i-- > 0;)
			m->pfn[m->count++] = pfn[i];
		lock_drop(&m->lock);
	}
	if (kept < n)
		buddy_put_batch(a, pfn + kept, n - kept);
}

static pfn_t mag_get(struct arena *a)
{
	struct magazine *m = mag_here(a);
	uint32_t batch[MAG_BATCH];
	uint32_t pfn = 0;
	unsigned n;

	if (unlikely(!lock_try(&m->lock)))
		return PFN_NONE;
	if (likely(m->count))
		pfn = m->pfn[--m->count];
	lock_drop(&m->lock);
	if (likely(pfn))
		return PFN(pfn);
	n = buddy_get_batch(a, batch, MAG_BATCH);
	if (READ_ONCE(a->free) < a->domain->pool->priv->reserve / 2)
		env_due(a->domain->pool->env);
	if (n == 0)
		return PFN_NONE;
	mag_stock(a, batch + 1, n - 1);
	return PFN(batch[0]);
}

static void mag_put(struct arena *a, pfn_t pfn)
{
	struct magazine *m = mag_here(a);
	uint32_t batch[MAG_BATCH];
	unsigned n = 0;

	if (unlikely(!lock_try(&m->lock))) {
		buddy_put(a, pfn, 0);
		return;
	}
	if (unlikely(m->count == MAG_SIZE)) {
		/* The oldest go: the newest are in the CPU's cache. */
		n = MAG_BATCH;
		memcpy(batch, m->pfn, sizeof(batch));
		m->count -= n;
		memmove(m->pfn, m->pfn + n, m->count * sizeof(m->pfn[0]));
	}
	m->pfn[m->count++] = (uint32_t)pfn.v;
	lock_drop(&m->lock);
	if (unlikely(n))
		buddy_put_batch(a, batch, n);
}

void magazine_drain_all(struct arena *a)
{
	for (unsigned i = 0; i < a->nmag; i++) {
		struct magazine *m = &a->mag[i];
		uint32_t all[MAG_SIZE];
		unsigned n;

		lock_take(&m->lock);
		n = m->count;
		memcpy(all, m->pfn, n * sizeof(all[0]));
		m->count = 0;
		lock_drop(&m->lock);
		buddy_put_batch(a, all, n);
	}
}

static pfn_t get_frames(struct arena *a, unsigned order)
{
	pfn_t pfn = order == 0 ? mag_get(a) : PFN_NONE;

	if (likely(!pfn_is_none(pfn)))
		return pfn;
	pfn = buddy_get(a, order);
	if (likely(!pfn_is_none(pfn)))
		return pfn;
	magazine_drain_all(a);
	return buddy_get(a, order);
}

static void frame_born(struct pool *pool, pfn_t pfn, unsigned order, enum frame_kind kind)
{
	struct frame *f = pfn_frame(pool, pfn);

	for (uint64_t i = 1; i < (uint64_t)1 << order; i++) {
		WRITE_ONCE(f[i].refs, 0);
		WRITE_ONCE(f[i].where, 0);
		WRITE_ONCE(f[i].bits, (uint32_t)FRAME_TAIL << FRAME_KIND_SHIFT);
	}
	WRITE_ONCE(f->where, 0);
	WRITE_ONCE(f->refs, 1);
	WRITE_ONCE(f->bits, (uint32_t)kind << FRAME_KIND_SHIFT | order << FRAME_ORDER_SHIFT);
}

int arena_alloc(struct pool *pool, uint32_t domain, unsigned order, enum frame_kind kind, unsigned flags,
		pfn_t *out)
{
	struct pool_domain *d = domain_find(pool, domain);
	uint64_t n = (uint64_t)1 << order;
	bool clean;
	pfn_t pfn;
	int err;

	kage_assert(order <= ARENA_MAX_ORDER);
	if (unlikely(!d)) {
		err = domain_get(pool, domain, &d);
		if (err)
			return err;
	}
	err = pool_charge(pool, n, flags);
	if (unlikely(err))
		return err;
	pfn = get_frames(&d->arena, order);
	if (unlikely(pfn_is_none(pfn))) {
		pool_uncharge(pool, n);
		return -ENOMEM;
	}
	clean = READ_ONCE(pfn_frame(pool, pfn)->bits) & FRAME_CLEAN;
	frame_born(pool, pfn, order, kind);
	if ((flags & ARENA_ZERO) && !clean)
		memset(pfn_hva(pool, pfn), 0, n << PAGE_SHIFT);
	*out = pfn;
	return 0;
}

void arena_split(struct pool *pool, pfn_t pfn)
{
	struct frame *f = pfn_frame(pool, pfn);
	uint64_t n = (uint64_t)1 << frame_order(f);
	enum frame_kind kind = frame_kind(f);

	for (uint64_t i = 0; i < n; i++) {
		WRITE_ONCE(f[i].refs, 1);
		WRITE_ONCE(f[i].bits, (uint32_t)kind << FRAME_KIND_SHIFT);
	}
}

static bool any_poison(struct pool *pool, pfn_t pfn, unsigned order)
{
	for (uint64_t i = 0; i < (uint64_t)1 << order; i++)
		if (READ_ONCE(pfn_frame(pool, pfn_add(pfn, i))->bits) & FRAME_POISON)
			return true;
	return false;
}

/* Broken memory is never handed out again: its frame is set aside, the rest goes back in halves. */
static void put_poisoned(struct arena *a, pfn_t pfn, unsigned order)
{
	struct frame *f = pfn_frame(a->domain->pool, pfn);

	if (order) {
		arena_put(a, pfn, order - 1);
		arena_put(a, pfn_add(pfn, (uint64_t)1 << (order - 1)), order - 1);
		return;
	}
	lock_take(&a->lock);
	a->poisoned++;
	lock_drop(&a->lock);
	WRITE_ONCE(f->refs, 0);
	WRITE_ONCE(f->bits, (uint32_t)FRAME_RESERVED << FRAME_KIND_SHIFT | FRAME_POISON);
}

void arena_put(struct arena *a, pfn_t pfn, unsigned order)
{
	struct frame *f = pfn_frame(a->domain->pool, pfn);

	if (unlikely(any_poison(a->domain->pool, pfn, order))) {
		put_poisoned(a, pfn, order);
		return;
	}
	WRITE_ONCE(f->refs, 0);
	WRITE_ONCE(f->bits, (uint32_t)FRAME_CACHED << FRAME_KIND_SHIFT | order << FRAME_ORDER_SHIFT);
	if (order)
		buddy_put(a, pfn, order);
	else
		mag_put(a, pfn);
}

void arena_free(struct pool *pool, pfn_t pfn)
{
	struct arena *a = pfn_section(pool, pfn)->arena;
	unsigned order = frame_order(pfn_frame(pool, pfn));

	kage_assert(a);
	arena_put(a, pfn, order);
	pool_uncharge(pool, (uint64_t)1 << order);
}
