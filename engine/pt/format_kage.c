/* SPDX-License-Identifier: MIT */
/*
 * Kage's own entries as a format: descriptors for walkers, dumps and audits.
 *
 * Everything is made of entry.h's inline functions, so that hot paths and this
 * file cannot disagree about a bit.
 *
 * Invariants:
 *  K1  zero is PT_NONE at every level: a zeroed frame is an empty table.
 *  K2  blocks exist at levels 1 and 2 only, tables above level 0 only; an entry
 *      that says otherwise decodes as PT_RESERVED.
 *
 * Locks: none; entries are values here.
 *
 * Why not simpler: a decode function for each kind of level, because what is
 * legal depends on the level and a decode function is not told which it is.
 */
#include "pt/entry.h"

static const enum pt_state state_of[8] = {
	[ENTRY_NONE] = PT_NONE,           [ENTRY_LEAF] = PT_LEAF,
	[ENTRY_TABLE] = PT_TABLE,         [ENTRY_SWAP] = PT_SWAP,
	[ENTRY_MIGRATION] = PT_MIGRATION, [ENTRY_PROTNONE] = PT_PROTNONE,
	[ENTRY_POISON] = PT_POISON,       [ENTRY_HOST_PRIVATE] = PT_HOST_PRIVATE,
};

static uint32_t perm_of(entry_t e)
{
	return (e & ENTRY_R ? KAGE_READ : 0) | (e & ENTRY_W ? KAGE_WRITE : 0) | (e & ENTRY_X ? KAGE_EXEC : 0);
}

static entry_t perm_bits(uint32_t perm)
{
	return (perm & KAGE_READ ? ENTRY_R : 0) | (perm & KAGE_WRITE ? ENTRY_W : 0) |
	       (perm & KAGE_EXEC ? ENTRY_X : 0);
}

static struct pt_decoded decode_any(entry_t e)
{
	struct pt_decoded d = { .state = state_of[entry_state(e)] };

	if (d.state == PT_NONE)
		return d;
	d.perm = perm_of(e);
	d.user = true;
	d.accessed = e & ENTRY_A;
	d.dirty = e & ENTRY_D;
	if (d.state == PT_LEAF || d.state == PT_TABLE)
		d.addr = entry_pfn(e).v << PAGE_SHIFT;
	return d;
}

static struct pt_decoded decode_without(entry_t e, enum pt_state illegal)
{
	struct pt_decoded d = decode_any(e);

	if (d.state == illegal)
		d.state = PT_RESERVED;
	return d;
}

static struct pt_decoded decode_page(uint64_t e, const struct pt_params *p)
{
	return decode_without(e, PT_TABLE);
}

static struct pt_decoded decode_block(uint64_t e, const struct pt_params *p)
{
	return decode_any(e);
}

static struct pt_decoded decode_top(uint64_t e, const struct pt_params *p)
{
	return decode_without(e, PT_LEAF);
}

static uint64_t make_leaf(uint64_t addr, unsigned level, uint32_t perm)
{
	return (entry_leaf(PFN(addr >> PAGE_SHIFT), 0) & ~(ENTRY_R | ENTRY_X)) | perm_bits(perm);
}

static uint64_t make_table(uint64_t addr, uint32_t perm)
{
	return (entry_table(PFN(addr >> PAGE_SHIFT), 0) & ~(ENTRY_R | ENTRY_X)) | perm_bits(perm);
}

#define SHIFT(n) (PAGE_SHIFT + LEVEL_BITS * (n))
#define LEVEL_0 { SHIFT(0), LEVEL_BITS, true, decode_page }
#define LEVEL_1 { SHIFT(1), LEVEL_BITS, true, decode_block }
#define LEVEL_2 { SHIFT(2), LEVEL_BITS, true, decode_block }
#define LEVEL_3 { SHIFT(3), LEVEL_BITS, false, decode_top }
#define LEVEL_4 { SHIFT(4), LEVEL_BITS, false, decode_top }
#define KAGE_FORMAT(n, ...)                                                                      \
	{                                                                                        \
		.name = "kage-" #n, .levels = (n), .entry_bytes = sizeof(entry_t), .writable = true, \
		.make_leaf = make_leaf, .make_table = make_table, .level = { __VA_ARGS__ }       \
	}

const struct pt_format pt_kage[4] = {
	KAGE_FORMAT(2, LEVEL_1, LEVEL_0),
	KAGE_FORMAT(3, LEVEL_2, LEVEL_1, LEVEL_0),
	KAGE_FORMAT(4, LEVEL_3, LEVEL_2, LEVEL_1, LEVEL_0),
	KAGE_FORMAT(5, LEVEL_4, LEVEL_3, LEVEL_2, LEVEL_1, LEVEL_0),
};
