/* SPDX-License-Identifier: MIT */
/*
 * The mirror as a listener: what happens to windows while an mm changes.
 *
 *      change                     mirror                         guest
 *      start ───────────────────► waits for overlapping changes
 *                                 blocks writes to the range     a write waits in the kernel
 *      has it diverged? ────────► looks (scan.c)
 *      commit
 *      end ─────────────────────► maps what the table says now
 *                                 wakes ────────────────────────► the write goes to the new page
 *
 * Blocking is write protection by userfaultfd: the range is registered, which
 * also splits its VMAs where the replacement will need them split, so that a
 * change which may be given up fails here, and not in its end. Nobody reads the events:
 * waiters are woken when the mapping has been replaced. Where the kernel cannot
 * do it, the embedder's pause() stops all writers instead.
 *
 * Invariants: W1 to W3 in internal.h, V1 to V5 in mm/mirror.h.
 *  B1  writes to a page were blocked, and it was seen not to be diverged after that, before sync replaces its
 *      mapping; or its contents are dropped; or freeze flips it from SHARED to PRIVATE, which loses nothing.
 *
 * Locks taken: k->lock, k->pause_lock; the table is read lock-free.
 */
#include <sched.h>
#include <sys/mman.h>

#include "base/guest.h"
#include "helper.h"
#include "internal.h"
#include "scan.h"

/* -- one mapping --------------------------------------------------------------------- */

static int ballast_map(struct kage_kvm *k)
{
	char *at = mmap(NULL, BALLAST_PAGES * host_page_size(), PROT_NONE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED)
		return -errno;
	for (unsigned i = 1; i < BALLAST_PAGES; i += 2) {
		if (mprotect(at + i * host_page_size(), host_page_size(), PROT_READ) != 0) {
			munmap(at, BALLAST_PAGES * host_page_size());
			return -ENOMEM;
		}
	}
	k->ballast = at;
	return 0;
}

void ballast_drop(struct kage_kvm *k)
{
	if (k->ballast)
		munmap(k->ballast, BALLAST_PAGES * host_page_size());
	k->ballast = NULL;
}

/* Not when it would take what a mapping has just been given up for. */
void ballast_fill(struct kage_kvm *k)
{
	if (!k->ballast)
		ballast_map(k);
}

/* What is shown of a frame that the window shares: a second view of the direct map, which has all flags already. */
static void *map_shared(struct kage_kvm *k, const struct run *want, void *at)
{
	return mremap(pfn_hva(k->pool, want->pfn), 0, want->npages << PAGE_SHIFT, MREMAP_MAYMOVE | MREMAP_FIXED, at);
}

static void *map_private(struct kage_kvm *k, const struct run *want, void *at)
{
	size_t len = want->npages << PAGE_SHIFT;
	int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
	uint64_t offset = 0;
	int fd = -1;

	if (want->kind == RUN_ZERO)
		flags |= MAP_ANONYMOUS;
	else if (pool_file(k->pool, want->pfn, &fd, &offset))
		return MAP_FAILED;
	return mmap(at, len, PROT_READ | PROT_WRITE, flags, fd, (off_t)offset);
}

/* Flags that all windows have, else neighbours do not become one VMA again. Those of SHARED runs have them from the start. */
static void map_uniform(char *at, size_t len)
{
	madvise(at, len, MADV_DONTFORK);
	madvise(at, len, MADV_DONTDUMP);
}

static void *map_at(struct kage_kvm *k, const struct run *want, void *at)
{
	void *p;

	helper_own(k, at, want->npages << PAGE_SHIFT);
	p = want->kind == RUN_SHARED ? map_shared(k, want, at) : map_private(k, want, at);
	helper_own_end(k);
	return p;
}

/* A trap is needed where the table has to hear of a touch, or of a write, before it happens. */
uint64_t mirror_mode(const struct kage_kvm *k, const struct run *run)
{
	const struct region *reg;
	bool trap;

	if (k->uffd.fd < 0 || k->mirror.abandoned)
		return 0;
	if (run->kind == RUN_SHARED)
		return k->events ? UFFDIO_REGISTER_MODE_WP : 0;
	if (k->mirror.exact)
		return run->kind == RUN_PRIVATE ? UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR |
						      UFFDIO_REGISTER_MODE_WP
						: UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP;
	if (run->kind != RUN_ZERO)
		return k->events ? UFFDIO_REGISTER_MODE_WP : 0;
	rcu_enter();
	reg = mm_region(k->mm, run->gfn);
	trap = reg && reg->flags & KAGE_REGION_TRAP;
	rcu_leave();
	return (trap ? UFFDIO_REGISTER_MODE_MISSING : 0) | (k->events || (trap && k->wp) ? UFFDIO_REGISTER_MODE_WP : 0);
}

