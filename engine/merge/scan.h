/* SPDX-License-Identifier: MIT */
/*
 * What the files of the policy share: guests' chunks, and what a step does next.
 * The read order is in merge.h.
 */
#ifndef KAGE_MERGE_SCAN_H
#define KAGE_MERGE_SCAN_H

#include "merge/run.h"

/* Why a chunk is visited. */
enum visit {
	VISIT_PASS,   /* the pass has come to it, or it was left open */
	VISIT_ARM,    /* new memory: what was written before is known from here on */
	VISIT_YOUNG,  /* new memory in a later step: what has been quiet since is looked at */
	VISIT_FINAL,  /* a hint: everything that has been written is */
};

/* What a step does next. */
struct work {
	struct mm *mm; /* its family is held; NULL: nothing is left */
	struct brlock_held held;
	struct family *busy; /* somebody writes to it: nothing is taken; NULL: no */
	pfn_t zero; /* as in struct scanner */
	struct merge_chunk *chunk; /* taken; NULL: the guest is over, or nothing is known of it yet */
	enum visit visit;
	gfn_t start, end; /* of hints, in the chunk */
	uint64_t step, pass; /* as in struct scanner */
	bool starved; /* something was passed over for want of memory */
	bool over;    /* the step's pass is */
	bool visited; /* what was written in the chunk is no longer in the log */
};

/* -- chunks (chunk.c) ------------------------------------------------------------ */

/* The guest's first chunk with this index or a higher one. merge->lock held. */
uint32_t chunk_search(const struct merge_mm *g, uint64_t index);
/* The chunk with this index; made if it is not there. NULL: no memory. The same. */
struct merge_chunk *chunk_have(struct merge *m, struct merge_mm *g, uint64_t index);
void chunks_free(struct merge *m, struct merge_mm *g);
/* Bytes of them. The same. */
uint64_t chunks_bytes(const struct merge_mm *g);
/*
 * Takes what a mirror's hardware has logged of the guest, for its chunks' visits. But for pages that this pass leaves
 * alone, if it can do without them (mm/mirror.h, harvest). merge->lock held. -errno.
 */
int merge_fetch(struct merge *m, struct merge_mm *g);
/* Harvests the chunk, or w's part of it, and works out what is to be looked at. The chunk is taken. -errno. */
int chunk_visit(struct scanner *s, const struct work *w);
/* Up to `limit` pages of an open chunk, 2 MiB at a time. Returns the number it spent, or -errno. */
int64_t chunk_batch(struct scanner *s, struct merge_chunk *c, uint64_t limit);

/* -- hints (hint.c) ---------------------------------------------------------------- */

/* The next chunk of a hint: w->mm stays NULL if there is none, or the family of one is busy. merge->lock held. -errno. */
int hint_take(struct merge *m, struct work *w);
/* The guest goes. */
void hints_forget(struct merge *m, const struct mm *mm);

/* -- the pass (scan.c) --------------------------------------------------------------- */

/* Opens the guest's dirty log. merge->lock held. */
int merge_attach(struct merge *m, struct mm *mm);
/* The first chunk at or after `index` that a mergeable region reaches. UINT64_MAX: none. */
uint64_t mergeable_next(struct mm *mm, uint64_t index);
/*
 * Read-locks the guest's family for w. False, and w->busy: somebody writes to it, or waits to. A clone does while it copies
 * pages, and merge->lock, which is held, is not held for so long. The gate is: no guest goes away.
 */
bool guest_enter(struct mm *mm, struct work *w);
/* Takes the chunk for w. The same. */
void chunk_take(struct merge *m, struct merge_mm *g, struct merge_chunk *c, struct work *w);

#endif
