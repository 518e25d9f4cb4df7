/* SPDX-License-Identifier: MIT */
/*
 * Notifiers: one test for each sentence of engine/notify/notify.h and
 * kage/notifier.h that can be observed from one process. What needs many
 * interleavings is in tests/stress/test_notify_stress.c and in the spin model.
 *
 * Threads of a test report through variables: Check's assertions stay on the
 * main thread. "Still waiting" is seen in the notifier's own `waiters` word or
 * hold word, so no test depends on how long something takes.
 */
#include <check.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>

#include "base/trace.h"
#include "notify/notify.h"

#define SLOW_MS 20000

static struct env env;
static struct notify n;
static long allocs_left; /* < 0: no limit */
static long allocs_live;
static unsigned corrupt_lines;

static void *test_alloc(void *opaque, size_t bytes)
{
	void *p;

	if (allocs_left == 0)
		return NULL;
	if (allocs_left > 0)
		allocs_left--;
	if (posix_memalign(&p, 64, bytes))
		return NULL;
	allocs_live++;
	return memset(p, 0, bytes);
}

static void test_free(void *opaque, void *p, size_t bytes)
{
	memset(p, 0xa5, bytes);
	allocs_live--;
	free(p);
}

static void test_log(void *opaque, int level, const char *line)
{
	corrupt_lines++;
}

static void setup(void)
{
	struct kage_engine_config config = {
		.log = test_log,
		.alloc = { .alloc = test_alloc, .free = test_free },
	};

	allocs_left = -1;
	allocs_live = 0;
	corrupt_lines = 0;
	env_init(&env, &config);
	ck_assert_int_eq(notify_init(&n, &env, 7), 0);
}

static void teardown(void)
{
	ck_assert_uint_eq(n.changes_used, 0);
	ck_assert_uint_eq(n.waiters, 0);
	ck_assert_uint_eq(n.spurious, 0);
	notify_finish(&n);
	env_finish(&env);
	ck_assert_int_eq(allocs_live, 0);
}

/* --- helpers --- */

static struct notify_change change(uint64_t start, uint64_t end, uint32_t flags)
{
	return (struct notify_change){
		.start = GFN(start),
		.end = GFN(end),
		.reason = KAGE_REASON_CLEAR,
		.flags = flags,
		.lost = KAGE_RWX,
	};
}

#define BLOCKABLE KAGE_RANGE_BLOCKABLE
#define OPTIONAL KAGE_RANGE_OPTIONAL

static bool eventually(bool (*cond)(void))
{
	for (unsigned i = 0; i < SLOW_MS; i++) {
		if (cond())
			return true;
		nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
	}
	return false;
}

static bool somebody_waits(void)
{
	return atomic_load(&n.waiters) != 0;
}

/* A listener that records what it is told. */
struct recorder {
	struct kage_notifier l;
	int rc; /* what start answers */
	unsigned starts, ends, releases, ages, tests;
	bool young;
	uint64_t started[8], ended[8]; /* ids */
	struct kage_range last;
	struct recorder *before; /* who must have fewer ends at our end (reverse order) */
	bool order_bad;
};

static int rec_start(struct kage_notifier *l, const struct kage_range *r)
{
	struct recorder *rec = container_of(l, struct recorder, l);

	rec->started[rec->starts++ % 8] = r->id;
	rec->last = *r;
	return rec->rc;
}

static void rec_end(struct kage_notifier *l, const struct kage_range *r)
{
	struct recorder *rec = container_of(l, struct recorder, l);

	rec->ended[rec->ends++ % 8] = r->id;
	if (rec->before && rec->before->ends >= rec->ends)
		rec->order_bad = true;
}

static bool rec_age(struct kage_notifier *l, uint64_t start, uint64_t end)
{
	struct recorder *rec = container_of(l, struct recorder, l);
	bool was = rec->young;

	rec->ages++;
	rec->young = false;
	return was && start == 0x3000 && end == 0x5000;
}

static bool rec_test_young(struct kage_notifier *l, uint64_t start, uint64_t end)
{
	struct recorder *rec = container_of(l, struct recorder, l);

	rec->tests++;
	return rec->young;
}

static void rec_release(struct kage_notifier *l)
{
	container_of(l, struct recorder, l)->releases++;
}

static const struct kage_notifier_ops rec_ops = {
	.invalidate_range_start = rec_start,
	.invalidate_range_end = rec_end,
	.age = rec_age,
	.test_young = rec_test_young,
	.release = rec_release,
};

static const struct kage_notifier_ops no_ops;

/* --- changes --- */

START_TEST(nested_and_overlapping)
{
	struct notify_change a = change(10, 20, BLOCKABLE), b = change(15, 16, BLOCKABLE);
	struct notify_change c = change(18, 30, 0);
	struct recorder rec = { 0 };

	ck_assert_int_eq(notify_register(&n, &rec.l, &rec_ops), 0);
	a.owner = &rec;
	ck_assert_int_eq(notify_start(&n, &a), 0);
	ck_assert_uint_eq(rec.last.start, 10 * PAGE_SIZE);
	ck_assert_uint_eq(rec.last.end, 20 * PAGE_SIZE);
	ck_assert_uint_eq(rec.last.reason, KAGE_REASON_CLEAR);
	ck_assert_uint_eq(rec.last.flags, BLOCKABLE);
	ck_assert_uint_eq(rec.last.lost, KAGE_RWX);
	ck_assert_ptr_eq(rec.last.owner, &rec);
	ck_assert_int_eq(notify_start(&n, &b), 0);
	ck_assert_int_eq(notify_start(&n, &c), 0);
	ck_assert(a.id != b.id && b.id != c.id && a.id != c.id);
	notify_end(&n, &a);
	notify_end(&n, &c);
	notify_end(&n, &b);
	ck_assert_uint_eq(rec.starts, 3);
	ck_assert_uint_eq(rec.ends, 3);
	ck_assert_uint_eq(rec.started[0], a.id);
	ck_assert_uint_eq(rec.ended[0], a.id);
	ck_assert_uint_eq(rec.ended[1], c.id);
	ck_assert_uint_eq(rec.ended[2], b.id);
	ck_assert_int_eq(notify_unregister(&rec.l), 0);
}
END_TEST

