/* SPDX-License-Identifier: MIT */
/*
 * Merging against a reference: guests whose pages have known contents, a
 * model of what each pass has to do, and after each pass every counter and the
 * number of frames compared.
 *
 *   struct page   what the model knows of one guest page
 *   struct world  an engine, guests, the model of all their pages
 *
 * The model (invariants of merging, KSM's words):
 *  G1  a page is looked at in pass n, and a candidate from then on until it is written, if it was not written during the
 *      whole of pass n - 1 or since, and is not left alone in pass n.
 *  G2  candidates of one domain with equal contents share one stable frame (or
 *      the zero frame, which is not counted); a content that occurs once keeps
 *      its frame and is "unshared", unless its frame is stable already.
 *  G3  pinned and unmergeable pages are never candidates.
 *  G4  frames in use == distinct contents of candidates (zero apart) in each
 *      domain + pages that are set aside: pinned, unmergeable, written lately.
 *  G5  a try fails (the page is volatile in this pass) if the page was written while it waited to be quiet, or between
 *      the pass that looked at it and the next, which it had left something to do. After the k-th failure on end it is left alone for 2^(k-1) passes,
 *      at most 64. A page that lasted from the pass that looked at it to the next begins anew.
 *  G6  a guest's first two passes go before the others, and judge nobody: all was written just before.
 *  G7  to pin a page is to write it, as far as merging goes: what it knew of the page is old.
 *  G8  ksm_bytes grows, and falls, with what the engine has from its allocator in a step that does nothing else than
 *      merge; profit is what is saved less that.
 *
 * Environment: KAGE_SEED (else the day's), KAGE_ROUNDS (of churn). One thread; no locks.
 */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>

#include <kage/kage.h>

#include "rng.h"

#define PAGE	 4096
#define GUESTS	 6
#define PAGES	 320 /* of the largest guest */
#define CONTENTS 48
#define BASE	 ((uint64_t)1 << 21)
#define BLOCK	 ((uint64_t)1 << 21)

struct page {
	bool touched, pinned, unmergeable, stable, zero;
	unsigned content;
	bool written; /* since the last pass */
	bool waits;   /* it had been, at the last pass */
	bool later;   /* quiet, but pinned or left alone */
	bool seen;    /* looked at since it was written */
	uint64_t tried;	 /* passes completed after the pass that looked at it; 0: long ago */
	unsigned failed; /* tries on end */
	uint64_t until;	 /* passes completed before the pass that does not leave it alone any more */
};

struct world {
	const char *what;
	struct rng rng;
	struct kage_engine *engine;
	struct kage_vm *vm[GUESTS];
	struct kage_vcpu *vcpu[GUESTS];
	unsigned domain[GUESTS], guests, pages;
	struct page page[GUESTS][PAGES];
	uint64_t passes, merges, unmerges, breaks;
	uint64_t allocated; /* bytes that the engine has from us */
	bool left; /* the last pass left pages to the next */
	bool no_zero;
	unsigned max_sharing;
};

static uint64_t seed;

static void fail(const struct world *w, const char *fmt, ...) __attribute__((format(printf, 2, 3), noreturn));
static void fail(const struct world *w, const char *fmt, ...)
{
	va_list ap;

	printf("merge: %s: FAILED after pass %llu: ", w->what, (unsigned long long)w->passes);
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\nrepeat: KAGE_SEED=%llu\n", (unsigned long long)seed);
	fflush(stdout);
	abort();
}

