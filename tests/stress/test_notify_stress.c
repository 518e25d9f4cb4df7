/* SPDX-License-Identifier: MIT */
/*
 * Notifiers under threads: a little guest whose pages move all the time while
 * others write to them, each by one of the contract's three ways. Frames hold
 * plain words, so a write that the protocol does not order is a data race for
 * TSan, and one that goes to a frame after it was replaced is lost and missed
 * in the final count (a replaced frame is scribbled over as soon as its change
 * has ended).
 *
 *   movers      start; copy the pages of a range to new frames; end
 *   writers     begin; look up; hold; write; end            (engine writes)
 *   cpus        begin; look up; under the lock: valid? install; write through
 *               what is installed                           (shadow tables)
 *   device      read_begin; look up; under its lock: read_retry? install; write
 *   churn       registers and unregisters a listener and an interval
 *   calm        a reader and a mover of their own pages: never disturbed
 *
 * Before that, for a quarter of the time, a duel: one thread holds and one
 * changes the same page, and neither does anything else, so that they meet
 * within a store buffer's depth. This is what finds a missing fence.
 *
 * Usage: stress-notify [milliseconds]
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "notify/notify.h"

#define STORM 32 /* pages that movers move */
#define CALM 16  /* pages above them that only the calm thread uses */
#define PAGES (STORM + CALM)
#define MOVERS 2
#define WRITERS 2
#define CPUS 2
#define USERS (WRITERS + CPUS + 1)
#define DEVICE (WRITERS + CPUS)
#define LONGEST 5
#define IDLE (NOTIFY_PERMANENT - 2) /* leaves two permanent slots: most readers take one for each section */

struct page {
	pthread_mutex_t lock;
	struct frame *_Atomic frame;
};

struct frame {
	uint64_t count[USERS]; /* one word for each who writes */
	struct frame *next;
};

static struct env env;
static struct notify n;
static struct page table[PAGES];
static uint64_t expected[USERS][PAGES];
static _Atomic int stop;
static _Atomic unsigned failures;

/* A shadow table of all cpus, or the tables of the device. */
struct secondary {
	pthread_mutex_t lock;
	struct frame *entry[PAGES];
};

static struct secondary shadow = { .lock = PTHREAD_MUTEX_INITIALIZER };
static struct secondary mirror = { .lock = PTHREAD_MUTEX_INITIALIZER };
static struct kage_notifier shadow_listener;
static struct kage_interval mirror_interval;
#define MIRRORED (STORM / 2)

#define EXPECT(x)                                                                        \
	do {                                                                             \
		if (!(x) && atomic_fetch_add(&failures, 1) < 10)                         \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #x);  \
	} while (0)

static struct frame *frame_of(unsigned page)
{
	return atomic_load_explicit(&table[page].frame, memory_order_acquire);
}

static void secondary_drop(struct secondary *s, const struct kage_range *r)
{
	pthread_mutex_lock(&s->lock);
	for (uint64_t p = r->start / PAGE_SIZE; p < r->end / PAGE_SIZE; p++)
		s->entry[p] = NULL;
	pthread_mutex_unlock(&s->lock);
}

static bool secondary_empty(struct secondary *s, unsigned start, unsigned end)
{
	bool empty = true;

	pthread_mutex_lock(&s->lock);
	for (unsigned p = start; p < end; p++)
		empty &= s->entry[p] == NULL;
	pthread_mutex_unlock(&s->lock);
	return empty;
}

static int shadow_start(struct kage_notifier *l, const struct kage_range *r)
{
	/* now and then it would block */
	if (!(r->flags & KAGE_RANGE_BLOCKABLE) && pthread_mutex_trylock(&shadow.lock))
		return -EAGAIN;
	if (!(r->flags & KAGE_RANGE_BLOCKABLE))
		pthread_mutex_unlock(&shadow.lock);
	secondary_drop(&shadow, r);
	return 0;
}

static const struct kage_notifier_ops shadow_ops = { .invalidate_range_start = shadow_start };

static int mirror_invalidate(struct kage_interval *i, const struct kage_range *r)
{
	secondary_drop(&mirror, r);
	return 0;
}

/* --- movers --- */

static struct frame *new_frame(struct frame **pool)
{
	struct frame *f = *pool;

	if (!f)
		return calloc(1, sizeof(*f));
	*pool = f->next;
	return f;
}

