/* SPDX-License-Identifier: MIT */
/*
 * Dirty logs: harvests of a guest of 16 GiB, and what tracking costs who writes.
 *
 * Harvest: kage_dirty_collect() of the whole guest into a bitmap of 512 KiB, which it
 * overwrites. Every 4 KiB entry is present; marks are made by
 * kage_vm_mark_dirty() (as a VMM or its devices report writes), since stores to all of it would need
 * 16 GiB. Rows of 512 MiB are real stores by a vCPU.
 */
#include <stdlib.h>
#include <string.h>

#include "kvmlog.h"
#include "scan.h"

#define SET	(512 * MIB) /* of the rows with stores */
#define TRAPPED (16 * MIB)  /* with traps that a thread resolves */

enum amount {
	CLEAN,
	PERCENT,
	ALL,
};

struct dirty {
	struct guest g;
	struct kage_dirty *log;
	uint64_t *bitmap;
	struct scan scan;
	struct kvmlog kvm;
	enum amount amount;
	/* rows with stores */
	struct kage_vcpu *v;
	uint64_t round;
};

static uint64_t pages_of(const struct dirty *d)
{
	return d->g.bytes / PAGE;
}

/* -- harvests ----------------------------------------------------------------------------- */

/* Page i of those that are written, of n; each is another one (an odd factor, modulo a power of two). */
static uint64_t chosen(const struct dirty *d, uint64_t i)
{
	return i * 0x9e3779b1u % pages_of(d) * PAGE;
}

static uint64_t amount_of(const struct dirty *d)
{
	return d->amount == CLEAN ? 0 : d->amount == ALL ? pages_of(d) : pages_of(d) / 100;
}

static bool bits_match(const struct dirty *d, uint64_t count)
{
	uint64_t bits = 0, missing = 0;

	for (uint64_t w = 0; w < (pages_of(d) + 63) / 64; w++)
		bits += (uint64_t)__builtin_popcountll(d->bitmap[w]);
	for (uint64_t i = 0; d->amount == PERCENT && i < count; i++) {
		uint64_t page = chosen(d, i) / PAGE;

		missing += !(d->bitmap[page / 64] >> page % 64 & 1);
	}
	return bits == count && missing == 0;
}

static int64_t collect(struct dirty *d)
{
	int r = kage_dirty_collect(d->log, 0, d->g.bytes, d->bitmap, (pages_of(d) + 63) / 64 * 8);

	must(r < 0 ? r : 0, "collect");
	return r;
}

static double sample_harvest(void *arg)
{
	struct dirty *d = arg;
	uint64_t count = amount_of(d);
	int64_t found;
	double ns;

	if (d->amount == ALL)
		must(kage_vm_mark_dirty(d->g.vm, 0, d->g.bytes), "mark");
	for (uint64_t i = 0; d->amount == PERCENT && i < count; i++)
		must(kage_vm_mark_dirty(d->g.vm, chosen(d, i), PAGE), "mark");
	memset(d->bitmap, 0xff, (pages_of(d) + 63) / 64 * 8);
	ns = cpu_ns();
	found = collect(d);
	ns = cpu_ns() - ns;
	return found == (int64_t)count && bits_match(d, count) ? ns / 1000 : -1;
}

static double sample_scan(void *arg)
{
	struct dirty *d = arg;
	uint64_t count = amount_of(d);
	int64_t found;
	double ns;

	if (d->amount == ALL)
		scan_protect(&d->scan, false);
	for (uint64_t i = 0; d->amount == PERCENT && i < count; i++)
		*(volatile uint64_t *)(d->scan.p + chosen(d, i)) = i;
	must(scan_take(&d->scan, &found, &ns), "PAGEMAP_SCAN");
	return found == (int64_t)count ? ns / 1000 : -1;
}

static double sample_kvmlog(void *arg)
{
	struct dirty *d = arg;
	uint64_t found;
	double ns;

	if (d->amount == ALL)
		kvmlog_fill(&d->kvm);
	found = kvmlog_take(&d->kvm, &ns);
	return found == amount_of(d) ? ns / 1000 : -1;
}

static void kvmlog_row(const struct bench *b, struct dirty *d, const char *name, enum amount amount,
		       const char *why)
{
	struct row row = {
	    .suite = "dirty", .name = name, .unit = "us", .peer = "KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG"};
	struct turns t;

	if (!why && amount == ALL && !d->kvm.manual)
		why = "no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2";
	if (why) {
		row_note(&row, "%s", why);
		report_skip(&row);
		return;
	}
	d->amount = amount;
	t = take_turns(b, sample_harvest, d, sample_kvmlog, d);
	row_note(
	    &row,
	    "%llu of %llu pages written; the peer's guest does not run, so nothing has to be write protected",
	    (unsigned long long)amount_of(d), (unsigned long long)pages_of(d));
	report_turns(&row, &t);
}

