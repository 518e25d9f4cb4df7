/* SPDX-License-Identifier: MIT */
/*
 * What caches may hold: guests that flush no more than the architecture demands,
 * or less, against a model of what a TLB and paging-structure caches can still
 * have (Intel SDM vol. 3A 4.10.2 to 4.10.4; Arm ARM D8.13, D8.14).
 *
 * The model keeps the history of each table entry. A translation may be made of
 * any values that the entries on the way have had since the last flush that is
 * for it: for this vCPU, address space and page. Entries that are not valid are
 * never cached, so a fault for want of one must be by the table as it is now. So
 *
 *      write new entry                        old or new until the page is flushed, then new
 *      write invalid, flush, write new        new at once (break before make)
 *      flush of another page, ASID, vCPU      nothing is promised
 *
 * A result outside of the set fails: something survived a flush that was for it, or
 * a walk used what was never there. Tables are written by the VMM and by the
 * guest's own stores, often enough for them to go out of sync in the shadow MMU;
 * two vCPUs switch between two address spaces. Levels above the last two stay.
 * Flushes are those that kage_vcpu_flush() has: one of the last level alone
 * (TLBI VALE1) is done by that of the page. Entries are not global.
 *
 * KAGE_SEED, KAGE_SEQUENCES, KAGE_STEPS, KAGE_FORMAT: see tests/README.md.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "format_guest.h"
#include "rng.h"

#define BIT(n) ((uint64_t)1 << (n))
#define CPUS 2
#define SPACES 2
#define DIRS 4   /* entries of the level above the last that change; each table of the last level has as many */
#define TABLES 5 /* of a space: 0 the directory, 1 to 4 of the last level */
#define VAS (DIRS * DIRS)
#define WINDOW_DIR 5
#define HISTORY 200
#define TABLE_GPA BIT(20)
#define STRIDE BIT(16)
#define PAGES BIT(22) /* 16 pages of 64 KiB */
#define MARK 0x120

struct format {
	const char *name;
	bool arm, pcid, pae;
	unsigned page_bits, entry_bytes, va_bits, levels;
};

struct entry {
	unsigned n;
	struct {
		uint64_t since, value;
	} was[HISTORY];
};

struct outcome {
	int result;
	uint64_t value; /* what was read; or the error code and level of a fault */
};

struct cpu {
	struct kage_vcpu *vcpu;
	unsigned space;
	bool user;
};

struct stale {
	const struct format *f;
	struct kage_engine *engine;
	struct kage_vm *vm;
	struct cpu cpu[CPUS];
	struct rng rng;
	uint64_t seed, step, now;
	struct entry entry[SPACES][TABLES][DIRS];
	uint64_t since[CPUS][SPACES][VAS];
	uint64_t root[SPACES], next_table;
	unsigned long accesses, open, old;
};

static const struct format formats[] = {
	{ "arm64-4k", true, false, false, 12, 8, 48, 4 },
	{ "arm64-16k", true, false, false, 14, 8, 47, 3 },
	{ "arm64-64k", true, false, false, 16, 8, 42, 2 },
	{ "x86-4level-pcid", false, true, false, 12, 8, 48, 4 },
	{ "x86-4level", false, false, false, 12, 8, 48, 4 },
	{ "x86-pae", false, false, true, 12, 8, 32, 3 },
	{ "x86-32bit", false, false, false, 12, 4, 32, 2 },
};

__attribute__((format(printf, 2, 3), noreturn)) static void fail(const struct stale *s, const char *format, ...)
{
	va_list ap;

	fflush(stdout);
	fprintf(stderr, "%s seed %llu step %llu: ", s->f->name, (unsigned long long)s->seed,
		(unsigned long long)s->step);
	va_start(ap, format);
	vfprintf(stderr, format, ap);
	va_end(ap);
	fprintf(stderr, "\n  again: KAGE_FORMAT=%s KAGE_SEED=%llu KAGE_SEQUENCES=1\n", s->f->name,
		(unsigned long long)s->seed);
	exit(EXIT_FAILURE);
}

