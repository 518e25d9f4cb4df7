/* SPDX-License-Identifier: MIT */
/*
 * What an engine gives to all of its parts: the embedder's allocator and log,
 * deferred free, the event ring. One `struct env` an engine; every object can
 * reach it. There is no other global state.
 */
#ifndef KAGE_BASE_ENV_H
#define KAGE_BASE_ENV_H

#include <kage/engine.h>
#include "base/base.h"
#include "base/rcu.h"

struct trace_ring;

struct env {
	struct kage_alloc alloc;
	void (*log)(void *opaque, int level, const char *line);
	void *log_opaque;
	struct kage_clock clock;
	struct defer_queue defer;
	unsigned window_timeout_ms;
	void (*due)(void *arg); /* a step has something to do; NULL: nobody asks */
	void *due_arg;
	_Atomic bool paced; /* the last step was the advisor's: what guests write waits until it wants another */
	struct trace_ring *trace; /* NULL: events are only probes */
	_Atomic uint64_t corruptions;
};

void env_init(struct env *env, const struct kage_engine_config *config);
/* Runs what is still deferred. No reader may be left. */
void env_finish(struct env *env);

/* Work for the next step has come up. Any context; cheap when it has been told already. */
static inline void env_due(struct env *env)
{
	if (env->due)
		env->due(env->due_arg);
}

/* Zeroed, 64-byte aligned. NULL when the embedder's allocator says so. */
void *env_alloc(struct env *env, size_t bytes);
void env_free(struct env *env, void *ptr, size_t bytes); /* NULL ok */

/* Nanoseconds by the embedder's clock. */
static inline uint64_t env_now(const struct env *env, enum kage_clock_id id)
{
	return env->clock.now(env->clock.opaque, id);
}

void env_log(struct env *env, int level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* Something that cannot be: logged, counted, asserted in debug builds. */
void env_corrupt(struct env *env, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Object of `bytes` from env_alloc(), freed after a grace period. `node` lies inside it. */
void env_free_rcu(struct env *env, void *ptr, size_t bytes, struct defer_node *node);

#endif
