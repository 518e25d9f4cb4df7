/* SPDX-License-Identifier: MIT */
/*
 * What guests hold of the memory in use: each frame's bytes divided by the
 * number of guest pages that it is (smaps' Pss, for guests).
 *
 * How many pages a frame is, no reference count says: entries of shared tables
 * count once. So two walks: the first counts, for each frame that is not some
 * guest's alone, the pages of all guests that might share it, those of the merge
 * domains asked about; the second adds up.
 *
 * Invariants:
 *  H1  a slot with pages 0 is free. The table is never more than half full.
 *  H2  a frame that the first walk did not meet is one page's (it came later): shares of one call
 *      never say less than there is.
 *
 * Locks: none here; pages are looked up as obs_page_map() does, one by one.
 */
#include "mm/region.h"
#include "obs/obs.h"

#define SLOTS_MIN 4096
#define SHARE_SHIFT 16 /* fraction of a byte */

struct shared_frame {
	uint64_t pfn;
	uint64_t pages;
};

struct sharers {
	struct env *env;
	struct mm *const *mms; /* whose domains count */
	unsigned guests;
	struct shared_frame *slot;
	uint64_t slots, used; /* slots: a power of two */
};

/* The frame's slot, or the free one where it belongs. */
static struct shared_frame *sharers_find(const struct sharers *t, uint64_t pfn)
{
	uint64_t at = pfn * 0x9e3779b97f4a7c15u >> 20;

	while (t->slot[at & (t->slots - 1)].pages && t->slot[at & (t->slots - 1)].pfn != pfn)
		at++;
	return &t->slot[at & (t->slots - 1)];
}

static int sharers_grow(struct sharers *t)
{
	struct sharers next = *t;

	next.slots = t->slots ? 2 * t->slots : SLOTS_MIN;
	next.slot = env_alloc(t->env, next.slots * sizeof(*next.slot));
	if (!next.slot)
		return -ENOMEM;
	for (uint64_t i = 0; i < t->slots; i++)
		if (t->slot[i].pages)
			*sharers_find(&next, t->slot[i].pfn) = t->slot[i];
	env_free(t->env, t->slot, t->slots * sizeof(*t->slot));
	*t = next;
	return 0;
}

static int sharers_add(struct sharers *t, uint64_t pfn)
{
	struct shared_frame *f;

	if (2 * (t->used + 1) > t->slots && sharers_grow(t))
		return -ENOMEM;
	f = sharers_find(t, pfn);
	t->used += !f->pages;
	f->pfn = pfn;
	f->pages++;
	return 0;
}

static bool shared(uint8_t class)
{
	return class == KAGE_PAGE_CLONE || class == KAGE_PAGE_MERGED;
}

/* The frame of a page that was found shared; 0, the zero frame's: it has none any more. */
static uint64_t frame_of(struct mm *mm, gfn_t gfn)
{
	struct mm_lookup l;

	rcu_enter();
	l = mm_lookup(mm, gfn);
	rcu_leave();
	return entry_is_leaf(l.entry) && !(l.entry & ENTRY_SPECIAL) ? l.pfn.v : 0;
}

/* Calls fn with the classes of at most 512 pages at a time; nonzero ends it. */
static int each_run(struct mm *mm, int (*fn)(struct mm *mm, gfn_t at, uint64_t n, const uint8_t *map, void *arg), void *arg)
{
	uint8_t map[BLOCK_PAGES];
	uint64_t n;
	gfn_t at;
	int r = 0;

	for (unsigned i = 0; r == 0 && (n = obs_region_at(mm, i, &at)) != 0; i++) {
		while (r == 0 && n) {
			uint64_t run = MIN(n, BLOCK_PAGES - at.v % BLOCK_PAGES);

			obs_page_map(mm, at, run, map);
			r = fn(mm, at, run, map, arg);
			at = gfn_add(at, run);
			n -= run;
		}
	}
	return r;
}

static int count_run(struct mm *mm, gfn_t at, uint64_t n, const uint8_t *map, void *arg)
{
	struct sharers *t = arg;
	int r = 0;

	for (uint64_t i = 0; r == 0 && i < n; i++) {
		uint64_t pfn = shared(map[i]) ? frame_of(mm, gfn_add(at, i)) : 0;

		if (pfn)
			r = sharers_add(t, pfn);
	}
	return r;
}

static int count_guest(struct mm *mm, void *arg)
{
	struct sharers *t = arg;

	for (unsigned i = 0; i < t->guests; i++)
		if (t->mms[i]->domain == mm->domain)
			return each_run(mm, count_run, t);
	return 0;
}

struct sum {
	const struct sharers *t;
	struct kage_share *out;
	uint64_t clone, merge; /* bytes << SHARE_SHIFT */
};

static int sum_run(struct mm *mm, gfn_t at, uint64_t n, const uint8_t *map, void *arg)
{
	struct sum *s = arg;

	for (uint64_t i = 0; i < n; i++) {
		uint64_t pfn = shared(map[i]) ? frame_of(mm, gfn_add(at, i)) : 0;
		uint64_t pages = pfn && s->t->slots ? sharers_find(s->t, pfn)->pages : 0;

		if (map[i] == KAGE_PAGE_HOME || map[i] == KAGE_PAGE_PRIVATE || map[i] == KAGE_PAGE_HOST_PRIVATE)
			s->out->pages_private++;
		else if (pfn)
			s->out->pages_shared++;
		if (pfn)
			*(map[i] == KAGE_PAGE_MERGED ? &s->merge : &s->clone) += (PAGE_SIZE << SHARE_SHIFT) / MAX(pages, 1u);
	}
	return 0;
}

static void share_of(const struct sharers *t, struct mm *mm, struct kage_share *out)
{
	struct sum s = { .t = t, .out = out };

	*out = (struct kage_share){ 0 };
	each_run(mm, sum_run, &s);
	out->bytes_clone = s.clone >> SHARE_SHIFT;
	out->bytes_merge = s.merge >> SHARE_SHIFT;
	out->bytes = (s.clone + s.merge + (1u << SHARE_SHIFT) / 2) >> SHARE_SHIFT;
	out->bytes += out->pages_private * PAGE_SIZE;
}

int obs_shares(struct mm *const *mms, unsigned guests, struct kage_share *out)
{
	struct host *h = mms[0]->host;
	struct sharers t = { .env = h->env, .mms = mms, .guests = guests };
	int r = host_each_mm(h, count_guest, &t);

	for (unsigned i = 0; r == 0 && i < guests; i++)
		share_of(&t, mms[i], &out[i]);
	env_free(t.env, t.slot, t.slots * sizeof(*t.slot));
	return r;
}
