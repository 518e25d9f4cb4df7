/* SPDX-License-Identifier: MIT */
/*
 * Several vCPUs of an arm64 guest that walk its tables, while other threads change
 * the tables (the guest's stores and the VMM's, with TLBI), clone the guest, merge
 * and protect its memory; for each granule in turn.
 *
 *   slot     a page of address space whose entry its owner changes: mapping n of a
 *            slot is known from n alone, so `done` and `begun`, both counted by the
 *            owner around the change, say what a walk may find
 *   private  pages that one reader stores to and nobody else
 *
 *      owner                                   reader
 *      begun = n + 1                           low = done
 *      entry invalid, TLBI, entry new          load through the slot
 *      done = n + 1                            high = begun
 *
 * Invariants (checked at every access):
 *  A1  what a load through a slot finds is a mapping of [low, high]; a translation
 *      fault is one that is not there, or a change on its way.
 *  A2  an access through an entry leaves the access flag in it, a store the dirty
 *      state (TCR_EL1.HA, HD; entries are put without either now and then).
 *  A3  a reader's private page has what the reader stored last.
 *  A4  a clone's tables are those of one instant: its own vCPU finds A1 too, with
 *      `done` from before the clone and `begun` from after it.
 *  A5  audits find nothing, now and at the end.
 *  A6  when TLBI has returned, nobody stores through the old mapping any more, be it
 *      by a pointer that was got before: readers count in a word of the slot's own.
 *
 * Environment: KAGE_STRESS_SECONDS (60, for all granules together), KAGE_SEED.
 */
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <kage/kage.h>

#include "../model/rng.h"

#define BIT(n)	 ((uint64_t)1 << (n))
#define READERS	 3
#define OWNERS	 2
#define SLOTS	 16 /* the last four are reached through an entry of the level above that is changed */
#define DIR_SLOTS 4
#define PAGES	 32
#define PRIVATE	 8 /* of each reader */
#define HOT	 2 /* of these */
#define STRIDE	 BIT(16)
#define TABLES	 BIT(20)
#define PAGE(n)	 (BIT(24) + (n)*STRIDE)
#define RAM	 (BIT(24) + (PAGES + READERS * PRIVATE) * STRIDE)
#define MARK	 0x120
#define MANY	 64 /* changes beside one load: then anything goes */

/* Tables, one each STRIDE: roots of two address spaces, what lies between, the directory, and those of pages. */
enum { ROOT_A, ROOT_B, MID, DIR = MID + 2, LEAF, DIR_LEAF_0, DIR_LEAF_1, WINDOW, PRIV_LEAF, NTABLES };
/* Their entries in the directory. */
enum { AT_LEAF, AT_DIR_SLOTS, AT_WINDOW, AT_PRIV };

#define KINDS(X) \
	X(loads) X(faults) X(stores) X(remaps) X(blocks) X(clones) X(merged) X(protects) X(vcpus) X(audits) X(dirtied) X(counted)
enum kind {
#define X(name) K_##name,
	KINDS(X)
#undef X
	K_COUNT
};

struct slot {
	_Atomic uint64_t begun, done;
};

static struct {
	struct kage_engine *engine;
	struct kage_vm *vm;
	unsigned granule, levels;
	uint64_t seed;
	struct slot slot[SLOTS];
	_Atomic bool stop;
	_Atomic uint64_t kind[K_COUNT];
} w;

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "arm64 stress: FAILED (granule %u): ", 1u << w.granule);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, "\nrepeat (threads race, so perhaps): KAGE_SEED=%llu\n", (unsigned long long)w.seed);
	abort();
}

