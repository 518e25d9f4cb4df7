/* SPDX-License-Identifier: MIT */
/*
 * Extents: a region's reservation of pfn space, and device memory.
 *
 * An extent owns whole 2 MiB blocks of pfn space. Its base lies where its gfn lies within
 * 2 MiB, and within 1 GiB if it is that long, so that what a block entry of the
 * primary table covers is one aligned run of pfns. Small ones share sections (space.c); large ones
 * and device extents have sections of their own.
 *
 * Invariants:
 *  1. block->extent == e exactly for the blocks that e's frames lie in; no two
 *     extents touch one block.
 *  2. while refs > 0 the extent keeps its place. At 0 it is queued once; readers
 *     that found it through a block in a read section may still look at it.
 *  3. what a freed home extent leaves behind is empty memory and all-zero
 *     frames: the next tenant of the blocks starts from nothing.
 *
 * Locks: pool->lock, taken here.
 */
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "frame/private.h"

#define SHARE_BLOCKS (SECTION_BLOCKS / 2)

struct place {
	uint64_t offset; /* of the first frame in the first block or section */
	uint64_t blocks; /* to share a section; 0: sections of its own */
	uint64_t sections;
	unsigned align, phase;
};

static struct place extent_place(gfn_t gfn, uint64_t npages, bool alone)
{
	struct place p = {.offset = gfn.v % BLOCK_PAGES, .align = 1};
	uint64_t blocks = (p.offset + npages + BLOCK_PAGES - 1) / BLOCK_PAGES;

	if (!alone && blocks <= SHARE_BLOCKS) {
		p.blocks = blocks;
		return p;
	}
	if (npages >= GIANT_PAGES) {
		p.offset = gfn.v % SECTION_PAGES;
		p.align = GIANT_SECTIONS;
		p.phase = (unsigned)(gfn.v / SECTION_PAGES % GIANT_SECTIONS);
	}
	p.sections = (p.offset + npages + SECTION_PAGES - 1) / SECTION_PAGES;
	return p;
}

/* pool->lock is held. */
static int place_take(struct pool *pool, struct extent *e, const struct place *p)
{
	uint64_t first;
	int err;

	if (p->blocks)
		err = space_take_blocks(pool, e->home, (unsigned)p->blocks, &e->base);
	else
		err = space_take(pool, e->home, p->sections, p->align, p->phase, UINT64_MAX,
				 e->kind == EXTENT_DEVICE, &first);
	if (err)
		return err;
	for (uint64_t i = 0; i < p->sections; i++) {
		pool->sections[first + i]->users = 1;
		pool->sections[first + i]->used = ~(uint64_t)0;
	}
	if (p->sections)
		e->base = PFN(first * SECTION_PAGES);
	e->base.v += p->offset;
	return 0;
}

/* A block counts nothing when it gets an extent, and nothing when it loses it. */
static void set_blocks(struct extent *e, struct extent *to)
{
	uint64_t end = e->base.v + e->npages;

	for (uint64_t pfn = ALIGN_DOWN(e->base.v, BLOCK_PAGES); pfn < end; pfn += BLOCK_PAGES) {
		struct block *b = pfn_block(e->pool, PFN(pfn));

		kage_assert(READ_ONCE(b->refs) == 0 && READ_ONCE(b->giant) == 0 && READ_ONCE(b->used) == 0);
		WRITE_ONCE(b->extent, to);
	}
}

/* pool->lock is held. */
static void place_give(struct extent *e)
{
	struct place p = extent_place(e->gfn, e->npages, e->kind == EXTENT_DEVICE);
	pfn_t start = PFN(e->base.v - p.offset);

	if (p.blocks)
		space_give_blocks(e->pool, start, (unsigned)p.blocks);
	else
		space_give(e->pool, start.v / SECTION_PAGES, p.sections);
}

static void extent_publish(struct extent *e)
{
	struct pool_private *priv = e->pool->priv;

	set_blocks(e, e);
	list_add(&priv->extents, &e->node);
	priv->nextents++;
	priv->extent_pages += e->npages;
}

static void extent_retire(struct extent *e)
{
	struct pool_private *priv = e->pool->priv;

	lock_take(&priv->lock);
	set_blocks(e, NULL);
	place_give(e);
	list_del(&e->node);
	priv->nextents--;
	priv->extent_pages -= e->npages;
	lock_drop(&priv->lock);
}

static int extent_new(struct pool *pool, enum extent_kind kind, uint32_t domain, gfn_t gfn, uint64_t npages,
		      struct extent **out)
{
	struct pool_domain *home = NULL;
	struct extent *e;
	int err = 0;

	if (npages == 0)
		return -EINVAL;
	if (npages > pool->npages)
		return -ENOMEM;
	if (kind == EXTENT_HOME)
		err = domain_get(pool, domain, &home);
	if (err)
		return err;
	e = env_alloc(pool->env, sizeof(*e));
	if (!e)
		return -ENOMEM;
	e->kind = kind;
	e->domain = domain;
	e->gfn = gfn;
	e->npages = npages;
	e->pool = pool;
	e->home = home;
	atomic_init(&e->refs, 1);
	*out = e;
	return 0;
}

int extent_create(struct pool *pool, uint32_t domain, gfn_t gfn, uint64_t npages, bool huge,
		  struct extent **out)
{
	struct place place = extent_place(gfn, npages, false);
	struct extent *e;
	int err = extent_new(pool, EXTENT_HOME, domain, gfn, npages, &e);

