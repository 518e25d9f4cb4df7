/* SPDX-License-Identifier: MIT */
/*
 * The space of permission cases, shared by the tests that go through it: what
 * each of four levels grants (writable, user, executable not), a reserved bit
 * at one of the levels or none, and the mode of the CPU.
 */
#ifndef KAGE_TESTS_PERM_SPACE_H
#define KAGE_TESTS_PERM_SPACE_H

#include "x86_reference.h"

#define PERM_COMBOS 4096 /* 3 bits a level: level n in bits 3n to 3n+2 */
#define PERM_MODES 32
#define PERM_PHYS_BITS 46
#define PERM_NO_RESERVED 4 /* in place of a level */

static inline unsigned perm_of_level(unsigned combo, unsigned level)
{
	return (combo >> (3 * level)) & 7;
}

/* P, and R/W, U/S, XD as the three bits say. */
static inline uint64_t perm_entry_bits(unsigned perm)
{
	return 1 | (perm & 1 ? 1u << 1 : 0) | (perm & 2 ? 1u << 2 : 0) |
	       (perm & 4 ? UINT64_C(1) << 63 : 0);
}

/* One of the address bits above MAXPHYADDR. */
static inline uint64_t perm_reserved_bit(unsigned pick)
{
	return UINT64_C(1) << (PERM_PHYS_BITS + pick % (52 - PERM_PHYS_BITS));
}

/* Mode bits: CPL 3, WP, SMEP, SMAP, AC. */
static inline struct ref_cpu perm_cpu(unsigned mode, uint64_t cr3)
{
	return (struct ref_cpu){
		.cr0 = 0x80000011 | (mode & 2 ? 1u << 16 : 0),
		.cr3 = cr3,
		.cr4 = 1u << 5 | (mode & 4 ? 1u << 20 : 0) | (mode & 8 ? 1u << 21 : 0),
		.efer = 0xd00,
		.rflags = 2 | (mode & 16 ? 1u << 18 : 0),
		.cpl = mode & 1 ? 3 : 0,
		.phys_bits = PERM_PHYS_BITS,
		.page1gb = true,
	};
}

#endif