#define EXPECT(x, want)                                                                        \
	do {                                                                                   \
		int got_ = (x);                                                                \
		if (got_ != (want))                                                            \
			fail("%s:%d: %s is %d, should be %d", __FILE__, __LINE__, #x, got_, (want)); \
	} while (0)

static void count(enum kind k)
{
	atomic_fetch_add_explicit(&w.kind[k], 1, memory_order_relaxed);
}

static bool stopped(void)
{
	return atomic_load_explicit(&w.stop, memory_order_relaxed);
}

static void pause_us(unsigned us)
{
	struct timespec t = {.tv_nsec = us * 1000L};

	nanosleep(&t, NULL);
}

/* -- tables ------------------------------------------------------------------ */

static unsigned shift_of(unsigned level)
{
	return w.granule + level * (w.granule - 3);
}

static uint64_t table_gpa(unsigned table)
{
	return TABLES + table * STRIDE;
}

static uint64_t entry_gpa(unsigned table, unsigned index)
{
	return table_gpa(table) + 8 * index;
}

static void put(unsigned table, unsigned index, uint64_t entry)
{
	EXPECT(kage_vm_write(w.vm, entry_gpa(table, index), &entry, 8), KAGE_OK);
}

#define E_NEXT(table) (table_gpa(table) | 3)
#define E_AF	      BIT(10)
#define E_RO	      BIT(7)
#define E_DBM	      BIT(51)
#define E_PAGE	      (BIT(11) | BIT(6) | 3) /* not global, for EL0 too; AF apart */

static uint64_t gva_of(unsigned at, unsigned index)
{
	return (uint64_t)at << shift_of(1) | (uint64_t)index << shift_of(0);
}

static uint64_t word_of(unsigned slot)
{
	return 0x600 + 8 * slot;
}

static uint64_t slot_gva(unsigned slot)
{
	return slot < SLOTS - DIR_SLOTS ? gva_of(AT_LEAF, slot) : gva_of(AT_DIR_SLOTS, slot);
}

/* Mapping n of a slot: a page, or none. Those of the directory's slots move together: the owner's slot is the last. */
static int page_of(unsigned slot, uint64_t n)
{
	if (slot >= SLOTS - DIR_SLOTS)
		return (int)(n % 3 == 2 ? -1 : (slot * 2 + n % 3) % PAGES);
	return n % 5 == 4 ? -1 : (int)((slot * 7 + n * 11) % PAGES);
}

static struct slot *counted(unsigned slot)
{
	return &w.slot[slot >= SLOTS - DIR_SLOTS ? SLOTS - 1 : slot];
}

static void build_tables(void)
{
	for (unsigned i = 0; i < SLOTS; i++) {
		if (i < SLOTS - DIR_SLOTS) {
			put(LEAF, i, PAGE(page_of(i, 0)) | E_PAGE | E_AF);
			continue;
		}
		put(DIR_LEAF_0, i, PAGE(page_of(i, 0)) | E_PAGE | E_AF);
		put(DIR_LEAF_1, i, PAGE(page_of(i, 1)) | E_PAGE);
	}
	for (unsigned i = 0; i < NTABLES; i++)
		put(WINDOW, i, table_gpa(i) | BIT(11) | E_AF | 3);
	for (unsigned i = 0; i < READERS * PRIVATE; i++)
		put(PRIV_LEAF, i, PAGE(PAGES + i) | E_PAGE | E_DBM | E_RO);
	put(DIR, AT_LEAF, E_NEXT(LEAF));
	put(DIR, AT_DIR_SLOTS, E_NEXT(DIR_LEAF_0));
	put(DIR, AT_WINDOW, E_NEXT(WINDOW));
	put(DIR, AT_PRIV, E_NEXT(PRIV_LEAF));
	/* levels 2 and up: MID below both roots */
	put(ROOT_A, 0, E_NEXT(w.levels > 3 ? MID : DIR));
	put(ROOT_B, 0, E_NEXT(w.levels > 3 ? MID : DIR));
	put(MID, 0, E_NEXT(DIR));
}

static void set_regs(struct kage_vcpu *cpu, bool el0, bool other)
{
	uint64_t tg = w.granule == 12 ? 0 : w.granule == 14 ? 2 : 1, bits = w.granule == 12 ? 48 : w.granule == 14 ? 47 : 48;
	struct kage_arm64_regs r = {.sctlr = 1, .pstate = el0 ? 0 : 4};

	r.tcr = (64 - bits) | tg << 14 | BIT(23) | 16 << 16 | 2ull << 30 | 5ull << 32 | BIT(36) | BIT(39) | BIT(40);
	r.ttbr0 = table_gpa(other ? ROOT_B : ROOT_A) | (other ? 2ull : 1ull) << 48;
	EXPECT(kage_vcpu_set_regs(cpu, &r, sizeof(r)), KAGE_OK);
}

static struct kage_vcpu *new_cpu(struct kage_vm *vm)
{
	struct kage_vcpu *cpu;

	EXPECT(kage_vcpu_create(vm, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .arch = KAGE_ARCH_ARM64, .tlb_bits = 9),
				&cpu),
	       KAGE_OK);
	set_regs(cpu, false, false);
	return cpu;
}