START_TEST(ids_do_not_repeat)
{
	uint64_t seen = 0;

	for (int i = 0; i < 1000; i++) {
		struct notify_change a = change(1, 2, 0);

		ck_assert_int_eq(notify_start(&n, &a), 0);
		ck_assert_uint_gt(a.id, seen); /* one slot: they grow */
		seen = a.id;
		notify_end(&n, &a);
	}
}
END_TEST

static void *start_one(void *arg)
{
	struct notify_change *c = arg;
	intptr_t err = notify_start(&n, c);

	if (!err)
		notify_end(&n, c);
	return (void *)err;
}

START_TEST(more_than_64)
{
	struct notify_change c[NOTIFY_CHANGES], extra = change(5, 6, 0), late = change(5, 6, BLOCKABLE);
	pthread_t t;
	void *err;

	for (unsigned i = 0; i < NOTIFY_CHANGES; i++) {
		c[i] = change(i, i + 2, 0);
		ck_assert_int_eq(notify_start(&n, &c[i]), 0);
		for (unsigned j = 0; j < i; j++)
			ck_assert_uint_ne(c[i].id, c[j].id);
	}
	ck_assert_int_eq(notify_start(&n, &extra), -EAGAIN);
	ck_assert_int_eq(pthread_create(&t, NULL, start_one, &late), 0);
	ck_assert(eventually(somebody_waits));
	notify_end(&n, &c[33]);
	pthread_join(t, &err);
	ck_assert_ptr_null(err);
	ck_assert_int_eq(notify_start(&n, &c[33]), 0);
	for (unsigned i = 0; i < NOTIFY_CHANGES; i++)
		notify_end(&n, &c[i]);
}
END_TEST

/* --- listeners: errors --- */

static void three_listeners(struct recorder *rec)
{
	for (int i = 0; i < 3; i++) {
		rec[i] = (struct recorder){ .before = i ? &rec[i - 1] : NULL };
		ck_assert_int_eq(notify_register(&n, &rec[i].l, &rec_ops), 0);
	}
}

static void three_gone(struct recorder *rec)
{
	for (int i = 0; i < 3; i++)
		ck_assert_int_eq(notify_unregister(&rec[i].l), 0);
}

/* The third says `rc`: the others have one end each, with the id of their start, the second first. */
static void expect_unwound(uint32_t flags, int rc)
{
	struct notify_change c = change(1, 4, flags);
	struct recorder rec[3];

	three_listeners(rec);
	rec[2].rc = rc;
	ck_assert_int_eq(notify_start(&n, &c), rc);
	for (int i = 0; i < 3; i++) {
		ck_assert_uint_eq(rec[i].starts, 1);
		ck_assert_uint_eq(rec[i].ends, i < 2);
		ck_assert(!rec[i].order_bad);
		if (i < 2)
			ck_assert_uint_eq(rec[i].started[0], rec[i].ended[0]);
	}
	ck_assert_uint_eq(n.changes_used, 0);
	rec[2].rc = 0;
	ck_assert_int_eq(notify_start(&n, &c), 0);
	notify_end(&n, &c);
	for (int i = 0; i < 3; i++)
		ck_assert_uint_eq(rec[i].ends, i < 2 ? 2 : 1);
	three_gone(rec);
	ck_assert_uint_eq(corrupt_lines, 0);
}

START_TEST(listener_would_block)
{
	expect_unwound(0, -EAGAIN);
	expect_unwound(OPTIONAL, -EAGAIN);
}
END_TEST

START_TEST(listener_has_no_memory)
{
	expect_unwound(BLOCKABLE | OPTIONAL, -ENOMEM);
	expect_unwound(OPTIONAL, -ENOMEM);
}
END_TEST

START_TEST(listener_times_out)
{
	expect_unwound(BLOCKABLE, -ETIMEDOUT); /* mandatory changes too */
	expect_unwound(BLOCKABLE | OPTIONAL, -ETIMEDOUT);
	expect_unwound(BLOCKABLE, -EDEADLK);
}
END_TEST

#ifndef KAGE_DEBUG /* env_corrupt() asserts in debug builds */
START_TEST(listener_breaks_the_rules)
{
	static const struct {
		uint32_t flags;
		int rc;
	} wrong[] = {
		{ BLOCKABLE, -ENOMEM },
		{ BLOCKABLE, -EAGAIN },
		{ BLOCKABLE | OPTIONAL, -EINVAL },
		{ 0, 1 },
	};

	for (unsigned i = 0; i < ARRAY_SIZE(wrong); i++) {
		struct notify_change c = change(1, 4, wrong[i].flags);
		struct recorder rec[3];

		three_listeners(rec);
		rec[1].rc = wrong[i].rc;
		ck_assert_int_eq(notify_start(&n, &c), 0);
		ck_assert_uint_eq(env.corruptions, i + 1);
		ck_assert_uint_eq(rec[2].starts, 1);
		notify_end(&n, &c);
		for (int j = 0; j < 3; j++)
			ck_assert_uint_eq(rec[j].ends, 1);
		three_gone(rec);
	}
	ck_assert_uint_ne(corrupt_lines, 0);
}
END_TEST
#endif

