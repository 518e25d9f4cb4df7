/* SPDX-License-Identifier: MIT */
/* base/: environment, deferred free, locks and their order, events. */
#include <check.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/env.h"
#include "base/lock.h"
#include "base/random.h"
#include "base/trace.h"

/* Check's assertions belong to the main thread: others count what failed. */
static _Atomic int thread_errors;
#define thread_check(x) ((x) ? (void)0 : (void)atomic_fetch_add(&thread_errors, 1))

/* -- env -------------------------------------------------------------------- */

struct heap {
	_Atomic int64_t live, bytes;
	void *last_freed;
	size_t last_bytes;
	bool refuse;
};

static void *heap_alloc(void *opaque, size_t bytes)
{
	struct heap *h = opaque;
	void *p = h->refuse ? NULL : aligned_alloc(64, ALIGN_UP(bytes, (size_t)64));

	if (!p)
		return NULL;
	h->live++;
	h->bytes += (int64_t)bytes;
	return memset(p, 0, bytes);
}

static void heap_free(void *opaque, void *ptr, size_t bytes)
{
	struct heap *h = opaque;

	h->live--;
	h->bytes -= (int64_t)bytes;
	h->last_freed = ptr;
	h->last_bytes = bytes;
	free(ptr);
}

static struct kage_engine_config heap_config(struct heap *h)
{
	return (struct kage_engine_config){
	    .size = sizeof(struct kage_engine_config),
	    .alloc = {.alloc = heap_alloc, .free = heap_free, .opaque = h},
	};
}

START_TEST(env_defaults)
{
	struct env env;

	env_init(&env, NULL);
	ck_assert_uint_eq(env.window_timeout_ms, 10000);
	for (size_t n = 1; n < 20000; n = n * 3 + 1) {
		unsigned char *p = env_alloc(&env, n);

		ck_assert_ptr_nonnull(p);
		ck_assert_uint_eq((uintptr_t)p % 64, 0);
		for (size_t i = 0; i < n; i++)
			ck_assert_uint_eq(p[i], 0);
		memset(p, 0xff, n);
		env_free(&env, p, n);
	}
	env_free(&env, NULL, 7);
	env_log(&env, KAGE_LOG_INFO, "nobody listens to %d", 1);
	env_finish(&env);
}
END_TEST

START_TEST(env_embedder_allocates)
{
	struct heap heap = {0};
	struct kage_engine_config config = heap_config(&heap);
	struct env env;
	void *p;

	config.window_timeout_ms = 5;
	env_init(&env, &config);
	ck_assert_uint_eq(env.window_timeout_ms, 5);
	p = env_alloc(&env, 100);
	ck_assert_ptr_nonnull(p);
	ck_assert_int_eq(heap.bytes, 100);
	env_free(&env, p, 100);
	ck_assert_int_eq(heap.live, 0);
	heap.refuse = true;
	ck_assert_ptr_null(env_alloc(&env, 1));
	env_finish(&env);
}
END_TEST

static char logged[400];
static int logged_level;

static void take_log(void *opaque, int level, const char *line)
{
	logged_level = level;
	snprintf(logged, sizeof(logged), "%s", line);
	++*(int *)opaque;
}

START_TEST(env_logs)
{
	int lines = 0;
	struct kage_engine_config config = {.size = sizeof(config), .log = take_log, .log_opaque = &lines};
	struct env env;

	env_init(&env, &config);
	env_log(&env, KAGE_LOG_WARN, "%s %d", "seven is", 7);
	ck_assert_str_eq(logged, "seven is 7");
	ck_assert_int_eq(logged_level, KAGE_LOG_WARN);
	env_log(&env, KAGE_LOG_INFO, "%0300d", 0);
	ck_assert_uint_eq(strlen(logged), 255);
	ck_assert_int_eq(lines, 2);
#ifndef KAGE_DEBUG
	env_corrupt(&env, "refs of %d", 3);
	ck_assert_str_eq(logged, "refs of 3");
	ck_assert_int_eq(logged_level, KAGE_LOG_ERROR);
	ck_assert_uint_eq(env.corruptions, 1);
#endif
	env_finish(&env);
}
END_TEST

struct object {
	char front[72];
	struct defer_node node;
	char back[1000];
};

