/* SPDX-License-Identifier: MIT */
/*
 * Two running guests of KVM with equal contents. Each reads all of its memory at
 * random and writes to a few pages of its own, before, during and after merging:
 * how fast it is is iterations for CPU time of its vCPU's thread, so that sharing
 * two cores with whoever merges costs it nothing here, and what merging does to
 * its mappings does. The peer: the same guests on plain anonymous memory that is
 * advised MERGEABLE, and ksmd.
 *
 *	warm up | as it is | merging | warm up | passes that find nothing | as it is | stop | read all, write all
 *
 * Flat out first, step after step; then, with other guests, in steps that the advisor paces
 * (KAGE_BUDGET_ADVISED), all of its settings at their defaults: `-advised`. There the pages are made known by one pass
 * that reads nothing, and merging is watched for some seconds or until all is merged; the rest of it is done flat out. The
 * passes that find nothing are watched for longer than one of them takes.
 *
 * Afterwards each equal page is written once: the kernel's break of a page that is
 * mapped MAP_PRIVATE from the pool, against that of a plain MAP_PRIVATE memfd.
 */
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "../kvm/kvm.h"
#include "merge.h"

#define GUESTS	   2
#define OWN_PAGES  256 /* written all the time */
#define PASSES_MAX 64
#define WAIT_MS	   600000
#define LATE_MS	   60000 /* in which advised steps must have done something */
#define WINDOW_NS  (form.smoke ? 20e6 : 400e6) /* CPU time of each guest in which its speed is measured */
#define CALM_NS	   (form.smoke ? 20e6 : form.quick ? 1000e6 : 2000e6) /* the same beside what takes seconds */
#define ADVISED_MS (form.smoke ? 50 : form.quick ? 2000 : 8000)	/* in which merging is watched */
/* of a pass; 0: the default, ten seconds. --quick: of guests a quarter as large, so as many pages a second */
#define SCAN_MSEC (form.smoke ? 20 : form.quick ? 2500 : 0)
#define PASS_MS	  (form.smoke ? 200 : form.quick ? 2500 : 21000) /* in which at least one begins and ends */

/* What guests have done, and the CPU time that took. */
struct gauge {
	uint64_t count;
	double cpu;
};

struct pair {
	struct subject *guest[GUESTS];
	struct gauge begun; /* when merging began */
	uint64_t merged;
	double stepping; /* ns of CPU of advised steps */
	struct guest_args args;
	uint64_t equal; /* pages after the first OWN_PAGES */
	bool ok;
};

struct figures {
	struct series cpu;	       /* ns a merged page */
	struct series before, merging; /* ns an iteration */
	struct series after, passes;   /* ns an iteration */
	struct series loss;	       /* us of the guests' CPU a merged page */
	/* advised: ns an iteration */
	struct series calm_before, calm_merging, calm_after, calm_passes;
	double calm_pages, calm_seconds, calm_cpu; /* merged in what time, all repetitions */
	struct series cow;	       /* ns a write */
	double saved;
};

static void check(struct pair *p, bool ok, const char *what)
{
	struct run r = {.ok = p->ok};

	run_check(&r, ok, what);
	p->ok = r.ok;
}

/* -- the guests ----------------------------------------------------------------------------- */

static void fill(struct pair *p)
{
	char page[PAGE];

	for (unsigned g = 0; g < GUESTS; g++)
		for (uint64_t i = 0; i < OWN_PAGES + p->equal; i++) {
			page_fill(page, i < OWN_PAGES ? ((uint64_t)(g + 1) << 32) + i : i);
			subject_write(p->guest[g], p->args.base + i * PAGE, page, PAGE);
		}
}

static void start(struct pair *p)
{
	p->args.program = GUEST_MIXED;
	p->args.iterations = UINT64_MAX;
	p->args.write_pages = OWN_PAGES;
	p->args.stop = 0;
	for (unsigned g = 0; g < GUESTS; g++) {
		p->args.seed = g;
		subject_start(p->guest[g], &p->args);
	}
}