START_TEST(register_errors)
{
	struct recorder rec = { 0 }, other = { 0 };

	ck_assert_int_eq(notify_register(&n, NULL, &rec_ops), -EINVAL);
	ck_assert_int_eq(notify_register(&n, &rec.l, NULL), -EINVAL);
	ck_assert_int_eq(notify_unregister(NULL), -EINVAL);
	ck_assert_int_eq(notify_unregister(&rec.l), -ENOENT);
	allocs_left = 0;
	ck_assert_int_eq(notify_register(&n, &rec.l, &rec_ops), -ENOMEM);
	ck_assert_ptr_null(rec.l.ops);
	ck_assert_int_eq(notify_unregister(&rec.l), -ENOENT);
	allocs_left = -1;
	ck_assert_int_eq(notify_register(&n, &rec.l, &rec_ops), 0);
	ck_assert_int_eq(notify_register(&n, &rec.l, &rec_ops), -EBUSY);
	ck_assert_int_eq(notify_register(&n, &other.l, &no_ops), 0); /* every op may be NULL */
	start_one(&(struct notify_change){ .start = GFN(1), .end = GFN(2) });
	ck_assert_uint_eq(rec.ends, 1);
	ck_assert(!notify_age(&n, GFN(0), GFN(1)));
	ck_assert_int_eq(notify_unregister(&rec.l), 0);
	ck_assert_int_eq(notify_unregister(&rec.l), -ENOENT);
	start_one(&(struct notify_change){ .start = GFN(1), .end = GFN(2) });
	ck_assert_uint_eq(rec.ends, 1);
	notify_release(&n); /* an op that is NULL */
	ck_assert_int_eq(notify_unregister(&other.l), -ENOENT);
}
END_TEST

static int never(struct kage_interval *i, const struct kage_range *r)
{
	abort();
}

/* Whatever order they come and go in, leaving needs no memory (set.c, S2). */
START_TEST(leaving_needs_no_memory)
{
	enum { N = 40 };
	static struct recorder rec[N];
	static struct kage_interval iv[N];
	bool in[2 * N] = { false };
	unsigned seed = 1;

	memset(rec, 0, sizeof(rec));
	memset(iv, 0, sizeof(iv));
	for (int step = 0; step < 4000; step++) {
		unsigned i = (unsigned)rand_r(&seed) % (2 * N);
		int rc;

		allocs_left = in[i] ? 0 : -1;
		if (i < N) {
			rc = in[i] ? notify_unregister(&rec[i].l) : notify_register(&n, &rec[i].l, &rec_ops);
		} else if (in[i]) {
			rc = notify_interval_remove(&iv[i - N]);
		} else {
			iv[i - N].start = i * PAGE_SIZE;
			iv[i - N].end = (i + 3) * PAGE_SIZE;
			iv[i - N].invalidate = never;
			rc = notify_interval_insert(&n, &iv[i - N]);
		}
		ck_assert_int_eq(rc, 0);
		in[i] = !in[i];
		if (step % 200 != 0)
			continue;
		start_one(&(struct notify_change){ .start = GFN(1000), .end = GFN(1001) });
		for (unsigned j = 0; j < N; j++) {
			ck_assert_uint_eq(rec[j].starts, rec[j].ends);
			ck_assert(rec[j].starts == 0 || rec[j].last.start == 1000 * PAGE_SIZE);
		}
	}
	allocs_left = -1;
	notify_release(&n);
}
END_TEST

START_TEST(young)
{
	struct recorder a = { 0 }, b = { .young = true };

	ck_assert(!notify_age(&n, GFN(3), GFN(5)));
	ck_assert_int_eq(notify_register(&n, &b.l, &rec_ops), 0);
	ck_assert_int_eq(notify_register(&n, &a.l, &rec_ops), 0);
	ck_assert(notify_test_young(&n, GFN(3), GFN(5)));
	ck_assert(notify_age(&n, GFN(3), GFN(5)));
	ck_assert(!notify_age(&n, GFN(3), GFN(5)));
	ck_assert(!notify_test_young(&n, GFN(3), GFN(5)));
	ck_assert_uint_eq(a.ages, 2); /* b's answer spares nobody the question */
	ck_assert_uint_eq(b.ages, 2);
	ck_assert_uint_eq(b.starts, 0);
	ck_assert_int_eq(notify_unregister(&a.l), 0);
	ck_assert_int_eq(notify_unregister(&b.l), 0);
}
END_TEST

/* --- listeners: coming and going during a change --- */

struct come_or_go {
	struct recorder rec;
	_Atomic int done;
	unsigned ends_at_return;
	int rc;
};

static void *come(void *arg)
{
	struct come_or_go *g = arg;

	g->rc = notify_register(&n, &g->rec.l, &rec_ops);
	atomic_store(&g->done, 1);
	return NULL;
}

static void *go(void *arg)
{
	struct come_or_go *g = arg;

	g->rc = notify_unregister(&g->rec.l);
	g->ends_at_return = g->rec.ends;
	atomic_store(&g->done, 1);
	return NULL;
}

START_TEST(register_during_change)
{
	struct notify_change c = change(1, 2, 0), later = change(1, 2, 0);
	struct come_or_go g = { .rc = 1 };
	pthread_t t;

	ck_assert_int_eq(notify_start(&n, &c), 0);
	ck_assert_int_eq(pthread_create(&t, NULL, come, &g), 0);
	ck_assert(eventually(somebody_waits));
	ck_assert_int_eq(atomic_load(&g.done), 0);
	ck_assert_int_eq(notify_start(&n, &later), 0); /* it is told of changes that start now */
	ck_assert_uint_eq(g.rec.starts, 1);
	notify_end(&n, &c);
	pthread_join(t, NULL); /* does not wait for `later` */
	ck_assert_int_eq(g.rc, 0);
	ck_assert_uint_eq(g.rec.ends, 0);
	notify_end(&n, &later);
	ck_assert_uint_eq(g.rec.ends, 1);
	ck_assert_uint_eq(g.rec.ended[0], later.id);
	ck_assert_int_eq(notify_unregister(&g.rec.l), 0);
}
END_TEST

