/* SPDX-License-Identifier: MIT */
#include "format_guest.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define LLU(x) ((unsigned long long)(x))

/* -- the guest ------------------------------------------------------------ */

void fg_fail(const struct format_guest *g, const char *format, ...)
{
	va_list ap;

	fflush(stdout);
	fprintf(stderr, "%s\n  ", g->about);
	va_start(ap, format);
	vfprintf(stderr, format, ap);
	va_end(ap);
	if (g->config.arch == KAGE_ARCH_ARM64)
		fprintf(stderr, "\n  sctlr %llx tcr %llx ttbr0 %llx ttbr1 %llx pstate %llx, %u address bits, features %x\n",
			LLU(g->arm64.sctlr), LLU(g->arm64.tcr), LLU(g->arm64.ttbr0), LLU(g->arm64.ttbr1),
			LLU(g->arm64.pstate), g->arm64.pa_bits, g->config.features);
	else
		fprintf(stderr, "\n  cr0 %llx cr3 %llx cr4 %llx efer %llx rflags %llx cpl %u pkru %x, %u address bits, "
			"features %x\n",
			LLU(g->x86.cr0), LLU(g->x86.cr3), LLU(g->x86.cr4), LLU(g->x86.efer), LLU(g->x86.rflags),
			g->x86.cpl, g->x86.pkru, g->x86.phys_bits, g->config.features);
	for (unsigned i = 0; i < g->ntouched; i++)
		fprintf(stderr, "  table word %llx: %llx\n", LLU(g->touched[i]),
			LLU(*(uint64_t *)fg_memory(g, g->touched[i])));
	exit(EXIT_FAILURE);
}

void fg_require(const struct format_guest *g, bool holds, const char *what)
{
	if (!holds)
		fg_fail(g, "%s", what);
}

static uint64_t high_base(const struct format_guest *g)
{
	return (uint64_t)1 << g->config.high_bit;
}

void *fg_memory(const struct format_guest *g, uint64_t gpa)
{
	if (gpa < FG_LOW)
		return g->low + gpa;
	if (gpa >= high_base(g) && gpa - high_base(g) < FG_HIGH)
		return g->high + (gpa - high_base(g));
	return NULL;
}

void fg_create(struct format_guest *g, const struct fg_config *config)
{
	const struct kage_engine_config *ec = KAGE_CFG(kage_engine_config, .address_space = (uint64_t)1 << 36);
	struct kage_vcpu_config *vc = KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .arch = config->arch,
					       .phys_bits = config->phys_bits, .features = config->features);

	memset(g, 0, sizeof(*g));
	g->config = *config;
	g->low = calloc(1, FG_LOW);
	g->high = calloc(1, FG_HIGH);
	fg_require(g, g->low && g->high, "no memory");
	fg_require(g, !kage_engine_create(ec, &g->engine), "kage_engine_create");
	fg_require(g, !kage_vm_create(g->engine, NULL, &g->vm), "kage_vm_create");
	fg_require(g, !kage_vm_map(g->vm, KAGE_CFG(kage_region, .len = FG_LOW)), "kage_vm_map");
	fg_require(g, !kage_vm_map(g->vm, KAGE_CFG(kage_region, .gpa = high_base(g), .len = FG_HIGH)),
		   "kage_vm_map, high");
	fg_require(g, !kage_vcpu_create(g->vm, vc, &g->vcpu), "kage_vcpu_create");
}

void fg_destroy(struct format_guest *g)
{
	kage_vcpu_destroy(g->vcpu);
	fg_require(g, !kage_vm_destroy(g->vm), "kage_vm_destroy");
	fg_require(g, !kage_engine_destroy(g->engine), "kage_engine_destroy");
	free(g->low);
	free(g->high);
}

void fg_write(struct format_guest *g, uint64_t gpa, uint64_t value, unsigned bytes)
{
	memcpy(fg_memory(g, gpa), &value, bytes);
	if (kage_vm_write(g->vm, gpa, &value, bytes))
		fg_fail(g, "kage_vm_write of %u bytes at %llx", bytes, LLU(gpa));
}

