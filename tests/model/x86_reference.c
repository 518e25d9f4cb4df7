/* SPDX-License-Identifier: MIT */
/*
 * The reference walk. Everything is spelled out where it happens, level after
 * level, with bit numbers as the manual prints them; nothing is shared between
 * levels that the manual describes apart. Slow and plain on purpose: it is
 * what the engine is checked against.
 *
 * Sources: Intel SDM vol. 3A, 4.3 (32-bit paging, tables 4-3 to 4-6), 4.4 (PAE,
 * tables 4-7 to 4-11), 4.5.4 (4-level and 5-level, tables 4-15 to 4-20), 4.6
 * (access rights), 4.7 (error codes), 4.8 (accessed and dirty flags); vol. 1,
 * 3.3.7.1 (canonical addresses).
 */
#include "x86_reference.h"

#define BIT(n) (UINT64_C(1) << (n))

struct walk {
	const struct ref_cpu *cpu;
	const struct ref_memory *mem;
	enum ref_access access;
	uint64_t where[5], value[5]; /* entries used, in the order of use; the PDPTEs of PAE are not among them */
	int used;
	unsigned entry_bytes;
	bool all_writable, all_user, any_xd;
	struct ref_result result;
};

static bool canonical(uint64_t a, bool five)
{
	uint64_t top = five ? a >> 56 : a >> 47;

	return top == 0 || top == (five ? 0xff : 0x1ffff);
}

static bool long_mode(const struct ref_cpu *cpu)
{
	return cpu->efer & BIT(10);
}

/* XD exists with PAE, 4-level and 5-level paging. */
static bool xd_enabled(const struct ref_cpu *cpu)
{
	return (cpu->efer & BIT(11)) && (cpu->cr4 & BIT(5));
}

static bool supervisor_mode(const struct walk *w)
{
	return w->cpu->implicit || w->cpu->cpl < 3;
}

/* 4.7: the bits that follow from the access and the mode alone. */
static uint32_t error_code(const struct walk *w, bool present, bool reserved)
{
	bool nxe = xd_enabled(w->cpu), smep = w->cpu->cr4 & BIT(20);
	uint32_t e = 0;

	if (present)
		e |= 1;
	if (w->access == REF_WRITE)
		e |= 2;
	if (!supervisor_mode(w))
		e |= 4;
	if (reserved)
		e |= 8;
	if (w->access == REF_FETCH && (nxe || smep))
		e |= 16;
	return e;
}

static bool page_fault(struct walk *w, uint32_t error)
{
	w->result.outcome = REF_PAGE_FAULT;
	w->result.error = error;
	return false;
}

/* Entries of 32-bit paging have four bytes, and no XD. */
static bool read_entry(const struct walk *w, uint64_t where, uint64_t *e)
{
	uint64_t both;

	if (w->entry_bytes == 8)
		return w->mem->read(w->mem->arg, where, e);
	if (!w->mem->read(w->mem->arg, where & ~UINT64_C(7), &both))
		return false;
	*e = where & 4 ? both >> 32 : both & 0xffffffff;
	return true;
}

static void write_entry(const struct walk *w, uint64_t where, uint64_t e)
{
	uint64_t both;

	if (w->entry_bytes == 8) {
		w->mem->write(w->mem->arg, where, e);
	} else if (w->mem->read(w->mem->arg, where & ~UINT64_C(7), &both)) {
		both = where & 4 ? (both & 0xffffffff) | e << 32 : (both & 0xffffffff00000000) | e;
		w->mem->write(w->mem->arg, where & ~UINT64_C(7), both);
	}
}

/* Reads an entry; false ends the walk. */
static bool use_entry(struct walk *w, unsigned level, uint64_t where, uint64_t *e)
{
	w->result.level = level;
	if (!read_entry(w, where, e)) {
		w->result.outcome = REF_NO_MEMORY;
		w->result.gpa = where;
		return false;
	}
	if ((*e & BIT(0)) == 0)
		return page_fault(w, error_code(w, false, false));
	w->where[w->used] = where;
	w->value[w->used] = *e;
	w->used++;
	w->all_writable = w->all_writable && (*e & BIT(1));
	w->all_user = w->all_user && (*e & BIT(2));
	w->any_xd = w->any_xd || (*e & BIT(63));
	return true;
}

/* Reserved at every level: bit 63 without NXE, address bits above MAXPHYADDR; `more` is the level's own. */
static bool no_reserved(struct walk *w, uint64_t e, uint64_t more)
{
	for (unsigned bit = w->cpu->phys_bits; bit <= 51; bit++)
		more |= BIT(bit);
	if (!(w->cpu->efer & BIT(11)))
		more |= BIT(63);
	if (e & more)
		return page_fault(w, error_code(w, true, true));
	return true;
}

