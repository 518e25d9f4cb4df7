/* SPDX-License-Identifier: MIT */
/*
 * Loads and stores of a soft vCPU against the same accesses through a host
 * pointer to the same memory.
 *
 * Throughput rows compute each address from a counter; dependent rows follow a
 * cycle of pointers (and, to store, write beside each pointer). Loads are
 * compared with what the address must hold, stores are read back through the
 * host pointer, after each timed run. Each run goes on where the last one
 * stopped, so that a working set larger than the cache is not found there.
 *
 * Modes: the raw pointer; one window of use an access; kage_vcpu_enter() and
 * kage_vcpu_leave() around 1,024 accesses, polling kage_vcpu_wanted() every 8.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

#define ALWAYS	  static inline __attribute__((always_inline))
#define DATA	  (64 * MIB)
#define GVA_PAGED ((uint64_t)1 << 46)
#define STEP	  (8 * 331) /* visits every word of the set; mostly another page each time */
#define BLOCK	  1024

enum mode { RAW, EACH, ENTER };
enum op { LOAD, STORE, FETCH };
enum shape { STRIDE, RANDOM, PAGES, SHAPES }; /* PAGES: one line in each page, pages at random */

struct lane {
	char *raw;
	struct kage_vcpu *v;
	uint64_t gva;	/* of offset 0 */
	uint64_t bytes; /* of the working set, a power of two */
	uint64_t at;	/* counter, or offset of the next pointer */
	uint64_t key;	/* of the last run of stores */
	int bad;	/* an access that did not succeed */
};

ALWAYS uint64_t page_line(uint64_t page)
{
	return page * PAGE + (page * 7 % 64) * 64;
}

ALWAYS uint64_t offset_of(const struct lane *l, enum shape shape, uint64_t i)
{
	if (shape == STRIDE)
		return i * STEP & (l->bytes - 1);
	if (shape == RANDOM)
		return mix(i) & (l->bytes - 8);
	return page_line(mix(i) & (l->bytes / PAGE - 1));
}

static uint64_t content_of(uint64_t offset)
{
	return offset * 0x2545f4914f6cdd1du + 1;
}

ALWAYS uint64_t get(struct lane *l, enum mode mode, enum op op, uint64_t offset)
{
	uint64_t v = 0;
	int r;

	if (mode == RAW)
		return *(const volatile uint64_t *)(l->raw + offset);
	if (op == FETCH)
		r = kage_vcpu_fetch(l->v, l->gva + offset, &v, 8, NULL);
	else
		r = kage_vcpu_load(l->v, l->gva + offset, &v, 8, NULL);
	if (unlikely(r))
		l->bad = r;
	return v;
}

ALWAYS void put(struct lane *l, enum mode mode, uint64_t offset, uint64_t v)
{
	int r;

	if (mode == RAW) {
		*(volatile uint64_t *)(l->raw + offset) = v;
		return;
	}
	r = kage_vcpu_store(l->v, l->gva + offset, &v, 8, NULL);
	if (unlikely(r))
		l->bad = r;
}

/* The block of work between two polls. */
ALWAYS uint64_t eight(struct lane *l, enum mode mode, enum op op, enum shape shape, uint64_t i)
{
	uint64_t sum = 0;

	for (unsigned u = 0; u < 8; u++) {
		uint64_t offset = offset_of(l, shape, i + u);

		if (op == STORE)
			put(l, mode, offset, offset ^ l->key);
		else
			sum += get(l, mode, op, offset);
	}
	return sum;
}

ALWAYS uint64_t eight_dependent(struct lane *l, enum mode mode, enum op op)
{
	uint64_t sum = 0;

	for (unsigned u = 0; u < 8; u++) {
		l->at = get(l, mode, op, l->at);
		if (op == STORE)
			put(l, mode, l->at + 8, l->at ^ l->key);
		else
			sum += l->at;
	}
	return sum;
}

