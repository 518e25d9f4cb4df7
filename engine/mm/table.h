/* SPDX-License-Identifier: MIT */
/*
 * Primary tables: descending, un-sharing, splitting, dropping. See mm.h for
 * what the table locks guard.
 *
 * "Slot of level n" is a pointer to an entry that lies in a table of level n
 * (leaf entries are level 0). The root entry of an mm is a slot of level
 * root_level + 1.
 */
#ifndef KAGE_MM_TABLE_H
#define KAGE_MM_TABLE_H

#include "mm/mm.h"

static inline entry_t *table_entries(const struct pool *pool, pfn_t table)
{
	return pfn_hva(pool, table);
}

static inline entry_t entry_load(const entry_t *slot)
{
	return load_acquire(slot);
}

/* Publishes what the entry points to: pairs with the acquire of every lookup. */
static inline void entry_store(entry_t *slot, entry_t e)
{
	store_release(slot, e);
}

static inline entry_t *mm_root_slot(struct mm *mm)
{
	return (entry_t *)&mm->root;
}

/* The lock of a slot of `level` at `gfn`; witness that it is held. */
struct table_locked {
	struct lock *lock;
};
struct lock *table_lock_of(struct family *f, unsigned level, gfn_t gfn);
struct lock *table_lock_root(struct family *f);
static inline struct table_locked table_lock(struct family *f, unsigned level, gfn_t gfn)
{
	struct table_locked w = { table_lock_of(f, level, gfn) };

	lock_take(w.lock);
	return w;
}
static inline void table_unlock(struct table_locked w)
{
	lock_drop(w.lock);
}

/* Frames that lost their last reference; linked through `where`, released after the change has ended. */
struct dead {
	uint64_t head; /* pfn << 8 | order; 0: empty */
	uint64_t pages;
};
void dead_add(struct pool *pool, struct dead *d, pfn_t pfn, unsigned order);
void dead_release(struct pool *pool, struct dead *d);

/* New table page, cleared, one reference. -ENOMEM. */
int table_new(struct mm *mm, unsigned level, pfn_t *out);

struct cursor {
	entry_t *slot;
	unsigned level; /* of the slot */
	entry_t entry;  /* as it was when reached */
};

/*
 * Descends to a slot of level `target` at gfn, making every table on the way
 * exclusive to the mm. Missing tables are created if `create`. Stops early,
 * with c->level > target, at an entry that is no table. mm->range is held.
 * -ENOMEM.
 */
int table_own(struct mm *mm, gfn_t gfn, unsigned target, bool create, struct cursor *c);

/*
 * Replaces a block entry by a table of the next level that maps the same
 * memory. The tables above may be shared: nothing that anybody sees changes.
 * 0 also if it is no block any more. -ENOMEM.
 */
int table_split(struct mm *mm, entry_t *slot, unsigned level, gfn_t gfn);

/*
 * Makes sure that no block and no shared table reaches across `gfn`, so that
 * the entries on either side can be dropped apart. -ENOMEM.
 */
int table_cut(struct mm *mm, gfn_t gfn);

/*
 * Drops every entry of [start, end), which table_cut() has prepared at both
 * ends. Frees tables that become empty. Cannot fail. mm->range held for writing.
 */
void table_zap(struct mm *mm, gfn_t start, gfn_t end, struct dead *dead);

/* Drops the root's reference on everything. */
void table_drop_root(struct mm *mm, struct dead *dead);

/* With the level-0 lock held: one entry that maps the frame goes. Adds it to `dead` if it was the last. */
void frame_drop(struct host *h, pfn_t pfn, struct dead *dead);
/* With the level-0 lock held: the only entry that maps the frame is the caller's. */
bool frame_exclusive(struct host *h, pfn_t pfn);
/* A block entry of somebody covers this home frame. */
bool frame_in_block(struct host *h, pfn_t pfn);
/* The same of a 2 MiB block; takes the level-0 lock, the caller holds the level-1 lock. */
bool block_exclusive(struct mm *mm, pfn_t pfn, gfn_t gfn);

/* Claims home memory for an entry of `level`, if it is untouched and vacant. With the lock of the slot held. */
bool home_claim(struct host *h, struct extent *e, pfn_t pfn, unsigned level);

/* Grows the root until it covers gfn. mm->range held for writing. -ENOMEM. */
int table_grow(struct mm *mm, gfn_t last);
static inline gfn_t root_limit(entry_t root) { return GFN(level_pages(root_level(root) + 1)); }

#endif
