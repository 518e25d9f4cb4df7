/* SPDX-License-Identifier: MIT */
/*
 * A memory-bound guest: random reads over 128 MiB, every 8th with a write. First
 * in a window that nothing has happened to; then after every other page was
 * merged with another one, and every other 2 MiB broken back by the guest: of each
 * 4 MiB, a quarter is merged, page by page, and a quarter has come home. Merged
 * pages are only read from then on.
 *
 * Peers run the same rounds with the same seeds on the same contents, so their
 * checksums have to be the same, round by round.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "kvm.h"

#define MERGED	  0x201 /* no bit of a page's number set: it is merged */
#define MERGED_2M 0x200 /* the same of its 2 MiB */
#define MAPPINGS  10000
#define PERIOD_MS 1000

enum { OURS, PLAIN, HUGE, SUBJECTS };

struct steady {
	struct subject *s[SUBJECTS];
	uint64_t pages, iterations, keep, rounds;
	struct series ns[SUBJECTS];
	bool ok;
	unsigned reconciles;
	double reconcile_ns;
};

/* Pages 0, 2, 4 ... are pairs of equal ones. */
static uint64_t first_key(uint64_t page)
{
	return page % 2 ? (uint64_t)1 << 40 | page : page / 4;
}

static void prepare(struct steady *st)
{
	for (unsigned i = 0; i < SUBJECTS; i++)
		for (uint64_t page = 0; page < st->pages; page++)
			subject_fill(st->s[i], page, first_key(page));
}

/* One round of one subject; ours is reconciled now and each second. */
static double run(struct steady *st, unsigned i, struct guest_args *args)
{
	struct subject *s = st->s[i];
	int r;

	subject_start(s, args);
	do {
		if (s->engine) {
			st->reconcile_ns += subject_reconcile(s, KAGE_KVM_ADOPT);
			st->reconciles++;
		}
		r = subject_wait(s, args, PERIOD_MS);
	} while (r == -ETIMEDOUT);
	return r ? -1 : (s->end - s->begin) / (double)args->iterations;
}

static void turn(struct steady *st, bool counts)
{
	uint64_t sum[SUBJECTS];

	for (unsigned n = 0; n < SUBJECTS; n++) {
		unsigned i = (n + (unsigned)st->rounds) % SUBJECTS;
		struct guest_args args = {.program = GUEST_MIXED,
					  .base = st->s[i]->base,
					  .pages = st->pages,
					  .iterations = st->iterations,
					  .seed = st->rounds,
					  .keep = st->keep,
					  .write_pages = st->pages};
		double ns = run(st, i, &args);

		st->ok &= ns > 0 && args.count == st->iterations;
		sum[i] = args.checksum;
		if (counts)
			series_add(&st->ns[i], ns);
	}
	st->ok &= sum[OURS] == sum[PLAIN] && sum[OURS] == sum[HUGE];
	st->rounds++;
}

static void measure(const struct bench *b, struct steady *st)
{
	memset(st->ns, 0, sizeof(st->ns));
	st->reconciles = 0;
	st->reconcile_ns = 0;
	for (unsigned i = 0; i <= 2 * b->reps; i++) /* the goal is within a hundredth */
		turn(st, i > 0);
}

/* The median of the turns' own ratios: what changes slowly, such as the machine's clock, is the same in both.
 */
static double paired(const struct steady *st, unsigned peer)
{
	struct series ratio = {0};

	for (unsigned i = 0; i < st->ns[OURS].n; i++)
		series_add(&ratio, st->ns[OURS].v[i] / st->ns[peer].v[i]);
	return series_median(&ratio);
}

static void rows(const struct steady *st, const char *name, double times, const char *state)
{
	struct row row = {.suite = "kvm",
			  .name = name,
			  .unit = "ns",
			  .value = series_median(&st->ns[OURS]),
			  .spread = series_spread(&st->ns[OURS]),
			  .isvoid = !st->ok,
			  .peer = "plain MAP_SHARED memfd, 4 KiB pages",
			  .peer_value = series_median(&st->ns[PLAIN]),
			  .goal = GOAL_TIMES,
			  .limit = 1 / times};
	char huge[40];

	row_note(&row,
		 "CPU of the vCPU's thread for one access; %.3fx turn by turn; %s; %u reconciles, %.2f ms "
		 "each on another thread",
		 paired(st, PLAIN), state, st->reconciles, st->reconcile_ns / st->reconciles / 1e6);
	report_row(&row);
	snprintf(huge, sizeof(huge), "%s-huge", name);
	row.name = huge;
	row.peer = "anonymous transparent huge pages";
	row.peer_value = series_median(&st->ns[HUGE]);
	row.goal = GOAL_NONE;
	row_note(&row, "the same figure against the huge-page peer; %.3fx turn by turn", paired(st, HUGE));
	report_row(&row);
}

/* Merges pages 0, 2, 4 ..., then the guest of each subject writes to half of them. */
static void churn(const struct bench *b, struct steady *st)
{
	struct kage_kvm_info info;
	struct kage_stats stats;

	subject_settle(st->s[OURS]);
	prepare(st);
	subject_merge(st->s[OURS]);
	stats = subject_stats(st->s[OURS]);
	st->ok &= stats.pages_shared_merge == st->pages / 2;
	for (unsigned i = 0; i < SUBJECTS; i++) {
		struct guest_args args = {.program = GUEST_TOUCH,
					  .base = st->s[i]->base,
					  .pages = st->pages,
					  .stride = 2,
					  .keep = MERGED_2M,
					  .mode = GUEST_WRITE,
					  .seed = 1};

		st->ok &= subject_round(st->s[i], &args) > 0 && args.count == st->pages / 4;
	}
	subject_reconcile(st->s[OURS], KAGE_KVM_ADOPT);
	stats = subject_stats(st->s[OURS]);
	info = subject_info(st->s[OURS]);
	st->ok &= stats.pages_shared_merge == st->pages / 4 && stats.pages_host_private == 0;
	st->ok &= info.mappings >= (b->quick ? st->pages / 4 : MAPPINGS);
	st->keep = MERGED;
}

void bench_steady(const struct bench *b)
{
	uint64_t set = (128 * MIB) >> b->shift, bytes = set + 16 * MIB;
	struct steady st = {
	    .pages = set / PAGE, .iterations = ((uint64_t)1 << 24) >> 2 * b->shift, .ok = true};
	char state[80];

	st.s[OURS] = subject_kage(bytes);
	st.s[PLAIN] = subject_plain(RAM_SHARED, bytes);
	st.s[HUGE] = subject_plain(RAM_HUGE, bytes);
	prepare(&st);
	measure(b, &st);
	snprintf(state, sizeof(state), "%lu mappings", (unsigned long)subject_info(st.s[OURS]).mappings);
	rows(&st, "steady-fresh", 0.99, state);
	churn(b, &st);
	measure(b, &st);
	snprintf(state, sizeof(state), "1/4 merged, 1/4 broken back, %lu mappings",
		 (unsigned long)subject_info(st.s[OURS]).mappings);
	st.ok &= subject_stats(st.s[OURS]).pages_shared_merge == st.pages / 4 && subject_sound(st.s[OURS]);
	rows(&st, "steady", 0.95, state);
	for (unsigned i = 0; i < SUBJECTS; i++)
		subject_destroy(st.s[i]);
}
