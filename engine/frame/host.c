/* SPDX-License-Identifier: MIT */
/*
 * The system calls on the pool's memory, and nothing else.
 *
 * Both reservations are PROT_NONE, MADV_DONTFORK, MADV_DONTDUMP and, so that
 * sparse homes stay sparse where the host says "always", MADV_NOHUGEPAGE. A
 * section is shown by mprotect(2) (anonymous; flags stay) or by mapping its
 * part of the domain's memfd over it (flags are set anew), and hidden by mapping PROT_NONE
 * over it: mprotect would keep what strict overcommit has charged.
 *
 * Invariants:
 *  1. no range of a reservation is ever unmapped: a stranger's mmap(2) could
 *     land there. A file is mapped elsewhere first, to fail there if it must.
 *  2. after host_punch() the range reads zero, even where the host refuses to
 *     take the memory back.
 *
 * Locks: none; callers own the ranges they name.
 */
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include "frame/private.h"

#ifndef MADV_POPULATE_WRITE /* Linux 5.14 */
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_DONTNEED_LOCKED /* Linux 5.18 */
#define MADV_DONTNEED_LOCKED 24
#endif

#define PAGEMAP_HELD (3ull << 62) /* present or swapped; Documentation/admin-guide/mm/pagemap.rst */

uint64_t host_page_size(void)
{
	long size = sysconf(_SC_PAGESIZE);

	return size > (long)PAGE_SIZE ? (uint64_t)size : PAGE_SIZE;
}

/* NOHUGEPAGE fails where the kernel has no huge pages: as good. */
static int host_quiet(void *addr, size_t len)
{
	if (madvise(addr, len, MADV_DONTFORK) != 0 || madvise(addr, len, MADV_DONTDUMP) != 0)
		return -errno;
	madvise(addr, len, MADV_NOHUGEPAGE);
	return 0;
}

void *host_reserve(size_t len, size_t align, void **map, size_t *map_len)
{
	size_t whole = len + align;
	char *at = mmap(NULL, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED)
		return NULL;
	if (host_quiet(at, whole) != 0) {
		munmap(at, whole);
		return NULL;
	}
	*map = at;
	*map_len = whole;
	return (void *)ALIGN_UP((uintptr_t)at, align);
}

void *host_map_lazy(size_t len)
{
	void *at =
	    mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED)
		return NULL;
	if (host_quiet(at, len) != 0) {
		munmap(at, len);
		return NULL;
	}
	return at;
}

void host_unmap(void *map, size_t len)
{
	if (map)
		munmap(map, len);
}

static char *section_hva(const struct pool *pool, uint64_t section)
{
	return pfn_hva(pool, PFN(section << SECTION_SHIFT));
}

static void *section_frames(const struct pool *pool, uint64_t section)
{
	return pfn_frame(pool, PFN(section << SECTION_SHIFT));
}

#define SECTION_BYTES (SECTION_PAGES << PAGE_SHIFT)
#define SECTION_META (SECTION_PAGES * sizeof(struct frame))

static int show_memory(struct pool *pool, struct pool_domain *d, uint64_t section, uint64_t n)
{
	char *at = section_hva(pool, section);

	if (d->fd < 0)
		return mprotect(at, n * SECTION_BYTES, PROT_READ | PROT_WRITE) == 0 ? 0 : -errno;
	if (mmap(at, n * SECTION_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, d->fd,
		 (off_t)(section * SECTION_BYTES)) == MAP_FAILED)
		return -errno;
	return host_quiet(at, n * SECTION_BYTES);
}

int host_show(struct pool *pool, struct pool_domain *d, uint64_t section, uint64_t n, bool device)
{
	int err = mprotect(section_frames(pool, section), n * SECTION_META, PROT_READ | PROT_WRITE) == 0 ?
		      0 :
		      -errno;

	if (!err && !device)
		err = show_memory(pool, d, section, n);
	if (err)
		host_hide(pool, section, n);
	return err;
}

