/* SPDX-License-Identifier: MIT */
/*
 * A guest writes to pages that it shares.
 *
 * cow-native: all of a guest's 32 MiB are shared with a clone; the guest reads
 * them, then writes to each page. Peer: the same guest on a plain MAP_PRIVATE
 * memfd, as a VMM restores a snapshot. Both are the kernel's break.
 *
 * cow-cycle: the whole way of a merged page, CPU a page: merging (steps of the
 * engine, all passes, the pages beside it that do not merge included), the
 * guest's write, reconciling, adopting with healing. `isolated`: every 16th page;
 * `dense`: every 4th; `runs`: whole 2 MiB. The guest writes the same to both pages of a pair, so
 * each repetition finds what the last one had.
 */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "kvm.h"

struct cow {
	struct subject *ours, *peer;
	uint64_t pages, round;
	/* cow-cycle */
	uint64_t stride, pair, merged; /* merged: pages that take part */
	struct series merge, write, reconcile, adopt, back, host;
	uint64_t mappings[3]; /* merged, before adopting, after */
};

/* CPU of a round in which the guest touches pages; < 0: something was wrong. */
static double touch(struct subject *s, const struct cow *c, uint64_t mode, uint64_t seed)
{
	struct guest_args args = {.program = GUEST_TOUCH,
				  .base = s->base,
				  .pages = c->pages,
				  .stride = c->stride,
				  .pair = c->pair,
				  .mode = mode,
				  .seed = seed};
	double ns = subject_round(s, &args);

	return args.count == c->merged ? ns : -1;
}

/* What the guest wrote is there. */
static bool written(struct subject *s, const struct cow *c, uint64_t seed)
{
	for (uint64_t i = 0; i < c->merged; i += i % 7 + 1)
		if (subject_word(s, s->base + i * c->stride * PAGE) !=
		    guest_word(guest_key(i, c->pair), seed))
			return false;
	return true;
}

/* -- native against plain ------------------------------------------------------------------------ */

static double sample_native(void *arg)
{
	struct cow *c = arg;
	uint64_t word, seed = ++c->round;
	struct kage_vm *clone;
	bool ok = true;
	double ns;

	must(kage_vm_clone(subject_vm(c->ours), NULL, &clone), "clone");
	ok &= touch(c->ours, c, GUEST_READ, 0) > 0;
	ns = touch(c->ours, c, GUEST_WRITE, seed);
	ok &= written(c->ours, c, seed);
	for (uint64_t i = 0; i < c->merged; i++) { /* the clone has what was there before */
		must(kage_vm_read(clone, c->ours->base + i * PAGE, &word, 8), "read");
		ok &= word == guest_word(guest_key(i, c->pair), seed - 1);
	}
	must(kage_vm_destroy(clone), "destroy clone");
	subject_reconcile(c->ours, KAGE_KVM_ADOPT);
	subject_settle(c->ours);
	ok &= subject_stats(c->ours).pages_host_private == 0;
	return ok ? ns / (double)c->merged : -1;
}

static double sample_plain(void *arg)
{
	struct cow *c = arg;
	uint64_t seed = ++c->round;
	const char *file = ram_file(c->peer->vmm->ram);
	bool ok;
	double ns;

	ram_settle(c->peer->vmm->ram);
	ok = touch(c->peer, c, GUEST_READ, 0) > 0;
	ns = touch(c->peer, c, GUEST_WRITE, seed);
	ok &= written(c->peer, c, seed);
	for (uint64_t i = 0; i < c->merged; i++)
		ok &= *(const volatile uint64_t *)(file + c->peer->base + i * c->stride * PAGE) !=
		      guest_word(guest_key(i, c->pair), seed);
	return ok ? ns / (double)c->merged : -1;
}

