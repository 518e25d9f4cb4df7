/* SPDX-License-Identifier: MIT */
/* The common arena: buddy, bitmaps of blocks, caches. Audited after every few steps. */
#include <check.h>
#include <pthread.h>
#include <stdlib.h>
#include <stdio.h>

#include "frame/private.h"

static struct env env;
static struct pool *pool;
static int violations;

static void show(void *opaque, const char *line)
{
	violations++;
	fprintf(stderr, "audit: %s\n", line);
}

static void audit(void)
{
	uint64_t checks = 0;

	violations = 0;
	pool_audit(pool, show, NULL, &checks);
	ck_assert_uint_gt(checks, 0);
	ck_assert_int_eq(violations, 0);
}

static void start(enum kage_backing backing, uint64_t limit)
{
	struct pool_config config = {.backing = backing, .memory_limit = limit, .address_space = 64ull << 30};

	env_init(&env, NULL);
	ck_assert_int_eq(pool_create(&config, &env, &pool), 0);
}

static void stop(void)
{
	audit();
	ck_assert_uint_eq(pool_destroy(pool), 0);
	env_finish(&env);
}

static uint64_t rnd_state = 88172645463325252ull;

static uint64_t rnd(uint64_t below)
{
	rnd_state ^= rnd_state << 13;
	rnd_state ^= rnd_state >> 7;
	rnd_state ^= rnd_state << 17;
	return rnd_state % below;
}

struct piece {
	pfn_t pfn;
	unsigned order;
	uint64_t stamp;
};

static uint64_t *word_of(const struct piece *p, uint64_t page, unsigned word)
{
	return (uint64_t *)pfn_hva(pool, pfn_add(p->pfn, page)) + word;
}

/* First and last word of first, middle and last page: two pieces that overlap would show. */
static void stamp(struct piece *p)
{
	uint64_t n = (uint64_t)1 << p->order;

	p->stamp = rnd(UINT64_MAX);
	for (uint64_t page = 0; page < n; page += MAX(n / 2, (uint64_t)1))
		*word_of(p, page, 0) = p->stamp + page;
	*word_of(p, n - 1, 511) = p->stamp;
}

static void check_stamp(const struct piece *p)
{
	uint64_t n = (uint64_t)1 << p->order;

	for (uint64_t page = 0; page < n; page += MAX(n / 2, (uint64_t)1))
		ck_assert_uint_eq(*word_of(p, page, 0), p->stamp + page);
	ck_assert_uint_eq(*word_of(p, n - 1, 511), p->stamp);
}

static void check_zero(const struct piece *p)
{
	static const char zeroes[4096];

	for (uint64_t i = 0; i < (uint64_t)1 << p->order; i++)
		if (memcmp(pfn_hva(pool, pfn_add(p->pfn, i)), zeroes, sizeof(zeroes)) != 0)
			ck_abort_msg("page %d of order %u is not zero", (int)i, p->order);
}

static void check_frames(const struct piece *p, enum frame_kind kind)
{
	struct frame *f = pfn_frame(pool, p->pfn);

	ck_assert_uint_eq(p->pfn.v % ((uint64_t)1 << p->order), 0);
	ck_assert_int_eq(frame_kind(f), kind);
	ck_assert_uint_eq(frame_order(f), p->order);
	ck_assert_uint_eq(f->refs, 1);
	ck_assert_uint_eq(f->where, 0);
	if (p->order) {
		uint64_t i = 1 + rnd(((uint64_t)1 << p->order) - 1);

		ck_assert_int_eq(frame_kind(f + i), FRAME_TAIL);
		ck_assert_uint_eq(f[i].refs, 0);
	}
}

static void take(struct piece *p, unsigned order, enum frame_kind kind, unsigned flags)
{
	p->order = order;
	ck_assert_int_eq(arena_alloc(pool, 0, order, kind, flags, &p->pfn), 0);
	check_frames(p, kind);
	if (flags & ARENA_ZERO)
		check_zero(p);
	stamp(p);
}

static void give(struct piece *p)
{
	check_stamp(p);
	if (rnd(2)) {
		arena_free(pool, p->pfn);
	} else {
		pfn_frame(pool, p->pfn)->refs = 0;
		pool_release(pool, p->pfn, p->order);
	}
	*p = (struct piece){0};
}

/* Small orders mostly; each order of the buddy and of the bitmaps now and then. */
static unsigned random_order(void)
{
	static const unsigned char order[] = {0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10, 11};

	return order[rnd(sizeof(order))];
}

#define PIECES 600

