/* SPDX-License-Identifier: MIT */
/*
 * kage-demo-kvm: the same on a running guest of KVM.
 *
 *   run -> clone 64 times while it runs -> merge -> break -> verify
 *
 * The guest is a payload of the reference VMM (tests/vmm/payload.h). STAMP writes
 * stamps that name page, generation and guest all over its memory and verifies them
 * as it goes; TOUCH writes one word to each page of a range.
 *
 * What the checks rely on:
 *  1. A guest verifies its own pages from inside, and this program from outside, by
 *     kage_vm_read(). Stamps of another guest, or old ones, are errors.
 *  2. What a page must hold after the guests' writes is computed here, by the guest's
 *     own function on a copy.
 *  3. COW breaks are the kernel's; the engine finds them when it reconciles.
 *
 * Exit: 0, 1 if a check failed, 2 if something could not be done, 77 where there is no KVM.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <kage/kvm.h>

#include "demo.h"
#include "payload.h"

#define CLONES	    64
#define GUESTS	    (CLONES + 1)
#define MIB	    ((uint64_t)1 << 20)
#define RAM	    (256 * MIB)
#define STAMP_PAGES 256
#define TEXT_PAGES  512 /* the same in all guests */
#define BREAK_PAGES 128 /* of them: those that each guest writes to */
#define RUN_AT_ONCE 8
#define RUN_US	    100000
#define TIMEOUT_MS  60000

struct live {
	struct kage_engine *engine;
	struct vmm *vmm[GUESTS];    /* 0: the parent */
	uint64_t stamps, log, text; /* gpa */
	uint8_t *page_text;	    /* TEXT_PAGES pages, before the guests write to them */
	int failed;
};

/* -- output ---------------------------------------------------------------------------- */

static void title(const char *text)
{
	printf("\n%s\n", text);
}

__attribute__((format(printf, 3, 4))) static void check(struct live *l, int ok, const char *format, ...)
{
	va_list args;

	fputs(ok ? "   ok    " : "   FAIL  ", stdout);
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	putchar('\n');
	l->failed += !ok;
}

static int cannot(const char *what, int err)
{
	fprintf(stderr, "kage-demo-kvm: %s: %s\n", what, err < 0 ? strerror(-err) : "unexpected outcome");
	return err < 0 ? err : -EIO;
}

static double cpu_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void complain(void *opaque, int level, const char *line)
{
	if (level == KAGE_LOG_ERROR)
		fprintf(stderr, "kage: %s\n", line);
}

/* -- the engine ------------------------------------------------------------------------- */

static struct kage_stats stats(struct live *l)
{
	struct kage_stats s = {.size = sizeof(s)};
	int err = kage_stats_get(l->engine, NULL, &s);

	if (err)
		check(l, 0, "kage_stats_get: %s", strerror(-err));
	return s;
}

static void settle(struct live *l)
{
	for (int i = 0; i < 16 && !kage_engine_step(l->engine, NULL, NULL); i++)
		if (!stats(l).frames_pending)
			return;
}

static void audit(struct live *l, const char *when)
{
	struct kage_audit a = {.size = sizeof(a)};
	int err = kage_engine_audit(l->engine, &a);

	check(l, !err, "audit %s: %lu checks, %lu violations", when, (unsigned long)a.checks,
	      (unsigned long)a.violations);
}

/* CPU ms for all guests. */
static int reconcile(struct live *l, uint32_t flags, double *ms)
{
	int r = 0;

	*ms = cpu_ms();
	for (unsigned i = 0; r >= 0 && i < GUESTS; i++)
		r = kage_kvm_reconcile(vmm_ram_kage_kvm(l->vmm[i]->ram), flags);
	*ms = cpu_ms() - *ms;
	return r < 0 ? cannot("reconciling", r) : 0;
}

/* -- run and clone ------------------------------------------------------------------------ */

