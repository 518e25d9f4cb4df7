/* SPDX-License-Identifier: MIT */
/*
 * 4 GiB: the first scan (scan.c), and then, in its last repetition, what a pass costs
 * once everything is known: over memory that nobody wrote, and when 1 % of it was
 * written since the last pass. At last, after a rest, pages become equal. One engine, and one run of ksmd, which
 * stays at memory that nobody writes, serve all rows.
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
static uint64_t random_page(uint64_t pages, uint64_t n)
{
	return n * 0x9e3779b1u % pages; /* pages: a power of two */
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

struct steady {
	struct series still, pass, hash; /* ns a page: covered; written; hashed */
	unsigned reps, idle;		 /* idle: seconds */
	uint64_t first, n;		 /* written pages: the next; of an interval */
	uint64_t sum, passes;
	struct run run;
};

/* The first scan has stopped merging; what it knows has not gone. */
static void know_all(struct ours *o, struct run *r)
{
	ours_tune(o, true);
	for (unsigned i = 0; i < FOR_SURE; i++)
		ours_pass(o, NULL, NULL);
	run_check(r, ours_stats(o).ksm_pages_unshared == o->contents.pages, "Kage does not know every page as unique");
}

/* -- nothing is written ------------------------------------------------------------------- */

static void pass_still(struct ours *o, struct steady *s)
{
	uint64_t scanned = 0;

	for (unsigned i = 0; i < s->reps; i++)
		series_add(&s->still, ours_pass(o, NULL, &scanned) / (double)o->contents.pages);
	run_check(&s->run, scanned == 0, "Kage read pages that nobody wrote");
}

/* Pages become equal in pairs, at random; two passes later each pair is one frame. */
static void make_equal(struct ours *o, struct steady *s)
{
	const struct contents *c = &o->contents;
	uint64_t pairs = (c->pages < 4 * SAME_PAGES ? c->pages / 4 : SAME_PAGES) / 2, merged = 0;

	for (uint64_t i = 0; i < 2 * pairs; i++) {
		uint64_t page = random_page(c->pages, s->first + i);

		c->overlay[page] = ((uint64_t)1 << 40) + i / 2;
		ours_write(o, 0, page, c->overlay[page]);
	}
	for (s->passes = 0; s->passes < 2 && merged < pairs; ++s->passes)
		ours_pass(o, &merged, NULL);
	run_check(&s->run, merged == pairs, "pages that became equal were not merged within one pass of quiet");
	run_check(&s->run, ours_stats(o).frames_used == c->pages - pairs, "Kage left another number of frames");
}

/* -- some of it is written ------------------------------------------------------------------- */

/* Memory as the engine's: of huge pages. With --quick a quarter of it, since populating it takes longest of all. */
static struct host_memory memory_to_hash(uint64_t bytes)
{
	struct host_memory m = {.bytes = bytes, .fd = -1};

	m.p = must_map(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "mmap");
	madvise(m.p, bytes, MADV_HUGEPAGE); /* as good as the host has it */
	memset(m.p, 1, bytes);
	return m;
}

/* CPU to hash as many pages as an interval writes, lying as those do. */
static double hash_written(const struct host_memory *memory, uint64_t first, uint64_t n, uint64_t *sum)
{
	double ns = cpu_ns();

	for (uint64_t i = 0; i < n; i++)
		*sum += XXH3_64bits_withSeed(memory->p + random_page(memory->bytes / PAGE, first + i) * PAGE, PAGE, 1);
	return (cpu_ns() - ns) / (double)n;
}

static void write_some(struct ours *o, struct steady *s)
{
	for (uint64_t end = s->first + s->n; s->first < end; s->first++) {
		uint64_t page = random_page(o->contents.pages, s->first);

		o->contents.overlay[page] = ((uint64_t)1 << 41) + s->first;
		ours_write(o, 0, page, o->contents.overlay[page]);
	}
}