START_TEST(env_frees_after_grace)
{
	struct heap heap = {0};
	struct kage_engine_config config = heap_config(&heap);
	struct env env;
	struct object *o;

	env_init(&env, &config);
	o = env_alloc(&env, sizeof(*o));
	memset(o->front, 1, sizeof(o->front));
	memset(o->back, 2, sizeof(o->back));
	env_free_rcu(&env, o, sizeof(*o), &o->node);
	ck_assert_int_eq(heap.live, 1);
	/* A reader may still look at it: untouched but for the node. */
	ck_assert_int_eq(o->front[71], 1);
	ck_assert_int_eq(o->back[0], 2);
	ck_assert_uint_eq(env.defer.pending, 1);
	ck_assert_uint_eq(defer_run(&env.defer), 1);
	ck_assert_ptr_eq(heap.last_freed, o);
	ck_assert_uint_eq(heap.last_bytes, sizeof(*o));
	ck_assert_int_eq(heap.live, 0);
	ck_assert_int_eq(heap.bytes, 0);
	ck_assert_uint_eq(env.defer.pending, 0);
	env_finish(&env);
}
END_TEST

/* -- rcu -------------------------------------------------------------------- */

START_TEST(rcu_nests)
{
	ck_assert(!rcu_inside());
	rcu_enter();
	rcu_enter();
	ck_assert(rcu_inside());
	rcu_leave();
	ck_assert(rcu_inside());
	rcu_leave();
	ck_assert(!rcu_inside());
	rcu_wait();
}
END_TEST

struct chain {
	struct defer_node node;
	struct defer_queue *queue;
	int id, more;
};

static int ran[64], ran_count;

static void run_chain(struct defer_node *node, void *arg)
{
	struct chain *c = arg;

	ck_assert_ptr_eq(node, &c->node);
	ran[ran_count++] = c->id;
	if (c->more-- > 0)
		defer_add(c->queue, &c->node, run_chain, c);
}

START_TEST(defer_runs_in_order)
{
	struct chain c[20];
	struct defer_queue q;

	defer_init(&q);
	ran_count = 0;
	ck_assert_uint_eq(defer_run(&q), 0);
	for (int i = 0; i < 20; i++) {
		c[i] = (struct chain){.queue = &q, .id = i, .more = i == 5 ? 2 : 0};
		defer_add(&q, &c[i].node, run_chain, &c[i]);
	}
	ck_assert_uint_eq(q.pending, 20);
	ck_assert_uint_eq(defer_run(&q), 20);
	for (int i = 0; i < 20; i++)
		ck_assert_int_eq(ran[i], i);
	/* What a callback adds runs in a later call. */
	ck_assert_uint_eq(q.pending, 1);
	ck_assert_uint_eq(defer_run(&q), 1);
	ck_assert_uint_eq(defer_run(&q), 1);
	ck_assert_uint_eq(defer_run(&q), 0);
	ck_assert_uint_eq(q.pending, 0);
}
END_TEST

#define CELLS 4
struct cell {
	struct defer_node node;
	uint64_t a, b;
};

struct shop {
	struct env env;
	struct cell *_Atomic cell[CELLS];
	_Atomic bool stop;
	_Atomic uint64_t reads;
};

static void *read_cells(void *arg)
{
	struct shop *s = arg;

	while (!atomic_load(&s->stop)) {
		rcu_enter();
		for (int i = 0; i < CELLS; i++) {
			struct cell *c = load_acquire(&s->cell[i]);

			thread_check(c->a == ~c->b);
		}
		rcu_leave();
		atomic_fetch_add(&s->reads, 1);
	}
	return NULL;
}

static struct cell *new_cell(struct env *env, uint64_t v)
{
	struct cell *c = env_alloc(env, sizeof(*c));

	c->a = v;
	c->b = ~v;
	return c;
}

static void retire_cell(struct defer_node *node, void *arg)
{
	struct cell *c = container_of(node, struct cell, node);

	/* No reader may see this. */
	c->a = c->b = 1;
	env_free(arg, c, sizeof(*c));
}

START_TEST(rcu_protects_readers)
{
	struct shop s = {0};
	pthread_t t[2];

	env_init(&s.env, NULL);
	for (int i = 0; i < CELLS; i++)
		s.cell[i] = new_cell(&s.env, (uint64_t)i);
	for (int i = 0; i < 2; i++)
		pthread_create(&t[i], NULL, read_cells, &s);
	for (uint64_t i = 0; i < 3000 || atomic_load(&s.reads) < 1000; i++) {
		struct cell *old = atomic_exchange(&s.cell[i % CELLS], new_cell(&s.env, i * 7));

		defer_add(&s.env.defer, &old->node, retire_cell, &s.env);
		if (i % 16 == 15)
			ck_assert_uint_eq(defer_run(&s.env.defer), 16);
	}
	s.stop = true;
	for (int i = 0; i < 2; i++)
		pthread_join(t[i], NULL);
	ck_assert_int_eq(thread_errors, 0);
	for (int i = 0; i < CELLS; i++)
		env_free(&s.env, s.cell[i], sizeof(struct cell));
	env_finish(&s.env);
}
END_TEST

