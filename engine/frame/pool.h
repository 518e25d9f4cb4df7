/* SPDX-License-Identifier: MIT */
/*
 * The pool: pfn space, what stands behind it, and who gets which part.
 *
 * pfn space is a reservation of address space, the direct map: hva = base +
 * pfn * 4096. A second reservation is the frame array (vmemmap's idea):
 * frame = frames + pfn. Both are PROT_NONE until a section (128 MiB of pfn
 * space) is first used. Three kinds of tenant:
 *
 *  - home extents: a pfn range reserved for a region (struct extent). Memory
 *    comes from the host on first touch. A frame that loses its last reference
 *    is vacated: punched out in batches, never given to anybody else.
 *  - device extents: a file mapped MAP_SHARED at its place in the direct map.
 *  - the common arena (one for a merge domain if the backing is memfd, else
 *    one): 4 KiB frames and larger blocks from a buddy allocator (orders 0 to
 *    18) with per-CPU caches, on memory populated 2 MiB at a time ahead of
 *    need; freed frames are handed out again populated.
 *
 * Invariants:
 *  P1  a pfn is in exactly one of: no section, free in pfn space, an extent, an arena.
 *  P2  charged == arena frames allocated + home and device-COW pages mapped
 *      (pool_charge) <= limit, if there is a limit.
 *  P3  a vacated home slot is empty (reads zero) until its extent is freed.
 *  P4  arena: a free run of order k <= 9 is 2^k aligned, and for k < 9 its buddy
 *      is not free at order k. Larger runs are found in bitmaps of whole blocks.
 *
 * Locks taken: pool->lock (RANK_POOL) for pfn space and sections; an arena's
 * lock (RANK_BUDDY); a cache's lock (RANK_MAGAZINE, trylock).
 */
#ifndef KAGE_FRAME_POOL_H
#define KAGE_FRAME_POOL_H

#include "base/env.h"
#include "base/lock.h"
#include "frame/frame.h"

#define SECTION_SHIFT 15 /* 32768 frames, 128 MiB */
#define SECTION_PAGES ((uint64_t)1 << SECTION_SHIFT)
#define SECTION_BLOCKS (SECTION_PAGES / BLOCK_PAGES)
#define ARENA_MAX_ORDER 18
_Static_assert(SECTION_PAGES == ZERO_PFNS, "section 0 is that of zero frames");

struct extent;
struct pool_domain;

/* What is known of 2 MiB of pfn space. */
struct block {
	_Atomic int32_t refs;  /* level-1 block entries that map it; counted as frame refs are */
	_Atomic int32_t giant; /* in the first block of an aligned GiB: level-2 entries that map the GiB */
	struct extent *extent; /* NULL: the arena */
	/*
	 * Home extents: 4 KiB pages of the block that an entry maps or that are
	 * released and not yet vacated (mm adds when it maps; pool_reap()
	 * subtracts what it vacated). 0: a block entry may map it.
	 */
	_Atomic uint32_t used;
};

struct section {
	struct block block[SECTION_BLOCKS];
	struct arena *arena; /* NULL: extents, or the zero frames' */
	uint32_t users;      /* extents that reach into it */
	/* the rest is frame/'s own */
	uint32_t index;
	struct pool_domain *domain;
	uint64_t used; /* extents: bit i: block i belongs to one. Arena: block i is not free as a whole */
	uint64_t hole; /* arena: block i has no memory (then it is free) */
	struct list node; /* of the domain: sections with room, or the arena's by index; or of a run that leaves */
	struct defer_node defer; /* of the first of a run that leaves */
};

enum extent_kind { EXTENT_HOME, EXTENT_DEVICE };

/* A run of pfn space with one purpose. gfn g of the region has pfn `base + (g - gfn)`. */
struct extent {
	enum extent_kind kind;
	uint32_t layer;  /* id of the layer that owns its frames (HOME); set by mm */
	uint32_t domain;
	bool huge;       /* huge pages are asked for */
	int prot;        /* DEVICE */
	int fd;          /* DEVICE: its file, and where it begins there */
	uint64_t offset;
	pfn_t base;
	gfn_t gfn;
	uint64_t npages;
	/* Regions that hold it, plus one for each 4 KiB page in use. Freed at 0, after a grace period. */
	_Atomic uint64_t refs;
	struct pool *pool;
	struct pool_domain *home; /* HOME: whose memfd and sections these are */
	struct list node;
	struct defer_node defer;
};

