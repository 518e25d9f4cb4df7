/* SPDX-License-Identifier: MIT */
/*
 * Threads that change the guests under the vCPU threads: merging, cloning,
 * regions, listeners, dirty logs. Each checks what its own changes promise.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "stress.h"

/* -- merging, and the audit now and then ------------------------------------------ */

static uint64_t audits_due(uint64_t steps)
{
	return steps % 256 == 255;
}

void *merge_thread(void *arg)
{
	struct rng rng = rng_seed(world.seed + 100 + (uintptr_t)arg);
	struct kage_progress p = {.size = sizeof(p)};

	for (uint64_t n = 0; !stopped(); n++) {
		uint64_t pages = rng_chance(&rng, 30) ? 64 + rng_below(&rng, 512) : 0;

		if (n % 64 == 0)
			EXPECT(kage_engine_tune(world.engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE,
								       .no_zero_pages = n / 64 % 4 == 3)),
			       KAGE_OK);
		EXPECT(kage_engine_step(world.engine, KAGE_CFG(kage_budget, .pages = pages), &p), KAGE_OK);
		atomic_store(&world.passes, p.passes);
		atomic_fetch_add(&world.kind[KIND_merges], p.pages_merged);
		if (audits_due(n))
			audit_engine();
		pause_us(50);
	}
	return NULL;
}

/* -- cloning ------------------------------------------------------------------------- */

#define SAMPLE 48

/* What a snapshot of a guest must lie between, taken before and after. */
struct bounds {
	uint64_t ring_lower[WORKERS], ring_upper[WORKERS];
	unsigned page[SAMPLE];
	uint64_t lower[SAMPLE], upper[SAMPLE];
};

struct clone {
	struct kage_vm *vm;
	const struct guest *of;
	uint64_t ring[WORKERS][RING_PAGES];
	unsigned page[SAMPLE];
	uint64_t word[SAMPLE][2];
};

static uint64_t read_word(struct kage_vm *vm, uint64_t gpa)
{
	uint64_t word;

	EXPECT(kage_vm_read(vm, gpa, &word, 8), KAGE_OK);
	return word;
}

static void bounds_before(struct bounds *b, struct guest *g, struct rng *rng)
{
	for (unsigned i = 0; i < SAMPLE; i++) {
		b->page[i] = rng_below(rng, STAMPS_PAGES);
		b->lower[i] = atomic_load(&g->lower[b->page[i]]);
	}
	for (unsigned w = 0; w < WORKERS; w++)
		b->ring_lower[w] = atomic_load(&g->ring[w].lower);
}

static void bounds_after(struct bounds *b, struct guest *g)
{
	for (unsigned i = 0; i < SAMPLE; i++)
		b->upper[i] = atomic_load(&g->upper[b->page[i]]);
	for (unsigned w = 0; w < WORKERS; w++)
		b->ring_upper[w] = atomic_load(&g->ring[w].upper);
}

/* One ring holds a prefix of its history: the newest entry says what all others are. Returns its number. */
static uint64_t check_ring(const struct clone *c, unsigned w)
{
	uint64_t newest = 0;

	for (unsigned i = 0; i < RING_PAGES; i++)
		newest = c->ring[w][i] >> 32 > newest ? c->ring[w][i] >> 32 : newest;
	for (unsigned i = 0; i < RING_PAGES; i++) {
		uint64_t back = (newest - i) % RING_PAGES, want = newest < back ? 0 : newest - back;

		if (c->ring[w][i] >> 32 != want)
			stress_fail(
			    "a clone of guest %u: ring %u holds %llu but slot %u has %llu, should be %llu",
			    c->of->id, w, (unsigned long long)newest, i,
			    (unsigned long long)c->ring[w][i] >> 32, (unsigned long long)want);
	}
	return newest;
}

