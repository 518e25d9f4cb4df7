/* SPDX-License-Identifier: MIT */
/*
 * A step by the advisor. See pace.h.
 */
#include "merge/pace.h"

#define QUIET ((uint64_t)100 * 1000000) /* ns that new memory has to be quiet for, if nothing else is urgent */

void pace_init(struct pace *p)
{
	memset(p, 0, sizeof(*p));
	lock_init(&p->lock, RANK_NONE, 0);
	advisor_init(&p->advisor);
}

void pace_tune(struct pace *p, uint32_t share, uint64_t scan_ns, uint32_t min_pages, uint32_t max_pages, uint32_t moved_pages)
{
	lock_take(&p->lock);
	advisor_tune(&p->advisor, share, scan_ns, min_pages, max_pages);
	advisor_tune_moved(&p->advisor, moved_pages);
	lock_drop(&p->lock);
}

/* What merging knows of the pass. */
struct state {
	bool between;     /* a pass would begin */
	uint64_t passes;
	uint64_t waiting; /* pages that the last pass left for this one: no more are looked at */
	uint64_t urgent;  /* of hints */
	bool ready;       /* some of them are not only waiting to be quiet */
};

static struct state merge_state(struct merge *m)
{
	struct state s;

	lock_take(&m->lock);
	s = (struct state){ .between = m->mm_id == 0, .passes = atomic_load(&m->passes), .waiting = m->waiting };
	lock_drop(&m->lock);
	s.urgent = merge_urgent(m, &s.ready);
	return s;
}

/* With the lock held. */
static struct advisor_work work_left(struct pace *p, const struct state *now)
{
	if (now->passes != p->pass) {
		p->pass = now->passes;
		p->spent = 0;
	}
	return (struct advisor_work){
		.begins = now->between,
		.left = now->waiting > p->spent ? now->waiting - p->spent : 0,
		.urgent = now->urgent,
	};
}

static uint64_t pace_budget(struct pace *p, struct merge *m, uint64_t *moved)
{
	struct state state = merge_state(m);
	uint64_t now = env_now(m->host->env, KAGE_CLOCK_WALL), pages = 0;
	struct advisor_work w;

	lock_take(&p->lock);
	w = work_left(p, &state);
	if (READ_ONCE(m->on))
		pages = advisor_pages(&p->advisor, now, &w);
	*moved = advisor_moves(&p->advisor);
	lock_drop(&p->lock);
	return pages;
}

/* Returns how long to wait. */
static uint64_t pace_paid(struct pace *p, struct merge *m, uint64_t cpu, uint64_t spent)
{
	uint64_t moved = atomic_load(&m->moved);
	struct state state = merge_state(m);
	uint64_t now = env_now(m->host->env, KAGE_CLOCK_WALL), wait;
	struct advisor_work w;

	lock_take(&p->lock);
	p->spent += spent;
	advisor_paid(&p->advisor, cpu, spent);
	advisor_moved(&p->advisor, moved - p->moved);
	p->moved = moved;
	w = work_left(p, &state);
	wait = READ_ONCE(m->on) ? advisor_wait(&p->advisor, now, &w) : p->advisor.scan;
	lock_drop(&p->lock);
	return state.urgent && !state.ready ? MAX(wait, QUIET) : wait;
}

int pace_step(struct pace *p, struct merge *m, uint64_t pages, uint64_t usec, uint64_t *scanned, uint64_t *merged,
	      bool *more, struct paced *out)
{
	uint64_t cpu, moved, spent = 0;
	int r = 0;

	*more = false;
	out->budget = pace_budget(p, m, &moved);
	if (pages && out->budget > pages)
		out->budget = pages;
	cpu = env_now(m->host->env, KAGE_CLOCK_THREAD);
	if (out->budget)
		r = merge_step(m, out->budget, usec, moved, &spent, merged, more);
	cpu = env_now(m->host->env, KAGE_CLOCK_THREAD) - cpu;
	out->wait = pace_paid(p, m, out->budget ? cpu : 0, spent);
	*scanned += spent;
	return r;
}
