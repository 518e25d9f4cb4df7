/* SPDX-License-Identifier: MIT */
/*
 * Back-off of merging: how long pages are left alone, and what is remembered.
 */
#include <check.h>
#include <stdlib.h>

#include "merge/backoff.h"

static struct env env;
static struct backoff *b;
static int64_t bytes;

static void *count_alloc(void *opaque, size_t n)
{
	bytes += (int64_t)n;
	return calloc(1, n);
}

static void count_free(void *opaque, void *p, size_t n)
{
	bytes -= (int64_t)n;
	free(p);
}

static void setup(void)
{
	struct kage_engine_config c = { .alloc = { .alloc = count_alloc, .free = count_free } };

	env_init(&env, &c);
	b = NULL;
	bytes = 0;
}

static void teardown(void)
{
	env_free(&env, b, sizeof(*b));
	env_finish(&env);
	ck_assert_int_eq(bytes, 0);
}

/* Passes after `pass` in which the page is left alone. */
static unsigned left_alone(unsigned page, uint64_t pass)
{
	uint64_t back;
	unsigned n = 0;

	while (backoff_off(b, page / 64, pass + 1 + n, &back) >> (page % 64) & 1)
		n++;
	return n;
}

START_TEST(twice_as_long_each_time)
{
	static const unsigned want[] = { 1, 2, 4, 8, 16, 32, 64, 64, 64, 64 };
	uint64_t pass = 250; /* numbers wrap at 256 on the way */

	for (unsigned k = 0; k < ARRAY_SIZE(want); k++) {
		backoff_failed(&env, &b, 3, (uint64_t)1 << 17, pass, BACKOFF_DEFAULT);
		ck_assert_uint_eq(left_alone(3 * 64 + 17, pass), want[k]);
		pass += want[k] + 3;
	}
}
END_TEST

START_TEST(bounds)
{
	static const unsigned most[] = { 1, 5, 64, BACKOFF_MOST };

	for (unsigned i = 0; i < ARRAY_SIZE(most); i++) {
		for (unsigned k = 0; k < 20; k++) {
			backoff_failed(&env, &b, 0, 1, 1000 * k, most[i]);
			ck_assert_uint_eq(left_alone(0, 1000 * k), MIN(k < 10 ? 1u << k : 1024, most[i]));
		}
		backoff_lasted(&env, &b, 0, 1);
		ck_assert_ptr_null(b);
	}
}
END_TEST

/* A try that lasts forgets all that came before it. */
START_TEST(success_resets)
{
	for (unsigned k = 0; k < 5; k++) {
		backoff_failed(&env, &b, 6, 1, 10, BACKOFF_DEFAULT);
		backoff_failed(&env, &b, 7, 1, 10, BACKOFF_DEFAULT);
	}
	backoff_lasted(&env, &b, 7, 1);
	ck_assert_uint_eq(left_alone(7 * 64, 10), 0);
	ck_assert_uint_eq(left_alone(6 * 64, 10), 16);
	backoff_failed(&env, &b, 7, 1, 20, BACKOFF_DEFAULT);
	ck_assert_uint_eq(left_alone(7 * 64, 20), 1);
}
END_TEST

/* Asking what stays away changes nothing; when the pass comes, who is back is said once. */
START_TEST(who_is_back)
{
	uint64_t back = 0;

	backoff_failed(&env, &b, 1, 0x30, 7, BACKOFF_DEFAULT);
	backoff_failed(&env, &b, 1, 0x20, 9, BACKOFF_DEFAULT); /* two passes now: 10 and 11 */
	ck_assert_uint_eq(backoff_stays(b, 1, 8), 0x30);
	ck_assert_uint_eq(backoff_stays(b, 1, 12), 0);
	ck_assert_uint_eq(backoff_off(b, 1, 8, &back), 0x30);
	ck_assert_uint_eq(back, 0);
	ck_assert_uint_eq(backoff_off(b, 1, 10, &back), 0x20);
	ck_assert_uint_eq(back, 0x10);
	ck_assert_uint_eq(backoff_off(b, 1, 10, &back), 0x20);
	ck_assert_uint_eq(back, 0);
	ck_assert_uint_eq(backoff_stays(NULL, 1, 10), 0);
	ck_assert_uint_eq(backoff_off(NULL, 1, 10, &back), 0);
	ck_assert_uint_eq(back, 0);
}
END_TEST

/* Memory: one object for 2 MiB in which a page has failed, none otherwise. */
START_TEST(memory_follows_failures)
{
	uint64_t back;

	backoff_lasted(&env, &b, 2, ~(uint64_t)0);
	ck_assert_uint_eq(backoff_off(b, 2, 5, &back), 0);
	ck_assert_int_eq(bytes, 0);
	for (unsigned w = 0; w < BACKOFF_WORDS; w++)
		backoff_failed(&env, &b, w, ~(uint64_t)0, w, BACKOFF_DEFAULT);
	ck_assert_int_eq(bytes, sizeof(struct backoff));
	ck_assert_uint_eq(b->failed, BLOCK_PAGES);
	for (unsigned w = 0; w < BACKOFF_WORDS; w++) {
		ck_assert_ptr_nonnull(b);
		backoff_lasted(&env, &b, w, 0xffff0000ffff0000u);
		backoff_lasted(&env, &b, w, ~(uint64_t)0);
	}
	ck_assert_ptr_null(b);
	ck_assert_int_eq(bytes, 0);
}
END_TEST

static void *no_memory(void *opaque, size_t n)
{
	return NULL;
}

START_TEST(no_memory_means_no_back_off)
{
	uint64_t back;

	env.alloc.alloc = no_memory;
	backoff_failed(&env, &b, 0, 5, 9, BACKOFF_DEFAULT);
	ck_assert_ptr_null(b);
	ck_assert_uint_eq(backoff_off(b, 0, 10, &back), 0);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("backoff");
	TCase *tc = tcase_create("backoff");
	SRunner *runner;
	int failed;

	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_test(tc, twice_as_long_each_time);
	tcase_add_test(tc, who_is_back);
	tcase_add_test(tc, bounds);
	tcase_add_test(tc, success_resets);
	tcase_add_test(tc, memory_follows_failures);
	tcase_add_test(tc, no_memory_means_no_back_off);
	suite_add_tcase(suite, tc);
	runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed != 0;
}
