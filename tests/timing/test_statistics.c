/* SPDX-License-Identifier: MIT */
/* The statistics of the timing test, on values and distributions that are known. */
#include <check.h>
#include <math.h>
#include <stdlib.h>

#include "../model/rng.h"
#include "statistics.h"

#define MANY 20000

static double buffer[2][MANY];
static struct rng rng;

/* In (0, 1). */
static double uniform(void)
{
	return ((double)(rng_next(&rng) >> 11) + 0.5) / 9007199254740992.0;
}

/* Box and Muller. */
static double normal(double mean, double deviation)
{
	return mean + deviation * sqrt(-2 * log(uniform())) * cos(2 * M_PI * uniform());
}

/* Times as a machine gives them: a quick part, and one in fifty far away. */
static double machine(double mean)
{
	return uniform() < 0.02 ? 50 * mean * uniform() + mean : normal(mean, mean / 20);
}

static struct sample fill(unsigned which, size_t n, double (*from)(double, double), double a, double b)
{
	struct sample s = {buffer[which], n};

	for (size_t i = 0; i < n; i++)
		s.x[i] = from(a, b);
	sample_sort(&s);
	return s;
}

static double machine_of(double mean, double unused)
{
	return machine(mean);
}

START_TEST(welch_of_known_values)
{
	/* Welch 1947's statistic by hand: means 21, 23; variances 10, 40/3; (21 - 23) / sqrt(2 + 10/3) */
	double a[] = {17, 19, 21, 23, 25}, b[] = {19, 21, 25, 27};
	struct sample sa = {a, 5}, sb = {b, 4};

	ck_assert_double_eq_tol(welch_t(&sa, &sb), -2 / sqrt(2 + 10.0 / 3), 1e-12);
	ck_assert_double_eq_tol(welch_t(&sb, &sa), 2 / sqrt(2 + 10.0 / 3), 1e-12);
	ck_assert(welch_t(&sa, &sa) == 0);
	sb.n = 1;
	ck_assert(welch_t(&sa, &sb) == 0);
}
END_TEST

START_TEST(welch_of_constants)
{
	double a[] = {3, 3, 3}, b[] = {4, 4};
	struct sample sa = {a, 3}, sb = {b, 2};

	ck_assert(welch_t(&sa, &sa) == 0);
	ck_assert(isinf(welch_t(&sa, &sb)));
}
END_TEST

START_TEST(ks_of_known_values)
{
	double a[] = {1, 2, 3, 4}, b[] = {3, 4, 5, 6}, c[] = {2, 2, 2};
	struct sample sa = {a, 4}, sb = {b, 4}, sc = {c, 3};

	ck_assert_double_eq_tol(ks_distance(&sa, &sb), 0.5, 1e-12);
	ck_assert_double_eq_tol(ks_distance(&sa, &sa), 0, 1e-12);
	ck_assert_double_eq_tol(ks_distance(&sa, &sc), 0.5, 1e-12); /* ties: 1/4 before 2, 2/4 after */
	/* Kolmogorov's distribution at 1.36, 1.63, 1.95: the tables' 0.05, 0.01, 0.001 */
	ck_assert_double_eq_tol(ks_probability(1.36 / sqrt(5e9), (size_t)1e10, (size_t)1e10), 0.0495, 5e-4);
	ck_assert_double_eq_tol(ks_probability(1.63 / sqrt(5e9), (size_t)1e10, (size_t)1e10), 0.00984, 1e-4);
	ck_assert_double_eq_tol(ks_probability(1.95 / sqrt(5e9), (size_t)1e10, (size_t)1e10), 0.000996, 1e-5);
	ck_assert(ks_probability(0, 100, 100) == 1);
	ck_assert(ks_probability(1, 1000, 1000) < 1e-12);
}
END_TEST

/* One distribution: the share of wrong answers is the one promised. */
START_TEST(equal_samples_pass)
{
	unsigned below[3] = {0}, wild = 0;

	for (unsigned i = 0; i < 1000; i++) {
		struct sample a = fill(0, 2000, i % 2 ? normal : machine_of, 1000, 50);
		struct sample b = fill(1, 2000, i % 2 ? normal : machine_of, 1000, 50);
		double p = ks_probability(ks_distance(&a, &b), a.n, b.n);

		wild += fabs(welch_t_cropped(&a, &b)) >= 4.5;
		below[0] += p < 0.5;
		below[1] += p < 0.1;
		below[2] += p < 1e-4;
	}
	ck_assert_uint_eq(wild, 0);
	ck_assert_uint_ge(below[0], 440);
	ck_assert_uint_le(below[0], 560);
	ck_assert_uint_ge(below[1], 65);
	ck_assert_uint_le(below[1], 135);
	ck_assert_uint_le(below[2], 2);
}
END_TEST

START_TEST(shifted_means_are_found)
{
	struct sample a = fill(0, MANY, normal, 1000, 50), b = fill(1, MANY, normal, 1005, 50);

	ck_assert_double_lt(welch_t_cropped(&a, &b), -4.5);
	ck_assert_double_lt(ks_probability(ks_distance(&a, &b), a.n, b.n), 1e-4);
}
END_TEST

/* What the tail hides from the whole, croppings see. */
START_TEST(tails_hide_nothing)
{
	struct sample a = fill(0, MANY, machine_of, 1000, 0), b = fill(1, MANY, machine_of, 1010, 0);

	ck_assert_double_lt(fabs(welch_t(&a, &b)), 4.5);
	ck_assert_double_gt(fabs(welch_t_cropped(&a, &b)), 4.5);
}
END_TEST

START_TEST(equal_means_of_other_shape_are_found)
{
	struct sample a = fill(0, MANY, normal, 1000, 50), b = fill(1, MANY, normal, 1000, 60);

	ck_assert_double_lt(fabs(welch_t(&a, &b)), 4.5);
	ck_assert_double_lt(ks_probability(ks_distance(&a, &b), a.n, b.n), 1e-4);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("statistics");
	TCase *tc = tcase_create("statistics");
	SRunner *sr;
	int failed;

	rng = rng_seed(20170327);
	tcase_set_timeout(tc, 120);
	tcase_add_test(tc, welch_of_known_values);
	tcase_add_test(tc, welch_of_constants);
	tcase_add_test(tc, ks_of_known_values);
	tcase_add_test(tc, equal_samples_pass);
	tcase_add_test(tc, shifted_means_are_found);
	tcase_add_test(tc, tails_hide_nothing);
	tcase_add_test(tc, equal_means_of_other_shape_are_found);
	suite_add_tcase(s, tc);
	sr = srunner_create(s);
	srunner_set_fork_status(sr, CK_NOFORK);
	srunner_run_all(sr, CK_NORMAL);
	failed = srunner_ntests_failed(sr);
	srunner_free(sr);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
