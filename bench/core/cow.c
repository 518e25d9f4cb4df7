/* SPDX-License-Identifier: MIT */
/*
 * COW break: one vCPU of a clone stores 8 bytes into each page of 1 GiB (128 MiB
 * with --quick), all of it shared with the parent. Peers do the same through host memory: a private
 * mapping of a memfd (fresh for each repetition), and anonymous memory after
 * fork(), both of 4 KiB pages.
 *
 * "-2": another vCPU of the clone reads pages at random meanwhile, on a thread of
 * its own, so that breaks have to wait until it uses a page no more.
 *
 * Recycled pool: the arena was filled by an earlier clone, which was destroyed,
 * and a step took the frames back. Its reserve is set so that steps keep them.
 * Empty pool: the engine is new, so the time includes populating every frame.
 */
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "core.h"

#define KEEP   (192 * MIB) /* reserve; steps keep eight times as much */
#define CHECKS 4096

struct cow {
	struct guest g;
	uint64_t bytes, pages; /* a power of two */
	uint32_t flags;
	uint64_t reserve;
	bool random, fresh;
	bool beside; /* a second vCPU runs */
	_Atomic bool stop;
	_Atomic uint64_t reads, wrong; /* by it */
	struct kage_vm *clone;
	struct host_memory memfd, anon;
	uint64_t round;
};

static inline uint64_t place(const struct cow *c, uint64_t i)
{
	/* A permutation: odd factor, modulo a power of two. */
	return (c->random ? i * 0x9e3779b1u % c->pages : i) * PAGE;
}

static struct guest populated(const struct cow *c)
{
	struct guest g = guest_create(c->bytes, c->flags, c->reserve);

	for (uint64_t at = 0; at < c->bytes; at += PAGE) {
		uint64_t v = at + 1;

		must(kage_vm_write(g.vm, at, &v, 8), "write");
	}
	return g;
}

static bool holds(const struct cow *c, struct kage_vm *vm, uint64_t key)
{
	uint64_t wrong = 0;

	for (uint64_t i = 0; i < CHECKS; i++) {
		uint64_t at = mix(i) % c->pages * PAGE, seen = 0;

		must(kage_vm_read(vm, at, &seen, 8), "read");
		wrong += seen != at + key;
	}
	return wrong == 0;
}

/* What a page holds is its first key or, once broken, that of the round. */
static void *read_beside(void *arg)
{
	struct cow *c = arg;
	struct kage_vcpu *v = vcpu_flat(c->clone, 0);
	uint64_t key = c->round + 1;

	for (uint64_t i = 0; !c->stop; i++) {
		kage_vcpu_enter(v);
		for (unsigned n = 0; n < 64 && !kage_vcpu_wanted(v); n++) {
			uint64_t at = mix(i * 64 + n) % c->pages * PAGE, seen = 0;

			must(kage_vcpu_load(v, at, &seen, 8, NULL), "load");
			c->wrong += seen != at + 1 && seen != at + key;
		}
		kage_vcpu_leave(v);
		c->reads++;
	}
	kage_vcpu_destroy(v);
	return NULL;
}

static void beside_start(struct cow *c, struct kage_vm *clone, pthread_t *thread)
{
	c->clone = clone;
	c->stop = false;
	c->reads = c->wrong = 0;
	must(-pthread_create(thread, NULL, read_beside, c), "thread");
	while (c->reads < 8)
		sched_yield();
}

static double break_all(const struct cow *c, struct kage_vcpu *v, uint64_t key)
{
	double ns = cpu_ns();

	for (uint64_t i = 0; i < c->pages; i++) {
		uint64_t at = place(c, i), value = at + key;

		must(kage_vcpu_store(v, at, &value, 8, NULL), "store");
	}
	return cpu_ns() - ns;
}