START_TEST(unregister_during_change)
{
	struct notify_change c = change(1, 2, 0), later = change(1, 2, 0);
	struct come_or_go g = { .rc = 1 };
	pthread_t t;

	ck_assert_int_eq(notify_register(&n, &g.rec.l, &rec_ops), 0);
	ck_assert_int_eq(notify_start(&n, &c), 0);
	ck_assert_int_eq(pthread_create(&t, NULL, go, &g), 0);
	ck_assert(eventually(somebody_waits));
	ck_assert_int_eq(atomic_load(&g.done), 0);
	ck_assert_int_eq(notify_start(&n, &later), 0);
	ck_assert_uint_eq(g.rec.starts, 1);
	notify_end(&n, &c);
	pthread_join(t, NULL);
	ck_assert_int_eq(g.rc, 0);
	ck_assert_uint_eq(g.ends_at_return, 1);
	ck_assert_uint_eq(g.rec.ended[0], c.id);
	notify_end(&n, &later);
	ck_assert_uint_eq(g.rec.ends, 1);
}
END_TEST

struct suicidal {
	struct kage_notifier l;
	unsigned *count;
};

static void die(struct kage_notifier *l)
{
	struct suicidal *s = container_of(l, struct suicidal, l);

	(*s->count)++;
	free(s);
}

static const struct kage_notifier_ops die_ops = { .release = die };

START_TEST(release)
{
	struct recorder rec = { 0 };
	struct kage_interval iv = { .invalidate = never, .start = 0, .end = PAGE_SIZE };
	struct suicidal *s = calloc(1, sizeof(*s));
	unsigned deaths = 0;

	s->count = &deaths;
	ck_assert_int_eq(notify_register(&n, &rec.l, &rec_ops), 0);
	ck_assert_int_eq(notify_register(&n, &s->l, &die_ops), 0);
	ck_assert_int_eq(notify_interval_insert(&n, &iv), 0);
	ck_assert(notify_busy(&n));
	notify_release(&n);
	ck_assert(!notify_busy(&n));
	ck_assert_uint_eq(rec.releases, 1);
	ck_assert_uint_eq(deaths, 1);
	ck_assert_int_eq(notify_unregister(&rec.l), -ENOENT);
	ck_assert_int_eq(notify_interval_remove(&iv), -ENOENT);
	ck_assert(kage_interval_read_retry(&iv, kage_interval_read_begin(&iv)));
	start_one(&(struct notify_change){ .start = GFN(0), .end = GFN(9) });
	ck_assert_uint_eq(rec.starts, 0);
	notify_release(&n);
	ck_assert_uint_eq(rec.releases, 1);
	ck_assert_int_eq(notify_register(&n, &rec.l, &rec_ops), 0); /* it may come again */
	ck_assert_int_eq(notify_unregister(&rec.l), 0);
}
END_TEST

/* --- readers --- */

START_TEST(sticky_hit)
{
	struct notify_reader r;

	ck_assert_int_eq(notify_reader_attach(&n, &r), 0);
	ck_assert(r.permanent);
	ck_assert(notify_busy(&n));
	notify_read_begin(&r, GFN(10), GFN(20));
	ck_assert(notify_read_valid(&r));
	start_one(&(struct notify_change){ .start = GFN(19), .end = GFN(25) });
	ck_assert(!notify_read_valid(&r));
	ck_assert(!notify_read_hold(&r));
	ck_assert_uint_eq(n.retried, 2);
	notify_read_begin(&r, GFN(10), GFN(20)); /* within the section: another section */
	ck_assert(notify_read_valid(&r));
	notify_read_end(&r);
	notify_read_begin(&r, GFN(10), GFN(20)); /* an old hit says nothing about it */
	ck_assert(notify_read_valid(&r));
	ck_assert(notify_read_hold(&r));
	ck_assert(notify_read_hold(&r));
	notify_read_end(&r);
	ck_assert_uint_eq(n.retried, 2);
	notify_reader_detach(&r);
	notify_reader_detach(&r);
	notify_reader_detach(NULL);
	ck_assert(!notify_busy(&n));
}
END_TEST

START_TEST(in_flight_hit)
{
	struct notify_change c = change(12, 13, 0);
	struct notify_reader r;

	ck_assert_int_eq(notify_reader_attach(&n, &r), 0);
	notify_read_begin(&r, GFN(10), GFN(20));
	ck_assert_int_eq(notify_start(&n, &c), 0);
	ck_assert(!notify_read_valid(&r));
	ck_assert(!notify_read_hold(&r));
	notify_end(&n, &c);
	ck_assert(!notify_read_valid(&r));
	notify_read_end(&r);
	notify_reader_detach(&r);
}
END_TEST

START_TEST(neighbours_do_not_hit)
{
	struct notify_change below = change(0, 10, 0), above = change(20, 30, 0);
	struct notify_reader r;

	ck_assert_int_eq(notify_reader_attach(&n, &r), 0);
	ck_assert_int_eq(notify_start(&n, &below), 0);
	notify_read_begin(&r, GFN(10), GFN(20));
	ck_assert_int_eq(notify_start(&n, &above), 0);
	ck_assert(notify_read_valid(&r));
	ck_assert(notify_read_hold(&r));
	start_one(&(struct notify_change){ .start = GFN(9), .end = GFN(10) });
	start_one(&(struct notify_change){ .start = GFN(20), .end = GFN(21) });
	ck_assert(notify_read_valid(&r));
	notify_read_end(&r);
	notify_end(&n, &below);
	notify_end(&n, &above);
	ck_assert_uint_eq(n.retried, 0);
	notify_reader_detach(&r);
}
END_TEST

