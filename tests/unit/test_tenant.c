/* SPDX-License-Identifier: MIT */
/*
 * Merge domains: what guests of one share and those of two do not; hardened ones, rule by rule (mm/fused.h).
 */
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include <kage/kage.h>
#include <kage/notifier.h>
#include "api/engine.h"
#include "api/vm.h"
#include "base/trace.h"
#include "merge/run.h"
#include "mm/fused.h"
#include "mm/table.h"
#include "mm/tenant.h"

#define PAGE 4096u
#define PAGES 16u

static struct kage_engine *engine;

static void audit_line(void *opaque, const char *line)
{
	fprintf(stderr, "audit: %s\n", line);
}

static void audit(void)
{
	struct kage_audit a = { .size = sizeof(a), .report = audit_line };

	ck_assert_int_eq(kage_engine_audit(engine, &a), 0);
}

static void open_engine(uint64_t seed, uint32_t backing)
{
	ck_assert_int_eq(kage_engine_create(KAGE_CFG(kage_engine_config, .seed = seed, .backing = backing), &engine), 0);
	ck_assert_int_eq(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)), 0);
}

static void setup(void)
{
	open_engine(0, KAGE_BACKING_ANON);
}

static void setup_memfd(void)
{
	open_engine(0, KAGE_BACKING_MEMFD);
}

static void teardown(void)
{
	audit();
	ck_assert_int_eq(kage_engine_destroy(engine), 0);
}

static struct kage_vm *guest(uint32_t domain)
{
	struct kage_vm *vm;

	ck_assert_int_eq(kage_vm_create(engine, KAGE_CFG(kage_vm_config, .merge_domain = domain), &vm), 0);
	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .len = PAGES * PAGE, .flags = KAGE_REGION_MERGEABLE)), 0);
	return vm;
}

static void put(struct kage_vm *vm, unsigned page, uint64_t content)
{
	uint64_t buf[PAGE / 8];

	for (unsigned i = 0; i < PAGE / 8; i++)
		buf[i] = content * (i + 1);
	ck_assert_int_eq(kage_vm_write(vm, (uint64_t)page * PAGE, buf, PAGE), 0);
}

/* Passes until whatever is quiet has been looked at. */
static void merge(void)
{
	for (unsigned i = 0; i < 4; i++)
		ck_assert_int_eq(kage_engine_step(engine, NULL, NULL), 0);
	audit();
}

static struct mm_lookup look(struct kage_vm *vm, unsigned page)
{
	struct mm_lookup l;

	rcu_enter();
	l = mm_lookup(&vm->mm, GFN(page));
	rcu_leave();
	return l;
}

static void configure(uint32_t domain, uint32_t flags)
{
	ck_assert_int_eq(kage_domain_configure(engine, domain, KAGE_CFG(kage_domain_config, .flags = flags)), 0);
}

/* Equal contents of two guests: one frame in one domain, two in two. */
START_TEST(domains_share_no_frame)
{
	struct kage_vm *a = guest(1), *b = guest(1), *c = guest(2), *d = guest(2);

	put(a, 3, 7);
	put(b, 5, 7);
	put(c, 3, 7);
	put(d, 5, 7);
	merge();
	ck_assert(pfn_eq(look(a, 3).pfn, look(b, 5).pfn));
	ck_assert(pfn_eq(look(c, 3).pfn, look(d, 5).pfn));
	ck_assert(!pfn_eq(look(a, 3).pfn, look(c, 3).pfn));
	kage_vm_destroy(a);
	kage_vm_destroy(b);
	kage_vm_destroy(c);
	kage_vm_destroy(d);
}
END_TEST

START_TEST(zeroes_stay_in_their_domain)
{
	struct kage_vm *vm[6];

	configure(3, KAGE_DOMAIN_ZERO_SHARED);
	configure(4, KAGE_DOMAIN_ZERO_SHARED);
	for (unsigned i = 0; i < 6; i++) {
		vm[i] = guest(i < 5 ? i : 0); /* 0 to 4, and another one in 0 */
		put(vm[i], 2, 0);
	}
	merge();
	for (unsigned i = 0; i < 6; i++) {
		uint64_t word = 1;

		ck_assert(pfn_is_zero(look(vm[i], 2).pfn));
		ck_assert_int_eq(frame_kind(pfn_frame(engine->pool, look(vm[i], 2).pfn)), FRAME_ZERO);
		ck_assert_int_eq(kage_vm_read(vm[i], 2 * PAGE + 8 * i, &word, 8), 0);
		ck_assert_uint_eq(word, 0);
	}
	ck_assert(pfn_eq(look(vm[0], 2).pfn, look(vm[5], 2).pfn));
	ck_assert(pfn_eq(look(vm[3], 2).pfn, PFN_ZERO));
	ck_assert(pfn_eq(look(vm[4], 2).pfn, PFN_ZERO));
	for (unsigned i = 0; i < 3; i++)
		for (unsigned j = i + 1; j < 4; j++)
			ck_assert(!pfn_eq(look(vm[i], 2).pfn, look(vm[j], 2).pfn));
	put(vm[1], 2, 9); /* broken as any other shared page */
	ck_assert(!pfn_is_zero(look(vm[1], 2).pfn));
	audit();
	for (unsigned i = 0; i < 6; i++)
		kage_vm_destroy(vm[i]);
}
END_TEST

