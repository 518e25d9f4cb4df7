/* SPDX-License-Identifier: MIT */
/*
 * The engine as the public API knows it: everything below, put together.
 */
#ifndef KAGE_API_ENGINE_H
#define KAGE_API_ENGINE_H

#include <kage/engine.h>
#include "merge/merge.h"
#include "merge/pace.h"
#include "mm/mm.h"

struct kage_engine {
	struct env env;
	struct pool *pool;
	struct host host;
	struct merge merge;
	struct pace pace;
	struct brlock upkeep; /* read: frames are being reaped, the reserve refilled; write: the audit counts them */
	uint64_t memory_limit; /* bytes; 0: none. Constant */
	int event; /* eventfd: a step is due */
	_Atomic bool due; /* it has been told since the last step began */
	_Atomic uint64_t guests;
};

/* 0, -EINVAL or -E2BIG: see the rules of configs in kage/types.h. `known` is sizeof the struct, `least` its first version's. */
int config_check(const void *config, size_t known, size_t least);
/* Copies what the caller's struct has, zeroes the rest. */
void config_copy(void *to, const void *config, size_t known);

/*
 * At the end of a public call: a refusal is told to the log as well, with the
 * range it was about (len 0: none). Returns r. `e` may be NULL.
 */
int api_result(struct kage_engine *e, const char *call, uint64_t gpa, uint64_t len, int r);

/*
 * -EDEADLK: the calling thread is inside a window of use, of whichever guest: a change that the caller would wait for may
 * wait for the end of that window. 0. No lock is held.
 */
int engine_entered(struct kage_engine *e);
/* Something may wait for a step: makes kage_engine_fd() readable. */
void engine_due(struct kage_engine *e);
/* What a mirrored guest discarded goes to the host now, and its home takes its place: mappings stay few. */
void engine_refill(struct kage_vm *vm, gfn_t start, uint64_t npages);
/* At the end of calls that release memory: too much is not left to a step that may never come. */
void engine_settle(struct kage_engine *e);

#endif
