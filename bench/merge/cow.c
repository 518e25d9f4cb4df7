/* SPDX-License-Identifier: MIT */
/*
 * What a guest pays after a merge: two guests of 256 MiB (--quick: 128) were equal and are
 * merged; one vCPU of the second writes a word to each page, in order. The peer
 * writes to the same pages after ksmd merged them; ksmd stands meanwhile.
 *
 * A break needs a frame. `cow-break`: the engine keeps as many as it needs
 * populated (reserve). `-empty`: it has given all but 4 MiB back, and gets them
 * from the host by 2 MiB pages, zeroed by the kernel. ksmd's breaks get pages
 * that the kernel has free.
 */
#include <stdio.h>
#include <sys/resource.h>

#include "merge.h"

struct breaks {
	struct contents c;
	struct series cpu, peer;
	bool ok;
};

/* The first word of every page of the last guest is written anew; it holds the same. */
static double break_ours(struct ours *o, struct run *r)
{
	const struct contents *c = &o->contents;
	unsigned g = c->guests - 1;
	uint64_t breaks = ours_stats(o).cow_breaks;
	struct kage_vcpu *v;
	double ns;

	must(kage_vcpu_create(o->vm[g], KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI), &v), "vCPU");
	ns = cpu_ns();
	for (uint64_t page = 0; page < c->pages; page++) {
		uint64_t word = mix(c->key(c, g, page) + 1);

		must(kage_vcpu_store(v, page * PAGE, &word, 8, NULL), "store");
	}
	ns = cpu_ns() - ns;
	kage_vcpu_destroy(v);
	run_check(r, ours_stats(o).cow_breaks - breaks == c->pages, "not every write broke a shared page");
	return ns / (double)c->pages;
}

static long faults(void)
{
	struct rusage u;

	getrusage(RUSAGE_THREAD, &u);
	return u.ru_minflt;
}

/* ksmd's counters fall when it next comes by; each break is one fault. */
static double break_theirs(struct theirs *t, struct run *r)
{
	const struct contents *c = &t->contents;
	unsigned g = c->guests - 1;
	long before = faults();
	double ns = cpu_ns();

	for (uint64_t page = 0; page < c->pages; page++)
		*(volatile uint64_t *)(t->p[g] + page * PAGE) = mix(c->key(c, g, page) + 1);
	ns = cpu_ns() - ns;
	run_check(r, faults() - before >= (long)c->pages, "not every write broke a KSM page");
	return ns / (double)c->pages;
}

static void turn_ours(struct breaks *w)
{
	struct ours o;
	struct run r;

	ours_create(&o, &w->c);
	ours_merge(&o, &r);
	run_check(&r, same_frames(r.frames, w->c.distinct), "Kage left another number of frames");
	series_add(&w->cpu, break_ours(&o, &r));
	ours_check(&o, &r);
	ours_destroy(&o);
	trace_free(&r.trace);
	w->ok &= r.ok;
}

static void turn_theirs(struct breaks *w)
{
	struct theirs t;
	struct run r;

	theirs_create(&t, &w->c);
	theirs_merge(&t, &r);
	run_check(&r, same_frames(r.frames, w->c.distinct), "ksmd left another number of frames");
	series_add(&w->peer, break_theirs(&t, &r));
	theirs_check(&t, &r);
	theirs_destroy(&t);
	trace_free(&r.trace);
	w->ok &= r.ok;
}

void bench_cow(const struct bench *b)
{
	uint64_t bytes = size_of_case(b->quick ? 128 * MIB : 256 * MIB);
	struct breaks kept = {.c = contents_equal(2, bytes), .ok = true}, empty = kept;
	struct row row = {.name = "cow-break",
			  .unit = "ns",
			  .peer = "a write to a KSM page",
			  .goal = GOAL_RATIO,
			  .limit = 2.5};
	struct row bare = {.name = "cow-break-empty", .unit = "ns", .peer = row.peer};
	unsigned reps = reps_of(b, bytes);

	kept.c.reserve = bytes;
	if (skip_case((const char *const[]){row.name, bare.name, NULL}))
		return;
	for (unsigned i = 0; i < 3 * reps; i++) {
		if (i % 3 == 0)
			turn_ours(&kept);
		else if (i % 3 == 1)
			turn_ours(&empty);
		else if (!form.alone)
			turn_theirs(&kept);
	}
	row.isvoid = !kept.ok;
	bare.isvoid = !kept.ok || !empty.ok;
	row_note(&row, "one vCPU writes a word to each page of a merged guest of %u MiB, in order; the engine has kept "
		       "frames for that", (unsigned)(bytes / MIB));
	row_note(&bare, "the engine has given its memory back: populating it is in the time");
	finish_row(&row, &kept.cpu, &kept.peer);
	finish_row(&bare, &empty.cpu, &kept.peer);
}
