/* SPDX-License-Identifier: MIT */
/*
 * Merging in runs: what one change does, and what happens when somebody comes between.
 *
 * A listener's start is called when the pages of a run have been chosen and its frames found, but
 * neither compared nor locked. What a test does there, or begins there on a thread of its own,
 * falls into that window every time (merge/plan.c has the interleavings).
 *
 * Guests a and b hold the same; a is created first and looked at first, so b's pages are merged into a's frames.
 */
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include <kage/kage.h>
#include "merge/merge.h"

#define PAGE 4096ull
#define BLOCK (512 * PAGE)
#define PAGES 512u

static struct kage_engine *engine;
static struct kage_vm *a, *b;

static void ok(int r)
{
	ck_assert_int_eq(r, 0);
}

static void audit_line(void *opaque, const char *line)
{
	fprintf(stderr, "audit: %s\n", line);
}

static void audit(void)
{
	struct kage_audit au = { .size = sizeof(au), .report = audit_line };

	ok(kage_engine_audit(engine, &au));
	ck_assert_uint_eq(au.violations, 0);
}

static struct kage_stats stats(struct kage_vm *vm)
{
	struct kage_stats s = { .size = sizeof(s) };

	ok(kage_stats_get(engine, vm, &s));
	return s;
}

static struct kage_vm *guest(uint64_t pages, uint32_t flags)
{
	struct kage_vm *vm;

	ok(kage_vm_create(engine, NULL, &vm));
	ok(kage_vm_map(vm, KAGE_CFG(kage_region, .len = pages * PAGE, .flags = KAGE_REGION_MERGEABLE | flags)));
	return vm;
}

static uint64_t word_of(uint64_t key, unsigned i)
{
	return (key + 1) * 0x9e3779b97f4a7c15ull + i;
}

static void put(struct kage_vm *vm, uint64_t page, uint64_t key)
{
	uint64_t buf[PAGE / 8];

	for (unsigned i = 0; i < PAGE / 8; i++)
		buf[i] = word_of(key, i);
	ok(kage_vm_write(vm, page * PAGE, buf, PAGE));
}

static void holds(struct kage_vm *vm, uint64_t page, uint64_t key)
{
	uint64_t buf[PAGE / 8];

	ok(kage_vm_read(vm, page * PAGE, buf, PAGE));
	for (unsigned i = 0; i < PAGE / 8; i++)
		ck_assert_uint_eq(buf[i], word_of(key, i));
}

static void fill(struct kage_vm *vm, uint64_t pages)
{
	for (uint64_t p = 0; p < pages; p++)
		put(vm, p, p);
}

static void all_hold(struct kage_vm *vm, uint64_t pages, uint64_t but)
{
	for (uint64_t p = 0; p < pages; p++)
		if (p != but)
			holds(vm, p, p);
}

static struct kage_progress pass(void)
{
	struct kage_progress p = { .size = sizeof(p) };

	ok(kage_engine_step(engine, NULL, &p));
	return p;
}

static void setup(void)
{
	ok(kage_engine_create(KAGE_CFG(kage_engine_config, .seed = 5), &engine));
	ok(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)));
	a = b = NULL;
}

static void teardown(void)
{
	ok(kage_vm_destroy(a));
	ok(kage_vm_destroy(b));
	ok(kage_engine_step(engine, NULL, NULL));
	ck_assert_uint_eq(stats(NULL).frames_used, 0);
	ck_assert_uint_eq(stats(NULL).ksm_pages_shared, 0);
	ck_assert_uint_eq(stats(NULL).ksm_pages_unshared, 0);
	ok(kage_engine_destroy(engine));
}

static void two_equal(uint64_t pages, uint32_t flags)
{
	a = guest(pages, flags);
	b = guest(pages, flags);
	fill(a, pages);
	fill(b, pages);
	ck_assert_uint_eq(pass().pages_merged, 0);
}

/* -- what a run is ------------------------------------------------------------------------------ */

/* Threads of a test that wait for a change make changes of their own, and are heard too. */
static _Atomic unsigned starts;
static _Atomic uint64_t told;
static void (*_Atomic meanwhile)(const struct kage_range *range); /* in the first start that there is */

static int tell(struct kage_notifier *n, const struct kage_range *range)
{
	void (*now)(const struct kage_range *) = atomic_exchange(&meanwhile, NULL);

	starts++;
	told += (range->end - range->start) / PAGE;
	if (now)
		now(range);
	return 0;
}

static const struct kage_notifier_ops ops = { .invalidate_range_start = tell };
static struct kage_notifier notifier;