#define EQ(w, got, want)                                                                                     \
	do {                                                                                                 \
		long long got_ = (long long)(got), want_ = (long long)(want);                                \
		if (got_ != want_)                                                                           \
			fail(w, "line %d: " #got " is %lld, should be %lld", __LINE__, got_, want_);         \
	} while (0)

/* -- contents ---------------------------------------------------------------- */

/* 0 is zero. Neighbours (2n, 2n + 1) differ in the last byte only. */
static void fill(uint8_t *buf, unsigned content)
{
	memset(buf, 0, PAGE);
	if (content == 0)
		return;
	for (unsigned i = 0; i < PAGE / 8; i++) {
		uint64_t v = (content / 2 + 1) * UINT64_C(0x9e3779b97f4a7c15) + i;

		memcpy(buf + 8 * i, &v, 8);
	}
	buf[PAGE - 1] = content;
}

static uint64_t gpa_of(unsigned page)
{
	return BASE + (uint64_t)page * PAGE;
}

static void written(struct page *p)
{
	p->written = true;
	p->seen = false;
}

/* It has been given a frame of its own, if it shared one. */
static void broken(struct world *w, struct page *p)
{
	w->breaks += p->stable || p->zero;
	p->stable = p->zero = false;
}

/* Half of the guests are written by a vCPU, whose TLB remembers the right to write. */
static void put(struct world *w, unsigned g, unsigned p, unsigned content)
{
	uint8_t buf[PAGE];

	fill(buf, content);
	if (w->vcpu[g] != NULL)
		EQ(w, kage_vcpu_store(w->vcpu[g], gpa_of(p), buf, PAGE, NULL), KAGE_OK);
	else
		EQ(w, kage_vm_write(w->vm[g], gpa_of(p), buf, PAGE), KAGE_OK);
	w->page[g][p].content = content;
	w->page[g][p].touched = true;
	broken(w, &w->page[g][p]);
	written(&w->page[g][p]);
}

static void check_contents(struct world *w)
{
	uint8_t want[PAGE], got[PAGE];

	for (unsigned g = 0; g < w->guests; g++) {
		for (unsigned p = 0; p < w->pages; p++) {
			fill(want, w->page[g][p].content);
			if (w->vcpu[g] != NULL && p % 2 && w->page[g][p].touched) /* a load would touch it */
				EQ(w, kage_vcpu_load(w->vcpu[g], gpa_of(p), got, PAGE, NULL), KAGE_OK);
			else
				EQ(w, kage_vm_read(w->vm[g], gpa_of(p), got, PAGE), KAGE_OK);
			if (memcmp(want, got, PAGE) != 0)
				fail(w, "guest %u page %u lost its contents (%u)", g, p,
				     w->page[g][p].content);
		}
	}
}

/* -- the model ---------------------------------------------------------------- */

static bool candidate(const struct world *w, const struct page *p)
{
	return p->touched && !p->pinned && !p->unmergeable && p->seen;
}

/* G1, G5, G6: the pass after `w->passes` others comes to the page. True: a try has failed. */
static bool model_visit(const struct world *w, struct page *p)
{
	bool off = w->passes < p->until, recent = w->left && p->tried && p->tried == w->passes, young = w->passes < 2;
	bool failed = p->written && (p->waits || recent) && !off && !young;
	bool quiet = (p->waits || p->later) && !p->written, looked = quiet && !off;

	if (p->tried && !p->written)
		p->failed = 0;
	if (failed)
		p->until = w->passes + 1 + (p->failed < 6 ? 1u << p->failed : 64);
	p->failed += failed;
	p->tried = looked && !young && !p->pinned ? w->passes + 1 : 0;
	p->waits = p->written;
	p->later = (quiet && off) || (looked && p->pinned);
	p->seen |= looked && !p->pinned;
	p->written = false;
	return failed;
}

struct expected {
	uint64_t frames, shared, sharing, unshared, volatiles, backed_off, zero, chains, dups;
};

static void model_zero(struct world *w, unsigned g, struct page *p, struct expected *e)
{
	e->zero++;
	if (!p->zero)
		w->merges++;
	p->zero = true;
}

/* One content of one domain: who shares it now? */
static void model_class(struct world *w, unsigned domain, unsigned content, struct expected *e)
{
	unsigned members = 0, fresh = 0, frames, most = w->max_sharing ? w->max_sharing : 1 << 18;

	for (unsigned g = 0; g < w->guests; g++) {
		for (unsigned i = 0; w->domain[g] == domain && i < w->pages; i++) {
			struct page *p = &w->page[g][i];

			if (p->content != content || !candidate(w, p))
				continue;
			if (content == 0 && (!w->no_zero || p->zero)) {
				model_zero(w, g, p, e);
				continue;
			}
			members++;
			fresh += !p->stable;
		}
	}
	frames = (members + most - 1) / most;
	e->frames += frames;
	if (members == 1 && fresh == 1)
		e->unshared++;
	if (members == 0 || (members == 1 && fresh == 1))
		return;
	e->chains += frames > 1;
	e->dups += frames > 1 ? frames : 0;
	e->shared += frames;
	e->sharing += members - frames;
	w->merges += fresh - (fresh == members ? frames : 0); /* the first became the stable frame */
	for (unsigned g = 0; g < w->guests; g++)
		for (unsigned i = 0; w->domain[g] == domain && i < w->pages; i++)
			if (w->page[g][i].content == content && candidate(w, &w->page[g][i]) &&
			    !w->page[g][i].zero)
				w->page[g][i].stable = true;
}

static struct expected model_pass(struct world *w)
{
	struct expected e = {0};
	bool left = false;

	for (unsigned g = 0; g < w->guests; g++) {
		for (unsigned i = 0; i < w->pages; i++) {
			struct page *p = &w->page[g][i];

			e.backed_off += w->passes < p->until;
			e.volatiles += model_visit(w, p);
			left |= p->waits || p->later;
		}
	}
	w->left = left;
	w->passes++;
	for (unsigned d = 0; d < 3; d++)
		for (unsigned c = 0; c < CONTENTS; c++)
			model_class(w, d, c, &e);
	for (unsigned g = 0; g < w->guests; g++) {
		for (unsigned i = 0; i < w->pages; i++) {
			struct page *p = &w->page[g][i];

			if (!p->touched || candidate(w, p))
				continue;
			e.frames++;
		}
	}
	return e;
}

/* -- one pass, compared ---------------------------------------------------------- */

static void audit_line(void *opaque, const char *line)
{
	printf("audit: %s\n", line);
}

static void audit(struct world *w)
{
	struct kage_audit a = {.size = sizeof(a), .report = audit_line};

	EQ(w, kage_engine_audit(w->engine, &a), KAGE_OK);
	EQ(w, a.violations, 0);
}

static struct kage_stats stats(struct world *w, struct kage_vm *vm)
{
	struct kage_stats s = {.size = sizeof(s)};

	EQ(w, kage_stats_get(w->engine, vm, &s), KAGE_OK);
	return s;
}

static void tune(struct world *w)
{
	EQ(w,
	   kage_engine_tune(w->engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE,
						.no_zero_pages = w->no_zero, .max_sharing = w->max_sharing)),
	   KAGE_OK);
}

