/* SPDX-License-Identifier: MIT */
/*
 * pfn space: who has which section, and how small extents share one.
 *
 * A bitmap has a bit for each section of the pool. Large tenants (arenas,
 * extents of more than half a section, device extents) take runs of whole
 * sections, first fit. Extents of up to 32 blocks share the sections of
 * their domain, a bit of section->used for each block; sections with room are
 * on the domain's partial list.
 *
 * Invariants:
 *  1. bit i of `taken` <=> the section is shown; sections[i] is not NULL, unless it leaves: readers that
 *     found it by pfn get a grace period before it is hidden.
 *     Section 0 holds the zero frame and belongs to nobody.
 *  2. a section is on a partial list <=> it is shared and used != ~0.
 *  3. no section below taken_hint is free.
 *  4. giving back allocates nothing and so cannot fail; a section that the host
 *     refuses to unmap stays taken and is never used again.
 *
 * Locks: pool->lock throughout.
 *
 * Why a bitmap and not a tree of free runs: 16 KiB cover 16 TiB, freeing needs no
 * node, and a scan skips 64 sections (8 GiB) a word.
 */
#include "frame/private.h"

#define PARTIAL_TRIES 32

/* The highest section in use in [s, s + n), or UINT64_MAX. */
static uint64_t last_taken(const uint64_t *taken, uint64_t s, uint64_t n)
{
	for (uint64_t e = s + n; e > s;) {
		uint64_t word = (e - 1) / 64, low = MAX(s, word * 64);
		uint64_t bits =
		    taken[word] & (~(uint64_t)0 << low % 64) & (~(uint64_t)0 >> (63 - (e - 1) % 64));

		if (bits)
			return word * 64 + 63 - (unsigned)__builtin_clzll(bits);
		e = low;
	}
	return UINT64_MAX;
}

/* The first section >= s that is in phase. */
static uint64_t in_phase(uint64_t s, unsigned align, unsigned phase)
{
	return s + (phase + align - s % align) % align;
}

static uint64_t space_find(const struct pool_private *p, uint64_t n, unsigned align, unsigned phase,
			   uint64_t end)
{
	uint64_t s = in_phase(p->taken_hint, align, phase);

	while (s < end && n <= end - s) {
		uint64_t busy = last_taken(p->taken, s, n);

		if (busy == UINT64_MAX)
			return s;
		s = busy + 1;
		while (s < end && s % 64 == 0 && p->taken[s / 64] == ~(uint64_t)0)
			s += 64;
		s = in_phase(s, align, phase);
	}
	return UINT64_MAX;
}

static void free_sections(struct pool *pool, struct list *made)
{
	list_for_each_safe(l, tmp, made)
		env_free(pool->env, container_of(l, struct section, node), sizeof(struct section));
}

static int make_sections(struct pool *pool, uint64_t n, struct list *made)
{
	list_init(made);
	for (uint64_t i = 0; i < n; i++) {
		struct section *s = env_alloc(pool->env, sizeof(*s));

		if (!s) {
			free_sections(pool, made);
			return -ENOMEM;
		}
		list_add(made, &s->node);
	}
	return 0;
}

static void mark_taken(struct pool_private *p, uint64_t first, uint64_t n, bool taken)
{
	for (uint64_t i = first; i < first + n; i++) {
		if (taken)
			bit_set(p->taken, i);
		else
			bit_clear(p->taken, i);
	}
	if (!taken)
		p->taken_hint = MIN(p->taken_hint, first);
	else if (first == p->taken_hint)
		p->taken_hint = first + n;
}

int space_take(struct pool *pool, struct pool_domain *d, uint64_t n, unsigned align, unsigned phase,
	       uint64_t end, bool device, uint64_t *first)
{
	struct pool_private *p = pool->priv;
	uint64_t at = space_find(p, n, align, phase, MIN(end, p->nsections));
	struct list made;

	if (at == UINT64_MAX || make_sections(pool, n, &made) != 0)
		return -ENOMEM;
	if (host_show(pool, d, at, n, device) != 0) {
		free_sections(pool, &made);
		return -ENOMEM;
	}
	mark_taken(p, at, n, true);
	p->active += n;
	for (uint64_t i = at; i < at + n; i++) {
		struct section *s = container_of(made.next, struct section, node);

		list_del(&s->node);
		s->index = (uint32_t)i;
		s->domain = d;
		store_release(&pool->sections[i], s);
	}
	*first = at;
	return 0;
}

