/* SPDX-License-Identifier: MIT */
/*
 * What an arm64 CPU does with one virtual address in stage 1 of the EL1&0
 * regime: a second opinion, written from the manual (Arm Architecture
 * Reference Manual for A-profile, DDI 0487, chapter D8) and nothing else. It
 * shares no header, no table and no constant with the engine.
 *
 * Not in here, because nothing that is compared has it: big-endian tables,
 * FEAT_D128, permission indirection and overlay, E0PD, NFD, MTE, BTI, stage 2.
 */
#ifndef KAGE_TESTS_ARM64_REFERENCE_H
#define KAGE_TESTS_ARM64_REFERENCE_H

#include <stdbool.h>
#include <stdint.h>

#include "ref_memory.h"

enum arm64_ref_access { ARM64_REF_READ, ARM64_REF_WRITE, ARM64_REF_FETCH };

enum arm64_ref_outcome {
	ARM64_REF_OK,
	ARM64_REF_ABORT,
	ARM64_REF_NO_MEMORY, /* a table lies where no memory answers */
};

struct arm64_ref_cpu {
	uint64_t sctlr, tcr, ttbr0, ttbr1, pstate; /* as the registers; pstate as SPSR_EL1: EL in 3:2, PAN in 22 */
	unsigned pa_bits;                          /* what ID_AA64MMFR0_EL1.PARange says, in bits */
	bool haf, hd, pan, epan, hpds, lva, lpa, lpa2, ttst, gran16, gran64;
};

struct arm64_ref_result {
	enum arm64_ref_outcome outcome;
	uint64_t gpa;  /* OK: the translation; NO_MEMORY: of the descriptor */
	uint32_t ec;   /* ABORT: ESR_EL1.EC */
	uint32_t iss;  /* ABORT: fault status code in bits 5:0, WnR in bit 6 */
	int level;     /* of the last descriptor looked at, as Arm counts: 3 is the page; of the fault status code */
	unsigned size; /* OK: log2 of the block's size */
	/*
	 * Permission fault through a descriptor whose access flag hardware may
	 * set: the manual leaves open whether it does (D8.4.6). The reference
	 * does not.
	 */
	bool af_open;
};

struct arm64_ref_result arm64_ref_translate(const struct arm64_ref_cpu *cpu, const struct ref_memory *mem, uint64_t va,
					    enum arm64_ref_access access);

#endif
