/* SPDX-License-Identifier: MIT */
/*
 * Clone: the child takes a reference on the parent's root table, both roots lose
 * W, nothing else is touched. Time does not depend on the size of the guest.
 *
 *   parent.root ─W─► [T]            parent.root ──► [T] refs 2 ◄── child.root
 *
 * Invariants:
 *  K1  the snapshot is the instant between start and end of one change that
 *      covers the whole guest and takes write permission away: nobody writes
 *      through an old translation after start, none is made before end.
 *  K2  memory that may be written without the engine's knowledge (pinned pages,
 *      EXTERNAL regions) is copied into the child before end, so the parent's
 *      frames stay where they are and stay the parent's.
 *  K4  a mirrored parent (mm/mirror.h) shares frames only: what the host kernel made private is adopted
 *      before. Then its windows are frozen, mapped MAP_PRIVATE: that is the snapshot. 2 MiB runs that hold no
 *      memory stay the parent's, as they are mapped; the child has holes of its own there.
 *  K3  both sides get a layer below the parent's old one; a parent whose layer
 *      has no frame yet keeps it and the child goes beside it.
 *
 * Locks taken: host->lock for an instant, family->lock and the parent's range for writing.
 */
#include "base/guest.h"
#include "mm/change.h"
#include "mm/layer.h"
#include "mm/mirror.h"
#include "mm/region.h"

struct clone {
	struct change c;
	struct change_target target;
	struct mm *parent, *child;
	struct layer *parent_layer, *child_layer; /* parent_layer NULL: it keeps its own */
	struct regions *parent_set, *child_set;
	struct dead dead; /* entries of the child that were replaced by copies */
	struct gfn_ranges kept; /* K4: what a mirrored parent does not share */
	unsigned holes;         /* the first of them */
};

/* -- copying what must not be shared (K2) -------------------------------------------- */

static int copy_page(struct clone *k, struct cursor *c, gfn_t gfn)
{
	struct mm *child = k->child;
	struct pool *pool = child->host->pool;
	struct table_locked w;
	pfn_t pfn;
	int r = arena_alloc(pool, child->domain, 0, FRAME_PRIVATE, 0, &pfn);

	if (r)
		return r;
	guest_copy_page(pfn_hva(pool, pfn), pfn_hva(pool, entry_pfn(c->entry)));
	atomic_store_explicit(&pfn_frame(pool, pfn)->where, frame_where(k->child_layer->id, gfn), memory_order_relaxed);
	layer_use(k->child_layer);
	w = table_lock(child->family, 0, gfn);
	entry_store(c->slot, entry_leaf(pfn, ENTRY_W));
	frame_drop(child->host, entry_pfn(c->entry), &k->dead);
	table_unlock(w);
	return 0;
}

/* The child's page gets a frame of its own; a hole of a block becomes a hole of the child. */
static int copy_one(struct clone *k, gfn_t gfn)
{
	struct mm *child = k->child;
	struct cursor c;
	uint64_t map[8];
	int r;

	for (;;) {
		r = table_own(child, gfn, 0, false, &c);
		if (r || !entry_is_leaf(c.entry) || c.entry & ENTRY_SPECIAL) /* pinned FOREIGN memory stays its owner's */
			return r;
		if (c.level == 0)
			break;
		r = table_split(child, c.slot, c.level, GFN(ALIGN_DOWN(gfn.v, level_pages(c.level))));
		if (r)
			return r;
	}
	pool_populated(child->host->pool, entry_pfn(c.entry), 1, map);
	if (map[0] & 1)
		return copy_page(k, &c, gfn);
	struct table_locked w = table_lock(child->family, 0, gfn);
	entry_store(c.slot, ENTRY_NONE);
	frame_drop(child->host, entry_pfn(c.entry), &k->dead);
	table_unlock(w);
	return 0;
}

static int copy_range(struct mm *parent, gfn_t start, uint64_t npages, void *arg)
{
	struct clone *k = arg;
	int r = 0;

	for (uint64_t i = 0; r == 0 && i < npages; i++)
		r = copy_one(k, gfn_add(start, i));
	return r;
}

static int clone_copies(struct clone *k)
{
	struct regions *set = k->parent->regions;
	int r = mm_each_pin(k->parent, copy_range, k);

	for (unsigned i = 0; r == 0 && i < set->count; i++)
		if (set->r[i].flags & KAGE_REGION_EXTERNAL)
			r = copy_range(k->parent, set->r[i].start, set->r[i].npages, k);
	return r;
}

/* -- a mirrored parent (K4) -------------------------------------------------------------- */

static int keep_range(struct mm *parent, gfn_t start, uint64_t npages, void *arg)
{
	struct clone *k = arg;

	return gfn_ranges_add(parent->host->env, &k->kept, start, gfn_add(start, npages));
}

static int mirror_kept(struct clone *k)
{
	int r = mm_own_holes(k->parent, &k->kept);

	k->holes = k->kept.n;
	if (r == 0)
		r = mm_each_pin(k->parent, keep_range, k); /* copied, not dropped */
	return r;
}

/* The child's holes are its own: it has no entry there. */
static int child_drop_holes(struct clone *k)
{
	int r = 0;

	for (unsigned i = 0; r == 0 && i < k->holes; i++) {
		gfn_t start = k->kept.r[i].start, end = k->kept.r[i].end;

		r = table_cut(k->child, start);
		if (r == 0)
			r = table_cut(k->child, end);
		if (r == 0)
			table_zap(k->child, start, end, &k->dead);
	}
	return r;
}

