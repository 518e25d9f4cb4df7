/* SPDX-License-Identifier: MIT */
/*
 * Same-page merging, in steps that the embedder drives.
 *
 *   scan.c        which guest, which 128 MiB of it: where a pass is
 *   hint.c        what goes before it: new memory, and what the embedder points at
 *   chunk.c       which pages of 128 MiB: from dirty logs, with backoff.c for those that change too fast
 *   pace.c        how many of them in a step, by advisor.c
 *   look.c        2 MiB at a time: what these pages map, and what is in them
 *   run.c         whom they equal: the zero frame, a stable frame, a candidate (candidate.c)
 *   plan.c        one change that merges all of a run
 *
 * A pass goes over all guests with mergeable regions. A page that was written
 * since the last pass waits for the next; one that was not, but was before, is
 * quiet: it is read, once. So nothing is read in the first pass, and memory
 * that nobody writes costs nothing from the third on. New memory and hints go before the pass;
 * pages that change too fast are left alone for longer and longer.
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
 * Several threads may step at once. Each takes a chunk (128 MiB of a guest) for
 * itself for the time of a batch: so a chunk's state needs no lock of its own. What one of them has seen written is for
 * none of the steps that had begun by then: for all of them together "quiet" means what it does for one
 * (J1 of hint.c, Q1 of chunk.c).
 *
 * Locks: merge->gate, for reading, around a batch; merge->lock for where the pass is and whose a
 * chunk is; host->lock, and the families concerned, for reading.
 */
#ifndef KAGE_MERGE_MERGE_H
#define KAGE_MERGE_MERGE_H

#include "mm/dirty.h"
#include "mm/mm.h"

struct stable;

/* -- candidates (candidate.c) -------------------------------------------------- */

struct candidate {
	uint64_t hash; /* salted, of the domain */
	uint64_t pfn;  /* 0: empty */
};

struct candidates {
	struct env *env;
	struct lock lock;
	uint64_t slots, used; /* slots: a power of two */
	struct candidate *slot;
	_Atomic uint64_t marked; /* invariant 3 of candidate.c */
};

int candidates_init(struct candidates *t, struct env *env);
void candidates_finish(struct candidates *t);
/* t->lock held: room for n more. -ENOMEM. */
int candidates_reserve(struct candidates *t, uint64_t n);
/* t->lock held, inside a read section. A candidate with this hash; PFN_NONE: no other than `not`. */
pfn_t candidates_find(struct candidates *t, struct pool *pool, uint64_t hash, pfn_t not);
/* The same: marks the frame, which was mapped in this read section. Room was reserved. */
void candidates_add(struct candidates *t, struct pool *pool, uint64_t hash, pfn_t pfn);
/* Brings an entry's place near. */
void candidates_prefetch(const struct candidates *t, uint64_t hash);
/* A comparison has disproved the entry, or it has been merged. */
void candidates_drop(struct candidates *t, uint64_t hash, pfn_t pfn);
/* What was known of the frame is old. Inside a read section, or the frame is held otherwise. */
void candidate_unmark(struct candidates *t, struct frame *f);
/* An ordinary frame in use that carries the mark, and no pin: it stays readable for the rest of the read section. */
bool candidate_alive(struct pool *pool, pfn_t pfn);
/* The same, and the (layer, gfn) pair that it is found under (invariant 6 of candidate.c). */
bool candidate_where(struct host *h, pfn_t pfn, uint64_t *where);
uint64_t candidates_count(const struct candidates *t, struct pool *pool);
/* Takes garbage out, if there is enough of it. */
void candidates_sweep(struct candidates *t, struct pool *pool);

/* -- what is known of guests (scan.c) --------------------------------------------- */

#define MERGE_CHUNK_SHIFT 15 /* pages: 128 MiB, as a dirty log's chunk */
#define MERGE_CHUNK_PAGES ((uint64_t)1 << MERGE_CHUNK_SHIFT)
#define MERGE_CHUNK_WORDS (MERGE_CHUNK_PAGES / 64)

struct backoff;

struct merge_chunk {
	uint64_t index; /* gfn >> MERGE_CHUNK_SHIFT */
	bool open;      /* not all of `todo` is done */
	bool counted;   /* in merge_mm.open. merge->lock, as `taken` */
	bool taken;     /* a scanner is at it */
	bool visited;   /* a pass has been at it: what its log says from here on was written */
	_Atomic bool busy; /* there is something to do in the next pass, even if nothing is written */
	uint64_t seen;   /* the last step that had begun when a visit had last taken what was written from the log; merge->lock */
	uint64_t armed;  /* the same: a visit of the pass, or one that arms a hint */
	uint64_t tried_pass; /* in which `tried` was */
	uint64_t pending[MERGE_CHUNK_WORDS]; /* written before the last harvest: hashed at the next if quiet */
	uint64_t later[MERGE_CHUNK_WORDS];   /* quiet, but pinned or in somebody's way, or left alone: again in the next pass */
	uint64_t todo[MERGE_CHUNK_WORDS];    /* quiet: to be looked at in this pass */
	uint64_t tried[MERGE_CHUNK_WORDS];   /* what has been in `todo` of the last pass */
	struct backoff *backoff[MERGE_CHUNK_PAGES / BLOCK_PAGES]; /* NULL: no page of the 2 MiB has failed */
};

