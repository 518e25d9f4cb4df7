/* SPDX-License-Identifier: MIT */
/*
 * Typed addresses. A gfn is not a pfn: one-field structs make the compiler say
 * so. All conversions are here; plain integers appear only at the public
 * boundary and inside page table entries. (The habit is hafnium's.)
 */
#ifndef KAGE_BASE_ADDR_H
#define KAGE_BASE_ADDR_H

#include <kage/vm.h>
#include "base/base.h"

typedef struct { uint64_t v; } gva_t; /* guest virtual address */
typedef struct { uint64_t v; } gpa_t; /* guest physical address */
typedef struct { uint64_t v; } gfn_t; /* gpa >> 12 */
typedef struct { uint64_t v; } pfn_t; /* frame of the pool */

#define GVA(x) ((gva_t){ (x) })
#define GPA(x) ((gpa_t){ (x) })
#define GFN(x) ((gfn_t){ (x) })
#define PFN(x) ((pfn_t){ (x) })

/*
 * pfn 0 is never a frame; all below ZERO_PFNS are frames of zeroes: pfn 1, which all domains may
 * map, then those that a domain has to itself.
 */
#define PFN_NONE PFN(0)
#define PFN_ZERO PFN(1)
#define ZERO_PFNS ((uint64_t)1 << 15)
#define PFN_BITS 40
#define GFN_BITS (KAGE_GPA_BITS - PAGE_SHIFT)

static inline gfn_t gpa_gfn(gpa_t a) { return GFN(a.v >> PAGE_SHIFT); }
static inline gpa_t gfn_gpa(gfn_t g) { return GPA(g.v << PAGE_SHIFT); }
static inline uint64_t gpa_offset(gpa_t a) { return a.v & (PAGE_SIZE - 1); }
static inline gfn_t gfn_add(gfn_t g, uint64_t n) { return GFN(g.v + n); }
static inline pfn_t pfn_add(pfn_t p, uint64_t n) { return PFN(p.v + n); }
static inline bool pfn_eq(pfn_t a, pfn_t b) { return a.v == b.v; }
static inline bool pfn_is_none(pfn_t p) { return p.v == 0; }
static inline bool pfn_is_zero(pfn_t p) { return p.v < ZERO_PFNS && p.v != 0; }

/* Pages that an entry of a level maps; leaf is level 0. Nine bits a level. */
#define LEVEL_BITS 9
#define LEVEL_ENTRIES 512
static inline uint64_t level_pages(unsigned level) { return (uint64_t)1 << (LEVEL_BITS * level); }
static inline unsigned level_index(gfn_t g, unsigned level)
{
	return (g.v >> (LEVEL_BITS * level)) & (LEVEL_ENTRIES - 1);
}

#define BLOCK_PAGES ((uint64_t)1 << LEVEL_BITS)       /* 2 MiB */
#define GIANT_PAGES ((uint64_t)1 << (2 * LEVEL_BITS)) /* 1 GiB */

#endif
