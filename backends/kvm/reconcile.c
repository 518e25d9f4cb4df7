/* SPDX-License-Identifier: MIT */
/*
 * Reconciling: finding pages whose COW the kernel broke, and what steps do for mirrors.
 *
 * A page of a MAP_PRIVATE or anonymous mapping has diverged when the kernel
 * says that it is private (scan.c); without a source for that, when its bytes are
 * not the frame's. Pages of SHARED runs cannot diverge.
 *
 * Mappings are counted, not measured: vm.max_map_count is one budget for the
 * process, of which the engine takes a part, split among its mirrors. A mirror that
 * comes near its share widens: it takes the 2 MiB with the most runs home as a whole, one
 * mapping from then on.
 *
 * Locks taken: k->lock for the scans; fn of mirror_each_diverged() is called without.
 */
#include <time.h>

#include "base/guest.h"
#include "internal.h"
#include "scan.h"

struct found {
	const char *base; /* address of bit 0 */
	uint64_t *map;
	unsigned npages;
};

static int found_run(void *arg, char *from, char *to)
{
	struct found *f = arg;

	for (; from < to; from += PAGE_SIZE) {
		uint64_t i = (uint64_t)(from - f->base) >> PAGE_SHIFT;

		if (i < f->npages)
			bit_set(f->map, i);
	}
	return 0;
}

/*
 * Without a word from the kernel: what is not the frame's content is the guest's own. A page that is there needs no
 * look, which may trap: the kernel's by the table, or one with a frame that lies gathered in the window (map_gathered()).
 */
static bool page_differs(struct kage_kvm *k, const struct run *piece, gfn_t gfn)
{
	pfn_t pfn = piece->kind == RUN_ZERO ? PFN_ZERO : run_pfn(piece, gfn);
	const struct region *reg;
	struct mm_lookup l;
	bool absent;

	rcu_enter();
	reg = mm_region(k->mm, gfn);
	l = mm_lookup(k->mm, gfn);
	absent = piece->kind == RUN_ZERO && reg && reg->flags & KAGE_REGION_TRAP && !k->mirror.abandoned; /* looking would trap */
	rcu_leave();
	if (entry_state(l.entry) == ENTRY_HOST_PRIVATE ||
	    (piece->kind == RUN_ZERO && entry_is_leaf(l.entry) && !pfn_is_zero(l.pfn)))
		return true;
	return !absent && guest_compare(kvm_hva(k, gfn), pfn_hva(k->pool, pfn), PAGE_SIZE) != 0;
}

static void compare_range(struct kage_kvm *k, const struct run *piece, struct found *f)
{
	for (gfn_t g = piece->gfn; g.v < run_end(piece).v; g.v++)
		if (page_differs(k, piece, g))
			found_run(f, kvm_hva(k, g), kvm_hva(k, g) + PAGE_SIZE);
}

/*
 * What may have diverged from `at` on, as one piece of one window: SHARED runs cannot, but
 * asking the kernel about short ones too is cheaper than asking twice.
 */
static bool suspects_from(const struct kage_kvm *k, gfn_t at, gfn_t end, struct run *s)
{
	const struct window *w;
	struct run piece;
	gfn_t last;

	while (runs_piece(&k->runs, at, end, s) && s->kind == RUN_SHARED)
		at = run_end(s);
	if (!runs_piece(&k->runs, at, end, s))
		return false;
	w = window_find(k, s->gfn);
	end = GFN(MIN(end.v, w->gfn.v + w->npages));
	last = run_end(s);
	for (at = last; runs_piece(&k->runs, at, end, &piece) && piece.gfn.v == at.v; at = run_end(&piece)) {
		if (piece.kind == RUN_SHARED && piece.npages >= BLOCK_PAGES)
			break;
		if (piece.kind != RUN_SHARED)
			last = run_end(&piece);
	}
	s->npages = last.v - s->gfn.v;
	return true;
}