static bool hide(void *at, size_t len)
{
	if (mmap(at, len, PROT_NONE, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) ==
	    MAP_FAILED)
		return false;
	/* Nothing is in it: should the flags fail, showing sets them or fails itself. */
	host_quiet(at, len);
	return true;
}

bool host_hide(struct pool *pool, uint64_t section, uint64_t n)
{
	bool meta = hide(section_frames(pool, section), n * SECTION_META);
	bool memory = hide(section_hva(pool, section), n * SECTION_BYTES);

	if (!meta)
		madvise(section_frames(pool, section), n * SECTION_META, MADV_DONTNEED);
	if (!memory)
		madvise(section_hva(pool, section), n * SECTION_BYTES, MADV_DONTNEED);
	return meta && memory;
}

int host_show_zero(struct pool *pool)
{
	uint64_t page = host_page_size(); /* of the host's, nothing else lies in PFN_ZERO's */

	if (mprotect((void *)ALIGN_DOWN((uintptr_t)pfn_hva(pool, PFN_ZERO), page), page, PROT_READ) != 0 ||
	    mprotect(pool->frames, SECTION_META, PROT_READ | PROT_WRITE) != 0)
		return -errno;
	return 0;
}

int host_own_zero(struct pool *pool, pfn_t pfn)
{
	char *at = pfn_hva(pool, pfn);
	uint64_t page = host_page_size();

	if (mprotect(at, page, PROT_READ | PROT_WRITE) != 0)
		return -errno;
	for (uint64_t i = 0; i < page; i += PAGE_SIZE)
		WRITE_ONCE(at[i], 0); /* a page that is only read is the host's page of zeroes, which all processes share */
	return mprotect(at, page, PROT_READ) == 0 ? 0 : -errno;
}

int host_map_file(struct pool *pool, pfn_t pfn, uint64_t npages, int fd, uint64_t offset, int prot)
{
	size_t len = npages << PAGE_SHIFT;
	void *trial = mmap(NULL, len, prot, MAP_SHARED, fd, (off_t)offset);

	if (trial == MAP_FAILED)
		return -errno;
	munmap(trial, len);
	if (mmap(pfn_hva(pool, pfn), len, prot, MAP_SHARED | MAP_FIXED, fd, (off_t)offset) == MAP_FAILED)
		return -errno;
	return host_quiet(pfn_hva(pool, pfn), len);
}

void host_huge(struct pool *pool, pfn_t pfn, uint64_t npages, bool on)
{
	uint64_t from = ALIGN_UP(pfn.v, BLOCK_PAGES), to = ALIGN_DOWN(pfn.v + npages, BLOCK_PAGES);

	if (from < to)
		madvise(pfn_hva(pool, PFN(from)), (to - from) << PAGE_SHIFT,
			on ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

/* QEMU's user-mode emulation says yes to advice that it does not know: a yes to that one means nothing there. */
static bool advice_is_checked(void *at)
{
	return madvise(at, 0, -1) != 0;
}

static bool punch_anonymous(void *at, size_t len)
{
	return madvise(at, len, MADV_DONTNEED) == 0 ||
	       (advice_is_checked(at) && madvise(at, len, MADV_DONTNEED_LOCKED) == 0);
}

static bool punch_file(int fd, uint64_t offset, size_t len)
{
	int err;

	do
		err = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)len);
	while (err != 0 && errno == EINTR);
	return err == 0;
}

/*
 * The host takes whole pages of its own back: of larger ones than 4 KiB the pieces at both ends are cleared by hand.
 * False: nothing whole lies between.
 */