/* One pass in one step, or in many with a small budget. */
static void step(struct world *w, unsigned budget)
{
	struct kage_progress p = {.size = sizeof(p)};
	uint64_t merged = 0, before = stats(w, NULL).ksm_merges;

	do {
		EQ(w, kage_engine_step(w->engine, budget ? KAGE_CFG(kage_budget, .pages = budget) : NULL, &p),
		   KAGE_OK);
		merged += p.pages_merged;
		if (budget && p.pages_scanned > budget)
			fail(w, "a step for %u pages scanned %llu", budget,
			     (unsigned long long)p.pages_scanned);
	} while (p.more);
	EQ(w, p.passes, w->passes + 1);
	EQ(w, stats(w, NULL).ksm_merges - before, merged);
}

static void check_guests(struct world *w)
{
	for (unsigned g = 0; g < w->guests; g++) {
		struct kage_stats s = stats(w, w->vm[g]);
		uint64_t stable = 0, zero = 0, own = 0;

		for (unsigned i = 0; i < w->pages; i++) {
			struct page *p = &w->page[g][i];

			stable += p->stable;
			zero += p->zero;
			own += p->touched && !p->stable && !p->zero;
		}
		EQ(w, s.pages_shared_merge, stable);
		EQ(w, s.pages_zero, zero);
		EQ(w, s.pages_private, own);
		EQ(w, s.pages_untouched, w->pages - stable - zero - own);
		EQ(w, s.ksm_pages_sharing, stable);
		EQ(w, s.ksm_zero_pages, zero);
		EQ(w, s.ksm_general_profit, (int64_t)((stable + zero) * PAGE) - (int64_t)s.ksm_bytes);
	}
}

