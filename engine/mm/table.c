/* SPDX-License-Identifier: MIT */
/*
 * Primary tables: descending, un-sharing, splitting, dropping.
 *
 * Un-sharing one table (the heart of clones). T is reached through a slot
 * without W. Under the slot's lock, which also guards T's reference count:
 *
 *   refs == 1   nobody else reaches T: take it over. T's own entries may carry
 *               a W that dates from before the clone, so W is cleared in all of
 *               them (the clear moves one level down), then set in the slot.
 *   refs  > 1   copy T without the W bits, take a reference on all its children,
 *               *then* drop the reference on T and point the slot to the copy.
 *
 *   A un-shares T                        B, the other user of T
 *   children.refs++                      lock(slot level)   <- same lock
 *   T.refs-- (2 -> 1)                    sees T.refs == 1: all of T is its own, and
 *   unlock                               sees children.refs == 2: they are not
 *
 * Invariants (beside M1 to M5 in mm.h):
 *  T1  block refs fall to 0 only with the level-1 and the level-0 lock held, and
 *      4 KiB references of its pieces change under the level-0 lock: so exactly
 *      one of "last block entry goes" and "last 4 KiB entry goes" sees a dead
 *      piece.
 *  T2  a giant's reference is turned into block references before it falls, and
 *      readers look at the giant first: a piece never looks unused in between.
 *
 * Locks taken: slot lock, then the lock one level down (then level 0 for blocks).
 */
#include "mm/table.h"
#include "mm/fused.h"
#include "mm/stable.h"

struct lock *table_lock_of(struct family *f, unsigned level, gfn_t gfn)
{
	uint64_t range = gfn.v >> (LEVEL_BITS * (level + 1));

	switch (level) {
	case 0:
		return &f->level0[range % TABLE_LOCKS_0];
	case 1:
		return &f->level1[range % TABLE_LOCKS_1];
	case 2:
		return &f->level2[range % TABLE_LOCKS_2];
	case 3:
		return &f->level3;
	default:
		return &f->level4;
	}
}

struct lock *table_lock_root(struct family *f)
{
	return &f->top;
}

static struct table_locked slot_lock(struct mm *mm, const entry_t *slot, unsigned level, gfn_t gfn)
{
	struct table_locked w = { slot == (const entry_t *)&mm->root ? &mm->family->top :
								       table_lock_of(mm->family, level, gfn) };

	lock_take(w.lock);
	return w;
}

static inline uint32_t refs_read(const struct frame *f)
{
	return atomic_load_explicit(&f->refs, memory_order_relaxed);
}

/* Plain add: the table lock of the range excludes every other writer. */
static inline uint32_t refs_add(struct frame *f, int n)
{
	uint32_t v = refs_read(f) + n;

	atomic_store_explicit(&f->refs, v, memory_order_relaxed);
	return v;
}

/*
 * Called with the table lock under which the last entry went: until the frame is
 * released (after the end of the change) FRAME_DEAD keeps its home slot from being
 * claimed by a fault that finds the entry empty, and `where` from being taken for the owner
 * (release: who reads the link there sees the bit; invariant 6 of merge/candidate.c).
 */
void dead_add(struct pool *pool, struct dead *d, pfn_t pfn, unsigned order)
{
	struct frame *f = pfn_frame(pool, pfn);

	atomic_fetch_or_explicit(&f->bits, FRAME_DEAD, memory_order_relaxed);
	atomic_store_explicit(&f->where, d->head, memory_order_release);
	d->head = pfn.v << 8 | order;
	d->pages += (uint64_t)1 << order;
}

void dead_release(struct pool *pool, struct dead *d)
{
	while (d->head) {
		pfn_t pfn = PFN(d->head >> 8);
		unsigned order = d->head & 0xff;

		d->head = atomic_load_explicit(&pfn_frame(pool, pfn)->where, memory_order_relaxed);
		pool_release(pool, pfn, order);
	}
	d->pages = 0;
}

