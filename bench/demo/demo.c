/* SPDX-License-Identifier: MIT */
/*
 * kage-demo: the engine's main job on the memory of three guests.
 *
 *   load -> linux_banner -> merge -> clone -> write -> prove -> picture
 *
 * What the checks rely on:
 *  1. The digests are sha256sum's, taken while QEMU had the guest stopped.
 *  2. "resident" is the engine's own count of frames; Pss is the kernel's count
 *     of this process. Between the two measurements nothing but the engine
 *     changes size: buffers are allocated and touched before, vCPUs are gone,
 *     files are read with pread(2) and never mapped, and regions use 4 KiB
 *     entries, so no huge page is split in between.
 *  3. COW breaks are the engine's count; that the copies are right is what the
 *     proof shows, byte by byte.
 */
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "demo.h"

#define PANELS (3 * DEMO_IMAGES)
#define MAX_PASSES 8
#define MERGE_SECONDS 120
#define STEP_PAGES 8192

/* A sanitizer keeps freed memory and shadows: then Pss says nothing about the engine, and is not judged. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

struct demo {
	const char *dir;
	char svg[4096];
	char how[256];
	int corrupt;
	unsigned nclones, nwrites;

	struct kage_engine *engine;
	struct image image[DEMO_IMAGES];
	struct kage_vm *vm[DEMO_IMAGES];
	struct clones clones;
	struct claim *claims;
	struct panel panel[PANELS];
	uint8_t *buffer; /* BANNER_BUFFER bytes, also the chunk of a load */
	uint64_t pages;  /* of the largest image */
	int failed;      /* checks */
};

/* -- output ---------------------------------------------------------------- */

static void title(const char *text)
{
	host_progress(NULL);
	printf("\n%s\n", text);
	fflush(stdout);
}

__attribute__((format(printf, 3, 4))) static void check(struct demo *d, int ok, const char *format, ...)
{
	va_list args;

	host_progress(NULL);
	fputs(ok ? "   ok    " : "   FAIL  ", stdout);
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	putchar('\n');
	fflush(stdout);
	d->failed += !ok;
}

/* For what cannot go on; returns its argument. */
static int cannot(const char *what, int err)
{
	host_progress(NULL);
	fprintf(stderr, "kage-demo: %s: %s\n", what, err < 0 ? strerror(-err) : "unexpected outcome");
	return err;
}

static double ms(uint64_t ns)
{
	return (double)ns / 1e6;
}

static double mib(uint64_t bytes)
{
	return (double)bytes / 1048576.0;
}

static double difference(uint64_t a, uint64_t b)
{
	return ((double)a - (double)b) / 1048576.0;
}

/* -- the engine ------------------------------------------------------------ */

static struct kage_stats stats(struct demo *d, struct kage_vm *vm)
{
	struct kage_stats s = { .size = sizeof(s) };
	int err = kage_stats_get(d->engine, vm, &s);

	if (err)
		check(d, 0, "kage_stats_get: %s", strerror(-err));
	return s;
}

/* Runs what is due (merging is off) until no freed frame waits for its grace period. */
static void settle(struct demo *d)
{
	for (int i = 0; i < 16; i++) {
		kage_engine_step(d->engine, NULL, NULL);
		if (!stats(d, NULL).frames_pending)
			return;
	}
}

static void print_violation(void *opaque, const char *line)
{
	int *lines = opaque;

	if ((*lines)++ < 10)
		printf("   audit: %s\n", line);
}

static void audit(struct demo *d, const char *when)
{
	int lines = 0;
	struct kage_audit a = { .size = sizeof(a), .report = print_violation, .opaque = &lines };
	int err = kage_engine_audit(d->engine, &a);

	check(d, !err, "audit %s: %lu checks, %lu violations%s%s", when, (unsigned long)a.checks,
	      (unsigned long)a.violations, err ? ": " : "", err ? strerror(-err) : "");
}

