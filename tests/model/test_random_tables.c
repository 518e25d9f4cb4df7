/* SPDX-License-Identifier: MIT */
/*
 * Random guest tables of every format against the reference walkers, through
 * the public API alone: translations, loads, stores and fetches; outcome,
 * address, fault syndrome, level, the bytes moved, and what has become of the
 * entries on the path. Between them entries change, by the VMM's writes and by
 * stores of the guest that land in its own tables; so do registers.
 *
 * A guest has a pool of tables, each made for one level, whose entries point
 * to any table of the next level, to memory, to tables as if they were memory,
 * and to where nothing is; now and then an entry has a bit that it should not
 * have. Addresses are put together from a few indices a level, and only those
 * slots are filled: paths meet in the same entries all the time.
 *
 * The guest is cloned now and then, so that what it writes, and the flags that
 * the walk sets, hit shared frames; the clone keeps what it had.
 *
 * What software has to flush is flushed; what the architectures promise
 * without (rights that depend on the mode of the CPU, a change of address
 * space among tables without global pages) is not.
 *
 * KAGE_SEED, KAGE_SEQUENCES, KAGE_STEPS (translations a sequence), KAGE_FORMAT:
 * see tests/README.md.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "format_guest.h"
#include "rng.h"

#define BIT(n) ((uint64_t)1 << (n))
#define TABLES 10            /* of each half of the address space */
#define TABLES_HIGH 8        /* from this one on they are in high memory */
#define TABLE_GPA BIT(20)
#define TABLE_STRIDE BIT(16) /* the largest table */
#define VAS 12
#define MAX_LEVELS 5
#define AUDIT_EVERY 1000
#define CLONE_EVERY 400
#define CLONE_GPA TABLE_GPA /* the part of a clone that is looked at */
#define CLONE_LEN (2 * TABLES * TABLE_STRIDE + BIT(20))

enum format { X86_32, X86_PAE, X86_4, X86_5, ARM_4K, ARM_16K, ARM_64K, ARM_WIDE = 16 };

/* How one half of the address space is translated (x86: all of it). Level 0 is the leaf. */
struct half {
	unsigned page_bits, index_bits, entry_bytes, va_bits, levels;
	bool upper;
	uint64_t root_offset; /* of the entries in a root table that is smaller than a page */
	unsigned index[VAS][MAX_LEVELS];
};

struct run {
	struct format_guest g;
	struct rng rng;
	unsigned format; /* ARM_WIDE taken out */
	bool wide, arm, no_global;
	unsigned halves;
	struct half half[2];
	uint64_t root[2][2];  /* of address space 0 and 1; of each half */
	unsigned space;
	uint64_t step, seed;
	unsigned long table_stores;
	struct kage_vm *clone;
	uint8_t *before; /* what the clone has from CLONE_GPA on */
};

static uint64_t below(struct run *r, uint64_t n)
{
	return rng_below(&r->rng, n);
}

static bool one_in(struct run *r, unsigned n)
{
	return below(r, n) == 0;
}

/* -- shapes and addresses ------------------------------------------------- */

static unsigned shift_of(const struct half *h, unsigned level)
{
	return h->page_bits + level * h->index_bits;
}

static unsigned entries_log2(const struct half *h, unsigned level)
{
	return level == h->levels - 1 ? h->va_bits - shift_of(h, level) : h->index_bits;
}

static void make_shape(struct run *r, struct half *h, unsigned page_bits, unsigned entry_bytes, unsigned va_bits)
{
	h->page_bits = page_bits;
	h->entry_bytes = entry_bytes;
	h->index_bits = page_bits - (entry_bytes == 4 ? 2 : 3);
	h->va_bits = va_bits;
	h->levels = (va_bits - page_bits + h->index_bits - 1) / h->index_bits;
	for (unsigned i = 0; i < VAS; i++)
		for (unsigned level = 0; level < h->levels; level++) {
			uint64_t n = BIT(entries_log2(h, level));

			h->index[i][level] = one_in(r, 4) ? below(r, n) : one_in(r, 8) ? n - 1 : below(r, 4) % n;
		}
}