int mirror_register(struct kage_kvm *k, const struct run *run)
{
	uint64_t mode = mirror_mode(k, run);

	return mode ? uffd_register(&k->uffd, kvm_hva(k, run->gfn), run->npages << PAGE_SHIFT, mode) : 0;
}

#define PROTECT_TRIES 1000 /* a VMM that does nothing but change mappings must not keep traps from being served */

/* -EAGAIN: the VMM changes a mapping, and the helper's reader has yet to hear of it. It needs nothing of ours. */
static int protect(struct kage_kvm *k, char *at, size_t len)
{
	int r, tries = 0;

	while ((r = uffd_protect(&k->uffd, at, len)) == -EAGAIN && tries++ < PROTECT_TRIES)
		sched_yield();
	return r == -EAGAIN ? -ETIMEDOUT : r;
}

struct slipped {
	struct kage_kvm *k;
	uint64_t mode;
};

/* Registered anew first: a page that slipped by may have done so because somebody took the registration away. */
static int protect_slipped(void *arg, char *from, char *to)
{
	struct slipped *s = arg;
	int r = uffd_register(&s->k->uffd, from, (size_t)(to - from), s->mode);

	return r ? r : protect(s->k, from, (size_t)(to - from));
}

/*
 * A replacement that has to trap is mapped first and registered then. Whoever touched it in between has a page
 * that is not protected: it is now. What was written is private, and is found by the next look.
 */
static int register_fresh(struct kage_kvm *k, const struct run *run, char *at)
{
	uint64_t mode = mirror_mode(k, run);
	struct slipped slipped = { k, mode };
	int r = mirror_register(k, run);

	if (r == 0 && mode & UFFDIO_REGISTER_MODE_MINOR)
		r = scan_present(&k->features, at, run->npages << PAGE_SHIFT, protect_slipped, &slipped);
	return r;
}

/* Without the flags of map_uniform(). */
static int map_piece(struct kage_kvm *k, const struct run *want)
{
	char *at = kvm_hva(k, want->gfn);
	struct run one = *want;
	int err = runs_ready(&k->runs) ? 0 : runs_reserve(&k->runs, 1);
	void *p = err ? MAP_FAILED : map_at(k, want, at);

	if (err)
		return err;
	if (p == MAP_FAILED && errno == ENOMEM && k->ballast) {
		ballast_drop(k); /* what is kept back for this */
		env_log(k->env, KAGE_LOG_WARN, "mm %llu: the process is at its limit of mappings",
			(unsigned long long)k->mm->id);
		p = map_at(k, want, at);
	}
	if (p == MAP_FAILED)
		return -errno;
	one.hva = at;
	runs_set(&k->runs, &one);
	k->mapped_private |= want->kind != RUN_SHARED;
	err = register_fresh(k, want, at);
	if (err)
		env_log(k->env, KAGE_LOG_ERROR, "mm %llu gfn %llx: cannot trap: errno %d",
			(unsigned long long)k->mm->id, (unsigned long long)want->gfn.v, -err);
	return 0;
}

int mirror_map(struct kage_kvm *k, const struct run *want)
{
	int r = map_piece(k, want);

	if (r == 0 && want->kind != RUN_SHARED)
		map_uniform(kvm_hva(k, want->gfn), want->npages << PAGE_SHIFT);
	return r;
}

/* -- what the table says --------------------------------------------------------------- */

#define RUN_KEEP ((enum run_kind)3) /* whatever is there: the page is the host kernel's */

/* A frame of a page without W: mapped shared already, and nobody else's? */
static bool still_shared(const struct kage_kvm *k, gfn_t gfn, const struct mm_lookup *l)
{
	const struct run *run = runs_find(&k->runs, gfn);

	return run && run->kind == RUN_SHARED && pfn_eq(run_pfn(run, gfn), l->pfn) &&
	       (l->level > 0 || mm_exclusive(k->mm, gfn, l));
}

