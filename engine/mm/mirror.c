/* SPDX-License-Identifier: MIT */
/*
 * What the primary MMU does for a guest that has a mirror: see mirror.h for what
 * sets such a guest apart.
 *
 * Adoption is the one planner that gives a mirrored guest pages of its own: COW
 * break, first touch, repair of what the kernel broke, and taking back a frame
 * whose other users have gone are the same change with other sources:
 *
 *      page                                 target            copied from
 *      diverged                             home or arena     window
 *      leaf, shared                         home or arena     frame
 *      leaf, exclusive, not diverged        its own frame     -
 *      leaf, exclusive, diverged            its own frame     window
 *      none, not diverged                   home or arena     - (a hole), or `touch`, or the file
 *      HOST_PRIVATE                         home or arena     window
 *
 * Invariants:
 *  A1  sources are read between start and end: the mirror has blocked writes, so
 *      what is copied is what the guest has until the mapping is replaced.
 *  A2  an entry that has changed between prepare and commit abandons all of it, and so does a pin that was taken before start (access.c, X3).
 *
 *      adopting                             merging (the same page)
 *      start waits ────────────────────────► its end: a mirror lets overlapping
 *      sees a stable frame: prepare was          changes in one by one
 *      of the old one, -EAGAIN
 *
 * Locks taken: table locks; those of the funnel. mm->range is held by the caller.
 */
#include <unistd.h>

#include "base/guest.h"
#include "mm/change.h"
#include "mm/layer.h"
#include "mm/mirror.h"
#include "mm/region.h"
#include "mm/stable.h"

#define for_each_bit(i, map)                               \
	for (unsigned i = 0; i < BLOCK_PAGES; i++)         \
		if (!bit_test((map), i)) {                 \
			if (!(map)[i / 64])                \
				i |= 63;                   \
		} else

/* V6 */
static void map_widen(const uint64_t map[MIRROR_WORDS], unsigned granule, uint64_t wide[MIRROR_WORDS])
{
	const uint64_t one = ((uint64_t)1 << granule) - 1;

	memmove(wide, map, MIRROR_WORDS * sizeof(map[0]));
	for (unsigned i = 0; granule > 1 && i < BLOCK_PAGES; i += granule)
		if (map[i / 64] >> i % 64 & one)
			wide[i / 64] |= one << i % 64;
}

/* First and one past the last bit that is set; some is. */
static void bits_span(const uint64_t *map, unsigned *first, unsigned *end)
{
	*first = BLOCK_PAGES;
	*end = 0;
	for_each_bit(i, map) {
		*first = MIN(*first, i);
		*end = i + 1;
	}
}

/* Brings the table that holds the pages' entries into being, the guest's alone. */
static int leaf_table(struct mm *mm, gfn_t base, entry_t **table)
{
	struct cursor c;
	int r;

	for (;;) {
		r = table_own(mm, base, 0, true, &c);
		if (r)
			return r;
		if (c.level == 0)
			break;
		r = table_split(mm, c.slot, c.level, GFN(ALIGN_DOWN(base.v, level_pages(c.level))));
		if (r)
			return r;
	}
	*table = c.slot - level_index(base, 0);
	return 0;
}

/* One entry of level 1 maps the block, and none of level 2. Pieces may be mapped beside. */
static bool block_single(const struct pool *pool, pfn_t pfn)
{
	pfn_t giant = PFN(ALIGN_DOWN(pfn.v, GIANT_PAGES));

	return READ_ONCE(pfn_block(pool, PFN(ALIGN_DOWN(pfn.v, BLOCK_PAGES)))->refs) == 1 &&
	       (!pfn_section(pool, giant) || READ_ONCE(pfn_block(pool, giant)->giant) == 0);
}

bool mm_block_alone(const struct mm *mm, gfn_t gfn, const struct mm_lookup *l)
{
	const struct pool *pool = mm->host->pool;
	bool alone = l->writable || (l->level == 1 && mm_exclusive(mm, gfn, l));

	for (unsigned i = 0; alone && !l->writable && i < BLOCK_PAGES; i++)
		alone = READ_ONCE(pfn_frame(pool, pfn_add(entry_pfn(l->entry), i))->refs) == 0;
	return alone;
}

bool mm_block_mixed(const struct mm *mm, gfn_t gfn, const struct mm_lookup *l)
{
	return l->level == 1 && entry_is_leaf(l->entry) && !(l->entry & ENTRY_SPECIAL) && !l->writable &&
	       block_single(mm->host->pool, l->pfn) && !mm_block_alone(mm, gfn, l);
}

bool mm_exclusive(const struct mm *mm, gfn_t gfn, const struct mm_lookup *l)
{
	const struct pool *pool = mm->host->pool;
	entry_t e = entry_load((const entry_t *)&mm->root);
	unsigned level = root_level(e) + 1;

	if (l->writable)
		return true;
	while (entry_is_table(e)) {
		if (READ_ONCE(pfn_frame(pool, entry_pfn(e))->refs) > 1)
			return false;
		level--;
		e = entry_load(table_entries(pool, entry_pfn(e)) + level_index(gfn, level));
	}
	if (l->level == 0)
		return frame_exclusive(mm->host, l->pfn);
	if (l->level > 1) /* somebody may map pieces of it; W says if nobody does */
		return false;
	return block_single(pool, l->pfn) && READ_ONCE(pfn_frame(pool, l->pfn)->refs) == 0;
}