static void random_steps(int steps)
{
	struct piece *piece = calloc(PIECES, sizeof(*piece));
	struct pool_stats s;
	uint64_t used = 0;

	for (int i = 0; i < steps; i++) {
		struct piece *p = &piece[rnd(PIECES)];

		if (p->order || p->pfn.v) {
			used -= (uint64_t)1 << p->order;
			give(p);
		} else {
			take(p, random_order(), rnd(3) ? FRAME_PRIVATE : FRAME_TABLE,
			     rnd(2) ? ARENA_ZERO : 0);
			used += (uint64_t)1 << p->order;
		}
		if (i % 97 == 0)
			pool_reap(pool);
		if (i % 50 == 0)
			audit();
	}
	pool_stats(pool, &s);
	ck_assert_uint_eq(s.arena_used, used + s.pending);
	ck_assert_uint_eq(s.charged, used + s.pending);
	for (int i = 0; i < PIECES; i++)
		if (piece[i].pfn.v)
			give(&piece[i]);
	pool_reap(pool);
	audit();
	pool_stats(pool, &s);
	ck_assert_uint_eq(s.arena_used, 0);
	ck_assert_uint_eq(s.charged, 0);
	ck_assert_uint_eq(s.pending, 0);
	free(piece);
}

START_TEST(random_anonymous)
{
	start(KAGE_BACKING_ANON, 0);
	random_steps(6000);
	stop();
}
END_TEST

START_TEST(random_memfd)
{
	start(KAGE_BACKING_MEMFD, 0);
	random_steps(3000);
	stop();
}
END_TEST

/* All frames of a block, freed in random order, become the block again. */
START_TEST(joins_up_to_a_block)
{
	pfn_t pfn[2048];
	struct pool_stats s;
	struct arena *a;
	uint64_t blocks = 0;

	start(KAGE_BACKING_ANON, 0);
	for (int i = 0; i < 2048; i++)
		ck_assert_int_eq(arena_alloc(pool, 0, 0, FRAME_PRIVATE, 0, &pfn[i]), 0);
	audit();
	for (int i = 2047; i >= 0; i--) {
		uint64_t j = rnd((uint64_t)i + 1);

		arena_free(pool, pfn[j]);
		pfn[j] = pfn[i];
	}
	a = &domain_find(pool, 0)->arena;
	magazine_drain_all(a);
	audit();
	for (uint32_t at = a->head[BLOCK_ORDER]; at; at = pfn_frame(pool, PFN(at))->free.next)
		blocks++;
	for (unsigned i = 0; i < BLOCK_ORDER; i++)
		ck_assert_uint_eq(a->head[i], 0);
	pool_stats(pool, &s);
	ck_assert_uint_eq(s.arena_free, blocks * BLOCK_PAGES);
	ck_assert_uint_ge(blocks, 4);
	stop();
}
END_TEST

/* Orders within a section, over sections, and 1 GiB; with memory and without mixed. */
START_TEST(large_orders)
{
	struct piece small, large[4];
	struct pool_stats s;

	start(KAGE_BACKING_ANON, 0);
	take(&small, 0, FRAME_TABLE, ARENA_ZERO);
	take(&large[0], 10, FRAME_PRIVATE, 0);
	take(&large[1], 13, FRAME_PRIVATE, 0);
	take(&large[2], 15, FRAME_PRIVATE, 0);
	take(&large[3], 16, FRAME_PRIVATE, 0);
	audit();
	pool_stats(pool, &s);
	ck_assert_uint_eq(s.arena_used, 1 + 1024 + 8192 + 32768 + 65536);
	ck_assert_uint_eq(s.arena_tables, 1);
	for (int i = 0; i < 4; i++) {
		give(&large[i]);
		pool_reap(pool);
		audit();
	}
	/* What went back is more than is kept: it is the host's again. */
	take(&large[0], 9, FRAME_PRIVATE, 0);
	give(&large[0]);
	pool_reap(pool);
	give(&small);
	stop();
}
END_TEST

#ifndef KAGE_TSAN
START_TEST(giant_order)
{
	struct piece giant;
	struct pool_stats s;
	pfn_t pfn;

	start(KAGE_BACKING_ANON, 3ull << 29); /* 1.5 GiB: one, not two */
	take(&giant, 18, FRAME_PRIVATE, 0);
	audit();
	ck_assert_int_eq(arena_alloc(pool, 0, 18, FRAME_PRIVATE, 0, &pfn), -ENOMEM);
	pool_release(pool, giant.pfn, 18);
	pool_stats(pool, &s);
	ck_assert_uint_eq(s.pending, 1u << 18);
	ck_assert(pool_reap_due(pool));
	ck_assert_uint_eq(pool_reap(pool), 1u << 18);
	audit();
	pool_stats(pool, &s);
	ck_assert_uint_le(s.arena_free, (64u << 20) / 4096);
	ck_assert_uint_eq(s.charged, 0);
	stop();
}
END_TEST
#endif

