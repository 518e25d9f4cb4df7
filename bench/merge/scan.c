/* SPDX-License-Identifier: MIT */
/*
 * First scan: memory in which no two pages are equal, from the first step until
 * every page is known as unique, so that an equal one would be found. Kage reads
 * each page once. ksmd reads it twice: in its first pass for the checksum, in the
 * second for the checksum again and its tree. Two rows: `scan-*` compares with a
 * page of one of its passes (half of both), `scan-*-ready` with both.
 */
#include <stdio.h>

#include "merge.h"

static bool scan_ours(const struct contents *c, struct run *r)
{
	struct ours o;
	struct kage_stats s;

	ours_create(&o, c);
	ours_merge(&o, r);
	s = ours_stats(&o);
	run_check(r, s.ksm_pages_unshared == c->distinct, "Kage does not know every page as unique");
	run_check(r, s.ksm_pages_scanned == c->distinct, "Kage did not read every page once");
	run_check(r, r->frames == c->distinct, "Kage merged what is not equal");
	ours_check(&o, r);
	ours_destroy(&o);
	trace_free(&r->trace);
	return r->ok;
}

static bool scan_theirs(const struct contents *c, struct run *r)
{
	struct theirs t;

	theirs_create(&t, c);
	theirs_merge(&t, 2, r);
	run_check(r, r->frames == c->distinct, "ksmd merged what is not equal");
	theirs_check(&t, r);
	theirs_destroy(&t);
	trace_free(&r->trace);
	return r->ok;
}

static void scan_case(const struct bench *b, const char *name, const char *ready, uint64_t bytes)
{
	struct contents c = contents_unique(1, size_of_case(bytes));
	struct row row = {
	    .name = name, .unit = "ns", .peer = "a page of a pass of ksmd", .goal = GOAL_RATIO, .limit = 9};
	struct row both = {.name = ready, .unit = "ns", .peer = "ksmd until its tree knows it"};
	struct series ours = {0}, pass = {0}, two = {0};
	unsigned reps = reps_of(b, bytes);

	if (skip_case((const char *const[]){name, ready, NULL}))
		return;
	for (unsigned i = 0; i < 2 * reps; i++) {
		struct run r;
		bool peer = (i & 1) ^ (i / 2 & 1);

		if (peer && form.alone)
			continue;
		row.isvoid |= !(peer ? scan_theirs(&c, &r) : scan_ours(&c, &r));
		series_add(peer ? &two : &ours, r.cpu / (double)c.distinct);
		if (peer)
			series_add(&pass, r.cpu / (double)c.distinct / 2);
	}
	both.isvoid = row.isvoid;
	row_note(&row, "%.2f million pages per second of CPU (goal 2.0); %u repetitions",
		 1e3 / series_median(&ours), reps);
	row_note(&both, "every page read once, ksmd: twice");
	finish_row(&row, &ours, &pass);
	finish_row(&both, &ours, &two);
}

void bench_scan(const struct bench *b)
{
	scan_case(b, "scan-1g", "scan-1g-ready", GIB);
	scan_case(b, "scan-4g", "scan-4g-ready", 4 * GIB);
}
