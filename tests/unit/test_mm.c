/* SPDX-License-Identifier: MIT */
/*
 * The primary MMU: kinds of regions, blocks, clones of what must not be shared,
 * pins, the reverse map, and every allocation failing once. The audit runs after
 * each step; random sequences are the model test's business.
 */
#include <check.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <kage/backend.h>
#include <kage/kage.h>
#include "api/engine.h"
#include "api/vm.h"
#include "mm/layer.h"
#include "mm/rmap.h"
#include "mm/table.h"

#define MIB ((uint64_t)1 << 20)
#define GIB ((uint64_t)1 << 30)

static struct kage_engine *engine;

static void audit_line(void *opaque, const char *line)
{
	fprintf(stderr, "audit: %s\n", line);
}

static void audit(void)
{
	struct kage_audit a = { .size = sizeof(a), .report = audit_line };

	ck_assert_int_eq(kage_engine_audit(engine, &a), 0);
	ck_assert_uint_gt(a.checks, 0);
}

static void setup(void)
{
	ck_assert_int_eq(kage_engine_create(NULL, &engine), 0);
}

static void setup_memfd(void)
{
	ck_assert_int_eq(kage_engine_create(KAGE_CFG(kage_engine_config, .backing = KAGE_BACKING_MEMFD), &engine), 0);
}

static void teardown(void)
{
	audit();
	ck_assert_int_eq(kage_engine_destroy(engine), 0);
}

static struct kage_vm *guest(void)
{
	struct kage_vm *vm;

	ck_assert_int_eq(kage_vm_create(engine, NULL, &vm), 0);
	return vm;
}

static struct kage_vm *cloned(struct kage_vm *vm)
{
	struct kage_vm *clone;

	ck_assert_int_eq(kage_vm_clone(vm, NULL, &clone), 0);
	audit();
	return clone;
}

static void map(struct kage_vm *vm, uint64_t gpa, uint64_t len, uint32_t flags)
{
	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .gpa = gpa, .len = len, .flags = flags)), 0);
	audit();
}

static void put(struct kage_vm *vm, uint64_t gpa, uint64_t value)
{
	ck_assert_int_eq(kage_vm_write(vm, gpa, &value, sizeof(value)), 0);
	audit();
}

static uint64_t get(struct kage_vm *vm, uint64_t gpa)
{
	uint64_t value = 0xbad;

	ck_assert_int_eq(kage_vm_read(vm, gpa, &value, sizeof(value)), 0);
	return value;
}

static struct kage_stats stats(struct kage_vm *vm)
{
	struct kage_stats s = { .size = sizeof(s) };

	ck_assert_int_eq(kage_stats_get(engine, vm, &s), 0);
	return s;
}

static void gone(struct kage_vm *vm)
{
	ck_assert_int_eq(kage_vm_destroy(vm), 0);
	audit();
}

static uint8_t class_of(struct kage_vm *vm, uint64_t gpa)
{
	uint8_t class = 255;

	ck_assert_int_eq(kage_page_map(vm, gpa & ~(uint64_t)4095, 4096, &class), 0);
	return class;
}

static unsigned level_of(struct kage_vm *vm, uint64_t gpa)
{
	struct mm_lookup l;

	rcu_enter();
	l = mm_lookup(&vm->mm, GFN(gpa >> PAGE_SHIFT));
	rcu_leave();
	ck_assert(entry_is_leaf(l.entry));
	return l.level;
}

static int file_with(uint64_t pages)
{
	int fd = memfd_create("test", 0);

	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(ftruncate(fd, pages * 4096), 0);
	for (uint64_t i = 0; i < pages; i++) {
		uint64_t v = 0xf11e0000 + i;

		ck_assert_int_eq(pwrite(fd, &v, sizeof(v), i * 4096), sizeof(v));
	}
	return fd;
}

/* -- kinds of regions ------------------------------------------------------------------ */

