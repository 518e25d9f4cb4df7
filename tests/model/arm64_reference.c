/* SPDX-License-Identifier: MIT */
/*
 * The reference walk. Plain on purpose: what differs between granules is
 * written out for each of them, with bit numbers as the manual prints them.
 *
 * Sources in DDI 0487: D8.2 (address ranges, granules, start levels), D8.3
 * (descriptor formats), D8.4 (permissions, access flag, dirty state), D8.9 and
 * D24.2.40 (fault status codes); the order of the checks is that of the
 * shared pseudocode AArch64.S1Walk and AArch64.S1Translate.
 */
#include "arm64_reference.h"

#define BIT(n) (UINT64_C(1) << (n))

enum granule { K4, K16, K64 };

/* Fault status codes without the level, D24.2.40. */
enum { ADDRESS_SIZE = 0x00, TRANSLATION = 0x04, ACCESS_FLAG = 0x08, PERMISSION = 0x0c };

struct walk {
	const struct arm64_ref_cpu *cpu;
	const struct ref_memory *mem;
	enum arm64_ref_access access;
	uint64_t va;
	bool upper;       /* TTBR1's half */
	bool tbi, ds, ha, hd, hpd;
	enum granule granule;
	unsigned ia_bits; /* bits of the input address: 64 - TxSZ */
	unsigned oa_bits;
	int level;
	/* of all table descriptors so far */
	bool table_no_el0, table_read_only, table_uxn, table_pxn;
	struct arm64_ref_result result;
};

static uint64_t bits(uint64_t v, unsigned high, unsigned low)
{
	return (v >> low) & ((high - low == 63 ? 0 : BIT(high - low + 1)) - 1);
}

static bool at_el0(const struct walk *w)
{
	return bits(w->cpu->pstate, 3, 2) == 0;
}

/* Ends the walk. */
static bool fault(struct walk *w, unsigned code, int level)
{
	bool fetch = w->access == ARM64_REF_FETCH;

	w->result.outcome = ARM64_REF_ABORT;
	w->result.level = level;
	w->result.gpa = 0;
	w->result.size = 0;
	if (fetch)
		w->result.ec = at_el0(w) ? 0x20 : 0x21;
	else
		w->result.ec = at_el0(w) ? 0x24 : 0x25;
	if (level >= 0)
		w->result.iss = code | level;
	else
		w->result.iss = code == TRANSLATION ? 0x2b : 0x29; /* level -1: these two only */
	if (w->access == ARM64_REF_WRITE)
		w->result.iss |= BIT(6);
	return false;
}

/* The lowest address bit that the index of a level's table is taken from. */
static unsigned shift_of(enum granule g, int level)
{
	switch (g) {
	case K4:
		return level == -1 ? 48 : level == 0 ? 39 : level == 1 ? 30 : level == 2 ? 21 : 12;
	case K16:
		return level == 0 ? 47 : level == 1 ? 36 : level == 2 ? 25 : 14;
	default:
		return level == 1 ? 42 : level == 2 ? 29 : 16;
	}
}

static unsigned index_bits(enum granule g)
{
	return g == K4 ? 9 : g == K16 ? 11 : 13;
}

static int top_level(enum granule g)
{
	return g == K4 ? -1 : g == K16 ? 0 : 1;
}

/* -- the registers -------------------------------------------------------- */

static void read_controls(struct walk *w)
{
	uint64_t tcr = w->cpu->tcr;
	unsigned tg;

	w->upper = w->va & BIT(55);
	w->tbi = tcr & (w->upper ? BIT(38) : BIT(37));
	w->hpd = w->cpu->hpds && (tcr & (w->upper ? BIT(42) : BIT(41)));
	w->ia_bits = 64 - (w->upper ? bits(tcr, 21, 16) : bits(tcr, 5, 0));
	if (w->upper) { /* TG1 and TG0 have different encodings */
		tg = bits(tcr, 31, 30);
		w->granule = tg == 1 ? K16 : tg == 3 ? K64 : K4;
	} else {
		tg = bits(tcr, 15, 14);
		w->granule = tg == 2 ? K16 : tg == 1 ? K64 : K4;
	}
	/* TGn that names no granule the CPU has: the manual leaves open which it is then */
	if ((w->granule == K16 && !w->cpu->gran16) || (w->granule == K64 && !w->cpu->gran64))
		w->granule = K4;
	w->ds = w->cpu->lpa2 && w->granule != K64 && (tcr & BIT(59));
	w->ha = w->cpu->haf && (tcr & BIT(39));
	w->hd = w->cpu->hd && w->ha && (tcr & BIT(40));
}