static bool whole_pages(char **at, size_t *len)
{
	uint64_t page = host_page_size();
	char *end = *at + *len, *from = (char *)ALIGN_UP((uintptr_t)*at, page),
	     *to = (char *)ALIGN_DOWN((uintptr_t)end, page);

	if (from >= to) {
		memset(*at, 0, *len);
		return false;
	}
	memset(*at, 0, (size_t)(from - *at));
	memset(to, 0, (size_t)(end - to));
	*at = from;
	*len = (size_t)(to - from);
	return true;
}

void host_punch(struct pool *pool, struct pool_domain *d, pfn_t pfn, uint64_t npages)
{
	char *at = pfn_hva(pool, pfn);
	size_t len = npages << PAGE_SHIFT;

	if (!whole_pages(&at, &len))
		return;
	if (d->fd < 0 ? punch_anonymous(at, len) : punch_file(d->fd, (uint64_t)(at - pool->base), len))
		return;
	env_log(pool->env, KAGE_LOG_WARN, "the host keeps %llu vacated pages (errno %d)",
		(unsigned long long)npages, errno);
	memset(at, 0, len);
}

void host_forget_frames(struct pool *pool, pfn_t pfn, uint64_t npages)
{
	char *at = (char *)pfn_frame(pool, pfn);
	size_t len = npages * sizeof(struct frame);

	if (whole_pages(&at, &len) && madvise(at, len, MADV_DONTNEED) != 0)
		memset(at, 0, len);
}

/* Before Linux 5.14, where nothing can be asked for anonymous pages and be told no. */
static int populate_by_hand(struct pool *pool, struct pool_domain *d, pfn_t pfn, uint64_t npages)
{
	if (d->fd >= 0 && fallocate(d->fd, FALLOC_FL_KEEP_SIZE, (off_t)(pfn.v << PAGE_SHIFT),
				    (off_t)(npages << PAGE_SHIFT)) != 0)
		return -ENOMEM;
	for (uint64_t i = 0; i < npages; i++)
		WRITE_ONCE(*(uint64_t *)pfn_hva(pool, pfn_add(pfn, i)), 0);
	return 0;
}

int host_populate(struct pool *pool, struct pool_domain *d, pfn_t pfn, uint64_t npages)
{
	int err;

	if (READ_ONCE(pool->priv->no_populate_write))
		return populate_by_hand(pool, d, pfn, npages);
	do
		err = madvise(pfn_hva(pool, pfn), npages << PAGE_SHIFT, MADV_POPULATE_WRITE);
	while (err != 0 && (errno == EINTR || errno == EAGAIN));
	if (err == 0)
		return 0;
	if (errno != EINVAL)
		return -ENOMEM;
	WRITE_ONCE(pool->priv->no_populate_write, true);
	return populate_by_hand(pool, d, pfn, npages);
}

int host_memfd(uint64_t bytes)
{
	struct rlimit limit;
	int fd, err;

	/* ftruncate(2) beyond RLIMIT_FSIZE raises SIGXFSZ. */
	if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < bytes)
		return -EFBIG;
	fd = memfd_create("kage", MFD_CLOEXEC);
	if (fd < 0)
		return -errno;
	if (ftruncate(fd, (off_t)bytes) == 0)
		return fd;
	err = -errno;
	close(fd);
	return err;
}

#define RESIDENT_CHUNK 4096

uint64_t host_resident(const void *addr, uint64_t bytes)
{
	unsigned char vec[RESIDENT_CHUNK];
	uint64_t page = host_page_size(), pages = bytes / page, found = 0;

	for (uint64_t at = 0; at < pages; at += RESIDENT_CHUNK) {
		uint64_t n = MIN(pages - at, (uint64_t)RESIDENT_CHUNK);

		if (mincore((char *)addr + at * page, n * page, vec) != 0)
			continue;
		for (uint64_t i = 0; i < n; i++)
			found += vec[i] & 1;
	}
	return found * (page >> PAGE_SHIFT);
}

static void set_bits(uint64_t map[8], unsigned from, unsigned to)
{
	for (unsigned i = from; i < to; i++)
		bit_set(map, i);
}

