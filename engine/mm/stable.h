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
 *  S4  a frame that was found with as many users as may share one is "full" (FRAME_FULL), and stands
 *      behind all others with its contents: a search ends at the first, so each is met full once, however many there are.
 *      Whoever drops a reference of a full one moves it to the front. (KSM's chains of stable nodes, of which it
 *      looks at each; Documentation/mm/ksm.rst)
 *
 *   bucket -> leader -> leader -> ...        by (domain, hash)
 *               |
 *             `same`: a ring of all with these contents, from the leader on: with room, ..., full, ...
 *
 *      search, host->stable held            drop (mm/table.c), no such lock
 *      refs == most                         refs--
 *      sets FRAME_FULL                      looks at FRAME_FULL: not there yet, or takes
 *      looks at refs: still? to the end     host->stable and brings it to the front
 *
 *  S5  whoever adds a pair holds its promise until the entries are in the tables as well: while anybody holds one, a pair that finds
 *      nothing may yet find something, and nothing is pruned.
 *
 * Locks: host->stable guards table and chains. Several changes may add to a chain at
 * once: each has reserved room for its own pairs before, which `promised` counts.
 */
#ifndef KAGE_MM_STABLE_H
#define KAGE_MM_STABLE_H

#include "mm/mm.h"

#define STABLE_FIRST 5 /* pairs that need no memory of their own: the object fills two cache lines */

struct stable {
	pfn_t pfn;
	uint64_t hash;
	uint32_t domain;
	uint32_t count, promised, room;
	uint32_t pruned; /* how often */
	uint32_t kept;   /* pairs that the last time has left */
	bool fused; /* all entries that map it are (mm/fused.h) */
	bool full;  /* S4; as FRAME_FULL of its frame */
	uint64_t *chain; /* where-style pairs; at first `first` */
	union {
		struct {
			struct stable *next, **at; /* leaders: in their bucket. Others: `at` is NULL */
			struct list same;
		};
		struct defer_node defer; /* it has died */
	};
	uint64_t first[STABLE_FIRST];
};
_Static_assert(sizeof(struct stable) == 128, "one for each merged frame");

struct stable_table;
int stable_init(struct host *h);
void stable_finish(struct host *h);

/* Allocates the object that makes a frame stable; not visible yet. -ENOMEM. */
struct stable *stable_alloc(struct host *h, uint32_t domain, uint64_t hash);
void stable_free(struct host *h, struct stable *s);
/* Room for one more pair, until it is given up, whether it has been added or not (S5). -ENOMEM. The caller has a reference. */
int stable_promise(struct host *h, struct stable *s);
void stable_give_up(struct host *h, struct stable *s);
/*
 * Under host->stable, which a change takes once for all of its pages:
 * publishes, the frame is STABLE from now on, its refs are already what they must be, with a promise
 * for whoever does it to give up; and adds a pair, for which room was promised.
 */
void stable_publish(struct host *h, struct stable *s, pfn_t pfn);
void stable_chain(struct stable *s, uint64_t where);
/*
 * Finds a stable frame with this hash that fewer than `most` entries (and others who look) use, and takes a
 * reference; NULL: none.
 */
struct stable *stable_get(struct host *h, uint32_t domain, uint64_t hash, uint32_t most);
/* The same of a frame, if it is a stable one of the domain. Inside a read section. */
struct stable *stable_get_frame(struct host *h, uint32_t domain, pfn_t pfn, uint32_t most);
/* Brings the bucket near. */
void stable_prefetch(struct host *h, uint32_t domain, uint64_t hash);
/* Drops a reference of stable_get(); the last one releases the frame. */
void stable_put(struct host *h, struct stable *s);
/*
 * A reference goes. True: it was the last one, the frame is out of the table and the caller's to release; the object is
 * freed after a grace period.
 */
bool stable_drop(struct host *h, pfn_t pfn);
/* More may share a frame from now on: none counts as full. */
void stable_reopen_all(struct host *h);
/* Contents that lie on more than one frame, and the number of those. */
void stable_chains(struct host *h, uint64_t *chains, uint64_t *dups);
/* Bytes of the table. */
uint64_t stable_bytes(struct host *h);
/* Calls fn for every stable frame. host->stable is held: fn takes no lock. */
void stable_each(struct host *h, void (*fn)(struct stable *s, void *arg), void *arg);
/* Its chain is mostly of pairs that find nothing any more. The caller has a reference. */
bool stable_is_stale(struct host *h, struct stable *s);
/* Keeps the pairs for which keep() says so, once each; unless the chain grows meanwhile. The caller has a reference. */
void stable_prune(struct host *h, struct stable *s, bool (*keep)(struct host *h, uint64_t where, pfn_t pfn));

/* A level-0 entry that merging has made. While it stands. Of a fused one the frame is not looked at (mm/fused.h, H3). */
static inline bool entry_merged(const struct pool *pool, entry_t e)
{
	if (!entry_is_leaf(e) || entry_is_fused(e))
		return entry_is_fused(e);
	return e & ENTRY_SPECIAL ? pfn_is_zero(entry_pfn(e)) :
				   frame_kind(pfn_frame(pool, entry_pfn(e))) == FRAME_STABLE;
}

static inline struct stable *frame_stable(const struct pool *pool, pfn_t pfn)
{
	return (struct stable *)(uintptr_t)atomic_load_explicit(&pfn_frame(pool, pfn)->where, memory_order_acquire);
}

#endif
