/* SPDX-License-Identifier: MIT */
/*
 * Guest memory from the VMM's side: read, write, pin.
 *
 * A read copies lock-free from whatever frame the table names (a grace period
 * keeps it). A write makes the page exclusive, turns its reader section into a
 * hold, so that every change that could take the frame or snapshot it waits,
 * and copies. A pin counts on the frame, under the table lock that merging
 * rechecks under, and is listed on the mm for clone, unmap and discard.
 *
 * Invariants:
 *  X1  a thread that holds a reader section does nothing but copy.
 *  X2  frame pins > 0 only on exclusive frames of ranges in mm->pins.
 *  X3  a pinned page keeps its frame until it is unpinned. A pin is taken in a hold, when the entry makes the frame the
 *      guest's alone, and (mirror) the window shows it. So none begins between a change's start and its end, and who
 *      looks at the pins after start, before contents are read, misses no store of one that has ended either:
 *
 *        COW break            its entry has no W: who pins sets it first, and the recheck finds another entry
 *        adoption, widening   adopt_inspect(). What it put in place is shown from its end on; where the host had no
 *                             mapping, nobody has pinned what goes back
 *        merging              page_compare() (merge/plan.c); in hardened domains fuse_inspect() (merge/hardened.c)
 *        discard, unmap       mm->range for writing, no pin can come; zap_prepare() refuses what is pinned
 *        clone                the same; pinned pages are copied for the child (K2 of clone.c), and not frozen (K4)
 *        attach, detach       the same, and adoption
 *        protect              gives no page another frame
 *
 * A fused page (mm/fused.h) is broken by mm_read() as by a guest: device models read on behalf of guests, who see
 * how long it takes. Who only wants to know what is there peeks.
 *
 * Where the host kernel breaks COW by itself (mm/mirror.h), what the guest has is in its window: bytes
 * are copied from and to there, unless the page is exclusive and so the same in both.
 *
 * Locks taken: mm->range for reading; mm->pin_lock; table locks.
 */
#include <sched.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/guest.h"

#include "mm/fused.h"
#include "mm/mirror.h"
#include "mm/region.h"
#include "mm/table.h"

/* -- read ------------------------------------------------------------------------- */

/*
 * What holds memory of a run of a block's frames. A call asks once a run, not once a page: what is
 * populated before it begins is seen, and what is meanwhile may be read as it was. Such a frame
 * cannot become another guest's without its entry changing, which read_frame() sees.
 */
struct populated {
	pfn_t first;
	unsigned npages; /* 0: nobody has been asked */
	unsigned ahead;	 /* how many pages the call is going to read from here on, at least 1 */
	uint64_t map[8];
};

/* A block of anonymous memory may never have been touched: then it is not ours to populate. */
static bool is_hole(const struct mm *mm, const struct mm_lookup *l, struct populated *p)
{
	uint64_t i;

	if (l->level == 0 || l->entry & ENTRY_SPECIAL)
		return false;
	if (l->pfn.v < p->first.v || l->pfn.v - p->first.v >= p->npages) {
		p->first = l->pfn;
		p->npages = (unsigned)MIN((uint64_t)p->ahead, BLOCK_PAGES - l->pfn.v % BLOCK_PAGES);
		pool_populated(mm->host->pool, p->first, p->npages, p->map);
	}
	i = l->pfn.v - p->first.v;
	return !bit_test(p->map, i);
}

static void copy_page(const struct mm *mm, const struct mm_lookup *l, size_t offset, void *buf, size_t len,
		      struct populated *p)
{
	if (is_hole(mm, l, p))
		memset(buf, 0, len);
	else
		guest_copy(buf, (const char *)pfn_hva(mm->host->pool, l->pfn) + offset, len);
}

void mm_copy_page(const struct mm *mm, const struct mm_lookup *l, size_t offset, void *buf, size_t len)
{
	struct populated p = { .ahead = 1 };

	copy_page(mm, l, offset, buf, len, &p);
}