static void kvmlog_rows(const struct bench *b, struct dirty *d)
{
	const char *why = kvmlog_create(&d->kvm, d->g.bytes);

	kvmlog_row(b, d, "harvest-16g-clean-kvm", CLEAN, why);
	kvmlog_row(b, d, "harvest-16g-all-kvm", ALL, why);
	if (!why)
		kvmlog_destroy(&d->kvm);
}

static void harvest_row(const struct bench *b, struct dirty *d, const char *name, enum amount amount,
			const char *why)
{
	struct row row = {.suite = "dirty",
			  .name = name,
			  .unit = "us",
			  .goal = amount == CLEAN ? GOAL_MOST : GOAL_NONE,
			  .limit = 50,
			  .peer = why ? NULL : "PAGEMAP_SCAN"};
	struct turns t;

	d->amount = amount;
	t = take_turns(b, sample_harvest, d, why ? NULL : sample_scan, d);
	row_note(&row, "%llu of %llu pages written, every 4 KiB entry present%s%s",
		 (unsigned long long)amount_of(d), (unsigned long long)pages_of(d),
		 why ? "; without a peer: " : "", why ? why : "");
	report_turns(&row, &t);
}

static void harvest_rows(const struct bench *b)
{
	struct dirty d = {.g = guest_create(bench_size(b, 16 * GIB), KAGE_REGION_NOHUGE, 0)};
	const char *why = scan_create(&d.scan, d.g.bytes, true);

	must(guest_present(&d.g) == pages_of(&d) ? 0 : -1, "present entries");
	d.bitmap = must_map(malloc((pages_of(&d) + 63) / 64 * 8), "memory");
	must(kage_dirty_open(d.g.vm, KAGE_CFG(kage_dirty_config, .flags = KAGE_DIRTY_INITIALLY_SET), &d.log),
	     "log");
	must(collect(&d) == (int64_t)pages_of(&d) ? 0 : -1, "first harvest");
	harvest_row(b, &d, "harvest-16g-clean", CLEAN, why);
	harvest_row(b, &d, "harvest-16g-1pct", PERCENT, why);
	harvest_row(b, &d, "harvest-16g-all", ALL, why);
	kvmlog_rows(b, &d);
	kage_dirty_close(d.log);
	guest_destroy(&d.g);
	if (!why)
		scan_destroy(&d.scan);
	free(d.bitmap);
}

/* -- stores ---------------------------------------------------------------------------------- */

/* A store to each page in order; ns of CPU, or of wall time. */
static double store_all(struct dirty *d, double (*clock)(void))
{
	double ns = clock();

	d->round++;
	for (uint64_t at = 0; at < d->g.bytes; at += PAGE) {
		uint64_t v = at + d->round;

		must(kage_vcpu_store(d->v, at, &v, 8, NULL), "store");
	}
	return clock() - ns;
}

static double touch_all(struct dirty *d, double (*clock)(void))
{
	double ns = clock();

	for (uint64_t at = 0; at < d->g.bytes; at += PAGE)
		*(volatile uint64_t *)(d->scan.p + at) = at;
	return clock() - ns;
}

static bool stored(const struct dirty *d)
{
	uint64_t wrong = 0, seen = 0;

	for (uint64_t i = 0; i < 512; i++) {
		uint64_t at = mix(i) % pages_of(d) * PAGE;

		must(kage_vm_read(d->g.vm, at, &seen, 8), "read");
		wrong += seen != at + d->round;
	}
	return wrong == 0;
}

/* The first store to each page after a harvest. */
static double first_stores(struct dirty *d, double (*clock)(void))
{
	double ns;

	collect(d);
	ns = store_all(d, clock);
	return collect(d) == (int64_t)pages_of(d) && stored(d) ? ns / (double)pages_of(d) : -1;
}

static double sample_first(void *arg)
{
	return first_stores(arg, cpu_ns);
}

static double sample_first_wall(void *arg)
{
	return first_stores(arg, wall_ns);
}

