/* SPDX-License-Identifier: MIT */
/*
 * The reverse map: from a frame to every entry that maps it.
 */
#ifndef KAGE_MM_RMAP_H
#define KAGE_MM_RMAP_H

#include "mm/mm.h"

/* One place where a frame is mapped: an entry of one table page, which several mms may reach. */
struct rmap_entry {
	struct mm *mm;  /* one of the mms that reach it */
	gfn_t gfn;      /* of the frame in it */
	entry_t *slot;
	unsigned level; /* of the entry; > 0: a block that contains the frame */
	pfn_t table;    /* the page that holds the entry */
};

/*
 * Calls visit for every entry that maps the frame, each table page once however
 * many guests share it. A nonzero return ends the walk and is returned.
 * The caller holds the lock of the families concerned, for reading at least: of
 * the one family of an ordinary frame, or of all that a stable frame's chain
 * names. -ENOMEM if there are more distinct tables than memory to remember them.
 */
int rmap_walk(struct host *h, pfn_t pfn, int (*visit)(const struct rmap_entry *e, void *arg), void *arg);

/* The same for one (layer, gfn) pair. */
int rmap_walk_where(struct host *h, uint64_t where, pfn_t pfn, int (*visit)(const struct rmap_entry *e, void *arg),
		    void *arg);

/* The pair an ordinary frame carries, or that its extent gives it. */
uint64_t rmap_where(const struct host *h, pfn_t pfn);

/*
 * The leaf entries of the 2 MiB around gfn, and the table's page; NULL: there is no such table, `above` is the entry
 * of `level` that covers all of it, or none. Inside a read section.
 */
entry_t *table_leaves(const struct mm *mm, gfn_t gfn, pfn_t *table, entry_t **above, unsigned *level);

/* The page of the table that holds the entry for gfn, and the entry's slot; PFN_NONE: a table is missing. */
pfn_t table_holding(const struct mm *mm, gfn_t gfn, entry_t **slot, unsigned *level);

#endif