/* Reads from a page without an entry: zeroes, the file, or what a pager fills in. */
static int read_untouched(struct mm *mm, const struct region *reg, gfn_t gfn, size_t offset, void *buf, size_t len)
{
	if (reg->kind == KAGE_REGION_ANON) {
		memset(buf, 0, len);
		return KAGE_OK;
	}
	guest_copy(buf, (const char *)pfn_hva(mm->host->pool,
					      extent_pfn(atomic_load(&((struct region *)reg)->extent), gfn)) + offset,
		   len);
	return KAGE_OK;
}

/*
 * The grace period keeps the frame, but not its contents: once our entry has let
 * go of it (COW break, discard) another guest may find it exclusive and write.
 */
static int read_frame(struct mm *mm, gfn_t gfn, const struct mm_lookup *l, size_t offset, void *buf, size_t len,
		      struct populated *p)
{
	struct mm_lookup now;

	copy_page(mm, l, offset, buf, len, p);
	if (entry_is_fused(l->entry))
		fused_was_read(mm->host->pool, l->pfn);
	atomic_thread_fence(memory_order_acquire);
	now = mm_lookup(mm, gfn);
	return entry_is_leaf(now.entry) && pfn_eq(now.pfn, l->pfn) ? KAGE_OK : KAGE_RETRY;
}

/* The next touch is its owner's. Under a mirror; mm->range held. */
static bool page_traps(const struct mm *mm, const struct region *reg, entry_t e)
{
	return entry_is_none(e) && reg->flags & KAGE_REGION_TRAP && !READ_ONCE(mm->mirror->abandoned);
}

/* The guest's page as the host kernel has it. KAGE_RETRY: the frame will do, or trapped memory is not there yet. */
static int read_window(struct mm *mm, gfn_t gfn, size_t offset, void *buf, size_t len)
{
	struct brlock_held held = brlock_read(&mm->range);
	const struct region *reg = mm_region(mm, gfn);
	struct mm_lookup l = mm_lookup(mm, gfn);
	const char *window = mm_native(mm) && reg ? mm->mirror->ops->window(mm->mirror, gfn) : NULL;
	int r = KAGE_RETRY;

	if (reg && !(reg->prot & KAGE_READ))
		r = KAGE_MMIO;
	else if (window && !page_traps(mm, reg, l.entry)) {
		guest_copy(buf, window + offset, len);
		r = KAGE_OK;
	}
	brlock_read_drop(&mm->range, held);
	return r;
}

/* Inner outcome: a moment later. */
#define READ_UNSETTLED 1001

/* One page; KAGE_RETRY: look again, it may have to be faulted in first. */
static int read_page(struct mm *mm, gfn_t gfn, size_t offset, void *buf, size_t len, struct populated *p,
		     bool peek)
{
	const struct region *reg;
	struct mirror *m;
	struct mm_lookup l;
	int r = KAGE_OK;

	rcu_enter();
	reg = mm_region(mm, gfn);
	l = mm_lookup(mm, gfn);
	m = load_acquire(&mm->mirror);
	if (!reg || !(reg->prot & KAGE_READ)) {
		r = KAGE_MMIO;
	} else if (m && !READ_ONCE(m->exact) && !l.writable) {
		rcu_leave();
		return read_window(mm, gfn, offset, buf, len);
	} else if (entry_is_leaf(l.entry) && !l.writable && m && atomic_load(&m->unsettled)) {
		r = READ_UNSETTLED;
	} else if (entry_is_leaf(l.entry) && (peek || !entry_is_fused(l.entry))) {
		r = read_frame(mm, gfn, &l, offset, buf, len, p);
	} else if (!entry_is_none(l.entry) || (reg->flags & KAGE_REGION_TRAP && reg->touch)) {
		r = KAGE_RETRY;
	} else {
		r = read_untouched(mm, reg, gfn, offset, buf, len);
	}
	rcu_leave();
	return r;
}

