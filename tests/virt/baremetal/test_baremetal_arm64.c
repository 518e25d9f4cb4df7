/* SPDX-License-Identifier: MIT */
/*
 * The arm64 reference walker (tests/model) against a CPU that somebody else
 * wrote: QEMU's TCG boots the bare-metal guest beside this file, which tries
 * each case of arm64_cases.h; each report must be what the reference says.
 * Once for a CPU that has all of it (max), once for one that has some
 * (cortex-a76: PAN, HPDS, HAFDBS, no 52-bit addresses) and once for one that
 * has little (cortex-a57: none of these).
 *
 * Not compared, because TCG does something else than the manual's pseudocode:
 *  - a fetch from a page that is writable but clean (DBM and HD): the manual
 *    takes it as writable, so it is not executable with WXN, and not at EL1 if
 *    EL0 can write it; TCG looks at DBM for writes only (target/arm/ptw.c), so
 *    it goes through. Any other difference in such a case counts.
 *
 * usage: test_baremetal_arm64 QEMU IMAGE; exits 77 (skipped) if either is missing.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "arm64_cases.h"
#include "arm64_reference.h"
#include "qemu.h"

#define OUTPUT_MAX (ARM64_CASES * 100ul + 4096)
#define EC_SVC 0x15u
#define PAR_ADDRESS 0x000ffffffffff000ul

struct report {
	unsigned number, good;
	unsigned long esr, far, leaf, par;
};

/* -- what the reference says ---------------------------------------------- */