/* -- loads --------------------------------------------------------------------- */

static bool in_range(unsigned slot, uint64_t low, uint64_t high, int page)
{
	if (high - low > MANY)
		return true;
	for (uint64_t n = low; n <= high; n++)
		if (page_of(slot, n) == page)
			return true;
	return page < 0 && high > low; /* between break and make */
}

/* A1, with `low` taken before. `high`: the caller's, or what is begun after the load. */
static void load_slot(struct kage_vcpu *cpu, unsigned slot, uint64_t offset, uint64_t low, const uint64_t *high_given)
{
	struct kage_fault f = {0};
	uint64_t word = 0, high;
	int r = kage_vcpu_load(cpu, slot_gva(slot) + offset + MARK, &word, 8, &f), page = -1;

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	high = high_given ? *high_given : atomic_load(&counted(slot)->begun);
	if (r == KAGE_GUEST_FAULT) {
		if ((f.error & 0x3c) != 4)
			fail("slot %u: a fault with status %x", slot, f.error);
		count(K_faults);
	} else {
		EXPECT(r, KAGE_OK);
		page = (int)((word - offset - PAGE(0)) / STRIDE);
		if (word != PAGE(page) + offset)
			fail("slot %u offset %llx: %llx is no page's mark", slot, (unsigned long long)offset,
			     (unsigned long long)word);
		count(K_loads);
	}
	if (!in_range(slot, low, high, page))
		fail("slot %u: page %d is none of mappings %llu to %llu", slot, page, (unsigned long long)low,
		     (unsigned long long)high);
}

static uint64_t some_offset(struct rng *rng)
{
	return rng_below(rng, BIT(w.granule - 12)) << 12;
}

static void load_any(struct kage_vcpu *cpu, struct rng *rng)
{
	unsigned slot = (unsigned)rng_below(rng, SLOTS);

	load_slot(cpu, slot, some_offset(rng), atomic_load(&counted(slot)->done), NULL);
}

struct reader {
	unsigned id;
	struct rng rng;
	struct kage_vcpu *cpu;
	uint64_t value[PRIVATE];
};

/* A3 */
static void use_private(struct reader *r)
{
	unsigned n = (unsigned)rng_below(&r->rng, PRIVATE);
	uint64_t gva = gva_of(AT_PRIV, r->id * PRIVATE + n) + 0x800, got;

	EXPECT(kage_vcpu_load(r->cpu, gva, &got, 8, NULL), KAGE_OK);
	if (got != r->value[n])
		fail("reader %u page %u: %llx, stored was %llx", r->id, n, (unsigned long long)got,
		     (unsigned long long)r->value[n]);
	if (n < HOT || rng_below(&r->rng, 4000) == 0) { /* the others rest long enough to be merged */
		r->value[n] = rng_below(&r->rng, 4); /* few: pages become equal */
		EXPECT(kage_vcpu_store(r->cpu, gva, &r->value[n], 8, NULL), KAGE_OK);
		count(K_stores);
	}
}

/* A6, the reader's side. */
static void count_in_slot(struct reader *r)
{
	unsigned slot = (unsigned)rng_below(&r->rng, SLOTS - DIR_SLOTS);
	uint64_t *word;
	struct kage_fault f;

	if (kage_vcpu_ptr(r->cpu, slot_gva(slot) + word_of(slot), 8, KAGE_READ | KAGE_WRITE, (void **)&word, &f) != KAGE_OK)
		return;
	for (unsigned i = 0; i < 20000 && !kage_vcpu_wanted(r->cpu); i++)
		__atomic_fetch_add(word, 1, __ATOMIC_RELAXED);
	count(K_counted);
}

static void block_of_work(struct reader *r)
{
	kage_vcpu_enter(r->cpu);
	if (rng_chance(&r->rng, 10))
		count_in_slot(r);
	for (unsigned i = 0; i < 32 && !kage_vcpu_wanted(r->cpu); i++)
		load_any(r->cpu, &r->rng);
	kage_vcpu_leave(r->cpu);
	count(K_blocks);
}

