/* SPDX-License-Identifier: MIT */
/*
 * The stress test's world: two guests, vCPU threads that load and store
 * stamps, and threads that change the guests meanwhile.
 *
 *   struct world   everything that threads share
 *   struct guest   one guest: its stamps' bounds, its clones' family
 *   struct ring    a log in guest memory: one writer appends sequence numbers
 *
 * Layout of each guest (guest physical = offset):
 *   TABLES    x86-64 page tables: identity in 4 KiB pages, an alias of all of it
 *             in 2 MiB pages, a few slots that workers remap
 *   STAMPS    pages in groups; a page holds group << 48 | stamp twice (words A, B)
 *   RINGS     one ring of pages for each worker
 *   DISCARD   written and discarded by the churn thread
 *   MAPPED    mapped and unmapped by the churn thread
 *   PROTECT   changes its protection
 *
 * Invariants (checked on every load):
 *  T1  page p's word carries p's group and a stamp s with lower[p] <= s <= upper[p],
 *      lower read before the load and upper after it: no store is lost, none is
 *      undone, nobody sees another page's bytes. The owner raises upper, stores A,
 *      stores B, raises lower.
 *  T2  A >= B in any page at any instant, so also in a snapshot.
 *  T3  a snapshot holds a prefix of each ring's history, and of the two histories
 *      together: what it has of one ring knew nothing of the other that it lacks.
 *  T4  pages of a group with equal stamps are equal as a whole, so that they merge.
 *  T5  a harvest names every page written since the last.
 */
#ifndef KAGE_TESTS_STRESS_H
#define KAGE_TESTS_STRESS_H

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include <kage/kage.h>

#include "../model/rng.h"

#define PAGE	((uint64_t)4096)
#define GUESTS	2
#define WORKERS 2

#define TABLES	      0x100000
#define TABLES_PAGES  32
#define STAMPS	      0x200000
#define STAMPS_PAGES  1024
#define GROUP_PAGES   64
#define GROUPS	      (STAMPS_PAGES / GROUP_PAGES)
#define RINGS	      0x800000
#define RING_PAGES    32
#define DISCARD	      0xa00000
#define DISCARD_PAGES 64
#define MAPPED	      0xc00000
#define MAPPED_PAGES  64
#define PROTECT	      0xe00000
#define PROTECT_PAGES 16
#define MEMORY_END    0x1000000

#define ALIAS	   ((uint64_t)0x7f0000000000) /* gva of gpa 0, 2 MiB pages */
#define SLOTS	   ((uint64_t)0x600000000000) /* gva of slot 0 */
#define SLOTS_EACH 8
#define SLOT_TABLE (TABLES + 15 * PAGE)
#define CR3	   TABLES

#define STAMP_BITS  48
#define STAMP_MASK  (((uint64_t)1 << STAMP_BITS) - 1)
#define TAG_DISCARD 0x8001
#define TAG_MAPPED  0x8002
#define TAG_PROTECT 0x8003
#define TAG_CLONE   0x8004

#define KINDS(X)                                                                                             \
	X(cow_breaks)                                                                                        \
	X(merges) X(clones) X(destroys) X(discards) X(maps) X(unmaps) X(protects) X(advices) X(pins)         \
	    X(notifiers) X(intervals) X(harvests) X(remaps)

enum kind {
#define X(name) KIND_##name,
	KINDS(X)
#undef X
	    KIND_COUNT
};

struct ring {
	_Atomic uint64_t lower, upper; /* sequence numbers, as lower and upper of a stamp */
};

struct guest {
	struct kage_vm *vm;
	unsigned id;
	_Atomic uint64_t lower[STAMPS_PAGES], upper[STAMPS_PAGES];
	struct ring ring[WORKERS];
	_Atomic uint64_t marks; /* upper bound of the stamps in DISCARD, MAPPED, PROTECT */
};

struct world {
	struct kage_engine *engine;
	struct guest guest[GUESTS];
	uint64_t seed, seconds;
	_Atomic bool stop;
	_Atomic uint64_t passes, audits, loads, stores, snapshots, lost_races;
	_Atomic uint64_t kind[KIND_COUNT];
};

extern struct world world;

/* Prints and aborts: a wrong byte is not something to go on from. */
void stress_fail(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn));
#define EXPECT(x, want)                                                                                      \
	do {                                                                                                 \
		int got_ = (x);                                                                              \
		if (got_ != (want))                                                                          \
			stress_fail("%s:%d: %s is %d, should be %d", __FILE__, __LINE__, #x, got_, (want));  \
	} while (0)

static inline void count(enum kind k)
{
	atomic_fetch_add_explicit(&world.kind[k], 1, memory_order_relaxed);
}

static inline bool stopped(void)
{
	return atomic_load_explicit(&world.stop, memory_order_relaxed);
}

/* Lets the others run: these machines have fewer CPUs than the test has threads. */
void pause_us(unsigned us);
void audit_engine(void);

static inline uint64_t stamp_gpa(unsigned page)
{
	return STAMPS + page * PAGE;
}

/* Where a group keeps its words: different places, so that all of a page is copied right. */
static inline unsigned word_a(unsigned page)
{
	return page / GROUP_PAGES * 104 % 2048;
}

static inline unsigned word_b(unsigned page)
{
	return 2048 + page / GROUP_PAGES * 112 % 2040;
}

static inline uint64_t stamp_word(unsigned page, uint64_t stamp)
{
	return (uint64_t)(page / GROUP_PAGES + 1) << STAMP_BITS | stamp;
}

static inline uint64_t ring_gpa(unsigned worker, uint64_t seq)
{
	return RINGS + (worker * RING_PAGES + seq % RING_PAGES) * PAGE + 64;
}

/* Threads: `arg` is the thread's number among its kind. */
void *worker_thread(void *arg); /* guest_threads.c */
void *merge_thread(void *arg);	/* change_threads.c, as all below */
void *clone_thread(void *arg);
void *churn_thread(void *arg);
void *notify_thread(void *arg);
void *dirty_thread(void *arg);

void build_guest(struct guest *g); /* guest_threads.c */

#endif
