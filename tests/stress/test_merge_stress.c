/* SPDX-License-Identifier: MIT */
/*
 * Merging against everybody else: writers, pins, discards, clones, unmaps, ends of guests, unmerging
 * with and without memory to spare, hints; two threads that merge, and audits.
 *
 * Pages hold one of a few contents, so nearly each can be merged with nearly each other. Each thread that writes owns
 * every OWNERS-th page of each guest and knows what it holds; nobody else writes it. So a byte that is lost, undone or
 * another page's is seen by its owner, and all are read at the end.
 *
 *   struct slot    a guest, its vCPUs, what its pages hold, and the merge that is in flight over it
 *   struct seen    the range that a listener was told of: a change with SAME_CONTENT that may be abandoned is a merge
 *
 * Races are not left to luck: a listener holds every second merge back for a moment between its start and its end, and the
 * other threads go for pages of ranges that are in flight. What is counted are operations that began in that time ("met").
 * The run goes on until each has been met often enough, PATIENCE times as long as asked for at most: on a machine that has other things
 * to do threads that wait for each other's moments meet less and less often.
 *
 * Locks: slot->life, for reading around operations, for writing by who makes and ends guests, or wants it
 * quiet to clone it. Merging knows nothing of it.
 *
 * Environment: KAGE_STRESS_SECONDS (30; half of it with a memory limit), KAGE_SEED (else the day's), KAGE_STRESS_HARDENED
 * (1: one of the two merge domains is hardened, without a limit).
 */
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

#include <kage/kage.h>

#include "../model/rng.h"

#define PAGE      ((uint64_t)4096)
#define SLOTS_ALL 3
#define PAGES_ALL 640 /* of a guest: more than 2 MiB */
#define SIDE_GPA  ((uint64_t)1 << 30)
#define SIDE_PAGES 96
#define CONTENTS  5 /* 0: zero */
#define LIMIT	  (PAGE * 800) /* of some 2,300 pages that there may be */
#define MET_LEAST 20
#define PATIENCE 60
#define RANGE(start, end) ((start) << 32 | (end))

enum owner { WRITER_0, WRITER_1, DEVICE, DISCARDER, OWNERS };

#define RACES(X)                                                                                             \
	X(writes) X(pins) X(discards) X(unmaps) X(clones) X(destroys) X(unmerges) X(hints) X(hints_unmapped) \
	X(hints_destroyed) X(unmerge_nomem)

enum race {
#define X(name) RACE_##name,
	RACES(X)
#undef X
	RACE_COUNT
};

struct slot {
	struct kage_notifier n; /* first */
	struct kage_vm *vm;
	struct kage_vcpu *vcpu[2];
	pthread_rwlock_t life;
	_Atomic uint32_t holds[PAGES_ALL];
	_Atomic uint64_t merging; /* RANGE() of pages, 0: none. Pages of SIDE come behind the others */
};

static struct {
	struct kage_engine *engine;
	struct slot slot[SLOTS_ALL];
	uint64_t seed, seconds;
	bool limited, hardened;
	_Atomic bool stop;
	_Atomic uint64_t done[RACE_COUNT], met[RACE_COUNT], merges, audits, turn;
} w;

/* Of one thread. */
struct self {
	struct rng rng;
	unsigned number;
};

static void die(const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "merge-stress: FAILED: ");
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, "\nrepeat (threads race, so perhaps): KAGE_SEED=%llu\n", (unsigned long long)w.seed);
	abort();
}