/* -- adoption -------------------------------------------------------------------------- */

#define ADOPT_BY_FILE 2 /* pages that are worth a system call */

struct adopt {
	struct change c;
	struct change_target target;
	gfn_t base;
	const uint64_t *map;
	entry_t *table;
	entry_t old[BLOCK_PAGES];
	pfn_t to[BLOCK_PAGES]; /* of pages in map */
	uint64_t own[MIRROR_WORDS]; /* `to` is the old frame */
	bool failed;		    /* some page could not be mapped, and is as it was */
	bool gather;		    /* exclusive frames that lie elsewhere come home too */
	uint64_t diverged;	    /* pages */
	pfn_t populated_base;	    /* 2 MiB of which `populated` says what holds memory; PFN_NONE: none yet */
	uint64_t populated[MIRROR_WORDS];
	unsigned taken;		    /* targets below this index have been claimed */
};

/* The page's home slot, if it is vacant: what heals the mapping. */
static bool home_frame(struct mm *mm, const struct region *reg, gfn_t gfn, pfn_t *out)
{
	struct pool *pool = mm->host->pool;
	struct extent *e = reg->kind == KAGE_REGION_ANON ? region_home(mm, reg) : NULL;
	struct table_locked w;
	bool claimed;

	if (!e || pool_charge(pool, 1, 0))
		return false;
	*out = extent_pfn(e, gfn);
	w = table_lock(mm->family, 0, gfn);
	claimed = home_claim(mm->host, e, *out, 0);
	table_unlock(w);
	if (!claimed)
		pool_uncharge(pool, 1);
	return claimed;
}

/* An exclusive frame that is neither at home nor pinned. */
static bool frame_moves(struct mm *mm, const struct region *reg, gfn_t gfn, pfn_t pfn)
{
	struct extent *home = reg->kind == KAGE_REGION_ANON ? region_home(mm, reg) : NULL;

	return home && !pfn_eq(extent_pfn(home, gfn), pfn) && frame_pins(pfn_frame(mm->host->pool, pfn)) == 0;
}

/* A target for one page. Trapped memory is filled by its owner, before anybody sees it. */
static int adopt_target(struct adopt *a, unsigned i)
{
	struct mm *mm = a->target.mm;
	gfn_t gfn = gfn_add(a->base, i);
	const struct region *reg = mm_region(mm, gfn);
	entry_t e = a->old[i];
	bool trap = reg->flags & KAGE_REGION_TRAP && entry_is_none(e);
	int r = 0;

	if (entry_is_leaf(e) && !(e & ENTRY_SPECIAL) && frame_exclusive(mm->host, entry_pfn(e)) &&
	    (!a->gather || !frame_moves(mm, reg, gfn, entry_pfn(e)))) {
		a->to[i] = entry_pfn(e);
		bit_set(a->own, i);
		return 0;
	}
	if (trap || !home_frame(mm, reg, gfn, &a->to[i]))
		r = layer_frame(mm, gfn, ARENA_ZERO, &a->to[i]);
	if (r)
		return r;
	a->taken = i + 1;
	return trap ? region_touch(mm, reg, gfn, a->to[i]) : 0;
}

/* A pinned frame stays where it is, and so does all of its granule. */
static bool granule_pinned(struct adopt *a, unsigned i, unsigned n)
{
	bool pinned = false;

	for (unsigned j = i; j < i + n; j++)
		pinned |= entry_is_leaf(a->old[j]) && !(a->old[j] & ENTRY_SPECIAL) &&
			  frame_pins(pfn_frame(a->target.mm->host->pool, entry_pfn(a->old[j]))) != 0;
	return pinned;
}

/* All of the granule is in frames that are the guest's alone and lie as V6 wants them. */
static bool granule_stays(struct adopt *a, unsigned i, unsigned n)
{
	struct mm *mm = a->target.mm;
	pfn_t first = entry_pfn(a->old[i]);
	bool gather = a->gather && !granule_pinned(a, i, n);

	for (unsigned j = i; j < i + n; j++) {
		entry_t e = a->old[j];
		gfn_t gfn = gfn_add(a->base, j);

		if (!entry_is_leaf(e) || e & ENTRY_SPECIAL || entry_pfn(e).v != first.v + (j - i) ||
		    !frame_exclusive(mm->host, entry_pfn(e)) ||
		    (gather && frame_moves(mm, mm_region(mm, gfn), gfn, entry_pfn(e))))
			return false;
	}
	return first.v % n == 0;
}

static void targets_drop(struct adopt *a, unsigned from, unsigned to)
{
	struct mm *mm = a->target.mm;
	struct table_locked w = table_lock(mm->family, 0, a->base);

	for (unsigned i = from; i < to; i++)
		if (!bit_test(a->own, i))
			frame_drop(mm->host, a->to[i], &a->c.dead);
	table_unlock(w);
	for (unsigned i = from; i < to; i++)
		bit_clear(a->own, i);
}

