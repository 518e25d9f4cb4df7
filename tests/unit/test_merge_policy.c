/* SPDX-License-Identifier: MIT */
/*
 * What merging looks at, and when: advised steps, new guests, hints, idle memory. Time is a clock
 * that the test moves; nothing here depends on how fast the machine is.
 */
#include <check.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdlib.h>

#include <kage/kage.h>
#include "api/engine.h"

#define PAGE KAGE_PAGE_SIZE
#define MS ((uint64_t)1000000)
#define SECOND (1000 * MS)

static void is(long long got, long long want)
{
	ck_assert_int_eq(got, want);
}

/* -- the world: an engine on a clock of ours ------------------------------------------------ */

static struct {
	_Atomic uint64_t wall, cpu;
	uint64_t step_cost; /* every look at the CPU clock finds it `step_cost` further on */
	uint64_t look; /* the same of the other */
} clock_;

/* What this thread does in a step that has begun and done nothing yet: at its third look, if it has a budget in microseconds. */
static __thread unsigned looks_left;
static __thread void (*when_begun)(void);

static uint64_t fake_now(void *opaque, enum kage_clock_id id)
{
	if (id == KAGE_CLOCK_WALL && looks_left && --looks_left == 0)
		when_begun();
	if (id == KAGE_CLOCK_WALL)
		return atomic_fetch_add(&clock_.wall, clock_.look) + clock_.look;
	return atomic_fetch_add(&clock_.cpu, clock_.step_cost) + clock_.step_cost;
}

static struct kage_engine *engine;

