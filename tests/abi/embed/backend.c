/* SPDX-License-Identifier: MIT */
/*
 * A backend outside the tree: a flat direct-mapped TLB for guest physical
 * addresses, built on kage/backend.h and nothing else.
 *
 *   struct flat     the backend: a listener, a lock, entries page -> pointer
 *   struct worker   a thread that loads and stores through it
 *
 * Invariants:
 *  1. An entry is used under flat.lock only, which invalidate_range_start takes
 *     too: after start returned nobody writes through a dropped entry.
 *  2. An entry is installed under that lock, and only while the reader's
 *     section is valid.
 *  3. Some stores use no entry but a hold: the change waits for them instead.
 *
 * The guest's pages are of four kinds, by page number modulo 4:
 *   0, 1   one worker each stores growing stamps, and checks them
 *   2      all pages equal; merging shares them; anybody checks them
 *   3      the third thread writes, discards and checks them
 * Every stamp names its page, so memory of another page is seen at once. A
 * clone is a snapshot: of each page it has a stamp between the last one that
 * was finished before the clone and the last one begun after it.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <kage/kage.h>
#include <kage/backend.h>

#include "leak.h"

#define PAGES 512u
#define ENTRIES 128u
#define ROUNDS 1500u
#define BASE ((uint64_t)16 << 20)
#define EQUAL_WORD 0x5a5a5a5a12345678u

#define must(x, want)                                                                              \
	do {                                                                                       \
		long long got_ = (long long)(x), want_ = (long long)(want);                        \
		if (got_ != want_) {                                                               \
			fprintf(stderr, "backend.c:%d: %s = %llx, not %llx\n", __LINE__, #x, got_, want_); \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

struct entry {
	uint64_t gpa; /* 1: none */
	char *hva;
	uint32_t prot;
};

struct flat {
	struct kage_notifier notifier; /* first: the callbacks cast */
	struct kage_vm *vm;
	pthread_mutex_t lock;
	struct entry entry[ENTRIES];
	unsigned long starts, ends, dropped, downgraded;
	_Atomic unsigned long hits, misses, retries, holds;
};

struct worker {
	struct flat *flat;
	unsigned kind;
	uint64_t random;
};

static _Atomic uint64_t begun[PAGES], finished[PAGES];
static _Atomic bool stop;

static uint64_t stamp(unsigned page, uint64_t n)
{
	return (uint64_t)(page + 1) << 40 | n;
}

/* -- the backend ------------------------------------------------------------ */

static int flat_start(struct kage_notifier *n, const struct kage_range *range)
{
	struct flat *flat = (struct flat *)n;

	pthread_mutex_lock(&flat->lock);
	flat->starts++;
	for (unsigned i = 0; i < ENTRIES; i++) {
		struct entry *e = &flat->entry[i];

		if (e->gpa == 1 || e->gpa < range->start || e->gpa >= range->end)
			continue;
		if (range->reason == KAGE_REASON_PROTECT && (e->prot & ~range->lost) != 0) {
			e->prot &= ~range->lost;
			flat->downgraded++;
		} else {
			e->gpa = 1;
			flat->dropped++;
		}
	}
	pthread_mutex_unlock(&flat->lock);
	return 0;
}

static void flat_end(struct kage_notifier *n, const struct kage_range *range)
{
	struct flat *flat = (struct flat *)n;

	(void)range;
	pthread_mutex_lock(&flat->lock);
	flat->ends++;
	pthread_mutex_unlock(&flat->lock);
}

static const struct kage_notifier_ops flat_ops = {
	.invalidate_range_start = flat_start,
	.invalidate_range_end = flat_end,
};

/* A word through an entry, if there is one that allows it. */
static bool flat_hit(struct flat *flat, uint64_t gpa, uint32_t access, uint64_t *word)
{
	struct entry *e = &flat->entry[gpa / KAGE_PAGE_SIZE % ENTRIES];
	bool hit;

	pthread_mutex_lock(&flat->lock);
	hit = e->gpa == (gpa & ~(KAGE_PAGE_SIZE - 1)) && (e->prot & access) == access;
	if (hit) {
		_Atomic uint64_t *p = (_Atomic uint64_t *)(e->hva + gpa % KAGE_PAGE_SIZE);

		if (access == KAGE_WRITE)
			atomic_store_explicit(p, *word, memory_order_relaxed);
		else
			*word = atomic_load_explicit(p, memory_order_relaxed);
	}
	pthread_mutex_unlock(&flat->lock);
	return hit;
}