static void listen_to(struct kage_vm *vm, void (*fn)(const struct kage_range *range))
{
	starts = 0;
	told = 0;
	meanwhile = fn;
	memset(&notifier, 0, sizeof(notifier));
	ok(kage_notifier_register(vm, &notifier, &ops));
}

static void listen_no_more(void)
{
	ok(kage_notifier_unregister(&notifier));
}

/* 2 MiB that equal 2 MiB: a few changes, one frame a page, and what is left over comes back as one piece. */
START_TEST(equal_neighbours_are_few_changes)
{
	struct kage_progress p;
	uint64_t changes;

	two_equal(2 * PAGES, _i ? KAGE_REGION_NOHUGE : 0);
	changes = stats(NULL).changes;
	p = pass();
	ck_assert_uint_eq(p.pages_merged, 2 * PAGES);
	ck_assert_uint_eq(p.frames_freed, 2 * PAGES);
	ck_assert_uint_le(stats(NULL).changes - changes, 8); /* two a guest for harvests, two runs of 2 MiB */
	ck_assert_uint_eq(stats(NULL).frames_used, 2 * PAGES);
	ck_assert_uint_eq(stats(NULL).ksm_pages_shared, 2 * PAGES);
	audit();
	all_hold(a, 2 * PAGES, UINT64_MAX);
	all_hold(b, 2 * PAGES, UINT64_MAX);
}
END_TEST

/* Guests that somebody listens to wait no longer than for 128 pages. */
START_TEST(who_listens_is_not_kept_for_long)
{
	two_equal(PAGES, 0);
	listen_to(b, NULL);
	ck_assert_uint_eq(pass().pages_merged, PAGES);
	ck_assert_uint_ge(starts, 4);
	ck_assert_uint_le(starts, 8);
	listen_no_more();
	audit();
}
END_TEST

/* Neighbours that do not go on: zeroes, holes, other pages, and b's page 11 is a's page 40. */
static uint64_t b_key(uint64_t p)
{
	return p % 5 == 4 ? 1000 + p : p == 11 ? 40 : p;
}

START_TEST(runs_with_gaps)
{
	static const uint64_t zero[PAGE / 8];
	uint64_t frames = 0;

	a = guest(PAGES, 0);
	b = guest(PAGES, 0);
	for (uint64_t p = 0; p < PAGES; p++) {
		if (p % 7 == 3)
			continue;
		put(a, p, p);
		put(b, p, b_key(p));
	}
	ok(kage_vm_write(a, 100 * PAGE, zero, PAGE));
	ok(kage_vm_write(b, 100 * PAGE, zero, PAGE));
	pass();
	pass();
	pass();
	audit();
	for (uint64_t p = 0; p < PAGES; p++) {
		if (p % 7 == 3 || p == 100)
			continue;
		holds(a, p, p);
		holds(b, p, b_key(p));
		frames += 1 + (b_key(p) >= 1000); /* a's, and b's that have no partner */
	}
	ck_assert_uint_eq(stats(NULL).frames_used, frames);
}
END_TEST

/* The guest lies at another offset of 2 MiB: runs end where either side's table does. */
START_TEST(runs_at_another_offset)
{
	const uint64_t shift = 200;

	a = guest(3 * PAGES, KAGE_REGION_NOHUGE);
	b = guest(3 * PAGES, KAGE_REGION_NOHUGE);
	for (uint64_t p = 0; p < 2 * PAGES; p++) {
		put(a, p, p);
		put(b, p + shift, p);
	}
	pass();
	ck_assert_uint_eq(pass().pages_merged, 2 * PAGES);
	ck_assert_uint_eq(stats(NULL).frames_used, 2 * PAGES);
	audit();
	for (uint64_t p = 0; p < 2 * PAGES; p++)
		holds(b, p + shift, p);
}
END_TEST

/* A page of the run differs in its last byte: only that stays as it is. */
START_TEST(one_page_of_a_run_differs)
{
	uint8_t last = 1;

	a = guest(PAGES, 0);
	b = guest(PAGES, 0);
	fill(a, PAGES);
	fill(b, PAGES);
	ok(kage_vm_write(b, 301 * PAGE - 1, &last, 1));
	pass();
	ck_assert_uint_eq(pass().pages_merged, PAGES - 1);
	ck_assert_uint_eq(stats(NULL).frames_used, PAGES + 1);
	ck_assert_uint_eq(stats(NULL).ksm_pages_unshared, 2);
	audit();
	all_hold(b, PAGES, 300);
	all_hold(a, PAGES, UINT64_MAX);
}
END_TEST

