/* SPDX-License-Identifier: MIT */
/*
 * Full merges: guests with equal contents, and one whose duplicates lie
 * scattered. Time until as many frames are left as the contents allow, and,
 * for Kage, until the memory of the others is released.
 */
#include <stdio.h>

#include "merge.h"

struct full {
	struct contents c, peer;
	struct series cpu, cpu_peer;  /* ns a merged page */
	struct series pool, returned; /* MiB */
	bool drawn; /* in pictures */
	bool ok;
};

/* Pages. */
static double saved(const struct contents *c)
{
	return (double)(contents_nominal(c) - c->distinct);
}

static void full_ours(struct full *f)
{
	struct ours o;
	struct run r;

	ours_create(&o, &f->c);
	ours_merge(&o, &r);
	run_check(&r, same_frames(r.frames, f->c.distinct), "Kage left another number of frames");
	ours_check(&o, &r);
	ours_destroy(&o);
	series_add(&f->cpu, r.cpu / saved(&f->c));
	if (f->drawn)
		plot_keep_run(false, &r.trace);
	series_add(&f->pool, r.pool_free / MIB);
	series_add(&f->returned, r.returned / MIB);
	trace_free(&r.trace);
	f->ok &= r.ok;
}

static void full_theirs(struct full *f)
{
	struct theirs t;
	struct run r;

	theirs_create(&t, &f->peer);
	theirs_merge(&t, &r);
	run_check(&r, same_frames(r.frames, f->peer.distinct), "ksmd left another number of frames");
	theirs_check(&t, &r);
	theirs_destroy(&t);
	series_add(&f->cpu_peer, r.cpu / saved(&f->peer));
	if (f->drawn)
		plot_keep_run(true, &r.trace);
	trace_free(&r.trace);
	f->ok &= r.ok;
}

static void full_turns(struct full *f, unsigned reps)
{
	f->ok = true;
	for (unsigned i = 0; i < 2 * reps; i++) {
		bool peer = (i & 1) ^ (i / 2 & 1);

		if (!peer)
			full_ours(f);
		else if (!form.alone)
			full_theirs(f);
	}
}

static void full_case(const struct bench *b, const char *name, unsigned guests, uint64_t bytes, double goal)
{
	struct full f = {.c = contents_equal(guests, size_of_case(bytes)), .drawn = guests == 2};
	char other[40] = "";
	struct row row = {.name = name, .unit = "ns", .peer = "ksmd", .goal = GOAL_RATIO, .limit = goal};

	if (skip_case((const char *const[]){name, NULL}))
		return;
	f.peer = f.c;
	full_turns(&f, reps_of(b, guests * bytes));
	row.isvoid = !f.ok;
	if (bytes != 512 * MIB)
		snprintf(other, sizeof(other), "; guests of %u MiB", (unsigned)(bytes / MIB));
	row_note(&row,
		 "CPU of a saved frame: harvest, reading, protecting, notifying, merging, releasing; %.0f "
		 "MiB given "
		 "back, %.0f kept by the pool; %.0f thousand merges per second of CPU%s",
		 series_median(&f.returned), series_median(&f.pool), 1e6 / series_median(&f.cpu), other);
	finish_row(&row, &f.cpu, &f.cpu_peer);
}

void bench_full(const struct bench *b)
{
	full_case(b, "full-2x512m", 2, 512 * MIB, 6);
	full_case(b, "full-8x512m", 8, b->quick ? 128 * MIB : 512 * MIB, 3);
}

void bench_scattered(const struct bench *b)
{
	struct full f = {.c = contents_scattered(size_of_case(GIB))};
	uint64_t theirs = b->quick ? 512 * MIB : GIB;
	double copies = saved(&f.c);
	struct row row = {.name = "scattered", .unit = "ns", .peer = "ksmd", .goal = GOAL_RATIO, .limit = 1};
	struct row pool = {.name = "scattered-pool", .unit = "MiB"};
	struct row returned = {.name = "scattered-returned", .unit = "MiB"};

	if (skip_case((const char *const[]){row.name, pool.name, returned.name, NULL}))
		return;
	f.peer = contents_scattered(size_of_case(theirs));
	full_turns(&f, reps_of(b, GIB));
	row.isvoid = pool.isvoid = returned.isvoid = !f.ok;
	row_note(&row,
		 "CPU of a saved frame, the scan of the other pages in it; %.0f of %.0f pages are copies%s",
		 copies, (double)f.c.pages, theirs < GIB ? "; ksmd: of 512 MiB" : "");
	row_note(&pool, "free frames that the pool keeps for new pages, of %.0f MiB saved",
		 copies * PAGE / MIB);
	row_note(&returned, "fall of the resident set; ksmd gives all of it to the host");
	finish_row(&row, &f.cpu, &f.cpu_peer);
	finish_row(&pool, &f.pool, NULL);
	finish_row(&returned, &f.returned, NULL);
}
