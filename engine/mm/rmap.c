/* SPDX-License-Identifier: MIT */
/*
 * The reverse map: frame -> (layer, gfn) -> mms below that layer -> entries,
 * each checked to still map the frame.
 *
 * Nothing is maintained when tables are shared or copied: that is what makes
 * clones cheap. The price is paid here, in looking into every descendant of the
 * layer; table pages that several of them share are visited once.
 *
 * Locks: the family's lock is held by the caller; entries are read without a
 * table lock, so a visitor that acts on one rechecks it under the lock.
 */
#include <stdlib.h>

#include "mm/layer.h"
#include "mm/rmap.h"
#include "mm/stable.h"
#include "mm/table.h"

/* Slots already visited: a hash set. Few as a rule: a small array, then a larger one from the embedder's memory. */
struct seen {
	struct env *env;
	uint64_t count, room; /* room: a power of two, more than count */
	entry_t **slot;
	entry_t *first[32];
};

static void seen_init(struct seen *s, struct env *env)
{
	*s = (struct seen){ .env = env, .room = ARRAY_SIZE(s->first) };
	s->slot = s->first;
}

static void seen_finish(struct seen *s)
{
	if (s->slot != s->first)
		env_free(s->env, s->slot, s->room * sizeof(*s->slot));
}

/* Where it is, or the empty place where it belongs. */
static entry_t **seen_at(entry_t **set, uint64_t room, const entry_t *slot)
{
	uint64_t i = (uint64_t)(uintptr_t)slot * 0x9e3779b97f4a7c15u >> 32;

	while (set[i & (room - 1)] && set[i & (room - 1)] != slot)
		i++;
	return &set[i & (room - 1)];
}

static int seen_grow(struct seen *s)
{
	uint64_t room = 4 * s->room;
	entry_t **set = env_alloc(s->env, room * sizeof(*set));

	if (!set)
		return -ENOMEM;
	for (uint64_t i = 0; i < s->room; i++)
		if (s->slot[i])
			*seen_at(set, room, s->slot[i]) = s->slot[i];
	seen_finish(s);
	s->slot = set;
	s->room = room;
	return 0;
}

/* 1: it was there; 0: added; -ENOMEM. */
static int seen_add(struct seen *s, entry_t *slot)
{
	entry_t **at = seen_at(s->slot, s->room, slot);

	if (*at)
		return 1;
	if (2 * s->count >= s->room) {
		if (seen_grow(s))
			return -ENOMEM;
		at = seen_at(s->slot, s->room, slot);
	}
	*at = slot;
	s->count++;
	return 0;
}

pfn_t table_holding(const struct mm *mm, gfn_t gfn, entry_t **slot, unsigned *level)
{
	const struct pool *pool = mm->host->pool;
	entry_t e = entry_load((const entry_t *)&mm->root);
	pfn_t table = PFN_NONE;

	*level = root_level(e) + 1;
	if (gfn.v >= level_pages(*level))
		return PFN_NONE;
	while (entry_is_table(e)) {
		--*level;
		table = entry_pfn(e);
		*slot = table_entries(pool, table) + level_index(gfn, *level);
		e = entry_load(*slot);
	}
	return entry_is_leaf(e) ? table : PFN_NONE;
}

entry_t *table_leaves(const struct mm *mm, gfn_t gfn, pfn_t *table, entry_t **above, unsigned *level)
{
	const struct pool *pool = mm->host->pool;
	entry_t *slot = (entry_t *)&mm->root, e = entry_load(slot);

	*level = root_level(e) + 1;
	if (gfn.v >= level_pages(*level)) {
		*above = NULL;
		return NULL;
	}
	while (*level > 0 && entry_is_table(e)) {
		--*level;
		*table = entry_pfn(e);
		slot = table_entries(pool, *table) + level_index(gfn, *level);
		e = entry_load(slot);
	}
	*above = slot;
	return *level == 0 ? slot - level_index(gfn, 0) : NULL;
}

struct rmap {
	pfn_t pfn;
	gfn_t gfn;
	struct seen seen;
	int (*visit)(const struct rmap_entry *e, void *arg);
	void *arg;
};

static int rmap_mm(struct mm *mm, void *arg)
{
	struct rmap *m = arg;
	struct rmap_entry e = { .mm = mm, .gfn = m->gfn };
	entry_t entry;
	bool maps;
	int r;

	rcu_enter();
	e.table = table_holding(mm, m->gfn, &e.slot, &e.level);
	maps = !pfn_is_none(e.table);
	if (maps) {
		entry = entry_load(e.slot);
		maps = entry_is_leaf(entry) &&
		       entry_pfn(entry).v + (m->gfn.v & (level_pages(e.level) - 1)) == m->pfn.v;
	}
	rcu_leave();
	if (!maps)
		return 0;
	r = seen_add(&m->seen, e.slot);
	if (r)
		return r < 0 ? r : 0;
	return m->visit(&e, m->arg);
}

static int rmap_one(struct host *h, uint64_t where, struct rmap *m)
{
	struct layer *l = layer_find(h, where_owner(where));

	m->gfn = where_index(where);
	return l ? layer_each_mm(l, rmap_mm, m) : 0;
}

uint64_t rmap_where(const struct host *h, pfn_t pfn)
{
	const struct frame *f = pfn_frame(h->pool, pfn);
	enum frame_kind kind = frame_kind(f);

	if (kind == FRAME_HOME) {
		const struct extent *e = pfn_block(h->pool, pfn)->extent;

		return frame_where(e->layer, extent_gfn(e, pfn));
	}
	return atomic_load_explicit(&((struct frame *)f)->where, memory_order_relaxed);
}

int rmap_walk_where(struct host *h, uint64_t where, pfn_t pfn, int (*visit)(const struct rmap_entry *e, void *arg),
		    void *arg)
{
	struct rmap m = { .pfn = pfn, .visit = visit, .arg = arg };
	int r;

	seen_init(&m.seen, h->env);
	r = rmap_one(h, where, &m);
	seen_finish(&m.seen);
	return r;
}

int rmap_walk(struct host *h, pfn_t pfn, int (*visit)(const struct rmap_entry *e, void *arg), void *arg)
{
	struct rmap m = { .pfn = pfn, .visit = visit, .arg = arg };
	struct frame *f = pfn_frame(h->pool, pfn);
	int r = 0;

	seen_init(&m.seen, h->env);
	if (frame_kind(f) == FRAME_STABLE) {
		struct stable *s = frame_stable(h->pool, pfn);

		for (uint32_t i = 0; r == 0 && i < s->count; i++)
			r = rmap_one(h, s->chain[i], &m);
	} else {
		r = rmap_one(h, rmap_where(h, pfn), &m);
	}
	seen_finish(&m.seen);
	return r;
}