struct merge_mm {
	struct mm *mm;
	struct list node; /* in merge->left while `open` is not 0; merge->lock */
	struct dirty_log *log;
	/* by index; merge->lock */
	struct merge_chunk **chunk;
	uint32_t chunks, room;
	uint32_t open;                                 /* chunks that a step has left open */
	bool fetched;                                  /* the mirror's log has been, in this pass */
	_Atomic uint32_t busy;                         /* chunks with something to do */
	_Atomic uint64_t volatiles, skipped, backed_off; /* pages, in this pass so far */
	_Atomic uint64_t volatiles_last, skipped_last, backed_off_last; /* in the last whole pass */
	_Atomic uint64_t scanned, passes, visits;      /* ever */
};

/* Memory to be looked at before what the pass is at. */
struct merge_hint {
	struct list node;
	struct mm *mm;
	bool final;     /* its contents need not be quiet first */
	bool armed;     /* not final: what was written is known, and looked at in a step after `step` */
	bool fetched;   /* the mirror's log has been, in this round */
	uint64_t step;    /* the last one that had begun then */
	uint64_t starved; /* a step that had no memory for it, and leaves it alone */
	gfn_t start, end, at;
	struct merge_chunk *chunk; /* where it is; NULL: at the next */
};

struct merge {
	struct host *host;
	struct brlock gate; /* read: a batch of a step; write: audit, tuning, a guest leaves */
	struct lock lock;   /* where the pass is; chunks of guests */
	_Atomic bool on; /* read without the lock by who asks whether a step is due */
	bool no_zero;    /* these three change with the gate held for writing */
	uint32_t max_sharing;
	uint32_t backoff; /* passes that a page is left alone at most; 0: no back-off */
	uint64_t salt;
	struct candidates candidates;
	struct lock mirrors; /* changes that involve a mirror are made one at a time */
	struct list guests; /* all of them, in the order in which they came */
	struct list left;   /* those with chunks that a step has left open */
	/* where the pass is */
	struct list *past; /* the last guest that it has left behind; &guests: none yet */
	uint64_t mm_id;  /* guest being scanned, 0: a pass begins */
	uint64_t chunk;  /* next chunk of it */
	unsigned taken;  /* chunks that scanners are at */
	struct list hints; /* oldest first */
	unsigned hinted;   /* their number */
	_Atomic uint64_t steps;
	/* counters */
	_Atomic uint64_t passes, scanned;
	_Atomic uint64_t moved; /* pages of mirrored guests whose mappings were replaced, ever */
	_Atomic uint64_t volatiles, skipped, backed_off; /* of the last pass */
	_Atomic uint64_t volatiles_pass, skipped_pass, backed_off_pass;
	_Atomic uint64_t visits; /* walks of a chunk's bitmaps, ever */
	_Atomic uint64_t waiting_pass; /* pages that this pass leaves for the next */
	_Atomic uint64_t waiting;      /* that the last one left */
};

int merge_init(struct merge *m, struct host *h, uint64_t salt);
void merge_finish(struct merge *m);
/* The last pass left pages for the next one. */
static inline bool merge_waiting(const struct merge *m)
{
	return READ_ONCE(m->waiting) != 0;
}
/* backoff: passes, at most BACKOFF_MOST; 0: none. */
void merge_tune(struct merge *m, bool on, bool no_zero, uint32_t max_sharing, uint32_t backoff);
/*
 * The range is looked at before all else: `final`, in the next step, whether it is quiet or not; else in a
 * step after the next, what is quiet until then. Nothing happens while merging is off. -ENOMEM.
 */
int merge_hint(struct merge *m, struct mm *mm, gfn_t start, uint64_t npages, bool final);
/* Pages of hints, none while merging is off; *ready: for some of them the next step need not wait. */
uint64_t merge_urgent(struct merge *m, bool *ready);
/* Bytes of what is remembered of a guest, its dirty log included; of all guests, candidates and hints. No lock held. */
uint64_t merge_mm_bytes(struct merge *m, struct mm *mm);
uint64_t merge_bytes(struct merge *m);
/* The guest is there: passes come to it. */
void merge_enter(struct merge *m, struct mm *mm);
/* The guest is about to be destroyed: no step comes to it from now on. */
void merge_forget(struct merge *m, struct mm *mm);
/*
 * Spends a budget: `pages` and `usec`, 0: no limit, both 0: to the end of the
 * pass. `moved`: it ends when so many pages of mirrored guests have been given other mappings, by any thread; checked
 * between batches. Adds to scanned and merged; *more: the pass is not over. -ENOMEM: at its end, if guests or chunks were
 * passed over for want of memory; or at once, if a batch had none. Threads
 * that step at once share the pass; who finds nothing left to take returns with *more. A step ends with the pass that it
 * began in, whoever came to its end.
 */
int merge_step(struct merge *m, uint64_t pages, uint64_t usec, uint64_t moved, uint64_t *scanned, uint64_t *merged, bool *more);

#endif