static void *enter_and_end(void *arg)
{
	rcu_enter();
	rcu_leave();
	return NULL;
}

/* A thread that ended without unregistering would make the wait look at its dead stack, or hang. */
START_TEST(rcu_threads_come_and_go)
{
	for (int i = 0; i < 300; i++) {
		pthread_t t[2];

		for (int j = 0; j < 2; j++)
			ck_assert_int_eq(pthread_create(&t[j], NULL, enter_and_end, NULL), 0);
		for (int j = 0; j < 2; j++)
			pthread_join(t[j], NULL);
		rcu_wait();
	}
}
END_TEST

/* -- locks ------------------------------------------------------------------ */

#define LOCK_THREADS 4
#define LOCK_ROUNDS 20000

struct arena_of_locks {
	struct lock lock;
	struct brlock br;
	uint64_t count, tries; /* under lock */
	uint64_t x, y;         /* under br */
	_Atomic bool stop;
};

static void *count_locked(void *arg)
{
	struct arena_of_locks *a = arg;

	for (int i = 0; i < LOCK_ROUNDS; i++) {
		if (i % 5 == 0 && lock_try(&a->lock))
			a->tries++;
		else
			lock_take(&a->lock);
		a->count++;
		lock_drop(&a->lock);
	}
	return NULL;
}

START_TEST(lock_excludes)
{
	struct arena_of_locks a = {0};
	pthread_t t[LOCK_THREADS];

	lock_init(&a.lock, RANK_POOL, 0);
	for (int i = 0; i < LOCK_THREADS; i++)
		pthread_create(&t[i], NULL, count_locked, &a);
	for (int i = 0; i < LOCK_THREADS; i++)
		pthread_join(t[i], NULL);
	ck_assert_uint_eq(a.count, (uint64_t)LOCK_THREADS * LOCK_ROUNDS);
	ck_assert(lock_try(&a.lock));
	ck_assert(!lock_try(&a.lock));
	lock_drop(&a.lock);
	ck_assert_uint_eq(a.lock.word, 0);
}
END_TEST

static void *br_reader(void *arg)
{
	struct arena_of_locks *a = arg;
	struct brlock_held h;
	uint64_t rounds = 0;

	while (!atomic_load(&a->stop)) {
		if (++rounds % 3 == 0) {
			if (!brlock_read_try(&a->br, &h))
				continue;
		} else {
			h = brlock_read(&a->br);
		}
		thread_check(a->x == a->y);
		brlock_read_drop(&a->br, h);
	}
	return NULL;
}

static void *br_writer(void *arg)
{
	struct arena_of_locks *a = arg;

	for (int i = 0; i < 3000; i++) {
		brlock_write(&a->br);
		a->x++;
		if (i % 64 == 0)
			sched_yield();
		a->y++;
		brlock_write_drop(&a->br);
	}
	return NULL;
}

START_TEST(brlock_excludes_writers)
{
	struct arena_of_locks a = {0};
	pthread_t r[3], w[2];
	struct brlock_held h, h2;

	brlock_init(&a.br, RANK_FAMILY, 1);
	for (int i = 0; i < 3; i++)
		pthread_create(&r[i], NULL, br_reader, &a);
	for (int i = 0; i < 2; i++)
		pthread_create(&w[i], NULL, br_writer, &a);
	for (int i = 0; i < 2; i++)
		pthread_join(w[i], NULL);
	a.stop = true;
	for (int i = 0; i < 3; i++)
		pthread_join(r[i], NULL);
	ck_assert_int_eq(thread_errors, 0);
	ck_assert_uint_eq(a.x, 6000);
	ck_assert_uint_eq(a.y, 6000);
	h = brlock_read(&a.br);
	ck_assert(brlock_read_try(&a.br, &h2));
	brlock_read_drop(&a.br, h2);
	brlock_read_drop(&a.br, h);
	brlock_write(&a.br);
	ck_assert(!brlock_read_try(&a.br, &h));
	brlock_write_drop(&a.br);
	for (int i = 0; i < BRLOCK_SLOTS; i++)
		ck_assert_uint_eq(a.br.slot[i].readers, 0);
}
END_TEST