static void check_rings(const struct clone *c, const struct bounds *b)
{
	uint64_t newest[WORKERS];

	for (unsigned w = 0; w < WORKERS; w++) {
		newest[w] = check_ring(c, w);
		if (newest[w] < b->ring_lower[w] || newest[w] > b->ring_upper[w])
			stress_fail("a clone of guest %u: ring %u holds %llu, should be in [%llu, %llu]",
				    c->of->id, w, (unsigned long long)newest[w],
				    (unsigned long long)b->ring_lower[w],
				    (unsigned long long)b->ring_upper[w]);
	}
	for (unsigned w = 0; w < WORKERS; w++) {
		uint32_t seen = c->ring[w][newest[w] % RING_PAGES];

		if (newest[w] != 0 && seen > newest[!w])
			stress_fail("a clone of guest %u: ring %u saw %u of ring %u, which ends at %llu",
				    c->of->id, w, seen, !w, (unsigned long long)newest[!w]);
	}
}

static void check_sample(const struct clone *c, const struct bounds *b)
{
	for (unsigned i = 0; i < SAMPLE; i++) {
		unsigned p = c->page[i];
		uint64_t a = c->word[i][0], bb = c->word[i][1], stamp = a & STAMP_MASK;

		if (a >> STAMP_BITS != p / GROUP_PAGES + 1 || bb >> STAMP_BITS != p / GROUP_PAGES + 1)
			stress_fail("a clone of guest %u: page %u holds 0x%llx", c->of->id, p,
				    (unsigned long long)a);
		if (stamp < b->lower[i] || stamp > b->upper[i])
			stress_fail("a clone of guest %u: page %u has stamp %llu, should be in [%llu, %llu]",
				    c->of->id, p, (unsigned long long)stamp, (unsigned long long)b->lower[i],
				    (unsigned long long)b->upper[i]);
		if (a < bb)
			stress_fail("a clone of guest %u: page %u has word B before word A", c->of->id, p);
	}
}

static void read_clone(struct clone *c)
{
	for (unsigned w = 0; w < WORKERS; w++)
		for (unsigned i = 0; i < RING_PAGES; i++)
			c->ring[w][i] = read_word(c->vm, ring_gpa(w, i));
	for (unsigned i = 0; i < SAMPLE; i++) {
		c->word[i][0] = read_word(c->vm, stamp_gpa(c->page[i]) + word_a(c->page[i]));
		c->word[i][1] = read_word(c->vm, stamp_gpa(c->page[i]) + word_b(c->page[i]));
	}
}

/* A clone that nobody writes to stays what it was. */
static void check_unchanged(const struct clone *c)
{
	struct clone now = {.vm = c->vm, .of = c->of};

	memcpy(now.page, c->page, sizeof(now.page));
	read_clone(&now);
	if (memcmp(now.ring, c->ring, sizeof(now.ring)) != 0 ||
	    memcmp(now.word, c->word, sizeof(now.word)) != 0)
		stress_fail("a clone of guest %u changed by itself", c->of->id);
}

/* The clone runs: it writes a few pages, of which the parent must not see a byte. */
static void run_clone(struct clone *c, struct rng *rng)
{
	struct kage_vcpu *vcpu;
	uint64_t word, want;

	EXPECT(
	    kage_vcpu_create(c->vm, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .tlb_bits = 9), &vcpu),
	    KAGE_OK);
	for (unsigned i = 0; i < 16; i++) {
		uint64_t gpa = stamp_gpa(rng_below(rng, STAMPS_PAGES)) + 8 * rng_below(rng, 512);

		want = (uint64_t)TAG_CLONE << STAMP_BITS | i;
		EXPECT(kage_vcpu_store(vcpu, gpa, &want, 8, NULL), KAGE_OK);
		EXPECT(kage_vcpu_load(vcpu, gpa, &word, 8, NULL), KAGE_OK);
		if (word != want)
			stress_fail("a clone does not read what it wrote");
	}
	for (unsigned i = 0; i < RING_PAGES; i++) {
		EXPECT(kage_vcpu_load(vcpu, ring_gpa(0, i), &word, 8, NULL), KAGE_OK);
		if (word != c->ring[0][i])
			stress_fail("a clone's ring changed when the clone wrote elsewhere");
	}
	kage_vcpu_destroy(vcpu);
}

