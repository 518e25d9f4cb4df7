/* SPDX-License-Identifier: MIT */
/*
 * Real guests: the RAM files that bench/demo/guests.sh makes. What the guest
 * never touched is touched on neither side; regions have entries of 4 KiB, so that
 * the engine counts what was touched and no more.
 *
 * How much there is to share is not known beforehand. ksmd is done when
 * two passes have found nothing new; its time counts until it had 99.9 % of that.
 * Kage's counts until its last step that did anything.
 */
#include <stdio.h>
#include <string.h>

#include "merge.h"

#define FAMILY	  4
#define NO_GUESTS "no RAM files of guests: sh bench/merge/run.sh makes them, or --guests DIR"

struct real {
	struct contents c;
	struct series cpu, peer;      /* ms */
	uint64_t frames, frames_peer; /* the most, and the fewest, of all runs */
	bool ok;
};

static void real_ours(struct real *w)
{
	struct ours o;
	struct run r;

	ours_create(&o, &w->c);
	run_check(&r, ours_stats(&o).frames_used == w->c.touched, "Kage holds more or less than was touched");
	ours_merge(&o, &r);
	ours_check(&o, &r);
	ours_destroy(&o);
	series_add(&w->cpu, r.cpu / 1e6);
	if (r.frames > w->frames)
		w->frames = r.frames;
	trace_free(&r.trace);
	w->ok &= r.ok;
}

static void real_theirs(struct real *w)
{
	struct theirs t;
	struct run r;

	theirs_create(&t, &w->c);
	theirs_merge(&t, 0, &r);
	theirs_check(&t, &r);
	theirs_destroy(&t);
	series_add(&w->peer, r.cpu / 1e6);
	if (!w->frames_peer || r.frames < w->frames_peer)
		w->frames_peer = r.frames;
	trace_free(&r.trace);
	w->ok &= r.ok;
}

static void demo_guests(const struct bench *b)
{
	static const char *const names[] = {"demo-guests", NULL};
	struct row row = {.name = names[0], .unit = "ms", .peer = "ksmd", .goal = GOAL_RATIO, .limit = 1};
	struct real w = {.ok = true};
	unsigned reps = form.smoke ? 1 : b->quick ? 3 : 11;

	if (skip_case(names))
		return;
	if (skip_because(names,
			 !form.guests || contents_images(&w.c, form.guests, FAMILY - 1) ? NO_GUESTS : NULL))
		return;
	for (unsigned i = 0; i < 2 * reps; i++) {
		bool peer = (i & 1) ^ (i / 2 & 1);

		if (!peer)
			real_ours(&w);
		else if (!form.alone)
			real_theirs(&w);
	}
	/* no more frames than ksmd leaves, within what counts as the same */
	row.isvoid =
	    !w.ok || (w.frames_peer && w.frames > w.frames_peer && !same_frames(w.frames, w.frames_peer));
	row_note(&row, "%.1f MiB touched; left: %.1f MiB, by ksmd %.1f", (double)w.c.touched / 256,
		 (double)w.frames / 256, (double)w.frames_peer / 256);
	finish_row(&row, &w.cpu, &w.peer);
	contents_free(&w.c);
}

/* -- a fourth of the family ------------------------------------------------------------------- */

struct family {
	struct contents c;
	struct series shared, peer;	 /* MiB within a second of CPU time */
	struct series until, until_peer; /* ms until 90 % of the end */
	bool ok;
};

static void take(struct run *r, struct series *shared, struct series *until)
{
	const struct sample *s = trace_at(&r->trace, 1e9), *end = &r->trace.sample[r->trace.n - 1];

	series_add(shared, (double)s->saved / 256);
	series_add(until, trace_reach(&r->trace, 0.9 * (double)end->saved)->cpu / 1e6);
	trace_free(&r->trace);
}

static void family_ours(struct family *f)
{
	struct ours o;
	struct run r;

	ours_create(&o, &f->c);
	ours_merge(&o, &r);
	trace_free(&r.trace);
	f->ok &= r.ok;
	ours_add(&o);
	ours_merge(&o, &r);
	ours_check(&o, &r);
	ours_destroy(&o);
	f->ok &= r.ok;
	take(&r, &f->shared, &f->until);
}

static void family_theirs(struct family *f)
{
	struct contents all = f->c;
	struct theirs t;
	struct run r;
	uint64_t before;

	theirs_create(&t, &f->c);
	theirs_merge(&t, 0, &r);
	trace_free(&r.trace);
	f->ok &= r.ok;
	before = ksm_counts().sharing;
	theirs_add(&t);
	t.contents.touched = all.touched;
	theirs_merge(&t, 0, &r);
	for (unsigned i = 0; i < r.trace.n; i++)
		r.trace.sample[i].saved -=
		    r.trace.sample[i].saved > before ? before : r.trace.sample[i].saved;
	theirs_check(&t, &r);
	theirs_destroy(&t);
	f->ok &= r.ok;
	take(&r, &f->peer, &f->until_peer);
}

static void family_1s(const struct bench *b)
{
	static const char *const names[] = {"family-1s", NULL};
	struct row row = {.name = names[0], .unit = "MiB", .peer = "ksmd", .more = true};
	struct family f = {.ok = true};
	unsigned reps = form.smoke ? 1 : b->quick ? 3 : 11;

	if (skip_case(names))
		return;
	if (skip_because(names,
			 !form.guests || contents_images(&f.c, form.guests, FAMILY) ? NO_GUESTS : NULL))
		return;
	f.c.guests--;
	for (unsigned i = 0; i < 2 * reps; i++) {
		bool peer = (i & 1) ^ (i / 2 & 1);

		if (!peer)
			family_ours(&f);
		else if (!form.alone)
			family_theirs(&f);
	}
	row.isvoid = !f.ok;
	row_note(&row,
		 "three are merged, a fourth comes: saved after 1 s of CPU time; 90 %% of its share after "
		 "%.0f ms, ksmd %.0f ms",
		 series_median(&f.until), series_median(&f.until_peer));
	finish_row(&row, &f.shared, &f.peer);
	f.c.guests++;
	contents_free(&f.c);
}

void bench_demo(const struct bench *b)
{
	demo_guests(b);
	family_1s(b);
}
