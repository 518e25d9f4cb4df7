/* SPDX-License-Identifier: MIT */
/* What rows have in common: sizes, repetitions, peers that are not there. */
#include <stdio.h>
#include <string.h>

#include "merge.h"

#define SMOKE_SHIFT 7 /* 512 MiB become 4 */

const char *no_ksm;

uint64_t size_of_case(uint64_t bytes)
{
	return form.smoke ? bytes >> SMOKE_SHIFT : bytes;
}

unsigned reps_of(const struct bench *b, uint64_t bytes)
{
	if (form.smoke || b->quick)
		return 1;
	return bytes >= 2 * GIB ? 5 : 11;
}

void run_check(struct run *r, bool ok, const char *what)
{
	r->ok &= ok;
	if (!ok)
		fprintf(stderr, "check failed: %s\n", what);
}

bool same_frames(uint64_t frames, uint64_t expected)
{
	uint64_t off = frames > expected ? frames - expected : expected - frames;

	return off * 1000 <= expected;
}

static bool wanted(const char *const *names)
{
	bool want = !form.only;

	for (; !want && *names; names++)
		want = !strcmp(form.only, *names);
	return want;
}

bool skip_because(const char *const *names, const char *why)
{
	for (; why && *names; names++) {
		struct row row = {.suite = "merge", .name = *names, .unit = "-"};

		row_note(&row, "%s", why);
		report_skip(&row);
	}
	return why != NULL;
}

bool skip_case(const char *const *names)
{
	if (!wanted(names))
		return true;
	return skip_because(names, form.alone ? NULL : no_ksm ? no_ksm : ksm_alone());
}

void finish_row(struct row *row, const struct series *ours, const struct series *peer)
{
	row->suite = "merge";
	row->value = series_median(ours);
	row->spread = series_spread(ours);
	if (peer && peer->n)
		row->peer_value = series_median(peer);
	else
		row->peer = NULL;
	if (!row->peer && row->goal != GOAL_MOST)
		row->goal = GOAL_NONE;
	report_row(row);
}