/* All of it to its home slots. False: one of them is taken. */
static bool granule_home(struct adopt *a, unsigned i, unsigned n)
{
	struct mm *mm = a->target.mm;
	const struct region *reg = mm_region(mm, gfn_add(a->base, i));

	for (unsigned j = i; j < i + n; j++) {
		entry_t e = a->old[j];
		gfn_t gfn = gfn_add(a->base, j);

		if (entry_is_leaf(e) && !(e & ENTRY_SPECIAL) && reg->kind == KAGE_REGION_ANON && region_home(mm, reg) &&
		    pfn_eq(entry_pfn(e), extent_pfn(region_home(mm, reg), gfn)) && frame_exclusive(mm->host, entry_pfn(e))) {
			a->to[j] = entry_pfn(e);
			bit_set(a->own, j);
		} else if (!home_frame(mm, reg, gfn, &a->to[j])) {
			targets_drop(a, i, j);
			return false;
		}
	}
	return true;
}

/* As adopt_target(), of a granule of several pages. */
static int adopt_granule(struct adopt *a, unsigned i, unsigned n)
{
	struct mm *mm = a->target.mm;
	const struct region *reg = mm_region(mm, gfn_add(a->base, i));
	bool trap = false;
	int r = 0;

	if (granule_stays(a, i, n)) {
		for (unsigned j = i; j < i + n; j++) {
			a->to[j] = entry_pfn(a->old[j]);
			bit_set(a->own, j);
		}
		return 0;
	}
	if (granule_pinned(a, i, n)) /* scattered while the guest was soft, and attaching it now: nothing else is not whole */
		return -EBUSY;
	for (unsigned j = i; j < i + n; j++)
		trap |= reg->flags & KAGE_REGION_TRAP && entry_is_none(a->old[j]);
	if (trap || !granule_home(a, i, n)) {
		r = layer_frames(mm, gfn_add(a->base, i), (unsigned)__builtin_ctz(n), ARENA_ZERO, &a->to[i]);
		for (unsigned j = i; r == 0 && j < i + n; j++)
			a->to[j] = pfn_add(a->to[i], j - i);
	}
	if (r)
		return r;
	a->taken = i + n;
	for (unsigned j = i; r == 0 && trap && j < i + n; j++)
		if (entry_is_none(a->old[j]))
			r = region_touch(mm, reg, gfn_add(a->base, j), a->to[j]);
	return r;
}

static int adopt_prepare(struct change *c)
{
	struct adopt *a = container_of(c, struct adopt, c);
	struct mm *mm = a->target.mm;
	unsigned granule = mm->mirror->granule;
	struct table_locked w;
	int r = leaf_table(mm, a->base, &a->table);

	if (r)
		return r;
	w = table_lock(mm->family, 0, a->base);
	for_each_bit(i, a->map)
		a->old[i] = entry_load(&a->table[i]);
	table_unlock(w);
	for_each_bit(i, a->map) {
		if (i % granule)
			continue;
		r = granule > 1 ? adopt_granule(a, i, granule) : adopt_target(a, i);
		if (r)
			return r;
	}
	return 0;
}

/* Home memory that was never touched has no contents to copy. */
static bool frame_empty(struct adopt *a, pfn_t pfn)
{
	struct pool *pool = a->target.mm->host->pool;
	pfn_t base = PFN(ALIGN_DOWN(pfn.v, BLOCK_PAGES));

	if (frame_kind(pfn_frame(pool, pfn)) != FRAME_HOME)
		return false;
	if (!pfn_eq(base, a->populated_base)) {
		pool_populated(pool, base, BLOCK_PAGES, a->populated);
		a->populated_base = base;
	}
	return !bit_test(a->populated, pfn.v - base.v);
}

/* What a FILE region has where nothing was ever touched; NULL: it is no such region. */
static const char *file_page(struct mm *mm, gfn_t gfn)
{
	const struct region *reg = mm_region(mm, gfn);

	if (reg->kind == KAGE_REGION_ANON)
		return NULL;
	return pfn_hva(mm->host->pool, extent_pfn(atomic_load(&((struct region *)reg)->extent), gfn));
}

/*
 * Where the page's contents are; NULL: it is a hole, or stays where it is. A guest whose COW the kernel
 * breaks sees all of it in its window: a whole run there is one copy.
 */
static const char *adopt_source(struct adopt *a, unsigned i, const uint64_t *diverged)
{
	struct mm *mm = a->target.mm;
	entry_t e = a->old[i];
	bool window = bit_test(diverged, i) || entry_state(e) == ENTRY_HOST_PRIVATE;

	if (!window && entry_is_none(e))
		return file_page(mm, gfn_add(a->base, i));
	if (!window) {
		if (!entry_is_leaf(e) || pfn_is_zero(entry_pfn(e)) || bit_test(a->own, i) ||
		    (!(e & ENTRY_SPECIAL) && frame_empty(a, entry_pfn(e))))
			return NULL;
		window = mm_native(mm);
	}
	if (window)
		return mm->mirror->ops->window(mm->mirror, gfn_add(a->base, i));
	return pfn_hva(mm->host->pool, entry_pfn(e));
}

/*
 * Copies `n` pages whose sources and targets are contiguous. Through the file: it
 * neither zeroes nor maps the new pages first. What the file would not take is copied by hand.
 */