int table_new(struct mm *mm, unsigned level, pfn_t *out)
{
	pfn_t pfn;
	int r = arena_alloc(mm->host->pool, mm->domain, 0, FRAME_TABLE, ARENA_ZERO, &pfn);

	if (r)
		return r;
	atomic_store_explicit(&pfn_frame(mm->host->pool, pfn)->where, level, memory_order_relaxed);
	*out = pfn;
	return 0;
}

/* -- references of what entries point to -------------------------------- */

static _Atomic int32_t *block_refs(struct pool *pool, pfn_t pfn, unsigned level)
{
	struct block *b = pfn_block(pool, pfn);

	return level == 1 ? &b->refs : &b->giant;
}

static inline int32_t block_refs_read(struct pool *pool, pfn_t pfn, unsigned level)
{
	return atomic_load_explicit(block_refs(pool, pfn, level), memory_order_acquire);
}

static int32_t block_refs_add(struct pool *pool, pfn_t pfn, unsigned level, int n)
{
	_Atomic int32_t *refs = block_refs(pool, pfn, level);
	int32_t v = atomic_load_explicit(refs, memory_order_relaxed) + n;

	atomic_store_explicit(refs, v, memory_order_release);
	return v;
}

/* A block entry covers the frame. The giant first: T2. */
static bool block_covers(struct pool *pool, pfn_t pfn)
{
	pfn_t giant = PFN(ALIGN_DOWN(pfn.v, GIANT_PAGES));

	if (pfn_section(pool, giant) && block_refs_read(pool, giant, 2) > 0)
		return true;
	return block_refs_read(pool, PFN(ALIGN_DOWN(pfn.v, BLOCK_PAGES)), 1) > 0;
}

bool frame_in_block(struct host *h, pfn_t pfn)
{
	return frame_kind(pfn_frame(h->pool, pfn)) == FRAME_HOME && block_covers(h->pool, pfn);
}

bool frame_exclusive(struct host *h, pfn_t pfn)
{
	struct frame *f = pfn_frame(h->pool, pfn);
	enum frame_kind kind = frame_kind(f);

	if (kind == FRAME_STABLE || refs_read(f) != 1)
		return false;
	return kind != FRAME_HOME || !block_covers(h->pool, pfn);
}

bool block_exclusive(struct mm *mm, pfn_t pfn, gfn_t gfn)
{
	struct pool *pool = mm->host->pool;
	struct table_locked w;
	bool alone = true;

	if (block_refs_read(pool, PFN(ALIGN_DOWN(pfn.v, GIANT_PAGES)), 2) > 0 ||
	    block_refs_read(pool, pfn, 1) != 1)
		return false;
	w = table_lock(mm->family, 0, gfn);
	for (unsigned i = 0; alone && i < LEVEL_ENTRIES; i++)
		alone = refs_read(pfn_frame(pool, pfn_add(pfn, i))) == 0;
	table_unlock(w);
	return alone;
}

void frame_drop(struct host *h, pfn_t pfn, struct dead *dead)
{
	struct frame *f = pfn_frame(h->pool, pfn);

	if (frame_kind(f) == FRAME_STABLE) {
		if (stable_drop(h, pfn))
			dead_add(h->pool, dead, pfn, 0);
		return;
	}
	if (refs_add(f, -1) == 0 && !(frame_kind(f) == FRAME_HOME && block_covers(h->pool, pfn)))
		dead_add(h->pool, dead, pfn, 0);
}

static void frame_take(struct host *h, pfn_t pfn)
{
	struct frame *f = pfn_frame(h->pool, pfn);

	if (frame_kind(f) == FRAME_STABLE)
		atomic_fetch_add_explicit(&f->refs, 1, memory_order_relaxed);
	else
		refs_add(f, 1);
}