START_TEST(file_region_reads_the_file_and_keeps_writes)
{
	struct kage_vm *vm = guest(), *clone;
	int fd = file_with(600);
	uint64_t v;

	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .kind = KAGE_REGION_FILE, .flags = KAGE_REGION_FD,
						  .fd = fd, .gpa = 2 * MIB, .len = 600 * 4096)), 0);
	ck_assert_uint_eq(get(vm, 2 * MIB + 599 * 4096), 0xf11e0000 + 599);
	put(vm, 2 * MIB + 4096, 7);
	ck_assert_uint_eq(get(vm, 2 * MIB + 4096), 7);
	ck_assert_uint_eq(class_of(vm, 2 * MIB + 4096), KAGE_PAGE_PRIVATE);
	ck_assert_int_eq(pread(fd, &v, sizeof(v), 4096), sizeof(v));
	ck_assert_uint_eq(v, 0xf11e0001);
	clone = cloned(vm);
	put(clone, 2 * MIB + 4096, 8);
	put(clone, 2 * MIB + 8192, 9);
	ck_assert_uint_eq(get(vm, 2 * MIB + 4096), 7);
	ck_assert_uint_eq(get(vm, 2 * MIB + 8192), 0xf11e0002);
	/* discarded: the file's bytes again */
	ck_assert_int_eq(kage_vm_advise(vm, 2 * MIB, 8192, KAGE_ADVICE_DISCARD), 0);
	audit();
	ck_assert_uint_eq(get(vm, 2 * MIB + 4096), 0xf11e0001);
	close(fd);
	gone(vm);
	ck_assert_uint_eq(get(clone, 2 * MIB + 8192), 9);
	gone(clone);
}
END_TEST

START_TEST(file_region_beyond_its_file)
{
	struct kage_vm *vm = guest();
	int fd = file_with(4);

	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .kind = KAGE_REGION_FILE, .flags = KAGE_REGION_FD,
						  .fd = fd, .gpa = 0, .len = 5 * 4096)), -EOVERFLOW);
	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .kind = KAGE_REGION_FILE, .flags = KAGE_REGION_FD,
						  .fd = -1, .gpa = 0, .len = 4096)), -EBADF);
	ck_assert_uint_eq(stats(vm).pages_nominal, 0);
	close(fd);
	gone(vm);
}
END_TEST

START_TEST(foreign_region_is_shared_with_its_owner)
{
	struct kage_vm *vm = guest(), *clone;
	int fd = file_with(1024);
	uint64_t v = 42;

	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .kind = KAGE_REGION_FOREIGN, .flags = KAGE_REGION_FD,
						  .fd = fd, .gpa = 0, .len = 1024 * 4096)), 0);
	put(vm, 4096, 5);
	ck_assert_int_eq(pread(fd, &v, sizeof(v), 4096), sizeof(v));
	ck_assert_uint_eq(v, 5);
	v = 6;
	ck_assert_int_eq(pwrite(fd, &v, sizeof(v), 4096), sizeof(v));
	ck_assert_uint_eq(get(vm, 4096), 6);
	clone = cloned(vm); /* what another owns cannot be cloned: both see it */
	put(clone, 8192, 11);
	ck_assert_uint_eq(get(vm, 8192), 11);
	ck_assert_uint_eq(class_of(vm, 4096), KAGE_PAGE_DEVICE);
	ck_assert_int_eq(kage_vm_advise(vm, 0, 4096, KAGE_ADVICE_MERGEABLE), -EOPNOTSUPP);
	close(fd);
	gone(vm);
	gone(clone);
}
END_TEST

static int touched;

static int touch(void *opaque, uint64_t gpa, void *page)
{
	uint64_t *w = page;

	if (gpa == 3 * 4096)
		return KAGE_WAIT;
	if (gpa == 5 * 4096)
		return -EIO;
	ck_assert_uint_eq(w[1], 0);
	w[0] = gpa + 1;
	touched++;
	return 0;
}