#define REQUIRE(s, x)                                                    \
	do {                                                             \
		int r_ = (x);                                            \
		if (r_ != KAGE_OK)                                       \
			fail(s, "%s: %d", #x, r_);                       \
	} while (0)

static uint64_t below(struct stale *s, uint64_t n)
{
	return rng_below(&s->rng, n);
}

/* -- tables --------------------------------------------------------------- */

static unsigned shift_of(const struct format *f, unsigned level)
{
	return f->page_bits + level * (f->page_bits - (f->entry_bytes == 8 ? 3 : 2));
}

static uint64_t table_gpa(unsigned space, unsigned table)
{
	return TABLE_GPA + (space * TABLES + table) * STRIDE;
}

static uint64_t page_gpa(unsigned page)
{
	return PAGES + page * STRIDE;
}

static uint64_t table_entry(const struct format *f, uint64_t gpa)
{
	return gpa | (f->arm ? 3 : 0x27);
}

/* Of the last level. Accessed and dirty are set: nothing is written back. rights: bit 0 writable, 1 user, 2 executable. */
static uint64_t page_entry(const struct format *f, uint64_t gpa, unsigned rights)
{
	uint64_t e = gpa;

	if (f->arm)
		return e | 0xc03 | (rights & 1 ? 0 : 0x80) | (rights & 2 ? 0x40 : 0) | (rights & 4 ? 0 : BIT(53) | BIT(54));
	e |= 0x61 | (rights & 1 ? 2 : 0) | (rights & 2 ? 4 : 0);
	return f->entry_bytes == 4 || (rights & 4) ? e : e | BIT(63);
}

static uint64_t address_in(const struct format *f, uint64_t e)
{
	return e & (BIT(40) - 1) & ~(BIT(f->page_bits) - 1);
}

static void put(struct stale *s, uint64_t gpa, uint64_t e)
{
	REQUIRE(s, kage_vm_write(s->vm, gpa, &e, s->f->entry_bytes));
}

static uint64_t new_table(struct stale *s)
{
	s->next_table += STRIDE;
	return s->next_table - STRIDE;
}

/* A window through which the guest sees the tables of both spaces, and what leads to the directory. */
static void build_space(struct stale *s, unsigned space)
{
	uint64_t window = new_table(s), table = table_gpa(space, 0);
	const struct format *f = s->f;

	for (unsigned t = 0; t < SPACES * TABLES; t++)
		put(s, window + t * f->entry_bytes, page_entry(f, TABLE_GPA + t * STRIDE, 1));
	put(s, table + WINDOW_DIR * f->entry_bytes, table_entry(f, window));
	for (unsigned level = 2; level < f->levels; level++) {
		uint64_t up = new_table(s);

		put(s, up, f->pae ? table | 1 : table_entry(f, table));
		table = up;
	}
	s->root[space] = table;
}

/* -- vCPUs ---------------------------------------------------------------- */

static int arm64_regs(struct stale *s, struct cpu *c)
{
	const struct format *f = s->f;
	uint64_t tg = f->page_bits == 12 ? 0 : f->page_bits == 14 ? 2 : 1;
	struct kage_arm64_regs r = { .sctlr = 1, .pstate = c->user ? 0 : 4 };

	r.tcr = (64 - f->va_bits) | tg << 14 | BIT(23) | (uint64_t)2 << 30 | 16 << 16 | (uint64_t)5 << 32 | BIT(36);
	r.ttbr0 = s->root[c->space] | (c->space + 1ull) << 48;
	return kage_vcpu_set_regs(c->vcpu, &r, sizeof(r));
}

static int x86_regs(struct stale *s, struct cpu *c, bool noflush)
{
	const struct format *f = s->f;
	bool lm = f->va_bits > 32;
	struct kage_x86_regs r = { .cr0 = 0x80010011, .cpl = c->user ? 3 : 0 };

	r.cr4 = (f->entry_bytes == 8 ? BIT(5) : 0) | (f->pcid ? BIT(17) : 0);
	r.efer = (lm ? 0x500 : 0) | 0x800;
	r.cr3 = s->root[c->space] | (f->pcid ? c->space + 1 : 0) | (noflush ? BIT(63) : 0);
	return kage_vcpu_set_regs(c->vcpu, &r, sizeof(r));
}

static void set_regs(struct stale *s, struct cpu *c, bool noflush)
{
	REQUIRE(s, s->f->arm ? arm64_regs(s, c) : x86_regs(s, c, noflush));
}

/* What is cached for a vCPU (all: for every one), space and page (negative: all) is gone. */
static void forget(struct stale *s, const struct cpu *c, int space, int va)
{
	for (unsigned i = 0; i < CPUS; i++)
		for (unsigned sp = 0; sp < SPACES; sp++)
			for (unsigned v = 0; v < VAS; v++)
				if ((s->f->arm || c == &s->cpu[i]) && (space < 0 || sp == (unsigned)space) &&
				    (va < 0 || v == (unsigned)va))
					s->since[i][sp][v] = s->now;
}

static void switch_space(struct stale *s, struct cpu *c)
{
	bool noflush = s->f->pcid && below(s, 2);

	c->space ^= 1;
	set_regs(s, c, noflush);
	if (!s->f->arm && !noflush)
		forget(s, c, s->f->pcid ? (int)c->space : -1, -1);
}

/* -- the model ------------------------------------------------------------ */

static uint64_t va_of(const struct stale *s, unsigned va)
{
	return (uint64_t)(va / DIRS) << shift_of(s->f, 1) | (uint64_t)(va % DIRS) << shift_of(s->f, 0);
}

static uint32_t abort_code(const struct stale *s, const struct cpu *c, int kind, bool permission, unsigned level)
{
	bool nx = s->f->entry_bytes == 8;

	if (s->f->arm)
		return (permission ? 0x0c : 0x04) | (3 - level) | (kind == 1 ? 0x40 : 0);
	return (permission ? 1 : 0) | (kind == 1 ? 2 : 0) | (c->user ? 4 : 0) | (kind == 2 && nx ? 16 : 0);
}

static bool granted(const struct stale *s, const struct cpu *c, uint64_t e, int kind)
{
	bool write = s->f->arm ? !(e & 0x80) : e & 2, user = s->f->arm ? e & 0x40 : e & 4;
	bool exec = s->f->arm ? !(e & BIT(54)) : !(e & BIT(63));

	if (s->f->arm && kind == 2)
		return exec && (c->user || !(user && write));
	if (c->user && !user)
		return false;
	return kind == 0 || (kind == 1 ? write : exec);
}

static struct outcome outcome_of(const struct stale *s, const struct cpu *c, uint64_t e, unsigned offset, int kind)
{
	if (!granted(s, c, e, kind))
		return (struct outcome){ KAGE_GUEST_FAULT, abort_code(s, c, kind, true, 0) };
	return (struct outcome){ KAGE_OK, address_in(s->f, e) + offset };
}

static bool same(struct outcome a, struct outcome b)
{
	return a.result == b.result && a.value == b.value;
}

struct question {
	const struct cpu *c;
	unsigned va, offset;
	int kind;
	struct outcome got;
	unsigned ways; /* that differ from what the tables say now */
	bool legal;
	struct outcome now;
};

static void way(struct question *q, struct outcome o, bool current)
{
	q->legal |= same(o, q->got);
	if (current)
		q->now = o;
	else
		q->ways++;
}

/* Has the i-th value of an entry been there at `since` or later? */
static bool counts(const struct entry *e, unsigned i, uint64_t since)
{
	return i + 1 == e->n || e->was[i + 1].since > since;
}

static void ways_below(struct stale *s, struct question *q, uint64_t dir, bool current, uint64_t since)
{
	uint64_t table = (address_in(s->f, dir) - table_gpa(q->c->space, 0)) / STRIDE;
	const struct entry *e = &s->entry[q->c->space][table][q->va % DIRS];

	for (unsigned i = 0; i < e->n; i++) {
		bool last = i + 1 == e->n;

		if (!counts(e, i, since))
			continue;
		if (e->was[i].value & 1)
			way(q, outcome_of(s, q->c, e->was[i].value, q->offset, q->kind), current && last);
		else if (last)
			way(q, (struct outcome){ KAGE_GUEST_FAULT, abort_code(s, q->c, q->kind, false, 0) }, current);
	}
}

static void judge(struct stale *s, struct question *q)
{
	const struct entry *e = &s->entry[q->c->space][0][q->va / DIRS];
	uint64_t since = s->since[q->c - s->cpu][q->c->space][q->va];

	for (unsigned i = 0; i < e->n; i++) {
		bool last = i + 1 == e->n;

		if (!counts(e, i, since))
			continue;
		if (e->was[i].value & 1)
			ways_below(s, q, e->was[i].value, last, since);
		else if (last)
			way(q, (struct outcome){ KAGE_GUEST_FAULT, abort_code(s, q->c, q->kind, false, 1) }, true);
	}
}

/* -- steps ---------------------------------------------------------------- */

static void do_access(struct stale *s, struct cpu *c, unsigned va, int kind)
{
	struct question q = { .c = c, .va = va, .kind = kind };
	uint64_t gva, value;
	struct kage_fault f = { 0 };
	int r;

	q.offset = (unsigned)below(s, BIT(s->f->page_bits - 12)) * 4096;
	gva = va_of(s, va) + q.offset + MARK;
	s->now++; /* nobody knows to which page a store goes: it leaves a word that no other has, beside the mark */
	r = kind == 0 ? kage_vcpu_load(c->vcpu, gva, &value, 8, &f) :
	    kind == 1 ? kage_vcpu_store(c->vcpu, gva + 8, &s->now, 8, &f) :
			kage_vcpu_fetch(c->vcpu, gva, &value, 8, &f);
	if (r == KAGE_OK && kind == 1) { /* where has it gone? */
		uint64_t there = 0;

		for (unsigned p = 0; p < 16 && there != s->now; p++) {
			value = page_gpa(p) + q.offset;
			REQUIRE(s, kage_vm_read(s->vm, value + MARK + 8, &there, 8));
		}
		value = there == s->now ? value : 0;
	}
	q.got = (struct outcome){ r, r == KAGE_OK ? value : f.error };
	judge(s, &q);
	s->accesses++;
	s->open += q.ways != 0;
	if (!q.legal)
		fail(s, "vCPU %u, space %u, va %llx, access %d: %d %llx; by the tables as they are %d %llx, and %u other "
		     "ways that caches allow",
		     (unsigned)(c - s->cpu), c->space, (unsigned long long)gva, kind, q.got.result,
		     (unsigned long long)q.got.value, q.now.result, (unsigned long long)q.now.value, q.ways);
	s->old += !same(q.got, q.now);
}

static void write_entry(struct stale *s, struct cpu *c, unsigned space, unsigned table, unsigned index, uint64_t e)
{
	struct entry *h = &s->entry[space][table][index];
	uint64_t at = index * s->f->entry_bytes;

	if (h->n && h->was[h->n - 1].value == e)
		return;
	if (h->n == HISTORY) { /* all that is cached goes, and with it the history */
		for (unsigned i = 0; i < CPUS; i++) {
			REQUIRE(s, kage_vcpu_flush(s->cpu[i].vcpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_ALL)));
			forget(s, &s->cpu[i], -1, -1);
		}
		h->was[0] = h->was[h->n - 1];
		h->n = 1;
	}
	s->now++;
	h->was[h->n].since = s->now;
	h->was[h->n++].value = e;
	if (!c) {
		put(s, table_gpa(space, table) + at, e);
		return;
	}
	at += (uint64_t)WINDOW_DIR << shift_of(s->f, 1) | (uint64_t)(space * TABLES + table) << shift_of(s->f, 0);
	if (c->user) {
		c->user = false;
		set_regs(s, c, s->f->pcid);
	}
	REQUIRE(s, s->f->entry_bytes == 8 ? kage_vcpu_store(c->vcpu, at, &e, 8, NULL) :
					    kage_vcpu_store(c->vcpu, at, &(uint32_t){ (uint32_t)e }, 4, NULL));
}