static void check_counters(struct world *w, const struct expected *e)
{
	struct kage_stats s = stats(w, NULL);

	EQ(w, s.frames_used, e->frames);
	EQ(w, s.ksm_pages_shared, e->shared);
	EQ(w, s.ksm_pages_sharing, e->sharing);
	EQ(w, s.ksm_pages_unshared, e->unshared);
	EQ(w, s.ksm_pages_volatile, e->volatiles);
	EQ(w, s.ksm_pages_backed_off, e->backed_off);
	EQ(w, s.ksm_zero_pages, e->zero);
	EQ(w, s.ksm_full_scans, w->passes);
	EQ(w, s.ksm_merges, w->merges);
	EQ(w, s.ksm_cow_breaks, w->breaks);
	EQ(w, s.ksm_unmerges, w->unmerges);
	EQ(w, s.ksm_stable_chains, e->chains);
	EQ(w, s.ksm_stable_dups, e->dups);
	EQ(w, s.ksm_general_profit, (int64_t)((e->sharing + e->zero) * PAGE) - (int64_t)s.ksm_bytes);
}

/* Nothing is left to be freed of what was before. */
static void settle(struct world *w)
{
	EQ(w, kage_engine_tune(w->engine, KAGE_CFG(kage_tune, .flags = 0)), KAGE_OK);
	EQ(w, kage_engine_step(w->engine, NULL, NULL), KAGE_OK);
	tune(w);
}

static void pass(struct world *w, unsigned budget)
{
	struct expected e;
	uint64_t rest;

	settle(w);
	rest = w->allocated - stats(w, NULL).ksm_bytes;
	step(w, budget);
	EQ(w, w->allocated - stats(w, NULL).ksm_bytes, rest); /* G8 */
	e = model_pass(w);
	check_counters(w, &e);
	check_guests(w);
	audit(w);
	check_contents(w);
}

/* -- worlds ----------------------------------------------------------------------- */

static void add_guest(struct world *w, unsigned domain, bool vcpu, uint32_t flags)
{
	unsigned g = w->guests++;
	struct kage_region r = {
	    .size = sizeof(r),
	    .flags = KAGE_REGION_MERGEABLE | flags,
	    .gpa = BASE,
	    .len = w->pages * PAGE,
	};

	w->domain[g] = domain;
	for (unsigned i = 0; i < w->pages && i < PAGES; i++)
		w->page[g][i].written = true;
	EQ(w, kage_vm_create(w->engine, KAGE_CFG(kage_vm_config, .merge_domain = domain), &w->vm[g]),
	   KAGE_OK);
	EQ(w, kage_vm_map(w->vm[g], &r), KAGE_OK);
	if (vcpu)
		EQ(w,
		   kage_vcpu_create(w->vm[g], KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI), &w->vcpu[g]),
		   KAGE_OK);
}

static void *count_alloc(void *opaque, size_t bytes)
{
	struct world *w = opaque;
	void *p = NULL;

	if (posix_memalign(&p, 64, bytes))
		return NULL;
	w->allocated += bytes;
	return memset(p, 0, bytes);
}

static void count_free(void *opaque, void *ptr, size_t bytes)
{
	struct world *w = opaque;

	w->allocated -= ptr ? bytes : 0;
	free(ptr);
}

static void open_engine(struct world *w, const char *what, enum kage_backing backing)
{
	memset(w, 0, sizeof(*w));
	w->what = what;
	w->rng = rng_seed(seed);
	w->pages = PAGES;
	EQ(w,
	   kage_engine_create(KAGE_CFG(kage_engine_config, .backing = backing, .seed = seed + 1,
				       .alloc = {.alloc = count_alloc, .free = count_free, .opaque = w}),
			      &w->engine),
	   KAGE_OK);
	tune(w);
}

static void close_engine(struct world *w)
{
	for (unsigned g = 0; g < w->guests; g++) {
		kage_vcpu_destroy(w->vcpu[g]);
		EQ(w, kage_vm_destroy(w->vm[g]), KAGE_OK);
	}
	EQ(w, kage_engine_step(w->engine, NULL, NULL), KAGE_OK);
	EQ(w, stats(w, NULL).frames_used, 0);
	EQ(w, stats(w, NULL).ksm_pages_shared, 0);
	EQ(w, kage_engine_destroy(w->engine), KAGE_OK);
	printf("merge: %s: %llu passes, %llu merges\n", w->what, (unsigned long long)w->passes,
	       (unsigned long long)w->merges);
	fflush(stdout);
}

/* Zero and the first contents often, most others rarely. */
static unsigned some_content(struct world *w)
{
	unsigned dice = rng_below(&w->rng, 100);

	if (dice < 15)
		return 0;
	if (dice < 60)
		return 1 + rng_below(&w->rng, 6);
	return 1 + rng_below(&w->rng, CONTENTS - 1);
}

