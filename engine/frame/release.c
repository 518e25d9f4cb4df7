/* SPDX-License-Identifier: MIT */
/*
 * Release: frames on their way back, through a grace period.
 *
 * pool_release() pushes a frame on a stack that is linked through `where`; its
 * bits keep kind PENDING and the order. pool_reap() takes the whole stack,
 * waits for one grace period, sorts it by pfn (a merge sort on the links: it
 * must not need memory) and gives the frames back, neighbours in one call.
 * What a frame was is told by where it lies: a section's arena, or the kind of
 * its block's extent.
 *
 * Invariants:
 *  1. a frame is pushed at most once before it is given back (PENDING says so).
 *  2. only the taker of a stack follows its links: takers never meet, so pushes
 *     need no protection against ABA.
 *  3. a home slot's bits become zero after the slot is empty: who finds HOME
 *     there may use it at once. Where the host's pages are larger than frames, a piece of
 *     one is emptied after that, while its block counts too many slots to be claimed.
 *  4. an extent outlives its pending frames: each holds a reference.
 *
 * Locks: the buddy's and the magazines', below; none is held while waiting. priv->vacating:
 * who empties a piece of a host page counts slots, which nobody else may be half through with.
 */
#include "frame/private.h"

#define SHRINK_FLOOR ((64u << 20) >> PAGE_SHIFT)
#define SORT_BINS 40

static uint64_t next_of(const struct pool *pool, uint64_t pfn)
{
	return READ_ONCE(pfn_frame(pool, PFN(pfn))->where);
}

static void set_next(const struct pool *pool, uint64_t pfn, uint64_t next)
{
	WRITE_ONCE(pfn_frame(pool, PFN(pfn))->where, next);
}

void pool_release(struct pool *pool, pfn_t pfn, unsigned order)
{
	struct pool_private *p = pool->priv;
	struct frame *f = pfn_frame(pool, pfn);
	uint64_t head = atomic_load_explicit(&p->pending_head, memory_order_relaxed);

	if (unlikely(frame_kind(f) == FRAME_PENDING)) {
		env_corrupt(pool->env, "pfn %llx released twice", (unsigned long long)pfn.v);
		return;
	}
	frame_set_kind(f, FRAME_PENDING, order);
	atomic_fetch_and_explicit(&f->bits, ~FRAME_DEAD, memory_order_relaxed); /* PENDING says the same from here on */
	atomic_fetch_add_explicit(&p->pending, (uint64_t)1 << order, memory_order_relaxed);
	/* Release pairs with the taker's exchange: it sees the links and the bits. */
	do
		set_next(pool, pfn.v, head);
	while (!atomic_compare_exchange_weak_explicit(&p->pending_head, &head, pfn.v, memory_order_release,
						      memory_order_relaxed));
}

/* -- sorting ---------------------------------------------------------------- */

static uint64_t merge_sorted(const struct pool *pool, uint64_t x, uint64_t y)
{
	uint64_t head = 0, tail = 0;

	while (x && y) {
		uint64_t *low = x < y ? &x : &y;

		if (tail)
			set_next(pool, tail, *low);
		else
			head = *low;
		tail = *low;
		*low = next_of(pool, *low);
	}
	if (!tail)
		return x ? x : y;
	set_next(pool, tail, x ? x : y);
	return head;
}

/* Bottom up: bin i holds a sorted list of 2^i frames. */
static uint64_t sort_pending(const struct pool *pool, uint64_t list)
{
	uint64_t bin[SORT_BINS] = {0}, sorted = 0;

	while (list) {
		uint64_t run = list;
		unsigned i = 0;

		list = next_of(pool, list);
		set_next(pool, run, 0);
		for (; i < SORT_BINS - 1 && bin[i]; i++) {
			run = merge_sorted(pool, bin[i], run);
			bin[i] = 0;
		}
		bin[i] = merge_sorted(pool, bin[i], run);
	}
	for (unsigned i = 0; i < SORT_BINS; i++)
		sorted = merge_sorted(pool, bin[i], sorted);
	return sorted;
}

/* -- giving back ------------------------------------------------------------ */