static uint64_t random_va(struct run *r, const struct half *h)
{
	unsigned i = below(r, VAS), slot = h->index[below(r, VAS)][below(r, h->levels)];
	uint64_t va = 0, page = BIT(h->page_bits) - 1;

	for (unsigned level = 0; level < h->levels; level++)
		va |= (uint64_t)h->index[i][level] << shift_of(h, level);
	/* half of the addresses are those of an entry, if the page is a table */
	va |= (one_in(r, 2) ? rng_next(&r->rng) : (uint64_t)slot * h->entry_bytes) & page & ~(uint64_t)7;
	if (h->upper)
		va |= ~(BIT(h->va_bits) - 1);
	else if (!r->arm && h->va_bits > 32 && (va & BIT(h->va_bits - 1)))
		va |= ~(BIT(h->va_bits) - 1);
	if (h->va_bits > 32 || r->arm) {
		if (one_in(r, 24))
			va ^= BIT(h->va_bits + below(r, 64 - h->va_bits));
		if (r->arm && one_in(r, 20))
			va ^= rng_next(&r->rng) << 56;
	}
	return va;
}

static uint64_t any_va(struct run *r)
{
	return random_va(r, &r->half[below(r, r->halves)]);
}

static unsigned table_level(const struct half *h, unsigned table)
{
	return table % h->levels;
}

static uint64_t table_gpa(const struct run *r, const struct half *h, unsigned table)
{
	unsigned n = table + (h == &r->half[1] ? TABLES : 0);
	/* a PDPT, and all tables of 32-bit paging, lie below 4 GiB */
	bool may_be_high = r->format == X86_32 ? r->g.config.high_bit < 32 : r->format != X86_PAE ||
			   table_level(h, table) != 2;

	if (table >= TABLES_HIGH && may_be_high)
		return BIT(r->g.config.high_bit) + n * TABLE_STRIDE;
	return TABLE_GPA + n * TABLE_STRIDE;
}

static bool in_tables(uint64_t gpa)
{
	return gpa >= TABLE_GPA ? gpa < TABLE_GPA + 2 * TABLES * TABLE_STRIDE || gpa >= FG_LOW : false;
}

static unsigned table_of_level(struct run *r, const struct half *h, unsigned level)
{
	unsigned t;

	do
		t = below(r, TABLES);
	while (table_level(h, t) != level);
	return t;
}

/* -- entries -------------------------------------------------------------- */

static uint64_t page_address(struct run *r, const struct half *h)
{
	switch (below(r, 16)) {
	case 0 ... 6:
		return below(r, FG_LOW);
	case 7 ... 11:
		return table_gpa(r, &r->half[below(r, r->halves)], below(r, TABLES)) + below(r, TABLE_STRIDE);
	case 12 ... 13:
		return BIT(r->g.config.high_bit) + below(r, FG_HIGH);
	default:
		return rng_next(&r->rng) & (BIT(r->g.config.phys_bits) - 1);
	}
}

/* Where an entry of this level points: a table of the next level down, rarely of another one; or memory. */
static uint64_t target(struct run *r, const struct half *h, unsigned level, bool leaf)
{
	if (leaf)
		return page_address(r, h) & ~(BIT(shift_of(h, level)) - 1);
	if (one_in(r, 40))
		return page_address(r, h) & ~(BIT(h->page_bits) - 1);
	return table_gpa(r, h, one_in(r, 24) ? below(r, TABLES) : table_of_level(r, h, level - 1));
}

static uint64_t x86_entry(struct run *r, const struct half *h, unsigned level)
{
	bool large = level > 0 && level < (r->format == X86_PAE ? 2 : 3) && one_in(r, 5), leaf = level == 0 || large;
	uint64_t to = target(r, h, level, leaf), e, x = rng_next(&r->rng);

	if (r->format == X86_PAE && level == 2) /* nothing but P, PWT, PCD and the ignored bits */
		return to | (x & 0xe18) | !one_in(r, 12) | (one_in(r, 24) ? BIT(x >> 20 & 63) : 0);
	if (r->format == X86_32 && large)
		to = (to & 0xffc00000) | (to >> 32 & 0xff) << 13;
	e = to | (x & 0xe78) | (one_in(r, 24) ? 0 : 1) | (one_in(r, 8) ? 0 : 2) | (one_in(r, 8) ? 0 : 4);
	if (large)
		e |= 0x80;
	if (leaf && !r->no_global && one_in(r, 3))
		e |= 0x100;
	if (r->format == X86_4 || r->format == X86_5)
		e |= one_in(r, 3) ? x & 0x7ff0000000000000 : 0;
	if (r->format != X86_32 && one_in(r, 10))
		e |= BIT(63);
	if (one_in(r, 20))
		e ^= BIT(x >> 20 & 63);
	if (r->no_global)
		e &= ~(uint64_t)0x100;
	return r->format == X86_32 ? e & 0xffffffff : e;
}

