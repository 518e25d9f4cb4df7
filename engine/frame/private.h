/* SPDX-License-Identifier: MIT */
/*
 * What the files of frame/ share. Nobody else includes it.
 *
 * Read order: host.c (system calls), space.c (pfn space and sections),
 * extent.c, buddy.c (an arena), magazine.c (its per-CPU caches), release.c,
 * wait.c, pool.c, audit.c.
 *
 * A domain is what may share a section and a memfd: one for each merge domain
 * if the backing is memfd, else one for all.
 */
#ifndef KAGE_FRAME_PRIVATE_H
#define KAGE_FRAME_PRIVATE_H

#include "frame/pool.h"

#define BLOCK_SHIFT 9
#define BLOCK_ORDER 9u
#define GIANT_SECTIONS ((unsigned)(GIANT_PAGES / SECTION_PAGES))
#define DOMAINS_MAX 65536
#define MAG_SIZE 64
#define MAG_BATCH 32
#define WAIT_BUCKETS 256
#define PENDING_DUE ((16u << 20) / 4096)
#define ARENA_PFN_MAX ((uint64_t)1 << 32) /* frame.free links are 32 bits */

_Static_assert(SECTION_BLOCKS == 64, "a section's bitmaps are one word");
_Static_assert(MAG_BATCH < MAG_SIZE, "a refill fits");

/* A free or cached arena frame that is known to be zero; for the head of a run, all of it. */
#define FRAME_CLEAN FRAME_FLAG(5)

struct magazine {
	_Alignas(CACHE_LINE) struct lock lock;
	uint32_t count;
	uint32_t pfn[MAG_SIZE];
};

struct arena {
	struct lock lock; /* RANK_BUDDY: all below, the sections' used and hole, free frames */
	struct pool_domain *domain;
	uint32_t head[BLOCK_ORDER + 1]; /* pfns; 0 ends a list */
	struct list sections;           /* by index */
	uint64_t nsections;
	uint64_t holes;        /* blocks without memory */
	uint64_t in_motion;    /* blocks being populated or given back */
	_Atomic uint64_t free; /* frames in the lists; read without the lock */
	uint64_t poisoned;     /* frames set aside for good */
	struct magazine *mag;
	unsigned nmag;
};

struct pool_domain {
	struct pool *pool;
	uint32_t id;
	int fd;              /* -1: anonymous */
	struct list partial; /* extent sections with a free block; pool->lock */
	struct arena arena;
	struct pool_domain *next; /* made before it; constant */
};

struct bucket {
	struct lock lock;
	struct list waiters;
};

struct pool_private {
	struct lock lock; /* RANK_POOL: sections, bitmap, domains, partial lists, extents */
	enum kage_backing backing;
	uint64_t limit, kept; /* pages */
	uint64_t reserve;     /* pages */
	unsigned ncpu;
	bool no_populate_write; /* an old kernel */
	int pagemap;            /* fd, or -1 */
	/* reservations as mapped, for munmap */
	void *space_map, *frames_map;
	size_t space_len, frames_len;
	struct pool_domain *_Atomic *domains;    /* DOMAINS_MAX, lazily populated; anonymous: only [0] */
	struct pool_domain *_Atomic domain_list; /* all; they stay until the pool goes */
	uint64_t *taken;                         /* bit i: section i is in use */
	uint64_t nsections;                      /* of the pool */
	uint64_t zeroes;                         /* pfns of section 0 that are given out, or PFN_ZERO's page */
	uint64_t taken_hint;                     /* no free section below */
	uint64_t active;                         /* sections in use */
	uint64_t stuck;                          /* sections whose mapping the host would not take back */
	struct list extents;
	uint64_t nextents, extent_pages;
	_Alignas(CACHE_LINE) _Atomic uint64_t charged;
	_Alignas(CACHE_LINE) _Atomic uint64_t pending_head; /* pfn */
	_Atomic uint64_t pending;
	_Atomic uint64_t forgotten; /* candidates of merging among what was given back */
	_Atomic uint64_t vacated;
	struct lock vacating; /* RANK_POOL: home slots being emptied, where the host's pages are larger than frames */
	struct bucket bucket[WAIT_BUCKETS];
};