/* All entries of a clone's frames move with them; its own page stays its own. */
START_TEST(runs_of_clones)
{
	struct kage_vm *clone;

	two_equal(PAGES, 0);
	ok(kage_vm_clone(b, NULL, &clone));
	put(clone, 17, 7777);
	pass();
	pass();
	pass();
	ck_assert_uint_eq(stats(NULL).frames_used, PAGES + 1);
	audit();
	all_hold(a, PAGES, UINT64_MAX);
	all_hold(b, PAGES, UINT64_MAX);
	all_hold(clone, PAGES, 17);
	holds(clone, 17, 7777);
	ok(kage_vm_destroy(clone));
}
END_TEST

/* -- somebody comes between ----------------------------------------------------------------------- */

static void *pin_page(void *arg)
{
	struct kage_vm *vm = arg;
	struct iovec iov;
	unsigned n = 1;

	ok(kage_vm_pin(vm, 3 * PAGE, PAGE, 0, &iov, &n));
	return NULL;
}

/* Guest b has heard of the change, a has not yet. */
static void pin_a(const struct kage_range *range)
{
	pin_page(a);
}

/* On a thread of its own: what waits for the change, or for the batch. */
static pthread_t thread;
static atomic_int thread_done;

static void begin(void *(*fn)(void *), void *arg)
{
	atomic_store(&thread_done, 0);
	ok(pthread_create(&thread, NULL, fn, arg));
	usleep(20000);
}

static void pin_b(const struct kage_range *range)
{
	begin(pin_page, b);
}

static void pinned_alone(struct kage_vm *vm, struct kage_vm *other)
{
	audit();
	put(vm, 3, 99);
	holds(other, 3, 3);
	holds(vm, 3, 99);
	ok(kage_vm_unpin(vm, 3 * PAGE, PAGE));
}

/* A pinned frame stays what it is and where it is: that page is let go, the others merge. */
START_TEST(candidate_pinned_meanwhile)
{
	two_equal(PAGES, 0);
	listen_to(b, pin_a);
	ck_assert_uint_eq(pass().pages_merged, PAGES - 1);
	listen_no_more();
	pinned_alone(a, b);
}
END_TEST

/* A pin waits for a change that has begun, and then takes a frame of its own. */
START_TEST(pinned_meanwhile)
{
	two_equal(PAGES, 0);
	listen_to(b, pin_b);
	pass();
	ok(pthread_join(thread, NULL));
	listen_no_more();
	pinned_alone(b, a);
}
END_TEST

static void discard_b(const struct kage_range *range)
{
	ok(kage_vm_advise(b, 5 * PAGE, 2 * PAGE, KAGE_ADVICE_DISCARD));
}

static void discard_a(const struct kage_range *range)
{
	ok(kage_vm_advise(a, 5 * PAGE, 2 * PAGE, KAGE_ADVICE_DISCARD));
}

/* What is dropped meanwhile reads zero, and the other side keeps what it has. */
START_TEST(discarded_meanwhile)
{
	uint64_t word = 1;

	two_equal(PAGES, 0);
	listen_to(b, _i ? discard_a : discard_b);
	ck_assert_uint_eq(pass().pages_merged, PAGES - 2);
	listen_no_more();
	audit();
	ok(kage_vm_read(_i ? a : b, 6 * PAGE, &word, sizeof(word)));
	ck_assert_uint_eq(word, 0);
	all_hold(_i ? b : a, PAGES, UINT64_MAX);
}
END_TEST

static void unmap_a(const struct kage_range *range)
{
	ok(kage_vm_unmap(a, 0, PAGES * PAGE));
}

/* All candidates of the run are gone: nothing is merged into what is not there. */
START_TEST(unmapped_meanwhile)
{
	two_equal(PAGES, 0);
	listen_to(b, unmap_a);
	pass();
	listen_no_more();
	audit();
	pass();
	all_hold(b, PAGES, UINT64_MAX);
	ck_assert_uint_eq(stats(NULL).frames_used, PAGES);
	ck_assert_uint_eq(stats(NULL).ksm_pages_shared, 0);
}
END_TEST

static void unmergeable_b(const struct kage_range *range)
{
	ok(kage_vm_advise(b, 0, PAGES * PAGE, KAGE_ADVICE_UNMERGEABLE));
}

START_TEST(unmergeable_meanwhile)
{
	two_equal(PAGES, 0);
	listen_to(b, unmergeable_b);
	ck_assert_uint_eq(pass().pages_merged, 0);
	listen_no_more();
	ck_assert_uint_eq(stats(b).pages_shared_merge, 0);
	audit();
}
END_TEST