static void setup(void)
{
	clock_.wall = 5 * SECOND;
	clock_.cpu = 0;
	clock_.step_cost = MS;
	clock_.look = 0;
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
		{.backoff = 101}, {.flags = 4},
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

/* A budget that ends among the last pages of what is scanned as one: the rest of them comes in the next step. */
START_TEST(the_end_of_a_chunk)
{
	const uint64_t first = 32768 - 512;
	struct kage_progress p;
	uint64_t scanned = 0;
	struct kage_vm *vm;

	is(kage_vm_create(engine, NULL, &vm), 0);
	is(kage_vm_map(vm, KAGE_CFG(kage_region, .gpa = first * PAGE, .len = 512 * PAGE,
				    .flags = KAGE_REGION_MERGEABLE | KAGE_REGION_NOHUGE)), 0);
	for (unsigned i = 0; i < 512; i++)
		put(vm, first + i, i + 1);
	tune(0, 0, 0, 0, 0);
	step(0, 0);
	do {
		p = step(0, 200);
		scanned += p.pages_scanned;
	} while (p.more);
	is(scanned, 512);
	is(stats(vm).ksm_pages_unshared, 512);
	is(kage_vm_destroy(vm), 0);
}
END_TEST

/* What a clone shares has been read as its parent's; what either writes is read once. */
START_TEST(a_clone_is_not_read_again)
{
	struct kage_vm *vm = guest(300, KAGE_REGION_MERGEABLE), *clone;

	tune(0, 0, 0, 0, 0);
	for (unsigned i = 0; i < 300; i++)
		put(vm, i, i + 1);
	is(step(0, 0).pages_scanned + step(0, 0).pages_scanned + step(0, 0).pages_scanned, 300);
	is(kage_vm_clone(vm, NULL, &clone), 0);
	for (unsigned i = 0; i < 4; i++)
		step(0, 0);
	is(stats(vm).ksm_pages_scanned, 300);
	is(stats(clone).ksm_pages_scanned, 0);
	put(clone, 7, 1000);
	put(clone, 8, 30); /* as page 29 of both */
	put(vm, 9, 1001);
	for (unsigned i = 0; i < 4; i++)
		step(0, 0);
	is(stats(clone).ksm_pages_scanned, 2);
	is(stats(vm).ksm_pages_scanned, 301);
	is(stats(clone).ksm_merges + stats(vm).ksm_merges, 1);
	is(kage_vm_destroy(clone), 0);
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

/* -- hints, and what is new ---------------------------------------------------------------------- */

/* A guest that is new while a long pass is under way: two steps, and it has found its family. */
START_TEST(new_guests_go_first)
{
	struct kage_vm *old = guest(8192, KAGE_REGION_MERGEABLE), *family[4];
	struct kage_progress p;

	tune(0, 0, 0, 0, 0);
	for (unsigned g = 0; g < 3; g++)
		family[g] = guest(256, KAGE_REGION_MERGEABLE);
	for (unsigned i = 0; i < 256; i++)
		for (unsigned g = 0; g < 3; g++)
			put(family[g], i, 1 + i);
	for (unsigned i = 0; i < 3; i++)
		step(0, 0);
	is(stats(NULL).ksm_pages_shared, 256);
	is(stats(NULL).ksm_pages_sharing, 512);
	for (unsigned i = 0; i < 8192; i++)
		put(old, i, 5000 + i);
	step(0, 0);
	p = step(0, 100); /* a pass that will take a while */
	is(p.pages_scanned, 100);
	is(p.more, 1);
	family[3] = guest(256, KAGE_REGION_MERGEABLE);
	for (unsigned i = 0; i < 256; i++)
		put(family[3], i, 1 + i);
	ck_assert(due());
	p = step(0, 1);
	is(p.pages_merged, 0); /* what it holds is known from here on */
	p = step(0, 256);
	is(p.pages_scanned, 256);
	is(p.pages_merged, 256);
	is(stats(family[3]).pages_shared_merge, 256);
	is(stats(NULL).frames_used, 256 + 8192);
	for (unsigned g = 0; g < 4; g++)
		is(kage_vm_destroy(family[g]), 0);
	is(kage_vm_destroy(old), 0);
}
END_TEST

/* What a new guest goes on writing is not merged on the way, and nothing of a guest's end is left behind. */
START_TEST(new_guests_that_write)
{
	struct kage_vm *vm, *gone;

	tune(0, 0, 0, 0, 0);
	vm = guest(64, KAGE_REGION_MERGEABLE);
	gone = guest(64, KAGE_REGION_MERGEABLE);
	for (unsigned i = 0; i < 64; i++)
		put(vm, i, 1);
	step(0, 0);
	is(kage_vm_destroy(gone), 0);
	for (unsigned i = 0; i < 10; i++)
		put(vm, i, 1);
	is(step(0, 0).pages_merged, 53); /* the first of 54 stays where it is */
	is(stats(vm).pages_private, 10);
	is(step(0, 0).pages_merged, 10);
	is(kage_vm_destroy(vm), 0);
}
END_TEST

START_TEST(hints_go_first_and_do_not_wait)
{
	struct kage_vm *vm = guest(1024, KAGE_REGION_MERGEABLE);
	struct kage_progress p;

	tune(0, 0, 0, 0, 0);
	for (unsigned i = 0; i < 1024; i++)
		put(vm, i, 7);
	is(kage_vm_advise(vm, 100 * PAGE, 50 * PAGE, KAGE_ADVICE_MERGE_FIRST), 0);
	is(kage_vm_advise(vm, 150 * PAGE, 50 * PAGE, KAGE_ADVICE_MERGE_FIRST), 0);
	p = step(0, 100);
	is(p.pages_scanned, 100);
	is(p.pages_merged, 99);
	is(stats(vm).pages_shared_merge, 100);
	p = step(0, 0);
	is(p.pages_merged, 0);
	p = step(0, 0);
	is(p.pages_merged, 924);
	/* written, hinted, merged again, though it has just changed */
	put(vm, 5, 9);
	put(vm, 6, 9);
	is(kage_vm_advise(vm, 0, 10 * PAGE, KAGE_ADVICE_MERGE_FIRST), 0);
	p = step(0, 0);
	is(p.pages_scanned, 2);
	is(p.pages_merged, 1);
	is(kage_vm_destroy(vm), 0);
}
END_TEST

START_TEST(hints_are_checked)
{
	struct kage_vm *vm = guest(64, KAGE_REGION_MERGEABLE);

	is(kage_vm_advise(vm, 0, 64 * PAGE, KAGE_ADVICE_MERGE_FIRST), 0); /* merging is off: nothing to remember */
	is(step(0, 0).pages_scanned, 0);
	tune(0, 0, 0, 0, 0);
	is(kage_vm_advise(vm, 0, 65 * PAGE, KAGE_ADVICE_MERGE_FIRST), -ENOENT);
	is(kage_vm_advise(vm, 0, 1, KAGE_ADVICE_MERGE_FIRST), -EINVAL);
	is(kage_vm_map(vm, KAGE_CFG(kage_region, .gpa = 64 * PAGE, .len = PAGE)), 0);
	is(kage_vm_advise(vm, 0, 65 * PAGE, KAGE_ADVICE_MERGE_FIRST), -EOPNOTSUPP);
	is(kage_vm_advise(vm, 64 * PAGE, PAGE, KAGE_ADVICE_MERGEABLE), 0);
	is(kage_vm_advise(vm, 0, 65 * PAGE, KAGE_ADVICE_MERGE_FIRST), 0);
	is(kage_vm_destroy(vm), 0); /* with the hint that nobody has looked at */
	step(0, 0);
}
END_TEST

/* Whoever goes on giving hints that nobody comes to gets no more memory for them than for a thousand; all the same all is merged. */
START_TEST(hints_are_limited)
{
	struct kage_vm *vm = guest(4096, KAGE_REGION_MERGEABLE);
	uint64_t bytes;
	unsigned n = 0;

	tune(0, 0, 0, 0, 0);
	for (unsigned i = 0; i < 4096; i++)
		put(vm, i, 7);
	for (unsigned i = 0; i < 100; i++) /* the same one again */
		is(kage_vm_advise(vm, 0, 10 * PAGE, KAGE_ADVICE_MERGE_FIRST), 0);
	bytes = stats(NULL).ksm_bytes;
	while (n < 2048 && kage_vm_advise(vm, 2 * n * PAGE, PAGE, KAGE_ADVICE_MERGE_FIRST) == 0)
		n++;
	ck_assert_uint_gt(n, 1000);
	ck_assert_uint_le(n, 1024 + 5);
	is(kage_vm_advise(vm, 4000 * PAGE, PAGE, KAGE_ADVICE_MERGE_FIRST), -ENOMEM);
	ck_assert_uint_le(stats(NULL).ksm_bytes - bytes, 1024 * 128);
	for (unsigned i = 0; i < 3; i++)
		step(0, 0);
	is(stats(NULL).frames_used, 1);
	is(stats(vm).pages_shared_merge, 4096);
	is(kage_vm_advise(vm, 4000 * PAGE, PAGE, KAGE_ADVICE_MERGE_FIRST), 0); /* there is room again */
	ck_assert(due());
	is(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = 0)), 0); /* it waits, and nobody is called for it */
	step(0, 0);
	ck_assert(!due());
	tune(0, 0, 0, 0, 0);
	step(0, 0);
	step(0, 0);
	ck_assert(!due());
	is(kage_vm_destroy(vm), 0);
}
END_TEST

