/* SPDX-License-Identifier: MIT */
/*
 * Figures and pictures: counters, classes of pages, dumps. Reads everything,
 * changes nothing.
 */
#ifndef KAGE_OBS_OBS_H
#define KAGE_OBS_OBS_H

#include <kage/stats.h>
#include "merge/merge.h"
#include "mm/mm.h"

/* Counters of one guest; `walk`: and what is counted by classifying its pages. Its family is read-locked inside. */
void obs_guest(struct mm *mm, struct merge *m, bool walk, struct kage_stats *out);
/* Of the whole engine: sums over the guests, and the pool. out->ksm_bytes is merge_bytes(). */
void obs_engine(struct host *h, struct merge *m, bool walk, struct kage_stats *out);
/* One byte (enum kage_page_class) a page. */
void obs_page_map(struct mm *mm, gfn_t gfn, uint64_t npages, uint8_t *map);

/* The i-th region's range, 0 pages beyond the last. */
uint64_t obs_region_at(struct mm *mm, unsigned i, gfn_t *start);

/* A page's digest. What mm_read() returns. */
int obs_digest(struct mm *mm, uint64_t salt, gfn_t gfn, struct kage_digest *out);
/* Compares what guests hold (census.c). -ENOMEM, or an error of obs_digest(). */
int obs_census(struct mm *const *mms, unsigned guests, uint64_t salt, struct kage_census *out);

/* What each of some guests holds, shared frames divided (share.c). `out`: one each. -ENOMEM. */
int obs_shares(struct mm *const *mms, unsigned guests, struct kage_share *out);

/* Text or JSON of a guest's primary table or regions, through put(). */
int obs_dump_primary(struct mm *mm, bool json, int (*put)(void *arg, const char *text, size_t len), void *arg);
int obs_dump_regions(struct mm *mm, bool json, int (*put)(void *arg, const char *text, size_t len), void *arg);

#endif
