/* SPDX-License-Identifier: MIT */
/*
 * The cases of 32-bit and PAE paging: as cases.h has them for 4-level paging.
 * The low 22 bits of the address are those of the page's physical address,
 * whatever size of page maps it. Freestanding.
 */
#ifndef KAGE_TESTS_BAREMETAL_CASES32_H
#define KAGE_TESTS_BAREMETAL_CASES32_H

#include "cases.h"

#define CASE32_ADDR (0x80000000u + CASE_PAGE)

struct pf_case32 {
	bool pae, pse, user, wp, smep, smap, ac, nxe;
	bool no_pdpte;
	enum case_access access;
	unsigned leaf;    /* level of the entry that maps the page: 0 or 1 */
	uint64_t bits[2]; /* of the PTE and the PDE, address aside */
	uint32_t marker;
};

static inline unsigned case32_shift(const struct pf_case32 *c, unsigned level)
{
	return level == 0 ? 12 : c->pae ? 21 : 22;
}

/* A bit that is reserved in the entry of this level; 0 if it has none. */
static inline uint64_t case32_reserved_bit(const struct pf_case32 *c, unsigned level, unsigned phys_bits, unsigned pick)
{
	bool large = level == 1 && c->leaf == 1;

	if (!c->pae)
		return large ? 1u << 21 : 0;
	if (large && (pick & 1))
		return UINT64_C(1) << (13 + (pick >> 1) % 8);
	return UINT64_C(1) << (phys_bits + (pick >> 1) % (63 - phys_bits));
}

static inline struct pf_case32 case32_make(unsigned number, unsigned phys_bits)
{
	uint64_t r = case_mix(number + 0x32000000u), more = case_mix(r), rights = case_mix(more);
	struct pf_case32 c = { 0 };
	bool generous;
	unsigned level, kind, pick;

	c.pae = case_take(&r, 1);
	c.pse = case_take(&r, 1);
	c.user = case_take(&r, 1);
	c.wp = case_take(&r, 1);
	c.smep = case_take(&r, 1);
	c.smap = case_take(&r, 1);
	c.ac = case_take(&r, 1);
	c.nxe = case_take(&r, 2) != 0;
	kind = case_take(&r, 2);
	c.access = (enum case_access)(kind < 3 ? kind : case_take(&r, 1));
	c.leaf = (c.pae || c.pse) && case_take(&r, 2) == 0;
	generous = case_take(&r, 1);
	for (level = c.leaf; level < 2; level++)
		c.bits[level] = case_rights(&rights, generous) & (c.pae ? ~UINT64_C(0) : 0xffffffff);
	/* a PDE of a table without PSE may have bit 7: it says nothing there */
	if (c.leaf || (!c.pae && !c.pse && case_take(&r, 1)))
		c.bits[1] |= 1u << 7;
	kind = case_take(&r, 4);
	level = c.leaf ? 1 : case_take(&r, 1);
	pick = case_take(&r, 8);
	if (kind < 4)
		c.bits[level] |= case32_reserved_bit(&c, level, phys_bits, pick);
	else if (kind == 4)
		c.bits[level] &= ~UINT64_C(1);
	else if (kind == 5)
		c.no_pdpte = c.pae;
	c.marker = (uint32_t)case_mix(rights);
	return c;
}

#endif