/* The last block entry of a block goes: pieces that no 4 KiB entry maps die. Level-1 lock held. */
static void block_drop(struct family *f, pfn_t pfn, gfn_t gfn, struct dead *dead)
{
	struct pool *pool = f->host->pool;
	struct table_locked w = table_lock(f, 0, gfn);
	unsigned used = 0;

	if (block_refs_add(pool, pfn, 1, -1) == 0) {
		for (unsigned i = 0; i < LEVEL_ENTRIES; i++)
			used += refs_read(pfn_frame(pool, pfn_add(pfn, i))) != 0;
		if (used == 0)
			dead_add(pool, dead, pfn, LEVEL_BITS);
		for (unsigned i = 0; used && i < LEVEL_ENTRIES; i++)
			if (refs_read(pfn_frame(pool, pfn_add(pfn, i))) == 0)
				dead_add(pool, dead, pfn_add(pfn, i), 0);
	}
	table_unlock(w);
}

/* One entry of `level` goes. The lock of the slot is held; level 2 takes the locks below. */
static void leaf_drop(struct family *f, entry_t e, unsigned level, gfn_t gfn, struct dead *dead)
{
	struct pool *pool = f->host->pool;
	pfn_t pfn = entry_pfn(e);

	if (e & ENTRY_SPECIAL)
		return;
	if (entry_is_fused(e)) {
		fused_gone(f->tenant, pfn);
	} else if (level == 0) {
		frame_drop(f->host, pfn, dead);
	} else if (level == 1) {
		block_drop(f, pfn, gfn, dead);
	} else if (block_refs_read(pool, pfn, 2) > 1) {
		block_refs_add(pool, pfn, 2, -1); /* another giant entry covers all pieces */
	} else {
		struct table_locked w = table_lock(f, 1, gfn);

		for (unsigned i = 0; i < LEVEL_ENTRIES; i++)
			block_refs_add(pool, pfn_add(pfn, i * BLOCK_PAGES), 1, 1);
		block_refs_add(pool, pfn, 2, -1);
		for (unsigned i = 0; i < LEVEL_ENTRIES; i++)
			block_drop(f, pfn_add(pfn, i * BLOCK_PAGES), gfn_add(gfn, i * BLOCK_PAGES), dead);
		table_unlock(w);
	}
}

/* An entry is about to be copied: what it points to gains a reference. The lock of its level is held. */
static void child_take(struct host *h, entry_t e, unsigned level)
{
	if (entry_is_table(e))
		refs_add(pfn_frame(h->pool, entry_pfn(e)), 1);
	else if (!entry_is_leaf(e) || (e & ENTRY_SPECIAL))
		return;
	else if (level == 0)
		frame_take(h, entry_pfn(e));
	else
		block_refs_add(h->pool, entry_pfn(e), level, 1);
}

/* -- un-sharing ----------------------------------------------------------- */

static void table_take_over(struct mm *mm, pfn_t table, unsigned level, gfn_t gfn)
{
	entry_t *t = table_entries(mm->host->pool, table);
	struct table_locked w = table_lock(mm->family, level, gfn);

	for (unsigned i = 0; i < LEVEL_ENTRIES; i++) {
		entry_t e = READ_ONCE(t[i]);

		if (e & ENTRY_W)
			entry_store(&t[i], e & ~ENTRY_W);
	}
	table_unlock(w);
}

/* What a leaf table of the guest may map as fused is noted there when it goes (H6 of mm/fused.h). NULL: nothing is. */
static struct reserve *table_reserve(const struct mm *mm, unsigned level)
{
	return level == 0 ? mm->family->tenant->reserve : NULL;
}

/* A frame for the copy of a table, and room to note all that it may map. -ENOMEM. */
static int copy_begin(struct mm *mm, unsigned level, pfn_t *copy)
{
	struct reserve *notes = table_reserve(mm, level);
	int r = notes ? notes_promise(notes, LEVEL_ENTRIES) : 0;

	if (r)
		return r;
	r = arena_alloc(mm->host->pool, mm->domain, 0, FRAME_TABLE, 0, copy);
	if (r == 0)
		atomic_store_explicit(&pfn_frame(mm->host->pool, *copy)->where, level, memory_order_relaxed);
	else if (notes)
		notes_give_up(notes, LEVEL_ENTRIES);
	return r;
}