/* Scribbled over at once: whoever still writes there loses his write, whoever reads notices. */
static void retire(struct frame **pool, struct frame *f)
{
	memset(f, 0xdd, sizeof(*f));
	f->next = *pool;
	*pool = f;
}

static void move_pages(struct frame **pool, unsigned start, unsigned end, struct frame **old)
{
	for (unsigned p = start; p < end; p++) {
		struct frame *f = new_frame(pool);

		pthread_mutex_lock(&table[p].lock);
		old[p - start] = frame_of(p);
		memcpy(f->count, old[p - start]->count, sizeof(f->count));
		atomic_store_explicit(&table[p].frame, f, memory_order_release);
		pthread_mutex_unlock(&table[p].lock);
	}
}

static bool move_once(struct frame **pool, unsigned start, unsigned end, uint32_t flags)
{
	struct notify_change c = { .start = GFN(start), .end = GFN(end), .flags = flags, .lost = KAGE_RWX };
	struct frame *old[LONGEST];

	if (notify_start(&n, &c))
		return false;
	move_pages(pool, start, end, old);
	EXPECT(secondary_empty(&shadow, start, end));
	EXPECT(start >= MIRRORED || secondary_empty(&mirror, start, MIN(end, MIRRORED)));
	notify_end(&n, &c);
	for (unsigned p = start; p < end; p++)
		retire(pool, old[p - start]);
	return true;
}

static void pool_free(struct frame *pool)
{
	while (pool) {
		struct frame *f = pool;

		pool = f->next;
		free(f);
	}
}

static _Atomic uint64_t moves, refused;

static void *mover(void *arg)
{
	unsigned seed = (unsigned)(uintptr_t)arg;
	struct frame *pool = NULL;

	while (!atomic_load(&stop)) {
		unsigned start = (unsigned)rand_r(&seed) % STORM;
		unsigned end = start + 1 + (unsigned)rand_r(&seed) % LONGEST;

		end = MIN(end, STORM);
		if (move_once(&pool, start, end, rand_r(&seed) % 4 ? KAGE_RANGE_BLOCKABLE : 0))
			atomic_fetch_add(&moves, 1);
		else
			atomic_fetch_add(&refused, 1);
	}
	pool_free(pool);
	return NULL;
}

/* --- who writes --- */

static void *writer(void *arg)
{
	unsigned me = (unsigned)(uintptr_t)arg, seed = me + 100;
	struct notify_reader r;

	EXPECT(notify_reader_attach(&n, &r) == 0);
	while (!atomic_load(&stop)) {
		unsigned p = (unsigned)rand_r(&seed) % STORM;
		struct frame *f;

		notify_read_begin(&r, GFN(p), GFN(p + 1));
		f = frame_of(p);
		if (notify_read_hold(&r)) {
			f->count[me]++;
			expected[me][p]++;
		}
		notify_read_end(&r);
	}
	notify_reader_detach(&r);
	return NULL;
}

static void *cpu(void *arg)
{
	unsigned me = (unsigned)(uintptr_t)arg, seed = me + 100;
	struct notify_reader r;

	EXPECT(notify_reader_attach(&n, &r) == 0);
	while (!atomic_load(&stop)) {
		unsigned p = (unsigned)rand_r(&seed) % STORM;
		struct frame *f;

		notify_read_begin(&r, GFN(p), GFN(p + 1));
		f = frame_of(p);
		pthread_mutex_lock(&shadow.lock);
		if (notify_read_valid(&r))
			shadow.entry[p] = f;
		if (shadow.entry[p]) {
			shadow.entry[p]->count[me]++;
			expected[me][p]++;
		}
		pthread_mutex_unlock(&shadow.lock);
		notify_read_end(&r);
	}
	notify_reader_detach(&r);
	return NULL;
}

static void *device(void *arg)
{
	unsigned seed = 77;

	while (!atomic_load(&stop)) {
		unsigned p = (unsigned)rand_r(&seed) % MIRRORED;
		uint64_t seq = kage_interval_read_begin(&mirror_interval);
		struct frame *f = frame_of(p);

		pthread_mutex_lock(&mirror.lock);
		if (!kage_interval_read_retry(&mirror_interval, seq))
			mirror.entry[p] = f;
		if (mirror.entry[p]) {
			mirror.entry[p]->count[DEVICE]++;
			expected[DEVICE][p]++;
		}
		pthread_mutex_unlock(&mirror.lock);
	}
	return NULL;
}

/* --- who comes and goes --- */

