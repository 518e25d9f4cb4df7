/* SPDX-License-Identifier: MIT */
/*
 * The bits word of a frame: kind, order and pins share it with flags that
 * anybody sets, so each change is one compare-and-swap of the whole word.
 */
#include "frame/frame.h"

void frame_set_kind(struct frame *f, enum frame_kind kind, unsigned order)
{
	uint32_t want = (uint32_t)kind << FRAME_KIND_SHIFT | order << FRAME_ORDER_SHIFT;
	uint32_t old = READ_ONCE(f->bits);

	kage_assert(order <= FRAME_ORDER_MASK >> FRAME_ORDER_SHIFT);
	while (!atomic_compare_exchange_weak_explicit(&f->bits, &old,
						      (old & ~(FRAME_KIND_MASK | FRAME_ORDER_MASK)) | want,
						      memory_order_release, memory_order_relaxed))
		;
}

int frame_pin(struct frame *f)
{
	uint32_t old = READ_ONCE(f->bits);

	do {
		if ((old & FRAME_PINS_MAX) == FRAME_PINS_MAX)
			return -EOVERFLOW;
	} while (!atomic_compare_exchange_weak_explicit(&f->bits, &old, old + 1, memory_order_acq_rel,
							memory_order_relaxed));
	return 0;
}

void frame_unpin(struct frame *f)
{
	uint32_t old = atomic_fetch_sub_explicit(&f->bits, 1, memory_order_acq_rel);

	kage_assert((old & FRAME_PINS_MAX) != 0);
	(void)old;
}