/* Without an answer contents are compared. That there is no source for answers is known; anything else is told. */
static bool scan_failed(struct kage_kvm *k, int r)
{
	if (r && r != -EOPNOTSUPP)
		env_log(k->env, KAGE_LOG_WARN, "mm %llu: the kernel does not say what is private: errno %d",
			(unsigned long long)k->mm->id, -r);
	return r != 0;
}

/* k->lock held. */
static void range_diverged(struct kage_kvm *k, gfn_t start, unsigned npages, uint64_t *map)
{
	gfn_t end = gfn_add(start, npages);
	struct found f = { .map = map, .npages = npages };
	struct run s;
	bool compare = false;

	memset(map, 0, (npages + 63) / 64 * sizeof(map[0]));
	for (gfn_t at = start; suspects_from(k, at, end, &s); at = run_end(&s)) {
		f.base = kvm_hva(k, s.gfn) - ((s.gfn.v - start.v) << PAGE_SHIFT);
		compare |= scan_failed(k, scan_private(&k->features, kvm_hva(k, s.gfn), s.npages << PAGE_SHIFT, found_run, &f));
	}
	for (gfn_t at = start; runs_piece(&k->runs, at, end, &s); at = run_end(&s)) {
		f.base = kvm_hva(k, s.gfn) - ((s.gfn.v - start.v) << PAGE_SHIFT);
		if (s.kind == RUN_SHARED)
			for (uint64_t i = s.gfn.v - start.v; i < run_end(&s).v - start.v; i++)
				bit_clear(map, i); /* protected where nothing is: looks private */
		else if (compare)
			compare_range(k, &s, &f);
	}
}

/*
 * A protected page that is not there looks private to who may not see frames (scan.h). Touched, it is there. True if
 * there was any.
 */
static bool unmark(struct kage_kvm *k, gfn_t start, unsigned npages, const uint64_t *map)
{
	bool any = false;

	for (unsigned i = 0; i < npages; i++) {
		const char *at = bit_test(map, i) ? kvm_hva(k, gfn_add(start, i)) : NULL;

		if (at)
			(void)READ_ONCE(*at);
		any |= at != NULL;
	}
	return any;
}

void mirror_diverged(struct mirror *m, gfn_t start, unsigned npages, uint64_t map[MIRROR_WORDS])
{
	struct kage_kvm *k = kvm_of(m);

	memset(map, 0, MIRROR_WORDS * sizeof(map[0]));
	lock_take(&k->lock);
	range_diverged(k, start, npages, map);
	if (!k->features.marker_frame && !m->exact && unmark(k, start, npages, map))
		range_diverged(k, start, npages, map);
	lock_drop(&k->lock);
}

/* 128 MiB: what is asked for at once. */
#define SCAN_BLOCKS 64
#define SCAN_PAGES (SCAN_BLOCKS * BLOCK_PAGES)

/* The next range from `at` on that has suspects, as long as a scan. False: none before `end`. */
static bool scan_next(struct kage_kvm *k, gfn_t at, gfn_t end, gfn_t *base)
{
	struct run s;

	if (!suspects_from(k, at, end, &s))
		return false;
	*base = GFN(ALIGN_DOWN(s.gfn.v, BLOCK_PAGES));
	return true;
}

static bool block_found(const uint64_t *map, gfn_t base, gfn_t start, gfn_t end, uint64_t out[MIRROR_WORDS])
{
	uint64_t any = 0;

	for (unsigned w = 0; w < MIRROR_WORDS; w++)
		any |= out[w] = map[w];
	if (!any)
		return false;
	for (unsigned i = 0; i < BLOCK_PAGES; i++) /* only what was asked for */
		if (base.v + i < start.v || base.v + i >= end.v)
			bit_clear(out, i);
	return true;
}