#define MUST(call)                                                           \
	do {                                                                 \
		int r_ = (call);                                             \
		if (r_ != KAGE_OK)                                           \
			die("line %d: " #call " returned %d", __LINE__, r_); \
	} while (0)

/* True: it was done; else there was no memory for it. */
#define DONE(call)                                                           \
	({                                                                   \
		int r_ = (call);                                             \
		if (r_ != KAGE_OK && r_ != -ENOMEM)                          \
			die("line %d: " #call " returned %d", __LINE__, r_); \
		if (r_ && !w.limited)                                        \
			die("line %d: " #call ": no memory", __LINE__);      \
		r_ == KAGE_OK;                                               \
	})

/* Steps merge, and give memory back. */
#define UNTIL_DONE(call)                                                     \
	do {                                                                 \
	} while (!DONE(call) && (DONE(kage_engine_step(w.engine, NULL, NULL)), true))

static void nap(unsigned us)
{
	nanosleep(&(struct timespec){.tv_nsec = us * 1000L}, NULL);
}

static bool over(void)
{
	return atomic_load_explicit(&w.stop, memory_order_relaxed);
}

static void count_race(enum race r, bool met)
{
	atomic_fetch_add_explicit(&w.done[r], 1, memory_order_relaxed);
	if (met)
		atomic_fetch_add_explicit(&w.met[r], 1, memory_order_relaxed);
}

/* -- merges in flight ------------------------------------------------------------- */

static uint64_t page_of(uint64_t gpa)
{
	return gpa >= SIDE_GPA ? PAGES_ALL + (gpa - SIDE_GPA) / PAGE : gpa / PAGE;
}

static bool is_merge(const struct kage_range *r)
{
	return r->reason == KAGE_REASON_CLEAR && r->flags & KAGE_RANGE_OPTIONAL && r->flags & KAGE_RANGE_SAME_CONTENT;
}

static int on_start(struct kage_notifier *n, const struct kage_range *r)
{
	struct slot *s = (struct slot *)n;

	if (!is_merge(r))
		return 0;
	atomic_store(&s->merging, RANGE(page_of(r->start), page_of(r->end - 1) + 1));
	if (atomic_fetch_add(&w.turn, 1) % 2)
		nap(300);
	return 0;
}

static void on_end(struct kage_notifier *n, const struct kage_range *r)
{
	struct slot *s = (struct slot *)n;

	if (is_merge(r))
		atomic_store(&s->merging, 0);
}

static const struct kage_notifier_ops listener = {.invalidate_range_start = on_start, .invalidate_range_end = on_end};

static bool overlaps(uint64_t range, uint64_t first, uint64_t end)
{
	return range && range >> 32 < end && first < (uint32_t)range;
}

/* Waits a little until a merge is in flight over [first, end). */
static bool await_merge(const struct slot *s, uint64_t first, uint64_t end, unsigned tries)
{
	while (tries-- > 0 && !over()) {
		if (overlaps(atomic_load(&s->merging), first, end))
			return true;
		nap(50);
	}
	return false;
}

/* One of the owner's pages, of what is being merged if there is such a thing. */
static unsigned aim(struct self *t, const struct slot *s, enum owner owner, bool *met)
{
	unsigned page = (unsigned)rng_below(&t->rng, PAGES_ALL / OWNERS) * OWNERS + owner;
	uint64_t range = atomic_load(&s->merging);

	*met = false;
	for (uint64_t i = range >> 32; i < (uint32_t)range && i < PAGES_ALL; i++) {
		if (i % OWNERS != (unsigned)owner)
			continue;
		*met = true;
		page = (unsigned)i;
		if (rng_chance(&t->rng, 20))
			break;
	}
	return page;
}

static struct slot *some_slot(struct self *t)
{
	return &w.slot[rng_below(&t->rng, SLOTS_ALL)];
}

/* -- contents ----------------------------------------------------------------------- */

static uint64_t word_of(uint32_t content)
{
	return content * UINT64_C(0x9e3779b97f4a7c15);
}

static uint32_t some_content(struct self *t)
{
	return 1 + (uint32_t)rng_below(&t->rng, CONTENTS - 1);
}

/* At both ends of the page. False: no memory. */
static bool check_page(struct kage_vm *vm, unsigned page, uint32_t content, const char *what)
{
	uint64_t word[2];

	for (unsigned i = 0; i < 2; i++) {
		if (!DONE(kage_vm_read(vm, page * PAGE + i * (PAGE - 8), &word[i], 8)))
			return false;
		if (word[i] != word_of(content))
			die("%s: page %u has 0x%llx, should have content %u", what, page, (unsigned long long)word[i],
			    content);
	}
	return true;
}

static void check_own(struct self *t, struct slot *s, enum owner owner)
{
	unsigned page = (unsigned)rng_below(&t->rng, PAGES_ALL / OWNERS) * OWNERS + owner;

	check_page(s->vm, page, s->holds[page], "its owner");
}

/* A whole page, by the VMM; half of it may be written when memory ends, so its owner tries until it is whole. */
static void write_page(struct slot *s, unsigned page, uint32_t content)
{
	uint64_t word = word_of(content);

	for (unsigned i = 0; i < 2; i++)
		UNTIL_DONE(kage_vm_write(s->vm, page * PAGE + i * (PAGE - 8), &word, 8));
	s->holds[page] = content;
}

/* One guest in three is another tenant's: frames that it gives back are taken by the others, and theirs by it. */
static void make_guest(struct self *t, struct slot *s)
{
	uint32_t domain = rng_below(&t->rng, 3) == 0;

	UNTIL_DONE(kage_vm_create(w.engine, KAGE_CFG(kage_vm_config, .merge_domain = domain), &s->vm));
	UNTIL_DONE(kage_vm_map(s->vm, KAGE_CFG(kage_region, .len = PAGES_ALL * PAGE, .flags = KAGE_REGION_MERGEABLE)));
	for (unsigned i = 0; i < 2; i++)
		UNTIL_DONE(kage_vcpu_create(s->vm, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .tlb_bits = 9),
					    &s->vcpu[i]));
	for (unsigned p = 0; p < PAGES_ALL; p++)
		write_page(s, p, some_content(t));
	memset(&s->n, 0, sizeof(s->n));
	UNTIL_DONE(kage_notifier_register(s->vm, &s->n, &listener));
}

static void end_guest(struct slot *s)
{
	for (unsigned i = 0; i < 2; i++)
		kage_vcpu_destroy(s->vcpu[i]);
	MUST(kage_vm_destroy(s->vm));
	atomic_store(&s->merging, 0);
}

/* -- what races with merging; slot->life is held for reading ------------------------------- */

/* By a vCPU: both words, or there is no memory and the first one says so. */
static void race_write(struct self *t, struct slot *s)
{
	enum owner owner = WRITER_0 + t->number % 2;
	uint32_t content = some_content(t);
	bool met;
	unsigned page = aim(t, s, owner, &met);
	uint64_t word = word_of(content);

	for (unsigned i = 0; i < 2; i++)
		UNTIL_DONE(kage_vcpu_store(s->vcpu[owner], page * PAGE + i * (PAGE - 8), &word, 8, NULL));
	s->holds[page] = content;
	count_race(RACE_writes, met);
	check_own(t, s, owner);
}

static void device_store(struct slot *s, unsigned page, char *hva, uint32_t content)
{
	__atomic_store_n((uint64_t *)hva, word_of(content), __ATOMIC_RELAXED);
	__atomic_store_n((uint64_t *)(hva + PAGE - 8), word_of(content), __ATOMIC_RELAXED);
	MUST(kage_vm_mark_dirty(s->vm, page * PAGE, PAGE));
	s->holds[page] = content;
}

/* A device writes while the page is pinned, at once and later; now and then not at all. */
static void race_pin(struct self *t, struct slot *s)
{
	struct iovec iov;
	bool met;
	unsigned page = aim(t, s, DEVICE, &met), n = 1, stores = (unsigned)rng_below(&t->rng, 3);

	if (!DONE(kage_vm_pin(s->vm, page * PAGE, PAGE, 0, &iov, &n)))
		return;
	count_race(RACE_pins, met);
	for (unsigned i = 0; i < stores; i++) {
		device_store(s, page, iov.iov_base, some_content(t));
		if (!check_page(s->vm, page, s->holds[page], "a device"))
			die("no memory to read a page that is pinned");
		nap(100);
	}
	MUST(kage_vm_unpin(s->vm, page * PAGE, PAGE));
	check_own(t, s, DEVICE);
}

static void race_discard(struct self *t, struct slot *s)
{
	bool met;
	unsigned page = aim(t, s, DISCARDER, &met);

	if (s->holds[page] == 0) {
		write_page(s, page, some_content(t));
	} else if (DONE(kage_vm_advise(s->vm, page * PAGE, PAGE, KAGE_ADVICE_DISCARD))) {
		s->holds[page] = 0;
		count_race(RACE_discards, met);
	}
	check_page(s->vm, page, s->holds[page], "after a discard");
	check_own(t, s, DISCARDER);
}

/* Nothing in the range is merged when the call says so, and nothing is until it may be again. */
static void check_unmerged(struct slot *s, unsigned first, unsigned n)
{
	uint8_t map[PAGES_ALL];

	MUST(kage_page_map(s->vm, first * PAGE, n * PAGE, map));
	for (unsigned i = 0; i < n; i++)
		if (map[i] == KAGE_PAGE_MERGED || map[i] == KAGE_PAGE_ZERO)
			die("page %u is merged after UNMERGEABLE", first + i);
}

/* Without memory it is taken up again where it stopped, once something has been given back. */
static void race_unmerge(struct self *t, struct slot *s)
{
	unsigned n = 1 + (unsigned)rng_below(&t->rng, w.limited ? PAGES_ALL - 1 : 256), first = (unsigned)rng_below(&t->rng, PAGES_ALL - n);
	bool met = await_merge(s, first, first + n, 20), all = false;

	for (unsigned i = 0; i < 3 && !all; i++) {
		all = DONE(kage_vm_advise(s->vm, first * PAGE, n * PAGE, KAGE_ADVICE_UNMERGEABLE));
		count_race(all ? RACE_unmerges : RACE_unmerge_nomem, met);
		if (!all)
			DONE(kage_engine_step(w.engine, NULL, NULL));
	}
	if (all)
		check_unmerged(s, first, n);
	UNTIL_DONE(kage_vm_advise(s->vm, first * PAGE, n * PAGE, KAGE_ADVICE_MERGEABLE));
	nap(2000);
}

static void race_hint(struct self *t, struct slot *s)
{
	unsigned n = 1 + (unsigned)rng_below(&t->rng, 256), first = (unsigned)rng_below(&t->rng, PAGES_ALL - n);
	bool met = await_merge(s, first, first + n, 20);
	int r = kage_vm_advise(s->vm, first * PAGE, n * PAGE, KAGE_ADVICE_MERGE_FIRST);

	if (r != KAGE_OK && r != -EOPNOTSUPP) /* unmergeable at the moment */
		die("a hint: %d", r);
	count_race(RACE_hints, met);
	nap(500);
}

/* Memory comes with contents that others have, is hinted at, and goes: before, while or after it is merged. */
static void race_unmap(struct self *t, struct slot *s)
{
	uint64_t word = word_of(some_content(t)), got;
	bool met, hinted = rng_chance(&t->rng, 50);

	if (!DONE(kage_vm_map(s->vm, KAGE_CFG(kage_region, .gpa = SIDE_GPA, .len = SIDE_PAGES * PAGE,
					      .flags = KAGE_REGION_MERGEABLE))))
		return;
	for (unsigned i = 0; i < SIDE_PAGES; i++)
		if (DONE(kage_vm_write(s->vm, SIDE_GPA + i * PAGE, &word, 8)))
			DONE(kage_vm_write(s->vm, SIDE_GPA + i * PAGE + PAGE - 8, &word, 8));
	DONE(kage_vm_advise(s->vm, SIDE_GPA, SIDE_PAGES * PAGE, KAGE_ADVICE_MERGE_FIRST));
	met = await_merge(s, PAGES_ALL, PAGES_ALL + SIDE_PAGES, 60);
	if (hinted)
		DONE(kage_vm_advise(s->vm, SIDE_GPA, SIDE_PAGES * PAGE, KAGE_ADVICE_MERGE_FIRST));
	UNTIL_DONE(kage_vm_unmap(s->vm, SIDE_GPA, SIDE_PAGES * PAGE));
	count_race(RACE_unmaps, met);
	if (hinted)
		count_race(RACE_hints_unmapped, true);
	if (kage_vm_read(s->vm, SIDE_GPA, &got, 8) != KAGE_MMIO)
		die("unmapped memory can be read");
}

/* -- whole guests; slot->life is held for writing --------------------------------------------- */

/* Nobody writes the guest: its clone is what it is, whatever merging does to both meanwhile. */
static void race_clone(struct self *t, struct slot *s)
{
	bool met = await_merge(s, 0, PAGES_ALL, 60);
	struct kage_vm *clone;

	if (!DONE(kage_vm_clone(s->vm, NULL, &clone)))
		return;
	count_race(RACE_clones, met);
	for (unsigned p = 0; p < PAGES_ALL; p++)
		check_page(clone, p, s->holds[p], "a clone");
	for (unsigned i = 0; i < 8; i++) {
		unsigned page = (unsigned)rng_below(&t->rng, PAGES_ALL);
		uint64_t word = word_of(77);

		DONE(kage_vm_write(clone, page * PAGE, &word, 8));
		check_page(s->vm, page, s->holds[page], "a clone's parent");
	}
	await_merge(s, 0, PAGES_ALL, 20);
	MUST(kage_vm_destroy(clone));
}

/* It goes while it is being merged, or has hints that nobody has come to. */
static void race_destroy(struct self *t, struct slot *s)
{
	bool met, hinted = rng_chance(&t->rng, 50);

	for (unsigned i = 0; i < PAGES_ALL; i++)
		check_page(s->vm, i, s->holds[i], "before the end");
	if (hinted)
		DONE(kage_vm_advise(s->vm, 0, PAGES_ALL * PAGE, KAGE_ADVICE_MERGE_FIRST));
	met = !hinted && await_merge(s, 0, PAGES_ALL, 100);
	end_guest(s);
	if (hinted)
		count_race(RACE_hints_destroyed, true);
	else
		count_race(RACE_destroys, met);
	make_guest(t, s);
}

/* -- threads ------------------------------------------------------------------------------------ */

static void audit_line(void *opaque, const char *line)
{
	fprintf(stderr, "audit: %s\n", line);
}

static void audit(void)
{
	struct kage_audit a = {.size = sizeof(a), .report = audit_line};
	int r = kage_engine_audit(w.engine, &a);

	if (r == -ENOMEM && w.limited)
		return;
	if (r != KAGE_OK || a.violations != 0)
		die("the audit: %d, %llu violations", r, (unsigned long long)a.violations);
	atomic_fetch_add(&w.audits, 1);
}

static void merge_some(struct self *t, uint64_t n)
{
	struct kage_progress p = {.size = sizeof(p)};
	uint64_t pages = rng_chance(&t->rng, 50) ? 32 + rng_below(&t->rng, 256) : 0;

	if (DONE(kage_engine_step(w.engine, KAGE_CFG(kage_budget, .pages = pages), &p)))
		atomic_fetch_add(&w.merges, p.pages_merged);
	if (t->number == 0 && n % 64 == 63)
		audit();
	if (t->number == 0 && n % 128 == 0) /* frames are full at times, and not any more */
		MUST(kage_engine_tune(w.engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE | KAGE_TUNE_NO_BACKOFF,
							 .no_zero_pages = n / 128 % 4 == 3,
							 .max_sharing = n / 128 % 2 ? 16 : 0)));
	nap(50);
}

struct job {
	void (*race)(struct self *t, struct slot *s); /* NULL: merging */
	bool alone;				     /* slot->life for writing */
	unsigned pause;				     /* us */
	unsigned number;
};

static const struct job jobs[] = {
	{NULL, false, 0, 0}, {NULL, false, 0, 1},
	{race_write, false, 100, 0}, {race_write, false, 100, 1},
	{race_pin, false, 300, 0}, {race_discard, false, 300, 0},
	{race_unmap, false, 1000, 0}, {race_unmerge, false, 3000, 0}, {race_hint, false, 1000, 0},
	{race_clone, true, 5000, 0}, {race_destroy, true, 10000, 0},
};

#define JOBS (sizeof(jobs) / sizeof(jobs[0]))

static void *run_job(void *arg)
{
	const struct job *j = arg;
	struct self t = {.rng = rng_seed(w.seed + 1 + (uint64_t)(j - jobs)), .number = j->number};

	for (uint64_t n = 0; !over(); n++) {
		struct slot *s = some_slot(&t);

		if (!j->race) {
			merge_some(&t, n);
			continue;
		}
		if (j->alone)
			pthread_rwlock_wrlock(&s->life);
		else
			pthread_rwlock_rdlock(&s->life);
		j->race(&t, s);
		pthread_rwlock_unlock(&s->life);
		nap(1 + (unsigned)rng_below(&t.rng, j->pause));
	}
	return NULL;
}

/* -- the run -------------------------------------------------------------------------------------- */

static void begin(void)
{
	struct self t = {.rng = rng_seed(w.seed)};
	pthread_rwlockattr_t attr;

	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	MUST(kage_engine_create(KAGE_CFG(kage_engine_config, .seed = w.seed + 1, .reserve = 64 * PAGE,
					 .memory_limit = w.limited ? LIMIT : 0), &w.engine));
	if (w.hardened)
		MUST(kage_domain_configure(w.engine, 0, KAGE_CFG(kage_domain_config, .flags = KAGE_DOMAIN_HARDENED,
								 .reserve_frames = 64)));
	MUST(kage_engine_tune(w.engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE | KAGE_TUNE_NO_BACKOFF)));
	for (unsigned i = 0; i < SLOTS_ALL; i++) {
		pthread_rwlock_init(&w.slot[i].life, &attr);
		make_guest(&t, &w.slot[i]);
	}
	pthread_rwlockattr_destroy(&attr);
}

