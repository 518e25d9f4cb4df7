/* SPDX-License-Identifier: MIT */
/*
 * Merging two frames: a planner for the change funnel.
 *
 * Places are the entries that map either frame, found by the reverse map: every
 * mm that reaches one is a target of the change. Between start and end no
 * guest writes either frame (G1), so the comparison is final.
 *
 * A place may vanish or multiply until the locks are held (a fault un-shares the
 * table, breaks COW): then the reference count no longer equals the number of
 * places, and the recheck gives up. New mms cannot come to reach a place: clones
 * need the family's lock for writing.
 *
 *      merging                              un-share of table T (two sharers)
 *      place: entry in T                    lock T's slot, lock level 0
 *                                           copies T: refs of the frame 1 -> 2
 *                                           unlock level 0
 *      lock level 0                         T.refs--, slot -> copy
 *      refs 2 != 1 place: -EAGAIN
 *
 * Locks taken: level-0 locks of both gfns, in rank order; those of the funnel.
 */
#include "base/guest.h"
#include "merge/merge.h"
#include "mm/change.h"
#include "mm/layer.h"
#include "mm/mirror.h"
#include "mm/rmap.h"
#include "mm/stable.h"

struct place {
	struct mm *mm;
	gfn_t gfn;
	entry_t *slot;
	pfn_t table;
	bool again; /* the same slot as an earlier place: another mm that reaches it */
};

struct side {
	pfn_t pfn;
	struct family *family; /* NULL: a stable frame, or the zero frame */
	gfn_t gfn;
	struct place *place;
	unsigned count, room;
};

struct plan {
	struct change c;
	struct host *h;
	struct side from, into;
	struct stable *stable; /* of `into`; fresh: to be published */
	bool fresh;
	uint64_t hash;
	uint32_t domain;
	struct lock *lock[2];
	unsigned locks;
};

/* -- places ------------------------------------------------------------------------- */

static int place_add(struct host *h, struct side *s, const struct place *p)
{
	if (s->count == s->room) {
		unsigned room = s->room ? 2 * s->room : 4;
		struct place *more = env_alloc(h->env, room * sizeof(*more));

		if (!more)
			return -ENOMEM;
		if (s->count)
			memcpy(more, s->place, s->count * sizeof(*more));
		env_free(h->env, s->place, s->room * sizeof(*more));
		s->place = more;
		s->room = room;
	}
	s->place[s->count++] = *p;
	return 0;
}

/* Splits the block entry through which an mm maps the frame. */
static int place_split(struct mm *mm, gfn_t gfn, entry_t *slot, unsigned level)
{
	return table_split(mm, slot, level, GFN(ALIGN_DOWN(gfn.v, level_pages(level))));
}

static int place_of_mm(struct mm *mm, void *arg)
{
	struct side *s = arg;
	struct place p = { .mm = mm, .gfn = s->gfn };
	unsigned level;
	entry_t e;
	int r = 0;

	for (;;) {
		rcu_enter();
		p.table = table_holding(mm, s->gfn, &p.slot, &level);
		e = pfn_is_none(p.table) ? ENTRY_NONE : entry_load(p.slot);
		if (!entry_is_leaf(e) || e & ENTRY_SPECIAL ||
		    entry_pfn(e).v + (s->gfn.v & (level_pages(level) - 1)) != s->pfn.v) {
			rcu_leave();
			return 0;
		}
		if (level > 0)
			r = place_split(mm, s->gfn, p.slot, level);
		rcu_leave();
		if (level == 0 || r)
			break;
	}
	for (unsigned i = 0; r == 0 && i < s->count; i++)
		p.again |= s->place[i].slot == p.slot;
	return r ? r : place_add(mm->host, s, &p);
}

/* A frame in use, of a kind that carries a (layer, gfn) pair. Inside a read section. */
static bool frame_listed(struct host *h, pfn_t pfn)
{
	enum frame_kind kind;

	if (!pfn_section(h->pool, pfn))
		return false;
	kind = frame_kind(pfn_frame(h->pool, pfn));
	return kind == FRAME_PRIVATE || (kind == FRAME_HOME && pfn_block(h->pool, pfn)->extent);
}

static int places_find(struct host *h, struct side *s)
{
	struct layer *l = NULL;
	uint64_t where;

	rcu_enter();
	if (frame_listed(h, s->pfn)) {
		where = rmap_where(h, s->pfn);
		l = layer_find(h, where_owner(where));
		s->gfn = where_index(where);
	}
	rcu_leave();
	if (!l || l->family != s->family)
		return -EAGAIN; /* freed since, and perhaps handed out to a family that we do not hold */
	return layer_each_mm(l, place_of_mm, s);
}

/* -- the change -------------------------------------------------------------------------- */