/* -- without memory ------------------------------------------------------------------------------ */

static bool scarce;
static unsigned refused;

/* While it is scarce there is memory for everything but what is remembered of 128 MiB of a guest: 4 bits a page. */
static void *scarce_alloc(void *opaque, size_t bytes)
{
	size_t room = (bytes + 63) & ~(size_t)63;
	void *p;

	if (scarce && bytes > 16384 && bytes < 20000) {
		refused++;
		return NULL;
	}
	p = aligned_alloc(64, room);
	return p ? memset(p, 0, room) : NULL;
}

static void scarce_free(void *opaque, void *ptr, size_t bytes)
{
	free(ptr);
}

/* A new guest for which there is no memory stops nobody else's merging, neither its hint nor the pass that comes to it. */
START_TEST(no_memory_for_one_guest)
{
	struct kage_vm *before, *poor, *after;

	is(kage_engine_destroy(engine), 0);
	is(kage_engine_create(KAGE_CFG(kage_engine_config, .seed = 11, .alloc = {scarce_alloc, scarce_free, NULL}), &engine), 0);
	before = guest(8, KAGE_REGION_MERGEABLE);
	is(kage_vm_create(engine, NULL, &poor), 0);
	after = guest(8, KAGE_REGION_MERGEABLE);
	put(before, 0, 1);
	put(after, 0, 2);
	tune(0, 0, 0, 0, 0);
	for (unsigned i = 0; i < 3; i++)
		step(0, 0);
	scarce = true;
	is(kage_vm_map(poor, KAGE_CFG(kage_region, .len = 8 * PAGE, .flags = KAGE_REGION_MERGEABLE | KAGE_REGION_NOHUGE)), 0);
	put(poor, 0, 1);
	put(before, 1, 2);
	put(after, 1, 1);
	for (unsigned i = 0; i < 3; i++)
		is(kage_engine_step(engine, NULL, NULL), -ENOMEM);
	ck_assert_uint_ge(refused, 3);
	is(stats(NULL).ksm_merges, 2);
	scarce = false;
	step(0, 0);
	step(0, 0);
	is(stats(NULL).ksm_merges, 3);
	is(kage_vm_destroy(before), 0);
	is(kage_vm_destroy(poor), 0);
	is(kage_vm_destroy(after), 0);
}
END_TEST

