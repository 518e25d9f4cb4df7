/* SPDX-License-Identifier: MIT */
/*
 * THE change funnel: every mutation of an mm that a secondary MMU could see.
 * A planner (COW break, discard, unmap, protect, clone, merge, harvest …) fills a
 * struct change and calls change_run(), which performs
 *
 *      prepare        all that can fail for want of memory; nothing visible
 *      notify start   on every mm that reaches the entries; may refuse
 *      inspect        contents may be looked at: nobody writes, nothing is locked
 *      lock
 *      recheck        does the plan still hold? else -EAGAIN
 *      commit         cannot fail
 *      unlock
 *      notify end
 *      after
 *      release        frames that lost their last entry, after a grace period
 *
 * After an error everything is as it was, and `cancel` has freed what prepare
 * took.
 */
#ifndef KAGE_MM_CHANGE_H
#define KAGE_MM_CHANGE_H

#include "mm/mm.h"
#include "mm/table.h"

struct change;
struct change_target;

struct change_ops {
	int (*prepare)(struct change *c);  /* NULL: nothing to do */
	/*
	 * Pages of a target that the host kernel has made private (bit i of map: start + i), which the
	 * planner leaves out. NULL: any such page ends the change, with -ESTALE.
	 */
	void (*diverged)(struct change *c, const struct change_target *t, const uint64_t *map);
	int (*inspect)(struct change *c);  /* NULL: nothing to do; -EAGAIN: give up */
	void (*lock)(struct change *c);    /* NULL: the caller holds what commit needs */
	int (*recheck)(struct change *c);  /* NULL: nothing can have changed */
	void (*commit)(struct change *c);
	void (*unlock)(struct change *c);
	void (*after)(struct change *c);   /* after the end: what secondary MMUs may have shown until then is let go */
	void (*cancel)(struct change *c);  /* after any error from prepare on */
};

/* Guests whose secondary MMUs hear of the change, and the range in each. */
struct change_target {
	struct mm *mm;
	struct notify_change notify; /* start and end are filled by the planner */
};

struct change {
	/* in: the planner */
	const struct change_ops *ops;
	struct change_target *target; /* prepare may set it */
	unsigned targets;
	uint32_t reason; /* enum kage_reason */
	uint32_t flags;  /* enum kage_range_flags */
	uint32_t lost;   /* permissions that go; 0: all */
	const void *owner;
	bool adopts; /* takes care itself of pages that the host kernel has made private (mm/mirror.h) */
	struct notify_reader *self; /* the reader of target[0] on whose behalf this is done */
	/* out: the funnel */
	struct dead dead;
};

/*
 * 0, -EAGAIN, -ENOMEM, -ETIMEDOUT, -EDEADLK, or what prepare and recheck return.
 * -ESTALE: the host kernel has made a page of a target private; adopt it, then plan again.
 */
int change_run(struct change *c);

#endif