static void *write_thread(void *arg)
{
	put(b, 9, 4242);
	atomic_store(&thread_done, 1);
	return NULL;
}

static void *destroy_thread(void *arg)
{
	ok(kage_vm_destroy(a));
	atomic_store(&thread_done, 1);
	return NULL;
}

static void *clone_thread(void *arg)
{
	ok(kage_vm_clone(b, NULL, arg));
	atomic_store(&thread_done, 1);
	return NULL;
}

static void write_b(const struct kage_range *range)
{
	begin(write_thread, NULL);
}

/* Between start and end nobody writes: the write comes after, to a frame of its own. */
START_TEST(written_meanwhile)
{
	two_equal(PAGES, 0);
	listen_to(b, write_b);
	pass();
	ok(pthread_join(thread, NULL));
	listen_no_more();
	audit();
	holds(b, 9, 4242);
	all_hold(b, PAGES, 9);
	all_hold(a, PAGES, UINT64_MAX);
}
END_TEST

static void write_a(const struct kage_range *range)
{
	put(a, 9, 4242);
}

/* Guest b has heard of the change, a has not yet: what is written there by then is compared. */
START_TEST(candidate_written_meanwhile)
{
	two_equal(PAGES, 0);
	listen_to(b, write_a);
	ck_assert_uint_eq(pass().pages_merged, PAGES - 1);
	listen_no_more();
	audit();
	holds(a, 9, 4242);
	all_hold(a, PAGES, 9);
	all_hold(b, PAGES, UINT64_MAX);
}
END_TEST

static struct kage_vm *other_tenant;

static void *take_frames(void *arg)
{
	for (unsigned i = 0; i < 4; i++) /* a's memory is given back */
		ok(kage_engine_step(engine, KAGE_CFG(kage_budget, .pages = 1), NULL));
	ok(kage_vm_map(other_tenant,
		       KAGE_CFG(kage_region, .len = PAGES * PAGE, .flags = KAGE_REGION_MERGEABLE)));
	fill(other_tenant, PAGES);
	ok(kage_vm_advise(other_tenant, 0, PAGES * PAGE, KAGE_ADVICE_MERGE_FIRST));
	for (unsigned i = 0; i < 3; i++)
		ok(kage_engine_step(engine, KAGE_CFG(kage_budget, .pages = PAGES + 8), NULL));
	return NULL;
}

static void hand_frames_over(const struct kage_range *range)
{
	ok(kage_vm_unmap(a, 0, PAGES * PAGE));
	ok(pthread_create(&thread, NULL, take_frames, NULL));
	ok(pthread_join(thread, NULL));
}

/* Candidates were a's, and by the time it is their turn another tenant's: equal, candidates again, and out of reach. */
START_TEST(frames_change_hands_meanwhile)
{
	ok(kage_vm_create(engine, KAGE_CFG(kage_vm_config, .merge_domain = 2), &other_tenant));
	two_equal(PAGES, 0);
	listen_to(b, hand_frames_over);
	pass();
	listen_no_more();
	audit();
	ck_assert_uint_gt(stats(NULL).ksm_pages_unshared, 0);
	ck_assert_uint_eq(stats(b).pages_shared_merge, 0);
	ck_assert_uint_eq(stats(other_tenant).pages_shared_merge, 0);
	for (unsigned i = 0; i < 4; i++)
		pass();
	audit();
	ck_assert_uint_eq(stats(NULL).frames_used, 2 * PAGES);
	all_hold(b, PAGES, UINT64_MAX);
	all_hold(other_tenant, PAGES, UINT64_MAX);
	ok(kage_vm_destroy(other_tenant));
}
END_TEST

/* A clone does not let its pages be merged: a's are left alone for longer and longer, and merge once it has gone. */
START_TEST(refused_by_a_clone)
{
	struct kage_vm *clone;
	uint64_t before, passes = 0;

	two_equal(PAGES, 0); /* looked at first: a */
	ok(kage_vm_clone(b, NULL, &clone));
	ok(kage_vm_advise(clone, 0, PAGES * PAGE, KAGE_ADVICE_UNMERGEABLE));
	before = stats(NULL).ksm_pages_scanned;
	for (unsigned i = 0; i < 64; i++)
		ck_assert_uint_eq(pass().pages_merged, 0);
	/* a once, b in the passes 1, 3, 6, 11, 20, 37 */
	ck_assert_uint_le(stats(NULL).ksm_pages_scanned - before, 10 * PAGES);
	ok(kage_vm_destroy(clone));
	for (before = 0; before < PAGES && passes < 80; passes++)
		before += pass().pages_merged;
	ck_assert_uint_eq(before, PAGES);
	audit();
	all_hold(a, PAGES, UINT64_MAX);
	all_hold(b, PAGES, UINT64_MAX);
}
END_TEST

