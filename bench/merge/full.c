/* SPDX-License-Identifier: MIT */
/*
 * Full merges: guests with equal contents, and one whose duplicates lie
 * scattered. Time until as many frames are left as the contents allow, and,
 * for Kage, until the memory of the others is released. What a write to a merged
 * page costs afterwards is measured on the same guests.
 */
#include <stdio.h>

#include "merge.h"

struct full {
	struct contents c;
	bool breaks;		      /* measure writes afterwards */
	double saved;		      /* pages */
	struct series cpu, cpu_peer;  /* ns a merged page */
	struct series cow, cow_peer;  /* ns a write */
	struct series pool, returned; /* MiB */
	bool ok;
};

/* The first word of every page of the last guest is written anew; it holds the same. */
static double break_ours(struct ours *o, struct run *r)
{
	const struct contents *c = &o->contents;
	unsigned g = c->guests - 1;
	uint64_t breaks = ours_stats(o).cow_breaks;
	struct kage_vcpu *v;
	double ns;

	must(kage_vcpu_create(o->vm[g], KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI), &v), "vCPU");
	ns = cpu_ns();
	for (uint64_t page = 0; page < c->pages; page++) {
		uint64_t word = mix(c->key(c, g, page) + 1);

		must(kage_vcpu_store(v, page * PAGE, &word, 8, NULL), "store");
	}
	ns = cpu_ns() - ns;
	kage_vcpu_destroy(v);
	run_check(r, ours_stats(o).cow_breaks - breaks == c->pages, "not every write broke a shared page");
	return ns / (double)c->pages;
}

static double break_theirs(struct theirs *t, struct run *r)
{
	const struct contents *c = &t->contents;
	unsigned g = c->guests - 1;
	double ns = cpu_ns();

	for (uint64_t page = 0; page < c->pages; page++)
		*(volatile uint64_t *)(t->p[g] + page * PAGE) = mix(c->key(c, g, page) + 1);
	ns = cpu_ns() - ns;
	/* Two equal guests: breaking all pages of one leaves nothing shared by two. */
	run_check(r, c->guests != 2 || ksm_counts().sharing == 0, "not every write broke a KSM page");
	return ns / (double)c->pages;
}

static void full_ours(struct full *f)
{
	struct ours o;
	struct run r;

	ours_create(&o, &f->c);
	ours_merge(&o, &r);
	run_check(&r, same_frames(r.frames, f->c.distinct), "Kage left another number of frames");
	ours_check(&o, &r);
	if (f->breaks) {
		series_add(&f->cow, break_ours(&o, &r));
		ours_check(&o, &r);
	}
	ours_destroy(&o);
	series_add(&f->cpu, r.cpu / f->saved);
	series_add(&f->pool, r.pool_free / MIB);
	series_add(&f->returned, r.returned / MIB);
	trace_free(&r.trace);
	f->ok &= r.ok;
}

static void full_theirs(struct full *f)
{
	struct theirs t;
	struct run r;

	theirs_create(&t, &f->c);
	theirs_merge(&t, 0, &r);
	run_check(&r, same_frames(r.frames, f->c.distinct), "ksmd left another number of frames");
	theirs_check(&t, &r);
	if (f->breaks) {
		series_add(&f->cow_peer, break_theirs(&t, &r));
		theirs_check(&t, &r);
	}
	theirs_destroy(&t);
	series_add(&f->cpu_peer, r.cpu / f->saved);
	trace_free(&r.trace);
	f->ok &= r.ok;
}

static void full_turns(struct full *f, unsigned reps)
{
	f->ok = true;
	f->saved = (double)(contents_nominal(&f->c) - f->c.distinct);
	for (unsigned i = 0; i < 2 * reps; i++) {
		bool peer = (i & 1) ^ (i / 2 & 1);

		if (!peer)
			full_ours(f);
		else if (!form.alone)
			full_theirs(f);
	}
}

static void full_case(const struct bench *b, const char *name, unsigned guests, double goal, const char *cow)
{
	uint64_t bytes = size_of_case(512 * MIB);
	struct full f = {.c = contents_equal(guests, bytes), .breaks = cow != NULL};
	struct row row = {.name = name, .unit = "ns", .peer = "ksmd", .goal = GOAL_RATIO, .limit = goal};
	struct row broken = {.name = cow,
			     .unit = "ns",
			     .peer = "the kernel's break of a KSM page",
			     .goal = GOAL_RATIO,
			     .limit = 2.5};

	if (skip_case((const char *const[]){name, cow, NULL}))
		return;
	full_turns(&f, reps_of(b, guests * 512 * MIB));
	row.isvoid = broken.isvoid = !f.ok;
	row_note(&row,
		 "CPU of a saved frame: harvest, reading, protecting, notifying, merging, releasing; %.0f "
		 "MiB given back, "
		 "%.0f kept by the pool; %.0f thousand merges per second of CPU",
		 series_median(&f.returned), series_median(&f.pool), 1e6 / series_median(&f.cpu));
	finish_row(&row, &f.cpu, &f.cpu_peer);
	if (!cow)
		return;
	row_note(&broken, "one vCPU writes a word to each page of a merged guest, in order");
	finish_row(&broken, &f.cow, &f.cow_peer);
}

void bench_full(const struct bench *b)
{
	full_case(b, "full-2x512m", 2, 6, "cow-break");
	full_case(b, "full-8x512m", 8, 3, NULL);
}

void bench_scattered(const struct bench *b)
{
	struct full f = {.c = contents_scattered(size_of_case(GIB))};
	struct row row = {.name = "scattered", .unit = "ns", .peer = "ksmd", .goal = GOAL_RATIO, .limit = 1};
	struct row pool = {.name = "scattered-pool", .unit = "MiB"};
	struct row returned = {.name = "scattered-returned", .unit = "MiB"};

	if (skip_case((const char *const[]){row.name, pool.name, returned.name, NULL}))
		return;
	full_turns(&f, reps_of(b, GIB));
	row.isvoid = pool.isvoid = returned.isvoid = !f.ok;
	row_note(&row,
		 "CPU of a saved frame, the scan of the other pages in it; %.0f of %.0f pages are copies",
		 f.saved, (double)f.c.pages);
	row_note(&pool, "free frames that the pool keeps for new pages, of %.0f MiB saved",
		 f.saved * PAGE / MIB);
	row_note(&returned, "fall of the resident set; ksmd gives all of it to the host");
	finish_row(&row, &f.cpu, &f.cpu_peer);
	finish_row(&pool, &f.pool, NULL);
	finish_row(&returned, &f.returned, NULL);
}
