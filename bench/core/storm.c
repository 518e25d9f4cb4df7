/* SPDX-License-Identifier: MIT */
/*
 * One thread faults in range A while another changes range B of the same guest
 * all the time: discards and writes it, and takes and gives write permission.
 * No fault of A may retry because of a change of B.
 */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "core.h"

#define RANGE_A (4 * GIB)
#define RANGE_B (64 * MIB)

struct storm {
	struct guest g;
	uint64_t faults; /* to make */
	uint64_t changes;
	_Atomic bool stop, started;
	bool ok;
};

static void *stormer(void *arg)
{
	struct storm *s = arg;

	s->ok = true;
	while (!s->stop) {
		uint64_t at = RANGE_A + mix(s->changes) % (RANGE_B / PAGE) * PAGE, v = s->changes + 1,
			 seen = 0;

		must(kage_vm_advise(s->g.vm, at, PAGE, KAGE_ADVICE_DISCARD), "discard");
		must(kage_vm_read(s->g.vm, at, &seen, 8), "read");
		s->ok &= seen == 0;
		must(kage_vm_write(s->g.vm, at, &v, 8), "write");
		must(kage_vm_protect(s->g.vm, at, PAGE, KAGE_READ), "protect");
		s->ok &= kage_vm_write(s->g.vm, at, &v, 8) == KAGE_MMIO;
		must(kage_vm_protect(s->g.vm, at, PAGE, KAGE_RWX), "protect");
		s->changes += 3;
		s->started = true;
		if (s->changes % 768 == 0)
			must(kage_engine_step(s->g.engine, NULL, NULL), "step");
	}
	return NULL;
}

/* Half by a vCPU's first touch of a page, half by a backend that reads, then writes what the vCPU touched. */
static double fault_range(struct storm *s)
{
	struct kage_vcpu *v = vcpu_flat(s->g.vm, 0);
	struct kage_reader r;
	struct kage_page page;
	double begin = wall_ns(), ns;

	must(kage_reader_init(s->g.vm, &r), "reader");
	for (uint64_t i = 0; i < s->faults / 2; i++) {
		uint64_t at = mix(i) % (RANGE_A / PAGE) * PAGE, seen = 1;
		int result;

		must(kage_vcpu_load(v, at, &seen, 8, NULL), "load");
		s->ok &= seen == 0;
		do {
			kage_reader_begin(&r, at, PAGE);
			result = kage_backend_fault(s->g.vm, &r, at, KAGE_READ, &page);
			if (result == KAGE_OK && !kage_reader_valid(&r))
				result = KAGE_RETRY;
			kage_reader_end(&r);
		} while (result == KAGE_RETRY);
		must(result, "fault");
		s->ok &= page.gpa == at;
	}
	ns = wall_ns() - begin;
	kage_reader_finish(&r);
	kage_vcpu_destroy(v);
	return ns;
}

static double storm_run(struct storm *s, bool storming, struct kage_stats *stats)
{
	pthread_t thread;
	double ns;

	s->g = guest_create(RANGE_A + RANGE_B, KAGE_REGION_NOHUGE, 0);
	s->stop = s->started = false;
	s->changes = 0;
	s->ok = true;
	if (storming) {
		must(-pthread_create(&thread, NULL, stormer, s), "thread");
		while (!s->started)
			;
	}
	ns = fault_range(s);
	s->stop = true;
	if (storming)
		pthread_join(thread, NULL);
	*stats = guest_stats(&s->g, s->g.vm);
	guest_destroy(&s->g);
	return ns / (double)s->faults;
}

void bench_storm(const struct bench *b)
{
	struct storm s = {.faults = (uint64_t)1 << (20 - b->shift)};
	struct series count = {0}, busy = {0}, quiet = {0};
	uint64_t claimed = 0, changes = 0, faults = 0;
	struct kage_stats stats;
	struct row row = {.suite = "notify", .name = "spurious-storm", .unit = "count", .goal = GOAL_MOST};
	bool ok = true;

	for (unsigned i = 0; i < b->reps; i++) {
		series_add(&quiet, storm_run(&s, false, &stats));
		series_add(&busy, storm_run(&s, true, &stats));
		/* nothing overlaps: whatever retried did so for nothing, whatever the engine's own counter says */
		series_add(&count, (double)stats.faults_retried);
		row.value += (double)stats.faults_retried;
		claimed += stats.retries_spurious;
		faults += s.faults;
		changes += s.changes;
		ok &= s.ok && s.changes >= 100;
	}
	row.spread = series_spread(&count);
	row.isvoid = !ok;
	row_note(&row,
		 "spurious retries in all repetitions: %llu faults, %llu changes elsewhere; the engine's own counter says %llu",
		 (unsigned long long)faults, (unsigned long long)changes, (unsigned long long)claimed);
	report_row(&row);
	row = (struct row){
	    .suite = "notify",
	    .name = "storm-fault",
	    .unit = "ns",
	    .peer = "no storm",
	    .isvoid = !ok,
	    .value = series_median(&busy),
	    .spread = series_spread(&busy),
	    .peer_value = series_median(&quiet),
	    .note = "wall time of a fault (half first loads by a vCPU, half backend faults) in the storm"};
	report_row(&row);
}
