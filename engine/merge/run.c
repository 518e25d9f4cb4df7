/* SPDX-License-Identifier: MIT */
/*
 * Whom the pages of a group equal, and runs of them: what one change merges.
 *
 *   looked at ──► zeroes ──────────────────────────► the zero frame
 *             ├─► hint ────────────────────────────► what is beside the neighbour's partner
 *             └─► hashed ──► a stable frame with this hash
 *                        ├─► a candidate with this hash
 *                        └─► neither: a candidate from now on
 *
 * What has found a partner joins the run. The run is merged when the group is at its end, when
 * it is as long as guests are to wait for, or when the next page does not go with it:
 *  - another candidate's 2 MiB than the run's (one more table, one more lock);
 *  - a candidate that some page of the run makes stable: only then the others can join it;
 *  - a gap: what lies in it would be blocked for nothing.
 *
 * A page whose partner turned out to differ is looked at once more, by its hash
 * alone. A candidate that a comparison has disproved goes. So each round takes a hint or an entry away,
 * and the group comes to its end.
 *
 * Locks taken: candidates.lock, host->stable; the family of the run's candidates, for reading. Writers of
 * a family's lock hold only that one, and host->lock keeps audits out: waiting for a second
 * family while holding a first one cannot close a circle.
 */
#include "merge/hardened.h"
#include "merge/run.h"
#include "mm/layer.h"
#include "mm/mirror.h"
#include "mm/region.h"
#include "mm/rmap.h"
#include "mm/stable.h"

#define GAP_MOST 32

/* -- chains ---------------------------------------------------------------------------------- */

static int found_one(const struct rmap_entry *e, void *arg)
{
	return 1;
}

/* A pair of a chain is worth keeping if an entry is still found through it. When in doubt: yes. */
bool pair_keeps(struct host *h, uint64_t where, pfn_t pfn)
{
	struct layer *l = layer_find(h, where_owner(where));
	struct brlock_held held;
	bool keep;

	if (!l)
		return false;
	if (!brlock_read_try(&l->family->lock, &held))
		return true;
	keep = rmap_walk_where(h, where, pfn, found_one, NULL) != 0;
	brlock_read_drop(&l->family->lock, held);
	return keep;
}

/* -- the run ------------------------------------------------------------------------------------- */

static void run_clear(struct scanner *s)
{
	struct run *r = &s->run;

	for (unsigned i = r->first; i < r->end; i++)
		r->page[i].to = RUN_NONE;
	r->count = r->end = 0;
	r->first = BLOCK_PAGES;
	r->fresh = false;
	memset(r->used, 0, sizeof(r->used));
}

static void page_later(struct scanner *s, unsigned at)
{
	bit_set(s->later, at);
}

/* Once more, by its hash. */
static void page_once_more(struct scanner *s, unsigned at)
{
	bit_set(s->todo, at);
	bit_set(s->hashed, at);
	s->hint = PFN_NONE;
}

static void page_merged(struct scanner *s, const struct run_page *p)
{
	s->merged++;
	if (p->to == RUN_FRESH)
		candidates_drop(&s->m->candidates, p->hash, p->into);
}

static bool still_candidate(struct scanner *s, pfn_t pfn)
{
	bool alive;

	rcu_enter();
	alive = candidate_alive(s->m->host->pool, pfn);
	rcu_leave();
	return alive;
}

static void page_result(struct scanner *s, unsigned at)
{
	struct run_page *p = &s->run.page[at];

	if (p->result == RUN_MERGED) {
		page_merged(s, p);
		return;
	}
	if (p->to == RUN_STABLE)
		stable_put(s->m->host, p->stable);
	if (p->result == RUN_REFUSED) {
		bit_set(s->refused, at);
		page_later(s, at);
	} else if (!p->hashed && p->to != RUN_ZERO)
		page_once_more(s, at);
	else if (p->to == RUN_FRESH && p->result == RUN_DIFFERS) {
		candidates_drop(&s->m->candidates, p->hash, p->into); /* written since it was hashed */
		page_once_more(s, at);
	} else if (p->to == RUN_FRESH && !still_candidate(s, p->into))
		page_once_more(s, at);
	else
		page_later(s, at);
}

