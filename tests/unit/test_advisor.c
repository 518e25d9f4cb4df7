/* SPDX-License-Identifier: MIT */
/*
 * The advisor of merging, on a clock that the test moves: shares, pace, limits.
 *
 *   struct sim   a machine on which a page costs a known time
 */
#include <check.h>

#include "merge/advisor.h"

#define MS ((uint64_t)1000000)
#define SECOND (1000 * MS)

struct sim {
	struct advisor a;
	uint64_t now, cost; /* ns a page */
	uint64_t cpu, pages, steps;
};

static void sim_init(struct sim *s, uint32_t share, uint64_t scan, uint64_t min_pages, uint64_t max_pages)
{
	memset(s, 0, sizeof(*s));
	s->now = 77 * SECOND;
	s->cost = 500;
	advisor_init(&s->a);
	advisor_tune(&s->a, share, scan, min_pages, max_pages);
}

/* One step at this moment; returns its budget. */
static uint64_t step(struct sim *s, const struct advisor_work *w)
{
	uint64_t pages = advisor_pages(&s->a, s->now, w);
	uint64_t done = MIN(pages, w->left + w->urgent);

	if (pages) {
		advisor_paid(&s->a, done * s->cost, done);
		s->cpu += done * s->cost;
		s->pages += done;
		s->steps++;
	}
	return pages;
}

START_TEST(defaults)
{
	struct advisor a;

	advisor_init(&a);
	ck_assert_uint_eq(a.share, 20);
	ck_assert_uint_eq(a.scan, 10 * SECOND);
	ck_assert_uint_eq(a.min_pages, 64);
	ck_assert_uint_eq(a.max_pages, 32768);
	ck_assert_uint_eq(a.moves, 6000);
	advisor_tune(&a, 0, 0, 100000, 0);
	ck_assert_uint_eq(a.max_pages, 100000); /* not below the least */
}
END_TEST

/* More work than the share allows: CPU used is the share of the time, whatever a page costs and however often steps come. */
START_TEST(share_is_kept)
{
	static const uint64_t gap[] = { MS, 7 * MS, 20 * MS, 300 * MS }, cost[] = { 300, 2000, 9000 };

	for (unsigned g = 0; g < 4; g++) {
		for (unsigned c = 0; c < 3; c++) {
			struct sim s;
			struct advisor_work w = { .left = 1u << 30 };
			uint64_t begin;

			sim_init(&s, 10, SECOND, 1, 1u << 20);
			s.cost = cost[c];
			step(&s, &w); /* the first second's credit, by a cost that is only guessed */
			for (begin = s.now; s.now < begin + 10 * SECOND; s.now += gap[g])
				step(&s, &w);
			s.cpu = 0;
			for (begin = s.now; s.now < begin + 60 * SECOND; s.now += gap[g])
				step(&s, &w);
			ck_assert_uint_ge(s.cpu, 60 * SECOND / 10 * 97 / 100);
			ck_assert_uint_le(s.cpu, 60 * SECOND / 10 * 103 / 100);
		}
	}
}
END_TEST

/* Less work than the share allows: a pass takes its time, and no CPU is spent to be early. */
START_TEST(pass_takes_its_time)
{
	struct sim s;
	struct advisor_work w = { .left = 1000000, .begins = true };
	uint64_t begin, pages;

	sim_init(&s, 50, 10 * SECOND, 1, 1u << 20);
	for (begin = s.now; w.left; s.now += 10 * MS) {
		pages = step(&s, &w);
		w.left -= MIN(pages, w.left);
		w.begins = false;
		ck_assert_uint_le(s.now, begin + 11 * SECOND);
	}
	ck_assert_uint_ge(s.now, begin + 10 * SECOND);
	ck_assert_uint_le(s.now, begin + 10 * SECOND + 100 * MS);
	ck_assert_uint_eq(s.pages, 1000000);
}
END_TEST