static void populate(struct world *w, unsigned percent)
{
	for (unsigned g = 0; g < w->guests; g++)
		for (unsigned p = 0; p < w->pages; p++)
			if (rng_chance(&w->rng, percent))
				put(w, g, p, some_content(w));
}

static void four_guests(struct world *w, uint32_t flags)
{
	add_guest(w, 0, false, flags);
	add_guest(w, 1, true, flags);
	add_guest(w, 0, true, flags);
	add_guest(w, 1, false, flags);
}

/* -- tests ------------------------------------------------------------------------- */

/* Pass 1 arms, pass 2 merges everything, pass 3 finds nothing to do. */
static void test_two_passes(struct world *w, enum kage_backing backing)
{
	open_engine(w, "two passes", backing);
	four_guests(w, KAGE_REGION_NOHUGE);
	populate(w, 80);
	pass(w, 0);
	EQ(w, stats(w, NULL).ksm_merges, 0);
	pass(w, 0);
	EQ(w, stats(w, NULL).ksm_merges != 0, 1);
	pass(w, 0);
	close_engine(w);
}

/* The same in many small steps. */
static void test_budget(struct world *w, enum kage_backing backing)
{
	open_engine(w, "small budget", backing);
	four_guests(w, KAGE_REGION_NOHUGE);
	populate(w, 80);
	pass(w, 64);
	pass(w, 17);
	pass(w, 100);
	close_engine(w);
}

static bool quiet(const struct world *w, const struct page *p)
{
	return p->touched && p->seen;
}

static void pin_some(struct world *w)
{
	unsigned g = rng_below(&w->rng, w->guests), i = rng_below(&w->rng, w->pages), n = 1;
	struct page *p = &w->page[g][i];
	struct iovec iov;

	if (p->pinned) {
		EQ(w, kage_vm_unpin(w->vm[g], gpa_of(i), PAGE), KAGE_OK);
		p->pinned = false;
		put(w, g, i, p->content);
		return;
	}
	if (!quiet(w, p))
		return;
	EQ(w, kage_vm_pin(w->vm[g], gpa_of(i), PAGE, 0, &iov, &n), KAGE_OK);
	EQ(w, n, 1);
	p->pinned = true;
	broken(w, p);
	written(p); /* G7 */
}

static void discard_some(struct world *w)
{
	unsigned g = rng_below(&w->rng, w->guests), i = rng_below(&w->rng, w->pages);
	struct page *p = &w->page[g][i];

	if (p->pinned || !quiet(w, p))
		return;
	EQ(w, kage_vm_advise(w->vm[g], gpa_of(i), PAGE, KAGE_ADVICE_DISCARD), KAGE_OK);
	written(p);
	p->touched = p->stable = p->zero = false;
	p->content = 0;
}

static void write_some(struct world *w)
{
	unsigned g = rng_below(&w->rng, w->guests), i = rng_below(&w->rng, w->pages);

	if (!w->page[g][i].pinned)
		put(w, g, i, some_content(w));
}

/* Random writes, pins and discards between passes; every counter after every pass. */
static void test_churn(struct world *w, enum kage_backing backing)
{
	open_engine(w, "churn", backing);
	four_guests(w, KAGE_REGION_NOHUGE);
	populate(w, 70);
	for (unsigned round = 0; round < env_number("KAGE_ROUNDS", 24); round++) {
		for (unsigned i = rng_below(&w->rng, 120); i > 0; i--)
			write_some(w);
		for (unsigned i = 0; i < 4; i++)
			pin_some(w);
		for (unsigned i = 0; i < 6; i++)
			discard_some(w);
		pass(w, round % 3 == 2 ? 50 : 0);
	}
	for (unsigned g = 0; g < w->guests; g++)
		for (unsigned p = 0; p < w->pages; p++)
			if (w->page[g][p].pinned)
				EQ(w, kage_vm_unpin(w->vm[g], gpa_of(p), PAGE), KAGE_OK);
	close_engine(w);
}

