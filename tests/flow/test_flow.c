/* SPDX-License-Identifier: MIT */
/*
 * Golden traces: what happens, in which order, on the paths that everything
 * else relies on. The engine's event ring is compared line by line with the text
 * beside each test: a reordering, a notification too many or too few fails here
 * though every result would still be right.
 */
#include <check.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include <kage/backend.h>
#include <kage/kage.h>
#include "api/engine.h"
#include "api/vm.h"

#define RING 4096

static struct kage_engine *engine;
static struct trace_ring *ring;

static void setup(void)
{
	ck_assert_int_eq(kage_engine_create(NULL, &engine), 0);
	ring = calloc(1, sizeof(*ring) + RING * sizeof(struct trace_record));
	ring->size = RING;
}

static void teardown(void)
{
	struct kage_audit a = { .size = sizeof(a) };

	engine->env.trace = NULL;
	ck_assert_int_eq(kage_engine_audit(engine, &a), 0);
	ck_assert_int_eq(kage_engine_destroy(engine), 0);
	free(ring);
}

static void record(void)
{
	atomic_store(&ring->head, 0);
	__atomic_store_n(&engine->env.trace, ring, __ATOMIC_RELEASE);
}

static void append(char *text, size_t room, const struct trace_record *r)
{
	size_t used = strlen(text);

	snprintf(text + used, room - used, "%s %lu %lu %lu\n", trace_name(r->event), (unsigned long)r->a,
		 (unsigned long)r->b, (unsigned long)r->c);
}

static void expect(const char *golden)
{
	static char text[64 * RING];

	__atomic_store_n(&engine->env.trace, NULL, __ATOMIC_RELEASE);
	text[0] = 0;
	ck_assert_uint_lt(atomic_load(&ring->head), RING);
	for (uint64_t i = 0; i < atomic_load(&ring->head); i++)
		append(text, sizeof(text), &ring->rec[i]);
	ck_assert_str_eq(text, golden);
}

/* Guests have the ids 1, 2 … of a fresh engine. */
static struct kage_vm *guest(uint64_t len, uint32_t flags)
{
	struct kage_vm *vm;

	ck_assert_int_eq(kage_vm_create(engine, NULL, &vm), 0);
	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .gpa = 0, .len = len, .flags = flags)), 0);
	return vm;
}

static void put(struct kage_vm *vm, uint64_t gpa, uint64_t value)
{
	ck_assert_int_eq(kage_vm_write(vm, gpa, &value, sizeof(value)), 0);
}

START_TEST(write_to_a_merged_page)
{
	struct kage_vm *a = guest(1 << 20, KAGE_REGION_MERGEABLE | KAGE_REGION_NOHUGE);
	struct kage_vm *b = guest(1 << 20, KAGE_REGION_MERGEABLE | KAGE_REGION_NOHUGE);

	put(a, 5 * 4096, 7);
	put(b, 9 * 4096, 7);
	ck_assert_int_eq(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)), 0);
	ck_assert_int_eq(kage_engine_step(engine, NULL, NULL), 0);
	record();
	ck_assert_int_eq(kage_engine_step(engine, NULL, NULL), 0);
	/* both guests hear of the merge before it happens, and of its end in reverse order */
	expect("change_start 2 9 1\n"
	       "change_start 1 5 1\n"
	       "change_commit 2 9 1\n"
	       "change_commit 1 5 1\n"
	       "change_end 1 5 1\n"
	       "change_end 2 9 1\n"
	       "merge 2 9 0\n");
	record();
	put(b, 9 * 4096, 8);
	/* the other guest hears nothing */
	expect("fault 2 9 2\n"
	       "change_start 2 9 1\n"
	       "change_commit 2 9 1\n"
	       "change_end 2 9 1\n"
	       "cow_break 2 9 0\n"
	       "fault_done 2 9 0\n");
	record();
	put(a, 5 * 4096, 9);
	/* the last user of a stable frame breaks away as well: stable frames are never written */
	expect("fault 1 5 2\n"
	       "change_start 1 5 1\n"
	       "change_commit 1 5 1\n"
	       "change_end 1 5 1\n"
	       "cow_break 1 5 0\n"
	       "fault_done 1 5 0\n");
	ck_assert_int_eq(kage_vm_destroy(a), 0);
	ck_assert_int_eq(kage_vm_destroy(b), 0);
}
END_TEST