static void *reader_thread(void *arg)
{
	struct reader r = {.id = (unsigned)(uintptr_t)arg, .rng = rng_seed(w.seed + 10 + (uintptr_t)arg)};

	r.cpu = new_cpu(w.vm);
	while (!stopped()) {
		unsigned dice = (unsigned)rng_below(&r.rng, 100);

		if (dice < 70)
			load_any(r.cpu, &r.rng);
		else if (dice < 90)
			use_private(&r);
		else if (dice < 95)
			block_of_work(&r);
		else
			set_regs(r.cpu, rng_chance(&r.rng, 50), rng_chance(&r.rng, 50));
	}
	kage_vcpu_destroy(r.cpu);
	return NULL;
}

/* -- changes of tables ------------------------------------------------------------ */

struct owner {
	struct rng rng;
	struct kage_vcpu *cpu;
};

static void write_entry(struct owner *o, unsigned table, unsigned index, uint64_t entry)
{
	if (rng_chance(&o->rng, 25))
		put(table, index, entry);
	else
		EXPECT(kage_vcpu_store(o->cpu, gva_of(AT_WINDOW, table) + 8 * index, &entry, 8, NULL), KAGE_OK);
}

static void flush(struct owner *o, uint32_t kind, uint64_t gva)
{
	EXPECT(kage_vcpu_flush(o->cpu, KAGE_CFG(kage_flush, .kind = kind, .gva = gva, .asid = 1)), KAGE_OK);
}

/* A2: only hardware writes to this entry beside its owner. */
static void check_flags(struct owner *o, unsigned slot, uint64_t entry)
{
	uint64_t word = entry, gva = slot_gva(slot) + 0x400, now;
	bool clean = (entry & E_DBM) && (entry & E_RO);
	struct kage_fault f;
	int r = kage_vcpu_store(o->cpu, gva, &word, 8, &f);

	if (r == KAGE_MMIO) /* its page is protected just now */
		return;
	if (!clean && (entry & E_RO)) {
		EXPECT(r, KAGE_GUEST_FAULT);
		if (f.error != (0x0f | 0x40))
			fail("slot %u: a store to a read-only page: status %x", slot, f.error);
		return;
	}
	EXPECT(r, KAGE_OK);
	EXPECT(kage_vcpu_load(o->cpu, gva_of(AT_WINDOW, LEAF) + 8 * slot, &now, 8, NULL), KAGE_OK);
	if (now != ((entry | E_AF) & (clean ? ~E_RO : ~(uint64_t)0)))
		fail("slot %u: entry %llx is %llx after a store", slot, (unsigned long long)entry,
		     (unsigned long long)now);
	count(K_dirtied);
}

/* A6: between break and make. */
static void check_quiet(unsigned slot, int page)
{
	uint64_t first, again;

	EXPECT(kage_vm_read(w.vm, PAGE(page) + word_of(slot), &first, 8), KAGE_OK);
	pause_us(50); /* who was stopped in the middle may go on */
	EXPECT(kage_vm_read(w.vm, PAGE(page) + word_of(slot), &again, 8), KAGE_OK);
	if (again != first)
		fail("slot %u: a store through its old mapping, to page %d", slot, page);
}

static void remap(struct owner *o, unsigned slot)
{
	uint64_t n = atomic_load(&w.slot[slot].done) + 1, entry = 0;
	int page = page_of(slot, n), old = page_of(slot, n - 1);

	if (page >= 0)
		entry = PAGE(page) | E_PAGE | (rng_chance(&o->rng, 60) ? E_AF : 0) |
			(rng_chance(&o->rng, 50) ? E_RO | (rng_chance(&o->rng, 70) ? E_DBM : 0) : 0);
	atomic_store(&w.slot[slot].begun, n);
	write_entry(o, LEAF, slot, 0);
	flush(o, rng_chance(&o->rng, 90) ? KAGE_FLUSH_PAGE : KAGE_FLUSH_ALL, slot_gva(slot) + some_offset(&o->rng));
	if (old >= 0 && rng_chance(&o->rng, 40))
		check_quiet(slot, old);
	if (entry)
		write_entry(o, LEAF, slot, entry);
	atomic_store(&w.slot[slot].done, n);
	count(K_remaps);
	if (entry && rng_chance(&o->rng, 50))
		check_flags(o, slot, entry);
}