/* The parent's, now that the child has let go of them, are its alone again: W says so, for the next clone too. */
static int parent_keep_holes(struct clone *k)
{
	for (unsigned i = 0; i < k->holes; i++) {
		gfn_t at = k->kept.r[i].start;

		while (at.v < k->kept.r[i].end.v) {
			struct table_locked w;
			struct cursor c;
			int r = table_own(k->parent, at, 0, false, &c);

			if (r)
				return r;
			w = table_lock(k->parent->family, c.level, at);
			if (entry_is_leaf(entry_load(c.slot)))
				entry_store(c.slot, entry_load(c.slot) | ENTRY_W);
			table_unlock(w);
			at = GFN(ALIGN_DOWN(at.v, level_pages(c.level)) + level_pages(c.level));
		}
	}
	return 0;
}

/* -- the change --------------------------------------------------------------------------- */

static int clone_prepare(struct change *c)
{
	struct clone *k = container_of(c, struct clone, c);
	struct host *h = k->parent->host;
	int r;

	if (k->parent->layer->used) {
		r = layer_new(h, k->parent->family, &k->parent_layer);
		if (r)
			return r;
	}
	r = layer_new(h, k->parent->family, &k->child_layer);
	if (r)
		return r;
	k->parent_set = regions_clone(h, k->parent->regions, true);
	k->child_set = regions_clone(h, k->parent->regions, false);
	return k->parent_set && k->child_set ? 0 : -ENOMEM;
}

static void clone_share_root(struct clone *k)
{
	struct mm *parent = k->parent;
	struct lock *top = table_lock_root(parent->family);
	entry_t root;

	lock_take(top);
	root = atomic_load(&parent->root) & ~ENTRY_W;
	atomic_fetch_add(&pfn_frame(parent->host->pool, entry_pfn(root))->refs, 1);
	entry_store(mm_root_slot(parent), root);
	entry_store(mm_root_slot(k->child), root);
	lock_drop(top);
}

/* Fallible, between start and end: the child is not visible yet, and a root without W is always legal. */
static int clone_recheck(struct change *c)
{
	struct clone *k = container_of(c, struct clone, c);
	struct mirror *m = k->parent->mirror;
	int r = m ? mirror_kept(k) : 0;

	if (r)
		return r;
	/* Before the freeze: who sees W reads the frame, and what the guest writes after the freeze is not there. */
	clone_share_root(k);
	if (m)
		r = m->ops->freeze(m, k->kept.r, k->kept.n);
	if (r == 0)
		r = child_drop_holes(k);
	if (r == 0)
		r = parent_keep_holes(k);
	return r ? r : clone_copies(k);
}

static void clone_commit(struct change *c)
{
	struct clone *k = container_of(c, struct clone, c);
	struct mm *parent = k->parent, *child = k->child;
	struct family *f = parent->family;
	struct layer *old = parent->layer;

	if (k->parent_layer) {
		old->mm = NULL;
		layer_attach(old, k->parent_layer, parent);
		layer_attach(old, k->child_layer, child);
	} else {
		layer_beside(old, k->child_layer, child);
	}
	parent->cloned = child->cloned = true;
	regions_replace(parent, k->parent_set);
	child->regions = k->child_set;
	list_add_tail(&f->mms, &child->node);
	f->count++;
	mm_count(parent, clones);
	trace(parent->host->env, clone, parent->id, child->id, 0);
}

static void clone_cancel(struct change *c)
{
	struct clone *k = container_of(c, struct clone, c);
	struct host *h = k->parent->host;

	if (k->child->root)
		table_drop_root(k->child, &k->dead);
	regions_free(h, k->parent_set);
	regions_free(h, k->child_set);
	layer_free(h, k->parent_layer);
	layer_free(h, k->child_layer);
}

static const struct change_ops clone_ops = {
	.prepare = clone_prepare, .recheck = clone_recheck, .commit = clone_commit, .cancel = clone_cancel,
};

int mm_clone(struct mm *parent, struct mm *child)
{
	struct family *f = parent->family;
	struct clone k = {
		.c = { .ops = &clone_ops, .targets = 1, .reason = KAGE_REASON_PROTECT, .lost = KAGE_WRITE },
		.target = { .mm = parent, .notify = { .start = GFN(0), .end = GFN((uint64_t)1 << GFN_BITS) } },
		.parent = parent, .child = child,
	};
	int r = mm_init(child, parent->host, f);

	if (r)
		return r;
	k.c.target = &k.target;
	if (mm_native(parent))
		k.c.lost = KAGE_RWX; /* what becomes shared may diverge: not even reads may go on from its frame */
	brlock_write(&f->lock);
	brlock_write(&parent->range);
	if (parent->mirror)
		r = mm_adopt_diverged(parent, GFN(0), GFN((uint64_t)1 << GFN_BITS));
	if (r == 0)
		r = change_run(&k.c);
	if (r == 0 && parent->mirror && parent->mirror->exact) /* who was not parked may have slipped by */
		mm_adopt_diverged(parent, GFN(0), GFN((uint64_t)1 << GFN_BITS));
	dead_release(parent->host->pool, &k.dead);
	brlock_write_drop(&parent->range);
	brlock_write_drop(&f->lock);
	gfn_ranges_free(parent->host->env, &k.kept);
	if (r)
		notify_finish(&child->notify);
	return r;
}
