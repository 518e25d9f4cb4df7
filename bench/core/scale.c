/* SPDX-License-Identifier: MIT */
/*
 * One engine with 1,000 guests against one with 32: what a guest costs must stay
 * the same. Each guest has 2 MiB: half of its pages are its own, half hold what all
 * guests have there. A vCPU of each stores to every page; steps merge; each
 * guest is cloned; all are destroyed and the memory taken back. CPU time of the thread, of the guests' own
 * work: the engine's creation and end are not in it.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "core.h"

#define MANY  1000
#define FEW   32
#define BYTES (2 * MIB)
#define PAGES (BYTES / PAGE)
#define IDLES 8 /* passes */

enum part {
	CREATE,
	FAULT,
	MERGE,
	IDLE,
	CLONE,
	DESTROY,
	PARTS,
};

struct herd {
	unsigned guests, times; /* so many engines, one after the other, make a repetition */
	struct series part[PARTS];
	/* of a repetition: ns a guest */
	double ns[PARTS];
	/* of an engine */
	char *held;
	struct kage_engine *engine;
	struct kage_vm *vm[2 * MANY];
	bool ok, counts;
};

/* What page i of guest g holds in its first word. */
static uint64_t word_of(unsigned g, uint64_t i)
{
	return i & 1 ? mix(i + 1) : mix(((uint64_t)g + 1) << 32 | i);
}

static void create(struct herd *h)
{
	for (unsigned g = 0; g < h->guests; g++) {
		must(kage_vm_create(h->engine, NULL, &h->vm[g]), "guest");
		must(kage_vm_map(h->vm[g],
				 KAGE_CFG(kage_region, .len = BYTES, .flags = KAGE_REGION_MERGEABLE)),
		     "region");
	}
}

/*
 * Memory that is let go of piece by piece, each before a guest needs as much, so that the kernel has it at
 * hand. Other free memory may be far: inside a virtual machine whose free pages are reported to its host,
 * first touch costs several times what it costs on hardware, and that is not what these rows are about.
 */
static void hold(struct herd *h)
{
	uint64_t bytes = (h->guests + 1) * BYTES;
	char *p =
	    must_map(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "mmap");

	madvise(p, bytes, MADV_HUGEPAGE);
	for (uint64_t at = 0; at < bytes; at += PAGE)
		*(volatile char *)(p + at) = 1;
	h->held = p;
}

static void let_go(struct herd *h, unsigned g)
{
	char *p = (char *)(((uintptr_t)h->held + BYTES - 1) & ~(BYTES - 1));

	must(munmap(p + g * BYTES, BYTES) ? -errno : 0, "munmap");
}

static void store_all(struct herd *h, unsigned g)
{
	struct kage_vcpu *v = vcpu_flat(h->vm[g], 9);

	for (uint64_t i = 0; i < PAGES; i++) {
		uint64_t word = word_of(g, i);

		must(kage_vcpu_store(v, i * PAGE, &word, 8, NULL), "store");
	}
	kage_vcpu_destroy(v);
}

/* CPU ns. */
static double fault(struct herd *h)
{
	double ns = 0;

	hold(h);
	for (unsigned g = 0; g < h->guests; g++) {
		double begin;

		let_go(h, g);
		begin = cpu_ns();
		store_all(h, g);
		ns += cpu_ns() - begin;
	}
	munmap(h->held, (h->guests + 1) * BYTES);
	return ns;
}

static void merge(struct herd *h)
{
	steps_merge(h->engine);
}

static void idle(struct herd *h)
{
	struct kage_stats before = {.size = sizeof(before)}, after = {.size = sizeof(after)};

	must(kage_stats_get(h->engine, NULL, &before), "stats");
	must(kage_engine_tune(h->engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)), "tune");
	for (unsigned i = 0; i < IDLES; i++)
		must(kage_engine_step(h->engine, NULL, NULL), "idle pass");
	must(kage_engine_tune(h->engine, KAGE_CFG(kage_tune, .flags = 0)), "tune");
	must(kage_stats_get(h->engine, NULL, &after), "stats");
	h->ok &= after.ksm_full_scans == before.ksm_full_scans + IDLES && after.ksm_pages_scanned == before.ksm_pages_scanned;
}

static void clone_all(struct herd *h)
{
	for (unsigned g = 0; g < h->guests; g++)
		must(kage_vm_clone(h->vm[g], NULL, &h->vm[h->guests + g]), "clone");
}

static void destroy_all(struct herd *h)
{
	for (unsigned i = 0; i < 2 * h->guests; i++)
		must(kage_vm_destroy(h->vm[i]), "destroy");
	steps_settle(h->engine);
}

