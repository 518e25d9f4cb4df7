/* SPDX-License-Identifier: MIT */
/*
 * Futex locks and the check of their order.
 *
 * struct lock is Drepper's three-state mutex ("Futexes Are Tricky", mutex 2)
 * with a short spin. A brlock reader counts itself in the slot of its CPU; a
 * writer sets BRLOCK_WRITER in every slot, which turns away new readers, and
 * waits until each slot holds nothing else. Reader and writer meet in one word
 * a slot, so no fence is needed, and a reader's drop touches the lock only
 * with its one atomic subtraction: whoever then gets it exclusively may free
 * it.
 *
 * Invariants:
 *  1. word == 2 whenever a thread may be asleep in lock_slow().
 *  2. `writer` is 1 from before the first slot is marked until after the last
 *     one is cleared; readers that were turned away sleep on it.
 *  3. a slot whose count of readers falls to 0 while it is marked is woken.
 *
 * Order check (debug builds): a thread-local list of what is held, with rank
 * and sub. Taking compares with everything held, not with the last taken,
 * because locks may be dropped in any order.
 */
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/lock.h"

#define LOCK_SPINS 40

_Static_assert(sizeof(_Atomic uint32_t) == 4, "futex(2) works on 32 bits");

static void futex_wait(_Atomic uint32_t *word, uint32_t seen)
{
	syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int n)
{
	syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

void lock_init(struct lock *l, enum lock_rank rank, uint64_t sub)
{
	atomic_init(&l->word, 0);
#ifdef KAGE_DEBUG
	l->rank = rank;
	l->sub = sub;
#endif
}

void lock_slow(struct lock *l)
{
	for (int i = 0; i < LOCK_SPINS; i++) {
		uint32_t free = 0;

		cpu_relax();
		if (READ_ONCE(l->word) == 0 &&
		    atomic_compare_exchange_strong_explicit(&l->word, &free, 1, memory_order_acquire,
							    memory_order_relaxed))
			return;
	}
	while (atomic_exchange_explicit(&l->word, 2, memory_order_acquire) != 0)
		futex_wait(&l->word, 2);
}

void lock_wake(struct lock *l)
{
	futex_wake(&l->word, 1);
}

#ifdef KAGE_DEBUG
#define HELD_MAX 256

static __thread struct held {
	const void *lock;
	unsigned rank;
	uint64_t sub;
} held[HELD_MAX];
static __thread unsigned held_count;

#ifndef NDEBUG
static void lock_violation(const struct held *h, unsigned rank, uint64_t sub)
{
	char text[160];

	snprintf(text, sizeof(text), "lock order: rank %u sub %llu taken while rank %u sub %llu is held",
		 rank, (unsigned long long)sub, h->rank, (unsigned long long)h->sub);
	__assert_fail(text, __FILE__, __LINE__, __func__);
}
#else
static void lock_violation(const struct held *h, unsigned rank, uint64_t sub)
{
}
#endif

void lock_check_note(const void *l, unsigned rank, uint64_t sub)
{
	kage_assert(held_count < HELD_MAX);
	if (held_count < HELD_MAX)
		held[held_count++] = (struct held){.lock = l, .rank = rank, .sub = sub};
}

void lock_check_take(const void *l, unsigned rank, uint64_t sub)
{
	for (unsigned i = 0; i < held_count && rank != RANK_NONE; i++)
		if (held[i].rank > rank || (held[i].rank == rank && held[i].sub >= sub))
			lock_violation(&held[i], rank, sub);
	lock_check_note(l, rank, sub);
}

void lock_check_drop(const void *l)
{
	for (unsigned i = held_count; i-- > 0;)
		if (held[i].lock == l) {
			held[i] = held[--held_count];
			return;
		}
	kage_assert(!"dropped a lock that this thread does not hold");
}
#endif

void brlock_init(struct brlock *b, enum lock_rank rank, uint64_t sub)
{
	atomic_init(&b->writer, 0);
	lock_init(&b->writers, RANK_NONE, 0);
#ifdef KAGE_DEBUG
	b->rank = rank;
	b->sub = sub;
#endif
	for (unsigned i = 0; i < BRLOCK_SLOTS; i++)
		atomic_init(&b->slot[i].readers, 0);
}

static void brlock_leave_slot(struct brlock *b, unsigned slot)
{
	_Atomic uint32_t *readers = &b->slot[slot].readers;

	/* After the subtraction *b may be gone: a wake of a stale address does no harm. */
	if (atomic_fetch_sub_explicit(readers, 1, memory_order_release) == (BRLOCK_WRITER | 1))
		futex_wake(readers, INT_MAX);
}

static bool brlock_enter_slot(struct brlock *b, struct brlock_held *held_slot)
{
	int cpu = sched_getcpu();
	unsigned slot = (cpu < 0 ? 0 : (unsigned)cpu) % BRLOCK_SLOTS;

	if (unlikely(atomic_fetch_add_explicit(&b->slot[slot].readers, 1, memory_order_acquire) &
		     BRLOCK_WRITER)) {
		brlock_leave_slot(b, slot);
		return false;
	}
	held_slot->slot = slot;
	return true;
}

/* Sleeps while a writer is in, and leaves word that somebody does. */
static void brlock_wait_writer(struct brlock *b)
{
	uint32_t in = 1;

	if (atomic_compare_exchange_strong_explicit(&b->writer, &in, 2, memory_order_relaxed, memory_order_relaxed) ||
	    in == 2)
		word_wait(&b->writer, 2, UINT_MAX);
}

struct brlock_held brlock_read(struct brlock *b)
{
	struct brlock_held h;

	LOCK_CHECK_TAKE(b);
	while (unlikely(!brlock_enter_slot(b, &h)))
		brlock_wait_writer(b);
	return h;
}

bool brlock_read_try(struct brlock *b, struct brlock_held *held_slot)
{
	if (!brlock_enter_slot(b, held_slot))
		return false;
	LOCK_CHECK_NOTE(b);
	return true;
}

void brlock_read_drop(struct brlock *b, struct brlock_held h)
{
	LOCK_CHECK_DROP(b);
	brlock_leave_slot(b, h.slot);
}

static void brlock_wait_slot(_Atomic uint32_t *readers)
{
	uint32_t seen;

	for (int i = 0; i < LOCK_SPINS; i++) {
		if (atomic_load_explicit(readers, memory_order_acquire) == BRLOCK_WRITER)
			return;
		cpu_relax();
	}
	while ((seen = atomic_load_explicit(readers, memory_order_acquire)) != BRLOCK_WRITER)
		futex_wait(readers, seen);
}

void brlock_write(struct brlock *b)
{
	LOCK_CHECK_TAKE(b);
	lock_take(&b->writers);
	atomic_store_explicit(&b->writer, 1, memory_order_relaxed);
	for (unsigned i = 0; i < BRLOCK_SLOTS; i++)
		atomic_fetch_or_explicit(&b->slot[i].readers, BRLOCK_WRITER, memory_order_acq_rel);
	for (unsigned i = 0; i < BRLOCK_SLOTS; i++)
		brlock_wait_slot(&b->slot[i].readers);
}

void brlock_write_drop(struct brlock *b)
{
	LOCK_CHECK_DROP(b);
	for (unsigned i = 0; i < BRLOCK_SLOTS; i++)
		atomic_fetch_and_explicit(&b->slot[i].readers, ~BRLOCK_WRITER, memory_order_release);
	if (atomic_exchange_explicit(&b->writer, 0, memory_order_release) == 2)
		word_wake(&b->writer);
	lock_drop(&b->writers);
}

static struct timespec deadline_in(unsigned ms)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	t.tv_sec += ms / 1000;
	t.tv_nsec += (long)(ms % 1000) * 1000000;
	if (t.tv_nsec >= 1000000000) {
		t.tv_nsec -= 1000000000;
		t.tv_sec++;
	}
	return t;
}

void word_wait(_Atomic uint32_t *word, uint32_t seen, unsigned ms)
{
	struct timespec until = deadline_in(ms);

	while (atomic_load_explicit(word, memory_order_acquire) == seen) {
		/* FUTEX_WAIT_BITSET takes an absolute time: interruptions do not prolong the wait. */
		if (syscall(SYS_futex, word, FUTEX_WAIT_BITSET_PRIVATE, seen, ms == UINT_MAX ? NULL : &until,
			    NULL, FUTEX_BITSET_MATCH_ANY) != 0 &&
		    errno == ETIMEDOUT)
			return;
	}
}

void word_wake(_Atomic uint32_t *word)
{
	futex_wake(word, INT_MAX);
}
