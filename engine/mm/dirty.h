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

int dirty_open(struct mm *mm, uint32_t kind, uint32_t flags, struct dirty_log **out);
void dirty_close(struct dirty_log *log);
/* Bits of [start, start + npages) into a zeroed or overwritten bitmap; returns their number. -errno. */
int64_t dirty_collect_bitmap(struct dirty_log *log, gfn_t start, uint64_t npages, uint64_t *bitmap);
/* At most `room` runs; returns their number. Pages that do not fit stay dirty. */
int64_t dirty_collect_runs(struct dirty_log *log, gfn_t start, uint64_t npages, struct kage_dirty_run *run,
			   uint64_t room);
struct mm *dirty_mm(struct dirty_log *log);

#endif
