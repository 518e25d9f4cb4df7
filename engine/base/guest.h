/* SPDX-License-Identifier: MIT */
/*
 * Copying and comparing guest memory, which vCPUs and devices may write at the
 * same time. Such races are the guest's own; TSan is told so, and nothing here
 * relies on a consistent view.
 */
#ifndef KAGE_BASE_GUEST_H
#define KAGE_BASE_GUEST_H

#include "base/base.h"

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define GUEST_TSAN 1
#endif
#endif
#ifdef __SANITIZE_THREAD__
#define GUEST_TSAN 1
#endif

#ifdef GUEST_TSAN
/* Atomic accesses, so that TSan sees no race where the guest's own synchronisation is not ours to know. */
static inline void guest_copy(void *to, const void *from, size_t len)
{
	char *t = to;
	const char *f = from;

	while (len && ((uintptr_t)t | (uintptr_t)f) & 7) {
		__atomic_store_n(t++, __atomic_load_n(f++, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
		len--;
	}
	for (; len >= 8; len -= 8, t += 8, f += 8)
		__atomic_store_n((uint64_t *)t, __atomic_load_n((const uint64_t *)f, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
	while (len--)
		__atomic_store_n(t++, __atomic_load_n(f++, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
}
static inline int guest_compare(const void *a, const void *b, size_t len)
{
	for (size_t i = 0; i < len; i += 8)
		if (__atomic_load_n((const uint64_t *)((const char *)a + i), __ATOMIC_RELAXED) !=
		    __atomic_load_n((const uint64_t *)((const char *)b + i), __ATOMIC_RELAXED))
			return 1;
	return 0;
}
#else
/* len: a multiple of 8, both aligned */
static inline int guest_compare(const void *a, const void *b, size_t len)
{
	return memcmp(a, b, len) != 0;
}

static inline void guest_copy(void *to, const void *from, size_t len)
{
	memcpy(to, from, len);
}
#endif

#endif
