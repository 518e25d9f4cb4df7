/* SPDX-License-Identifier: MIT */
/*
 * Threads against threads: see stress.h for what is checked.
 *
 * Environment: KAGE_STRESS_SECONDS (60; at least that is the full form, which
 * fails if too little happened; on a busy machine it goes on until enough has, ten times as long at most), KAGE_SEED, KAGE_STRESS_HARDENED (1: in a hardened merge domain).
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "stress.h"

#define FULL_SECONDS  60
#define FULL_CHANGES  1000000
#define FULL_ACCESSES 10000000
#define FULL_EACH     1000

struct world world;

void stress_fail(const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "stress: FAILED: ");
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, "\nrepeat (threads race, so perhaps): KAGE_SEED=%llu\n",
		(unsigned long long)world.seed);
	abort();
}

void pause_us(unsigned us)
{
	struct timespec t = {.tv_nsec = us * 1000L};

	nanosleep(&t, NULL);
}

static void audit_line(void *opaque, const char *line)
{
	fprintf(stderr, "audit: %s\n", line);
}

void audit_engine(void)
{
	struct kage_audit a = {.size = sizeof(a), .report = audit_line};
	int r = kage_engine_audit(world.engine, &a);

	if (r != KAGE_OK || a.violations != 0)
		stress_fail("the audit: %d, %llu violations", r, (unsigned long long)a.violations);
	atomic_fetch_add(&world.audits, 1);
}

static void log_line(void *opaque, int level, const char *line)
{
	if (level == KAGE_LOG_ERROR)
		stress_fail("the engine says: %s", line);
}

static void start(void)
{
	EXPECT(kage_engine_create(KAGE_CFG(kage_engine_config, .seed = world.seed, .log = log_line),
				  &world.engine),
	       KAGE_OK);
	if (env_number("KAGE_STRESS_HARDENED", 0))
		EXPECT(kage_domain_configure(world.engine, 0,
					     KAGE_CFG(kage_domain_config, .flags = KAGE_DOMAIN_HARDENED, .reserve_frames = 512)),
		       KAGE_OK);
	for (unsigned i = 0; i < GUESTS; i++) {
		world.guest[i].id = i;
		build_guest(&world.guest[i]);
	}
	audit_engine();
}

/* What a run must have done: all of it in a full one, a tenth of its share in a short one. */
static uint64_t required(uint64_t full)
{
	uint64_t share = world.seconds >= FULL_SECONDS ? full : full * world.seconds / FULL_SECONDS / 10;

	return share ? share : 1;
}

static uint64_t changes_done(void)
{
	uint64_t changes = 0;

	for (unsigned k = 0; k < KIND_COUNT; k++)
		changes += atomic_load(&world.kind[k]);
	return changes;
}

/* The engine counts these. */
static void count_breaks(void)
{
	struct kage_stats s = {.size = sizeof(s)};

	EXPECT(kage_stats_get(world.engine, NULL, &s), KAGE_OK);
	atomic_store(&world.kind[KIND_cow_breaks], s.cow_breaks);
}

static bool enough(void)
{
	bool few = false;

	count_breaks();
	for (unsigned k = 0; k < KIND_COUNT; k++)
		few |= atomic_load(&world.kind[k]) < required(FULL_EACH);
	return !few && changes_done() >= required(FULL_CHANGES) && world.loads + world.stores >= required(FULL_ACCESSES);
}

static void run_threads(void)
{
	static const struct {
		void *(*fn)(void *arg);
		unsigned n;
	} kinds[] = {
	    {worker_thread, WORKERS}, {merge_thread, 2},  {clone_thread, 1},
	    {churn_thread, GUESTS},   {notify_thread, 1}, {dirty_thread, 1},
	};
	pthread_t thread[16];
	unsigned n = 0;

	for (unsigned k = 0; k < sizeof(kinds) / sizeof(kinds[0]); k++)
		for (uintptr_t i = 0; i < kinds[k].n; i++)
			if (pthread_create(&thread[n++], NULL, kinds[k].fn, (void *)i) != 0)
				stress_fail("no thread");
	for (uint64_t s = 0; s < world.seconds || (s < 10 * world.seconds && !enough()); s++) {
		sleep(1);
		if (s % 10 == 9 && isatty(1)) {
			printf("stress: %llu of %llu s\n", (unsigned long long)s + 1,
			       (unsigned long long)world.seconds);
			fflush(stdout);
		}
	}
	atomic_store(&world.stop, true);
	while (n > 0)
		pthread_join(thread[--n], NULL);
}