START_TEST(self_change)
{
	struct notify_change c = change(10, 20, 0), nested = change(12, 14, 0);
	struct notify_reader r, other;
	struct notify another;

	ck_assert_int_eq(notify_reader_attach(&n, &r), 0);
	ck_assert_int_eq(notify_reader_attach(&n, &other), 0);
	notify_read_begin(&r, GFN(10), GFN(20));
	notify_read_begin(&other, GFN(10), GFN(11));
	c.self = nested.self = &r;
	ck_assert_int_eq(notify_start(&n, &c), 0);
	ck_assert_int_eq(notify_start(&n, &nested), 0);
	ck_assert(notify_read_valid(&r));
	ck_assert(!notify_read_valid(&other));
	notify_end(&n, &c);
	ck_assert(notify_read_valid(&r));
	notify_read_begin(&r, GFN(10), GFN(20)); /* `nested` is in flight: must not wait for it */
	notify_end(&n, &nested);
	ck_assert(notify_read_valid(&r));
	ck_assert(!notify_read_valid(&other));
	/* the slots are no longer its own */
	c.self = NULL;
	ck_assert_int_eq(notify_start(&n, &c), 0);
	ck_assert(!notify_read_valid(&r));
	notify_end(&n, &c);
	notify_read_end(&r);
	notify_read_end(&other);
	/* a change of another mm for the same reader */
	ck_assert_int_eq(notify_init(&another, &env, 8), 0);
	c.self = &r;
	ck_assert_int_eq(notify_start(&another, &c), 0);
	ck_assert_uint_eq(r.own, 0);
	notify_end(&another, &c);
	notify_finish(&another);
	notify_reader_detach(&r);
	notify_reader_detach(&other);
}
END_TEST

START_TEST(self_change_that_fails)
{
	struct notify_change c = change(10, 20, 0), c2 = change(10, 20, 0);
	struct recorder rec = { .rc = -EAGAIN };
	struct notify_reader r;

	ck_assert_int_eq(notify_register(&n, &rec.l, &rec_ops), 0);
	ck_assert_int_eq(notify_reader_attach(&n, &r), 0);
	notify_read_begin(&r, GFN(10), GFN(20));
	c.self = &r;
	ck_assert_int_eq(notify_start(&n, &c), -EAGAIN);
	ck_assert(notify_read_valid(&r));
	rec.rc = 0;
	ck_assert_int_eq(notify_start(&n, &c2), 0); /* not its own */
	ck_assert(!notify_read_valid(&r));
	notify_end(&n, &c2);
	notify_read_end(&r);
	notify_reader_detach(&r);
	ck_assert_int_eq(notify_unregister(&rec.l), 0);
}
END_TEST

struct section {
	struct notify_reader r;
	_Atomic int in;
	bool valid;
};

static void *begin_one(void *arg)
{
	struct section *s = arg;

	notify_read_begin(&s->r, GFN(10), GFN(20));
	atomic_store(&s->in, 1);
	s->valid = notify_read_valid(&s->r);
	notify_read_end(&s->r);
	return NULL;
}

static _Alignas(64) char ring_memory[sizeof(struct trace_ring) + 16 * sizeof(struct trace_record)];

START_TEST(begin_waits)
{
	struct notify_change c = change(15, 16, 0), second = change(11, 12, 0);
	struct trace_ring *ring = (struct trace_ring *)ring_memory;
	struct section s = { .valid = false };
	pthread_t t;

	memset(ring_memory, 0, sizeof(ring_memory));
	ring->size = 16;
	env.trace = ring;
	ck_assert_int_eq(notify_reader_attach(&n, &s.r), 0);
	ck_assert_int_eq(notify_start(&n, &c), 0);
	ck_assert_int_eq(pthread_create(&t, NULL, begin_one, &s), 0);
	ck_assert(eventually(somebody_waits));
	ck_assert_int_eq(notify_start(&n, &second), 0);
	notify_end(&n, &c);
	ck_assert_int_eq(atomic_load(&s.in), 0); /* now it waits for the second */
	notify_end(&n, &second);
	pthread_join(t, NULL);
	env.trace = NULL;
	ck_assert(s.valid); /* what went by while it waited does not hit it */
	ck_assert_uint_eq(n.retried, 0);
	ck_assert_uint_ge(ring->head, 1);
	ck_assert_uint_eq(ring->rec[0].event, TRACE_reader_wait);
	ck_assert_uint_eq(ring->rec[0].a, 7);
	ck_assert_uint_eq(ring->rec[0].b, 10);
	notify_reader_detach(&s.r);
}
END_TEST

START_TEST(hit_is_traced)
{
	struct trace_ring *ring = (struct trace_ring *)ring_memory;
	struct notify_reader r;

	memset(ring_memory, 0, sizeof(ring_memory));
	ring->size = 16;
	env.trace = ring;
	ck_assert_int_eq(notify_reader_attach(&n, &r), 0);
	notify_read_begin(&r, GFN(3), GFN(4));
	start_one(&(struct notify_change){ .start = GFN(3), .end = GFN(4) });
	ck_assert(!notify_read_valid(&r));
	notify_read_end(&r);
	notify_reader_detach(&r);
	env.trace = NULL;
	ck_assert_uint_eq(ring->head, 1);
	ck_assert_uint_eq(ring->rec[0].event, TRACE_reader_hit);
	ck_assert_uint_eq(ring->rec[0].a, 7);
	ck_assert_uint_eq(ring->rec[0].b, 3);
}
END_TEST

