/* SPDX-License-Identifier: MIT */
/*
 * The mirror's table: gfn -> host mapping, as runs. One run is what one call of
 * mmap(2) maps and what the kernel keeps as one VMA: neighbours of one kind
 * whose memory is contiguous, here and in the pool, are one run, always.
 *
 * Structures: leaves of up to RUNS_LEAF runs, in an array sorted by gfn. So a
 * change in the middle of 100,000 runs moves one leaf's worth of them.
 *
 * Invariants:
 *  R1  runs are sorted, do not overlap, are not empty; no two neighbours could be one.
 *  R2  a run holds a reference on the extent its frames lie in (mm/mirror.h, V5).
 *  R3  no leaf is empty.
 *
 * Locks: the mirror's, by the caller.
 */
#ifndef KAGE_KVM_RUNS_H
#define KAGE_KVM_RUNS_H

#include "frame/pool.h"

enum run_kind {
	RUN_ZERO = 0,    /* anonymous: reads zero */
	RUN_PRIVATE = 1, /* MAP_PRIVATE of the frames: a write makes a page of the host kernel's */
	RUN_SHARED = 2,  /* MAP_SHARED of them */
};

struct run {
	gfn_t gfn;
	uint64_t npages;
	pfn_t pfn; /* of the first; ZERO: PFN_NONE */
	enum run_kind kind;
	const char *hva; /* where it is seen: neighbours in the guest may lie in different windows */
};

#define RUNS_LEAF 25 /* a leaf is 1 KiB */

struct run_leaf {
	unsigned count;
	struct run_leaf *next; /* spare ones */
	struct run run[RUNS_LEAF];
};

struct runs {
	struct pool *pool;
	struct run_leaf **leaf;
	unsigned leaves, room;
	struct run_leaf *spare;
	unsigned spares;
	uint64_t count;
};

void runs_init(struct runs *r, struct pool *pool);
void runs_finish(struct runs *r);
/* Memory for runs_set() on `npages` neighbouring pages one by one, or for any `n` calls (the larger counts). -ENOMEM. */
int runs_reserve(struct runs *r, uint64_t n);
/* Gives spare memory back, but for what the next few changes take and `n` neighbouring pages. */
void runs_trim(struct runs *r, uint64_t n);
/* One more runs_set() needs no memory. */
static inline bool runs_ready(const struct runs *r) { return r->spares >= 3 && r->leaves + 3 <= r->room; }
/* The run that holds gfn, or NULL. Valid until the next change. */
const struct run *runs_find(const struct runs *r, gfn_t gfn);
/* The first run that ends beyond gfn, or NULL. */
const struct run *runs_from(const struct runs *r, gfn_t gfn);
/* Makes [run->gfn, + npages) this run, whatever was there. Memory has been reserved. */
void runs_set(struct runs *r, const struct run *run);
/* Nothing is mapped in [gfn, + npages) any more. Memory has been reserved. */
void runs_clear(struct runs *r, gfn_t gfn, uint64_t npages);

/* The part of the first run from `at` on that lies before `end`. */
bool runs_piece(const struct runs *r, gfn_t at, gfn_t end, struct run *piece);
/* Two that follow one another are one run: R1. `b` is not empty; an empty `a` joins nothing. */
bool runs_join(const struct runs *r, const struct run *a, const struct run *b);

static inline gfn_t run_end(const struct run *r) { return gfn_add(r->gfn, r->npages); }
/* What the run has at a page of its own. */
static inline pfn_t run_pfn(const struct run *r, gfn_t gfn)
{
	return r->kind == RUN_ZERO ? PFN_NONE : pfn_add(r->pfn, gfn.v - r->gfn.v);
}

#endif
