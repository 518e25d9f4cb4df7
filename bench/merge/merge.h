/* SPDX-License-Identifier: MIT */
/*
 * The parts of kage-bench-merge, beside ../common.
 *
 *   contents.c  what the guests of a row hold: a page is a function of its key
 *   ours.c      guests of an engine: filled, merged in steps, checked
 *   ksm.c       the running kernel's ksmd: its settings, its CPU time, the same contents merged by it
 *   rows.c      both sides in turns; when they count as the same
 *   scan.c      first scan of memory that has nothing in common
 *   full.c      equal guests; scattered duplicates
 *   cow.c       what a write to a merged page costs
 *   demo.c      three real guests, and a fourth one
 *   kvm.c       two running guests of KVM, with what ../kvm has
 *   latency.c   a guest's writes while it is merged
 *   plot.c      pictures
 *   steady.c    what a pass costs when nothing, or little, was written
 *
 * Rules of every row:
 *  1. Both sides get the same contents, and every page is compared with what it
 *     was made of after the run, on both sides.
 *  2. Time is CPU time: ksmd's from /proc/PID/schedstat, Kage's that of the
 *     thread that steps, in kage_engine_step(). It counts until the last step
 *     that read, merged or released anything; ksmd's until its counters reach
 *     what the contents allow.
 *  3. Both sides end with the number of frames that the contents allow, +-0.1 %,
 *     by their own counters, or the row is void.
 */
#ifndef KAGE_BENCH_MERGE_H
#define KAGE_BENCH_MERGE_H

#include "common.h"

#define GUESTS_MAX 8
#define STEP_PAGES 16384

/* From main()'s options. */
struct form {
	bool quick;
	bool smoke;	  /* a few MiB, no peer: that rows work */
	bool alone;	  /* no peer */
	const char *only; /* the case to run, with the rows that come from it; NULL: all */
	const char *plots;
	const char *guests; /* directory of RAM files */
};
extern struct form form;

/* -- contents.c -------------------------------------------------------------------- */

struct contents {
	unsigned guests;
	uint64_t pages; /* of each */
	uint64_t seed;
	uint64_t (*key)(const struct contents *c, unsigned guest, uint64_t page); /* NULL: images */
	uint64_t *overlay; /* keys of pages that were written since, 0: not; a row's own */
	/* frames that are left when everything equal is shared; 0: not known */
	uint64_t distinct;
	/* images: their bytes, and a bit for each page that is no hole of its file */
	const char *image[GUESTS_MAX];
	uint64_t *present[GUESTS_MAX];
	uint64_t touched[GUESTS_MAX]; /* how many */
	/* of Kage's engine and regions */
	uint64_t reserve;
	uint32_t flags;
};

/* No two pages are equal. */
struct contents contents_unique(unsigned guests, uint64_t bytes);
/* All guests hold the same; within one no two pages are equal. */
struct contents contents_equal(unsigned guests, uint64_t bytes);
/* One guest; every fourth page or so, at random, equals another one at random. */
struct contents contents_scattered(uint64_t bytes);
/* RAM files guest1.ram ... guestN.ram of a directory, as the demo makes them. 0 or -errno. */
int contents_images(struct contents *c, const char *dir, unsigned guests);
void contents_free(struct contents *c);
static inline uint64_t contents_nominal(const struct contents *c)
{
	uint64_t n = 0;

	for (unsigned g = 0; g < c->guests; g++)
		n += c->key ? c->pages : c->touched[g];
	return n;
}
/* What a page holds; false: it was never touched. */
bool contents_page(const struct contents *c, unsigned guest, uint64_t page, void *buf);
bool contents_is(const struct contents *c, unsigned guest, uint64_t page, const void *found);

void page_fill(void *page, uint64_t key);

/* -- what a run gives ------------------------------------------------------------------ */

struct sample {
	double wall, cpu; /* ns since the run began */
	uint64_t saved;	  /* pages */
};

struct trace {
	struct sample *sample;
	unsigned n, room;
};

void trace_add(struct trace *t, double wall, double cpu, uint64_t saved);
void trace_free(struct trace *t);
/* The first sample in which so much is saved; the last one if none. */
const struct sample *trace_reach(const struct trace *t, double saved);
/* The last sample at or before so much CPU. */
const struct sample *trace_at(const struct trace *t, double cpu);

struct run {
	bool ok;
	double cpu; /* ns until the last useful work */
	double wall;
	uint64_t frames; /* left */
	uint64_t passes;
	uint64_t seen, seen_pass;   /* ksmd: saved when last looked, and the pass in which that changed */
	double pool_free, returned; /* bytes; Kage: kept populated by the pool, given back to the host */
	struct trace trace;
};

/* A check of a run: it says so if it failed. */
void run_check(struct run *r, bool ok, const char *what);

/* -- ours.c ------------------------------------------------------------------------------ */

struct ours {
	struct contents contents;
	struct kage_engine *engine;
	struct kage_vm *vm[GUESTS_MAX];
};

