/* SPDX-License-Identifier: MIT */
/*
 * What arm64 stage 1, PAE and 32-bit tables permit: every combination, through
 * kage_vcpu_translate() and through real loads, stores and fetches, against the
 * reference walkers. (4-level paging: test_permissions.c, test_permissions_api.c.)
 *
 * All combinations stand in one set of tables, in which an index is what the
 * entry there grants: a combination is an address. Before each access the
 * entries of its path are fresh again (access flags and dirty state as the
 * combination has them) and what was cached is flushed, so that each access
 * shows all that it sets.
 *
 * The cases whose names begin with "product" are a sample of the full product of
 * format_space.h, in the order of test_format_product.c (which does the whole of
 * it with the engine's walk alone): here a vCPU does the accesses.
 *
 * KAGE_STRIDE=n: every n-th combination only (7 if nothing is said; 1 takes minutes). KAGE_FORMAT: one case by name.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "format_guest.h"
#include "format_space.h"
#include "rng.h"

#define BIT(n) ((uint64_t)1 << (n))
#define TABLE_GPA(level) (BIT(20) + (uint64_t)(level) * BIT(16))
#define PAGES_GPA ((uint64_t)4 << 20)
#define MAX_LEVELS 5
#define SAMPLE 40000 /* of each space, if the stride is 1 */
#define STRIDE 7     /* no divisor of what the loops below count to, nearly all powers of two */

/* A combination: an address and the entries that translate it, as they are before use. */
struct path {
	uint64_t va;
	unsigned n, bytes;
	struct {
		uint64_t gpa, value;
	} entry[MAX_LEVELS];
};

static uint64_t stride, turn;

static void make_fresh(struct format_guest *g, const struct path *p)
{
	bool changed = false;

	kage_vcpu_leave(g->vcpu); /* else each write waits for it, which is most of the time this test takes */
	for (unsigned i = 0; i < p->n; i++)
		if (memcmp(fg_memory(g, p->entry[i].gpa), &p->entry[i].value, p->bytes) != 0) {
			fg_write(g, p->entry[i].gpa, p->entry[i].value, p->bytes);
			changed = true;
		}
	if (changed)
		fg_flush(g, KAGE_FLUSH_ALL, 0);
}

static void put_path(struct format_guest *g, const struct path *p)
{
	for (unsigned i = 0; i < p->n; i++)
		fg_write(g, p->entry[i].gpa, p->entry[i].value, p->bytes);
}

static void try_access(struct format_guest *g, const char *name, const struct path *p, unsigned mode,
		       enum fg_access access)
{
	uint64_t gpa;

	snprintf(g->about, sizeof(g->about), "%s, mode %x", name, mode);
	make_fresh(g, p);
	fg_translate(g, p->va, access);
	if (g->config.arch == KAGE_ARCH_X86 && access != FG_FETCH)
		fg_translate(g, p->va, access == FG_READ ? FG_IMPLICIT_READ : FG_IMPLICIT_WRITE);
	fg_do(g, p->va, access, p->va * 0x9e3779b97f4a7c15 + mode + 1, &gpa);
}

static void try_path(struct format_guest *g, const char *name, const struct path *p, unsigned mode)
{
	if (turn++ % stride)
		return;
	for (enum fg_access access = FG_READ; access <= FG_FETCH; access++)
		try_access(g, name, p, mode, access);
}

static void finish(struct format_guest *g, const char *name)
{
	fg_compare_all(g);
	fg_audit(g);
	printf("%s: %lu cases, %lu granted, %lu faults of %d kinds, %lu entries updated\n", name, g->count.translations,
	       g->count.granted, g->count.faults, __builtin_popcountll(g->count.fault_kinds), g->count.flags_set);
	if (!g->count.granted || !g->count.faults || g->count.mmio || !g->count.flags_set)
		fg_fail(g, "one-sided, or addresses went astray");
	fg_destroy(g);
}

/* -- arm64 ---------------------------------------------------------------- */