/* As many domains as section 0 has frames for, and those that come after merge zeroes as contents. */
START_TEST(zero_frames_run_out)
{
	struct kage_vm *a = guest(9), *b = guest(9);
	pfn_t pfn, last = PFN_NONE;
	unsigned n = 0;

	while (pool_zero_new(engine->pool, &pfn) == 0) {
		ck_assert(pfn_is_zero(pfn) && pfn.v > last.v);
		ck_assert_uint_eq(*(const uint64_t *)pfn_hva(engine->pool, pfn), 0);
		last = pfn;
		n++;
	}
	ck_assert_uint_gt(n, 1000);
	put(a, 1, 0);
	put(b, 2, 0);
	merge();
	ck_assert(pfn_eq(look(a, 1).pfn, look(b, 2).pfn));
	ck_assert_int_eq(frame_kind(pfn_frame(engine->pool, look(a, 1).pfn)), FRAME_STABLE);
	kage_vm_destroy(a);
	kage_vm_destroy(b);
}
END_TEST

/* A domain's salt depends on the engine's key and its number, and on both, and so does what a page hashes to. */
START_TEST(salts_are_a_domains_own)
{
	static const char page[PAGE] = "the same in all of them";
	uint64_t salt[2][8], hash[2][8];

	for (unsigned e = 0; e < 2; e++) {
		open_engine(5 + e, KAGE_BACKING_ANON);
		for (unsigned d = 0; d < 8; d++) {
			struct tenant *t;

			ck_assert_int_eq(tenant_get(&engine->host, d, &t), 0);
			salt[e][d] = t->salt;
			hash[e][d] = page_hash(t, page);
			tenant_put(t);
		}
		ck_assert_int_eq(kage_engine_destroy(engine), 0);
	}
	for (unsigned i = 0; i < 16; i++)
		for (unsigned j = 0; j < i; j++) {
			ck_assert_uint_ne(salt[i / 8][i % 8], salt[j / 8][j % 8]);
			ck_assert_uint_ne(hash[i / 8][i % 8], hash[j / 8][j % 8]);
		}
	open_engine(5, KAGE_BACKING_ANON);
	struct tenant *t;
	ck_assert_int_eq(tenant_get(&engine->host, 3, &t), 0);
	ck_assert_uint_eq(t->salt, salt[0][3]);
	tenant_put(t);
	ck_assert_int_eq(kage_engine_destroy(engine), 0);
}
END_TEST

START_TEST(configured_before_guests)
{
	struct kage_domain_config longer[2] = { { .size = sizeof(longer) } };
	struct kage_vm *a, *b;

	ck_assert_int_eq(kage_domain_configure(NULL, 1, longer), -EINVAL);
	ck_assert_int_eq(kage_domain_configure(engine, 1, NULL), -EINVAL);
	ck_assert_int_eq(kage_domain_configure(engine, 65536, longer), -EINVAL);
	ck_assert_int_eq(kage_domain_configure(engine, 65535, longer), 0);
	memset(&longer[1], 1, sizeof(longer[1]));
	ck_assert_int_eq(kage_domain_configure(engine, 1, longer), -E2BIG);
	ck_assert_int_eq(kage_domain_configure(engine, 1, KAGE_CFG(kage_domain_config, .flags = 1u << 31)), -EINVAL);
	a = guest(1);
	ck_assert_int_eq(kage_domain_configure(engine, 1, KAGE_CFG(kage_domain_config, .flags = 0)), -EBUSY);
	ck_assert_int_eq(kage_vm_clone(a, NULL, &b), 0);
	ck_assert_int_eq(kage_vm_destroy(a), 0);
	ck_assert_int_eq(kage_domain_configure(engine, 1, KAGE_CFG(kage_domain_config, .flags = 0)), -EBUSY);
	ck_assert_int_eq(kage_vm_destroy(b), 0);
	configure(1, KAGE_DOMAIN_ZERO_SHARED);
}
END_TEST

/* -- hardened domains -------------------------------------------------------------- */

#define HARD 7u
#define FRAMES 64u

static void harden(uint32_t frames)
{
	ck_assert_int_eq(kage_domain_configure(engine, HARD, KAGE_CFG(kage_domain_config, .flags = KAGE_DOMAIN_HARDENED,
								       .reserve_frames = frames)), 0);
}

static struct kage_vcpu *vcpu(struct kage_vm *vm)
{
	struct kage_vcpu *v;

	ck_assert_int_eq(kage_vcpu_create(vm, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI), &v), 0);
	return v;
}

static uint64_t load(struct kage_vcpu *v, unsigned page)
{
	uint64_t word = 0;

	ck_assert_int_eq(kage_vcpu_load(v, (uint64_t)page * PAGE, &word, 8, NULL), 0);
	return word;
}

static void store(struct kage_vcpu *v, unsigned page, uint64_t word)
{
	ck_assert_int_eq(kage_vcpu_store(v, (uint64_t)page * PAGE, &word, 8, NULL), 0);
}

static bool fused(struct kage_vm *vm, unsigned page)
{
	return entry_is_fused(look(vm, page).entry);
}

static struct kage_stats stats(struct kage_vm *vm)
{
	struct kage_stats s = { .size = sizeof(s) };

	ck_assert_int_eq(kage_stats_get(engine, vm, &s), 0);
	return s;
}

static struct reserve *reserve(struct kage_vm *vm)
{
	return vm->mm.family->tenant->reserve;
}