/* Installs what the fault found. False: a change came first. */
static bool flat_fill(struct flat *flat, struct kage_reader *r, uint64_t gpa, const struct kage_page *p)
{
	struct entry *e = &flat->entry[gpa / KAGE_PAGE_SIZE % ENTRIES];
	bool valid;

	pthread_mutex_lock(&flat->lock);
	valid = kage_reader_valid(r);
	if (valid)
		*e = (struct entry){ gpa, (char *)p->hva, p->prot };
	pthread_mutex_unlock(&flat->lock);
	return valid;
}

/* One turn of the loop that kage/backend.h describes. */
static bool flat_fault(struct flat *flat, struct kage_reader *r, uint64_t gpa, uint32_t access)
{
	struct kage_page page;
	bool done = false;
	int ret;

	kage_reader_begin(r, gpa, KAGE_PAGE_SIZE);
	ret = kage_backend_fault(flat->vm, r, gpa, access, &page);
	if (ret == KAGE_OK) {
		must(page.prot & access, access);
		must(page.gpa <= gpa && page.gpa + page.len >= gpa + KAGE_PAGE_SIZE, 1);
		done = flat_fill(flat, r, gpa, &page);
	} else {
		must(ret, KAGE_RETRY);
	}
	kage_reader_end(r);
	return done;
}

static void flat_access(struct flat *flat, struct kage_reader *r, uint64_t gpa, uint32_t access, uint64_t *word)
{
	if (flat_hit(flat, gpa, access, word)) {
		flat->hits++;
		return;
	}
	do {
		if (flat_fault(flat, r, gpa & ~(KAGE_PAGE_SIZE - 1), access))
			flat->misses++;
		else
			flat->retries++;
	} while (!flat_hit(flat, gpa, access, word));
}

/* Without an entry: the change waits until the store is done. */
static void flat_store_held(struct flat *flat, struct kage_reader *r, uint64_t gpa, uint64_t word)
{
	uint64_t start = gpa & ~(KAGE_PAGE_SIZE - 1);
	struct kage_page page;
	bool done = false;
	int ret;

	while (!done) {
		kage_reader_begin(r, start, KAGE_PAGE_SIZE);
		ret = kage_backend_fault(flat->vm, r, start, KAGE_WRITE, &page);
		if (ret != KAGE_OK)
			must(ret, KAGE_RETRY);
		done = ret == KAGE_OK && kage_reader_hold(r);
		if (done)
			atomic_store_explicit((_Atomic uint64_t *)((char *)page.hva + (gpa - start)), word,
					      memory_order_relaxed);
		kage_reader_end(r);
	}
	flat->holds++;
}

/* -- the threads ------------------------------------------------------------- */

static uint64_t page_gpa(unsigned page)
{
	return BASE + page * KAGE_PAGE_SIZE + (page % 4 == 2 ? 0 : page % 64 * 8);
}

static unsigned next_random(uint64_t *state)
{
	*state = *state * 6364136223846793005u + 1442695040888963407u;
	return (unsigned)(*state >> 33);
}

/* What a load of any page may answer. */
static void check_word(unsigned page, unsigned kind, uint64_t word)
{
	if (page % 4 == 2)
		must(word, EQUAL_WORD);
	else if (page % 4 == kind)
		must(word, finished[page] ? stamp(page, finished[page]) : 0);
	else if (word != 0)
		must(word >> 40, page + 1);
}

static void *work(void *arg)
{
	struct worker *w = arg;
	struct flat *flat = w->flat;
	struct kage_reader reader;
	unsigned page;
	uint64_t word;

	must(kage_reader_init(flat->vm, &reader), KAGE_OK);
	while (!stop) {
		page = next_random(&w->random) % PAGES;
		flat_access(flat, &reader, page_gpa(page), KAGE_READ, &word);
		check_word(page, w->kind, word);
		if (page % 4 != w->kind)
			continue;
		word = stamp(page, ++begun[page]);
		if (next_random(&w->random) % 8 == 0)
			flat_store_held(flat, &reader, page_gpa(page), word);
		else
			flat_access(flat, &reader, page_gpa(page), KAGE_WRITE, &word);
		finished[page] = begun[page];
	}
	kage_reader_finish(&reader);
	return NULL;
}

/* Writes a page of the fourth kind, loads it back, discards it, and loads zero. */
static void churn(struct flat *flat, struct kage_reader *r, unsigned page, uint64_t n)
{
	uint64_t gpa = page_gpa(page), word = stamp(page, n), got;

	must(kage_vm_write(flat->vm, gpa, &word, sizeof(word)), KAGE_OK);
	flat_access(flat, r, gpa, KAGE_READ, &got);
	must(got, word);
	must(kage_vm_advise(flat->vm, gpa & ~(KAGE_PAGE_SIZE - 1), KAGE_PAGE_SIZE, KAGE_ADVICE_DISCARD), KAGE_OK);
	flat_access(flat, r, gpa, KAGE_READ, &got);
	must(got, 0);
}

