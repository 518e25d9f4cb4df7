/* SPDX-License-Identifier: MIT */
/*
 * A mirror: the secondary MMU of a guest whose translations the host kernel
 * performs. Its entries are host mappings (windows) of the pool's files; a guest
 * runs on them without asking the engine.
 *
 * What sets it apart from other listeners: the kernel breaks COW by itself. A
 * page whose frame is shared is mapped MAP_PRIVATE, so a write gives the guest
 * an anonymous page that the table knows nothing of: the page has *diverged*. What
 * the guest has is then in the window, not in the frame.
 *
 *   entry               window                            contents
 *   leaf, exclusive     MAP_SHARED, the frame             frame == window
 *   leaf, shared        MAP_PRIVATE, the frame            window (diverged or not)
 *   none                anonymous, reads zero             window
 *   HOST_PRIVATE        as it was when it diverged        window
 *
 * Invariants:
 *  V1  effective W of a page means that the window maps its frame MAP_SHARED; a
 *      frame that anybody else maps is never mapped MAP_SHARED.
 *  V2  a shared page, or none, becomes the guest's own only through mm_adopt(),
 *      which takes its contents from where they are.
 *  V3  no window page is replaced unless writes to it have been blocked since it was
 *      seen not to be diverged, or its contents were taken, or are dropped.
 *  V4  tables shared by two guests have no HOST_PRIVATE entry: a clone adopts first.
 *  V6  the pages of a granule (what the host maps and protects at the least; four or sixteen on hosts
 *      with pages of 16 or 64 KiB) are in the same state: frames side by side and aligned, or none, or all the host
 *      kernel's. Whoever gives the guest one page gives it the granule; single pages are not merged.
 *  V5  while a window can show a frame, the frame is not given to anybody else:
 *      home slots are punched and not recycled while the mirror holds their
 *      extent; of arena frames the entry keeps its reference until the page is adopted.
 *
 * Locks: ops are called as each says; a mirror's own lock comes after all table locks.
 */
#ifndef KAGE_MM_MIRROR_H
#define KAGE_MM_MIRROR_H

#include "mm/mm.h"

#define MIRROR_WORDS (BLOCK_PAGES / 64)
#define MIRROR_GRANULE_MAX 16u
#define REAPS_MAX 3 /* what a failed attempt gave back is pending too: it must not feed the next one for ever */

struct mirror;
struct dirty_left;

struct gfn_range {
	gfn_t start, end;
};

/* Grows. Zeroed: empty. */
struct gfn_ranges {
	struct gfn_range *r;
	unsigned n, room;
};

/* 0, -ENOMEM. */
int gfn_ranges_add(struct env *env, struct gfn_ranges *list, gfn_t start, gfn_t end);
void gfn_ranges_free(struct env *env, struct gfn_ranges *list);

struct mirror_ops {
	/*
	 * The set of regions is about to become `next` (mm->range held for
	 * writing): everything that can fail. Then commit, when it has, or cancel.
	 */
	int (*regions_prepare)(struct mirror *m, const struct regions *next);
	void (*regions_commit)(struct mirror *m, const struct regions *next);
	void (*regions_cancel)(struct mirror *m);
	/* Which of `npages` pages (at most 512) have diverged. Final only if writes are blocked. Any lock. */
	void (*diverged)(struct mirror *m, gfn_t start, unsigned npages, uint64_t map[MIRROR_WORDS]);
	/* A write slipped by while [start, end) was being replaced (see unsettled). True once. */
	bool (*slipped)(struct mirror *m, gfn_t start, gfn_t end);
	/* Calls fn for each 2 MiB with diverged pages in [start, end); nonzero ends it and is returned. */
	int (*each_diverged)(struct mirror *m, gfn_t start, gfn_t end,
			     int (*fn)(struct mm *mm, gfn_t base, const uint64_t map[MIRROR_WORDS], void *arg), void *arg);
	/* Contents of [start, end) are dropped: reads show zeroes from here on. In a change of the range. */
	void (*drop)(struct mirror *m, gfn_t start, gfn_t end);
	/* After a change's end: the window shows the frame, shared. False: the mapping failed, it is as it was. */
	bool (*shows)(struct mirror *m, gfn_t gfn, pfn_t pfn);
	/* Where the page is seen; NULL: in no window. mm->range held. */
	void *(*window)(struct mirror *m, gfn_t gfn);
	/*
	 * Maps everything MAP_PRIVATE but the kept ranges (in any order) and EXTERNAL regions:
	 * from its return on no frame outside of these is written. -ENOMEM.
	 */
	int (*freeze)(struct mirror *m, const struct gfn_range *kept, unsigned n);
	/*
	 * Takes what the hardware logged into the open dirty logs. Pages of `left` (NULL: none) may stay as they are: logged, and free to be
	 * written without a fault. They are reported again by each harvest until one takes them. The family is held, mm->range is not.
	 */
	int (*harvest)(struct mirror *m, gfn_t start, gfn_t end, const struct dirty_left *left);
	/* Logs of written pages have been opened or closed: makes the hardware's logging what it has to be. The same. */
	int (*track)(struct mirror *m);
	/* Around changes of regions, without any lock: stops the guest if the embedder lets us. */
	int (*stop)(struct mirror *m);
	void (*go)(struct mirror *m);
	/* Finds diverged pages, drops the frames they shared; mm->range not held. Pages that are private now, or -errno. */
	int64_t (*reconcile)(struct mirror *m, bool adopt);
	/* A step of the engine; its family is held for reading. */
	void (*step)(struct mirror *m);
	/* Everything is stopped: compares the window with the table. */
	int (*audit)(struct mirror *m, struct audit *a);
	int (*dump)(struct mirror *m, bool json, int (*put)(void *arg, const char *text, size_t len), void *arg);
};