struct word {
	_Atomic uint32_t w;
	_Atomic int woke;
};

static void *wait_word(void *arg)
{
	struct word *w = arg;

	word_wait(&w->w, 7, UINT_MAX);
	thread_check(w->w == 8);
	w->woke++;
	return NULL;
}

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

START_TEST(words_wait_and_wake)
{
	struct word w = {.w = 7};
	int64_t start = now_ms();
	pthread_t t[3];

	word_wait(&w.w, 6, UINT_MAX);
	word_wait(&w.w, 7, 30);
	ck_assert_int_ge(now_ms() - start, 29);
	for (int i = 0; i < 3; i++)
		pthread_create(&t[i], NULL, wait_word, &w);
	usleep(10000);
	/* A wake without a change lets nobody through. */
	word_wake(&w.w);
	usleep(10000);
	ck_assert_int_eq(w.woke, 0);
	w.w = 8;
	word_wake(&w.w);
	for (int i = 0; i < 3; i++)
		pthread_join(t[i], NULL);
	ck_assert_int_eq(thread_errors, 0);
	ck_assert_int_eq(w.woke, 3);
}
END_TEST

#if defined(KAGE_DEBUG) && !defined(NDEBUG)
static struct lock table, table2, engine, free_rank;
static struct brlock family;

static void good_order(void)
{
	struct brlock_held h;

	lock_take(&free_rank);
	lock_take(&engine);
	h = brlock_read(&family);
	lock_take(&table);
	lock_take(&table2);
	lock_drop(&table);
	brlock_read_drop(&family, h);
	lock_drop(&table2);
	lock_drop(&engine);
	lock_drop(&free_rank);
	/* A trylock against the order is fine. */
	lock_take(&table);
	ck_assert(lock_try(&engine));
	lock_drop(&engine);
	lock_drop(&table);
}

static void bad_rank(void)
{
	lock_take(&table);
	lock_take(&engine);
}

static void bad_sub(void)
{
	lock_take(&table2);
	lock_take(&table);
}

static void bad_twice(void)
{
	brlock_read(&family);
	brlock_write(&family);
}

static void bad_under_try(void)
{
	if (lock_try(&table))
		lock_take(&engine);
}

/* Buried under a later, higher lock that is gone again. */
static void bad_below_top(void)
{
	lock_take(&engine);
	lock_take(&table);
	lock_drop(&engine);
	brlock_read(&family);
}

static void bad_drop(void)
{
	lock_drop(&engine);
}

/* How a child that does this ends: 0, or the signal. */
static int ending(void (*fn)(void))
{
	int status;
	pid_t pid = fork();

	if (pid == 0) {
		signal(SIGABRT, SIG_DFL);
		if (fn != good_order)
			close(2);
		fn();
		_exit(0);
	}
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	return WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status);
}

START_TEST(lock_order_is_checked)
{
	lock_init(&free_rank, RANK_NONE, 0);
	lock_init(&engine, RANK_ENGINE, 0);
	brlock_init(&family, RANK_FAMILY, 3);
	lock_init(&table, RANK_TABLE_0, 1);
	lock_init(&table2, RANK_TABLE_0, 2);
	ck_assert_int_eq(ending(good_order), 0);
	ck_assert_int_ne(ending(bad_rank), 0);
	ck_assert_int_ne(ending(bad_sub), 0);
	ck_assert_int_ne(ending(bad_twice), 0);
	ck_assert_int_ne(ending(bad_under_try), 0);
	ck_assert_int_ne(ending(bad_below_top), 0);
	ck_assert_int_ne(ending(bad_drop), 0);
}
END_TEST
#endif

/* -- events ----------------------------------------------------------------- */

