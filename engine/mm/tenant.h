/* SPDX-License-Identifier: MIT */
/*
 * A tenant: what all guests of one merge domain have in common, and nobody else.
 *
 *   salt    of its pages' hashes: what equals what shows in no table to another tenant
 *   zero    the frame that its pages of zeroes are merged into
 *   reserve frames for hardened merging, if it is hardened
 *
 * A tenant is made with its first guest, or when it is configured, and stays until
 * the engine goes: numbers of domains are few and small.
 *
 * Invariants:
 *  D1  flags and reserve change only while no family lives in it: what was decided
 *      for a page by the old ones cannot meet the new ones.
 *  D2  families of two tenants have no frame in common, but for PFN_ZERO if both say so.
 *
 * Locks: host->ids guards the table of tenants, `families` and D1.
 */
#ifndef KAGE_MM_TENANT_H
#define KAGE_MM_TENANT_H

#include "mm/mm.h"

#define TENANT_BUCKETS 256

struct tenant {
	struct tenant *next; /* in its bucket */
	struct host *host;
	uint32_t id;
	uint32_t flags; /* enum kage_domain_flags */
	_Atomic uint64_t families;
	uint64_t salt;
	pfn_t zero; /* PFN_NONE until a page of zeroes comes; merging's lock */
	struct reserve *reserve; /* hardened (mm/fused.h); else NULL */
};

struct tenant_table {
	struct tenant *bucket[TENANT_BUCKETS];
	_Atomic uint32_t hardened; /* tenants with a reserve */
};

int tenants_init(struct host *h);
void tenants_finish(struct host *h);
/* Finds or makes it, for a family that comes. -ENOMEM. */
int tenant_get(struct host *h, uint32_t id, struct tenant **out);
/* The family is gone. */
void tenant_put(struct tenant *t);
/* -EBUSY while families live in it, -ENOMEM. The engine's upkeep lock held for writing: nobody looks at its reserve. */
int tenant_configure(struct host *h, uint32_t id, uint32_t flags, uint32_t frames);
/*
 * Before a step merges: what hardened tenants let go of goes, and their reserves are filled, until a time (mm/fused.h).
 * True: not all of them, for lack of time. The engine's upkeep lock held.
 */
bool tenants_upkeep(struct host *h, uint64_t until);
/* Calls fn for every hardened tenant. The engine's upkeep lock held, or everything stopped. */
void tenants_hardened(struct host *h, void (*fn)(struct tenant *t, void *arg), void *arg);

/*
 * The frame that a page of zeroes of this tenant may be merged into; PFN_NONE: it
 * is merged as any other contents. Merging's lock held.
 */
pfn_t tenant_zero(struct tenant *t);

#endif