/* Pages that are written between all passes are left alone, for longer each time, and merge once they are quiet. */
static void test_volatile(struct world *w, enum kage_backing backing)
{
	/* 40 pages that fail, then are left alone for 1, 2, 4 passes; G6 */
	static const unsigned fails[] = {0, 0, 40, 0, 40, 0, 0, 40, 0, 0, 0, 0, 40};
	unsigned rounds = sizeof(fails) / sizeof(fails[0]);

	open_engine(w, "volatile", backing);
	four_guests(w, KAGE_REGION_NOHUGE);
	populate(w, 100);
	for (unsigned round = 0; round < rounds; round++) {
		for (unsigned p = 0; p < 40; p++)
			put(w, p % w->guests, p, 3);
		pass(w, 0);
		EQ(w, stats(w, NULL).ksm_pages_volatile, fails[round]);
		EQ(w, stats(w, NULL).ksm_pages_backed_off, round > 1 && !fails[round] ? 40 : 0);
	}
	for (unsigned round = 0; round < 8; round++) { /* the fourth failure was the last */
		EQ(w, w->page[0][0].seen, false);
		pass(w, 0);
		EQ(w, stats(w, NULL).ksm_pages_volatile, 0);
		EQ(w, stats(w, NULL).ksm_pages_backed_off, 40);
	}
	pass(w, 0);
	EQ(w, w->page[0][0].seen, true);
	EQ(w, stats(w, NULL).ksm_pages_backed_off, 0);
	close_engine(w);
}

/* Without back-off a page is looked at as soon as it has been quiet for a pass, however often it has failed. */
static void test_no_backoff(struct world *w, enum kage_backing backing)
{
	open_engine(w, "no back-off", backing);
	EQ(w, kage_engine_tune(w->engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE | KAGE_TUNE_NO_BACKOFF)), KAGE_OK);
	add_guest(w, 0, false, KAGE_REGION_NOHUGE);
	populate(w, 100);
	for (unsigned round = 0; round < 8; round++) {
		put(w, 0, 5, 3);
		step(w, 0);
		w->passes++;
		EQ(w, stats(w, NULL).ksm_pages_volatile, round >= 2);
		EQ(w, stats(w, NULL).ksm_pages_backed_off, 0);
	}
	for (unsigned round = 0; round < 2; round++) {
		EQ(w, stats(w, w->vm[0]).pages_private != 0, true);
		step(w, 0);
		w->passes++;
	}
	w->merges = stats(w, NULL).ksm_merges;
	close_engine(w);
}

static void advise_all(struct world *w, unsigned g, enum kage_advice advice)
{
	EQ(w, kage_vm_advise(w->vm[g], BASE, w->pages * PAGE, advice), KAGE_OK);
	for (unsigned i = 0; i < w->pages; i++) {
		struct page *p = &w->page[g][i];

		p->unmergeable = advice == KAGE_ADVICE_UNMERGEABLE;
		w->unmerges += p->unmergeable && (p->stable || p->zero);
		if (p->unmergeable)
			broken(w, p);
		written(p);
	}
}

/* UNMERGEABLE gives every page a frame of its own; MERGEABLE lets them merge again. */
static void test_unmerge(struct world *w, enum kage_backing backing)
{
	uint64_t before;

	open_engine(w, "unmerge", backing);
	four_guests(w, KAGE_REGION_NOHUGE);
	populate(w, 80);
	pass(w, 0);
	pass(w, 0);
	before = stats(w, NULL).ksm_unmerges;
	advise_all(w, 2, KAGE_ADVICE_UNMERGEABLE);
	EQ(w, stats(w, NULL).ksm_unmerges - before, w->unmerges);
	check_guests(w);
	check_contents(w);
	pass(w, 0);
	pass(w, 0);
	advise_all(w, 2, KAGE_ADVICE_MERGEABLE);
	pass(w, 0);
	pass(w, 0);
	close_engine(w);
}