/* Keeps how the pages of a guest are held now, for the picture. */
static int snapshot(struct demo *d, unsigned slot, struct kage_vm *vm, const char *what)
{
	struct panel *p = &d->panel[slot];

	snprintf(p->title, sizeof(p->title), "%s", what);
	return kage_page_map(vm, 0, p->pages << KAGE_PAGE_SHIFT, p->map);
}

static int snapshot_guests(struct demo *d, unsigned row, const char *what)
{
	int err = 0;

	for (unsigned i = 0; !err && i < DEMO_IMAGES; i++) {
		char text[64];

		snprintf(text, sizeof(text), "guest %u, %s", i + 1, what);
		err = snapshot(d, row * DEMO_IMAGES + i, d->vm[i], text);
	}
	return err ? cannot("kage_page_map", err) : 0;
}

static int prove(struct demo *d, unsigned nclones, const char *when)
{
	uint64_t start = host_ns(), bytes = 0;
	unsigned n = DEMO_IMAGES + nclones, shown = 0;
	int failed;

	for (unsigned i = 0; i < n; i++) {
		unsigned clone = i - DEMO_IMAGES;

		if (i < DEMO_IMAGES)
			d->claims[i] = (struct claim){ .vm = d->vm[i], .image = &d->image[i] };
		else
			d->claims[i] = (struct claim){ .vm = d->clones.vm[clone], .image = &d->image[0],
						       .clones = &d->clones, .clone = clone };
		bytes += d->claims[i].image->bytes;
	}
	failed = proof_run(d->claims, n);
	if (failed < 0)
		return cannot("the proof", failed);
	host_progress(NULL);
	for (unsigned i = 0; i < n && shown < 8; i++) {
		int r = d->claims[i].result;

		if (!r)
			continue;
		shown++;
		printf("         %s %u: %s\n", i < DEMO_IMAGES ? "guest" : "clone",
		       i < DEMO_IMAGES ? i + 1 : i - DEMO_IMAGES + 1,
		       r == -EBADMSG ? "sha256 is not that of its RAM file" :
		       r == -EILSEQ  ? "a page that it wrote is not as it wrote it" :
				       strerror(-r));
	}
	check(d, !failed,
	      "sha256 proof %s: %u of %u guests read exactly their own bytes (%.1f GiB in %.1f s)", when,
	      n - (unsigned)failed, n, mib(bytes) / 1024, ms(host_ns() - start) / 1000);
	return 0;
}

/* -- the steps ------------------------------------------------------------- */

static int load(struct demo *d)
{
	title("Load: the RAM of each guest, as QEMU left it");
	for (unsigned i = 0; i < DEMO_IMAGES; i++) {
		struct image *image = &d->image[i];
		uint64_t start = host_ns();
		int err = kage_vm_create(d->engine, NULL, &d->vm[i]);

		if (!err)
			err = image_load(image, d->vm[i], d->buffer);
		if (err)
			return cannot("loading a guest", err);
		host_progress(NULL);
		printf("   guest %u  %7.1f MiB nominal   %7.1f touched, %6.1f of it zero   %6.1f untouched "
		       "%5.0f ms\n",
		       image->number, mib(image->bytes), DEMO_MIB(image->pages_data),
		       DEMO_MIB(image->pages_zero), mib(image->bytes) - DEMO_MIB(image->pages_data),
		       ms(host_ns() - start));
	}
	return prove(d, 0, "after loading");
}

