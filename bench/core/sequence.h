/* SPDX-License-Identifier: MIT */
/*
 * One sequence for all changes of a guest, as Linux's KVM has it: a count of
 * changes in flight, one range that spans them all, and a number that moves when
 * one ends. A fault takes the number, looks up, and repeats if the number has
 * moved since, wherever the change was; or if its page is in the range now.
 * Model: virt/kvm/kvm_main.c (kvm_mmu_invalidate_begin and _end) and
 * include/linux/kvm_host.h (mmu_invalidate_retry_gfn).
 */
#ifndef KAGE_BENCH_SEQUENCE_H
#define KAGE_BENCH_SEQUENCE_H

#include "base/lock.h"

struct sequence {
	struct lock lock; /* in the place of mmu_lock */
	_Atomic uint64_t number;
	_Atomic uint64_t in_flight;
	_Atomic uint64_t start, end; /* of all that is in flight */
};

static inline void sequence_begin(struct sequence *s, uint64_t start, uint64_t end)
{
	lock_take(&s->lock);
	if (s->in_flight++ == 0) {
		s->start = start;
		s->end = end;
	} else {
		s->start = MIN(s->start, start);
		s->end = MAX(s->end, end);
	}
	lock_drop(&s->lock);
}

static inline void sequence_end(struct sequence *s)
{
	lock_take(&s->lock);
	s->number++;
	s->in_flight--;
	lock_drop(&s->lock);
}

static inline bool sequence_valid(struct sequence *s, uint64_t number, uint64_t start, uint64_t end)
{
	if (s->in_flight && s->start < end && start < s->end)
		return false;
	return s->number == number;
}

#endif