/* A table of pages in place of another one. */
static void remap_dir(struct owner *o)
{
	struct slot *s = &w.slot[SLOTS - 1];
	uint64_t n = atomic_load(&s->done) + 1;

	atomic_store(&s->begun, n);
	write_entry(o, DIR, AT_DIR_SLOTS, 0);
	flush(o, KAGE_FLUSH_ALL, 0);
	if (n % 3 != 2)
		write_entry(o, DIR, AT_DIR_SLOTS, E_NEXT(n % 3 ? DIR_LEAF_1 : DIR_LEAF_0));
	atomic_store(&s->done, n);
	count(K_remaps);
}

static void *owner_thread(void *arg)
{
	unsigned id = (unsigned)(uintptr_t)arg;
	struct owner o = {.rng = rng_seed(w.seed + 20 + id)};

	o.cpu = new_cpu(w.vm);
	while (!stopped()) {
		unsigned slot = (unsigned)rng_below(&o.rng, SLOTS - DIR_SLOTS) / OWNERS * OWNERS + id;

		if (id == 0 && rng_chance(&o.rng, 15))
			remap_dir(&o);
		else
			remap(&o, slot);
		if (rng_chance(&o.rng, 10))
			pause_us(200);
	}
	kage_vcpu_destroy(o.cpu);
	return NULL;
}

/* -- changes of memory ------------------------------------------------------------- */

/* A4 */
static void clone_once(struct rng *rng)
{
	uint64_t low[SLOTS], high[SLOTS];
	struct kage_vcpu *cpu;
	struct kage_vm *vm;

	for (unsigned i = 0; i < SLOTS; i++)
		low[i] = atomic_load(&counted(i)->done);
	EXPECT(kage_vm_clone(w.vm, NULL, &vm), KAGE_OK);
	for (unsigned i = 0; i < SLOTS; i++)
		high[i] = atomic_load(&counted(i)->begun);
	cpu = new_cpu(vm);
	set_regs(cpu, rng_chance(rng, 50), rng_chance(rng, 50));
	for (unsigned i = 0; i < 3 * SLOTS; i++)
		load_slot(cpu, i % SLOTS, some_offset(rng), low[i % SLOTS], &high[i % SLOTS]);
	for (unsigned i = 0; i < READERS * PRIVATE; i++) /* of which the parent's readers see nothing */
		EXPECT(kage_vcpu_store(cpu, gva_of(AT_PRIV, i) + 0x800, &(uint64_t){~0ull}, 8, NULL), KAGE_OK);
	kage_vcpu_destroy(cpu);
	EXPECT(kage_vm_destroy(vm), KAGE_OK);
	count(K_clones);
}

static void protect_once(struct rng *rng)
{
	uint64_t gpa = PAGE(rng_below(rng, PAGES - 4)), len = 1 + rng_below(rng, 4 * STRIDE / 4096);

	EXPECT(kage_vm_protect(w.vm, gpa, len * 4096, KAGE_READ), KAGE_OK);
	pause_us((unsigned)rng_below(rng, 200));
	EXPECT(kage_vm_protect(w.vm, gpa, len * 4096, KAGE_RWX), KAGE_OK);
	count(K_protects);
}

/* One that comes, looks and goes. */
static void vcpu_once(struct rng *rng)
{
	struct kage_vcpu *cpu = new_cpu(w.vm);

	set_regs(cpu, false, true);
	for (unsigned i = 0; i < 32; i++)
		load_any(cpu, rng);
	kage_vcpu_destroy(cpu);
	count(K_vcpus);
}

static void audit_line(void *opaque, const char *line)
{
	(void)opaque;
	fprintf(stderr, "audit: %s\n", line);
}

static void audit_once(void)
{
	struct kage_audit a = {.size = sizeof(a), .report = audit_line};

	if (kage_engine_audit(w.engine, &a) != KAGE_OK || a.violations)
		fail("the audit found %llu violations", (unsigned long long)a.violations);
	count(K_audits);
}