ALWAYS uint64_t loop(struct lane *lane, enum mode mode, enum op op, enum shape shape, bool dependent,
		     uint64_t n)
{
	struct lane l = *lane; /* in registers */
	uint64_t sum = 0;

	for (uint64_t done = 0; done < n; done += BLOCK) {
		if (mode == ENTER)
			kage_vcpu_enter(l.v);
		for (unsigned i = 0; i < BLOCK; i += 8) {
			sum +=
			    dependent ? eight_dependent(&l, mode, op) : eight(&l, mode, op, shape, l.at + i);
			if (mode == ENTER && unlikely(kage_vcpu_wanted(l.v))) {
				kage_vcpu_leave(l.v);
				kage_vcpu_enter(l.v);
			}
		}
		if (!dependent)
			l.at += BLOCK;
		if (mode == ENTER)
			kage_vcpu_leave(l.v);
	}
	*lane = l;
	return sum;
}

#define BY_SHAPE(mode, op)                                                                                   \
	do {                                                                                                 \
		if (dependent)                                                                               \
			return loop(l, mode, op, PAGES, true, n);                                            \
		if (shape == STRIDE)                                                                         \
			return loop(l, mode, op, STRIDE, false, n);                                          \
		return shape == RANDOM ? loop(l, mode, op, RANDOM, false, n)                                 \
				       : loop(l, mode, op, PAGES, false, n);                                 \
	} while (0)

#define BY_MODE(name, op)                                                                                    \
	static __attribute__((noinline)) uint64_t name(struct lane *l, enum mode mode, enum shape shape,     \
						       bool dependent, uint64_t n)                           \
	{                                                                                                    \
		if (mode == RAW)                                                                             \
			BY_SHAPE(RAW, op);                                                                   \
		if (mode == EACH)                                                                            \
			BY_SHAPE(EACH, op);                                                                  \
		BY_SHAPE(ENTER, op);                                                                         \
	}

BY_MODE(run_load, LOAD)
BY_MODE(run_store, STORE)
BY_MODE(run_fetch, FETCH)

/* -- what the runs must have found ------------------------------------------------- */

static uint64_t expected_sum(const struct lane *l, enum shape shape, uint64_t from, uint64_t n)
{
	uint64_t sum = 0;

	for (uint64_t i = from; i < from + n; i++)
		sum += content_of(offset_of(l, shape, i));
	return sum;
}

static uint64_t expected_walk(const struct lane *l, uint64_t from, uint64_t n)
{
	uint64_t sum = 0;

	while (n--) {
		from = *(const uint64_t *)(l->raw + from);
		sum += from;
	}
	return sum;
}

static bool stores_arrived(const struct lane *l, enum shape shape, bool dependent, uint64_t from, uint64_t n)
{
	uint64_t offset = from, wrong = 0;

	for (uint64_t i = from; i < from + n; i++) {
		if (dependent)
			offset = *(const uint64_t *)(l->raw + offset);
		else
			offset = offset_of(l, shape, i);
		wrong += *(const uint64_t *)(l->raw + offset + (dependent ? 8 : 0)) != (offset ^ l->key);
	}
	return wrong == 0;
}

/* -- rows ------------------------------------------------------------------------------ */

struct work {
	struct lane *lane;
	enum mode mode;
	enum op op;
	enum shape shape;
	bool dependent;
	uint64_t n;
};

static double sample(void *arg)
{
	struct work *w = arg;
	struct lane *l = w->lane;
	uint64_t from = l->at, sum;
	double ns;
	bool ok;

	l->key = mix(l->key + 1);
	l->bad = 0;
	ns = cpu_ns();
	if (w->op == LOAD)
		sum = run_load(l, w->mode, w->shape, w->dependent, w->n);
	else if (w->op == STORE)
		sum = run_store(l, w->mode, w->shape, w->dependent, w->n);
	else
		sum = run_fetch(l, w->mode, w->shape, w->dependent, w->n);
	ns = cpu_ns() - ns;
	if (w->op == STORE)
		ok = stores_arrived(l, w->shape, w->dependent, from, w->n);
	else if (w->dependent)
		ok = sum == expected_walk(l, from, w->n);
	else
		ok = sum == expected_sum(l, w->shape, from, w->n);
	return ok && !l->bad ? ns / (double)w->n : -1;
}

