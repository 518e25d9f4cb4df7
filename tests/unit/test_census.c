/* SPDX-License-Identifier: MIT */
/*
 * Contents: digests of pages and how much of guests is the same. The oracle
 * compares every page with every other one.
 */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <kage/kage.h>

#define PAGE 4096u
#define PAGES 300u

static struct kage_engine *engine;

static void setup(void)
{
	ck_assert_int_eq(kage_engine_create(KAGE_CFG(kage_engine_config, .address_space = 1ull << 36), &engine), 0);
}

static void teardown(void)
{
	ck_assert_int_eq(kage_engine_destroy(engine), 0);
}

static struct kage_vm *guest(uint32_t domain)
{
	struct kage_vm *vm;

	ck_assert_int_eq(kage_vm_create(engine, KAGE_CFG(kage_vm_config, .merge_domain = domain), &vm), 0);
	return vm;
}

/* A guest and what its pages hold: page i holds tag[i] in word i % 512, the rest zeroes. */
struct side {
	struct kage_vm *vm;
	uint64_t tag[PAGES];
};

static void put(struct side *s, unsigned page, uint64_t tag)
{
	s->tag[page] = tag;
	ck_assert_int_eq(kage_vm_write(s->vm, (uint64_t)page * PAGE + tag % 512 * 8, &tag, sizeof(tag)), 0);
}

static struct kage_census census(struct kage_vm *const *vms, unsigned n)
{
	struct kage_census c = { .size = sizeof(c) };

	ck_assert_int_eq(kage_census_take(vms, n, &c), 0);
	return c;
}

/* By comparing tags: equal ones mean equal pages. */
static void expect(const struct side *s, unsigned n)
{
	struct kage_vm *vms[4];
	struct kage_census c, want = { .pages = (uint64_t)n * PAGES };

	for (unsigned i = 0; i < n * PAGES; i++) {
		uint64_t tag = s[i / PAGES].tag[i % PAGES];
		bool first = true, other = false;

		for (unsigned j = 0; j < n * PAGES; j++) {
			bool same = s[j / PAGES].tag[j % PAGES] == tag;

			first &= !(same && j < i);
			other |= same && j / PAGES != i / PAGES;
		}
		want.distinct += first;
		want.common += other;
		want.zero += tag == 0;
	}
	for (unsigned i = 0; i < n; i++)
		vms[i] = s[i].vm;
	c = census(vms, n);
	ck_assert_uint_eq(c.pages, want.pages);
	ck_assert_uint_eq(c.distinct, want.distinct);
	ck_assert_uint_eq(c.zero, want.zero);
	ck_assert_uint_eq(c.common, want.common);
	ck_assert_uint_eq(c.skipped, 0);
}

START_TEST(census_counts_what_a_comparison_of_all_pairs_counts)
{
	static struct side s[3];

	srand(5);
	for (unsigned i = 0; i < 3; i++) {
		s[i] = (struct side){ .vm = guest(i) }; /* domains do not matter */
		ck_assert_int_eq(kage_vm_map(s[i].vm, KAGE_CFG(kage_region, .len = PAGES * PAGE)), 0);
		for (unsigned page = 0; page < PAGES; page++)
			if (page % 3 != i)
				put(&s[i], page, (uint64_t)(rand() % 200));
	}
	expect(s, 1);
	expect(s, 2);
	expect(s, 3);
	for (unsigned i = 0; i < 3; i++)
		ck_assert_int_eq(kage_vm_destroy(s[i].vm), 0);
}
END_TEST

/* More contents than the table begins with, and more than it has after growing once. */
START_TEST(census_of_many_contents)
{
	struct kage_vm *vm = guest(0), *clone;
	struct kage_census c;
	const uint64_t pages = 10000;

	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .len = pages * PAGE)), 0);
	for (uint64_t i = 0; i < pages; i++)
		ck_assert_int_eq(kage_vm_write(vm, i * PAGE, &i, sizeof(i)), 0);
	c = census(&vm, 1);
	ck_assert_uint_eq(c.distinct, pages);
	ck_assert_uint_eq(c.zero, 1);
	ck_assert_uint_eq(c.common, 0);
	ck_assert_int_eq(kage_vm_clone(vm, NULL, &clone), 0);
	c = census((struct kage_vm *[]){ vm, clone }, 2);
	ck_assert_uint_eq(c.pages, 2 * pages);
	ck_assert_uint_eq(c.distinct, pages);
	ck_assert_uint_eq(c.common, 2 * pages);
	ck_assert_int_eq(kage_vm_destroy(vm), 0);
	ck_assert_int_eq(kage_vm_destroy(clone), 0);
}
END_TEST