static unsigned add_targets(struct plan *p, unsigned n, const struct side *s)
{
	for (unsigned i = 0; i < s->count; i++)
		p->c.target[n++] = (struct change_target){
			.mm = s->place[i].mm,
			.notify = { .start = s->gfn, .end = gfn_add(s->gfn, 1) },
		};
	return n;
}

static void plan_locks(struct plan *p)
{
	struct side *a = &p->from, *b = p->into.family ? &p->into : NULL;
	struct lock *x = table_lock_of(a->family, 0, a->gfn), *y;

	p->lock[p->locks++] = x;
	if (!b)
		return;
	y = table_lock_of(b->family, 0, b->gfn);
	if (x == y)
		return;
	p->lock[p->locks++] = y;
	if (b->family->id < a->family->id || (b->family == a->family && y < x))
		SWAP(p->lock[0], p->lock[1]);
}

/* The host maps no single page of that guest (mm/mirror.h, V6): its frames stay as they are. */
static bool any_coarse(const struct side *s)
{
	bool coarse = false;

	for (unsigned i = 0; i < s->count; i++)
		coarse |= mm_coarse(s->place[i].mm);
	return coarse;
}

static int plan_prepare(struct change *c)
{
	struct plan *p = container_of(c, struct plan, c);
	struct host *h = p->h;
	bool ordinary = !p->stable && !pfn_is_zero(p->into.pfn);
	int r = places_find(h, &p->from);

	if (!r && ordinary)
		r = places_find(h, &p->into);
	if (r)
		return r;
	if (!p->from.count || (ordinary && !p->into.count))
		return -EAGAIN;
	if (any_coarse(&p->from) || any_coarse(&p->into))
		return -EOPNOTSUPP;
	if (ordinary) {
		p->fresh = true;
		p->stable = stable_alloc(h, p->domain, p->hash);
		if (!p->stable)
			return -ENOMEM;
	} else if (p->stable) {
		r = stable_reserve(h, p->stable, 1);
		if (r)
			return r;
	}
	c->targets = p->from.count + p->into.count;
	c->target = env_alloc(h->env, c->targets * sizeof(*c->target));
	if (!c->target)
		return -ENOMEM;
	add_targets(p, add_targets(p, 0, &p->from), &p->into);
	plan_locks(p);
	return 0;
}

/* The place is still where its mm's walk for the gfn ends, and maps the frame. Inside a read section. */
static bool place_holds(const struct side *s, const struct place *p)
{
	unsigned level;
	entry_t *slot;
	pfn_t table = table_holding(p->mm, s->gfn, &slot, &level);
	entry_t e;

	if (!pfn_eq(table, p->table) || slot != p->slot)
		return false;
	e = entry_load(slot);
	return entry_is_leaf(e) && pfn_eq(entry_pfn(e), s->pfn);
}

/* Readable for the rest of the read section: an entry maps it, so it is not even released yet. */
static bool side_readable(const struct side *s)
{
	return !s->count || place_holds(s, &s->place[0]);
}

static int plan_inspect(struct change *c)
{
	struct plan *p = container_of(c, struct plan, c);
	struct pool *pool = p->h->pool;
	int r = -EAGAIN;

	rcu_enter();
	if (side_readable(&p->from) && side_readable(&p->into))
		r = guest_compare(pfn_hva(pool, p->from.pfn), pfn_hva(pool, p->into.pfn), PAGE_SIZE) ? -EILSEQ : 0;
	rcu_leave();
	return r;
}

static void plan_lock(struct change *c)
{
	struct plan *p = container_of(c, struct plan, c);

	for (unsigned i = 0; i < p->locks; i++)
		lock_take(p->lock[i]);
}

static void plan_unlock(struct change *c)
{
	struct plan *p = container_of(c, struct plan, c);

	for (unsigned i = p->locks; i-- > 0;)
		lock_drop(p->lock[i]);
}

/* Every entry that the frame counts is one of the places. */
static bool side_holds(struct plan *p, const struct side *s)
{
	struct frame *f = pfn_frame(p->h->pool, s->pfn);
	unsigned slots = 0;
	bool holds = true;

	rcu_enter();
	for (unsigned i = 0; holds && i < s->count; i++) {
		holds = place_holds(s, &s->place[i]);
		slots += !s->place[i].again;
	}
	rcu_leave();
	return holds && frame_kind(f) != FRAME_STABLE && frame_pins(f) == 0 && atomic_load(&f->refs) == slots &&
	       !frame_in_block(p->h, s->pfn);
}