/* Some of what guests and clones hold; that all was merged that could be. */
static void check_all(struct herd *h)
{
	struct kage_stats s = {.size = sizeof(s)};
	uint64_t common = (PAGES / 2) * (uint64_t)(h->guests - 1), seen = 0;

	must(kage_counters_get(h->engine, NULL, &s), "counters");
	h->ok &= s.ksm_merges == common && s.guests == 2 * h->guests;
	for (uint64_t k = 0; k < 1000; k++) {
		unsigned vm = (unsigned)(mix(k) % (2 * h->guests));
		uint64_t i = mix(k + 1000) % PAGES;

		must(kage_vm_read(h->vm[vm], i * PAGE, &seen, 8), "read");
		h->ok &= seen == word_of(vm % h->guests, i);
	}
}

static void timed(struct herd *h, enum part part, void (*work)(struct herd *h))
{
	double ns = cpu_ns();

	work(h);
	h->ns[part] += (cpu_ns() - ns) / h->guests / h->times;
}

static void one_engine(struct herd *h)
{
	must(kage_engine_create(NULL, &h->engine), "engine");
	timed(h, CREATE, create);
	h->ns[FAULT] += fault(h) / h->guests / h->times;
	timed(h, MERGE, merge);
	timed(h, IDLE, idle);
	timed(h, CLONE, clone_all);
	check_all(h);
	timed(h, DESTROY, destroy_all);
	must(kage_engine_destroy(h->engine), "engine");
}

static double sample_herd(void *arg)
{
	struct herd *h = arg;
	double sum = 0;

	h->ok = true;
	for (unsigned i = 0; i < PARTS; i++)
		h->ns[i] = 0;
	for (unsigned i = 0; i < h->times; i++)
		one_engine(h);
	h->ns[IDLE] /= IDLES;
	for (unsigned i = 0; i < PARTS; i++) {
		sum += h->ns[i];
		if (h->counts)
			series_add(&h->part[i], h->ns[i] / 1000);
	}
	h->counts = true; /* not the first round */
	return h->ok ? sum / 1000 : -1;
}

static struct herd *herd_create(unsigned guests, unsigned times)
{
	struct herd *h = must_map(calloc(1, sizeof(*h)), "memory");

	h->guests = guests;
	h->times = times;
	return h;
}

static void part_rows(const struct herd *many, const struct herd *few, bool ok)
{
	static const char *const name[PARTS] = {"guests-1000-create", "guests-1000-fault",
						"guests-1000-merge", "guests-1000-idle",
						"guests-1000-clone", "guests-1000-destroy"};
	static const char *const note[PARTS] = {
	    "of it: guest and region", "of it: a vCPU and its store to each of 512 pages",
	    "of it: steps until nothing more merges; 256 pages of each guest do",
	    "a pass of merging over it once nobody writes", "of it: cloning the guest",
	    "of it: destroying guest and clone, and the steps that take memory back"};

	for (unsigned i = 0; i < PARTS; i++) {
		struct row row = {.suite = "scale",
				  .name = name[i],
				  .unit = "us",
				  .peer = "a guest of 32",
				  .isvoid = !ok,
				  .value = series_median(&many->part[i]),
				  .spread = series_spread(&many->part[i]),
				  .peer_value = series_median(&few->part[i])};

		row_note(&row, "%s", note[i]);
		report_row(&row);
	}
}

void bench_scale(const struct bench *b)
{
	struct herd *many = herd_create(b->smoke ? 40 : MANY, 1);
	struct herd *few = herd_create(b->smoke ? 8 : FEW, b->smoke ? 1 : 8),
		    *one = herd_create(1, b->smoke ? 2 : 32);
	struct bench fewer = {.quick = b->quick, .smoke = b->smoke, .reps = b->quick ? 1 : b->reps};
	struct turns t = take_turns(&fewer, sample_herd, many, sample_herd, few);
	struct row row = {.suite = "scale",
			  .name = "guests-1000",
			  .unit = "us",
			  .peer = "a guest of 32",
			  .goal = GOAL_TIMES,
			  .limit = 1.3};

	row_note(&row,
		 "CPU a guest of 2 MiB, of %u in one engine: created, 512 stores, merged, cloned, destroyed; "
		 "%llu entries "
		 "present in all",
		 many->guests, (unsigned long long)(many->guests * PAGES));
	report_turns(&row, &t);
	part_rows(many, few, t.ok);
	few->counts = one->counts = false;
	t = take_turns(&fewer, sample_herd, one, NULL, NULL);
	row = (struct row){.suite = "scale", .name = "guests-1", .unit = "us"};
	row_note(&row, "the same for one guest alone, which has nobody to be merged with");
	report_turns(&row, &t);
	free(many);
	free(few);
	free(one);
}