/* A candidate that is pinned stands in nobody's way, and is a candidate again when it is not. */
START_TEST(pinned_candidates_are_passed_over)
{
	a = guest(8, KAGE_REGION_NOHUGE);
	b = guest(8, KAGE_REGION_NOHUGE);
	put(a, 3, 77);
	pass();
	pass();
	ck_assert_uint_eq(stats(NULL).ksm_pages_unshared, 1);
	pin_page(a);
	put(b, 0, 77);
	put(b, 1, 77);
	pass();
	ck_assert_uint_eq(pass().pages_merged, 1); /* b's, with one another */
	ck_assert_uint_eq(stats(NULL).ksm_pages_unshared, 0);
	ck_assert_uint_eq(stats(NULL).ksm_pages_skipped, 1);
	ok(kage_vm_unpin(a, 3 * PAGE, PAGE));
	ck_assert_uint_eq(pass().pages_merged, 1);
	ck_assert_uint_eq(stats(NULL).frames_used, 1);
	audit();
	holds(a, 3, 77);
	holds(b, 1, 77);
}
END_TEST

static int destroyed_at_start;

static void destroy_a(const struct kage_range *range)
{
	begin(destroy_thread, NULL);
	destroyed_at_start = atomic_load(&thread_done);
}

/* The guest whose frames b is merged into goes: not before the batch is over (KSM had this wrong once: CVE-2011-2183). */
START_TEST(destroyed_meanwhile)
{
	two_equal(PAGES, 0);
	listen_to(b, destroy_a);
	pass();
	ok(pthread_join(thread, NULL));
	a = NULL;
	ck_assert_int_eq(destroyed_at_start, 0);
	listen_no_more();
	audit();
	all_hold(b, PAGES, UINT64_MAX);
	ok(kage_engine_step(engine, NULL, NULL));
	ck_assert_uint_eq(stats(NULL).frames_used, PAGES);
}
END_TEST

static uint64_t step_pages;

static void *step_thread(void *arg)
{
	ok(kage_engine_step(engine, KAGE_CFG(kage_budget, .pages = step_pages), NULL));
	return NULL;
}

/* Another scanner goes on where this one is not. */
static void scan_others(const struct kage_range *range)
{
	ok(pthread_create(&thread, NULL, step_thread, NULL));
	ok(pthread_join(thread, NULL));
}

/*
 * A page leaves a frame in the change in which another page of the run comes to it. For that, two scanners:
 *
 *      a's                                       its clone b's
 *      looks at pages X and Y, equal ones: X
 *      goes with its neighbours to the next
 *      merged frame, which has room for one more
 *      merges the neighbours first
 *                                                X's frame is nobody's candidate, the merged frame is full: a candidate
 *      Y's contents: the merged frame is full,
 *      but X's is a candidate
 *      one change: X's frame to the merged one,
 *      Y's frame to X's
 *
 * If X lies first (0), its frame loses its last entry, in the table that both guests share, before it has a new one; if Y
 * does (1), X's frame is a merged one before its places are known.
 */
START_TEST(left_by_one_page_and_joined_by_another)
{
	const uint64_t x = 56 + (uint64_t)_i, y = 57 - (uint64_t)_i; /* behind a gap that ends a run */
	struct kage_vm *first = guest(64, KAGE_REGION_NOHUGE), *second = guest(64, KAGE_REGION_NOHUGE);
	struct kage_progress p;

	ok(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE, .max_sharing = 3)));
	fill(first, 64);
	fill(second, 64);
	pass();
	ck_assert_uint_eq(pass().pages_merged, 64);
	a = guest(64, KAGE_REGION_NOHUGE);
	fill(a, 16);
	put(a, x, x);
	put(a, y, x);
	ok(kage_vm_clone(a, NULL, &b));
	step_pages = x + 1;
	if (_i)
		put(b, y, 1000);
	ck_assert_uint_eq(pass().pages_merged, 0);
	listen_to(a, scan_others);
	p = pass();
	listen_no_more();
	audit();
	all_hold(a, 16, UINT64_MAX);
	all_hold(b, 16, UINT64_MAX);
	holds(a, x, x);
	holds(b, x, x);
	holds(a, y, x);
	holds(b, y, _i ? 1000 : x);
	ck_assert_uint_eq(stats(NULL).ksm_stable_chains, 1); /* X's contents: the merged frame, and X's own */
	ck_assert_uint_eq(stats(NULL).ksm_stable_dups, 2);
	ck_assert_uint_eq(p.pages_merged, 18);
	ok(kage_vm_destroy(first));
	ok(kage_vm_destroy(second));
	ok(kage_engine_step(engine, NULL, NULL));
	audit();
	holds(a, x, x);
	holds(a, y, x);
}
END_TEST

