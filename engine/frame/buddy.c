/* SPDX-License-Identifier: MIT */
/*
 * The buddy allocator of an arena.
 *
 * Within a 2 MiB block it is the classical buddy: lists of free runs of orders 0
 * to 9, linked through the metadata of their heads. Between blocks two words a
 * section say which blocks are free as a whole (used) and which of those
 * have no memory (hole). A run of order 10 to 18 is any aligned run of blocks
 * that are free as a whole, with memory or without: what lacks memory is
 * populated on the way.
 *
 * Invariants (all under arena->lock):
 *  1. a list holds only populated runs; the head of each has kind FREE and the
 *     list's order, and no other frame of the run has kind FREE.
 *  2. hole bit => used bit clear. used bit clear, hole bit clear <=> the block
 *     is on list 9.
 *  3. a block that is being populated or given back is used, not a hole, on no
 *     list, and counted in in_motion: the host is called without the lock.
 *  4. a frame leaves a list as CACHED before the lock is dropped: a neighbour
 *     that is freed meanwhile must not join it.
 *  5. the sections list is sorted by index.
 *
 * Locks: arena->lock (RANK_BUDDY); pool->lock before it to add and remove
 * sections.
 *
 * Why lists end at order 9: blocks of one run may be with and without memory,
 * and a giant run is rare enough to be searched for.
 */
#include "frame/private.h"

#define SHRINK_BATCH 32

static struct pool *arena_pool(const struct arena *a)
{
	return a->domain->pool;
}

static struct section *section_of(struct list *l)
{
	return container_of(l, struct section, node);
}

static uint64_t block_bit(pfn_t pfn)
{
	return (uint64_t)1 << (pfn.v / BLOCK_PAGES % SECTION_BLOCKS);
}

static pfn_t section_block(const struct section *s, unsigned i)
{
	return PFN((uint64_t)s->index * SECTION_PAGES + i * BLOCK_PAGES);
}

static void add_free(struct arena *a, int64_t frames)
{
	/* Only the lock's holder writes; refill and reaping peek at it. */
	WRITE_ONCE(a->free, READ_ONCE(a->free) + (uint64_t)frames);
}

static void set_bits(struct frame *f, enum frame_kind kind, unsigned order, uint32_t flags)
{
	WRITE_ONCE(f->bits, (uint32_t)kind << FRAME_KIND_SHIFT | order << FRAME_ORDER_SHIFT | flags);
}

static void push(struct arena *a, pfn_t pfn, unsigned order, uint32_t clean)
{
	struct pool *pool = arena_pool(a);
	struct frame *f = pfn_frame(pool, pfn);
	uint32_t next = a->head[order];

	WRITE_ONCE(f->refs, 0);
	set_bits(f, FRAME_FREE, order, clean);
	f->free.prev = 0;
	f->free.next = next;
	if (next)
		pfn_frame(pool, PFN(next))->free.prev = (uint32_t)pfn.v;
	a->head[order] = (uint32_t)pfn.v;
	add_free(a, (int64_t)1 << order);
	if (order == BLOCK_ORDER)
		pfn_section(pool, pfn)->used &= ~block_bit(pfn);
}

/* Takes a run off its list; its head becomes a cached run. Returns FRAME_CLEAN or 0. */
static uint32_t unlink_run(struct arena *a, pfn_t pfn, unsigned order)
{
	struct pool *pool = arena_pool(a);
	struct frame *f = pfn_frame(pool, pfn);
	uint32_t clean = READ_ONCE(f->bits) & FRAME_CLEAN;

	if (f->free.prev)
		pfn_frame(pool, PFN(f->free.prev))->free.next = f->free.next;
	else
		a->head[order] = f->free.next;
	if (f->free.next)
		pfn_frame(pool, PFN(f->free.next))->free.prev = f->free.prev;
	set_bits(f, FRAME_CACHED, order, clean);
	add_free(a, -((int64_t)1 << order));
	if (order == BLOCK_ORDER)
		pfn_section(pool, pfn)->used |= block_bit(pfn);
	return clean;
}