void ours_create(struct ours *o, const struct contents *c);
void ours_destroy(struct ours *o);
/* One more guest, as the contents have it. */
void ours_add(struct ours *o);
/* Steps with merging on until passes find nothing to do. Its CPU time, and what is left. */
void ours_merge(struct ours *o, struct run *r);
/* One pass. CPU ns. Adds to *merged and *scanned, which may be NULL. */
double ours_pass(struct ours *o, uint64_t *merged, uint64_t *scanned);
void ours_tune(struct ours *o, bool merge);
/* Every page of every guest is what the contents say. */
void ours_check(const struct ours *o, struct run *r);
struct kage_stats ours_stats(const struct ours *o);
/* One page, by its key. */
void ours_write(struct ours *o, unsigned guest, uint64_t page, uint64_t key);

/* -- ksm.c ------------------------------------------------------------------------------- */

/* Waits until nobody else's memory can be merged. NULL, or why not. */
const char *ksm_alone(void);
/* NULL: ksmd can be measured, and its settings are put back when the process ends, however it ends. Else why
 * not. */
const char *ksm_open(void);
void ksm_close(void);

struct ksm_counts {
	uint64_t shared, sharing, unshared, volatiles, zero, full_scans, scanned;
	double cpu; /* ns, of ksmd */
};
struct ksm_counts ksm_counts(void);
void ksm_start(void);
void ksm_stop(void);
/* After this process's mergeable memory has gone: what ksmd knew is dropped. False: others had such memory.
 */
bool ksm_clean(void);

/* Anonymous memory with the contents, advised MERGEABLE. */
struct theirs {
	struct contents contents;
	char *p[GUESTS_MAX];
};

void theirs_create(struct theirs *t, const struct contents *c);
void theirs_destroy(struct theirs *t);
void theirs_add(struct theirs *t);
/* Runs ksmd until as much is shared as the contents allow. */
void theirs_merge(struct theirs *t, struct run *r);
/* Unique pages: `first` passes, after which it knows them all, and whose CPU time is r->cpu; then `n`, whose CPU time is
 * added to the series, ns a page each. */
void theirs_passes(struct theirs *t, unsigned first, unsigned n, struct run *r, struct series *s);
void theirs_check(const struct theirs *t, struct run *r);

/* -- rows.c ------------------------------------------------------------------------------- */

/* Why rows have no peer, or NULL. */
extern const char *no_ksm;

/* Repetitions of a row of this size. */
unsigned reps_of(const struct bench *b, uint64_t bytes);
/* Bytes of a case in this form of the benchmark. */
uint64_t size_of_case(uint64_t bytes);
bool same_frames(uint64_t frames, uint64_t expected);
/* The case is to be left out: another one is asked for, or it needs ksmd and that cannot be measured. Then
 * all its rows, a list that ends with NULL, are reported as skipped, with the reason. */
bool skip_case(const char *const *names);
/* The same for another reason; NULL: there is none. */
bool skip_because(const char *const *names, const char *why);
/* Median and quartiles of both series into the row, and out with it. */
void finish_row(struct row *row, const struct series *ours, const struct series *peer);

/* -- scan.c ------------------------------------------------------------------------------- */

/* First scans, whose ns a page go into the series; every page is known afterwards. `go_on` may be NULL: what is done with
 * the memory then. ksmd: two passes, and `n` further ones; with --quick once, of 1 GiB and with one further pass, for all
 * rows. False: a check failed. */
bool scan_ours(const struct contents *c, void (*go_on)(struct ours *o, void *arg), void *arg, struct series *s);
bool scan_theirs(const struct contents *c, unsigned n, struct series *two, struct series *later);
/* Two rows: against a page of one pass, against both. */
void scan_rows(const char *const name[2], bool ok, const struct series *ours, const struct series *two, const char *note);

/* -- latency.c --------------------------------------------------------------------------------- */

#define HIST_FIRST   20.0 /* ns: bucket 0 is less */
#define HIST_STEPS   4	  /* buckets for a factor of two */
#define HIST_BUCKETS 96

struct histogram {
	uint64_t count[HIST_BUCKETS], total;
	double longest; /* ns */
};

double histogram_edge(unsigned bucket);
double histogram_quantile(const struct histogram *h, double q);

/* -- plot.c ------------------------------------------------------------------------------------ */

/* Keeps what pictures are made of, of the last repetition; nothing without --plots. */
void plot_keep_run(bool peer, const struct trace *t);
void plot_keep_latency(const struct histogram *ours, const struct histogram *peer);

/* -- suites --------------------------------------------------------------------------------- */

void bench_scan(const struct bench *b);
void bench_full(const struct bench *b);
void bench_scattered(const struct bench *b);
void bench_steady(const struct bench *b);
void bench_cow(const struct bench *b);
void bench_demo(const struct bench *b);
void bench_merge_kvm(const struct bench *b);
void bench_latency(const struct bench *b);
void bench_plots(const struct bench *b);

#endif