START_TEST(hardened_is_configured)
{
	struct kage_domain_config c = { .size = sizeof(c), .flags = KAGE_DOMAIN_HARDENED };
	static const uint32_t wrong[] = { 1, 63, (1u << 20) + 1 };

	for (unsigned i = 0; i < 3; i++) {
		c.reserve_frames = wrong[i];
		ck_assert_int_eq(kage_domain_configure(engine, HARD, &c), -EINVAL);
	}
	c.reserve_frames = 64;
	ck_assert_int_eq(kage_domain_configure(engine, HARD, &c), 0);
	c.flags |= KAGE_DOMAIN_ZERO_SHARED;
	ck_assert_int_eq(kage_domain_configure(engine, HARD, &c), -EINVAL);
	c.flags = 0;
	ck_assert_int_eq(kage_domain_configure(engine, HARD, &c), -EINVAL);
	c.reserve_frames = 0;
	ck_assert_int_eq(kage_domain_configure(engine, HARD, &c), 0);
	c.flags = KAGE_DOMAIN_HARDENED;
	ck_assert_int_eq(kage_domain_configure(engine, HARD, &c), 0);
	struct kage_vm *vm = guest(HARD);
	ck_assert_uint_eq(reserve(vm)->want, RESERVE_FRAMES_DEFAULT);
	kage_vm_destroy(vm);
}
END_TEST

/* Merged, equal within one guest, alone, zero: after a pass none can be told by what it maps, nor reached. */
START_TEST(hardened_pages_are_out_of_reach)
{
	struct kage_vm *a, *b;
	struct kage_vcpu *v;
	pfn_t was[6], now[6];

	harden(FRAMES);
	a = guest(HARD);
	b = guest(HARD);
	v = vcpu(a);
	put(b, 0, 5);
	for (unsigned i = 0; i < 6; i++) {
		put(a, i, i == 0 ? 5 : i < 3 ? 77 : i == 3 ? 0 : 100 + i);
		load(v, i); /* a translation is cached */
		was[i] = look(a, i).pfn;
	}
	merge();
	for (unsigned i = 0; i < 6; i++) {
		ck_assert(fused(a, i));
		ck_assert_uint_eq(look(a, i).entry & (ENTRY_R | ENTRY_W | ENTRY_X | ENTRY_SPECIAL), 0);
		now[i] = look(a, i).pfn;
		ck_assert_int_eq(frame_kind(pfn_frame(engine->pool, now[i])), FRAME_STABLE);
		for (unsigned j = 0; j < 6; j++) /* J2: nobody's own frame, also not that of the first of equals */
			ck_assert(!pfn_eq(now[i], was[j]));
	}
	ck_assert(pfn_eq(now[0], look(b, 0).pfn));
	ck_assert(pfn_eq(now[1], now[2]));
	ck_assert(!pfn_is_zero(now[3]));
	ck_assert_uint_eq(stats(NULL).ksm_pages_shared, 2);
	ck_assert_uint_eq(stats(NULL).ksm_pages_sharing, 2);
	ck_assert_uint_eq(stats(NULL).ksm_pages_unshared, 3);
	for (unsigned i = 0; i < 6; i++) {
		uint64_t faults = stats(a).faults;

		ck_assert_uint_eq(load(v, i), i == 0 ? 5 : i < 3 ? 77 : i == 3 ? 0 : 100 + i);
		ck_assert_uint_eq(stats(a).faults, faults + 1);
		ck_assert(look(a, i).writable && !pfn_eq(look(a, i).pfn, now[i]));
		store(v, i, 1); /* has it, whatever it was: no more faults than a page of its own costs */
		ck_assert_uint_eq(stats(a).cow_breaks, i + 1);
	}
	audit();
	kage_vcpu_destroy(v);
	kage_vm_destroy(a);
	kage_vm_destroy(b);
}
END_TEST

struct steps {
	unsigned n;
	uint16_t event[64];
	uint64_t c[64];
	struct kage_stats d; /* what counters grew by */
};

/* Everything that one access does, as the event ring and the counters have it. */
static struct steps steps_of(struct kage_vm *vm, struct kage_vcpu *v, unsigned page, bool write)
{
	struct trace_ring *ring = calloc(1, sizeof(*ring) + 64 * sizeof(struct trace_record));
	struct kage_stats before, after;
	struct steps s = { 0 };

	before = stats(NULL);
	ring->size = 64;
	engine->env.trace = ring;
	if (write)
		store(v, page, 1);
	else
		load(v, page);
	engine->env.trace = NULL;
	after = stats(NULL);
	ck_assert_uint_le(ring->head, 64);
	for (; s.n < ring->head; s.n++) {
		s.event[s.n] = ring->rec[s.n].event;
		s.c[s.n] = s.event[s.n] == TRACE_shadow_drop ? 0 : ring->rec[s.n].c; /* that is where */
	}
	free(ring);
	for (unsigned i = 1; i < sizeof(after) / 8; i++)
		((uint64_t *)&s.d)[i] = ((uint64_t *)&after)[i] - ((uint64_t *)&before)[i];
	return s;
}

