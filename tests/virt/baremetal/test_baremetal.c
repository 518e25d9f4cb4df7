/* SPDX-License-Identifier: MIT */
/*
 * The reference walker (tests/model) against a CPU that somebody else wrote:
 * QEMU's TCG boots the bare-metal guests beside this file, which try each case
 * of cases.h (4-level paging) and of cases32.h (32-bit and PAE) and report;
 * each report must be what the reference says.
 *
 * Two things are not compared, because TCG differs from the manual or the
 * manual leaves them open:
 *  - accessed flags of an access that faulted: TCG has set them in the upper
 *    levels already;
 *  - P in the error code of a reserved-bit fault: vol. 3A 4.7 has RSVD only
 *    together with P; TCG reports RSVD alone (target/i386, do_fault_rsvd).
 *
 * usage: test_baremetal QEMU IMAGE IMAGE32; exits 77 (skipped) if one is missing.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cases.h"
#include "cases32.h"
#include "qemu.h"
#include "x86_reference.h"

#define OUTPUT_MAX (CASES * 64ul + 4096)
#define ERROR_P 1u
#define ERROR_RSVD 8u
#define TABLE(level) (UINT64_C(0x10000) + 0x1000 * (level))

/* -- QEMU ----------------------------------------------------------------- */

/* The guest leaves by isa-debug-exit with code 0, which QEMU makes 1. */
static char *run_guest(char *qemu, char *image)
{
	char *argv[] = { qemu, "-accel", "tcg", "-cpu", "max", "-machine", "pc", "-m", "64", "-nodefaults",
			 "-no-reboot", "-display", "none", "-debugcon", "stdio", "-device",
			 "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel", image, NULL };

	return qemu_run(argv, 1, OUTPUT_MAX);
}

/* -- what the reference says ---------------------------------------------- */

static uint64_t *entry_at(uint64_t entries[4], uint64_t gpa)
{
	for (unsigned level = 0; level < 4; level++)
		if (gpa == TABLE(level) + 8 * ((CASE_ADDR >> (12 + 9 * level)) & 511))
			return &entries[level];
	return NULL;
}

static bool read_entry(void *arg, uint64_t gpa, uint64_t *value)
{
	const uint64_t *e = entry_at(arg, gpa);

	if (e)
		*value = *e;
	return e;
}

static bool write_entry(void *arg, uint64_t gpa, uint64_t value)
{
	uint64_t *e = entry_at(arg, gpa);

	if (e)
		*e = value;
	return e;
}

static void fill_entries(const struct pf_case *c, uint64_t entries[4])
{
	for (unsigned level = 0; level < 4; level++) {
		uint64_t to = level ? TABLE(level - 1) : CASE_PAGE;

		if (level == c->leaf)
			to = CASE_PAGE & ~((UINT64_C(1) << (12 + 9 * level)) - 1);
		entries[level] = level < c->leaf ? 0 : to | c->bits[level];
	}
}

static struct ref_cpu cpu_of(const struct pf_case *c, unsigned phys_bits, unsigned cpu)
{
	return (struct ref_cpu){
		.cr0 = 0x80000011 | (c->wp ? 1u << 16 : 0),
		.cr3 = TABLE(3),
		.cr4 = 1u << 5 | (c->smep ? 1u << 20 : 0) | (c->smap ? 1u << 21 : 0) |
		       (c->pke ? 1u << 22 : 0),
		.efer = 0x500 | (c->nxe ? 1u << 11 : 0),
		.rflags = 2 | (c->ac ? 1u << 18 : 0),
		.cpl = c->user ? 3 : 0,
		.pkru = c->pkru,
		.phys_bits = phys_bits,
		.page1gb = cpu & CPU_PAGE1GB,
	};
}

struct report {
	unsigned number, vector, error, flags, good;
	unsigned long cr2;
};

static struct report expect(unsigned number, unsigned phys_bits, unsigned cpu)
{
	static const enum ref_access kinds[] = { REF_READ, REF_WRITE, REF_FETCH };
	struct pf_case c = case_make(number, phys_bits, cpu);
	struct ref_cpu rc = cpu_of(&c, phys_bits, cpu);
	uint64_t entries[4], addr = CASE_ADDR + (c.access == CASE_FETCH ? 0 : CASE_DATA);
	struct ref_memory m = { read_entry, write_entry, entries };
	struct ref_result r;
	struct report e = { .number = number, .vector = 0x80, .good = 1 };