static uint64_t random_entry(struct stale *s, unsigned space, unsigned table)
{
	if (below(s, 6) == 0)
		return below(s, 2) ? 0 : below(s, 0x100000) << 12; /* the valid bit alone counts */
	if (!table)
		return table_entry(s->f, table_gpa(space, 1 + (unsigned)below(s, TABLES - 1)));
	return page_entry(s->f, page_gpa((unsigned)below(s, 16)), (unsigned)below(s, 8));
}

static void flush(struct stale *s, struct cpu *c, unsigned kind, unsigned space, unsigned va)
{
	const struct format *f = s->f;
	bool asids = f->arm || f->pcid;
	uint64_t gva = va_of(s, va) + below(s, BIT(f->page_bits));

	if (!asids && (kind == KAGE_FLUSH_ASID || kind == KAGE_FLUSH_PAGE_ASID))
		space = c->space; /* PCID 0 is all there is */
	if (kind == KAGE_FLUSH_CR3) {
		if (f->arm)
			return;
		set_regs(s, c, f->pcid);
		REQUIRE(s, kage_vcpu_flush(c->vcpu, KAGE_CFG(kage_flush, .kind = kind,
							     .value = s->root[c->space] | (f->pcid ? c->space + 1 : 0))));
		forget(s, c, f->pcid ? (int)c->space : -1, -1);
		return;
	}
	REQUIRE(s, kage_vcpu_flush(c->vcpu, KAGE_CFG(kage_flush, .kind = kind, .gva = gva,
						     .asid = asids ? space + 1 : 0)));
	switch (kind) {
	case KAGE_FLUSH_ALL: forget(s, c, -1, -1); break;
	case KAGE_FLUSH_PAGE: forget(s, c, -1, (int)va); break;
	case KAGE_FLUSH_ASID: forget(s, c, asids ? (int)space : -1, -1); break;
	default: forget(s, c, asids ? (int)space : -1, (int)va);
	}
}