static struct kage_vm *cloned;

static void clone_b(const struct kage_range *range)
{
	begin(clone_thread, &cloned);
}

START_TEST(cloned_meanwhile)
{
	two_equal(PAGES, 0);
	listen_to(b, clone_b);
	ck_assert_uint_eq(pass().pages_merged, PAGES);
	ok(pthread_join(thread, NULL));
	listen_no_more();
	audit();
	all_hold(cloned, PAGES, UINT64_MAX);
	all_hold(b, PAGES, UINT64_MAX);
	ok(kage_vm_destroy(cloned));
}
END_TEST

/* -- a clone that takes long ------------------------------------------------------------------------ */

static sem_t clone_is_in, clone_may_go;
static pthread_t clone_pthread;

static void clone_stays(const struct kage_range *range)
{
	ok(sem_post(&clone_is_in));
	ok(sem_wait(&clone_may_go));
}

/* Until clone_ends(), b's family is held by its clone. */
static void clone_begins(void)
{
	ok(sem_init(&clone_is_in, 0, 0));
	ok(sem_init(&clone_may_go, 0, 0));
	listen_to(b, clone_stays);
	ok(pthread_create(&clone_pthread, NULL, clone_thread, &cloned));
	ok(sem_wait(&clone_is_in));
}

static void clone_ends(void)
{
	ok(sem_post(&clone_may_go));
	ok(pthread_join(clone_pthread, NULL));
	listen_no_more();
}

static _Atomic int pass_is_over;

static void *pass_thread(void *arg)
{
	pass();
	atomic_store(&pass_is_over, 1);
	return NULL;
}

/* A step comes to b while we go on, as its pass says (0) or a hint (1), and waits; whoever has no part in the clone does not. */
START_TEST(others_do_not_wait_for_a_clone)
{
	struct kage_vm *other = guest(1, 0), *one;
	pthread_t t;

	b = guest(PAGES, KAGE_REGION_NOHUGE);
	fill(b, PAGES);
	for (unsigned i = 0; i < (_i ? 1u : 4u); i++)
		pass();
	clone_begins();
	atomic_store(&pass_is_over, 0);
	ok(pthread_create(&t, NULL, pass_thread, NULL));
	for (unsigned i = 1; i <= 100; i++) {
		ok(kage_vm_map(other, KAGE_CFG(kage_region, .gpa = i * 2 * PAGE, .len = PAGE, .flags = KAGE_REGION_MERGEABLE)));
		ok(kage_vm_create(engine, NULL, &one));
		ok(kage_vm_destroy(one));
		ok(usleep(1000));
	}
	ck_assert_int_eq(atomic_load(&pass_is_over), 0);
	clone_ends();
	ok(pthread_join(t, NULL));
	audit();
	all_hold(b, PAGES, UINT64_MAX);
	all_hold(cloned, PAGES, UINT64_MAX);
	ok(kage_vm_destroy(cloned));
	ok(kage_vm_destroy(other));
}
END_TEST

/* A page that would be merged into b's waits for a later pass; the step goes on with its neighbours, and ends. */
START_TEST(candidate_of_a_guest_that_is_cloned)
{
	static const char zeroes[PAGE];
	struct kage_progress p = { .size = sizeof(p) };
	uint64_t merged = 0;

	ok(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = 0)));
	a = guest(8, KAGE_REGION_NOHUGE);
	b = guest(8, KAGE_REGION_NOHUGE);
	put(a, 0, 1);
	put(a, 1, 2);
	ok(kage_vm_write(a, 2 * PAGE, zeroes, PAGE));
	put(b, 0, 1);
	ok(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)));
	ok(kage_vm_advise(b, 0, PAGE, KAGE_ADVICE_MERGE_FIRST));
	ck_assert_uint_eq(pass().pages_scanned, 1);
	clone_begins();
	ok(kage_vm_advise(a, 0, 3 * PAGE, KAGE_ADVICE_MERGE_FIRST));
	ok(kage_engine_step(engine, KAGE_CFG(kage_budget, .pages = 3), &p));
	ck_assert_uint_eq(p.pages_scanned, 3);
	ck_assert_uint_eq(p.pages_merged, 1); /* the zeroes */
	clone_ends();
	for (unsigned i = 0; i < 3; i++)
		merged += pass().pages_merged;
	ck_assert_uint_eq(merged, 1);
	audit();
	holds(a, 0, 1);
	holds(a, 1, 2);
	holds(b, 0, 1);
	holds(cloned, 0, 1);
	ok(kage_vm_destroy(cloned));
}
END_TEST

