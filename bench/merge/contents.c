/* SPDX-License-Identifier: MIT */
/*
 * Contents by key. Words of a page go up in equal steps from one that its key
 * decides, so different pages differ in their first word: the best case for
 * whoever compares pages, which is ksmd with every node of its trees.
 */
#include <stdlib.h>

#include "merge.h"

#define WORDS (PAGE / 8)
#define STEP  0x9e3779b97f4a7c15u

void page_fill(void *page, uint64_t key)
{
	uint64_t *w = page, first = mix(key + 1);

	for (uint64_t i = 0; i < WORDS; i++)
		w[i] = first + i * STEP;
}

bool page_is(const void *page, uint64_t key)
{
	const uint64_t *w = page;
	uint64_t first = mix(key + 1), wrong = 0;

	for (uint64_t i = 0; i < WORDS; i++)
		wrong |= w[i] ^ (first + i * STEP);
	return wrong == 0;
}

static uint64_t key_unique(const struct contents *c, unsigned guest, uint64_t page)
{
	return c->seed + guest * c->pages + page;
}

static uint64_t key_equal(const struct contents *c, unsigned guest, uint64_t page)
{
	return c->seed + page;
}

static bool is_copy(const struct contents *c, uint64_t page)
{
	return mix(mix(page) + c->seed) % 4 == 0;
}

static uint64_t key_scattered(const struct contents *c, unsigned guest, uint64_t page)
{
	uint64_t of = page;

	for (uint64_t i = 1; is_copy(c, of); i++)
		of = mix(page * 64 + i) % c->pages;
	return c->seed + of;
}

struct contents contents_unique(unsigned guests, uint64_t bytes)
{
	return (struct contents){.guests = guests,
				 .pages = bytes / PAGE,
				 .seed = 1u << 30,
				 .key = key_unique,
				 .distinct = guests * (bytes / PAGE)};
}

struct contents contents_equal(unsigned guests, uint64_t bytes)
{
	return (struct contents){.guests = guests,
				 .pages = bytes / PAGE,
				 .seed = 1u << 30,
				 .key = key_equal,
				 .distinct = bytes / PAGE};
}

struct contents contents_scattered(uint64_t bytes)
{
	struct contents c = {.guests = 1, .pages = bytes / PAGE, .seed = 1u << 30, .key = key_scattered};

	for (uint64_t page = 0; page < c.pages; page++)
		c.distinct += !is_copy(&c, page);
	return c;
}

void trace_add(struct trace *t, double wall, double cpu, uint64_t saved)
{
	if (t->n == t->room) {
		t->room = t->room ? 2 * t->room : 256;
		t->sample = must_map(realloc(t->sample, t->room * sizeof(*t->sample)), "memory");
	}
	t->sample[t->n++] = (struct sample){wall, cpu, saved};
}

void trace_free(struct trace *t)
{
	free(t->sample);
	*t = (struct trace){0};
}