/* Frees a run of order <= 9 and joins it with free buddies. */
static void free_run(struct arena *a, pfn_t pfn, unsigned order)
{
	struct pool *pool = arena_pool(a);
	uint32_t clean = READ_ONCE(pfn_frame(pool, pfn)->bits) & FRAME_CLEAN;

	for (; order < BLOCK_ORDER; order++) {
		pfn_t buddy = PFN(pfn.v ^ (uint64_t)1 << order);
		struct frame *b = pfn_frame(pool, buddy);

		if (frame_kind(b) != FRAME_FREE || frame_order(b) != order)
			break;
		clean &= unlink_run(a, buddy, order);
		set_bits(b, FRAME_TAIL, 0, 0);
		set_bits(pfn_frame(pool, pfn), FRAME_TAIL, 0, 0);
		pfn.v &= ~((uint64_t)1 << order);
	}
	push(a, pfn, order, clean);
}

static pfn_t take_run(struct arena *a, unsigned order)
{
	struct pool *pool = arena_pool(a);
	unsigned have = order;
	uint32_t clean;
	pfn_t pfn;

	while (have <= BLOCK_ORDER && !a->head[have])
		have++;
	if (have > BLOCK_ORDER)
		return PFN_NONE;
	pfn = PFN(a->head[have]);
	clean = unlink_run(a, pfn, have);
	while (have > order) {
		have--;
		push(a, pfn_add(pfn, (uint64_t)1 << have), have, clean);
	}
	set_bits(pfn_frame(pool, pfn), FRAME_CACHED, order, clean);
	return pfn;
}

/* -- sections ------------------------------------------------------------- */

/* pool->lock is held. */
static void adopt_sections(struct arena *a, uint64_t first, uint64_t n)
{
	struct pool *pool = arena_pool(a);
	struct list *after = a->sections.prev;

	lock_take(&a->lock);
	while (after != &a->sections && section_of(after)->index > first)
		after = after->prev;
	for (uint64_t i = first; i < first + n; i++) {
		struct section *s = pool->sections[i];

		s->used = 0;
		s->hole = ~(uint64_t)0;
		s->arena = a;
		list_add(after, &s->node);
		after = &s->node;
	}
	a->nsections += n;
	a->holes += n * SECTION_BLOCKS;
	lock_drop(&a->lock);
}

/* n neighbouring sections, the first a multiple of n. */
static int add_sections(struct arena *a, uint64_t n)
{
	struct pool *pool = arena_pool(a);
	uint64_t first;
	int err;

	lock_take(&pool->priv->lock);
	err = space_take(pool, a->domain, n, (unsigned)n, 0, ARENA_PFN_MAX / SECTION_PAGES, false, &first);
	if (!err) {
		host_huge(pool, PFN(first * SECTION_PAGES), n * SECTION_PAGES, true);
		adopt_sections(a, first, n);
	}
	lock_drop(&pool->priv->lock);
	return err;
}

/* Returns sections without any memory to pfn space. */
static void drop_sections(struct arena *a)
{
	struct pool *pool = arena_pool(a);
	struct list empty;

	list_init(&empty);
	lock_take(&pool->priv->lock);
	lock_take(&a->lock);
	list_for_each_safe(l, tmp, &a->sections) {
		if (section_of(l)->hole != ~(uint64_t)0)
			continue;
		list_del(l);
		list_add(&empty, l);
		a->nsections--;
		a->holes -= SECTION_BLOCKS;
	}
	lock_drop(&a->lock);
	list_for_each_safe(l, tmp, &empty) {
		list_del(l);
		space_give(pool, section_of(l)->index, 1);
	}
	lock_drop(&pool->priv->lock);
}

/* -- memory behind blocks -------------------------------------------------- */

/* Claims a block without memory, lowest first: it is in motion now. PFN_NONE: there is none. */
static pfn_t claim_hole(struct arena *a)
{
	if (!a->holes)
		return PFN_NONE;
	list_for_each(l, &a->sections) {
		struct section *s = section_of(l);

		if (s->hole) {
			pfn_t pfn = section_block(s, (unsigned)__builtin_ctzll(s->hole));

			s->used |= block_bit(pfn);
			s->hole &= ~block_bit(pfn);
			a->holes--;
			a->in_motion++;
			return pfn;
		}
	}
	return PFN_NONE;
}

static void block_arrives(struct arena *a, pfn_t pfn)
{
	a->in_motion--;
	set_bits(pfn_frame(arena_pool(a), pfn), FRAME_CACHED, BLOCK_ORDER, FRAME_CLEAN);
	free_run(a, pfn, BLOCK_ORDER);
}

static void block_leaves(struct arena *a, pfn_t pfn)
{
	struct section *s = pfn_section(arena_pool(a), pfn);

	a->in_motion--;
	a->holes++;
	s->hole |= block_bit(pfn);
	s->used &= ~block_bit(pfn);
}

