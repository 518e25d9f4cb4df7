/* SPDX-License-Identifier: MIT */
/*
 * Who may do what through an x86 translation, and the error code of who may
 * not. Intel SDM vol. 3A, 4.6 ("Access rights") and 4.7 ("Page-fault
 * exceptions").
 *
 * Invariants:
 *  A1  PK is set whenever the key forbids a data access to a user-mode
 *      address, also when something else forbids it too (4.7).
 *  A2  I is set for a fetch only if the CPU could forbid fetches at all: NXE
 *      or SMEP.
 *  A3  an implicit access is a supervisor access at any CPL, and AC does not
 *      open user pages for it.
 *
 * Locks: none.
 */
#include "pt/pt.h"

static bool is_user_access(const struct x86_mode *m, uint32_t access)
{
	return m->user && !(access & KAGE_IMPLICIT);
}

/* 4.6.2: two bits a key, access disable and write disable. */
static bool key_forbids(const struct x86_mode *m, bool user_page, uint8_t pkey, uint32_t access)
{
	uint32_t bits = m->pkru >> (2 * (pkey & 15));

	if (!m->pke || !user_page || (access & KAGE_EXEC))
		return false;
	return (bits & 1) || ((bits & 2) && (access & KAGE_WRITE) && (is_user_access(m, access) || m->wp));
}

/* 4.6.1, supervisor-mode accesses to user-mode addresses. */
static bool supervisor_kept_out(const struct x86_mode *m, uint32_t access)
{
	if (access & KAGE_EXEC)
		return m->smep;
	return m->smap && (!m->ac || (access & KAGE_IMPLICIT));
}

static bool rights_forbid(const struct x86_mode *m, uint32_t perm, bool user_page, uint32_t access)
{
	bool user = is_user_access(m, access);

	if (user && !user_page)
		return true;
	if (!user && user_page && supervisor_kept_out(m, access))
		return true;
	if (access & KAGE_EXEC)
		return !(perm & KAGE_EXEC);
	return (access & KAGE_WRITE) && !(perm & KAGE_WRITE) && (user || m->wp);
}

/* The bits that describe the access, whatever the reason. */
static uint32_t access_bits(const struct x86_mode *m, uint32_t access)
{
	return (access & KAGE_WRITE ? X86_PF_W : 0) | (is_user_access(m, access) ? X86_PF_U : 0) |
	       ((access & KAGE_EXEC) && (m->nxe || m->smep) ? X86_PF_I : 0);
}

uint32_t x86_check(const struct x86_mode *m, uint32_t perm, bool user_page, uint8_t pkey, uint32_t access)
{
	bool key = key_forbids(m, user_page, pkey, access);

	if (!key && !rights_forbid(m, perm, user_page, access))
		return 0;
	return X86_PF_P | access_bits(m, access) | (key ? X86_PF_PK : 0);
}

uint32_t x86_allowed(const struct x86_mode *m, uint32_t perm, bool user_page, uint8_t pkey)
{
	uint32_t allowed = 0;

	for (uint32_t access = KAGE_READ; access <= KAGE_EXEC; access <<= 1)
		if (!x86_check(m, perm, user_page, pkey, access))
			allowed |= access;
	return allowed;
}

uint32_t x86_walk_error(const struct x86_mode *m, uint32_t access, bool rsvd)
{
	return access_bits(m, access) | (rsvd ? X86_PF_P | X86_PF_RSVD : 0);
}