/* -- cost follows writes ---------------------------------------------------------------------------- */

START_TEST(idle_memory_costs_nothing)
{
	uint64_t chunk = (uint64_t)128 << 20, chunks = 512; /* 64 GiB, or what a sanitizer or an emulator has room for */
	struct kage_stats before, after;
	struct kage_vm *vm;
	int r;

	tune(0, 0, 0, 0, 0);
	is(kage_vm_create(engine, NULL, &vm), 0);
	for (;; chunks /= 2) {
		is(kage_vm_map(vm, KAGE_CFG(kage_region, .len = chunks * chunk, .flags = KAGE_REGION_MERGEABLE)), 0);
		r = kage_vm_write(vm, 0, &chunk, sizeof(chunk)); /* reserves all of it */
		if (r != -ENOMEM || chunks <= 8)
			break;
		is(kage_vm_unmap(vm, 0, chunks * chunk), 0);
	}
	is(r, 0);
	for (unsigned i = 0; i < chunks; i++)
		put(vm, i * chunk / PAGE, 1 + i);
	for (unsigned i = 0; i < 5; i++)
		step(0, 0);
	before = stats(vm);
	is(before.ksm_pages_unshared, chunks);
	for (unsigned i = 0; i < 100; i++)
		step(0, 0);
	after = stats(vm);
	is(after.ksm_full_scans - before.ksm_full_scans, 100);
	is(after.ksm_chunk_visits - before.ksm_chunk_visits, 0);
	is(after.ksm_pages_scanned - before.ksm_pages_scanned, 0);
	/* three pages of two chunks are written: three are read, and only those chunks are gone through */
	put(vm, 7, 4242);
	put(vm, 9, 4243);
	put(vm, chunks / 2 * chunk / PAGE, 4244);
	for (unsigned i = 0; i < 20; i++)
		step(0, 0);
	is(stats(vm).ksm_chunk_visits - after.ksm_chunk_visits, 4); /* one finds them written, one quiet */
	is(stats(vm).ksm_pages_scanned - after.ksm_pages_scanned, 3);
	is(kage_vm_destroy(vm), 0);
}
END_TEST

/* -- guests that come and go ------------------------------------------------------------------ */

#define HERD 24

static struct {
	struct kage_vm *vm;
	uint64_t scans; /* passes that had come to it when the last one ended */
	bool whole;     /* it was there then */
} herd[HERD];

static unsigned dice(unsigned n)
{
	static uint64_t state;

	state = state * 6364136223846793005u + 1442695040888963407u;
	return (unsigned)(state >> 33) % n;
}

/* Destroys the guest of a slot, or fills it: with another one's clone, or a new guest. */
static void come_or_go(unsigned i)
{
	unsigned parent = dice(HERD);

	if (herd[i].vm) {
		is(kage_vm_destroy(herd[i].vm), 0);
		herd[i].vm = NULL;
	} else if (herd[parent].vm) {
		is(kage_vm_clone(herd[parent].vm, NULL, &herd[i].vm), 0);
	} else {
		herd[i].vm = guest(2, KAGE_REGION_MERGEABLE);
	}
	herd[i].whole = false;
	herd[i].scans = 0;
}

/* A pass has ended. Returns how many guests were there for all of it. */
static unsigned herd_check(void)
{
	unsigned whole = 0;

	for (unsigned i = 0; i < HERD; i++) {
		uint64_t scans = herd[i].vm ? stats(herd[i].vm).ksm_full_scans : 0;

		if (herd[i].whole)
			is(scans, herd[i].scans + 1);
		ck_assert_uint_le(scans, herd[i].scans + 1);
		whole += herd[i].whole;
		herd[i].scans = scans;
		herd[i].whole = herd[i].vm != NULL;
	}
	return whole;
}