static void stop(struct pair *p)
{
	const uint64_t one = 1;

	for (unsigned g = 0; g < GUESTS; g++) {
		struct guest_args args;

		subject_write(p->guest[g], GUEST_ARGS + offsetof(struct guest_args, stop), &one, sizeof(one));
		check(p, subject_wait(p->guest[g], &args, WAIT_MS) == 0, "a guest did not stop");
	}
}

/* One round of TOUCH over the equal pages of a guest. ns of CPU a page. */
static double touch(struct pair *p, unsigned g, uint64_t mode)
{
	struct guest_args args = {.program = GUEST_TOUCH,
				  .base = p->args.base + OWN_PAGES * PAGE,
				  .pages = p->equal,
				  .stride = 1,
				  .mode = mode,
				  .seed = 7};
	double ns = subject_round(p->guest[g], &args);

	check(p, ns >= 0 && args.count == p->equal, "a guest did not get through its memory");
	return ns / (double)p->equal;
}

/* What the guests hold: of guest 0 the first word of each equal page is what it wrote, if it did. */
static void check_contents(struct pair *p, bool written)
{
	uint64_t wrong = 0, want[PAGE / 8];
	char page[PAGE];

	for (unsigned g = 0; g < GUESTS; g++)
		for (uint64_t i = 0; i < p->equal; i++) {
			page_fill(want, OWN_PAGES + i);
			if (written && g == 0)
				want[0] = guest_word(guest_key(i, 0), 7);
			must(vmm_read(p->guest[g]->vmm, p->args.base + (OWN_PAGES + i) * PAGE, page, PAGE),
			     "read");
			wrong += memcmp(page, want, PAGE) != 0;
		}
	check(p, wrong == 0, "a guest's page holds something else");
}

/* -- how fast they are ------------------------------------------------------------------------- */

