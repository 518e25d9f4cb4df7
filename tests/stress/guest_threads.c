/* SPDX-License-Identifier: MIT */
/*
 * vCPU threads: each has one vCPU on each guest, one of them with paging. It
 * owns every second group of pages of both guests, stores rising stamps there
 * and loads everything.
 *
 * Groups take turns: hot ones are stored to all the time; a group that cools
 * gets one stamp everywhere and is left alone for some merge passes, so that
 * its pages become one frame, which the next turn breaks again.
 */
#include <string.h>

#include "stress.h"

#define OWNED	    (GROUPS / WORKERS) /* groups of one guest that one worker owns */
#define HOT	    2
#define REST_PASSES 2 /* between turns */

struct binding {
	struct guest *g;
	struct kage_vcpu *vcpu;
	bool paging;
	unsigned turn;	    /* the coolest group: heated next */
	uint64_t turn_pass; /* pass at which the last turn was */
	uint64_t seq;	    /* of this worker's ring */
	unsigned slot_page[SLOTS_EACH];
};

struct worker {
	unsigned id;
	struct rng rng;
	struct binding b[GUESTS];
	uint64_t loads, stores;
};

/* -- page tables --------------------------------------------------------------- */

static void put_entry(struct guest *g, uint64_t table, unsigned index, uint64_t entry)
{
	EXPECT(kage_vm_write(g->vm, table + 8 * index, &entry, 8), KAGE_OK);
}

#define P_RW	3 /* present, writable; accessed and dirty are left to the walker */
#define P_LARGE 0x80

static void build_tables(struct guest *g)
{
	uint64_t pml4 = TABLES, pdpt = TABLES + PAGE, pd = TABLES + 2 * PAGE, pt = TABLES + 3 * PAGE;
	uint64_t alias = TABLES + 11 * PAGE, slots = TABLES + 13 * PAGE;

	put_entry(g, pml4, 0, pdpt | P_RW);
	put_entry(g, pdpt, 0, pd | P_RW);
	for (unsigned i = 0; i < MEMORY_END >> 21; i++) {
		put_entry(g, pd, i, (pt + i * PAGE) | P_RW);
		for (unsigned k = 0; k < 512; k++)
			put_entry(g, pt + i * PAGE, k, (uint64_t)i << 21 | k * PAGE | P_RW);
	}
	put_entry(g, pml4, ALIAS >> 39 & 511, alias | P_RW);
	put_entry(g, alias, 0, (alias + PAGE) | P_RW);
	for (unsigned i = 0; i < MEMORY_END >> 21; i++)
		put_entry(g, alias + PAGE, i, (uint64_t)i << 21 | P_LARGE | P_RW);
	put_entry(g, pml4, SLOTS >> 39 & 511, slots | P_RW);
	put_entry(g, slots, 0, (slots + PAGE) | P_RW);
	put_entry(g, slots + PAGE, 0, SLOT_TABLE | P_RW);
}

static void build_region(struct guest *g, uint64_t gpa, uint64_t pages, uint32_t flags)
{
	EXPECT(kage_vm_map(g->vm, KAGE_CFG(kage_region, .flags = flags, .gpa = gpa, .len = pages * PAGE)),
	       KAGE_OK);
}

void build_guest(struct guest *g)
{
	EXPECT(kage_vm_create(world.engine, NULL, &g->vm), KAGE_OK);
	build_region(g, TABLES, TABLES_PAGES, KAGE_REGION_MERGEABLE);
	build_region(g, STAMPS, STAMPS_PAGES, KAGE_REGION_MERGEABLE);
	build_region(g, RINGS, WORKERS * RING_PAGES, KAGE_REGION_MERGEABLE);
	build_region(g, DISCARD, DISCARD_PAGES, KAGE_REGION_MERGEABLE);
	build_region(g, PROTECT, PROTECT_PAGES, 0);
	build_tables(g);
	for (unsigned p = 0; p < STAMPS_PAGES; p++) {
		uint64_t word = stamp_word(p, 0);

		EXPECT(kage_vm_write(g->vm, stamp_gpa(p) + word_a(p), &word, 8), KAGE_OK);
		EXPECT(kage_vm_write(g->vm, stamp_gpa(p) + word_b(p), &word, 8), KAGE_OK);
	}
}