/* Readers that found the run by pfn alone (candidates of merging) have left it: now it may be hidden. */
static void space_leave(struct defer_node *node, void *arg)
{
	struct section *head = container_of(node, struct section, defer);
	struct pool *pool = arg;
	struct pool_private *p = pool->priv;
	uint64_t first = head->index, n = 1;
	bool hidden;

	list_for_each(l, &head->node)
		n++;
	lock_take(&p->lock);
	hidden = host_hide(pool, first, n);
	if (hidden) {
		mark_taken(p, first, n, false);
	} else {
		p->active += n;
		p->stuck += n;
		list_for_each(l, &head->node) {
			struct section *s = container_of(l, struct section, node);

			store_release(&pool->sections[s->index], s);
		}
		store_release(&pool->sections[first], head);
	}
	lock_drop(&p->lock);
	if (!hidden) {
		env_log(pool->env, KAGE_LOG_WARN, "the host refuses to unmap %llu sections",
			(unsigned long long)n);
		return;
	}
	free_sections(pool, &head->node);
	env_free(pool->env, head, sizeof(*head));
}

void space_give(struct pool *pool, uint64_t first, uint64_t n)
{
	struct section *head = pool->sections[first];

	list_init(&head->node);
	for (uint64_t i = first; i < first + n; i++) {
		struct section *s = pool->sections[i];

		s->arena = NULL;
		s->users = 0;
		s->used = ~(uint64_t)0;
		store_release(&pool->sections[i], NULL);
		if (s != head)
			list_add_tail(&head->node, &s->node);
	}
	pool->priv->active -= n;
	defer_add(&pool->env->defer, &head->defer, space_leave, pool);
}

/* Lowest position of n free neighbours, or -1. */
static int find_blocks(uint64_t used, unsigned n)
{
	uint64_t fit = ~used;

	for (unsigned have = 1; have < n;) {
		unsigned step = MIN(have, n - have);

		fit &= fit >> step;
		have += step;
	}
	return fit ? __builtin_ctzll(fit) : -1;
}

static uint64_t block_mask(unsigned first, unsigned n)
{
	return (~(uint64_t)0 >> (64 - n)) << first;
}

static void take_in_section(struct section *s, unsigned at, unsigned n, pfn_t *base)
{
	s->used |= block_mask(at, n);
	s->users++;
	if (s->used == ~(uint64_t)0)
		list_del(&s->node);
	*base = PFN((uint64_t)s->index * SECTION_PAGES + at * BLOCK_PAGES);
}

int space_take_blocks(struct pool *pool, struct pool_domain *d, unsigned nblocks, pfn_t *base)
{
	unsigned tries = 0;
	uint64_t index;
	struct section *s;

	kage_assert(nblocks > 0 && nblocks <= SECTION_BLOCKS / 2);
	list_for_each(l, &d->partial) {
		struct section *with_room = container_of(l, struct section, node);
		int at = find_blocks(with_room->used, nblocks);

		if (at >= 0) {
			take_in_section(with_room, (unsigned)at, nblocks, base);
			return 0;
		}
		if (++tries == PARTIAL_TRIES)
			break;
	}
	if (space_take(pool, d, 1, 1, 0, UINT64_MAX, false, &index) != 0)
		return -ENOMEM;
	s = pool->sections[index];
	list_add(&d->partial, &s->node);
	take_in_section(s, 0, nblocks, base);
	return 0;
}

void space_give_blocks(struct pool *pool, pfn_t base, unsigned nblocks)
{
	struct section *s = pfn_section(pool, base);

	s->used &= ~block_mask((unsigned)(base.v / BLOCK_PAGES % SECTION_BLOCKS), nblocks);
	if (--s->users == 0) {
		list_del(&s->node);
		space_give(pool, s->index, 1);
	} else if (list_empty(&s->node)) {
		list_add(&s->domain->partial, &s->node);
	}
}
