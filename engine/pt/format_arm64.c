/* SPDX-License-Identifier: MIT */
/*
 * arm64 guest tables, VMSAv8-64 stage 1 of EL1&0, read only: granules of 4K, 16K
 * and 64K. Arm ARM D8.3 ("Translation table descriptor formats"), D8.4 (access
 * flag, dirty state, permissions).
 *
 * Arm numbers levels from the root, 0 (or -1) to 3; here level n is Arm's 3 - n.
 * A format has the levels of the largest address there is; walks of smaller ones
 * begin below (struct pt_root).
 *
 * Invariants:
 *  V1  bit 0 clear is PT_NONE. A block where there are none, and 0b01 at the
 *      last level, are PT_RESERVED, which faults as PT_NONE does.
 *  V2  an address beyond `phys_bits` is PT_ADDRESS_SIZE, in tables and leaves.
 *      Without `ds` or `lpa`, addresses end at bit 47; other bits are ignored.
 *  V3  of leaves, in this order: address size, access flag.
 *  V4  with `hd`, DBM makes a read-only leaf a writable one that is not dirty.
 *      Without, every leaf is dirty: there is nothing to set.
 *  V5  the contiguous bit is a hint and is not looked at; nT neither.
 *
 * Locks: none; entries are values here.
 */
#include "pt/pt.h"

#define ARM_VALID ((uint64_t)1 << 0)
#define ARM_TABLE ((uint64_t)1 << 1) /* level 0: page */
#define ARM_AP_EL0 ((uint64_t)1 << 6)
#define ARM_AP_RO ((uint64_t)1 << 7)
#define ARM_AF ((uint64_t)1 << 10)
#define ARM_NG ((uint64_t)1 << 11)
#define ARM_DBM ((uint64_t)1 << 51)
#define ARM_PXN ((uint64_t)1 << 53)
#define ARM_UXN ((uint64_t)1 << 54)
#define ARM_PXN_TABLE ((uint64_t)1 << 59)
#define ARM_UXN_TABLE ((uint64_t)1 << 60)
#define ARM_AP_TABLE_EL0 ((uint64_t)1 << 61)
#define ARM_AP_TABLE_RO ((uint64_t)1 << 62)
#define ARM_ADDR_TOP 48

static uint64_t bit_range(unsigned lo, unsigned hi)
{
	return (((uint64_t)1 << hi) - 1) & ~(((uint64_t)1 << lo) - 1);
}

/* The address in an entry, of which bits below `shift` are none. */
static uint64_t address(uint64_t e, unsigned shift, const struct pt_params *p)
{
	if (p->ds)
		return (e & bit_range(shift, 50)) | (e >> 8 & 3) << 50;
	if (p->lpa)
		return (e & bit_range(shift, ARM_ADDR_TOP)) | (e >> 12 & 15) << ARM_ADDR_TOP;
	return e & bit_range(shift, ARM_ADDR_TOP);
}

static bool too_large(uint64_t addr, const struct pt_params *p)
{
	return p->phys_bits && addr >> p->phys_bits;
}

static struct pt_decoded decode_table(uint64_t e, unsigned granule, const struct pt_params *p)
{
	struct pt_decoded d = { .state = PT_TABLE, .accessed = true, .dirty = true };
	bool plain = p->hpd;

	d.addr = address(e, granule, p);
	d.perm = KAGE_READ | (plain || !(e & ARM_AP_TABLE_RO) ? KAGE_WRITE : 0) |
		 (plain || !(e & ARM_PXN_TABLE) ? KAGE_EXEC : 0);
	d.user = plain || !(e & ARM_AP_TABLE_EL0);
	d.user_exec = plain || !(e & ARM_UXN_TABLE);
	if (too_large(d.addr, p))
		d.state = PT_ADDRESS_SIZE;
	return d;
}

static struct pt_decoded decode_leaf(uint64_t e, unsigned shift, const struct pt_params *p)
{
	bool clean = p->hd && (e & ARM_DBM) && (e & ARM_AP_RO);
	struct pt_decoded d = { .state = PT_LEAF, .accessed = e & ARM_AF, .dirty = !clean, .global = !(e & ARM_NG) };

	d.addr = address(e, shift, p);
	d.perm = KAGE_READ | (clean || !(e & ARM_AP_RO) ? KAGE_WRITE : 0) | (e & ARM_PXN ? 0 : KAGE_EXEC);
	d.user = e & ARM_AP_EL0;
	d.user_exec = !(e & ARM_UXN);
	if (too_large(d.addr, p))
		d.state = PT_ADDRESS_SIZE;
	else if (!d.accessed && !p->ha)
		d.state = PT_ACCESS_FLAG;
	return d;
}

/* An entry of a level above 0; `block`: of 1 << shift bytes, may stand here. */
static struct pt_decoded decode_upper(uint64_t e, unsigned granule, unsigned shift, bool block,
				      const struct pt_params *p)
{
	if (!(e & ARM_VALID))
		return (struct pt_decoded){ .state = PT_NONE };
	if (e & ARM_TABLE)
		return decode_table(e, granule, p);
	return block ? decode_leaf(e, shift, p) : (struct pt_decoded){ .state = PT_RESERVED };
}

static struct pt_decoded decode_page(uint64_t e, unsigned granule, const struct pt_params *p)
{
	if (!(e & ARM_VALID))
		return (struct pt_decoded){ .state = PT_NONE };
	return e & ARM_TABLE ? decode_leaf(e, granule, p) : (struct pt_decoded){ .state = PT_RESERVED };
}

#define DECODE_PAGE(granule)                                                            \
	static struct pt_decoded page_##granule(uint64_t e, const struct pt_params *p)  \
	{                                                                               \
		return decode_page(e, granule, p);                                      \
	}
#define DECODE_UPPER(granule, shift, block)                                                 \
	static struct pt_decoded upper_##granule##_##shift(uint64_t e, const struct pt_params *p) \
	{                                                                                   \
		return decode_upper(e, granule, shift, block, p);                           \
	}

DECODE_PAGE(12)
DECODE_UPPER(12, 21, true)
DECODE_UPPER(12, 30, true)
DECODE_UPPER(12, 39, p->ds)
DECODE_UPPER(12, 48, false)
DECODE_PAGE(14)
DECODE_UPPER(14, 25, true)
DECODE_UPPER(14, 36, p->ds)
DECODE_UPPER(14, 47, false)
DECODE_PAGE(16)
DECODE_UPPER(16, 29, true)
DECODE_UPPER(16, 42, p->giant)

const struct pt_format pt_arm64_4k = {
	.name = "arm64-4k",
	.levels = 5,
	.entry_bytes = 8,
	.entangled = true,
	.level = { { 48, 4, false, upper_12_48 }, { 39, 9, true, upper_12_39 }, { 30, 9, true, upper_12_30 },
		   { 21, 9, true, upper_12_21 }, { 12, 9, true, page_12 } },
};

const struct pt_format pt_arm64_16k = {
	.name = "arm64-16k",
	.levels = 4,
	.entry_bytes = 8,
	.entangled = true,
	.level = { { 47, 5, false, upper_14_47 }, { 36, 11, true, upper_14_36 }, { 25, 11, true, upper_14_25 },
		   { 14, 11, true, page_14 } },
};

const struct pt_format pt_arm64_64k = {
	.name = "arm64-64k",
	.levels = 3,
	.entry_bytes = 8,
	.entangled = true,
	.level = { { 42, 10, true, upper_16_42 }, { 29, 13, true, upper_16_29 }, { 16, 13, true, page_16 } },
};