/* TCR_EL1.DS counts, or the 64K granule has 52-bit addresses: where the top of an address goes. */
static uint64_t arm64_address(const struct run *r, const struct half *h, uint64_t a)
{
	uint64_t e = a & (BIT(48) - 1);

	if (!r->wide)
		return e;
	if (h->page_bits == 16)
		return e | (a >> 48 & 15) << 12;
	return r->g.arm64.tcr & BIT(59) ? e | (a >> 48 & 3) << 48 | (a >> 50 & 3) << 8 : e;
}

/* May a block stand at this level? Rarely there is one where it may not. */
static bool arm64_block(struct run *r, const struct half *h, unsigned level)
{
	bool good = level == 1 || (level == 2 && h->page_bits == 12) ||
		    (level < 4 && r->wide && (h->page_bits == 16 || r->g.arm64.tcr & BIT(59)));

	return one_in(r, good ? 5 : 60);
}

static uint64_t arm64_entry(struct run *r, const struct half *h, unsigned level)
{
	bool leaf = level == 0 || arm64_block(r, h, level);
	uint64_t e = arm64_address(r, h, target(r, h, level, leaf)), x = rng_next(&r->rng);

	if (!one_in(r, 32))
		e |= leaf && level ? 1 : 3;
	if (leaf) {
		e |= (x & 0xdc) | BIT(11) | (one_in(r, 3) ? 0 : BIT(10)) | (x & BIT(51)) | (x & BIT(52));
		e |= (one_in(r, 4) ? BIT(53) : 0) | (one_in(r, 4) ? BIT(54) : 0);
		e ^= r->no_global || one_in(r, 2) ? 0 : BIT(11);
	} else {
		for (unsigned bit = 59; bit < 63; bit++)
			e |= one_in(r, 24) ? BIT(bit) : 0;
	}
	if (one_in(r, 20))
		e ^= BIT(x >> 20 & 63);
	if (leaf && r->no_global)
		e |= BIT(11);
	return e;
}

static uint64_t new_entry(struct run *r, const struct half *h, unsigned level)
{
	return r->arm ? arm64_entry(r, h, level) : x86_entry(r, h, level);
}

static uint64_t slot_gpa(const struct run *r, const struct half *h, unsigned table, unsigned va)
{
	unsigned level = table_level(h, table);

	return table_gpa(r, h, table) + (level == h->levels - 1 ? h->root_offset : 0) +
	       (uint64_t)h->index[va][level] * h->entry_bytes;
}

static void fill_tables(struct run *r)
{
	for (unsigned i = 0; i < r->halves; i++)
		for (unsigned t = 0; t < TABLES; t++)
			for (unsigned va = 0; va < VAS; va++)
				fg_write(&r->g, slot_gpa(r, &r->half[i], t, va),
					 new_entry(r, &r->half[i], table_level(&r->half[i], t)),
					 r->half[i].entry_bytes);
}

/* -- registers ------------------------------------------------------------ */

static struct ref_memory plain_memory(struct run *r);

static bool word_read(void *arg, uint64_t gpa, uint64_t *value)
{
	const void *p = fg_memory(arg, gpa);

	if (p)
		memcpy(value, p, sizeof(*value));
	return p;
}

static struct ref_memory plain_memory(struct run *r)
{
	return (struct ref_memory){ .read = word_read, .arg = &r->g };
}

static bool paging(const struct run *r)
{
	return r->arm ? r->g.arm64.sctlr & 1 : r->g.x86.cr0 & BIT(31);
}

