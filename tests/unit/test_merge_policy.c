/* SPDX-License-Identifier: MIT */
/*
 * What merging looks at, and when: advised steps. Time is a clock
 * that the test moves; nothing here depends on how fast the machine is.
 */
#include <check.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>

#include <kage/kage.h>

#define PAGE KAGE_PAGE_SIZE
#define MS ((uint64_t)1000000)
#define SECOND (1000 * MS)

static void is(long long got, long long want)
{
	ck_assert_int_eq(got, want);
}

/* -- the world: an engine on a clock of ours ------------------------------------------------ */

static struct {
	uint64_t wall, cpu, step_cost; /* every look at the CPU clock finds it `step_cost` further on */
} clock_;

static uint64_t fake_now(void *opaque, enum kage_clock_id id)
{
	if (id == KAGE_CLOCK_WALL)
		return clock_.wall;
	clock_.cpu += clock_.step_cost;
	return clock_.cpu;
}

static struct kage_engine *engine;

static void setup(void)
{
	clock_.wall = 5 * SECOND;
	clock_.cpu = 0;
	clock_.step_cost = MS;
	is(kage_engine_create(KAGE_CFG(kage_engine_config, .seed = 11, .clock = {.now = fake_now}), &engine), 0);
}

static void teardown(void)
{
	struct kage_audit a = {.size = sizeof(a)};

	is(kage_engine_audit(engine, &a), 0);
	is(kage_engine_destroy(engine), 0);
}

static struct kage_vm *guest(uint64_t pages, uint32_t flags)
{
	struct kage_vm *vm;

	is(kage_vm_create(engine, NULL, &vm), 0);
	is(kage_vm_map(vm, KAGE_CFG(kage_region, .len = pages * PAGE, .flags = flags | KAGE_REGION_NOHUGE)), 0);
	return vm;
}

static void put(struct kage_vm *vm, uint64_t page, uint64_t content)
{
	uint64_t buf[PAGE / 8];

	for (unsigned i = 0; i < PAGE / 8; i++)
		buf[i] = content ? content * 0x9e3779b97f4a7c15u + i : 0;
	is(kage_vm_write(vm, page * PAGE, buf, PAGE), 0);
}

static struct kage_stats stats(struct kage_vm *vm)
{
	struct kage_stats s = {.size = sizeof(s)};

	is(kage_stats_get(engine, vm, &s), 0);
	return s;
}

static struct kage_progress step(uint32_t flags, uint64_t pages)
{
	struct kage_progress p = {.size = sizeof(p)};

	is(kage_engine_step(engine, KAGE_CFG(kage_budget, .flags = flags, .pages = pages), &p), 0);
	return p;
}

static bool due(void)
{
	struct pollfd p = {.fd = kage_engine_fd(engine), .events = POLLIN};

	return poll(&p, 1, 0) == 1;
}

static void tune(uint32_t max_sharing, uint32_t share, uint32_t scan_msec, uint32_t min_pages, uint32_t max_pages)
{
	is(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE, .max_sharing = max_sharing,
					     .cpu_share = share, .scan_msec = scan_msec, .min_pages = min_pages,
					     .max_pages = max_pages)), 0);
}

/* -- advised steps ---------------------------------------------------------------------------- */

START_TEST(bad_settings)
{
	static const struct kage_tune bad[] = {
		{.cpu_share = 10001}, {.scan_msec = 86400001}, {.min_pages = 65, .max_pages = 64}, {.max_sharing = 1},
	};

	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		struct kage_tune t = bad[i];

		t.size = sizeof(t);
		is(kage_engine_tune(engine, &t), -EINVAL);
	}
	tune(0, 10000, 86400000, 64, 64);
	is(kage_engine_step(engine, KAGE_CFG(kage_budget, .flags = 2), NULL), -EINVAL);
	/* structs as they were before the advisor */
	is(kage_engine_tune(engine, &(struct kage_tune){.size = 16}), 0);
	is(kage_engine_step(engine, NULL, &(struct kage_progress){.size = 40}), 0);
}
END_TEST