START_TEST(trap_region_is_filled_at_first_touch)
{
	struct kage_vm *vm = guest(), *clone;
	uint64_t v = 1;

	touched = 0;
	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .flags = KAGE_REGION_TRAP, .touch = touch, .gpa = 0,
						  .len = 4 * MIB)), 0);
	ck_assert_uint_eq(get(vm, 4096), 4097);
	ck_assert_int_eq(touched, 1);
	ck_assert_uint_eq(get(vm, 4096), 4097);
	ck_assert_int_eq(touched, 1);
	ck_assert_int_eq(kage_vm_read(vm, 3 * 4096, &v, sizeof(v)), KAGE_WAIT);
	ck_assert_int_eq(kage_vm_write(vm, 5 * 4096, &v, sizeof(v)), -EIO);
	audit();
	clone = cloned(vm);
	ck_assert_uint_eq(get(clone, 8192), 8193); /* each side is filled for itself */
	ck_assert_uint_eq(get(vm, 8192), 8193);
	ck_assert_int_eq(touched, 3);
	gone(vm);
	gone(clone);
}
END_TEST

START_TEST(external_region_is_copied_by_a_clone)
{
	struct kage_vm *vm = guest(), *clone;
	struct iovec iov;
	unsigned n = 1;
	uint64_t *raw;

	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .len = MIB,
						  .flags = KAGE_REGION_EXTERNAL | KAGE_REGION_MERGEABLE)), -EINVAL);
	map(vm, 0, 4 * MIB, KAGE_REGION_EXTERNAL);
	put(vm, 4096, 1);
	put(vm, 2 * MIB, 2);
	ck_assert_int_eq(kage_vm_pin(vm, 4096, 4096, 0, &iov, &n), 0);
	raw = iov.iov_base;
	ck_assert_int_eq(kage_vm_unpin(vm, 4096, 4096), 0);
	clone = cloned(vm);
	*raw = 77; /* the other party writes by address, after the clone too */
	ck_assert_uint_eq(get(vm, 4096), 77);
	ck_assert_uint_eq(get(clone, 4096), 1);
	ck_assert_uint_eq(get(clone, 2 * MIB), 2);
	put(vm, 4096, 78);
	ck_assert_uint_eq(*raw, 78); /* it did not move */
	ck_assert_int_eq(kage_vm_advise(vm, 0, MIB, KAGE_ADVICE_DISCARD), -EOPNOTSUPP);
	gone(vm);
	gone(clone);
}
END_TEST

/* -- blocks ---------------------------------------------------------------------------------- */

START_TEST(blocks_map_what_lines_up)
{
	struct kage_vm *vm = guest();

	map(vm, MIB, 6 * MIB, 0);
	put(vm, MIB, 1);
	put(vm, 3 * MIB, 2);
	ck_assert_uint_eq(level_of(vm, MIB), 0);
	ck_assert_uint_eq(level_of(vm, 3 * MIB), 1);
	gone(vm);
}
END_TEST

START_TEST(giant_blocks_split_step_by_step)
{
	struct kage_vm *vm = guest(), *clone;

	map(vm, 3 * GIB, 2 * GIB, 0);
	put(vm, 3 * GIB + 5 * MIB, 1);
	ck_assert_uint_eq(level_of(vm, 3 * GIB + 100 * MIB), 2);
	clone = cloned(vm);
	put(clone, 3 * GIB + 5 * MIB, 2);
	ck_assert_uint_eq(level_of(clone, 3 * GIB + 5 * MIB), 0);
	ck_assert_uint_eq(level_of(clone, 3 * GIB + 100 * MIB), 1);
	ck_assert_uint_eq(get(vm, 3 * GIB + 5 * MIB), 1);
	put(vm, 3 * GIB + 200 * MIB, 3);
	put(clone, 3 * GIB + 200 * MIB, 4);
	ck_assert_uint_eq(get(vm, 3 * GIB + 200 * MIB), 3);
	ck_assert_int_eq(kage_vm_unmap(vm, 3 * GIB + 4096, GIB), 0);
	audit();
	ck_assert_uint_eq(get(clone, 3 * GIB + 200 * MIB), 4);
	ck_assert_uint_eq(get(clone, 3 * GIB + 300 * MIB), 0);
	gone(vm);
	put(clone, 3 * GIB + 300 * MIB, 5);
	gone(clone);
}
END_TEST

