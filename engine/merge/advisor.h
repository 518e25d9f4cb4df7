/* SPDX-License-Identifier: MIT */
/*
 * The advisor: how many pages the next step of merging may look at.
 *
 * What KSM's scan-time advisor is for (Documentation/admin-guide/mm/ksm.rst):
 * nobody should have to find out how many pages at a time are right. Two aims:
 *
 *   share   percent of one CPU that merging may use, over any second
 *   scan    time that a pass should take: never less, and not more if the share allows it
 *
 *   moves   pages of mirrored guests that may be mapped anew in a second: what merging costs is in its own time, but for
 *           the fault that such a guest takes at each of them, which nobody measures
 *
 * and a floor, `min_pages` a step, which goes before all: merging that stands still helps nobody.
 *
 * CPU time earns credit while time goes by and is paid when a step has been
 * measured; what a page costs is averaged (EWMA). What a pass still has to look at is known
 * exactly (pages that were written, and have been left to it), so nothing
 * needs to be guessed about how long it will be, which is what KSM averages.
 *
 *   pages = min(credit / cost of a page, pages left * time since the last step / time left), in [min_pages, max_pages]
 *
 * Invariants:
 *  A1  credit <= share of one second: who sleeps for an hour may not work for one.
 *  A2  credit >= -share of ten seconds: one long step (an audit held it up) is not paid for ever.
 *  A3  nothing here reads a clock: callers pass what they measured, so the same calls give the same answers.
 *  A4  the same of moves, in pages: at most a quarter of a second's are ready at once, at most a minute's are owed.
 *
 * Locks: the caller's.
 */
#ifndef KAGE_MERGE_ADVISOR_H
#define KAGE_MERGE_ADVISOR_H

#include "base/base.h"

#define ADVISOR_SHARE 20u                          /* percent */
#define ADVISOR_SCAN ((uint64_t)10 * 1000000000)   /* ns */
#define ADVISOR_MIN_PAGES 64u
#define ADVISOR_MAX_PAGES (32u << 10)
#define ADVISOR_MOVES 6000u /* pages a second */

struct advisor {
	/* knobs */
	uint32_t share;
	uint64_t scan;
	uint64_t min_pages, max_pages;
	uint64_t moves;
	/* state; times in nanoseconds */
	bool begun;          /* `last` and `pass` are set */
	uint64_t last;       /* when the budget was asked for last */
	uint64_t pass;       /* when the running pass began; between passes: the last one */
	int64_t credit;      /* CPU time */
	int64_t ready;       /* pages that may be moved now */
	uint64_t rest;       /* of the next one, in nanoseconds of `moves` */
	uint64_t cost;       /* of a page, times COST_ONE; 0: nothing measured yet */
};

/* What the next step finds. */
struct advisor_work {
	bool begins;     /* it would begin a pass */
	uint64_t left;   /* pages that the pass has to look at, at most */
	uint64_t urgent; /* pages that wait for no pass: young guests, hints */
};

void advisor_init(struct advisor *a);
/* 0: the default. */
void advisor_tune(struct advisor *a, uint32_t share, uint64_t scan, uint64_t min_pages, uint64_t max_pages);
/* Pages for a step at `now`. 0: there is nothing to do yet. */
uint64_t advisor_pages(struct advisor *a, uint64_t now, const struct advisor_work *w);
void advisor_tune_moved(struct advisor *a, uint64_t moves);
/* Pages of mirrored guests that the step may move before it ends. */
uint64_t advisor_moves(const struct advisor *a);
/* So many have been moved. */
void advisor_moved(struct advisor *a, uint64_t pages);
/* The step took this much CPU time for so many pages. */
void advisor_paid(struct advisor *a, uint64_t cpu, uint64_t pages);
/* Nanoseconds until another step is worth while. */
uint64_t advisor_wait(const struct advisor *a, uint64_t now, const struct advisor_work *w);

#endif
