/* SPDX-License-Identifier: MIT */
/*
 * A change of a page that a running vCPU has in its TLB: the shadow MMU's entry
 * and the tag go, membarrier(2) makes the vCPU pass a barrier, its window of use is
 * waited for. The vCPU's thread stores to that page all the time, and faults it in again after
 * each change. Wall time, the middle of many changes, both threads at real-time
 * priority where the process may: else, on a machine with fewer free CPUs than
 * threads, it is the scheduler that is measured.
 */
#include <errno.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "api/vm.h"
#include "notify.h"

#define CHANGES 1024
#define WINDOW	64 /* stores in one window of use */

struct shootdown {
	struct guest g;
	struct kage_vcpu *v;
	bool entered; /* windows of WINDOW stores; else one for each */
	unsigned changes;
	double *ns;
	double *whole;	   /* with the change's end, which wakes the vCPU if it sleeps */
	double late;	   /* 99th of 100 */
	uint64_t barriers; /* the engine's own count, of a sample */
	_Atomic uint64_t stores;
	_Atomic bool stop, failed;
};

/* The calling thread's. */
static bool real_time(bool on)
{
	const struct sched_param p = {.sched_priority = on};

	return pthread_setschedparam(pthread_self(), on ? SCHED_FIFO : SCHED_OTHER, &p) == 0;
}

static void *run_vcpu(void *arg)
{
	struct shootdown *s = arg;

	real_time(true); /* or as usual */
	for (uint64_t i = 1; !s->stop; i++) {
		if (s->entered && i % WINDOW == 1)
			kage_vcpu_enter(s->v);
		if (kage_vcpu_store(s->v, 0, &i, 8, NULL))
			s->failed = true;
		atomic_store_explicit(&s->stores, i, memory_order_relaxed);
		if (s->entered && i % WINDOW == 0)
			kage_vcpu_leave(s->v);
	}
	if (s->entered)
		kage_vcpu_leave(s->v);
	return NULL;
}

/* The vCPU has stored since: the page is in its TLB. */
static void wait_stores(struct shootdown *s)
{
	uint64_t seen = s->stores;

	while (s->stores < seen + 2)
		sched_yield();
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double middle(const struct shootdown *s, double *ns)
{
	qsort(ns, s->changes, sizeof(ns[0]), by_value);
	return ns[s->changes / 2];
}

static double sample_change(void *arg)
{
	struct shootdown *s = arg;
	struct notify *n = &s->g.vm->mm.notify;
	struct kage_stats before = guest_counters(&s->g, s->g.vm), after;

	for (unsigned i = 0; i < s->changes; i++) {
		struct notify_change c = {.start = GFN(0),
					  .end = GFN(1),
					  .reason = KAGE_REASON_CLEAR,
					  .flags = KAGE_RANGE_BLOCKABLE};

		wait_stores(s);
		s->ns[i] = wall_ns();
		must(notify_start(n, &c), "change");
		s->whole[i] = s->ns[i];
		s->ns[i] = wall_ns() - s->ns[i];
		notify_end(n, &c);
		s->whole[i] = wall_ns() - s->whole[i];
	}
	wait_stores(s);
	after = guest_counters(&s->g, s->g.vm);
	s->barriers = after.shootdowns - before.shootdowns;
	middle(s, s->ns);
	middle(s, s->whole);
	s->late = s->ns[s->changes * 99 / 100];
	/* the vCPU had the page, and had to fetch it again, each time */
	return !s->failed && after.tlb_misses - before.tlb_misses >= s->changes ? s->ns[s->changes / 2] : -1;
}

static double sample_membarrier(void *arg)
{
	struct shootdown *s = arg;

	for (unsigned i = 0; i < s->changes; i++) {
		int r;

		wait_stores(s);
		s->ns[i] = wall_ns();
		r = (int)syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0);
		s->ns[i] = wall_ns() - s->ns[i];
		must(r ? -errno : 0, "membarrier");
	}
	return middle(s, s->ns);
}

static void shootdown_row(const struct bench *b, const char *name, bool entered, const char *note)
{
	struct shootdown s = {.g = guest_create(GIB, KAGE_REGION_NOHUGE, 0),
			      .entered = entered,
			      .changes = CHANGES >> b->shift};
	struct row row = {.suite = "notify", .name = name, .unit = "ns", .peer = "membarrier(2) alone"};
	pthread_t thread;
	struct turns t;
	bool first;

	s.ns = must_map(calloc(2 * s.changes, sizeof(*s.ns)), "memory");
	s.whole = s.ns + s.changes;
	s.v = vcpu_flat(s.g.vm, 0);
	must(-pthread_create(&thread, NULL, run_vcpu, &s), "thread");
	first = real_time(true);
	t = take_turns(b, sample_change, &s, sample_membarrier, &s);
	real_time(false);
	s.stop = true;
	pthread_join(thread, NULL);
	row_note(&row,
		 "wall time of the start, middle of %u changes of the page that the vCPU stores to, %s; 99 "
		 "of 100 within "
		 "%.1f us; with the end, which wakes the vCPU, %.1f; %llu barriers in the last repetition; "
		 "%s priority",
		 s.changes, note, s.late / 1000, s.whole[s.changes / 2] / 1000,
		 (unsigned long long)s.barriers, first ? "real-time" : "ordinary");
	report_turns(&row, &t);
	kage_vcpu_destroy(s.v);
	guest_destroy(&s.g);
	free(s.ns);
}

void shootdown_rows(const struct bench *b)
{
	shootdown_row(b, "shootdown", false, "a window for each store");
	shootdown_row(b, "shootdown-window", true, "64 stores a window, parked between them");
}