int fg_set_regs(struct format_guest *g)
{
	const struct arm64_ref_cpu *a = &g->arm64;
	const struct ref_cpu *x = &g->x86;

	if (g->config.arch == KAGE_ARCH_ARM64) {
		struct kage_arm64_regs r = { .sctlr = a->sctlr, .tcr = a->tcr, .ttbr0 = a->ttbr0, .ttbr1 = a->ttbr1,
					     .pstate = a->pstate };

		return kage_vcpu_set_regs(g->vcpu, &r, sizeof(r));
	}
	struct kage_x86_regs r = { .cr0 = x->cr0, .cr3 = x->cr3, .cr4 = x->cr4, .efer = x->efer, .rflags = x->rflags,
				   .cpl = x->cpl, .pkru = x->pkru };

	return kage_vcpu_set_regs(g->vcpu, &r, sizeof(r));
}

void fg_flush(struct format_guest *g, uint32_t kind, uint64_t gva)
{
	if (kage_vcpu_flush(g->vcpu, KAGE_CFG(kage_flush, .kind = kind, .gva = gva)))
		fg_fail(g, "kage_vcpu_flush, kind %u gva %llx", kind, LLU(gva));
}

/* -- what the reference says ---------------------------------------------- */

static bool answers(const struct format_guest *g, uint64_t gpa, uint32_t access)
{
	return fg_memory(g, gpa) && (!g->prot || (g->prot(g, gpa) & access));
}

static bool waits(const struct format_guest *g, uint64_t gpa)
{
	return g->waits && fg_memory(g, gpa) && g->waits(g, gpa);
}

static bool reference_read(void *arg, uint64_t gpa, uint64_t *value)
{
	struct format_guest *g = arg;
	const void *p = fg_memory(g, gpa);

	g->met_wait = answers(g, gpa, KAGE_READ) && waits(g, gpa);
	if (!answers(g, gpa, KAGE_READ) || g->met_wait)
		return false;
	memcpy(value, p, sizeof(*value));
	if (g->ntouched < FG_TOUCHED)
		g->touched[g->ntouched++] = gpa;
	return true;
}

static bool reference_write(void *arg, uint64_t gpa, uint64_t value)
{
	struct format_guest *g = arg;

	if (!answers(g, gpa, KAGE_WRITE))
		return false;
	memcpy(fg_memory(g, gpa), &value, sizeof(value));
	g->count.flags_set++;
	return true;
}

struct answer {
	int outcome; /* as the library calls them */
	uint64_t gpa;
	uint32_t vector, error, level;
	bool level_open; /* the manual says nothing of a level */
	bool af_open;
	bool outside; /* a table in no memory */
};

static struct answer expect_x86(struct format_guest *g, const struct ref_memory *m, uint64_t gva, enum fg_access access)
{
	static const enum ref_access kinds[] = { REF_READ, REF_WRITE, REF_FETCH, REF_READ, REF_WRITE };
	struct answer a = { .outcome = KAGE_OK };
	struct ref_result r;

	g->x86.implicit = access == FG_IMPLICIT_READ || access == FG_IMPLICIT_WRITE;
	r = ref_translate(&g->x86, m, gva, kinds[access]);
	a.gpa = r.gpa;
	switch (r.outcome) {
	case REF_OK:
		a.level = r.size == 12 ? 0 : r.size == 30 ? 2 : 1;
		break;
	case REF_PAGE_FAULT:
		a.outcome = KAGE_GUEST_FAULT;
		a.vector = 14;
		a.error = r.error;
		a.level = r.level;
		/* of a missing or malformed entry the level is known; of rights that several levels deny together not */
		a.level_open = (r.error & 9) == 1;
		break;
	case REF_NOT_CANONICAL:
		a.outcome = KAGE_GUEST_FAULT;
		a.vector = 13;
		a.level_open = true;
		break;
	case REF_NO_MEMORY:
		a.outside = true;
		break;
	}
	return a;
}

static struct answer expect_arm64(struct format_guest *g, const struct ref_memory *m, uint64_t gva,
				  enum fg_access access)
{
	static const enum arm64_ref_access kinds[] = { ARM64_REF_READ, ARM64_REF_WRITE, ARM64_REF_FETCH };
	struct arm64_ref_result r = arm64_ref_translate(&g->arm64, m, gva, kinds[access]);
	struct answer a = { .outcome = KAGE_OK, .gpa = r.gpa, .level = 3 - r.level };

	if (r.outcome == ARM64_REF_ABORT) {
		a.outcome = KAGE_GUEST_FAULT;
		a.vector = r.ec;
		a.error = r.iss;
		a.af_open = r.af_open;
	}
	a.outside = r.outcome == ARM64_REF_NO_MEMORY;
	return a;
}