static double sample_kage(void *arg)
{
	struct cow *c = arg;
	struct guest g = c->fresh ? populated(c) : c->g;
	struct kage_vm *clone = must_clone(g.vm);
	struct kage_vcpu *v = vcpu_flat(clone, 0);
	uint64_t breaks = guest_counters(&g, NULL).cow_breaks, key = ++c->round + 1;
	pthread_t thread;
	double ns;
	bool ok;

	if (c->beside)
		beside_start(c, clone, &thread);
	ns = break_all(c, v, key);
	if (c->beside) {
		c->stop = true;
		pthread_join(thread, NULL);
	}
	ok = c->wrong == 0 && guest_counters(&g, NULL).cow_breaks - breaks == c->pages && holds(c, clone, key) &&
	     holds(c, g.vm, 1);
	kage_vcpu_destroy(v);
	must(kage_vm_destroy(clone), "destroy clone");
	guest_settle(&g);
	if (c->fresh)
		guest_destroy(&g);
	return ok ? ns / (double)c->pages : -1;
}

static double store_all(const struct cow *c, char *p, uint64_t key)
{
	double ns = cpu_ns();

	for (uint64_t i = 0; i < c->pages; i++) {
		uint64_t at = place(c, i);

		*(volatile uint64_t *)(p + at) = at + key;
	}
	return cpu_ns() - ns;
}

static bool host_holds(const struct cow *c, const char *p, uint64_t key)
{
	uint64_t wrong = 0;

	for (uint64_t i = 0; i < CHECKS; i++) {
		uint64_t at = mix(i) % c->pages * PAGE;

		wrong += *(const volatile uint64_t *)(p + at) != at + key;
	}
	return wrong == 0;
}

static double sample_private(void *arg)
{
	struct cow *c = arg;
	char *p = must_map(mmap(NULL, c->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, c->memfd.fd, 0), "mmap");
	uint64_t key = ++c->round + 1;
	double ns;
	bool ok;

	must(madvise(p, c->bytes, MADV_NOHUGEPAGE), "MADV_NOHUGEPAGE");
	ns = store_all(c, p, key);
	ok = host_holds(c, p, key) && host_holds(c, c->memfd.p, 1);
	munmap(p, c->bytes);
	return ok ? ns / (double)c->pages : -1;
}

static double sample_fork(void *arg)
{
	struct cow *c = arg;
	double ns;
	struct host_child child = host_fork(&ns);
	uint64_t key = ++c->round + 1;
	bool ok;

	ns = store_all(c, c->anon.p, key);
	ok = host_holds(c, c->anon.p, key);
	host_reap(child);
	return ok ? ns / (double)c->pages : -1;
}

static void cow_row(const struct bench *b, struct cow *c, const char *name, bool fork, const char *note)
{
	struct row row = {.suite = "fault",
			  .name = name,
			  .unit = "ns",
			  .peer = fork ? "anonymous memory after fork()" : "MAP_PRIVATE of a memfd"};
	struct turns t;

	row.goal = fork || c->fresh || c->beside ? GOAL_NONE : GOAL_RATIO;
	row.limit = 2.5;
	row_note(&row, "%u MiB, %s", (unsigned)(c->bytes / MIB), note);
	if (fork)
		c->anon = host_anon(c->bytes);
	else
		c->memfd = host_memfd(c->bytes);
	if (!c->fresh)
		c->g = populated(c);
	t = take_turns(b, sample_kage, c, fork ? sample_fork : sample_private, c);
	if (!c->fresh)
		guest_destroy(&c->g);
	host_release(fork ? &c->anon : &c->memfd);
	report_turns(&row, &t);
}

void bench_cow(const struct bench *b)
{
	uint64_t bytes = b->smoke ? 8 * MIB : b->quick ? 128 * MIB : GIB;
	struct cow c = {.bytes = bytes, .pages = bytes / PAGE, .reserve = KEEP};

	cow_row(b, &c, "cow-break", false, "in order, mapped by blocks, recycled pool, one vCPU running");
	cow_row(b, &c, "cow-break-fork", true, "the same against fork()");
	c.random = true;
	cow_row(b, &c, "cow-break-random", false, "pages in random order");
	c.random = false;
	c.beside = true;
	cow_row(b, &c, "cow-break-2", false,
		"in order, while another vCPU of the clone reads pages at random");
	c.beside = false;
	c.flags = KAGE_REGION_NOHUGE;
	cow_row(b, &c, "cow-break-4k", false, "in order, mapped in 4 KiB pieces");
	c = (struct cow){.bytes = bytes, .pages = bytes / PAGE, .fresh = true};
	cow_row(b, &c, "cow-break-empty", false, "new engine: refill of the empty pool included");
}