	fill_entries(&c, entries);
	r = ref_translate(&rc, &m, addr, kinds[c.access]);
	if (r.outcome == REF_PAGE_FAULT) {
		e.vector = 14;
		e.error = r.error;
		e.cr2 = addr;
	} else if (r.outcome != REF_OK || r.gpa != (addr & 0x3fffffff)) {
		e.vector = 0; /* no case is made so: never equal */
	}
	for (unsigned level = 0; level < 4; level++)
		e.flags |= (entries[level] >> 5 & 3) << (2 * level);
	return e;
}

/* The tables of a case of 32-bit or PAE paging: PTEs, PDEs, PDPTEs. */
static bool read_word(void *arg, uint64_t gpa, uint64_t *value)
{
	uint64_t (*tables)[512] = arg;

	if (gpa < TABLE(0) || gpa >= TABLE(3))
		return false;
	*value = tables[(gpa - TABLE(0)) >> 12][(gpa & 0xfff) / 8];
	return true;
}

static bool write_word(void *arg, uint64_t gpa, uint64_t value)
{
	uint64_t (*tables)[512] = arg;

	tables[(gpa - TABLE(0)) >> 12][(gpa & 0xfff) / 8] = value;
	return true;
}

/* The word an entry is in, and how far up. */
static uint64_t *entry32_at(const struct pf_case32 *c, uint64_t tables[3][512], unsigned level, unsigned *shift)
{
	unsigned i = CASE32_ADDR >> case32_shift(c, level);

	*shift = c->pae ? 0 : 32 * (i & 1);
	return &tables[level][c->pae ? i & 511 : (i & 1023) / 2];
}

static void fill_tables32(const struct pf_case32 *c, uint64_t tables[3][512])
{
	unsigned shift;

	memset(tables, 0, 3 * sizeof(tables[0]));
	for (unsigned level = c->leaf; level < 2; level++)
		*entry32_at(c, tables, level, &shift) |=
			((level == c->leaf ? CASE_PAGE : TABLE(0)) | c->bits[level]) << shift;
	tables[2][CASE32_ADDR >> 30] = TABLE(1) | !c->no_pdpte;
}

static struct ref_cpu cpu32_of(const struct pf_case32 *c, unsigned phys_bits)
{
	return (struct ref_cpu){
		.cr0 = 0x80000011 | (c->wp ? 1u << 16 : 0),
		.cr3 = c->pae ? TABLE(2) : TABLE(1),
		.cr4 = (c->pse ? 1u << 4 : 0) | (c->pae ? 1u << 5 : 0) | (c->smep ? 1u << 20 : 0) |
		       (c->smap ? 1u << 21 : 0),
		.efer = c->nxe ? 0x800 : 0,
		.rflags = 2 | (c->ac ? 1u << 18 : 0),
		.cpl = c->user ? 3 : 0,
		.phys_bits = phys_bits,
	};
}

static struct report expect32(unsigned number, unsigned phys_bits, unsigned cpu)
{
	static const enum ref_access kinds[] = { REF_READ, REF_WRITE, REF_FETCH };
	static uint64_t tables[3][512];
	struct pf_case32 c = case32_make(number, phys_bits);
	struct ref_cpu rc = cpu32_of(&c, phys_bits);
	uint64_t addr = CASE32_ADDR + (c.access == CASE_FETCH ? 0 : CASE_DATA);
	struct ref_memory m = { read_word, write_word, tables };
	struct ref_result r;
	struct report e = { .number = number, .vector = 0x80, .good = 1 };
	unsigned shift;

	fill_tables32(&c, tables);
	if (c.pae && !ref_load_pdptes(&rc, &m))
		return (struct report){ 0 };
	r = ref_translate(&rc, &m, addr, kinds[c.access]);
	if (r.outcome == REF_PAGE_FAULT) {
		e.vector = 14;
		e.error = r.error;
		e.cr2 = addr;
	} else if (r.outcome != REF_OK || r.gpa != (addr & 0x3fffffff)) {
		e.vector = 0; /* no case is made so: never equal */
	}
	for (unsigned level = 0; level < 2; level++)
		e.flags |= (*entry32_at(&c, tables, level, &shift) >> shift >> 5 & 3) << (2 * level);
	return e;
}