static int boot(struct live *l)
{
	const struct vmm_region region = {0, RAM};
	const struct payload_config payload = {.map = RAM};
	struct vmm_config config = {.identity = PAYLOAD_IDENTITY};
	struct payload_mailbox mb = {.program = PAYLOAD_STAMP, .pages = STAMP_PAGES, .words = 8};
	int r = vmm_ram_kage(l->engine, &region, 1, NULL, &config.ram);

	if (r == 0)
		r = vmm_create(&config, &l->vmm[0]);
	if (r < 0)
		return cannot("making the guest", r);
	l->stamps = mb.base = payload_free(&payload);
	l->log = mb.log = mb.base + STAMP_PAGES * KAGE_PAGE_SIZE;
	l->text = mb.log + MIB;
	r = vmm_add_vcpu(l->vmm[0], NULL);
	if (r == 0)
		r = payload_load(l->vmm[0], &payload);
	if (r == 0)
		r = payload_put(l->vmm[0], 0, &mb);
	if (r == 0)
		r = vmm_vcpu_start(l->vmm[0]->vcpu[0]);
	return r < 0 ? cannot("starting the guest", r) : 0;
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static int clone_all(struct live *l)
{
	struct vmm_clone_times times;
	const struct vmm_clone_config config = {.paused = true, .times = &times};
	uint64_t parked[CLONES], begin = host_ns();

	for (unsigned i = 0; i < CLONES; i++) {
		int r = vmm_clone(l->vmm[0], &config, &l->vmm[i + 1]);

		if (r < 0)
			return cannot("cloning the running guest", r);
		parked[i] = times.parked_ns;
	}
	begin = host_ns() - begin;
	qsort(parked, CLONES, sizeof(parked[0]), by_value);
	printf("   %u clones in %.0f ms, KVM's VMs and vCPUs included; the parent stood %.0f us (median), "
	       "%.0f at most\n",
	       CLONES, (double)begin / 1e6, (double)parked[CLONES / 2] / 1e3,
	       (double)parked[CLONES - 1] / 1e3);
	return 0;
}

/* A few at a time, as there are few CPUs. */
static int run_some(struct live *l, unsigned first, unsigned end)
{
	int r = 0;

	for (unsigned i = first; r == 0 && i < end; i++)
		r = i ? vmm_vcpu_start(l->vmm[i]->vcpu[0]) : 0; /* the parent runs */
	usleep(RUN_US);
	for (unsigned i = first; r == 0 && i < end; i++)
		r = payload_stop(l->vmm[i], TIMEOUT_MS);
	return r;
}

/* Everybody runs, then stops and verifies; then this program does. */
static int run_all(struct live *l)
{
	uint64_t stamped = 0, errors = 0, own = 0;
	int64_t wrong = 0;
	int r = 0;

	for (unsigned i = 0; r == 0 && i < GUESTS; i += RUN_AT_ONCE)
		r = run_some(l, i, i + RUN_AT_ONCE < GUESTS ? i + RUN_AT_ONCE : GUESTS);
	if (r < 0)
		return cannot("running the guests", r);
	for (unsigned i = 0; i < GUESTS; i++) {
		struct payload_mailbox mb;
		int64_t n;

		if (payload_get(l->vmm[i], 0, &mb))
			return cannot("a guest's mailbox", -EIO);
		/* a clone counts on from where its parent was */
		n = (int64_t)(mb.count - (i ? mb.ancestor[0].generation : 0));
		stamped += (uint64_t)n;
		own += n > 0 && mb.reseeded == (i > 0);
		errors += mb.errors;
		n = payload_check_stamps(l->vmm[i], 0);
		wrong += n < 0 ? 1 : n;
	}
	check(l, !errors && own == GUESTS,
	      "%lu guests knew who they were and stamped %lu pages: they found %lu errors",
	      (unsigned long)own, (unsigned long)stamped, (unsigned long)errors);
	check(l, !wrong, "and as read from outside: %ld pages wrong of %u", (long)wrong,
	      GUESTS * STAMP_PAGES);
	return 0;
}

static uint64_t adopted(struct live *l)
{
	uint64_t n = 0;

	for (unsigned i = 0; i < GUESTS; i++) {
		struct kage_kvm_info info = {.size = sizeof(info)};

		if (kage_kvm_info(vmm_ram_kage_kvm(l->vmm[i]->ram), &info))
			return 0;
		n += info.adopted;
	}
	return n;
}

/* The kernel has broken COW of at least `pages`; they come home. */
static int bring_home(struct live *l, uint64_t pages)
{
	uint64_t before = adopted(l);
	double find = 0, adopt = 0;
	struct kage_stats s;
	int r = reconcile(l, 0, &find);

	if (r == 0)
		r = reconcile(l, KAGE_KVM_ADOPT, &adopt);
	if (r)
		return r;
	settle(l);
	s = stats(l);
	before = adopted(l) - before;
	printf("   nominal   %8.1f MiB\n   resident  %8.1f MiB\n", DEMO_MIB(s.pages_nominal),
	       DEMO_MIB(s.frames_used));
	check(l, before >= pages && s.pages_host_private == 0,
	      "%lu pages that the kernel had copied (%.1f MiB) were found in %.1f ms of CPU and taken home "
	      "in %.1f, none is left",
	      (unsigned long)before, DEMO_MIB(before), find, adopt);
	return 0;
}

/* -- merge, break -------------------------------------------------------------------------- */

static int put_text(struct live *l)
{
	uint64_t *word = (uint64_t *)l->page_text;
	int r = 0;

	for (uint64_t i = 0; i < TEXT_PAGES * KAGE_PAGE_SIZE / 8; i++)
		word[i] = (i + 1) * UINT64_C(0x9e3779b97f4a7c15);
	for (unsigned i = 0; r == 0 && i < GUESTS; i++)
		r = vmm_write(l->vmm[i], l->text, l->page_text, TEXT_PAGES * KAGE_PAGE_SIZE);
	return r < 0 ? cannot("writing to the guests", r) : 0;
}

static int merge(struct live *l)
{
	struct kage_stats before, after;
	uint64_t merged = 1, pss;
	double ms;
	int err = 0;

	settle(l);
	before = stats(l);
	pss = host_pss();
	ms = cpu_ms();
	kage_engine_tune(l->engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE));
	for (unsigned pass = 0; !err && (pass < 3 || merged) && pass < 16; pass++) {
		struct kage_progress p = {.size = sizeof(p)};

		err = kage_engine_step(l->engine, NULL, &p);
		merged = p.pages_merged;
	}
	kage_engine_tune(l->engine, KAGE_CFG(kage_tune, .flags = 0));
	if (err)
		return cannot("merging", err);
	settle(l);
	ms = cpu_ms() - ms;
	after = stats(l);
	printf("   nominal   %8.1f MiB\n   resident  %8.1f MiB before, %.1f after, in %.0f ms of CPU; own "
	       "Pss %.1f, %.1f after\n",
	       DEMO_MIB(after.pages_nominal), DEMO_MIB(before.frames_used), DEMO_MIB(after.frames_used), ms,
	       (double)pss / (double)MIB, (double)host_pss() / (double)MIB);
	check(l, before.frames_used - after.frames_used >= (GUESTS - 1) * (uint64_t)TEXT_PAGES,
	      "%u guests with the same %lu MiB: %.1f MiB saved", GUESTS,
	      (unsigned long)(TEXT_PAGES * KAGE_PAGE_SIZE / MIB),
	      DEMO_MIB(before.frames_used - after.frames_used));
	return 0;
}