/* -- without memory to spare ------------------------------------------------------------------------ */

START_TEST(unmerge_at_the_limit)
{
	struct kage_vm *full;
	uint64_t p = 0, word = 1;
	int r;

	ok(kage_engine_destroy(engine));
	ok(kage_engine_create(KAGE_CFG(kage_engine_config, .seed = 5, .memory_limit = 6 * BLOCK), &engine));
	ok(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)));
	two_equal(PAGES, KAGE_REGION_NOHUGE);
	pass();
	full = guest(8 * PAGES, KAGE_REGION_NOHUGE);
	while ((r = kage_vm_write(full, p * PAGE, &word, sizeof(word))) == 0)
		p++;
	ck_assert_int_eq(r, -ENOMEM);
	r = kage_vm_advise(b, 0, PAGES * PAGE, KAGE_ADVICE_UNMERGEABLE);
	ck_assert_int_eq(r, -ENOMEM);
	audit();
	all_hold(b, PAGES, UINT64_MAX); /* each page has a frame of its own, or the one it shared */
	all_hold(a, PAGES, UINT64_MAX);
	ok(kage_vm_destroy(full));
	ok(kage_engine_step(engine, NULL, NULL));
	ok(kage_vm_advise(b, 0, PAGES * PAGE, KAGE_ADVICE_UNMERGEABLE));
	ck_assert_uint_eq(stats(b).pages_shared_merge, 0);
	audit();
	all_hold(b, PAGES, UINT64_MAX);
}
END_TEST

/* -- several threads ----------------------------------------------------------------------------------- */

static void *stepper(void *arg)
{
	struct kage_progress p = { .size = sizeof(p) };
	uint64_t *merged = arg;

	do {
		ok(kage_engine_step(engine, KAGE_CFG(kage_budget, .pages = 300), &p));
		*merged += p.pages_merged;
	} while (p.passes < 2);
	return NULL;
}

/* Three threads share the passes: each page is merged once, all counters say so. */
START_TEST(steps_of_three_threads)
{
	enum { GUESTS = 6 };
	struct kage_vm *vm[GUESTS];
	uint64_t merged[3] = { 0 };
	pthread_t t[3];

	for (unsigned g = 0; g < GUESTS; g++) {
		vm[g] = guest(PAGES, 0);
		fill(vm[g], PAGES);
	}
	for (unsigned i = 0; i < 3; i++)
		ok(pthread_create(&t[i], NULL, stepper, &merged[i]));
	for (unsigned i = 0; i < 3; i++)
		ok(pthread_join(t[i], NULL));
	for (unsigned i = 0; i < 4; i++) /* what raced, and frames that became stable beside one another, stay: the rest merges */
		pass();
	audit();
	ck_assert_uint_eq(stats(NULL).ksm_merges, (GUESTS * PAGES) - stats(NULL).frames_used);
	ck_assert_uint_le(merged[0] + merged[1] + merged[2], stats(NULL).ksm_merges);
	ck_assert_uint_ge(merged[0] + merged[1] + merged[2], PAGES);
	for (unsigned g = 0; g < GUESTS; g++) {
		all_hold(vm[g], PAGES, UINT64_MAX);
		ok(kage_vm_destroy(vm[g]));
	}
}
END_TEST

/* -- the table of candidates ------------------------------------------------------------------------------ */

#define FRAMES 6000u

