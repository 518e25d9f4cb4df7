/* SPDX-License-Identifier: MIT */
/*
 * What a pass costs once everything is known: over memory that nobody wrote, and
 * when 1 % of it was written since the last pass.
 *
 * A page is read at the earliest in the pass after the one that finds it
 * written, so that it has been quiet for one whole pass. "Within one pass" is
 * meant from there: the pass that hears of the writes, and one more. ksmd
 * needs as many: it reads a page twice before it believes it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__x86_64__) && __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h> /* picks AVX where there is some */
#else
#include <xxhash.h>
#endif

#include "merge.h"

#define SAME_PAGES 4096 /* made equal in pairs */
#define FOR_SURE   3	/* passes after which all is known */

/* The n-th of distinct pages in random order. */
static uint64_t random_page(const struct contents *c, uint64_t n)
{
	return n * 0x9e3779b1u % c->pages; /* pages: a power of two */
}

static uint64_t key_overlaid(const struct contents *c, unsigned guest, uint64_t page)
{
	return c->overlay[page] ? c->overlay[page] : c->seed + page;
}

static struct contents contents_written(uint64_t bytes)
{
	struct contents c = contents_unique(1, bytes);

	c.key = key_overlaid;
	c.overlay = must_map(calloc(c.pages, sizeof(*c.overlay)), "memory");
	return c;
}

static void know_all(struct ours *o, struct run *r)
{
	uint64_t unshared;

	*r = (struct run){.ok = true};
	ours_tune(o, true);
	for (unsigned i = 0; i < FOR_SURE; i++)
		ours_pass(o, NULL, NULL);
	unshared = ours_stats(o).ksm_pages_unshared;
	run_check(r, unshared == o->contents.pages, "Kage does not know every page as unique");
}

/* ksmd's CPU of a pass over the same memory, ns a page; after two passes, when it knows it all. */
static bool pass_theirs(const struct contents *c, struct series *peer, unsigned passes)
{
	struct theirs t;
	struct run r;

	theirs_create(&t, c);
	theirs_passes(&t, 2, passes, &r, peer);
	theirs_check(&t, &r);
	theirs_destroy(&t);
	trace_free(&r.trace);
	return r.ok;
}

/* -- nothing is written ------------------------------------------------------------------- */

/* Pages become equal in pairs, at random; two passes later each pair is one frame. */
static void make_equal(struct ours *o, struct run *r, uint64_t *passes)
{
	const struct contents *c = &o->contents;
	uint64_t pairs = (c->pages < 4 * SAME_PAGES ? c->pages / 4 : SAME_PAGES) / 2, merged = 0;

	for (uint64_t i = 0; i < 2 * pairs; i++) {
		uint64_t page = random_page(c, i + 12345);

		c->overlay[page] = ((uint64_t)1 << 40) + i / 2;
		ours_write(o, 0, page, c->overlay[page]);
	}
	for (*passes = 0; *passes < 2 && merged < pairs; ++*passes)
		ours_pass(o, &merged, NULL);
	run_check(r, merged == pairs, "pages that became equal were not merged within one pass of quiet");
	run_check(r, ours_stats(o).frames_used == c->pages - pairs, "Kage left another number of frames");
}

static void steady_still(const struct bench *b, const char *name, uint64_t bytes)
{
	struct contents c = contents_written(size_of_case(bytes));
	struct row row = {.name = name,
			  .unit = "ns",
			  .peer = "a page of a pass of ksmd",
			  .goal = GOAL_RATIO,
			  .limit = 1000};
	unsigned reps = form.smoke ? 2 : b->quick ? 5 : 11, idle = form.smoke ? 0 : b->quick ? 5 : 60;
	struct series ours = {0}, peer = {0};
	uint64_t scanned = 0, passes;
	struct ours o;
	struct run r;

	ours_create(&o, &c);
	know_all(&o, &r);
	for (unsigned i = 0; i < reps; i++)
		series_add(&ours, ours_pass(&o, NULL, &scanned) / (double)c.pages);
	run_check(&r, scanned == 0, "Kage read pages that nobody wrote");
	sleep(idle);
	make_equal(&o, &r, &passes);
	ours_check(&o, &r);
	ours_destroy(&o);
	row.isvoid = !r.ok;
	if (!form.alone)
		row.isvoid |= !pass_theirs(&c, &peer, reps < 5 ? reps : 5);
	row_note(&row,
		 "a page that a pass covers; after %u idle seconds pages made equal were merged in %u "
		 "passes: the one that "
		 "heard of the writes, and the next",
		 idle, (unsigned)passes);
	finish_row(&row, &ours, &peer);
	contents_free(&c);
}