/* EL0, PAN, WXN, EPAN, HA, HD, HPD0 */
#define ARM64_MODES 128
/* AP[2:1], AF, DBM, PXN, UXN */
#define ARM64_LEAVES 64

struct arm64_shape {
	unsigned page_bits, va_bits, leaf, top; /* levels */
	bool thorough;
};

static unsigned arm64_shift(const struct arm64_shape *s, unsigned level)
{
	return s->page_bits + level * (s->page_bits - 3);
}

static uint64_t arm64_leaf(const struct arm64_shape *s, unsigned combo)
{
	uint64_t e = s->leaf ? 1 : 3;
	uint64_t page = PAGES_GPA + (uint64_t)combo * BIT(16);

	e |= s->leaf ? 0 : page;
	e |= (uint64_t)(combo & 3) << 6 | (uint64_t)(combo >> 2 & 1) << 10 | (uint64_t)(combo >> 3 & 1) << 51 |
	     (uint64_t)(combo >> 4 & 3) << 53;
	return e;
}

/* `attributes`: four bits a table level, the lowest for the level above the leaf. */
static struct path arm64_path(const struct arm64_shape *s, unsigned attributes, unsigned combo)
{
	struct path p = { .bytes = 8, .n = s->top - s->leaf + 1 };
	unsigned n = 0;

	for (unsigned level = s->top; level > s->leaf; level--, n++) {
		unsigned index = attributes >> (4 * (level - s->leaf - 1)) & 15;

		p.va |= (uint64_t)index << arm64_shift(s, level);
		p.entry[n].gpa = TABLE_GPA(level) + 8 * index;
		p.entry[n].value = TABLE_GPA(level - 1) | (uint64_t)index << 59 | 3;
	}
	p.va |= (uint64_t)combo << arm64_shift(s, s->leaf);
	/* in a block: at the page of this combination, as for pages */
	p.va |= (s->leaf ? PAGES_GPA + (uint64_t)combo * BIT(16) : 0) & (BIT(arm64_shift(s, s->leaf)) - 1);
	p.va |= 0x120;
	p.entry[n].gpa = TABLE_GPA(s->leaf) + 8 * combo;
	p.entry[n].value = arm64_leaf(s, combo);
	return p;
}

static void arm64_mode(struct format_guest *g, const struct arm64_shape *s, unsigned mode)
{
	struct arm64_ref_cpu *c = &g->arm64;
	uint64_t tg0 = s->page_bits == 12 ? 0 : s->page_bits == 14 ? 2 : 1;

	c->pstate = (mode & 1 ? 0 : 4) | (mode & 2 ? BIT(22) : 0);
	c->sctlr = 1 | (mode & 4 ? BIT(19) : 0) | (mode & 8 ? BIT(57) : 0);
	c->tcr = (64 - s->va_bits) | tg0 << 14 | BIT(23) | (uint64_t)2 << 30 | 16 << 16 | (uint64_t)5 << 32;
	c->tcr |= (mode & 16 ? BIT(39) : 0) | (mode & 32 ? BIT(40) : 0) | (mode & 64 ? BIT(41) : 0);
	c->ttbr0 = TABLE_GPA(s->top);
	fg_require(g, fg_set_regs(g) == KAGE_OK, "kage_vcpu_set_regs");
	fg_flush(g, KAGE_FLUSH_ALL, 0);
}

static void arm64_begin(struct format_guest *g)
{
	struct fg_config config = { .arch = KAGE_ARCH_ARM64, .phys_bits = 48, .high_bit = 40 };

	config.features = KAGE_ARM64_GRAN16 | KAGE_ARM64_GRAN64 | KAGE_ARM64_HAF | KAGE_ARM64_HD | KAGE_ARM64_PAN |
			  KAGE_ARM64_EPAN | KAGE_ARM64_HPDS;
	fg_create(g, &config);
	g->arm64 = (struct arm64_ref_cpu){ .pa_bits = 48, .haf = true, .hd = true, .pan = true, .epan = true,
					   .hpds = true, .gran16 = true, .gran64 = true };
}

