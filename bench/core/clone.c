/* SPDX-License-Identifier: MIT */
/*
 * Clones of guests whose tables are full: every 4 KiB entry is present (made so
 * by read faults; no memory stands behind it, which a clone cannot tell).
 *
 * fork() is that of a process beside this one which has no other memory (twin.c).
 *
 * Work between timings (destroying clones, giving their tables back) is not
 * counted; destroying has a row of its own.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"

#define BATCH 32   /* clones of one repetition */
#define DEEP  64   /* generations */
#define READS 4096 /* pages of the mapping that both sides read */
#define SPOTS 1024 /* 2 MiB ranges written in one repetition of un-share, if there are so many */
#define SPAN  (2 * MIB)

struct full {
	struct guest g;
	struct kage_vm *clone[BATCH];
	struct kage_vcpu *vcpu[BATCH];
	struct kage_vcpu *parent; /* of the parent, in rows that want one */
	uint64_t round;
	bool stores; /* first write by a vCPU */
};

static void make_clones(struct full *f)
{
	for (unsigned i = 0; i < BATCH; i++)
		must(kage_vm_clone(f->g.vm, NULL, &f->clone[i]), "clone");
}

static void drop_clones(struct full *f)
{
	for (unsigned i = 0; i < BATCH; i++)
		must(kage_vm_destroy(f->clone[i]), "destroy clone");
}

/* -- clone, destroy, first write ------------------------------------------------------- */

static double sample_clone(void *arg)
{
	struct full *f = arg;
	double ns = cpu_ns();
	uint64_t before = 0, seen = 1;

	make_clones(f);
	ns = cpu_ns() - ns;
	/* Each clone must read what the parent reads, in a page that holds something. */
	must(kage_vm_read(f->g.vm, 0, &before, 8), "read");
	for (unsigned i = 0; i < BATCH; i++) {
		must(kage_vm_read(f->clone[i], 0, &seen, 8), "read");
		if (seen != before || !seen)
			return -1;
	}
	drop_clones(f);
	guest_settle(&f->g);
	return ns / BATCH;
}

static double sample_destroy(void *arg)
{
	struct full *f = arg;
	uint64_t guests = guest_counters(&f->g, NULL).guests;
	double ns;

	make_clones(f);
	ns = cpu_ns();
	drop_clones(f);
	ns = cpu_ns() - ns;
	guest_settle(&f->g);
	return guest_counters(&f->g, NULL).guests == guests ? ns / BATCH : -1;
}

/* The parent's vCPU has the pages it writes in its TLB and shadow tables at each clone. */
static double sample_warm(void *arg)
{
	struct full *f = arg;
	double ns = 0;

	for (unsigned i = 0; i < BATCH; i++) {
		double begin;

		for (uint64_t at = 0; at < 512; at++) {
			uint64_t v = f->round + at + 1;

			must(kage_vcpu_store(f->parent, at * PAGE, &v, 8, NULL), "store");
		}
		begin = cpu_ns();
		must(kage_vm_clone(f->g.vm, NULL, &f->clone[i]), "clone");
		ns += cpu_ns() - begin;
	}
	for (unsigned i = 0; i < BATCH; i++) {
		uint64_t seen = 0;

		must(kage_vm_read(f->clone[i], 511 * PAGE, &seen, 8), "read");
		if (seen != f->round + 512)
			return -1;
	}
	f->round++;
	drop_clones(f);
	guest_settle(&f->g);
	return ns / BATCH;
}

static void write_first(struct full *f, unsigned i, uint64_t v)
{
	if (f->stores)
		must(kage_vcpu_store(f->vcpu[i], 0, &v, 8, NULL), "store");
	else
		must(kage_vm_write(f->clone[i], 0, &v, 8), "write");
}

static double sample_first_write(void *arg)
{
	struct full *f = arg;
	uint64_t original, seen;
	bool ok = true;
	double ns;

	must(kage_vm_read(f->g.vm, 0, &original, 8), "read");
	make_clones(f);
	for (unsigned i = 0; f->stores && i < BATCH; i++)
		f->vcpu[i] = vcpu_flat(f->clone[i], 0);
	ns = cpu_ns();
	for (unsigned i = 0; i < BATCH; i++)
		write_first(f, i, original + i + 1);
	ns = cpu_ns() - ns;
	for (unsigned i = 0; i < BATCH; i++) {
		must(kage_vm_read(f->clone[i], 0, &seen, 8), "read");
		ok &= seen == original + i + 1;
		if (f->stores)
			kage_vcpu_destroy(f->vcpu[i]);
	}
	must(kage_vm_read(f->g.vm, 0, &seen, 8), "read");
	drop_clones(f);
	guest_settle(&f->g);
	return ok && seen == original ? ns / BATCH : -1;
}