static void make_clone(struct clone *c, struct guest *g, struct rng *rng)
{
	struct bounds b;

	*c = (struct clone){.of = g};
	bounds_before(&b, g, rng);
	EXPECT(kage_vm_clone(g->vm, NULL, &c->vm), KAGE_OK);
	bounds_after(&b, g);
	count(KIND_clones);
	memcpy(c->page, b.page, sizeof(c->page));
	read_clone(c);
	check_rings(c, &b);
	check_sample(c, &b);
	atomic_fetch_add(&world.snapshots, 1);
}

static void destroy_clone(struct clone *c)
{
	if (c->vm == NULL)
		return;
	EXPECT(kage_vm_destroy(c->vm), KAGE_OK);
	c->vm = NULL;
	count(KIND_destroys);
}

/* A clone of the clone goes on after its parent went. */
static void clone_again(struct clone *c)
{
	struct clone again = *c;

	EXPECT(kage_vm_clone(c->vm, NULL, &again.vm), KAGE_OK);
	count(KIND_clones);
	check_unchanged(&again);
	destroy_clone(c);
	check_unchanged(&again);
	destroy_clone(&again);
}

#define ALIVE 3

void *clone_thread(void *arg)
{
	struct rng rng = rng_seed(world.seed + 200);
	static struct clone alive[ALIVE];

	for (uint64_t n = 0; !stopped(); n++) {
		struct clone *c = &alive[n % ALIVE];

		if (c->vm != NULL) {
			check_unchanged(c);
			if (rng_chance(&rng, 30))
				run_clone(c, &rng);
			else if (rng_chance(&rng, 20))
				clone_again(c);
			destroy_clone(c);
		}
		make_clone(c, &world.guest[rng_below(&rng, GUESTS)], &rng);
		pause_us(rng_below(&rng, 1500));
	}
	for (unsigned i = 0; i < ALIVE; i++)
		destroy_clone(&alive[i]);
	return NULL;
}

/* -- regions ----------------------------------------------------------------------------- */

struct churn {
	struct rng rng;
	struct guest *g;
	struct kage_vcpu *vcpu;
};

static uint64_t mark(struct churn *c, unsigned tag)
{
	return (uint64_t)tag << STAMP_BITS | (atomic_fetch_add(&c->g->marks, 1) + 1);
}

static int churn_load(struct churn *c, uint64_t gpa, uint64_t *word)
{
	return kage_vcpu_load(c->vcpu, gpa, word, 8, NULL);
}

static void churn_store(struct churn *c, uint64_t gpa, unsigned tag)
{
	uint64_t word = mark(c, tag), now;

	EXPECT(kage_vcpu_store(c->vcpu, gpa, &word, 8, NULL), KAGE_OK);
	EXPECT(churn_load(c, gpa, &now), KAGE_OK);
	if (now != word)
		stress_fail("gpa 0x%llx: stored 0x%llx, loaded 0x%llx", (unsigned long long)gpa,
			    (unsigned long long)word, (unsigned long long)now);
}

/* `count` pages of an area, some way in. */
static uint64_t some_pages(struct churn *c, uint64_t gpa, unsigned pages, unsigned number)
{
	return gpa + rng_below(&c->rng, pages - number + 1) * PAGE;
}

static void churn_discard(struct churn *c)
{
	unsigned n = 1 + rng_below(&c->rng, 8);
	uint64_t gpa = some_pages(c, DISCARD, DISCARD_PAGES, n), word;

	for (unsigned i = 0; i < n; i++)
		churn_store(c, gpa + i * PAGE, TAG_DISCARD);
	EXPECT(kage_vm_advise(c->g->vm, gpa, n * PAGE, KAGE_ADVICE_DISCARD), KAGE_OK);
	for (unsigned i = 0; i < n; i++) {
		EXPECT(churn_load(c, gpa + i * PAGE, &word), KAGE_OK);
		if (word != 0)
			stress_fail("0x%llx after discarding", (unsigned long long)word);
	}
	count(KIND_discards);
}

