/* SPDX-License-Identifier: MIT */
/*
 * What a guest takes beside its memory: primary tables, frame metadata and
 * objects, with every entry present, as a share of the guest's memory; an engine
 * without guests has a row of its own. Then what a clone and a vCPU take.
 *
 * Linux pays 64 bytes of struct page for each 4 KiB (not optimised away for ordinary
 * memory, huge or not) and page tables: 8 bytes for each 4 KiB, or 8 for each 2 MiB and
 * a table kept aside for the day it is split. Struct pages are arithmetic; page tables
 * are VmPTE of a process with that much memory where one fits, else arithmetic.
 *
 * Suite clone has guests of the same sizes. Where it has run in this process, what they
 * took is reported here, and none is made again.
 */
#include <errno.h>
#include <stdlib.h>

#include "core.h"

#define SPOTS	  16 /* ranges that a clone writes */
#define SPAN	  (2 * MIB)
#define CLONES	  64
#define VCPUS	  32
#define TLB_PAGES 16384 /* of the default table */

struct linux_cost {
	double tables; /* bytes */
	bool measured;
};

/* kind: of the process; a process that is too large is computed. */
static struct linux_cost linux_tables(const struct bench *b, uint64_t bytes, bool block)
{
	struct linux_cost c = {.tables =
				   block ? (double)(bytes / SPAN) * (8 + 4096) : (double)(bytes / PAGE) * 8};
	struct twin twin;

	if (block ? bytes > GIB : bytes > 16 * GIB && b->quick)
		return c;
	twin = twin_start(block ? TWIN_HUGE : bytes > GIB ? TWIN_MANY : TWIN_REAL, bytes);
	c.tables = twin_ask(&twin, "m", NULL) * 1024;
	c.measured = true;
	twin_stop(&twin);
	return c;
}

/* An engine without guests. */
static double engine_bytes(void)
{
	double others = (double)heap_bytes(), bytes;
	struct guest g = guest_counted(PAGE, 0);

	must(kage_vm_destroy(g.vm), "destroy guest");
	guest_settle(&g);
	bytes = (double)heap_bytes() - others;
	must(kage_engine_destroy(g.engine), "destroy engine");
	return bytes;
}

/* What a guest takes, in bytes, the engine itself apart. */
struct cost {
	uint64_t bytes, entries; /* entries 0: no such guest yet */
	uint32_t flags;
	double tables, metadata, objects;
};

static struct cost known[6]; /* as many kinds of guests as there are rows */

static struct cost *cost_find(uint64_t bytes, uint32_t flags)
{
	struct cost *c = known;

	while (c->entries && (c->bytes != bytes || c->flags != flags))
		must(++c < known + LENGTH(known) ? 0 : -ENOSPC, "kinds of guests");
	return c;
}

struct guest guest_measured(uint64_t bytes, uint32_t region_flags, uint64_t *entries)
{
	double before = (double)heap_bytes() + engine_bytes();
	struct guest g = guest_counted(bytes, region_flags);
	struct kage_stats s;

	*entries = guest_present(&g);
	s = guest_counters(&g, NULL);
	*cost_find(bytes, region_flags) = (struct cost){.bytes = bytes,
							.entries = *entries,
							.flags = region_flags,
							.tables = (double)(s.frames_table * PAGE),
							.metadata = (double)s.bytes_metadata,
							.objects = (double)heap_bytes() - before};
	return g;
}

static struct cost cost_of(uint64_t bytes, uint32_t flags)
{
	const struct cost *c = cost_find(bytes, flags);
	uint64_t entries;

	if (!c->entries) {
		struct guest g = guest_measured(bytes, flags, &entries);

		guest_destroy(&g);
	}
	return *c;
}

static void metadata_row(const struct bench *b, const char *name, uint64_t bytes, bool block)
{
	uint64_t size = bench_size(b, bytes);
	struct cost ours = cost_of(size, block ? 0 : KAGE_REGION_NOHUGE);
	struct linux_cost theirs = linux_tables(b, size, block);
	struct row row = {
	    .suite = "memory", .name = name, .unit = "%", .goal = GOAL_MOST, .limit = block ? 0.05 : 0.6};

	row.peer = theirs.measured ? "Linux: struct page (arithmetic) and VmPTE"
				   : "Linux: struct page and tables, arithmetic";
	row.value = (ours.tables + ours.metadata + ours.objects) * 100 / (double)size;
	row.peer_value = ((double)(size / PAGE) * 64 + theirs.tables) * 100 / (double)size;
	/* All of it is mapped, by as many entries as the row says. */
	row.isvoid = block ? !ours.entries || ours.entries > size / SPAN : ours.entries != size / PAGE;
	row_note(&row,
		 "%llu entries present; tables %.2f MiB, metadata %.2f, objects %.2f. Linux: tables %.2f "
		 "MiB, rest struct page",
		 (unsigned long long)ours.entries, ours.tables / (double)MIB, ours.metadata / (double)MIB,
		 ours.objects / (double)MIB, theirs.tables / (double)MIB);
	report_row(&row);
}

/* -- a clone, a vCPU ----------------------------------------------------------------------- */