static void want_leaf(const struct kage_kvm *k, const struct region *reg, const struct mm_lookup *l,
		      struct run *w)
{
	bool shared = reg->kind == KAGE_REGION_FOREIGN || reg->flags & KAGE_REGION_EXTERNAL;

	w->pfn = l->pfn;
	w->kind = shared || l->writable || still_shared(k, w->gfn, l) ? RUN_SHARED : RUN_PRIVATE;
	if (pfn_is_zero(l->pfn)) {
		w->pfn = PFN_NONE;
		w->kind = RUN_ZERO;
	}
}

/* No entry: files show themselves, anonymous memory reads zero. */
static void want_none(const struct region *reg, struct run *w)
{
	const struct extent *e = atomic_load(&((struct region *)reg)->extent);

	w->kind = RUN_ZERO;
	w->pfn = PFN_NONE;
	if (reg->kind == KAGE_REGION_ANON)
		return;
	w->kind = reg->kind == KAGE_REGION_FOREIGN ? RUN_SHARED : RUN_PRIVATE;
	w->pfn = extent_pfn(e, w->gfn);
}

/* How a piece from gfn on ought to be mapped; false: not at all, there is no region. */
static bool page_want(const struct kage_kvm *k, gfn_t gfn, struct run *w)
{
	const struct region *reg;
	struct mm_lookup l;
	uint64_t span;

	rcu_enter();
	reg = mm_region(k->mm, gfn);
	l = mm_lookup(k->mm, gfn);
	*w = (struct run){.gfn = gfn, .npages = 1, .kind = RUN_KEEP};
	if (reg) {
		span = level_pages(MIN(l.level, 2u));
		w->npages = MIN(region_end(reg).v - gfn.v, span - gfn.v % span);
		if (entry_is_leaf(l.entry))
			want_leaf(k, reg, &l, w);
		else if (entry_is_none(l.entry))
			want_none(reg, w);
	}
	rcu_leave();
	return reg != NULL;
}

/* V6. How the granules from gfn on ought to be mapped; -EXDEV: the pages of the first are not to be had side by side. */
static int granules_want(const struct kage_kvm *k, gfn_t gfn, struct run *w)
{
	unsigned n = k->mirror.granule;
	int r = 0;

	if (n == 1 || (w->npages >= n && (w->kind == RUN_ZERO || w->pfn.v % n == 0) && w->kind != RUN_KEEP)) {
		w->npages = ALIGN_DOWN(w->npages, (uint64_t)n);
		return 0;
	}
	for (unsigned i = 1; i < n && w->kind != RUN_KEEP; i++) {
		struct run next;

		if (!page_want(k, gfn_add(gfn, i), &next) || next.kind == RUN_KEEP)
			w->kind = RUN_KEEP;
		else if (next.kind != w->kind || (w->kind != RUN_ZERO && next.pfn.v != w->pfn.v + i))
			r = -EXDEV;
	}
	if (w->kind != RUN_ZERO && w->kind != RUN_KEEP && w->pfn.v % n)
		r = -EXDEV;
	w->npages = n;
	return w->kind == RUN_KEEP ? 0 : r;
}

/* While a guest attaches, and nobody writes: a granule as anonymous memory, filled before anything traps there. */
static int map_gathered(struct kage_kvm *k, gfn_t gfn)
{
	struct run one = { .gfn = gfn, .npages = k->mirror.granule, .kind = RUN_ZERO, .hva = kvm_hva(k, gfn) }, page;
	size_t len = one.npages << PAGE_SHIFT;
	char *at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED)
		return -ENOMEM;
	for (unsigned i = 0; i < one.npages; i++)
		if (page_want(k, gfn_add(gfn, i), &page) && page.kind != RUN_ZERO && page.kind != RUN_KEEP)
			guest_copy_page(at + (i << PAGE_SHIFT), pfn_hva(k->pool, page.pfn));
	madvise(at, len, MADV_DONTFORK);
	madvise(at, len, MADV_DONTDUMP);
	if (mremap(at, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, one.hva) == MAP_FAILED) {
		munmap(at, len);
		return -ENOMEM;
	}
	runs_set(&k->runs, &one);
	k->gathered = true;
	return mirror_register(k, &one);
}