/* Passes one move at a time, the one the pass is at among those that go meanwhile. */
START_TEST(each_guest_once_a_pass)
{
	uint64_t passes = 0, whole = 0;

	tune(0, 0, 0, 0, 0);
	clock_.look = MS; /* a step looks before each move, and once more: it has time for one */
	while (passes < 300) {
		struct kage_progress p = {.size = sizeof(p)};

		is(kage_engine_step(engine, KAGE_CFG(kage_budget, .usec = 1500), &p), 0);
		ck_assert_uint_le(p.passes, passes + 1);
		if (p.passes != passes)
			whole += herd_check();
		passes = p.passes;
		if (dice(4) == 0)
			come_or_go(dice(HERD));
	}
	ck_assert_uint_gt(whole, 300);
	for (unsigned i = 0; i < HERD; i++)
		is(kage_vm_destroy(herd[i].vm), 0);
}
END_TEST

/* What merging remembers of guests goes with them. */
START_TEST(memory_of_guests_that_went)
{
	struct kage_vm *vm;
	uint64_t before;

	tune(0, 0, 0, 0, 0);
	step(0, 0);
	before = stats(NULL).ksm_bytes;
	vm = guest(40000, KAGE_REGION_MERGEABLE);
	for (unsigned i = 0; i < 40000; i++)
		put(vm, i, 1 + i);
	for (unsigned i = 0; i < 3; i++)
		step(0, 0);
	ck_assert_uint_gt(stats(NULL).ksm_bytes, before + 40000 * 16);
	is(stats(NULL).ksm_pages_unshared, 40000);
	is(kage_vm_destroy(vm), 0);
	step(0, 0);
	step(0, 0);
	is(stats(NULL).ksm_bytes, before);
}
END_TEST

/* Equal contents appear in what has been idle for long: merged in the pass after the one that saw them come. */
START_TEST(idle_memory_is_not_forgotten)
{
	struct kage_vm *vm = guest(4096, KAGE_REGION_MERGEABLE);

	tune(0, 0, 0, 0, 0);
	for (unsigned i = 0; i < 4096; i++)
		put(vm, i, 1 + i);
	for (unsigned i = 0; i < 60; i++)
		step(0, 0);
	for (unsigned i = 0; i < 4096; i += 37)
		put(vm, i, 9999);
	step(0, 0);
	is(step(0, 0).pages_merged, 4096 / 37);
	is(kage_vm_destroy(vm), 0);
}
END_TEST

/* -- limits ------------------------------------------------------------------------------------------ */

/* Twice as many pages as may share a frame, one more, and one more than that; then room comes back. */
START_TEST(sharers_beyond_the_limit)
{
	struct kage_vm *vm = guest(32, KAGE_REGION_MERGEABLE);
	struct kage_stats s;

	tune(8, 0, 0, 0, 0);
	for (unsigned i = 0; i < 17; i++)
		put(vm, i, 3);
	for (unsigned i = 0; i < 3; i++)
		step(0, 0);
	s = stats(NULL);
	is(s.ksm_pages_shared, 2);
	is(s.ksm_pages_sharing, 14);
	is(s.ksm_pages_unshared, 1); /* nobody to share a third frame with */
	is(s.frames_used, 3);
	put(vm, 17, 3);
	for (unsigned i = 0; i < 3; i++)
		step(0, 0);
	s = stats(NULL);
	is(s.ksm_pages_shared, 3);
	is(s.ksm_pages_sharing, 15);
	is(s.frames_used, 3);
	for (unsigned i = 0; i < 18; i++) /* whichever frame they are on: two full, and one with room for six */
		is(kage_vm_advise(vm, i * PAGE, PAGE, KAGE_ADVICE_WILLNEED), 0);
	is(stats(NULL).ksm_pages_shared, 0);
	for (unsigned i = 0; i < 4; i++)
		step(0, 0);
	is(stats(NULL).frames_used, 3);
	is(kage_vm_destroy(vm), 0);
}
END_TEST

