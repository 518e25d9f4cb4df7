/* SPDX-License-Identifier: MIT */
/*
 * The cases that the bare-metal guest tries and the test expects: both sides
 * compute them from the number alone. Freestanding.
 *
 * One address is translated through four tables of which a case fills one
 * entry each. It points to the same page whatever size of page maps it: the
 * low 30 bits of the address are those of the page's physical address.
 */
#ifndef KAGE_TESTS_BAREMETAL_CASES_H
#define KAGE_TESTS_BAREMETAL_CASES_H

#include <stdbool.h>
#include <stdint.h>

#define CASES 16384
#define CASE_PAGE 0x1400000u /* 2 MiB aligned, beyond the guest's image */
#define CASE_ADDR ((UINT64_C(1) << 39) + CASE_PAGE)
#define CASE_DATA 16 /* reads and writes go here; instructions stand at 0 */

#define CPU_PAGE1GB 1u
#define CPU_PKU 2u

enum case_access { CASE_READ, CASE_WRITE, CASE_FETCH };

struct pf_case {
	bool user, wp, smep, smap, ac, nxe, pke;
	uint32_t pkru;
	enum case_access access;
	unsigned leaf;      /* level of the entry that maps the page: 0, 1 or 2 */
	uint64_t bits[4];   /* of the entry at each level, address aside */
	uint64_t marker;    /* what lies at CASE_DATA or is written there */
};

static inline uint64_t case_mix(uint64_t x)
{
	x += UINT64_C(0x9e3779b97f4a7c15);
	x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
	return x ^ x >> 31;
}

static inline unsigned case_take(uint64_t *r, unsigned bits)
{
	unsigned v = *r & ((1u << bits) - 1);

	*r >>= bits;
	return v;
}

/* A bit that is reserved in the entry of this level. */
static inline uint64_t case_reserved_bit(unsigned level, unsigned leaf, unsigned phys_bits, unsigned pick)
{
	if (level == 3 && (pick & 3) == 0)
		return 1u << 7;
	if (level == leaf && level > 0 && (pick & 1))
		return UINT64_C(1) << (13 + (pick >> 1) % (9 * level - 1));
	return UINT64_C(1) << (phys_bits + (pick >> 1) % (52 - phys_bits));
}

/* Rights, one level: half of the cases grant nearly everything, so that enough of them succeed. */
static inline uint64_t case_rights(uint64_t *r, bool generous)
{
	unsigned w = case_take(r, 3), u = case_take(r, 3), x = case_take(r, 3);
	uint64_t e = 1;

	if (generous ? w : w & 1)
		e |= 2;
	if (generous ? u : u & 1)
		e |= 4;
	if (generous ? !x : x & 1)
		e |= UINT64_C(1) << 63;
	return e;
}

static inline struct pf_case case_make(unsigned number, unsigned phys_bits, unsigned cpu)
{
	uint64_t r = case_mix(number), more = case_mix(r), rights = case_mix(more);
	struct pf_case c = { 0 };
	bool generous;
	unsigned kind, level, pick;

	c.user = case_take(&r, 1);
	c.wp = case_take(&r, 1);
	c.smep = case_take(&r, 1);
	c.smap = case_take(&r, 1);
	c.ac = case_take(&r, 1);
	c.nxe = case_take(&r, 3) != 0;
	c.pke = case_take(&r, 2) == 0 && (cpu & CPU_PKU);
	c.pkru = (uint32_t)(more >> 32);
	c.access = (enum case_access)(case_take(&r, 8) % 3);
	kind = case_take(&r, 3);
	c.leaf = kind == 7 && (cpu & CPU_PAGE1GB) ? 2 : kind >= 6 ? 1 : 0;
	generous = case_take(&r, 1);
	for (level = 0; level < 4; level++)
		c.bits[level] = level < c.leaf ? 0 : case_rights(&rights, generous);
	c.bits[c.leaf] |= (c.leaf ? 1u << 7 : 0) | (uint64_t)case_take(&r, 4) << 59;
	kind = case_take(&r, 4);
	level = c.leaf + case_take(&r, 8) % (4 - c.leaf);
	pick = case_take(&r, 8);
	if (kind < 5)
		c.bits[level] |= case_reserved_bit(level, c.leaf, phys_bits, pick);
	else if (kind == 5)
		c.bits[level] &= ~UINT64_C(1);
	c.marker = case_mix(rights);
	return c;
}

#endif