/*
 * The family of the run's candidates, read-locked unless it is the guest's own. False: there is none any more, or
 * it is of another domain: since they were looked up, their frames may have changed hands (G1). Or somebody writes to it:
 * that is not waited for. It may wait for the guest's own family in the end, by way of who writes to that and of another
 * scanner; and a clone takes long.
 */
static bool family_hold(struct scanner *s, struct brlock_held *held, bool *locked)
{
	struct run *r = &s->run;
	struct layer *l = layer_find(s->m->host, where_owner(r->into << LEVEL_BITS));

	*locked = false;
	if (!l || l->family->domain != s->mm->domain)
		return false;
	r->into_family = l->family;
	if (l->family == s->mm->family)
		return true;
	*locked = brlock_read_try(&l->family->lock, held);
	return *locked;
}

/* The candidates cannot be had now. */
static void run_drop_fresh(struct scanner *s)
{
	struct run *r = &s->run;

	for (unsigned i = r->first; i < r->end; i++)
		if (r->page[i].to == RUN_FRESH) {
			page_result(s, i);
			r->page[i].to = RUN_NONE;
			r->count--;
		}
	r->fresh = false;
}

static void run_prune(struct scanner *s)
{
	struct run *r = &s->run;

	for (unsigned i = r->first; i < r->end; i++)
		if (r->page[i].to == RUN_STABLE && stable_is_stale(s->m->host, r->page[i].stable))
			stable_prune(s->m->host, r->page[i].stable, pair_keeps);
}

static int run_flush(struct scanner *s)
{
	struct run *r = &s->run;
	struct brlock_held held;
	bool locked = false;
	int err = 0;

	if (r->count == 0)
		return 0;
	run_prune(s);
	for (unsigned i = r->first; i < r->end; i++)
		r->page[i].result = RUN_RACED;
	if (r->fresh && !family_hold(s, &held, &locked))
		run_drop_fresh(s);
	if (r->count)
		err = merge_run(s->m, r);
	if (locked)
		brlock_read_drop(&r->into_family->lock, held);
	for (unsigned i = r->first; i < r->end; i++)
		if (r->page[i].to != RUN_NONE)
			page_result(s, i);
	run_clear(s);
	return err;
}

/* -- who goes with whom ----------------------------------------------------------------------------- */

static void run_add(struct scanner *s, const struct look *l, enum run_to to)
{
	struct run *r = &s->run;

	r->page[l->at] = (struct run_page){
		.from = l->pfn, .into = to == RUN_ZERO ? s->zero : l->into, .stable = l->stable, .hash = l->hash,
		.hashed = l->what != LOOK_HINT, .to = to,
	};
	r->count++;
	r->first = MIN(r->first, l->at);
	r->end = MAX(r->end, l->at + 1);
	if (to == RUN_ZERO)
		return;
	s->hint = l->into;
	s->hint_gfn = gfn_add(s->base, l->at);
}

/* False: the run has to be merged first. Inside a read section. What is no candidate any more is not found again. */
static bool run_add_fresh(struct scanner *s, const struct look *l)
{
	struct run *r = &s->run;
	uint64_t where;
	unsigned at;

	if (!candidate_where(s->m->host, l->into, &where)) {
		page_once_more(s, l->at);
		return true;
	}
	at = where & (BLOCK_PAGES - 1);
	if (r->fresh && (r->into != where >> LEVEL_BITS || bit_test(r->used, at)))
		return false;
	r->fresh = true;
	r->into = where >> LEVEL_BITS;
	bit_set(r->used, at);
	run_add(s, l, RUN_FRESH);
	r->page[l->at].at = (uint16_t)at;
	return true;
}

