/* SPDX-License-Identifier: MIT */
/*
 * What the benchmark programs share. Each suite measures what Kage does and its
 * peer in turns, in one process, and hands rows to report.c.
 *
 *   suites.c    options, which suites run
 *   measure.c   clocks, medians and quartiles, turns, giving up
 *   report.c    the table and the JSON file
 *   steps.c     steps of an engine
 *   peer.c      the kernel's private mappings and fork()
 *
 * Rules of every row: its result is checked in the run that was timed, and a row
 * whose check fails is void. CPU time of the thread, unless waiting is what
 * counts. `ratio` is how many times better than the peer Kage is.
 */
#ifndef KAGE_BENCH_COMMON_H
#define KAGE_BENCH_COMMON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <kage/kage.h>

#define MIB	 ((uint64_t)1 << 20)
#define GIB	 ((uint64_t)1 << 30)
#define PAGE	 KAGE_PAGE_SIZE
#define REPS_MAX 31

#define likely(x)   __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define LENGTH(a)   (sizeof(a) / sizeof((a)[0]))

struct bench {
	bool quick;	/* less of everything */
	bool smoke;	/* quick, and as little as shows that checks pass; times mean nothing */
	unsigned reps;	/* repetitions of a row; odd */
	uint64_t shift; /* work of a repetition is divided by 2^shift */
};

/* Bytes of a guest or of a working set, in this form of the benchmark. */
static inline uint64_t bench_size(const struct bench *b, uint64_t bytes)
{
	return b->smoke ? bytes >> b->shift : bytes;
}

/* -- measure.c ------------------------------------------------------------------ */

/* Ends the program with a message: the machine cannot run the benchmark. */
void must(int result, const char *what);
void *must_map(void *p, const char *what);

double cpu_ns(void);  /* CPU time of this thread */
double wall_ns(void); /* CLOCK_MONOTONIC */

struct series {
	unsigned n;
	double v[REPS_MAX];
};

void series_add(struct series *s, double v);
double series_quantile(const struct series *s, double q);
static inline double series_median(const struct series *s)
{
	return series_quantile(s, 0.5);
}
/* Distance of the quartiles. */
double series_spread(const struct series *s);

/* One timed and checked piece of work: ns for one operation, or a negative number if the check failed. */
typedef double (*sample_fn)(void *arg);

struct turns {
	struct series ours, peer;
	bool ok; /* every check of every repetition passed */
};

/* Runs both in turns, who goes first alternating, after one round that does not count. `peer` may be NULL. */
struct turns take_turns(const struct bench *b, sample_fn ours, void *arg, sample_fn peer, void *peer_arg);

/* -- report.c --------------------------------------------------------------------- */

enum goal {
	GOAL_NONE,
	GOAL_MOST,  /* value <= limit */
	GOAL_EXTRA, /* value - peer <= limit */
	GOAL_TIMES, /* value / peer <= limit */
	GOAL_RATIO, /* peer / value >= limit */
	GOAL_SHARE, /* value / peer >= limit */
};

struct row {
	const char *suite, *name, *unit;
	double value, spread;
	const char *peer; /* NULL: none */
	double peer_value;
	enum goal goal;
	double limit;
	bool more; /* is better: ratio = value / peer */
	bool isvoid;
	char note[320];
};

/* `json`: where rows are written as an array, or NULL. `append`: they are added to what other programs have
 * written, an object a line; the heading of the table is printed if they are the first. */
bool report_open(const char *json, bool append);
void report_row(const struct row *row);
/* A row that cannot be measured here; its note says why. */
void report_skip(const struct row *row);
/* Medians of a series of turns; unit and rest are the caller's. */
void report_turns(struct row *row, const struct turns *t);
/* Ends the JSON file. Returns the number of void rows, or -1 if the file could not be written. */
int report_close(void);
void row_note(struct row *row, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A number that looks random for each i. */
static inline uint64_t mix(uint64_t i)
{
	i *= 0x9e3779b97f4a7c15u;
	i ^= i >> 29;
	i *= 0xbf58476d1ce4e5b9u;
	return i ^ i >> 32;
}

/* -- steps.c ---------------------------------------------------------------------------- */

/* Steps until nothing waits for its grace period. CPU ns. */
double steps_settle(struct kage_engine *e);
/* Steps with merging on until nothing more merges; the first passes may only look. CPU ns. */
double steps_merge(struct kage_engine *e);

/* -- peer.c ----------------------------------------------------------------------------- */

/* Populated memory of 4 KiB pages: of a memfd (fd) or anonymous (fd -1). */
struct host_memory {
	char *p;
	uint64_t bytes;
	int fd;
};

struct host_memory host_memfd(uint64_t bytes);
struct host_memory host_anon(uint64_t bytes);
void host_release(struct host_memory *m);
/* A child that shares this process's pages until told to go. */
struct host_child {
	int pid, fd;
};
struct host_child host_fork(double *fork_ns);
void host_reap(struct host_child c);

/* -- suites.c ----------------------------------------------------------------------------------- */

struct suite {
	const char *name;
	void (*run)(const struct bench *b);
};

/*
 * main() of a benchmark program: [--quick | --smoke] [--json FILE | --rows FILE] [suite...]. Runs the suites that are
 * named, or all. --json writes an array, --rows appends (report_open()). Returns its exit status: 0; 1 if a row was
 * void; 2 if the options are wrong or the file could not be written.
 */
int suites_run(int argc, char **argv, const struct suite *suites, unsigned n);

#endif