/* Pieces that are mapped one after the other. What lies around those of one window gets its flags in one go. */
struct sync {
	struct run piece; /* to be mapped; npages 0: none */
	int64_t pages;	  /* mapped */
	const struct window *window;
	gfn_t first, end; /* there are pieces without their flags in here; equal: none */
};

static void sync_uniform(struct sync *s)
{
	if (s->first.v < s->end.v)
		map_uniform(window_hva(s->window, s->first), (s->end.v - s->first.v) << PAGE_SHIFT);
	s->first = s->end = GFN(0);
}

static void sync_mapped(struct kage_kvm *k, struct sync *s)
{
	const struct window *w = window_find(k, s->piece.gfn);

	s->pages += (int64_t)s->piece.npages;
	if (s->piece.kind == RUN_SHARED)
		return;
	if (w != s->window)
		sync_uniform(s);
	if (s->first.v == s->end.v)
		s->first = s->piece.gfn;
	s->end = run_end(&s->piece);
	s->window = w;
}

static int piece_flush(struct kage_kvm *k, struct sync *s)
{
	int r;

	if (!s->piece.npages)
		return 0;
	r = map_piece(k, &s->piece);
	if (r == 0)
		sync_mapped(k, s);
	s->piece.npages = 0;
	return r;
}

int64_t mirror_sync(struct kage_kvm *k, gfn_t start, gfn_t end)
{
	struct sync s = {.pages = 0};
	uint64_t before = k->runs.count;
	int r = 0;

	while (r == 0 && start.v < end.v) {
		const struct run *cur = runs_find(&k->runs, start);
		const struct window *w = window_find(k, start);
		struct run want;

		if (!w || !page_want(k, start, &want)) {
			start = gfn_add(start, 1);
			continue;
		}
		r = granules_want(k, start, &want);
		want.npages = MIN(MIN(want.npages, end.v - start.v), w->gfn.v + w->npages - start.v);
		want.hva = window_hva(w, start);
		if (cur)
			want.npages = MIN(want.npages, run_end(cur).v - start.v);
		start = run_end(&want);
		if (r == -EXDEV && k->attaching) {
			r = piece_flush(k, &s);
			r = r ? r : map_gathered(k, want.gfn);
			continue;
		}
		if (r)
			break;
		if (want.kind == RUN_KEEP ||
		    (cur && cur->kind == want.kind && pfn_eq(run_pfn(cur, want.gfn), want.pfn)))
			continue;
		if (runs_join(&k->runs, &s.piece, &want)) {
			s.piece.npages += want.npages;
			continue;
		}
		r = piece_flush(k, &s);
		s.piece = want;
	}
	if (r == 0)
		r = piece_flush(k, &s);
	sync_uniform(&s);
	if (k->runs.count < before)
		atomic_fetch_add(&k->healed, before - k->runs.count);
	return r ? r : s.pages;
}

/* -- blocking writes -------------------------------------------------------------------- */

static struct blocked *blocked_overlap(struct kage_kvm *k, gfn_t start, gfn_t end)
{
	for (unsigned i = 0; i < BLOCKED_MAX; i++) {
		struct blocked *b = &k->blocked[i];

		if (b->used && b->start.v < end.v && start.v < b->end.v)
			return b;
	}
	return NULL;
}

/* W2. k->lock is held, and dropped while waiting. */
static int blocked_wait(struct kage_kvm *k, const struct kage_range *range, gfn_t start, gfn_t end)
{
	while (blocked_overlap(k, start, end)) {
		uint32_t seen = atomic_load(&k->unblocked);

		if (!(range->flags & KAGE_RANGE_BLOCKABLE))
			return -EAGAIN;
		lock_drop(&k->lock);
		word_wait(&k->unblocked, seen, UINT32_MAX);
		lock_take(&k->lock);
	}
	return 0;
}

/* Neighbouring runs of a window that are treated alike: one call of the kernel's for all. */
struct stretch {
	gfn_t gfn;
	uint64_t npages;
	uint64_t mode; /* as mirror_mode() */
	bool zero;     /* anonymous memory: what is not there cannot be protected, but for recent kernels */
	bool exact;    /* all first writes trap */
};

static bool stretch_grow(struct stretch *s, const struct stretch *next)
{
	if (s->npages && (s->gfn.v + s->npages != next->gfn.v || s->mode != next->mode || s->zero != next->zero ||
			  s->exact != next->exact))
		return false;
	if (!s->npages)
		*s = *next;
	else
		s->npages += next->npages;
	return true;
}