/* Break before make, with no more flushed than must be; then nothing is left open for this page. */
static void break_and_make(struct stale *s, struct cpu *c, unsigned va)
{
	unsigned space = c->space, table = below(s, 4) ? 1 + (unsigned)below(s, TABLES - 1) : 0;
	unsigned index = table ? va % DIRS : va / DIRS;
	struct cpu *by = below(s, 2) ? c : NULL;

	write_entry(s, by, space, table, index, 0);
	flush(s, c, below(s, 2) ? KAGE_FLUSH_PAGE : KAGE_FLUSH_PAGE_ASID, space, va);
	if (below(s, 2))
		do_access(s, c, va, (int)below(s, 3));
	write_entry(s, by, space, table, index, random_entry(s, space, table));
	do_access(s, c, va, (int)below(s, 3));
}

static void one_step(struct stale *s)
{
	struct cpu *c = &s->cpu[below(s, CPUS)];
	unsigned va = (unsigned)below(s, VAS), space = (unsigned)below(s, SPACES), what = (unsigned)below(s, 100);
	unsigned table = below(s, 5) ? 1 + (unsigned)below(s, TABLES - 1) : 0;

	if (what < 24)
		write_entry(s, below(s, 3) ? c : NULL, space, table, (unsigned)below(s, DIRS),
			    random_entry(s, space, table));
	else if (what < 32)
		flush(s, c, (unsigned)below(s, 5), space, va);
	else if (what < 38)
		break_and_make(s, c, va);
	else if (what < 42)
		switch_space(s, c);
	else if (what < 46) {
		c->user = below(s, 2);
		set_regs(s, c, s->f->pcid);
	}
	s->now++;
	do_access(s, c, va, (int)below(s, 3));
}