/*
 * MOV to CR3 under PAE paging: the PDPTEs are loaded, or all stays as it was.
 * The engine must refuse exactly what the reference refuses.
 */
static void load_pdptes(struct run *r)
{
	struct ref_memory m = plain_memory(r);
	struct ref_cpu c = r->g.x86;
	bool good = ref_load_pdptes(&c, &m);
	int err = kage_vcpu_flush(r->g.vcpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_CR3, .value = c.cr3));

	if (good != !err)
		fg_fail(&r->g, "MOV to CR3 %llx: %d, reference %s", (unsigned long long)c.cr3, err,
			good ? "takes it" : "refuses");
	if (good)
		r->g.x86 = c;
}

/* After changes of tables that software has to flush for. */
static void flush_all(struct run *r)
{
	fg_flush(&r->g, KAGE_FLUSH_ALL, 0);
	if (r->format == X86_PAE && !r->arm && paging(r) && one_in(r, 2))
		load_pdptes(r);
}

/* A PDPT that cannot be loaded is mended: registers that are refused are a case of their own (load_pdptes). */
static void mend_pdpt(struct run *r)
{
	for (unsigned i = 0; i < 4; i++) {
		uint64_t *e = fg_memory(&r->g, (r->g.x86.cr3 & 0xffffffe0) + 8 * i);

		if ((*e & 1) && ((*e & 0x1e6) || *e >> r->g.x86.phys_bits))
			fg_write(&r->g, (r->g.x86.cr3 & 0xffffffe0) + 8 * i,
				 *e & ~(uint64_t)0x1e6 & (BIT(r->g.x86.phys_bits) - 1), 8);
	}
}

static void set_regs(struct run *r)
{
	struct ref_memory m = plain_memory(r);
	bool pae = !r->arm && r->format == X86_PAE && paging(r);
	int err;

	if (pae)
		mend_pdpt(r);
	err = fg_set_regs(&r->g);
	if (err)
		fg_fail(&r->g, "kage_vcpu_set_regs: %d", err);
	if (pae) {
		fg_flush(&r->g, KAGE_FLUSH_ALL, 0);
		fg_require(&r->g, ref_load_pdptes(&r->g.x86, &m), "PDPTEs");
		load_pdptes(r);
	}
}

/* What needs no flush. */
static void x86_mode(struct run *r)
{
	struct ref_cpu *c = &r->g.x86;

	c->cpl = one_in(r, 2) ? 3 : below(r, 3);
	c->rflags = 2 | (one_in(r, 2) ? BIT(18) : 0);
	c->cr0 = (c->cr0 & ~BIT(16)) | (one_in(r, 2) ? BIT(16) : 0);
	c->cr4 = (c->cr4 & ~BIT(21)) | (one_in(r, 2) ? BIT(21) : 0);
	c->pkru = rng_next(&r->rng) & rng_next(&r->rng);
}

static void x86_root(struct run *r)
{
	struct ref_cpu *c = &r->g.x86;

	c->cr3 = r->root[r->space][0] + r->half[0].root_offset;
	if ((c->cr4 & BIT(17)))
		c->cr3 |= r->space + 1; /* its PCID */
}

static void x86_registers(struct run *r)
{
	struct ref_cpu *c = &r->g.x86;
	bool lm = r->format == X86_4 || r->format == X86_5;

	c->cr0 = 0x11 | (one_in(r, 24) ? 0 : BIT(31));
	c->efer = one_in(r, 8) ? 0 : 0x800;
	if (lm)
		c->efer |= 0x100 | (c->cr0 & BIT(31) ? 0x400 : 0);
	c->cr4 = (one_in(r, 3) ? 0 : BIT(4)) | (one_in(r, 2) ? BIT(7) : 0) | (one_in(r, 2) ? BIT(20) : 0);
	if (r->format != X86_32)
		c->cr4 |= BIT(5);
	if (r->format == X86_5)
		c->cr4 |= BIT(12);
	if (lm && one_in(r, 2))
		c->cr4 |= BIT(22);
	if (lm && (c->cr0 & BIT(31)) && one_in(r, 2))
		c->cr4 |= BIT(17);
	x86_mode(r);
	x86_root(r);
}