static double thread_ns(pthread_t thread)
{
	struct timespec t = {0};
	clockid_t id;

	must(-pthread_getcpuclockid(thread, &id), "clock of a thread");
	clock_gettime(id, &t);
	return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* Of both together. */
static struct gauge gauge(const struct pair *p)
{
	struct gauge now = {0};

	for (unsigned g = 0; g < GUESTS; g++) {
		now.count += subject_word(p->guest[g], GUEST_ARGS + offsetof(struct guest_args, count));
		now.cpu += thread_ns(p->guest[g]->vmm->vcpu[0]->thread);
	}
	return now;
}

static double speed(const struct gauge *from, const struct gauge *to)
{
	return to->count > from->count ? (to->cpu - from->cpu) / (double)(to->count - from->count) : -1;
}

/* Until every page has been read a few times over, and then some. */
static void warm_up(const struct pair *p)
{
	struct gauge begin = gauge(p), now = begin;

	while (now.count - begin.count < 8 * GUESTS * p->equal) {
		usleep(2000);
		now = gauge(p);
	}
}

/* ns an iteration while `work`, which may be NULL, is done again and again; `ns`: CPU time of each guest. */
static double watch_for(struct pair *p, void (*work)(struct pair *), double ns)
{
	struct gauge begin = gauge(p), now = begin;

	while (now.cpu - begin.cpu < GUESTS * ns) {
		if (work)
			work(p);
		else
			usleep(2000);
		now = gauge(p);
	}
	return speed(&begin, &now);
}

static double watch(struct pair *p, void (*work)(struct pair *))
{
	return watch_for(p, work, WINDOW_NS);
}

/* -- merging them --------------------------------------------------------------------------------- */

static double pass(struct pair *p, uint64_t *merged)
{
	struct kage_progress progress = {.size = sizeof(progress), .more = 1};
	double ns = cpu_ns();

	while (progress.more) {
		must(kage_engine_step(p->guest[0]->engine, NULL, &progress), "step");
		*merged += progress.pages_merged;
	}
	return cpu_ns() - ns;
}

static void one_pass(struct pair *p)
{
	uint64_t merged = 0;

	pass(p, &merged);
}

static void tune(struct pair *p, uint32_t flags)
{
	must(kage_engine_tune(p->guest[0]->engine, KAGE_CFG(kage_tune, .flags = flags)), "tune");
}

static void merge_ours(struct pair *p, struct figures *f)
{
	struct gauge begin = gauge(p), end;
	uint64_t merged = 0;
	double cpu = 0;

	tune(p, KAGE_TUNE_MERGE);
	for (unsigned i = 0; merged < p->equal && i < PASSES_MAX; i++)
		cpu += pass(p, &merged);
	cpu += subject_settle(p->guest[0]);
	end = gauge(p);
	check(p, merged >= p->equal, "Kage did not merge all equal pages");
	p->begun = begin;
	p->merged = merged;
	series_add(&f->cpu, cpu / (double)merged);
	series_add(&f->merging, speed(&begin, &end));
}

/* A step, when the advisor wants one. `wait`: microseconds until the next. */
static uint64_t advised_step(struct pair *p, uint64_t *merged, uint64_t *wait)
{
	struct kage_progress progress = {.size = sizeof(progress)};
	double ns = cpu_ns();

	must(kage_engine_step(p->guest[0]->engine, KAGE_CFG(kage_budget, .flags = KAGE_BUDGET_ADVISED), &progress), "step");
	p->stepping += cpu_ns() - ns;
	*merged += progress.pages_merged;
	*wait = progress.wait_usec;
	return progress.passes;
}

/*
 * ns an iteration while advised steps are made for so long, or until all is merged; longer if they have not
 * merged a page by then, or not ended a pass where nothing is left to be merged.
 */
static double advise(struct pair *p, double ms, uint64_t *merged, uint64_t *passes, double *seconds)
{
	struct gauge begin = gauge(p), end;
	double start = wall_ns(), left = ms * 1e6;
	uint64_t wait, before = *merged, first = advised_step(p, merged, &wait), now = first;
	bool some = *merged > before;

	while (*merged < p->equal && (left > 0 || (!some && left > -LATE_MS * 1e6))) {
		if (wait)
			usleep((useconds_t)(left > 0 && wait * 1e3 > left ? left / 1e3 + 1 : (double)wait));
		now = advised_step(p, merged, &wait);
		some = *merged > before || (before && now > first);
		left = ms * 1e6 - (wall_ns() - start);
	}
	end = gauge(p);
	*passes = now - first;
	*seconds = (wall_ns() - start) / 1e9;
	check(p, some || *merged >= p->equal, "advised steps did nothing");
	return speed(&begin, &end);
}

static void merge_theirs(struct pair *p, struct figures *f)
{
	struct ksm_counts first = ksm_counts(), now = first;
	struct gauge begin = gauge(p), end;
	double wall = wall_ns();

	for (unsigned g = 0; g < GUESTS; g++)
		must(madvise(vmm_ptr(p->guest[g]->vmm, 0, p->guest[g]->bytes), p->guest[g]->bytes,
			     MADV_MERGEABLE)
			 ? -errno
			 : 0,
		     "MADV_MERGEABLE");
	ksm_start();
	while (now.sharing < p->equal && wall_ns() - wall < WAIT_MS * 1e6) {
		usleep(500);
		now = ksm_counts();
	}
	end = gauge(p);
	check(p, now.sharing >= p->equal, "ksmd did not merge all equal pages");
	p->begun = begin;
	p->merged = now.sharing;
	series_add(&f->cpu, (now.cpu - first.cpu) / (double)now.sharing);
	series_add(&f->merging, speed(&begin, &end));
}

/* -- a repetition ------------------------------------------------------------------------------------ */

static struct pair pair_create(uint64_t bytes, bool ours)
{
	struct pair p = {.ok = true};

	for (unsigned g = 0; g < GUESTS; g++)
		p.guest[g] = !ours ? subject_plain(RAM_SMALL, bytes)
			     : g   ? subject_kage_beside(p.guest[0], bytes)
				   : subject_kage(bytes);
	p.args.base = p.guest[0]->base;
	p.args.pages = (bytes - p.args.base) / PAGE;
	p.equal = p.args.pages - OWN_PAGES;
	fill(&p);
	return p;
}

static void pair_destroy(struct pair *p)
{
	for (unsigned g = GUESTS; g-- > 0;)
		subject_destroy(p->guest[g]);
}

/* What the guests lost from the begin of merging until every page has been read again. */
static double loss(const struct pair *p, double undisturbed)
{
	struct gauge now = gauge(p);
	double done = (double)(now.count - p->begun.count);

	return (now.cpu - p->begun.cpu - done * undisturbed) / (double)p->merged / 1e3;
}

static bool turn(uint64_t bytes, bool ours, struct figures *f)
{
	struct pair p = pair_create(bytes, ours);

	start(&p);
	warm_up(&p);
	series_add(&f->before, watch(&p, NULL));
	if (ours)
		merge_ours(&p, f);
	else
		merge_theirs(&p, f);
	warm_up(&p);
	series_add(&f->loss, loss(&p, f->before.v[f->before.n - 1]));
	if (ours) {
		series_add(&f->passes, watch(&p, one_pass));
		tune(&p, 0);
	} else {
		series_add(&f->passes, watch(&p, NULL)); /* ksmd goes on */
		ksm_stop();
	}
	series_add(&f->after, watch(&p, NULL));
	stop(&p);
	check_contents(&p, false);
	touch(&p, 0, GUEST_READ);
	series_add(&f->cow, touch(&p, 0, GUEST_WRITE));
	check_contents(&p, true);
	check(&p, !ours || subject_sound(p.guest[0]), "the audit found something");
	pair_destroy(&p);
	return p.ok && (ours || ksm_clean());
}

/* The same in advised steps. */
static bool turn_advised(uint64_t bytes, struct figures *f)
{
	struct pair p = pair_create(bytes, true);
	uint64_t merged = 0, found = p.equal - 1, passes;
	double seconds, calm;

	start(&p);
	warm_up(&p);
	series_add(&f->calm_before, watch_for(&p, NULL, CALM_NS));
	must(kage_engine_tune(p.guest[0]->engine,
			      KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE, .scan_msec = (uint32_t)SCAN_MSEC)),
	     "tune");
	one_pass(&p);
	series_add(&f->calm_merging, advise(&p, ADVISED_MS, &merged, &passes, &seconds));
	f->calm_pages += (double)merged;
	f->calm_seconds += seconds;
	f->calm_cpu += p.stepping;
	for (unsigned i = 0; merged < p.equal && i < PASSES_MAX; i++)
		pass(&p, &merged);
	check(&p, merged >= p.equal, "Kage did not merge all equal pages");
	subject_settle(p.guest[0]);
	warm_up(&p);
	calm = watch_for(&p, NULL, CALM_NS); /* nobody steps */
	series_add(&f->calm_passes, advise(&p, PASS_MS, &found, &passes, &seconds));
	check(&p, passes >= 1 && found == p.equal - 1, "no pass, or one that found something");
	series_add(&f->calm_after, (calm + watch_for(&p, NULL, CALM_NS)) / 2);
	tune(&p, 0);
	stop(&p);
	check_contents(&p, false);
	check(&p, subject_sound(p.guest[0]), "the audit found something");
	pair_destroy(&p);
	return p.ok;
}