/* -- a private mapping of a file ------------------------------------------------------- */

struct mapping {
	struct full *f;
	int fd;
};

static double sample_mmap(void *arg)
{
	struct mapping *m = arg;
	char *p[BATCH];
	double ns = cpu_ns();
	bool ok = true;

	for (unsigned i = 0; i < BATCH; i++)
		p[i] =
		    mmap(NULL, m->f->g.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, m->fd, 0);
	ns = cpu_ns() - ns;
	for (unsigned i = 0; i < BATCH; i++) {
		ok &= *(volatile uint64_t *)must_map(p[i], "mmap") == 1;
		munmap(p[i], m->f->g.bytes);
	}
	return ok ? ns / BATCH : -1;
}

/* A clone, its vCPU, and a read of each of READS pages. */
static double sample_clone_read(void *arg)
{
	struct mapping *m = arg;
	uint64_t word = 0, sum = 0;
	struct kage_vm *clone;
	struct kage_vcpu *v;
	double ns = cpu_ns();

	must(kage_vm_clone(m->f->g.vm, NULL, &clone), "clone");
	v = vcpu_flat(clone, 0);
	for (uint64_t i = 0; i < READS; i++) {
		must(kage_vcpu_load(v, i * PAGE, &word, 8, NULL), "load");
		sum += word;
	}
	ns = cpu_ns() - ns;
	kage_vcpu_destroy(v);
	must(kage_vm_destroy(clone), "destroy clone");
	guest_settle(&m->f->g);
	return sum == READS ? ns / READS : -1;
}

static double sample_mmap_read(void *arg)
{
	struct mapping *m = arg;
	uint64_t bytes = m->f->g.bytes, sum = 0;
	double ns = cpu_ns();
	char *p = must_map(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, m->fd, 0),
			   "mmap");

	for (uint64_t i = 0; i < READS; i++)
		sum += *(volatile uint64_t *)(p + i * PAGE);
	ns = cpu_ns() - ns;
	munmap(p, bytes);
	return sum == READS ? ns / READS : -1;
}

static void mapping_rows(const struct bench *b, struct full *big)
{
	struct mapping m = {.f = big, .fd = memfd_create("kage-bench", MFD_CLOEXEC)};
	struct row row = {
	    .suite = "clone", .name = "16g-private", .unit = "ns", .peer = "mmap(MAP_PRIVATE) of a memfd"};
	struct turns t;
	uint64_t one = 1;

	must(m.fd < 0 || ftruncate(m.fd, (off_t)big->g.bytes) ? -errno : 0, "memfd");
	for (uint64_t i = 0; i < READS; i++) {
		must(pwrite(m.fd, &one, 8, (off_t)(i * PAGE)) == 8 ? 0 : -errno, "memfd");
		must(kage_vm_write(big->g.vm, i * PAGE, &one, 8), "write");
	}
	t = take_turns(b, sample_clone, big, sample_mmap, &m);
	row_note(&row, "the peer puts all work off until a page is touched");
	report_turns(&row, &t);
	t = take_turns(b, sample_clone_read, &m, sample_mmap_read, &m);
	row = (struct row){
	    .suite = "clone", .name = "16g-private-read", .unit = "ns", .peer = "the same of a mapping"};
	row_note(&row,
		 "a page: clone, its vCPU and loads of %u pages in order; the kernel maps 16 pages a fault",
		 READS);
	report_turns(&row, &t);
	close(m.fd);
}

/* -- generations ------------------------------------------------------------------------- */

/* A clone of a clone ... Each has written a page in a range of its own; all are alive. */
static void generation_rows(const struct bench *b, struct full *first)
{
	struct kage_vm *vm[DEEP];
	struct full last = {.g = first->g};
	struct row row = {.suite = "clone",
			  .name = "generations-64",
			  .unit = "ns",
			  .peer = "clone of the first",
			  .goal = GOAL_MOST,
			  .limit = 5000};
	struct turns t;

	for (uint64_t i = 0; i < DEEP; i++) {
		uint64_t v = i + 1;

		vm[i] = must_clone(last.g.vm);
		last.g.vm = vm[i];
		must(kage_vm_write(vm[i], i * SPAN % last.g.bytes, &v, 8), "write");
	}
	t = take_turns(b, sample_clone, &last, sample_clone, first);
	row_note(&row, "clone of the last of %u generations, each of which wrote a page in 2 MiB of its own",
		 DEEP);
	report_turns(&row, &t);
	t = take_turns(b, sample_first_write, &last, sample_first_write, first);
	row = (struct row){.suite = "clone",
			   .name = "generations-64-write",
			   .unit = "ns",
			   .peer = "in a clone of the first"};
	row_note(&row, "first write in such a clone: the tables of the path and one page");
	report_turns(&row, &t);
	for (unsigned i = 0; i < DEEP; i++)
		must(kage_vm_destroy(vm[i]), "destroy");
	guest_settle(&first->g);
}

