/* SPDX-License-Identifier: MIT */
/*
 * Proportional shares and the memory counters against brute force: after each of many random
 * histories (clones of clones, writes, merging, discards, ends of guests; single pages and blocks)
 * every table of every guest is walked page by page, and each frame's bytes are divided by
 * the number of pages that were found on it. What counters say of the pool is compared
 * with a look at every frame there is, and at every page of the frame array.
 *
 *   struct found   one page's frame, as the walk met it
 *
 * Environment: KAGE_SEED, KAGE_ROUNDS. One thread; no locks.
 */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <kage/kage.h>

#include "api/engine.h"
#include "api/vm.h"
#include "mm/region.h"
#include "rng.h"

#define PAGE	4096
#define GUESTS	9
#define SMALL	96   /* pages of the region that has entries of 4 KiB only */
#define LARGE	1024 /* pages of the one that blocks map, at 1 GiB */
#define LARGE_AT ((uint64_t)1 << 30)
#define FRAMES	(GUESTS * (SMALL + LARGE))

struct found {
	uint64_t pfn, guest;
	bool stable;
};

struct world {
	struct rng rng;
	struct kage_engine *engine;
	struct kage_vm *vm[GUESTS];
	struct found found[FRAMES];
	unsigned count;
};

static uint64_t seed, checks;

static void die(const char *what, unsigned line, long long got, long long want)
{
	printf("share: line %u: %s is %lld, should be %lld\nrepeat: KAGE_SEED=%llu\n", line, what, got, want,
	       (unsigned long long)seed);
	fflush(stdout);
	abort();
}