/*
 * Every leaf under every mode, with every set of attributes at one level of tables and none at the others (not
 * thorough: with every single one).
 */
static void arm64_every_mode(struct format_guest *g, const char *name, const struct arm64_shape *s)
{
	unsigned tables = s->top - s->leaf;

	for (unsigned mode = 0; mode < ARM64_MODES; mode++) {
		arm64_mode(g, s, mode);
		for (unsigned combo = 0; combo < ARM64_LEAVES; combo++) {
			struct path p = arm64_path(s, 0, combo);

			try_path(g, name, &p, mode);
			for (unsigned attributes = 1; attributes < 16; attributes += s->thorough ? 1 : attributes)
				for (unsigned level = 0; level < tables; level++) {
					p = arm64_path(s, attributes << (4 * level), combo);
					try_path(g, name, &p, mode);
				}
		}
	}
}

/* Every set of attributes at all levels together, each under one of the modes and with one kind of access. */
static void arm64_every_table(struct format_guest *g, const char *name, const struct arm64_shape *s)
{
	struct rng rng = rng_seed(48);
	unsigned sets = 1u << (4 * (s->top - s->leaf));

	for (unsigned attributes = 0; attributes < sets; attributes++) {
		unsigned mode = rng_below(&rng, ARM64_MODES);

		arm64_mode(g, s, mode);
		for (unsigned combo = 0; combo < ARM64_LEAVES; combo++) {
			struct path p = arm64_path(s, attributes, combo);

			if (turn++ % stride == 0)
				try_access(g, name, &p, mode, (enum fg_access)rng_below(&rng, 3));
		}
	}
}

static const struct arm64_shape arm64_shapes[] = {
	{ 12, 48, 0, 3, true }, { 12, 48, 1, 3, false }, { 12, 48, 2, 3, false }, /* 4K pages, 2M blocks, 1G blocks */
	{ 14, 47, 0, 2, false }, { 14, 47, 1, 2, false },                        /* 16K pages, 32M blocks */
	{ 16, 48, 0, 2, false }, { 16, 48, 1, 2, false },                        /* 64K pages, 512M blocks */
};

static void arm64_case(const struct fg_case *c)
{
	const struct arm64_shape *s = &arm64_shapes[c->arg];
	struct format_guest g;

	arm64_begin(&g);
	for (unsigned attributes = 0; attributes < 1u << (4 * (s->top - s->leaf)); attributes++)
		for (unsigned combo = 0; combo < ARM64_LEAVES; combo += attributes ? ARM64_LEAVES : 1) {
			struct path p = arm64_path(s, attributes, combo);

			put_path(&g, &p);
		}
	arm64_every_mode(&g, c->name, s);
	arm64_every_table(&g, c->name, s);
	finish(&g, c->name);
}

/* -- PAE and 32-bit ------------------------------------------------------- */

/* CPL 3, WP, SMEP, SMAP, AC, NXE, PSE */
#define X86_MODES 128
#define X86_PHYS_BITS 38 /* with PSE-36 some address bits of a 4 MiB page exist and some do not */
#define PT_GPA TABLE_GPA(0)
#define PD_GPA TABLE_GPA(1)
#define PDPT_GPA TABLE_GPA(2)
#define X86_RIGHTS(pae) ((pae) ? 8u : 4u)

/* P, and R/W, U/S, XD as the bits of `rights` say. */
static uint64_t x86_rights(unsigned rights)
{
	return 1 | (rights & 1 ? 2 : 0) | (rights & 2 ? 4 : 0) | (rights & 4 ? BIT(63) : 0);
}

enum x86_kind { PTE, PDE, LARGE };

/*
 * What a slot adds to an entry: one of the sets of rights, or full rights and a
 * single bit, of which bit 0 takes P away.
 */
static uint64_t x86_slot(unsigned slot, bool pae)
{
	unsigned rights = X86_RIGHTS(pae);

	return slot < rights ? x86_rights(slot) : 7 ^ BIT(slot - rights);
}