static struct payload_mailbox touch_of(const struct live *l, unsigned guest)
{
	return (struct payload_mailbox){.program = PAYLOAD_TOUCH,
					.base = l->text,
					.pages = BREAK_PAGES,
					.mode = PAYLOAD_WRITE,
					.seed = guest + 1};
}

/* Each guest's vCPU writes to the merged pages: KVM and the kernel alone. */
static int break_all(struct live *l)
{
	const struct vmm_entry entry = payload_entry(0);
	int r = 0;

	for (unsigned i = 0; r == 0 && i < GUESTS; i++) {
		struct payload_mailbox old, mb = touch_of(l, i);

		r = payload_get(l->vmm[i], 0, &old);
		if (r == 0)
			r = vmm_vcpu_enter(l->vmm[i]->vcpu[0], &entry);
		if (r == 0)
			r = payload_put(l->vmm[i], 0, &mb);
		if (r == 0)
			r = payload_round(l->vmm[i], 0, TIMEOUT_MS);
		if (r == 0) /* for payload_check_stamps() */
			r = payload_put(l->vmm[i], 0, &old);
	}
	if (r < 0)
		return cannot("the guests' writes", r);
	printf("   %u pages written by %u vCPUs\n", GUESTS * BREAK_PAGES, GUESTS);
	return bring_home(l, GUESTS * BREAK_PAGES);
}

