/* SPDX-License-Identifier: MIT */
/*
 * Copying and comparing guest memory, which vCPUs and devices may write at the
 * same time. Such races are the guest's own: nothing here relies on a consistent
 * view, and TSan is shown atomic accesses. An aligned copy of a register's size
 * is one access, as the guest's CPU would make it.
 */
#ifndef KAGE_BASE_GUEST_H
#define KAGE_BASE_GUEST_H

#include <kage/vcpu.h>
#include "base/base.h"

#ifdef KAGE_TSAN
static inline void guest_copy_long(void *to, const void *from, size_t len)
{
	char *t = to;
	const char *f = from;

	while (len && ((uintptr_t)t | (uintptr_t)f) & 7) {
		kage_guest_move(t++, f++, 1);
		len--;
	}
	for (; len >= 8; len -= 8, t += 8, f += 8)
		kage_guest_move(t, f, 8);
	while (len--)
		kage_guest_move(t++, f++, 1);
}

/* 0: equal. Both aligned to 8, len a multiple of it. */
static inline int guest_compare(const void *a, const void *b, size_t len)
{
	const uint64_t *x = a, *y = b;

	for (size_t i = 0; i < len / 8; i++)
		if (READ_ONCE(x[i]) != READ_ONCE(y[i]))
			return 1;
	return 0;
}
#else
static inline void guest_copy_long(void *to, const void *from, size_t len)
{
	memcpy(to, from, len);
}

static inline int guest_compare(const void *a, const void *b, size_t len)
{
	return memcmp(a, b, len) != 0;
}
#endif

/*
 * A page, from border to border. The compiler is told so: gcc's copy of a constant size begins behind the first
 * 8 bytes where it knows of no border, and `rep movs` takes a fifth more time from there.
 */
static inline void guest_copy_page(void *to, const void *from)
{
	guest_copy_long(__builtin_assume_aligned(to, PAGE_SIZE), __builtin_assume_aligned(from, PAGE_SIZE), PAGE_SIZE);
}

static inline void guest_copy(void *to, const void *from, size_t len)
{
	if ((len == 1 || len == 2 || len == 4 || len == 8) && !(((uintptr_t)to | (uintptr_t)from) & (len - 1)))
		kage_guest_move(to, from, len);
	else
		guest_copy_long(to, from, len);
}

#endif