static void *memory_thread(void *arg)
{
	struct rng rng = rng_seed(w.seed + 30);
	struct kage_progress p = {.size = sizeof(p)};

	(void)arg;
	for (uint64_t n = 0; !stopped(); n++) {
		switch (n % 4) {
		case 0: clone_once(&rng); break;
		case 1: protect_once(&rng); break;
		case 2: vcpu_once(&rng); break;
		default:
			for (unsigned pass = 0; pass < 3; pass++) {
				EXPECT(kage_engine_step(w.engine, NULL, &p), KAGE_OK);
				atomic_fetch_add(&w.kind[K_merged], p.pages_merged);
			}
		}
		if (n % 64 == 32)
			audit_once();
		pause_us((unsigned)rng_below(&rng, 300));
	}
	return NULL;
}

/* -- one granule ---------------------------------------------------------------------- */

static void begin(unsigned granule)
{
	w.granule = granule;
	w.levels = granule == 12 ? 4 : 3;
	for (unsigned i = 0; i < SLOTS; i++)
		w.slot[i].begun = w.slot[i].done = 0;
	w.stop = false;
	EXPECT(kage_engine_create(KAGE_CFG(kage_engine_config, .seed = w.seed), &w.engine), KAGE_OK);
	EXPECT(kage_engine_tune(w.engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)), KAGE_OK);
	EXPECT(kage_vm_create(w.engine, NULL, &w.vm), KAGE_OK);
	EXPECT(kage_vm_map(w.vm, KAGE_CFG(kage_region, .flags = KAGE_REGION_MERGEABLE, .len = RAM)), KAGE_OK);
	for (uint64_t gpa = PAGE(0); gpa < PAGE(PAGES); gpa += 4096)
		EXPECT(kage_vm_write(w.vm, gpa + MARK, &gpa, 8), KAGE_OK);
	build_tables();
}

/* Nothing changes any more: every slot has exactly its last mapping, in a new vCPU too. */
static void end(void)
{
	struct kage_vcpu *cpu = new_cpu(w.vm);

	for (unsigned i = 0; i < SLOTS; i++) {
		uint64_t last = atomic_load(&counted(i)->done);

		load_slot(cpu, i, 0, last, &last);
	}
	audit_once();
	kage_vcpu_destroy(cpu);
	EXPECT(kage_vm_destroy(w.vm), KAGE_OK);
	audit_once();
	EXPECT(kage_engine_destroy(w.engine), KAGE_OK);
}

static void run(unsigned granule, uint64_t ms)
{
	pthread_t thread[READERS + OWNERS + 1];
	struct timespec t = {.tv_sec = (time_t)(ms / 1000), .tv_nsec = (long)(ms % 1000) * 1000000};
	unsigned n = 0;

	begin(granule);
	for (uintptr_t i = 0; i < READERS; i++)
		EXPECT(pthread_create(&thread[n++], NULL, reader_thread, (void *)i), 0);
	for (uintptr_t i = 0; i < OWNERS; i++)
		EXPECT(pthread_create(&thread[n++], NULL, owner_thread, (void *)i), 0);
	EXPECT(pthread_create(&thread[n++], NULL, memory_thread, NULL), 0);
	nanosleep(&t, NULL);
	atomic_store(&w.stop, true);
	while (n)
		pthread_join(thread[--n], NULL);
	end();
}

int main(void)
{
	static const char *const name[] = {
#define X(n) #n,
	    KINDS(X)
#undef X
	};
	uint64_t seconds = env_number("KAGE_STRESS_SECONDS", 60);
	int bad = 0;

	w.seed = env_number("KAGE_SEED", 11);
	printf("arm64 stress: %llu s, seed %llu\n", (unsigned long long)seconds, (unsigned long long)w.seed);
	fflush(stdout);
	for (unsigned granule = 12; granule <= 16; granule += 2)
		run(granule, seconds * 1000 / 3);
	for (unsigned k = 0; k < K_COUNT; k++) {
		printf("arm64 stress: %-9s %llu%s\n", name[k], (unsigned long long)w.kind[k], w.kind[k] ? "" : "  NONE");
		bad |= !w.kind[k];
	}
	if (bad)
		printf("arm64 stress: FAILED: too little happened\n");
	return bad;
}
