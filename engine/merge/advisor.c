/* SPDX-License-Identifier: MIT */
/*
 * Pace of merging from a CPU share and the time of a pass. See advisor.h.
 */
#include "merge/advisor.h"

#define SECOND ((uint64_t)1000000000)
#define COST_ONE 256 /* fraction of a nanosecond in `cost` */
#define COST_WEIGHT 8 /* a step counts for 1/8 */
#define COST_FIRST ((uint64_t)1000 * COST_ONE) /* until something has been measured */
#define WAIT_MAX SECOND
#define MOVES_AT_ONCE 4 /* a second's part of them that may come at once */
#define MOVES_OWED 60	/* seconds' worth */

static int64_t moves_most(const struct advisor *a)
{
	return (int64_t)MAX(a->moves / MOVES_AT_ONCE, (uint64_t)1);
}

void advisor_init(struct advisor *a)
{
	memset(a, 0, sizeof(*a));
	advisor_tune(a, 0, 0, 0, 0);
	advisor_tune_moved(a, 0);
	a->ready = moves_most(a);
}

void advisor_tune(struct advisor *a, uint32_t share, uint64_t scan, uint64_t min_pages, uint64_t max_pages)
{
	a->share = share ? share : ADVISOR_SHARE;
	a->scan = scan ? scan : ADVISOR_SCAN;
	a->min_pages = min_pages ? min_pages : ADVISOR_MIN_PAGES;
	a->max_pages = max_pages ? max_pages : MAX(ADVISOR_MAX_PAGES, a->min_pages);
}

void advisor_tune_moved(struct advisor *a, uint64_t moves)
{
	a->moves = moves ? moves : ADVISOR_MOVES;
}

uint64_t advisor_moves(const struct advisor *a)
{
	return MAX(a->ready, (int64_t)a->min_pages);
}

/* A4 */
void advisor_moved(struct advisor *a, uint64_t pages)
{
	int64_t most = (int64_t)(MOVES_OWED * a->moves);

	a->ready = MAX(a->ready - (int64_t)MIN(pages, (uint64_t)most), -most);
}

static void earn_moves(struct advisor *a, uint64_t gap)
{
	unsigned __int128 earned = (unsigned __int128)MIN(gap, 2 * MOVES_OWED * SECOND) * a->moves + a->rest;

	a->rest = (uint64_t)(earned % SECOND);
	a->ready = MIN(a->ready + (int64_t)(earned / SECOND), moves_most(a));
}

/* The share of a span; spans are at most some seconds. */
static int64_t earned(const struct advisor *a, uint64_t span)
{
	return (int64_t)(span * a->share / 100);
}

static uint64_t page_cost(const struct advisor *a)
{
	return a->cost ? a->cost : COST_FIRST;
}

static uint64_t pass_end(const struct advisor *a)
{
	return a->pass + a->scan;
}

static bool nothing_due(const struct advisor *a, uint64_t now, const struct advisor_work *w)
{
	return w->begins && !w->urgent && a->begun && now < pass_end(a);
}

/* `gap`: since the last step, as far as it lies in this pass. */
static uint64_t pages_by_time(const struct advisor *a, uint64_t now, uint64_t gap, const struct advisor_work *w)
{
	uint64_t left = pass_end(a) > now ? pass_end(a) - now : 0;

	if (w->urgent || left <= gap)
		return UINT64_MAX;
	return (uint64_t)((unsigned __int128)w->left * gap / left);
}

uint64_t advisor_pages(struct advisor *a, uint64_t now, const struct advisor_work *w)
{
	uint64_t gap = a->begun ? now - a->last : SECOND;
	uint64_t pages;

	a->credit = MIN(a->credit + earned(a, MIN(gap, SECOND)), earned(a, SECOND));
	earn_moves(a, gap);
	a->last = now;
	if (nothing_due(a, now, w))
		return 0;
	if (!a->begun || (w->begins && now >= pass_end(a)))
		a->pass = now;
	a->begun = true;
	pages = a->credit > 0 ? (uint64_t)a->credit * COST_ONE / page_cost(a) : 0;
	pages = MIN(pages, pages_by_time(a, now, MIN(gap, now - a->pass), w));
	return MAX(a->min_pages, MIN(pages, a->max_pages));
}

void advisor_paid(struct advisor *a, uint64_t cpu, uint64_t pages)
{
	int64_t lowest = -10 * earned(a, SECOND);

	a->credit = cpu > (uint64_t)(a->credit - lowest) ? lowest : a->credit - (int64_t)cpu;
	if (pages) {
		uint64_t cost = MAX(MIN(cpu, 3600 * SECOND) * COST_ONE / pages, 1u);

		a->cost = a->cost ? MAX((a->cost * (COST_WEIGHT - 1) + cost) / COST_WEIGHT, 1u) : cost;
	}
}

/* Until the least number of pages is due by the pass's time. */
static uint64_t wait_by_time(const struct advisor *a, uint64_t now, const struct advisor_work *w)
{
	uint64_t left = pass_end(a) > now ? pass_end(a) - now : 0;

	if (w->urgent || w->left <= a->min_pages)
		return 0;
	return (uint64_t)((unsigned __int128)left * a->min_pages / w->left);
}

/* Until there is credit for them. */
static uint64_t wait_by_share(const struct advisor *a)
{
	int64_t need = (int64_t)(a->min_pages * page_cost(a) / COST_ONE);

	return need > a->credit ? (uint64_t)(need - a->credit) * 100 / a->share : 0;
}

/* Until a good part of what may come at once may. */
static uint64_t wait_by_moves(const struct advisor *a)
{
	int64_t need = MAX(moves_most(a) / 4, (int64_t)1);

	return a->ready < need ? (uint64_t)((unsigned __int128)(need - a->ready) * SECOND / a->moves) : 0;
}

uint64_t advisor_wait(const struct advisor *a, uint64_t now, const struct advisor_work *w)
{
	if (!a->begun)
		return 0;
	if (nothing_due(a, now, w))
		return pass_end(a) - now;
	return MIN(MAX(MAX(wait_by_time(a, now, w), wait_by_share(a)), wait_by_moves(a)), WAIT_MAX);
}