/* The guest's break of a plain MAP_PRIVATE page, beside the other guest: the kernel tells both VMs of each. */
static bool private_turn(uint64_t bytes, struct series *s)
{
	struct pair p = {.ok = true};

	for (unsigned g = 0; g < GUESTS; g++)
		p.guest[g] = subject_plain(RAM_PRIVATE, bytes);
	p.args.base = p.guest[0]->base;
	p.equal = (bytes - p.args.base) / PAGE - OWN_PAGES;
	for (unsigned g = 0; g < GUESTS; g++) {
		for (uint64_t i = 0; i < OWN_PAGES + p.equal; i++) {
			char page[PAGE];

			page_fill(page, i);
			subject_write(p.guest[g], p.args.base + i * PAGE, page, PAGE);
		}
		ram_settle(p.guest[g]->vmm->ram);
	}
	touch(&p, 0, GUEST_READ);
	series_add(s, touch(&p, 0, GUEST_WRITE));
	for (unsigned g = GUESTS; g-- > 0;)
		subject_destroy(p.guest[g]);
	return p.ok;
}

/* -- rows --------------------------------------------------------------------------------------------- */

static void speed_row(const char *name, bool ok, const struct series *s, const struct series *undisturbed,
		      const char *how, const struct series *theirs, const struct series *theirs_alone)
{
	struct row row = {.name = name,
			  .unit = "ns",
			  .peer = "the same guests undisturbed",
			  .goal = GOAL_RATIO,
			  .limit = 0.97,
			  .isvoid = !ok};

	row_note(&row, "an iteration of the guests, %s", how);
	if (theirs && theirs->n)
		row_note(&row, "an iteration of the guests, %s; with ksmd %.0f ns, %.2f of undisturbed", how,
			 series_median(theirs), series_median(theirs_alone) / series_median(theirs));
	finish_row(&row, s, undisturbed);
}