	if (err)
		return err;
	e->huge = huge;
	lock_take(&pool->priv->lock);
	err = place_take(pool, e, &place);
	if (!err)
		extent_publish(e);
	lock_drop(&pool->priv->lock);
	if (err) {
		env_free(pool->env, e, sizeof(*e));
		return err;
	}
	if (huge)
		host_huge(pool, e->base, npages, true);
	*out = e;
	return 0;
}

/* Where the file ends, rounded up to a page: the rest of its last page reads zero. */
static int file_covers(int fd, uint64_t offset, uint64_t npages)
{
	uint64_t size = UINT64_MAX, end;
	struct stat st;

	if (fstat(fd, &st) != 0)
		return -errno;
	if (S_ISREG(st.st_mode))
		size = (uint64_t)st.st_size;
	else if (S_ISBLK(st.st_mode) && ioctl(fd, BLKGETSIZE64, &size) != 0)
		return -errno;
	if (__builtin_add_overflow(offset, npages << PAGE_SHIFT, &end))
		return -EOVERFLOW;
	return size != UINT64_MAX && end > ALIGN_UP(size, PAGE_SIZE) ? -EOVERFLOW : 0;
}

static void mark_device(struct extent *e)
{
	for (uint64_t i = 0; i < e->npages; i++)
		WRITE_ONCE(pfn_frame(e->pool, pfn_add(e->base, i))->bits,
			   (uint32_t)FRAME_DEVICE << FRAME_KIND_SHIFT);
}

static int device_prepare(struct extent *e, int fd, uint64_t offset)
{
	struct pool_private *priv = e->pool->priv;
	struct place place = extent_place(e->gfn, e->npages, true);
	int err;

	lock_take(&priv->lock);
	err = place_take(e->pool, e, &place);
	lock_drop(&priv->lock);
	if (err)
		return err;
	err = host_map_file(e->pool, e->base, e->npages, fd, offset, e->prot);
	if (!err) {
		mark_device(e);
		return 0;
	}
	lock_take(&priv->lock);
	place_give(e);
	lock_drop(&priv->lock);
	return err;
}

int extent_create_device(struct pool *pool, int fd, uint64_t offset, gfn_t gfn, uint64_t npages, int prot,
			 struct extent **out)
{
	struct extent *e;
	int err = npages > pool->npages ? -ENOMEM : file_covers(fd, offset, npages);

	if (!err)
		err = extent_new(pool, EXTENT_DEVICE, 0, gfn, npages, &e);
	if (err)
		return err;
	e->prot = prot;
	e->offset = offset;
	e->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	err = e->fd < 0 ? -errno : device_prepare(e, fd, offset);
	if (err) {
		if (e->fd >= 0)
			close(e->fd);
		env_free(pool->env, e, sizeof(*e));
		return err;
	}
	lock_take(&pool->priv->lock);
	extent_publish(e);
	lock_drop(&pool->priv->lock);
	*out = e;
	return 0;
}

/* Empties its blocks. Sections of its own are emptied by hiding them, all but the pages of a memfd. */
static void extent_vacate(struct extent *e)
{
	uint64_t from = ALIGN_DOWN(e->base.v, BLOCK_PAGES), to = ALIGN_UP(e->base.v + e->npages, BLOCK_PAGES);
	bool shared = extent_place(e->gfn, e->npages, false).blocks != 0;

	if (shared || e->home->fd >= 0)
		host_punch(e->pool, e->home, PFN(from), to - from);
	if (!shared)
		return;
	host_forget_frames(e->pool, PFN(from), to - from);
	if (e->huge)
		host_huge(e->pool, e->base, e->npages, false);
}

static void extent_free(struct defer_node *node, void *arg)
{
	struct extent *e = arg;

	if (e->kind == EXTENT_HOME)
		extent_vacate(e);
	else
		close(e->fd);
	extent_retire(e);
	env_free(e->pool->env, e, sizeof(*e));
}

struct extent *pool_extent(const struct pool *pool, pfn_t pfn)
{
	return pfn_is_zero(pfn) ? NULL : pfn_block(pool, pfn)->extent;
}

bool pool_has_files(const struct pool *pool)
{
	return pool_memfd(pool);
}

int pool_file(const struct pool *pool, pfn_t pfn, int *fd, uint64_t *offset)
{
	const struct extent *e = pool_extent(pool, pfn);

	if (pfn_is_zero(pfn) || (!e && !pfn_section(pool, pfn)->domain))
		return -ENOENT;
	if (e && e->kind == EXTENT_DEVICE) {
		*fd = e->fd;
		*offset = e->offset + ((pfn.v - e->base.v) << PAGE_SHIFT);
		return 0;
	}
	*fd = e ? e->home->fd : pfn_section(pool, pfn)->domain->fd;
	*offset = pfn.v << PAGE_SHIFT;
	return *fd < 0 ? -ENOENT : 0;
}

void extent_get(struct extent *e, uint64_t n)
{
	atomic_fetch_add_explicit(&e->refs, n, memory_order_relaxed);
}

void extent_put(struct extent *e, uint64_t n)
{
	/* Release: what this holder did comes before the free; acquire: the last one sees it all. */
	uint64_t old = atomic_fetch_sub_explicit(&e->refs, n, memory_order_acq_rel);

	kage_assert(old >= n);
	if (old == n)
		defer_add(&e->pool->env->defer, &e->defer, extent_free, e);
}