static void open_vcpu(struct binding *b)
{
	struct kage_x86_regs regs = {
	    .cr0 = 0x80010031,
	    .cr3 = CR3,
	    .cr4 = 0x20,
	    .efer = 0xd00,
	};

	EXPECT(kage_vcpu_create(b->g->vm, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI), &b->vcpu),
	       KAGE_OK);
	if (b->paging)
		EXPECT(kage_vcpu_set_regs(b->vcpu, &regs, sizeof(regs)), KAGE_OK);
}

/* -- loads -------------------------------------------------------------------------- */

static uint64_t gva_of(struct worker *w, const struct binding *b, uint64_t gpa)
{
	return b->paging && rng_chance(&w->rng, 50) ? ALIAS + gpa : gpa;
}

static int load_word(struct worker *w, struct binding *b, uint64_t gva, uint64_t *word)
{
	w->loads++;
	return kage_vcpu_load(b->vcpu, gva, word, 8, NULL);
}

/* T1 for a word that was loaded between `lower` and now. */
static void check_stamp(const struct binding *b, unsigned page, uint64_t word, uint64_t lower,
			const char *what)
{
	uint64_t upper;

	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	upper = atomic_load(&b->g->upper[page]);
	if (word >> STAMP_BITS != page / GROUP_PAGES + 1)
		stress_fail("guest %u page %u %s: 0x%llx is another page's", b->g->id, page, what,
			    (unsigned long long)word);
	if ((word & STAMP_MASK) < lower || (word & STAMP_MASK) > upper)
		stress_fail("guest %u page %u %s: stamp %llu is not in [%llu, %llu]", b->g->id, page, what,
			    (unsigned long long)(word & STAMP_MASK), (unsigned long long)lower,
			    (unsigned long long)upper);
}

static void load_stamp(struct worker *w, struct binding *b, unsigned page)
{
	uint64_t lower = atomic_load(&b->g->lower[page]), a, bb;

	EXPECT(load_word(w, b, gva_of(w, b, stamp_gpa(page) + word_b(page)), &bb), KAGE_OK);
	check_stamp(b, page, bb, lower, "word B");
	EXPECT(load_word(w, b, gva_of(w, b, stamp_gpa(page) + word_a(page)), &a), KAGE_OK);
	check_stamp(b, page, a, bb & STAMP_MASK, "word A"); /* T2 */
}

/* Two pages by one access that crosses their border. */
static void load_two(struct worker *w, struct binding *b, unsigned page)
{
	uint8_t buf[2 * PAGE];
	uint64_t lower[2], word;

	if (page + 1 == STAMPS_PAGES)
		return;
	lower[0] = atomic_load(&b->g->lower[page]);
	lower[1] = atomic_load(&b->g->lower[page + 1]);
	w->loads++;
	EXPECT(kage_vcpu_load(b->vcpu, gva_of(w, b, stamp_gpa(page)), buf, sizeof(buf), NULL), KAGE_OK);
	for (unsigned i = 0; i < 2; i++) {
		memcpy(&word, buf + i * PAGE + word_a(page + i), 8);
		check_stamp(b, page + i, word, lower[i], "in a long load");
	}
}

/* Regions that come and go: the word is the churn thread's, or zero, or nothing answers. */
static void load_churned(struct worker *w, struct binding *b)
{
	static const struct {
		uint64_t gpa;
		unsigned pages, tag;
	} area[] = {
	    {DISCARD, DISCARD_PAGES, TAG_DISCARD},
	    {MAPPED, MAPPED_PAGES, TAG_MAPPED},
	    {PROTECT, PROTECT_PAGES, TAG_PROTECT},
	};
	unsigned k = rng_below(&w->rng, 3);
	uint64_t gpa = area[k].gpa + rng_below(&w->rng, area[k].pages) * PAGE, word = 0;
	int r = load_word(w, b, gva_of(w, b, gpa), &word);

	if (r == KAGE_MMIO && area[k].tag == TAG_MAPPED)
		return;
	EXPECT(r, KAGE_OK);
	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	if (word != 0 &&
	    (word >> STAMP_BITS != area[k].tag || (word & STAMP_MASK) > atomic_load(&b->g->marks)))
		stress_fail("guest %u gpa 0x%llx: 0x%llx is not the churn thread's", b->g->id,
			    (unsigned long long)gpa, (unsigned long long)word);
}

