/* SPDX-License-Identifier: MIT */
/*
 * Sets of regions: what a guest has at which gfn, and with what permission.
 *
 * A set is sorted, immutable but for the lazily filled home extents, and
 * replaced as a whole under mm->range held for writing; lock-free readers see
 * the old or the new one. Protection lives here alone: table entries do not
 * repeat it (their W is the write rule of clones), so protecting memory never
 * touches a table.
 */
#ifndef KAGE_MM_REGION_H
#define KAGE_MM_REGION_H

#include "mm/mm.h"

static inline gfn_t region_end(const struct region *r)
{
	return gfn_add(r->start, r->npages);
}

/* An empty set with room for n regions. -ENOMEM: NULL. */
struct regions *regions_new(struct host *h, unsigned n);
/* A copy with room for `extra` more; takes a reference on every extent. */
struct regions *regions_copy(struct host *h, const struct regions *set, unsigned extra);
/*
 * For a clone: ANON regions lose their home (the next touch of a hole gives a
 * fresh one), unless `keep` and the region is EXTERNAL.
 */
struct regions *regions_clone(struct host *h, const struct regions *set, bool keep);
/* Frees a set that nobody can have seen, or after a grace period. NULL ok. */
void regions_free(struct host *h, struct regions *set);
void regions_retire(struct host *h, struct regions *set);
/* Installs a new set, retires the old. mm->range held for writing. */
void regions_replace(struct mm *mm, struct regions *set);

const struct region *regions_find(const struct regions *set, gfn_t gfn);
/* Regions cover [start, end) without a hole. */
bool regions_cover(const struct regions *set, gfn_t start, gfn_t end);

/* The home extent of an ANON region, made at the first call. NULL: -ENOMEM. mm->range held for reading. */
struct extent *region_home(struct mm *mm, const struct region *r);
/*
 * Has the owner of a region that traps fill a frame that nobody sees yet. 0, KAGE_WAIT (for -EAGAIN too, which to who plans
 * a change means "raced, again", and would be asked for ever), -errno. mm->range held.
 */
int region_touch(struct mm *mm, const struct region *r, gfn_t gfn, pfn_t pfn);

#endif
