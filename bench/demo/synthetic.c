/* SPDX-License-Identifier: MIT */
/*
 * Three generated guests for machines without QEMU or a kernel package:
 * kage-demo-synthetic OUTDIR MIB writes OUTDIR/guestN.ram and guestN.regs.
 *
 * Each has x86-64 page tables of its own (guest 3: five levels) that map a
 * "kernel" at a randomised address of the kernel's range: 2 MiB pages, and one
 * 2 MiB in 4 KiB pages with holes. Its banner lies in a large page, in guest 2
 * across two small pages. The rest of its RAM is a mix of pages that all
 * guests have, that it alone has, that repeat, that are zero, and holes.
 * Accessed and dirty bits are set in every entry, as a kernel's mappings have
 * them, so that reading through them changes nothing.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PAGE 4096u
#define LARGE (2u << 20)
#define KERNEL_GPA (16u << 20) /* 4 large pages; the second is mapped in small pages */
#define KERNEL_LARGE 4
#define TABLES_GPA (1u << 20)
#define KERNEL_GVA 0xffffffff80000000u

#define ENTRY_TABLE 0x063u  /* P RW A D */
#define ENTRY_LARGE 0x0e1u  /* P A D PS: the kernel is read-only */
#define ENTRY_SMALL 0x061u
#define CR4_LA57 0x1000u

static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
	x = (x ^ x >> 27) * 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

static void fill(uint64_t *page, uint64_t seed)
{
	for (unsigned i = 0; i < PAGE / 8; i++)
		page[i] = mix(seed * PAGE + i + 1);
}

static int put(int fd, uint64_t gpa, const void *data, size_t len)
{
	ssize_t n = pwrite(fd, data, len, (off_t)gpa);

	return n == (ssize_t)len ? 0 : n < 0 ? -errno : -ENOSPC;
}

/* What is in page `p` of guest `g` above the kernel. Sixteenths of the memory. */
static int put_data(int fd, unsigned g, uint64_t p)
{
	uint64_t page[PAGE / 8] = { 0 };
	unsigned kind = (unsigned)(mix(p / 16) % 16); /* runs of 16 pages */

	if (kind < 4)
		return 0; /* a hole */
	if (kind < 9)
		fill(page, p); /* common to all guests */
	else if (kind < 12)
		fill(page, p + ((uint64_t)g << 32)); /* its own */
	else if (kind < 14)
		fill(page, 1 + p % 64 + ((uint64_t)1 << 40)); /* repeats, in each guest */
	return put(fd, p * PAGE, page, PAGE); /* kinds 14, 15: zeroes */
}

static int put_entry(int fd, uint64_t table, uint64_t index, uint64_t entry)
{
	return put(fd, table + 8 * index, &entry, 8);
}

/* Tables from the root down: one path of 1 or 2 upper tables, a PD, a PT. */
static int put_tables(int fd, unsigned g, uint64_t gva, uint64_t *cr3)
{
	uint64_t at = TABLES_GPA + g * 16 * PAGE; /* not at the same place in each guest */
	uint64_t pt, zero[PAGE / 8] = { 0 };
	int err = 0;

	for (unsigned i = 0; !err && i < 5; i++)
		err = put(fd, at + i * PAGE, zero, PAGE);
	*cr3 = at;
	for (int level = g == 3 ? 4 : 3; !err && level > 1; level--, at += PAGE)
		err = put_entry(fd, at, gva >> (12 + 9 * level) & 511, (at + PAGE) | ENTRY_TABLE);
	pt = at + PAGE;
	for (uint64_t i = 0; !err && i < KERNEL_LARGE; i++)
		err = put_entry(fd, at, ((gva >> 21) + i) & 511,
				i == 1 ? pt | ENTRY_TABLE : (KERNEL_GPA + i * LARGE) | ENTRY_LARGE);
	for (uint64_t i = 0; !err && i < 512; i++)
		if (i % 7 != 5) /* holes */
			err = put_entry(fd, pt, i, (KERNEL_GPA + LARGE + i * PAGE) | ENTRY_SMALL);
	return err;
}

static int put_kernel(int fd, unsigned g)
{
	/* guest 2: 20 bytes before the end of a small page; its neighbour is no hole */
	uint64_t at = KERNEL_GPA + (g == 2 ? LARGE + 9 * PAGE - 20 : 2 * LARGE + 0x1c60);
	char banner[256];
	uint64_t page[PAGE / 8];
	int err = 0;
	int n = snprintf(banner, sizeof(banner),
			 "Linux version 0.0.%u-synthetic (kage-demo) (no compiler) #%u: not a real guest\n",
			 g, g);

	for (uint64_t p = 0; !err && p < (uint64_t)KERNEL_LARGE * LARGE / PAGE; p++) {
		fill(page, p + ((uint64_t)2 << 40)); /* the same kernel in every guest */
		err = put(fd, KERNEL_GPA + p * PAGE, page, PAGE);
	}
	return err ? err : put(fd, at, banner, (size_t)n + 1);
}

static int put_regs(const char *dir, unsigned g, uint64_t cr3)
{
	char path[4096];
	FILE *f;

	snprintf(path, sizeof(path), "%s/guest%u.regs", dir, g);
	f = fopen(path, "w");
	if (!f)
		return -errno;
	fprintf(f, "cr0 0x80050033\ncr3 0x%llx\ncr4 0x%x\nefer 0xd01\n", (unsigned long long)cr3,
		0xa0u | (g == 3 ? CR4_LA57 : 0));
	return fclose(f) ? -errno : 0;
}

static int make_guest(const char *dir, unsigned g, uint64_t bytes)
{
	/* the last of KERNEL_LARGE large pages is below the end of the range */
	uint64_t gva = KERNEL_GVA + (mix(g) % 400) * LARGE;
	char path[4096];
	uint64_t cr3 = 0;
	int fd, err;

	snprintf(path, sizeof(path), "%s/guest%u.ram", dir, g);
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0)
		return -errno;
	err = ftruncate(fd, (off_t)bytes) ? -errno : 0;
	if (!err)
		err = put_tables(fd, g, gva, &cr3);
	if (!err)
		err = put_kernel(fd, g);
	for (uint64_t p = (KERNEL_GPA + (uint64_t)KERNEL_LARGE * LARGE) / PAGE; !err && p < bytes / PAGE; p++)
		err = put_data(fd, g, p);
	close(fd);
	return err ? err : put_regs(dir, g, cr3);
}

int main(int argc, char **argv)
{
	uint64_t mib = argc == 3 ? strtoull(argv[2], NULL, 10) : 0;

	if (mib < 32 || mib > 3072) {
		fprintf(stderr, "usage: %s OUTDIR MIB (32 to 3072)\n", argv[0]);
		return 2;
	}
	for (unsigned g = 1; g <= 3; g++) {
		int err = make_guest(argv[1], g, mib << 20);

		if (err) {
			fprintf(stderr, "%s: guest %u: %s\n", argv[0], g, strerror(-err));
			return 1;
		}
	}
	return 0;
}