/* Nobody needs the frame. */
static void copy_cancel(struct mm *mm, unsigned level, pfn_t copy)
{
	struct reserve *notes = table_reserve(mm, level);

	if (notes)
		notes_give_up(notes, LEVEL_ENTRIES);
	arena_free(mm->host->pool, copy);
}

static void table_copy(struct mm *mm, pfn_t to, pfn_t from, unsigned level, gfn_t gfn)
{
	struct host *h = mm->host;
	entry_t *src = table_entries(h->pool, from), *dst = table_entries(h->pool, to);
	struct reserve *notes = table_reserve(mm, level);
	struct table_locked w = table_lock(mm->family, level, gfn);
	unsigned fused = 0;

	for (unsigned i = 0; i < LEVEL_ENTRIES; i++) {
		entry_t e = READ_ONCE(src[i]) & ~ENTRY_W;

		dst[i] = e;
		fused += entry_is_fused(e);
		if (!entry_is_none(e))
			child_take(h, e, level);
	}
	if (notes)
		notes_give_up(notes, LEVEL_ENTRIES - fused);
	table_unlock(w);
}

/* The table that `slot` (of `level`) points to becomes exclusive. 0 also if somebody else was faster. */
static int table_unshare(struct mm *mm, entry_t *slot, unsigned level, gfn_t gfn)
{
	struct pool *pool = mm->host->pool;
	pfn_t copy = PFN_NONE;
	struct table_locked w;
	entry_t e;
	int r;

	e = entry_load(slot);
	if (entry_is_table(e) && refs_read(pfn_frame(pool, entry_pfn(e))) > 1) {
		r = copy_begin(mm, level - 1, &copy);
		if (r)
			return r;
	}
	w = slot_lock(mm, slot, level, gfn);
	e = entry_load(slot);
	if (!entry_is_table(e) || (e & ENTRY_W)) {
		table_unlock(w);
	} else if (refs_read(pfn_frame(pool, entry_pfn(e))) == 1) {
		table_take_over(mm, entry_pfn(e), level - 1, gfn);
		entry_store(slot, e | ENTRY_W);
		table_unlock(w);
	} else if (pfn_is_none(copy)) {
		table_unlock(w); /* shared since we looked: the caller comes again */
	} else {
		table_copy(mm, copy, entry_pfn(e), level - 1, gfn);
		refs_add(pfn_frame(pool, entry_pfn(e)), -1);
		entry_store(slot, (e & ~ENTRY_PFN_MASK) | copy.v << PAGE_SHIFT | ENTRY_W);
		table_unlock(w);
		copy = PFN_NONE;
		mm_count(mm, tables_unshared);
		trace(mm->host->env, unshare, mm->id, gfn.v, level - 1);
	}
	if (!pfn_is_none(copy))
		copy_cancel(mm, level - 1, copy);
	return 0;
}

static int table_insert(struct mm *mm, entry_t *slot, unsigned level, gfn_t gfn)
{
	struct table_locked w;
	bool used = false;
	pfn_t pfn;
	int r = table_new(mm, level - 1, &pfn);

	if (r)
		return r;
	w = slot_lock(mm, slot, level, gfn);
	if (entry_is_none(entry_load(slot))) {
		entry_store(slot, entry_table(pfn, ENTRY_W));
		used = true;
	}
	table_unlock(w);
	if (!used)
		arena_free(mm->host->pool, pfn);
	return 0;
}

