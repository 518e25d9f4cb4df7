/* SPDX-License-Identifier: MIT */
/*
 * A format for tests only: three levels whose tables differ in size, with
 * every field somewhere else than in Kage's or any guest's entries. Code that
 * pokes bits by hand, or assumes nine bits a level, breaks loudly on it.
 * (The idea is hafnium's src/arch/fake/mm.c.)
 *
 *   63   61 60   58 57  56  55           43 42         3 2    0
 *   | state | deny  | D | A |     magic    |  addr>>12  |   0  |
 *
 * Invariants:
 *  F1  zero is PT_NONE. Any other entry carries the magic, else PT_RESERVED.
 *  F2  permissions are stored denied: a set bit takes one away.
 *  F3  a block may stand at level 1, not at level 2.
 *
 * Locks: none.
 */
#include "pt/pt.h"

#define FAKE_ADDR_SHIFT 3
#define FAKE_ADDR_MASK ((((uint64_t)1 << 40) - 1) << FAKE_ADDR_SHIFT)
#define FAKE_MAGIC ((uint64_t)0x15a5 << 43)
#define FAKE_MAGIC_MASK ((uint64_t)0x1fff << 43)
#define FAKE_A ((uint64_t)1 << 56)
#define FAKE_D ((uint64_t)1 << 57)
#define FAKE_DENY_SHIFT 58 /* KAGE_READ, WRITE, EXEC, in this order */
#define FAKE_STATE_SHIFT 61
_Static_assert(KAGE_RWX == 7, "the three permissions are the low bits");

/* Numbered unlike any other format. */
static const enum pt_state fake_states[8] = {
	PT_RESERVED, PT_POISON, PT_TABLE, PT_SWAP, PT_PROTNONE, PT_LEAF, PT_MIGRATION, PT_HOST_PRIVATE,
};

static uint64_t fake_number(enum pt_state state)
{
	for (uint64_t i = 0; i < ARRAY_SIZE(fake_states); i++)
		if (fake_states[i] == state)
			return i << FAKE_STATE_SHIFT;
	return 0;
}

static struct pt_decoded decode_fake(uint64_t e, const struct pt_params *p)
{
	struct pt_decoded d = { .state = PT_NONE };

	if (e == 0)
		return d;
	d.state = (e & FAKE_MAGIC_MASK) == FAKE_MAGIC ? fake_states[e >> FAKE_STATE_SHIFT] : PT_RESERVED;
	d.perm = ~(e >> FAKE_DENY_SHIFT) & KAGE_RWX;
	d.user = true;
	d.accessed = e & FAKE_A;
	d.dirty = e & FAKE_D;
	if (d.state == PT_LEAF || d.state == PT_TABLE)
		d.addr = ((e & FAKE_ADDR_MASK) >> FAKE_ADDR_SHIFT) << PAGE_SHIFT;
	return d;
}

static struct pt_decoded decode_fake_top(uint64_t e, const struct pt_params *p)
{
	struct pt_decoded d = decode_fake(e, p);

	if (d.state == PT_LEAF)
		d.state = PT_RESERVED;
	return d;
}

static uint64_t make_entry(uint64_t addr, uint32_t perm, enum pt_state state)
{
	return FAKE_MAGIC | fake_number(state) | (uint64_t)(~perm & KAGE_RWX) << FAKE_DENY_SHIFT |
	       (((addr >> PAGE_SHIFT) << FAKE_ADDR_SHIFT) & FAKE_ADDR_MASK);
}

static uint64_t make_fake_leaf(uint64_t addr, unsigned level, uint32_t perm)
{
	return make_entry(addr, perm, PT_LEAF);
}

static uint64_t make_fake_table(uint64_t addr, uint32_t perm)
{
	return make_entry(addr, perm, PT_TABLE);
}

const struct pt_format pt_fake = {
	.name = "fake",
	.levels = 3,
	.entry_bytes = 8,
	.writable = true,
	.make_leaf = make_fake_leaf,
	.make_table = make_fake_table,
	.level = {
		{ 20, 4, false, decode_fake_top },
		{ 17, 3, true, decode_fake },
		{ 12, 5, true, decode_fake },
	},
};