static void native_row(const struct bench *b, struct cow *c)
{
	struct row row = {.suite = "kvm",
			  .name = "cow-native",
			  .unit = "ns",
			  .peer = "the same guest on a plain MAP_PRIVATE memfd"};
	struct cow plain;
	struct turns t;

	c->stride = 1;
	c->merged = c->pages;
	c->pair = 0;
	c->round = 1;
	if (touch(c->ours, c, GUEST_WRITE, 1) < 0 || touch(c->peer, c, GUEST_WRITE, 1) < 0)
		row.isvoid = true;
	plain = *c; /* each has a count of its own: a check looks for what the round before wrote */
	t = take_turns(b, sample_native, c, sample_plain, &plain);
	row_note(
	    &row,
	    "CPU of the vCPU's thread for the first write to a page that it has read; %lu pages in order",
	    (unsigned long)c->merged);
	report_turns(&row, &t);
}

/* -- the whole way --------------------------------------------------------------------------------- */

static void fill_pairs(struct cow *c)
{
	for (uint64_t page = 0; page < c->pages; page++) {
		bool pairs = page % c->stride == 0;

		subject_fill(c->ours, page,
			     pairs ? guest_key(page / c->stride, c->pair) : (uint64_t)1 << 40 | page);
	}
}

static double sample_cycle(void *arg)
{
	struct cow *c = arg;
	uint64_t seed = ++c->round;
	double merge = subject_merge(c->ours), write, reconcile, adopt, n = (double)c->merged;
	bool ok = subject_stats(c->ours).pages_shared_merge == c->merged;

	c->mappings[0] = subject_info(c->ours).mappings;
	ok &= touch(c->ours, c, GUEST_READ, 0) > 0;
	write = touch(c->ours, c, GUEST_WRITE, seed);
	reconcile = subject_reconcile(c->ours, 0) + subject_settle(c->ours);
	ok &= subject_stats(c->ours).pages_shared_merge == 0;
	c->mappings[1] = subject_info(c->ours).mappings;
	adopt = subject_reconcile(c->ours, KAGE_KVM_ADOPT) + subject_settle(c->ours);
	c->mappings[2] = subject_info(c->ours).mappings;
	ok &= subject_stats(c->ours).pages_host_private == 0 && written(c->ours, c, seed) && write > 0;
	series_add(&c->merge, merge / n);
	series_add(&c->write, write / n);
	series_add(&c->reconcile, reconcile / n);
	series_add(&c->adopt, adopt / n);
	series_add(&c->back, (write + reconcile + adopt) / n);
	return ok ? (merge + write + reconcile + adopt) / n : -1;
}

/* The kernel alone: the guest's break, and beside it the same from this process. */
static double sample_bare(void *arg)
{
	struct cow *c = arg;
	struct vmm_ram *ram = c->peer->vmm->ram;
	char *p = vmm_ptr(c->peer->vmm, c->peer->base, c->pages * PAGE);
	uint64_t seed = ++c->round;
	double host, ns;
	bool ok;

	ram_renew(ram);
	host = cpu_ns();
	for (uint64_t i = 0; i < c->merged; i++)
		*(volatile uint64_t *)(p + i * c->stride * PAGE) = guest_word(guest_key(i, c->pair), seed);
	host = cpu_ns() - host;
	series_add(&c->host, host / (double)c->merged);
	ok = written(c->peer, c, seed);
	ram_renew(ram);
	ok &= touch(c->peer, c, GUEST_READ, 0) > 0;
	ns = touch(c->peer, c, GUEST_WRITE, seed + 1);
	return ok && written(c->peer, c, seed + 1) ? ns / (double)c->merged : -1;
}

static void part_row(const struct cow *c, const struct turns *t, const char *name, const char *part,
		     const struct series *s, const char *note)
{
	char text[64];
	struct row row = {.suite = "kvm",
			  .unit = "ns",
			  .value = series_median(s),
			  .spread = series_spread(s),
			  .isvoid = !t->ok};

	snprintf(text, sizeof(text), "%s-%s", name, part);
	row.name = text;
	row_note(&row, "%s", note);
	if (s == &c->back) {
		row.peer = "the guest's break of a plain MAP_PRIVATE page";
		row.peer_value = series_median(&t->peer);
		row.goal = GOAL_TIMES;
		row.limit = 2;
	}
	report_row(&row);
}