int buddy_grow(struct arena *a)
{
	struct pool *pool = arena_pool(a);
	pfn_t pfn;
	int err;

	for (;;) {
		lock_take(&a->lock);
		pfn = claim_hole(a);
		lock_drop(&a->lock);
		if (!pfn_is_none(pfn))
			break;
		err = add_sections(a, 1);
		if (err)
			return err;
	}
	err = host_populate(pool, a->domain, pfn, BLOCK_PAGES);
	if (err) /* what came is given back: a hole is empty */
		host_punch(pool, a->domain, pfn, BLOCK_PAGES);
	lock_take(&a->lock);
	if (err)
		block_leaves(a, pfn);
	else
		block_arrives(a, pfn);
	lock_drop(&a->lock);
	return err;
}

static unsigned claim_free_blocks(struct arena *a, uint64_t keep, pfn_t *block)
{
	unsigned n = 0;

	lock_take(&a->lock);
	while (n < SHRINK_BATCH && a->head[BLOCK_ORDER] && READ_ONCE(a->free) >= keep + BLOCK_PAGES) {
		block[n] = PFN(a->head[BLOCK_ORDER]);
		unlink_run(a, block[n], BLOCK_ORDER);
		a->in_motion++;
		n++;
	}
	lock_drop(&a->lock);
	return n;
}

uint64_t buddy_shrink(struct arena *a, uint64_t keep)
{
	struct pool *pool = arena_pool(a);
	pfn_t block[SHRINK_BATCH];
	uint64_t done = 0;
	unsigned n;

	while ((n = claim_free_blocks(a, keep, block)) != 0) {
		for (unsigned i = 0; i < n; i++) {
			host_punch(pool, a->domain, block[i], BLOCK_PAGES);
			host_forget_frames(pool, block[i], BLOCK_PAGES);
		}
		lock_take(&a->lock);
		for (unsigned i = 0; i < n; i++)
			block_leaves(a, block[i]);
		lock_drop(&a->lock);
		done += n;
	}
	if (done)
		drop_sections(a);
	return done;
}

/* -- runs of more than a block --------------------------------------------- */

/* A claimed run: sections from the first on, the same blocks of each. */
struct claim {
	struct section *section[GIANT_SECTIONS];
	unsigned nsections;
	uint64_t mask;                 /* blocks of each section */
	uint64_t hole[GIANT_SECTIONS]; /* of these, without memory */
};

static bool find_in_section(struct section *s, unsigned nblocks, struct claim *c)
{
	for (unsigned i = 0; i < SECTION_BLOCKS; i += nblocks) {
		uint64_t mask = (~(uint64_t)0 >> (SECTION_BLOCKS - nblocks)) << i;

		if (!(s->used & mask)) {
			c->section[0] = s;
			c->mask = mask;
			return true;
		}
	}
	return false;
}

/* n neighbouring sections from this one on, all free? */
static bool find_sections(struct arena *a, struct list *l, unsigned n, struct claim *c)
{
	uint32_t first = section_of(l)->index;

	if (first % n)
		return false;
	for (unsigned i = 0; i < n; i++, l = l->next) {
		if (l == &a->sections || section_of(l)->index != first + i || section_of(l)->used)
			return false;
		c->section[i] = section_of(l);
	}
	c->mask = ~(uint64_t)0;
	return true;
}

static bool find_large(struct arena *a, unsigned order, struct claim *c)
{
	c->nsections = order <= SECTION_SHIFT ? 1 : 1u << (order - SECTION_SHIFT);
	list_for_each(l, &a->sections)
		if (order <= SECTION_SHIFT ? find_in_section(section_of(l), 1u << (order - BLOCK_ORDER), c) :
					     find_sections(a, l, c->nsections, c))
			return true;
	return false;
}

static bool claim_large(struct arena *a, unsigned order, struct claim *c)
{
	bool found;

	lock_take(&a->lock);
	found = find_large(a, order, c);
	for (unsigned i = 0; found && i < c->nsections; i++) {
		struct section *s = c->section[i];

		c->hole[i] = s->hole & c->mask;
		for (uint64_t m = c->mask & ~c->hole[i]; m; m &= m - 1)
			unlink_run(a, section_block(s, (unsigned)__builtin_ctzll(m)), BLOCK_ORDER);
		s->used |= c->mask;
		s->hole &= ~c->mask;
		a->holes -= (unsigned)__builtin_popcountll(c->hole[i]);
		a->in_motion += (unsigned)__builtin_popcountll(c->hole[i]);
	}
	lock_drop(&a->lock);
	return found;
}