struct guest_listener {
	struct kage_notifier l;
	struct kage_interval i;
	_Atomic uint64_t starts, ends, told;
	_Atomic uint64_t ids; /* XOR of the ids of starts and of ends */
};

static int churn_start(struct kage_notifier *l, const struct kage_range *r)
{
	struct guest_listener *g = container_of(l, struct guest_listener, l);

	if (!(r->flags & KAGE_RANGE_BLOCKABLE) && (r->id >> 6) % 8 == 1)
		return -EAGAIN;
	atomic_fetch_add(&g->starts, 1);
	atomic_fetch_xor(&g->ids, r->id);
	return 0;
}

static void churn_end(struct kage_notifier *l, const struct kage_range *r)
{
	struct guest_listener *g = container_of(l, struct guest_listener, l);

	atomic_fetch_add(&g->ends, 1);
	atomic_fetch_xor(&g->ids, r->id);
}

static int churn_invalidate(struct kage_interval *i, const struct kage_range *r)
{
	struct guest_listener *g = container_of(i, struct guest_listener, i);

	EXPECT(r->start < i->end && i->start < r->end);
	atomic_fetch_add(&g->told, 1);
	return 0;
}

static const struct kage_notifier_ops churn_ops = {
	.invalidate_range_start = churn_start,
	.invalidate_range_end = churn_end,
};

static _Atomic uint64_t churns, churn_starts, churn_told;

/* Freed as soon as it is unregistered: a late callback is a use after free. */
static void *churn(void *arg)
{
	while (!atomic_load(&stop)) {
		struct guest_listener *g = calloc(1, sizeof(*g));

		g->i = (struct kage_interval){ .invalidate = churn_invalidate, .start = 3 * PAGE_SIZE,
					       .end = 9 * PAGE_SIZE };
		EXPECT(notify_register(&n, &g->l, &churn_ops) == 0);
		EXPECT(notify_interval_insert(&n, &g->i) == 0);
		sched_yield();
		notify_age(&n, GFN(0), GFN(PAGES));
		EXPECT(notify_unregister(&g->l) == 0);
		EXPECT(g->starts == g->ends && g->ids == 0);
		EXPECT(notify_interval_remove(&g->i) == 0);
		atomic_fetch_add(&churn_starts, g->starts);
		atomic_fetch_add(&churn_told, g->told);
		atomic_fetch_add(&churns, 1);
		free(g);
	}
	return NULL;
}

/* --- who must not be disturbed --- */

static _Atomic uint64_t calm_sections;

static void *calm(void *arg)
{
	struct frame *pool = NULL;
	struct notify_reader r;
	unsigned seed = 5;

	EXPECT(notify_reader_attach(&n, &r) == 0);
	while (!atomic_load(&stop)) {
		unsigned p = STORM + 1 + (unsigned)rand_r(&seed) % (CALM - 2);

		notify_read_begin(&r, GFN(p), GFN(p + 1));
		EXPECT(notify_read_valid(&r));
		EXPECT(notify_read_hold(&r));
		EXPECT(move_once(&pool, p - 1, p, KAGE_RANGE_BLOCKABLE));
		EXPECT(notify_read_valid(&r));
		notify_read_end(&r);
		atomic_fetch_add(&calm_sections, 1);
	}
	notify_reader_detach(&r);
	pool_free(pool);
	return NULL;
}

/* --- the duel --- */

static _Atomic int holder_in, changer_in;
static _Atomic uint64_t version; /* what the changer changes */

static void *duel_holder(void *arg)
{
	struct notify_reader r;
	uint64_t *holds = arg;

	EXPECT(notify_reader_attach(&n, &r) == 0);
	while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
		uint64_t seen;

		notify_read_begin(&r, GFN(1), GFN(2));
		seen = atomic_load_explicit(&version, memory_order_relaxed);
		if (notify_read_hold(&r)) {
			atomic_store_explicit(&holder_in, 1, memory_order_relaxed);
			EXPECT(atomic_load_explicit(&changer_in, memory_order_relaxed) == 0);
			EXPECT(atomic_load_explicit(&version, memory_order_relaxed) == seen);
			atomic_store_explicit(&holder_in, 0, memory_order_relaxed);
			++*holds;
		}
		notify_read_end(&r);
	}
	notify_reader_detach(&r);
	return NULL;
}