/* -- stores --------------------------------------------------------------------------- */

static void store_word(struct worker *w, struct binding *b, uint64_t gva, uint64_t word)
{
	w->stores++;
	EXPECT(kage_vcpu_store(b->vcpu, gva, &word, 8, NULL), KAGE_OK);
}

static void store_stamp(struct worker *w, struct binding *b, unsigned page, uint64_t stamp)
{
	uint64_t word = stamp_word(page, stamp);

	atomic_store(&b->g->upper[page], stamp);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	store_word(w, b, gva_of(w, b, stamp_gpa(page) + word_a(page)), word);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	store_word(w, b, gva_of(w, b, stamp_gpa(page) + word_b(page)), word);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	atomic_store(&b->g->lower[page], stamp);
}

/* Through a pointer, as an atomic instruction would. Inside a window. */
static void store_by_pointer(struct worker *w, struct binding *b, unsigned page)
{
	uint64_t stamp = atomic_load(&b->g->upper[page]) + 1, word = stamp_word(page, stamp), *p[2];
	unsigned at[2] = {word_a(page), word_b(page)};

	atomic_store(&b->g->upper[page], stamp);
	for (unsigned i = 0; i < 2; i++) {
		uint64_t gva = gva_of(w, b, stamp_gpa(page) + at[i]);

		w->stores++;
		EXPECT(kage_vcpu_ptr(b->vcpu, gva, 8, KAGE_READ | KAGE_WRITE, (void **)&p[i], NULL), KAGE_OK);
		__atomic_exchange_n(p[i], word, __ATOMIC_SEQ_CST);
	}
	atomic_store(&b->g->lower[page], stamp);
}

static unsigned owned_page(const struct worker *w, unsigned group, unsigned i)
{
	return (group * WORKERS + w->id) * GROUP_PAGES + i;
}

static unsigned hot_page(struct worker *w, const struct binding *b)
{
	unsigned group = (b->turn + OWNED - 1 - rng_below(&w->rng, HOT)) % OWNED;

	return owned_page(w, group, rng_below(&w->rng, GROUP_PAGES));
}

/* The hottest group but one cools to one stamp; the coolest becomes hot. */
static void next_turn(struct worker *w, struct binding *b)
{
	unsigned cool = (b->turn + OWNED - HOT) % OWNED;
	uint64_t pass = atomic_load(&world.passes), stamp = 0;

	if (pass < b->turn_pass + REST_PASSES)
		return;
	b->turn_pass = pass;
	for (unsigned i = 0; i < GROUP_PAGES; i++) {
		uint64_t u = atomic_load(&b->g->upper[owned_page(w, cool, i)]);

		stamp = stamp > u ? stamp : u;
	}
	for (unsigned i = 0; i < GROUP_PAGES; i++)
		store_stamp(w, b, owned_page(w, cool, i), (stamp | 255) + 1);
	b->turn = (b->turn + 1) % OWNED;
	for (unsigned i = 0; i < GROUP_PAGES; i++) { /* breaks what was merged */
		unsigned page = owned_page(w, (b->turn + OWNED - 1) % OWNED, i);

		store_stamp(w, b, page, atomic_load(&b->g->upper[page]) + 1);
	}
}

/* T3: sequence number, and how much of the other ring the writer had seen. */
static void append_ring(struct worker *w, struct binding *b)
{
	struct ring *mine = &b->g->ring[w->id], *other = &b->g->ring[!w->id];
	uint64_t seen = atomic_load(&other->lower), seq = ++b->seq;

	atomic_store(&mine->upper, seq);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	store_word(w, b, gva_of(w, b, ring_gpa(w->id, seq)), seq << 32 | (uint32_t)seen);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	atomic_store(&mine->lower, seq);
}

