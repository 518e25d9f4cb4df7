/* SPDX-License-Identifier: MIT */
/*
 * How each page of a guest is held.
 *
 * A page is private if nobody else's entry maps its frame: effective W says so
 * at once; without W (a clone that has ended, say) the references along the path
 * are looked at. Read without locks: the answer is true for some instant of the
 * call, page by page.
 */
#include "mm/mirror.h"
#include "mm/region.h"
#include "mm/table.h"
#include "obs/obs.h"

static uint8_t leaf_class(struct mm *mm, const struct mm_lookup *l, gfn_t gfn, const struct region *reg)
{
	enum frame_kind kind;

	if (l->entry & ENTRY_SPECIAL)
		return pfn_is_zero(l->pfn) ? KAGE_PAGE_ZERO : KAGE_PAGE_DEVICE;
	if (l->level > 0) /* blocks lie at home; their frames' metadata stays unread, and so unpopulated */
		return mm_exclusive(mm, gfn, l) ? KAGE_PAGE_HOME : KAGE_PAGE_CLONE;
	kind = frame_kind(pfn_frame(mm->host->pool, l->pfn));
	if (kind == FRAME_STABLE && entry_is_fused(l->entry) && READ_ONCE(pfn_frame(mm->host->pool, l->pfn)->refs) == 1)
		return KAGE_PAGE_PRIVATE; /* looked at, and alone so far */
	if (kind == FRAME_STABLE)
		return KAGE_PAGE_MERGED;
	if (!mm_exclusive(mm, gfn, l))
		return KAGE_PAGE_CLONE;
	return kind == FRAME_HOME ? KAGE_PAGE_HOME : KAGE_PAGE_PRIVATE;
}

/* What is known of one 2 MiB of pfn space: which pages hold memory. */
struct holes {
	pfn_t base; /* PFN_NONE: nothing yet */
	uint64_t populated[8];
};

/* Home pages that were never touched are not held at all, whatever maps them. */
static void mark_holes(struct mm *mm, struct holes *h, pfn_t pfn, uint64_t n, uint8_t *map)
{
	pfn_t base = PFN(ALIGN_DOWN(pfn.v, BLOCK_PAGES));

	if (!pfn_eq(base, h->base)) {
		pool_populated(mm->host->pool, base, BLOCK_PAGES, h->populated);
		h->base = base;
	}
	for (uint64_t i = 0; i < n; i++) {
		uint64_t at = pfn.v - base.v + i;

		if (!bit_test(h->populated, at))
			map[i] = KAGE_PAGE_UNTOUCHED;
	}
}

/* Classifies pages from gfn on that one entry, or one gap, covers; at most n and at most a block. Returns how many. */
static uint64_t classify_run(struct mm *mm, gfn_t gfn, uint64_t n, struct holes *h, uint8_t *map)
{
	const struct region *reg = mm_region(mm, gfn);
	struct mm_lookup l = mm_lookup(mm, gfn);
	uint64_t span = level_pages(MIN(l.level, 1u));
	uint64_t run = reg ? MIN(region_end(reg).v - gfn.v, span - gfn.v % span) : 1;
	uint8_t class = KAGE_PAGE_NONE;

	run = MIN(run, n);
	if (mm_block_mixed(mm, gfn, &l))
		run = 1;
	if (reg && entry_is_leaf(l.entry))
		class = leaf_class(mm, &l, gfn, reg);
	else if (reg)
		class = entry_state(l.entry) == ENTRY_POISON       ? KAGE_PAGE_POISON :
			entry_state(l.entry) == ENTRY_HOST_PRIVATE ? KAGE_PAGE_HOST_PRIVATE :
								     KAGE_PAGE_UNTOUCHED;
	memset(map, class, run);
	if (entry_is_leaf(l.entry) && !(l.entry & ENTRY_SPECIAL) &&
	    (l.level > 0 || frame_kind(pfn_frame(mm->host->pool, l.pfn)) == FRAME_HOME))
		mark_holes(mm, h, l.pfn, run, map);
	return run;
}

void obs_page_map(struct mm *mm, gfn_t gfn, uint64_t npages, uint8_t *map)
{
	struct holes h = { .base = PFN_NONE };

	while (npages) {
		uint64_t run;

		rcu_enter();
		run = classify_run(mm, gfn, npages, &h, map);
		rcu_leave();
		gfn = gfn_add(gfn, run);
		map += run;
		npages -= run;
	}
}
