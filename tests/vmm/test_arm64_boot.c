/* SPDX-License-Identifier: MIT */
/*
 * Direct boot on arm64, without KVM: what an Image and its neighbours look like in memory, which images are
 * refused, and that the device tree says what the machine is. The tree is read by a reader of its own.
 */
#include <check.h>
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arm64.h"
#include "arm64_boot.h"
#include "arm64_fdt.h"

#define MIB ((uint64_t)1 << 20)
#define GIB ((uint64_t)1 << 30)
#define is(a, b) ck_assert_uint_eq(a, b)

/* -- memory that notes what is written ------------------------------------------------------ */

static struct {
	struct vmm_ram ram;
	uint8_t *bytes;
	uint64_t len; /* of what is kept: the first region */
	unsigned writes;
} mem;

static int mem_write(struct vmm_ram *ram, uint64_t gpa, const void *buf, size_t len)
{
	ck_assert(gpa <= mem.len && len <= mem.len - gpa);
	memcpy(mem.bytes + gpa, buf, len);
	mem.writes++;
	return 0;
}

static const struct vmm_ram_ops mem_ops = { .write = mem_write };

static void setup(void)
{
	mem.len = 64 * MIB;
	mem.bytes = calloc(1, mem.len);
	mem.ram = (struct vmm_ram){ .ops = &mem_ops, .regions = 1, .region = { { 0, mem.len } } };
}

static void teardown(void)
{
	free(mem.bytes);
}

#define IMAGE_LEN 100000u
#define IMAGE_MEM (5 * MIB + 4096)

/* Exactly as long as it says, on the heap: a sanitizer sees any read beyond it. */
static uint8_t *make_image(uint64_t text_offset, uint64_t size, uint64_t flags)
{
	uint8_t *p = malloc(IMAGE_LEN);
	const uint64_t words[] = { htole64(text_offset), htole64(size), htole64(flags) };

	for (unsigned i = 0; i < IMAGE_LEN; i++)
		p[i] = (uint8_t)(i * 7 + i / 251);
	memcpy(p + 8, words, sizeof(words));
	memcpy(p + 56, "ARM\x64", 4);
	return p;
}

static const struct boot_machine machine = { .gic_version = 3, .mpidr = { 0x80000000, 0x80000001, 0x80000100 }, .seed = "seed" };

static int load(const struct boot_config *config, struct boot_entry *entry)
{
	const char *why = NULL;
	int err = boot_load(&mem.ram, config, &machine, entry, &why);

	ck_assert_msg(!err || (why && *why), "%d without a reason", err);
	return err;
}

/* One assertion for many bytes: Check takes note of each one with a system call. */
static bool all_are(const uint8_t *p, uint8_t byte, size_t len)
{
	return len == 0 || (p[0] == byte && !memcmp(p, p + 1, len - 1));
}

/* -- a reader of trees -------------------------------------------------------------------------- */

static uint32_t be32_at(const uint8_t *p)
{
	uint32_t v;

	memcpy(&v, p, 4);
	return be32toh(v);
}

static uint64_t be64_at(const uint8_t *p)
{
	return (uint64_t)be32_at(p) << 32 | be32_at(p + 4);
}

/* The value of a property, `path` as /node/node/property; NULL: it is not there. Checks the tree's form. */
static const uint8_t *find(const uint8_t *tree, const char *path, uint32_t *len)
{
	const uint8_t *at = tree + be32_at(tree + 8), *found = NULL;
	const char *names = (const char *)tree + be32_at(tree + 12);
	char here[256] = "";
	unsigned depth = 0;

	is(be32_at(tree), 0xd00dfeed);
	is(be32_at(tree + 20), 17);
	for (;;) {
		uint32_t token = be32_at(at);
		char full[512];

		at += 4;
		if (token == 1) {
			size_t n = strlen((const char *)at) + 1;

			if (depth++) {
				strcat(here, "/");
				strcat(here, (const char *)at);
			}
			at += (n + 3) & ~(size_t)3;
		} else if (token == 2) {
			ck_assert_uint_gt(depth, 0);
			if (--depth)
				*strrchr(here, '/') = 0;
		} else if (token == 3) {
			uint32_t n = be32_at(at);

			snprintf(full, sizeof(full), "%s/%s", here, names + be32_at(at + 4));
			if (!strcmp(full, path)) {
				ck_assert_ptr_null(found);
				found = at + 8;
				*len = n;
			}
			at += 8 + ((n + 3) & ~3u);
		} else {
			is(token, 9);
			is(depth, 0);
			is(at - tree, be32_at(tree + 12)); /* names follow */
			is(be32_at(tree + 4), be32_at(tree + 12) + ((be32_at(tree + 32) + 3) & ~3u));
			return found;
		}
	}
}

static void has_text(const uint8_t *tree, const char *path, const char *text)
{
	uint32_t len = 0;
	const uint8_t *p = find(tree, path, &len);

	ck_assert_msg(p && len == strlen(text) + 1 && !memcmp(p, text, len), "%s is not %s", path, text);
}