/* -- the comparison ------------------------------------------------------- */

struct tally {
	unsigned cases, granted, wrong;
	unsigned errors[64]; /* how often each error code was seen */
};

static bool same_error(unsigned got, unsigned want)
{
	return got == want || ((want & ERROR_RSVD) && (got | ERROR_P) == want);
}

static void compare(struct tally *t, const struct report *got, const struct report *want)
{
	bool same = got->number == want->number && got->vector == want->vector &&
		    same_error(got->error, want->error) && got->cr2 == want->cr2 && got->good == want->good &&
		    (want->vector != 0x80 || got->flags == want->flags);

	t->cases++;
	t->granted += want->vector == 0x80;
	if (want->vector == 14)
		t->errors[want->error & 63]++;
	if (!same && t->wrong++ < 20)
		fprintf(stderr, "case %x: cpu %x %x %x %lx flags %x good %x, reference %x %x %lx flags %x\n",
			want->number, got->number, got->vector, got->error, got->cr2, got->flags, got->good,
			want->vector, want->error, want->cr2, want->flags);
}

static bool read_report(char *line, struct report *r)
{
	return sscanf(line, "%x %x %x %lx %x %x", &r->number, &r->vector, &r->error, &r->cr2, &r->flags,
		      &r->good) == 6;
}

struct guest {
	const char *name;
	char *image;
	struct report (*expect)(unsigned number, unsigned phys_bits, unsigned cpu);
	unsigned least_kinds; /* of error codes that a fair sample has */
};

static int check_output(const struct guest *g, char *out)
{
	struct tally t = { 0 };
	unsigned phys_bits, cpu, kinds = 0;
	char *save, *line = strtok_r(out, "\n", &save);

	if (!line || sscanf(line, "cpu %x %x", &phys_bits, &cpu) != 2) {
		fprintf(stderr, "the guest said: %s\n", line ? line : "nothing");
		return line && strncmp(line, "no smep", 7) == 0 ? SKIPPED : EXIT_FAILURE;
	}
	while ((line = strtok_r(NULL, "\n", &save)) && strcmp(line, "end") != 0) {
		struct report got, want = g->expect(t.cases, phys_bits, cpu);

		if (!read_report(line, &got)) {
			fprintf(stderr, "the guest said: %s\n", line);
			return EXIT_FAILURE;
		}
		compare(&t, &got, &want);
	}
	for (unsigned i = 0; i < 64; i++)
		kinds += t.errors[i] > 0;
	printf("%s: %u cases, %u went through, %u kinds of error code, %u differ (phys bits %u, features %x)\n",
	       g->name, t.cases, t.granted, kinds, t.wrong, phys_bits, cpu);
	/* a sample in which nearly all cases are alike would show nothing */
	if (t.cases != CASES || t.wrong || t.granted < CASES / 10 || kinds < g->least_kinds)
		return EXIT_FAILURE;
	return EXIT_SUCCESS;
}

static int run(char *qemu, const struct guest *g)
{
	char *out;
	int r;

	if (access(g->image, R_OK)) {
		printf("skipped: no image %s\n", g->image);
		return SKIPPED;
	}
	out = run_guest(qemu, g->image);
	r = out ? check_output(g, out) : EXIT_FAILURE;
	free(out);
	return r;
}

int main(int argc, char **argv)
{
	if (argc != 4 || !argv[1][0] || !argv[2][0] || !argv[3][0]) {
		puts("skipped: no qemu-system-x86_64 (apt-get install qemu-system-x86, then configure a new build), or "
		     "a compiler that cannot make x86 images (gcc or clang for x86-64, -m64 and -m32)");
		return SKIPPED;
	}
	struct guest guests[] = {
		{ "4-level", argv[2], expect, 15 },
		{ "32-bit and PAE", argv[3], expect32, 15 },
	};
	for (unsigned i = 0; i < 2; i++) {
		int r = run(argv[1], &guests[i]);

		if (r != EXIT_SUCCESS)
			return r;
	}
	return EXIT_SUCCESS;
}