static void clear_frames(struct pool *pool, pfn_t pfn, uint64_t n, uint32_t bits)
{
	uint64_t forgotten = 0;

	for (uint64_t i = 0; i < n; i++) {
		struct frame *f = pfn_frame(pool, pfn_add(pfn, i));

		/* Reading an untouched page of the array costs no memory, writing does. */
		if (READ_ONCE(f->where) != 0)
			WRITE_ONCE(f->where, 0);
		if (READ_ONCE(f->refs) != 0)
			WRITE_ONCE(f->refs, 0);
		forgotten += (READ_ONCE(f->bits) & FRAME_CANDIDATE) != 0;
		if (READ_ONCE(f->bits) != bits)
			store_release(&f->bits, bits);
	}
	if (forgotten)
		atomic_fetch_add_explicit(&pool->priv->forgotten, forgotten, memory_order_relaxed);
}

/* The slots are vacant: a block of which none is left in use may be mapped as a whole again. */
static void blocks_unused(struct pool *pool, pfn_t pfn, uint64_t n)
{
	while (n) {
		uint64_t run = MIN(n, BLOCK_PAGES - pfn.v % BLOCK_PAGES);

		atomic_fetch_sub_explicit(&pfn_block(pool, pfn)->used, (uint32_t)run, memory_order_release);
		pfn = pfn_add(pfn, run);
		n -= run;
	}
}

static uint64_t in_use(const struct pool *pool, uint64_t pfn, uint64_t n)
{
	uint64_t found = 0;

	for (uint64_t end = pfn + n; pfn < end; pfn++) {
		const struct frame *f = pfn_frame(pool, PFN(pfn));

		found += READ_ONCE(f->refs) != 0 || READ_ONCE(f->bits) != 0;
	}
	return found;
}

/*
 * Less than a page of the host. The last piece of the page takes all of it back. What no frame of it says may still
 * be on its way: a slot that is claimed and has no reference yet, or has lost its last and is not marked. Then the
 * block counts more slots than frames say, and the page stays. Counting beyond a block's end, nobody claims.
 */
static void vacate_piece(struct pool *pool, struct extent *e, pfn_t pfn, uint64_t n, uint64_t frames)
{
	uint64_t page = ALIGN_DOWN(pfn.v, frames), base = ALIGN_DOWN(pfn.v, BLOCK_PAGES);
	struct block *b;
	uint32_t used;

	if (n == 0)
		return;
	b = pfn_block(pool, pfn);
	used = atomic_fetch_add_explicit(&b->used, BLOCK_PAGES, memory_order_acq_rel);
	clear_frames(pool, pfn, n, 0);
	if (in_use(pool, page, frames) == 0 && in_use(pool, base, BLOCK_PAGES) == used - n)
		host_punch(pool, e->home, PFN(page), frames);
	else
		host_punch(pool, e->home, pfn, n);
	atomic_fetch_sub_explicit(&b->used, BLOCK_PAGES + (uint32_t)n, memory_order_release);
}

static void vacate(struct pool *pool, struct extent *e, pfn_t pfn, uint64_t n)
{
	uint64_t frames = host_page_size() >> PAGE_SHIFT, end = pfn.v + n;
	uint64_t from = MIN(ALIGN_UP(pfn.v, frames), end), to = MAX(ALIGN_DOWN(end, frames), from);

	if (frames > 1)
		lock_take(&pool->priv->vacating);
	vacate_piece(pool, e, pfn, from - pfn.v, frames);
	if (from < to) {
		host_punch(pool, e->home, PFN(from), to - from);
		clear_frames(pool, PFN(from), to - from, 0);
		blocks_unused(pool, PFN(from), to - from);
	}
	vacate_piece(pool, e, PFN(to), end - to, frames);
	if (frames > 1)
		lock_drop(&pool->priv->vacating);
}

static void give_back_extent(struct pool *pool, struct extent *e, pfn_t pfn, uint64_t n)
{
	if (e->kind == EXTENT_HOME) {
		vacate(pool, e, pfn, n);
		atomic_fetch_add_explicit(&pool->priv->vacated, n, memory_order_relaxed);
		pool_uncharge(pool, n);
	} else {
		clear_frames(pool, pfn, n, (uint32_t)FRAME_DEVICE << FRAME_KIND_SHIFT);
	}
	extent_put(e, n);
}