/* Reads and writes, of merged pages and of those that are alone: event for event, count for count. */
START_TEST(hardened_accesses_take_one_path)
{
	struct kage_vm *a, *b;
	struct kage_vcpu *v;
	struct steps s[4];

	harden(FRAMES);
	a = guest(HARD);
	b = guest(HARD);
	v = vcpu(a);
	for (unsigned i = 0; i < 8; i++) {
		put(a, i, 20 + i);
		put(b, i, i % 2 ? 20 + i : 40 + i); /* odd pages have their like */
	}
	merge();
	load(v, 6); /* the first fault of all makes shadow tables */
	for (unsigned i = 0; i < 4; i++)
		s[i] = steps_of(a, v, i, i >= 2);
	ck_assert_uint_gt(s[0].n, 4);
	ck_assert_uint_eq(s[0].d.cow_breaks, 1);
	ck_assert_uint_eq(s[0].d.references_noted, 1);
	ck_assert_uint_eq(s[0].d.frames_pending, 0);
	ck_assert_uint_eq(s[0].d.frames_used, 1);
	for (unsigned i = 1; i < 4; i++) {
		ck_assert_uint_eq(s[i].n, s[0].n);
		ck_assert_mem_eq(s[i].event, s[0].event, sizeof(s[0].event));
		ck_assert_mem_eq(s[i].c, s[i & 2].c, sizeof(s[0].c)); /* some say what the access was */
		ck_assert_uint_eq(s[i].d.faults, s[0].d.faults);
		ck_assert_uint_eq(s[i].d.faults_spurious, s[0].d.faults_spurious);
		ck_assert_uint_eq(s[i].d.changes, s[0].d.changes);
		ck_assert_uint_eq(s[i].d.cow_breaks, s[0].d.cow_breaks);
		ck_assert_uint_eq(s[i].d.cow_reused, s[0].d.cow_reused);
		ck_assert_uint_eq(s[i].d.references_noted, s[0].d.references_noted);
		ck_assert_uint_eq(s[i].d.frames_pending, s[0].d.frames_pending);
		ck_assert_uint_eq(s[i].d.frames_used, s[0].d.frames_used);
		ck_assert_uint_eq(s[i].d.frames_reserve, 0);
	}
	audit(); /* with references noted */
	ck_assert_int_eq(kage_engine_step(engine, NULL, NULL), 0);
	ck_assert_uint_eq(stats(NULL).references_noted, 0);
	kage_vcpu_destroy(v);
	kage_vm_destroy(a);
	kage_vm_destroy(b);
}
END_TEST

/* Draws are spread over the reserve, and what was just freed is drawn as rarely as anything else. */
START_TEST(hardened_draws_are_random)
{
	struct kage_vm *a;
	struct reserve *r;
	unsigned seen[FRAMES] = { 0 }, again = 0, draws = 200 * FRAMES;
	pfn_t last[2] = { PFN_NONE, PFN_NONE }, before[FRAMES];
	double chi = 0;

	harden(FRAMES);
	a = guest(HARD);
	ck_assert_int_eq(kage_engine_step(engine, NULL, NULL), 0);
	r = reserve(a);
	ck_assert(reserve_full(r));
	for (unsigned i = 0; i < draws; i++) {
		pfn_t got;
		unsigned at = 0;

		memcpy(before, r->frame, sizeof(before));
		ck_assert_int_eq(reserve_draw(r, false, &got), 0);
		while (at < FRAMES && !pfn_eq(before[at], got))
			at++;
		ck_assert_uint_lt(at, FRAMES);
		ck_assert(!pfn_eq(r->frame[at], got));
		ck_assert_uint_eq(r->count, FRAMES);
		seen[at]++;
		again += pfn_eq(got, last[1]);
		last[1] = last[0];
		last[0] = got;
		arena_free(engine->pool, got); /* what a guest would like to see used next */
	}
	for (unsigned i = 0; i < FRAMES; i++)
		chi += (seen[i] - 200.0) * (seen[i] - 200.0) / 200.0;
	/* 63 degrees of freedom: 63 on average, deviation 11.2; and 200 of 12,800 draws, deviation 14 */
	ck_assert_double_gt(chi, 63 - 5 * 11.2);
	ck_assert_double_lt(chi, 63 + 7 * 11.2);
	ck_assert_uint_gt(again, 200 - 6 * 14);
	ck_assert_uint_lt(again, 200 + 6 * 14);
	kage_vm_destroy(a);
	ck_assert_int_eq(kage_engine_step(engine, NULL, NULL), 0);
	ck_assert_uint_eq(stats(NULL).frames_reserve, 0); /* nobody lives there any more */
}
END_TEST

static unsigned told;

static void count_line(void *opaque, int level, const char *line)
{
	told += strstr(line, "frames in the reserve") != NULL && level == KAGE_LOG_WARN;
}