static int read_range(struct mm *mm, gpa_t gpa, void *buf, size_t len, bool peek)
{
	struct populated p = { .npages = 0 };
	char *to = buf;

	while (len) {
		size_t offset = gpa_offset(gpa), n = MIN(len, PAGE_SIZE - offset);
		int r;

		p.ahead = (unsigned)MIN((offset + len + PAGE_SIZE - 1) >> PAGE_SHIFT, (uint64_t)BLOCK_PAGES);
		r = read_page(mm, gpa_gfn(gpa), offset, to, n, &p, peek);
		if (r)
			p.npages = 0;
		if (r == READ_UNSETTLED) {
			sched_yield();
			continue;
		}
		if (r == KAGE_RETRY) {
			struct mm_fault f = { .gfn = gpa_gfn(gpa), .access = KAGE_READ };

			r = mm_fault(mm, &f);
			if (r == KAGE_OK || r == KAGE_RETRY)
				continue;
		}
		if (r)
			return r;
		to += n;
		gpa.v += n;
		len -= n;
	}
	return KAGE_OK;
}

int mm_read(struct mm *mm, gpa_t gpa, void *buf, size_t len)
{
	return read_range(mm, gpa, buf, len, false);
}

int mm_peek(struct mm *mm, gpa_t gpa, void *buf, size_t len)
{
	return read_range(mm, gpa, buf, len, true);
}

/*
 * A page that is its file's own, read through the descriptor: a load through a mapping makes the host give memory to
 * a hole of tmpfs (a guest's RAM is one where nobody touched it). False: it is not, or the file cannot be read so.
 */
static bool read_file_page(struct mm *mm, gfn_t gfn, void *page)
{
	const struct region *reg;
	struct mm_lookup l;
	struct extent *e = NULL;
	bool done;

	rcu_enter();
	reg = mm_region(mm, gfn);
	l = mm_lookup(mm, gfn);
	if (reg && reg->prot & KAGE_READ && reg->kind != KAGE_REGION_ANON &&
	    (reg->kind == KAGE_REGION_FOREIGN || !load_acquire(&mm->mirror)))
		e = atomic_load(&((struct region *)reg)->extent);
	if (e && !entry_is_none(l.entry) && !(entry_is_leaf(l.entry) && pfn_eq(l.pfn, extent_pfn(e, gfn))))
		e = NULL;
	done = e && pread(e->fd, page, PAGE_SIZE, (off_t)(e->offset + (gfn.v - e->gfn.v) * PAGE_SIZE)) ==
			    (ssize_t)PAGE_SIZE;
	rcu_leave();
	return done;
}

int mm_read_page(struct mm *mm, gfn_t gfn, void *page)
{
	return read_file_page(mm, gfn, page) ? KAGE_OK : mm_peek(mm, gfn_gpa(gfn), page, PAGE_SIZE);
}

/* -- write ------------------------------------------------------------------------ */

static int write_check(struct mm *mm, gpa_t gpa, size_t len)
{
	gfn_t gfn = gpa_gfn(gpa), last = GFN((gpa.v + len - 1) >> PAGE_SHIFT);
	int r = KAGE_OK;

	rcu_enter();
	while (r == KAGE_OK && gfn.v <= last.v) {
		const struct region *reg = mm_region(mm, gfn);

		if (!reg || !(reg->prot & KAGE_WRITE))
			r = KAGE_MMIO;
		else
			gfn = region_end(reg);
	}
	rcu_leave();
	return r;
}

/* Where a held page is written: its frame, or (kernel's COW) its window. Trapped memory has to be there first. */
static int write_place(struct mm *mm, struct mm_fault *f, struct brlock_held held, char **place)
{
	const struct region *reg = mm_region(mm, f->gfn);
	struct mm_lookup l = mm_lookup(mm, f->gfn);
	int r;

	*place = NULL;
	if (!reg || !(reg->prot & KAGE_WRITE))
		return KAGE_MMIO;
	if (mm_native(mm) && !page_traps(mm, reg, l.entry))
		*place = mm->mirror->ops->window(mm->mirror, f->gfn);
	if (*place)
		return KAGE_OK;
	r = mm_fault_held(mm, f, held);
	if (r == KAGE_OK)
		*place = pfn_hva(mm->host->pool, f->pfn);
	return r;
}