static struct answer expect(struct format_guest *g, uint64_t gva, enum fg_access access, bool quiet)
{
	struct ref_memory m = { reference_read, quiet ? NULL : reference_write, g };

	g->ntouched = 0;
	g->met_wait = false;
	return g->config.arch == KAGE_ARCH_ARM64 ? expect_arm64(g, &m, gva, access) : expect_x86(g, &m, gva, access);
}

/* -- the comparison ------------------------------------------------------- */

static const char *const access_name[] = { "read", "write", "fetch", "implicit read", "implicit write" };

static void fail_answer(const struct format_guest *g, const char *what, uint64_t gva, enum fg_access access,
			int outcome, const struct kage_fault *f, const struct answer *a)
{
	fg_fail(g, "%s, gva %llx %s: outcome %d gpa %llx vector %x error %x level %u at %llx, reference %d %llx %x %x %u%s",
		what, LLU(gva), access_name[access], outcome, LLU(f->gpa), f->vector, f->error, f->level, LLU(f->gva),
		a->outcome, LLU(a->gpa), a->vector, a->error, a->level, a->outside ? " (table in no memory)" : "");
}

static bool same_fault(const struct kage_fault *f, const struct answer *a, uint64_t gva)
{
	return f->vector == a->vector && f->error == a->error && f->gva == gva &&
	       (a->level_open || f->level == a->level);
}

static void count(struct format_guest *g, const struct answer *a)
{
	g->count.translations++;
	if (a->outside && g->met_wait)
		g->count.waits++;
	else if (a->outside)
		g->count.outside++;
	else if (a->outcome == KAGE_GUEST_FAULT)
		g->count.faults++, g->count.fault_kinds |= (uint64_t)1 << (a->error & 63);
	else if (fg_memory(g, a->gpa))
		g->count.granted++;
	else
		g->count.mmio++;
}

void fg_translate(struct format_guest *g, uint64_t gva, enum fg_access access)
{
	static const uint32_t kinds[] = { KAGE_READ, KAGE_WRITE, KAGE_EXEC, KAGE_READ | KAGE_IMPLICIT,
					  KAGE_WRITE | KAGE_IMPLICIT };
	struct answer a = expect(g, gva, access, true);
	struct kage_fault f = { 0 };
	int outcome = kage_vcpu_translate(g->vcpu, gva, kinds[access], &f);
	bool same;

	count(g, &a);
	if (a.outside && g->met_wait)
		same = outcome == KAGE_WAIT;
	else if (a.outside)
		same = outcome == KAGE_MMIO && f.gpa == a.gpa;
	else if (a.outcome == KAGE_GUEST_FAULT)
		same = outcome == a.outcome && same_fault(&f, &a, gva);
	else
		same = outcome == a.outcome && f.gpa == a.gpa && f.level == a.level;
	if (!same)
		fail_answer(g, "translate", gva, access, outcome, &f, &a);
	if (a.outcome != KAGE_OK || a.outside || g->count.translations % 8 != 0)
		return;
	/* what some access may do is there when none is asked for */
	outcome = kage_vcpu_translate(g->vcpu, gva, 0, &f);
	if (outcome != KAGE_OK || f.gpa != a.gpa)
		fail_answer(g, "translate for no access", gva, access, outcome, &f, &a);
}

static int access_of(struct format_guest *g, uint64_t gva, enum fg_access access, uint64_t *value, struct kage_fault *f)
{
	switch (access) {
	case FG_READ: return kage_vcpu_load(g->vcpu, gva, value, sizeof(*value), f);
	case FG_WRITE: return kage_vcpu_store(g->vcpu, gva, value, sizeof(*value), f);
	default: return kage_vcpu_fetch(g->vcpu, gva, value, sizeof(*value), f);
	}
}

/*
 * Each word that the walk read is what the reference left there. On arm64 nobody but software writes table
 * descriptors: it is enough to look at them now and then.
 */
static void compare_touched(struct format_guest *g, uint64_t gva, enum fg_access access, bool af_open)
{
	bool last = g->config.arch == KAGE_ARCH_ARM64 && g->ntouched && g->count.translations % 8 != 0;

	for (unsigned i = last ? g->ntouched - 1 : 0; i < g->ntouched; i++) {
		uint64_t there, want, *mine = fg_memory(g, g->touched[i]);

		fg_require(g, !kage_vm_read(g->vm, g->touched[i], &there, sizeof(there)), "kage_vm_read");
		want = *mine;
		if (af_open && i == g->ntouched - 1 && there == (want | 1u << 10))
			*mine = there;
		else if (there != want)
			fg_fail(g, "gva %llx %s: table word %llx is %llx, reference %llx", LLU(gva),
				access_name[access], LLU(g->touched[i]), LLU(there), LLU(want));
	}
}