/* No memory for the reserve: no merging, one line in the log, and guests run. */
START_TEST(hardened_without_memory)
{
	struct kage_vm *a;
	struct kage_vcpu *v;
	struct reserve *r;

	told = 0;
	ck_assert_int_eq(kage_engine_create(KAGE_CFG(kage_engine_config, .memory_limit = 4u << 20, .log = count_line),
					    &engine), 0);
	ck_assert_int_eq(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)), 0);
	harden(4096); /* four times the limit */
	a = guest(HARD);
	put(a, 0, 1);
	put(a, 1, 1);
	merge();
	ck_assert_uint_eq(told, 1);
	ck_assert(!fused(a, 0) && !fused(a, 1));
	ck_assert_uint_eq(stats(NULL).ksm_merges, 0);
	v = vcpu(a);
	store(v, 2, 3);
	ck_assert_uint_eq(load(v, 0), 1);
	kage_vcpu_destroy(v);
	kage_vm_destroy(a);
	merge();

	/* Enough for it at first; then others take all there is, and breaks draw on it. */
	harden(FRAMES);
	a = guest(HARD);
	for (unsigned i = 0; i < PAGES; i++)
		put(a, i, i / 2);
	merge();
	r = reserve(a);
	ck_assert_uint_eq(r->count, FRAMES);
	while (pool_charge(engine->pool, 1, 0) == 0)
		told++;
	told -= 1;
	for (unsigned i = 0; i < PAGES; i++) {
		uint64_t word;

		ck_assert(fused(a, i));
		ck_assert_int_eq(kage_vm_read(a, i * PAGE, &word, 8), 0);
		ck_assert_uint_eq(word, i / 2);
		ck_assert(!fused(a, i));
	}
	ck_assert_uint_eq(r->count, FRAMES - PAGES);
	pool_uncharge(engine->pool, told);
	merge();
	ck_assert_uint_eq(r->count, FRAMES);
	ck_assert(fused(a, 3));
	kage_vm_destroy(a);
	ck_assert_int_eq(kage_engine_destroy(engine), 0);
}
END_TEST

/* A block is split because a page of it was quiet, whether it has its like or not. */
START_TEST(hardened_splits_blocks_alike)
{
	struct kage_vm *vm[2];
	uint64_t split[2];

	harden(FRAMES);
	for (unsigned i = 0; i < 2; i++) {
		ck_assert_int_eq(kage_vm_create(engine, KAGE_CFG(kage_vm_config, .merge_domain = HARD), &vm[i]), 0);
		ck_assert_int_eq(kage_vm_map(vm[i], KAGE_CFG(kage_region, .len = 8 << 20, .flags = KAGE_REGION_MERGEABLE)), 0);
		put(vm[i], 0, 3);        /* equal */
		put(vm[i], 512, 10 + i); /* not */
		put(vm[i], 1024 + i, 4); /* equal, elsewhere */
		ck_assert_uint_ge(look(vm[i], 512).level, 1);
	}
	merge();
	for (unsigned i = 0; i < 2; i++) {
		split[i] = stats(vm[i]).blocks_split;
		ck_assert_uint_ge(split[i], 3);
		ck_assert(fused(vm[i], 0) && fused(vm[i], 512) && fused(vm[i], 1024 + i));
		ck_assert_uint_eq(look(vm[i], 1536).level, look(vm[1 - i], 1536).level);
	}
	ck_assert_uint_eq(split[0], split[1]);
	kage_vm_destroy(vm[0]);
	kage_vm_destroy(vm[1]);
}
END_TEST

/* Pins, reads by the VMM, digests, advice, discarding: who breaks, and who looks on. */
START_TEST(hardened_and_the_vmm)
{
	struct kage_digest d[2];
	struct iovec iov[2];
	struct kage_vm *a;
	unsigned n = 2;
	uint64_t word;

	harden(FRAMES);
	a = guest(HARD);
	for (unsigned i = 0; i < PAGES; i++)
		put(a, i, 1 + i / 2);
	merge();
	ck_assert_int_eq(kage_page_digest(a, 0, 2 * PAGE, d), 0);
	ck_assert_mem_eq(&d[0], &d[1], sizeof(d[0]));
	ck_assert(fused(a, 0) && fused(a, 1));
	ck_assert_int_eq(kage_vm_read(a, 0, &word, 8), 0);
	ck_assert(!fused(a, 0) && fused(a, 1));
	ck_assert_int_eq(kage_vm_pin(a, 2 * PAGE, PAGE, 0, iov, &n), 0);
	ck_assert_uint_eq(*(uint64_t *)iov[0].iov_base, 2);
	merge();
	ck_assert(fused(a, 0)); /* quiet again */
	ck_assert(!fused(a, 2));
	ck_assert_int_eq(kage_vm_unpin(a, 2 * PAGE, PAGE), 0);
	ck_assert_int_eq(kage_vm_advise(a, 4 * PAGE, 2 * PAGE, KAGE_ADVICE_UNMERGEABLE), 0);
	ck_assert(!fused(a, 4) && !fused(a, 5));
	ck_assert_int_eq(kage_vm_advise(a, 6 * PAGE, 2 * PAGE, KAGE_ADVICE_DISCARD), 0);
	ck_assert_uint_ge(stats(NULL).references_noted, 2);
	audit();
	ck_assert_int_eq(kage_vm_unmap(a, 8 * PAGE, 2 * PAGE), 0);
	merge();
	ck_assert(!fused(a, 4));
	ck_assert_int_eq(kage_vm_read(a, 6 * PAGE, &word, 8), 0);
	ck_assert_uint_eq(word, 0);
	kage_vm_destroy(a);
}
END_TEST

