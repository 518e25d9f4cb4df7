/* SPDX-License-Identifier: MIT */
/*
 * Stable frames: merged contents, never written, shared by guests of one domain.
 *
 * A stable frame has refs (atomic) == entries that map it, plus references that
 * merging holds while it compares. Its `where` points to a struct stable: the
 * content's hash, and the chain: one (layer, gfn) pair for each place it was
 * merged into, in the form of `where` of an ordinary frame. The reverse map of
 * a stable frame is the union over its chain (KSM's rmap items).
 *
 * Invariants:
 *  S1  a frame of kind STABLE with refs > 0 is in the table under its (domain, hash).
 *  S2  every entry that maps it is found through its chain. Pairs that find
 *      nothing any more are stale; they are pruned when the chain is longer than
 *      twice the references.
 *  S3  refs goes from 0 to 1 never: stable_get() fails on a dying frame.
 *
 * Locks: host->stable guards table and chains. Chains grow only under merging's own lock.
 */
#ifndef KAGE_MM_STABLE_H
#define KAGE_MM_STABLE_H

#include "mm/mm.h"

struct stable {
	struct stable *next; /* in its bucket */
	pfn_t pfn;
	uint64_t hash;
	uint32_t domain;
	uint32_t count, room;
	uint64_t *chain; /* where-style pairs */
	struct defer_node defer;
};

struct stable_table;
int stable_init(struct host *h);
void stable_finish(struct host *h);

/* Allocates the object that makes a frame stable; not visible yet. -ENOMEM. */
struct stable *stable_alloc(struct host *h, uint32_t domain, uint64_t hash);
void stable_free(struct host *h, struct stable *s);
/* Room for n more pairs. -ENOMEM. Merging's lock held. */
int stable_reserve(struct host *h, struct stable *s, unsigned n);
/* Publishes: the frame is STABLE from now on. Its refs are already what they must be. */
void stable_publish(struct host *h, struct stable *s, pfn_t pfn);
/* Adds a pair; room was reserved. */
void stable_chain(struct host *h, struct stable *s, uint64_t where);
/* Finds a stable frame with this hash, `skip` candidates further on, and takes a reference; NULL: none. */
struct stable *stable_get(struct host *h, uint32_t domain, uint64_t hash, unsigned skip);
/* Drops a reference of stable_get(); the last one releases the frame. */
void stable_put(struct host *h, struct stable *s);
/* The last entry is gone: out of the table; the object is freed after a grace period. */
void stable_die(struct host *h, pfn_t pfn);
/* Calls fn for every stable frame. host->stable is held: fn takes no lock. */
void stable_each(struct host *h, void (*fn)(struct stable *s, void *arg), void *arg);
/* Keeps the pairs for which keep() says so, once each. Merging's lock held. */
void stable_prune(struct host *h, struct stable *s, bool (*keep)(struct host *h, uint64_t where, pfn_t pfn));

static inline struct stable *frame_stable(const struct pool *pool, pfn_t pfn)
{
	return (struct stable *)(uintptr_t)atomic_load_explicit(&pfn_frame(pool, pfn)->where, memory_order_acquire);
}

#endif
