/* SPDX-License-Identifier: MIT */
/*
 * Counting what is in use, for figures. May run beside everything else: the
 * answer is then a little old and no worse.
 *
 * Locks: pool->lock, so that no extent goes while it is counted.
 */
#include "frame/private.h"

uint64_t pool_forgotten(const struct pool *pool)
{
	return READ_ONCE(pool->priv->forgotten);
}

uint64_t pool_pending(const struct pool *pool)
{
	return READ_ONCE(pool->priv->pending);
}

static bool giant_covers(const struct pool *pool, pfn_t pfn)
{
	pfn_t first = PFN(ALIGN_DOWN(pfn.v, GIANT_PAGES));

	return pfn_section(pool, first) && pfn_block(pool, first)->giant > 0;
}

/* Home pages of one block that an entry maps and that hold memory. */
static uint64_t block_pages(struct pool *pool, pfn_t first, pfn_t end)
{
	struct block *b = pfn_block(pool, first);
	unsigned n = end.v - first.v;
	bool covered = b->refs > 0 || giant_covers(pool, first);
	uint64_t map[8], used = 0;

	if (!covered && READ_ONCE(b->used) == 0)
		return 0;
	pool_populated(pool, first, n, map);
	for (unsigned i = 0; i < n; i++)
		if (bit_test(map, i) &&
		    (covered || READ_ONCE(pfn_frame(pool, pfn_add(first, i))->refs)))
			used++;
	return used;
}

uint64_t pool_home_pages(struct pool *pool)
{
	uint64_t pages = 0;

	lock_take(&pool->priv->lock);
	list_for_each(pos, &pool->priv->extents) {
		struct extent *e = container_of(pos, struct extent, node);
		pfn_t at = e->base, end = pfn_add(e->base, e->npages);

		while (e->kind == EXTENT_HOME && at.v < end.v) {
			pfn_t next = PFN(MIN(ALIGN_DOWN(at.v, BLOCK_PAGES) + BLOCK_PAGES, end.v));

			pages += block_pages(pool, at, next);
			at = next;
		}
	}
	lock_drop(&pool->priv->lock);
	return pages;
}