static void has_u64(const uint8_t *tree, const char *path, unsigned index, uint64_t value)
{
	uint32_t len = 0;
	const uint8_t *p = find(tree, path, &len);

	ck_assert_msg(p && len >= 8 * (index + 1), "no %s", path);
	ck_assert_msg(be64_at(p + 8 * index) == value, "%s[%u] is %lx", path, index, be64_at(p + 8 * index));
}

static void has_u32(const uint8_t *tree, const char *path, unsigned index, uint32_t value)
{
	uint32_t len = 0;
	const uint8_t *p = find(tree, path, &len);

	ck_assert_msg(p && len >= 4 * (index + 1), "no %s", path);
	ck_assert_msg(be32_at(p + 4 * index) == value, "%s[%u] is %x", path, index, be32_at(p + 4 * index));
}

/* -- loading -------------------------------------------------------------------------------------- */

START_TEST(image_tree_and_initramfs)
{
	static const uint64_t offsets[] = { 0, 0x80000 };
	uint8_t *image = make_image(offsets[_i], IMAGE_MEM, 0xa), *initrd = malloc(300001);
	struct boot_config config = { .kernel = { image, IMAGE_LEN }, .initrd = { initrd, 300001 }, .cmdline = "console=ttyS0 x",
				      .cpus = 3 };
	struct boot_entry e;
	uint64_t end;

	memset(initrd, 0x5a, 300001);
	is(load(&config, &e), 0);
	is(e.pc, 2 * MIB + offsets[_i]);
	is(e.kernel, e.pc);
	ck_assert(!memcmp(mem.bytes + e.pc, image, IMAGE_LEN));
	end = e.pc + IMAGE_MEM;
	ck_assert(e.tree >= end && e.tree % 8 == 0);
	ck_assert(e.initrd >= e.tree + be32_at(mem.bytes + e.tree + 4) && e.initrd % 4096 == 0);
	ck_assert(e.initrd + 300001 <= mem.len);
	ck_assert(!memcmp(mem.bytes + e.initrd, initrd, 300001));
	ck_assert(all_are(mem.bytes, 0, 2 * MIB));
	has_text(mem.bytes + e.tree, "/chosen/bootargs", "console=ttyS0 x");
	has_u64(mem.bytes + e.tree, "/chosen/linux,initrd-start", 0, e.initrd);
	has_u64(mem.bytes + e.tree, "/chosen/linux,initrd-end", 0, e.initrd + 300001);
	free(image);
	free(initrd);
}
END_TEST

START_TEST(the_tree_is_the_machine)
{
	const struct vmm_ram ram = { .regions = 2, .region = { { 0, 3 * GIB }, { 4 * GIB, 1 * GIB } } };
	const struct boot_config config = { .cpus = 3 };
	struct boot_machine other = machine;
	static uint64_t buf[8192];
	const uint8_t *t = (const uint8_t *)buf;
	uint32_t len;

	ck_assert_int_gt(boot_tree(&ram, &config, &machine, 0, buf, sizeof(buf)), 0);
	has_text(t, "/chosen/bootargs", "");
	ck_assert_ptr_null(find(t, "/chosen/linux,initrd-start", &len));
	has_u64(t, "/memory@200000/reg", 0, 2 * MIB);
	has_u64(t, "/memory@200000/reg", 1, 3 * GIB - 2 * MIB);
	has_u64(t, "/memory@200000/reg", 2, 4 * GIB);
	has_u64(t, "/memory@200000/reg", 3, 1 * GIB);
	has_u32(t, "/cpus/cpu@0/reg", 0, 0);
	has_u32(t, "/cpus/cpu@1/reg", 0, 1);
	has_u32(t, "/cpus/cpu@100/reg", 0, 0x100);
	has_text(t, "/cpus/cpu@100/enable-method", "psci");
	has_text(t, "/psci/method", "hvc");
	has_text(t, "/interrupt-controller@fe000000/compatible", "arm,gic-v3");
	has_u64(t, "/interrupt-controller@fe000000/reg", 2, ARM64_GICR);
	has_u64(t, "/interrupt-controller@fe000000/reg", 3, 3 * ARM64_GICR_ONE);
	has_u32(t, "/interrupt-parent", 0, 1);
	has_u32(t, "/interrupt-controller@fe000000/phandle", 0, 1);
	has_u32(t, "/timer/interrupts", 7, 11); /* the virtual timer */
	has_u32(t, "/timer/interrupts", 8, 4);
	has_u64(t, "/serial@fd000000/reg", 0, VMM_SERIAL_BASE);
	has_u32(t, "/serial@fd000000/interrupts", 1, VMM_SERIAL_IRQ);
	ck_assert(!memcmp(find(t, "/chosen/kaslr-seed", &len), machine.seed, 8));
	other.gic_version = 2;
	ck_assert_int_gt(boot_tree(&ram, &config, &other, 0, buf, sizeof(buf)), 0);
	has_text(t, "/interrupt-controller@fe000000/compatible", "arm,cortex-a15-gic");
	has_u64(t, "/interrupt-controller@fe000000/reg", 2, ARM64_GICC);
	has_u32(t, "/timer/interrupts", 8, 0x704);
}
END_TEST