/* --- holds --- */

START_TEST(hold_against_nonblockable)
{
	struct notify_change c = change(10, 11, 0), elsewhere = change(11, 12, 0);
	struct recorder rec = { 0 };
	struct notify_reader r;

	ck_assert_int_eq(notify_register(&n, &rec.l, &rec_ops), 0);
	ck_assert_int_eq(notify_reader_attach(&n, &r), 0);
	notify_read_begin(&r, GFN(10), GFN(11));
	ck_assert(notify_read_hold(&r));
	ck_assert_int_eq(notify_start(&n, &c), -EAGAIN);
	ck_assert_uint_eq(n.changes_used, 0);
	ck_assert_uint_eq(rec.starts, 0);
	ck_assert_int_eq(notify_start(&n, &elsewhere), 0);
	notify_end(&n, &elsewhere);
	notify_read_end(&r);
	ck_assert_int_eq(notify_start(&n, &c), 0);
	notify_end(&n, &c);
	ck_assert_uint_eq(rec.starts, 2);
	ck_assert_uint_eq(rec.ends, 2);
	notify_reader_detach(&r);
	ck_assert_int_eq(notify_unregister(&rec.l), 0);
}
END_TEST

static struct notify_reader *watched;

static bool somebody_sleeps_on_hold(void)
{
	return atomic_load(&watched->at->hold) == 2;
}

static struct notify_change *watched_change;
static _Atomic int watched_started;

static void *start_and_tell(void *arg)
{
	intptr_t err = notify_start(&n, watched_change);

	atomic_store(&watched_started, 1);
	if (!err)
		notify_end(&n, watched_change);
	return (void *)err;
}

START_TEST(start_waits_for_hold)
{
	struct notify_change c = change(0, 100, BLOCKABLE);
	struct notify_reader r, late;
	pthread_t t;
	void *err;

	ck_assert_int_eq(notify_reader_attach(&n, &r), 0);
	ck_assert_int_eq(notify_reader_attach(&n, &late), 0);
	watched = &r;
	watched_change = &c;
	atomic_store(&watched_started, 0);
	notify_read_begin(&r, GFN(10), GFN(11));
	notify_read_begin(&late, GFN(12), GFN(13));
	ck_assert(notify_read_hold(&r));
	ck_assert_int_eq(pthread_create(&t, NULL, start_and_tell, NULL), 0);
	ck_assert(eventually(somebody_sleeps_on_hold));
	ck_assert(!notify_read_hold(&late)); /* the change was first */
	ck_assert_int_eq(atomic_load(&watched_started), 0);
	notify_read_end(&r);
	pthread_join(t, &err);
	ck_assert_ptr_null(err);
	notify_read_end(&late);
	notify_reader_detach(&r);
	notify_reader_detach(&late);
}
END_TEST

START_TEST(begin_drops_a_hold)
{
	struct notify_change c = change(10, 11, 0);
	struct notify_reader r;

	ck_assert_int_eq(notify_reader_attach(&n, &r), 0);
	notify_read_begin(&r, GFN(10), GFN(11));
	ck_assert(notify_read_hold(&r));
	notify_read_begin(&r, GFN(10), GFN(12));
	ck_assert_int_eq(notify_start(&n, &c), 0);
	notify_end(&n, &c);
	notify_read_end(&r);
	notify_reader_detach(&r);
}
END_TEST

/* --- many readers --- */

START_TEST(temporary_slots)
{
	static struct notify_reader r[NOTIFY_READERS + 1];
	struct section s = { .valid = false };
	unsigned i;
	pthread_t t;

	for (i = 0; i < NOTIFY_READERS; i++) {
		ck_assert_int_eq(notify_reader_attach(&n, &r[i]), 0);
		ck_assert_int_eq(r[i].permanent, i < NOTIFY_PERMANENT);
		notify_read_begin(&r[i], GFN(i), GFN(i + 1));
		for (unsigned j = 0; j < i; j++)
			ck_assert_int_ne(r[i].slot, r[j].slot);
	}
	ck_assert_int_eq(notify_reader_attach(&n, &s.r), 0);
	ck_assert_int_eq(pthread_create(&t, NULL, begin_one, &s), 0);
	ck_assert(eventually(somebody_waits));
	ck_assert_int_eq(atomic_load(&s.in), 0);
	start_one(&(struct notify_change){ .start = GFN(100), .end = GFN(120) });
	for (i = 0; i < NOTIFY_READERS; i++) {
		ck_assert_int_eq(notify_read_valid(&r[i]), i < 100 || i >= 120);
		notify_read_end(&r[i]);
	}
	pthread_join(t, NULL);
	ck_assert(s.valid);
	ck_assert_int_eq(s.r.slot, -1);
	notify_reader_detach(&s.r);
	for (i = 0; i < NOTIFY_READERS; i++)
		notify_reader_detach(&r[i]);
	ck_assert_int_eq(notify_reader_attach(&n, &r[0]), 0);
	ck_assert(r[0].permanent);
	notify_reader_detach(&r[0]);
}
END_TEST