static void churn_map(struct churn *c)
{
	uint64_t word;

	EXPECT(kage_vm_map(c->g->vm, KAGE_CFG(kage_region, .flags = KAGE_REGION_MERGEABLE, .gpa = MAPPED,
					      .len = MAPPED_PAGES * PAGE)),
	       KAGE_OK);
	count(KIND_maps);
	for (unsigned i = 0; i < 4; i++) {
		uint64_t gpa = MAPPED + (i * 16 + rng_below(&c->rng, 16)) * PAGE;

		EXPECT(churn_load(c, gpa, &word), KAGE_OK);
		if (word != 0)
			stress_fail("0x%llx in fresh memory", (unsigned long long)word);
		churn_store(c, gpa, TAG_MAPPED);
	}
	EXPECT(kage_vm_unmap(c->g->vm, MAPPED, MAPPED_PAGES * PAGE), KAGE_OK);
	count(KIND_unmaps);
	EXPECT(churn_load(c, MAPPED, &word), KAGE_MMIO);
	EXPECT(kage_vm_read(c->g->vm, MAPPED, &word, 8), KAGE_MMIO);
}

static void churn_protect(struct churn *c)
{
	unsigned n = 1 + rng_below(&c->rng, PROTECT_PAGES);
	uint64_t gpa = some_pages(c, PROTECT, PROTECT_PAGES, n), word = mark(c, TAG_PROTECT), now;

	churn_store(c, gpa, TAG_PROTECT);
	EXPECT(kage_vm_protect(c->g->vm, gpa, n * PAGE, KAGE_READ), KAGE_OK);
	EXPECT(kage_vcpu_store(c->vcpu, gpa, &word, 8, NULL), KAGE_MMIO);
	EXPECT(kage_vm_write(c->g->vm, gpa, &word, 8), KAGE_MMIO);
	EXPECT(churn_load(c, gpa, &now), KAGE_OK);
	EXPECT(now >> STAMP_BITS, TAG_PROTECT);
	EXPECT(kage_vm_protect(c->g->vm, gpa, n * PAGE, KAGE_RWX), KAGE_OK);
	churn_store(c, gpa, TAG_PROTECT);
	count(KIND_protects);
}

/* Takes a group out of merging and back: neither may change a byte, which the workers watch. */
static void churn_advise(struct churn *c)
{
	uint64_t gpa = stamp_gpa(rng_below(&c->rng, GROUPS) * GROUP_PAGES);
	unsigned n = 1 + rng_below(&c->rng, GROUP_PAGES / 4);

	EXPECT(kage_vm_advise(c->g->vm, gpa, n * PAGE, KAGE_ADVICE_UNMERGEABLE), KAGE_OK);
	EXPECT(kage_vm_advise(c->g->vm, gpa, n * PAGE, KAGE_ADVICE_WILLNEED), KAGE_OK);
	EXPECT(kage_vm_advise(c->g->vm, gpa, GROUP_PAGES * PAGE, KAGE_ADVICE_MERGEABLE), KAGE_OK);
	count(KIND_advices);
}

/* A device: what it writes through pinned pointers is there, and nowhere else. */
static void churn_pin(struct churn *c)
{
	uint64_t gpa = some_pages(c, DISCARD, DISCARD_PAGES, 4), word = mark(c, TAG_DISCARD), now;
	struct iovec iov[4];
	unsigned n = 4;

	EXPECT(kage_vm_pin(c->g->vm, gpa, 4 * PAGE, 0, iov, &n), KAGE_OK);
	EXPECT(kage_vm_advise(c->g->vm, gpa, PAGE, KAGE_ADVICE_DISCARD), -EBUSY);
	__atomic_store_n((uint64_t *)iov[0].iov_base, word, __ATOMIC_RELAXED);
	EXPECT(kage_vm_mark_dirty(c->g->vm, gpa, 8), KAGE_OK);
	EXPECT(churn_load(c, gpa, &now), KAGE_OK);
	if (now != word)
		stress_fail("a device wrote 0x%llx, the guest reads 0x%llx", (unsigned long long)word,
			    (unsigned long long)now);
	EXPECT(kage_vm_unpin(c->g->vm, gpa, 4 * PAGE), KAGE_OK);
	count(KIND_pins);
}