static void adopt_copy(struct adopt *a, unsigned i, unsigned n, const char *from)
{
	struct pool *pool = a->target.mm->host->pool;
	size_t len = (size_t)n << PAGE_SHIFT, done = 0;
	uint64_t offset;
	int fd;

	if (n >= ADOPT_BY_FILE && pool_file(pool, a->to[i], &fd, &offset) == 0) {
		ssize_t got = pwrite(fd, from, len, (off_t)offset);

		done = got > 0 ? (size_t)got : 0;
	}
	guest_copy((char *)pfn_hva(pool, a->to[i]) + done, from + done, len - done);
}

static unsigned adopt_run(struct adopt *a, unsigned i, const char *from, const uint64_t *diverged)
{
	unsigned n = 1;

	while (i + n < BLOCK_PAGES && bit_test(a->map, i + n) && a->to[i + n].v == a->to[i].v + n &&
	       adopt_source(a, i + n, diverged) == from + ((size_t)n << PAGE_SHIFT))
		n++;
	return n;
}

static bool adopt_unchanged(const struct adopt *a)
{
	for_each_bit(i, a->map)
		if (entry_load(&a->table[i]) != a->old[i])
			return false;
	return true;
}

/* X3 of access.c: a frame that would move is pinned since prepare. Whoever has unpinned one has stored what the copy gets. */
static bool adopt_pinned(const struct adopt *a)
{
	bool pinned = false;

	for_each_bit(i, a->map)
		pinned |= !bit_test(a->own, i) && entry_is_leaf(a->old[i]) && !(a->old[i] & ENTRY_SPECIAL) &&
			  frame_pins(pfn_frame(a->target.mm->host->pool, entry_pfn(a->old[i]))) != 0;
	atomic_thread_fence(memory_order_acquire);
	return pinned;
}

/* A1: writes are blocked here. */
static int adopt_inspect(struct change *c)
{
	struct adopt *a = container_of(c, struct adopt, c);
	struct mirror *m = a->target.mm->mirror;
	uint64_t diverged[MIRROR_WORDS];

	m->ops->diverged(m, a->base, BLOCK_PAGES, diverged);
	rcu_enter(); /* frames that entries still have now stay readable, even if merging takes them away meanwhile */
	if (!adopt_unchanged(a) || adopt_pinned(a)) {
		rcu_leave();
		return -EAGAIN;
	}
	for (unsigned i = 0, n; i < BLOCK_PAGES; i += n) {
		const char *from = bit_test(a->map, i) ? adopt_source(a, i, diverged) : NULL;

		n = from ? adopt_run(a, i, from, diverged) : 1;
		if (from)
			adopt_copy(a, i, n, from);
	}
	rcu_leave();
	for (unsigned w = 0; w < MIRROR_WORDS; w++)
		a->diverged += (uint64_t)__builtin_popcountll(diverged[w] & a->map[w]);
	return 0;
}

static void adopt_lock(struct change *c)
{
	struct adopt *a = container_of(c, struct adopt, c);

	table_lock(a->target.mm->family, 0, a->base);
}

static void adopt_unlock(struct change *c)
{
	struct adopt *a = container_of(c, struct adopt, c);

	lock_drop(table_lock_of(a->target.mm->family, 0, a->base));
}

static int adopt_recheck(struct change *c)
{
	struct adopt *a = container_of(c, struct adopt, c);

	if (!adopt_unchanged(a))
		return -EAGAIN;
	for_each_bit(i, a->own) /* without W they look the same after merging has made a frame a stable one, in place */
		if (!frame_exclusive(a->target.mm->host, a->to[i]))
			return -EAGAIN;
	return 0;
}

static void adopt_commit(struct change *c)
{
	struct adopt *a = container_of(c, struct adopt, c);

	for_each_bit(i, a->map)
		entry_store(&a->table[i], entry_leaf(a->to[i], ENTRY_W));
}

/*
 * The window showed the old frames until the end: only now may another guest find
 * that one of them is its alone, and write to it. Where the host had no mapping left, the window
 * shows them still: then the entry goes back, and what the guest has stays where it is.
 */
static void adopt_after(struct change *c)
{
	struct adopt *a = container_of(c, struct adopt, c);
	struct mm *mm = a->target.mm;
	struct mirror *m = mm->mirror;
	struct table_locked w = table_lock(mm->family, 0, a->base);

	for_each_bit(i, a->map) {
		entry_t e = a->old[i];
		pfn_t gone = entry_is_leaf(e) && !(e & ENTRY_SPECIAL) ? entry_pfn(e) : PFN_NONE;

		if (unlikely(!m->ops->shows(m, gfn_add(a->base, i), a->to[i])) &&
		    entry_load(&a->table[i]) == entry_leaf(a->to[i], ENTRY_W)) {
			entry_store(&a->table[i], e & ~ENTRY_W);
			gone = a->to[i];
			a->failed = true;
		}
		else
			mm_count_add(mm, ksm_cow_breaks, entry_merged(mm->host->pool, e));
		if (!bit_test(a->own, i) && !pfn_is_none(gone))
			frame_drop(mm->host, gone, &c->dead);
	}
	table_unlock(w);
}

static void adopt_cancel(struct change *c)
{
	struct adopt *a = container_of(c, struct adopt, c);
	struct mm *mm = a->target.mm;
	struct table_locked w = table_lock(mm->family, 0, a->base);

	for_each_bit(i, a->map)
		if (i < a->taken && !bit_test(a->own, i))
			frame_drop(mm->host, a->to[i], &c->dead);
	table_unlock(w);
	dead_release(mm->host->pool, &c->dead);
}