static void *duel_changer(void *arg)
{
	uint64_t *changes = arg;

	while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
		struct notify_change c = { .end = GFN(2), .flags = *changes & KAGE_RANGE_BLOCKABLE };

		if (notify_start(&n, &c) == 0) {
			atomic_store_explicit(&changer_in, 1, memory_order_relaxed);
			EXPECT(atomic_load_explicit(&holder_in, memory_order_relaxed) == 0);
			atomic_fetch_add_explicit(&version, 1, memory_order_relaxed);
			atomic_store_explicit(&changer_in, 0, memory_order_relaxed);
			notify_end(&n, &c);
		}
		++*changes;
	}
	return NULL;
}

static void sleep_ms(unsigned ms)
{
	nanosleep(&(struct timespec){ .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L }, NULL);
}

static void duel(unsigned ms)
{
	uint64_t holds = 0, changes = 0;
	pthread_t a, b;

	if (pthread_create(&a, NULL, duel_holder, &holds) || pthread_create(&b, NULL, duel_changer, &changes))
		exit(2);
	sleep_ms(ms);
	atomic_store(&stop, 1);
	pthread_join(a, NULL);
	pthread_join(b, NULL);
	atomic_store(&stop, 0);
	EXPECT(holds > 0 && changes > 0);
	printf("duel: holds %llu, changes %llu\n", (unsigned long long)holds, (unsigned long long)changes);
}

/* --- */

static uint64_t check_counts(void)
{
	uint64_t writes = 0;

	for (unsigned p = 0; p < PAGES; p++) {
		for (unsigned u = 0; u < USERS; u++) {
			EXPECT(frame_of(p)->count[u] == expected[u][p]);
			writes += expected[u][p];
		}
		free(frame_of(p));
		pthread_mutex_destroy(&table[p].lock);
	}
	return writes;
}

static unsigned spawn(pthread_t *t, unsigned k, void *(*fn)(void *), unsigned arg)
{
	if (pthread_create(&t[k], NULL, fn, (void *)(uintptr_t)arg))
		exit(2);
	return k + 1;
}

int main(int argc, char **argv)
{
	unsigned ms = argc > 1 ? (unsigned)atoi(argv[1]) : 2000, k = 0;
	static struct notify_reader idle[IDLE];
	pthread_t t[16];
	uint64_t writes;

	env_init(&env, NULL);
	EXPECT(notify_init(&n, &env, 1) == 0);
	duel(ms / 4);
	for (unsigned p = 0; p < PAGES; p++) {
		pthread_mutex_init(&table[p].lock, NULL);
		table[p].frame = calloc(1, sizeof(struct frame));
	}
	mirror_interval.invalidate = mirror_invalidate;
	mirror_interval.end = MIRRORED * PAGE_SIZE;
	EXPECT(notify_register(&n, &shadow_listener, &shadow_ops) == 0);
	EXPECT(notify_interval_insert(&n, &mirror_interval) == 0);
	for (unsigned i = 0; i < IDLE; i++)
		EXPECT(notify_reader_attach(&n, &idle[i]) == 0);
	for (unsigned i = 0; i < MOVERS; i++)
		k = spawn(t, k, mover, i + 1);
	for (unsigned i = 0; i < WRITERS; i++)
		k = spawn(t, k, writer, i);
	for (unsigned i = 0; i < CPUS; i++)
		k = spawn(t, k, cpu, WRITERS + i);
	k = spawn(t, k, device, 0);
	k = spawn(t, k, churn, 0);
	k = spawn(t, k, calm, 0);
	sleep_ms(ms - ms / 4);
	atomic_store(&stop, 1);
	while (k)
		pthread_join(t[--k], NULL);
	for (unsigned i = 0; i < IDLE; i++)
		notify_reader_detach(&idle[i]);
	EXPECT(n.spurious == 0);
	EXPECT(n.changes_used == 0 && n.waiters == 0 && n.readers_used[0] == 0 && n.readers_used[1] == 0);
	EXPECT(moves > 0 && churns > 0 && calm_sections > 0);
	notify_release(&n);
	writes = check_counts();
	EXPECT(writes > 0);
	printf("moves %llu (refused %llu), writes %llu, retried %llu, churns %llu (starts %llu, told %llu), "
	       "calm %llu, failures %u\n",
	       (unsigned long long)moves, (unsigned long long)refused, (unsigned long long)writes,
	       (unsigned long long)n.retried, (unsigned long long)churns, (unsigned long long)churn_starts,
	       (unsigned long long)churn_told, (unsigned long long)calm_sections, failures);
	notify_finish(&n);
	env_finish(&env);
	return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
