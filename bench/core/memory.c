/* SPDX-License-Identifier: MIT */
/*
 * Primary tables and frame metadata of a 16 GiB guest with every entry present,
 * as a share of its memory. Linux pays 64 bytes of struct page and 8 bytes of
 * page table for each 4 KiB; for a 2 MiB page 64 * 512 and 8 (struct pages are
 * not optimised away for ordinary memory), and 8 bytes of page table reserve.
 */
#include <stdio.h>

#include "core.h"

#define SIZE (16 * GIB)

static void memory_row(const char *name, uint32_t flags, double limit, double linux_bytes, const char *peer)
{
	struct guest g = guest_create(SIZE, flags, 0);
	uint64_t entries = guest_present(&g);
	struct kage_stats s = guest_stats(&g, NULL);
	double bytes = (double)(s.frames_table * PAGE + s.bytes_metadata);
	struct row row = {.suite = "memory",
			  .name = name,
			  .unit = "%",
			  .peer = peer,
			  .goal = GOAL_MOST,
			  .limit = limit,
			  .value = bytes * 100 / (double)SIZE,
			  .peer_value = linux_bytes * 100 / (double)SIZE};

	/* All of it is mapped, by as many entries as the row says. */
	row.isvoid =
	    flags & KAGE_REGION_NOHUGE ? entries != SIZE / PAGE : !entries || entries > SIZE / (2 * MIB);
	row_note(&row, "%llu entries present; tables %.1f MiB, metadata %.1f MiB, shadow apart (%.1f MiB)",
		 (unsigned long long)entries, (double)(s.frames_table * PAGE) / (double)MIB,
		 (double)s.bytes_metadata / (double)MIB, (double)s.shadow_bytes / (double)MIB);
	report_row(&row);
	guest_destroy(&g);
}

void bench_memory(const struct bench *b)
{
	(void)b;
	memory_row("metadata-4k", KAGE_REGION_NOHUGE, 0.6, (double)(SIZE / PAGE) * (64 + 8),
		   "Linux: struct page and tables, arithmetic");
	memory_row("metadata-block", 0, 0.05,
		   (double)(SIZE / PAGE) * 64 + (double)(SIZE / (2 * MIB)) * (8 + 4096),
		   "Linux with huge pages, arithmetic");
}
