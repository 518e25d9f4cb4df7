/* SPDX-License-Identifier: MIT */
/*
 * Reading /proc/self: pagemap by ioctl or by its entries, maps, statm.
 *
 * struct runs joins what the kernel hands out in pieces (a full vector, a full buffer)
 * into maximal runs. struct text reads a file of /proc byte by byte through a
 * buffer, by offset: the position of a descriptor that the embedder handed in
 * is his.
 *
 * A page that is "swapped, not of a file" is one of three: swapped or migrating
 * anonymous memory (private); a marker, which userfaultfd's write protection leaves in
 * place of a page that is not there; a guard. Only the entry's frame field
 * tells them apart, so those runs are looked at again if the kernel shows it.
 *
 * Locks: none. Nothing is kept between calls.
 *
 * Source: Documentation/admin-guide/mm/pagemap.rst, PAGEMAP_SCAN(2const), proc(5).
 */
#include <unistd.h>

#include "compat.h"
#include "frame/pool.h"
#include "scan.h"

#define ENTRY_FRAME   (((uint64_t)1 << 55) - 1)
#define ENTRY_FILE    ((uint64_t)1 << 61)
#define ENTRY_SWAP    ((uint64_t)1 << 62)
#define ENTRY_PRESENT ((uint64_t)1 << 63)

#define ENTRIES 1024 /* 4 MiB a read */
#define REGIONS 256

struct runs {
	scan_run_fn run;
	void *arg;
	char *from, *to; /* from == to: none is open */
};

static int runs_flush(struct runs *r)
{
	char *from = r->from, *to = r->to;

	r->from = r->to = NULL;
	return from == to ? 0 : r->run(r->arg, from, to);
}

static int runs_add(struct runs *r, char *from, char *to)
{
	int err = 0;

	if (r->to != from || r->from == r->to) {
		err = runs_flush(r);
		r->from = from;
	}
	r->to = to;
	return err;
}

/* -- entries ----------------------------------------------------------------- */

typedef bool (*entry_test_fn)(const struct features *f, uint64_t entry);

static bool entry_private(const struct features *f, uint64_t entry)
{
	uint64_t frame = entry & ENTRY_FRAME;

	if (!(entry & (ENTRY_PRESENT | ENTRY_SWAP)) || (entry & ENTRY_FILE))
		return false;
	return !frame || frame != (entry & ENTRY_PRESENT ? f->zero_frame : f->marker_frame);
}

static bool entry_present(const struct features *f, uint64_t entry)
{
	return entry & ENTRY_PRESENT;
}

static int scan_entries(const struct features *f, char *at, char *end, entry_test_fn test, struct runs *r)
{
	uint64_t entry[ENTRIES];

	while (at < end) {
		const size_t page = host_page_size(); /* an entry each */
		size_t want = MIN((size_t)(end - at) / page, (size_t)ENTRIES);
		ssize_t n = pread(f->pagemap, entry, want * sizeof(entry[0]),
				  (off_t)((uintptr_t)at / page) * (off_t)sizeof(entry[0]));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < (ssize_t)sizeof(entry[0]))
			return n < 0 ? -errno : -EFAULT; /* beyond the address space */
		for (size_t i = 0; i < (size_t)n / sizeof(entry[0]); i++, at += page) {
			int err = test(f, entry[i]) ? runs_add(r, at, at + page) : 0;

			if (err)
				return err;
		}
	}
	return 0;
}

/* -- PAGEMAP_SCAN ------------------------------------------------------------ */

static int take_region(const struct features *f, const struct kage_pm_region *region, entry_test_fn test,
		       struct runs *r)
{
	char *from = (char *)(uintptr_t)region->start, *to = (char *)(uintptr_t)region->end;

	if ((region->categories & KAGE_PAGE_IS_SWAPPED) && f->marker_frame)
		return scan_entries(f, from, to, test, r);
	return runs_add(r, from, to);
}

static int scan_ioctl(const struct features *f, char *at, char *end, struct kage_pm_scan_arg arg,
		      entry_test_fn test, struct runs *r)
{
	struct kage_pm_region region[REGIONS];

	arg.size = sizeof(arg);
	arg.vec = (uintptr_t)region;
	arg.vec_len = REGIONS;
	while (at < end) {
		int n;

		arg.start = (uintptr_t)at;
		arg.end = (uintptr_t)end;
		n = ioctl(f->pagemap, KAGE_PAGEMAP_SCAN, &arg);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		for (int i = 0; i < n; i++) {
			int err = take_region(f, &region[i], test, r);

			if (err)
				return err;
		}
		if (arg.walk_end <= arg.start)
			return -EIO;
		at = (char *)(uintptr_t)arg.walk_end;
	}
	return 0;
}

uint64_t scan_frame(const struct features *f, const void *page)
{
	uint64_t entry = 0;

	if (pread(f->pagemap, &entry, sizeof(entry),
		  (off_t)((uintptr_t)page / host_page_size()) * (off_t)sizeof(entry)) != sizeof(entry))
		return 0;
	return entry & ENTRY_FRAME;
}