static int memory_file(uint64_t pages)
{
	int fd = memfd_create("foreign", MFD_CLOEXEC);

	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(ftruncate(fd, (off_t)(pages * PAGE)), 0);
	return fd;
}

/* Somebody else writes to foreign memory: the digest of that page alone is another one. */
START_TEST(digests_follow_the_owner_of_foreign_memory)
{
	struct kage_vm *vm = guest(0);
	struct kage_digest was[64], is[64];
	uint64_t value = 7;
	int fd = memory_file(80);
	struct stat st;

	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .kind = KAGE_REGION_FOREIGN, .flags = KAGE_REGION_FD,
						  .prot = KAGE_READ, .fd = fd, .offset = 16 * PAGE,
						  .gpa = 1 << 30, .len = 64 * PAGE)), 0);
	ck_assert_int_eq(kage_page_digest(vm, 1 << 30, 64 * PAGE, was), 0);
	ck_assert_int_eq(fstat(fd, &st), 0);
	ck_assert_int_eq(st.st_blocks, 0); /* looking gave no memory to the holes */
	ck_assert_int_eq(pwrite(fd, &value, sizeof(value), (16 + 9) * PAGE + 4088), sizeof(value));
	ck_assert_int_eq(kage_page_digest(vm, 1 << 30, 64 * PAGE, is), 0);
	for (unsigned i = 0; i < 64; i++)
		ck_assert_int_eq(memcmp(&was[i], &is[i], sizeof(is[i])) != 0, i == 9);
	ck_assert_int_eq(fstat(fd, &st), 0);
	ck_assert_int_eq(st.st_blocks, PAGE / 512);
	ck_assert_uint_eq(census(&vm, 1).distinct, 2);
	close(fd);
	ck_assert_int_eq(kage_vm_destroy(vm), 0);
}
END_TEST

/* A private view: the file's bytes until the guest writes its own. */
START_TEST(digests_of_file_memory_are_what_the_guest_sees)
{
	struct kage_vm *vm = guest(0), *anon = guest(0);
	struct kage_digest file[4], own[4];
	uint64_t value = 9;
	int fd = memory_file(4);

	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .kind = KAGE_REGION_FILE, .flags = KAGE_REGION_FD,
						  .fd = fd, .len = 4 * PAGE)), 0);
	ck_assert_int_eq(kage_vm_map(anon, KAGE_CFG(kage_region, .len = 4 * PAGE)), 0);
	ck_assert_int_eq(pwrite(fd, &value, sizeof(value), PAGE), sizeof(value));
	ck_assert_int_eq(kage_vm_write(vm, 2 * PAGE, &value, sizeof(value)), 0);
	for (unsigned i = 1; i < 3; i++)
		ck_assert_int_eq(kage_vm_write(anon, i * PAGE, &value, sizeof(value)), 0);
	ck_assert_int_eq(kage_page_digest(vm, 0, 4 * PAGE, file), 0);
	ck_assert_int_eq(kage_page_digest(anon, 0, 4 * PAGE, own), 0);
	ck_assert_mem_eq(file, own, sizeof(own));
	value = 10; /* behind the page that the guest has its own copy of: nothing changes */
	ck_assert_int_eq(pwrite(fd, &value, sizeof(value), 2 * PAGE), sizeof(value));
	ck_assert_int_eq(kage_page_digest(vm, 0, 4 * PAGE, file), 0);
	ck_assert_mem_eq(file, own, sizeof(own));
	close(fd);
	ck_assert_int_eq(kage_vm_destroy(vm), 0);
	ck_assert_int_eq(kage_vm_destroy(anon), 0);
}
END_TEST