/* mincore(2) calls a page that is swapped out "not resident". Where swap is on, better sources are asked. */
static bool swap_on(void)
{
	struct sysinfo si;

	return sysinfo(&si) != 0 || si.totalswap != 0;
}

/* Pages of the host that the frames lie in, and how many frames of the first come before. */
static unsigned host_pages(pfn_t pfn, unsigned npages, unsigned *before)
{
	uint64_t frames = host_page_size() >> PAGE_SHIFT;

	*before = (unsigned)(pfn.v % frames);
	return (unsigned)((*before + npages + frames - 1) / frames);
}

/* The frames of host page i. */
static void set_host_page(uint64_t map[8], unsigned i, unsigned before, unsigned npages)
{
	unsigned frames = (unsigned)(host_page_size() >> PAGE_SHIFT), from = i * frames, to = from + frames;

	set_bits(map, MAX(from, before) - before, MIN(to - before, npages));
}

static bool populated_pagemap(struct pool *pool, pfn_t pfn, unsigned npages, uint64_t map[8])
{
	uint64_t entry[BLOCK_PAGES];
	unsigned before, n = host_pages(pfn, npages, &before);
	ssize_t want = (ssize_t)(n * sizeof(entry[0]));

	if (pool->priv->pagemap < 0 || pread(pool->priv->pagemap, entry, (size_t)want,
					     (off_t)((uintptr_t)pfn_hva(pool, pfn) / host_page_size() * 8)) != want)
		return false;
	for (unsigned i = 0; i < n; i++)
		if (entry[i] & PAGEMAP_HELD)
			set_host_page(map, i, before, npages);
	return true;
}

static bool populated_seek(int fd, pfn_t pfn, unsigned npages, uint64_t map[8])
{
	off_t start = (off_t)(pfn.v << PAGE_SHIFT), end = start + (off_t)((uint64_t)npages << PAGE_SHIFT);
	off_t at = start;

	while (at < end) {
		off_t data = lseek(fd, at, SEEK_DATA);
		off_t hole = data < 0 ? data : lseek(fd, data, SEEK_HOLE);

		if (hole < 0)
			return errno == ENXIO;
		if (data < end)
			set_bits(map, (unsigned)((data - start) >> PAGE_SHIFT),
				 (unsigned)((MIN(hole, end) - start + (off_t)PAGE_SIZE - 1) >> PAGE_SHIFT));
		at = hole;
	}
	return true;
}

static bool populated_mincore(struct pool *pool, pfn_t pfn, unsigned npages, uint64_t map[8])
{
	unsigned char vec[BLOCK_PAGES];
	unsigned before, n = host_pages(pfn, npages, &before);
	char *at = (char *)pfn_hva(pool, pfn) - ((size_t)before << PAGE_SHIFT);

	if (mincore(at, n * host_page_size(), vec) != 0)
		return false;
	if (n == npages) { /* the host's pages are frames */
		for (unsigned i = 0; i < n; i++)
			map[i / 64] |= (uint64_t)(vec[i] & 1) << i % 64;
		return true;
	}
	for (unsigned i = 0; i < n; i++)
		if (vec[i] & 1)
			set_host_page(map, i, before, npages);
	return true;
}

void pool_populated(struct pool *pool, pfn_t pfn, unsigned npages, uint64_t map[8])
{
	const struct extent *e = pfn_block(pool, pfn)->extent;
	bool known;

	kage_assert(npages <= BLOCK_PAGES);
	memset(map, 0, 8 * sizeof(map[0]));
	if (!e || e->kind != EXTENT_HOME)
		known = false;
	else if (!swap_on())
		known = populated_mincore(pool, pfn, npages, map);
	else
		known = e->home->fd < 0 ? populated_pagemap(pool, pfn, npages, map) :
					  populated_seek(e->home->fd, pfn, npages, map);
	if (!known)
		set_bits(map, 0, npages);
}