static int banners(struct demo *d)
{
	static const char *const page_size[] = { "4 KiB", "2 MiB", "1 GiB" };

	title("linux_banner: found through each guest's own page tables on a soft vCPU");
	for (unsigned i = 0; i < DEMO_IMAGES; i++) {
		struct image *image = &d->image[i];
		uint64_t start = host_ns();
		struct kage_vcpu *vcpu;
		struct banner b;
		int err = image_vcpu(image, d->vm[i], &vcpu);

		if (err)
			return cannot("a vCPU with the guest's registers", err);
		err = banner_find(vcpu, d->buffer, &b);
		kage_vcpu_destroy(vcpu);
		check(d, !err, "guest %u  cr3 %08lx, %d levels%s%s", image->number,
		      (unsigned long)image->regs.cr3, image->regs.cr4 & 0x1000 ? 5 : 4,
		      err ? ": no banner: " : "", err ? strerror(-err) : "");
		if (err)
			continue;
		printf("         gva %016lx -> gpa %09lx (a %s page); %.1f MiB loaded in %.1f ms\n"
		       "         %s\n",
		       (unsigned long)b.gva, (unsigned long)b.gpa,
		       page_size[b.level], mib(b.read), ms(host_ns() - start), b.text);
	}
	return 0;
}

/* Passes until one merges nothing more, at least two. */
static int merge_passes(struct demo *d)
{
	uint64_t start = host_ns(), pass = start, scanned = 0, merged = 0, passes = 0;

	while (passes < MAX_PASSES) {
		struct kage_progress p = { .size = sizeof(p) };
		int err = kage_engine_step(d->engine, KAGE_CFG(kage_budget, .pages = STEP_PAGES), &p);

		if (err)
			return cannot("a merging step", err);
		scanned += p.pages_scanned;
		merged += p.pages_merged;
		host_progress("pass %lu: %lu pages scanned, %lu merged", (unsigned long)passes + 1,
			      (unsigned long)scanned, (unsigned long)merged);
		if (host_ns() - start > MERGE_SECONDS * UINT64_C(1000000000))
			return cannot("merging", -ETIMEDOUT);
		if (p.passes == passes)
			continue;
		passes = p.passes;
		host_progress(NULL);
		printf("   pass %lu   %8lu pages scanned   %8lu merged   %7.0f ms\n", (unsigned long)passes,
		       (unsigned long)scanned, (unsigned long)merged, ms(host_ns() - pass));
		if (passes >= 2 && !merged)
			break;
		scanned = merged = 0;
		pass = host_ns();
	}
	return 0;
}

static void report_merge(struct demo *d, const struct kage_stats *before, const struct kage_stats *after,
			 uint64_t pss_before, uint64_t pss_after, uint64_t ns)
{
	int64_t saved = (int64_t)(before->frames_used - after->frames_used) * (int64_t)KAGE_PAGE_SIZE;
	int64_t fall = (int64_t)(pss_before - pss_after);
	double apart = saved ? 100.0 * (double)(fall - saved) / (double)saved : 100.0;

	printf("   nominal   %8.1f MiB\n", DEMO_MIB(after->pages_nominal));
	printf("   resident  %8.1f MiB before, %.1f after\n", DEMO_MIB(before->frames_used),
	       DEMO_MIB(after->frames_used));
	printf("   saved     %8.1f MiB in %.0f ms: %.1f by equal contents, %.1f by the zero frame\n",
	       (double)saved / 1048576.0, ms(ns), DEMO_MIB(after->ksm_pages_sharing),
	       DEMO_MIB(after->ksm_zero_pages));
	printf("   pages     shared %lu, sharing %lu, zero %lu, unshared %lu, volatile %lu, skipped %lu\n",
	       (unsigned long)after->ksm_pages_shared, (unsigned long)after->ksm_pages_sharing,
	       (unsigned long)after->ksm_zero_pages, (unsigned long)after->ksm_pages_unshared,
	       (unsigned long)after->ksm_pages_volatile, (unsigned long)after->ksm_pages_skipped);
	printf("   own Pss   %8.1f MiB before, %.1f after: fell by %.1f\n", mib(pss_before), mib(pss_after),
	       (double)fall / 1048576.0);
	check(d, saved > 0 && (SANITIZED || (apart <= 10 && apart >= -10)),
	      "what the engine says it saved and the fall in Pss are %+.1f %% apart (limit %s)", apart,
	      SANITIZED ? "not applied: a sanitizer's memory is in Pss" : "10");
}