/* An embedder that sleeps as it is told: every pass takes scan_msec, and the CPU that is used is the share. */
START_TEST(advised_steps_keep_the_pace)
{
	struct kage_vm *vm = guest(4096, KAGE_REGION_MERGEABLE);
	uint64_t begin, last = 0, steps = 0;
	struct kage_progress p;

	tune(0, 10, 2000, 64, 0);
	for (unsigned i = 0; i < 4096; i++)
		put(vm, i, i + 1);
	begin = clock_.wall;
	do {
		p = step(KAGE_BUDGET_ADVISED, 0);
		ck_assert_uint_le(p.pages_scanned, p.pages_budget);
		if (p.passes != last && last)
			ck_assert_uint_ge(clock_.wall - begin, 2 * SECOND * (last - 1));
		last = p.passes;
		clock_.wall += p.wait_usec * 1000;
		ck_assert_uint_lt(++steps, 10000);
	} while (p.passes < 5);
	ck_assert_uint_ge(clock_.wall - begin, 8 * SECOND);
	ck_assert_uint_le(clock_.wall - begin, 11 * SECOND);
	is(stats(vm).ksm_pages_unshared, 4096);
	/* steps of 1 ms each: not more than a tenth of the time, with the first second's credit */
	ck_assert_uint_le(steps * MS, (clock_.wall - begin + SECOND) / 10 + 10 * MS);
	is(kage_vm_destroy(vm), 0);
}
END_TEST

/* Its own limits hold as well, and a step that is not advised does as it always did. */
START_TEST(advised_with_a_limit)
{
	struct kage_vm *vm = guest(1000, KAGE_REGION_MERGEABLE);
	struct kage_progress p;

	tune(0, 100, 1000, 64, 0);
	for (unsigned i = 0; i < 1000; i++)
		put(vm, i, i + 1);
	step(0, 0);
	clock_.wall += SECOND;
	p = step(KAGE_BUDGET_ADVISED, 10);
	is(p.pages_budget, 10);
	is(p.pages_scanned, 10);
	p = step(0, 20);
	is(p.pages_scanned, 20);
	is(p.wait_usec, 0);
	is(p.pages_budget, 0);
	p = step(0, 0);
	is(p.pages_scanned, 970);
	is(kage_vm_destroy(vm), 0);
}
END_TEST

/* The descriptor: writes of guests wait for the advisor's next step, what is new does not. */
START_TEST(advised_steps_sleep)
{
	struct kage_vm *vm = guest(64, KAGE_REGION_MERGEABLE);

	tune(0, 0, 0, 0, 0);
	for (unsigned i = 0; i < 64; i++)
		put(vm, i, i + 1);
	for (unsigned i = 0; i < 4; i++, clock_.wall += 10 * SECOND)
		step(KAGE_BUDGET_ADVISED, 0);
	ck_assert(step(KAGE_BUDGET_ADVISED, 0).wait_usec != 0);
	ck_assert(!due());
	put(vm, 3, 99);
	ck_assert(!due());
	is(kage_vm_map(vm, KAGE_CFG(kage_region, .gpa = 1 << 30, .len = PAGE, .flags = KAGE_REGION_MERGEABLE)), 0);
	ck_assert(due());
	step(0, 0);
	step(0, 0);
	step(0, 0);
	ck_assert(!due());
	put(vm, 3, 98);
	ck_assert(due());
	is(kage_vm_destroy(vm), 0);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("merge-policy");
	TCase *tc = tcase_create("merge-policy");
	SRunner *runner;
	int failed;

	tcase_set_timeout(tc, 120);
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_test(tc, bad_settings);
	tcase_add_test(tc, advised_steps_keep_the_pace);
	tcase_add_test(tc, advised_with_a_limit);
	tcase_add_test(tc, advised_steps_sleep);
	suite_add_tcase(suite, tc);
	runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed != 0;
}