static const struct change_ops adopt_ops = {
	.prepare = adopt_prepare, .inspect = adopt_inspect, .lock = adopt_lock, .recheck = adopt_recheck,
	.commit = adopt_commit, .unlock = adopt_unlock, .after = adopt_after, .cancel = adopt_cancel,
};

static void adopt_done(struct adopt *a)
{
	struct mm *mm = a->target.mm;
	uint64_t pages = 0;

	for_each_bit(i, a->map) {
		pages++;
		mm_mark_changed(mm, gfn_add(a->base, i), 1); /* as it was, but in a frame that merging has not seen */
		trace(mm->host->env, cow_break, mm->id, a->base.v + i, 0);
	}
	mm_count_add(mm, pages_adopted, a->diverged);
	mm_count_add(mm, cow_breaks, pages - a->diverged);
}

static int adopt(struct mm *mm, gfn_t base, const uint64_t map[MIRROR_WORDS], bool gather, struct notify_reader *self,
		 const void *owner)
{
	uint64_t wide[MIRROR_WORDS];
	struct adopt a = {
		.c = { .ops = &adopt_ops, .targets = 1, .reason = KAGE_REASON_CLEAR,
		       .flags = KAGE_RANGE_SAME_CONTENT | KAGE_RANGE_OPTIONAL, .owner = owner, .self = self,
		       .adopts = true },
		.target = { .mm = mm }, .base = base, .map = wide, .gather = gather,
	};
	unsigned first, end;
	int r;

	if (!mm->mirror->blocks)
		return -EOPNOTSUPP;
	map_widen(map, mm->mirror->granule, wide);
	bits_span(wide, &first, &end);
	a.target.notify.start = gfn_add(base, first);
	a.target.notify.end = gfn_add(base, end);
	a.c.target = &a.target;
	r = change_run(&a.c);
	if (r == 0)
		adopt_done(&a);
	return r == 0 && a.failed ? -ENOMEM : r;
}

int mm_adopt(struct mm *mm, gfn_t base, const uint64_t map[MIRROR_WORDS], struct notify_reader *self, const void *owner)
{
	return adopt(mm, base, map, false, self, owner);
}

int mm_adopt_page(struct mm *mm, gfn_t gfn, struct notify_reader *self, const void *owner)
{
	uint64_t map[MIRROR_WORDS] = { 0 };

	bit_set(map, gfn.v % BLOCK_PAGES);
	return mm_adopt(mm, GFN(ALIGN_DOWN(gfn.v, BLOCK_PAGES)), map, self, owner);
}

/* Ordinary memory may move; pinned frames are exclusive, and adopting leaves those, and the rest of their granules, where they are. */
int mm_adopt_block(struct mm *mm, gfn_t base)
{
	uint64_t map[MIRROR_WORDS] = { 0 }, any = 0;
	int r;

	for (unsigned i = 0; i < BLOCK_PAGES; i++) {
		const struct region *reg = mm_region(mm, gfn_add(base, i));

		if (reg && reg->kind == KAGE_REGION_ANON && !(reg->flags & (KAGE_REGION_EXTERNAL | KAGE_REGION_TRAP)))
			bit_set(map, i);
	}
	for (unsigned w = 0; w < MIRROR_WORDS; w++)
		any |= map[w];
	r = any ? adopt(mm, base, map, true, NULL, NULL) : 0;
	if (r == 0)
		mm_count(mm, blocks_widened);
	return r;
}

/* Merging has saved memory here, which a whole block of the guest's own would cost again. */
static bool block_merged(struct mm *mm, gfn_t base)
{
	bool merged = false;

	rcu_enter();
	for (unsigned i = 0; !merged && i < BLOCK_PAGES; i++) {
		struct mm_lookup l = mm_lookup(mm, gfn_add(base, i));

		merged = entry_is_leaf(l.entry) && l.level == 0 &&
			 (pfn_is_zero(l.pfn) || frame_kind(pfn_frame(mm->host->pool, l.pfn)) == FRAME_STABLE);
	}
	rcu_leave();
	return merged;
}

/*
 * A mapping call costs what copying 30 pages does, and it is paid again at the next clone. At
 * 64 runs the whole block is cheaper, and takes at most 8 times the memory.
 */
#define WIDEN_RUNS 64

int mm_adopt_runs(struct mm *mm, gfn_t base, const uint64_t map[MIRROR_WORDS])
{
	unsigned runs = 0;
	uint64_t before = 0;

	for (unsigned w = 0; w < MIRROR_WORDS; w++) {
		runs += (unsigned)__builtin_popcountll(map[w] & ~(map[w] << 1 | before >> 63));
		before = map[w];
	}
	if (runs < WIDEN_RUNS || block_merged(mm, base))
		return mm_adopt(mm, base, map, NULL, NULL);
	return mm_adopt_block(mm, base);
}

static int adopt_block(struct mm *mm, gfn_t base, const uint64_t map[MIRROR_WORDS], void *arg)
{
	unsigned reaps = 0;
	int r;

	do
		r = mm_adopt_runs(mm, base, map);
	while (r == -EAGAIN || (r == -ENOMEM && reaps++ < REAPS_MAX && pool_reap(mm->host->pool) > 0));
	return r;
}