/* Entries in tables that clones share: each side breaks its own. */
START_TEST(hardened_clones)
{
	struct kage_vm *vm[3];

	harden(FRAMES);
	vm[0] = guest(HARD);
	for (unsigned i = 0; i < PAGES; i++)
		put(vm[0], i, 1 + i / 2);
	merge();
	ck_assert_int_eq(kage_vm_clone(vm[0], NULL, &vm[1]), 0);
	audit();
	for (unsigned i = 0; i < PAGES; i++)
		ck_assert(fused(vm[1], i));
	for (unsigned g = 0; g < 2; g++)
		for (unsigned i = g; i < PAGES; i += 2) {
			uint64_t word;

			ck_assert_int_eq(kage_vm_read(vm[g], i * PAGE, &word, 8), 0);
			ck_assert_uint_eq(word, 1 + i / 2);
			ck_assert(!fused(vm[g], i) && fused(vm[1 - g], i));
		}
	audit();
	put(vm[0], 3, 99);
	ck_assert_int_eq(kage_vm_clone(vm[0], NULL, &vm[2]), 0);
	merge(); /* frames that clones share are fused in both */
	for (unsigned i = 0; i < PAGES; i++)
		ck_assert(fused(vm[0], i) && fused(vm[2], i) && pfn_eq(look(vm[0], i).pfn, look(vm[2], i).pfn));
	for (unsigned g = 0; g < 3; g++)
		kage_vm_destroy(vm[g]);
}
END_TEST

/* No frame has more users than it may; the others are fused all the same. */
START_TEST(hardened_sharing_is_limited)
{
	struct kage_vm *a;
	unsigned frames = 0;

	ck_assert_int_eq(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE, .max_sharing = 3)), 0);
	harden(FRAMES);
	a = guest(HARD);
	for (unsigned i = 0; i < PAGES; i++)
		put(a, i, 5);
	merge();
	for (unsigned i = 0; i < PAGES; i++) {
		bool first = true;

		ck_assert(fused(a, i));
		ck_assert_uint_le(pfn_frame(engine->pool, look(a, i).pfn)->refs, 3);
		for (unsigned j = 0; j < i; j++)
			first &= !pfn_eq(look(a, i).pfn, look(a, j).pfn);
		frames += first;
	}
	ck_assert_uint_eq(frames, (PAGES + 2) / 3);
	kage_vm_destroy(a);
}
END_TEST

static unsigned allocations, fails_at;

static void *failing_alloc(void *opaque, size_t bytes)
{
	void *p;

	if (++allocations == fails_at || posix_memalign(&p, 64, bytes))
		return NULL;
	return memset(p, 0, bytes);
}

static void plain_free(void *opaque, void *p, size_t bytes)
{
	free(p);
}

/* Every allocation of configuring, merging and breaking fails once: nothing is lost, nothing leaks. */
START_TEST(hardened_without_an_object)
{
	for (unsigned n = 1;; n++) {
		struct kage_vm *a;
		uint64_t word;
		bool done;
		int r;

		fails_at = 0;
		ck_assert_int_eq(kage_engine_create(KAGE_CFG(kage_engine_config, .alloc = { failing_alloc, plain_free, NULL }),
						    &engine), 0);
		ck_assert_int_eq(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)), 0);
		allocations = 0;
		fails_at = n;
		r = kage_domain_configure(engine, HARD, KAGE_CFG(kage_domain_config, .flags = KAGE_DOMAIN_HARDENED,
								 .reserve_frames = FRAMES));
		if (r == -ENOMEM)
			harden(FRAMES);
		a = NULL;
		if (kage_vm_create(engine, KAGE_CFG(kage_vm_config, .merge_domain = HARD), &a))
			ck_assert_int_eq(kage_vm_create(engine, KAGE_CFG(kage_vm_config, .merge_domain = HARD), &a), 0);
		while (kage_vm_map(a, KAGE_CFG(kage_region, .len = PAGES * PAGE, .flags = KAGE_REGION_MERGEABLE)))
			;
		for (unsigned i = 0; i < PAGES; i++) {
			word = 1 + i / 2;
			while (kage_vm_write(a, i * PAGE, &word, 8))
				;
		}
		for (unsigned i = 0; i < 5; i++)
			kage_engine_step(engine, NULL, NULL); /* one of them may run out of memory */
		for (unsigned i = 0; i < PAGES; i++) {
			ck_assert(fused(a, i));
			while (kage_vm_read(a, i * PAGE, &word, 8))
				;
			ck_assert_uint_eq(word, 1 + i / 2);
		}
		done = allocations < fails_at;
		fails_at = 0;
		audit();
		ck_assert_int_eq(kage_vm_destroy(a), 0);
		audit();
		ck_assert_int_eq(kage_engine_destroy(engine), 0);
		if (done)
			break;
		ck_assert_uint_lt(n, 10000);
	}
}
END_TEST

#define MANY (3u * 8192u)

static uint64_t fused_pages(struct kage_vm *vm, uint64_t pages)
{
	uint64_t n = 0;

	for (uint64_t i = 0; i < pages; i++)
		n += fused(vm, i);
	return n;
}

/* `pages` pages of the guest, half of which have their like in it; fused. */
static struct kage_vm *guest_fused(uint64_t pages)
{
	struct kage_vm *vm;

	ck_assert_int_eq(kage_vm_create(engine, KAGE_CFG(kage_vm_config, .merge_domain = HARD), &vm), 0);
	ck_assert_int_eq(kage_vm_map(vm, KAGE_CFG(kage_region, .len = pages * PAGE, .flags = KAGE_REGION_MERGEABLE)), 0);
	for (uint64_t i = 0; i < pages; i++)
		put(vm, i, 1 + (i % 4 == 1 ? i - 1 : i));
	merge();
	ck_assert_uint_eq(fused_pages(vm, pages), pages);
	return vm;
}