static int populate_large(struct arena *a, const struct claim *c)
{
	for (unsigned i = 0; i < c->nsections; i++)
		for (uint64_t m = c->hole[i]; m; m &= m - 1) {
			pfn_t block = section_block(c->section[i], (unsigned)__builtin_ctzll(m));
			int err = host_populate(arena_pool(a), a->domain, block, BLOCK_PAGES);

			if (err)
				return err;
		}
	return 0;
}

static void abandon_large(struct arena *a, const struct claim *c)
{
	for (unsigned i = 0; i < c->nsections; i++)
		for (uint64_t m = c->hole[i]; m; m &= m - 1)
			host_punch(arena_pool(a), a->domain,
				   section_block(c->section[i], (unsigned)__builtin_ctzll(m)), BLOCK_PAGES);
	lock_take(&a->lock);
	for (unsigned i = 0; i < c->nsections; i++)
		for (uint64_t m = c->mask; m; m &= m - 1) {
			pfn_t block = section_block(c->section[i], (unsigned)__builtin_ctzll(m));

			if (c->hole[i] & block_bit(block))
				block_leaves(a, block);
			else
				free_run(a, block, BLOCK_ORDER);
		}
	lock_drop(&a->lock);
}

static pfn_t commit_large(struct arena *a, unsigned order, const struct claim *c)
{
	pfn_t pfn = section_block(c->section[0], (unsigned)__builtin_ctzll(c->mask));

	lock_take(&a->lock);
	for (unsigned i = 0; i < c->nsections; i++)
		a->in_motion -= (unsigned)__builtin_popcountll(c->hole[i]);
	lock_drop(&a->lock);
	set_bits(pfn_frame(arena_pool(a), pfn), FRAME_CACHED, order, 0);
	return pfn;
}

static pfn_t get_large(struct arena *a, unsigned order)
{
	struct claim c;

	while (!claim_large(a, order, &c))
		if (add_sections(a, order <= SECTION_SHIFT ? 1 : (uint64_t)1 << (order - SECTION_SHIFT)) != 0)
			return PFN_NONE;
	if (populate_large(a, &c) != 0) {
		abandon_large(a, &c);
		return PFN_NONE;
	}
	return commit_large(a, order, &c);
}

/* -- what the other files use ---------------------------------------------- */

int arena_init(struct arena *a, struct pool_domain *d)
{
	lock_init(&a->lock, RANK_BUDDY, d->id);
	a->domain = d;
	list_init(&a->sections);
	a->nmag = d->pool->priv->ncpu;
	a->mag = env_alloc(d->pool->env, a->nmag * sizeof(a->mag[0]));
	if (!a->mag)
		return -ENOMEM;
	for (unsigned i = 0; i < a->nmag; i++)
		lock_init(&a->mag[i].lock, RANK_MAGAZINE, i);
	return 0;
}

void arena_finish(struct arena *a)
{
	env_free(arena_pool(a)->env, a->mag, a->nmag * sizeof(a->mag[0]));
}

pfn_t buddy_get(struct arena *a, unsigned order)
{
	if (order > BLOCK_ORDER)
		return get_large(a, order);
	for (;;) {
		pfn_t pfn;

		lock_take(&a->lock);
		pfn = take_run(a, order);
		lock_drop(&a->lock);
		if (!pfn_is_none(pfn) || buddy_grow(a) != 0)
			return pfn;
	}
}

unsigned buddy_get_batch(struct arena *a, uint32_t *pfn, unsigned n)
{
	unsigned got = 0;

	lock_take(&a->lock);
	while (got < n) {
		pfn_t one = take_run(a, 0);

		if (pfn_is_none(one))
			break;
		pfn[got++] = (uint32_t)one.v;
	}
	lock_drop(&a->lock);
	return got;
}

void buddy_put(struct arena *a, pfn_t pfn, unsigned order)
{
	lock_take(&a->lock);
	if (order <= BLOCK_ORDER)
		free_run(a, pfn, order);
	for (uint64_t i = 0; order > BLOCK_ORDER && i < (uint64_t)1 << order; i += BLOCK_PAGES)
		free_run(a, pfn_add(pfn, i), BLOCK_ORDER);
	lock_drop(&a->lock);
}

void buddy_put_batch(struct arena *a, const uint32_t *pfn, unsigned n)
{
	lock_take(&a->lock);
	for (unsigned i = 0; i < n; i++)
		free_run(a, PFN(pfn[i]), 0);
	lock_drop(&a->lock);
}