bool fg_do(struct format_guest *g, uint64_t gva, enum fg_access access, uint64_t value, uint64_t *gpa)
{
	struct answer a = expect(g, gva, access, false);
	struct kage_fault f = { 0 };
	uint32_t kind = access == FG_READ ? KAGE_READ : access == FG_WRITE ? KAGE_WRITE : KAGE_EXEC;
	uint64_t wrote = value, *there;
	int outcome = access_of(g, gva, access, &value, &f);
	bool same, wait;

	count(g, &a);
	there = a.outcome == KAGE_OK && !a.outside && answers(g, a.gpa, kind) ? fg_memory(g, a.gpa) : NULL;
	wait = g->met_wait || (there && waits(g, a.gpa));
	there = wait ? NULL : there;
	if (a.outcome == KAGE_GUEST_FAULT)
		same = outcome == a.outcome && same_fault(&f, &a, gva);
	else if (wait)
		same = outcome == KAGE_WAIT;
	else if (!there)
		same = outcome == KAGE_MMIO && f.gpa == a.gpa;
	else
		same = outcome == KAGE_OK;
	if (!same)
		fail_answer(g, "access", gva, access, outcome, &f, &a);
	if (there && access == FG_WRITE)
		*there = wrote;
	else if (there && value != *there)
		fg_fail(g, "gva %llx %s: %llx, reference %llx from %llx", LLU(gva), access_name[access], LLU(value),
			LLU(*there), LLU(a.gpa));
	compare_touched(g, gva, access, a.af_open);
	if (there && access == FG_WRITE) {
		fg_require(g, !kage_vm_read(g->vm, a.gpa, &value, sizeof(value)), "kage_vm_read");
		if (value != wrote)
			fg_fail(g, "gva %llx write: %llx is not at %llx", LLU(gva), LLU(wrote), LLU(a.gpa));
	}
	*gpa = a.gpa;
	return there;
}

static void compare_range(struct format_guest *g, uint64_t gpa, uint64_t len)
{
	static uint64_t page[512];

	for (uint64_t end = gpa + len; gpa < end; gpa += sizeof(page)) {
		fg_require(g, !kage_vm_read(g->vm, gpa, page, sizeof(page)), "kage_vm_read");
		if (memcmp(page, fg_memory(g, gpa), sizeof(page)))
			fg_fail(g, "page %llx differs from the reference's", LLU(gpa));
	}
}

void fg_compare_all(struct format_guest *g)
{
	compare_range(g, 0, FG_LOW);
	compare_range(g, high_base(g), FG_HIGH);
}

static void report(void *opaque, const char *line)
{
	(void)opaque;
	fprintf(stderr, "audit: %s\n", line);
}

void fg_audit(struct format_guest *g)
{
	struct kage_audit a = { .size = sizeof(a), .report = report };

	if (kage_engine_audit(g->engine, &a) || a.violations)
		fg_fail(g, "the audit found %llu violations", LLU(a.violations));
}

/* -- programs ------------------------------------------------------------- */

int fg_run_cases(const char *program, const struct fg_case *cases, unsigned n)
{
	const char *only = getenv("KAGE_FORMAT");
	unsigned failed = 0, ran = 0;

	for (unsigned i = 0; i < n; i++) {
		int status = 1;
		pid_t pid;

		if (only && strcmp(only, cases[i].name) != 0)
			continue;
		ran++;
		fflush(stdout);
		pid = fork();
		if (pid == 0) {
			cases[i].run(&cases[i]);
			fflush(stdout);
			exit(EXIT_SUCCESS);
		}
		if (pid > 0)
			while (waitpid(pid, &status, 0) < 0)
				;
		if (status) {
			fprintf(stderr, "%s: %s FAILED (wait status %x); it alone: KAGE_FORMAT=%s\n", program,
				cases[i].name, status, cases[i].name);
			failed++;
		}
	}
	if (!ran)
		fprintf(stderr, "%s: no case %s\n", program, only);
	printf("%s: %u of %u cases passed\n", program, ran - failed, ran);
	return failed || !ran ? EXIT_FAILURE : EXIT_SUCCESS;
}