static int write_page(struct mm *mm, struct notify_reader *reader, gpa_t gpa, const void *buf, size_t len)
{
	struct mm_fault f = { .gfn = gpa_gfn(gpa), .access = KAGE_WRITE, .reader = reader };
	struct brlock_held held;
	char *place;
	int r;

	notify_read_begin(reader, f.gfn, gfn_add(f.gfn, 1));
	held = brlock_read(&mm->range);
	r = write_place(mm, &f, held, &place);
	if (r == KAGE_OK && !notify_read_hold(reader))
		r = KAGE_RETRY;
	if (r == KAGE_OK) {
		/* again: a harvest may have come between the fault and the hold */
		mm_mark_dirty(mm, f.gfn, 1);
		guest_copy(place + gpa_offset(gpa), buf, len);
	}
	brlock_read_drop(&mm->range, held);
	notify_read_end(reader);
	return r;
}

int mm_write(struct mm *mm, gpa_t gpa, const void *buf, size_t len,
	     void (*written)(void *arg, gpa_t gpa, size_t len), void *arg)
{
	struct notify_reader reader;
	const char *from = buf;
	int r;

	if (len == 0)
		return KAGE_OK;
	r = write_check(mm, gpa, len);
	if (r)
		return r;
	r = notify_reader_attach(&mm->notify, &reader);
	if (r)
		return r;
	while (r == 0 && len) {
		size_t n = MIN(len, PAGE_SIZE - gpa_offset(gpa));

		r = write_page(mm, &reader, gpa, from, n);
		if (r == KAGE_RETRY) {
			r = 0;
			continue;
		}
		if (r)
			break;
		if (written)
			written(arg, gpa, n);
		from += n;
		gpa.v += n;
		len -= n;
	}
	notify_reader_detach(&reader);
	return r;
}

/* -- pin --------------------------------------------------------------------------- */

static struct pin *pin_find(struct mm *mm, gfn_t gfn, uint64_t npages)
{
	list_for_each(pos, &mm->pins) {
		struct pin *p = container_of(pos, struct pin, node);

		if (p->gfn.v == gfn.v && p->npages == npages)
			return p;
	}
	return NULL;
}

/* What an adoption has put into the table is certain when the window shows it (X3). The table lock is held. */
static bool window_shows(struct mm *mm, gfn_t gfn, pfn_t pfn)
{
	return !mm->mirror || mm->mirror->ops->shows(mm->mirror, gfn, pfn);
}

/* Pins the frame of a page that is held, if the entry still makes it exclusive. */
static int pin_held(struct mm *mm, gfn_t gfn, pfn_t pfn)
{
	struct table_locked w = table_lock(mm->family, 0, gfn);
	struct mm_lookup l;
	int r;

	rcu_enter();
	l = mm_lookup(mm, gfn);
	rcu_leave();
	if (!entry_is_leaf(l.entry) || !l.writable || !pfn_eq(l.pfn, pfn) || !window_shows(mm, gfn, pfn))
		r = KAGE_RETRY;
	else
		r = frame_pin(pfn_frame(mm->host->pool, pfn));
	table_unlock(w);
	return r;
}

/* X3. Waits for the end of changes in flight: whoever is in one needs no mm->range to come to it. */
static int pin_page(struct mm *mm, gfn_t gfn, struct notify_reader *reader, struct brlock_held held, pfn_t *out)
{
	struct mm_fault f = { .gfn = gfn, .unshare = true, .reader = reader };
	int r;

	notify_read_begin(reader, gfn, gfn_add(gfn, 1));
	r = mm_fault_held(mm, &f, held);
	if (r == KAGE_OK)
		r = notify_read_hold(reader) ? pin_held(mm, gfn, f.pfn) : KAGE_RETRY;
	notify_read_end(reader);
	*out = f.pfn;
	return r;
}

static void unpin_pages(struct mm *mm, gfn_t gfn, uint64_t npages)
{
	for (uint64_t i = 0; i < npages; i++) {
		struct mm_lookup l;

		rcu_enter();
		l = mm_lookup(mm, gfn_add(gfn, i));
		rcu_leave();
		frame_unpin(pfn_frame(mm->host->pool, l.pfn));
	}
}