static void arm64_mode(struct run *r)
{
	r->g.arm64.pstate = (one_in(r, 2) ? 4 : 0) | (one_in(r, 4) ? BIT(22) : 0) | (one_in(r, 2) ? 1 : 0);
}

static uint64_t arm64_ttbr(struct run *r, unsigned half)
{
	const struct half *h = &r->half[half];
	uint64_t a = r->root[r->space][half] + h->root_offset;
	bool split = (r->g.arm64.tcr & BIT(59) && h->page_bits != 16) || h->page_bits == 16;

	a = (a & (BIT(48) - 1)) | (r->wide && split ? (a >> 48 & 15) << 2 : 0);
	return a | (r->space + 1ull) << 48 | one_in(r, 2);
}

static void arm64_root(struct run *r)
{
	r->g.arm64.ttbr0 = arm64_ttbr(r, 0);
	r->g.arm64.ttbr1 = arm64_ttbr(r, 1);
}

static unsigned granule_field(unsigned page_bits, bool upper)
{
	if (page_bits == 12)
		return upper ? 2 : 0;
	if (page_bits == 14)
		return upper ? 1 : 2;
	return upper ? 3 : 1;
}

static void arm64_registers(struct run *r)
{
	struct arm64_ref_cpu *c = &r->g.arm64;

	c->sctlr = (one_in(r, 24) ? 0 : 1) | (one_in(r, 4) ? BIT(19) : 0) | (one_in(r, 2) ? BIT(57) : 0);
	c->tcr &= BIT(59);
	for (unsigned i = 0; i < 2; i++) {
		const struct half *h = &r->half[i];

		c->tcr |= (uint64_t)(64 - h->va_bits) << (i ? 16 : 0);
		c->tcr |= (uint64_t)granule_field(h->page_bits, i) << (i ? 30 : 14);
		c->tcr |= one_in(r, 3) ? BIT(37 + i) : 0;
		c->tcr |= one_in(r, 4) ? BIT(41 + i) : 0;
		c->tcr |= one_in(r, 24) ? BIT(i ? 23 : 7) : 0;
	}
	c->tcr |= (one_in(r, 5) ? below(r, 7) : r->wide ? 6 : 5) << 32;
	c->tcr |= (one_in(r, 4) ? 0 : BIT(39)) | (one_in(r, 4) ? 0 : BIT(40)) | (one_in(r, 2) ? BIT(22) : 0) |
		  (one_in(r, 2) ? BIT(36) : 0);
	arm64_mode(r);
	arm64_root(r);
}

/* The shape of both halves; the granule that the format is named after in one of them, mostly in both. */
static void arm64_shapes(struct run *r)
{
	static const unsigned page_bits[] = { 12, 14, 16 };
	unsigned other = one_in(r, 4) ? below(r, 3) : r->format - ARM_4K, swap = below(r, 2);
	bool ds = r->wide && !one_in(r, 4);

	r->g.arm64.tcr = ds ? BIT(59) : 0;
	for (unsigned i = 0; i < 2; i++) {
		unsigned bits = page_bits[i == swap ? r->format - ARM_4K : other];
		unsigned least = r->wide && (ds || bits == 16) ? 12 : 16, most = 39;
		struct half *h = &r->half[i];
		uint64_t align;

		if (r->g.arm64.ttst)
			most = bits == 16 ? 47 : 48;
		make_shape(r, h, bits, 8, 64 - (one_in(r, 3) ? least : least + below(r, most - least + 1)));
		h->upper = i;
		align = BIT(entries_log2(h, h->levels - 1) + 3);
		if (r->wide && align < 64)
			align = 64;
		h->root_offset = align < BIT(bits) ? align * below(r, BIT(bits) / align) : 0;
	}
}

static void new_roots(struct run *r)
{
	r->no_global = one_in(r, 2);
	for (unsigned space = 0; space < 2; space++)
		for (unsigned i = 0; i < r->halves; i++)
			r->root[space][i] =
				table_gpa(r, &r->half[i], table_of_level(r, &r->half[i], r->half[i].levels - 1));
}