typedef int stretch_fn(struct kage_kvm *k, char *at, size_t len, const struct stretch *s);

static int stretch_call(struct kage_kvm *k, const struct stretch *s, stretch_fn *fn)
{
	char *at = s->npages ? kvm_hva(k, s->gfn) : NULL;

	return at ? fn(k, at, s->npages << PAGE_SHIFT, s) : 0;
}

/*
 * PRIVATE runs of an exact policy stay as they are: what is mapped there is protected, the rest traps. But
 * for pages that slipped by, before their mapping had been registered.
 */
static int each_stretch(struct kage_kvm *k, gfn_t start, gfn_t end, stretch_fn *fn)
{
	struct stretch s = { .npages = 0 };
	struct run run;
	int r = 0;

	while (r == 0 && runs_piece(&k->runs, start, end, &run)) {
		const struct window *w = window_find(k, run.gfn);
		struct stretch next = {
		    .gfn = run.gfn,
		    .npages = run.npages,
		    .mode = mirror_mode(k, &run),
		    .zero = run.kind == RUN_ZERO,
		    .exact = k->mirror.exact && run.kind == RUN_PRIVATE,
		};

		start = run_end(&run);
		if (s.npages && window_find(k, s.gfn) == w && stretch_grow(&s, &next))
			continue;
		r = stretch_call(k, &s, fn);
		s = next;
	}
	return r ? r : stretch_call(k, &s, fn);
}

static int stretch_protect(struct kage_kvm *k, char *at, size_t len, const struct stretch *s)
{
	struct slipped slipped = { k, s->mode };
	int r = 0;

	if (s->exact)
		return scan_private(&k->features, at, len, protect_slipped, &slipped);
	if (s->zero && !(s->mode & UFFDIO_REGISTER_MODE_MISSING) && !(k->uffd.features & UFFD_FEATURE_WP_UNPOPULATED))
		madvise(at, len, MADV_POPULATE_READ);
	if (!s->mode)
		r = uffd_register(&k->uffd, at, len, UFFDIO_REGISTER_MODE_WP);
	return r ? r : protect(k, at, len);
}

static int stretch_unprotect(struct kage_kvm *k, char *at, size_t len, const struct stretch *s)
{
	if (s->exact)
		return 0;
	if (s->mode)
		while (uffd_unprotect(&k->uffd, at, len) == -EAGAIN)
			sched_yield();
	else
		uffd_unregister(&k->uffd, at, len); /* and with it the protection */
	return 0;
}

static int stretch_wake(struct kage_kvm *k, char *at, size_t len, const struct stretch *s)
{
	uffd_wake(&k->uffd, at, len);
	return 0;
}

static int block(struct kage_kvm *k, struct blocked *b)
{
	int r = 0;

	if (k->detaching)
		return 0;
	b->protected = k->wp && !b->paused;
	if (b->protected)
		r = each_stretch(k, b->start, b->end, stretch_protect);
	if (r) {
		each_stretch(k, b->start, b->end, stretch_unprotect);
		each_stretch(k, b->start, b->end, stretch_wake);
		b->protected = false;
	}
	return r;
}

static int stretch_split(struct kage_kvm *k, char *at, size_t len, const struct stretch *s)
{
	return s->mode ? 0 : uffd_register(&k->uffd, at, len, UFFDIO_REGISTER_MODE_WP);
}

/* Contents are dropped, nothing is blocked: but what splits VMAs is done while it may still fail. */
static int split(struct kage_kvm *k, struct blocked *b)
{
	int r = each_stretch(k, b->start, b->end, stretch_split);

	b->split = r == 0;
	if (r)
		each_stretch(k, b->start, b->end, stretch_unprotect);
	return r;
}

static int pause_now(struct kage_kvm *k, bool *paused)
{
	int r = 0;

	lock_take(&k->pause_lock);
	if (k->paused == 0)
		r = k->config.pause ? k->config.pause(k->config.opaque) : -EOPNOTSUPP;
	k->paused += r == 0;
	*paused = r == 0;
	lock_drop(&k->pause_lock);
	return r;
}