#define EQ(got, want)                                                                     \
	do {                                                                              \
		long long got_ = (long long)(got), want_ = (long long)(want);             \
		checks++;                                                                 \
		if (got_ != want_)                                                        \
			die(#got, __LINE__, got_, want_);                                 \
	} while (0)

/* -- histories ------------------------------------------------------------------------- */

static void put(struct kage_vm *vm, uint64_t gpa, uint64_t content)
{
	uint64_t buf[PAGE / 8];

	for (unsigned i = 0; i < PAGE / 8; i++)
		buf[i] = content ? content * UINT64_C(0x9e3779b97f4a7c15) + i : 0;
	EQ(kage_vm_write(vm, gpa, buf, PAGE), KAGE_OK);
}

static uint64_t some_gpa(struct world *w)
{
	return rng_chance(&w->rng, 60) ? rng_below(&w->rng, SMALL) * PAGE : LARGE_AT + rng_below(&w->rng, LARGE) * PAGE;
}

static struct kage_vm **some_guest(struct world *w, bool there)
{
	for (unsigned i = rng_below(&w->rng, GUESTS), n = 0; n < GUESTS; n++, i = (i + 1) % GUESTS)
		if ((w->vm[i] != NULL) == there)
			return &w->vm[i];
	return NULL;
}

static void create(struct world *w)
{
	struct kage_vm **vm = some_guest(w, false);

	if (vm == NULL)
		return;
	EQ(kage_vm_create(w->engine, KAGE_CFG(kage_vm_config, .merge_domain = rng_below(&w->rng, 2)), vm), KAGE_OK);
	EQ(kage_vm_map(*vm, KAGE_CFG(kage_region, .len = SMALL * PAGE, .flags = KAGE_REGION_MERGEABLE | KAGE_REGION_NOHUGE)),
	   KAGE_OK);
	EQ(kage_vm_map(*vm, KAGE_CFG(kage_region, .gpa = LARGE_AT, .len = LARGE * PAGE, .flags = KAGE_REGION_MERGEABLE)),
	   KAGE_OK);
}

static void clone(struct world *w)
{
	struct kage_vm **from = some_guest(w, true), **to = some_guest(w, false);

	if (from != NULL && to != NULL)
		EQ(kage_vm_clone(*from, NULL, to), KAGE_OK);
}

static void end(struct world *w)
{
	struct kage_vm **vm = some_guest(w, true);

	if (vm != NULL)
		EQ(kage_vm_destroy(*vm), KAGE_OK);
	if (vm != NULL)
		*vm = NULL;
}

static void write_some(struct world *w)
{
	struct kage_vm **vm = some_guest(w, true);

	for (unsigned i = rng_below(&w->rng, 60); vm != NULL && i > 0; i--)
		put(*vm, some_gpa(w), rng_below(&w->rng, 12));
}

static void discard(struct world *w)
{
	struct kage_vm **vm = some_guest(w, true);

	if (vm != NULL)
		EQ(kage_vm_advise(*vm, some_gpa(w), PAGE, KAGE_ADVICE_DISCARD), KAGE_OK);
}

static void step(struct world *w)
{
	EQ(kage_engine_step(w->engine, rng_chance(&w->rng, 30) ? KAGE_CFG(kage_budget, .pages = 40) : NULL, NULL), KAGE_OK);
}

static void history(struct world *w)
{
	for (unsigned i = 0; i < 20; i++) {
		unsigned dice = rng_below(&w->rng, 100);

		if (dice < 12)
			create(w);
		else if (dice < 30)
			clone(w);
		else if (dice < 36)
			end(w);
		else if (dice < 66)
			write_some(w);
		else if (dice < 72)
			discard(w);
		else
			step(w);
	}
}

/* -- brute force ------------------------------------------------------------------------ */

static void find_page(struct world *w, unsigned g, uint64_t gfn)
{
	struct pool *pool = w->engine->pool;
	struct mm_lookup l;
	uint64_t there[8];

	rcu_enter();
	l = mm_lookup(&w->vm[g]->mm, GFN(gfn));
	rcu_leave();
	if (!entry_is_leaf(l.entry) || pfn_is_zero(l.pfn))
		return;
	pool_populated(pool, l.pfn, 1, there);
	if (pool_extent(pool, l.pfn) != NULL && !(there[0] & 1))
		return; /* a block's page that nobody touched */
	w->found[w->count++] = (struct found){
		.pfn = l.pfn.v,
		.guest = g,
		.stable = l.level == 0 && frame_kind(pfn_frame(pool, l.pfn)) == FRAME_STABLE,
	};
}

static int by_frame(const void *a, const void *b)
{
	const struct found *x = a, *y = b;

	return (x->pfn > y->pfn) - (x->pfn < y->pfn);
}

static void find_all(struct world *w)
{
	w->count = 0;
	for (unsigned g = 0; g < GUESTS; g++) {
		for (uint64_t i = 0; w->vm[g] != NULL && i < SMALL; i++)
			find_page(w, g, i);
		for (uint64_t i = 0; w->vm[g] != NULL && i < LARGE; i++)
			find_page(w, g, LARGE_AT / PAGE + i);
	}
	qsort(w->found, w->count, sizeof(w->found[0]), by_frame);
}

struct expected {
	long double bytes, merge, clone;
	uint64_t own, shared, merged;
};

/* Frames in use; what each guest's part of them is. */
static uint64_t divide(const struct world *w, struct expected *e, uint64_t *stable)
{
	uint64_t frames = 0;

	for (unsigned i = 0, end; i < w->count; i = end, frames++) {
		for (end = i; end < w->count && w->found[end].pfn == w->found[i].pfn; end++)
			;
		for (unsigned j = i; j < end; j++) {
			struct expected *x = &e[w->found[j].guest];
			long double part = (long double)PAGE / (end - i);

			x->bytes += part;
			x->own += end - i == 1 && !w->found[i].stable;
			x->shared += end - i > 1 || w->found[i].stable;
			x->merged += w->found[i].stable;
			if (w->found[i].stable)
				x->merge += part;
			else if (end - i > 1)
				x->clone += part;
		}
		*stable += w->found[i].stable;
	}
	return frames;
}

/* Every frame of every section, whatever lists and counters say of it. */
struct census {
	uint64_t free, pending, tables, sections;
};

static void look_at_block(const struct pool *pool, const struct section *sec, uint64_t first, unsigned block, struct census *c)
{
	bool arena = sec->arena != NULL;

	if (arena && !(sec->used >> block & 1)) {
		c->free += sec->hole >> block & 1 ? 0 : BLOCK_PAGES;
		return;
	}
	for (uint64_t i = 0; i < BLOCK_PAGES; i++) {
		const struct frame *f = pfn_frame(pool, PFN(first + i));
		uint64_t pages = (uint64_t)1 << frame_order(f);

		switch (frame_kind(f)) {
		case FRAME_FREE:
			c->free += arena ? pages : 0;
			break;
		case FRAME_CACHED:
			c->free++;
			break;
		case FRAME_PENDING:
			c->pending += pages;
			break;
		case FRAME_TABLE:
			c->tables++;
			break;
		default:
			break;
		}
	}
}

static struct census look_at_frames(const struct pool *pool)
{
	struct census c = {0};

	for (uint64_t i = 0; i < pool->npages / SECTION_PAGES; i++) {
		const struct section *sec = pool->sections[i];

		c.sections += sec != NULL;
		for (unsigned b = 0; sec != NULL && b < SECTION_BLOCKS; b++)
			if (sec->arena != NULL || sec->block[b].extent != NULL)
				look_at_block(pool, sec, i * SECTION_PAGES + b * BLOCK_PAGES, b, &c);
	}
	return c;
}

/* Pages of the whole frame array that are there; UINT64_MAX: QEMU's user mode has no mincore() for what is reserved. */
static uint64_t frame_array_bytes(const struct pool *pool)
{
	static bool said;
	uint64_t pages = pool->npages * sizeof(struct frame) / PAGE, bytes = 0;
	unsigned char *there = malloc(pages);

	if (mincore(pool->frames, pages * PAGE, there)) {
		if (!said)
			printf("skipped: bytes_metadata: mincore() of the frame array: %s; run on a kernel\n", strerror(errno));
		said = true;
		free(there);
		return UINT64_MAX;
	}
	for (uint64_t i = 0; i < pages; i++)
		bytes += there[i] & 1 ? PAGE : 0;
	free(there);
	return bytes;
}

/* `settled`: nothing waits for a grace period, neither frames nor sections that leave. */
static void check_pool(struct world *w, const struct kage_stats *s, bool settled)
{
	struct census c = look_at_frames(w->engine->pool);
	uint64_t array;

	EQ(s->frames_pending, c.pending);
	EQ(s->frames_free, c.free);
	if (!settled)
		return;
	EQ(s->frames_pending, 0);
	EQ(s->frames_table, c.tables);
	array = frame_array_bytes(w->engine->pool);
	if (array != UINT64_MAX)
		EQ(s->bytes_metadata, array + c.sections * sizeof(struct section));
}

static bool near(uint64_t got, long double want)
{
	checks++;
	return (long double)got >= want - 1.01L && (long double)got <= want + 1.01L;
}

static void check_share(const struct kage_share *s, const struct expected *e)
{
	if (!near(s->bytes, e->bytes) || !near(s->bytes_merge, e->merge) || !near(s->bytes_clone, e->clone))
		die("bytes", __LINE__, (long long)s->bytes, (long long)e->bytes);
	EQ(s->pages_private, e->own);
	EQ(s->pages_shared, e->shared);
}

/* The classes of a guest's pages, counted by kage_stats_get(). */
static void check_guest(struct world *w, unsigned g, const struct expected *e)
{
	struct kage_stats s = {.size = sizeof(s)};

	EQ(kage_stats_get(w->engine, w->vm[g], &s), KAGE_OK);
	EQ(s.pages_private, e->own);
	EQ(s.pages_shared_merge, e->merged);
	EQ(s.pages_shared_clone, e->shared - e->merged);
	EQ(s.pages_mapped, e->own + e->shared + s.pages_zero);
	EQ(s.ksm_pages_sharing, e->merged);
	EQ(s.ksm_zero_pages, s.pages_zero);
}

static void check(struct world *w)
{
	struct kage_stats s = {.size = sizeof(s)};
	struct expected e[GUESTS] = {0};
	struct kage_share share[GUESTS], one;
	struct kage_vm *vms[GUESTS];
	uint64_t frames, sum = 0, stable = 0;
	unsigned n = 0;

	EQ(kage_stats_get(w->engine, NULL, &s), KAGE_OK);
	check_pool(w, &s, false);
	while (pool_reap(w->engine->pool) + defer_run(&w->engine->env.defer))
		;
	EQ(kage_stats_get(w->engine, NULL, &s), KAGE_OK);
	check_pool(w, &s, true);
	find_all(w);
	frames = divide(w, e, &stable);
	EQ(s.frames_used, frames);
	EQ(s.ksm_pages_shared, stable);
	for (unsigned g = 0; g < GUESTS; g++)
		if (w->vm[g] != NULL)
			vms[n++] = w->vm[g];
	if (n == 0)
		return;
	EQ(kage_share_take(vms, n, share), KAGE_OK);
	for (unsigned g = 0, i = 0; g < GUESTS; g++) {
		if (w->vm[g] == NULL)
			continue;
		check_share(&share[i], &e[g]);
		check_guest(w, g, &e[g]);
		sum += share[i].bytes;
		EQ(kage_share_take(&w->vm[g], 1, &one), KAGE_OK); /* alone or with others: the same */
		EQ(memcmp(&one, &share[i++], sizeof(one)), 0);
	}
	if (sum + n < frames * PAGE || sum > frames * PAGE + n)
		die("sum", __LINE__, (long long)sum, (long long)(frames * PAGE));
}

static void run(enum kage_backing backing)
{
	static struct world w;
	uint64_t rounds = env_number("KAGE_ROUNDS", 40);

	memset(&w, 0, sizeof(w));
	w.rng = rng_seed(seed + backing);
	EQ(kage_engine_create(KAGE_CFG(kage_engine_config, .backing = backing, .seed = seed + 1,
				      .address_space = (uint64_t)1 << 36), &w.engine), KAGE_OK);
	EQ(kage_engine_tune(w.engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)), KAGE_OK);
	create(&w);
	for (uint64_t i = 0; i < rounds; i++) {
		history(&w);
		check(&w);
	}
	for (unsigned g = 0; g < GUESTS; g++)
		EQ(kage_vm_destroy(w.vm[g]), KAGE_OK);
	EQ(kage_engine_destroy(w.engine), KAGE_OK);
}

int main(void)
{
	seed = env_number("KAGE_SEED", 3);
	run(KAGE_BACKING_ANON);
	run(KAGE_BACKING_MEMFD);
	printf("share: seed %llu, %llu checks\n", (unsigned long long)seed, (unsigned long long)checks);
	return 0;
}