/* Freed memory is handed out again; beyond what is kept it goes to the host, and comes back zero. */
START_TEST(shrinks_and_grows)
{
	struct piece p[60];
	struct pool_stats s;

	start(KAGE_BACKING_ANON, 0);
	for (int round = 0; round < 2; round++) {
		for (int i = 0; i < 60; i++)
			take(&p[i], 9, FRAME_PRIVATE, ARENA_ZERO);
		pool_stats(pool, &s);
		ck_assert_uint_eq(s.arena_used, 60 * BLOCK_PAGES);
		for (int i = 0; i < 60; i++) {
			check_stamp(&p[i]);
			pool_release(pool, p[i].pfn, 9);
		}
		ck_assert_uint_eq(pool_reap(pool), 60 * BLOCK_PAGES);
		audit();
		pool_stats(pool, &s);
		ck_assert_uint_le(s.arena_free, (64u << 20) / 4096);
		ck_assert_uint_ge(s.arena_free, (64u << 20) / 4096 - BLOCK_PAGES);
	}
	stop();
}
END_TEST

START_TEST(refill_populates_the_reserve)
{
	struct pool_config config = {.address_space = 8ull << 30, .reserve = 10u << 20};
	struct pool_stats s;

	env_init(&env, NULL);
	ck_assert_int_eq(pool_create(&config, &env, &pool), 0);
	ck_assert_int_eq(pool_refill(pool), 0);
	pool_stats(pool, &s);
	ck_assert_uint_eq(s.arena_free, (10u << 20) / 4096);
	ck_assert_uint_eq(s.charged, 0);
	ck_assert_int_eq(pool_refill(pool), 0);
	stop();
}
END_TEST

/* 8 sections of pfn space, one of them the zero frame's: it ends, and nothing is lost by that. */
START_TEST(space_ends)
{
	struct pool_config config = {.address_space = 1ull << 30};
	struct extent *e;
	struct piece p[500];
	int n = 0, err;

	env_init(&env, NULL);
	ck_assert_int_eq(pool_create(&config, &env, &pool), 0);
	ck_assert_int_eq(extent_create(pool, 0, GFN(0), 6 * SECTION_PAGES, false, &e), 0);
	while ((err = arena_alloc(pool, 0, 9, FRAME_PRIVATE, 0, &p[n].pfn)) == 0) {
		p[n].order = 9;
		stamp(&p[n++]);
		ck_assert_int_lt(n, 500);
	}
	ck_assert_int_eq(err, -ENOMEM);
	ck_assert_int_eq(n, 64);
	audit();
	while (n)
		give(&p[--n]);
	pool_reap(pool);
	audit();
	/* Single frames that sit in caches do not make an allocation fail. */
	take(&p[0], 0, FRAME_PRIVATE, 0);
	give(&p[0]);
	pool_reap(pool);
	magazine_drain_all(&domain_find(pool, 0)->arena);
	take(&p[0], 15, FRAME_PRIVATE, 0);
	give(&p[0]);
	pool_reap(pool);
	extent_put(e, 1);
	stop();
}
END_TEST

START_TEST(limit_keeps_a_reserve)
{
	struct piece p[1024];
	pfn_t pfn = PFN(77);
	int n = 0;

	start(KAGE_BACKING_ANON, 1000 * 4096);
	while (arena_alloc(pool, 0, 0, FRAME_PRIVATE, 0, &p[n].pfn) == 0)
		n++;
	ck_assert_int_eq(n, 1000 - 64);
	ck_assert_int_eq(arena_alloc(pool, 0, 0, FRAME_PRIVATE, 0, &pfn), -ENOMEM);
	ck_assert_uint_eq(pfn.v, 77);
	ck_assert_int_eq(pool_charge(pool, 1, 0), -ENOMEM);
	ck_assert_int_eq(pool_charge(pool, UINT64_MAX - 5, ARENA_RESERVE), -ENOMEM);
	while (arena_alloc(pool, 0, 0, FRAME_PRIVATE, ARENA_RESERVE, &p[n].pfn) == 0)
		n++;
	ck_assert_int_eq(n, 1000);
	audit();
	while (n)
		arena_free(pool, p[--n].pfn);
	ck_assert_int_eq(pool_charge(pool, 936, 0), 0);
	ck_assert_int_eq(arena_alloc(pool, 0, 0, FRAME_PRIVATE, 0, &pfn), -ENOMEM);
	pool_uncharge(pool, 936);
	stop();
}
END_TEST

