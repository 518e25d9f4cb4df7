/* SPDX-License-Identifier: MIT */
/*
 * Loops of loads, stores and fetches: of a soft vCPU, and through a host pointer
 * to the same memory.
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
#include <stdlib.h>

#include "access.h"

#define ALWAYS static inline __attribute__((always_inline))
#define BLOCK  1024

ALWAYS uint64_t offset_of(const struct lane *l, enum shape shape, uint64_t i)
{
	if (shape == STRIDE)
		return i * ACCESS_STEP & (l->bytes - 1);
	if (shape == RANDOM)
		return mix(i) & (l->bytes - 8);
	if (shape == LINES)
		return i * 64 & (l->bytes - 1);
	return access_line(mix(i) & (l->bytes / PAGE - 1));
}

uint64_t access_content(uint64_t offset)
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
		if (shape == LINES)                                                                          \
			return loop(l, mode, op, LINES, false, n);                                           \
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
		sum += access_content(offset_of(l, shape, i));
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

/* -- what rows use ---------------------------------------------------------------------- */

double access_sample(void *arg)
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
	return shape == PAGES ? access_line(node) : node * 64;
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

void access_fill(struct lane *l, enum shape shape, bool dependent)
{
	for (uint64_t at = 0; at < l->bytes; at += 8)
		*(uint64_t *)(l->raw + at) = access_content(at);
	l->at = 0;
	if (dependent)
		fill_cycle(l, shape);
}
