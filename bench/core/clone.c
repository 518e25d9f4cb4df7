/* SPDX-License-Identifier: MIT */
/*
 * Clones of guests whose tables are full: every 4 KiB entry is present (made so
 * by read faults; no memory stands behind it, which a clone cannot tell).
 *
 * Work between timings (destroying clones, giving their tables back) is not
 * counted; destroying has a row of its own.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

#define BATCH 32   /* clones of one repetition */
#define SPOTS 1024 /* 2 MiB ranges written in one repetition of un-share */
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
	uint64_t guests = guest_stats(&f->g, NULL).guests;
	double ns;

	make_clones(f);
	ns = cpu_ns();
	drop_clones(f);
	ns = cpu_ns() - ns;
	guest_settle(&f->g);
	return guest_stats(&f->g, NULL).guests == guests ? ns / BATCH : -1;
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

static double sample_fork(void *arg)
{
	const struct host_memory *m = arg;
	double ns;
	struct host_child c = host_fork(&ns);

	host_reap(c);
	return *(volatile uint64_t *)(m->p + m->bytes - PAGE) == m->bytes - PAGE + 1 ? ns : -1;
}

/* -- un-sharing one leaf table ----------------------------------------------------------- */

struct unshare {
	struct full *f;
	struct series first, second; /* ns a write */
	unsigned rounds;
};

static double write_spots(struct kage_vm *vm, uint64_t offset, uint64_t v)
{
	double ns = cpu_ns();

	for (uint64_t i = 0; i < SPOTS; i++)
		must(kage_vm_write(vm, (i + 1) * SPAN + offset, &v, 8), "write");
	return (cpu_ns() - ns) / SPOTS;
}

static bool spots_hold(struct kage_vm *vm, uint64_t offset, uint64_t v)
{
	uint64_t seen = 0;
	bool ok = true;

	for (uint64_t i = 0; i < SPOTS; i++) {
		must(kage_vm_read(vm, (i + 1) * SPAN + offset, &seen, 8), "read");
		ok &= seen == v;
	}
	return ok;
}

/* First and second write in each of SPOTS ranges: the first un-shares a leaf table and breaks a page, the
 * second only breaks one. */
static double sample_unshare(void *arg)
{
	struct unshare *u = arg;
	struct full *f = u->f;
	struct kage_vm *clone = must_clone(f->g.vm);
	uint64_t before, tables, v = 0;
	double first, second;
	bool ok;

	must(kage_vm_write(clone, 0, &v, 8), "write"); /* the path to the first GiB's tables */
	before = guest_stats(&f->g, NULL).tables_unshared;
	first = write_spots(clone, 0, 2 + u->rounds);
	tables = guest_stats(&f->g, NULL).tables_unshared - before;
	second = write_spots(clone, PAGE, 3 + u->rounds);
	ok = spots_hold(clone, 0, 2 + u->rounds) && spots_hold(clone, PAGE, 3 + u->rounds) &&
	     spots_hold(f->g.vm, 0, 1) && spots_hold(f->g.vm, PAGE, 1) &&
	     guest_stats(&f->g, NULL).tables_unshared - before == tables;
	/* a leaf for each spot, and the tables above those beyond the first GiB */
	ok &= tables == SPOTS + ((SPOTS + 1) * SPAN - 1) / GIB;
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
	struct unshare u = {.f = f};
	struct row row = {
	    .suite = "clone", .name = "unshare-leaf", .unit = "ns", .goal = GOAL_MOST, .limit = 1500};
	struct turns t;
	uint64_t one = 1;

	for (uint64_t i = 0; i < 2 * SPOTS; i++)
		must(kage_vm_write(f->g.vm, (i / 2 + 1) * SPAN + (i & 1) * PAGE, &one, 8), "write");
	t = take_turns(b, sample_unshare, &u, NULL, NULL);
	row_note(&row, "first minus second write (8 bytes by kage_vm_write) in each of %u ranges of 2 MiB",
		 SPOTS);
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
	struct full f = {.g = guest_create(bytes, KAGE_REGION_NOHUGE, 0)};
	uint64_t entries = guest_present(&f.g), one = 1;

	must(entries == bytes / PAGE ? 0 : -EIO, "present entries");
	must(kage_vm_write(f.g.vm, 0, &one, 8), "write");
	return f;
}

static void size_rows(const struct bench *b, struct full *big, struct full *small)
{
	struct host_memory m = host_anon(GIB);
	struct turns t = take_turns(b, sample_clone, small, sample_fork, &m);
	struct row row = {.suite = "clone",
			  .name = "1g",
			  .unit = "ns",
			  .peer = "fork() of 1 GiB in 4 KiB pages",
			  .goal = GOAL_MOST,
			  .limit = 5000,
			  .note = "262,144 entries present"};

	report_turns(&row, &t);
	host_release(&m);
	t = take_turns(b, sample_clone, big, sample_clone, small);
	row = (struct row){.suite = "clone",
			   .name = "16g",
			   .unit = "ns",
			   .peer = "clone of 1 GiB",
			   .goal = GOAL_MOST,
			   .limit = 5000,
			   .note = "4,194,304 entries present"};
	report_turns(&row, &t);
	t = take_turns(b, sample_destroy, big, sample_destroy, small);
	row = (struct row){.suite = "clone",
			   .name = "16g-destroy",
			   .unit = "ns",
			   .peer = "destroy of a 1 GiB clone",
			   .note = "a clone that wrote nothing"};
	report_turns(&row, &t);
	t = take_turns(b, sample_first_write, big, sample_first_write, small);
	row = (struct row){.suite = "clone",
			   .name = "16g-first-write",
			   .unit = "ns",
			   .peer = "the same at 1 GiB",
			   .note = "8 bytes by kage_vm_write: every table of the path and one page"};
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
	struct full big = full_create(16 * GIB), small = full_create(GIB);

	size_rows(b, &big, &small);
	unshare_rows(b, &big);
	vcpu_rows(b, &big, &small);
	guest_destroy(&big.g);
	guest_destroy(&small.g);
}
