/* SPDX-License-Identifier: MIT */
/*
 * Locks. All are futexes underneath, 4 bytes each, fair enough, and sleep
 * instead of spinning for long: the engine runs on hosts with fewer CPUs than
 * threads.
 *
 *  - struct lock: a mutex.
 *  - struct brlock: many readers that share no cache line, rare writers
 *    (Linux percpu_rw_semaphore's idea). A reader gets a witness that names
 *    its slot; the writer waits for every slot.
 *
 * Debug builds check the lock order: each lock has a rank, a thread takes
 * ranks in ascending order, and locks of one rank in ascending `sub` order.
 * The order itself is written in engine/README.md.
 */
#ifndef KAGE_BASE_LOCK_H
#define KAGE_BASE_LOCK_H

#include "base/base.h"

enum lock_rank {
	RANK_NONE = 0,   /* not checked */
	RANK_MERGE,      /* merging: one step at a time */
	RANK_UPKEEP,     /* brlock: read around reaping and refilling, written by the audit */
	RANK_ENGINE,     /* list of guests and families */
	RANK_SCAN,       /* where merging's pass is */
	RANK_FAMILY,     /* brlock of a clone family; sub: family id */
	RANK_MIRRORS,    /* merging's changes of guests that have a mirror */
	RANK_MM_RANGE,   /* brlock of an mm; sub: mm id */
	RANK_TABLE_TOP,  /* table locks by level, top first; sub: family id << 16 | stripe */
	RANK_TABLE_4,
	RANK_TABLE_3,
	RANK_TABLE_2,
	RANK_TABLE_1,
	RANK_TABLE_0,
	RANK_CANDIDATES, /* merging's table of candidates */
	RANK_STABLE,     /* stable frames: their table and chains */
	RANK_RESERVE,    /* of a hardened domain: frames to draw, references to let go of; sub: domain */
	RANK_NOTIFY,     /* listener lists */
	RANK_SLOTS,      /* KVM slots of one guest; sub: mm id */
	RANK_SHADOW,     /* shadow tables of one guest; sub: mm id */
	RANK_TLB,        /* TLB of one vCPU */
	RANK_DIRTY,      /* list of dirty logs */
	RANK_PIN,        /* pinned ranges of an mm */
	RANK_IDS,        /* layer and mm ids */
	RANK_POOL,       /* sections, extents */
	RANK_BUDDY,      /* an arena's buddy */
	RANK_MAGAZINE,   /* a per-CPU cache: trylock only above the buddy */
	RANK_COUNT,
};

struct lock {
	_Atomic uint32_t word; /* 0 free, 1 held, 2 held and waited for */
#ifdef KAGE_DEBUG
	uint32_t rank;
	uint64_t sub;
#endif
};

void lock_init(struct lock *l, enum lock_rank rank, uint64_t sub);
void lock_slow(struct lock *l);
void lock_wake(struct lock *l);
#ifdef KAGE_DEBUG
void lock_check_take(const void *l, unsigned rank, uint64_t sub);
/* Records without checking: a trylock cannot deadlock, but what is taken under it can. */
void lock_check_note(const void *l, unsigned rank, uint64_t sub);
void lock_check_drop(const void *l);
#define LOCK_CHECK_TAKE(l) lock_check_take((l), (l)->rank, (l)->sub)
#define LOCK_CHECK_NOTE(l) lock_check_note((l), (l)->rank, (l)->sub)
#define LOCK_CHECK_DROP(l) lock_check_drop(l)
#else
#define LOCK_CHECK_TAKE(l) ((void)0)
#define LOCK_CHECK_NOTE(l) ((void)0)
#define LOCK_CHECK_DROP(l) ((void)0)
#endif

static inline void lock_take(struct lock *l)
{
	uint32_t free = 0;

	LOCK_CHECK_TAKE(l);
	if (unlikely(!atomic_compare_exchange_strong_explicit(&l->word, &free, 1, memory_order_acquire,
							      memory_order_relaxed)))
		lock_slow(l);
}

static inline bool lock_try(struct lock *l)
{
	uint32_t free = 0;

	if (!atomic_compare_exchange_strong_explicit(&l->word, &free, 1, memory_order_acquire,
						     memory_order_relaxed))
		return false;
	LOCK_CHECK_NOTE(l);
	return true;
}

static inline void lock_drop(struct lock *l)
{
	LOCK_CHECK_DROP(l);
	if (unlikely(atomic_exchange_explicit(&l->word, 0, memory_order_release) == 2))
		lock_wake(l);
}

#define BRLOCK_SLOTS 16
#define BRLOCK_WRITER (1u << 31)

struct brlock {
	_Atomic uint32_t writer; /* 0 none, 1 a writer is in or wants in, 2 and a reader sleeps on it */
	struct lock writers;
#ifdef KAGE_DEBUG
	uint32_t rank;
	uint64_t sub;
#endif
	struct {
		_Alignas(CACHE_LINE) _Atomic uint32_t readers; /* and BRLOCK_WRITER */
	} slot[BRLOCK_SLOTS];
};

/* Which slot this reader counts in: made by brlock_read() only. */
struct brlock_held {
	uint32_t slot;
};

void brlock_init(struct brlock *b, enum lock_rank rank, uint64_t sub);
struct brlock_held brlock_read(struct brlock *b);
/* Takes it for reading if no writer is in or waiting. */
bool brlock_read_try(struct brlock *b, struct brlock_held *held);
void brlock_read_drop(struct brlock *b, struct brlock_held held);
void brlock_write(struct brlock *b);
void brlock_write_drop(struct brlock *b);

/* Waits until `*word != seen` (futex), at most `ms` (UINT_MAX: for ever); others wake it with word_wake(). */
void word_wait(_Atomic uint32_t *word, uint32_t seen, unsigned ms);
void word_wake(_Atomic uint32_t *word);

#endif
