/* SPDX-License-Identifier: MIT */
/*
 * x86 as an architecture of guests: which root, page faults, accessed and dirty
 * bits. Rights and error codes are x86_perm.c.
 *
 * Roots: one for 4 and 5 levels and for 32-bit paging; four for PAE, one for
 * each PDPTE. Addresses that 32-bit modes do not have are answered like those
 * that are not canonical.
 *
 * Locks: none.
 */
#include "pt/guest.h"

#define X86_ENTRY_A ((uint64_t)1 << 5)
#define X86_ENTRY_D ((uint64_t)1 << 6)
#define VECTOR_GP 13
#define VECTOR_PF 14

static int x86_root_of(const struct pt_guest *g, uint64_t gva)
{
	const struct pt_root *r = &g->root[0];
	int64_t top;

	if (!g->nroots)
		return 0;
	if (!r->format->sign_extended)
		return gva >> 32 ? -1 : g->nroots > 1 ? (int)(gva >> 30) : 0;
	top = (int64_t)gva >> (r->bits - 1);
	return top == 0 || top == -1 ? 0 : -1;
}

static bool x86_allows(const struct pt_guest *g, struct pt_rights r, uint32_t access)
{
	return !x86_check(&g->x86, r.perm, r.user, r.pkey, access);
}

static uint32_t x86_allowed_rights(const struct pt_guest *g, struct pt_rights r)
{
	return x86_allowed(&g->x86, r.perm, r.user, r.pkey);
}

static struct pt_fault x86_fault(const struct pt_guest *g, enum pt_state state, unsigned level, struct pt_rights r,
				 uint32_t access)
{
	struct pt_fault f = { .vector = VECTOR_PF, .level = level };

	if (state == PT_OUTSIDE)
		return (struct pt_fault){ .vector = VECTOR_GP };
	if (state == PT_LEAF)
		f.error = x86_check(&g->x86, r.perm, r.user, r.pkey, access);
	else
		f.error = x86_walk_error(&g->x86, access, state == PT_RESERVED);
	return f;
}

/* SDM vol. 3A 4.8. */
static uint64_t x86_used(const struct pt_root *root, uint64_t entry, bool leaf, bool write)
{
	return entry | X86_ENTRY_A | (leaf && write ? X86_ENTRY_D : 0);
}

/* What cannot matter is left out (4.6), so that more modes are alike. */
static uint64_t x86_key(const struct pt_guest *g)
{
	const struct x86_mode *m = &g->x86;
	bool smap = m->smap && !m->user;

	return (uint64_t)m->user | (uint64_t)(m->wp && !m->user) << 1 | (uint64_t)(m->smep && !m->user) << 2 |
	       (uint64_t)smap << 3 | (uint64_t)(smap && m->ac) << 4 | (uint64_t)m->pke << 5 | (uint64_t)m->nxe << 6 |
	       (m->pke ? (uint64_t)m->pkru << 32 : 0);
}

const struct pt_arch pt_arch_x86 = {
	.name = "x86",
	.root_of = x86_root_of,
	.allows = x86_allows,
	.allowed = x86_allowed_rights,
	.fault = x86_fault,
	.used = x86_used,
	.key = x86_key,
};
