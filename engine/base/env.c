/* SPDX-License-Identifier: MIT */
/*
 * The environment of an engine: allocator hooks, log, deferred free.
 *
 * Invariants:
 *  1. env_alloc() returns zeroed memory aligned to a cache line, whoever allocates.
 *     Of our own allocator's, what is as large as a huge page is mapped apart.
 *  2. nothing is formatted when nobody listens.
 *
 * Locks: none. The embedder's callbacks are called on the calling thread.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include "base/env.h"

#define WINDOW_TIMEOUT_MS 10000

#define HUGE_PAGE ((size_t)2 << 20)

/* Mapped so that whole huge pages of it can be such, if the host has them. */
static void *huge_alloc(size_t bytes)
{
	size_t whole = ALIGN_UP(bytes, HUGE_PAGE);
	char *p = mmap(NULL, whole + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *at;

	if (p == MAP_FAILED)
		return NULL;
	at = (char *)ALIGN_UP((uintptr_t)p, HUGE_PAGE);
	if (at != p)
		munmap(p, (size_t)(at - p));
	munmap(at + whole, (size_t)(p + HUGE_PAGE - at));
	madvise(at, ALIGN_DOWN(bytes, HUGE_PAGE), MADV_HUGEPAGE);
	return at;
}

static void *default_alloc(void *opaque, size_t bytes)
{
	void *p;

	if (bytes >= HUGE_PAGE)
		return huge_alloc(bytes);
	if (posix_memalign(&p, CACHE_LINE, bytes) != 0)
		return NULL;
	return memset(p, 0, bytes);
}

static void default_free(void *opaque, void *ptr, size_t bytes)
{
	if (bytes >= HUGE_PAGE)
		munmap(ptr, ALIGN_UP(bytes, HUGE_PAGE));
	else
		free(ptr);
}

static uint64_t default_now(void *opaque, enum kage_clock_id id)
{
	struct timespec t;

	clock_gettime(id == KAGE_CLOCK_WALL ? CLOCK_MONOTONIC : CLOCK_THREAD_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

void env_init(struct env *env, const struct kage_engine_config *config)
{
	memset(env, 0, sizeof(*env));
	if (config) {
		env->alloc = config->alloc;
		env->log = config->log;
		env->log_opaque = config->log_opaque;
		env->clock = config->clock;
		env->window_timeout_ms = config->window_timeout_ms;
	}
	if (!env->alloc.alloc || !env->alloc.free)
		env->alloc = (struct kage_alloc){.alloc = default_alloc, .free = default_free};
	if (!env->clock.now)
		env->clock = (struct kage_clock){.now = default_now};
	if (!env->window_timeout_ms)
		env->window_timeout_ms = WINDOW_TIMEOUT_MS;
	defer_init(&env->defer);
}

void env_finish(struct env *env)
{
	/* What runs may defer more. */
	while (defer_run(&env->defer))
		;
}

void *env_alloc(struct env *env, size_t bytes)
{
	return env->alloc.alloc(env->alloc.opaque, bytes);
}

void env_free(struct env *env, void *ptr, size_t bytes)
{
	if (ptr)
		env->alloc.free(env->alloc.opaque, ptr, bytes);
}

static __attribute__((format(printf, 3, 0))) void env_vlog(struct env *env, int level, const char *fmt,
							   va_list ap)
{
	char line[256];

	if (!env->log)
		return;
	vsnprintf(line, sizeof(line), fmt, ap);
	env->log(env->log_opaque, level, line);
}

void env_log(struct env *env, int level, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	env_vlog(env, level, fmt, ap);
	va_end(ap);
}

void env_corrupt(struct env *env, const char *fmt, ...)
{
	va_list ap;

	atomic_fetch_add_explicit(&env->corruptions, 1, memory_order_relaxed);
	va_start(ap, fmt);
	env_vlog(env, KAGE_LOG_ERROR, fmt, ap);
	va_end(ap);
	kage_assert(!"corruption: see the log");
}

static void free_deferred(struct defer_node *node, void *arg)
{
	env_free(arg, (char *)node - node->offset, node->bytes);
}

void env_free_rcu(struct env *env, void *ptr, size_t bytes, struct defer_node *node)
{
	kage_assert((char *)node >= (char *)ptr && (char *)(node + 1) <= (char *)ptr + bytes &&
		    bytes <= UINT32_MAX);
	/* In the node and not in the object's other words: readers may still be looking at those. */
	node->bytes = (uint32_t)bytes;
	node->offset = (uint32_t)((char *)node - (char *)ptr);
	defer_add(&env->defer, node, free_deferred, env);
}
