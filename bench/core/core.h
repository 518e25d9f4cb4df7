/* SPDX-License-Identifier: MIT */
/*
 * The parts of kage-bench-core, beside ../common.
 *
 *   guest.c     engines, guests, raw pointers, guest page tables
 *   translate.c TLB hits and warm misses against raw accesses
 *   clone.c     clone, first write after, un-share
 *   cow.c       COW break against the kernel's
 *   storm.c     retries while unrelated ranges change
 *   memory.c    what a mapped guest costs
 */
#ifndef KAGE_BENCH_CORE_H
#define KAGE_BENCH_CORE_H

#include <kage/backend.h>

#include "common.h"

/* -- guest.c ------------------------------------------------------------------------ */

struct guest {
	struct kage_engine *engine;
	struct kage_vm *vm;
	uint64_t bytes;
};

/* An engine with one guest with one region. reserve: see kage_engine_config. */
struct guest guest_create(uint64_t bytes, uint32_t region_flags, uint64_t reserve);
void guest_destroy(struct guest *g);
/* Steps until nothing waits for its grace period. */
void guest_settle(const struct guest *g);
/* Makes every entry present by read faults; no memory is populated. Returns the number of entries made, 0 if
 * the engine's count of faults that made one is another. */
uint64_t guest_present(const struct guest *g);
struct kage_stats guest_stats(const struct guest *g, struct kage_vm *vm);
/* The guest's memory at gpa 0 as one host range. It is pinned until guest_unraw(). */
char *guest_raw(const struct guest *g, uint64_t bytes);
void guest_unraw(const struct guest *g, uint64_t bytes);
/* Builds 4-level tables that map [gva, gva + bytes) to gpa 0 by 4 KiB pages; they lie at `tables`. */
void guest_tables(const struct guest *g, uint64_t gva, uint64_t bytes, uint64_t tables);
struct kage_vcpu *vcpu_flat(struct kage_vm *vm, unsigned tlb_bits); /* 0: the default */
/* Long mode, CPL 3, CR3 = tables. */
struct kage_vcpu *vcpu_paged(struct kage_vm *vm, uint64_t tables, unsigned tlb_bits);
struct kage_vm *must_clone(struct kage_vm *vm);

/* -- suites --------------------------------------------------------------------------------- */

void bench_translate(const struct bench *b);
void bench_clone(const struct bench *b);
void bench_cow(const struct bench *b);
void bench_storm(const struct bench *b);
void bench_memory(const struct bench *b);

#endif