/* A pass that is late goes as fast as the share lets it. */
START_TEST(late_pass_hurries)
{
	struct sim s;
	struct advisor_work w = { .left = 1u << 30, .begins = true };

	sim_init(&s, 10, SECOND, 1, 1u << 20);
	step(&s, &w);
	w.begins = false;
	advisor_paid(&s.a, 0, 0);
	s.now += 5 * SECOND;
	ck_assert_uint_eq(advisor_pages(&s.a, s.now, &w), 100 * MS / s.cost);
}
END_TEST

START_TEST(floor_and_ceiling)
{
	struct sim s;
	struct advisor_work w = { .left = 1u << 30 };

	sim_init(&s, 1, SECOND, 256, 1024);
	ck_assert_uint_eq(step(&s, &w), 256); /* a pass begins: no page of it is due yet */
	s.now += 100 * MS;
	ck_assert_uint_eq(step(&s, &w), 1024);
	s.now += 1; /* no time, no credit, but the floor */
	advisor_paid(&s.a, 100 * SECOND, 1);
	ck_assert_uint_eq(step(&s, &w), 256);
	/* A2: a debt is forgotten after ten seconds */
	ck_assert_int_ge(s.a.credit, -10 * (int64_t)SECOND / 100 - 256 * (int64_t)s.cost);
	/* A1: an hour's sleep is worth a second */
	s.now += 3600 * SECOND;
	advisor_pages(&s.a, s.now, &w);
	ck_assert_int_le(s.a.credit, (int64_t)SECOND / 100);
}
END_TEST

/* Between passes nothing is due until the time of the last one is over, unless something is urgent. */
START_TEST(between_passes)
{
	struct sim s;
	struct advisor_work idle = { .begins = true }, urgent = { .begins = true, .urgent = 5000 };

	sim_init(&s, 20, 10 * SECOND, 64, 4096);
	ck_assert_uint_eq(advisor_wait(&s.a, s.now, &idle), 0);
	ck_assert_uint_eq(step(&s, &idle), 64); /* a pass with no pages to look at */
	s.now += SECOND;
	ck_assert_uint_eq(advisor_wait(&s.a, s.now, &idle), 9 * SECOND);
	ck_assert_uint_eq(step(&s, &idle), 0);
	ck_assert_uint_eq(advisor_wait(&s.a, s.now, &urgent), 0);
	ck_assert_uint_eq(step(&s, &urgent), 4096);
	ck_assert_uint_eq(step(&s, &idle), 0); /* urgent work has not begun a pass */
	s.now += 9 * SECOND;
	ck_assert_uint_eq(advisor_wait(&s.a, s.now, &idle), 0);
	ck_assert_uint_eq(step(&s, &idle), 64);
	ck_assert_uint_eq(advisor_wait(&s.a, s.now, &idle), 10 * SECOND);
}
END_TEST

/* Who sleeps as long as it is told to keeps the pace: neither idle steps nor a late pass. */
START_TEST(wait_is_right)
{
	struct sim s;
	struct advisor_work w = { .left = 200000, .begins = true };
	uint64_t begin, wait, pages;

	sim_init(&s, 50, 10 * SECOND, 100, 1u << 20);
	for (begin = s.now; w.left; s.now += wait) {
		pages = step(&s, &w);
		w.left -= MIN(pages, w.left);
		w.begins = false;
		wait = advisor_wait(&s.a, s.now, &w);
	}
	ck_assert_uint_le(s.steps, 200000 / 100 + 2);
	ck_assert_uint_le(s.now, begin + 10 * SECOND + 100 * MS);
	/* and by the share: a debt is slept off */
	sim_init(&s, 10, 10 * SECOND, 100, 1u << 20);
	step(&s, &w);
	s.a.cost = 500 * 256;
	s.a.credit = -(int64_t)(10 * MS);
	w.left = 1u << 30;
	ck_assert_uint_eq(advisor_wait(&s.a, s.now, &w), 10 * (10 * MS + 100 * 500));
}
END_TEST

