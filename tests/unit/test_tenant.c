/* SPDX-License-Identifier: MIT */
/*
 * Merge domains: what guests of one share and those of two do not.
 */
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <kage/kage.h>
#include "api/engine.h"
#include "api/vm.h"
#include "mm/table.h"
#include "mm/tenant.h"

#define PAGE 4096u
#define PAGES 16u

static struct kage_engine *engine;

static void audit_line(void *opaque, const char *line)
{
	fprintf(stderr, "audit: %s\n", line);
}

static void audit(void)
{
	struct kage_audit a = { .size = sizeof(a), .report = audit_line };

	ck_assert_int_eq(kage_engine_audit(engine, &a), 0);
}

static void open_engine(uint64_t seed, uint32_t backing)
{
	ck_assert_int_eq(kage_engine_create(KAGE_CFG(kage_engine_config, .seed = seed, .backing = backing), &engine), 0);
	ck_assert_int_eq(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)), 0);
}

static void setup(void)
{
	open_engine(0, KAGE_BACKING_ANON);
}

static void setup_memfd(void)
{
	open_engine(0, KAGE_BACKING_MEMFD);
}

static void teardown(void)
{
	audit();
	ck_assert_int_eq(kage_engine_destroy(engine), 0);
}

static struct kage_vm *guest(uint32_t domain)
{
	struct kage_vm *vm;

	ck_assert_int_eq(kage_vm_create(engine, KAGE_CFG(kage_vm_config, .merge_domain = domain), &vm), 0);
	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .len = PAGES * PAGE, .flags = KAGE_REGION_MERGEABLE)), 0);
	return vm;
}

static void put(struct kage_vm *vm, unsigned page, uint64_t content)
{
	uint64_t buf[PAGE / 8];

	for (unsigned i = 0; i < PAGE / 8; i++)
		buf[i] = content * (i + 1);
	ck_assert_int_eq(kage_vm_write(vm, (uint64_t)page * PAGE, buf, PAGE), 0);
}

/* Passes until whatever is quiet has been looked at. */
static void merge(void)
{
	for (unsigned i = 0; i < 4; i++)
		ck_assert_int_eq(kage_engine_step(engine, NULL, NULL), 0);
	audit();
}

static struct mm_lookup look(struct kage_vm *vm, unsigned page)
{
	struct mm_lookup l;

	rcu_enter();
	l = mm_lookup(&vm->mm, GFN(page));
	rcu_leave();
	return l;
}

static void configure(uint32_t domain, uint32_t flags)
{
	ck_assert_int_eq(kage_domain_configure(engine, domain, KAGE_CFG(kage_domain_config, .flags = flags)), 0);
}

/* Equal contents of two guests: one frame in one domain, two in two. */
START_TEST(domains_share_no_frame)
{
	struct kage_vm *a = guest(1), *b = guest(1), *c = guest(2), *d = guest(2);

	put(a, 3, 7);
	put(b, 5, 7);
	put(c, 3, 7);
	put(d, 5, 7);
	merge();
	ck_assert(pfn_eq(look(a, 3).pfn, look(b, 5).pfn));
	ck_assert(pfn_eq(look(c, 3).pfn, look(d, 5).pfn));
	ck_assert(!pfn_eq(look(a, 3).pfn, look(c, 3).pfn));
	kage_vm_destroy(a);
	kage_vm_destroy(b);
	kage_vm_destroy(c);
	kage_vm_destroy(d);
}
END_TEST

START_TEST(zeroes_stay_in_their_domain)
{
	struct kage_vm *vm[6];

	configure(3, KAGE_DOMAIN_ZERO_SHARED);
	configure(4, KAGE_DOMAIN_ZERO_SHARED);
	for (unsigned i = 0; i < 6; i++) {
		vm[i] = guest(i < 5 ? i : 0); /* 0 to 4, and another one in 0 */
		put(vm[i], 2, 0);
	}
	merge();
	for (unsigned i = 0; i < 6; i++) {
		uint64_t word = 1;

		ck_assert(pfn_is_zero(look(vm[i], 2).pfn));
		ck_assert_int_eq(frame_kind(pfn_frame(engine->pool, look(vm[i], 2).pfn)), FRAME_ZERO);
		ck_assert_int_eq(kage_vm_read(vm[i], 2 * PAGE + 8 * i, &word, 8), 0);
		ck_assert_uint_eq(word, 0);
	}
	ck_assert(pfn_eq(look(vm[0], 2).pfn, look(vm[5], 2).pfn));
	ck_assert(pfn_eq(look(vm[3], 2).pfn, PFN_ZERO));
	ck_assert(pfn_eq(look(vm[4], 2).pfn, PFN_ZERO));
	for (unsigned i = 0; i < 3; i++)
		for (unsigned j = i + 1; j < 4; j++)
			ck_assert(!pfn_eq(look(vm[i], 2).pfn, look(vm[j], 2).pfn));
	put(vm[1], 2, 9); /* broken as any other shared page */
	ck_assert(!pfn_is_zero(look(vm[1], 2).pfn));
	audit();
	for (unsigned i = 0; i < 6; i++)
		kage_vm_destroy(vm[i]);
}
END_TEST

