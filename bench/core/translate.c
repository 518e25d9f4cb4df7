/* SPDX-License-Identifier: MIT */
/*
 * Accesses that the TLB answers, or the shadow tables, by working set; against
 * the same accesses through a host pointer, and Unicorn's where the goals name it.
 */
#include <errno.h>
#include <stdio.h>

#include "access.h"

#define DATA	    (64 * MIB)
#define CODE	    (2 * MIB) /* of Unicorn */
#define TABLES	    (2 * MIB)
#define GUEST_BYTES (DATA + CODE + TABLES)
#define FAR	    (4 * GIB)
#define GVA_PAGED   ((uint64_t)1 << 46)

/* -- rows ------------------------------------------------------------------------------ */

static void measure(const struct bench *b, struct row *row, struct work *ours)
{
	struct work peer = *ours;
	struct turns t;

	peer.mode = RAW;
	ours->n >>= b->shift;
	peer.n = ours->n;
	access_fill(ours->lane, ours->shape, ours->dependent);
	t = take_turns(b, access_sample, ours, access_sample, &peer);
	row->suite = "translate";
	row->unit = "ns";
	row->peer = "raw access";
	report_turns(row, &t);
}

static const struct set {
	const char *name; /* in the case; none for the first */
	uint64_t bytes;
	enum shape shape;
	uint64_t n, n_dependent;
	const char *note;
} sets[] = {
    {"", 16 << 10, STRIDE, 4 << 20, 2 << 20, "16 KiB"},
    {"-256k", 256 << 10, STRIDE, 4 << 20, 1 << 20, "256 KiB"},
    {"-4m", 4 << 20, RANDOM, 2 << 20, 1 << 19, "4 MiB at random"},
    {"-64m", 64 << 20, RANDOM, 1 << 19, 1 << 17,
     "64 MiB at random: all that the TLB of 16,384 entries reaches"},
};

static void hit_row(const struct bench *b, struct lane *l, const struct set *s, struct work w, bool paged)
{
	static const char *const names[] = {"load", "store", "fetch"};
	bool beyond = s->bytes > MIB;
	struct row row = {.goal = beyond ? GOAL_TIMES : GOAL_EXTRA,
			  .limit = beyond	 ? 1.5
				   : w.dependent ? 4
						 : 1.5};
	char name[64];

	snprintf(name, sizeof(name), "hit-%s%s%s%s%s", names[w.op], w.dependent ? "-dep" : "", s->name,
		 w.mode == ENTER ? "-enter" : "", paged ? "-paged" : "");
	row.name = name;
	if (w.mode == EACH && !paged && w.op == LOAD && !w.dependent)
		row_note(&row, "%s", s->note);
	l->bytes = s->bytes;
	w.lane = l;
	w.shape = s->shape;
	w.n = w.dependent ? s->n_dependent : s->n;
	measure(b, &row, &w);
}

static void hit_rows(const struct bench *b, struct lane *l, bool paged)
{
	for (unsigned i = 0; i < LENGTH(sets); i++)
		for (unsigned op = LOAD; op <= STORE; op++)
			for (unsigned dependent = 0; dependent < 2; dependent++)
				for (unsigned mode = EACH; mode <= ENTER; mode++)
					hit_row(b, l, &sets[i],
						(struct work){.mode = mode, .op = op, .dependent = dependent},
						paged);
	for (unsigned dependent = 0; dependent < 2; dependent++)
		hit_row(b, l, &sets[0], (struct work){.mode = EACH, .op = FETCH, .dependent = dependent},
			paged);
}

/*
 * One line in each of many pages: what a TLB of the usual size misses. `name` miss-warm: with the default
 * table, which holds them all; miss-shadow: with one of 512 entries, so that nearly every access goes to the
 * shadow tables.
 */
static void miss_rows(const struct bench *b, struct lane *l, const char *what, const char *kind)
{
	for (unsigned i = 0; i < 4; i++) {
		bool dependent = i & 1;
		uint64_t pages = i & 2 ? 16384 : 4096;
		struct work w = {.lane = l,
				 .mode = EACH,
				 .op = LOAD,
				 .shape = PAGES,
				 .dependent = dependent,
				 .n = dependent ? 1 << 18 : 1 << 20};
		struct row row = {0};
		char name[64];

		snprintf(name, sizeof(name), "%s%s%s%s", what, dependent ? "-dep" : "", i & 2 ? "-16384" : "",
			 kind);
		row.name = name;
		row_note(&row, "%s of %llu pages at random, one line each",
			 dependent ? "dependent loads" : "loads", (unsigned long long)pages);
		l->bytes = pages * PAGE;
		measure(b, &row, &w);
	}
}