START_TEST(poison_is_set_aside)
{
	struct piece p[3];
	struct pool_stats before, after;

	start(KAGE_BACKING_ANON, 0);
	pool_stats(pool, &before);
	take(&p[0], 0, FRAME_PRIVATE, 0);
	take(&p[1], 5, FRAME_PRIVATE, 0);
	take(&p[2], 0, FRAME_PRIVATE, 0);
	pfn_frame(pool, p[0].pfn)->bits |= FRAME_POISON;
	pfn_frame(pool, pfn_add(p[1].pfn, 9))->bits |= FRAME_POISON;
	pfn_frame(pool, p[2].pfn)->bits |= FRAME_POISON;
	arena_free(pool, p[0].pfn);
	arena_free(pool, p[1].pfn);
	pool_release(pool, p[2].pfn, 0);
	ck_assert_uint_eq(pool_reap(pool), 1);
	audit();
	pool_stats(pool, &after);
	ck_assert_uint_eq(after.arena_used, 0);
	ck_assert_uint_eq(after.arena_free % BLOCK_PAGES, BLOCK_PAGES - 3);
	for (int i = 0; i < 2000; i++) {
		pfn_t pfn;

		ck_assert_int_eq(arena_alloc(pool, 0, 0, FRAME_PRIVATE, 0, &pfn), 0);
		ck_assert_uint_ne(pfn.v, p[0].pfn.v);
		ck_assert_uint_ne(pfn.v, p[1].pfn.v + 9);
		ck_assert_uint_ne(pfn.v, p[2].pfn.v);
		pool_release(pool, pfn, 0);
	}
	pool_reap(pool);
	stop();
}
END_TEST

/* A block that was split into pages comes back page by page. */
START_TEST(split_run_returns_in_pieces)
{
	struct pool_stats s;
	struct frame *f;
	pfn_t pfn;

	start(KAGE_BACKING_ANON, 0);
	ck_assert_int_eq(arena_alloc(pool, 0, 9, FRAME_PRIVATE, 0, &pfn), 0);
	f = pfn_frame(pool, pfn);
	for (uint64_t i = 0; i < BLOCK_PAGES; i++) {
		frame_set_kind(f + i, FRAME_PRIVATE, 0);
		f[i].refs = 1;
	}
	audit();
	for (uint64_t i = 0; i < BLOCK_PAGES; i += 2) {
		f[i].refs = 0;
		pool_release(pool, pfn_add(pfn, i), 0);
	}
	ck_assert_uint_eq(pool_reap(pool), BLOCK_PAGES / 2);
	audit();
	for (uint64_t i = 1; i < BLOCK_PAGES; i += 2)
		arena_free(pool, pfn_add(pfn, i));
	magazine_drain_all(&domain_find(pool, 0)->arena);
	audit();
	pool_stats(pool, &s);
	ck_assert_uint_eq(s.arena_free, BLOCK_PAGES);
	ck_assert_uint_eq(domain_find(pool, 0)->arena.head[BLOCK_ORDER], pfn.v);
	stop();
}
END_TEST

/* A run is known to be zero only if both halves that it was joined from are. */
START_TEST(dirty_half_makes_a_dirty_run)
{
	struct piece p = { .order = 0 };
	pfn_t pfn[2];

	start(KAGE_BACKING_ANON, 0);
	/* The second fills the cache. The buddy gets the dirty frames first, then their clean neighbours. */
	for (int i = 0; i < 2; i++) {
		ck_assert_int_eq(arena_alloc(pool, 0, 0, FRAME_PRIVATE, 0, &pfn[i]), 0);
		memset(pfn_hva(pool, pfn[i]), 0x77, 4096);
	}
	for (int i = 0; i < 2; i++) {
		pfn_frame(pool, pfn[i])->refs = 0;
		pool_release(pool, pfn[i], 0);
	}
	ck_assert_uint_eq(pool_reap(pool), 2);
	ck_assert_uint_lt(domain_find(pool, 0)->arena.free, BLOCK_PAGES);
	magazine_drain_all(&domain_find(pool, 0)->arena);
	ck_assert_uint_eq(domain_find(pool, 0)->arena.free, BLOCK_PAGES);
	take(&p, 9, FRAME_PRIVATE, ARENA_ZERO);
	give(&p);
	pool_reap(pool);
	stop();
}
END_TEST