void bench_merge_kvm(const struct bench *b)
{
	static const char *const names[] = {"kvm",	     "kvm-guest-merging",	  "kvm-guest-passes",
					    "cow-break-kvm", "kvm-guest-loss",		  "kvm-guest-merging-advised",
					    "kvm-guest-passes-advised", NULL};
	char pace[40] = "the default pace", paced[96], calm[64];
	uint64_t bytes = form.smoke ? 16 * MIB : b->quick ? 64 * MIB : 256 * MIB;
	unsigned reps = form.smoke ? 1 : b->quick ? 1 : 5;
	struct row row = {.name = names[0], .unit = "ns", .peer = "ksmd", .goal = GOAL_RATIO, .limit = 1};
	struct row cow = {.name = names[3],
			  .unit = "ns",
			  .peer = "the guest's break of a plain MAP_PRIVATE page",
			  .goal = GOAL_RATIO,
			  .limit = 0.95};
	struct row lost = {.name = names[4], .unit = "us", .peer = "ksmd"};
	struct figures ours = {0}, peer = {0};
	struct series plain = {0};
	bool ok = true;

	if (skip_case(names) || skip_because(names, vmm_missing()))
		return;
	if (SCAN_MSEC)
		snprintf(pace, sizeof(pace), "the pace of a pass in %g s", SCAN_MSEC / 1e3);
	for (unsigned i = 0; i < reps; i++) {
		ok &= turn(bytes, true, &ours);
		ok &= private_turn(bytes, &plain);
		ok &= turn_advised(bytes, &ours);
		if (!form.alone)
			ok &= turn(bytes, false, &peer);
	}
	row.isvoid = cow.isvoid = lost.isvoid = !ok;
	row_note(&row,
		 "CPU of a saved frame while both guests, of %u MiB, run; of the stepping thread, releasing included",
		 (unsigned)(bytes / MIB));
	row_note(&cow, "a guest's first write to each merged page, after it has read it%s",
		 peer.cow.n ? "" : "; KSM's not measured");
	if (peer.cow.n)
		row_note(
		    &cow,
		    "a guest's first write to each merged page, after it has read it; of a KSM page %.0f ns",
		    series_median(&peer.cow));
	finish_row(&row, &ours.cpu, &peer.cpu);
	speed_row(names[1], ok, &ours.merging, &ours.before, "merged flat out", &peer.merging, &peer.before);
	speed_row(names[2], ok, &ours.passes, &ours.after, "one pass after the other", &peer.passes, &peer.after);
	snprintf(paced, sizeof(paced), "merged at %s: %.0f MiB in %.1f s, %.1f us of CPU a saved frame", pace,
		 ours.calm_pages * PAGE / MIB, ours.calm_seconds, ours.calm_cpu / ours.calm_pages / 1e3);
	speed_row(names[5], ok, &ours.calm_merging, &ours.calm_before, paced, NULL, NULL);
	snprintf(calm, sizeof(calm), "passes at %s", pace);
	speed_row(names[6], ok, &ours.calm_passes, &ours.calm_after, calm, NULL, NULL);
	finish_row(&cow, &ours.cow, &plain);
	row_note(&lost, "CPU of the guests' threads for each saved frame, from the begin of merging until "
			"all was read again, less what "
			"the same iterations took before");
	finish_row(&lost, &ours.loss, &peer.loss);
}