struct pool_config {
	enum kage_backing backing;
	uint64_t address_space; /* bytes; halved until the host agrees */
	uint64_t memory_limit;  /* bytes; 0: none */
	uint64_t reserve;       /* bytes of populated arena frames kept */
};

struct pool {
	/* hot, constant after creation */
	char *base;           /* hva of pfn 0 */
	struct frame *frames; /* of pfn 0 */
	struct section **sections;
	struct env *env;
	uint64_t npages; /* of pfn space */
	/* the rest is pool.c's */
	struct pool_private *priv;
};

int pool_create(const struct pool_config *config, struct env *env, struct pool **out);
/* All extents and arena frames must be gone; returns the number that are not (leaks), then frees all the same. */
uint64_t pool_destroy(struct pool *pool);

static inline void *pfn_hva(const struct pool *pool, pfn_t pfn)
{
	return pool->base + (pfn.v << PAGE_SHIFT);
}

static inline struct frame *pfn_frame(const struct pool *pool, pfn_t pfn)
{
	return pool->frames + pfn.v;
}

static inline pfn_t frame_pfn(const struct pool *pool, const struct frame *f)
{
	return PFN((uint64_t)(f - pool->frames));
}

static inline struct section *pfn_section(const struct pool *pool, pfn_t pfn)
{
	return load_acquire(&pool->sections[pfn.v >> SECTION_SHIFT]);
}

static inline struct block *pfn_block(const struct pool *pool, pfn_t pfn)
{
	return &pfn_section(pool, pfn)->block[(pfn.v / BLOCK_PAGES) % SECTION_BLOCKS];
}

/* pfn of an address in the direct map, or PFN_NONE. */
pfn_t pool_hva_pfn(const struct pool *pool, const void *hva);

/* -- extents ------------------------------------------------------------- */

/*
 * Reserves a home extent with one reference. Its base is congruent to `gfn`
 * modulo 2 MiB (modulo 1 GiB if it is that long), so that blocks line up.
 * `huge`: ask the host for huge pages. Nothing is populated. -ENOMEM.
 */
int extent_create(struct pool *pool, uint32_t domain, gfn_t gfn, uint64_t npages, bool huge, struct extent **out);
/*
 * Maps npages of a file at an extent of its own, shared, with `prot` (PROT_*).
 * Errors of mmap(2); -EOVERFLOW when the file ends before. The fd is duplicated.
 */
int extent_create_device(struct pool *pool, int fd, uint64_t offset, gfn_t gfn, uint64_t npages, int prot,
			 struct extent **out);
static inline pfn_t extent_pfn(const struct extent *e, gfn_t gfn) { return PFN(e->base.v + (gfn.v - e->gfn.v)); }
static inline gfn_t extent_gfn(const struct extent *e, pfn_t pfn) { return GFN(e->gfn.v + (pfn.v - e->base.v)); }
void extent_get(struct extent *e, uint64_t n);
/* Drops n references; the last one frees the extent after a grace period (env's defer queue). */
void extent_put(struct extent *e, uint64_t n);

/*
 * Which of npages pages (at most 512) hold memory: bit i of map is set if page
 * i may be something else than a hole. Uses mincore(2). When in doubt: set.
 */
void pool_populated(struct pool *pool, pfn_t pfn, unsigned npages, uint64_t map[8]);

/*
 * The file behind a frame, and the frame's offset there: what a host mapping of
 * guest memory is made of. -ENOENT: anonymous backing, or the zero frame.
 */
int pool_file(const struct pool *pool, pfn_t pfn, int *fd, uint64_t *offset);
bool pool_has_files(const struct pool *pool);
/*
 * A frame of zeroes that nobody else has, of memory of its own; it stays until the pool goes and is not charged.
 * -ENOSPC: there are no more (about 32,000); errors of mprotect(2).
 */
