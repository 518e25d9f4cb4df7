/* SPDX-License-Identifier: MIT */
/*
 * Windows and slots: what a guest's regions are to this process and to KVM.
 *
 * A window is address space reserved for what one call mapped into the guest;
 * its address stays until none of it is mapped any more. Slots lie over windows, one for
 * each run of regions with the same right to write: advice that cuts a region in two
 * (mergeable) leaves slots alone, protection does not.
 *
 *   regions   [ mergeable ][ not ][ read-only ][ not ]
 *   window    [--------------------------------------]
 *   slots     [    1             ][     2     ][  3  ]
 *
 * Invariants, beside W1:
 *  1. what can fail is done by prepare, when nobody knows of the new regions:
 *     their windows and slots are there, and show zeroes, before the table has them.
 *  2. commit leaves slots that do not change alone: vCPUs may be running on them.
 *
 * A slot whose right to write changes is removed and made anew, which a running
 * vCPU could see as MMIO: parking vCPUs meanwhile is the embedder's affair.
 *
 * Locks taken: k->slots_lock, k->lock, one after the other. mm->range is held for writing by the caller, so windows are read with
 * either. `preparing` is only looked at by who changes regions.
 */
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>

#include "helper.h"
#include "internal.h"

/* -- windows ---------------------------------------------------------------------- */

struct window *window_find(const struct kage_kvm *k, gfn_t gfn)
{
	unsigned lo = 0, hi = k->windows;

	while (lo < hi) {
		unsigned mid = (lo + hi) / 2;
		struct window *w = &k->window[mid];

		if (gfn.v < w->gfn.v)
			hi = mid;
		else if (gfn.v >= w->gfn.v + w->npages)
			lo = mid + 1;
		else
			return w;
	}
	return NULL;
}

char *kvm_hva(const struct kage_kvm *k, gfn_t gfn)
{
	const struct window *w = window_find(k, gfn);

	return w ? window_hva(w, gfn) : NULL;
}

bool window_gfn(const struct kage_kvm *k, const char *hva, gfn_t *gfn)
{
	for (unsigned i = 0; i < k->windows; i++) {
		const struct window *w = &k->window[i];

		if (hva < w->hva || hva >= w->hva + (w->npages << PAGE_SHIFT))
			continue;
		*gfn = gfn_add(w->gfn, (uint64_t)(hva - w->hva) >> PAGE_SHIFT);
		return true;
	}
	return false;
}

bool window_whole(const struct kage_kvm *k, gfn_t first, gfn_t last)
{
	while (first.v <= last.v) {
		const struct run *run = runs_find(&k->runs, first);

		if (!run)
			return false;
		first = run_end(run);
	}
	return true;
}