/* Entries of a leaf table that say HOST_PRIVATE, whatever the kernel has there by now. Returns the table's end. */
static gfn_t marked_pages(struct mm *mm, gfn_t at, gfn_t end, uint64_t map[MIRROR_WORDS])
{
	gfn_t base = GFN(ALIGN_DOWN(at.v, BLOCK_PAGES)), next = gfn_add(base, BLOCK_PAGES);
	struct mm_lookup l = mm_lookup(mm, at);

	memset(map, 0, MIRROR_WORDS * sizeof(map[0]));
	if (l.level > 0)
		return GFN(ALIGN_DOWN(at.v, level_pages(l.level)) + level_pages(l.level));
	for (; at.v < MIN(next.v, end.v); at.v++)
		if (entry_state(mm_lookup(mm, at).entry) == ENTRY_HOST_PRIVATE)
			bit_set(map, at.v - base.v);
	return next;
}

static int adopt_marked(struct mm *mm, gfn_t start, gfn_t end)
{
	uint64_t map[MIRROR_WORDS], any = 0;
	int r = 0;

	for (gfn_t next; r == 0 && start.v < end.v; start = next) {
		gfn_t base = GFN(ALIGN_DOWN(start.v, BLOCK_PAGES));

		rcu_enter();
		next = marked_pages(mm, start, end, map);
		rcu_leave();
		any = 0;
		for (unsigned w = 0; w < MIRROR_WORDS; w++)
			any |= map[w];
		if (any)
			r = adopt_block(mm, base, map, NULL);
	}
	return r;
}

void mm_settle(struct mm *mm, gfn_t start, gfn_t end)
{
	struct brlock_held held = brlock_read(&mm->range);
	int r = 0;

	if (mm->mirror && mm->mirror->ops->slipped(mm->mirror, start, end)) {
		r = mm_adopt_diverged(mm, start, end);
		atomic_fetch_sub(&mm->mirror->unsettled, 1);
	}
	brlock_read_drop(&mm->range, held);
	if (r)
		env_log(mm->host->env, KAGE_LOG_WARN, "mm %llu gfn %llx: a write that slipped by is seen late: errno %d",
			(unsigned long long)mm->id, (unsigned long long)start.v, -r);
}

/* Home slots that wait for their grace period are where pages belong. mm->range held: the audit sees no half of it. */
static void reap_home(struct mm *mm)
{
	if (pool_pending(mm->host->pool))
		pool_reap(mm->host->pool);
}

/* Whoever asked for a range knows of no page that its owner wants later, and takes what is positive for a success. */
static int later(int r)
{
	return r == KAGE_WAIT ? -EAGAIN : r;
}

int mm_adopt_diverged(struct mm *mm, gfn_t start, gfn_t end)
{
	int r;

	reap_home(mm);
	r = mm->mirror->ops->each_diverged(mm->mirror, start, end, adopt_block, NULL);
	if (!atomic_load(&mm->count.pages_broken))
		return later(r);
	for (unsigned i = 0; r == 0 && i < mm->regions->count; i++) {
		const struct region *reg = &mm->regions->r[i];

		r = adopt_marked(mm, GFN(MAX(start.v, reg->start.v)), GFN(MIN(end.v, region_end(reg).v)));
	}
	return later(r);
}

/* Pages of a leaf table's range that have no entry and are ordinary memory. */
static bool empty_pages(struct mm *mm, gfn_t base, gfn_t start, gfn_t end, uint64_t map[MIRROR_WORDS])
{
	bool any = false;

	memset(map, 0, MIRROR_WORDS * sizeof(map[0]));
	rcu_enter();
	for (gfn_t at = start; at.v < end.v; at.v++) {
		const struct region *reg = mm_region(mm, at);

		if (!reg || reg->kind != KAGE_REGION_ANON || reg->flags & KAGE_REGION_TRAP ||
		    !entry_is_none(mm_lookup(mm, at).entry))
			continue;
		bit_set(map, at.v - base.v);
		any = true;
	}
	rcu_leave();
	return any;
}

void mm_refill(struct mm *mm, gfn_t start, gfn_t end)
{
	uint64_t map[MIRROR_WORDS];

	while (start.v < end.v) {
		gfn_t base = GFN(ALIGN_DOWN(start.v, BLOCK_PAGES)), next = GFN(MIN(end.v, base.v + BLOCK_PAGES));
		struct brlock_held held = brlock_read(&mm->range);
		int r = 0;

		if (mm->mirror && empty_pages(mm, base, start, next, map))
			r = mm_adopt(mm, base, map, NULL, NULL);
		brlock_read_drop(&mm->range, held);
		if (r && r != -EAGAIN)
			return; /* they stay anonymous memory of the window: correct, and one mapping more */
		if (r == 0)
			start = next;
	}
}

static void told(struct change *c)
{
}

int mm_tell(struct mm *mm, gfn_t start, gfn_t end, const void *owner)
{
	static const struct change_ops ops = { .commit = told };
	struct change_target target = { .mm = mm, .notify = { .start = start, .end = end } };
	struct change c = { .ops = &ops, .target = &target, .targets = 1, .reason = KAGE_REASON_CLEAR, .owner = owner };

	return change_run(&c);
}