/* Adds a page to an iov whose last entry may grow. */
static int iov_add(struct iovec *iov, unsigned *used, unsigned room, void *hva)
{
	if (*used && (char *)iov[*used - 1].iov_base + iov[*used - 1].iov_len == hva) {
		iov[*used - 1].iov_len += PAGE_SIZE;
		return 0;
	}
	if (*used == room)
		return -ENOSPC;
	iov[(*used)++] = (struct iovec){ .iov_base = hva, .iov_len = PAGE_SIZE };
	return 0;
}

static int pin_check(struct mm *mm, gfn_t gfn, uint64_t npages)
{
	for (gfn_t at = gfn; at.v < gfn.v + npages;) {
		const struct region *reg = mm_region(mm, at);

		if (!reg || !(reg->prot & KAGE_WRITE))
			return KAGE_MMIO;
		at = region_end(reg);
	}
	return 0;
}

/* Pins page by page; undoes it all on failure. */
static int pin_pages(struct mm *mm, gfn_t gfn, uint64_t npages, struct iovec *iov, unsigned *used, unsigned room,
		     struct notify_reader *reader, struct brlock_held held)
{
	uint64_t done = 0;
	int r = 0;

	while (r == 0 && done < npages) {
		pfn_t pfn;

		r = pin_page(mm, gfn_add(gfn, done), reader, held, &pfn);
		if (r == KAGE_RETRY) {
			sched_yield();
			r = 0;
			continue;
		}
		if (r)
			break;
		done++;
		r = iov_add(iov, used, room, pfn_hva(mm->host->pool, pfn));
	}
	mm_mark_changed(mm, gfn, done); /* after the pins: merging drops pinned candidates, and comes back to them */
	if (r)
		unpin_pages(mm, gfn, done);
	return r;
}

int mm_pin(struct mm *mm, gfn_t gfn, uint64_t npages, struct iovec *iov, unsigned *n)
{
	struct pin *fresh = env_alloc(mm->host->env, sizeof(*fresh)), *p;
	struct notify_reader reader;
	struct brlock_held held;
	unsigned used = 0;
	int r;

	if (!fresh)
		return -ENOMEM;
	r = notify_reader_attach(&mm->notify, &reader);
	if (r) {
		env_free(mm->host->env, fresh, sizeof(*fresh));
		return r;
	}
	*fresh = (struct pin){ .gfn = gfn, .npages = npages };
	held = brlock_read(&mm->range);
	r = pin_check(mm, gfn, npages);
	if (r == 0)
		r = pin_pages(mm, gfn, npages, iov, &used, *n, &reader, held);
	if (r == 0) {
		lock_take(&mm->pin_lock);
		p = pin_find(mm, gfn, npages);
		if (!p) {
			SWAP(p, fresh);
			list_add_tail(&mm->pins, &p->node);
		}
		p->count++;
		lock_drop(&mm->pin_lock);
		*n = used;
	}
	brlock_read_drop(&mm->range, held);
	notify_reader_detach(&reader);
	env_free(mm->host->env, fresh, sizeof(*fresh));
	return r;
}

int mm_unpin(struct mm *mm, gfn_t gfn, uint64_t npages)
{
	struct brlock_held held = brlock_read(&mm->range);
	struct pin *p, *gone = NULL;

	lock_take(&mm->pin_lock);
	p = pin_find(mm, gfn, npages);
	if (p && --p->count == 0) {
		list_del(&p->node);
		gone = p;
	}
	lock_drop(&mm->pin_lock);
	if (p)
		unpin_pages(mm, gfn, npages);
	brlock_read_drop(&mm->range, held);
	env_free(mm->host->env, gone, sizeof(*gone));
	return p ? KAGE_OK : -ENOENT;
}

int mm_each_pin(struct mm *mm, int (*fn)(struct mm *mm, gfn_t gfn, uint64_t npages, void *arg), void *arg)
{
	uint64_t granule = mm->mirror ? mm->mirror->granule : 1;

	list_for_each(pos, &mm->pins) {
		struct pin *p = container_of(pos, struct pin, node);
		uint64_t start = ALIGN_DOWN(p->gfn.v, granule), end = ALIGN_UP(p->gfn.v + p->npages, granule);
		int r = fn(mm, GFN(start), end - start, arg);

		if (r)
			return r;
	}
	return 0;
}