static int merge(struct demo *d)
{
	struct kage_stats before, after;
	uint64_t pss_before, pss_after, start, ns;
	int err;

	title("Merge: equal pages of the three guests become one frame");
	settle(d);
	before = stats(d, NULL);
	pss_before = host_pss();
	start = host_ns();
	kage_engine_tune(d->engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE));
	err = merge_passes(d);
	kage_engine_tune(d->engine, KAGE_CFG(kage_tune, .flags = 0));
	if (err)
		return err;
	ns = host_ns() - start;
	settle(d);
	pss_after = host_pss();
	after = stats(d, NULL);
	report_merge(d, &before, &after, pss_before, pss_after, ns);
	audit(d, "after merging");
	return 0;
}

/* Flips a bit of a merged frame behind the engine's back: the proof must find it. */
static int corrupt(struct demo *d)
{
	struct panel *p = &d->panel[DEMO_IMAGES]; /* guest 1, merged */
	struct kage_vcpu *vcpu;
	uint64_t page = 0;
	void *ptr;
	int err;

	while (page < p->pages && p->map[page] != KAGE_PAGE_MERGED)
		page++;
	if (page == p->pages)
		return cannot("a merged page to corrupt", -ENODATA);
	err = kage_vcpu_create(d->vm[0], KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI), &vcpu);
	if (err)
		return cannot("a vCPU", err);
	kage_vcpu_enter(vcpu);
	err = kage_vcpu_ptr(vcpu, (page << KAGE_PAGE_SHIFT) + 123, 1, KAGE_READ, &ptr, NULL);
	if (!err)
		*(uint8_t *)ptr ^= 0x10;
	kage_vcpu_leave(vcpu);
	kage_vcpu_destroy(vcpu);
	if (err)
		return cannot("a pointer to a merged page", err);
	printf("\n   --corrupt: flipped a bit of the merged frame at gpa %lx of guest 1\n",
	       (unsigned long)((page << KAGE_PAGE_SHIFT) + 123));
	return 0;
}

static int make_clones(struct demo *d)
{
	struct clones *c = &d->clones;
	struct kage_stats before = stats(d, NULL), after;
	uint64_t pss = host_pss(), metadata, tables;
	int err;

	title("Clone: guest 1, again and again");
	err = clones_make(c, d->vm[0]);
	if (err)
		return cannot("cloning", err);
	after = stats(d, NULL);
	metadata = after.bytes_metadata - before.bytes_metadata;
	tables = (after.frames_table - before.frames_table) << KAGE_PAGE_SHIFT;
	printf("   %u clones  median %.1f us, max %.1f us each\n", c->n, (double)c->ns[c->n / 2] / 1e3,
	       (double)c->ns[c->n - 1] / 1e3);
	printf("   nominal    %.1f MiB more\n", DEMO_MIB(after.pages_nominal - before.pages_nominal));
	printf("   resident   %.1f MiB more guest memory, %.1f KiB tables, %.1f KiB metadata, own Pss %+.1f "
	       "MiB\n",
	       (double)((int64_t)(after.frames_used - before.frames_used)) / 256.0,
	       (double)(int64_t)tables / 1024, (double)(int64_t)metadata / 1024, difference(host_pss(), pss));
	check(d, after.frames_used == before.frames_used, "cloning copied no guest memory");
	return 0;
}

