/* SPDX-License-Identifier: MIT */
/*
 * First touches of a new region, and writes to pages whose protection was
 * lifted. Peers: anonymous memory, with the same order of accesses.
 *
 * First touch: each repetition maps a region anew and unmaps it after; steps
 * give its memory back to the host, so both sides get theirs from the kernel,
 * which clears it.
 */
#include <errno.h>
#include <stdio.h>
#include <sys/mman.h>

#include "core.h"

#define BASE (4 * GIB)

struct touch {
	struct guest g;
	struct kage_vcpu *v;
	char *p; /* the peer's */
	uint64_t bytes;
	uint32_t flags; /* of the region */
	int advice;	/* on the peer's memory */
	uint64_t round;
};

static double store_each(struct touch *t, uint64_t key)
{
	double ns = cpu_ns();

	for (uint64_t at = 0; at < t->bytes; at += PAGE) {
		uint64_t v = at + key;

		must(kage_vcpu_store(t->v, BASE + at, &v, 8, NULL), "store");
	}
	return cpu_ns() - ns;
}

/* Each page holds its key, and nothing else where it is new. */
static bool each_holds(struct touch *t, uint64_t key)
{
	uint64_t wrong = 0;

	for (uint64_t at = 0; at < t->bytes; at += PAGE) {
		uint64_t seen[2] = {0};

		must(kage_vm_read(t->g.vm, BASE + at, seen, sizeof(seen)), "read");
		wrong += seen[0] != at + key || seen[1] != 0;
	}
	return wrong == 0;
}

static void map_region(struct touch *t)
{
	must(kage_vm_map(t->g.vm, KAGE_CFG(kage_region, .gpa = BASE, .len = t->bytes, .flags = t->flags)),
	     "map");
	t->v = vcpu_flat(t->g.vm, 0);
}

static void unmap_region(struct touch *t)
{
	kage_vcpu_destroy(t->v);
	must(kage_vm_unmap(t->g.vm, BASE, t->bytes), "unmap");
	guest_settle(&t->g);
}

static double sample_touch(void *arg)
{
	struct touch *t = arg;
	uint64_t key = ++t->round, before, faults;
	double ns;
	bool ok;

	map_region(t);
	before = guest_counters(&t->g, t->g.vm).faults;
	ns = store_each(t, key);
	faults = guest_counters(&t->g, t->g.vm).faults - before;
	ok = each_holds(t, key) && faults >= t->bytes / (t->flags & KAGE_REGION_NOHUGE ? PAGE : 2 * MIB);
	unmap_region(t);
	return ok ? ns / (double)(t->bytes / PAGE) : -1;
}

static double host_store_each(struct touch *t, uint64_t key)
{
	double ns = cpu_ns();

	for (uint64_t at = 0; at < t->bytes; at += PAGE)
		*(volatile uint64_t *)(t->p + at) = at + key;
	return cpu_ns() - ns;
}

static bool host_each_holds(struct touch *t, uint64_t key)
{
	uint64_t wrong = 0;

	for (uint64_t at = 0; at < t->bytes; at += PAGE)
		wrong += *(volatile uint64_t *)(t->p + at) != at + key ||
			 *(volatile uint64_t *)(t->p + at + 8) != 0;
	return wrong == 0;
}