START_TEST(trace_keeps_the_last)
{
	struct trace_ring *ring = calloc(1, sizeof(*ring) + 8 * sizeof(struct trace_record));
	struct env env;

	env_init(&env, NULL);
	trace(&env, merge, 1, 2, 3); /* nowhere to go */
	ring->size = 8;
	env.trace = ring;
	for (uint64_t i = 0; i < 11; i++)
		trace(&env, cow_break, i, i * 2, i * 3);
	ck_assert_uint_eq(ring->head, 11);
	for (uint64_t i = 3; i < 11; i++) {
		ck_assert_uint_eq(ring->rec[i % 8].event, TRACE_cow_break);
		ck_assert_uint_eq(ring->rec[i % 8].a, i);
		ck_assert_uint_eq(ring->rec[i % 8].b, i * 2);
		ck_assert_uint_eq(ring->rec[i % 8].c, i * 3);
	}
	ck_assert_str_eq(trace_name(TRACE_fault), "fault");
	ck_assert_str_eq(trace_name(TRACE_shootdown), "shootdown");
	ck_assert_str_eq(trace_name(TRACE_COUNT), "?");
	env_finish(&env);
	free(ring);
}
END_TEST

/* -- random numbers --------------------------------------------------------- */

/* RFC 8439, 2.3.2; its 32 bits of counter and 96 of nonce are 64 and 64 here. */
START_TEST(random_is_chacha20)
{
	static const uint32_t want[16] = {
	    0xe4e7f110, 0x15593bd1, 0x1fdd0f50, 0xc47120a3, 0xc7f4d1c7, 0x0368c033, 0x9aaa2204, 0x4e6cd4c3,
	    0x466482d2, 0x09aa9f07, 0x05d7c214, 0xa2028bd9, 0xd19c12b5, 0xb94e16de, 0xe883d0cb, 0x4e3c50a2,
	};
	struct random_key key;
	uint32_t got[16];

	for (unsigned i = 0; i < 8; i++)
		key.word[i] = (4 * i) | (4 * i + 1) << 8 | (4 * i + 2) << 16 | (4 * i + 3) << 24;
	random_block(&key, 0x4a000000, 0x0900000000000001, got);
	ck_assert_mem_eq(got, want, sizeof(want));
}
END_TEST

START_TEST(random_numbers_spread)
{
	static const uint32_t bounds[] = { 1, 2, 3, 10, 64, 1000 };
	struct random_key key = random_key_of(7), other = random_key_of(8);
	struct random r, again;

	for (unsigned b = 0; b < ARRAY_SIZE(bounds); b++) {
		uint32_t n = bounds[b], seen[1000] = { 0 };
		double chi = 0, expect = 200;

		random_init(&r, &key, b);
		random_init(&again, &key, b);
		for (uint32_t i = 0; i < 200 * n; i++) {
			uint32_t x = random_below(&r, n);

			ck_assert_uint_lt(x, n);
			ck_assert_uint_eq(x, random_below(&again, n));
			seen[x]++;
		}
		for (uint32_t i = 0; i < n; i++)
			chi += (seen[i] - expect) * (seen[i] - expect) / expect;
		/* n - 1 degrees of freedom: variance twice their number; a fixed key, so no chance is involved */
		ck_assert_double_lt((chi - (n - 1)) * (chi - (n - 1)), 16.0 * 2 * n);
	}
	ck_assert_uint_ne(random_of(&key, 1), random_of(&key, 2));
	ck_assert_uint_ne(random_of(&key, 1), random_of(&other, 1));
	ck_assert_uint_eq(random_of(&key, 1), random_of(&key, 1));
}
END_TEST

int main(void)
{
	Suite *s = suite_create("base");
	TCase *tc = tcase_create("base");
	SRunner *sr;
	int failed;

	tcase_set_timeout(tc, 120);
	tcase_add_test(tc, env_defaults);
	tcase_add_test(tc, env_embedder_allocates);
	tcase_add_test(tc, env_logs);
	tcase_add_test(tc, env_frees_after_grace);
	tcase_add_test(tc, rcu_nests);
	tcase_add_test(tc, defer_runs_in_order);
#if defined(KAGE_DEBUG) && !defined(NDEBUG)
	tcase_add_test(tc, lock_order_is_checked);
#endif
	tcase_add_test(tc, rcu_protects_readers);
	tcase_add_test(tc, rcu_threads_come_and_go);
	tcase_add_test(tc, lock_excludes);
	tcase_add_test(tc, brlock_excludes_writers);
	tcase_add_test(tc, words_wait_and_wake);
	tcase_add_test(tc, trace_keeps_the_last);
	tcase_add_test(tc, random_is_chacha20);
	tcase_add_test(tc, random_numbers_spread);
	suite_add_tcase(s, tc);
	sr = srunner_create(s);
	srunner_set_fork_status(sr, CK_NOFORK);
	srunner_run_all(sr, CK_NORMAL);
	failed = srunner_ntests_failed(sr);
	srunner_free(sr);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