/* The cost of a page follows what is measured, slowly: one step that was held up changes it by an eighth. */
START_TEST(cost_is_averaged)
{
	struct advisor a;

	advisor_init(&a);
	advisor_paid(&a, 400 * 1000, 1000);
	ck_assert_uint_eq(a.cost, 400 * 256);
	advisor_paid(&a, 1200 * 1000, 1000);
	ck_assert_uint_eq(a.cost, 500 * 256);
	for (unsigned i = 0; i < 100; i++)
		advisor_paid(&a, 1200 * 1000, 1000);
	ck_assert_uint_ge(a.cost, 1195 * 256);
	advisor_paid(&a, 5 * MS, 0); /* a step that looked at nothing says nothing about pages */
	ck_assert_uint_ge(a.cost, 1195 * 256);
	advisor_paid(&a, 0, 1000);
	ck_assert_uint_gt(a.cost, 0);
}
END_TEST

/* Guests under KVM: every page that is looked at moves two. However often steps come, as many move in a second as may. */
START_TEST(moves_are_kept)
{
	static const uint64_t gap[] = { MS, 7 * MS, 40 * MS, 0 };

	for (unsigned g = 0; g < 4; g++) {
		struct sim s;
		struct advisor_work w = { .urgent = 1u << 30 };
		uint64_t begin, moved = 0, most = 0;

		sim_init(&s, 100, SECOND, 1, 1u << 20);
		advisor_tune_moved(&s.a, 2000);
		s.a.ready = 0;
		for (begin = s.now; s.now < begin + 60 * SECOND;) {
			uint64_t pages = step(&s, &w), moves = 2 * MIN(pages, advisor_moves(&s.a)); /* found out too late */

			advisor_moved(&s.a, moves);
			moved += moves;
			most = MAX(most, moves);
			s.now += gap[g] ? gap[g] : MAX(advisor_wait(&s.a, s.now, &w), (uint64_t)1000);
		}
		ck_assert_uint_ge(moved, 60 * 2000 * 95 / 100);
		ck_assert_uint_le(moved, 60 * 2000 + 2 * 2000 / 4);
		ck_assert_uint_le(most, 2 * 2000 / 4);
	}
}
END_TEST

/* What is ready does not add up, and what is owed is forgotten after a minute. Nobody who moves nothing waits. */
START_TEST(moves_in_hand)
{
	struct sim s;
	struct advisor_work w = { .urgent = 1000 };

	sim_init(&s, 100, SECOND, 64, 1u << 20);
	advisor_tune_moved(&s.a, 4000);
	step(&s, &w);
	s.now += 3600 * SECOND;
	step(&s, &w);
	ck_assert_uint_eq(advisor_moves(&s.a), 1000);
	ck_assert_uint_eq(advisor_wait(&s.a, s.now, &w), 0);
	advisor_moved(&s.a, 1000);
	ck_assert_uint_eq(advisor_moves(&s.a), 64); /* the floor */
	ck_assert_uint_eq(advisor_wait(&s.a, s.now, &w), 250 * SECOND / 4000);
	advisor_moved(&s.a, UINT64_MAX);
	ck_assert_int_eq(s.a.ready, -60 * 4000);
	ck_assert_uint_eq(advisor_wait(&s.a, s.now, &w), SECOND); /* at most */
	s.now += 60 * SECOND;
	step(&s, &w);
	ck_assert_int_eq(s.a.ready, 0);
	s.now += SECOND / 8000; /* half a page */
	step(&s, &w);
	ck_assert_int_eq(s.a.ready, 0);
	s.now += SECOND / 8000;
	step(&s, &w);
	ck_assert_int_eq(s.a.ready, 1);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("advisor");
	TCase *tc = tcase_create("advisor");
	SRunner *runner;
	int failed;

	tcase_add_test(tc, defaults);
	tcase_add_test(tc, share_is_kept);
	tcase_add_test(tc, pass_takes_its_time);
	tcase_add_test(tc, late_pass_hurries);
	tcase_add_test(tc, floor_and_ceiling);
	tcase_add_test(tc, between_passes);
	tcase_add_test(tc, wait_is_right);
	tcase_add_test(tc, cost_is_averaged);
	tcase_add_test(tc, moves_are_kept);
	tcase_add_test(tc, moves_in_hand);
	suite_add_tcase(suite, tc);
	runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed != 0;
}
