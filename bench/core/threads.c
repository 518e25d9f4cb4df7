/* SPDX-License-Identifier: MIT */
/*
 * COW breaks by one thread, then by two that do half of it each: how many times
 * faster the second is. Peer: the same of memcpy() between other memory, page by
 * page, cold: what the machine's memory lets two threads do.
 *
 * Wall time: a thread that waits for another one is what this looks for.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core.h"

#define KEEP (192 * MIB) /* reserve; steps keep eight times as much */

struct crowd {
	struct guest g;
	bool apart; /* a clone for each thread; else two vCPUs of one */
	uint64_t bytes, key;
	struct kage_vm *clone[2];
	char *from, *to;
};

struct worker {
	struct crowd *c;
	struct kage_vcpu *v; /* NULL: memcpy() */
	uint64_t begin, end;
	pthread_barrier_t *gate;
	double started, ended;
};

static void break_pages(struct worker *w)
{
	for (uint64_t at = w->begin; at < w->end; at += PAGE) {
		uint64_t v = at + w->c->key;

		must(kage_vcpu_store(w->v, at, &v, 8, NULL), "store");
	}
}

static void copy_pages(struct worker *w)
{
	for (uint64_t at = w->begin; at < w->end; at += PAGE)
		memcpy(w->c->to + at, w->c->from + at, PAGE);
}

static void *work(void *arg)
{
	struct worker *w = arg;

	pthread_barrier_wait(w->gate);
	w->started = wall_ns();
	if (w->v)
		break_pages(w);
	else
		copy_pages(w);
	w->ended = wall_ns();
	return NULL;
}

/* Wall ns of all pages, done by n threads. */
static double run_threads(struct crowd *c, unsigned n, struct kage_vcpu *const v[2])
{
	pthread_barrier_t gate;
	pthread_t thread[2];
	struct worker w[2];
	double begin, end;

	pthread_barrier_init(&gate, NULL, n);
	for (unsigned i = 0; i < n; i++) {
		w[i] = (struct worker){.c = c,
				       .v = v ? v[i] : NULL,
				       .begin = c->bytes / n * i,
				       .end = c->bytes / n * (i + 1),
				       .gate = &gate};
		must(-pthread_create(&thread[i], NULL, work, &w[i]), "thread");
	}
	for (unsigned i = 0; i < n; i++)
		pthread_join(thread[i], NULL);
	pthread_barrier_destroy(&gate);
	begin = w[0].started;
	end = w[0].ended;
	for (unsigned i = 1; i < n; i++) {
		begin = w[i].started < begin ? w[i].started : begin;
		end = w[i].ended > end ? w[i].ended : end;
	}
	return end - begin;
}

static bool all_hold(struct crowd *c, unsigned n)
{
	uint64_t wrong = 0;

	for (uint64_t at = 0; at < c->bytes; at += PAGE) {
		struct kage_vm *writer = c->clone[c->apart && at >= c->bytes / n];
		uint64_t seen[2] = {0}, original = 0;

		must(kage_vm_read(writer, at, seen, sizeof(seen)), "read");
		must(kage_vm_read(c->g.vm, at, &original, 8), "read");
		wrong += seen[0] != at + c->key || seen[1] != at || original != at;
	}
	return wrong == 0;
}

/* Wall ns, or a negative number. */
static double break_all(struct crowd *c, unsigned n)
{
	uint64_t before = guest_counters(&c->g, NULL).cow_breaks;
	struct kage_vcpu *v[2];
	double ns;
	bool ok;

	c->key++;
	for (unsigned i = 0; i < 2; i++) {
		c->clone[i] = must_clone(c->g.vm);
		v[i] = vcpu_flat(c->clone[c->apart ? i : 0], 0);
	}
	ns = run_threads(c, n, v);
	ok = guest_counters(&c->g, NULL).cow_breaks - before == c->bytes / PAGE && all_hold(c, n);
	for (unsigned i = 0; i < 2; i++)
		kage_vcpu_destroy(v[i]);
	for (unsigned i = 0; i < 2; i++)
		must(kage_vm_destroy(c->clone[i]), "destroy clone");
	guest_settle(&c->g);
	return ok ? ns : -1;
}

static double sample_breaks(void *arg)
{
	double one = break_all(arg, 1), two = break_all(arg, 2);

	return one > 0 && two > 0 ? one / two : -1;
}

static double copy_all(struct crowd *c, unsigned n)
{
	double ns;

	memset(c->to, 0, c->bytes);
	ns = run_threads(c, n, NULL);
	return memcmp(c->to, c->from, c->bytes) ? -1 : ns;
}

static double sample_copies(void *arg)
{
	double one = copy_all(arg, 1), two = copy_all(arg, 2);

	return one > 0 && two > 0 ? one / two : -1;
}

static char *memory(uint64_t bytes)
{
	char *p =
	    must_map(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "mmap");

	madvise(p, bytes, MADV_HUGEPAGE); /* as good as the host has it */
	for (uint64_t at = 0; at < bytes; at += 8)
		*(uint64_t *)(p + at) = mix(at);
	return p;
}

static void threads_row(const struct bench *b, struct crowd *c, const char *name, const char *note)
{
	struct row row = {.suite = "fault",
			  .name = name,
			  .unit = "times",
			  .peer = "two threads of memcpy()",
			  .more = true,
			  .goal = GOAL_SHARE,
			  .limit = 0.9};
	struct turns t = take_turns(b, sample_breaks, c, sample_copies, c);

	row_note(&row, "wall time of one thread / of two, %llu MiB of COW breaks; %s",
		 (unsigned long long)(c->bytes / MIB), note);
	report_turns(&row, &t);
}

void bench_threads(const struct bench *b)
{
	struct crowd c = {.bytes = bench_size(b, b->quick ? 128 * MIB : GIB)};

	c.g = guest_create(c.bytes, 0, KEEP);
	for (uint64_t at = 0; at < c.bytes; at += PAGE) {
		uint64_t v[2] = {at, at};

		must(kage_vm_write(c.g.vm, at, v, sizeof(v)), "write");
	}
	c.from = memory(c.bytes);
	c.to = memory(c.bytes);
	threads_row(b, &c, "threads-2", "two vCPUs of one guest, each its half");
	c.apart = true;
	threads_row(b, &c, "threads-2-apart", "each in a clone of its own");
	munmap(c.from, c.bytes);
	munmap(c.to, c.bytes);
	guest_destroy(&c.g);
}