int table_own(struct mm *mm, gfn_t gfn, unsigned target, bool create, struct cursor *c)
{
	struct pool *pool = mm->host->pool;
	entry_t *slot = mm_root_slot(mm);
	entry_t e = entry_load(slot);
	unsigned level = root_level(e) + 1;
	int r = 0;

	while (level > target) {
		if (entry_is_table(e) && (e & ENTRY_W)) {
			level--;
			slot = table_entries(pool, entry_pfn(e)) + level_index(gfn, level);
		} else if (entry_is_table(e)) {
			r = table_unshare(mm, slot, level, gfn);
		} else if (entry_is_none(e) && create) {
			r = table_insert(mm, slot, level, gfn);
		} else {
			break;
		}
		if (r)
			return r;
		e = entry_load(slot);
	}
	*c = (struct cursor){ .slot = slot, .level = level, .entry = e };
	return 0;
}

/* -- blocks ------------------------------------------------------------------ */

/* With the slot's lock held: fills `table` with the pieces of a block and moves the references. */
static void split_fill(struct mm *mm, pfn_t table, entry_t e, unsigned level, gfn_t gfn)
{
	struct pool *pool = mm->host->pool;
	entry_t *t = table_entries(pool, table);
	uint64_t step = level_pages(level - 1);
	entry_t bits = e & ~ENTRY_PFN_MASK;
	struct table_locked w = table_lock(mm->family, level - 1, gfn);

	for (unsigned i = 0; i < LEVEL_ENTRIES; i++) {
		pfn_t pfn = pfn_add(entry_pfn(e), i * step);

		t[i] = bits | pfn.v << PAGE_SHIFT;
		if (e & ENTRY_SPECIAL)
			continue;
		if (level == 1)
			refs_add(pfn_frame(pool, pfn), 1);
		else
			block_refs_add(pool, pfn, 1, 1);
	}
	if (!(e & ENTRY_SPECIAL))
		block_refs_add(pool, entry_pfn(e), level, -1);
	table_unlock(w);
}

int table_split(struct mm *mm, entry_t *slot, unsigned level, gfn_t gfn)
{
	struct table_locked w;
	bool used = false;
	pfn_t table;
	entry_t e;
	int r = table_new(mm, level - 1, &table);

	if (r)
		return r;
	w = table_lock(mm->family, level, gfn);
	e = entry_load(slot);
	/* a table without references is dead: table_free() has taken, or will take, its entries as they are */
	if (entry_is_leaf(e) && refs_read(pfn_frame(mm->host->pool, pool_hva_pfn(mm->host->pool, slot))) > 0) {
		split_fill(mm, table, e, level, gfn);
		entry_store(slot, entry_table(table, ENTRY_W));
		used = true;
	}
	table_unlock(w);
	if (!used) {
		arena_free(mm->host->pool, table);
		return 0;
	}
	mm_count(mm, blocks_split);
	trace(mm->host->env, split, mm->id, gfn.v, level);
	return 0;
}

/* One page of a block whose used count says that it may be more: only as 4 KiB pieces. */
static bool home_claim_page(struct pool *pool, pfn_t pfn)
{
	struct block *b = pfn_block(pool, pfn);
	struct frame *f = pfn_frame(pool, pfn);
	uint32_t used = atomic_load_explicit(&b->used, memory_order_relaxed);

	if (refs_read(f) || load_acquire(&f->bits)) /* bits last: pairs with clear_frames() */
		return false;
	do {
		if (used >= BLOCK_PAGES)
			return false;
	} while (!atomic_compare_exchange_weak(&b->used, &used, used + 1));
	refs_add(f, 1);
	return true;
}

static bool home_claim_block(struct pool *pool, pfn_t pfn)
{
	uint32_t unused = 0;

	return atomic_compare_exchange_strong(&pfn_block(pool, pfn)->used, &unused, BLOCK_PAGES);
}