static void cycle_rows(const struct bench *b, struct cow *c, const char *name, uint64_t stride, uint64_t pair)
{
	struct row row = {.suite = "kvm",
			  .name = name,
			  .unit = "ns",
			  .goal = GOAL_TIMES,
			  .limit = 2,
			  .peer = "the guest's break of a plain MAP_PRIVATE page"};
	struct cow bare = *c;
	char host[64];
	struct turns t;

	bare.stride = c->stride = stride;
	bare.merged = c->merged = c->pages / stride;
	c->pair = pair;
	c->merge = c->write = c->reconcile = c->adopt = c->back = (struct series){0};
	fill_pairs(c);
	t = take_turns(b, sample_cycle, c, sample_bare, &bare);
	t.ok &= subject_sound(c->ours);
	row_note(&row,
		 "CPU a page, all threads: merge, write, reconcile, adopt; %lu merged pages; mappings %lu "
		 "merged, %lu "
		 "before adopting, %lu after",
		 (unsigned long)c->merged, (unsigned long)c->mappings[0], (unsigned long)c->mappings[1],
		 (unsigned long)c->mappings[2]);
	report_turns(&row, &t);
	snprintf(host, sizeof(host), "%s-host", name);
	row.name = host;
	row.peer = "this process's break of a plain MAP_PRIVATE page";
	row.isvoid = !t.ok;
	row.peer_value = series_median(&bare.host);
	row.note[0] = 0;
	report_row(&row);
	part_row(c, &t, name, "back", &c->back, "the same without merging");
	part_row(c, &t, name, "merge", &c->merge, "of it: steps of the engine until nothing more merges");
	part_row(c, &t, name, "write", &c->write,
		 "of it: the guest's write after a read, the kernel's break");
	part_row(c, &t, name, "reconcile", &c->reconcile,
		 "of it: kage_kvm_reconcile() and a step of the engine, which frees frames");
	part_row(c, &t, name, "adopt", &c->adopt, "of it: kage_kvm_reconcile(ADOPT) and a step");
}

/* -- how soon it is known ------------------------------------------------------------------------------ */

/* From the guest's last write until a reconcile has run and the statistics show it. Wall time. */
static double sample_delay(void *arg)
{
	struct cow *c = arg;
	uint64_t before, after;
	double ns;
	bool ok;

	subject_merge(c->ours);
	before = subject_stats(c->ours).pages_shared_merge;
	ok = touch(c->ours, c, GUEST_WRITE, ++c->round) > 0;
	ns = wall_ns();
	subject_reconcile(c->ours, 0);
	after = subject_stats(c->ours).pages_shared_merge;
	ns = wall_ns() - ns;
	ok &= before == c->merged && after == 0;
	subject_reconcile(c->ours, KAGE_KVM_ADOPT);
	subject_settle(c->ours);
	return ok ? ns / 1e6 : -1;
}

static void delay_row(const struct bench *b, struct cow *c)
{
	struct row row = {.suite = "kvm", .name = "cow-delay", .unit = "ms"};
	struct turns t;

	c->stride = 16;
	c->pair = 0;
	c->merged = c->pages / c->stride;
	fill_pairs(c);
	t = take_turns(b, sample_delay, c, NULL, NULL);
	row_note(&row,
		 "wall time of kage_kvm_reconcile() and kage_stats_get() after %lu writes to merged pages; "
		 "the period in "
		 "which the VMM reconciles comes on top",
		 (unsigned long)c->merged);
	report_turns(&row, &t);
}

void bench_cow(const struct bench *b)
{
	uint64_t set = (32 * MIB) >> (b->shift ? 1 : 0), bytes = set + 16 * MIB;
	struct cow c = {
	    .pages = set / PAGE, .ours = subject_kage(bytes), .peer = subject_plain(RAM_PRIVATE, bytes)};

	native_row(b, &c);
	subject_destroy(c.ours); /* a clone leaves memory elsewhere than at home */
	c.ours = subject_kage(bytes);
	ram_settle(c.peer->vmm->ram);
	cycle_rows(b, &c, "cow-cycle-isolated", 16, 0);
	cycle_rows(b, &c, "cow-cycle-dense", 4, 0);
	cycle_rows(b, &c, "cow-cycle-runs", 1, 9);
	delay_row(b, &c);
	subject_destroy(c.ours);
	subject_destroy(c.peer);
}