START_TEST(block_is_reused_when_the_clone_is_gone)
{
	struct kage_vm *vm = guest(), *clone;

	map(vm, 0, 4 * MIB, 0);
	put(vm, 0, 1);
	clone = cloned(vm);
	gone(clone);
	put(vm, 8, 2);
	ck_assert_uint_eq(level_of(vm, 0), 1);
	ck_assert_uint_eq(stats(vm).cow_breaks, 0);
	ck_assert_uint_ge(stats(vm).cow_reused, 1);
	gone(vm);
}
END_TEST

START_TEST(discard_gives_memory_back_and_reads_zero)
{
	struct kage_vm *vm = guest();

	map(vm, 0, 8 * MIB, 0);
	for (unsigned i = 0; i < 2048; i++)
		ck_assert_int_eq(kage_vm_write(vm, i * 4096, &i, sizeof(i)), 0);
	audit();
	ck_assert_uint_eq(stats(NULL).frames_used, 2048);
	ck_assert_int_eq(kage_vm_advise(vm, 4096, 4 * MIB, KAGE_ADVICE_DISCARD), 0);
	audit();
	ck_assert_int_eq(kage_engine_step(engine, NULL, NULL), 0);
	ck_assert_uint_eq(stats(NULL).frames_used, 1024);
	ck_assert_uint_eq(get(vm, 3 * 4096), 0);
	ck_assert_uint_eq(get(vm, 4 * MIB + 4096), 1025);
	put(vm, 3 * 4096, 9);
	put(vm, 2 * MIB, 10);
	ck_assert_uint_eq(get(vm, 2 * MIB + 4096), 0);
	gone(vm);
	ck_assert_int_eq(kage_engine_step(engine, NULL, NULL), 0);
	ck_assert_uint_eq(stats(NULL).frames_used, 0);
}
END_TEST

/* -- clones of clones, layers -------------------------------------------------------------------- */

START_TEST(generations_stay_apart)
{
	enum { N = 12 };
	struct kage_vm *vm[N];

	vm[0] = guest();
	map(vm[0], 0, 4 * MIB, 0);
	for (unsigned i = 0; i < 64; i++)
		put(vm[0], i * 8192, i);
	for (unsigned g = 1; g < N; g++) {
		vm[g] = cloned(vm[g - 1]);
		put(vm[g], g * 8192, 1000 + g);
		put(vm[g - 1], 40 * 8192, 2000 + g);
	}
	for (unsigned g = 0; g < N; g++)
		for (unsigned i = 1; i < N; i++)
			ck_assert_uint_eq(get(vm[g], i * 8192), i <= g ? 1000 + i : i);
	for (unsigned g = 0; g < N; g += 2)
		gone(vm[g]);
	ck_assert_uint_eq(get(vm[N - 1], 8192), 1001);
	for (unsigned g = 1; g < N; g += 2)
		gone(vm[g]);
}
END_TEST

START_TEST(a_long_line_of_clones_keeps_few_layers)
{
	struct kage_vm *vm = guest(), *next;
	unsigned depth = 0;

	map(vm, 0, 2 * MIB, 0);
	for (unsigned i = 0; i < 200; i++) {
		put(vm, i * 4096, i + 1);
		ck_assert_int_eq(kage_vm_clone(vm, NULL, &next), 0);
		gone(vm);
		vm = next;
	}
	for (struct layer *l = vm->mm.layer; l; l = l->parent)
		depth++;
	ck_assert_uint_le(depth, 2);
	for (unsigned i = 0; i < 200; i++)
		ck_assert_uint_eq(get(vm, i * 4096), i + 1);
	gone(vm);
}
END_TEST

static int count_entry(const struct rmap_entry *e, void *arg)
{
	(*(unsigned *)arg)++;
	return 0;
}

START_TEST(reverse_map_visits_each_table_once)
{
	struct kage_vm *vm = guest(), *clone[8];
	struct mm_lookup l;
	unsigned n = 0;

	map(vm, 0, 2 * MIB, KAGE_REGION_NOHUGE);
	put(vm, 0, 1);
	put(vm, 4096, 1);
	for (unsigned i = 0; i < 8; i++)
		clone[i] = cloned(vm);
	l = mm_lookup(&vm->mm, GFN(0));
	ck_assert_int_eq(rmap_walk(&engine->host, l.pfn, count_entry, &n), 0);
	ck_assert_uint_eq(n, 1); /* nine guests, one table */
	put(clone[3], 4096, 2);  /* its own table from now on */
	n = 0;
	ck_assert_int_eq(rmap_walk(&engine->host, l.pfn, count_entry, &n), 0);
	ck_assert_uint_eq(n, 2);
	put(clone[3], 0, 3);     /* its own frame */
	n = 0;
	ck_assert_int_eq(rmap_walk(&engine->host, l.pfn, count_entry, &n), 0);
	ck_assert_uint_eq(n, 1);
	gone(vm);
	for (unsigned i = 0; i < 8; i++)
		gone(clone[i]);
}
END_TEST

