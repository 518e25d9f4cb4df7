/* SPDX-License-Identifier: MIT */
/*
 * Regions come and go: some are mapped, each of their pages is written, all are
 * unmapped. Mapping and unmapping is timed, writing is not. Unmapping includes
 * the engine's steps until the memory is released.
 *
 * Peers: mmap() and munmap() of anonymous memory; Unicorn's uc_mem_map() and
 * uc_mem_unmap().
 */
#include <errno.h>
#include <stdio.h>
#include <sys/mman.h>

#include "unicorn.h"

#define BASE  (64 * GIB)
#define GAP   (4 * MIB) /* between regions */
#define COUNT 64

struct maps {
	struct guest g;
	uint64_t pages; /* of a region */
	unsigned count; /* of regions */
	uint32_t flags;
	int advice; /* on the peer's memory */
	uint64_t round;
	struct uni *uni;
};

static uint64_t place(const struct maps *m, unsigned i)
{
	return BASE + i * ((m->pages * PAGE + GAP + 2 * MIB - 1) & ~(2 * MIB - 1));
}

static uint64_t content(const struct maps *m, unsigned i, uint64_t at)
{
	return m->round + i + at;
}

static bool fill_regions(struct maps *m)
{
	struct kage_vcpu *v = vcpu_flat(m->g.vm, 0);
	uint64_t seen, wrong = 0, before = guest_stats(&m->g, m->g.vm).pages_mapped;

	for (unsigned i = 0; i < m->count; i++)
		for (uint64_t at = 0; at < m->pages * PAGE; at += PAGE) {
			uint64_t x = content(m, i, at);

			must(kage_vcpu_store(v, place(m, i) + at, &x, 8, NULL), "store");
			must(kage_vm_read(m->g.vm, place(m, i) + at, &seen, 8), "read");
			wrong += seen != x;
		}
	kage_vcpu_destroy(v);
	return wrong == 0 && guest_stats(&m->g, m->g.vm).pages_mapped - before >= m->count * m->pages;
}

static double sample_map(void *arg)
{
	struct maps *m = arg;
	double ns = cpu_ns(), begin;
	uint64_t seen;
	bool ok;

	m->round++;
	for (unsigned i = 0; i < m->count; i++)
		must(kage_vm_map(m->g.vm, KAGE_CFG(kage_region, .gpa = place(m, i), .len = m->pages * PAGE,
						   .flags = m->flags)),
		     "map");
	ns = cpu_ns() - ns;
	ok = fill_regions(m);
	begin = cpu_ns();
	for (unsigned i = 0; i < m->count; i++)
		must(kage_vm_unmap(m->g.vm, place(m, i), m->pages * PAGE), "unmap");
	guest_settle(&m->g);
	ns += cpu_ns() - begin;
	for (unsigned i = 0; i < m->count; i++)
		ok &= kage_vm_read(m->g.vm, place(m, i) + (m->pages - 1) * PAGE, &seen, 8) == KAGE_MMIO;
	return ok ? ns / m->count : -1;
}

static bool fill_host(struct maps *m, char *const p[COUNT])
{
	uint64_t wrong = 0;

	for (unsigned i = 0; i < m->count; i++) {
		must(madvise(p[i], m->pages * PAGE, m->advice) ? -errno : 0, "madvise");
		for (uint64_t at = 0; at < m->pages * PAGE; at += PAGE) {
			*(volatile uint64_t *)(p[i] + at) = content(m, i, at);
			wrong += *(volatile uint64_t *)(p[i] + at) != content(m, i, at);
		}
	}
	return wrong == 0;
}

