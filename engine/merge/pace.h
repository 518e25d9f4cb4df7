/* SPDX-License-Identifier: MIT */
/*
 * Steps whose number of pages the advisor sets: what a step cost is measured
 * around it, by the embedder's clock, and what the pass has left is read off merging's
 * own figures.
 *
 * Locks: pace->lock, for moments; merge->lock is never held around or inside it.
 */
#ifndef KAGE_MERGE_PACE_H
#define KAGE_MERGE_PACE_H

#include "merge/advisor.h"
#include "merge/merge.h"

struct pace {
	struct lock lock;
	struct advisor advisor;
	uint64_t pass, spent; /* pages that steps have spent in this pass */
	uint64_t moved;       /* merge->moved, as far as it has been paid for */
};

void pace_init(struct pace *p);
void pace_tune(struct pace *p, uint32_t share, uint64_t scan_ns, uint32_t min_pages, uint32_t max_pages, uint32_t moved_pages);

/* What is known before and after a step. */
struct paced {
	uint64_t budget; /* pages that the advisor allowed; 0: it is too early */
	uint64_t wait;   /* nanoseconds until the next one */
};

/* merge_step() with the advisor's budget; `pages`, `usec`: further limits, 0: none. */
int pace_step(struct pace *p, struct merge *m, uint64_t pages, uint64_t usec, uint64_t *scanned, uint64_t *merged,
	      bool *more, struct paced *out);

#endif
