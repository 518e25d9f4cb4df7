/* SPDX-License-Identifier: MIT */
/*
 * x86 guest tables, read only: 4 and 5 levels (Intel SDM vol. 3A, 4.5, tables
 * 4-14 to 4-20), PAE (4.4, tables 4-8 to 4-11) and 32-bit (4.3, tables 4-4 to
 * 4-6). The four entries of PAE's upper level are registers; who loads them
 * checks them with x86_pdpte_valid(), and walks begin below.
 *
 * Invariants:
 *  X1  a clear P bit makes an entry PT_NONE whatever else it holds.
 *  X2  a present entry with a reserved bit is PT_RESERVED: bits 51:phys_bits
 *      always; bit 63 unless EFER.NXE; PS in PML5E and PML4E, and in a PDPTE
 *      of a CPU without 1 GiB pages; the address bits below a large page's
 *      size, except bit 12, which is PAT there.
 *      PAE: bits 62:phys_bits instead. 32-bit: of a 4 MiB page, the bits
 *      between its highest address bit (at most 39, in bit 20: PSE-36) and 22.
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
	d.user_exec = d.perm & KAGE_EXEC;
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

/* -- PAE -------------------------------------------------------------------- */

static uint64_t pae_reserved_bits(const struct pt_params *p)
{
	unsigned phys = p->phys_bits ? p->phys_bits : X86_ADDR_BITS;

	return bit_range(phys, 63) | (p->nx ? 0 : X86_XD);
}

static struct pt_decoded without_key(struct pt_decoded d)
{
	d.pkey = 0;
	return d;
}

static struct pt_decoded decode_pae_pte(uint64_t e, const struct pt_params *p)
{
	return without_key(decode_bits(e, true, PAGE_SHIFT, pae_reserved_bits(p)));
}

static struct pt_decoded decode_pae_pde(uint64_t e, const struct pt_params *p)
{
	return without_key(decode_large(e, 21, pae_reserved_bits(p)));
}

bool x86_pdpte_valid(uint64_t e, const struct pt_params *p)
{
	uint64_t reserved = bit_range(p->phys_bits ? p->phys_bits : X86_ADDR_BITS, 63) | X86_XD;

	return !(e & X86_P) || !(e & (reserved | bit_range(1, 3) | bit_range(5, 9)));
}

/* Grants all; an accessed bit it has not. */
static struct pt_decoded decode_pae_pdpte(uint64_t e, const struct pt_params *p)
{
	struct pt_decoded d = { .state = PT_TABLE, .perm = KAGE_RWX, .user = true, .user_exec = true, .accessed = true };

	if (!(e & X86_P))
		return (struct pt_decoded){ .state = PT_NONE };
	if (!x86_pdpte_valid(e, p))
		d.state = PT_RESERVED;
	else
		d.addr = e & bit_range(PAGE_SHIFT, X86_ADDR_BITS);
	return d;
}

/* -- 32-bit ----------------------------------------------------------------- */

#define PSE_SHIFT 22
#define PSE_HIGH 13 /* bits 20:13 are address bits 39:32 */
#define PSE_PHYS_MAX 40

static struct pt_decoded decode_pte32(uint64_t e, const struct pt_params *p)
{
	return without_key(decode_bits(e, true, PAGE_SHIFT, 0));
}

static struct pt_decoded decode_pde32(uint64_t e, const struct pt_params *p)
{
	unsigned phys = MIN(p->phys_bits ? p->phys_bits : X86_ADDR_BITS, PSE_PHYS_MAX);
	struct pt_decoded d;

	if (!p->pse || !(e & X86_PS))
		return without_key(decode_bits(e, false, PAGE_SHIFT, 0));
	d = without_key(decode_bits(e, true, PSE_SHIFT, bit_range(PSE_HIGH + phys - 32, PSE_SHIFT)));
	if (d.state == PT_LEAF)
		d.addr |= (e & bit_range(PSE_HIGH, PSE_HIGH + 8)) << (32 - PSE_HIGH);
	return d;
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

const struct pt_format pt_x86_pae = {
	.name = "x86-pae",
	.levels = 3,
	.entry_bytes = 8,
	.level = { { 30, 2, false, decode_pae_pdpte }, { 21, 9, true, decode_pae_pde }, { 12, 9, true, decode_pae_pte } },
};

const struct pt_format pt_x86_32 = {
	.name = "x86-32bit",
	.levels = 2,
	.entry_bytes = 4,
	.level = { { PSE_SHIFT, 10, true, decode_pde32 }, { 12, 10, true, decode_pte32 } },
};