void *churn_thread(void *arg)
{
	static void (*const action[])(struct churn * c) = {
	    churn_discard, churn_discard, churn_map, churn_map, churn_protect, churn_advise, churn_pin,
	};
	struct churn c = {.rng = rng_seed(world.seed + 300 + (uintptr_t)arg),
			  .g = &world.guest[(uintptr_t)arg]};

	EXPECT(kage_vcpu_create(c.g->vm, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .tlb_bits = 9),
				&c.vcpu),
	       KAGE_OK);
	for (uint64_t n = 0; !stopped(); n++) {
		action[n % (sizeof(action) / sizeof(action[0]))](&c);
		pause_us(rng_below(&c.rng, 400));
	}
	kage_vcpu_destroy(c.vcpu);
	return NULL;
}

/* -- listeners ------------------------------------------------------------------------------- */

#define IN_FLIGHT 128

/* Sees to it that starts and ends pair up, and that nothing comes after unregistering. */
struct listener {
	struct kage_notifier n;		/* first */
	_Atomic uint64_t id[IN_FLIGHT]; /* changes in flight, by their slot */
	_Atomic uint64_t starts, ends;
	_Atomic bool gone;
};

static struct listener *listener_of(struct kage_notifier *n)
{
	return (struct listener *)n;
}

static int on_start(struct kage_notifier *n, const struct kage_range *range)
{
	struct listener *l = listener_of(n);

	if (atomic_load(&l->gone))
		stress_fail("a start after the listener had gone");
	if (range->start >= range->end || range->start % PAGE != 0 || range->end % PAGE != 0)
		stress_fail("a range that is none");
	for (unsigned i = 0; i < IN_FLIGHT; i++) {
		uint64_t none = 0;

		if (atomic_compare_exchange_strong(&l->id[i], &none, range->id + 1))
			break;
		if (i == IN_FLIGHT - 1)
			stress_fail("more changes in flight than there can be");
	}
	atomic_fetch_add(&l->starts, 1);
	return 0;
}

static void on_end(struct kage_notifier *n, const struct kage_range *range)
{
	struct listener *l = listener_of(n);

	if (atomic_load(&l->gone))
		stress_fail("an end after the listener had gone");
	for (unsigned i = 0; i < IN_FLIGHT; i++) {
		uint64_t id = range->id + 1;

		if (atomic_compare_exchange_strong(&l->id[i], &id, 0))
			break;
		if (i == IN_FLIGHT - 1)
			stress_fail("an end without its start");
	}
	atomic_fetch_add(&l->ends, 1);
}

static const struct kage_notifier_ops listener_ops = {
    .invalidate_range_start = on_start,
    .invalidate_range_end = on_end,
};

static void churn_listener(struct listener *l, struct guest *g, struct rng *rng)
{
	memset(l, 0, sizeof(*l));
	EXPECT(kage_notifier_register(g->vm, &l->n, &listener_ops), KAGE_OK);
	pause_us(rng_below(rng, 300));
	EXPECT(kage_notifier_unregister(&l->n), KAGE_OK);
	atomic_store(&l->gone, true);
	if (atomic_load(&l->starts) != atomic_load(&l->ends))
		stress_fail("%llu starts, %llu ends", (unsigned long long)atomic_load(&l->starts),
			    (unsigned long long)atomic_load(&l->ends));
	count(KIND_notifiers);
}

/* A device that mirrors DISCARD: what it read between begin and a successful retry check is current. */
static int on_invalidate(struct kage_interval *i, const struct kage_range *range)
{
	if (range->start >= i->end || range->end <= i->start)
		stress_fail("an interval was told of a range that is not its own");
	return 0;
}