/* -- sequences ------------------------------------------------------------ */

static void begin(struct stale *s, const struct format *f, uint64_t seed)
{
	const struct kage_engine_config *ec = KAGE_CFG(kage_engine_config, .address_space = (uint64_t)1 << 36);

	memset(s, 0, sizeof(*s));
	s->f = f;
	s->seed = seed;
	s->rng = rng_seed(seed);
	s->next_table = table_gpa(SPACES, 0);
	REQUIRE(s, kage_engine_create(ec, &s->engine));
	REQUIRE(s, kage_vm_create(s->engine, NULL, &s->vm));
	REQUIRE(s, kage_vm_map(s->vm, KAGE_CFG(kage_region, .len = PAGES + 16 * STRIDE)));
	for (uint64_t gpa = PAGES; gpa < PAGES + 16 * STRIDE; gpa += 4096)
		REQUIRE(s, kage_vm_write(s->vm, gpa + MARK, &gpa, 8));
	for (unsigned space = 0; space < SPACES; space++) {
		build_space(s, space);
		for (unsigned t = 0; t < TABLES; t++)
			for (unsigned i = 0; i < DIRS; i++)
				write_entry(s, NULL, space, t, i, random_entry(s, space, t));
	}
	for (unsigned i = 0; i < CPUS; i++) {
		struct kage_vcpu_config *vc = KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .tlb_bits = 9,
						       .arch = f->arm ? KAGE_ARCH_ARM64 : KAGE_ARCH_X86);

		s->cpu[i].space = i;
		REQUIRE(s, kage_vcpu_create(s->vm, vc, &s->cpu[i].vcpu));
		set_regs(s, &s->cpu[i], false);
		forget(s, &s->cpu[i], -1, -1);
	}
}