/* A run of frames of one extent that are neighbours. Returns what follows on the list. */
static uint64_t reap_extent(struct pool *pool, struct extent *e, uint64_t pfn, uint64_t *frames)
{
	uint64_t first = pfn, end = pfn;

	while (pfn == end && pfn && pfn_block(pool, PFN(pfn))->extent == e) {
		end += (uint64_t)1 << frame_order(pfn_frame(pool, PFN(pfn)));
		pfn = next_of(pool, pfn);
	}
	give_back_extent(pool, e, PFN(first), end - first);
	*frames += end - first;
	return pfn;
}

/* Frames of one arena: single ones straight to the buddy, a batch for each taking of its lock. */
static uint64_t reap_arena(struct pool *pool, struct arena *a, uint64_t pfn, uint64_t *frames)
{
	uint32_t batch[MAG_BATCH];
	uint64_t done = 0, forgotten = 0;
	unsigned n = 0;

	while (pfn && n < MAG_BATCH && pfn_section(pool, PFN(pfn))->arena == a) {
		struct frame *f = pfn_frame(pool, PFN(pfn));
		uint64_t next = next_of(pool, pfn);
		unsigned order = frame_order(f);

		done += (uint64_t)1 << order;
		forgotten += (READ_ONCE(f->bits) & FRAME_CANDIDATE) != 0;
		if (order || (READ_ONCE(f->bits) & FRAME_POISON)) {
			arena_put(a, PFN(pfn), order);
		} else {
			WRITE_ONCE(f->refs, 0);
			WRITE_ONCE(f->bits, (uint32_t)FRAME_CACHED << FRAME_KIND_SHIFT);
			batch[n++] = (uint32_t)pfn;
		}
		pfn = next;
	}
	if (n)
		buddy_put_batch(a, batch, n);
	pool_uncharge(pool, done);
	if (forgotten)
		atomic_fetch_add_explicit(&pool->priv->forgotten, forgotten, memory_order_relaxed);
	*frames += done;
	return pfn;
}

static uint64_t give_back(struct pool *pool, uint64_t pfn)
{
	uint64_t frames = 0;

	while (pfn) {
		struct arena *a = pfn_section(pool, PFN(pfn))->arena;
		struct extent *e = pfn_block(pool, PFN(pfn))->extent;

		if (a) {
			pfn = reap_arena(pool, a, pfn, &frames);
		} else if (e) {
			pfn = reap_extent(pool, e, pfn, &frames);
		} else {
			env_corrupt(pool->env, "pfn %llx released, but it belongs to nobody",
				    (unsigned long long)pfn);
			frames += (uint64_t)1 << frame_order(pfn_frame(pool, PFN(pfn)));
			pfn = next_of(pool, pfn);
		}
	}
	return frames;
}

/* An arena that has much more than its reserve gives the rest to the host. */
static void shrink_arenas(struct pool *pool)
{
	uint64_t keep = MAX((uint64_t)SHRINK_FLOOR, 8 * pool->priv->reserve);

	for_each_domain(d, pool)
		if (READ_ONCE(d->arena.free) >= keep + BLOCK_PAGES)
			buddy_shrink(&d->arena, keep);
}

uint64_t pool_reap(struct pool *pool)
{
	struct pool_private *p = pool->priv;
	uint64_t head, frames;

	if (atomic_load_explicit(&p->pending_head, memory_order_relaxed) == 0)
		return 0;
	head = atomic_exchange_explicit(&p->pending_head, 0, memory_order_acquire);
	if (head == 0)
		return 0;
	rcu_wait();
	frames = give_back(pool, sort_pending(pool, head));
	atomic_fetch_sub_explicit(&p->pending, frames, memory_order_relaxed);
	shrink_arenas(pool);
	return frames;
}

bool pool_reap_due(const struct pool *pool)
{
	return READ_ONCE(pool->priv->pending) >= PENDING_DUE;
}

uint64_t pending_walk(const struct pool *pool)
{
	uint64_t frames = 0;

	for (uint64_t pfn = READ_ONCE(pool->priv->pending_head); pfn; pfn = next_of(pool, pfn))
		frames += (uint64_t)1 << frame_order(pfn_frame(pool, PFN(pfn)));
	return frames;
}