static uint64_t node_offset(enum shape shape, uint64_t node)
{
	return shape == PAGES ? page_line(node) : node * 64;
}

/* One cycle through all nodes in random order (Sattolo's algorithm); a node holds the offset of the next. */
static void fill_cycle(struct lane *l, enum shape shape)
{
	uint64_t n = shape == PAGES ? l->bytes / PAGE : l->bytes / 64;
	uint32_t *order = must_map(malloc(n * sizeof(*order)), "malloc");

	for (uint64_t i = 0; i < n; i++)
		order[i] = (uint32_t)i;
	for (uint64_t i = n - 1; i > 0; i--) {
		uint64_t j = mix(i * 2 + 1) % i;
		uint32_t swap = order[i];

		order[i] = order[j];
		order[j] = swap;
	}
	for (uint64_t i = 0; i < n; i++)
		*(uint64_t *)(l->raw + node_offset(shape, order[i])) = node_offset(shape, order[(i + 1) % n]);
	free(order);
}

static void fill(struct lane *l, enum shape shape, bool dependent)
{
	for (uint64_t at = 0; at < l->bytes; at += 8)
		*(uint64_t *)(l->raw + at) = content_of(at);
	l->at = 0;
	if (dependent)
		fill_cycle(l, shape);
}

static void measure(const struct bench *b, struct row *row, struct work *ours)
{
	struct work peer = *ours;
	struct turns t;

	peer.mode = RAW;
	ours->n >>= b->shift;
	peer.n = ours->n;
	fill(ours->lane, ours->shape, ours->dependent);
	t = take_turns(b, sample, ours, sample, &peer);
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
    {"-64m", 64 << 20, RANDOM, 1 << 19, 1 << 17, "64 MiB at random: all that the TLB of 16,384 entries reaches"},
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
 * One line in each of many pages: what a TLB of the usual size misses. `name` miss-warm: with the default table, which
 * holds them all; miss-shadow: with one of 512 entries, so that nearly every access goes to the shadow tables.
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
		struct row row = {.goal = GOAL_EXTRA, .limit = 15};
		char name[64];

		snprintf(name, sizeof(name), "%s%s%s%s", what, dependent ? "-dep" : "",
			 i & 2 ? "-16384" : "", kind);
		row.name = name;
		row_note(&row, "%s of %llu pages at random, one line each",
			 dependent ? "dependent loads" : "loads", (unsigned long long)pages);
		l->bytes = pages * PAGE;
		measure(b, &row, &w);
	}
}

void bench_translate(const struct bench *b)
{
	uint64_t tables = DATA, bytes = DATA + 2 * MIB;
	struct guest blocks = guest_create(bytes, 0, 0), pieces = guest_create(bytes, KAGE_REGION_NOHUGE, 0);
	struct lane flat = {.raw = guest_raw(&blocks, DATA)}, small = {.raw = guest_raw(&pieces, DATA)};
	struct lane paged = {.raw = flat.raw, .gva = GVA_PAGED};
	struct lane narrow = small, narrow_paged = paged;

	guest_tables(&blocks, GVA_PAGED, DATA, tables);
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
	kage_vcpu_destroy(flat.v);
	kage_vcpu_destroy(paged.v);
	kage_vcpu_destroy(small.v);
	kage_vcpu_destroy(narrow.v);
	kage_vcpu_destroy(narrow_paged.v);
	guest_unraw(&blocks, DATA);
	guest_unraw(&pieces, DATA);
	guest_destroy(&blocks);
	guest_destroy(&pieces);
}