/* The single bits that change neither what the entry points to nor A and D: reserved ones, ignored ones, P. */
static bool x86_fair(unsigned slot, bool pae, enum x86_kind kind, bool pse)
{
	uint64_t fair = 0xf19;

	if (slot < X86_RIGHTS(pae))
		return true;
	if (pae)
		fair |= ~(BIT(X86_PHYS_BITS) - 1);
	if (kind == PTE || (kind == PDE && !pae && !pse))
		fair |= 0x80;
	if (kind == LARGE)
		fair |= BIT(12) | (pae ? 0x1fe000 : 0x3fffff & ~(BIT(X86_PHYS_BITS - 19) - 1));
	return fair & BIT(slot - X86_RIGHTS(pae));
}

static struct path x86_path(bool pae, bool large, unsigned pde, unsigned pte)
{
	struct path p = { .bytes = pae ? 8 : 4, .n = large ? 1 : 2 };
	/* the second half of the directory is of large pages */
	unsigned pde_index = pde + (large ? (pae ? 256 : 512) : 0), shift = pae ? 21 : 22;

	p.va = (uint64_t)pde_index << shift | (large ? PAGES_GPA & (BIT(shift) - 1) : (uint64_t)pte << 12) | 0x120;
	p.entry[0].gpa = PD_GPA + pde_index * p.bytes;
	p.entry[0].value = (large ? PAGES_GPA | 0x80 : PT_GPA) | x86_slot(pde, pae);
	p.entry[1].gpa = PT_GPA + pte * p.bytes;
	p.entry[1].value = (PAGES_GPA + 4096ull * pte) | x86_slot(pte, pae);
	return p;
}

static void x86_mode(struct format_guest *g, bool pae, unsigned mode)
{
	struct ref_cpu *c = &g->x86;
	struct kage_flush f = { .size = sizeof(f), .kind = KAGE_FLUSH_CR3 };

	c->cpl = mode & 1 ? 3 : 0;
	c->cr0 = 0x80000011 | (mode & 2 ? BIT(16) : 0);
	c->cr4 = (pae ? BIT(5) : 0) | (mode & 4 ? BIT(20) : 0) | (mode & 8 ? BIT(21) : 0) | (mode & 64 ? BIT(4) : 0);
	c->rflags = 2 | (mode & 16 ? BIT(18) : 0);
	c->efer = mode & 32 ? 0x800 : 0;
	f.value = c->cr3 = pae ? PDPT_GPA : PD_GPA;
	fg_require(g, fg_set_regs(g) == KAGE_OK, "kage_vcpu_set_regs");
	fg_require(g, kage_vcpu_flush(g->vcpu, &f) == KAGE_OK, "MOV to CR3");
	fg_flush(g, KAGE_FLUSH_ALL, 0);
}

static void each_path(struct format_guest *g, const char *name, const struct path *p, unsigned mode, bool put)
{
	if (put)
		put_path(g, p);
	else
		try_path(g, name, p, mode);
}

static void x86_every_path(struct format_guest *g, const char *name, bool pae, unsigned mode, bool put)
{
	unsigned slots = X86_RIGHTS(pae) + (pae ? 64 : 32);
	bool pse = mode & 64;
	struct path p;

	for (unsigned pde = 0; pde < slots; pde++) {
		/* without PSE a large PDE points to a table that is none of the test's */
		if (x86_fair(pde, pae, LARGE, pse) && (pae || pse)) {
			p = x86_path(pae, true, pde, 0);
			each_path(g, name, &p, mode, put);
		}
		for (unsigned pte = 0; pte < slots && x86_fair(pde, pae, PDE, pse); pte++)
			/* single bits in one of them at a time, beside full rights in the other */
			if (x86_fair(pte, pae, PTE, pse) &&
			    (pde < X86_RIGHTS(pae) || pte == X86_RIGHTS(pae) - 1 || pte == 3) &&
			    (pte < X86_RIGHTS(pae) || pde == 3)) {
				p = x86_path(pae, false, pde, pte);
				each_path(g, name, &p, mode, put);
			}
	}
}

