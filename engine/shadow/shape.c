/* SPDX-License-Identifier: MIT */
/*
 * Roles, and guest entries as shadow entries: how tables of any format feed
 * pages that have one shape (README.md, "Guest formats").
 *
 * Invariants:
 *  P1  a page is made from entries of one guest level, each of which is as large
 *      as its own entries or 2^split times; or it is a pass page, whose own are
 *      larger. All of them lie in one frame.
 *  P2  the page below an entry is found by the entry, its index and the role of
 *      its page alone, so that sync and audit need no path.
 *
 * Locks: the shadow lock for what reads pages; roles are values.
 *
 * Why not simpler: pages as large as the guest's tables would need entries of
 * 16K and 64K, which no frame has and no TLB.
 */
#include "shadow/internal.h"

/* -- roles -------------------------------------------------------------------- */

static const struct pt_format *const formats[] = {
    &pt_x86_4, &pt_x86_5, &pt_x86_pae, &pt_x86_32, &pt_arm64_4k, &pt_arm64_16k, &pt_arm64_64k,
};
_Static_assert(ARRAY_SIZE(formats) <= 8, "three bits of a role");

enum role_flag { F_NX, F_PAGE1G, F_PSE, F_DS, F_LPA, F_GIANT, F_HA, F_HD, F_HPD, FLAGS };
#define FORMAT_BITS 3
#define PHYS_BITS   6
_Static_assert(ROLE_PARAM_SHIFT + FORMAT_BITS + PHYS_BITS + FLAGS <= 64, "a role is 64 bits");

static uint64_t role_of_params(const struct pt_format *f, const struct pt_params *p)
{
	uint64_t flags = (uint64_t)p->nx << F_NX | (uint64_t)p->page1g << F_PAGE1G | (uint64_t)p->pse << F_PSE |
			 (uint64_t)p->ds << F_DS | (uint64_t)p->lpa << F_LPA | (uint64_t)p->giant << F_GIANT |
			 (uint64_t)p->ha << F_HA | (uint64_t)p->hd << F_HD | (uint64_t)p->hpd << F_HPD;
	uint64_t n = 0;

	while (formats[n] != f)
		n++;
	return (n | (uint64_t)p->phys_bits << FORMAT_BITS | flags << (FORMAT_BITS + PHYS_BITS)) << ROLE_PARAM_SHIFT;
}

static struct pt_params role_params(uint64_t role)
{
	uint64_t params = role >> (ROLE_PARAM_SHIFT + FORMAT_BITS), flags = params >> PHYS_BITS;

	return (struct pt_params){
	    .phys_bits = params & ((1u << PHYS_BITS) - 1),
	    .nx = flags >> F_NX & 1,
	    .page1g = flags >> F_PAGE1G & 1,
	    .pse = flags >> F_PSE & 1,
	    .ds = flags >> F_DS & 1,
	    .lpa = flags >> F_LPA & 1,
	    .giant = flags >> F_GIANT & 1,
	    .ha = flags >> F_HA & 1,
	    .hd = flags >> F_HD & 1,
	    .hpd = flags >> F_HPD & 1,
	};
}

static unsigned entry_shift(unsigned level)
{
	return PAGE_SHIFT + LEVEL_BITS * level;
}

/* The role of a page of `level` whose first guest entry, of `table`'s level, lies at `gpa`. */
static uint64_t role_at(const struct pt_format *f, uint64_t params, unsigned level, unsigned table, uint64_t gpa)
{
	bool pass = pt_level_of(f, table)->shift < entry_shift(level);

	return params | level | table << ROLE_TABLE_SHIFT | (pass ? ROLE_PASS : 0) |
	       (gpa & (PAGE_SIZE - 1)) / sizeof(uint64_t) << ROLE_FIRST_SHIFT;
}

void page_shape(struct shadow_page *p)
{
	unsigned shift = entry_shift(p->role & ROLE_LEVEL), table;

	p->level = p->role & ROLE_LEVEL;
	p->format = NULL;
	p->first = p->split = p->table_level = 0;
	if (p->role & ROLE_DIRECT)
		return;
	p->format = formats[p->role >> ROLE_PARAM_SHIFT & ((1u << FORMAT_BITS) - 1)];
	p->params = role_params(p->role);
	p->table_level = p->role >> ROLE_TABLE_SHIFT & ROLE_LEVEL;
	p->first = (uint16_t)(((p->role & ROLE_FIRST) >> ROLE_FIRST_SHIFT) * sizeof(uint64_t) / p->format->entry_bytes);
	table = pt_level_of(p->format, p->table_level)->shift;
	if (table > shift)
		p->split = (uint8_t)(table - shift);
	kage_assert(p->split < LEVEL_BITS);
}

gfn_t root_gfn(const struct pt_root *r)
{
	return GFN(r->table >> PAGE_SHIFT);
}

/* The lowest level whose page covers what the root translates. */
uint64_t root_role(const struct pt_root *r)
{
	unsigned level = 0;

	while (entry_shift(level) + LEVEL_BITS < r->bits)
		level++;
	return role_at(r->format, role_of_params(r->format, &r->params), level, r->level, r->table);
}

/* -- entries -------------------------------------------------------------------- */

/* Where the page below p[idx] has its first guest entry: in the table at `gpa`, which p[idx] is the n-th part of. */
static void below_entry(const struct shadow_page *p, unsigned table, uint64_t gpa, uint64_t n, struct guest_entry *g)
{
	unsigned shift = pt_level_of(p->format, table)->shift;

	kage_assert(shift <= entry_shift(p->level));
	gpa += (n << (entry_shift(p->level) - shift)) * p->format->entry_bytes;
	g->leaf = false;
	g->target = gpa_gfn(GPA(gpa));
	g->role = role_at(p->format, p->role & ROLE_PARAMS, p->level - 1u, table, gpa);
}

void unfed_entry(const struct shadow_page *p, unsigned idx, struct guest_entry *g)
{
	g->bits = SPTE_ALL;
	if (p->role & ROLE_DIRECT) {
		g->leaf = true;
		g->target = gfn_add(p->gfn, idx * level_pages(p->level));
		return;
	}
	below_entry(p, p->table_level, gfn_gpa(p->gfn).v + (uint64_t)p->first * p->format->entry_bytes, idx, g);
}

bool guest_entry(struct shadow *s, const struct shadow_page *p, unsigned idx, uint64_t raw,
		 struct guest_entry *g)
{
	struct pt_decoded d = pt_level_of(p->format, p->table_level)->decode(raw, &p->params);
	uint64_t part = idx & ((1u << p->split) - 1);

	if (d.state != PT_LEAF && (d.state != PT_TABLE || !p->table_level))
		return false;
	if (!d.accessed && !(p->spte[idx] & SPTE_NOAD) && !table_readonly(s, p->gfn))
		return false;
	g->leaf = d.state == PT_LEAF;
	if (g->leaf)
		g->target = gfn_add(GFN(d.addr >> PAGE_SHIFT), part * level_pages(p->level));
	else
		below_entry(p, p->table_level - 1u, d.addr, part, g);
	g->bits = (d.perm & KAGE_WRITE ? SPTE_W : 0) | (d.perm & KAGE_EXEC ? SPTE_X : 0) |
		  (d.user ? SPTE_U : 0) | (d.user_exec ? SPTE_UX : 0) | (d.dirty || !g->leaf ? SPTE_D : 0) |
		  (d.accessed ? 0 : SPTE_NOAD) | (spte_t)d.pkey << SPTE_PKEY_SHIFT;
	return true;
}
