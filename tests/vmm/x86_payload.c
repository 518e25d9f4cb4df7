/* SPDX-License-Identifier: MIT */
/*
 * Payloads on x86-64: entries of 4-level page tables, the task state segment, the registers of the entry.
 */
#include <assert.h>
#include <string.h>

#include "payload.h"

#define PAGE ((uint64_t)4096)

/* 104 bytes, of which the bitmap's offset matters; 65536 bits, 0 allows; a byte of ones (SDM volume 1, 19.5.2). */
#define TSS_BITMAP_AT 102
#define TSS_BITMAP    104
#define TSS_LIMIT     (TSS_BITMAP + 65536 / 8)

static_assert(PAYLOAD_TSS + TSS_LIMIT < PAYLOAD_TABLES, "the TSS ends before the tables");

/* Present, writable, user, accessed; pages also dirty; bit 7: 2 MiB. */
const struct payload_entries payload_entries = {.table = 0x27, .large = 0xe7, .page = 0x67};

void payload_arch_image(char *image)
{
	const uint16_t bitmap = TSS_BITMAP;
	char *tss = image + PAYLOAD_TSS;

	memcpy(tss + TSS_BITMAP_AT, &bitmap, sizeof(bitmap));
	tss[TSS_LIMIT] = (char)0xff;
}

struct vmm_entry payload_entry(unsigned index)
{
	struct vmm_entry entry = {.cpl = 3, .cr3 = PAYLOAD_PML4, .tss = PAYLOAD_TSS, .tss_limit = TSS_LIMIT};

	entry.rip = PAYLOAD_CODE + ((const char *)(uintptr_t)guest_main - __start_vmm_guest);
	entry.rsp = PAYLOAD_STACK + (index + 1) * PAGE - 8; /* as after a call: System V ABI, 3.2.2 */
	entry.rdi = PAYLOAD_MAILBOX + index * PAGE;
	entry.rsi = 0;
	return entry;
}