static int pause_guest(struct kage_kvm *k, bool *paused)
{
	if ((READ_ONCE(k->wp) && !k->unblockable) || k->detaching)
		return 0;
	return pause_now(k, paused);
}

static void resume_guest(struct kage_kvm *k)
{
	lock_take(&k->pause_lock);
	if (--k->paused == 0 && k->config.resume)
		k->config.resume(k->config.opaque);
	lock_drop(&k->pause_lock);
}

/* The mirror's own changes replace no mapping: they only keep others from doing so meanwhile. */
static bool range_replaces(const struct kage_kvm *k, const struct kage_range *range)
{
	return range->owner != &k->mirror;
}

static struct blocked *blocked_new(struct kage_kvm *k, const struct kage_range *range, gfn_t start, gfn_t end)
{
	for (unsigned i = 0; i < BLOCKED_MAX; i++) {
		struct blocked *b = &k->blocked[i];

		if (b->used)
			continue;
		*b = (struct blocked){.used = true,
				      .start = start,
				      .end = end,
				      .id = range->id,
				      .reserved = range_replaces(k, range) ? MIN(end.v - start.v, BLOCK_PAGES) : 0};
		k->reserved += b->reserved;
		return b;
	}
	kage_assert(false); /* as many as the mm has changes */
	return NULL;
}

static void blocked_free(struct kage_kvm *k, struct blocked *b)
{
	k->reserved -= b->reserved;
	runs_trim(&k->runs, k->reserved);
	b->used = false;
	atomic_fetch_add(&k->unblocked, 1);
	word_wake(&k->unblocked);
}

/* An end that finds no mapping left takes what is kept back. So it has to be there when one begins. */
static int ballast_ready(struct kage_kvm *k)
{
	ballast_fill(k);
	return k->ballast ? 0 : -ENOMEM;
}

static int mirror_start(struct kage_notifier *n, const struct kage_range *range)
{
	struct kage_kvm *k = container_of(n, struct kage_kvm, notifier);
	gfn_t start = granule_down(k, gpa_gfn(GPA(range->start))), end = granule_up(k, gpa_gfn(GPA(range->end)));
	bool same = range->flags & KAGE_RANGE_SAME_CONTENT && range_replaces(k, range), paused = false;
	struct blocked *b;
	int r = 0;

	if (range->reason != KAGE_REASON_CLEAR && range->reason != KAGE_REASON_UNMAP)
		return 0;
	if (same)
		r = pause_guest(k, &paused);
	if (r)
		return -ETIMEDOUT;
	lock_take(&k->lock);
	r = blocked_wait(k, range, start, end);
	if (r == 0) {
		b = blocked_new(k, range, start, end);
		b->paused = paused;
		r = runs_reserve(&k->runs, k->reserved);
		if (r == 0 && range_replaces(k, range))
			r = ballast_ready(k);
		if (r == 0 && same)
			r = block(k, b);
		else if (r == 0 && range_replaces(k, range) && k->wp)
			r = split(k, b);
		if (!(range->flags & KAGE_RANGE_OPTIONAL))
			r = 0; /* contents are dropped, or nothing is mapped: a few runs, for which there always is memory */
		if (r)
			blocked_free(k, b);
	}
	lock_drop(&k->lock);
	if (r && paused)
		resume_guest(k);
	return r == 0 || r == -EAGAIN || r == -ENOMEM ? r : -ETIMEDOUT; /* what an optional change may be told */
}

static int found_any(void *arg, char *from, char *to)
{
	return 1;
}

/*
 * Under an exact policy a replacement is mapped first and registered then. Whether a write
 * came in between, which nobody heard of, is known after one more look; the change's caller settles it (mm_settle()).
 */
static int64_t replace(struct kage_kvm *k, struct blocked *b, gfn_t start, gfn_t end)
{
	bool watch = k->mirror.exact && b->protected;
	int64_t pages;
	char *at;

	if (!watch)
		return mirror_sync(k, start, end);
	k->mapped_private = false;
	atomic_fetch_add(&k->mirror.unsettled, 1);
	pages = mirror_sync(k, start, end);
	at = kvm_hva(k, start);
	if (at && k->mapped_private && scan_private(&k->features, at, (end.v - start.v) << PAGE_SHIFT, found_any, NULL) == 1) {
		k->slip = (struct gfn_range){ start, end };
		return pages;
	}
	atomic_fetch_sub(&k->mirror.unsettled, 1);
	return pages;
}

