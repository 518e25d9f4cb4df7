/* SPDX-License-Identifier: MIT */
/*
 * For tests: a guest with memory from gpa 0, a vCPU, and x86 page tables that
 * the test builds in guest memory.
 */
#ifndef TESTS_GUEST_TABLES_H
#define TESTS_GUEST_TABLES_H

#include <check.h>
#include <kage/kage.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PTE_P	   1ull
#define PTE_W	   2ull
#define PTE_U	   4ull
#define PTE_A	   0x20ull
#define PTE_D	   0x40ull
#define PTE_PS	   0x80ull
#define PTE_G	   0x100ull
#define PTE_NX	   (1ull << 63)
#define PTE_ADDR   0x000ffffffffff000ull
#define PTE_KEY(k) ((uint64_t)(k) << 59)

#define MIB    (1ull << 20)
#define GIB    (1ull << 30)
#define TABLES (1 * MIB) /* tables are allocated from here up */

struct guest {
	struct kage_engine *engine;
	struct kage_vm *vm;
	struct kage_vcpu *cpu;
	struct kage_x86_regs regs;
	uint64_t next_table;
	unsigned levels;
};

static inline uint64_t guest_r64(struct guest *g, uint64_t gpa)
{
	uint64_t v = 0;

	ck_assert_int_eq(kage_vm_read(g->vm, gpa, &v, 8), KAGE_OK);
	return v;
}

static inline void guest_w64(struct guest *g, uint64_t gpa, uint64_t v)
{
	ck_assert_int_eq(kage_vm_write(g->vm, gpa, &v, 8), KAGE_OK);
}

static inline uint64_t guest_table(struct guest *g)
{
	static const char zero[4096];
	uint64_t gpa = g->next_table;

	g->next_table += 4096;
	ck_assert_int_eq(kage_vm_write(g->vm, gpa, zero, 4096), KAGE_OK);
	return gpa;
}

/* Where the entry of `level` for gva lies; makes the tables above it in the space of `root`. */
static inline uint64_t guest_entry_gpa(struct guest *g, uint64_t root, uint64_t gva, unsigned level)
{
	uint64_t table = root;

	for (unsigned l = g->levels - 1; l > level; l--) {
		uint64_t at = table + (gva >> (12 + 9 * l) & 511) * 8, e = guest_r64(g, at);

		if (!(e & PTE_P)) {
			e = guest_table(g) | PTE_P | PTE_W | PTE_U;
			guest_w64(g, at, e);
		}
		table = e & PTE_ADDR;
	}
	return table + (gva >> (12 + 9 * level) & 511) * 8;
}

static inline uint64_t guest_map(struct guest *g, uint64_t root, uint64_t gva, uint64_t gpa, uint64_t flags,
				 unsigned level)
{
	uint64_t at = guest_entry_gpa(g, root, gva, level);

	guest_w64(g, at, gpa | flags | PTE_P | (level ? PTE_PS : 0));
	return at;
}

static inline int guest_set_regs(struct guest *g)
{
	return kage_vcpu_set_regs(g->cpu, &g->regs, sizeof(g->regs));
}

/* Long mode, paging on, supervisor, WP, NXE; returns the root. */
static inline uint64_t guest_long_mode(struct guest *g, unsigned levels)
{
	uint64_t root;

	g->levels = levels;
	root = guest_table(g);
	g->regs = (struct kage_x86_regs){
	    .cr0 = 0x80010001,
	    .cr3 = root,
	    .cr4 = 0x20 | (levels == 5 ? 1 << 12 : 0),
	    .efer = 0xd00,
	};
	ck_assert_int_eq(guest_set_regs(g), KAGE_OK);
	return root;
}

static inline struct kage_vcpu *guest_cpu(struct guest *g)
{
	struct kage_vcpu *cpu;

	ck_assert_int_eq(kage_vcpu_create(g->vm,
					  KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI,
						   .features = KAGE_X86_NX | KAGE_X86_PAGE1GB |
							       KAGE_X86_SMEP | KAGE_X86_SMAP | KAGE_X86_PCID |
							       KAGE_X86_LA57 | KAGE_X86_PKU),
					  &cpu),
			 KAGE_OK);
	return cpu;
}

static inline void guest_start(struct guest *g, uint64_t bytes)
{
	memset(g, 0, sizeof(*g));
	ck_assert_int_eq(kage_engine_create(KAGE_CFG(kage_engine_config, .address_space = 64 * GIB,
						     .window_timeout_ms = 500),
					    &g->engine),
			 KAGE_OK);
	ck_assert_int_eq(kage_vm_create(g->engine, NULL, &g->vm), KAGE_OK);
	ck_assert_int_eq(kage_vm_map(g->vm, KAGE_CFG(kage_region, .len = bytes)), KAGE_OK);
	g->next_table = TABLES;
	g->cpu = guest_cpu(g);
}

static inline void guest_report(void *opaque, const char *line)
{
	(void)opaque;
	fprintf(stderr, "audit: %s\n", line);
}

static inline void guest_audit(struct guest *g)
{
	struct kage_audit a = {.size = sizeof(a), .report = guest_report};

	ck_assert_int_eq(kage_engine_audit(g->engine, &a), KAGE_OK);
	ck_assert_uint_gt(a.checks, 0);
}

static inline void guest_stop(struct guest *g)
{
	guest_audit(g);
	kage_vcpu_destroy(g->cpu);
	ck_assert_int_eq(kage_vm_destroy(g->vm), KAGE_OK);
	ck_assert_int_eq(kage_engine_destroy(g->engine), KAGE_OK);
}

static inline uint64_t cpu_load(struct kage_vcpu *cpu, uint64_t gva)
{
	struct kage_fault f = {0};
	uint64_t v = 0;
	int r = kage_vcpu_load(cpu, gva, &v, 8, &f);

	ck_assert_msg(r == KAGE_OK, "load of %#lx: %d, vector %u error %#x gpa %#lx", (unsigned long)gva, r,
		      f.vector, f.error, (unsigned long)f.gpa);
	return v;
}

static inline void cpu_store(struct kage_vcpu *cpu, uint64_t gva, uint64_t v)
{
	struct kage_fault f = {0};
	int r = kage_vcpu_store(cpu, gva, &v, 8, &f);

	ck_assert_msg(r == KAGE_OK, "store to %#lx: %d, vector %u error %#x gpa %#lx", (unsigned long)gva, r,
		      f.vector, f.error, (unsigned long)f.gpa);
}

#define KIND_LOAD  0
#define KIND_STORE 1
#define KIND_FETCH 2

/* One access that must fault in the guest with this error code. */
static inline void cpu_faults(struct kage_vcpu *cpu, uint64_t gva, int kind, uint32_t error)
{
	struct kage_fault f = {0};
	uint64_t v = 0;
	int r = kind == KIND_LOAD    ? kage_vcpu_load(cpu, gva, &v, 8, &f)
		: kind == KIND_STORE ? kage_vcpu_store(cpu, gva, &v, 8, &f)
				     : kage_vcpu_fetch(cpu, gva, &v, 8, &f);

	ck_assert_int_eq(r, KAGE_GUEST_FAULT);
	ck_assert_uint_eq(f.vector, 14);
	ck_assert_uint_eq(f.error, error);
	ck_assert_uint_eq(f.gva, gva);
}

#endif