/* A write to a merged page breaks that one page off; all others keep the frame. */
static void test_break(struct world *w, enum kage_backing backing)
{
	struct kage_stats s;

	open_engine(w, "break", backing);
	four_guests(w, KAGE_REGION_NOHUGE);
	for (unsigned g = 0; g < w->guests; g++)
		for (unsigned p = 0; p < w->pages; p++)
			put(w, g, p, p % 3); /* zero and two others */
	pass(w, 0);
	pass(w, 0);
	EQ(w, stats(w, NULL).frames_used, 4); /* two contents in two domains */
	for (unsigned p = 0; p < 30; p++)
		put(w, p % w->guests, p, 7);
	s = stats(w, NULL);
	EQ(w, s.frames_used, 4 + 30);
	EQ(w, s.cow_breaks, 30);
	EQ(w, s.ksm_zero_pages, 4 * ((PAGES + 2) / 3) - 10);
	check_guests(w);
	check_contents(w);
	pass(w, 0);
	EQ(w, stats(w, NULL).frames_used, 4 + 30);
	pass(w, 0);
	EQ(w, stats(w, NULL).frames_used, 4 + 2);
	close_engine(w);
}

static void test_no_zero(struct world *w, enum kage_backing backing)
{
	open_engine(w, "no zero pages", backing);
	w->no_zero = true;
	tune(w);
	four_guests(w, KAGE_REGION_NOHUGE);
	populate(w, 80);
	pass(w, 0);
	pass(w, 0);
	EQ(w, stats(w, NULL).ksm_zero_pages, 0);
	close_engine(w);
}

static void test_max_sharing(struct world *w, enum kage_backing backing)
{
	open_engine(w, "max sharing", backing);
	w->max_sharing = 8;
	tune(w);
	add_guest(w, 0, false, KAGE_REGION_NOHUGE);
	add_guest(w, 0, true, KAGE_REGION_NOHUGE);
	for (unsigned p = 0; p < 64; p++) {
		put(w, 0, p, 5);
		put(w, 1, p, 1 + p % 2);
	}
	pass(w, 0);
	pass(w, 0);
	EQ(w, stats(w, NULL).ksm_pages_shared, 16);
	close_engine(w);
}

/* Frames by G4 alone, for guests that are quiet. */
static uint64_t model_frames(const struct world *w)
{
	struct world *copy = malloc(sizeof(*copy));
	uint64_t frames;

	*copy = *w;
	frames = model_pass(copy).frames;
	free(copy);
	return frames;
}

/*
 * Clones of guests that are merged already: nothing is added until somebody
 * writes. Counters of entries are left out: a shared table counts once.
 */
static void test_clone(struct world *w, enum kage_backing backing)
{
	uint64_t frames;

	open_engine(w, "clones of merged guests", backing);
	four_guests(w, KAGE_REGION_NOHUGE);
	populate(w, 80);
	pass(w, 0);
	pass(w, 0);
	frames = stats(w, NULL).frames_used;
	for (unsigned c = 4; c < GUESTS; c++) {
		EQ(w, kage_vm_clone(w->vm[c - 4], NULL, &w->vm[c]), KAGE_OK);
		w->domain[c] = w->domain[c - 4];
		memcpy(w->page[c], w->page[c - 4], sizeof(w->page[c]));
		for (unsigned p = 0; p < w->pages; p++)
			w->page[c][p].written = true; /* for a pass that sees it first */
		w->guests++;
	}
	EQ(w, stats(w, NULL).frames_used, frames);
	check_contents(w);
	for (unsigned p = 0; p < 20; p++) {
		put(w, 4, p, 9);
		put(w, 1, p + 40, 0);
	}
	check_contents(w);
	audit(w);
	for (unsigned i = 0; i < 5; i++) {
		step(w, 0);
		model_pass(w);
		audit(w);
		check_contents(w);
	}
	EQ(w, stats(w, NULL).frames_used, model_frames(w));
	w->merges = stats(w, NULL).ksm_merges;
	close_engine(w);
}