static void snapshot(struct flat *flat, uint64_t low[PAGES])
{
	struct kage_vm *clone;
	uint64_t high, word;

	for (unsigned p = 0; p < PAGES; p++)
		low[p] = finished[p];
	must(kage_vm_clone(flat->vm, NULL, &clone), KAGE_OK);
	for (unsigned p = 0; p < PAGES; p++) {
		high = begun[p];
		must(kage_vm_read(clone, page_gpa(p), &word, sizeof(word)), KAGE_OK);
		if (p % 4 == 2)
			must(word, EQUAL_WORD);
		else if (p % 4 == 3)
			must(word == 0 || word >> 40 == p + 1, 1);
		else if (word == 0)
			must(low[p], 0);
		else
			must(word >= stamp(p, low[p]) && word <= stamp(p, high), 1);
	}
	must(kage_vm_destroy(clone), KAGE_OK);
}

static void change(struct kage_engine *engine, struct flat *flat)
{
	uint64_t low[PAGES], seed = 99;
	struct kage_reader reader;

	must(kage_reader_init(flat->vm, &reader), KAGE_OK);
	for (unsigned round = 1; round <= ROUNDS; round++) {
		for (unsigned i = 0; i < 4; i++)
			churn(flat, &reader, next_random(&seed) % (PAGES / 4) * 4 + 3, round);
		if (round % 8 == 0)
			must(kage_engine_step(engine, NULL, NULL), KAGE_OK);
		if (round % 4 == 0)
			snapshot(flat, low);
	}
	kage_reader_finish(&reader);
}

/* -- the test ----------------------------------------------------------------- */

static struct kage_vm *make_guest(struct kage_engine *engine)
{
	uint64_t word = EQUAL_WORD;
	struct kage_vm *vm;

	must(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)), KAGE_OK);
	must(kage_vm_create(engine, NULL, &vm), KAGE_OK);
	must(kage_vm_map(vm, KAGE_CFG(kage_region, .gpa = BASE, .len = PAGES * KAGE_PAGE_SIZE,
				      .flags = KAGE_REGION_MERGEABLE)), KAGE_OK);
	for (unsigned p = 2; p < PAGES; p += 4)
		must(kage_vm_write(vm, page_gpa(p), &word, sizeof(word)), KAGE_OK);
	return vm;
}

static void check_end(struct kage_engine *engine, struct flat *flat)
{
	struct kage_audit audit = { .size = sizeof(audit) };
	uint64_t word;

	for (unsigned p = 0; p < PAGES; p++) {
		must(kage_vm_read(flat->vm, page_gpa(p), &word, sizeof(word)), KAGE_OK);
		must(word, p % 4 == 2 ? EQUAL_WORD : p % 4 < 2 && finished[p] ? stamp(p, finished[p]) : 0);
	}
	must(kage_engine_audit(engine, &audit), KAGE_OK);
	must(audit.violations, 0);
	must(flat->starts, flat->ends);
	/* The test must have met what it is about. */
	must(flat->starts > ROUNDS && flat->dropped > ROUNDS, 1);
	must(flat->hits > ROUNDS && flat->misses > ROUNDS && flat->holds > 0, 1);
}

static void run(struct flat *flat)
{
	struct worker worker[2] = { { flat, 0, 1 }, { flat, 1, 2 } };
	struct kage_engine *engine;
	pthread_t thread[2];

	must(kage_engine_create(NULL, &engine), KAGE_OK);
	flat->vm = make_guest(engine);
	must(kage_notifier_register(flat->vm, &flat->notifier, &flat_ops), KAGE_OK);
	for (unsigned i = 0; i < 2; i++)
		must(pthread_create(&thread[i], NULL, work, &worker[i]), 0);
	change(engine, flat);
	stop = true;
	for (unsigned i = 0; i < 2; i++)
		must(pthread_join(thread[i], NULL), 0);
	check_end(engine, flat);
	must(kage_notifier_unregister(&flat->notifier), KAGE_OK);
	must(kage_vm_destroy(flat->vm), KAGE_OK);
	must(kage_engine_destroy(engine), KAGE_OK);
}

int main(void)
{
	struct leak before = leak_take();
	static struct flat flat;

	pthread_mutex_init(&flat.lock, NULL);
	for (unsigned i = 0; i < ENTRIES; i++)
		flat.entry[i].gpa = 1;
	run(&flat);
	if (leak_check(&before))
		return 1;
	printf("backend: %lu hits, %lu misses, %lu retries, %lu holds; %lu changes heard, %lu entries dropped, "
	       "%lu downgraded\n", flat.hits, flat.misses, flat.retries, flat.holds, flat.starts, flat.dropped,
	       flat.downgraded);
	return 0;
}
