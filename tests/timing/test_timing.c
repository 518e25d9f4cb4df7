/* SPDX-License-Identifier: MIT */
/*
 * Can a guest tell by the clock which of its pages are merged?
 *
 * Two guests of one merge domain. In each round some pages of the attacker, chosen by lot,
 * hold what a page of the victim holds, the others what nobody holds; the attacker reads all
 * of them, so that translations are cached. Merging passes go over both. Then
 * the attacker accesses each of its pages once, in random order, and notes how long it takes: two samples, one
 * of merged and one of unmerged pages. The same once more with stores instead of loads. In an ordinary domain a store to a
 * merged page is a COW break, and a load misses its translation, which others have still:
 * as an attacker would, the lot decides for groups of pages there, since merging drops translations of whole runs. In a hardened domain it
 * decides for each page, so that whatever neighbours have in common is in both samples.
 *
 * In a hardened domain neither Welch's t nor Kolmogorov and Smirnov's test may tell the samples from each
 * other (statistics.h); in an ordinary domain both must, with a tenth of the samples. No
 * time is asserted: order by lot puts whatever else happens on the machine into both samples alike.
 *
 * Errors of the first kind: |t| >= 4.5 in one of some 150,000 runs (croppings are not
 * independent: a few times that), p < ALPHA in one of 10,000. A leak shows again: when the samples of a hardened
 * domain differ, new ones have to differ as well before the test fails.
 *
 * That it fails where it should is tried by hand: mutations.sh.
 *
 * Environment: KAGE_TIMING_SAMPLES (of each experiment in a hardened domain, default 100,000), KAGE_SEED.
 */
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <kage/kage.h>

#include "../model/rng.h"
#include "statistics.h"

#define PAGE	 4096u
#define PAGES	 4096u /* of each guest */
#define GROUP	 128u
#define ALPHA	 1e-4
#define T_LEAST	 4.5
#define PASSES	 3 /* written, quiet, looked at */

#define MUST(call)                                                                    \
	do {                                                                          \
		int r_ = (call);                                                      \
		if (r_ != 0) {                                                        \
			printf("timing: line %d: " #call " returned %d\n", __LINE__, r_); \
			exit(1);                                                      \
		}                                                                     \
	} while (0)

enum experiment { LOADS, STORES, EXPERIMENTS };

static const char *const names[] = { "loads", "stores" };

struct scene {
	struct kage_engine *engine;
	struct kage_vm *attacker, *victim;
	struct kage_vcpu *vcpu;
	struct rng rng;
	uint64_t content; /* the last one in use */
	unsigned group;   /* pages for which one lot decides */
	bool merged[PAGES];
	unsigned order[PAGES];
};

struct samples {
	struct sample of[2]; /* unmerged, merged */
};

/* -- the clock ------------------------------------------------------------------ */

/* No access before it moves behind it, and none after it before (Intel SDM vol. 2B RDTSC; Arm ARM D12.1). */
static inline uint64_t ticks(void)
{
#if defined(__x86_64__)
	uint32_t low, high;

	__asm__ volatile("mfence\n\tlfence\n\trdtsc\n\tlfence" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
#elif defined(__aarch64__)
	uint64_t now;

	__asm__ volatile("dsb sy\n\tisb\n\tmrs %0, cntvct_el0\n\tisb" : "=r"(now) : : "memory");
	return now;
#else
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
#endif
}

static void stay_on_one_cpu(void)
{
	cpu_set_t set;
	int cpu = sched_getcpu();

	CPU_ZERO(&set);
	if (cpu >= 0)
		CPU_SET(cpu, &set);
	if (cpu < 0 || sched_setaffinity(0, sizeof(set), &set))
		printf("timing: not bound to one CPU\n");
}

/* -- guests ----------------------------------------------------------------------- */

static struct kage_vm *guest(struct kage_engine *e)
{
	struct kage_vm *vm;

	MUST(kage_vm_create(e, KAGE_CFG(kage_vm_config, .merge_domain = 1), &vm));
	MUST(kage_vm_map(vm, KAGE_CFG(kage_region, .len = PAGES * PAGE, .flags = KAGE_REGION_MERGEABLE)));
	return vm;
}

static void log_line(void *opaque, int level, const char *line)
{
	printf("timing: engine: %s\n", line);
}

static struct scene *scene_open(bool hardened, uint64_t seed)
{
	struct scene *s = calloc(1, sizeof(*s));

	s->rng = rng_seed(seed);
	s->group = hardened ? 1 : GROUP;
	MUST(kage_engine_create(KAGE_CFG(kage_engine_config, .log = log_line), &s->engine));
	MUST(kage_domain_configure(s->engine, 1,
				   KAGE_CFG(kage_domain_config, .flags = hardened ? KAGE_DOMAIN_HARDENED : 0)));
	MUST(kage_engine_tune(s->engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)));
	s->victim = guest(s->engine);
	s->attacker = guest(s->engine);
	MUST(kage_vcpu_create(s->attacker, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI), &s->vcpu));
	return s;
}

static void scene_close(struct scene *s)
{
	MUST(kage_engine_audit(s->engine, KAGE_CFG(kage_audit, .report = NULL)));
	kage_vcpu_destroy(s->vcpu);
	MUST(kage_vm_destroy(s->attacker));
	MUST(kage_vm_destroy(s->victim));
	MUST(kage_engine_destroy(s->engine));
	free(s);
}