START_TEST(attach_without_memory)
{
	struct notify_reader r = { 0 };

	ck_assert_uint_le(sizeof(n), 2048);
	ck_assert_int_eq(allocs_live, 0); /* a guest without readers has none of it */
	allocs_left = 0;
	ck_assert_int_eq(notify_reader_attach(&n, &r), -ENOMEM);
	ck_assert_ptr_null(r.notify);
	ck_assert(!notify_busy(&n));
	allocs_left = -1;
	ck_assert_int_eq(notify_reader_attach(&n, &r), 0);
	ck_assert_int_eq(allocs_live, 1);
	allocs_left = 0;
	notify_read_begin(&r, GFN(1), GFN(2));
	start_one(&(struct notify_change){ .start = GFN(1), .end = GFN(2) });
	ck_assert(!notify_read_valid(&r));
	notify_read_end(&r);
	notify_reader_detach(&r);
}
END_TEST

/* --- interval notifiers --- */

struct device {
	struct kage_interval i;
	unsigned told;
	int rc;
	struct kage_range last;
};

static int device_invalidate(struct kage_interval *i, const struct kage_range *r)
{
	struct device *d = container_of(i, struct device, i);

	d->told++;
	d->last = *r;
	return d->rc;
}

static struct device device(uint64_t start, uint64_t end)
{
	return (struct device){
		.i = { .invalidate = device_invalidate, .start = start * PAGE_SIZE, .end = end * PAGE_SIZE },
	};
}

START_TEST(interval_errors)
{
	struct device d = device(1, 2), bad;

	ck_assert_int_eq(notify_interval_insert(&n, NULL), -EINVAL);
	bad = device(2, 2);
	ck_assert_int_eq(notify_interval_insert(&n, &bad.i), -EINVAL);
	bad = device(1, 2);
	bad.i.start++;
	ck_assert_int_eq(notify_interval_insert(&n, &bad.i), -EINVAL);
	bad = device(1, ((uint64_t)1 << GFN_BITS) + 1);
	ck_assert_int_eq(notify_interval_insert(&n, &bad.i), -EINVAL);
	bad = device(1, 2);
	bad.i.invalidate = NULL;
	ck_assert_int_eq(notify_interval_insert(&n, &bad.i), -EINVAL);
	ck_assert_int_eq(notify_interval_remove(NULL), -EINVAL);
	ck_assert_int_eq(notify_interval_remove(&d.i), -ENOENT);
	allocs_left = 0;
	ck_assert_int_eq(notify_interval_insert(&n, &d.i), -ENOMEM);
	ck_assert_int_eq(notify_interval_remove(&d.i), -ENOENT);
	allocs_left = -1;
	ck_assert_int_eq(notify_interval_insert(&n, &d.i), 0);
	ck_assert_int_eq(notify_interval_insert(&n, &d.i), -EBUSY);
	ck_assert(notify_busy(&n));
	ck_assert_int_eq(notify_interval_remove(&d.i), 0);
	ck_assert_int_eq(notify_interval_remove(&d.i), -ENOENT);
	ck_assert(!notify_busy(&n));
}
END_TEST

START_TEST(interval_sequence)
{
	struct notify_change in = change(5, 6, BLOCKABLE), out = change(20, 21, BLOCKABLE);
	struct device d = device(4, 20);
	uint64_t seq;

	ck_assert_int_eq(notify_interval_insert(&n, &d.i), 0);
	seq = kage_interval_read_begin(&d.i);
	ck_assert(!kage_interval_read_retry(&d.i, seq));
	ck_assert_int_eq(notify_start(&n, &out), 0);
	ck_assert(!kage_interval_read_retry(&d.i, seq));
	ck_assert(kage_interval_read_begin(&d.i) == seq); /* does not wait for `out` */
	ck_assert_int_eq(notify_start(&n, &in), 0);
	ck_assert_uint_eq(d.told, 1);
	ck_assert_uint_eq(d.last.start, 5 * PAGE_SIZE);
	ck_assert_uint_eq(d.last.id, in.id);
	ck_assert(kage_interval_read_retry(&d.i, seq));
	notify_end(&n, &out);
	notify_end(&n, &in);
	ck_assert_uint_eq(d.told, 1);
	ck_assert(kage_interval_read_retry(&d.i, seq));
	seq = kage_interval_read_begin(&d.i);
	ck_assert(!kage_interval_read_retry(&d.i, seq));
	ck_assert_uint_eq(n.retried, 2);
	ck_assert_int_eq(notify_interval_remove(&d.i), 0);
}
END_TEST

static _Atomic int interval_done;

static void *interval_read(void *arg)
{
	struct device *d = arg;
	uint64_t seq = kage_interval_read_begin(&d->i);
	bool retry = kage_interval_read_retry(&d->i, seq);

	atomic_store(&interval_done, 1);
	return (void *)(uintptr_t)retry;
}

static void *interval_insert(void *arg)
{
	struct device *d = arg;
	intptr_t rc = notify_interval_insert(&n, &d->i);

	atomic_store(&interval_done, 1);
	return (void *)rc;
}

START_TEST(interval_waits)
{
	struct notify_change c = change(0, 100, BLOCKABLE);
	struct device d = device(4, 20), late = device(0, 2);
	pthread_t t;
	void *res;

	ck_assert_int_eq(notify_interval_insert(&n, &d.i), 0);
	ck_assert_int_eq(notify_start(&n, &c), 0);
	atomic_store(&interval_done, 0);
	ck_assert_int_eq(pthread_create(&t, NULL, interval_read, &d), 0);
	ck_assert(eventually(somebody_waits));
	ck_assert_int_eq(atomic_load(&interval_done), 0);
	notify_end(&n, &c);
	pthread_join(t, &res);
	ck_assert_ptr_null(res);

	/* inserted during a change of it: never told, and insert waits for it */
	ck_assert_int_eq(notify_start(&n, &c), 0);
	atomic_store(&interval_done, 0);
	ck_assert_int_eq(pthread_create(&t, NULL, interval_insert, &late), 0);
	ck_assert(eventually(somebody_waits));
	ck_assert_int_eq(atomic_load(&interval_done), 0);
	notify_end(&n, &c);
	pthread_join(t, &res);
	ck_assert_ptr_null(res);
	ck_assert_uint_eq(late.told, 0);
	ck_assert_uint_eq(d.told, 2);
	ck_assert_int_eq(notify_interval_remove(&d.i), 0);
	start_one(&c);
	ck_assert_uint_eq(late.told, 1);
	ck_assert_uint_eq(d.told, 2);
	ck_assert_int_eq(notify_interval_remove(&late.i), 0);
}
END_TEST