static int verify(struct live *l)
{
	uint64_t bytes = TEXT_PAGES * KAGE_PAGE_SIZE, wrong = 0, stamps = 0;
	char *want = malloc(bytes), *got = malloc(bytes);
	int r = want && got ? 0 : -ENOMEM;

	for (unsigned i = 0; r == 0 && i < GUESTS; i++) {
		struct payload_mailbox mb = touch_of(l, i);

		memcpy(want, l->page_text, bytes);
		guest_touch(&mb, want - l->text);
		r = vmm_read(l->vmm[i], l->text, got, bytes);
		for (uint64_t at = 0; at < bytes; at += KAGE_PAGE_SIZE)
			wrong += memcmp(want + at, got + at, KAGE_PAGE_SIZE) != 0;
		stamps += payload_check_stamps(l->vmm[i], 0) != 0;
	}
	free(want);
	free(got);
	if (r)
		return cannot("reading the guests", r);
	check(l, !wrong && !stamps,
	      "every guest reads its own bytes: %lu pages wrong of %u, stamps of %lu guests wrong",
	      (unsigned long)wrong, GUESTS * TEXT_PAGES, (unsigned long)stamps);
	audit(l, "at the end");
	return 0;
}

/* -- the order of things -------------------------------------------------------------------- */

static int acts(struct live *l)
{
	int r;

	title("Run and clone: a guest of KVM on Kage's memory, cloned while it runs");
	r = boot(l);
	if (r == 0) {
		usleep(300000);
		r = clone_all(l);
	}
	if (r == 0)
		r = run_all(l);
	if (r == 0)
		r = bring_home(l, GUESTS);
	if (r)
		return r;
	title("Merge: all guests are given the same 2 MiB");
	r = put_text(l);
	if (r == 0)
		r = merge(l);
	if (r)
		return r;
	title("Break: each guest writes to 512 KiB of it");
	r = break_all(l);
	if (r)
		return r;
	title("Verify");
	return verify(l);
}

static void finish(struct live *l, int err)
{
	int busy;

	for (unsigned i = GUESTS; i-- > 0;)
		vmm_destroy(l->vmm[i]);
	settle(l);
	busy = kage_engine_destroy(l->engine);
	if (!err)
		check(l, !busy, "all guests destroyed");
	free(l->page_text);
}

int main(void)
{
	static struct live l;
	const char *missing = vmm_missing();
	int err;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (missing) {
		printf("\nKVM: left out: %s\n", missing);
		return 77;
	}
	l.page_text = malloc(TEXT_PAGES * KAGE_PAGE_SIZE);
	err = l.page_text ? kage_engine_create(
				KAGE_CFG(kage_engine_config, .backing = KAGE_BACKING_MEMFD, .log = complain),
				&l.engine)
			  : -ENOMEM;
	if (err) {
		cannot("an engine", err);
		free(l.page_text);
		return 2;
	}
	err = acts(&l);
	finish(&l, err);
	if (err)
		return 2;
	printf("\n%s\n", l.failed ? "FAILED" : "all checks passed");
	return l.failed ? 1 : 0;
}
