/* SPDX-License-Identifier: MIT */
/*
 * The parts of kage-bench-core, beside ../common.
 *
 *   guest.c     engines, guests, raw pointers, guest page tables
 *   translate.c TLB hits and misses against raw accesses and Unicorn; access.c: the accesses
 *   tables.c    shadow misses, context switches, changes of guest tables
 *   unicorn.c   that peer, and asm.c its guest code
 *   twin.c      a process with as much memory as a guest: fork(), /proc
 *   clone.c     clone, first write after, un-share; idle.c: what a clone takes
 *   cow.c       COW break against the kernel's
 *   touch.c     first touch and protection, map.c regions, threads.c two threads at once
 *   storm.c     retries while unrelated ranges change
 *   dirty.c     harvests, and what tracking costs; scan.c: the kernel's ways
 *   memory.c    what a mapped guest takes
 *   scale.c     1,000 guests against 32
 */
#ifndef KAGE_BENCH_CORE_H
#define KAGE_BENCH_CORE_H

#include <stdio.h>

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
static inline void guest_settle(const struct guest *g)
{
	steps_settle(g->engine);
}
/* Makes every entry present by read faults; no memory is populated. Returns the number of entries made, 0 if
 * the engine's count of faults that made one is another. */
uint64_t guest_present(const struct guest *g);
struct kage_stats guest_counters(const struct guest *g, struct kage_vm *vm); /* without what is counted by a walk */
struct kage_stats guest_stats(const struct guest *g, struct kage_vm *vm);
/* The guest's memory at gpa 0 as one host range. It is pinned until guest_unraw(). */
char *guest_raw(const struct guest *g, uint64_t bytes);
void guest_unraw(const struct guest *g, uint64_t bytes);
/* What 4-level guest tables map: [gva, gva + bytes), gva at a border of 512 GiB, to gpa. */
struct guest_map {
	uint64_t gva, gpa, bytes;
	uint64_t tables; /* gpa of the tables: root, next level, then those of levels 1 and 0, which follow each other */
	bool large;	 /* by pages of 2 MiB */
};
/* Builds them: writable, user, accessed, dirty. Returns the number of leaf entries. */
uint64_t guest_tables(const struct guest *g, struct guest_map m);
struct kage_vcpu *vcpu_flat(struct kage_vm *vm, unsigned tlb_bits); /* 0: the default */
/* Long mode, CPL 3, CR3 = tables. */
struct kage_vcpu *vcpu_paged(struct kage_vm *vm, uint64_t tables, unsigned tlb_bits);
struct kage_vm *must_clone(struct kage_vm *vm);

/* An engine whose structures' bytes are counted in heap_bytes(), of all such engines together. */
struct guest guest_counted(uint64_t bytes, uint32_t region_flags);
uint64_t heap_bytes(void);

/* -- memory.c ----------------------------------------------------------------------------- */

/* Such a guest with every entry present, their number in *entries; what it takes is kept for the rows of suite memory,
 * which need not make it once more. */
struct guest guest_measured(uint64_t bytes, uint32_t region_flags, uint64_t *entries);

/* -- twin.c ------------------------------------------------------------------------------- */

#define TWIN_SPOTS 32

enum twin_kind {
	TWIN_REAL,
	TWIN_MANY,
	TWIN_HUGE,
};

struct twin {
	int pid;
	bool ready;
	FILE *to, *from;
};

/* Starts the process; it needs a while. */
struct twin twin_start(enum twin_kind kind, uint64_t bytes);
/* See twin.c. */
double twin_ask(struct twin *t, const char *what, double *second);
void twin_stop(struct twin *t);
/* ns of a fork(); of a first write after it. arg: struct twin. */
double sample_twin_fork(void *arg);
double sample_twin_write(void *arg);
/* main() of that process. */
int twin_main(int argc, char **argv);
/* KiB of a line of a file in /proc/self. */
double own_kib(const char *file, const char *name);

/* -- suites --------------------------------------------------------------------------------- */

void bench_translate(const struct bench *b);
void bench_clone(const struct bench *b);
void idle_row(const struct bench *b, struct twin *twin); /* of clone; idle.c */
void bench_cow(const struct bench *b); /* of fault, as the next three */
void bench_touch(const struct bench *b);
void bench_map(const struct bench *b);
void bench_threads(const struct bench *b);
void bench_tables(const struct bench *b); /* of translate */
void bench_dirty(const struct bench *b);
void bench_memory(const struct bench *b);
void bench_scale(const struct bench *b);

#endif