/* Ten thousand frames with the same contents: the full ones are not gone through for each page. Any of them takes one more. */
START_TEST(many_frames_of_one_content)
{
	enum { N = 20000 };
	struct kage_vm *vm = guest(N + 2, KAGE_REGION_MERGEABLE);
	struct kage_stats s;

	tune(2, 0, 0, 0, 0);
	for (unsigned i = 0; i < N; i++)
		put(vm, i, 3);
	step(0, 0);
	is(step(0, 0).pages_merged, N / 2);
	s = stats(NULL);
	is(s.ksm_pages_shared, N / 2);
	is(s.ksm_pages_sharing, N / 2);
	is(s.ksm_stable_chains, 1);
	is(s.ksm_stable_dups, N / 2);
	for (unsigned i = 0; i < N; i += 400) /* one place comes free in each of fifty frames, or two in some */
		put(vm, i, 4);
	is(stats(NULL).ksm_cow_breaks, 50);
	for (unsigned i = 0; i < N; i += 400)
		put(vm, i, 3);
	step(0, 0);
	is(step(0, 0).pages_merged, 50);
	s = stats(NULL);
	is(s.ksm_pages_shared, N / 2);
	is(s.ksm_pages_sharing, N / 2);
	tune(8, 0, 0, 0, 0); /* those that were full are not any more */
	put(vm, N, 3);
	put(vm, N + 1, 3);
	step(0, 0);
	is(step(0, 0).pages_merged, 2);
	is(stats(NULL).ksm_pages_shared, N / 2);
	is(stats(NULL).ksm_stable_dups, N / 2);
	is(kage_vm_destroy(vm), 0);
}
END_TEST

/* 4,096 frames: a step with a budget stops after two milliseconds, and asks for another one; a step without fills it. */
START_TEST(reserves_are_filled_in_pieces)
{
	struct kage_vm *vm;
	uint64_t last = 0;
	unsigned steps = 0;

	tune(0, 0, 0, 0, 0);
	for (unsigned d = 1; d <= 2; d++) {
		is(kage_domain_configure(engine, d, KAGE_CFG(kage_domain_config, .flags = KAGE_DOMAIN_HARDENED,
							     .reserve_frames = 4096)), 0);
		is(kage_vm_create(engine, KAGE_CFG(kage_vm_config, .merge_domain = d), &vm), 0);
		is(kage_vm_map(vm, KAGE_CFG(kage_region, .len = 64 * PAGE, .flags = KAGE_REGION_MERGEABLE)), 0);
		clock_.look = MS;
		while (d == 1 && stats(NULL).frames_reserve < 4096) {
			for (unsigned i = 0; i < 64; i++)
				put(vm, i, 1);
			is(step(0, 1000).pages_merged, 0); /* not before it is full */
			ck_assert_uint_gt(stats(NULL).frames_reserve, last);
			last = stats(NULL).frames_reserve;
			ck_assert(last == 4096 || due());
			steps++;
		}
		step(0, 0);
		is(stats(NULL).frames_reserve, 4096);
		clock_.look = 0;
		is(kage_vm_destroy(vm), 0);
		step(0, 0);
		is(stats(NULL).frames_reserve, 0);
	}
	ck_assert_uint_ge(steps, 4);
	ck_assert_uint_le(steps, 32);
}
END_TEST

/* -- several threads: what one has seen written is not quiet for the others ------------------------ */

#define SEEN 64u

static uint64_t step_with(void (*begun)(void))
{
	struct kage_progress p = {.size = sizeof(p)};

	looks_left = 3;
	when_begun = begun;
	if (kage_engine_step(engine, KAGE_CFG(kage_budget, .usec = 1000000), &p) || looks_left)
		return UINT64_MAX;
	return p.pages_merged;
}

static struct {
	pthread_t thread;
	sem_t begun, go;
	uint64_t merged;
} other;

static void other_waits(void)
{
	sem_post(&other.begun);
	sem_wait(&other.go);
}

static void *other_step(void *arg)
{
	other.merged = step_with(other_waits);
	return NULL;
}

static void other_begins(void)
{
	uint64_t before = atomic_load(&engine->merge.steps);

	is(pthread_create(&other.thread, NULL, other_step, NULL), 0);
	sem_wait(&other.begun);
	is(atomic_load(&engine->merge.steps), before + 1);
}

