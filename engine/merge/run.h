/* SPDX-License-Identifier: MIT */
/*
 * What the files of merging share: runs of pages, and the state of one thread that
 * looks for them. The read order is in merge.h.
 */
#ifndef KAGE_MERGE_RUN_H
#define KAGE_MERGE_RUN_H

#include "merge/merge.h"
#include "mm/tenant.h"

#define GROUP_WORDS (BLOCK_PAGES / 64) /* a group: 2 MiB, one leaf table */

/* -- one change (plan.c) --------------------------------------------------------- */

enum run_to {
	RUN_NONE = 0, /* not part of the run */
	RUN_ZERO,
	RUN_STABLE,
	RUN_FRESH,    /* an ordinary frame, which becomes stable */
};

enum run_result {
	RUN_RACED = 0, /* somebody was in the way */
	RUN_DIFFERS,   /* the contents do */
	RUN_REFUSED,   /* another guest that sees the page does not let its pages be merged */
	RUN_MERGED,
};

struct run_page {
	pfn_t from, into;
	struct stable *stable; /* STABLE: with a reference, consumed if merged. FRESH: merge_run()'s own */
	uint64_t hash;
	uint16_t at;	       /* FRESH: of `into`, in its 2 MiB */
	uint8_t to;	       /* enum run_to */
	bool hashed;	       /* else it is while it is compared, and no page of zeroes is taken */
	uint8_t result;	       /* out */
	bool live;	       /* plan.c's own: still part of the change */
	bool promised;	       /* the same: room in the stable frame's chain */
	uint16_t slots;	       /* the same: entries that map the frame */
	uint16_t guests;       /* the same: guests that see `from` */
};

/* Pages of 2 MiB of one guest, and what each is to be merged with. */
struct run {
	struct mm *mm; /* the guest that is scanned */
	struct family *family;
	gfn_t base; /* 2 MiB aligned */
	uint32_t domain;
	uint64_t zero_hash; /* of the domain; FRESH and STABLE pages that are not hashed must not have it. 0: they may */
	unsigned count, first, end; /* pages in it; they lie in [first, end) */
	/* of FRESH pages: all in one 2 MiB of one layer */
	bool fresh;
	uint64_t into; /* where >> LEVEL_BITS */
	struct family *into_family;
	uint64_t used[GROUP_WORDS];
	struct run_page page[BLOCK_PAGES];
};

/*
 * A frame in use, of a kind that carries a (layer, gfn) pair. Inside a read section: what is in use now is not
 * given back before its end, and so its extent is there.
 */
bool frame_listed(struct host *h, pfn_t pfn);

/*
 * Replaces every entry that maps a page's `from` by one that maps its `into`, page by page for
 * itself: each gets its result. 0; -ENOMEM, and nothing was done. Both families are held for reading.
 */
int merge_run(struct merge *m, struct run *r);

/* -- 2 MiB of a guest (look.c, run.c) ---------------------------------------------- */

/* What one thread works with. */
struct scanner {
	struct merge *m;
	struct merge_mm *g;
	struct mm *mm; /* of this batch: its family is held */
	uint64_t mm_id;
	uint64_t step; /* number of the step that it is made for */
	uint64_t pass; /* that the step has begun in: it comes to no other */
	bool starved; /* the step has passed something over for want of memory */
	gfn_t base;
	uint64_t todo[GROUP_WORDS];   /* not looked at yet */
	uint64_t later[GROUP_WORDS];  /* out: again in the next pass */
	uint64_t refused[GROUP_WORDS]; /* out: of these, not so soon (backoff.h) */
	uint64_t hashed[GROUP_WORDS]; /* their neighbours' partners are none of theirs */
	uint64_t merged;
	unsigned live; /* most pages of a change: guests wait for all of it */
	/* The last page that found a partner, and that: what follows one may equal what follows the other. */
	gfn_t hint_gfn;
	pfn_t hint;
	unsigned misses;
	/* Memory of a home that was never touched is not there to be read: one query for 2 MiB */
	pfn_t populated_base; /* PFN_NONE: none yet */
	uint64_t populated[BLOCK_PAGES / 64];
	pfn_t zero; /* what pages of zeroes are merged into; PFN_NONE: they are pages like others */
	uint64_t dirty[MERGE_CHUNK_WORDS]; /* of the chunk that is being visited */
	struct run run;
};

enum looked {
	LOOK_NOTHING = 0, /* not a page for merging */
	LOOK_LATER,  /* somebody is in the way: again in the next pass */
	LOOK_ADOPT,  /* quiet, but in a page of the host kernel's */
	LOOK_ZERO,
	LOOK_HINT,   /* probably equal to `into` */
	LOOK_HASHED,
};

struct look {
	unsigned at; /* in the group */
	enum looked what;
	pfn_t pfn, into;
	struct stable *stable; /* of `into`, with a reference; NULL: a candidate */
	uint64_t hash;
};

#define LOOKS 16

uint64_t page_hash(const struct tenant *t, const void *page);
/* Takes up to LOOKS pages from s->todo and looks at them. Their number. */
unsigned look_some(struct scanner *s, struct look *l);
/* The pages still map what they did when they were looked at: clears `what` of others, to LATER. Inside a read section. */
void look_again(struct scanner *s, struct look *l, unsigned n);
/* For stable_prune(): a pair is worth keeping if an entry is still found through it. */
bool pair_keeps(struct host *h, uint64_t where, pfn_t pfn);
/* Looks at all of s->todo and merges what it can. -ENOMEM: what is left is in s->todo. */
int scan_group(struct scanner *s);

#endif