/* What the engine has beside the guests' pages. */
static double beside(const struct guest *g)
{
	struct kage_stats s = guest_counters(g, NULL);

	return (double)(s.frames_table * PAGE + s.bytes_metadata + s.shadow_bytes) + (double)heap_bytes();
}

static void per_clone_rows(struct guest *g)
{
	struct kage_vm *clone[CLONES];
	struct row row = {.suite = "memory", .name = "per-clone", .unit = "KiB"};
	uint64_t spots = g->bytes / SPAN < SPOTS ? g->bytes / SPAN : SPOTS, seen = 0;
	double before = beside(g), idle;

	for (unsigned i = 0; i < CLONES; i++)
		clone[i] = must_clone(g->vm);
	idle = beside(g);
	for (uint64_t i = 1; i <= CLONES * spots; i++)
		must(kage_vm_write(clone[(i - 1) / spots], (i - 1) % spots * SPAN, &i, 8), "write");
	row.value = (idle - before) / CLONES / 1024;
	for (uint64_t i = 1; i <= CLONES * spots; i++) {
		must(kage_vm_read(clone[(i - 1) / spots], (i - 1) % spots * SPAN, &seen, 8), "read");
		row.isvoid |= seen != i;
	}
	row_note(&row, "objects and tables of an idle clone by the engine's count; clone/idle-1000 has what "
		       "is resident");
	report_row(&row);
	row.name = "per-clone-range";
	row.value = (beside(g) - idle) / CLONES / (double)spots / 1024;
	row.peer = "a page table and 64 bytes of struct page";
	row.peer_value = (4096 + 64) / 1024.;
	row_note(&row, "each 2 MiB range that a clone has begun to write: its leaf table, its share of those "
		       "above; the copied "
		       "page itself apart");
	report_row(&row);
	for (unsigned i = 0; i < CLONES; i++)
		must(kage_vm_destroy(clone[i]), "destroy");
	guest_settle(g);
}

/* Resident memory: what the engine maps for TLBs is in no count of its own. */
static double vcpus_kib(struct guest *g, struct kage_vcpu *v[VCPUS], uint64_t pages, bool *ok)
{
	double kib = own_kib("smaps_rollup", "Rss") + own_kib("status", "VmPTE");
	uint64_t word = 0, sum = 0;

	for (unsigned i = 0; i < VCPUS; i++)
		if (!v[i])
			v[i] = vcpu_flat(g->vm, 0);
	for (unsigned i = 0; i < VCPUS; i++)
		for (uint64_t at = 0; at < pages; at++) {
			must(kage_vcpu_load(v[i], at * PAGE, &word, 8, NULL), "load");
			sum += word == 0;
		}
	*ok &= sum == pages * VCPUS;
	return (own_kib("smaps_rollup", "Rss") + own_kib("status", "VmPTE") - kib) / VCPUS;
}

static void per_vcpu_rows(struct guest *g)
{
	struct kage_vcpu *first = vcpu_flat(g->vm, 0), *v[VCPUS] = {NULL};
	uint64_t pages = g->bytes / PAGE < TLB_PAGES ? g->bytes / PAGE : TLB_PAGES, word;
	struct row row = {.suite = "memory", .name = "per-vcpu", .unit = "KiB"};
	uint64_t heap;
	bool ok = true;

	for (uint64_t at = 0; at < pages; at++) /* the guest's shadow tables, and what is behind its pages */
		must(kage_vcpu_load(first, at * PAGE, &word, 8, NULL), "load");
	heap = heap_bytes();
	vcpus_kib(g, v, 0, &ok);
	row.value = (double)(heap_bytes() - heap) / VCPUS / 1024;
	row_note(&row, "objects, of %u vCPUs that have not run", VCPUS);
	report_row(&row);
	row.name = "per-vcpu-used";
	row.value = vcpus_kib(g, v, pages, &ok);
	row.isvoid = !ok;
	row_note(&row,
		 "resident, more once it has used %llu pages: its TLB of 32 bytes an entry; shadow tables "
		 "are the guest's",
		 (unsigned long long)pages);
	report_row(&row);
	for (unsigned i = 0; i < VCPUS; i++)
		kage_vcpu_destroy(v[i]);
	kage_vcpu_destroy(first);
}

void bench_memory(const struct bench *b)
{
	struct row row = {.suite = "memory", .name = "per-engine", .unit = "KiB"};
	struct guest g;

	metadata_row(b, "metadata-4k-1g", GIB, false);
	metadata_row(b, "metadata-4k", 16 * GIB, false);
	metadata_row(b, "metadata-4k-256g", 256 * GIB, false);
	metadata_row(b, "metadata-block-1g", GIB, true);
	metadata_row(b, "metadata-block", 16 * GIB, true);
	metadata_row(b, "metadata-block-256g", 256 * GIB, true);
	row.value = engine_bytes() / 1024;
	row_note(&row, "objects of an engine without guests, whatever its guests' size");
	report_row(&row);
	g = guest_counted(bench_size(b, GIB), KAGE_REGION_NOHUGE);
	guest_present(&g);
	per_clone_rows(&g);
	per_vcpu_rows(&g);
	guest_destroy(&g);
}