/* TCR_EL1.IPS, no more than the CPU has, and 48 where descriptors hold no more. */
static unsigned output_bits(const struct walk *w)
{
	static const unsigned ips[8] = { 32, 36, 40, 42, 44, 48, 52, 52 };
	unsigned n = ips[bits(w->cpu->tcr, 34, 32)];

	if (n > w->cpu->pa_bits)
		n = w->cpu->pa_bits;
	if (n > 48 && !w->ds && !(w->granule == K64 && w->cpu->lpa))
		n = 48;
	return n;
}

static bool too_large(const struct walk *w, uint64_t address)
{
	return address >> w->oa_bits;
}

/* Is TxSZ one that this granule can have? */
static bool size_is_valid(const struct walk *w)
{
	unsigned txsz = 64 - w->ia_bits, least = 16, most = 39;

	if (w->ds || (w->granule == K64 && w->cpu->lva))
		least = 12;
	if (w->cpu->ttst)
		most = w->granule == K64 ? 47 : 48;
	return txsz >= least && txsz <= most;
}

/* All bits above the input address, up to bit 63 or with top byte ignored bit 55, must say which half it is. */
static bool address_is_valid(const struct walk *w)
{
	unsigned top = w->tbi ? 55 : 63;

	for (unsigned bit = w->ia_bits; bit <= top; bit++)
		if (!!(w->va & BIT(bit)) != w->upper)
			return false;
	return true;
}

static uint64_t root_table(const struct walk *w, unsigned entries_log2)
{
	uint64_t ttbr = w->upper ? w->cpu->ttbr1 : w->cpu->ttbr0, base;
	unsigned align = entries_log2 + 3;

	/* IPS 7 is reserved and behaves as 6 (D24.2.131, TCR_EL1.IPS) */
	if (w->ds || (w->granule == K64 && w->cpu->lpa && bits(w->cpu->tcr, 34, 32) >= 6)) {
		base = bits(ttbr, 47, 6) << 6 | bits(ttbr, 5, 2) << 48;
		if (align < 6)
			align = 6;
	} else {
		base = bits(ttbr, 47, 1) << 1;
	}
	return base & ~(BIT(align) - 1);
}

/* -- descriptors ---------------------------------------------------------- */

/* The address a descriptor holds, down to the bit where what it points to begins. */
static uint64_t output_address(const struct walk *w, uint64_t d, unsigned low)
{
	uint64_t a = bits(d, 47, low) << low;

	if (w->granule == K64 && w->cpu->lpa && w->cpu->pa_bits == 52)
		a |= bits(d, 15, 12) << 48;
	else if (w->ds)
		a |= bits(d, 49, 48) << 48 | bits(d, 9, 8) << 50;
	return a;
}

static bool block_allowed(const struct walk *w)
{
	switch (w->granule) {
	case K4:
		return w->level == 1 || w->level == 2 || (w->level == 0 && w->ds);
	case K16:
		return w->level == 2 || (w->level == 1 && w->ds);
	default:
		return w->level == 2 || (w->level == 1 && w->cpu->lpa && w->cpu->pa_bits == 52);
	}
}

static bool use_table(struct walk *w, uint64_t d, uint64_t *table)
{
	unsigned low = w->granule == K4 ? 12 : w->granule == K16 ? 14 : 16;

	*table = output_address(w, d, low);
	if (too_large(w, *table))
		return fault(w, ADDRESS_SIZE, w->level);
	if (!w->hpd) {
		w->table_pxn = w->table_pxn || (d & BIT(59));
		w->table_uxn = w->table_uxn || (d & BIT(60));
		w->table_no_el0 = w->table_no_el0 || (d & BIT(61));
		w->table_read_only = w->table_read_only || (d & BIT(62));
	}
	return true;
}