static void end(struct stale *s)
{
	struct kage_audit a = { .size = sizeof(a) };

	if (kage_engine_audit(s->engine, &a) || a.violations)
		fail(s, "the audit found %llu violations", (unsigned long long)a.violations);
	for (unsigned i = 0; i < CPUS; i++)
		kage_vcpu_destroy(s->cpu[i].vcpu);
	REQUIRE(s, kage_vm_destroy(s->vm));
	REQUIRE(s, kage_engine_destroy(s->engine));
}

static void run_format(const struct fg_case *c)
{
	uint64_t seed = env_number("KAGE_SEED", 1), sequences = env_number("KAGE_SEQUENCES", 10);
	uint64_t steps = env_number("KAGE_STEPS", 6000);
	unsigned long accesses = 0, open = 0, old = 0;
	static struct stale s;

	for (uint64_t i = 0; i < sequences; i++) {
		begin(&s, &formats[c->arg], seed + i);
		for (; s.step < steps; s.step++)
			one_step(&s);
		end(&s);
		accesses += s.accesses;
		open += s.open;
		old += s.old;
	}
	printf("%s: %lu accesses (seeds %llu to %llu), of %lu caches could have had another answer, and %lu times had\n",
	       c->name, accesses, (unsigned long long)seed, (unsigned long long)(seed + sequences - 1), open, old);
	/* nothing is open: nothing was asked; everything is as it is now: no table was ever out of sync */
	if (sequences * steps >= 50000 && (open < accesses / 10 || open > accesses - accesses / 10 || !old)) {
		fprintf(stderr, "%s: the sample is too one-sided\n", c->name);
		exit(EXIT_FAILURE);
	}
}

int main(void)
{
	enum { N = sizeof(formats) / sizeof(formats[0]) };
	struct fg_case cases[N];

	for (unsigned i = 0; i < N; i++)
		cases[i] = (struct fg_case){ formats[i].name, run_format, i };
	return fg_run_cases("stale", cases, N);
}