START_TEST(interval_would_block)
{
	struct notify_change c = change(5, 6, 0);
	struct device d = device(5, 6);
	struct recorder rec = { 0 };
	uint64_t seq;

	ck_assert_int_eq(notify_register(&n, &rec.l, &rec_ops), 0);
	ck_assert_int_eq(notify_interval_insert(&n, &d.i), 0);
	d.rc = -EAGAIN;
	ck_assert_int_eq(notify_start(&n, &c), -EAGAIN);
	ck_assert_uint_eq(n.changes_used, 0);
	ck_assert_uint_eq(rec.starts, 1);
	ck_assert_uint_eq(rec.ends, 1);
	ck_assert_uint_eq(rec.started[0], rec.ended[0]);
	seq = kage_interval_read_begin(&d.i);
	ck_assert(!kage_interval_read_retry(&d.i, seq));
	/* a listener that refuses keeps the intervals out of it */
	d.rc = 0;
	rec.rc = -EAGAIN;
	ck_assert_int_eq(notify_start(&n, &c), -EAGAIN);
	ck_assert_uint_eq(d.told, 1);
	ck_assert(!kage_interval_read_retry(&d.i, seq));
	ck_assert_int_eq(notify_interval_remove(&d.i), 0);
	ck_assert_int_eq(notify_unregister(&rec.l), 0);
}
END_TEST

/* The tree against the plain rule: told exactly once iff the ranges overlap. */
START_TEST(interval_oracle)
{
	enum { N = 200 };
	static struct device d[N];
	bool in[N] = { false };
	unsigned seed = 42, hits = 0;

	for (int step = 0; step < 3000; step++) {
		unsigned i = (unsigned)rand_r(&seed) % N;
		uint64_t start = (uint64_t)rand_r(&seed) % 1000, len = 1 + (uint64_t)rand_r(&seed) % 60;
		struct notify_change c = change(start, start + len, BLOCKABLE);

		if (in[i]) {
			ck_assert_int_eq(notify_interval_remove(&d[i].i), 0);
		} else {
			uint64_t s = (uint64_t)rand_r(&seed) % 1000, e = s + 1;

			d[i] = device(s, e + (uint64_t)rand_r(&seed) % (step % 10 ? 20 : 900));
			ck_assert_int_eq(notify_interval_insert(&n, &d[i].i), 0);
		}
		in[i] = !in[i];
		for (unsigned j = 0; j < N; j++)
			d[j].told = 0;
		ck_assert_int_eq(notify_start(&n, &c), 0);
		for (unsigned j = 0; j < N; j++) {
			bool overlap = d[j].i.start < (start + len) * PAGE_SIZE &&
				       start * PAGE_SIZE < d[j].i.end;

			ck_assert_uint_eq(d[j].told, in[j] && overlap);
			hits += d[j].told;
		}
		notify_end(&n, &c);
	}
	ck_assert_uint_gt(hits, 1000);
	notify_release(&n);
	for (unsigned j = 0; j < N; j++)
		ck_assert_int_eq(notify_interval_remove(&d[j].i), -ENOENT);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("notify");
	TCase *tc = tcase_create("notify");
	SRunner *sr;
	int failed;

	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_set_timeout(tc, 120);
	tcase_add_test(tc, nested_and_overlapping);
	tcase_add_test(tc, ids_do_not_repeat);
	tcase_add_test(tc, more_than_64);
	tcase_add_test(tc, listener_would_block);
	tcase_add_test(tc, listener_has_no_memory);
	tcase_add_test(tc, listener_times_out);
#ifndef KAGE_DEBUG
	tcase_add_test(tc, listener_breaks_the_rules);
#endif
	tcase_add_test(tc, register_errors);
	tcase_add_test(tc, leaving_needs_no_memory);
	tcase_add_test(tc, young);
	tcase_add_test(tc, register_during_change);
	tcase_add_test(tc, unregister_during_change);
	tcase_add_test(tc, release);
	tcase_add_test(tc, sticky_hit);
	tcase_add_test(tc, in_flight_hit);
	tcase_add_test(tc, neighbours_do_not_hit);
	tcase_add_test(tc, self_change);
	tcase_add_test(tc, self_change_that_fails);
	tcase_add_test(tc, begin_waits);
	tcase_add_test(tc, hit_is_traced);
	tcase_add_test(tc, hold_against_nonblockable);
	tcase_add_test(tc, start_waits_for_hold);
	tcase_add_test(tc, begin_drops_a_hold);
	tcase_add_test(tc, temporary_slots);
	tcase_add_test(tc, attach_without_memory);
	tcase_add_test(tc, interval_errors);
	tcase_add_test(tc, interval_sequence);
	tcase_add_test(tc, interval_waits);
	tcase_add_test(tc, interval_would_block);
	tcase_add_test(tc, interval_oracle);
	suite_add_tcase(s, tc);
	sr = srunner_create(s);
	srunner_set_fork_status(sr, CK_NOFORK);
	srunner_run_all(sr, CK_NORMAL);
	failed = srunner_ntests_failed(sr);
	srunner_free(sr);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