START_TEST(clone_and_the_first_writes)
{
	struct kage_vm *a = guest(1 << 20, KAGE_REGION_NOHUGE), *b;

	put(a, 3 * 4096, 1);
	put(a, 4 * 4096, 1);
	record();
	ck_assert_int_eq(kage_vm_clone(a, NULL, &b), 0);
	/* one change for the whole guest, whatever its size */
	expect("change_start 1 0 2\n"
	       "clone 1 2 0\n"
	       "change_commit 1 0 2\n"
	       "change_end 1 0 2\n");
	record();
	put(b, 3 * 4096, 2);
	put(b, 4 * 4096, 2);
	/* two levels are un-shared once; nobody is told of that: translations stay what they were */
	expect("fault 2 3 2\n"
	       "unshare 2 3 1\n"
	       "unshare 2 3 0\n"
	       "change_start 2 3 1\n"
	       "change_commit 2 3 1\n"
	       "change_end 2 3 1\n"
	       "cow_break 2 3 0\n"
	       "fault_done 2 3 0\n"
	       "fault 2 4 2\n"
	       "change_start 2 4 1\n"
	       "change_commit 2 4 1\n"
	       "change_end 2 4 1\n"
	       "cow_break 2 4 0\n"
	       "fault_done 2 4 0\n");
	record();
	put(a, 3 * 4096, 3);
	/* the parent is alone with its frame again: no copy, no change, no notification */
	expect("fault 1 3 2\n"
	       "cow_reuse 1 3 0\n"
	       "fault_done 1 3 0\n");
	ck_assert_int_eq(kage_vm_destroy(a), 0);
	ck_assert_int_eq(kage_vm_destroy(b), 0);
}
END_TEST

/* -- unmap with a fault that comes in the middle -------------------------------------------- */

struct race {
	struct kage_notifier n;
	struct kage_vm *vm;
	pthread_t thread;
	int result;
};

static void *fault_thread(void *arg)
{
	struct race *r = arg;
	struct kage_reader reader;
	struct kage_page page;

	ck_assert_int_eq(kage_reader_init(r->vm, &reader), 0);
	kage_reader_begin(&reader, 6 * 4096, 4096);
	r->result = kage_backend_fault(r->vm, &reader, 6 * 4096, KAGE_READ, &page);
	kage_reader_end(&reader);
	kage_reader_finish(&reader);
	return NULL;
}

/* In the start of the unmap: lets the fault come, and goes on once it waits. */
static int race_start(struct kage_notifier *n, const struct kage_range *range)
{
	struct race *r = (struct race *)n;

	ck_assert_uint_eq(range->start, 4 * 4096);
	ck_assert_uint_eq(range->end, 8 * 4096);
	ck_assert_int_eq(pthread_create(&r->thread, NULL, fault_thread, r), 0);
	for (;;) {
		uint64_t n_events = atomic_load(&ring->head);

		if (n_events && READ_ONCE(ring->rec[n_events - 1].event) == TRACE_reader_wait)
			return 0;
		sched_yield();
	}
}

static const struct kage_notifier_ops race_ops = { .invalidate_range_start = race_start };

START_TEST(unmap_with_a_racing_fault)
{
	struct race r = { .vm = guest(1 << 20, KAGE_REGION_NOHUGE) };

	put(r.vm, 6 * 4096, 1);
	ck_assert_int_eq(kage_notifier_register(r.vm, &r.n, &race_ops), 0);
	record();
	ck_assert_int_eq(kage_vm_unmap(r.vm, 4 * 4096, 4 * 4096), 0);
	ck_assert_int_eq(pthread_join(r.thread, NULL), 0);
	ck_assert_int_eq(r.result, KAGE_MMIO);
	/* the fault waits for the change, which holds the range until it has ended, and then finds no memory */
	expect("change_start 1 4 0\n"
	       "reader_wait 1 6 0\n"
	       "change_commit 1 4 0\n"
	       "change_end 1 4 0\n"
	       "unmap 1 4 4\n"
	       "fault 1 6 1\n"
	       "fault_done 1 6 2\n");
	ck_assert_int_eq(kage_notifier_unregister(&r.n), 0);
	ck_assert_int_eq(kage_vm_destroy(r.vm), 0);
}
END_TEST

START_TEST(discard_and_touch_again)
{
	struct kage_vm *a = guest(1 << 20, KAGE_REGION_NOHUGE);

	put(a, 3 * 4096, 1);
	record();
	ck_assert_int_eq(kage_vm_advise(a, 2 * 4096, 3 * 4096, KAGE_ADVICE_DISCARD), 0);
	put(a, 3 * 4096, 2);
	expect("change_start 1 2 1\n"
	       "change_commit 1 2 1\n"
	       "change_end 1 2 1\n"
	       "discard 1 2 3\n"
	       "fault 1 3 2\n"
	       "fault_done 1 3 0\n");
	ck_assert_int_eq(kage_vm_destroy(a), 0);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("flow");
	TCase *tc = tcase_create("golden");
	SRunner *run;
	int failed;

	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_set_timeout(tc, 60);
	tcase_add_test(tc, write_to_a_merged_page);
	tcase_add_test(tc, clone_and_the_first_writes);
	tcase_add_test(tc, unmap_with_a_racing_fault);
	tcase_add_test(tc, discard_and_touch_again);
	suite_add_tcase(s, tc);
	run = srunner_create(s);
	srunner_set_fork_status(run, CK_NOFORK);
	srunner_run_all(run, CK_NORMAL);
	failed = srunner_ntests_failed(run);
	srunner_free(run);
	return failed != 0;
}