static bool enough(void)
{
	for (unsigned r = 0; r < RACE_COUNT; r++)
		if (atomic_load(&w.met[r]) < MET_LEAST && (w.limited || r != RACE_unmerge_nomem))
			return false;
	return true;
}

static void finish(void)
{
	struct kage_stats s = {.size = sizeof(s)};

	audit();
	MUST(kage_stats_get(w.engine, NULL, &s));
	printf("merge-stress: %s%s: %llu merges, %llu breaks of merged pages, %llu changes raced of %llu, %llu audits\n",
	       w.limited ? "limited" : "unlimited", w.hardened ? ", hardened" : "", (unsigned long long)w.merges,
	       (unsigned long long)s.ksm_cow_breaks, (unsigned long long)s.changes_raced, (unsigned long long)s.changes,
	       (unsigned long long)w.audits);
	for (unsigned i = 0; i < SLOTS_ALL; i++) {
		for (unsigned p = 0; p < PAGES_ALL; p++)
			while (!check_page(w.slot[i].vm, p, w.slot[i].holds[p], "at the end"))
				MUST(kage_engine_step(w.engine, NULL, NULL));
		end_guest(&w.slot[i]);
		pthread_rwlock_destroy(&w.slot[i].life);
	}
	audit();
	MUST(kage_engine_step(w.engine, NULL, NULL));
	MUST(kage_stats_get(w.engine, NULL, &s));
	if (s.frames_used || s.frames_table || s.ksm_pages_shared || s.ksm_stable_dups)
		die("left behind: %llu frames, %llu tables", (unsigned long long)s.frames_used,
		    (unsigned long long)s.frames_table);
	MUST(kage_engine_destroy(w.engine));
}