static char *host_map(const struct touch *t)
{
	/* room to begin at a border of 2 MiB, as regions do */
	char *p = must_map(
	    mmap(NULL, t->bytes + 2 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
	    "mmap");
	uint64_t skip = -(uintptr_t)p & (2 * MIB - 1);

	if (skip)
		munmap(p, skip);
	munmap(p + skip + t->bytes, 2 * MIB - skip);
	must(madvise(p + skip, t->bytes, t->advice) ? -errno : 0, "madvise");
	return p + skip;
}

static double sample_touch_host(void *arg)
{
	struct touch *t = arg;
	uint64_t key = ++t->round;
	double ns;
	bool ok;

	t->p = host_map(t);
	ns = host_store_each(t, key);
	ok = host_each_holds(t, key);
	munmap(t->p, t->bytes);
	return ok ? ns / (double)(t->bytes / PAGE) : -1;
}

static void touch_row(const struct bench *b, const char *name, uint32_t flags, int advice, const char *peer,
		      const char *note)
{
	struct touch t = {.g = guest_create(2 * MIB, 0, 0),
			  .bytes = bench_size(b, b->quick ? 128 * MIB : GIB),
			  .flags = flags,
			  .advice = advice};
	struct row row = {.suite = "fault", .name = name, .unit = "ns", .peer = peer};
	struct turns turns = take_turns(b, sample_touch, &t, sample_touch_host, &t);

	row_note(&row, "a page of %llu MiB in order; %s", (unsigned long long)(t.bytes / MIB), note);
	report_turns(&row, &turns);
	guest_destroy(&t.g);
}

/* -- protection ----------------------------------------------------------------------- */

static double sample_upgrade(void *arg)
{
	struct touch *t = arg;
	uint64_t key = ++t->round, sum = 0;
	double ns;
	bool ok;

	store_each(t, key);
	must(kage_vm_protect(t->g.vm, BASE, t->bytes, KAGE_READ | KAGE_EXEC), "protect");
	for (uint64_t at = 0; at < t->bytes; at += PAGE) {
		uint64_t seen = 0;

		must(kage_vcpu_load(t->v, BASE + at, &seen, 8, NULL), "load");
		sum += seen - at - key;
	}
	ok = sum == 0 && kage_vcpu_store(t->v, BASE, &key, 8, NULL) == KAGE_MMIO &&
	     kage_vcpu_store(t->v, BASE + t->bytes - PAGE, &key, 8, NULL) == KAGE_MMIO;
	ns = cpu_ns();
	must(kage_vm_protect(t->g.vm, BASE, t->bytes, KAGE_RWX), "protect");
	ns = cpu_ns() - ns;
	key = ++t->round;
	ns += store_each(t, key);
	return ok && each_holds(t, key) ? ns / (double)(t->bytes / PAGE) : -1;
}

static double sample_upgrade_host(void *arg)
{
	struct touch *t = arg;
	uint64_t key = ++t->round, sum = 0;
	double ns;

	host_store_each(t, key);
	must(mprotect(t->p, t->bytes, PROT_READ) ? -errno : 0, "mprotect");
	for (uint64_t at = 0; at < t->bytes; at += PAGE)
		sum += *(volatile uint64_t *)(t->p + at) - at - key;
	ns = cpu_ns();
	must(mprotect(t->p, t->bytes, PROT_READ | PROT_WRITE) ? -errno : 0, "mprotect");
	ns = cpu_ns() - ns;
	key = ++t->round;
	ns += host_store_each(t, key);
	return sum == 0 && host_each_holds(t, key) ? ns / (double)(t->bytes / PAGE) : -1;
}

static void upgrade_row(const struct bench *b, const char *name, uint32_t flags, const char *note)
{
	struct touch t = {.g = guest_create(2 * MIB, 0, 0),
			  .bytes = bench_size(b, 256 * MIB),
			  .flags = flags,
			  .advice = MADV_NOHUGEPAGE};
	struct row row = {.suite = "fault", .name = name, .unit = "ns", .peer = "mprotect() of 4 KiB pages"};
	struct turns turns;

	map_region(&t);
	t.p = host_map(&t);
	turns = take_turns(b, sample_upgrade, &t, sample_upgrade_host, &t);
	row_note(&row, "a page of %llu MiB: write permission for all, then a store to each; %s",
		 (unsigned long long)(t.bytes / MIB), note);
	report_turns(&row, &turns);
	munmap(t.p, t.bytes);
	unmap_region(&t);
	guest_destroy(&t.g);
}

void bench_touch(const struct bench *b)
{
	touch_row(b, "first-touch", 0, MADV_NOHUGEPAGE, "anonymous memory, 4 KiB pages",
		  "Kage maps 2 MiB a fault where memory is new");
	touch_row(b, "first-touch-huge", 0, MADV_HUGEPAGE, "anonymous memory, huge pages",
		  "the kernel's clearing is nearly all of both");
	touch_row(b, "first-touch-4k", KAGE_REGION_NOHUGE, MADV_NOHUGEPAGE, "anonymous memory, 4 KiB pages",
		  "an entry, a fault each");
	upgrade_row(b, "protect-upgrade", 0, "mapped by blocks");
	upgrade_row(b, "protect-upgrade-4k", KAGE_REGION_NOHUGE, "mapped in 4 KiB pieces");
}