/* Everything anew but the guest itself. */
static void new_registers(struct run *r)
{
	if (r->arm)
		arm64_shapes(r);
	new_roots(r);
	if (r->arm)
		arm64_registers(r);
	else
		x86_registers(r);
	fill_tables(r);
	set_regs(r);
	fg_flush(&r->g, KAGE_FLUSH_ALL, 0);
}

/* The other address space: without a flush, if nothing in the tables is global. */
static void switch_space(struct run *r)
{
	if (!paging(r))
		return;
	r->space ^= 1;
	if (r->arm)
		arm64_root(r);
	else
		x86_root(r);
	set_regs(r);
	if (!r->no_global)
		fg_flush(&r->g, KAGE_FLUSH_ALL, 0);
}

/* -- steps ---------------------------------------------------------------- */

static enum fg_access random_access(struct run *r)
{
	return (enum fg_access)below(r, 3);
}

static void access_once(struct run *r, uint64_t va)
{
	enum fg_access access = random_access(r);
	const struct half *h = &r->half[below(r, r->halves)];
	uint64_t value = rng_next(&r->rng), gpa;

	/* stores that happen to hit a table mostly leave something that looks like an entry */
	if (!one_in(r, 4))
		value = new_entry(r, h, below(r, h->levels));
	if (h->entry_bytes == 4)
		value |= new_entry(r, h, below(r, h->levels)) << 32;
	if (fg_do(&r->g, va, access, value, &gpa) && access == FG_WRITE && in_tables(gpa)) {
		r->table_stores++;
		flush_all(r);
	}
}

static void translate_once(struct run *r, uint64_t va)
{
	enum fg_access access = random_access(r);

	if (!r->arm && access != FG_FETCH && one_in(r, 4))
		access = access == FG_READ ? FG_IMPLICIT_READ : FG_IMPLICIT_WRITE;
	fg_translate(&r->g, va, access);
}

/* One entry changes. A flush of one page makes that page exact at once; the others follow with all. */
static void mutate(struct run *r)
{
	struct half *h = &r->half[below(r, r->halves)];
	unsigned table = below(r, TABLES);
	uint64_t gpa = slot_gpa(r, h, table, below(r, VAS)), e = 0, va;

	memcpy(&e, fg_memory(&r->g, gpa), h->entry_bytes);
	if (one_in(r, 2))
		e = new_entry(r, h, table_level(h, table));
	else
		e ^= BIT(below(r, 12));
	if (r->no_global && !r->arm)
		e &= ~(uint64_t)0x100;
	else if (r->no_global)
		e |= BIT(11);
	fg_write(&r->g, gpa, e, h->entry_bytes);
	if (one_in(r, 3)) {
		va = random_va(r, h);
		fg_flush(&r->g, KAGE_FLUSH_PAGE, va);
		access_once(r, va);
	}
	flush_all(r);
}

/* Without translation: addresses are those of memory, or close to it. */
static uint64_t flat_va(struct run *r)
{
	uint64_t va = page_address(r, &r->half[0]) & ~(uint64_t)7;

	if (!r->arm)
		return r->format >= X86_4 ? va : va & 0xffffffff;
	return one_in(r, 8) ? va | BIT(40 + below(r, 24)) : va;
}

static void one_step(struct run *r)
{
	unsigned what = below(r, 200);
	uint64_t va;

	if (what < 1) {
		new_registers(r);
	} else if (what < 14) {
		if (r->arm)
			arm64_mode(r);
		else
			x86_mode(r);
		set_regs(r);
	} else if (what < 20) {
		switch_space(r);
	} else if (what < 36) {
		mutate(r);
	}
	va = paging(r) ? any_va(r) : flat_va(r);
	if (one_in(r, 3))
		translate_once(r, va);
	access_once(r, va);
}

/* The clone has what the guest had when it was made. */
static void end_clone(struct run *r)
{
	static uint8_t now[CLONE_LEN];

	if (!r->clone)
		return;
	fg_require(&r->g, !kage_vm_read(r->clone, CLONE_GPA, now, CLONE_LEN), "kage_vm_read of the clone");
	fg_require(&r->g, !memcmp(now, r->before, CLONE_LEN), "the clone has changed");
	fg_require(&r->g, !kage_vm_destroy(r->clone), "kage_vm_destroy of the clone");
	free(r->before);
	r->clone = NULL;
}