static double sample_first_scan(void *arg)
{
	struct dirty *d = arg;
	int64_t found;
	double ns;

	must(scan_take(&d->scan, &found, NULL), "PAGEMAP_SCAN");
	ns = touch_all(d, cpu_ns);
	must(scan_take(&d->scan, &found, NULL), "PAGEMAP_SCAN");
	return found == (int64_t)pages_of(d) ? ns / (double)pages_of(d) : -1;
}

static double sample_first_trap(void *arg)
{
	struct dirty *d = arg;
	uint64_t before = d->scan.resolved;
	double ns;

	scan_protect(&d->scan, true);
	ns = touch_all(d, wall_ns);
	return d->scan.resolved - before == pages_of(d) ? ns / (double)pages_of(d) : -1;
}

/* Stores to pages that are dirty already. */
static double sample_again(void *arg)
{
	struct dirty *d = arg;
	double ns;

	collect(d);
	store_all(d, cpu_ns);
	ns = store_all(d, cpu_ns);
	return collect(d) == (int64_t)pages_of(d) && stored(d) ? ns / (double)pages_of(d) : -1;
}

/* With no log open. */
static double sample_untracked(void *arg)
{
	struct dirty *d = arg;
	double ns;

	kage_dirty_close(d->log);
	store_all(d, cpu_ns);
	ns = store_all(d, cpu_ns);
	must(kage_dirty_open(d->g.vm, KAGE_CFG(kage_dirty_config, .flags = KAGE_DIRTY_FINE), &d->log), "log");
	guest_settle(&d->g);
	return stored(d) ? ns / (double)pages_of(d) : -1;
}

static void stores_begin(struct dirty *d, uint64_t bytes)
{
	*d = (struct dirty){.g = guest_create(bytes, KAGE_REGION_NOHUGE, 0)};
	d->bitmap = must_map(malloc((pages_of(d) + 63) / 64 * 8), "memory");
	d->v = vcpu_flat(d->g.vm, 0);
	store_all(d, cpu_ns);
	must(kage_dirty_open(d->g.vm, KAGE_CFG(kage_dirty_config, .flags = KAGE_DIRTY_FINE), &d->log), "log");
}

static void stores_end(struct dirty *d)
{
	kage_dirty_close(d->log);
	kage_vcpu_destroy(d->v);
	guest_destroy(&d->g);
	free(d->bitmap);
}

static void store_rows(const struct bench *b)
{
	struct dirty d;
	const char *why;
	struct row row = {.suite = "dirty", .name = "write-cost", .unit = "ns"};
	struct turns t;

	stores_begin(&d, bench_size(b, SET));
	why = scan_create(&d.scan, d.g.bytes, true);
	t = take_turns(b, sample_first, &d, why ? NULL : sample_first_scan, &d);
	row.peer =
	    why ? NULL : "a store after PAGEMAP_SCAN, userfaultfd write protection that resolves itself";
	row_note(&row,
		 "a page: a vCPU's first store to each of %llu pages, in order, after a harvest; TLB misses "
		 "included%s%s",
		 (unsigned long long)pages_of(&d), why ? "; without a peer: " : "", why ? why : "");
	report_turns(&row, &t);
	t = take_turns(b, sample_again, &d, sample_untracked, &d);
	row = (struct row){.suite = "dirty", .name = "write-again", .unit = "ns", .peer = "no log is open"};
	row_note(&row, "a page: the same stores once more, to pages that are dirty");
	report_turns(&row, &t);
	if (!why)
		scan_destroy(&d.scan);
	stores_end(&d);
}

static void trap_row(const struct bench *b)
{
	struct row row = {.suite = "dirty",
			  .name = "write-cost-trap",
			  .unit = "ns",
			  .peer = "userfaultfd write protection, resolved by a thread"};
	const char *why;
	struct turns t;
	struct dirty d;

	stores_begin(&d, bench_size(b, TRAPPED));
	why = scan_create(&d.scan, d.g.bytes, false);
	if (!why)
		scan_resolver_start(&d.scan);
	else
		row.peer = NULL;
	t = take_turns(b, sample_first_wall, &d, why ? NULL : sample_first_trap, &d);
	row_note(&row, "wall time a page: as write-cost, of %llu pages%s%s", (unsigned long long)pages_of(&d),
		 why ? "; without a peer: " : "", why ? why : "");
	report_turns(&row, &t);
	if (!why) {
		scan_resolver_stop(&d.scan);
		scan_destroy(&d.scan);
	}
	stores_end(&d);
}

void bench_dirty(const struct bench *b)
{
	harvest_rows(b);
	store_rows(b);
	trap_row(b);
}
