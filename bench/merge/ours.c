/* SPDX-License-Identifier: MIT */
/* Kage's side: one engine, its guests, merging in steps on this thread. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "merge.h"

#define CHUNK	   ((uint64_t)64) /* pages written or read at once */
#define PASSES_MAX 16

static void fill(struct ours *o, unsigned guest)
{
	const struct contents *c = &o->contents;
	char *chunk = must_map(aligned_alloc(PAGE, CHUNK * PAGE), "memory");

	/* as many neighbours at once as there are */
	for (uint64_t page = 0, n; page < c->pages; page += n ? n : 1) {
		for (n = 0; n < CHUNK && page + n < c->pages; n++)
			if (!contents_page(c, guest, page + n, chunk + n * PAGE))
				break;
		if (n)
			must(kage_vm_write(o->vm[guest], page * PAGE, chunk, n * PAGE), "write");
	}
	free(chunk);
}

static void add(struct ours *o, unsigned g)
{
	const struct contents *c = &o->contents;

	must(kage_vm_create(o->engine, NULL, &o->vm[g]), "guest");
	must(kage_vm_map(o->vm[g], KAGE_CFG(kage_region, .len = c->pages * PAGE,
					    .flags = KAGE_REGION_MERGEABLE | c->flags)),
	     "region");
	fill(o, g);
}

void ours_create(struct ours *o, const struct contents *c)
{
	*o = (struct ours){.contents = *c};
	must(kage_engine_create(KAGE_CFG(kage_engine_config, .reserve = c->reserve), &o->engine), "engine");
	for (unsigned g = 0; g < c->guests; g++)
		add(o, g);
}

void ours_add(struct ours *o)
{
	add(o, o->contents.guests++);
}

void ours_destroy(struct ours *o)
{
	for (unsigned g = 0; g < o->contents.guests; g++)
		must(kage_vm_destroy(o->vm[g]), "destroy guest");
	must(kage_engine_destroy(o->engine), "destroy engine");
}

void ours_tune(struct ours *o, bool merge)
{
	must(kage_engine_tune(o->engine, KAGE_CFG(kage_tune, .flags = merge ? KAGE_TUNE_MERGE : 0)), "tune");
}

struct kage_stats ours_stats(const struct ours *o)
{
	struct kage_stats s = {.size = sizeof(s)};

	must(kage_counters_get(o->engine, NULL, &s), "counters");
	return s;
}

/* Bytes of this process that are in memory. */
static double resident(void)
{
	FILE *f = fopen("/proc/self/statm", "re");
	unsigned long size = 0, pages = 0;

	if (f) {
		if (fscanf(f, "%lu %lu", &size, &pages) != 2)
			pages = 0;
		fclose(f);
	}
	return (double)pages * (double)sysconf(_SC_PAGESIZE);
}

static struct kage_progress step(struct ours *o, uint64_t pages, double *cpu)
{
	struct kage_progress p = {.size = sizeof(p)};
	double begin = cpu_ns();

	must(kage_engine_step(o->engine, KAGE_CFG(kage_budget, .pages = pages), &p), "step");
	*cpu += cpu_ns() - begin;
	return p;
}

double ours_pass(struct ours *o, uint64_t *merged, uint64_t *scanned)
{
	struct kage_progress p = {.more = 1};
	double cpu = 0;

	while (p.more) {
		p = step(o, 0, &cpu);
		if (merged)
			*merged += p.pages_merged;
		if (scanned)
			*scanned += p.pages_scanned;
	}
	return cpu;
}

/* Passes until one finds nothing to read, merge or release; from the third, since the first two may only
 * look. */
static void merge_all(struct ours *o, struct run *r)
{
	double begin = wall_ns(), cpu = 0;
	uint64_t merged = 0;
	bool idle = true;

	trace_add(&r->trace, 0, 0, 0);
	while (r->passes < PASSES_MAX) {
		struct kage_progress p = step(o, STEP_PAGES, &cpu);

		merged += p.pages_merged;
		trace_add(&r->trace, wall_ns() - begin, cpu, merged);
		if (p.pages_scanned || p.pages_merged || p.frames_freed) {
			idle = false;
			r->cpu = cpu;
			r->wall = wall_ns() - begin;
		}
		if (p.more)
			continue;
		if (++r->passes >= 3 && idle)
			return;
		idle = true;
	}
	run_check(r, false, "Kage's passes do not come to an end");
}

void ours_merge(struct ours *o, struct run *r)
{
	struct kage_stats before = ours_stats(o), after;
	double rss = resident();

	*r = (struct run){.ok = true};
	ours_tune(o, true);
	merge_all(o, r);
	ours_tune(o, false);
	after = ours_stats(o);
	r->frames = after.frames_used;
	r->pool_free = ((double)after.frames_free - (double)before.frames_free) * PAGE;
	r->returned = rss - resident();
}

void ours_check(const struct ours *o, struct run *r)
{
	const struct contents *c = &o->contents;
	char *chunk = must_map(aligned_alloc(PAGE, CHUNK * PAGE), "memory");
	uint64_t wrong = 0;

	for (unsigned g = 0; g < c->guests; g++)
		for (uint64_t page = 0, n; page < c->pages; page += n) {
			n = c->pages - page < CHUNK ? c->pages - page : CHUNK;
			must(kage_vm_read(o->vm[g], page * PAGE, chunk, n * PAGE), "read");
			for (uint64_t i = 0; i < n; i++)
				wrong += !contents_is(c, g, page + i, chunk + i * PAGE);
		}
	free(chunk);
	run_check(r, wrong == 0, "Kage's pages hold something else");
}

void ours_write(struct ours *o, unsigned guest, uint64_t page, uint64_t key)
{
	_Alignas(64) char buf[PAGE];

	page_fill(buf, key);
	must(kage_vm_write(o->vm[guest], page * PAGE, buf, PAGE), "write");
}