/* From here on tables and pages are shared: stores, access flags and dirty state break the sharing. */
static void new_clone(struct run *r)
{
	end_clone(r);
	fg_require(&r->g, !kage_vm_clone(r->g.vm, NULL, &r->clone), "kage_vm_clone");
	r->before = malloc(CLONE_LEN);
	fg_require(&r->g, r->before, "no memory");
	memcpy(r->before, fg_memory(&r->g, CLONE_GPA), CLONE_LEN);
}

/* -- sequences ------------------------------------------------------------ */

static struct fg_config arm64_config(struct run *r, struct arm64_ref_cpu *c)
{
	static const unsigned pa_bits[] = { 32, 36, 40, 42, 44, 48 };
	struct fg_config config = { .arch = KAGE_ARCH_ARM64 };

	*c = (struct arm64_ref_cpu){
		.pa_bits = r->wide ? 52 : pa_bits[below(r, 6)],
		.haf = !one_in(r, 8), .pan = !one_in(r, 8), .epan = !one_in(r, 4), .hpds = !one_in(r, 8),
		.ttst = !one_in(r, 4), .gran16 = true, .gran64 = true, .lva = r->wide, .lpa = r->wide, .lpa2 = r->wide,
	};
	c->hd = c->haf && !one_in(r, 8);
	c->epan = c->epan && c->pan;
	config.phys_bits = c->pa_bits;
	config.high_bit = c->pa_bits - 1;
	config.features = KAGE_ARM64_GRAN16 | KAGE_ARM64_GRAN64 | KAGE_ARM64_ASID16 | (c->haf ? KAGE_ARM64_HAF : 0) |
			  (c->hd ? KAGE_ARM64_HD : 0) | (c->pan ? KAGE_ARM64_PAN : 0) |
			  (c->epan ? KAGE_ARM64_EPAN : 0) | (c->hpds ? KAGE_ARM64_HPDS : 0) |
			  (c->ttst ? KAGE_ARM64_TTST : 0) |
			  (r->wide ? KAGE_ARM64_LVA | KAGE_ARM64_LPA | KAGE_ARM64_LPA2 : 0);
	return config;
}

static struct fg_config x86_config(struct run *r, struct ref_cpu *c)
{
	static const unsigned pa_bits[] = { 36, 40, 46, 52 };
	struct fg_config config = { .arch = KAGE_ARCH_X86, .phys_bits = pa_bits[below(r, 4)] };

	*c = (struct ref_cpu){ .phys_bits = config.phys_bits, .page1gb = one_in(r, 2) };
	config.high_bit = config.phys_bits - 1;
	if (r->format == X86_32) /* what PSE-36 reaches, or what every entry does */
		config.high_bit = one_in(r, 2) ? 31 : config.high_bit > 39 ? 39 : config.high_bit;
	config.features = KAGE_X86_NX | KAGE_X86_SMEP | KAGE_X86_SMAP | KAGE_X86_PCID | KAGE_X86_LA57 | KAGE_X86_PKU |
			  (c->page1gb ? KAGE_X86_PAGE1GB : 0);
	return config;
}

static void x86_shape(struct run *r)
{
	static const unsigned va_bits[] = { [X86_32] = 32, [X86_PAE] = 32, [X86_4] = 48, [X86_5] = 57 };

	make_shape(r, &r->half[0], 12, r->format == X86_32 ? 4 : 8, va_bits[r->format]);
	if (r->format != X86_PAE)
		return;
	for (unsigned i = 0; i < VAS; i++)
		r->half[0].index[i][2] = i & 3; /* all four PDPTEs */
	r->half[0].root_offset = 32 * below(r, 128);
}