static uint64_t *entry_at(struct arm64_case *c, uint64_t gpa)
{
	for (int level = c->start; level <= c->leaf; level++)
		if (gpa == (uint64_t)(uintptr_t)arm64_entry(c, ARM64_TABLE(level), level))
			return &c->desc[level + 1];
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

static struct arm64_ref_cpu cpu_of(const struct arm64_case *c, const struct arm64_id *id)
{
	return (struct arm64_ref_cpu){
		.sctlr = 1 | (c->wxn ? A64(19) : 0) | (c->epan ? A64(57) : 0),
		.tcr = arm64_tcr(c),
		.ttbr0 = c->upper ? 0 : c->ttbr,
		.ttbr1 = c->upper ? c->ttbr : 0,
		.pstate = (c->pan ? A64(22) : 0) | (c->el ? 4 : 0),
		.pa_bits = id->pa_bits,
		.haf = id->haf, .hd = id->hd, .pan = id->pan, .epan = id->epan, .hpds = id->hpds, .lva = id->lva,
		.lpa = id->lpa, .lpa2 = id->lpa2, .ttst = id->ttst, .gran16 = id->gran16, .gran64 = id->gran64,
	};
}

static bool clean_fetch(const struct arm64_case *c)
{
	uint64_t d = c->desc[c->leaf + 1];

	return c->access == A64_FETCH && c->hd && c->ha && (d & A64(51)) && (d & A64(7));
}

/* What the guest should say; `open`: TCG may let a fetch through that the manual forbids. */
static struct report expect(unsigned number, const struct arm64_id *id, bool *open)
{
	static const enum arm64_ref_access kinds[] = { ARM64_REF_READ, ARM64_REF_WRITE, ARM64_REF_FETCH,
						       ARM64_REF_READ };
	struct arm64_case c = arm64_case_make(number, id);
	struct arm64_ref_cpu cpu = cpu_of(&c, id);
	struct ref_memory m = { read_entry, write_entry, &c };
	struct report e = { .number = number, .good = 1, .esr = EC_SVC << 26, .far = c.va };
	struct arm64_ref_result r;

	r = arm64_ref_translate(&cpu, &m, c.va, kinds[c.access]);
	e.leaf = c.desc[c.leaf + 1];
	*open = clean_fetch(&c) && r.outcome == ARM64_REF_ABORT && (r.iss & 0x3c) == 0x0c;
	if (r.outcome == ARM64_REF_NO_MEMORY)
		e.esr = 0; /* no case is made so: never equal */
	else if (c.access == A64_AT)
		e.par = r.outcome == ARM64_REF_OK ? r.gpa & PAR_ADDRESS : 1 | (r.iss & 0x3f) << 1;
	else if (r.outcome == ARM64_REF_ABORT)
		e.esr = (uint64_t)r.ec << 26 | r.iss;
	else if ((r.gpa & (A64(64 - c.txsz < 42 ? 64 - c.txsz : 42) - 1) & ~UINT64_C(0xff)) !=
		 (c.va & ARM64_PAGE & (A64(64 - c.txsz) - 1)))
		e.esr = 0;
	return e;
}

/* -- the comparison ------------------------------------------------------- */

struct tally {
	unsigned cases, granted, translated, open, wrong;
	unsigned codes[64]; /* how often each fault status code was seen */
};

/* FAR_EL1 holds the address where there was a fault; the bits of ESR_EL1 are those that the reference has. */
static bool same(const struct report *got, const struct report *want)
{
	bool abort = want->esr >> 26 != EC_SVC;
	unsigned long par = got->par & 1 ? got->par & 0x7f : got->par & PAR_ADDRESS;

	return got->number == want->number && got->good == want->good && got->leaf == want->leaf &&
	       (got->esr & ~(1ul << 25)) == want->esr && par == want->par && (!abort || got->far == want->far);
}

static void compare(struct tally *t, const struct report *got, const struct report *want, bool open)
{
	t->cases++;
	if (want->par && !(want->par & 1))
		t->translated++;
	else if (want->esr >> 26 == EC_SVC)
		t->granted++;
	else
		t->codes[want->esr & 63]++;
	if (same(got, want))
		return;
	if (open && got->esr >> 26 == EC_SVC && got->good && got->leaf == (want->leaf | A64(10))) {
		t->open++;
		return;
	}
	if (t->wrong++ < 20)
		fprintf(stderr, "case %x: cpu esr %lx far %lx leaf %lx good %x par %lx, reference %lx %lx %lx par %lx\n",
			want->number, got->esr, got->far, got->leaf, got->good, got->par, want->esr, want->far,
			want->leaf, want->par);
}

static bool read_report(const char *line, struct report *r)
{
	return sscanf(line, "%x %lx %lx %lx %x %lx", &r->number, &r->esr, &r->far, &r->leaf, &r->good, &r->par) == 6;
}

static int check_output(const char *model, char *out)
{
	struct tally t = { 0 };
	struct arm64_id id;
	unsigned long mmfr[3];
	unsigned kinds = 0;
	char *save, *line = strtok_r(out, "\n", &save);

	if (!line || sscanf(line, "cpu %lx %lx %lx", &mmfr[0], &mmfr[1], &mmfr[2]) != 3) {
		fprintf(stderr, "%s: the guest said: %s\n", model, line ? line : "nothing");
		return EXIT_FAILURE;
	}
	id = arm64_identify(mmfr[0], mmfr[1], mmfr[2]);
	while ((line = strtok_r(NULL, "\n", &save)) && strcmp(line, "end") != 0) {
		bool open;
		struct report got, want = expect(t.cases, &id, &open);

		if (!read_report(line, &got)) {
			fprintf(stderr, "%s: the guest said: %s\n", model, line);
			return EXIT_FAILURE;
		}
		compare(&t, &got, &want, open);
	}
	for (unsigned i = 0; i < 64; i++)
		kinds += t.codes[i] > 0;
	printf("%s: %u cases, %u went through, %u addresses by AT, %u kinds of fault, %u differ, %u of them where TCG "
	       "is known to (%u address bits%s%s%s%s%s)\n",
	       model, t.cases, t.granted, t.translated, kinds, t.wrong + t.open, t.open, id.pa_bits,
	       id.hd ? ", HAFDBS" : "", id.pan ? ", PAN" : "", id.epan ? ", EPAN" : "", id.lpa2 ? ", LPA2" : "",
	       id.ttst ? ", TTST" : "");
	/* a sample in which nearly all cases are alike would show nothing */
	if (t.cases != ARM64_CASES || t.wrong || t.granted < ARM64_CASES / 5 || t.translated < ARM64_CASES / 40 ||
	    kinds < 12)
		return EXIT_FAILURE;
	return EXIT_SUCCESS;
}

static int run_on(char *qemu, char *image, char *model)
{
	char *argv[] = { qemu, "-accel", "tcg", "-machine", "virt", "-cpu", model, "-m", "64", "-nodefaults",
			 "-no-reboot", "-display", "none", "-semihosting-config", "enable=on,target=native",
			 "-kernel", image, NULL };
	char *out = qemu_run(argv, 0, OUTPUT_MAX);
	int r = out ? check_output(model, out) : EXIT_FAILURE;

	free(out);
	return r;
}

int main(int argc, char **argv)
{
	if (argc != 3 || !argv[1][0] || !argv[2][0]) {
		puts("skipped: no qemu-system-aarch64, or no compiler for arm64 (apt-get install qemu-system-arm "
		     "gcc-aarch64-linux-gnu, then configure a new build)");
		return SKIPPED;
	}
	if (access(argv[2], R_OK)) {
		printf("skipped: no image %s\n", argv[2]);
		return SKIPPED;
	}
	if (run_on(argv[1], argv[2], "max") || run_on(argv[1], argv[2], "cortex-a76") ||
	    run_on(argv[1], argv[2], "cortex-a57"))
		return EXIT_FAILURE;
	return EXIT_SUCCESS;
}