/* A hashed page. candidates.lock is held, inside a read section. False: as above. */
static bool resolve_hashed(struct scanner *s, struct look *l)
{
	struct merge *m = s->m;

	l->stable = stable_get(m->host, s->mm->domain, l->hash, m->max_sharing);
	if (l->stable) {
		l->into = l->stable->pfn;
		run_add(s, l, RUN_STABLE);
		return true;
	}
	l->into = candidates_find(&m->candidates, m->host->pool, l->hash, l->pfn);
	if (!pfn_is_none(l->into))
		return run_add_fresh(s, l);
	candidates_add(&m->candidates, m->host->pool, l->hash, l->pfn);
	return true;
}

/* Who asked for the hint's frame has a reference of a stable one. A candidate may have died since. */
static bool resolve_hint(struct scanner *s, struct look *l)
{
	if (l->stable) {
		run_add(s, l, RUN_STABLE);
		return true;
	}
	return run_add_fresh(s, l);
}

static bool resolve_one(struct scanner *s, struct look *l)
{
	switch (l->what) {
	case LOOK_ZERO:
		run_add(s, l, RUN_ZERO);
		return true;
	case LOOK_HINT:
		return resolve_hint(s, l);
	case LOOK_HASHED:
		return resolve_hashed(s, l);
	case LOOK_LATER:
		if (l->stable)
			stable_put(s->m->host, l->stable);
		l->stable = NULL;
		page_later(s, l->at);
		return true;
	default:
		return true;
	}
}

static bool run_is_over(const struct scanner *s, const struct look *l)
{
	const struct run *r = &s->run;

	return r->count && (r->count >= s->live || l->at > r->end + GAP_MOST || l->at + GAP_MOST < r->first);
}

/* Resolves pages until the run has to be merged. Returns how many; -ENOMEM. */
static int resolve_some(struct scanner *s, struct look *l, unsigned n)
{
	struct candidates *t = &s->m->candidates;
	unsigned done = 0;
	int r;

	lock_take(&t->lock);
	r = candidates_reserve(t, n);
	if (r == 0) {
		rcu_enter();
		look_again(s, l, n);
		while (done < n && !run_is_over(s, &l[done]) && resolve_one(s, &l[done]))
			done++;
		rcu_leave();
	}
	lock_drop(&t->lock);
	return r ? r : (int)done;
}

/* A page that the host kernel has made private comes home; it is looked at once it has been quiet there. */
static int page_adopt(struct scanner *s, unsigned at)
{
	gfn_t gfn = gfn_add(s->base, at);
	struct brlock_held held = brlock_read(&s->mm->range);
	int r = s->mm->mirror && mm_region(s->mm, gfn) ? mm_adopt_page(s->mm, gfn, NULL, NULL) : 0;

	brlock_read_drop(&s->mm->range, held);
	page_later(s, at);
	return r == -ENOMEM ? r : 0;
}

/* What has been looked at and not resolved: as if it had not been. */
static void look_forget(struct scanner *s, struct look *l, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		if (l[i].stable)
			stable_put(s->m->host, l[i].stable);
		bit_set(s->todo, l[i].at);
	}
}

static bool todo_left(const struct scanner *s)
{
	uint64_t left = 0;

	for (unsigned w = 0; w < GROUP_WORDS; w++)
		left |= s->todo[w];
	return left != 0;
}

int scan_group(struct scanner *s)
{
	struct look l[LOOKS];
	unsigned n, done;
	int r = 0;

	if (s->mm->family->tenant->reserve) {
		hardened_group(s);
		return 0;
	}
	s->run.base = s->base;
	run_clear(s);
	while (r == 0 && (n = look_some(s, l)) > 0) {
		for (unsigned i = 0; i < n; i++)
			if (l[i].what == LOOK_ADOPT && r == 0)
				r = page_adopt(s, l[i].at);
		for (done = 0; r == 0 && done < n;) {
			r = resolve_some(s, &l[done], n - done);
			if (r < 0)
				break;
			done += (unsigned)r;
			r = done < n ? run_flush(s) : 0;
		}
		if (r < 0)
			look_forget(s, &l[done], n - done);
		else
			r = 0;
		if (r == 0 && !todo_left(s)) /* but for what has to be looked at once more */
			r = run_flush(s);
	}
	if (r)
		run_flush(s);
	return r;
}