static int later(void *opaque, uint64_t gpa, void *page)
{
	return gpa == PAGE ? KAGE_WAIT : gpa == *(uint64_t *)opaque ? -EIO : 0;
}

START_TEST(what_cannot_be_read_is_skipped_or_said)
{
	uint64_t broken = UINT64_MAX;
	struct kage_vm *vm = guest(0), *two[2] = { vm, vm };
	struct kage_census c = { .size = sizeof(c) };
	struct kage_digest d[4];

	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .flags = KAGE_REGION_TRAP, .touch = later,
						  .opaque = &broken, .len = 4 * PAGE)), 0);
	ck_assert_int_eq(kage_vm_protect(vm, 3 * PAGE, PAGE, KAGE_WRITE), 0);
	c = census(&vm, 1);
	ck_assert_uint_eq(c.pages, 2);
	ck_assert_uint_eq(c.skipped, 2);
	ck_assert_uint_eq(c.zero, 2);
	ck_assert_int_eq(kage_page_digest(vm, 0, 2 * PAGE, d), KAGE_WAIT);
	ck_assert_int_eq(kage_page_digest(vm, 2 * PAGE, 2 * PAGE, d), KAGE_MMIO);
	ck_assert_int_eq(kage_page_digest(vm, 8 * PAGE, PAGE, d), KAGE_MMIO);
	ck_assert_int_eq(kage_page_digest(vm, 1, PAGE, d), -EINVAL);
	ck_assert_int_eq(kage_page_digest(vm, 0, 0, d), -EINVAL);
	ck_assert_int_eq(kage_vm_advise(vm, 0, 4 * PAGE, KAGE_ADVICE_DISCARD), 0);
	broken = 0;
	c.pages = 77;
	ck_assert_int_eq(kage_census_take(&vm, 1, &c), -EIO);
	ck_assert_uint_eq(c.pages, 77);
	ck_assert_int_eq(kage_census_take(two, 2, &c), -EINVAL);
	c.size = 8;
	ck_assert_int_eq(kage_census_take(&vm, 1, &c), -EINVAL);
	ck_assert_int_eq(kage_vm_destroy(vm), 0);
}
END_TEST

START_TEST(shares_are_refused)
{
	struct kage_vm *vms[2] = { guest(0), guest(1) }, *twice[2] = { vms[0], vms[0] }, *none[1] = { NULL };
	struct kage_share share[2] = { { .bytes = 77 } };

	ck_assert_int_eq(kage_share_take(NULL, 1, share), -EINVAL);
	ck_assert_int_eq(kage_share_take(vms, 1, NULL), -EINVAL);
	ck_assert_int_eq(kage_share_take(vms, 0, share), -EINVAL);
	ck_assert_int_eq(kage_share_take(twice, 2, share), -EINVAL);
	ck_assert_int_eq(kage_share_take(none, 1, share), -EINVAL);
	ck_assert_uint_eq(share[0].bytes, 77);
	ck_assert_int_eq(kage_share_take(vms, 2, share), 0);
	ck_assert_uint_eq(share[0].bytes + share[1].bytes, 0);
	for (unsigned i = 0; i < 2; i++)
		ck_assert_int_eq(kage_vm_destroy(vms[i]), 0);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("census");
	TCase *tc = tcase_create("census");
	SRunner *runner;
	int failed;

	tcase_set_timeout(tc, 240);
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_test(tc, shares_are_refused);
	tcase_add_test(tc, census_counts_what_a_comparison_of_all_pairs_counts);
	tcase_add_test(tc, census_of_many_contents);
	tcase_add_test(tc, digests_follow_the_owner_of_foreign_memory);
	tcase_add_test(tc, digests_of_file_memory_are_what_the_guest_sees);
	tcase_add_test(tc, what_cannot_be_read_is_skipped_or_said);
	suite_add_tcase(suite, tc);
	runner = srunner_create(suite);
	srunner_run_all(runner, CK_NORMAL);
	failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed != 0;
}
