/* SPDX-License-Identifier: MIT */
/*
 * Kage's own entries, inline: the primary MMU's hot paths use these, everything
 * else goes through the descriptors in format_kage.c, which are made of them.
 *
 *   63      52 51                    12 11   9 8  7 6 5 4  3 2     0
 *   | soft    | pfn (40 bits)          |  -   |SP|D|A|X|W |R| state |
 *
 * W is not a protection (regions have that) but the write rule of clones: the
 * effective W of an address is the AND along its path from the mm's root
 * entry, and an effective W means that the frame is exclusive to the guest.
 */
#ifndef KAGE_PT_ENTRY_H
#define KAGE_PT_ENTRY_H

#include "pt/pt.h"

typedef uint64_t entry_t;

#define ENTRY_STATE_MASK ((entry_t)7)
#define ENTRY_NONE ((entry_t)0)
#define ENTRY_LEAF ((entry_t)1) /* above level 0: a block */
#define ENTRY_TABLE ((entry_t)2)
#define ENTRY_SWAP ((entry_t)3)
#define ENTRY_MIGRATION ((entry_t)4)
#define ENTRY_PROTNONE ((entry_t)5)
#define ENTRY_POISON ((entry_t)6)
#define ENTRY_HOST_PRIVATE ((entry_t)7)

#define ENTRY_R ((entry_t)1 << 3)
#define ENTRY_W ((entry_t)1 << 4)
#define ENTRY_X ((entry_t)1 << 5)
#define ENTRY_A ((entry_t)1 << 6)
#define ENTRY_D ((entry_t)1 << 7)
#define ENTRY_SPECIAL ((entry_t)1 << 8) /* device frame or zero frame: refs are not counted */
#define ENTRY_PFN_MASK ((((entry_t)1 << PFN_BITS) - 1) << PAGE_SHIFT)
_Static_assert((ENTRY_PFN_MASK & 0xfff) == 0 && (ENTRY_PFN_MASK >> 52) == 0, "pfn lies in bits 12 to 51");

static inline entry_t entry_leaf(pfn_t pfn, entry_t bits) { return ENTRY_LEAF | ENTRY_R | ENTRY_X | bits | pfn.v << PAGE_SHIFT; }
static inline entry_t entry_table(pfn_t pfn, entry_t w) { return ENTRY_TABLE | ENTRY_R | ENTRY_X | w | pfn.v << PAGE_SHIFT; }
static inline entry_t entry_state(entry_t e) { return e & ENTRY_STATE_MASK; }
static inline bool entry_is_leaf(entry_t e) { return entry_state(e) == ENTRY_LEAF; }
static inline bool entry_is_table(entry_t e) { return entry_state(e) == ENTRY_TABLE; }
static inline bool entry_is_none(entry_t e) { return entry_state(e) == ENTRY_NONE; }
/* A leaf without R is fused: a page that hardened merging has looked at (mm/fused.h). It counts as any other. */
static inline entry_t entry_fused(pfn_t pfn) { return ENTRY_LEAF | pfn.v << PAGE_SHIFT; }
static inline bool entry_is_fused(entry_t e) { return (e & (ENTRY_STATE_MASK | ENTRY_R)) == ENTRY_LEAF; }
static inline pfn_t entry_pfn(entry_t e) { return PFN((e & ENTRY_PFN_MASK) >> PAGE_SHIFT); }

#endif