/* -- un-sharing one leaf table ----------------------------------------------------------- */

struct unshare {
	struct full *f;
	struct series first, second; /* ns a write */
	unsigned rounds;
	uint64_t spots;
};

static double write_spots(struct kage_vm *vm, uint64_t spots, uint64_t offset, uint64_t v)
{
	double ns = cpu_ns();

	for (uint64_t i = 0; i < spots; i++)
		must(kage_vm_write(vm, (i + 1) * SPAN + offset, &v, 8), "write");
	return (cpu_ns() - ns) / (double)spots;
}

static bool spots_hold(struct kage_vm *vm, uint64_t spots, uint64_t offset, uint64_t v)
{
	uint64_t seen = 0;
	bool ok = true;

	for (uint64_t i = 0; i < spots; i++) {
		must(kage_vm_read(vm, (i + 1) * SPAN + offset, &seen, 8), "read");
		ok &= seen == v;
	}
	return ok;
}

/* First and second write in each of these ranges: the first un-shares a leaf table and breaks a page, the
 * second only breaks one. */
static double sample_unshare(void *arg)
{
	struct unshare *u = arg;
	struct full *f = u->f;
	struct kage_vm *clone = must_clone(f->g.vm);
	uint64_t before, tables, n = u->spots, v = 0;
	double first, second;
	bool ok;

	must(kage_vm_write(clone, 0, &v, 8), "write"); /* the path to the first GiB's tables */
	before = guest_counters(&f->g, NULL).tables_unshared;
	first = write_spots(clone, n, 0, 2 + u->rounds);
	tables = guest_counters(&f->g, NULL).tables_unshared - before;
	second = write_spots(clone, n, PAGE, 3 + u->rounds);
	ok = spots_hold(clone, n, 0, 2 + u->rounds) && spots_hold(clone, n, PAGE, 3 + u->rounds) &&
	     spots_hold(f->g.vm, n, 0, 1) && spots_hold(f->g.vm, n, PAGE, 1) &&
	     guest_counters(&f->g, NULL).tables_unshared - before == tables;
	/* a leaf for each spot, and the tables above those beyond the first GiB */
	ok &= tables == n + ((n + 1) * SPAN - 1) / GIB;
	must(kage_vm_destroy(clone), "destroy clone");
	guest_settle(&f->g);
	if (u->rounds++) {
		series_add(&u->first, first);
		series_add(&u->second, second);
	}
	return ok ? (first > second ? first - second : 0) : -1;
}

static void unshare_rows(const struct bench *b, struct full *f)
{
	struct unshare u = {.f = f, .spots = f->g.bytes / SPAN - 1};
	struct row row = {
	    .suite = "clone", .name = "unshare-leaf", .unit = "ns", .goal = GOAL_MOST, .limit = 1500};
	struct turns t;
	uint64_t one = 1;

	if (u.spots > SPOTS)
		u.spots = SPOTS;
	for (uint64_t i = 0; i < 2 * u.spots; i++)
		must(kage_vm_write(f->g.vm, (i / 2 + 1) * SPAN + (i & 1) * PAGE, &one, 8), "write");
	t = take_turns(b, sample_unshare, &u, NULL, NULL);
	row_note(&row, "first minus second write (8 bytes by kage_vm_write) in each of %u ranges of 2 MiB",
		 (unsigned)u.spots);
	report_turns(&row, &t);
	row = (struct row){.suite = "clone",
			   .name = "unshare-first-write",
			   .unit = "ns",
			   .isvoid = !t.ok,
			   .value = series_median(&u.first),
			   .spread = series_spread(&u.first),
			   .note = "un-share of one leaf table and COW break"};
	report_row(&row);
	row = (struct row){.suite = "clone",
			   .name = "unshare-second-write",
			   .unit = "ns",
			   .isvoid = !t.ok,
			   .value = series_median(&u.second),
			   .spread = series_spread(&u.second),
			   .note = "COW break alone, one page in each 2 MiB"};
	report_row(&row);
}

/* -- rows ------------------------------------------------------------------------------------ */