static int scan(const struct features *f, void *start, size_t len, const struct kage_pm_scan_arg *arg,
		entry_test_fn test, struct runs *r)
{
	char *end = (char *)start + len;
	int err;

	kage_assert((uintptr_t)start % host_page_size() == 0 && len % host_page_size() == 0);
	if (feature_used(f, KAGE_KVM_PAGEMAP_SCAN))
		err = scan_ioctl(f, start, end, *arg, test, r);
	else if (feature_used(f, KAGE_KVM_PAGEMAP))
		err = scan_entries(f, start, end, test, r);
	else
		err = -EOPNOTSUPP;
	return err ? err : runs_flush(r);
}

int scan_private(const struct features *f, void *start, size_t len, scan_run_fn run, void *arg)
{
	struct runs r = {.run = run, .arg = arg};
	struct kage_pm_scan_arg want = {
	    .category_inverted = KAGE_PAGE_IS_FILE | KAGE_PAGE_IS_PFNZERO,
	    .category_mask = KAGE_PAGE_IS_FILE | KAGE_PAGE_IS_PFNZERO,
	    .category_anyof_mask = KAGE_PAGE_IS_PRESENT | KAGE_PAGE_IS_SWAPPED,
	    .return_mask = KAGE_PAGE_IS_SWAPPED,
	};

	return scan(f, start, len, &want, entry_private, &r);
}

int scan_present(const struct features *f, void *start, size_t len, scan_run_fn run, void *arg)
{
	struct runs r = {.run = run, .arg = arg};
	struct kage_pm_scan_arg want = {
	    .category_mask = KAGE_PAGE_IS_PRESENT,
	    .return_mask = KAGE_PAGE_IS_PRESENT,
	};

	return scan(f, start, len, &want, entry_present, &r);
}

/* -- maps and statm ---------------------------------------------------------- */

#define END_OF_TEXT (-1)

struct text {
	int fd;
	off_t offset;
	unsigned at, n;
	bool end;
	int err;
	char buf[4096];
};

static int text_next(struct text *t)
{
	ssize_t n;

	if (t->at < t->n)
		return (unsigned char)t->buf[t->at++];
	do
		n = pread(t->fd, t->buf, sizeof(t->buf), t->offset);
	while (n < 0 && errno == EINTR);
	if (n <= 0) {
		t->end = n == 0;
		t->err = n < 0 ? -errno : 0;
		return END_OF_TEXT;
	}
	t->offset += n;
	t->n = (unsigned)n;
	t->at = 1;
	return (unsigned char)t->buf[0];
}

static int digit(int c, unsigned base)
{
	int v = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;

	return v < (int)base ? v : -1;
}

/* Reads on to `stop`. */
static bool text_number(struct text *t, unsigned base, int stop, uint64_t *v)
{
	int c, n = 0;

	for (*v = 0; (c = text_next(t)) != stop; n++) {
		if (digit(c, base) < 0)
			return false;
		*v = *v * base + (unsigned)digit(c, base);
	}
	return n > 0;
}

static bool text_flags(struct text *t, struct scan_map *m)
{
	int r = text_next(t), w = text_next(t), x = text_next(t), s = text_next(t);

	m->prot = (r == 'r' ? PROT_READ : 0) | (w == 'w' ? PROT_WRITE : 0) | (x == 'x' ? PROT_EXEC : 0);
	m->shared = s == 's';
	return (s == 's' || s == 'p') && text_next(t) == ' ';
}

/* The inode is followed by blanks and perhaps a path, or by the end of the line. */
static bool text_tail(struct text *t, uint64_t *inode)
{
	int c, n = 0;

	for (*inode = 0; digit(c = text_next(t), 10) >= 0; n++)
		*inode = *inode * 10 + (unsigned)digit(c, 10);
	while (c != '\n' && c != END_OF_TEXT)
		c = text_next(t);
	return n > 0 && c == '\n';
}

static bool text_map(struct text *t, struct scan_map *m)
{
	uint64_t major, minor;

	if (!text_number(t, 16, ' ', &m->end) || !text_flags(t, m) || !text_number(t, 16, ' ', &m->offset) ||
	    !text_number(t, 16, ':', &major) || !text_number(t, 16, ' ', &minor))
		return false;
	m->dev_major = (uint32_t)major;
	m->dev_minor = (uint32_t)minor;
	return text_tail(t, &m->inode);
}

int scan_maps(const struct features *f, int (*line)(void *arg, const struct scan_map *map), void *arg)
{
	struct text t = {.fd = f->maps};
	struct scan_map m;
	int err = 0;

	if (f->maps < 0)
		return -EOPNOTSUPP;
	while (!err) {
		if (!text_number(&t, 16, '-', &m.start) || !text_map(&t, &m))
			return t.end && !m.start ? 0 : t.err ? t.err : -EINVAL;
		err = line(arg, &m);
	}
	return err;
}

int64_t scan_anon_rss(const struct features *f)
{
	struct text t = {.fd = f->statm};
	uint64_t size, resident, shared;

	if (f->statm < 0)
		return -EOPNOTSUPP;
	if (!text_number(&t, 10, ' ', &size) || !text_number(&t, 10, ' ', &resident) ||
	    !text_number(&t, 10, ' ', &shared))
		return t.err ? t.err : -EINVAL;
	return resident > shared ? (int64_t)((resident - shared) * host_page_size()) : 0;
}
