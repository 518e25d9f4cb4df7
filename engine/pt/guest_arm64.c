/* SPDX-License-Identifier: MIT */
/*
 * arm64 as an architecture of guests: which root, who may do what, fault
 * syndromes, access flag and dirty state. Arm ARM D8.4 ("Stage 1 permissions"),
 * D17.2 (ESR_ELx), AArch64.S1DirectBasePermissions() of the pseudocode.
 *
 * pt_rights: perm is what EL1 may do, `user` that EL0 may read, and write what
 * EL1 may write; `user_exec` that EL0 may execute.
 *
 * Invariants:
 *  J1  what EL0 may write is never executed at EL1. WXN takes execution of what
 *      the same level may write.
 *  J2  PAN keeps EL1 from data that EL0 may read; with EPAN also from what EL0
 *      may execute. It takes no execution.
 *
 * Locks: none.
 */
#include "pt/guest.h"

#define ARM_ENTRY_AF ((uint64_t)1 << 10)
#define ARM_ENTRY_RO ((uint64_t)1 << 7)
#define ARM_ENTRY_DBM ((uint64_t)1 << 51)

#define EC_INSTRUCTION 0x20u /* from EL0; one more: from the same level */
#define EC_DATA 0x24u
#define ISS_WNR (1u << 6)
#define FSC_ADDRESS_SIZE 0x00u /* and Arm's level */
#define FSC_TRANSLATION 0x04u
#define FSC_ACCESS_FLAG 0x08u
#define FSC_PERMISSION 0x0cu
#define FSC_ADDRESS_SIZE_M1 0x29u /* level -1 */
#define FSC_TRANSLATION_M1 0x2bu
#define ARM_LEVEL_0 3u /* here */

static int arm64_root_of(const struct pt_guest *g, uint64_t gva)
{
	if (!g->nroots)
		return gva >> g->arm64.phys_bits ? -1 : 0;
	for (int i = 0; i < g->nroots; i++)
		if (gva >= g->root[i].base && gva - g->root[i].base <= (((uint64_t)1 << g->root[i].bits) - 1))
			return i;
	return -1;
}

static bool el0_allows(const struct arm64_mode *m, struct pt_rights r, uint32_t access)
{
	bool write = r.user && (r.perm & KAGE_WRITE);

	if (access & KAGE_EXEC)
		return r.user_exec && !(m->wxn && write);
	return access & KAGE_WRITE ? write : r.user;
}

static bool el1_allows(const struct arm64_mode *m, struct pt_rights r, uint32_t access)
{
	bool write = r.perm & KAGE_WRITE;

	if (access & KAGE_EXEC)
		return (r.perm & KAGE_EXEC) && !(r.user && write) && !(m->wxn && write);
	if (m->pan && (r.user || (m->epan && r.user_exec)))
		return false;
	return write || !(access & KAGE_WRITE);
}

static bool arm64_allows(const struct pt_guest *g, struct pt_rights r, uint32_t access)
{
	return g->arm64.el0 ? el0_allows(&g->arm64, r, access) : el1_allows(&g->arm64, r, access);
}

static uint32_t arm64_allowed(const struct pt_guest *g, struct pt_rights r)
{
	return (arm64_allows(g, r, KAGE_READ) ? KAGE_READ : 0) | (arm64_allows(g, r, KAGE_WRITE) ? KAGE_WRITE : 0) |
	       (arm64_allows(g, r, KAGE_EXEC) ? KAGE_EXEC : 0);
}

static uint32_t fault_status(enum pt_state state, unsigned level)
{
	bool m1 = level > ARM_LEVEL_0;
	uint32_t arm_level = m1 ? 0 : ARM_LEVEL_0 - level;

	switch (state) {
	case PT_LEAF:
		return FSC_PERMISSION + arm_level;
	case PT_ACCESS_FLAG:
		return FSC_ACCESS_FLAG + arm_level;
	case PT_ADDRESS_SIZE:
		return m1 ? FSC_ADDRESS_SIZE_M1 : FSC_ADDRESS_SIZE + arm_level;
	default:
		return m1 ? FSC_TRANSLATION_M1 : FSC_TRANSLATION + arm_level;
	}
}

static struct pt_fault arm64_fault(const struct pt_guest *g, enum pt_state state, unsigned level, struct pt_rights r,
				   uint32_t access)
{
	struct pt_fault f = { .level = level };

	if (state == PT_OUTSIDE) {
		f.level = ARM_LEVEL_0;
		state = g->nroots ? PT_NONE : PT_ADDRESS_SIZE;
	}
	f.vector = (access & KAGE_EXEC ? EC_INSTRUCTION : EC_DATA) + !g->arm64.el0;
	f.error = fault_status(state, f.level) | (access & KAGE_WRITE ? ISS_WNR : 0);
	return f;
}

/* Tables have neither. `hd` counts with `ha` only, and `ha` here only if the flag was clear (V3 of the format). */
static uint64_t arm64_used(const struct pt_root *root, uint64_t entry, bool leaf, bool write)
{
	if (!leaf)
		return entry;
	if (write && root->params.hd && (entry & ARM_ENTRY_DBM))
		entry &= ~ARM_ENTRY_RO;
	return entry | ARM_ENTRY_AF;
}

static uint64_t arm64_key(const struct pt_guest *g)
{
	const struct arm64_mode *m = &g->arm64;
	bool pan = m->pan && !m->el0;

	return (uint64_t)m->el0 | (uint64_t)m->wxn << 1 | (uint64_t)pan << 2 | (uint64_t)(pan && m->epan) << 3;
}

const struct pt_arch pt_arch_arm64 = {
	.name = "arm64",
	.root_of = arm64_root_of,
	.allows = arm64_allows,
	.allowed = arm64_allowed,
	.fault = arm64_fault,
	.used = arm64_used,
	.key = arm64_key,
};
