/* SPDX-License-Identifier: MIT */
/*
 * The loaders of direct boot without KVM: images made here, good ones and
 * broken ones, into a flat fake of guest memory that counts what is written.
 *
 * The expected values come from Linux Documentation/arch/x86/boot.rst and
 * zero-page.rst and from the ACPI specification, read by offset and not through the
 * structs that the code under test uses.
 */
#include <check.h>
#include <elf.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "x86_boot.h"

#define MIB	 ((uint64_t)1 << 20)
#define GIB	 ((uint64_t)1 << 30)
#define PREF	 (16 * MIB)
#define SETUP	 (3 * 512) /* of an image with setup_sects 2 */
#define BODY	 (64 * 1024)
#define INIT	 (2 * MIB)
#define CMDLINE	 255
#define ELF_BASE (16 * MIB)

/* -- guest memory ------------------------------------------------------------------ */

/* Addresses below 16 GiB are backed by one sparse mapping. Writes outside the regions fail. */
#define SPAN (16 * GIB)

struct flat {
	struct vmm_ram ram;
	uint8_t *bytes;
	unsigned writes;
	uint64_t low, high; /* lowest and highest address written at or above 1 MiB */
};

static struct flat mem;

static int flat_write(struct vmm_ram *ram, uint64_t gpa, const void *buf, size_t len)
{
	struct flat *f = (struct flat *)ram;

	f->writes++;
	for (unsigned i = 0; i < ram->regions; i++) {
		const struct vmm_region *r = &ram->region[i];

		if (gpa >= r->gpa && gpa - r->gpa <= r->len && len <= r->len - (gpa - r->gpa)) {
			memcpy(f->bytes + gpa, buf, len);
			if (gpa >= MIB && gpa < f->low)
				f->low = gpa;
			if (gpa >= MIB && gpa + len > f->high)
				f->high = gpa + len;
			return 0;
		}
	}
	return -EFAULT;
}

static const struct vmm_ram_ops flat_ops = { .write = flat_write };

static void set_ram(uint64_t bytes)
{
	mem.ram.regions = vmm_pc_layout(bytes, mem.ram.region);
}