static double sample_mmap(void *arg)
{
	struct maps *m = arg;
	char *p[COUNT];
	unsigned char there;
	double ns = cpu_ns(), begin;
	bool ok;

	m->round++;
	for (unsigned i = 0; i < m->count; i++)
		p[i] =
		    mmap(NULL, m->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ns = cpu_ns() - ns;
	for (unsigned i = 0; i < m->count; i++)
		must_map(p[i], "mmap");
	ok = fill_host(m, p);
	begin = cpu_ns();
	for (unsigned i = 0; i < m->count; i++)
		munmap(p[i], m->pages * PAGE);
	ns += cpu_ns() - begin;
	for (unsigned i = 0; i < m->count; i++)
		ok &= mincore(p[i], PAGE, &there) == -1 && errno == ENOMEM;
	return ok ? ns / m->count : -1;
}

static double sample_uni(void *arg)
{
	struct maps *m = arg;
	double ns = cpu_ns(), begin;
	uint64_t seen, wrong = 0;

	m->round++;
	for (unsigned i = 0; i < m->count; i++)
		uni_map(m->uni, place(m, i), m->pages * PAGE);
	ns = cpu_ns() - ns;
	for (unsigned i = 0; i < m->count; i++)
		for (uint64_t at = 0; at < m->pages * PAGE; at += PAGE) {
			seen = 0;
			wrong += !uni_write(m->uni, place(m, i) + at, content(m, i, at)) ||
				 !uni_read(m->uni, place(m, i) + at, &seen) || seen != content(m, i, at);
		}
	begin = cpu_ns();
	for (unsigned i = 0; i < m->count; i++)
		uni_unmap(m->uni, place(m, i), m->pages * PAGE);
	ns += cpu_ns() - begin;
	for (unsigned i = 0; i < m->count; i++)
		wrong += uni_read(m->uni, place(m, i), &seen);
	return wrong == 0 ? ns / m->count : -1;
}

static void map_row(const struct bench *b, struct maps *m, const char *name, const char *peer)
{
	struct row row = {.suite = "fault", .name = name, .unit = "ns", .peer = peer};
	struct turns t;
	bool uni = peer[0] == 'U';

	row_note(&row,
		 "a region of %llu pages mapped, and unmapped after each page was written; %u at a time; %s",
		 (unsigned long long)m->pages, m->count,
		 m->flags & KAGE_REGION_NOHUGE ? "entries of 4 KiB" : "blocks of 2 MiB");
	if (uni && unicorn_missing()) {
		row_note(&row, "%s", unicorn_missing());
		report_skip(&row);
		return;
	}
	if (uni)
		m->uni = uni_create(NULL, 0, 0, 0, 0);
	t = take_turns(b, sample_map, m, uni ? sample_uni : sample_mmap, m);
	if (uni)
		uni_destroy(m->uni);
	report_turns(&row, &t);
}

void bench_map(const struct bench *b)
{
	const struct bench few = {.quick = b->quick,
				  .smoke = b->smoke,
				  .reps = b->quick ? 1 : b->reps,
				  .shift = b->shift};
	static const struct {
		uint64_t pages;
		unsigned count;
	} cases[] = {{1, COUNT}, {512, 8}, {262144, 1}};
	char name[64];

	for (unsigned i = 0; i < LENGTH(cases); i++) {
		struct maps m = {.g = guest_create(2 * MIB, 0, 0),
				 .pages =
				     cases[i].pages > 512 ? bench_size(b, cases[i].pages) : cases[i].pages,
				 .count = cases[i].count,
				 .flags = KAGE_REGION_NOHUGE,
				 .advice = MADV_NOHUGEPAGE};

		snprintf(name, sizeof(name), "map-%llu", (unsigned long long)cases[i].pages);
		map_row(cases[i].pages > 512 ? &few : b, &m, name, "mmap(), munmap() of 4 KiB pages");
		snprintf(name, sizeof(name), "map-%llu-unicorn", (unsigned long long)cases[i].pages);
		map_row(cases[i].pages > 512 ? &few : b, &m, name, "Unicorn: uc_mem_map(), uc_mem_unmap()");
		if (cases[i].pages >= 512) {
			m.flags = 0;
			m.advice = MADV_HUGEPAGE;
			snprintf(name, sizeof(name), "map-%llu-block", (unsigned long long)cases[i].pages);
			map_row(cases[i].pages > 512 ? &few : b, &m, name, "mmap(), munmap() of huge pages");
		}
		guest_destroy(&m.g);
	}
}
