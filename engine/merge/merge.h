/* SPDX-License-Identifier: MIT */
/*
 * Same-page merging, in steps that the embedder drives.
 *
 *   dirty log ──► pages quiet for one whole pass ──► hash ──► stable frame with this hash?  merge into it
 *                                                         └─► candidate with this hash?     both become one stable frame
 *                                                         └─► else: a candidate
 *
 * A pass goes over all guests with mergeable regions, 128 MiB at a time. A page
 * that was written since the last pass waits for the next; one that was not, but
 * was before, is quiet: it is hashed, once. So nothing is read in the first pass,
 * and a guest that writes nothing costs nothing from the third on.
 *
 * Merging is between frames, not pages: all entries that map the duplicate (a
 * clone's as well) are found by the reverse map and redirected in one change.
 *
 * Invariants:
 *  G1  frames are merged only within a domain, after a full comparison made
 *      while no guest that maps either could write.
 *  G2  a merged frame has no pin, and no block entry covers it.
 *  G3  a candidate is a frame, not a page: its content is what its hash says
 *      unless somebody wrote it, and then the comparison tells.
 *
 * Locks: merge->lock, one step at a time; then host->lock, families for reading.
 */
#ifndef KAGE_MERGE_MERGE_H
#define KAGE_MERGE_MERGE_H

#include "mm/dirty.h"
#include "mm/mm.h"

struct stable;

struct candidate {
	struct candidate *by_hash, *by_pfn;
	uint64_t hash;
	pfn_t pfn;
	uint32_t domain;
};

/* Two chained tables over the same objects. */
struct candidates {
	struct env *env;
	uint64_t buckets, count;
	struct candidate **hash, **pfn;
};

int candidates_init(struct candidates *t, struct env *env);
void candidates_finish(struct candidates *t);
int candidates_add(struct candidates *t, struct pool *pool, uint32_t domain, uint64_t hash, pfn_t pfn);
struct candidate *candidates_find(struct candidates *t, uint32_t domain, uint64_t hash, pfn_t not);
struct candidate *candidates_find_pfn(struct candidates *t, pfn_t pfn);
void candidates_remove(struct candidates *t, struct pool *pool, struct candidate *c);
/* The frame still carries the mark of a candidate. Inside a read section. */
bool candidate_alive(struct pool *pool, pfn_t pfn);
/* Drops candidates whose frame is no ordinary frame in use any more. */
void candidates_sweep(struct candidates *t, struct pool *pool);

#define MERGE_CHUNK_SHIFT 15 /* pages: 128 MiB, as a dirty log's chunk */
#define MERGE_CHUNK_PAGES ((uint64_t)1 << MERGE_CHUNK_SHIFT)
#define MERGE_CHUNK_WORDS (MERGE_CHUNK_PAGES / 64)

struct merge_chunk {
	uint64_t index; /* gfn >> MERGE_CHUNK_SHIFT */
	struct merge_chunk *next; /* ascending */
	uint64_t pending[MERGE_CHUNK_WORDS]; /* written before the last harvest: hashed at the next if quiet */
	uint64_t later[MERGE_CHUNK_WORDS];   /* quiet, but pinned or in somebody's way: again in the next pass */
};

struct merge_mm {
	struct mm *mm;
	struct dirty_log *log;
	struct merge_chunk *chunks;
	uint64_t volatiles, skipped;           /* pages, in this pass so far */
	uint64_t volatiles_last, skipped_last; /* in the last whole pass */
	uint64_t scanned, passes;              /* ever */
};

struct merge {
	struct host *host;
	struct lock lock;
	_Atomic bool on; /* read without the lock by who asks whether a step is due */
	bool no_zero;
	uint32_t max_sharing;
	uint64_t salt;
	struct candidates candidates;
	/* where the pass is */
	uint64_t mm_id;       /* guest being scanned, 0: a pass begins */
	uint64_t chunk;       /* next chunk of it */
	bool chunk_open;
	uint64_t next_word;
	uint64_t todo[MERGE_CHUNK_WORDS];
	/* counters */
	_Atomic uint64_t passes, scanned;
	_Atomic uint64_t volatiles, skipped; /* of the last pass */
	_Atomic uint64_t volatiles_pass, skipped_pass;
	uint64_t waiting_pass;    /* pages that this pass leaves for the next */
	_Atomic uint64_t waiting; /* that the last one left */
};

int merge_init(struct merge *m, struct host *h, uint64_t salt);
void merge_finish(struct merge *m);
/* The last pass left pages for the next one. */
static inline bool merge_waiting(const struct merge *m)
{
	return READ_ONCE(m->waiting) != 0;
}
void merge_tune(struct merge *m, bool on, bool no_zero, uint32_t max_sharing);
/* The guest is about to be destroyed: steps pass it over from now on. */
void merge_forget(struct merge *m, struct mm *mm);
/*
 * Spends a budget: `pages` and `usec`, 0: no limit, both 0: to the end of the
 * pass. Adds to scanned and merged; *more: the pass is not over. -ENOMEM.
 */
int merge_step(struct merge *m, uint64_t pages, uint64_t usec, uint64_t *scanned, uint64_t *merged, bool *more);

/*
 * Replaces every entry that maps `from` by one that maps `into`: the zero frame,
 * a stable frame (`s`, with a reference that is consumed on success), or an
 * ordinary frame that becomes stable. 0; -EILSEQ: the contents differ; -EAGAIN:
 * raced, or a pin is in the way; -ENOMEM, -ETIMEDOUT. The families of both are
 * held for reading.
 */
int merge_frames(struct merge *m, struct family *from_family, pfn_t from, struct family *into_family, pfn_t into,
		 struct stable *s, uint64_t hash, uint32_t domain);

#endif