int pool_zero_new(struct pool *pool, pfn_t *out);
/* What the host maps, protects and frees at the least; not less than a frame. */
uint64_t host_page_size(void);
/* The extent a frame lies in; NULL: the arena, or the zero frame. */
struct extent *pool_extent(const struct pool *pool, pfn_t pfn);

/* -- the common arena ---------------------------------------------------- */

enum arena_flags {
	ARENA_ZERO = 1u << 0,    /* clear it */
	ARENA_RESERVE = 1u << 1, /* a mandatory change: may use what memory_limit keeps back (1/64, at least 64 frames) */
};

/*
 * Allocates 2^order frames: kind `kind`, refs 1, order in the head, tails
 * FRAME_TAIL. Charged. -ENOMEM (limit, host, pfn space). Takes no lock that a
 * table lock excludes: callers still do it before they lock (prepare).
 */
int arena_alloc(struct pool *pool, uint32_t domain, unsigned order, enum frame_kind kind, unsigned flags, pfn_t *out);
/* Makes it 2^order allocations of one frame each. Nobody else has seen it. */
void arena_split(struct pool *pool, pfn_t pfn);
/* Gives back an allocation that nobody can have seen; no grace period. */
void arena_free(struct pool *pool, pfn_t pfn);

/* -- release ------------------------------------------------------------- */

/*
 * Takes back frames whose last reference has just gone, after a grace period.
 * Works for every kind: an arena frame goes to its cache or the buddy; a home
 * frame's slot is vacated and uncharged; a device frame drops its extent's
 * reference. `order` 9 or 18: the whole block. Any context, lock-free.
 * Who releases a STABLE frame has freed its chain.
 */
void pool_release(struct pool *pool, pfn_t pfn, unsigned order);
/* Waits for a grace period if frames are pending and gives them back, vacated slots joined into runs. Returns frames. */
uint64_t pool_reap(struct pool *pool);
/* More is pending than an allocation should let pass (16 MiB): callers at a safe point call pool_reap(). */
bool pool_reap_due(const struct pool *pool);

/* Charges n pages of home memory that an entry is about to map. -ENOMEM at the limit (`flags`: ARENA_RESERVE). */
int pool_charge(struct pool *pool, uint64_t n, unsigned flags);
void pool_uncharge(struct pool *pool, uint64_t n);

/* Populates the arena's reserve. -ENOMEM if the host has none. */
int pool_refill(struct pool *pool);

/* -- a frame's lock ------------------------------------------------------ */

/* The locked bit plus a hashed wait table; waiters sleep, one is woken at a time. */
void frame_lock(struct pool *pool, pfn_t pfn);
bool frame_trylock(struct pool *pool, pfn_t pfn);
void frame_unlock(struct pool *pool, pfn_t pfn);

/* -- figures and audit --------------------------------------------------- */

struct pool_stats {
	uint64_t charged;        /* pages */
	uint64_t arena_used;     /* frames allocated, all kinds; pending ones until they are reaped */
	uint64_t arena_tables;   /* of these, FRAME_TABLE */
	uint64_t arena_free;     /* populated and free: buddy and caches */
	uint64_t pending;        /* released, waiting */
	uint64_t extents;
	uint64_t extent_pages;   /* reserved pfn space */
	uint64_t sections;
	uint64_t metadata_bytes; /* populated part of the frame array (mincore) and section structs */
	uint64_t vacated;        /* home slots punched, ever */
};
void pool_stats(struct pool *pool, struct pool_stats *out);
/* Frames that wait for their grace period. */
uint64_t pool_pending(const struct pool *pool);
/* Frames that were given back with FRAME_CANDIDATE set, ever. */
uint64_t pool_forgotten(const struct pool *pool);
/* Pages of home extents that an entry maps and that hold memory; time follows the number of blocks in use. */
uint64_t pool_home_pages(struct pool *pool);

/*
 * Checks P1 to P4, buddy lists, caches and counters; the caller has stopped
 * everything else. Calls report() for each violation, adds to checks.
 */
void pool_audit(struct pool *pool, void (*report)(void *opaque, const char *line), void *opaque, uint64_t *checks);

#endif