/*
 * However much is noted, no access and no discard lets go of any of it (H3): nothing dies and nothing is given back before
 * the step, and the last access takes the steps of the first, whether its page has its like or not.
 */
START_TEST(hardened_notes_wait_for_a_step)
{
	struct steps first[2], last[2];
	struct kage_stats s;
	struct kage_vm *a;
	struct kage_vcpu *v;
	uint64_t stable;

	harden(FRAMES);
	a = guest_fused(MANY);
	v = vcpu(a);
	stable = atomic_load(&engine->host.stable_frames);
	ck_assert_uint_eq(stable, MANY - MANY / 4);
	load(v, 4);
	for (unsigned i = 0; i < 2; i++)
		first[i] = steps_of(a, v, 8 + i * 2, false); /* 8 has its like */
	for (unsigned i = 16; i < MANY - 64; i++) {
		ck_assert_uint_eq(load(v, i), 1 + (i % 4 == 1 ? i - 1 : i));
		ck_assert_uint_eq(atomic_load(&engine->host.stable_frames), stable);
		ck_assert_uint_eq(pool_pending(engine->pool), 0);
	}
	for (unsigned i = 0; i < 2; i++) {
		last[i] = steps_of(a, v, MANY - 32 + i * 2, false);
		ck_assert_uint_eq(last[i].n, first[i].n);
		ck_assert_mem_eq(last[i].event, first[i].event, sizeof(first[i].event));
		ck_assert_mem_eq(last[i].c, first[i].c, sizeof(first[i].c));
		ck_assert_uint_eq(last[i].d.references_noted, 1);
	}
	ck_assert_int_eq(kage_vm_advise(a, 0, 16 * PAGE, KAGE_ADVICE_DISCARD), 0);
	ck_assert_int_eq(kage_vm_unmap(a, (MANY - 64) * PAGE, 64 * PAGE), 0);
	s = stats(NULL);
	ck_assert_uint_eq(s.references_noted, MANY);
	ck_assert_uint_eq(atomic_load(&engine->host.stable_frames), stable);
	audit();
	kage_vcpu_destroy(v);
	kage_vm_destroy(a);
	ck_assert_int_eq(kage_engine_step(engine, NULL, NULL), 0);
	ck_assert_uint_eq(stats(NULL).references_noted, 0);
	ck_assert_uint_eq(atomic_load(&engine->host.stable_frames), 0);
	ck_assert_uint_lt(stats(NULL).ksm_bytes + MANY * 4 - 4 * sizeof(struct notes), s.ksm_bytes); /* nor is the room kept */
}
END_TEST

static uint64_t slow_now(void *opaque, enum kage_clock_id id)
{
	static _Atomic uint64_t now;

	return atomic_fetch_add(&now, 1000000);
}

/* A step with a budget lets go of as much as it has time for. Until all is gone nothing is fused: memory comes to an end. */
START_TEST(hardened_notes_in_pieces)
{
	struct kage_vm *a;
	uint64_t word, noted, before = MANY;
	unsigned steps = 0;

	ck_assert_int_eq(kage_engine_create(KAGE_CFG(kage_engine_config, .clock = { .now = slow_now }), &engine), 0);
	ck_assert_int_eq(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)), 0);
	harden(FRAMES);
	a = guest_fused(MANY);
	for (unsigned i = 0; i < MANY; i++)
		ck_assert_int_eq(kage_vm_read(a, i * PAGE, &word, 8), 0);
	ck_assert_uint_eq(fused_pages(a, MANY), 0);
	for (; (noted = stats(NULL).references_noted) != 0; steps++) {
		ck_assert(steps == 0 || noted < before);
		ck_assert_uint_eq(fused_pages(a, MANY), 0);
		ck_assert_int_eq(kage_engine_step(engine, KAGE_CFG(kage_budget, .pages = 512), NULL), 0);
		before = noted;
		audit();
	}
	ck_assert_uint_gt(steps, 2);
	merge();
	ck_assert_uint_eq(fused_pages(a, MANY), MANY);
	kage_vm_destroy(a);
	ck_assert_int_eq(kage_engine_destroy(engine), 0);
}
END_TEST

/* What a clone's tables map is owed as well, from when they become its own. */
START_TEST(hardened_notes_of_clones)
{
	struct kage_vm *vm[2];
	uint64_t word;

	harden(FRAMES);
	vm[0] = guest_fused(4 * 512);
	ck_assert_int_eq(kage_vm_clone(vm[0], NULL, &vm[1]), 0);
	for (unsigned g = 0; g < 2; g++) {
		for (unsigned i = 0; i < 4 * 512; i += 512 / (1 + g))
			ck_assert_int_eq(kage_vm_read(vm[g], i * PAGE, &word, 8), 0);
		audit();
	}
	ck_assert_uint_gt(reserve(vm[0])->owed, 4 * 512);
	ck_assert_int_eq(kage_vm_destroy(vm[0]), 0);
	audit();
	ck_assert_uint_eq(stats(NULL).references_noted, 4 * 512 + 8);
	for (unsigned i = 0; i < 4 * 512; i++) {
		ck_assert_int_eq(kage_vm_read(vm[1], i * PAGE, &word, 8), 0);
		ck_assert_uint_eq(word, 1 + (i % 4 == 1 ? i - 1 : i));
	}
	audit();
	kage_vm_destroy(vm[1]);
}
END_TEST

