/* SPDX-License-Identifier: MIT */
/*
 * Payloads on arm64: entries of 4-level tables with 4 KiB granules, the registers of the entry.
 *
 * Sources: Arm Architecture Reference Manual (DDI 0487), D8.3 (descriptors), D19.2 (SCTLR_EL1, TCR_EL1,
 * MAIR_EL1).
 */
#include "payload.h"

#define PAGE ((uint64_t)4096)
#define GIB  ((uint64_t)1 << 30)

#define UXN    ((uint64_t)1 << 54)
#define AF     (1u << 10)
#define INNER  (3u << 8)
#define DEVICE (1u << 2) /* attributes 1 of MAIR; 0: normal memory */
#define MAIR   0x04ff	 /* 0: write-back, read and write allocate; 1: Device-nGnRE */

/* 48 bits of TTBR0, walks through write-back memory; nothing through TTBR1; 40 bits of physical address. */
#define TCR ((uint64_t)2 << 32 | 1u << 23 | 3u << 12 | 1u << 10 | 1u << 8 | (64 - 48))
/* The bits that are 1 in Armv8.0; MMU, data and instruction caches on. */
#define SCTLR (0x30d00800u | 1u << 12 | 1u << 2 | 1u)

extern const char guest_vectors[] __attribute__((visibility("hidden")));

/* Only EL1 gets at it, and executes all of it. */
const struct payload_entries payload_entries = {
	.table = 3, .large = UXN | AF | INNER | 1, .page = UXN | AF | INNER | 3};

/* The ports: one block of level 1, whatever else the gigabyte had been given. */
void payload_arch_image(char *image)
{
	uint64_t *entry = (uint64_t *)(image + PAYLOAD_PDPT) + PAYLOAD_PORTS / GIB;

	*entry = PAYLOAD_PORTS / GIB * GIB | UXN | (uint64_t)1 << 53 | AF | DEVICE | 1;
}

static uint64_t code(const char *at)
{
	return PAYLOAD_CODE + (uint64_t)(at - __start_vmm_guest);
}

struct vmm_entry payload_entry(unsigned index)
{
	return (struct vmm_entry){
	    .pc = code((const char *)(uintptr_t)guest_main),
	    .sp = PAYLOAD_STACK + (index + 1) * PAGE,
	    .x0 = PAYLOAD_MAILBOX + index * PAGE,
	    .sctlr = SCTLR,
	    .ttbr0 = PAYLOAD_PML4,
	    .tcr = TCR,
	    .mair = MAIR,
	    .vbar = code(guest_vectors),
	};
}