/* What was set aside by a pin, or made private by WILLNEED, merges (again) once nothing stands in the way. */
static void test_set_aside(struct world *w, enum kage_backing backing)
{
	struct iovec iov[10];
	unsigned n = 10;
	uint64_t frames;

	open_engine(w, "set aside", backing);
	add_guest(w, 0, false, KAGE_REGION_NOHUGE);
	add_guest(w, 0, true, KAGE_REGION_NOHUGE);
	for (unsigned p = 0; p < 100; p++) {
		put(w, 0, p, 1 + p % 4);
		put(w, 1, p, 1 + p % 4);
	}
	EQ(w, kage_vm_pin(w->vm[0], gpa_of(0), 10 * PAGE, 0, iov, &n), KAGE_OK);
	for (unsigned p = 0; p < 10; p++)
		w->page[0][p].pinned = true;
	pass(w, 0);
	pass(w, 0);
	EQ(w, stats(w, NULL).ksm_pages_skipped, 10);
	frames = stats(w, NULL).frames_used;
	EQ(w, frames, 4 + 10);
	EQ(w, kage_vm_unpin(w->vm[0], gpa_of(0), 10 * PAGE), KAGE_OK);
	EQ(w, kage_vm_advise(w->vm[1], gpa_of(50), 10 * PAGE, KAGE_ADVICE_WILLNEED), KAGE_OK);
	EQ(w, stats(w, NULL).frames_used, frames + 10);
	for (unsigned i = 0; i < 3; i++) {
		step(w, 0);
		w->passes++;
		audit(w);
	}
	check_contents(w);
	EQ(w, stats(w, NULL).frames_used, 4);
	w->merges = stats(w, NULL).ksm_merges;
	close_engine(w);
}

/* Guests of two domains with the same contents: twice the frames, never one in common. */
static void test_domains(struct world *w, enum kage_backing backing)
{
	open_engine(w, "domains", backing);
	for (unsigned g = 0; g < 3; g++)
		add_guest(w, g, g == 1, KAGE_REGION_NOHUGE);
	for (unsigned g = 0; g < 3; g++)
		for (unsigned p = 0; p < w->pages; p++)
			put(w, g, p, 1 + p % 11);
	pass(w, 0);
	pass(w, 0);
	EQ(w, stats(w, NULL).frames_used, 33);
	close_engine(w);
}

/* -- blocks: frames only, for a block's untouched pages may count as zero or as nothing -- */

static void put_block(struct world *w, unsigned g, unsigned p, unsigned content)
{
	uint8_t buf[PAGE];

	fill(buf, content);
	EQ(w, kage_vm_write(w->vm[g], BLOCK + (uint64_t)p * PAGE, buf, PAGE), KAGE_OK);
}

static void check_block(struct world *w, unsigned g, unsigned p, unsigned content)
{
	uint8_t want[PAGE], got[PAGE];

	fill(want, content);
	EQ(w, kage_vm_read(w->vm[g], BLOCK + (uint64_t)p * PAGE, got, PAGE), KAGE_OK);
	if (memcmp(want, got, PAGE) != 0)
		fail(w, "guest %u page %u of a block lost its contents", g, p);
}

/* Regions that large entries map; `stride` 1: every page is written. */
static void test_blocks(struct world *w, enum kage_backing backing, unsigned stride)
{
	open_engine(w, stride == 1 ? "full blocks" : "sparse blocks", backing);
	w->pages = 1024;
	add_guest(w, 0, false, 0);
	add_guest(w, 0, false, 0);
	for (unsigned g = 0; g < 2; g++)
		for (unsigned p = 0; p < w->pages; p += stride)
			put_block(w, g, p, 1 + (p / stride + g) % 13);
	for (unsigned i = 0; i < 2; i++) {
		EQ(w, kage_engine_step(w->engine, NULL, NULL), KAGE_OK);
		audit(w);
	}
	EQ(w, stats(w, NULL).frames_used, 13);
	EQ(w, stats(w, NULL).ksm_pages_shared, 13);
	EQ(w, stats(w, NULL).ksm_pages_sharing, 2 * ((w->pages + stride - 1) / stride) - 13);
	for (unsigned g = 0; g < 2; g++)
		for (unsigned p = 0; p < w->pages; p++)
			check_block(w, g, p, p % stride ? 0 : 1 + (p / stride + g) % 13);
	close_engine(w);
}

int main(void)
{
	static struct world w;

	seed = seed_of_today();
	printf("merge: seed %llu\n", (unsigned long long)seed);
	for (int b = KAGE_BACKING_ANON; b <= KAGE_BACKING_MEMFD; b++) {
		test_two_passes(&w, b);
		test_budget(&w, b);
		test_churn(&w, b);
		test_volatile(&w, b);
		test_no_backoff(&w, b);
		test_unmerge(&w, b);
		test_break(&w, b);
		test_no_zero(&w, b);
		test_max_sharing(&w, b);
		test_domains(&w, b);
		test_clone(&w, b);
		test_set_aside(&w, b);
		test_blocks(&w, b, 1);
		test_blocks(&w, b, 5);
	}
	return 0;
}