struct mirror {
	const struct mirror_ops *ops;
	struct mm *mm;
	bool exact;  /* writes to shared pages trap before they happen: the table is the truth, for reads too */
	bool abandoned; /* nothing traps any more: what of regions that trap was not fetched is zero, as the guest sees it */
	bool blocks; /* writes to a range can be blocked while the guest runs, or the guest can be paused */
	/*
	 * Exact: a replacement has been mapped and it is not known yet whether a write slipped by before it was
	 * registered. The page's frame may lack that write: reads wait.
	 */
	_Atomic uint32_t unsettled;
	unsigned granule; /* pages, a power of two, at most MIRROR_GRANULE_MAX (V6) */
	bool scarce; /* mappings are: changes that are nobody's need had better wait */
};

/* The kernel may have broken COW: contents are read through the window. */
static inline bool mm_native(const struct mm *mm)
{
	const struct mirror *m = load_acquire(&mm->mirror);

	return m && !READ_ONCE(m->exact);
}

/* Its pages come and go by granules of several: nothing else may be done with one of them. */
static inline bool mm_coarse(const struct mm *mm)
{
	const struct mirror *m = load_acquire(&mm->mirror);

	return m && m->granule > 1;
}

/*
 * Makes pages (and what else is of their granules: V6) the guest's own: `map` says which of the 512 pages from `base` (2 MiB
 * aligned), all in regions. Each gets its home slot, or a frame of the arena,
 * filled with what the guest sees; a frame that is the guest's alone already
 * stays. mm->range held. 0; -EAGAIN (raced); -EOPNOTSUPP (writes cannot be
 * blocked); -EBUSY (a page is pinned whose granule is not whole: a guest that attaches only); -ENOMEM, -ETIMEDOUT, or
 * what a region's touch returned (KAGE_WAIT too). Those that do all of a range at once say -EAGAIN for that.
 */
int mm_adopt(struct mm *mm, gfn_t base, const uint64_t map[MIRROR_WORDS], struct notify_reader *self, const void *owner);
/* The same of one page. */
int mm_adopt_page(struct mm *mm, gfn_t gfn, struct notify_reader *self, const void *owner);
/* The same of all ordinary memory of a 2 MiB, whatever its state: one mapping from then on. Counted as widened. */
int mm_adopt_block(struct mm *mm, gfn_t base);
/* The same of the pages in `map`; if they are many and scattered, of all of the 2 MiB: that is less work. */
int mm_adopt_runs(struct mm *mm, gfn_t base, const uint64_t map[MIRROR_WORDS]);
/* After a change's end: pages of the range that slipped by an exact policy come home. mm->range not held. */
void mm_settle(struct mm *mm, gfn_t start, gfn_t end);
/* Adopts whatever has diverged in [start, end). */
int mm_adopt_diverged(struct mm *mm, gfn_t start, gfn_t end);
/*
 * Diverged pages lose the frames they shared: their entries become HOST_PRIVATE.
 * Those whose old frame the arena would recycle are left, and set in `left`. mm->range held.
 */
int mm_host_private(struct mm *mm, gfn_t base, const uint64_t map[MIRROR_WORDS], uint64_t left[MIRROR_WORDS]);
/*
 * Finds what has diverged in a range and drops the frames that it shared, or (`adopts`) takes it home.
 * mm->range not held. Pages that are the host kernel's now; -EOPNOTSUPP, -ENOMEM.
 */
int64_t mm_reconcile(struct mm *mm, gfn_t start, gfn_t end, bool adopts);
/* Gives all of the guest's ANON memory that has no entry and does not trap its home, in blocks. No mirror looks on. */
int mm_fill(struct mm *mm, gfn_t start, gfn_t end);
/* The same under a mirror: pages without an entry get their home slots, by adoption. Best effort. */
void mm_refill(struct mm *mm, gfn_t start, gfn_t end);
/* Listeners hear that [start, end) has changed behind the engine's back; `owner` as in a change. */
int mm_tell(struct mm *mm, gfn_t start, gfn_t end, const void *owner);
/* The page's frame is this guest's alone, whatever W says. Inside a read section. */
bool mm_exclusive(const struct mm *mm, gfn_t gfn, const struct mm_lookup *l);
/* The same of all that an entry of level 1 or 2 maps (of level 2: if W says so). */
bool mm_block_alone(const struct mm *mm, gfn_t gfn, const struct mm_lookup *l);
/* A block entry of which some pages are the guest's alone, and others map pieces of the rest. */
bool mm_block_mixed(const struct mm *mm, gfn_t gfn, const struct mm_lookup *l);

/*
 * Runs of 2 MiB blocks that are the guest's own and hold no memory: a clone gives
 * each side holes of its own instead of sharing them. Sorted, added to *out. mm->range held for writing. -ENOMEM.
 */
int mm_own_holes(struct mm *mm, struct gfn_ranges *out);

#endif