static bool mirror_slipped(struct mirror *m, gfn_t start, gfn_t end)
{
	struct kage_kvm *k = kvm_of(m);
	bool slipped;

	lock_take(&k->lock);
	slipped = k->slip.start.v < end.v && start.v < k->slip.end.v;
	if (slipped)
		k->slip = (struct gfn_range){ GFN(0), GFN(0) };
	lock_drop(&k->lock);
	return slipped;
}

static void mirror_end(struct kage_notifier *n, const struct kage_range *range)
{
	struct kage_kvm *k = container_of(n, struct kage_kvm, notifier);
	gfn_t start = granule_down(k, gpa_gfn(GPA(range->start))), end = granule_up(k, gpa_gfn(GPA(range->end)));
	bool paused;
	struct blocked *b = NULL;
	int64_t pages;

	if (range->reason != KAGE_REASON_CLEAR && range->reason != KAGE_REASON_UNMAP)
		return;
	lock_take(&k->lock);
	for (unsigned i = 0; !b && i < BLOCKED_MAX; i++)
		if (k->blocked[i].used && k->blocked[i].id == range->id)
			b = &k->blocked[i];
	kage_assert(b); /* N5: our start returned 0 */
	pages = range_replaces(k, range) ? replace(k, b, start, end) : 0;
	if (pages < 0)
		env_log(k->env, KAGE_LOG_WARN, "mm %llu gfn %llx: a mapping failed, errno %d",
			    (unsigned long long)k->mm->id, (unsigned long long)start.v, (int)-pages);
	if (b->split)
		each_stretch(k, start, end, stretch_unprotect);
	if (b->protected) {
		if (pages != (int64_t)(end.v - start.v))
			each_stretch(k, start, end, stretch_unprotect);
		each_stretch(k, start, end, stretch_wake);
	}
	WRITE_ONCE(k->mirror.scarce, k->runs.count + 8 > mirror_share(k));
	paused = b->paused;
	blocked_free(k, b);
	lock_drop(&k->lock);
	if (paused)
		resume_guest(k);
}

/* -- contents that are dropped ------------------------------------------------------------- */

static void mirror_drop(struct mirror *m, gfn_t start, gfn_t end)
{
	struct kage_kvm *k = kvm_of(m);
	const struct run *run;
	int r = 0;

	lock_take(&k->lock);
	for (gfn_t at = start; r == 0 && at.v < end.v && (run = runs_from(&k->runs, at)) && run->gfn.v < end.v;) {
		const struct window *w = window_find(k, run->gfn);
		gfn_t from = GFN(MAX(at.v, run->gfn.v)), to = GFN(MIN(end.v, w->gfn.v + w->npages));
		struct run zero = { .gfn = from, .npages = to.v - from.v, .kind = RUN_ZERO };

		r = mirror_map(k, &zero);
		at = to;
	}
	lock_drop(&k->lock);
	if (r)
		env_corrupt(k->env, "mm %llu gfn %llx: a mapping failed, errno %d", (unsigned long long)k->mm->id,
			    (unsigned long long)start.v, -r);
}

/* -- the snapshot of a clone ---------------------------------------------------------------- */

struct freeze {
	const struct gfn_range *kept;
	unsigned n;
};

/* The end of the first piece from gfn on that is kept, or is not; *kept says which. */
static gfn_t freeze_piece(const struct kage_kvm *k, const struct freeze *f, gfn_t gfn, gfn_t end, bool *kept)
{
	const struct region *reg = mm_region(k->mm, gfn);

	*kept = false;
	if (reg) {
		end = GFN(MIN(end.v, region_end(reg).v));
		*kept = reg->flags & KAGE_REGION_EXTERNAL || reg->kind == KAGE_REGION_FOREIGN;
	}
	if (*kept)
		return end;
	for (unsigned i = 0; i < f->n; i++) {
		if (f->kept[i].start.v <= gfn.v && gfn.v < f->kept[i].end.v) {
			*kept = true;
			return GFN(MIN(end.v, f->kept[i].end.v));
		}
		if (f->kept[i].start.v > gfn.v)
			end = GFN(MIN(end.v, f->kept[i].start.v));
	}
	return end;
}