/* -- what the kernel broke ---------------------------------------------------------------- */

struct broken {
	struct change c;
	struct change_target target;
	gfn_t base;
	uint64_t map[MIRROR_WORDS];
	uint64_t *left;
	entry_t *table;
};

static int broken_prepare(struct change *c)
{
	struct broken *b = container_of(c, struct broken, c);

	return leaf_table(b->target.mm, b->base, &b->table);
}

/*
 * What was found may be long ago: a clone or an adoption may have brought the page home
 * since. The mirror lets no other change of the range be in flight now, and a page that has
 * diverged stays so until one.
 */
static int broken_inspect(struct change *c)
{
	struct broken *b = container_of(c, struct broken, c);
	struct mirror *m = b->target.mm->mirror;
	uint64_t now[MIRROR_WORDS];
	const uint64_t one = ((uint64_t)1 << m->granule) - 1;

	m->ops->diverged(m, b->base, BLOCK_PAGES, now);
	for (unsigned w = 0; w < MIRROR_WORDS; w++)
		b->map[w] &= now[w];
	/* V6. The kernel's pages are granules, or (a granule that was asked for) less: then some of it shows frames still. */
	for (unsigned i = 0; m->granule > 1 && i < BLOCK_PAGES; i += m->granule)
		if ((now[i / 64] >> i % 64 & one) != one) {
			b->left[i / 64] |= b->map[i / 64] & one << i % 64;
			b->map[i / 64] &= ~(one << i % 64);
		} else if (b->map[i / 64] & one << i % 64) {
			b->map[i / 64] |= one << i % 64;
		}
	return 0;
}

/* V5: may the frame of an entry be dropped while the window can still show it? */
static bool entry_droppable(struct host *h, entry_t e)
{
	if (!entry_is_leaf(e) || e & ENTRY_SPECIAL)
		return entry_is_none(e) || e & ENTRY_SPECIAL;
	return pfn_block(h->pool, entry_pfn(e))->extent != NULL;
}

static void broken_commit(struct change *c)
{
	struct broken *b = container_of(c, struct broken, c);
	struct mm *mm = b->target.mm;
	struct table_locked w = table_lock(mm->family, 0, b->base);

	for_each_bit(i, b->map) {
		entry_t e = entry_load(&b->table[i]);

		if (entry_state(e) == ENTRY_HOST_PRIVATE)
			continue;
		if (e & ENTRY_W || !entry_droppable(mm->host, e)) {
			bit_set(b->left, i);
			continue;
		}
		mm_count_add(mm, ksm_cow_breaks, entry_merged(mm->host->pool, e));
		entry_store(&b->table[i], ENTRY_HOST_PRIVATE);
		mm_mark_changed(mm, gfn_add(b->base, i), 1); /* merging takes it for a page of a frame that it knows */
		if (entry_is_leaf(e) && !(e & ENTRY_SPECIAL))
			frame_drop(mm->host, entry_pfn(e), &c->dead);
		mm_count(mm, pages_broken);
	}
	table_unlock(w);
}

static const struct change_ops broken_ops = {
	.prepare = broken_prepare, .inspect = broken_inspect, .commit = broken_commit,
};

int mm_host_private(struct mm *mm, gfn_t base, const uint64_t map[MIRROR_WORDS], uint64_t left[MIRROR_WORDS])
{
	struct broken b = {
		.c = { .ops = &broken_ops, .targets = 1, .reason = KAGE_REASON_CLEAR, .owner = mm->mirror,
		       .flags = KAGE_RANGE_SAME_CONTENT | KAGE_RANGE_OPTIONAL, .adopts = true },
		.target = { .mm = mm }, .base = base, .left = left,
	};
	unsigned first, end;

	map_widen(map, mm->mirror->granule, b.map);
	memset(left, 0, MIRROR_WORDS * sizeof(left[0]));
	bits_span(b.map, &first, &end);
	b.target.notify.start = gfn_add(base, first);
	b.target.notify.end = gfn_add(base, end);
	b.c.target = &b.target;
	return change_run(&b.c);
}

/* -- reconciling ----------------------------------------------------------------------------- */

struct reconcile {
	bool adopt;
	uint64_t left; /* pages that are the host kernel's now */
};

static uint64_t map_count(const uint64_t map[MIRROR_WORDS])
{
	uint64_t n = 0;

	for (unsigned w = 0; w < MIRROR_WORDS; w++)
		n += (uint64_t)__builtin_popcountll(map[w]);
	return n;
}

static int reconcile_held(struct mm *mm, gfn_t base, const uint64_t map[MIRROR_WORDS], struct reconcile *rc)
{
	uint64_t left[MIRROR_WORDS], all[MIRROR_WORDS];
	int r;

	if (rc->adopt)
		return mm_adopt_runs(mm, base, map);
	r = mm_host_private(mm, base, map, left);
	if (r)
		return r;
	for (unsigned w = 0; w < MIRROR_WORDS; w++)
		all[w] = map[w] | left[w];
	rc->left += map_count(all);
	if (!map_count(left) || !mm->mirror->blocks)
		return 0;
	r = mm_adopt(mm, base, left, NULL, NULL);
	map_widen(left, mm->mirror->granule, left);
	for (unsigned w = 0; w < MIRROR_WORDS; w++)
		all[w] &= left[w];
	if (r == 0)
		rc->left -= map_count(all);
	return r == -ETIMEDOUT || r == -EAGAIN ? 0 : r; /* the next one */
}