/* Address space whose large pages line up with the guest's. */
static int window_reserve(struct kage_kvm *k, struct window *w)
{
	uint64_t align = w->npages >= GIANT_PAGES ? GIANT_PAGES :
			 w->npages >= BLOCK_PAGES ? BLOCK_PAGES :
						    k->mirror.granule;
	struct reservation *res = env_alloc(k->env, sizeof(*res));

	if (!res)
		return -ENOMEM;
	align <<= PAGE_SHIFT;
	res->refs = 1;
	res->len = (w->npages << PAGE_SHIFT) + 2 * align;
	res->map = mmap(NULL, res->len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (res->map == MAP_FAILED) {
		env_free(k->env, res, sizeof(*res));
		return -ENOMEM;
	}
	w->reservation = res;
	w->hva = (char *)ALIGN_UP((uintptr_t)res->map, align) + (gfn_gpa(w->gfn).v & (align - 1));
	return 0;
}

static void reservation_put(struct kage_kvm *k, struct reservation *res)
{
	if (--res->refs)
		return;
	helper_own(k, res->map, res->len);
	munmap(res->map, res->len);
	helper_own_end(k);
	env_free(k->env, res, sizeof(*res));
}

/* Nothing is shown there any more; who waits for a page of it comes again, and fails. */
static void window_blank(struct kage_kvm *k, const struct window *w, gfn_t gfn, uint64_t npages)
{
	char *at = window_hva(w, gfn);
	size_t len = npages << PAGE_SHIFT;

	runs_clear(&k->runs, gfn, npages);
	helper_own(k, at, len);
	mmap(at, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
	helper_own_end(k);
	if (k->uffd.fd >= 0 && !k->mirror.abandoned)
		uffd_wake(&k->uffd, at, len);
}

static int window_room(struct kage_kvm *k, unsigned more)
{
	unsigned room = k->windows + more;
	struct window *w;

	if (room <= k->window_room)
		return 0;
	room *= 2;
	w = env_alloc(k->env, room * sizeof(*w));
	if (!w)
		return -ENOMEM;
	if (k->windows)
		memcpy(w, k->window, k->windows * sizeof(*w));
	env_free(k->env, k->window, k->window_room * sizeof(*w));
	k->window = w;
	k->window_room = room;
	return 0;
}

static void window_insert(struct kage_kvm *k, const struct window *w)
{
	unsigned at = 0;

	while (at < k->windows && k->window[at].gfn.v < w->gfn.v)
		at++;
	memmove(&k->window[at + 1], &k->window[at], (k->windows - at) * sizeof(*w));
	k->window[at] = *w;
	k->windows++;
}

/* Takes the entry out of the array. */
static void window_forget(struct kage_kvm *k, unsigned at)
{
	k->windows--;
	memmove(&k->window[at], &k->window[at + 1], (k->windows - at) * sizeof(k->window[0]));
}

static void window_remove(struct kage_kvm *k, unsigned at)
{
	struct window w = k->window[at];

	window_blank(k, &w, w.gfn, w.npages);
	window_forget(k, at);
	reservation_put(k, w.reservation);
}

/* A window for a region that has none, all zero. */
static int window_new(struct kage_kvm *k, const struct region *r)
{
	struct window w = {.gfn = r->start, .npages = r->npages};
	struct run zero = {.gfn = r->start, .npages = r->npages, .kind = RUN_ZERO};
	int err = window_room(k, 1);

	if (err)
		return err;
	err = window_reserve(k, &w);
	if (err)
		return err;
	window_insert(k, &w);
	err = mirror_map(k, &zero);
	if (err)
		window_remove(k, (unsigned)(window_find(k, w.gfn) - k->window));
	return err;
}

static bool window_used(const struct window *w, const struct regions *set)
{
	for (unsigned i = 0; i < set->count; i++)
		if (set->r[i].start.v < w->gfn.v + w->npages && w->gfn.v < region_end(&set->r[i]).v)
			return true;
	return false;
}

/* -- slots ---------------------------------------------------------------------------- */

static int spans_room(struct kage_kvm *k, struct spans *s, unsigned n)
{
	struct span *span;

	if (n <= s->room)
		return 0;
	span = env_alloc(k->env, n * sizeof(*span));
	if (!span)
		return -ENOMEM;
	env_free(k->env, s->span, s->room * sizeof(*span));
	s->span = span;
	s->room = n;
	return 0;
}

/* The slots that a set of regions asks for. Memory that may not be read has none: accesses exit as MMIO. */
static int spans_of(struct kage_kvm *k, const struct regions *set, struct spans *s)
{
	struct window *last_window = NULL;
	int r = spans_room(k, s, set->count);

	s->count = 0;
	for (unsigned i = 0; r == 0 && i < set->count; i++) {
		const struct region *reg = &set->r[i];
		struct span *last = s->count ? &s->span[s->count - 1] : NULL;
		struct window *w = window_find(k, reg->start);
		bool readonly = !(reg->prot & KAGE_WRITE);

		if (!(reg->prot & KAGE_READ))
			continue;
		if (readonly && !feature_used(&k->features, KAGE_KVM_READONLY_SLOT))
			return -EOPNOTSUPP;
		if (last && w == last_window && last->gfn.v + last->npages == reg->start.v &&
		    last->readonly == readonly)
			last->npages += reg->npages;
		else
			s->span[s->count++] = (struct span){reg->start, reg->npages, readonly};
		last_window = w;
	}
	return r;
}

static bool spans_have(const struct spans *s, const struct span *span)
{
	for (unsigned i = 0; i < s->count; i++)
		if (s->span[i].gfn.v == span->gfn.v && s->span[i].npages == span->npages &&
		    s->span[i].readonly == span->readonly)
			return true;
	return false;
}

static bool spans_overlap(const struct spans *s, const struct span *span)
{
	for (unsigned i = 0; i < s->count; i++)
		if (s->span[i].gfn.v < span->gfn.v + span->npages &&
		    span->gfn.v < s->span[i].gfn.v + s->span[i].npages)
			return true;
	return false;
}

static int span_add(struct kage_kvm *k, const struct span *span)
{
	return slots_add(&k->slots, span->gfn, span->npages, kvm_hva(k, span->gfn), span->readonly);
}

static int span_remove(struct kage_kvm *k, const struct span *span)
{
	return slots_remove(&k->slots, span->gfn, span->npages);
}

/* Slots where there was none: made at once, and unmade by cancel. */
static int spans_prepare(struct kage_kvm *k)
{
	uint64_t largest = 0;
	unsigned added = 0;
	int r;

	for (unsigned i = 0; i < k->next.count; i++) {
		added += !spans_have(&k->spans, &k->next.span[i]);
		largest = MAX(largest, k->next.span[i].npages);
	}
	r = added ? slots_reserve(&k->slots, added, largest) : 0;
	for (unsigned i = 0; r == 0 && i < k->next.count; i++)
		if (!spans_overlap(&k->spans, &k->next.span[i]))
			r = span_add(k, &k->next.span[i]);
	return r;
}

static void spans_cancel(struct kage_kvm *k)
{
	for (unsigned i = 0; i < k->next.count; i++)
		if (!spans_overlap(&k->spans, &k->next.span[i]))
			span_remove(k, &k->next.span[i]); /* -ENOENT: it was not reached */
	k->next.count = 0;
}

static void spans_commit(struct kage_kvm *k)
{
	int r = 0;

	/* What KVM has logged of slots that are made anew would go with them. */
	if (k->slots.logging)
		mirror_take_log(k, GFN(0), GFN((uint64_t)1 << GFN_BITS), NULL);

	for (unsigned i = 0; i < k->spans.count; i++)
		if (!spans_have(&k->next, &k->spans.span[i]))
			span_remove(k, &k->spans.span[i]);
	for (unsigned i = 0; i < k->next.count; i++)
		if (!spans_have(&k->spans, &k->next.span[i]) && spans_overlap(&k->spans, &k->next.span[i]))
			r = span_add(k, &k->next.span[i]);
	if (r)
		env_log(k->env, KAGE_LOG_ERROR,
			"mm %llu: KVM refused a slot that has only been cut: errno %d",
			(unsigned long long)k->mm->id, -r);
	SWAP(k->spans, k->next);
	k->next.count = 0;
}

/* -- the set of regions changes ---------------------------------------------------------- */

#define COMMIT_RUNS 16 /* cuts that trimming windows makes */

static void windows_drop_unused(struct kage_kvm *k, const struct regions *now)
{
	for (unsigned i = k->windows; i-- > 0;)
		if (!window_used(&k->window[i], now))
			window_remove(k, i);
}

/* Files that userfaultfd knows. */
static bool file_in_memory(int fd)
{
	struct statfs fs;

	return fstatfs(fd, &fs) == 0 && (fs.f_type == TMPFS_MAGIC || fs.f_type == HUGETLBFS_MAGIC);
}

/* Trapped memory needs somebody who can be told, and a way to put a page in place. */
static int region_possible(struct kage_kvm *k, const struct region *r)
{
	uint64_t offset;
	bool traps = k->uffd.fd >= 0 && !k->mirror.abandoned;
	const struct extent *e = r->kind == KAGE_REGION_ANON ? NULL : atomic_load(&((struct region *)r)->extent);
	uint64_t odd = r->start.v | r->npages | (e ? extent_pfn(e, r->start).v : 0);
	int fd;

	if (e && pool_file(k->pool, extent_pfn(e, r->start), &fd, &offset) == 0)
		odd |= offset >> PAGE_SHIFT;
	if (odd % k->mirror.granule) {
		env_log(k->env, KAGE_LOG_ERROR, "a region that does not begin and end on pieces of %u bytes",
			(unsigned)(k->mirror.granule << PAGE_SHIFT));
		return -EINVAL;
	}
	if (r->flags & KAGE_REGION_TRAP && !(traps && k->mirror.blocks)) {
		env_log(k->env, KAGE_LOG_ERROR, "a region that traps needs userfaultfd, and write protection or pause()");
		return -EOPNOTSUPP;
	}
	if (r->kind == KAGE_REGION_ANON && k->mm->host->limited && !(r->flags & KAGE_REGION_TRAP)) {
		env_log(k->env, KAGE_LOG_ERROR, "the kernel fills a guest's memory without asking: a limit needs regions that trap");
		return -EOPNOTSUPP;
	}
	if (r->kind != KAGE_REGION_FILE || file_in_memory(atomic_load(&((struct region *)r)->extent)->fd))
		return 0;
	if (k->mirror.exact || !k->config.pause) {
		env_log(k->env, KAGE_LOG_ERROR, "userfaultfd does not know this FILE region's file system: native policy and pause()");
		return -EOPNOTSUPP;
	}
	k->unblockable = true;
	return 0;
}

static int windows_prepare(struct kage_kvm *k, const struct regions *next)
{
	int r;

	lock_take(&k->lock);
	k->preparing = true;
	k->reserved += COMMIT_RUNS;
	r = runs_reserve(&k->runs, k->reserved);
	if (r == 0)
		r = window_room(k, next->count); /* pieces of those that shrink */
	for (unsigned i = 0; r == 0 && i < next->count; i++) {
		r = region_possible(k, &next->r[i]);
		if (r == 0 && !window_find(k, next->r[i].start))
			r = window_new(k, &next->r[i]);
	}
	lock_drop(&k->lock);
	return r;
}

int window_prepare(struct mirror *m, const struct regions *next)
{
	struct kage_kvm *k = kvm_of(m);
	int r = windows_prepare(k, next);

	lock_take(&k->slots_lock);
	if (r == 0)
		r = spans_of(k, next, &k->next);
	if (r == 0)
		r = spans_prepare(k);
	lock_drop(&k->slots_lock);
	if (r)
		window_cancel(m);
	return r;
}

/* Also where nothing has been prepared, or it has been cancelled already. */
void window_cancel(struct mirror *m)
{
	struct kage_kvm *k = kvm_of(m);

	if (!k->preparing)
		return;
	lock_take(&k->slots_lock);
	spans_cancel(k);
	lock_drop(&k->slots_lock);
	lock_take(&k->lock);
	windows_drop_unused(k, k->mm->regions);
	k->reserved -= COMMIT_RUNS;
	runs_trim(&k->runs, k->reserved);
	k->preparing = false;
	lock_drop(&k->lock);
}

/* The first gfn from `at` on that a region has; `end` if none before it. */
static gfn_t next_region(const struct regions *set, gfn_t at, gfn_t end)
{
	for (unsigned i = 0; i < set->count; i++)
		if (region_end(&set->r[i]).v > at.v)
			return GFN(MIN(end.v, MAX(at.v, set->r[i].start.v)));
	return end;
}

/* Where regions that follow each other without a gap end. */
static gfn_t covered_to(const struct regions *set, gfn_t at, gfn_t end)
{
	const struct region *r;

	while (at.v < end.v && (r = regions_find(set, at)))
		at = region_end(r);
	return GFN(MIN(at.v, end.v));
}

/*
 * A window is what regions cover without a gap: of one that lost a part, each piece that is left goes on at its
 * address as a window of its own.
 */
static void window_shrink(struct kage_kvm *k, unsigned i, const struct regions *now)
{
	struct window w = k->window[i];
	gfn_t end = gfn_add(w.gfn, w.npages), next;

	if (covered_to(now, w.gfn, end).v == end.v)
		return;
	window_forget(k, i);
	for (gfn_t at = w.gfn; at.v < end.v; at = next) {
		struct window piece = w;

		next = covered_to(now, at, end);
		if (next.v == at.v) {
			next = next_region(now, at, end);
			window_blank(k, &w, at, next.v - at.v);
			continue;
		}
		piece.gfn = at;
		piece.npages = next.v - at.v;
		piece.hva = window_hva(&w, at);
		w.reservation->refs++;
		window_insert(k, &piece);
	}
	reservation_put(k, w.reservation);
}

/* What shows zeroes from the start is registered now that the region says whether it traps. */
static int window_register(struct kage_kvm *k, const struct window *w)
{
	gfn_t end = gfn_add(w->gfn, w->npages);
	const struct run *run;
	int r = 0;

	for (gfn_t at = w->gfn; r == 0 && at.v < end.v && (run = runs_find(&k->runs, at)); at = run_end(run))
		r = mirror_register(k, run);
	return r;
}

/* A new window shows zeroes until here. */
static int window_show(struct kage_kvm *k, struct window *w)
{
	int64_t r;

	if (w->shown)
		return 0;
	r = mirror_sync(k, w->gfn, gfn_add(w->gfn, w->npages));
	if (r >= 0)
		r = window_register(k, w);
	w->shown = r >= 0;
	return r < 0 ? (int)r : 0;
}

int window_show_all(struct kage_kvm *k)
{
	int r = 0;

	for (unsigned i = 0; r == 0 && i < k->windows; i++)
		r = window_show(k, &k->window[i]);
	return r;
}

void window_commit(struct mirror *m, const struct regions *next)
{
	struct kage_kvm *k = kvm_of(m);
	int r;

	lock_take(&k->slots_lock);
	spans_commit(k);
	lock_drop(&k->slots_lock);
	lock_take(&k->lock);
	windows_drop_unused(k, next);
	for (unsigned i = k->windows; i-- > 0;)
		window_shrink(k, i, next);
	r = window_show_all(k);
	if (r)
		env_corrupt(k->env, "mm %llu: a window could not be mapped: errno %d",
			    (unsigned long long)k->mm->id, -r);
	k->reserved -= COMMIT_RUNS;
	runs_trim(&k->runs, k->reserved);
	k->preparing = false;
	lock_drop(&k->lock);
}

void window_finish(struct kage_kvm *k)
{
	slots_finish(&k->slots);
	while (k->windows)
		window_remove(k, k->windows - 1);
	runs_finish(&k->runs);
	env_free(k->env, k->window, k->window_room * sizeof(*k->window));
	env_free(k->env, k->spans.span, k->spans.room * sizeof(*k->spans.span));
	env_free(k->env, k->next.span, k->next.room * sizeof(*k->next.span));
}
