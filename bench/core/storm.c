/* SPDX-License-Identifier: MIT */
/*
 * One thread faults in range A while another changes range B of the same guest
 * all the time: discards and writes it, and takes and gives write permission.
 * No fault of A may retry because of a change of B. The peer is the same program
 * with global.c in place of what is exact by range.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "notify.h"

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
	*stats = guest_counters(&s->g, s->g.vm);
	guest_destroy(&s->g);
	return ns / (double)s->faults;
}

/* -- the peer: the same in a process whose faults go by one sequence (global.c) ------------- */

struct storm_result {
	double ns; /* a fault, wall */
	unsigned long long retried, claimed, changes;
	int ok;
};

int storm_main(int argc, char **argv)
{
	struct storm s = {.faults = argc > 3 ? strtoull(argv[2], NULL, 0) : 0};
	struct kage_stats stats;
	double ns;

	if (!s.faults)
		return 2;
	ns = storm_run(&s, atoi(argv[3]) != 0, &stats);
	printf("%f %llu %llu %llu %d\n", ns, (unsigned long long)stats.faults_retried,
	       (unsigned long long)stats.retries_spurious, (unsigned long long)s.changes, s.ok);
	return 0;
}

static struct storm_result run_here(uint64_t faults, bool storming)
{
	struct storm s = {.faults = faults};
	struct kage_stats stats;
	double ns = storm_run(&s, storming, &stats);

	return (struct storm_result){ns, stats.faults_retried, stats.retries_spurious, s.changes, s.ok};
}

static struct storm_result run_global(const char *program, uint64_t faults, bool storming)
{
	struct storm_result r = {0};
	char command[600];
	FILE *f;

	snprintf(command, sizeof(command), "'%s' --storm %llu %d", program, (unsigned long long)faults,
		 storming);
	f = must_map(popen(command, "r"), program);
	if (fscanf(f, "%lf %llu %llu %llu %d", &r.ns, &r.retried, &r.claimed, &r.changes, &r.ok) != 5)
		r.ok = false;
	pclose(f);
	return r;
}

/* This program's name and "-global". */
static bool find_global(char *path, size_t bytes)
{
	ssize_t n = readlink("/proc/self/exe", path, bytes - 8);

	if (n < 0)
		return false;
	strcpy(path + n, "-global");
	return access(path, X_OK) == 0;
}

struct side {
	struct series count, busy, quiet;
	uint64_t retried, claimed, changes;
	bool ok;
};

static void side_add(struct side *s, struct storm_result quiet, struct storm_result busy, uint64_t faults)
{
	/* nothing overlaps: whatever retried did so for nothing, whatever the engine's own counter says */
	series_add(&s->count, (double)busy.retried * 1e6 / (double)faults);
	series_add(&s->busy, busy.ns);
	series_add(&s->quiet, quiet.ns);
	s->retried += busy.retried;
	s->claimed += busy.claimed;
	s->changes += busy.changes;
	s->ok &= quiet.ok && busy.ok && busy.changes >= 3;
}

static void fault_row(const struct side *ours, const struct side *global, const char *name, const char *note,
		      bool storming)
{
	const struct series *a = storming ? &ours->busy : &ours->quiet,
			    *b = storming ? &global->busy : &global->quiet;
	struct row row = {.suite = "notify",
			  .name = name,
			  .unit = "ns",
			  .peer = b->n ? "one sequence for all changes" : NULL,
			  .isvoid = !ours->ok || !global->ok,
			  .value = series_median(a),
			  .spread = series_spread(a),
			  .peer_value = series_median(b)};

	row_note(&row, "wall time of a fault (half first loads by a vCPU, half backend faults) %s", note);
	report_row(&row);
}

void storm_rows(const struct bench *b)
{
	uint64_t faults = (uint64_t)1 << (b->smoke ? 13 : 18 - b->shift);
	struct side ours = {.ok = true}, global = {.ok = true};
	struct row row = {.suite = "notify", .name = "spurious-storm", .unit = "count", .goal = GOAL_MOST};
	char program[512];
	bool peer = find_global(program, sizeof(program));

	for (unsigned i = 0; i < b->reps; i++) {
		struct storm_result quiet = run_here(faults, false), busy = run_here(faults, true);

		side_add(&ours, quiet, busy, faults);
		if (!peer)
			continue;
		quiet = run_global(program, faults, false);
		side_add(&global, quiet, run_global(program, faults, true), faults);
	}
	row.value = (double)ours.retried * 1e6 / (double)(faults * b->reps);
	row.spread = series_spread(&ours.count);
	row.peer = peer ? "one sequence for all changes" : NULL;
	row.peer_value = series_median(&global.count);
	row.isvoid = !ours.ok || !global.ok;
	row_note(&row,
		 "retries in a million faults, of all repetitions together: %llu of %llu, %llu changes "
		 "elsewhere, the "
		 "engine's own counter says %llu; with one sequence %llu retries, %llu changes%s",
		 (unsigned long long)ours.retried, (unsigned long long)(faults * b->reps),
		 (unsigned long long)ours.changes, (unsigned long long)ours.claimed,
		 (unsigned long long)global.retried, (unsigned long long)global.changes,
		 peer ? "" : " (not run: no kage-bench-notify-global beside this program)");
	report_row(&row);
	fault_row(&ours, &global, "storm-fault", "in the storm", true);
	fault_row(&ours, &global, "storm-quiet", "without it", false);
}