/* Walks to the descriptor that maps the address. */
static bool find_page(struct walk *w, uint64_t *where, uint64_t *d)
{
	unsigned n, shift;
	uint64_t table;

	w->level = top_level(w->granule);
	while (shift_of(w->granule, w->level) >= w->ia_bits)
		w->level++;
	n = w->ia_bits - shift_of(w->granule, w->level);
	table = root_table(w, n);
	if (too_large(w, table))
		return fault(w, ADDRESS_SIZE, 0);

	for (;;) {
		shift = shift_of(w->granule, w->level);
		*where = table + 8 * bits(w->va, shift + n - 1, shift);
		w->result.level = w->level;
		if (!w->mem->read(w->mem->arg, *where, d)) {
			w->result.outcome = ARM64_REF_NO_MEMORY;
			w->result.gpa = *where;
			return false;
		}
		switch (bits(*d, 1, 0)) {
		case 1:
			if (w->level == 3 || !block_allowed(w))
				return fault(w, TRANSLATION, w->level);
			goto page;
		case 3:
			if (w->level == 3)
				goto page;
			if (!use_table(w, *d, &table))
				return false;
			break;
		default:
			return fault(w, TRANSLATION, w->level);
		}
		w->level++;
		n = index_bits(w->granule);
	}
page:
	w->result.gpa = output_address(w, *d, shift);
	if (too_large(w, w->result.gpa))
		return fault(w, ADDRESS_SIZE, w->level);
	w->result.gpa |= w->va & (BIT(shift) - 1);
	w->result.size = shift;
	if (!(*d & BIT(10)) && !w->ha)
		return fault(w, ACCESS_FLAG, w->level);
	return true;
}

/* -- permissions ---------------------------------------------------------- */

/* D8.4.1; `d` is the descriptor of the page or block. */
static bool permitted(const struct walk *w, uint64_t d)
{
	bool wxn = w->cpu->sctlr & BIT(19), epan = w->cpu->epan && (w->cpu->sctlr & BIT(57));
	bool pan = w->cpu->pan && (w->cpu->pstate & BIT(22));
	bool el0 = d & BIT(6), read_only = d & BIT(7);
	bool priv_write, user_read, user_write, user_exec, priv_exec;

	/* writable, clean: as if it were writable already (D8.4.7) */
	if (w->hd && (d & BIT(51)))
		read_only = false;
	if (w->table_no_el0)
		el0 = false;
	if (w->table_read_only)
		read_only = true;

	priv_write = !read_only;
	user_read = el0;
	user_write = el0 && !read_only;
	user_exec = !(d & BIT(54)) && !w->table_uxn && !(wxn && user_write);
	priv_exec = !(d & BIT(53)) && !w->table_pxn && !(wxn && priv_write) && !user_write;

	if (at_el0(w)) {
		switch (w->access) {
		case ARM64_REF_READ: return user_read;
		case ARM64_REF_WRITE: return user_write;
		case ARM64_REF_FETCH: return user_exec;
		}
	}
	if (w->access == ARM64_REF_FETCH)
		return priv_exec;
	if (pan && (user_read || user_write))
		return false;
	if (pan && epan && user_exec)
		return false;
	return w->access == ARM64_REF_READ || priv_write;
}

/* Access flag and dirty state, for an access that goes ahead. */
static void set_flags(const struct walk *w, uint64_t where, uint64_t d)
{
	uint64_t v = d;

	if (!w->mem->write)
		return;
	if (w->ha)
		v |= BIT(10);
	if (w->hd && (d & BIT(51)) && w->access == ARM64_REF_WRITE)
		v &= ~BIT(7);
	if (v != d)
		w->mem->write(w->mem->arg, where, v);
}

/* SCTLR_EL1.M clear: addresses are physical ones; what the CPU does not have is an address size fault, level 0. */
static void untranslated(struct walk *w)
{
	uint64_t a = w->tbi ? bits(w->va, 55, 0) : w->va;

	if (a >> w->cpu->pa_bits) {
		fault(w, ADDRESS_SIZE, 0);
		return;
	}
	w->result.gpa = a;
	w->result.size = 12;
	w->result.level = 3;
}

struct arm64_ref_result arm64_ref_translate(const struct arm64_ref_cpu *cpu, const struct ref_memory *mem, uint64_t va,
					    enum arm64_ref_access access)
{
	struct walk w = { .cpu = cpu, .mem = mem, .access = access, .va = va };
	uint64_t where = 0, d = 0;

	read_controls(&w);
	w.oa_bits = output_bits(&w);
	if (!(cpu->sctlr & BIT(0))) {
		untranslated(&w);
		return w.result;
	}
	if (!size_is_valid(&w) || !address_is_valid(&w) || (cpu->tcr & (w.upper ? BIT(23) : BIT(7)))) {
		fault(&w, TRANSLATION, 0);
		return w.result;
	}
	if (!find_page(&w, &where, &d))
		return w.result;
	if (!permitted(&w, d)) {
		fault(&w, PERMISSION, w.level);
		w.result.af_open = w.ha && !(d & BIT(10));
		return w.result;
	}
	set_flags(&w, where, d);
	return w.result;
}
