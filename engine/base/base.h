/* SPDX-License-Identifier: MIT */
/*
 * Small things that every file uses: compiler words, assertions, intrusive
 * containers. Includes nothing of the engine.
 *
 * Three tiers of failure: misuse of the public API gives -errno; an internal
 * impossibility is a kage_assert() (debug builds; still type-checked in
 * others); corruption found at run time is reported through env_corrupt().
 */
#ifndef KAGE_BASE_BASE_H
#define KAGE_BASE_BASE_H

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <kage/types.h>

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define container_of(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define SWAP(a, b)                       \
	do {                             \
		__typeof__(a) swap_ = (a); \
		(a) = (b);               \
		(b) = swap_;             \
	} while (0)
#define ALIGN_UP(x, a) (((x) + (a)-1) & ~((__typeof__(x))(a)-1))
#define ALIGN_DOWN(x, a) ((x) & ~((__typeof__(x))(a)-1))

#ifdef KAGE_DEBUG
#define kage_assert(x) assert(x)
#else
#define kage_assert(x) ((void)sizeof(!(x)))
#endif

/* clang says it through __has_feature, gcc through a macro. */
#if defined(__SANITIZE_THREAD__)
#define KAGE_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define KAGE_TSAN 1
#endif
#endif

#define CACHE_LINE 64
#define PAGE_SIZE ((uint64_t)4096)
#define PAGE_SHIFT 12

/*
 * Relaxed accesses to words that other threads change; the places that need
 * more order say so. They take plain and _Atomic words alike: the comma makes
 * an rvalue, which has no _Atomic (clang's builtins refuse such pointers).
 */
#define PLAIN_TYPE(x) __typeof__(((void)0, (x)))
#define READ_ONCE(x) __atomic_load_n((PLAIN_TYPE(x) *)&(x), __ATOMIC_RELAXED)
#define WRITE_ONCE(x, v) __atomic_store_n((PLAIN_TYPE(x) *)&(x), (v), __ATOMIC_RELAXED)
#define load_acquire(p) __atomic_load_n((PLAIN_TYPE(*(p)) *)(p), __ATOMIC_ACQUIRE)
#define store_release(p, v) __atomic_store_n((PLAIN_TYPE(*(p)) *)(p), (v), __ATOMIC_RELEASE)
#define add_relaxed(p, n) __atomic_fetch_add((PLAIN_TYPE(*(p)) *)(p), (n), __ATOMIC_RELAXED)
/* Of guest memory, which is nobody's _Atomic. */
#define cas_acq_rel(p, old, v) \
	__atomic_compare_exchange_n((p), (old), (v), false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)

/* Bit maps in 64-bit words that one thread at a time changes. */
static inline bool bit_test(const uint64_t *map, size_t i)
{
	return map[i / 64] >> (i % 64) & 1;
}

static inline void bit_set(uint64_t *map, size_t i)
{
	map[i / 64] |= (uint64_t)1 << (i % 64);
}

static inline void bit_clear(uint64_t *map, size_t i)
{
	map[i / 64] &= ~((uint64_t)1 << (i % 64));
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* Doubly linked intrusive list, circular through its head. */
struct list {
	struct list *prev, *next;
};

static inline void list_init(struct list *l)
{
	l->prev = l->next = l;
}

static inline bool list_empty(const struct list *l)
{
	return l->next == l;
}

static inline void list_add(struct list *head, struct list *n)
{
	n->prev = head;
	n->next = head->next;
	head->next->prev = n;
	head->next = n;
}

static inline void list_add_tail(struct list *head, struct list *n)
{
	list_add(head->prev, n);
}

static inline void list_del(struct list *n)
{
	n->prev->next = n->next;
	n->next->prev = n->prev;
	list_init(n);
}

#define list_for_each(pos, head) for (struct list *pos = (head)->next; pos != (head); pos = pos->next)
#define list_for_each_safe(pos, tmp, head)                                                        \
	for (struct list *pos = (head)->next, *tmp = pos->next; pos != (head); pos = tmp, tmp = pos->next)

#endif