static void setup(void)
{
	memset(&mem, 0, sizeof(mem));
	mem.ram.ops = &flat_ops;
	mem.low = UINT64_MAX;
	mem.bytes = mmap(NULL, SPAN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	ck_assert_ptr_ne(mem.bytes, MAP_FAILED);
	set_ram(256 * MIB);
}

static void teardown(void)
{
	munmap(mem.bytes, SPAN);
}

static uint64_t get(const void *base, size_t at, unsigned bytes)
{
	uint64_t v = 0;

	memcpy(&v, (const uint8_t *)base + at, bytes);
	return v;
}

static void set(void *base, size_t at, unsigned bytes, uint64_t v)
{
	memcpy((uint8_t *)base + at, &v, bytes);
}

static void fill(uint8_t *p, size_t len, uint32_t seed)
{
	for (size_t i = 0; i < len; i++) {
		seed = seed * 1664525 + 1013904223;
		p[i] = (uint8_t)(seed >> 24);
	}
}

/* -- images ------------------------------------------------------------------------ */

/* Exactly as long as it says, on the heap: a sanitizer sees any read beyond it. */
static uint8_t *make_bzimage(size_t *len)
{
	uint8_t *p = calloc(1, SETUP + BODY);

	*len = SETUP + BODY;
	fill(p + SETUP, BODY, 1);
	set(p, 0x1f1, 1, SETUP / 512 - 1);
	set(p, 0x1f4, 4, BODY / 16);
	set(p, 0x1fe, 2, 0xaa55);
	set(p, 0x200, 2, 0x6aeb); /* jump to 0x26c */
	set(p, 0x202, 4, 0x53726448);
	set(p, 0x206, 2, 0x20f);
	set(p, 0x211, 1, 1);
	set(p, 0x22c, 4, 0x7fffffff);
	set(p, 0x230, 4, 0x200000);
	set(p, 0x234, 1, 1);
	set(p, 0x236, 2, 1);
	set(p, 0x238, 4, CMDLINE);
	set(p, 0x258, 8, PREF);
	set(p, 0x260, 4, INIT);
	return p;
}

/* Two segments (the second with BSS) and a note. */
#define ELF_TEXT 0x2000u
#define ELF_DATA 0x1000u
#define ELF_BSS	 0x5000u

static uint8_t *make_elf(size_t *len)
{
	size_t head = sizeof(Elf64_Ehdr) + 3 * sizeof(Elf64_Phdr);
	uint8_t *p = calloc(1, *len = head + ELF_TEXT + ELF_DATA);
	Elf64_Ehdr *e = (Elf64_Ehdr *)p;
	Elf64_Phdr *ph = (Elf64_Phdr *)(e + 1);

	memcpy(e->e_ident, ELFMAG, SELFMAG);
	e->e_ident[EI_CLASS] = ELFCLASS64;
	e->e_ident[EI_DATA] = ELFDATA2LSB;
	e->e_type = ET_EXEC;
	e->e_machine = EM_X86_64;
	e->e_entry = ELF_BASE + 0x10;
	e->e_phoff = sizeof(*e);
	e->e_phentsize = sizeof(*ph);
	e->e_phnum = 3;
	ph[0] = (Elf64_Phdr){ .p_type = PT_LOAD, .p_offset = head, .p_paddr = ELF_BASE, .p_filesz = ELF_TEXT,
			      .p_vaddr = 0xffffffff81000000, .p_memsz = ELF_TEXT };
	ph[1] = (Elf64_Phdr){ .p_type = PT_NOTE, .p_offset = 1u << 30, .p_filesz = 8, .p_memsz = 8 };
	ph[2] = (Elf64_Phdr){ .p_type = PT_LOAD, .p_offset = head + ELF_TEXT, .p_paddr = ELF_BASE + ELF_TEXT,
			      .p_filesz = ELF_DATA, .p_memsz = ELF_DATA + ELF_BSS };
	fill(p + head, ELF_TEXT + ELF_DATA, 2);
	return p;
}

static int load(const void *image, size_t len, struct boot_entry *entry, const char **why)
{
	struct boot_config config = { .kernel = { image, len }, .cmdline = "console=ttyS0", .cpus = 2 };

	return boot_load(&mem.ram, &config, entry, why);
}

/* Refused with `want`, with a reason, and nothing was touched. */
static void refused(const void *image, size_t len, int want, const char *what)
{
	struct boot_entry entry, before;
	const char *why = NULL;
	int err;

	memset(&entry, 0x5a, sizeof(entry));
	before = entry;
	mem.writes = 0;
	err = load(image, len, &entry, &why);
	ck_assert_msg(err == want, "%s: %d, not %d (%s)", what, err, want, why);
	ck_assert_msg(why && *why, "%s: no reason", what);
	ck_assert_msg(!mem.writes, "%s: memory was written", what);
	ck_assert_msg(!memcmp(&entry, &before, sizeof(entry)), "%s: the result was written", what);
}

/* -- bzImage ----------------------------------------------------------------------- */

START_TEST(bzimage_loads)
{
	struct boot_entry entry;
	const char *why;
	size_t len;
	uint8_t *p = make_bzimage(&len), *zp = mem.bytes + BOOT_PARAMS;

	ck_assert_int_eq(load(p, len, &entry, &why), 0);
	ck_assert_uint_eq(entry.rip, PREF + 0x200);
	ck_assert_uint_eq(entry.rsi, BOOT_PARAMS);
	ck_assert_uint_eq(entry.kernel_len, INIT);
	ck_assert_uint_eq(entry.initrd, 0);
	ck_assert(!memcmp(mem.bytes + PREF, p + SETUP, BODY));
	ck_assert_uint_eq(mem.low, PREF);
	ck_assert_uint_eq(mem.high, PREF + BODY);
	/* the setup header is the image's, but for what the loader fills in */
	ck_assert_uint_eq(get(zp, 0x1ef, 1), 0);
	ck_assert(!memcmp(zp + 0x1f1, p + 0x1f1, 0x210 - 0x1f1));
	ck_assert_uint_eq(get(zp, 0x210, 1), 0xff);
	ck_assert_uint_eq(get(zp, 0x218, 4), 0);
	ck_assert_uint_eq(get(zp, 0x21c, 4), 0);
	ck_assert_uint_eq(get(zp, 0x228, 4), BOOT_CMDLINE);
	ck_assert(!memcmp(zp + 0x22c, p + 0x22c, 0x264 - 0x22c));
	ck_assert_uint_eq(get(zp, 0x70, 8), BOOT_ACPI);
	ck_assert_str_eq((char *)mem.bytes + BOOT_CMDLINE, "console=ttyS0");
	ck_assert(!memcmp(mem.bytes + BOOT_ACPI, "RSD PTR ", 8));
	free(p);
}
END_TEST

/* The first four GiB map to themselves, writable and supervisor; and the segments of boot.rst are there. */
START_TEST(paging_and_segments)
{
	struct boot_entry entry;
	const char *why;
	size_t len;
	uint8_t *p = make_bzimage(&len);

	ck_assert_int_eq(load(p, len, &entry, &why), 0);
	for (uint64_t gva = 0; gva < 4 * GIB; gva += 2 * MIB) {
		uint64_t e = get(mem.bytes, entry.cr3 + 8 * (gva >> 39 & 511), 8);

		ck_assert_uint_eq(e & 0x87, 3);
		e = get(mem.bytes, (e & ~4095ull) + 8 * (gva >> 30 & 511), 8);
		ck_assert_uint_eq(e & 0x87, 3);
		e = get(mem.bytes, (e & ~4095ull) + 8 * (gva >> 21 & 511), 8);
		ck_assert_uint_eq(e & 0x87, 0x83);
		ck_assert_uint_eq(e & ~(2 * MIB - 1), gva);
	}
	/* type and S, P and DPL, L and D: 64-bit code (execute, read) and writable data */
	ck_assert_uint_eq(get(mem.bytes, entry.gdt, 8), 0);
	ck_assert_uint_eq(get(mem.bytes, entry.gdt + 0x10 + 5, 1) & 0xfa, 0x9a);
	ck_assert_uint_eq(get(mem.bytes, entry.gdt + 0x10 + 6, 1) >> 4, 0xa);
	ck_assert_uint_eq(get(mem.bytes, entry.gdt + 0x18 + 5, 1) & 0xfa, 0x92);
	free(p);
}
END_TEST

static const struct {
	const char *what;
	size_t at;
	unsigned bytes;
	uint64_t value;
	int want;
} broken_bzimage[] = {
	{ "boot flag", 0x1fe, 2, 0xaa54, -ENOEXEC },
	{ "magic", 0x202, 4, 0x53726449, -ENOEXEC },
	{ "protocol 2.11", 0x206, 2, 0x20b, -EOPNOTSUPP },
	{ "zImage", 0x211, 1, 0, -EOPNOTSUPP },
	{ "no 64-bit entry", 0x236, 2, 0x7e, -EOPNOTSUPP },
	{ "header cut short", 0x201, 1, 0x10, -ENOEXEC },
	{ "more setup than file", 0x1f1, 1, 255, -ENOEXEC },
	{ "syssize beyond the file", 0x1f4, 4, BODY / 16 + 2, -ENOEXEC },
	{ "preferred address 0", 0x258, 8, 0, -ENOEXEC },
	{ "preferred address in low memory", 0x258, 8, 0x8000, -ENOEXEC },
	{ "preferred address beyond 3 GiB", 0x258, 8, 3 * GIB, -ENOEXEC },
	{ "preferred address that wraps", 0x258, 8, UINT64_MAX - 4095, -ENOEXEC },
	{ "preferred address beyond RAM", 0x258, 8, 255 * MIB, -ENOSPC },
	{ "init_size beyond RAM", 0x260, 4, 0xffffffff, -ENOSPC },
};

START_TEST(bzimage_broken)
{
	size_t len;
	uint8_t *p = make_bzimage(&len);

	set(p, broken_bzimage[_i].at, broken_bzimage[_i].bytes, broken_bzimage[_i].value);
	refused(p, len, broken_bzimage[_i].want, broken_bzimage[_i].what);
	free(p);
}
END_TEST

/* Cut anywhere: refused, as the header says how long it is. */
START_TEST(bzimage_truncated)
{
	size_t len;
	uint8_t *p = make_bzimage(&len);

	for (size_t n = 0; n + 16 < len; n += n < 0x300 || n > len - 64 ? 1 : 97) {
		uint8_t *copy = malloc(n ? n : 1);

		memcpy(copy, p, n);
		refused(copy, n, -ENOEXEC, "truncated");
		free(copy);
	}
	free(p);
}
END_TEST

/* setup_sects 0 means 4. */
START_TEST(bzimage_old_sectors)
{
	uint8_t *p = calloc(1, 5 * 512 + BODY);
	struct boot_entry entry;
	const char *why;
	size_t len;
	uint8_t *small = make_bzimage(&len);

	memcpy(p, small, SETUP);
	fill(p + 5 * 512, BODY, 3);
	set(p, 0x1f1, 1, 0);
	ck_assert_int_eq(load(p, 5 * 512 + BODY, &entry, &why), 0);
	ck_assert(!memcmp(mem.bytes + PREF, p + 5 * 512, BODY));
	free(small);
	free(p);
}
END_TEST

/* Any bytes in the header: an error, or a kernel that lies in RAM with what belongs to it. */
START_TEST(bzimage_random)
{
	static const uint8_t interesting[] = { 0, 1, 2, 0x0f, 0x10, 0x7f, 0x80, 0xff };
	unsigned loaded = 0;
	size_t len;

	srandom(1);
	for (unsigned round = 0; round < 5000; round++) {
		uint8_t *p = make_bzimage(&len), initrd[4097] = { 0 };
		struct boot_config config = { .kernel = { p, len }, .initrd = { initrd, sizeof(initrd) }, .cpus = 1 };
		struct boot_entry entry;
		const char *why = NULL;
		int err;

		for (unsigned n = 1 + (unsigned)random() % 3; n--;)
			p[0x1f1 + random() % 0x80] = interesting[random() % sizeof(interesting)];
		mem.writes = 0;
		err = boot_load(&mem.ram, &config, &entry, &why);
		if (err) {
			ck_assert_msg(err < 0 && *why && !mem.writes, "round %u: %d", round, err);
		} else {
			loaded++;
			ck_assert_uint_ge(entry.kernel, MIB);
			ck_assert_uint_le(entry.kernel + entry.kernel_len, entry.initrd);
			ck_assert_uint_le(entry.initrd + sizeof(initrd), 256 * MIB);
			ck_assert_uint_lt(entry.rip, entry.kernel + entry.kernel_len);
		}
		free(p);
	}
	ck_assert_uint_gt(loaded, 0);
	ck_assert_uint_lt(loaded, 5000);
}
END_TEST

/* -- command line, initramfs, memory map --------------------------------------------- */

START_TEST(cmdline_limit)
{
	char line[CMDLINE + 2];
	size_t len;
	uint8_t *p = make_bzimage(&len);
	struct boot_config config = { .kernel = { p, len }, .cmdline = line, .cpus = 1 };
	struct boot_entry entry;
	const char *why;

	memset(line, 'x', sizeof(line));
	line[CMDLINE + 1] = 0;
	ck_assert_int_eq(boot_load(&mem.ram, &config, &entry, &why), -E2BIG);
	ck_assert_uint_eq(mem.writes, 0);
	line[CMDLINE] = 0;
	mem.bytes[BOOT_CMDLINE + CMDLINE] = 1;
	ck_assert_int_eq(boot_load(&mem.ram, &config, &entry, &why), 0);
	ck_assert_str_eq((char *)mem.bytes + BOOT_CMDLINE, line);
	config.cmdline = NULL;
	ck_assert_int_eq(boot_load(&mem.ram, &config, &entry, &why), 0);
	ck_assert_str_eq((char *)mem.bytes + BOOT_CMDLINE, "");
	free(p);
}
END_TEST

/* A kernel that takes any length does not make the line run into what lies behind it. */
START_TEST(cmdline_of_boundless_kernel)
{
	char *line = malloc(BOOT_CMDLINE_MAX + 1);
	size_t len;
	uint8_t *p = make_bzimage(&len);
	struct boot_config config = { .kernel = { p, len }, .cmdline = line, .cpus = 1 };
	struct boot_entry entry;
	const char *why;

	set(p, 0x238, 4, 0xffffffff);
	memset(line, 'x', BOOT_CMDLINE_MAX);
	line[BOOT_CMDLINE_MAX] = 0;
	ck_assert_int_eq(boot_load(&mem.ram, &config, &entry, &why), -E2BIG);
	line[BOOT_CMDLINE_MAX - 1] = 0;
	ck_assert_int_eq(boot_load(&mem.ram, &config, &entry, &why), 0);
	free(line);
	free(p);
}
END_TEST

static int load_initrd(uint8_t *image, size_t image_len, const void *initrd, size_t len, struct boot_entry *entry)
{
	struct boot_config config = { .kernel = { image, image_len }, .initrd = { initrd, len }, .cpus = 1 };
	const char *why;

	return boot_load(&mem.ram, &config, entry, &why);
}

START_TEST(initrd_place)
{
	uint8_t initrd[10000], *zp = mem.bytes + BOOT_PARAMS;
	struct boot_entry entry;
	size_t len;
	uint8_t *p = make_bzimage(&len);

	fill(initrd, sizeof(initrd), 4);
	ck_assert_int_eq(load_initrd(p, len, initrd, sizeof(initrd), &entry), 0);
	ck_assert_uint_eq(entry.initrd, 256 * MIB - 3 * 4096);
	ck_assert_uint_eq(get(zp, 0x218, 4), entry.initrd);
	ck_assert_uint_eq(get(zp, 0x21c, 4), sizeof(initrd));
	ck_assert(!memcmp(mem.bytes + entry.initrd, initrd, sizeof(initrd)));

	set(p, 0x22c, 4, 0x0203ffff); /* the last byte that the kernel reaches */
	ck_assert_int_eq(load_initrd(p, len, initrd, sizeof(initrd), &entry), 0);
	ck_assert_uint_eq(entry.initrd, 0x02040000 - 3 * 4096);
	ck_assert_int_eq(load_initrd(p, len, initrd, 8192, &entry), 0);
	ck_assert_uint_eq(entry.initrd, 0x02040000 - 8192);

	/* RAM beyond 3 GiB is not for it */
	set(p, 0x22c, 4, 0xffffffff);
	set_ram(5 * GIB);
	ck_assert_int_eq(load_initrd(p, len, initrd, sizeof(initrd), &entry), 0);
	ck_assert_uint_eq(entry.initrd, 3 * GIB - 3 * 4096);
	free(p);
}
END_TEST

/* As much as lies between the kernel's end and the end of RAM, and not a page more. */
START_TEST(initrd_limit)
{
	size_t room = 32 * MIB - PREF - INIT, len;
	uint8_t *p = make_bzimage(&len), *initrd = calloc(1, room + 1);
	struct boot_entry entry;

	set_ram(32 * MIB);
	ck_assert_int_eq(load_initrd(p, len, initrd, room + 1, &entry), -ENOSPC);
	ck_assert_uint_eq(mem.writes, 0);
	ck_assert_int_eq(load_initrd(p, len, initrd, room, &entry), 0);
	ck_assert_uint_eq(entry.initrd, PREF + INIT);
	ck_assert_int_eq(load_initrd(p, len, initrd, (size_t)5 << 30, &entry), -ENOSPC);
	set(p, 0x22c, 4, 0xfff); /* a kernel that reaches nothing */
	ck_assert_int_eq(load_initrd(p, len, initrd, 1, &entry), -ENOSPC);
	free(initrd);
	free(p);
}
END_TEST

struct e820 {
	uint64_t gpa, len;
	uint32_t type;
} __attribute__((packed));

static void e820_is(const struct e820 *want, unsigned n)
{
	ck_assert_uint_eq(get(mem.bytes + BOOT_PARAMS, 0x1e8, 1), n);
	ck_assert(!memcmp(mem.bytes + BOOT_PARAMS + 0x2d0, want, n * sizeof(*want)));
}

START_TEST(memory_map)
{
	static const struct e820 small[] = { { 0, 0x9fc00, 1 }, { 0x9fc00, 0x60400, 2 }, { MIB, 63 * MIB, 1 } };
	static const struct e820 exact[] = { { 0, 0x9fc00, 1 }, { 0x9fc00, 0x60400, 2 }, { MIB, 3 * GIB - MIB, 1 } };
	static const struct e820 large[] = { { 0, 0x9fc00, 1 },
					     { 0x9fc00, 0x60400, 2 },
					     { MIB, 3 * GIB - MIB, 1 },
					     { 4 * GIB, 2 * GIB + 4096, 1 } };
	struct boot_entry entry;
	const char *why;
	size_t len;
	uint8_t *p = make_bzimage(&len);

	set_ram(64 * MIB);
	ck_assert_int_eq(load(p, len, &entry, &why), 0);
	e820_is(small, 3);
	set_ram(3 * GIB);
	ck_assert_int_eq(load(p, len, &entry, &why), 0);
	e820_is(exact, 3);
	set_ram(5 * GIB + 4096);
	ck_assert_int_eq(load(p, len, &entry, &why), 0);
	e820_is(large, 4);
	free(p);
}
END_TEST

START_TEST(config_refused)
{
	size_t len;
	uint8_t *p = make_bzimage(&len);
	struct boot_config config = { .kernel = { p, len } };
	struct boot_entry entry;
	const char *why;

	ck_assert_int_eq(boot_load(&mem.ram, &config, &entry, &why), -EINVAL);
	config.cpus = 256;
	ck_assert_int_eq(boot_load(&mem.ram, &config, &entry, &why), -EINVAL);
	set_ram(15 * MIB);
	refused(p, len, -EINVAL, "15 MiB");
	set_ram(64 * MIB + 512);
	refused(p, len, -EINVAL, "half a page");
	set_ram(64 * MIB);
	mem.ram.region[0].gpa = 4096;
	refused(p, len, -EINVAL, "no RAM at 0");
	set_ram(4 * GIB);
	mem.ram.region[1].gpa = 3 * GIB;
	refused(p, len, -EINVAL, "RAM in the hole");
	mem.ram.regions = 0;
	refused(p, len, -EINVAL, "no RAM");
	set_ram(16 * MIB);
	refused(p, len, -ENOSPC, "RAM that ends where the kernel begins");
	set_ram(64 * MIB);
	refused("MZ", 2, -ENOEXEC, "another file");
	free(p);
}
END_TEST

/* Errors of the memory are handed on, whichever write it is. */
static unsigned fail_at;

static int failing_write(struct vmm_ram *ram, uint64_t gpa, const void *buf, size_t len)
{
	return mem.writes++ == fail_at ? -ENOMEM : 0;
}

START_TEST(write_fails)
{
	static const struct vmm_ram_ops failing = { .write = failing_write };
	struct boot_entry entry;
	const char *why;
	size_t len;
	uint8_t *p = make_bzimage(&len);
	unsigned all;

	ck_assert_int_eq(load(p, len, &entry, &why), 0);
	all = mem.writes;
	ck_assert_uint_ge(all, 6); /* kernel, ACPI, parameters, tables, GDT, command line */
	mem.ram.ops = &failing;
	for (fail_at = 0; fail_at < all; fail_at++) {
		mem.writes = 0;
		ck_assert_int_eq(load(p, len, &entry, &why), -ENOMEM);
		ck_assert(*why);
		ck_assert_uint_eq(mem.writes, fail_at + 1);
	}
	free(p);
}
END_TEST

/* -- ELF ----------------------------------------------------------------------------- */

START_TEST(elf_loads)
{
	struct boot_entry entry;
	const char *why;
	size_t len, head = sizeof(Elf64_Ehdr) + 3 * sizeof(Elf64_Phdr);
	uint8_t *p = make_elf(&len), *zp = mem.bytes + BOOT_PARAMS;

	ck_assert_int_eq(load(p, len, &entry, &why), 0);
	ck_assert_uint_eq(entry.rip, ELF_BASE + 0x10);
	ck_assert_uint_eq(entry.kernel, ELF_BASE);
	ck_assert_uint_eq(entry.kernel_len, ELF_TEXT + ELF_DATA + ELF_BSS);
	ck_assert(!memcmp(mem.bytes + ELF_BASE, p + head, ELF_TEXT + ELF_DATA));
	ck_assert_uint_eq(mem.high, ELF_BASE + ELF_TEXT + ELF_DATA);
	ck_assert_uint_eq(get(zp, 0x1fe, 2), 0xaa55);
	ck_assert_uint_eq(get(zp, 0x202, 4), 0x53726448);
	ck_assert_uint_ge(get(zp, 0x206, 2), 0x20c);
	ck_assert_uint_eq(get(zp, 0x210, 1), 0xff);
	ck_assert_uint_eq(get(zp, 0x228, 4), BOOT_CMDLINE);
	free(p);
}
END_TEST

#define EH(field)    offsetof(Elf64_Ehdr, field), sizeof(((Elf64_Ehdr *)0)->field)
#define PH(n, field) sizeof(Elf64_Ehdr) + (n) * sizeof(Elf64_Phdr) + offsetof(Elf64_Phdr, field), \
	sizeof(((Elf64_Phdr *)0)->field)

static const struct {
	const char *what;
	size_t at, bytes;
	uint64_t value;
	int want;
} broken_elf[] = {
	{ "32 bits", EI_CLASS, 1, ELFCLASS32, -EOPNOTSUPP },
	{ "big endian", EI_DATA, 1, ELFDATA2MSB, -EOPNOTSUPP },
	{ "arm64", EH(e_machine), EM_AARCH64, -EOPNOTSUPP },
	{ "relocatable", EH(e_type), ET_REL, -EOPNOTSUPP },
	{ "shared", EH(e_type), ET_DYN, -EOPNOTSUPP },
	{ "size of program headers", EH(e_phentsize), 32, -ENOEXEC },
	{ "no program headers", EH(e_phnum), 0, -ENOEXEC },
	{ "65535 program headers", EH(e_phnum), 65535, -ENOEXEC },
	{ "program headers beyond the file", EH(e_phoff), ~0ull, -ENOEXEC },
	{ "program headers at the file's end", EH(e_phoff), sizeof(Elf64_Ehdr) + 3 * sizeof(Elf64_Phdr) + ELF_TEXT +
							    ELF_DATA - 100, -ENOEXEC },
	{ "segment's offset", PH(0, p_offset), ~0ull - 100, -ENOEXEC },
	{ "segment's size", PH(2, p_filesz), ELF_DATA + 1, -ENOEXEC },
	{ "file larger than memory", PH(0, p_memsz), 16, -ENOEXEC },
	{ "segment in low memory", PH(0, p_paddr), 0x8000, -ENOEXEC },
	{ "segment beyond 3 GiB", PH(0, p_paddr), 3 * GIB - 0x1000, -ENOEXEC },
	{ "segment that wraps", PH(2, p_paddr), ~0ull - 0x1000, -ENOEXEC },
	{ "BSS that wraps", PH(2, p_memsz), ~0ull - 0x1000, -ENOEXEC },
	{ "segment beyond RAM", PH(2, p_paddr), 256 * MIB - 0x1000, -ENOSPC },
	{ "BSS beyond RAM", PH(2, p_memsz), GIB, -ENOSPC },
	{ "overlap", PH(2, p_paddr), ELF_BASE + ELF_TEXT - 1, -ENOEXEC },
	{ "no segments", PH(0, p_type), PT_NULL, -ENOEXEC }, /* the entry is in no segment */
	{ "virtual entry", EH(e_entry), 0xffffffff81000010, -ENOEXEC },
	{ "entry in the BSS", EH(e_entry), ELF_BASE + ELF_TEXT + ELF_DATA, -ENOEXEC },
};

START_TEST(elf_broken)
{
	size_t len;
	uint8_t *p = make_elf(&len);

	set(p, broken_elf[_i].at, (unsigned)broken_elf[_i].bytes, broken_elf[_i].value);
	refused(p, len, broken_elf[_i].want, broken_elf[_i].what);
	free(p);
}
END_TEST

START_TEST(elf_truncated)
{
	size_t len;
	uint8_t *p = make_elf(&len);

	for (size_t n = 0; n < len; n += n < 300 ? 1 : 61) {
		uint8_t *copy = malloc(n ? n : 1);

		memcpy(copy, p, n);
		refused(copy, n, -ENOEXEC, "truncated");
		free(copy);
	}
	free(p);
}
END_TEST

/* -- ACPI ------------------------------------------------------------------------------ */

static uint8_t sum(const uint8_t *p, size_t len)
{
	uint8_t s = 0;

	while (len--)
		s = (uint8_t)(s + *p++);
	return s;
}

/* The table at a guest physical address, whole and with the right sum. */
static const uint8_t *table(const uint8_t *buf, int total, uint64_t gpa, const char *signature)
{
	const uint8_t *t = buf + (gpa - BOOT_ACPI);

	ck_assert(gpa >= BOOT_ACPI && gpa + 36 <= BOOT_ACPI + (uint64_t)total);
	ck_assert_uint_le(gpa - BOOT_ACPI + get(t, 4, 4), (uint64_t)total);
	ck_assert(!memcmp(t, signature, 4));
	ck_assert_uint_eq(sum(t, get(t, 4, 4)), 0);
	return t;
}

static void check_madt(const uint8_t *madt, unsigned cpus)
{
	unsigned cpu = 0, ioapics = 0;
	size_t at = 44, len = get(madt, 4, 4);

	ck_assert_uint_eq(get(madt, 36, 4), BOOT_LAPIC_ADDR);
	ck_assert_uint_eq(get(madt, 40, 4), 1);
	for (; at < len; at += madt[at + 1]) {
		ck_assert_uint_ge(madt[at + 1], 2);
		if (madt[at] == 0) {
			ck_assert_uint_eq(madt[at + 1], 8);
			ck_assert_uint_eq(madt[at + 3], cpu++);
			ck_assert_uint_eq(get(madt, at + 4, 4), 1);
		} else if (madt[at] == 1) {
			ioapics++;
			ck_assert_uint_eq(madt[at + 1], 12);
			ck_assert_uint_eq(get(madt, at + 4, 4), BOOT_IOAPIC_ADDR);
			ck_assert_uint_eq(get(madt, at + 8, 4), 0);
		}
	}
	ck_assert_uint_eq(at, len);
	ck_assert_uint_eq(cpu, cpus);
	ck_assert_uint_eq(ioapics, 1);
}

START_TEST(acpi_tables)
{
	static const unsigned counts[] = { 1, 2, 64, 255 };
	const uint8_t *xsdt, *fadt, *dsdt;
	uint8_t buf[8192];
	int len = acpi_build(counts[_i], buf, sizeof(buf));
	uint64_t facs;

	ck_assert_int_gt(len, 0);
	ck_assert_int_le(len, 0x20000); /* up to 1 MiB */
	ck_assert(!memcmp(buf, "RSD PTR ", 8));
	ck_assert_uint_eq(sum(buf, 20), 0);
	ck_assert_uint_eq(sum(buf, 36), 0);
	ck_assert_uint_eq(buf[15], 2);
	ck_assert_uint_eq(get(buf, 20, 4), 36);
	xsdt = table(buf, len, get(buf, 24, 8), "XSDT");
	ck_assert_uint_eq(get(xsdt, 4, 4), 36 + 2 * 8);
	fadt = table(buf, len, get(xsdt, 36, 8), "FACP");
	ck_assert_uint_eq(get(fadt, 4, 4), 276);
	check_madt(table(buf, len, get(xsdt, 44, 8), "APIC"), counts[_i]);
	ck_assert_uint_eq(get(fadt, 40, 4), get(fadt, 140, 8)); /* DSDT, X_DSDT */
	dsdt = table(buf, len, get(fadt, 140, 8), "DSDT");
	ck_assert(!memcmp(dsdt + 36, "\x08_S5_", 5));
	facs = get(fadt, 36, 4);
	ck_assert_uint_eq(facs % 64, 0);
	ck_assert(!memcmp(buf + (facs - BOOT_ACPI), "FACS", 4));
	ck_assert_uint_eq(get(buf, facs - BOOT_ACPI + 4, 4), 64);
	ck_assert_uint_eq(get(fadt, 56, 4), BOOT_PM_PORT); /* PM1a_EVT_BLK */
	ck_assert_uint_eq(get(fadt, 64, 4), BOOT_PM_PORT + 4); /* PM1a_CNT_BLK */
	ck_assert_uint_eq(get(fadt, 152, 8), BOOT_PM_PORT); /* X_PM1a_EVT_BLK's address */
	ck_assert_uint_eq(get(fadt, 176, 8), BOOT_PM_PORT + 4);
	ck_assert_uint_eq(get(fadt, 112, 4) & 1u << 20, 0); /* not hardware reduced */
	ck_assert_uint_eq(get(fadt, 120, 8), BOOT_PM_PORT + 6); /* RESET_REG's address */
}
END_TEST

START_TEST(acpi_refused)
{
	uint8_t buf[2048];
	int len = acpi_build(4, buf, sizeof(buf));

	ck_assert_int_gt(len, 0);
	ck_assert_int_eq(acpi_build(0, buf, sizeof(buf)), -EINVAL);
	ck_assert_int_eq(acpi_build(256, buf, sizeof(buf)), -EINVAL);
	for (size_t n = 36; n < (size_t)len; n++) {
		uint8_t *exact = malloc(n);

		ck_assert_int_eq(acpi_build(4, exact, n), -ENOSPC);
		free(exact);
	}
	ck_assert_int_eq(acpi_build(4, buf, (size_t)len), len);
}
END_TEST

static uint32_t pm_read(struct acpi_pm *pm, unsigned offset, unsigned size)
{
	uint32_t v = 0;

	acpi_pm_io(pm, offset, false, &v, size);
	return v;
}

static void pm_write(struct acpi_pm *pm, unsigned offset, uint32_t v, unsigned size)
{
	acpi_pm_io(pm, offset, true, &v, size);
}

START_TEST(pm_registers)
{
	struct acpi_pm pm = { .status = 0x8421 };

	ck_assert_uint_eq(pm_read(&pm, 4, 2), 1); /* SCI_EN: always in ACPI mode */
	pm_write(&pm, 2, 0x0120, 2);
	ck_assert_uint_eq(pm_read(&pm, 0, 4), 0x01208421);
	pm_write(&pm, 0, 0x0401, 2); /* ones clear */
	ck_assert_uint_eq(pm_read(&pm, 0, 2), 0x8020);
	pm_write(&pm, 1, 0x80, 1);
	ck_assert_uint_eq(pm_read(&pm, 0, 4), 0x01200020);
	pm_write(&pm, 4, 0x2000 | 3 << 10, 2); /* S3 does not exist */
	ck_assert_uint_eq(pm_read(&pm, 4, 2), 3 << 10 | 1);
	pm_write(&pm, 4, 5 << 10, 2); /* the type alone */
	pm_write(&pm, 6, 2, 1);
	pm_write(&pm, 7, 0x1, 1);
	ck_assert(!pm.off && !pm.reset);
	ck_assert_uint_eq(pm_read(&pm, 7, 1), 0xff);
	ck_assert_uint_eq(pm_read(&pm, 6, 4), 0xffffff00);
	pm_write(&pm, 4, 0x2000 | 5 << 10, 2);
	ck_assert(pm.off && !pm.reset);
	pm = (struct acpi_pm){ 0 };
	pm_write(&pm, 5, 0x20 | 5 << 2, 1); /* the upper half alone */
	ck_assert(pm.off);
	pm_write(&pm, 6, 1, 1);
	ck_assert(pm.reset);
}
END_TEST

/* -- CPUID ------------------------------------------------------------------------------ */

struct cpuid {
	union {
		struct kvm_cpuid2 list;
		char room[sizeof(struct kvm_cpuid2) + 32 * sizeof(struct kvm_cpuid_entry2)];
	};
};

static void leaf(struct cpuid *c, uint32_t function, uint32_t index, uint32_t a, uint32_t b, uint32_t x, uint32_t d)
{
	c->list.entries[c->list.nent++] = (struct kvm_cpuid_entry2){ .function = function, .index = index,
								     .eax = a, .ebx = b, .ecx = x, .edx = d };
}

static const struct kvm_cpuid_entry2 *find(const struct cpuid *c, uint32_t function, uint32_t index)
{
	for (unsigned i = 0; i < c->list.nent; i++)
		if (c->list.entries[i].function == function && c->list.entries[i].index == index)
			return &c->list.entries[i];
	return NULL;
}

START_TEST(cpuid_intel)
{
	struct cpuid c = { 0 };

	leaf(&c, 0, 0, 0x1f, 0x756e6547, 0, 0);
	leaf(&c, 1, 0, 0, 0x07402a55, 0, 0);
	leaf(&c, 4, 0, 0xfc00c121, 0, 0, 0);
	leaf(&c, 4, 2, 0xfc01c143, 0, 0, 0);
	leaf(&c, 4, 3, 0xfc1fc163, 0, 0, 0);
	leaf(&c, 4, 4, 0, 0, 0, 0);
	leaf(&c, 0xb, 0, 7, 7, 7, 7);
	leaf(&c, 0x1f, 0, 7, 7, 7, 7);
	leaf(&c, 0x80000001, 0, 0, 0, 0x121, 0);
	boot_cpuid(&c.list, 2, 3, true);
	ck_assert_uint_eq(find(&c, 1, 0)->ebx, 0x02032a55);
	ck_assert_uint_eq(find(&c, 1, 0)->ecx, 0x81000000);
	ck_assert_uint_eq(find(&c, 1, 0)->edx, 1u << 28);
	ck_assert_uint_eq(find(&c, 4, 0)->eax, 3u << 26 | 0x121); /* a core's own */
	ck_assert_uint_eq(find(&c, 4, 2)->eax, 3u << 26 | 0x143);
	ck_assert_uint_eq(find(&c, 4, 3)->eax, 3u << 26 | 3 << 14 | 0x163); /* the package's */
	ck_assert_uint_eq(find(&c, 4, 4)->eax, 0);
	ck_assert_ptr_null(find(&c, 0x1f, 0));
	ck_assert_uint_eq(find(&c, 0xb, 0)->eax, 0);
	ck_assert_uint_eq(find(&c, 0xb, 0)->ebx, 1);
	ck_assert_uint_eq(find(&c, 0xb, 0)->ecx, 0x100);
	ck_assert_uint_eq(find(&c, 0xb, 1)->eax, 2);
	ck_assert_uint_eq(find(&c, 0xb, 1)->ebx, 3);
	ck_assert_uint_eq(find(&c, 0xb, 1)->ecx, 0x201);
	ck_assert_uint_eq(find(&c, 0xb, 1)->edx, 2);
	ck_assert_uint_eq(find(&c, 0xb, 2)->ecx, 2);
	ck_assert_uint_eq(find(&c, 0x80000001, 0)->ecx, 0x121);
}
END_TEST

START_TEST(cpuid_amd)
{
	struct cpuid c = { 0 };

	leaf(&c, 0, 0, 1, 0x68747541, 0, 0);
	leaf(&c, 1, 0, 0, 0, 0, 1u << 28);
	leaf(&c, 0x80000001, 0, 0, 0, 0x120, 0);
	leaf(&c, 0x80000008, 0, 0x3030, 0, 0xf0ff, 0);
	leaf(&c, 0x8000001e, 0, 9, 0x109, 0x103, 0);
	boot_cpuid(&c.list, 0, 1, false);
	ck_assert_uint_eq(find(&c, 1, 0)->ecx, 1u << 31);
	ck_assert_uint_eq(find(&c, 1, 0)->edx, 0);
	ck_assert_uint_eq(find(&c, 0x80000001, 0)->ecx, 0x120);
	ck_assert_uint_eq(find(&c, 0x80000008, 0)->ecx, 0);
	ck_assert_ptr_null(find(&c, 0xb, 0)); /* it was not there */
	boot_cpuid(&c.list, 5, 6, false);
	ck_assert_uint_eq(find(&c, 0x80000001, 0)->ecx, 0x122);
	ck_assert_uint_eq(find(&c, 0x80000008, 0)->ecx, 0x3005);
	ck_assert_uint_eq(find(&c, 0x8000001e, 0)->eax, 5);
	ck_assert_uint_eq(find(&c, 0x8000001e, 0)->ebx, 5);
	ck_assert_uint_eq(c.list.nent, 5);
}
END_TEST

/* -- files ------------------------------------------------------------------------------ */

START_TEST(files)
{
	char path[] = "/tmp/kage-boot-XXXXXX";
	int fd = mkstemp(path);
	struct boot_blob b = { 0 };

	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(boot_map_file(path, &b), -ENODATA);
	ck_assert_int_eq(write(fd, "kernel", 6), 6);
	ck_assert_int_eq(boot_map_file(path, &b), 0);
	ck_assert_uint_eq(b.len, 6);
	ck_assert(!memcmp(b.data, "kernel", 6));
	boot_unmap_file(&b);
	ck_assert_ptr_null(b.data);
	boot_unmap_file(&b);
	unlink(path);
	close(fd);
	ck_assert_int_eq(boot_map_file(path, &b), -ENOENT);
	ck_assert_int_eq(boot_map_file("/tmp", &b), -EINVAL);
}
END_TEST

static TCase *add_case(Suite *s, const char *name)
{
	TCase *t = tcase_create(name);

	tcase_add_checked_fixture(t, setup, teardown);
	tcase_set_timeout(t, 120);
	suite_add_tcase(s, t);
	return t;
}

int main(void)
{
	Suite *s = suite_create("boot");
	TCase *t = add_case(s, "bzimage");
	SRunner *runner;
	int failed;

	tcase_add_test(t, bzimage_loads);
	tcase_add_test(t, paging_and_segments);
	tcase_add_loop_test(t, bzimage_broken, 0, sizeof(broken_bzimage) / sizeof(broken_bzimage[0]));
	tcase_add_test(t, bzimage_truncated);
	tcase_add_test(t, bzimage_old_sectors);
	tcase_add_test(t, bzimage_random);
	t = add_case(s, "layout");
	tcase_add_test(t, cmdline_limit);
	tcase_add_test(t, cmdline_of_boundless_kernel);
	tcase_add_test(t, initrd_place);
	tcase_add_test(t, initrd_limit);
	tcase_add_test(t, memory_map);
	tcase_add_test(t, config_refused);
	tcase_add_test(t, write_fails);
	tcase_add_test(t, files);
	t = add_case(s, "elf");
	tcase_add_test(t, elf_loads);
	tcase_add_loop_test(t, elf_broken, 0, sizeof(broken_elf) / sizeof(broken_elf[0]));
	tcase_add_test(t, elf_truncated);
	t = add_case(s, "firmware");
	tcase_add_loop_test(t, acpi_tables, 0, 4);
	tcase_add_test(t, acpi_refused);
	tcase_add_test(t, pm_registers);
	tcase_add_test(t, cpuid_intel);
	tcase_add_test(t, cpuid_amd);
	runner = srunner_create(s);
	srunner_run_all(runner, CK_NORMAL);
	failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed ? 1 : 0;
}