/*
 * A pin that is taken after merging has looked, and is over when the entry changes; in between its device stores.
 *
 *      the step                              others
 *      looks: page 4 is not pinned
 *      start of the change of page 3         page 4 is pinned
 *      start of the change of page 4         its table's lock is taken
 *      inspects page 4; waits for the lock   the device stores; unpinned; the lock is let go of
 */
static struct {
	struct kage_notifier notifier;
	struct kage_vm *vm;
	struct iovec iov;
	pthread_t locker;
	unsigned pins, stores;
	_Atomic bool locked, over;
} late;

static void *late_pin(void *arg)
{
	unsigned n = 1;

	ck_assert_int_eq(kage_vm_pin(late.vm, 4 * PAGE, PAGE, 0, &late.iov, &n), 0);
	late.pins++;
	return NULL;
}

static void *late_store(void *arg)
{
	*(volatile uint64_t *)late.iov.iov_base = 99;
	late.stores++;
	ck_assert_int_eq(kage_vm_unpin(late.vm, 4 * PAGE, PAGE), 0);
	return NULL;
}

static void on_thread(void *(*fn)(void *))
{
	pthread_t t;

	ck_assert_int_eq(pthread_create(&t, NULL, fn, NULL), 0);
	ck_assert_int_eq(pthread_join(t, NULL), 0);
}

static void *late_lock(void *arg)
{
	struct lock *l = table_lock_of(late.vm->mm.family, 0, GFN(4));

	lock_take(l);
	late.locked = true;
	while (atomic_load(&l->word) != 2 && !late.over)
		usleep(100);
	on_thread(late_store); /* a thread with a table lock takes no mm->range */
	lock_drop(l);
	return NULL;
}

static int late_start(struct kage_notifier *n, const struct kage_range *r)
{
	if (r->start == 3 * PAGE && late.pins == 0)
		on_thread(late_pin);
	if (r->start == 4 * PAGE && late.pins == 1 && !late.locked) {
		ck_assert_int_eq(pthread_create(&late.locker, NULL, late_lock, NULL), 0);
		while (!late.locked)
			usleep(100);
	}
	return 0;
}

static void late_end(struct kage_notifier *n, const struct kage_range *r)
{
	if (r->start == 4 * PAGE)
		late.over = true;
}

static const struct kage_notifier_ops late_ops = { .invalidate_range_start = late_start, .invalidate_range_end = late_end };

/* Page 4 is copied to a frame of its own; or has its like, and is compared with it. */
START_TEST(hardened_pins_that_are_over)
{
	struct kage_vm *a;
	uint64_t word;

	harden(FRAMES);
	memset(&late, 0, sizeof(late));
	late.vm = a = guest(HARD);
	put(a, 1, _i ? 5 : 6);
	merge();
	put(a, 3, 4);
	put(a, 4, 5);
	ck_assert_int_eq(kage_notifier_register(a, &late.notifier, &late_ops), 0);
	merge();
	ck_assert_uint_eq(late.pins, 1);
	ck_assert(late.locked);
	ck_assert_int_eq(pthread_join(late.locker, NULL), 0);
	ck_assert_uint_eq(late.stores, 1);
	merge();
	ck_assert(fused(a, 3) && fused(a, 4));
	ck_assert_int_eq(kage_vm_read(a, 4 * PAGE, &word, 8), 0);
	ck_assert_uint_eq(word, 99);
	ck_assert_int_eq(kage_notifier_unregister(&late.notifier), 0);
	kage_vm_destroy(a);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("tenant");
	TCase *anon = tcase_create("anonymous"), *memfd = tcase_create("memfd"), *bare = tcase_create("bare");
	SRunner *sr;
	int failed;

	tcase_add_checked_fixture(anon, setup, teardown);
	tcase_add_checked_fixture(memfd, setup_memfd, teardown);
	for (unsigned i = 0; i < 2; i++) {
		TCase *tc = i ? memfd : anon;

		tcase_set_timeout(tc, 120);
		tcase_add_test(tc, domains_share_no_frame);
		tcase_add_test(tc, zeroes_stay_in_their_domain);
		tcase_add_test(tc, zero_frames_run_out);
		tcase_add_test(tc, configured_before_guests);
		tcase_add_test(tc, hardened_is_configured);
		tcase_add_test(tc, hardened_pages_are_out_of_reach);
		tcase_add_test(tc, hardened_accesses_take_one_path);
		tcase_add_test(tc, hardened_draws_are_random);
		tcase_add_test(tc, hardened_splits_blocks_alike);
		tcase_add_test(tc, hardened_and_the_vmm);
		tcase_add_test(tc, hardened_clones);
		tcase_add_test(tc, hardened_notes_wait_for_a_step);
		tcase_add_test(tc, hardened_notes_of_clones);
		tcase_add_test(tc, hardened_sharing_is_limited);
		tcase_add_loop_test(tc, hardened_pins_that_are_over, 0, 2);
		suite_add_tcase(s, tc);
	}
	tcase_add_test(bare, salts_are_a_domains_own);
	tcase_add_test(bare, hardened_without_memory);
	tcase_add_test(bare, hardened_without_an_object);
	tcase_add_test(bare, hardened_notes_in_pieces);
	suite_add_tcase(s, bare);
	sr = srunner_create(s);
	srunner_set_fork_status(sr, CK_NOFORK);
	srunner_run_all(sr, CK_NORMAL);
	failed = srunner_ntests_failed(sr);
	srunner_free(sr);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