/* What a listener is told decides what it may keep: a break and a merge leave contents, a discard does not. */
static struct kage_range told;

static int tell(struct kage_notifier *n, const struct kage_range *range)
{
	told = *range;
	return 0;
}

START_TEST(listeners_are_told_whether_contents_stay)
{
	static const struct kage_notifier_ops ops = { .invalidate_range_start = tell };
	struct kage_vm *vm = guest(), *clone;
	struct kage_notifier n = { 0 };

	map(vm, 0, MIB, KAGE_REGION_NOHUGE);
	put(vm, 4096, 1);
	ck_assert_int_eq(kage_notifier_register(vm, &n, &ops), 0);
	clone = cloned(vm);
	ck_assert_uint_eq(told.reason, KAGE_REASON_PROTECT);
	ck_assert_uint_eq(told.lost, KAGE_WRITE);
	put(vm, 4096, 2);
	ck_assert_uint_eq(told.reason, KAGE_REASON_CLEAR);
	ck_assert_uint_eq(told.flags & KAGE_RANGE_SAME_CONTENT, KAGE_RANGE_SAME_CONTENT);
	ck_assert_uint_eq(told.start, 4096);
	ck_assert_uint_eq(told.end, 8192);
	ck_assert_int_eq(kage_vm_advise(vm, 4096, 4096, KAGE_ADVICE_DISCARD), 0);
	ck_assert_uint_eq(told.reason, KAGE_REASON_CLEAR);
	ck_assert_uint_eq(told.flags & KAGE_RANGE_SAME_CONTENT, 0);
	ck_assert_int_eq(kage_notifier_unregister(&n), 0);
	gone(vm);
	gone(clone);
}
END_TEST

/* -- pins -------------------------------------------------------------------------------------------- */

START_TEST(pinned_pages_stay_and_are_copied)
{
	struct kage_vm *vm = guest(), *clone;
	struct iovec iov[4];
	unsigned n = 4;
	uint64_t *raw;

	map(vm, 0, 4 * MIB, KAGE_REGION_MERGEABLE);
	put(vm, 4096, 5);
	clone = cloned(vm);
	ck_assert_int_eq(kage_vm_pin(vm, 4096, 3 * 4096, 0, iov, &n), 0);
	audit();
	ck_assert_uint_ge(n, 1);
	raw = iov[0].iov_base;
	ck_assert_uint_eq(*raw, 5);
	*raw = 6;
	ck_assert_uint_eq(get(vm, 4096), 6);
	ck_assert_uint_eq(get(clone, 4096), 5);
	gone(clone);
	clone = cloned(vm);
	*raw = 7;
	ck_assert_uint_eq(get(clone, 4096), 6);
	ck_assert_uint_eq(get(vm, 4096), 7);
	put(vm, 4104, 1);
	ck_assert_uint_eq(raw[1], 1);
	ck_assert_int_eq(kage_vm_unmap(vm, 0, 4 * MIB), -EBUSY);
	ck_assert_int_eq(kage_vm_advise(vm, 0, 4 * MIB, KAGE_ADVICE_DISCARD), -EBUSY);
	ck_assert_int_eq(kage_vm_destroy(vm), -EBUSY);
	ck_assert_int_eq(kage_vm_unpin(vm, 4096, 4096), -ENOENT);
	ck_assert_int_eq(kage_vm_unpin(vm, 4096, 3 * 4096), 0);
	ck_assert_int_eq(kage_vm_unmap(vm, 0, 4 * MIB), 0);
	gone(vm);
	gone(clone);
}
END_TEST