static int judge(void)
{
	static const char *const name[] = {
#define X(n) #n,
		RACES(X)
#undef X
	};
	bool ok = enough();

	for (unsigned r = 0; r < RACE_COUNT; r++)
		printf("merge-stress: %-16s %8llu, %8llu of them met a merge\n", name[r], (unsigned long long)w.done[r],
		       (unsigned long long)w.met[r]);
	if (!ok)
		printf("merge-stress: FAILED: each has to meet %d\n", MET_LEAST);
	fflush(stdout);
	return ok ? 0 : 1;
}

static int run(bool limited)
{
	pthread_t thread[JOBS];

	w.limited = limited;
	atomic_store(&w.stop, false);
	w.merges = w.audits = 0;
	for (unsigned r = 0; r < RACE_COUNT; r++)
		w.done[r] = w.met[r] = 0;
	begin();
	for (unsigned i = 0; i < JOBS; i++)
		if (pthread_create(&thread[i], NULL, run_job, (void *)&jobs[i]))
			die("no thread");
	for (uint64_t s = 0; s < w.seconds || (s < PATIENCE * w.seconds && !enough()); s++)
		nanosleep(&(struct timespec){.tv_nsec = 500000000}, NULL);
	atomic_store(&w.stop, true);
	for (unsigned i = 0; i < JOBS; i++)
		pthread_join(thread[i], NULL);
	finish();
	return judge();
}

int main(void)
{
	w.seconds = env_number("KAGE_STRESS_SECONDS", 30);
	w.seed = seed_of_today();
	w.hardened = env_number("KAGE_STRESS_HARDENED", 0);
	printf("merge-stress: %llu s, seed %llu\n", (unsigned long long)w.seconds, (unsigned long long)w.seed);
	fflush(stdout);
	if (w.hardened) /* merges nothing without memory for a whole reserve, and so never comes out of a limit by itself */
		return run(false);
	return run(false) | run(true);
}