static int write_clones(struct demo *d)
{
	struct clones *c = &d->clones;
	struct kage_stats before = stats(d, NULL), after;
	uint64_t start, ns, breaks, pss = host_pss();
	int err;

	title("Write: every clone writes pages of its own");
	start = host_ns();
	err = clones_write(c, d->vm[0], d->panel[PANELS - 1].map, d->panel[PANELS - 1].pages);
	if (err)
		return cannot("a clone's write", err);
	ns = host_ns() - start;
	host_progress(NULL);
	after = stats(d, NULL);
	breaks = after.cow_breaks - before.cow_breaks;
	printf("   %u clones x %u pages  %.1f ms, %.2f us a page; half by vCPU, half by kage_vm_write()\n",
	       c->n, c->writes, ms(ns), (double)ns / 1e3 / c->n / c->writes);
	printf("   COW breaks           %lu; tables un-shared %lu\n", (unsigned long)breaks,
	       (unsigned long)(after.tables_unshared - before.tables_unshared));
	printf("   resident             %.1f MiB more guest memory, %.1f MiB tables; own Pss %+.1f MiB\n",
	       DEMO_MIB(after.frames_used - before.frames_used),
	       DEMO_MIB(after.frames_table - before.frames_table), difference(host_pss(), pss));
	check(d, breaks == (uint64_t)c->n * c->writes,
	      "every first write to a shared page was one COW break");
	audit(d, "after the writes");
	return 0;
}

static int picture(struct demo *d)
{
	char text[64];
	int err;

	title("Picture");
	snprintf(text, sizeof(text), "guest 1, cloned %u times", d->clones.n);
	err = snapshot(d, 2 * DEMO_IMAGES, d->vm[0], text);
	if (!err)
		err = snapshot(d, 2 * DEMO_IMAGES + 1, d->clones.vm[0], "clone 1, after its writes");
	snprintf(text, sizeof(text), "clone %u, after its writes", d->clones.n);
	if (!err)
		err = snapshot(d, 2 * DEMO_IMAGES + 2, d->clones.vm[d->clones.n - 1], text);
	if (!err)
		err = svg_write(d->svg, d->how, d->panel, PANELS, DEMO_IMAGES);
	if (err)
		return cannot(d->svg, err);
	printf("   %s\n", d->svg);
	return 0;
}

static int steps(struct demo *d)
{
	int err = load(d);

	if (!err)
		err = snapshot_guests(d, 0, "loaded");
	if (!err)
		err = banners(d);
	if (!err)
		err = merge(d);
	if (!err)
		err = snapshot_guests(d, 1, "merged");
	if (!err && d->corrupt)
		err = corrupt(d);
	if (!err)
		err = make_clones(d);
	if (!err)
		err = write_clones(d);
	if (err)
		return err;
	title("Prove: against the sha256sum of the RAM files");
	err = prove(d, d->clones.n, "after everything");
	return err ? err : picture(d);
}

/* -- beginning and end ----------------------------------------------------- */

static void read_how(struct demo *d)
{
	char path[4096];
	FILE *f;

	snprintf(d->how, sizeof(d->how), "unknown images");
	if ((size_t)snprintf(path, sizeof(path), "%s/how", d->dir) >= sizeof(path) || !(f = fopen(path, "r")))
		return;
	if (fgets(d->how, sizeof(d->how), f))
		d->how[strcspn(d->how, "\n")] = 0;
	fclose(f);
}

static int open_images(struct demo *d)
{
	for (unsigned i = 0; i < DEMO_IMAGES; i++) {
		int err = image_open(&d->image[i], d->dir, i + 1);

		if (err)
			return cannot("the files of a guest", err);
		if (d->image[i].bytes >> KAGE_PAGE_SHIFT > d->pages)
			d->pages = d->image[i].bytes >> KAGE_PAGE_SHIFT;
	}
	return 0;
}

/* All memory of the program itself, touched, so that later only the engine's changes size. */
static int prepare(struct demo *d)
{
	d->buffer = malloc(BANNER_BUFFER);
	d->claims = calloc(DEMO_IMAGES + d->nclones, sizeof(*d->claims));
	if (!d->buffer || !d->claims)
		return cannot("memory", -ENOMEM);
	memset(d->buffer, 1, BANNER_BUFFER);
	for (unsigned i = 0; i < PANELS; i++) {
		struct panel *p = &d->panel[i];

		p->pages = d->image[i < 2 * DEMO_IMAGES ? i % DEMO_IMAGES : 0].bytes >> KAGE_PAGE_SHIFT;
		p->map = malloc(p->pages);
		if (!p->map)
			return cannot("memory", -ENOMEM);
		memset(p->map, KAGE_PAGE_NONE, p->pages);
	}
	return clones_init(&d->clones, d->nclones, d->nwrites, d->pages);
}

