/* SPDX-License-Identifier: MIT */
/*
 * Read sections and deferred free over liburcu's memb flavour.
 *
 * A thread's registration is one thread-local byte. The destructor of a
 * pthread key undoes it when the thread ends; if a later destructor of the same
 * thread reads again, the key is set again and the C library calls ours again.
 *
 * Invariants:
 *  1. a thread that is in liburcu's registry has the key set, or is inside a
 *     read section (state TEMPORARY: the key could not be had, the outermost
 *     rcu_leave() unregisters).
 *  2. a deferred node is on exactly one of: the queue, the batch of one
 *     defer_run(). Nodes of one batch run in the order in which they came.
 *
 * Locks: none.
 *
 * Why not liburcu's _LGPL_SOURCE: it inlines more than the small functions that
 * section 5 of the LGPL lets anybody inline. Newer releases offer just those;
 * before them a section costs four calls, about 10 ns.
 */
#define URCU_INLINE_SMALL_FUNCTIONS /* liburcu 0.14 */
#include <pthread.h>
#include <urcu/urcu-memb.h>

#include "base/rcu.h"

enum { RCU_NONE, RCU_KEPT, RCU_TEMPORARY };

static __thread unsigned char rcu_state __attribute__((tls_model("initial-exec")));
static pthread_once_t rcu_once = PTHREAD_ONCE_INIT;
static pthread_key_t rcu_key;
static bool rcu_key_ok;

/* liburcu is not instrumented: tell ThreadSanitizer what a grace period orders. */
#ifdef KAGE_TSAN
void __tsan_acquire(void *addr);
void __tsan_release(void *addr);
static char rcu_tsan_word;
#define RCU_TSAN_RELEASE() __tsan_release(&rcu_tsan_word)
#define RCU_TSAN_ACQUIRE() __tsan_acquire(&rcu_tsan_word)
#else
#define RCU_TSAN_RELEASE() ((void)0)
#define RCU_TSAN_ACQUIRE() ((void)0)
#endif

static void rcu_thread_ends(void *arg)
{
	urcu_memb_unregister_thread();
	rcu_state = RCU_NONE;
}

static void rcu_make_key(void)
{
	rcu_key_ok = pthread_key_create(&rcu_key, rcu_thread_ends) == 0;
}

static __attribute__((noinline, cold)) void rcu_register(void)
{
	pthread_once(&rcu_once, rcu_make_key);
	rcu_state = rcu_key_ok && pthread_setspecific(rcu_key, &rcu_key) == 0 ? RCU_KEPT : RCU_TEMPORARY;
	urcu_memb_register_thread();
}

static __attribute__((noinline, cold)) void rcu_leave_temporary(void)
{
	urcu_memb_read_unlock();
	if (urcu_memb_read_ongoing())
		return;
	urcu_memb_unregister_thread();
	rcu_state = RCU_NONE;
}

void rcu_enter(void)
{
	if (unlikely(rcu_state == RCU_NONE))
		rcu_register();
	urcu_memb_read_lock();
}

void rcu_leave(void)
{
	RCU_TSAN_RELEASE();
	if (unlikely(rcu_state == RCU_TEMPORARY)) {
		rcu_leave_temporary();
		return;
	}
	urcu_memb_read_unlock();
}

bool rcu_inside(void)
{
	return rcu_state != RCU_NONE && urcu_memb_read_ongoing();
}

void rcu_wait(void)
{
	kage_assert(!rcu_inside());
	urcu_memb_synchronize_rcu();
	RCU_TSAN_ACQUIRE();
}

void defer_init(struct defer_queue *q)
{
	atomic_init(&q->head, NULL);
	atomic_init(&q->pending, 0);
}

void defer_add(struct defer_queue *q, struct defer_node *node, void (*fn)(struct defer_node *, void *),
	       void *arg)
{
	struct defer_node *head = atomic_load_explicit(&q->head, memory_order_relaxed);

	node->fn = fn;
	node->arg = arg;
	atomic_fetch_add_explicit(&q->pending, 1, memory_order_relaxed);
	/* Pairs with the exchange in defer_run(): what the adder unlinked is seen unlinked. */
	do
		node->next = head;
	while (!atomic_compare_exchange_weak_explicit(&q->head, &head, node, memory_order_release,
						      memory_order_relaxed));
}

static struct defer_node *defer_reverse(struct defer_node *lifo)
{
	struct defer_node *fifo = NULL;

	while (lifo) {
		struct defer_node *next = lifo->next;

		lifo->next = fifo;
		fifo = lifo;
		lifo = next;
	}
	return fifo;
}

uint64_t defer_run(struct defer_queue *q)
{
	struct defer_node *node;
	uint64_t ran = 0;

	if (atomic_load_explicit(&q->head, memory_order_relaxed) == NULL)
		return 0;
	node = defer_reverse(atomic_exchange_explicit(&q->head, NULL, memory_order_acquire));
	if (!node)
		return 0;
	rcu_wait();
	while (node) {
		struct defer_node *next = node->next;

		node->fn(node, node->arg);
		node = next;
		ran++;
	}
	atomic_fetch_sub_explicit(&q->pending, ran, memory_order_relaxed);
	return ran;
}
