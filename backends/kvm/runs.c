/* SPDX-License-Identifier: MIT */
/*
 * Runs of the mirror. See runs.h.
 *
 * A change is: cut the runs at both ends of the range, remove what lies between,
 * insert one, join it with its neighbours. Each of at most two cuts and the insertion may
 * split a full leaf; the pages for that have been reserved.
 */
#include "runs.h"

#define SPARE_KEPT 32 /* leaves that come and go with changes */

/* Neighbouring single pages: each call adds at most two runs, and a split leaf has room for half a leaf. */
static unsigned splits_for(uint64_t n)
{
	return (unsigned)(MIN(n, (uint64_t)1 << 20) * 2 / (RUNS_LEAF / 2)) + 4;
}

void runs_init(struct runs *r, struct pool *pool)
{
	*r = (struct runs){.pool = pool};
}

static void run_hold(struct runs *r, const struct run *run)
{
	struct extent *e = run->kind == RUN_ZERO ? NULL : pool_extent(r->pool, run->pfn);

	if (e)
		extent_get(e, 1);
}

static void run_drop(struct runs *r, const struct run *run)
{
	struct extent *e = run->kind == RUN_ZERO ? NULL : pool_extent(r->pool, run->pfn);

	if (e)
		extent_put(e, 1);
}

void runs_finish(struct runs *r)
{
	struct env *env = r->pool ? r->pool->env : NULL;

	for (unsigned i = 0; i < r->leaves; i++) {
		for (unsigned j = 0; j < r->leaf[i]->count; j++)
			run_drop(r, &r->leaf[i]->run[j]);
		env_free(env, r->leaf[i], sizeof(struct run_leaf));
	}
	if (env)
		env_free(env, r->leaf, r->room * sizeof(*r->leaf));
	for (struct run_leaf *l = r->spare, *next; l; l = next) {
		next = l->next;
		env_free(env, l, sizeof(*l));
	}
	r->leaf = NULL;
	r->spare = NULL;
	r->leaves = r->room = r->spares = 0;
}

int runs_reserve(struct runs *r, uint64_t n)
{
	struct env *env = r->pool->env;
	unsigned want = splits_for(n);

	if (r->leaves + want > r->room) {
		unsigned room = 2 * r->leaves + want;
		struct run_leaf **leaf = env_alloc(env, room * sizeof(*leaf));

		if (!leaf)
			return -ENOMEM;
		if (r->leaves)
			memcpy(leaf, r->leaf, r->leaves * sizeof(*leaf));
		env_free(env, r->leaf, r->room * sizeof(*leaf));
		r->leaf = leaf;
		r->room = room;
	}
	while (r->spares < want) {
		struct run_leaf *l = env_alloc(env, sizeof(*l));

		if (!l)
			return -ENOMEM;
		l->next = r->spare;
		r->spare = l;
		r->spares++;
	}
	return 0;
}

void runs_trim(struct runs *r, uint64_t n)
{
	while (r->spares > splits_for(n) + SPARE_KEPT) {
		struct run_leaf *l = r->spare;

		r->spare = l->next;
		r->spares--;
		env_free(r->pool->env, l, sizeof(*l));
	}
}

static struct run_leaf *spare_take(struct runs *r)
{
	struct run_leaf *l = r->spare;

	kage_assert(l);
	r->spare = l->next;
	r->spares--;
	l->next = NULL;
	l->count = 0;
	return l;
}

static void spare_give(struct runs *r, struct run_leaf *l)
{
	l->next = r->spare;
	r->spare = l;
	r->spares++;
}

/* -- finding ------------------------------------------------------------------------- */

struct place {
	unsigned leaf, at;
};

/* The first run that ends beyond gfn; leaf == r->leaves: none. */
static struct place place_of(const struct runs *r, gfn_t gfn)
{
	struct place p = {0, 0};
	unsigned lo = 0, hi = r->leaves;

	while (lo < hi) {
		unsigned mid = (lo + hi) / 2;
		const struct run_leaf *l = r->leaf[mid];

		if (run_end(&l->run[l->count - 1]).v <= gfn.v)
			lo = mid + 1;
		else
			hi = mid;
	}
	p.leaf = lo;
	if (lo == r->leaves)
		return p;
	hi = r->leaf[p.leaf]->count;
	lo = 0;
	while (lo < hi) {
		unsigned mid = (lo + hi) / 2;

		if (run_end(&r->leaf[p.leaf]->run[mid]).v <= gfn.v)
			lo = mid + 1;
		else
			hi = mid;
	}
	p.at = lo;
	return p;
}

static struct run *run_at(const struct runs *r, struct place p)
{
	return p.leaf < r->leaves ? &r->leaf[p.leaf]->run[p.at] : NULL;
}

const struct run *runs_from(const struct runs *r, gfn_t gfn)
{
	return run_at(r, place_of(r, gfn));
}

const struct run *runs_find(const struct runs *r, gfn_t gfn)
{
	const struct run *run = runs_from(r, gfn);

	return run && run->gfn.v <= gfn.v ? run : NULL;
}

