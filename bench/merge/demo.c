/* SPDX-License-Identifier: MIT */
/*
 * Real guests: the RAM files that bench/demo/guests.sh makes. What the guest
 * never touched is touched on neither side; regions have entries of 4 KiB, so that
 * the engine counts what was touched and no more.
 *
 * Three are merged (demo-guests), then a fourth comes (family-1s): one run gives both.
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

struct family {
	struct contents c;	      /* of four guests; runs begin with three */
	struct series cpu, cpu_peer;  /* ms; three guests */
	uint64_t frames, frames_peer; /* left of them: the most, and the fewest, of all runs */
	struct series shared, peer;	 /* of the fourth: MiB within a second of CPU time */
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
	struct run three, four;
	struct ours o;
	uint64_t held;

	ours_create(&o, &f->c);
	held = ours_stats(&o).frames_used;
	ours_merge(&o, &three);
	run_check(&three, held == contents_nominal(&f->c), "Kage holds more or less than was touched");
	series_add(&f->cpu, three.cpu / 1e6);
	if (three.frames > f->frames)
		f->frames = three.frames;
	trace_free(&three.trace);
	ours_add(&o);
	ours_merge(&o, &four);
	ours_check(&o, &four);
	ours_destroy(&o);
	take(&four, &f->shared, &f->until);
	f->ok &= three.ok && four.ok;
}

static void family_theirs(struct family *f)
{
	struct run three, four;
	struct theirs t;
	uint64_t before;

	theirs_create(&t, &f->c);
	theirs_merge(&t, &three);
	series_add(&f->cpu_peer, three.cpu / 1e6);
	if (!f->frames_peer || three.frames < f->frames_peer)
		f->frames_peer = three.frames;
	trace_free(&three.trace);
	before = ksm_counts().sharing;
	theirs_add(&t);
	theirs_merge(&t, &four);
	for (unsigned i = 0; i < four.trace.n; i++)
		four.trace.sample[i].saved -=
		    four.trace.sample[i].saved > before ? before : four.trace.sample[i].saved;
	theirs_check(&t, &four);
	theirs_destroy(&t);
	take(&four, &f->peer, &f->until_peer);
	f->ok &= three.ok && four.ok;
}

static void family_rows(struct family *f)
{
	struct row three = {.name = "demo-guests", .unit = "ms", .peer = "ksmd", .goal = GOAL_RATIO, .limit = 1};
	struct row four = {.name = "family-1s", .unit = "MiB", .peer = "ksmd", .more = true, .isvoid = !f->ok};

	/* no more frames than ksmd leaves, within what counts as the same */
	three.isvoid =
	    !f->ok || (f->frames_peer && f->frames > f->frames_peer && !same_frames(f->frames, f->frames_peer));
	row_note(&three, "%.1f MiB touched; left: %.1f MiB, by ksmd %.1f", (double)contents_nominal(&f->c) / 256,
		 (double)f->frames / 256, (double)f->frames_peer / 256);
	row_note(&four,
		 "three are merged, a fourth comes: saved after 1 s of CPU time; 90 %% of its share after "
		 "%.0f ms, ksmd %.0f ms",
		 series_median(&f->until), series_median(&f->until_peer));
	finish_row(&three, &f->cpu, &f->cpu_peer);
	finish_row(&four, &f->shared, &f->peer);
}

void bench_demo(const struct bench *b)
{
	static const char *const names[] = {"demo-guests", "family-1s", NULL};
	struct family f = {.ok = true};
	unsigned reps = form.smoke || b->quick ? 1 : 11;

	if (skip_case(names))
		return;
	if (skip_because(names, !form.guests || contents_images(&f.c, form.guests, FAMILY) ? NO_GUESTS : NULL))
		return;
	f.c.guests = FAMILY - 1;
	for (unsigned i = 0; i < 2 * reps; i++) {
		bool peer = (i & 1) ^ (i / 2 & 1);

		if (!peer)
			family_ours(&f);
		else if (!form.alone)
			family_theirs(&f);
	}
	family_rows(&f);
	contents_free(&f.c);
}