/* Nothing runs any more: every page has exactly its last stamp. */
static void check_final(const struct guest *g)
{
	for (unsigned p = 0; p < STAMPS_PAGES; p++) {
		uint64_t want = stamp_word(p, g->lower[p]), a, b;

		EXPECT(kage_vm_read(g->vm, stamp_gpa(p) + word_a(p), &a, 8), KAGE_OK);
		EXPECT(kage_vm_read(g->vm, stamp_gpa(p) + word_b(p), &b, 8), KAGE_OK);
		if (a != want || b != want)
			stress_fail("guest %u page %u at the end: 0x%llx and 0x%llx, should be 0x%llx", g->id,
				    p, (unsigned long long)a, (unsigned long long)b,
				    (unsigned long long)want);
	}
}

static void finish(void)
{
	struct kage_stats s = {.size = sizeof(s)};

	audit_engine();
	EXPECT(kage_stats_get(world.engine, NULL, &s), KAGE_OK);
	atomic_store(&world.kind[KIND_cow_breaks], s.cow_breaks);
	if (s.retries_spurious != 0)
		stress_fail("%llu spurious retries", (unsigned long long)s.retries_spurious);
	printf("stress: engine: %llu changes, %llu raced, %llu faults, %llu tables un-shared, %llu blocks "
	       "split, "
	       "%llu shootdowns, %llu window waits\n",
	       (unsigned long long)s.changes, (unsigned long long)s.changes_raced,
	       (unsigned long long)s.faults, (unsigned long long)s.tables_unshared,
	       (unsigned long long)s.blocks_split, (unsigned long long)s.shootdowns,
	       (unsigned long long)s.window_waits);
	for (unsigned i = 0; i < GUESTS; i++) {
		check_final(&world.guest[i]);
		EXPECT(kage_vm_destroy(world.guest[i].vm), KAGE_OK);
	}
	audit_engine();
	EXPECT(kage_engine_step(world.engine, NULL, NULL), KAGE_OK);
	EXPECT(kage_stats_get(world.engine, NULL, &s), KAGE_OK);
	if (s.frames_used != 0 || s.frames_table != 0)
		stress_fail("left behind: %llu frames, %llu tables", (unsigned long long)s.frames_used,
			    (unsigned long long)s.frames_table);
	EXPECT(kage_engine_destroy(world.engine), KAGE_OK);
}

static int judge(void)
{
	static const char *const name[] = {
#define X(n) #n,
	    KINDS(X)
#undef X
	};
	uint64_t accesses = world.loads + world.stores, changes = changes_done();
	int bad = 0;

	for (unsigned k = 0; k < KIND_COUNT; k++) {
		bool few = world.kind[k] < required(FULL_EACH);

		printf("stress: %-12s %12llu%s\n", name[k], (unsigned long long)world.kind[k],
		       few ? "  TOO FEW" : "");
		bad |= few;
	}
	printf("stress: %llu loads, %llu stores, %llu snapshots checked, %llu passes, %llu audits\n",
	       (unsigned long long)world.loads, (unsigned long long)world.stores,
	       (unsigned long long)world.snapshots, (unsigned long long)world.passes,
	       (unsigned long long)world.audits);
	printf("stress: %llu changes (at least %llu), %llu accesses (at least %llu)\n",
	       (unsigned long long)changes, (unsigned long long)required(FULL_CHANGES),
	       (unsigned long long)accesses, (unsigned long long)required(FULL_ACCESSES));
	if (changes < required(FULL_CHANGES) || accesses < required(FULL_ACCESSES))
		bad = 1;
	return bad;
}

int main(void)
{
	int bad;

	world.seconds = env_number("KAGE_STRESS_SECONDS", FULL_SECONDS);
	world.seed = env_number("KAGE_SEED", 11);
	printf("stress: %llu s, seed %llu\n", (unsigned long long)world.seconds,
	       (unsigned long long)world.seed);
	fflush(stdout);
	start();
	run_threads();
	finish();
	bad = judge();
	if (bad)
		printf("stress: FAILED: too little happened\n");
	return bad;
}
