/* SPDX-License-Identifier: MIT */
/*
 * x86-64 guest tables, 4 and 5 levels, read only. Intel SDM vol. 3A, 4.5
 * ("4-level paging and 5-level paging"), tables 4-14 to 4-20.
 *
 * Invariants:
 *  X1  a clear P bit makes an entry PT_NONE whatever else it holds.
 *  X2  a present entry with a reserved bit is PT_RESERVED: bits 51:phys_bits
 *      always; bit 63 unless EFER.NXE; PS in PML5E and PML4E, and in a PDPTE
 *      of a CPU without 1 GiB pages; the address bits below a large page's
 *      size, except bit 12, which is PAT there.
 *  X3  bit 7 of a PTE is PAT, never PS. D, G and the protection key count in
 *      entries that map a page, and are ignored in others.
 *
 * Locks: none; entries are values here.
 */
#include "pt/pt.h"

#define X86_P ((uint64_t)1 << 0)
#define X86_RW ((uint64_t)1 << 1)
#define X86_US ((uint64_t)1 << 2)
#define X86_A ((uint64_t)1 << 5)
#define X86_D ((uint64_t)1 << 6)
#define X86_PS ((uint64_t)1 << 7)
#define X86_G ((uint64_t)1 << 8)
#define X86_PKEY_SHIFT 59
#define X86_XD ((uint64_t)1 << 63)
#define X86_ADDR_BITS 52

/* Bits lo to hi-1. */
static uint64_t bit_range(unsigned lo, unsigned hi)
{
	return (((uint64_t)1 << hi) - 1) & ~(((uint64_t)1 << lo) - 1);
}

static uint64_t reserved_bits(const struct pt_params *p)
{
	unsigned phys = p->phys_bits ? p->phys_bits : X86_ADDR_BITS;

	return bit_range(phys, X86_ADDR_BITS) | (p->nx ? 0 : X86_XD);
}

/* What the bits common to all entries say; `leaf`: the entry maps a page of 1 << shift bytes. */
static struct pt_decoded decode_bits(uint64_t e, bool leaf, unsigned shift, uint64_t reserved)
{
	struct pt_decoded d = { .state = leaf ? PT_LEAF : PT_TABLE };

	if (!(e & X86_P))
		return (struct pt_decoded){ .state = PT_NONE };
	if (e & reserved)
		d.state = PT_RESERVED;
	else
		d.addr = e & bit_range(shift, X86_ADDR_BITS);
	d.perm = KAGE_READ | (e & X86_RW ? KAGE_WRITE : 0) | (e & X86_XD ? 0 : KAGE_EXEC);
	d.user = e & X86_US;
	d.accessed = e & X86_A;
	if (leaf) {
		d.dirty = e & X86_D;
		d.global = e & X86_G;
		d.pkey = (e >> X86_PKEY_SHIFT) & 15;
	}
	return d;
}

static struct pt_decoded decode_large(uint64_t e, unsigned shift, uint64_t reserved)
{
	if (e & X86_PS)
		return decode_bits(e, true, shift, reserved | bit_range(PAGE_SHIFT + 1, shift));
	return decode_bits(e, false, PAGE_SHIFT, reserved);
}

static struct pt_decoded decode_pte(uint64_t e, const struct pt_params *p)
{
	return decode_bits(e, true, PAGE_SHIFT, reserved_bits(p));
}

static struct pt_decoded decode_pde(uint64_t e, const struct pt_params *p)
{
	return decode_large(e, 21, reserved_bits(p));
}

static struct pt_decoded decode_pdpte(uint64_t e, const struct pt_params *p)
{
	return decode_large(e, 30, reserved_bits(p) | (p->page1g ? 0 : X86_PS));
}

/* PML4E and PML5E. */
static struct pt_decoded decode_upper(uint64_t e, const struct pt_params *p)
{
	return decode_bits(e, false, PAGE_SHIFT, reserved_bits(p) | X86_PS);
}

#define X86_LEVELS                                                                         \
	{ 39, 9, false, decode_upper }, { 30, 9, true, decode_pdpte }, { 21, 9, true, decode_pde }, \
	{                                                                                  \
		12, 9, true, decode_pte                                                    \
	}

const struct pt_format pt_x86_4 = {
	.name = "x86-4level",
	.levels = 4,
	.entry_bytes = 8,
	.sign_extended = true,
	.level = { X86_LEVELS },
};

const struct pt_format pt_x86_5 = {
	.name = "x86-5level",
	.levels = 5,
	.entry_bytes = 8,
	.sign_extended = true,
	.level = { { 48, 9, false, decode_upper }, X86_LEVELS },
};