bool home_claim(struct host *h, struct extent *e, pfn_t pfn, unsigned level)
{
	struct pool *pool = h->pool;
	unsigned n = 0;

	if (level == 0) {
		if (!home_claim_page(pool, pfn))
			return false;
	} else if (level == 1) {
		if (!home_claim_block(pool, pfn))
			return false;
		block_refs_add(pool, pfn, 1, 1);
	} else {
		while (n < LEVEL_ENTRIES && home_claim_block(pool, pfn_add(pfn, n * BLOCK_PAGES)))
			n++;
		if (n < LEVEL_ENTRIES) {
			while (n--)
				atomic_store(&pfn_block(pool, pfn_add(pfn, n * BLOCK_PAGES))->used, 0);
			return false;
		}
		block_refs_add(pool, pfn, 2, 1);
	}
	extent_get(e, level_pages(level));
	return true;
}

/* -- cutting and zapping ------------------------------------------------------ */

int table_cut(struct mm *mm, gfn_t gfn)
{
	for (;;) {
		unsigned top = root_level(atomic_load(&mm->root));
		bool inside = gfn.v < level_pages(top + 1);
		unsigned target = inside ? 0 : top;
		struct cursor c;
		int r;

		while (target < top && gfn.v % level_pages(target + 1) == 0)
			target++;
		r = table_own(mm, inside ? gfn : GFN(0), target, false, &c);
		if (r)
			return r;
		if (c.level == target || !entry_is_leaf(c.entry))
			return 0;
		r = table_split(mm, c.slot, c.level, gfn);
		if (r)
			return r;
	}
}

static void table_free(struct family *f, pfn_t table, unsigned level, gfn_t gfn, struct dead *dead);

/* An entry is gone from its slot; the lock of its level is held. True: a table whose last user that was. */
static bool child_drop(struct family *f, entry_t e, unsigned level, gfn_t gfn, struct dead *dead)
{
	if (entry_is_table(e))
		return refs_add(pfn_frame(f->host->pool, entry_pfn(e)), -1) == 0;
	if (entry_is_leaf(e))
		leaf_drop(f, e, level, gfn, dead);
	return false;
}

/* A table that nothing points to any more (lock-free readers may still be in it). */
static void table_free(struct family *f, pfn_t table, unsigned level, gfn_t gfn, struct dead *dead)
{
	struct pool *pool = f->host->pool;
	entry_t *t = table_entries(pool, table);
	uint64_t last[LEVEL_ENTRIES / 64] = { 0 };
	struct table_locked w = table_lock(f, level, gfn);

	for (unsigned i = 0; i < LEVEL_ENTRIES; i++) {
		entry_t e = READ_ONCE(t[i]);

		if (!entry_is_none(e) && child_drop(f, e, level, gfn_add(gfn, i * level_pages(level)), dead))
			bit_set(last, i);
	}
	table_unlock(w);
	for (unsigned i = 0; i < LEVEL_ENTRIES; i++)
		if (bit_test(last, i))
			table_free(f, entry_pfn(t[i]), level - 1, gfn_add(gfn, i * level_pages(level)), dead);
	dead_add(pool, dead, table, 0);
}

static bool table_empty(const entry_t *t)
{
	for (unsigned i = 0; i < LEVEL_ENTRIES; i++)
		if (!entry_is_none(READ_ONCE(t[i])))
			return false;
	return true;
}

/*
 * Empties one slot. The entry is read under the lock: merging, which holds
 * neither mm->range nor waits for overlapping changes, may have redirected it
 * since anybody looked.
 */
static void zap_slot(struct mm *mm, entry_t *slot, unsigned level, gfn_t gfn, struct dead *dead)
{
	struct table_locked w = table_lock(mm->family, level, gfn);
	entry_t e = entry_load(slot);
	bool last;

	entry_store(slot, ENTRY_NONE);
	last = child_drop(mm->family, e, level, gfn, dead);
	table_unlock(w);
	if (last)
		table_free(mm->family, entry_pfn(e), level - 1, gfn, dead);
}

