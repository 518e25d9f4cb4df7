/* SPDX-License-Identifier: MIT */
/*
 * What merging does to a guest that writes meanwhile: one thread writes a word to
 * a page at random every 50 us or so and takes the time of each write, while two
 * guests of equal contents are merged. The word is what the page holds there
 * already, so that contents stay what they are.
 *
 * Kage: a store by a vCPU; slow ones are the first after a harvest of the dirty
 * log (the entry is write-protected), and COW breaks. The peer: a store into memory
 * that ksmd merges. Wall time, since a guest waits; so it contains being
 * descheduled, which is the same on both sides.
 */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "merge.h"

#define PAUSE_US 50
#define LAST	 (PAGE - 8) /* the word that is written */

struct writer {
	const struct contents *c;
	struct kage_vcpu *vcpu; /* NULL: memory */
	char *memory;
	_Atomic bool stop;
	struct histogram h;
};

static void note_latency(struct histogram *h, double ns)
{
	int bucket = ns < HIST_FIRST ? 0 : (int)(log2(ns / HIST_FIRST) * HIST_STEPS) + 1;

	h->count[bucket < HIST_BUCKETS ? bucket : HIST_BUCKETS - 1]++;
	h->total++;
	if (ns > h->longest)
		h->longest = ns;
}

/* Upper end of a bucket, ns. */
double histogram_edge(unsigned bucket)
{
	return HIST_FIRST * exp2((double)bucket / HIST_STEPS);
}

double histogram_quantile(const struct histogram *h, double q)
{
	uint64_t seen = 0;
	unsigned i = 0;

	for (; i < HIST_BUCKETS - 1; i++) {
		seen += h->count[i];
		if ((double)seen >= q * (double)h->total)
			break;
	}
	return histogram_edge(i);
}

static void *write_on(void *arg)
{
	struct writer *w = arg;
	char page[PAGE];

	for (uint64_t i = 1; !atomic_load_explicit(&w->stop, memory_order_relaxed); i++) {
		uint64_t at = mix(i) % w->c->pages, word;
		double ns;

		contents_page(w->c, 0, at, page);
		memcpy(&word, page + LAST, 8);
		ns = wall_ns();
		if (w->vcpu)
			must(kage_vcpu_store(w->vcpu, at * PAGE + LAST, &word, 8, NULL), "store");
		else
			*(volatile uint64_t *)(w->memory + at * PAGE + LAST) = word;
		note_latency(&w->h, wall_ns() - ns);
		usleep(PAUSE_US);
	}
	return NULL;
}

static pthread_t writer_start(struct writer *w)
{
	pthread_t thread;

	must(-pthread_create(&thread, NULL, write_on, w), "thread");
	return thread;
}

static void writer_stop(struct writer *w, pthread_t thread)
{
	atomic_store(&w->stop, true);
	pthread_join(thread, NULL);
}

static bool latency_ours(const struct contents *c, struct histogram *h)
{
	struct writer w = {.c = c};
	struct run r = {.ok = true};
	uint64_t merged = 0;
	pthread_t thread;
	struct ours o;

	ours_create(&o, c);
	must(kage_vcpu_create(o.vm[0], KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI), &w.vcpu), "vCPU");
	thread = writer_start(&w);
	ours_tune(&o, true);
	for (unsigned i = 0; merged < c->pages / 10 * 9 && i < 64; i++)
		ours_pass(&o, &merged, NULL);
	writer_stop(&w, thread);
	ours_tune(&o, false);
	run_check(&r, merged >= c->pages / 10 * 9, "Kage merged too little beside a writer");
	kage_vcpu_destroy(w.vcpu);
	ours_check(&o, &r);
	ours_destroy(&o);
	*h = w.h;
	return r.ok;
}

static bool latency_theirs(const struct contents *c, struct histogram *h)
{
	struct writer w = {.c = c};
	struct run r = {.ok = true};
	struct contents most = *c;
	pthread_t thread;
	struct theirs t;

	most.distinct = 2 * c->pages - c->pages / 10 * 9;
	theirs_create(&t, &most);
	w.memory = t.p[0];
	thread = writer_start(&w);
	theirs_merge(&t, &r);
	writer_stop(&w, thread);
	trace_free(&r.trace);
	theirs_check(&t, &r);
	theirs_destroy(&t);
	*h = w.h;
	return r.ok;
}

/* Two equal guests are merged while somebody writes to one; the peer's only if there is one. */
static bool latency_measure(const struct contents *c, struct histogram *ours, struct histogram *peer)
{
	bool ok = latency_ours(c, ours);

	if (!form.alone)
		ok &= latency_theirs(c, peer);
	return ok;
}

void bench_latency(const struct bench *b)
{
	static const char *const names[] = {"write-latency", NULL};
	struct contents c = contents_equal(2, size_of_case(b->quick ? 256 * MIB : 512 * MIB));
	struct row row = {.name = names[0], .unit = "us", .peer = "the same beside ksmd"};
	struct histogram ours = {0}, peer = {0};
	struct series p99 = {0}, p99_peer = {0};
	unsigned reps = form.smoke || b->quick ? 1 : 5;

	if (skip_case(names))
		return;
	for (unsigned i = 0; i < reps; i++) {
		row.isvoid |= !latency_measure(&c, &ours, &peer);
		plot_keep_latency(&ours, &peer);
		series_add(&p99, histogram_quantile(&ours, 0.99) / 1e3);
		if (peer.total)
			series_add(&p99_peer, histogram_quantile(&peer, 0.99) / 1e3);
	}
	row_note(&row,
		 "99 of 100 writes of one of two guests of %u MiB were faster while they were merged; wall time; last run: "
		 "median %.2f us "
		 "(ksmd %.2f), 99.9 %% %.0f (%.0f), longest %.0f (%.0f)",
		 (unsigned)(c.pages * PAGE / MIB), histogram_quantile(&ours, 0.5) / 1e3, peer.total ? histogram_quantile(&peer, 0.5) / 1e3 : 0,
		 histogram_quantile(&ours, 0.999) / 1e3,
		 peer.total ? histogram_quantile(&peer, 0.999) / 1e3 : 0, ours.longest / 1e3,
		 peer.longest / 1e3);
	finish_row(&row, &p99, &p99_peer);
}