/* Random marks, disproved entries, written and freed frames, against an array. */
START_TEST(candidates_against_an_array)
{
	struct kage_engine_config none = { .size = sizeof(none) };
	struct env env;
	struct pool *pool;
	struct candidates t;
	static uint64_t hash[FRAMES];
	static pfn_t pfn[FRAMES];
	uint64_t x = 88172645463325252ull, marked = 0;

	env_init(&env, &none);
	ok(pool_create(&(struct pool_config){ .address_space = 1ull << 34, .reserve = 4 << 20 }, &env, &pool));
	ok(candidates_init(&t, &env));
	for (unsigned i = 0; i < FRAMES; i++)
		ok(arena_alloc(pool, 0, 0, FRAME_PRIVATE, 0, &pfn[i]));
	for (unsigned n = 0; n < 200000; n++) {
		unsigned i;

		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		i = (unsigned)(x % FRAMES);
		if (x >> 60 < 10) { /* written, and hashed anew; few hashes, so that clusters form */
			candidate_unmark(&t, pfn_frame(pool, pfn[i]));
			marked -= hash[i] != 0;
			hash[i] = (x >> 20 & 0xfff) * 0x9e3779b97f4a7c15ull | 1;
			ok(candidates_reserve(&t, 1));
			rcu_enter();
			candidates_add(&t, pool, hash[i], pfn[i]);
			rcu_leave();
			marked++;
		} else if (x >> 60 < 12 && hash[i]) { /* merged */
			candidate_unmark(&t, pfn_frame(pool, pfn[i]));
			candidates_drop(&t, hash[i], pfn[i]);
			hash[i] = 0;
			marked--;
		} else if (hash[i]) { /* somebody with this hash is found, and i is, among those that are */
			bool seen = false;
			pfn_t found;

			rcu_enter();
			found = candidates_find(&t, pool, hash[i], PFN_NONE);
			for (unsigned j = 0; j < FRAMES; j++)
				seen |= pfn_eq(pfn[j], found) && hash[j] != 0;
			ck_assert(seen);
			ck_assert(candidate_alive(pool, pfn[i]));
			rcu_leave();
		}
		if (n % 20000 == 0)
			candidates_sweep(&t, pool);
		ck_assert_uint_eq(candidates_count(&t, pool), marked);
	}
	candidates_sweep(&t, pool);
	ck_assert_uint_le(t.used, 2 * marked + 4096);
	for (unsigned i = 0; i < FRAMES; i++) {
		pool_release(pool, pfn[i], 0);
		marked -= hash[i] != 0;
	}
	ck_assert_uint_eq(pool_reap(pool), FRAMES);
	ck_assert_uint_eq(candidates_count(&t, pool), 0); /* they took their marks with them */
	ck_assert_uint_eq(marked, 0);
	candidates_sweep(&t, pool);
	rcu_enter();
	for (unsigned i = 0; i < FRAMES; i++)
		ck_assert(!hash[i] || pfn_is_none(candidates_find(&t, pool, hash[i], PFN_NONE)));
	rcu_leave();
	candidates_finish(&t);
	ck_assert_uint_eq(pool_destroy(pool), 0);
	env_finish(&env);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("merge");
	TCase *runs = tcase_create("runs"), *races = tcase_create("races"), *table = tcase_create("candidates");
	SRunner *runner;
	int failed;

	tcase_set_timeout(runs, 240);
	tcase_add_checked_fixture(runs, setup, teardown);
	tcase_add_loop_test(runs, equal_neighbours_are_few_changes, 0, 2);
	tcase_add_test(runs, who_listens_is_not_kept_for_long);
	tcase_add_test(runs, runs_with_gaps);
	tcase_add_test(runs, runs_at_another_offset);
	tcase_add_test(runs, one_page_of_a_run_differs);
	tcase_add_test(runs, runs_of_clones);
	tcase_add_test(runs, steps_of_three_threads);
	suite_add_tcase(suite, runs);
	tcase_set_timeout(races, 240);
	tcase_add_checked_fixture(races, setup, teardown);
	tcase_add_test(races, candidate_pinned_meanwhile);
	tcase_add_test(races, pinned_meanwhile);
	tcase_add_test(races, pinned_candidates_are_passed_over);
	tcase_add_loop_test(races, discarded_meanwhile, 0, 2);
	tcase_add_test(races, unmapped_meanwhile);
	tcase_add_test(races, unmergeable_meanwhile);
	tcase_add_test(races, written_meanwhile);
	tcase_add_test(races, candidate_written_meanwhile);
	tcase_add_test(races, frames_change_hands_meanwhile);
	tcase_add_test(races, refused_by_a_clone);
	tcase_add_test(races, destroyed_meanwhile);
	tcase_add_loop_test(races, left_by_one_page_and_joined_by_another, 0, 2);
	tcase_add_test(races, cloned_meanwhile);
	tcase_add_loop_test(races, others_do_not_wait_for_a_clone, 0, 2);
	tcase_add_test(races, candidate_of_a_guest_that_is_cloned);
	tcase_add_test(races, unmerge_at_the_limit);
	suite_add_tcase(suite, races);
	tcase_set_timeout(table, 240);
	tcase_add_test(table, candidates_against_an_array);
	suite_add_tcase(suite, table);
	runner = srunner_create(suite);
	srunner_run_all(runner, CK_NORMAL);
	failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed != 0;
}
