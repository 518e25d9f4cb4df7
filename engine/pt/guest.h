/* SPDX-License-Identifier: MIT */
/*
 * A guest's translation as its registers set it up, and what its architecture
 * says about it. Formats (pt.h) tell how tables are read; this tells where walks
 * begin, who may use what they find, how a fault is reported and what a use
 * writes back. Whoever follows guest tables asks through here and knows no
 * architecture.
 *
 *   pt_guest   the roots, and the mode that decides about rights; made from
 *              registers by a backend
 *   pt_arch    functions of an architecture, constant
 *   pt_rights  what the entries of a path grant together
 *
 * Invariants:
 *  N1  rights depend on pt_rights and on pt_arch.key() alone: equal keys, equal
 *      rights.
 *  N2  tables are followed by roots alone: two guests with equal roots translate
 *      alike, whatever their mode.
 *
 * Locks: none; all of it are values.
 */
#ifndef KAGE_PT_GUEST_H
#define KAGE_PT_GUEST_H

#include "pt/pt.h"

#define PT_ROOTS 4

struct pt_rights {
	uint8_t perm;         /* KAGE_READ | WRITE | EXEC, as pt_decoded has them */
	bool user, user_exec;
	uint8_t pkey;
};

/* What the guest gets. */
struct pt_fault {
	uint32_t vector, error; /* as struct kage_fault */
	uint32_t level;
};

/* Arm ARM D8.4; what decides besides the entries. */
struct arm64_mode {
	bool el0, pan, epan, wxn;
	uint8_t phys_bits; /* with translation off: larger addresses fault */
};

struct pt_guest {
	const struct pt_arch *arch;
	uint8_t nroots; /* 0: translation is off, gva is gpa */
	bool asids;     /* translations of several address spaces are kept: flushes of a page reach all of them */
	union {
		struct x86_mode x86;
		struct arm64_mode arm64;
	};
	struct pt_root root[PT_ROOTS];
};

struct pt_arch {
	const char *name;
	/* Index of the root that translates an address; -1: none does (PT_OUTSIDE). Translation off: 0 or -1. */
	int (*root_of)(const struct pt_guest *g, uint64_t gva);
	/* May a single kind of access (KAGE_IMPLICIT besides) use a page? */
	bool (*allows)(const struct pt_guest *g, struct pt_rights r, uint32_t access);
	/* What of READ, WRITE, EXEC is allowed: allows() of each. */
	uint32_t (*allowed)(const struct pt_guest *g, struct pt_rights r);
	/* The fault of an access that a walk ended in `state` at `level`; PT_LEAF: by the lack of rights. */
	struct pt_fault (*fault)(const struct pt_guest *g, enum pt_state state, unsigned level, struct pt_rights r,
				 uint32_t access);
	/* An entry on the path of a use that was granted, after it. */
	uint64_t (*used)(const struct pt_root *root, uint64_t entry, bool leaf, bool write);
	uint64_t (*key)(const struct pt_guest *g);
};

extern const struct pt_arch pt_arch_x86, pt_arch_arm64;

static inline struct pt_rights pt_path_rights(const struct pt_guest_path *path)
{
	return (struct pt_rights){
		.perm = (uint8_t)path->perm,
		.user = path->user,
		.user_exec = path->user_exec,
		.pkey = path->pkey,
	};
}

/* The address within what its root translates. */
static inline uint64_t pt_root_offset(const struct pt_root *r, uint64_t gva)
{
	return gva & (((uint64_t)1 << r->bits) - 1);
}

static inline bool pt_same_root(const struct pt_root *a, const struct pt_root *b)
{
	return a->table == b->table && a->format == b->format && a->base == b->base && a->bits == b->bits &&
	       a->level == b->level && a->state == b->state && !memcmp(&a->params, &b->params, sizeof(a->params));
}

static inline bool pt_same_roots(const struct pt_guest *a, const struct pt_guest *b)
{
	if (a->nroots != b->nroots)
		return false;
	for (unsigned i = 0; i < a->nroots; i++)
		if (!pt_same_root(&a->root[i], &b->root[i]))
			return false;
	return true;
}

#endif
