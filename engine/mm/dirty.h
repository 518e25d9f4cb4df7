/* SPDX-License-Identifier: MIT */
/*
 * Dirty and accessed logs. Each log has a bitmap of its own, so each consumer
 * has its own epoch: a harvest of one leaves the others' bits alone.
 */
#ifndef KAGE_MM_DIRTY_H
#define KAGE_MM_DIRTY_H

#include <kage/dirty.h>
#include "mm/mm.h"

/* Kind of merging's own logs: written pages, and those of mm_mark_changed(). */
#define DIRTY_MERGE 2

/* Pages whose writes nobody needs to hear of at present: of the 64 from `gfn` on. Called under the mirror's locks. */
struct dirty_left {
	uint64_t (*word)(const struct dirty_left *left, gfn_t gfn);
};

int dirty_open(struct mm *mm, uint32_t kind, uint32_t flags, struct dirty_log **out);
void dirty_close(struct dirty_log *log);
/* Bits of [start, start + npages) into a zeroed or overwritten bitmap; returns their number. -errno. */
int64_t dirty_collect_bitmap(struct dirty_log *log, gfn_t start, uint64_t npages, uint64_t *bitmap);
/* At most `room` runs; returns their number. Pages that do not fit stay dirty. */
int64_t dirty_collect_runs(struct dirty_log *log, gfn_t start, uint64_t npages, struct kage_dirty_run *run,
			   uint64_t room);
/*
 * The same in two parts, for who comes back to pieces of a guest: what a mirror's hardware has logged goes into all
 * logs, but for `left`, if nobody else has a log (mirror.h); and taking bits. Bit 0 of the bitmap is the page at or below `start` whose number is a multiple of 64.
 */
int dirty_fetch(struct dirty_log *log, const struct dirty_left *left);
int64_t dirty_take(struct dirty_log *log, gfn_t start, uint64_t npages, uint64_t *bitmap);
/* The first 128 MiB at or after gfn with a mark that can be taken; its address, or DIRTY_NONE. Looks at summaries only. */
#define DIRTY_NONE GFN(UINT64_MAX)
gfn_t dirty_next(struct dirty_log *log, gfn_t gfn);
/* Memory that the log takes. */
uint64_t dirty_bytes(const struct dirty_log *log);
struct mm *dirty_mm(struct dirty_log *log);

#endif