/* The leaf entries of a range within one table: one lock for all. */
static void zap_leaves(struct mm *mm, entry_t *t, gfn_t start, gfn_t end, struct dead *dead)
{
	struct table_locked w = table_lock(mm->family, 0, start);

	for (; start.v < end.v; start.v++) {
		entry_t *slot = &t[level_index(start, 0)];
		entry_t e = entry_load(slot);

		if (entry_is_none(e))
			continue;
		entry_store(slot, ENTRY_NONE);
		child_drop(mm->family, e, 0, start, dead);
	}
	table_unlock(w);
}

/* Zaps [start, end) within the range of one table of `level`, which is exclusive. True: it is empty now. */
static bool zap_table(struct mm *mm, pfn_t table, unsigned level, gfn_t start, gfn_t end, struct dead *dead)
{
	entry_t *t = table_entries(mm->host->pool, table);
	uint64_t step = level_pages(level);

	if (level == 0)
		zap_leaves(mm, t, start, end, dead);
	while (level > 0 && start.v < end.v) {
		gfn_t first = GFN(ALIGN_DOWN(start.v, step));
		gfn_t next = GFN(MIN(first.v + step, end.v));
		entry_t *slot = &t[level_index(start, level)];
		entry_t e = entry_load(slot);
		bool whole = next.v - start.v == step;

		if (entry_is_table(e) && !whole)
			whole = zap_table(mm, entry_pfn(e), level - 1, start, next, dead);
		if (whole && !entry_is_none(e))
			zap_slot(mm, slot, level, first, dead);
		start = next;
	}
	return table_empty(t);
}

void table_zap(struct mm *mm, gfn_t start, gfn_t end, struct dead *dead)
{
	entry_t root = atomic_load(&mm->root);

	end = GFN(MIN(end.v, root_limit(root).v));
	if (start.v < end.v)
		zap_table(mm, entry_pfn(root), root_level(root), start, end, dead);
}

void table_drop_root(struct mm *mm, struct dead *dead)
{
	entry_t root = atomic_load(&mm->root);
	struct table_locked w = { table_lock_root(mm->family) };
	bool last;

	lock_take(w.lock);
	atomic_store(&mm->root, ENTRY_NONE);
	last = refs_add(pfn_frame(mm->host->pool, entry_pfn(root)), -1) == 0;
	table_unlock(w);
	if (last)
		table_free(mm->family, entry_pfn(root), root_level(root), GFN(0), dead);
}

int table_grow(struct mm *mm, gfn_t last)
{
	struct cursor c;

	while (last.v >= root_limit(atomic_load(&mm->root)).v) {
		entry_t root = atomic_load(&mm->root);
		unsigned level = root_level(root);
		pfn_t top;
		int r;

		/* The old root becomes an ordinary table: its references move from the root lock to its level's. */
		r = table_own(mm, GFN(0), level, false, &c);
		if (!r)
			r = table_new(mm, level + 1, &top);
		if (r)
			return r;
		root = atomic_load(&mm->root);
		entry_store(table_entries(mm->host->pool, top), entry_table(entry_pfn(root), ENTRY_W));
		entry_store(mm_root_slot(mm), entry_table(top, ENTRY_W) | (entry_t)(level + 1) << ROOT_LEVEL_SHIFT);
	}
	return 0;
}

struct mm_lookup mm_lookup(const struct mm *mm, gfn_t gfn)
{
	const struct pool *pool = mm->host->pool;
	entry_t e = entry_load((const entry_t *)&mm->root);
	unsigned level = root_level(e) + 1;
	entry_t w = e & ENTRY_W;
	struct mm_lookup l = { .entry = ENTRY_NONE, .level = level - 1 };

	if (gfn.v >= level_pages(level))
		return l;
	while (entry_is_table(e)) {
		level--;
		e = entry_load(table_entries(pool, entry_pfn(e)) + level_index(gfn, level));
		w &= e;
	}
	l = (struct mm_lookup){ .entry = e, .level = level, .writable = w != 0 };
	if (entry_is_leaf(e))
		l.pfn = pfn_add(entry_pfn(e), gfn.v & (level_pages(level) - 1));
	return l;
}