/* -- threads ---------------------------------------------------------------- */

#define WORKERS 4
#ifdef KAGE_TSAN
#define WORK_STEPS 4000
#else
#define WORK_STEPS 40000
#endif

static _Atomic int thread_errors;

static void *work(void *arg)
{
	uint64_t seed = (uint64_t)(uintptr_t)arg * 0x9e3779b97f4a7c15ull + 1;
	struct {
		pfn_t pfn;
		unsigned order;
	} mine[64] = {0};

	for (int i = 0; i < WORK_STEPS; i++) {
		unsigned slot = (unsigned)(seed >> 33) % 64;

		seed = seed * 6364136223846793005ull + 1442695040888963407ull;
		if (mine[slot].pfn.v) {
			uint64_t *word = pfn_hva(pool, mine[slot].pfn);

			if (*word != (mine[slot].pfn.v ^ (uintptr_t)arg))
				atomic_fetch_add(&thread_errors, 1);
			if (seed >> 60 & 1) {
				arena_free(pool, mine[slot].pfn);
			} else {
				pfn_frame(pool, mine[slot].pfn)->refs = 0;
				pool_release(pool, mine[slot].pfn, mine[slot].order);
			}
			mine[slot].pfn = PFN_NONE;
		} else {
			mine[slot].order = (seed >> 61) == 0 ? (unsigned)(seed >> 40) % 11 : 0;
			if (arena_alloc(pool, 0, mine[slot].order, FRAME_PRIVATE, 0, &mine[slot].pfn) != 0)
				atomic_fetch_add(&thread_errors, 1);
			*(uint64_t *)pfn_hva(pool, mine[slot].pfn) = mine[slot].pfn.v ^ (uintptr_t)arg;
		}
		if (pool_reap_due(pool) || i % 500 == 499)
			pool_reap(pool);
		if (i % 1000 == 0) {
			struct pool_stats s;

			pool_stats(pool, &s);
		}
	}
	for (unsigned slot = 0; slot < 64; slot++)
		if (mine[slot].pfn.v) {
			pfn_frame(pool, mine[slot].pfn)->refs = 0;
			pool_release(pool, mine[slot].pfn, mine[slot].order);
		}
	return NULL;
}

static void run_workers(enum kage_backing backing)
{
	pthread_t t[WORKERS];
	struct pool_stats s;

	start(backing, 0);
	thread_errors = 0;
	for (uintptr_t i = 0; i < WORKERS; i++)
		pthread_create(&t[i], NULL, work, (void *)(i + 1));
	for (int i = 0; i < WORKERS; i++)
		pthread_join(t[i], NULL);
	ck_assert_int_eq(thread_errors, 0);
	audit();
	pool_reap(pool);
	pool_stats(pool, &s);
	ck_assert_uint_eq(s.arena_used, 0);
	ck_assert_uint_eq(s.charged, 0);
	stop();
}

START_TEST(threads_anonymous)
{
	run_workers(KAGE_BACKING_ANON);
}
END_TEST

START_TEST(threads_memfd)
{
	run_workers(KAGE_BACKING_MEMFD);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("buddy");
	TCase *tc = tcase_create("buddy");
	SRunner *sr;
	int failed;

	tcase_set_timeout(tc, 240);
	tcase_add_test(tc, random_anonymous);
	tcase_add_test(tc, random_memfd);
	tcase_add_test(tc, joins_up_to_a_block);
	tcase_add_test(tc, large_orders);
#ifndef KAGE_TSAN
	tcase_add_test(tc, giant_order);
#endif
	tcase_add_test(tc, shrinks_and_grows);
	tcase_add_test(tc, refill_populates_the_reserve);
	tcase_add_test(tc, space_ends);
	tcase_add_test(tc, limit_keeps_a_reserve);
	tcase_add_test(tc, poison_is_set_aside);
	tcase_add_test(tc, split_run_returns_in_pieces);
	tcase_add_test(tc, dirty_half_makes_a_dirty_run);
	tcase_add_test(tc, threads_anonymous);
	tcase_add_test(tc, threads_memfd);
	suite_add_tcase(s, tc);
	sr = srunner_create(s);
	srunner_set_fork_status(sr, CK_NOFORK);
	srunner_run_all(sr, CK_NORMAL);
	failed = srunner_ntests_failed(sr);
	srunner_free(sr);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
