/* SPDX-License-Identifier: MIT */
/*
 * First scan: memory in which no two pages are equal, from the first step until
 * every page is known as unique, so that an equal one would be found. Kage reads
 * each page once. ksmd reads it twice: in its first pass for the checksum, in the
 * second for the checksum again and its tree. Two rows: `scan-*` compares with a
 * page of one of its passes (half of both), `scan-*-ready` with both.
 *
 * steady.c scans 4 GiB, and goes on with what is known then.
 */
#include <stdio.h>

#include "merge.h"

bool scan_ours(const struct contents *c, void (*go_on)(struct ours *o, void *arg), void *arg, struct series *s)
{
	struct kage_stats stats;
	struct ours o;
	struct run r;

	ours_create(&o, c);
	ours_merge(&o, &r);
	stats = ours_stats(&o);
	run_check(&r, stats.ksm_pages_unshared == c->distinct, "Kage does not know every page as unique");
	run_check(&r, stats.ksm_pages_scanned == c->distinct, "Kage did not read every page once");
	run_check(&r, r.frames == c->distinct, "Kage merged what is not equal");
	if (go_on)
		go_on(&o, arg);
	ours_check(&o, &r);
	ours_destroy(&o);
	series_add(s, r.cpu / (double)c->distinct);
	trace_free(&r.trace);
	return r.ok;
}

/* What ksmd did with memory of 1 GiB, for the rows of 1 GiB and of 4. */
static struct quick {
	bool there, ok;
	struct series two, later;
} quick;

bool scan_theirs(const struct contents *c, unsigned n, struct series *two, struct series *later)
{
	struct theirs t;
	struct run r;

	if (form.quick && quick.there) {
		*two = quick.two;
		*later = quick.later;
		return quick.ok;
	}
	theirs_create(&t, c);
	theirs_passes(&t, 2, n, &r, later);
	run_check(&r, r.frames == c->distinct, "ksmd merged what is not equal");
	theirs_check(&t, &r);
	theirs_destroy(&t);
	series_add(two, r.cpu / (double)c->distinct);
	quick = (struct quick){.there = true, .ok = r.ok, .two = *two, .later = *later};
	return r.ok;
}

void scan_rows(const char *const name[2], bool ok, const struct series *ours, const struct series *two, const char *note)
{
	struct row row = {
	    .name = name[0], .unit = "ns", .peer = "a page of a pass of ksmd", .goal = GOAL_RATIO, .limit = 9, .isvoid = !ok};
	struct row both = {.name = name[1], .unit = "ns", .peer = "ksmd until its tree knows it", .isvoid = !ok};
	struct series pass = *two;

	for (unsigned i = 0; i < pass.n; i++)
		pass.v[i] /= 2;
	row_note(&row, "%.2f million pages per second of CPU (goal 2.0); %u repetitions%s", 1e3 / series_median(ours),
		 ours->n, note);
	row_note(&both, "every page read once, ksmd: twice%s", note);
	finish_row(&row, ours, &pass);
	finish_row(&both, ours, two);
}

void bench_scan(const struct bench *b)
{
	static const char *const names[] = {"scan-1g", "scan-1g-ready", NULL};
	struct contents c = contents_unique(1, size_of_case(GIB));
	struct series ours = {0}, two = {0}, later = {0};
	unsigned reps = reps_of(b, GIB);
	bool ok = true;

	if (skip_case(names))
		return;
	for (unsigned i = 0; i < 2 * reps; i++) {
		bool peer = (i & 1) ^ (i / 2 & 1);

		if (!peer)
			ok &= scan_ours(&c, NULL, NULL, &ours);
		else if (!form.alone)
			ok &= scan_theirs(&c, form.quick ? 1 : 0, &two, &later);
	}
	scan_rows(names, ok, &ours, &two, "");
}