START_TEST(pins_nest_up_to_their_limit)
{
	struct kage_vm *vm = guest();
	struct iovec iov;
	unsigned n;
	int r = 0, count = 0;

	map(vm, 0, MIB, 0);
	for (; count < 2000 && r == 0; count += r == 0) {
		n = 1;
		r = kage_vm_pin(vm, 0, 4096, 0, &iov, &n);
	}
	ck_assert_int_eq(r, -EOVERFLOW);
	ck_assert_int_eq(count, 1023);
	while (count--)
		ck_assert_int_eq(kage_vm_unpin(vm, 0, 4096), 0);
	n = 0;
	ck_assert_int_eq(kage_vm_pin(vm, 0, 8192, 0, NULL, &n), -ENOSPC);
	ck_assert_int_eq(kage_vm_unpin(vm, 0, 8192), -ENOENT);
	gone(vm);
}
END_TEST

/* -- every allocation fails once ------------------------------------------------------------------------ */

static long fail_after = -1;
static long allocated;

static void *failing_alloc(void *opaque, size_t bytes)
{
	void *p;

	if (fail_after >= 0 && fail_after-- == 0)
		return NULL;
	if (posix_memalign(&p, 64, bytes))
		return NULL;
	memset(p, 0, bytes);
	allocated++;
	return p;
}

static void failing_free(void *opaque, void *ptr, size_t bytes)
{
	allocated--;
	free(ptr);
}

/* A life with everything in it; stops at the first error. */
static int life(struct kage_vm **vm, struct kage_vm **clone)
{
	struct kage_dirty *log = NULL;
	struct iovec iov[8];
	uint64_t v = 1, bits[32];
	unsigned n = 8;
	int r = kage_vm_create(engine, NULL, vm);

	if (!r)
		r = kage_vm_map(*vm, KAGE_CFG(kage_region, .gpa = 0, .len = 4 * MIB,
					       .flags = KAGE_REGION_MERGEABLE | KAGE_REGION_NOHUGE));
	for (unsigned i = 0; !r && i < 8; i++)
		r = kage_vm_write(*vm, i * 512 * 1024, &v, sizeof(v));
	if (!r)
		r = kage_vm_pin(*vm, 8192, 8192, 0, iov, &n);
	if (!r)
		r = kage_vm_clone(*vm, NULL, clone);
	if (n != 8)
		ck_assert_int_eq(kage_vm_unpin(*vm, 8192, 8192), 0);
	if (!r)
		r = kage_dirty_open(*clone, NULL, &log);
	if (!r)
		r = kage_vm_write(*clone, 512 * 1024, &v, sizeof(v));
	if (log) {
		int c = kage_dirty_collect(log, 0, 4 * MIB, bits, sizeof(bits));

		if (!r && c < 0)
			r = c;
		kage_dirty_close(log);
	}
	for (unsigned i = 0; !r && i < 3; i++)
		r = kage_engine_step(engine, NULL, NULL);
	if (!r)
		r = kage_vm_unmap(*vm, 4096, 2 * MIB);
	if (!r)
		r = kage_vm_advise(*clone, 0, 4 * MIB, KAGE_ADVICE_UNMERGEABLE);
	return r;
}

START_TEST(every_allocation_fails_once)
{
	long at = 0;
	int r;

	do {
		struct kage_vm *vm = NULL, *clone = NULL;

		allocated = 0;
		ck_assert_int_eq(kage_engine_create(KAGE_CFG(kage_engine_config, .alloc = { failing_alloc, failing_free, NULL }),
						    &engine), 0);
		kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE));
		fail_after = at++;
		r = life(&vm, &clone);
		fail_after = -1;
		ck_assert_msg(r == 0 || r == -ENOMEM, "allocation %ld: %d", at - 1, r);
		audit();
		ck_assert_int_eq(kage_vm_destroy(vm), 0);
		ck_assert_int_eq(kage_vm_destroy(clone), 0);
		audit();
		ck_assert_int_eq(kage_engine_destroy(engine), 0);
		ck_assert_int_eq(allocated, 0);
	} while (at < 2000 && (r != 0 || at < 40));
	ck_assert_int_eq(r, 0);
}
END_TEST