/* As many domains as section 0 has frames for, and those that come after merge zeroes as contents. */
START_TEST(zero_frames_run_out)
{
	struct kage_vm *a = guest(9), *b = guest(9);
	pfn_t pfn, last = PFN_NONE;
	unsigned n = 0;

	while (pool_zero_new(engine->pool, &pfn) == 0) {
		ck_assert(pfn_is_zero(pfn) && pfn.v > last.v);
		ck_assert_uint_eq(*(const uint64_t *)pfn_hva(engine->pool, pfn), 0);
		last = pfn;
		n++;
	}
	ck_assert_uint_gt(n, 1000);
	put(a, 1, 0);
	put(b, 2, 0);
	merge();
	ck_assert(pfn_eq(look(a, 1).pfn, look(b, 2).pfn));
	ck_assert_int_eq(frame_kind(pfn_frame(engine->pool, look(a, 1).pfn)), FRAME_STABLE);
	kage_vm_destroy(a);
	kage_vm_destroy(b);
}
END_TEST

/* A domain's salt depends on the engine's key and its number, and on both. */
START_TEST(salts_are_a_domains_own)
{
	uint64_t salt[2][8];

	for (unsigned e = 0; e < 2; e++) {
		open_engine(5 + e, KAGE_BACKING_ANON);
		for (unsigned d = 0; d < 8; d++) {
			struct tenant *t;

			ck_assert_int_eq(tenant_get(&engine->host, d, &t), 0);
			salt[e][d] = t->salt;
			tenant_put(t);
		}
		ck_assert_int_eq(kage_engine_destroy(engine), 0);
	}
	for (unsigned i = 0; i < 16; i++)
		for (unsigned j = 0; j < i; j++)
			ck_assert_uint_ne(salt[i / 8][i % 8], salt[j / 8][j % 8]);
	open_engine(5, KAGE_BACKING_ANON);
	struct tenant *t;
	ck_assert_int_eq(tenant_get(&engine->host, 3, &t), 0);
	ck_assert_uint_eq(t->salt, salt[0][3]);
	tenant_put(t);
	ck_assert_int_eq(kage_engine_destroy(engine), 0);
}
END_TEST

START_TEST(configured_before_guests)
{
	struct kage_domain_config longer[2] = { { .size = sizeof(longer) } };
	struct kage_vm *a, *b;

	ck_assert_int_eq(kage_domain_configure(NULL, 1, longer), -EINVAL);
	ck_assert_int_eq(kage_domain_configure(engine, 1, NULL), -EINVAL);
	ck_assert_int_eq(kage_domain_configure(engine, 65536, longer), -EINVAL);
	ck_assert_int_eq(kage_domain_configure(engine, 65535, longer), 0);
	memset(&longer[1], 1, sizeof(longer[1]));
	ck_assert_int_eq(kage_domain_configure(engine, 1, longer), -E2BIG);
	ck_assert_int_eq(kage_domain_configure(engine, 1, KAGE_CFG(kage_domain_config, .flags = 1u << 31)), -EINVAL);
	a = guest(1);
	ck_assert_int_eq(kage_domain_configure(engine, 1, KAGE_CFG(kage_domain_config, .flags = 0)), -EBUSY);
	ck_assert_int_eq(kage_vm_clone(a, NULL, &b), 0);
	ck_assert_int_eq(kage_vm_destroy(a), 0);
	ck_assert_int_eq(kage_domain_configure(engine, 1, KAGE_CFG(kage_domain_config, .flags = 0)), -EBUSY);
	ck_assert_int_eq(kage_vm_destroy(b), 0);
	configure(1, KAGE_DOMAIN_ZERO_SHARED);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("tenant");
	TCase *anon = tcase_create("anonymous"), *memfd = tcase_create("memfd"), *bare = tcase_create("bare");
	SRunner *sr;
	int failed;

	tcase_add_checked_fixture(anon, setup, teardown);
	tcase_add_checked_fixture(memfd, setup_memfd, teardown);
	for (unsigned i = 0; i < 2; i++) {
		TCase *tc = i ? memfd : anon;

		tcase_set_timeout(tc, 120);
		tcase_add_test(tc, domains_share_no_frame);
		tcase_add_test(tc, zeroes_stay_in_their_domain);
		tcase_add_test(tc, zero_frames_run_out);
		tcase_add_test(tc, configured_before_guests);
		suite_add_tcase(s, tc);
	}
	tcase_add_test(bare, salts_are_a_domains_own);
	suite_add_tcase(s, bare);
	sr = srunner_create(s);
	srunner_set_fork_status(sr, CK_NOFORK);
	srunner_run_all(sr, CK_NORMAL);
	failed = srunner_ntests_failed(sr);
	srunner_free(sr);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
