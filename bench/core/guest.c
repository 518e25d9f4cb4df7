/* SPDX-License-Identifier: MIT */
/* Engines and guests for the suites, and ways into their memory. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>

#include "core.h"

struct guest guest_create(uint64_t bytes, uint32_t region_flags, uint64_t reserve)
{
	struct guest g = {.bytes = bytes};

	must(kage_engine_create(KAGE_CFG(kage_engine_config, .reserve = reserve), &g.engine), "engine");
	must(kage_vm_create(g.engine, NULL, &g.vm), "guest");
	must(kage_vm_map(g.vm, KAGE_CFG(kage_region, .len = bytes, .flags = region_flags)), "region");
	return g;
}

static uint64_t heap;

static void *counted_alloc(void *opaque, size_t bytes)
{
	void *p;

	if (posix_memalign(&p, 64, bytes))
		return NULL;
	heap += bytes;
	return memset(p, 0, bytes);
}

static void counted_free(void *opaque, void *p, size_t bytes)
{
	heap -= bytes;
	free(p);
}

uint64_t heap_bytes(void)
{
	return heap;
}

struct guest guest_counted(uint64_t bytes, uint32_t region_flags)
{
	struct guest g = {.bytes = bytes};
	const struct kage_alloc alloc = {.alloc = counted_alloc, .free = counted_free};

	must(kage_engine_create(KAGE_CFG(kage_engine_config, .alloc = alloc), &g.engine), "engine");
	must(kage_vm_create(g.engine, NULL, &g.vm), "guest");
	must(kage_vm_map(g.vm, KAGE_CFG(kage_region, .len = bytes, .flags = region_flags)), "region");
	return g;
}

void guest_destroy(struct guest *g)
{
	must(kage_vm_destroy(g->vm), "destroy guest");
	must(kage_engine_destroy(g->engine), "destroy engine");
}

struct kage_stats guest_counters(const struct guest *g, struct kage_vm *vm)
{
	struct kage_stats s = {.size = sizeof(s)};

	must(kage_counters_get(g->engine, vm, &s), "counters");
	return s;
}

struct kage_stats guest_stats(const struct guest *g, struct kage_vm *vm)
{
	struct kage_stats s = {.size = sizeof(s)};

	must(kage_stats_get(g->engine, vm, &s), "stats");
	return s;
}

uint64_t guest_present(const struct guest *g)
{
	struct kage_reader r;
	struct kage_page page;
	uint64_t entries = 0;
	struct kage_stats before = guest_counters(g, g->vm), after;

	must(kage_reader_init(g->vm, &r), "reader");
	for (uint64_t gpa = 0; gpa < g->bytes; entries++) {
		int result;

		do {
			kage_reader_begin(&r, gpa, PAGE);
			result = kage_backend_fault(g->vm, &r, gpa, KAGE_READ, &page);
			kage_reader_end(&r);
		} while (result == KAGE_RETRY);
		must(result, "fault");
		gpa = page.gpa + page.len;
	}
	kage_reader_finish(&r);
	after = guest_counters(g, g->vm);
	return after.faults - before.faults - (after.faults_spurious - before.faults_spurious) == entries
		   ? entries
		   : 0;
}

char *guest_raw(const struct guest *g, uint64_t bytes)
{
	struct iovec iov;
	unsigned n = 1;

	must(kage_vm_pin(g->vm, 0, bytes, 0, &iov, &n), "pin");
	return iov.iov_base;
}

void guest_unraw(const struct guest *g, uint64_t bytes)
{
	must(kage_vm_unpin(g->vm, 0, bytes), "unpin");
}

static void put_entry(const struct guest *g, uint64_t table, uint64_t gva, unsigned level, uint64_t target)
{
	uint64_t slot = table + (gva >> (12 + 9 * level) & 511) * 8;
	/* present, writable, user, accessed; dirty in a leaf */
	uint64_t entry = target | 0x27 | (level == 0 ? 0x40 : 0);

	must(kage_vm_write(g->vm, slot, &entry, 8), "guest table");
}

uint64_t guest_tables(const struct guest *g, struct guest_map m)
{
	uint64_t pds = m.tables + 2 * PAGE, pts = pds + (m.bytes + GIB - 1) / GIB * PAGE, n = 0;

	put_entry(g, m.tables, m.gva, 3, m.tables + PAGE);
	for (uint64_t at = 0; at < m.bytes; at += m.large ? 2 * MIB : PAGE, n++) {
		uint64_t pd = pds + at / GIB * PAGE, pt = pts + at / (2 * MIB) * PAGE;

		if (at % GIB == 0)
			put_entry(g, m.tables + PAGE, m.gva + at, 2, pd);
		if (m.large) {
			put_entry(g, pd, m.gva + at, 1, (m.gpa + at) | 0xc0); /* dirty, large */
			continue;
		}
		if (at % (2 * MIB) == 0)
			put_entry(g, pd, m.gva + at, 1, pt);
		put_entry(g, pt, m.gva + at, 0, m.gpa + at);
	}
	return n;
}

struct kage_vcpu *vcpu_flat(struct kage_vm *vm, unsigned tlb_bits)
{
	struct kage_vcpu *v;

	must(kage_vcpu_create(vm, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .tlb_bits = tlb_bits), &v), "vCPU");
	return v;
}

struct kage_vcpu *vcpu_paged(struct kage_vm *vm, uint64_t tables, unsigned tlb_bits)
{
	struct kage_vcpu *v = vcpu_flat(vm, tlb_bits);
	const struct kage_x86_regs regs = {
	    .cr0 = 0x80010001, /* PG, WP, PE */
	    .cr3 = tables,
	    .cr4 = 0x20,   /* PAE */
	    .efer = 0xd00, /* NXE, LMA, LME */
	    .cpl = 3,
	};

	must(kage_vcpu_set_regs(v, &regs, sizeof(regs)), "registers");
	return v;
}

struct kage_vm *must_clone(struct kage_vm *vm)
{
	struct kage_vm *clone;

	must(kage_vm_clone(vm, NULL, &clone), "clone");
	return clone;
}