START_TEST(memory_limit_is_kept)
{
	struct kage_vm *vm;
	uint64_t v = 1, i;
	int r = 0;

	ck_assert_int_eq(kage_engine_create(KAGE_CFG(kage_engine_config, .memory_limit = 8 * MIB), &engine), 0);
	vm = guest();
	map(vm, 0, 64 * MIB, 0);
	for (i = 0; r == 0; i += r == 0)
		r = kage_vm_write(vm, i * 4096, &v, sizeof(v));
	ck_assert_int_eq(r, -ENOMEM);
	ck_assert_uint_gt(i, 1500);
	ck_assert_uint_lt(i, 2048);
	audit();
	ck_assert_int_eq(kage_vm_advise(vm, 0, MIB, KAGE_ADVICE_DISCARD), 0);
	ck_assert_int_eq(kage_engine_step(engine, NULL, NULL), 0);
	put(vm, i * 4096, 1);
	gone(vm);
	teardown();
}
END_TEST

START_TEST(table_grows_with_its_regions)
{
	struct kage_vm *vm = guest(), *clone;

	map(vm, 0, MIB, 0);
	put(vm, 0, 1);
	ck_assert_uint_eq(root_level(vm->mm.root), 1);
	clone = cloned(vm);
	map(vm, 600 * GIB, 4 * MIB, 0);
	ck_assert_uint_eq(root_level(vm->mm.root), 3);
	put(vm, 600 * GIB, 2);
	ck_assert_uint_eq(get(vm, 0), 1);
	map(clone, ((uint64_t)1 << 52) - MIB, MIB, 0);
	ck_assert_uint_eq(root_level(clone->mm.root), 4);
	put(clone, ((uint64_t)1 << 52) - 4096, 3);
	put(clone, 0, 4);
	ck_assert_uint_eq(get(vm, 0), 1);
	gone(vm);
	gone(clone);
}
END_TEST

static void add_all(TCase *tc)
{
	tcase_set_timeout(tc, 120);
	tcase_add_test(tc, file_region_reads_the_file_and_keeps_writes);
	tcase_add_test(tc, file_region_beyond_its_file);
	tcase_add_test(tc, foreign_region_is_shared_with_its_owner);
	tcase_add_test(tc, trap_region_is_filled_at_first_touch);
	tcase_add_test(tc, external_region_is_copied_by_a_clone);
	tcase_add_test(tc, blocks_map_what_lines_up);
	tcase_add_test(tc, giant_blocks_split_step_by_step);
	tcase_add_test(tc, block_is_reused_when_the_clone_is_gone);
	tcase_add_test(tc, discard_gives_memory_back_and_reads_zero);
	tcase_add_test(tc, generations_stay_apart);
	tcase_add_test(tc, a_long_line_of_clones_keeps_few_layers);
	tcase_add_test(tc, reverse_map_visits_each_table_once);
	tcase_add_test(tc, listeners_are_told_whether_contents_stay);
	tcase_add_test(tc, pinned_pages_stay_and_are_copied);
	tcase_add_test(tc, pins_nest_up_to_their_limit);
	tcase_add_test(tc, table_grows_with_its_regions);
}

int main(void)
{
	Suite *s = suite_create("mm");
	TCase *anon = tcase_create("anonymous"), *memfd = tcase_create("memfd"), *faults = tcase_create("failures");
	SRunner *run;
	int failed;

	tcase_add_checked_fixture(anon, setup, teardown);
	add_all(anon);
	tcase_add_checked_fixture(memfd, setup_memfd, teardown);
	add_all(memfd);
	tcase_set_timeout(faults, 300);
	tcase_add_test(faults, every_allocation_fails_once);
	tcase_add_test(faults, memory_limit_is_kept);
	suite_add_tcase(s, anon);
	suite_add_tcase(s, memfd);
	suite_add_tcase(s, faults);
	run = srunner_create(s);
	srunner_set_fork_status(run, CK_NOFORK);
	srunner_run_all(run, CK_NORMAL);
	failed = srunner_ntests_failed(run);
	srunner_free(run);
	return failed != 0;
}
