/* SPDX-License-Identifier: MIT */
/*
 * Lock-free readers and deferred free over liburcu (flavour "memb").
 *
 * A thread registers with liburcu at its first read section and unregisters
 * when it ends. There is no call_rcu thread: what is to be freed is queued and
 * freed by defer_run(), which the engine's steps call, after one
 * synchronize_rcu() for the whole batch.
 *
 * Invariant: an object reachable by a lock-free lookup is unlinked first,
 * queued second. defer_run() is never called inside a read section nor under a
 * lock.
 */
#ifndef KAGE_BASE_RCU_H
#define KAGE_BASE_RCU_H

#include "base/base.h"

void rcu_enter(void);
void rcu_leave(void);
bool rcu_inside(void);

struct defer_node {
	struct defer_node *next;
	void (*fn)(struct defer_node *node, void *arg);
	void *arg;
	uint32_t bytes, offset; /* env_free_rcu(): size of the object, and where in it the node lies */
};

struct defer_queue {
	struct defer_node *_Atomic head;
	_Atomic uint64_t pending;
};

void defer_init(struct defer_queue *q);
/* `fn(node, arg)` runs after a grace period, in some later defer_run(). Any context, lock-free. */
void defer_add(struct defer_queue *q, struct defer_node *node, void (*fn)(struct defer_node *, void *), void *arg);
/* Waits for a grace period if anything is queued; runs it. Returns how many ran. */
uint64_t defer_run(struct defer_queue *q);
/* Just waits for all readers that are inside now. */
void rcu_wait(void);

#endif