static void churn_interval(struct guest *g, struct rng *rng)
{
	struct kage_interval i = {
	    .invalidate = on_invalidate,
	    .start = DISCARD,
	    .end = DISCARD + DISCARD_PAGES * PAGE,
	};

	EXPECT(kage_interval_insert(g->vm, &i), KAGE_OK);
	for (unsigned n = 0; n < 4; n++) {
		uint64_t seq = kage_interval_read_begin(&i);

		read_word(g->vm, DISCARD + rng_below(rng, DISCARD_PAGES) * PAGE);
		if (kage_interval_read_retry(&i, seq))
			atomic_fetch_add(&world.lost_races, 1);
	}
	EXPECT(kage_interval_remove(&i), KAGE_OK);
	count(KIND_intervals);
}

void *notify_thread(void *arg)
{
	struct rng rng = rng_seed(world.seed + 400);
	static struct listener listener[2];

	for (uint64_t n = 0; !stopped(); n++) {
		struct guest *g = &world.guest[rng_below(&rng, GUESTS)];

		churn_listener(&listener[n % 2], g, &rng);
		churn_interval(g, &rng);
		pause_us(rng_below(&rng, 300));
	}
	return NULL;
}

/* -- dirty logs --------------------------------------------------------------------------------- */

/* A live migration of the stamps: copied once, then what each harvest names. */
struct migration {
	struct guest *g;
	struct kage_vcpu *vcpu;
	struct kage_dirty *log;
	uint64_t copy[STAMPS_PAGES];
};

static uint64_t copy_stamp(struct migration *m, unsigned page)
{
	uint64_t word;

	EXPECT(kage_vcpu_load(m->vcpu, stamp_gpa(page) + word_a(page), &word, 8, NULL), KAGE_OK);
	return word & STAMP_MASK;
}

static void migration_begin(struct migration *m, bool fine)
{
	EXPECT(kage_dirty_open(m->g->vm, KAGE_CFG(kage_dirty_config, .flags = fine ? KAGE_DIRTY_FINE : 0),
			       &m->log),
	       KAGE_OK);
	for (unsigned p = 0; p < STAMPS_PAGES; p++)
		m->copy[p] = copy_stamp(m, p);
}

/* T5: stored before the harvest, not in the copy, not named: lost. */
static void migration_harvest(struct migration *m)
{
	uint64_t before[STAMPS_PAGES], bits[STAMPS_PAGES / 64];

	for (unsigned p = 0; p < STAMPS_PAGES; p++)
		before[p] = atomic_load(&m->g->lower[p]);
	if (kage_dirty_collect(m->log, STAMPS, STAMPS_PAGES * PAGE, bits, sizeof(bits)) < 0)
		stress_fail("a harvest failed");
	for (unsigned p = 0; p < STAMPS_PAGES; p++) {
		if (bits[p / 64] >> (p % 64) & 1)
			m->copy[p] = copy_stamp(m, p);
		else if (m->copy[p] < before[p])
			stress_fail(
			    "guest %u page %u: stamp %llu was stored and not reported; the copy has %llu",
			    m->g->id, p, (unsigned long long)before[p], (unsigned long long)m->copy[p]);
	}
	count(KIND_harvests);
}

void *dirty_thread(void *arg)
{
	struct rng rng = rng_seed(world.seed + 500);
	static struct migration m[GUESTS];

	for (unsigned i = 0; i < GUESTS; i++) {
		m[i] = (struct migration){.g = &world.guest[i]};
		EXPECT(kage_vcpu_create(m[i].g->vm, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI),
					&m[i].vcpu),
		       KAGE_OK);
	}
	for (uint64_t n = 0; !stopped(); n++) {
		struct migration *one = &m[n % GUESTS];

		if (one->log != NULL && rng_chance(&rng, 5)) {
			kage_dirty_close(one->log);
			one->log = NULL;
		}
		if (one->log == NULL)
			migration_begin(one, rng_chance(&rng, 50));
		migration_harvest(one);
		pause_us(rng_below(&rng, 2000));
	}
	for (unsigned i = 0; i < GUESTS; i++) {
		kage_dirty_close(m[i].log);
		kage_vcpu_destroy(m[i].vcpu);
	}
	return NULL;
}