static int reconcile_block(struct mm *mm, gfn_t base, const uint64_t map[MIRROR_WORDS], void *arg)
{
	struct reconcile *rc = arg;
	struct brlock_held held;
	uint64_t now[MIRROR_WORDS];
	unsigned reaps = 0;
	int r;

	do {
		held = brlock_read(&mm->range);
		memcpy(now, map, sizeof(now));
		for (unsigned i = 0; i < BLOCK_PAGES; i++) /* unmapped since */
			if (!mm_region(mm, gfn_add(base, i)))
				bit_clear(now, i);
		r = map_count(now) ? reconcile_held(mm, base, now, rc) : 0;
		if (r == -ENOMEM && reaps++ < REAPS_MAX && pool_reap(mm->host->pool) > 0)
			r = -EAGAIN;
		brlock_read_drop(&mm->range, held);
	} while (r == -EAGAIN);
	return r;
}

int64_t mm_reconcile(struct mm *mm, gfn_t start, gfn_t end, bool adopts)
{
	struct reconcile rc = { .adopt = adopts };
	struct brlock_held held;
	int r;

	if (adopts && !mm->mirror->blocks)
		return -EOPNOTSUPP;
	if (adopts) {
		held = brlock_read(&mm->range);
		reap_home(mm);
		brlock_read_drop(&mm->range, held);
	}
	r = mm->mirror->ops->each_diverged(mm->mirror, start, end, reconcile_block, &rc);
	return r ? later(r) : (int64_t)rc.left;
}

/* -- holes ----------------------------------------------------------------------------------- */

int gfn_ranges_add(struct env *env, struct gfn_ranges *list, gfn_t start, gfn_t end)
{
	if (list->n == list->room) {
		unsigned room = list->room ? 2 * list->room : 16;
		struct gfn_range *more = env_alloc(env, room * sizeof(*more));

		if (!more)
			return -ENOMEM;
		if (list->n)
			memcpy(more, list->r, list->n * sizeof(*more));
		env_free(env, list->r, list->room * sizeof(*more));
		list->r = more;
		list->room = room;
	}
	list->r[list->n++] = (struct gfn_range){ start, end };
	return 0;
}

void gfn_ranges_free(struct env *env, struct gfn_ranges *list)
{
	env_free(env, list->r, list->room * sizeof(*list->r));
	*list = (struct gfn_ranges){ 0 };
}

struct holes {
	struct mm *mm;
	struct gfn_ranges *list;
};

static int hole_add(struct holes *h, gfn_t start, gfn_t end)
{
	struct gfn_range *last = h->list->n ? &h->list->r[h->list->n - 1] : NULL;

	if (!last || last->end.v != start.v)
		return gfn_ranges_add(h->mm->host->env, h->list, start, end);
	last->end = end;
	return 0;
}

/* The first byte of the pool's file at or after `at` that holds memory; `end` if none does before it. */
static uint64_t next_data(int fd, uint64_t at, uint64_t end)
{
	off_t data = lseek(fd, (off_t)at, SEEK_DATA);

	if (data < 0)
		return errno == ENXIO ? end : at; /* in doubt it is data */
	return MIN((uint64_t)data, end);
}

/* An exclusive entry of level 1 or 2. A giant that is not empty is split, for its blocks to be looked at. */
static int hole_entry(struct holes *h, gfn_t gfn, const struct mm_lookup *l, gfn_t *next)
{
	uint64_t pages = level_pages(l->level), off, bytes = pages << PAGE_SHIFT;
	struct mm *mm = h->mm;
	struct cursor c;
	int fd, r;

	*next = gfn_add(gfn, pages);
	if (pool_file(mm->host->pool, l->pfn, &fd, &off))
		return 0;
	if (next_data(fd, off, off + bytes) == off + bytes)
		return hole_add(h, gfn, *next);
	if (l->level == 1)
		return 0;
	*next = gfn;
	r = table_own(mm, gfn, l->level, false, &c);
	return r ? r : table_split(mm, c.slot, c.level, gfn);
}

int mm_own_holes(struct mm *mm, struct gfn_ranges *out)
{
	struct holes h = { .mm = mm, .list = out };
	gfn_t at, next, end;
	int r = 0;

	for (unsigned i = 0; r == 0 && i < mm->regions->count; i++) {
		const struct region *reg = &mm->regions->r[i];

		end = region_end(reg);
		if (reg->kind != KAGE_REGION_ANON || reg->flags & (KAGE_REGION_EXTERNAL | KAGE_REGION_TRAP))
			continue;
		for (at = reg->start; r == 0 && at.v < end.v; at = next) {
			struct mm_lookup l = mm_lookup(mm, at);
			uint64_t step = level_pages(MAX(l.level, 1u));
			bool block = entry_is_leaf(l.entry) && l.level > 0 && at.v % level_pages(l.level) == 0 &&
				     at.v + level_pages(l.level) <= end.v;

			next = GFN(ALIGN_DOWN(at.v, step) + step);
			if (block && mm_block_alone(mm, at, &l))
				r = hole_entry(&h, at, &l, &next);
		}
	}
	return r;
}