static void finish(struct demo *d, int err)
{
	clones_finish(&d->clones);
	for (unsigned i = 0; i < DEMO_IMAGES; i++) {
		kage_vm_destroy(d->vm[i]);
		image_close(&d->image[i]);
	}
	if (d->engine) {
		uint64_t left;
		int busy;

		settle(d);
		left = stats(d, NULL).frames_used;
		busy = kage_engine_destroy(d->engine);

		if (!err)
			check(d, !busy && !left, "all guests destroyed, %lu frames left",
			      (unsigned long)left);
	}
	for (unsigned i = 0; i < PANELS; i++)
		free(d->panel[i].map);
	free(d->claims);
	free(d->buffer);
}

static int usage(const char *name)
{
	fprintf(stderr,
		"usage: %s [--corrupt] [--clones N] [--writes N] [--svg FILE] DIR\n"
		"  DIR          holds guestN.ram, guestN.regs, guestN.sha256 for N = 1, 2, 3 (guests.sh)\n"
		"  --corrupt    flip a bit of a merged frame; the proof must fail, and so the program\n"
		"  --clones N   clones of guest 1, default 100\n"
		"  --writes N   pages that each clone writes, default 64\n"
		"  --svg FILE   the picture, default DIR/frames.svg\n",
		name);
	return 2;
}

static int options(struct demo *d, int argc, char **argv)
{
	static const struct option names[] = {
		{ "corrupt", no_argument, NULL, 'c' },	     { "clones", required_argument, NULL, 'n' },
		{ "writes", required_argument, NULL, 'w' },  { "svg", required_argument, NULL, 's' },
		{ NULL, 0, NULL, 0 },
	};
	const char *svg = NULL;
	int option;

	while ((option = getopt_long(argc, argv, "", names, NULL)) != -1) {
		if (option == 'c')
			d->corrupt = 1;
		else if (option == 'n')
			d->nclones = (unsigned)strtoul(optarg, NULL, 10);
		else if (option == 'w')
			d->nwrites = (unsigned)strtoul(optarg, NULL, 10);
		else if (option == 's')
			svg = optarg;
		else
			return -EINVAL;
	}
	if (optind + 1 != argc || !d->nclones || !d->nwrites || d->nclones > 100000 || d->nwrites > 100000)
		return -EINVAL;
	d->dir = argv[optind];
	snprintf(d->svg, sizeof(d->svg), svg ? "%s" : "%s/frames.svg", svg ? svg : d->dir);
	return 0;
}

int main(int argc, char **argv)
{
	static struct demo d = { .nclones = 100, .nwrites = 64 };
	int err;

	for (unsigned i = 0; i < DEMO_IMAGES; i++)
		d.image[i].fd = -1;
	if (options(&d, argc, argv))
		return usage(argv[0]);
	setvbuf(stdout, NULL, _IOLBF, 0);
	read_how(&d);
	printf("Kage %u.%u.%u on three guests\n   %s\n", kage_version() >> 16, kage_version() >> 8 & 255,
	       kage_version() & 255, d.how);
	err = open_images(&d);
	if (!err)
		err = prepare(&d);
	if (!err) {
		err = kage_engine_create(NULL, &d.engine);
		err = err ? cannot("kage_engine_create", err) : steps(&d);
	}
	finish(&d, err);
	if (err)
		return 2;
	printf("\n%s\n", d.failed ? "FAILED" : "all checks passed");
	return d.failed ? 1 : 0;
}