static struct full full_create(uint64_t bytes)
{
	uint64_t entries, one = 1;
	struct full f = {.g = guest_measured(bytes, KAGE_REGION_NOHUGE, &entries)};

	must(entries == bytes / PAGE ? 0 : -EIO, "present entries");
	must(kage_vm_write(f.g.vm, 0, &one, 8), "write");
	return f;
}

static void present_note(struct row *row, const struct full *f)
{
	row_note(row, "%llu entries of 4 KiB present", (unsigned long long)(f->g.bytes / PAGE));
}

static void clone_row(const struct bench *b, const char *name, struct full *f, struct twin *twin,
		      const char *peer)
{
	struct turns t = take_turns(b, sample_clone, f, sample_twin_fork, twin);
	struct row row = {
	    .suite = "clone", .name = name, .unit = "ns", .peer = peer, .goal = GOAL_MOST, .limit = 5000};
	double times = series_median(&t.peer) / series_median(&t.ours);

	present_note(&row, f);
	if (f->g.bytes >= 256 * GIB)
		row_note(&row, "%llu entries of 4 KiB present; goal >= 10000x %s",
			 (unsigned long long)(f->g.bytes / PAGE), times >= 10000 ? "met" : "MISSED");
	report_turns(&row, &t);
}

/* The largest guest is not taken apart: its 67 million entries take seconds, the end of the process does not. */
static void largest_row(const struct bench *b, struct twin *twin)
{
	struct full f = full_create(bench_size(b, 256 * GIB));

	clone_row(b, "256g", &f, twin, "fork() of 16 GiB in 4 KiB pages");
}

static void size_rows(const struct bench *b, struct full *big, struct full *small, struct twin *fork_big)
{
	struct twin fork_small = twin_start(TWIN_REAL, small->g.bytes);
	struct turns t;
	struct row row;

	clone_row(b, "1g", small, &fork_small, "fork() of 1 GiB in 4 KiB pages");
	twin_stop(&fork_small);
	clone_row(b, "16g", big, fork_big, "fork() of 16 GiB in 4 KiB pages");
	largest_row(b, fork_big);
	t = take_turns(b, sample_destroy, big, sample_destroy, small);
	row = (struct row){.suite = "clone",
			   .name = "16g-destroy",
			   .unit = "ns",
			   .peer = "destroy of a 1 GiB clone",
			   .note = "a clone that wrote nothing"};
	report_turns(&row, &t);
	t = take_turns(b, sample_first_write, big, sample_twin_write, fork_big);
	row = (struct row){
	    .suite = "clone",
	    .name = "16g-first-write",
	    .unit = "ns",
	    .peer = "first writes after fork() of 16 GiB",
	    .note = "8 bytes by kage_vm_write: every table of the path and one page. fork() has copied the "
		    "tables before"};
	report_turns(&row, &t);
}

static void vcpu_rows(const struct bench *b, struct full *big, struct full *small)
{
	struct row row = {.suite = "clone",
			  .name = "16g-first-store",
			  .unit = "ns",
			  .peer = "the same at 1 GiB",
			  .note = "8 bytes by a new vCPU: also its shadow tables"};
	struct turns t;

	big->stores = small->stores = true;
	t = take_turns(b, sample_first_write, big, sample_first_write, small);
	report_turns(&row, &t);
	big->parent = vcpu_flat(big->g.vm, 0);
	small->parent = vcpu_flat(small->g.vm, 0);
	t = take_turns(b, sample_warm, big, sample_warm, small);
	row = (struct row){
	    .suite = "clone",
	    .name = "16g-warm",
	    .unit = "ns",
	    .peer = "the same at 1 GiB",
	    .goal = GOAL_MOST,
	    .limit = 5000,
	    .note = "the parent's vCPU wrote 512 pages since the last clone; includes the clock, ~0.5 us"};
	report_turns(&row, &t);
	kage_vcpu_destroy(big->parent);
	kage_vcpu_destroy(small->parent);
}

void bench_clone(const struct bench *b)
{
	struct twin twin = twin_start(TWIN_MANY, bench_size(b, 16 * GIB));
	struct full big = full_create(bench_size(b, 16 * GIB)), small = full_create(bench_size(b, GIB));

	size_rows(b, &big, &small, &twin);
	mapping_rows(b, &big);
	generation_rows(b, &big);
	unshare_rows(b, &big);
	vcpu_rows(b, &big, &small);
	guest_destroy(&big.g);
	guest_destroy(&small.g);
	idle_row(b, &twin);
	twin_stop(&twin);
}