static void put_alike(struct kage_vm *a, struct kage_vm *b)
{
	for (unsigned i = 0; i < SEEN; i++) {
		put(a, i, 1 + i);
		put(b, i, 1 + i);
	}
}

/*
 * Two steps have begun. One of them sees what was written, in new memory or in a pass, and ends; then the other goes on. It
 * does not take it for quiet, whichever began first; the next step does.
 */
START_TEST(steps_that_had_begun)
{
	bool before = _i % 2, new = _i / 2;
	struct kage_vm *a, *b;

	sem_init(&other.begun, 0, 0);
	sem_init(&other.go, 0, 0);
	tune(0, 0, 0, 0, 0);
	a = guest(SEEN, KAGE_REGION_MERGEABLE);
	b = guest(SEEN, KAGE_REGION_MERGEABLE);
	for (unsigned i = 0; i < 3 && !new; i++)
		step(0, 0);
	put_alike(a, b);
	if (before) {
		other_begins();
		is(step(0, 0).pages_merged, 0);
	} else {
		is(step_with(other_begins), 0);
	}
	sem_post(&other.go);
	is(pthread_join(other.thread, NULL), 0);
	is(other.merged, 0);
	is(stats(NULL).ksm_pages_sharing, 0);
	is(step(0, 0).pages_merged, SEEN);
	is(stats(NULL).ksm_pages_sharing, SEEN);
	sem_destroy(&other.begun);
	sem_destroy(&other.go);
	is(kage_vm_destroy(a), 0);
	is(kage_vm_destroy(b), 0);
}
END_TEST

#define AT_ONCE 3u

static uint64_t steps_begun;

static void wait_for_all(void)
{
	while (atomic_load(&engine->merge.steps) < steps_begun)
		sched_yield();
}

static void *step_at_once(void *arg)
{
	*(uint64_t *)arg = step_with(wait_for_all);
	return NULL;
}

/* The same of steps that really go on at once, from their beginnings on. */
START_TEST(steps_at_once)
{
	struct kage_vm *vm[4];
	pthread_t thread[AT_ONCE];
	uint64_t merged[AT_ONCE];

	tune(0, 0, 0, 0, 0);
	for (unsigned round = 0; round < 20; round++) {
		for (unsigned g = 0; g < 4; g++)
			vm[g] = guest(SEEN, KAGE_REGION_MERGEABLE);
		put_alike(vm[0], vm[1]);
		put_alike(vm[2], vm[3]);
		steps_begun = atomic_load(&engine->merge.steps) + AT_ONCE;
		for (unsigned i = 0; i < AT_ONCE; i++)
			is(pthread_create(&thread[i], NULL, step_at_once, &merged[i]), 0);
		for (unsigned i = 0; i < AT_ONCE; i++)
			is(pthread_join(thread[i], NULL), 0);
		for (unsigned i = 0; i < AT_ONCE; i++)
			is(merged[i], 0);
		is(step(0, 0).pages_merged, 3 * SEEN);
		for (unsigned g = 0; g < 4; g++)
			is(kage_vm_destroy(vm[g]), 0);
	}
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
	tcase_add_test(tc, the_end_of_a_chunk);
	tcase_add_test(tc, a_clone_is_not_read_again);
	tcase_add_test(tc, advised_steps_sleep);
	tcase_add_test(tc, new_guests_go_first);
	tcase_add_test(tc, new_guests_that_write);
	tcase_add_test(tc, hints_go_first_and_do_not_wait);
	tcase_add_test(tc, hints_are_checked);
	tcase_add_test(tc, hints_are_limited);
	tcase_add_test(tc, no_memory_for_one_guest);
	tcase_add_test(tc, idle_memory_costs_nothing);
	tcase_add_test(tc, idle_memory_is_not_forgotten);
	tcase_add_test(tc, each_guest_once_a_pass);
	tcase_add_test(tc, memory_of_guests_that_went);
	tcase_add_test(tc, sharers_beyond_the_limit);
	tcase_add_test(tc, many_frames_of_one_content);
	tcase_add_test(tc, reserves_are_filled_in_pieces);
	tcase_add_loop_test(tc, steps_that_had_begun, 0, 4);
	tcase_add_test(tc, steps_at_once);
	suite_add_tcase(suite, tc);
	runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed != 0;
}