/* Everybody who maps it lets it be merged. */
static bool side_mergeable(const struct side *s)
{
	bool mergeable = true;

	rcu_enter();
	for (unsigned i = 0; mergeable && i < s->count; i++) {
		const struct region *r = mm_region(s->place[i].mm, s->gfn);

		mergeable = r && r->flags & KAGE_REGION_MERGEABLE;
	}
	rcu_leave();
	return mergeable;
}

static int plan_recheck(struct change *c)
{
	struct plan *p = container_of(c, struct plan, c);

	if (!side_mergeable(&p->from))
		return -EAGAIN;
	if (p->fresh && !side_mergeable(&p->into))
		return -EILSEQ;
	if (!side_holds(p, &p->from) || (p->fresh && !side_holds(p, &p->into)))
		return -EAGAIN;
	return 0;
}

static void commit_fresh(struct plan *p)
{
	uint64_t where = rmap_where(p->h, p->into.pfn);

	for (unsigned i = 0; i < p->into.count; i++) {
		entry_t *slot = p->into.place[i].slot;

		entry_store(slot, entry_load(slot) & ~ENTRY_W);
	}
	stable_publish(p->h, p->stable, p->into.pfn);
	stable_chain(p->h, p->stable, where);
}

static void plan_commit(struct change *c)
{
	struct plan *p = container_of(c, struct plan, c);
	struct frame *into = pfn_frame(p->h->pool, p->into.pfn);
	bool zero = pfn_is_zero(p->into.pfn);
	uint64_t where = rmap_where(p->h, p->from.pfn);
	bool first = !p->fresh && p->stable; /* the reference of stable_get() becomes the first entry's */

	if (p->fresh)
		commit_fresh(p);
	if (p->stable)
		stable_chain(p->h, p->stable, where);
	for (unsigned i = 0; i < p->from.count; i++) {
		struct place *at = &p->from.place[i];

		if (at->again)
			continue;
		if (p->stable && !first)
			atomic_fetch_add_explicit(&into->refs, 1, memory_order_relaxed);
		first = false;
		entry_store(at->slot, entry_leaf(p->into.pfn, zero ? ENTRY_SPECIAL : 0));
		frame_drop(p->h, p->from.pfn, &c->dead);
	}
}

static void plan_cancel(struct change *c)
{
	struct plan *p = container_of(c, struct plan, c);

	if (p->fresh)
		stable_free(p->h, p->stable);
}

static const struct change_ops plan_ops = {
	.prepare = plan_prepare, .inspect = plan_inspect, .lock = plan_lock, .recheck = plan_recheck,
	.commit = plan_commit, .unlock = plan_unlock, .cancel = plan_cancel,
};

/* The host kernel has made a place's page private (mm/mirror.h): that guest has it home, and nothing was merged. */
static int plan_adopt(struct plan *p)
{
	int r = -EAGAIN;

	for (unsigned i = 0; r == -EAGAIN && i < p->c.targets; i++) {
		struct mm *mm = p->c.target[i].mm;
		gfn_t gfn = p->c.target[i].notify.start;
		struct brlock_held held = brlock_read(&mm->range);
		uint64_t map[MIRROR_WORDS] = { 0 };

		if (mm->mirror && mm_region(mm, gfn))
			mm->mirror->ops->diverged(mm->mirror, gfn, 1, map);
		if (map[0])
			r = mm_adopt_page(mm, gfn, NULL, NULL);
		brlock_read_drop(&mm->range, held);
		r = r == -ENOMEM ? r : -EAGAIN;
	}
	return r;
}

int merge_frames(struct merge *m, struct family *from_family, pfn_t from, struct family *into_family, pfn_t into,
		 struct stable *s, uint64_t hash, uint32_t domain)
{
	struct host *h = m->host;
	struct plan p = {
		.c = { .ops = &plan_ops, .reason = KAGE_REASON_CLEAR,
		       .flags = KAGE_RANGE_SAME_CONTENT | KAGE_RANGE_OPTIONAL },
		.h = h, .from = { .pfn = from, .family = from_family },
		.into = { .pfn = into, .family = into_family }, .stable = s, .hash = hash, .domain = domain,
	};
	bool zero = pfn_is_zero(into);
	int r = change_run(&p.c);

	if (r == -ESTALE)
		r = plan_adopt(&p);
	if (r == 0) {
		mm_count(p.from.place[0].mm, ksm_merges);
		if (zero)
			mm_count_add(p.from.place[0].mm, ksm_zero_pages, p.from.count);
		trace(h->env, merge, p.from.place[0].mm->id, p.from.gfn.v, zero);
	}
	env_free(h->env, p.c.target, p.c.targets * sizeof(*p.c.target));
	env_free(h->env, p.from.place, p.from.room * sizeof(*p.from.place));
	env_free(h->env, p.into.place, p.into.room * sizeof(*p.into.place));
	return r;
}