/* What is left of a run from a page of its own on. */
static struct run run_from(const struct run *run, gfn_t gfn)
{
	uint64_t skip = gfn.v - run->gfn.v;

	return (struct run){.gfn = gfn, .npages = run->npages - skip, .pfn = run_pfn(run, gfn), .kind = run->kind,
			    .hva = run->hva + (skip << PAGE_SHIFT)};
}

bool runs_piece(const struct runs *r, gfn_t at, gfn_t end, struct run *piece)
{
	const struct run *run = at.v < end.v ? runs_from(r, at) : NULL;

	if (!run || run->gfn.v >= end.v)
		return false;
	*piece = run_from(run, GFN(MAX(run->gfn.v, at.v)));
	piece->npages = MIN(piece->npages, end.v - piece->gfn.v);
	return true;
}

/* -- changing ------------------------------------------------------------------------- */

static void leaf_insert(struct runs *r, unsigned at, struct run_leaf *l)
{
	kage_assert(r->leaves < r->room);
	memmove(&r->leaf[at + 1], &r->leaf[at], (r->leaves - at) * sizeof(*r->leaf));
	r->leaf[at] = l;
	r->leaves++;
}

/* Makes room for one more run at a place, which may move into a new leaf. */
static struct place place_open(struct runs *r, struct place p)
{
	struct run_leaf *l;

	if (p.leaf == r->leaves) { /* behind the last run */
		if (r->leaves && r->leaf[r->leaves - 1]->count < RUNS_LEAF)
			return (struct place){r->leaves - 1, r->leaf[r->leaves - 1]->count};
		leaf_insert(r, r->leaves, spare_take(r));
		return p;
	}
	l = r->leaf[p.leaf];
	if (l->count == RUNS_LEAF) {
		struct run_leaf *half = spare_take(r);
		unsigned keep = RUNS_LEAF / 2;

		half->count = l->count - keep;
		memcpy(half->run, &l->run[keep], half->count * sizeof(half->run[0]));
		l->count = keep;
		leaf_insert(r, p.leaf + 1, half);
		if (p.at > keep)
			p = (struct place){p.leaf + 1, p.at - keep};
	}
	return p;
}

static void run_insert(struct runs *r, struct place p, const struct run *run)
{
	struct run_leaf *l;

	p = place_open(r, p);
	l = r->leaf[p.leaf];
	memmove(&l->run[p.at + 1], &l->run[p.at], (l->count - p.at) * sizeof(l->run[0]));
	l->run[p.at] = *run;
	l->count++;
	r->count++;
	run_hold(r, run);
}

static void run_remove(struct runs *r, struct place p)
{
	struct run_leaf *l = r->leaf[p.leaf];

	run_drop(r, &l->run[p.at]);
	l->count--;
	r->count--;
	memmove(&l->run[p.at], &l->run[p.at + 1], (l->count - p.at) * sizeof(l->run[0]));
	if (l->count)
		return;
	r->leaves--;
	memmove(&r->leaf[p.leaf], &r->leaf[p.leaf + 1], (r->leaves - p.leaf) * sizeof(*r->leaf));
	spare_give(r, l);
}

/* No run reaches across gfn. */
static void runs_cut(struct runs *r, gfn_t gfn)
{
	struct place p = place_of(r, gfn);
	struct run *run = run_at(r, p), tail;

	if (!run || run->gfn.v >= gfn.v)
		return;
	tail = run_from(run, gfn);
	run->npages -= tail.npages;
	p.at++;
	run_insert(r, p, &tail);
}

void runs_clear(struct runs *r, gfn_t gfn, uint64_t npages)
{
	gfn_t end = gfn_add(gfn, npages);
	struct place p;
	struct run *run;

	runs_cut(r, gfn);
	runs_cut(r, end);
	for (;;) {
		p = place_of(r, gfn);
		run = run_at(r, p);
		if (!run || run->gfn.v >= end.v)
			return;
		run_remove(r, p);
	}
}

bool runs_join(const struct runs *r, const struct run *a, const struct run *b)
{
	if (!a->npages || run_end(a).v != b->gfn.v || a->kind != b->kind || a->hva + (a->npages << PAGE_SHIFT) != b->hva)
		return false;
	if (a->kind == RUN_ZERO)
		return true;
	/* Frames that lie side by side may belong to extents that do not go together. */
	return a->pfn.v + a->npages == b->pfn.v && pool_extent(r->pool, a->pfn) == pool_extent(r->pool, b->pfn);
}

void runs_set(struct runs *r, const struct run *run)
{
	struct run one = *run;
	struct place p;
	struct run *other;

	runs_clear(r, one.gfn, one.npages);
	other = run_at(r, place_of(r, run_end(&one)));
	if (other && runs_join(r, &one, other)) {
		one.npages += other->npages;
		run_remove(r, place_of(r, other->gfn));
	}
	if (one.gfn.v > 0) {
		p = place_of(r, GFN(one.gfn.v - 1));
		other = run_at(r, p);
		if (other && runs_join(r, other, &one)) {
			other->npages += one.npages;
			return;
		}
	}
	run_insert(r, place_of(r, one.gfn), &one);
}
