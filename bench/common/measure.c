/* SPDX-License-Identifier: MIT */
/* Clocks, medians and quartiles, measuring in turns, and giving up. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "common.h"

void must(int result, const char *what)
{
	if (result == 0)
		return;
	fflush(stdout);
	fprintf(stderr, "%s: %s: %s (%d)\n", program_invocation_short_name, what,
		result < 0 ? strerror(-result) : "outcome", result);
	exit(2);
}

void *must_map(void *p, const char *what)
{
	if (p == MAP_FAILED || !p) {
		fflush(stdout);
		perror(what);
		exit(2);
	}
	return p;
}

static double clock_ns(clockid_t id)
{
	struct timespec t;

	clock_gettime(id, &t);
	return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

double cpu_ns(void)
{
	return clock_ns(CLOCK_THREAD_CPUTIME_ID);
}

double wall_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

void series_add(struct series *s, double v)
{
	if (s->n < REPS_MAX)
		s->v[s->n++] = v;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

double series_quantile(const struct series *s, double q)
{
	double v[REPS_MAX], at = q * (s->n - 1);
	unsigned low = (unsigned)at;

	if (s->n == 0)
		return 0;
	memcpy(v, s->v, s->n * sizeof(v[0]));
	qsort(v, s->n, sizeof(v[0]), by_value);
	if (low + 1 >= s->n)
		return v[s->n - 1];
	return v[low] + (at - low) * (v[low + 1] - v[low]);
}

double series_spread(const struct series *s)
{
	return series_quantile(s, 0.75) - series_quantile(s, 0.25);
}

static bool sample(sample_fn fn, void *arg, struct series *s, bool counts)
{
	double v = fn(arg);

	if (counts)
		series_add(s, v);
	return v >= 0;
}

struct turns take_turns(const struct bench *b, sample_fn ours, void *arg, sample_fn peer, void *peer_arg)
{
	struct turns t = {.ok = true};

	for (unsigned i = 0; i <= b->reps; i++) {
		bool first = i & 1;

		if (peer && first)
			t.ok &= sample(peer, peer_arg, &t.peer, i > 0);
		t.ok &= sample(ours, arg, &t.ours, i > 0);
		if (peer && !first)
			t.ok &= sample(peer, peer_arg, &t.peer, i > 0);
	}
	return t;
}