static void put(struct scene *s, struct kage_vm *vm, unsigned page, uint64_t content)
{
	uint64_t buf[PAGE / 8];

	for (unsigned i = 0; i < PAGE / 8; i++)
		buf[i] = content * UINT64_C(0x9e3779b97f4a7c15) + i;
	MUST(kage_vm_write(vm, (uint64_t)page * PAGE, buf, PAGE));
}

static void shuffle(struct scene *s)
{
	for (unsigned i = 0; i < PAGES; i++) {
		unsigned j = (unsigned)rng_below(&s->rng, i + 1);

		s->order[i] = s->order[j];
		s->order[j] = i;
	}
}

/* The samples are of what they say. */
static void check_merged(struct scene *s)
{
	static uint8_t map[PAGES];

	for (unsigned g = 0; g < 2; g++) {
		MUST(kage_page_map(g ? s->attacker : s->victim, 0, PAGES * PAGE, map));
		for (unsigned i = 0; i < PAGES; i++) {
			if ((map[i] == KAGE_PAGE_MERGED) == s->merged[i])
				continue;
			printf("timing: page %u of guest %u: class %u, %smerged by plan\n", i, g, map[i],
			       s->merged[i] ? "" : "not ");
			exit(1);
		}
	}
}

static void arrange(struct scene *s)
{
	uint64_t word;

	for (unsigned i = 0; i < PAGES; i++) {
		s->merged[i] = i % s->group ? s->merged[i - 1] : rng_chance(&s->rng, 50);
		put(s, s->victim, i, ++s->content);
		put(s, s->attacker, i, s->merged[i] ? s->content : ++s->content);
		MUST(kage_vcpu_load(s->vcpu, (uint64_t)i * PAGE, &word, sizeof(word), NULL));
	}
	for (unsigned i = 0; i < PASSES; i++)
		MUST(kage_engine_step(s->engine, NULL, NULL));
	check_merged(s);
}

/* -- measuring ----------------------------------------------------------------------- */

static uint64_t timed_load(struct scene *s, unsigned page)
{
	uint64_t word, start = ticks(), end;
	int r = kage_vcpu_load(s->vcpu, (uint64_t)page * PAGE, &word, sizeof(word), NULL);

	end = ticks();
	MUST(r);
	return end - start;
}

static uint64_t timed_store(struct scene *s, unsigned page)
{
	uint64_t word = page, start = ticks(), end;
	int r = kage_vcpu_store(s->vcpu, (uint64_t)page * PAGE, &word, sizeof(word), NULL);

	end = ticks();
	MUST(r);
	return end - start;
}

static uint64_t measure(struct scene *s, enum experiment what, unsigned page)
{
	return what == STORES ? timed_store(s, page) : timed_load(s, page);
}

static struct samples sample(struct scene *s, enum experiment what, size_t total)
{
	struct samples out = { { { malloc(total * sizeof(double)), 0 }, { malloc(total * sizeof(double)), 0 } } };
	bool warm = false;

	while (out.of[0].n + out.of[1].n < total) {
		arrange(s);
		shuffle(s);
		for (unsigned i = 0; i < PAGES && out.of[0].n + out.of[1].n < total; i++) {
			struct sample *to = &out.of[s->merged[s->order[i]]];
			uint64_t t = measure(s, what, s->order[i]);

			if (warm)
				to->x[to->n++] = (double)t;
		}
		warm = true;
	}
	sample_sort(&out.of[0]);
	sample_sort(&out.of[1]);
	return out;
}

/* Do they differ? Both tests say so, or one of them. */
struct verdict {
	bool both, any;
};

static struct verdict judge(const char *domain, enum experiment what, struct samples *m)
{
	const struct sample *a = &m->of[0], *b = &m->of[1];
	double t = welch_t_cropped(a, b), d = ks_distance(a, b), p = ks_probability(d, a->n, b->n);
	bool by_t = fabs(t) >= T_LEAST, by_ks = p < ALPHA;

	printf("timing: %-8s %-6s %6zu unmerged, %6zu merged: medians %.0f %.0f, t %+.2f%s, D %.4f, p %.2g%s\n", domain,
	       names[what], a->n, b->n, a->x[a->n / 2], b->x[b->n / 2], t, by_t ? " (differ)" : "", d, p,
	       by_ks ? " (differ)" : "");
	fflush(stdout);
	free(m->of[0].x);
	free(m->of[1].x);
	return (struct verdict){ by_t && by_ks, by_t || by_ks };
}

static struct verdict look(const char *domain, struct scene *s, enum experiment what, size_t samples)
{
	struct samples m = sample(s, what, samples);

	return judge(domain, what, &m);
}

int main(void)
{
	uint64_t total = env_number("KAGE_TIMING_SAMPLES", 100000), seed = env_number("KAGE_SEED", (uint64_t)time(NULL));
	struct scene *s;
	unsigned failed = 0;

	printf("timing: seed %llu\n", (unsigned long long)seed);
	stay_on_one_cpu();
	s = scene_open(true, seed);
	for (unsigned what = 0; what < EXPERIMENTS; what++)
		failed += look("hardened", s, what, total).any && look("hardened", s, what, total).any;
	scene_close(s);
	s = scene_open(false, seed + 1);
	for (unsigned what = 0; what < EXPERIMENTS; what++)
		failed += !look("ordinary", s, what, total / 10).both;
	scene_close(s);
	printf("timing: %s\n", failed ? "FAILED" : "passed");
	return failed != 0;
}