/* A buffer that is one byte too short, and all shorter ones, give -ENOSPC, and nothing is written behind them. */
START_TEST(a_tree_without_room)
{
	const struct vmm_ram ram = { .regions = 1, .region = { { 0, GIB } } };
	const struct boot_config config = { .cpus = 2, .cmdline = "something" };
	static uint64_t buf[8192];
	int len = boot_tree(&ram, &config, &machine, 0, buf, sizeof(buf));

	ck_assert_int_gt(len, 0);
	is(boot_tree(&ram, &config, &machine, 0, buf, (size_t)len), len);
	for (int room = 0; room < len; room++) {
		memset(buf, 0xee, sizeof(buf));
		ck_assert_int_eq(boot_tree(&ram, &config, &machine, 0, buf, (size_t)room), -ENOSPC);
		ck_assert(all_are((uint8_t *)buf + room, 0xee, (size_t)(len + 64 - room)));
	}
}
END_TEST

/* -- what is refused -------------------------------------------------------------------------------- */

static void refused(struct boot_config config, int want, const char *what)
{
	struct boot_entry entry, before;
	int err;

	memset(&entry, 0x5a, sizeof(entry));
	before = entry;
	mem.writes = 0;
	if (!config.cpus)
		config.cpus = 1;
	err = load(&config, &entry);
	ck_assert_msg(err == want, "%s: %d, not %d", what, err, want);
	ck_assert_msg(!mem.writes, "%s: memory was written", what);
	ck_assert_msg(!memcmp(&entry, &before, sizeof(entry)), "%s: the result was written", what);
}

START_TEST(broken_images)
{
	static const struct {
		const char *what;
		uint64_t offset, size, flags;
		int want;
	} broken[] = {
		{ "no size", 0, 0, 0xa, -EOPNOTSUPP },		   { "big-endian", 0, IMAGE_MEM, 0xb, -EOPNOTSUPP },
		{ "smaller than the file", 0, 4096, 0xa, -ENOEXEC }, { "offset", 2 * MIB, IMAGE_MEM, 0xa, -ENOEXEC },
		{ "huge", 0, UINT64_MAX, 0xa, -ENOEXEC },	   { "larger than RAM", 0, 62 * MIB, 0xa, -ENOSPC },
	};
	uint8_t *p;

	for (unsigned i = 0; i < sizeof(broken) / sizeof(broken[0]); i++) {
		p = make_image(broken[i].offset, broken[i].size, broken[i].flags);
		refused((struct boot_config){ .kernel = { p, IMAGE_LEN } }, broken[i].want, broken[i].what);
		free(p);
	}
	p = make_image(0, IMAGE_MEM, 0xa);
	p[59] ^= 1;
	refused((struct boot_config){ .kernel = { p, IMAGE_LEN } }, -ENOEXEC, "magic");
	refused((struct boot_config){ .kernel = { p, 63 } }, -ENOEXEC, "short");
	refused((struct boot_config){ .kernel = { NULL, 0 } }, -ENOEXEC, "empty");
	free(p);
}
END_TEST

START_TEST(what_does_not_fit)
{
	uint8_t *p = make_image(0, IMAGE_MEM, 0xa), *initrd = calloc(1, 60 * MIB);
	char line[BOOT_CMDLINE_MAX + 1] = "";
	struct boot_config config = { .kernel = { p, IMAGE_LEN }, .initrd = { initrd, 57 * MIB } };

	refused(config, -ENOSPC, "initramfs beside the kernel");
	config.initrd.len = 65 * MIB;
	refused(config, -ENOSPC, "initramfs larger than RAM");
	config.initrd.len = 0;
	memset(line, 'x', BOOT_CMDLINE_MAX);
	config.cmdline = line;
	refused(config, -E2BIG, "command line");
	config.cmdline = NULL;
	config.cpus = VMM_VCPUS + 1;
	refused(config, -EINVAL, "CPUs");
	config.cpus = 1;
	mem.ram.region[0].gpa = MIB;
	refused(config, -EINVAL, "RAM from 1 MiB");
	mem.ram.region[0] = (struct vmm_region){ 0, 2 * MIB };
	refused(config, -EINVAL, "2 MiB of RAM");
	mem.ram.region[0].len = 3 * GIB + 4096;
	refused(config, -EINVAL, "RAM where devices are");
	free(initrd);
	free(p);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("arm64 boot");
	TCase *tc = tcase_create("boot");
	SRunner *runner;
	int failures;

	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_set_timeout(tc, 60);
	tcase_add_loop_test(tc, image_tree_and_initramfs, 0, 2);
	tcase_add_test(tc, the_tree_is_the_machine);
	tcase_add_test(tc, a_tree_without_room);
	tcase_add_test(tc, broken_images);
	tcase_add_test(tc, what_does_not_fit);
	suite_add_tcase(s, tc);
	runner = srunner_create(s);
	srunner_run_all(runner, CK_NORMAL);
	failures = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failures != 0;
}