static void begin(struct run *r, unsigned format, uint64_t seed)
{
	struct arm64_ref_cpu arm64 = { 0 };
	struct ref_cpu x86 = { 0 };
	struct fg_config config;

	*r = (struct run){ .rng = rng_seed(seed), .seed = seed, .format = format % ARM_WIDE,
			   .wide = format >= ARM_WIDE };
	r->arm = r->format >= ARM_4K;
	r->halves = r->arm ? 2 : 1;
	config = r->arm ? arm64_config(r, &arm64) : x86_config(r, &x86);
	fg_create(&r->g, &config);
	r->g.arm64 = arm64;
	r->g.x86 = x86;
	if (!r->arm)
		x86_shape(r);
}

struct total {
	unsigned long translations, granted, faults, mmio, outside, flags_set, table_stores;
	uint64_t kinds;
};

static void one_sequence(const struct fg_case *c, uint64_t seed, uint64_t steps, struct total *t)
{
	struct run r;

	begin(&r, c->arg, seed);
	snprintf(r.g.about, sizeof(r.g.about), "%s seed %llu: at the start", c->name, (unsigned long long)seed);
	new_registers(&r);
	while (r.g.count.translations < steps) {
		snprintf(r.g.about, sizeof(r.g.about),
			 "%s seed %llu step %llu; again: KAGE_FORMAT=%s KAGE_SEED=%llu KAGE_SEQUENCES=1", c->name,
			 (unsigned long long)seed, (unsigned long long)r.step, c->name, (unsigned long long)seed);
		one_step(&r);
		if (++r.step % AUDIT_EVERY == 0)
			fg_audit(&r.g);
		if (r.step % CLONE_EVERY == 0)
			new_clone(&r);
	}
	end_clone(&r);
	fg_compare_all(&r.g);
	fg_audit(&r.g);
	t->translations += r.g.count.translations;
	t->granted += r.g.count.granted;
	t->faults += r.g.count.faults;
	t->mmio += r.g.count.mmio;
	t->outside += r.g.count.outside;
	t->flags_set += r.g.count.flags_set;
	t->table_stores += r.table_stores;
	t->kinds |= r.g.count.fault_kinds;
	fg_destroy(&r.g);
}

static void run_format(const struct fg_case *c)
{
	uint64_t seed = env_number("KAGE_SEED", 1), sequences = env_number("KAGE_SEQUENCES", 25);
	uint64_t steps = env_number("KAGE_STEPS", 4000);
	struct total t = { 0 };
	unsigned kinds;

	for (uint64_t i = 0; i < sequences; i++)
		one_sequence(c, seed + i, steps, &t);
	kinds = (unsigned)__builtin_popcountll(t.kinds);
	printf("%s: %lu translations (seeds %llu to %llu): %lu granted, %lu faults of %u kinds, %lu MMIO, %lu with a "
	       "table outside memory, %lu entries updated, %lu stores into tables\n",
	       c->name, t.translations, (unsigned long long)seed, (unsigned long long)(seed + sequences - 1), t.granted,
	       t.faults, kinds, t.mmio, t.outside, t.flags_set, t.table_stores);
	/* a sample in which nearly all is alike would show nothing */
	if (sequences * steps >= 50000 && (t.granted < t.translations / 8 || t.faults < t.translations / 8 ||
					   t.mmio < t.translations / 200 || kinds < 8 || t.flags_set < 1000 ||
					   t.table_stores < 200 || !t.outside)) {
		fprintf(stderr, "%s: the sample is too one-sided\n", c->name);
		exit(EXIT_FAILURE);
	}
}

int main(void)
{
	static const struct fg_case formats[] = {
		{ "x86-32bit", run_format, X86_32 },
		{ "x86-pae", run_format, X86_PAE },
		{ "x86-4level", run_format, X86_4 },
		{ "x86-5level", run_format, X86_5 },
		{ "arm64-4k", run_format, ARM_4K },
		{ "arm64-16k", run_format, ARM_16K },
		{ "arm64-64k", run_format, ARM_64K },
		{ "arm64-4k-52bit", run_format, ARM_4K | ARM_WIDE },
		{ "arm64-16k-52bit", run_format, ARM_16K | ARM_WIDE },
		{ "arm64-64k-52bit", run_format, ARM_64K | ARM_WIDE },
	};

	return fg_run_cases("random tables", formats, sizeof(formats) / sizeof(formats[0]));
}
