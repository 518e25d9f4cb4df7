/* SPDX-License-Identifier: MIT */
/*
 * What an x86 CPU does with one linear address, under 32-bit, PAE, 4-level and
 * 5-level paging: a second opinion, written from the manual (Intel SDM vol. 3A
 * ch. 4) and nothing else. It shares no header, no table and no constant with
 * the engine.
 */
#ifndef KAGE_TESTS_X86_REFERENCE_H
#define KAGE_TESTS_X86_REFERENCE_H

#include <stdbool.h>
#include <stdint.h>

#include "ref_memory.h"

enum ref_access { REF_READ, REF_WRITE, REF_FETCH };

enum ref_outcome {
	REF_OK,
	REF_PAGE_FAULT,
	REF_NOT_CANONICAL, /* #GP(0) */
	REF_NO_MEMORY,     /* a paging structure lies where no memory answers */
};

struct ref_cpu {
	uint64_t cr0, cr3, cr4, efer, rflags;
	uint32_t cpl;
	uint32_t pkru;
	uint32_t phys_bits; /* MAXPHYADDR */
	bool page1gb;       /* CPUID.80000001H:EDX.Page1GB */
	bool implicit;      /* the access is an implicit supervisor-mode access */
	uint64_t pdpte[4];  /* PAE: the registers, see ref_load_pdptes() */
};

struct ref_result {
	enum ref_outcome outcome;
	uint64_t gpa;    /* REF_OK: the translation; REF_NO_MEMORY: of the entry */
	uint32_t error;  /* REF_PAGE_FAULT: error code */
	unsigned level;  /* of the last entry looked at: 0 is the PTE, 1 the PDE, 4 the PML5E */
	unsigned size;   /* REF_OK: log2 of the page's size */
};

struct ref_result ref_translate(const struct ref_cpu *cpu, const struct ref_memory *mem, uint64_t linear,
				enum ref_access access);

/*
 * 4.4.1: what MOV to CR3 does under PAE paging. False: #GP(0), a PDPTE has reserved bits set, or lies in no memory;
 * the registers are then as they were.
 */
bool ref_load_pdptes(struct ref_cpu *cpu, const struct ref_memory *mem);

#endif
