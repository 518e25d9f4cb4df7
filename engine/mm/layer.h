/* SPDX-License-Identifier: MIT */
/*
 * Layers: the reverse map's object (anon_vma's role in Linux).
 *
 * Every frame is born in the current layer of some mm, under some gfn, and can
 * only ever be mapped at that gfn by mms whose layer descends from it (merged
 * frames keep a list of such pairs, stable.h). A clone gives both sides a new
 * layer below the old one, so the tree of layers is the family's tree of
 * clones; its leaves are the layers of live mms.
 *
 *      L1 (frozen at the first clone)
 *      |- L2  parent's layer now
 *      `- L3 (frozen: the clone was cloned)
 *         |- L4
 *         `- L5
 *
 * Invariants:
 *  L1  a layer has an mm, or children, or both never: an inner layer has no mm.
 *  L2  an inner layer has at least two children: one with a single child is
 *      spliced out and its id becomes an alias of the child. So the tree is never
 *      larger than twice the number of live mms, however long the history.
 *
 * Locks: the tree changes with family->lock held for writing, ids under
 * host->ids; lookups hold family->lock for reading.
 */
#ifndef KAGE_MM_LAYER_H
#define KAGE_MM_LAYER_H

#include "mm/mm.h"

struct layer {
	uint32_t id;
	_Atomic bool used;      /* a frame carries its id; only ever set */
	struct family *family;
	struct layer *parent;
	struct layer *into;     /* spliced out: the layer that answers for this id */
	struct layer *aliases;  /* layers whose `into` chain ends here, linked through `parent` */
	struct list children, sibling;
	struct mm *mm;
};

/* A frame gets its id. Faults do this all the time: no store if it is set. */
static inline void layer_use(struct layer *l)
{
	if (!atomic_load_explicit(&l->used, memory_order_relaxed))
		atomic_store_explicit(&l->used, true, memory_order_relaxed);
}

/* A frame of the common arena for a page of the mm, private to it. `flags` and errors are those of arena_alloc(). */
int layer_frame(struct mm *mm, gfn_t gfn, unsigned flags, pfn_t *out);

/* The same of 2^order pages from gfn on: frames that lie side by side, aligned, each an allocation of its own. */
int layer_frames(struct mm *mm, gfn_t gfn, unsigned order, unsigned flags, pfn_t *out);

struct layer_table;
int layer_table_init(struct host *h);
void layer_table_finish(struct host *h);

/* Allocates a layer and its id. Not in any tree yet. -ENOMEM. */
int layer_new(struct host *h, struct family *f, struct layer **out);
void layer_free(struct host *h, struct layer *l); /* NULL ok; one that was never in a tree */
void layer_attach(struct layer *parent, struct layer *l, struct mm *mm);
/* The layer of a new mm goes beside `l`, which has frames of nobody: both below a common parent, if there is one (a family's layers may be a forest). */
void layer_beside(struct layer *l, struct layer *child, struct mm *mm);
/* The mm of this layer is gone; prunes and splices upwards. */
void layer_leave(struct host *h, struct layer *l);
/* The layer that answers for an id, NULL if nobody does any more. */
struct layer *layer_find(struct host *h, uint32_t id);

/* Calls fn for every mm at or below the layer; stops at a nonzero return and returns it. */
int layer_each_mm(struct layer *l, int (*fn)(struct mm *mm, void *arg), void *arg);
/* True if the mm's layer is `l` or descends from it. */
bool layer_above(const struct layer *l, const struct mm *mm);

#endif