static inline bool pool_memfd(const struct pool *pool)
{
	return pool->priv->backing == KAGE_BACKING_MEMFD;
}

/* -- host.c: all system calls on memory. Ranges are frames of pfn space. -- */

/* Reserves `len` bytes of address space aligned to `align`. NULL: refused. */
void *host_reserve(size_t len, size_t align, void **map, size_t *map_len);
void *host_map_lazy(size_t len); /* zeroed, populated on first touch */
void host_unmap(void *map, size_t len);
/* Makes n sections usable: frame array, and (unless `device`) memory behind the direct map. */
int host_show(struct pool *pool, struct pool_domain *d, uint64_t section, uint64_t n, bool device);
/* The reverse. False: the host would not; the range stays as it is, empty. */
bool host_hide(struct pool *pool, uint64_t section, uint64_t n);
/* Section 0: its part of the frame array, and the page of PFN_ZERO. */
int host_show_zero(struct pool *pool);
/* A page of section 0 of the host's memory, read-only. */
int host_own_zero(struct pool *pool, pfn_t pfn);
int host_map_file(struct pool *pool, pfn_t pfn, uint64_t npages, int fd, uint64_t offset, int prot);
void host_huge(struct pool *pool, pfn_t pfn, uint64_t npages, bool on);
/* Empties frames: they read zero afterwards, whatever it takes. */
void host_punch(struct pool *pool, struct pool_domain *d, pfn_t pfn, uint64_t npages);
void host_forget_frames(struct pool *pool, pfn_t pfn, uint64_t npages);
int host_populate(struct pool *pool, struct pool_domain *d, pfn_t pfn, uint64_t npages);
int host_memfd(uint64_t bytes);
uint64_t host_resident(const void *addr, uint64_t bytes); /* pages, mincore(2) */

/* -- space.c: pool->lock is held, unless said otherwise -- */

/* n neighbouring sections with first % align == phase, below `end`; shown. `device`: d is NULL. -ENOMEM. */
int space_take(struct pool *pool, struct pool_domain *d, uint64_t n, unsigned align, unsigned phase,
	       uint64_t end, bool device, uint64_t *first);
void space_give(struct pool *pool, uint64_t first, uint64_t n);
/* nblocks (at most 32) neighbouring blocks of a section that the domain shares. */
int space_take_blocks(struct pool *pool, struct pool_domain *d, unsigned nblocks, pfn_t *base);
void space_give_blocks(struct pool *pool, pfn_t base, unsigned nblocks);

/* -- pool.c -- */

#define for_each_domain(d, pool) \
	for (struct pool_domain *d = load_acquire(&(pool)->priv->domain_list); d; d = d->next)

/* Finds or makes. -ENOMEM, memfd_create(2)'s. */
int domain_get(struct pool *pool, uint32_t id, struct pool_domain **out);
static inline struct pool_domain *domain_find(struct pool *pool, uint32_t id)
{
	return load_acquire(&pool->priv->domains[pool_memfd(pool) ? id : 0]);
}

/* -- buddy.c: no lock is held -- */

int arena_init(struct arena *a, struct pool_domain *d);
void arena_finish(struct arena *a);
/* 2^order populated frames; the head says FRAME_CACHED and the order. PFN_NONE: the host has none. */
pfn_t buddy_get(struct arena *a, unsigned order);
/* Up to n single frames from the lists alone; returns how many. */
unsigned buddy_get_batch(struct arena *a, uint32_t *pfn, unsigned n);
void buddy_put(struct arena *a, pfn_t pfn, unsigned order);
void buddy_put_batch(struct arena *a, const uint32_t *pfn, unsigned n);
/* Populates one more block. -ENOMEM. */
int buddy_grow(struct arena *a);
/* Gives whole free blocks back to the host while more than `keep` frames are free. Returns blocks. */
uint64_t buddy_shrink(struct arena *a, uint64_t keep);

/* -- magazine.c -- */

void magazine_drain_all(struct arena *a);
/* Makes a released frame free again: kind, references, order. */
void arena_put(struct arena *a, pfn_t pfn, unsigned order);

/* -- release.c -- */

uint64_t pending_walk(const struct pool *pool); /* frames on the stack; nobody else runs */

#endif
