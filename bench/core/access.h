/* SPDX-License-Identifier: MIT */
/*
 * What the rows of suite translate share: loops of accesses (access.c), and
 * Unicorn, which runs loops of guest code on the same memory (unicorn.c).
 */
#ifndef KAGE_BENCH_ACCESS_H
#define KAGE_BENCH_ACCESS_H

#include "core.h"

/* -- access.c ----------------------------------------------------------------------- */

#define ACCESS_STEP (8 * 331) /* visits every word of a set; mostly another page each time */

enum mode { RAW, EACH, ENTER };
enum op { LOAD, STORE, FETCH };
/* LINES: every line in order. PAGES: one line in each page, pages at random */
enum shape { STRIDE, RANDOM, LINES, PAGES };

struct lane {
	char *raw;
	struct kage_vcpu *v;
	uint64_t gva;	/* of offset 0 */
	uint64_t bytes; /* of the working set, a power of two */
	uint64_t at;	/* counter, or offset of the next pointer */
	uint64_t key;	/* of the last run of stores */
	int bad;	/* an access that did not succeed */
};

struct work {
	struct lane *lane;
	enum mode mode;
	enum op op;
	enum shape shape;
	bool dependent;
	uint64_t n;
	struct uni *uni; /* of uni_sample() */
	uint64_t pages;	 /* of uni_sample() with PAGES: how many, a power of two */
	bool emitted;	 /* of uni_sample(): its code is there */
};

/* Offset of the line that is touched in a page. */
static inline uint64_t access_line(uint64_t page)
{
	return page * PAGE + (page * 7 % 64) * 64;
}

/* What the word at an offset holds before it is stored to. */
uint64_t access_content(uint64_t offset);
/* Puts contents, or pointers, into a lane's working set. */
void access_fill(struct lane *l, enum shape shape, bool dependent);
/* A run of arg's (struct work) n accesses: ns of one, or a negative number. */
double access_sample(void *arg);

/* -- unicorn.c ------------------------------------------------------------------------ */

struct uni;

/* Why there is no such peer, or NULL. */
const char *unicorn_missing(void);
/*
 * A CPU on the host memory `raw` as guest physical memory. Guest code is put at `code`. tables: of 4-level
 * paging, which maps gva + x to x for all that is used; 0: flat, and gva is 0.
 */
struct uni *uni_create(char *raw, uint64_t bytes, uint64_t gva, uint64_t tables, uint64_t code);
void uni_destroy(struct uni *u);
/* The same accesses as access_sample(), PAGES in another random order. STRIDE and PAGES, or dependent. */
double uni_sample(void *arg);

#endif