/* -- Unicorn ------------------------------------------------------------------------------ */

static void uni_row(const struct bench *b, struct lane *l, uint64_t tables, struct work w, const char *name,
		    double goal)
{
	struct row row = {.suite = "translate",
			  .name = name,
			  .unit = "ns",
			  .peer = "Unicorn",
			  .goal = goal > 0 ? GOAL_RATIO : GOAL_NONE,
			  .limit = goal};
	struct work peer;
	struct turns t;

	if (unicorn_missing()) {
		row_note(&row, "%s", unicorn_missing());
		report_skip(&row);
		return;
	}
	w.lane = l;
	w.mode = EACH;
	w.n >>= b->shift;
	peer = w;
	peer.uni = uni_create(l->raw, GUEST_BYTES, l->gva, tables, DATA);
	access_fill(l, w.shape, w.dependent);
	t = take_turns(b, access_sample, &w, uni_sample, &peer);
	row_note(&row, "guest code in a loop%s",
		 w.dependent	    ? ""
		 : w.shape == PAGES ? "; of the peer's time some ns compute addresses"
				    : "");
	report_turns(&row, &t);
	uni_destroy(peer.uni);
}

/* The rows of the hits that goals compare with Unicorn, and all misses. `narrow`: the lane with a small TLB.
 */
static void uni_rows(const struct bench *b, struct lane *l, struct lane *narrow, uint64_t tables, bool paged)
{
	static const char *const ops[] = {"load", "store"};
	const char *kind = paged ? "-paged" : "";
	char name[64];

	l->bytes = sets[0].bytes;
	for (unsigned i = 0; i < 4; i++) {
		struct work w = {.op = i & 1, .dependent = i & 2, .shape = STRIDE, .n = 1 << 20};

		snprintf(name, sizeof(name), "hit-%s%s%s-unicorn", ops[i & 1], i & 2 ? "-dep" : "", kind);
		uni_row(b, l, tables, w, name, i & 1 ? 20 : 0);
	}
	for (unsigned i = 0; i < 12; i++) {
		uint64_t pages = i & 1 ? 16384 : 4096;
		struct lane *lane = i < 8 ? l : narrow;
		struct work w = {.op = i & 4 && i < 8 ? STORE : LOAD,
				 .dependent = i & 2,
				 .shape = PAGES,
				 .n = 1 << 18,
				 .pages = pages};

		lane->bytes = pages * PAGE;
		snprintf(name, sizeof(name), "%s%s%s%s%s-unicorn", i < 8 ? "miss-warm" : "miss-shadow",
			 w.op == STORE ? "-store" : "", w.dependent ? "-dep" : "", i & 1 ? "-16384" : "",
			 kind);
		uni_row(b, lane, tables, w, name, i >= 8 || w.op == STORE ? 0 : paged ? 20 : 9);
	}
}

/* -- 4 GiB ---------------------------------------------------------------------------------- */

static void far_row(const struct bench *b, struct lane *l, const char *name, struct work w, double goal,
		    const char *note)
{
	struct work peer;
	struct turns t;
	struct row row = {.suite = "translate",
			  .name = name,
			  .unit = "ns",
			  .peer = "raw access",
			  .goal = goal > 0 ? GOAL_TIMES : GOAL_NONE,
			  .limit = goal};

	w.lane = l;
	w.n >>= b->shift;
	peer = w;
	peer.mode = RAW;
	t = take_turns(b, access_sample, &w, access_sample, &peer);
	row_note(&row, "%s", note);
	report_turns(&row, &t);
}

/* More than any table of the default size reaches: guest pages of 4 KiB, or of 2 MiB. */
static void far_rows(const struct bench *b, struct lane *l, const char *size, uint64_t entries)
{
	char name[64], note[160];

	for (unsigned i = 0; i < 4; i++) {
		struct work w = {
		    .mode = EACH, .op = i & 2 ? STORE : LOAD, .shape = i & 1 ? LINES : PAGES, .n = 1 << 20};

		snprintf(name, sizeof(name), "far-%s-%s%s", i & 2 ? "store" : "load", size,
			 i & 1 ? "-seq" : "");
		snprintf(note, sizeof(note), "%llu MiB, %s; %llu guest entries present, TLB of 16,384",
			 (unsigned long long)(l->bytes / MIB),
			 i & 1 ? "line by line" : "a line of a page at random", (unsigned long long)entries);
		far_row(b, l, name, w, 0, note);
	}
}