static void x86_case(const struct fg_case *c)
{
	bool pae = c->arg;
	struct fg_config config = { .arch = KAGE_ARCH_X86, .phys_bits = X86_PHYS_BITS, .high_bit = 36,
				    .features = KAGE_X86_NX | KAGE_X86_SMEP | KAGE_X86_SMAP };
	struct path none = { .va = 0xc0000120, .bytes = 8 };
	struct format_guest g;

	fg_create(&g, &config);
	g.x86.phys_bits = X86_PHYS_BITS;
	fg_write(&g, PDPT_GPA, PD_GPA | 1, 8);
	g.x86.pdpte[0] = PD_GPA | 1; /* the others are not present */
	x86_every_path(&g, c->name, pae, 64, true);
	for (unsigned mode = 0; mode < X86_MODES; mode++) {
		x86_mode(&g, pae, mode);
		x86_every_path(&g, c->name, pae, mode, false);
		try_path(&g, c->name, &none, mode);
	}
	finish(&g, c->name);
}

/* -- the full product, sampled -------------------------------------------- */

static void product_mode(struct format_guest *g, const struct space *s, unsigned mode)
{
	space_registers(s, mode, &g->x86, &g->arm64);
	fg_require(g, fg_set_regs(g) == KAGE_OK, "kage_vcpu_set_regs");
}

static void product_access(struct format_guest *g, const struct space *s, const char *name, const struct space_case *c)
{
	struct path p = { .va = c->va, .n = c->n, .bytes = s->entry_bytes };

	for (unsigned i = 0; i < c->n; i++) {
		p.entry[i].gpa = c->entry[i].gpa;
		p.entry[i].value = c->entry[i].value;
	}
	if (c->access <= FG_FETCH) {
		try_access(g, name, &p, c->mode, c->access);
		return;
	}
	snprintf(g->about, sizeof(g->about), "%s, mode %x", name, c->mode);
	make_fresh(g, &p);
	fg_translate(g, p.va, c->access);
}

static void product_case(const struct fg_case *f)
{
	const struct space *s = &spaces[f->arg];
	struct fg_config config = space_config(s);
	uint64_t size = space_size(s), step = space_stride(s), n = SAMPLE / stride, number = 0;
	struct format_guest g;
	struct space_case c;

	fg_create(&g, &config);
	if (space_is_pae(s))
		fg_write(&g, SPACE_PDPT + 16, SPACE_PDPTE, 8);
	n = n < size ? n : size;
	for (uint64_t i = 0; i < n; i++, number = (number + step) % size) {
		space_case_of(s, number, &c);
		product_mode(&g, s, c.mode);
		product_access(&g, s, f->name, &c);
	}
	printf("%llu of %llu combinations of ", (unsigned long long)n, (unsigned long long)size);
	finish(&g, f->name);
}

#define CASES_MAX 64

int main(void)
{
	static const struct fg_case single[] = {
		{ "arm64-4k", arm64_case, 0 },      { "arm64-2m-block", arm64_case, 1 },
		{ "arm64-1g-block", arm64_case, 2 }, { "arm64-16k", arm64_case, 3 },
		{ "arm64-32m-block", arm64_case, 4 }, { "arm64-64k", arm64_case, 5 },
		{ "arm64-512m-block", arm64_case, 6 }, { "x86-pae", x86_case, true },
		{ "x86-32bit", x86_case, false },
	};
	static char names[CASES_MAX][48];
	struct fg_case cases[CASES_MAX];
	unsigned n = sizeof(single) / sizeof(single[0]);

	memcpy(cases, single, sizeof(single));
	for (unsigned i = 0; i < nspaces; i++, n++) {
		snprintf(names[i], sizeof(names[i]), "product-%s", spaces[i].name);
		cases[n] = (struct fg_case){ names[i], product_case, i };
	}
	stride = env_number("KAGE_STRIDE", env_number("KAGE_SHORT", 0) ? 31 : STRIDE);
	return fg_run_cases("format permissions", cases, n);
}
