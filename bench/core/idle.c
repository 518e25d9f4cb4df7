/* SPDX-License-Identifier: MIT */
/*
 * What an idle clone takes: memory of this process for each of 1,000 clones of a
 * guest of 16 GiB with every 4 KiB entry present. Resident memory and host page tables, so
 * that nothing is forgotten; the note says what the engine knows of.
 */
#include <malloc.h>
#include <stdlib.h>

#include "core.h"

#define CLONES 1000

/* Free memory of the C library does not count: it would hide what is allocated next. */
static double resident_kib(void)
{
	malloc_trim(0);
	return own_kib("smaps_rollup", "Rss") + own_kib("status", "VmPTE");
}

void idle_row(const struct bench *b, struct twin *twin)
{
	unsigned n = b->smoke ? 50 : CLONES;
	struct kage_vm **clone = must_map(calloc(n, sizeof(*clone)), "memory");
	struct guest g = guest_counted(bench_size(b, 16 * GIB), KAGE_REGION_NOHUGE);
	uint64_t entries = guest_present(&g), one = 1, seen, heap;
	struct row row = {.suite = "clone", .name = "idle-1000", .unit = "KiB", .peer = "a child of fork()"};
	double kib, private;

	must(kage_vm_write(g.vm, 0, &one, 8), "write");
	row.isvoid = entries != g.bytes / PAGE;
	heap = heap_bytes();
	kib = resident_kib();
	for (unsigned i = 0; i < n; i++)
		clone[i] = must_clone(g.vm);
	row.value = (resident_kib() - kib) / n;
	heap = heap_bytes() - heap;
	for (unsigned i = 0; i < n; i++) {
		seen = 0;
		must(kage_vm_read(clone[i], 0, &seen, 8), "read");
		row.isvoid |= seen != one;
		must(kage_vm_destroy(clone[i]), "destroy");
	}
	row.peer_value = twin_ask(twin, "c 2", &private) + private;
	row_note(&row,
		 "resident memory and page tables a clone, of %u, %llu entries of 4 KiB present; objects are "
		 "%.2f KiB "
		 "of it. Peer: page tables and private memory, without the kernel's objects",
		 n, (unsigned long long)entries, (double)heap / n / 1024);
	report_row(&row);
	guest_destroy(&g);
	free(clone);
}