/* A TLB of as many entries as the guest has pages: hits, though of a table of 32 MiB. */
static void far_hit_rows(const struct bench *b, struct lane *l)
{
	struct lane touch = *l;
	struct work once = {.lane = &touch, .mode = EACH, .op = LOAD, .shape = LINES, .n = l->bytes / 64};
	static const char note[] = "4 GiB at random, a line of a page; TLB of 1,048,576 entries, 32 MiB";

	must(access_sample(&once) < 0 ? -EIO : 0, "contents");
	far_row(b, l, "hit-load-4g", (struct work){.mode = EACH, .op = LOAD, .shape = PAGES, .n = 1 << 20},
		1.5, note);
	far_row(b, l, "hit-store-4g", (struct work){.mode = EACH, .op = STORE, .shape = PAGES, .n = 1 << 20},
		1.5, note);
	access_fill(l, PAGES, true);
	far_row(b, l, "hit-load-dep-4g",
		(struct work){.mode = EACH, .op = LOAD, .shape = PAGES, .dependent = true, .n = 1 << 19}, 1.5,
		note);
}

static void bench_far(const struct bench *b)
{
	uint64_t bytes = bench_size(b, FAR), tables = bytes, large = bytes + 32 * MIB;
	struct guest g = guest_create(bytes + 64 * MIB, 0, 0);
	struct lane flat = {.raw = guest_raw(&g, bytes), .bytes = bytes}, lane;
	uint64_t entries;

	access_fill(&flat, LINES, false);
	entries = guest_tables(&g, (struct guest_map){.gva = GVA_PAGED, .bytes = bytes, .tables = tables});
	lane = flat;
	lane.gva = GVA_PAGED;
	lane.v = vcpu_paged(g.vm, tables, 0);
	far_rows(b, &lane, "4k", entries);
	kage_vcpu_destroy(lane.v);
	access_fill(&flat, LINES, false);
	entries = guest_tables(
	    &g, (struct guest_map){.gva = GVA_PAGED, .bytes = bytes, .tables = large, .large = true});
	lane.v = vcpu_paged(g.vm, large, 0);
	far_rows(b, &lane, "2m", entries);
	kage_vcpu_destroy(lane.v);
	access_fill(&flat, LINES, false);
	flat.v = vcpu_flat(g.vm, 20);
	far_hit_rows(b, &flat);
	kage_vcpu_destroy(flat.v);
	guest_unraw(&g, bytes);
	guest_destroy(&g);
}

/* ------------------------------------------------------------------------------------------- */

void bench_translate(const struct bench *b)
{
	uint64_t tables = DATA + CODE;
	struct guest blocks = guest_create(GUEST_BYTES, 0, 0),
		     pieces = guest_create(GUEST_BYTES, KAGE_REGION_NOHUGE, 0);
	struct lane flat = {.raw = guest_raw(&blocks, GUEST_BYTES)},
		    small = {.raw = guest_raw(&pieces, GUEST_BYTES)};
	struct lane paged = {.raw = flat.raw, .gva = GVA_PAGED};
	struct lane narrow = small, narrow_paged = paged;

	guest_tables(&blocks, (struct guest_map){.gva = GVA_PAGED, .bytes = DATA + CODE, .tables = tables});
	flat.v = vcpu_flat(blocks.vm, 0);
	paged.v = vcpu_paged(blocks.vm, tables, 0);
	small.v = vcpu_flat(pieces.vm, 0);
	narrow.v = vcpu_flat(pieces.vm, 9);
	narrow_paged.v = vcpu_paged(blocks.vm, tables, 9);
	hit_rows(b, &flat, false);
	hit_rows(b, &paged, true);
	miss_rows(b, &small, "miss-warm", "");
	miss_rows(b, &paged, "miss-warm", "-paged");
	miss_rows(b, &flat, "miss-warm", "-block");
	miss_rows(b, &narrow, "miss-shadow", "");
	miss_rows(b, &narrow_paged, "miss-shadow", "-paged");
	uni_rows(b, &small, &narrow, 0, false);
	uni_rows(b, &paged, &narrow_paged, tables, true);
	kage_vcpu_destroy(flat.v);
	kage_vcpu_destroy(paged.v);
	kage_vcpu_destroy(small.v);
	kage_vcpu_destroy(narrow.v);
	kage_vcpu_destroy(narrow_paged.v);
	guest_unraw(&blocks, GUEST_BYTES);
	guest_unraw(&pieces, GUEST_BYTES);
	guest_destroy(&blocks);
	guest_destroy(&pieces);
	bench_far(b);
	bench_tables(b);
}