/* 32-bit paging, 4.3. */
static bool find_page_32bit(struct walk *w, uint64_t a, uint64_t *leaf)
{
	uint64_t table = w->cpu->cr3 & 0xfffff000, e;
	unsigned m = w->cpu->phys_bits < 40 ? w->cpu->phys_bits : 40;

	if (!use_entry(w, 1, table + 4 * ((a >> 22) & 1023), &e))
		return false;
	if ((e & BIT(7)) && (w->cpu->cr4 & BIT(4))) {
		/* a 4 MiB page: bits 20:13 are address bits 39:32, of which M - 32 exist; bit 21 is nothing */
		for (unsigned bit = m - 19; bit <= 21; bit++)
			if (e & BIT(bit))
				return page_fault(w, error_code(w, true, true));
		w->result.size = 22;
		w->result.gpa = ((e >> 13) & 0xff) << 32 | (e & 0xffc00000) | (a & 0x3fffff);
		*leaf = e;
		return true;
	}
	table = e & 0xfffff000;

	if (!use_entry(w, 0, table + 4 * ((a >> 12) & 1023), &e))
		return false;
	w->result.size = 12;
	w->result.gpa = (e & 0xfffff000) | (a & 0xfff);
	*leaf = e;
	return true;
}

/* PAE paging, 4.4.2. Bits 62:52 are reserved here; PDPTEs grant everything and have been checked when loaded. */
static bool find_page_pae(struct walk *w, uint64_t a, uint64_t *leaf)
{
	uint64_t pdpte = w->cpu->pdpte[(a >> 30) & 3], table, e;

	w->result.level = 2;
	if (!(pdpte & BIT(0)))
		return page_fault(w, error_code(w, false, false));
	table = pdpte & 0x000ffffffffff000;

	if (!use_entry(w, 1, table + 8 * ((a >> 21) & 511), &e))
		return false;
	if (e & BIT(7)) {
		if (!no_reserved(w, e, 0x7ff0000000000000 | 0x001fe000))
			return false;
		w->result.size = 21;
		w->result.gpa = (e & 0x000fffffffe00000) | (a & 0x1fffff);
		*leaf = e;
		return true;
	}
	if (!no_reserved(w, e, 0x7ff0000000000000))
		return false;
	table = e & 0x000ffffffffff000;

	if (!use_entry(w, 0, table + 8 * ((a >> 12) & 511), &e) || !no_reserved(w, e, 0x7ff0000000000000))
		return false;
	w->result.size = 12;
	w->result.gpa = (e & 0x000ffffffffff000) | (a & 0xfff);
	*leaf = e;
	return true;
}

bool ref_load_pdptes(struct ref_cpu *cpu, const struct ref_memory *mem)
{
	uint64_t e[4];

	for (unsigned i = 0; i < 4; i++) {
		if (!mem->read(mem->arg, (cpu->cr3 & 0xffffffe0) + 8 * i, &e[i]))
			return false;
		/* present, and one of the bits 2:1, 8:5 and 63:M */
		if ((e[i] & 1) && ((e[i] & 0x1e6) || e[i] >> cpu->phys_bits))
			return false;
	}
	for (unsigned i = 0; i < 4; i++)
		cpu->pdpte[i] = e[i];
	return true;
}

/* Walks to the entry that maps the page, 4-level and 5-level. False: `result` says why not. */
static bool find_page(struct walk *w, uint64_t a, uint64_t *leaf)
{
	uint64_t table = w->cpu->cr3 & 0x000ffffffffff000, e;

	if (w->cpu->cr4 & BIT(12)) {
		if (!use_entry(w, 4, table + 8 * ((a >> 48) & 511), &e) || !no_reserved(w, e, BIT(7)))
			return false;
		table = e & 0x000ffffffffff000;
	}

	if (!use_entry(w, 3, table + 8 * ((a >> 39) & 511), &e) || !no_reserved(w, e, BIT(7)))
		return false;
	table = e & 0x000ffffffffff000;

	if (!use_entry(w, 2, table + 8 * ((a >> 30) & 511), &e))
		return false;
	if (e & BIT(7)) {
		if (!no_reserved(w, e, w->cpu->page1gb ? 0x3fffe000 : BIT(7)))
			return false;
		w->result.size = 30;
		w->result.gpa = (e & 0x000fffffc0000000) | (a & 0x3fffffff);
		*leaf = e;
		return true;
	}
	if (!no_reserved(w, e, 0))
		return false;
	table = e & 0x000ffffffffff000;

	if (!use_entry(w, 1, table + 8 * ((a >> 21) & 511), &e))
		return false;
	if (e & BIT(7)) {
		if (!no_reserved(w, e, 0x001fe000))
			return false;
		w->result.size = 21;
		w->result.gpa = (e & 0x000fffffffe00000) | (a & 0x1fffff);
		*leaf = e;
		return true;
	}
	if (!no_reserved(w, e, 0))
		return false;
	table = e & 0x000ffffffffff000;

	if (!use_entry(w, 0, table + 8 * ((a >> 12) & 511), &e) || !no_reserved(w, e, 0))
		return false;
	w->result.size = 12;
	w->result.gpa = (e & 0x000ffffffffff000) | (a & 0xfff);
	*leaf = e;
	return true;
}