/* Between two passes n pages are written; each pass reads those of the interval before the last. */
static void pass_written(struct ours *o, struct steady *s)
{
	uint64_t pages = o->contents.pages / (form.quick ? 4 : 1);
	struct host_memory memory = memory_to_hash(pages * PAGE);

	for (unsigned i = 0; i <= s->reps; i++) {
		uint64_t scanned = 0;
		double ns;

		write_some(o, s);
		ns = ours_pass(o, NULL, &scanned);
		if (i == 0)
			continue;
		run_check(&s->run, scanned == s->n, "a pass did not read exactly what was written");
		series_add(&s->pass, ns / (double)s->n);
		series_add(&s->hash, hash_written(&memory, s->first - s->n, s->n, &s->sum));
	}
	run_check(&s->run, s->sum != 0, "nothing was hashed");
	host_release(&memory);
}

/* -- rows ------------------------------------------------------------------------------------ */

static void go_on(struct ours *o, void *arg)
{
	struct steady *s = arg;

	know_all(o, &s->run);
	pass_still(o, s);
	pass_written(o, s);
	sleep(s->idle);
	make_equal(o, s);
}

static void steady_rows(const struct steady *s, const struct contents *c, const struct series *peer, const char *note)
{
	struct row still = {.name = "steady-4g",
			    .unit = "ns",
			    .peer = "a page of a pass of ksmd",
			    .goal = GOAL_RATIO,
			    .limit = 1000,
			    .isvoid = !s->run.ok};
	struct row written = {.name = "steady-1pct",
			      .unit = "ns",
			      .peer = "XXH3 of the same pages, no more",
			      .goal = GOAL_TIMES,
			      .limit = 3,
			      .isvoid = !s->run.ok};
	struct row covered = {
	    .name = "steady-1pct-ksmd", .unit = "ns", .peer = "a page of a pass of ksmd", .isvoid = !s->run.ok};
	struct series all = s->pass;

	for (unsigned i = 0; i < all.n; i++)
		all.v[i] *= (double)s->n / (double)c->pages;
	row_note(&still,
		 "a page that a pass covers; after %u idle seconds pages made equal were merged in %u passes: the one that "
		 "heard of the writes, and the next%s",
		 s->idle, (unsigned)s->passes, note);
	row_note(&written, "CPU of a pass for each page written since the last: %lu of %lu, at random%s", (unsigned long)s->n,
		 (unsigned long)c->pages, form.quick ? "; hashed: in 1 GiB" : "");
	row_note(&covered, "the same CPU for each page that the pass covers; ksmd's memory is not written at all%s", note);
	finish_row(&still, &s->still, peer);
	finish_row(&written, &s->pass, &s->hash);
	finish_row(&covered, &all, peer);
}

void bench_steady(const struct bench *b)
{
	static const char *const names[] = {"scan-4g", "scan-4g-ready", "steady-4g", "steady-1pct", "steady-1pct-ksmd", NULL};
	struct contents c = contents_written(size_of_case(4 * GIB));
	struct contents theirs = contents_unique(1, size_of_case(b->quick ? GIB : 4 * GIB)); /* ksmd takes its time */
	const char *note = b->quick ? "; ksmd: of 1 GiB" : "";
	struct series ours = {0}, two = {0}, later = {0};
	struct steady s = {.reps = form.smoke ? 2 : b->quick ? 5 : 11,
			   .idle = form.smoke ? 0 : b->quick ? 2 : 60,
			   .n = c.pages / 100,
			   .run = {.ok = true}};
	unsigned reps = reps_of(b, 4 * GIB);
	bool ok = true;

	if (skip_case(names)) {
		contents_free(&c);
		return;
	}
	for (unsigned i = 0; i < 2 * reps; i++) {
		bool peer = (i & 1) ^ (i / 2 & 1), last = i / 2 + 1 == reps;

		if (!peer)
			ok &= scan_ours(&c, last ? go_on : NULL, &s, &ours);
		else if (!form.alone)
			ok &= scan_theirs(&theirs, last ? (b->quick ? 1 : 5) : 0, &two, &later);
	}
	s.run.ok &= ok;
	scan_rows(names, ok, &ours, &two, note);
	steady_rows(&s, &c, &later, note);
	contents_free(&c);
}