/* -- some of it is written ------------------------------------------------------------------- */

/* Memory as the engine's: of huge pages. */
static struct host_memory memory_to_hash(uint64_t bytes)
{
	struct host_memory m = {.bytes = bytes, .fd = -1};

	m.p = must_map(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "mmap");
	madvise(m.p, bytes, MADV_HUGEPAGE); /* as good as the host has it */
	memset(m.p, 1, bytes);
	return m;
}

/* CPU to hash the pages that an interval writes, as they lie in memory of the same size. */
static double hash_written(const struct contents *c, const char *memory, uint64_t first, uint64_t n,
			   uint64_t *sum)
{
	double ns = cpu_ns();

	for (uint64_t i = 0; i < n; i++)
		*sum += XXH3_64bits_withSeed(memory + random_page(c, first + i) * PAGE, PAGE, 1);
	return (cpu_ns() - ns) / (double)n;
}

struct writes {
	struct series pass, hash, write, untracked;
	uint64_t sum;
};

static void write_some(struct ours *o, uint64_t first, uint64_t n)
{
	struct contents *c = &o->contents;

	for (uint64_t i = 0; i < n; i++) {
		uint64_t page = random_page(c, first + i);

		c->overlay[page] = ((uint64_t)1 << 41) + first + i;
		ours_write(o, 0, page, c->overlay[page]);
	}
}

/* Between two passes n pages are written; each pass reads those of the interval before the last. */
static void steady_turns(struct ours *o, struct writes *w, struct run *r, unsigned reps, uint64_t n,
			 char *memory)
{
	for (unsigned i = 0; i <= reps; i++) {
		uint64_t scanned = 0;
		double ns;

		write_some(o, i * n, n);
		ns = ours_pass(o, NULL, &scanned);
		if (i == 0)
			continue;
		run_check(r, scanned == n, "a pass did not read exactly what was written");
		series_add(&w->pass, ns / (double)n);
		series_add(&w->hash, hash_written(&o->contents, memory, i * n, n, &w->sum));
	}
}

static void steady_written(const struct bench *b, uint64_t bytes)
{
	struct contents c = contents_written(size_of_case(bytes));
	struct row row = {.name = "steady-1pct",
			  .unit = "ns",
			  .peer = "XXH3 of the same pages, no more",
			  .goal = GOAL_TIMES,
			  .limit = 3};
	struct row theirs = {.name = "steady-1pct-ksmd", .unit = "ns", .peer = "a page of a pass of ksmd"};
	struct series all = {0}, peer = {0};
	struct writes w = {0};
	unsigned reps = form.smoke ? 2 : b->quick ? 5 : 11;
	uint64_t n = c.pages / 100;
	struct host_memory memory;
	struct ours o;
	struct run r;

	memory = memory_to_hash(c.pages * PAGE);
	ours_create(&o, &c);
	know_all(&o, &r);
	steady_turns(&o, &w, &r, reps, n, memory.p);
	run_check(&r, w.sum != 0, "nothing was hashed");
	ours_check(&o, &r);
	ours_destroy(&o);
	host_release(&memory);
	for (unsigned i = 0; i < w.pass.n; i++)
		series_add(&all, w.pass.v[i] * (double)n / (double)c.pages);
	row.isvoid = !r.ok;
	if (!form.alone)
		theirs.isvoid = !pass_theirs(&c, &peer, reps < 5 ? reps : 5);
	theirs.isvoid |= !r.ok;
	row_note(&row, "CPU of a pass for each page written since the last: %lu of %lu, at random",
		 (unsigned long)n, (unsigned long)c.pages);
	row_note(&theirs,
		 "the same CPU for each page that the pass covers; ksmd's memory is not written at all");
	finish_row(&row, &w.pass, &w.hash);
	finish_row(&theirs, &all, &peer);
	contents_free(&c);
}

void bench_steady(const struct bench *b)
{
	if (!skip_case((const char *const[]){"steady-4g", NULL}))
		steady_still(b, "steady-4g", 4 * GIB);
	if (!skip_case((const char *const[]){"steady-1pct", "steady-1pct-ksmd", NULL}))
		steady_written(b, 4 * GIB);
}