static int freeze_run(struct kage_kvm *k, const struct freeze *f, struct run run)
{
	gfn_t end = run_end(&run), next;
	int r = 0;

	for (gfn_t at = run.gfn; r == 0 && at.v < end.v; at = next) {
		struct run piece = {.gfn = at, .pfn = run_pfn(&run, at), .kind = RUN_PRIVATE};
		bool kept;

		next = freeze_piece(k, f, at, end, &kept);
		piece.npages = next.v - at.v;
		if (kept)
			continue;
		r = runs_reserve(&k->runs, k->reserved + 1);
		if (r == 0)
			r = mirror_map(k, &piece);
	}
	return r;
}

static int mirror_freeze(struct mirror *m, const struct gfn_range *kept, unsigned n)
{
	struct kage_kvm *k = kvm_of(m);
	struct freeze f = {kept, n};
	const struct run *run;
	gfn_t at = GFN(0);
	int r = 0;

	lock_take(&k->lock);
	while (r == 0 && (run = runs_from(&k->runs, at))) {
		struct run copy = *run;

		at = run_end(&copy);
		if (copy.kind == RUN_SHARED)
			r = freeze_run(k, &f, copy);
	}
	lock_drop(&k->lock);
	return r;
}

/* -- dirty logs ----------------------------------------------------------------------------- */

static void mark(void *arg, gfn_t gfn, uint64_t npages)
{
	struct kage_kvm *k = arg;

	mm_mark_dirty(k->mm, gfn, npages);
}

/* k->slots_lock held. */
int mirror_take_log(struct kage_kvm *k, gfn_t start, gfn_t end, const struct dirty_left *left)
{
	if (k->ring)
		return rings_harvest(&k->rings, &k->slots, mark, k);
	return slots_dirty_but(&k->slots, start, end, left, mark, k);
}

static int mirror_harvest(struct mirror *m, gfn_t start, gfn_t end, const struct dirty_left *left)
{
	struct kage_kvm *k = kvm_of(m);
	int r;

	lock_take(&k->slots_lock);
	r = mirror_take_log(k, start, end, left);
	lock_drop(&k->slots_lock);
	return r;
}

/* What is wanted is looked at under the lock: the last who opens or closes a log sees all that came before. */
int mirror_track(struct mirror *m)
{
	struct kage_kvm *k = kvm_of(m);
	int r;

	lock_take(&k->slots_lock);
	r = slots_log(&k->slots, mm_dirty_logged(k->mm));
	lock_drop(&k->slots_lock);
	return r;
}

/* -- around changes of regions ---------------------------------------------------------------- */

static int mirror_stop(struct mirror *m)
{
	struct kage_kvm *k = kvm_of(m);
	bool paused;

	return k->config.pause ? pause_now(k, &paused) : 0; /* else its vCPUs do not run: kvm.h asks for it */
}

static void mirror_go(struct mirror *m)
{
	struct kage_kvm *k = kvm_of(m);

	if (k->config.pause)
		resume_guest(k);
}

static bool mirror_shows(struct mirror *m, gfn_t gfn, pfn_t pfn)
{
	struct kage_kvm *k = kvm_of(m);
	const struct run *run;
	bool shows;

	lock_take(&k->lock);
	run = runs_find(&k->runs, gfn);
	shows = !run || (run->kind == RUN_SHARED && pfn_eq(run_pfn(run, gfn), pfn)); /* no window: nothing shows anything */
	lock_drop(&k->lock);
	return shows;
}

static void *mirror_window(struct mirror *m, gfn_t gfn)
{
	return kvm_hva(kvm_of(m), gfn);
}

const struct kage_notifier_ops kvm_notifier_ops = {
    .invalidate_range_start = mirror_start,
    .invalidate_range_end = mirror_end,
};

const struct mirror_ops kvm_mirror_ops = {
    .regions_prepare = window_prepare,
    .regions_commit = window_commit,
    .regions_cancel = window_cancel,
    .diverged = mirror_diverged,
    .each_diverged = mirror_each_diverged,
    .window = mirror_window,
    .drop = mirror_drop, .freeze = mirror_freeze,
    .harvest = mirror_harvest,
    .track = mirror_track,
	.stop = mirror_stop, .go = mirror_go, .slipped = mirror_slipped, .shows = mirror_shows,
    .reconcile = mirror_reconcile,
    .step = mirror_step,
    .audit = mirror_audit,
    .dump = mirror_dump,
};