int mirror_each_diverged(struct mirror *m, gfn_t start, gfn_t end,
			 int (*fn)(struct mm *mm, gfn_t base, const uint64_t map[MIRROR_WORDS], void *arg), void *arg)
{
	struct kage_kvm *k = kvm_of(m);
	uint64_t map[SCAN_BLOCKS * MIRROR_WORDS];
	gfn_t at = start, base;
	bool any = true;
	int r = 0;

	while (r == 0 && any) {
		lock_take(&k->lock);
		any = scan_next(k, at, end, &base);
		if (any)
			range_diverged(k, base, SCAN_PAGES, map);
		lock_drop(&k->lock);
		for (unsigned b = 0; r == 0 && any && b < SCAN_BLOCKS; b++) {
			uint64_t one[MIRROR_WORDS];
			gfn_t first = gfn_add(base, b * BLOCK_PAGES);

			if (block_found(&map[b * MIRROR_WORDS], first, start, end, one))
				r = fn(k->mm, first, one, arg);
		}
		at = gfn_add(base, SCAN_PAGES);
	}
	return r;
}

/* -- reconciling --------------------------------------------------------------------------- */

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int64_t mirror_reconcile(struct mirror *m, bool adopt)
{
	struct kage_kvm *k = kvm_of(m);
	int64_t left = mm_reconcile(k->mm, GFN(0), GFN((uint64_t)1 << GFN_BITS), adopt), anon;

	if (left < 0)
		return left;
	anon = scan_anon_rss(&k->features);
	atomic_store(&k->anon_seen, anon < 0 ? 0 : anon);
	atomic_store(&k->host_private, (uint64_t)left);
	atomic_store(&k->reconciled_ns, now_ns());
	atomic_fetch_add(&k->reconciles, 1);
	return left;
}

/* -- mappings are scarce ---------------------------------------------------------------------- */

uint64_t mirror_share(const struct kage_kvm *k)
{
	const struct host *h = k->mm->host;
	uint32_t n = atomic_load(&h->mirrors);

	return atomic_load(&h->map_budget) / 8 * 7 / (n ? n : 1);
}

/* The 2 MiB of guest memory with the most runs; 0 runs: none has several. k->lock held. */
static uint64_t densest(struct kage_kvm *k, gfn_t *base)
{
	uint64_t best = 1, n = 0, block = UINT64_MAX;
	const struct run *run;
	gfn_t at = GFN(0);

	for (; (run = runs_from(&k->runs, at)); at = run_end(run)) {
		uint64_t b = run->gfn.v / BLOCK_PAGES;

		n = b == block ? n + 1 : 1;
		block = b;
		if (n > best) {
			best = n;
			*base = GFN(b * BLOCK_PAGES);
		}
	}
	return best > 2 ? best : 0;
}

static int widen(struct kage_kvm *k, gfn_t base)
{
	struct brlock_held held = brlock_read(&k->mm->range);
	int r = mm_adopt_block(k->mm, base);

	brlock_read_drop(&k->mm->range, held);
	return r;
}

/* Until the guest is well below its share; each round at most as long as it helps. */
static void mirror_widen(struct kage_kvm *k)
{
	uint64_t before = UINT64_MAX, now;
	gfn_t base = GFN(0);

	for (;;) {
		lock_take(&k->lock);
		now = k->runs.count;
		if (now + now / 4 <= mirror_share(k) || now >= before || !densest(k, &base))
			now = 0;
		WRITE_ONCE(k->mirror.scarce, k->runs.count + 8 > mirror_share(k));
		lock_drop(&k->lock);
		if (!now || widen(k, base))
			return;
		before = now;
	}
}

/* -- a step of the engine ------------------------------------------------------------------------ */

#define ANON_SHARE ((int64_t)16 << 20) /* this much more anonymous memory in the process: look whose it is   \
					*/

void mirror_step(struct mirror *m)
{
	struct kage_kvm *k = kvm_of(m);
	int64_t anon = scan_anon_rss(&k->features), seen = atomic_load(&k->anon_seen);

	if (anon < 0 || anon > seen + ANON_SHARE)
		mirror_reconcile(m, m->exact); /* a page that slipped by an exact policy comes home at once */
	if (m->blocks)
		mirror_widen(k);
	lock_take(&k->lock);
	ballast_fill(k);
	lock_drop(&k->lock);
}