/* 4.6.1, for each kind of access in the manual's order; protection keys apart. */
static bool rights(const struct walk *w)
{
	bool wp = w->cpu->cr0 & BIT(16), smep = w->cpu->cr4 & BIT(20), smap = w->cpu->cr4 & BIT(21);
	bool nxe = xd_enabled(w->cpu), ac = w->cpu->rflags & BIT(18);
	bool smap_lets_in = !smap || (ac && !w->cpu->implicit);

	if (supervisor_mode(w)) {
		switch (w->access) {
		case REF_READ:
			return !w->all_user || smap_lets_in;
		case REF_WRITE:
			if (!w->all_user)
				return !wp || w->all_writable;
			if (!wp)
				return smap_lets_in;
			return w->all_writable && smap_lets_in;
		case REF_FETCH:
			if (w->all_user && smep)
				return false;
			return !nxe || !w->any_xd;
		}
	}
	switch (w->access) {
	case REF_READ:
		return w->all_user;
	case REF_WRITE:
		return w->all_user && w->all_writable;
	case REF_FETCH:
		return w->all_user && (!nxe || !w->any_xd);
	}
	return false;
}

/* 4.6.2 and the PK bit of 4.7, which is set whatever else forbids the access. */
static bool key_lets_in(const struct walk *w, uint64_t leaf)
{
	unsigned key = (leaf >> 59) & 15;
	bool ad = (w->cpu->pkru >> (2 * key)) & 1, wd = (w->cpu->pkru >> (2 * key + 1)) & 1;

	if (!long_mode(w->cpu) || !(w->cpu->cr4 & BIT(22)) || w->access == REF_FETCH || !w->all_user)
		return true;
	if (ad)
		return false;
	if (wd && w->access == REF_WRITE) {
		if (!supervisor_mode(w))
			return false;
		if (w->cpu->cr0 & BIT(16))
			return false;
	}
	return true;
}

/* 4.8. A flag that is set already is not written. */
static void set_flags(const struct walk *w)
{
	if (!w->mem->write)
		return;
	for (int i = 0; i < w->used; i++) {
		uint64_t v = w->value[i] | BIT(5);

		if (i == w->used - 1 && w->access == REF_WRITE)
			v |= BIT(6);
		if (v != w->value[i])
			write_entry(w, w->where[i], v);
	}
}

struct ref_result ref_translate(const struct ref_cpu *cpu, const struct ref_memory *mem, uint64_t linear,
				enum ref_access access)
{
	struct walk w = { .cpu = cpu, .mem = mem, .access = access, .all_writable = true, .all_user = true,
			  .entry_bytes = 8 };
	uint64_t leaf;
	bool found;

	if (!(cpu->cr0 & BIT(31))) {
		w.result.gpa = linear;
		w.result.size = 12;
		return w.result;
	}
	if (!long_mode(cpu)) {
		if (!(cpu->cr4 & BIT(5)))
			w.entry_bytes = 4;
		found = w.entry_bytes == 4 ? find_page_32bit(&w, linear, &leaf) : find_page_pae(&w, linear, &leaf);
	} else if (canonical(linear, cpu->cr4 & BIT(12))) {
		found = find_page(&w, linear, &leaf);
	} else {
		w.result.outcome = REF_NOT_CANONICAL;
		return w.result;
	}
	if (!found)
		return w.result;
	if (!rights(&w) || !key_lets_in(&w, leaf)) {
		w.result.gpa = 0;
		page_fault(&w, error_code(&w, true, false) | (key_lets_in(&w, leaf) ? 0 : 32));
		return w.result;
	}
	set_flags(&w);
	return w.result;
}