/* -- the guest changes its own tables ---------------------------------------------------- */

/* Points a slot of this worker at a page and flushes it, then reads through it. */
static void point_slot(struct worker *w, struct binding *b, unsigned slot, unsigned page)
{
	unsigned index = w->id * SLOTS_EACH + slot;
	uint64_t gva = SLOTS + index * PAGE, word, lower;

	store_word(w, b, gva_of(w, b, SLOT_TABLE + 8 * index), stamp_gpa(page) | P_RW);
	EXPECT(kage_vcpu_flush(b->vcpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_PAGE, .gva = gva)), KAGE_OK);
	lower = atomic_load(&b->g->lower[page]);
	EXPECT(load_word(w, b, gva + word_a(page), &word), KAGE_OK);
	check_stamp(b, page, word, lower, "through a slot");
	b->slot_page[slot] = page;
	count(KIND_remaps);
}

static void load_slot(struct worker *w, struct binding *b)
{
	unsigned slot = rng_below(&w->rng, SLOTS_EACH), page = b->slot_page[slot];
	uint64_t gva = SLOTS + (w->id * SLOTS_EACH + slot) * PAGE, word,
		 lower = atomic_load(&b->g->lower[page]);

	EXPECT(load_word(w, b, gva + word_a(page), &word), KAGE_OK);
	check_stamp(b, page, word, lower, "through a slot");
}

/* -- the loop ------------------------------------------------------------------------------ */

/* A block of guest work in one window of use. */
static void block(struct worker *w, struct binding *b)
{
	kage_vcpu_enter(b->vcpu);
	for (unsigned i = 0; i < 48 && !kage_vcpu_wanted(b->vcpu); i++) {
		unsigned page = hot_page(w, b);

		if (i % 8 == 3)
			store_by_pointer(w, b, page);
		else if (i % 2)
			load_stamp(w, b, rng_below(&w->rng, STAMPS_PAGES));
		else
			store_stamp(w, b, page, atomic_load(&b->g->upper[page]) + 1);
	}
	kage_vcpu_leave(b->vcpu);
}

static void act(struct worker *w, struct binding *b)
{
	unsigned dice = rng_below(&w->rng, 1000), page = hot_page(w, b);

	if (dice < 540)
		load_stamp(w, b, rng_below(&w->rng, STAMPS_PAGES));
	else if (dice < 800)
		store_stamp(w, b, page, atomic_load(&b->g->upper[page]) + 1);
	else if (dice < 880)
		append_ring(w, b);
	else if (dice < 940)
		load_churned(w, b);
	else if (dice < 950)
		load_two(w, b, page);
	else if (dice < 965)
		block(w, b);
	else if (dice < 995 && b->paging)
		load_slot(w, b);
	else if (b->paging)
		point_slot(w, b, rng_below(&w->rng, SLOTS_EACH), rng_below(&w->rng, STAMPS_PAGES));
}

/* The others learn of what has been done since the last time. */
static void tell(struct worker *w)
{
	atomic_fetch_add(&world.loads, w->loads);
	atomic_fetch_add(&world.stores, w->stores);
	w->loads = w->stores = 0;
}

void *worker_thread(void *arg)
{
	struct worker w = {.id = (uintptr_t)arg, .rng = rng_seed(world.seed + (uintptr_t)arg)};

	for (unsigned i = 0; i < GUESTS; i++) {
		struct binding *b = &w.b[i];

		*b = (struct binding){.g = &world.guest[i], .paging = (w.id + i) % 2 == 1};
		open_vcpu(b);
		for (unsigned slot = 0; b->paging && slot < SLOTS_EACH; slot++)
			point_slot(&w, b, slot, slot);
	}
	for (uint64_t n = 0; !stopped(); n++) {
		struct binding *b = &w.b[n / 256 % GUESTS];

		if (n % 64 == 0)
			next_turn(&w, b);
		if (n % 1024 == 0)
			tell(&w);
		act(&w, b);
	}
	for (unsigned i = 0; i < GUESTS; i++)
		kage_vcpu_destroy(w.b[i].vcpu);
	tell(&w);
	return NULL;
}
