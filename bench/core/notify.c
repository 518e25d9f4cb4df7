/* SPDX-License-Identifier: MIT */
/*
 * kage-bench-notify: what it costs to tell who must hear of a change.
 *
 *   kage-bench-notify [--quick] [--json FILE] [notify]
 *
 * The round of a change is notify_start() and notify_end(), which no public call does
 * alone: so this program is linked with the engine's inside. The peer of the
 * rounds is one sequence for all changes (sequence.h), counted under a lock at both
 * ends, which is all that KVM's does when no vCPU is told.
 *
 * Exit: 0; 1 if a row was void; 2 if the machine cannot run it or the options are wrong.
 */
#include <stdlib.h>
#include <string.h>

#include "api/vm.h"
#include "notify.h"
#include "sequence.h"

#define LISTENERS 16
#define READERS	  32
#define BASE	  1000 /* gfn of the first change */

struct listener {
	struct kage_notifier n;
	uint64_t starts, ends, bytes;
};

struct rounds {
	struct guest g;
	struct listener listener[LISTENERS];
	struct kage_reader reader[READERS];
	struct sequence sequence;
	unsigned listeners;
	uint64_t rounds;
};

static int on_start(struct kage_notifier *n, const struct kage_range *range)
{
	struct listener *l = (struct listener *)n;

	l->starts++;
	l->bytes += range->end - range->start;
	return 0;
}

static void on_end(struct kage_notifier *n, const struct kage_range *range)
{
	((struct listener *)n)->ends++;
}

static const struct kage_notifier_ops ops = {.invalidate_range_start = on_start,
					     .invalidate_range_end = on_end};

static void listeners_reset(struct rounds *r)
{
	for (unsigned i = 0; i < r->listeners; i++)
		r->listener[i].starts = r->listener[i].ends = r->listener[i].bytes = 0;
}

/* Each listener has heard of each round, of one page. */
static bool listeners_heard(const struct rounds *r)
{
	bool ok = true;

	for (unsigned i = 0; i < r->listeners; i++) {
		const struct listener *l = &r->listener[i];

		ok &= l->starts == r->rounds && l->ends == r->rounds && l->bytes == r->rounds * PAGE;
	}
	return ok;
}

static double sample_rounds(void *arg)
{
	struct rounds *r = arg;
	struct notify *n = &r->g.vm->mm.notify;
	uint64_t last = 0, moved = 0;
	double ns;

	listeners_reset(r);
	ns = cpu_ns();
	for (uint64_t i = 0; i < r->rounds; i++) {
		struct notify_change c = {.start = GFN(BASE + i % 512),
					  .end = GFN(BASE + i % 512 + 1),
					  .reason = KAGE_REASON_CLEAR,
					  .flags = KAGE_RANGE_BLOCKABLE};

		if (notify_start(n, &c))
			return -1;
		moved += c.id != last;
		last = c.id;
		notify_end(n, &c);
	}
	ns = cpu_ns() - ns;
	return moved == r->rounds && listeners_heard(r) ? ns / (double)r->rounds : -1;
}

/* The same callbacks, called in a row. */
static void tell_all(struct rounds *r, const struct kage_range *range, bool start)
{
	for (unsigned i = 0; i < r->listeners; i++) {
		struct kage_notifier *l = &r->listener[i].n;

		if (start)
			l->ops->invalidate_range_start(l, range);
		else
			l->ops->invalidate_range_end(l, range);
	}
}

static double sample_sequence(void *arg)
{
	struct rounds *r = arg;
	uint64_t before = r->sequence.number;
	double ns;

	listeners_reset(r);
	ns = cpu_ns();
	for (uint64_t i = 0; i < r->rounds; i++) {
		const struct kage_range range = {.start = (BASE + i % 512) * PAGE,
						 .end = (BASE + i % 512 + 1) * PAGE,
						 .reason = KAGE_REASON_CLEAR,
						 .id = i};

		sequence_begin(&r->sequence, BASE + i % 512, BASE + i % 512 + 1);
		tell_all(r, &range, true);
		tell_all(r, &range, false);
		sequence_end(&r->sequence);
	}
	ns = cpu_ns() - ns;
	return r->sequence.number - before == r->rounds && listeners_heard(r) ? ns / (double)r->rounds : -1;
}

static void round_row(const struct bench *b, struct rounds *r, const char *name, const char *peer,
		      double limit, const char *note)
{
	struct row row = {.suite = "notify",
			  .name = name,
			  .unit = "ns",
			  .peer = peer,
			  .goal = limit > 0 ? GOAL_MOST : GOAL_NONE,
			  .limit = limit};
	struct turns t = take_turns(b, sample_rounds, r, sample_sequence, r);

	row_note(&row, "start and end of a change of one page, %s", note);
	report_turns(&row, &t);
}

static void round_rows(const struct bench *b)
{
	struct rounds r = {.g = guest_create(GIB, 0, 0), .rounds = (uint64_t)1 << (18 - b->shift)};

	lock_init(&r.sequence.lock, RANK_NONE, 0);
	round_row(b, &r, "empty", "one sequence, under a lock", 30, "nobody listens, no reader is attached");
	for (unsigned i = 0; i < READERS; i++)
		must(kage_reader_init(r.g.vm, &r.reader[i]), "reader");
	round_row(b, &r, "readers-32", "one sequence, under a lock", 0,
		  "32 readers are attached, none is in a section");
	for (unsigned i = 0; i < READERS; i++)
		kage_reader_finish(&r.reader[i]);
	for (unsigned i = 0; i < LISTENERS; i++) {
		must(kage_notifier_register(r.g.vm, &r.listener[i].n, &ops), "listener");
		r.listeners++;
		if (i == 0)
			round_row(b, &r, "listeners-1", "one sequence, and the callback", 0,
				  "one listener that counts");
	}
	round_row(b, &r, "listeners-16", "one sequence, and the callbacks", 0, "16 listeners that count");
	for (unsigned i = 0; i < LISTENERS; i++)
		must(kage_notifier_unregister(&r.listener[i].n), "listener");
	guest_destroy(&r.g);
}

static void bench_notify(const struct bench *b)
{
	round_rows(b);
	storm_rows(b);
	shootdown_rows(b);
}

int main(int argc, char **argv)
{
	static const struct suite suites[] = {{"notify", bench_notify}};

	if (argc > 1 && !strcmp(argv[1], "--storm"))
		return storm_main(argc, argv);
	return suites_run(argc, argv, suites, LENGTH(suites));
}
