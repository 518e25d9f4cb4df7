/* SPDX-License-Identifier: MIT */
/*
 * Merging a run of pages: a planner for the change funnel.
 *
 * A run is up to 512 pages of one 2 MiB of a guest. Each has a frame of its own to be
 * merged into: the zero frame, a stable one, or an ordinary one that becomes stable (all of
 * these in one 2 MiB as well). So at most two leaf tables' worth of entries are
 * concerned in each guest, under at most two level-0 locks, however long the run is; what a
 * change costs beside comparing is paid once.
 *
 * Places are the entries that map the frames, found by the reverse map as leaf tables:
 * one for each mm below the layers that the frames belong to. Every mm that reaches one is
 * a target of the change, with the range of all its pages. Between start and end no
 * guest writes any of the frames (G1), so the comparison is final.
 *
 * Each page stands for itself: one that differs, or is raced for, leaves the run ("live" is
 * cleared) and the others go on. A place may vanish or multiply until the locks are
 * held (a fault un-shares the table, breaks COW): then the reference count no longer equals the
 * number of places, and the recheck lets the page go. New mms cannot come to reach a
 * place: clones need the family's lock for writing.
 *
 *      merging                              un-share of table T (two sharers)
 *      place: T                             lock T's slot, lock level 0
 *                                           copies T: refs of the frame 1 -> 2
 *                                           unlock level 0
 *      lock level 0                         T.refs--, slot -> copy
 *      refs 2 != 1 place: page let go
 *
 *      merging                              vCPU of the same guest, writes the page
 *      start: no translation is left        waits for the end, or has written before
 *      compares: what was written is seen
 *      lock; redirects
 *      end                                  fault: W is gone, COW break of the merged frame
 *
 *      merging                              pin (mm/access.c, X3)
 *      places found
 *                                           section: no change in flight; frame_pin() under level 0
 *      start
 *      lock level 0; pins != 0:
 *      page let go                or        section waits for the end, breaks the merged frame, pins the copy
 *
 *      merging                              discard, unmap, destroy
 *      places found                         range lock for writing; start
 *      start (both may be in flight)        zaps under level 0: the entry is gone
 *      lock level 0
 *      entry differs: page let go
 *                                           destroy waits for host->lock: a batch holds it, so
 *                                           no mm, layer or table goes while places are known
 *                                           (the shape of KSM's CVE-2011-2183)
 *
 *      merging into candidate Q             Q's last entry goes
 *      Q is in nobody's table: no place,
 *      nothing is read                or    Q has a place: read in a read section after
 *                                           looking at the entry; it is released later than that
 *
 * Two merging changes, of threads that step at once: frames may be in both, and the
 * recheck of the later one sees an entry, kind or count that differs. Their starts wait for each
 * other where a mirror is concerned: those are made one at a time (merge->mirrors).
 *
 * Targets: no two of one mm overlap. Where both sides lie in the same 2 MiB of an mm, it
 * is told of the range around both.
 *
 * Locks taken: level-0 locks of both sides, in rank order; host->stable, once; those of the funnel.
 */
#include "base/guest.h"
#include "merge/run.h"
#include "mm/change.h"
#include "mm/layer.h"
#include "mm/mirror.h"
#include "mm/rmap.h"
#include "mm/stable.h"

/* A leaf table that maps some of the frames. */
struct place {
	struct mm *mm;
	entry_t *slot; /* of the first page of the 2 MiB */
	pfn_t table;
	bool again; /* the same table as an earlier place: another mm that reaches it */
};

struct side {
	bool into; /* else: from */
	struct family *family;
	gfn_t base;
	struct place *place;
	unsigned count, room;
	unsigned first, end; /* live pages lie in there */
	unsigned mirrored;   /* places in guests that have a mirror */
};

struct plan {
	struct change c;
	struct merge *m;
	struct host *h;
	struct run *r;
	struct side from, into;
	struct lock *lock[2];
	unsigned locks, room; /* of c.target */
	bool stale;	      /* the host kernel has made pages private */
	bool mirrored, locked; /* some guest has a mirror: merge->mirrors is held */
};

/* The live pages of a side: FRESH ones only, of `into`. */
#define for_each_page(p, s, r)                                                       \
	for (struct run_page *p = &(r)->page[(r)->first]; p < &(r)->page[(r)->end]; p++) \
		if (!p->live || ((s)->into && p->to != RUN_FRESH)) {                 \
		} else

static inline unsigned page_at(const struct side *s, struct run *r, const struct run_page *p)
{
	return s->into ? p->at : (unsigned)(p - r->page);
}

static inline pfn_t page_pfn(const struct side *s, const struct run_page *p)
{
	return s->into ? p->into : p->from;
}

static inline void page_drop(struct run_page *p, enum run_result why)
{
	p->live = false;
	p->result = why;
}

static bool run_lives(struct run *r)
{
	for (unsigned i = r->first; i < r->end; i++)
		if (r->page[i].live)
			return true;
	return false;
}

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

static inline bool entry_maps(entry_t e, pfn_t pfn)
{
	return entry_is_leaf(e) && !(e & ENTRY_SPECIAL) && pfn_eq(entry_pfn(e), pfn);
}

static bool table_maps(const struct side *s, struct run *r, const entry_t *slot)
{
	for_each_page(p, s, r)
		if (entry_maps(entry_load(&slot[page_at(s, r, p)]), page_pfn(s, p)))
			return true;
	return false;
}

static bool block_maps(const struct side *s, struct run *r, entry_t e, unsigned level)
{
	uint64_t skip = s->base.v & (level_pages(level) - 1);

	if (!entry_is_leaf(e) || e & ENTRY_SPECIAL)
		return false;
	for_each_page(p, s, r)
		if (entry_pfn(e).v + skip + page_at(s, r, p) == page_pfn(s, p).v)
			return true;
	return false;
}

struct places {
	struct run *r;
	struct side *s;
};

/* Block entries through which an mm maps one of the frames are split. */
static int place_of_mm(struct mm *mm, void *arg)
{
	struct places *f = arg;
	struct side *s = f->s;
	struct place at = { .mm = mm };
	bool maps;
	int r = 0;

	for (unsigned i = 0; i < s->count; i++)
		if (s->place[i].mm == mm)
			return 0;
	for (;;) {
		entry_t *above;
		unsigned level;

		rcu_enter();
		at.slot = table_leaves(mm, s->base, &at.table, &above, &level);
		maps = at.slot ? table_maps(s, f->r, at.slot) : above && block_maps(s, f->r, entry_load(above), level);
		if (maps && !at.slot)
			r = table_split(mm, above, level, GFN(ALIGN_DOWN(s->base.v, level_pages(level))));
		rcu_leave();
		if (!maps || at.slot || r)
			break;
	}
	if (!maps || r)
		return r;
	for (unsigned i = 0; i < s->count; i++)
		at.again |= pfn_eq(s->place[i].table, at.table);
	return place_add(mm->host, s, &at);
}

/* A home slot that is not in use may be one whose extent goes right now (invariant 6 of candidate.c). */
bool frame_listed(struct host *h, pfn_t pfn)
{
	const struct frame *f;

	if (!pfn_section(h->pool, pfn))
		return false;
	f = pfn_frame(h->pool, pfn);
	if (frame_kind(f) == FRAME_HOME)
		return READ_ONCE(pfn_block(h->pool, pfn)->extent) && (READ_ONCE(f->refs) || frame_in_block(h, pfn));
	return frame_kind(f) == FRAME_PRIVATE;
}

/* The layer that the page's frame belongs to; 0: freed since, and perhaps handed out to somebody else. */
static uint32_t page_owner(struct plan *pl, const struct side *s, const struct run_page *p)
{
	struct host *h = pl->h;
	pfn_t pfn = page_pfn(s, p);
	uint32_t owner = 0;

	rcu_enter();
	if (frame_listed(h, pfn)) {
		uint64_t where = rmap_where(h, pfn);
		struct layer *l = layer_find(h, where_owner(where));

		if (l && l->family == s->family && where_index(where).v == s->base.v + page_at(s, pl->r, p))
			owner = where_owner(where);
	}
	rcu_leave();
	return owner;
}

static int places_find(struct plan *pl, struct side *s)
{
	struct places f = { pl->r, s };
	uint32_t last = 0;
	int r = 0;

	s->first = BLOCK_PAGES;
	for_each_page(p, s, pl->r) {
		uint32_t owner = page_owner(pl, s, p);

		if (!owner) {
			page_drop(p, RUN_RACED);
			continue;
		}
		s->first = MIN(s->first, page_at(s, pl->r, p));
		s->end = MAX(s->end, page_at(s, pl->r, p) + 1);
		if (owner == last)
			continue;
		last = owner;
		r = layer_each_mm(layer_find(pl->h, owner), place_of_mm, &f);
		if (r)
			return r;
	}
	return 0;
}

/* The host maps no single page of that guest (mm/mirror.h, V6): its frames stay as they are. */
static bool side_coarse(struct plan *pl, struct side *s)
{
	bool coarse = false;

	for (unsigned i = 0; i < s->count; i++) {
		coarse |= mm_coarse(s->place[i].mm);
		s->mirrored += s->place[i].mm->mirror != NULL; /* the family is held */
	}
	pl->mirrored |= s->mirrored != 0;
	return coarse;
}

/* -- the change: prepare ---------------------------------------------------------------- */

/* Where both sides lie in the same 2 MiB of a guest, it hears of one range. */
static void target_add(struct plan *pl, struct mm *mm, gfn_t start, gfn_t end)
{
	struct change *c = &pl->c;

	for (unsigned i = 0; i < c->targets; i++) {
		struct notify_change *n = &c->target[i].notify;

		if (c->target[i].mm != mm || (n->start.v ^ start.v) >> LEVEL_BITS)
			continue;
		n->start = GFN(MIN(n->start.v, start.v));
		n->end = GFN(MAX(n->end.v, end.v));
		return;
	}
	c->target[c->targets++] = (struct change_target){ .mm = mm, .notify = { .start = start, .end = end } };
}

static int plan_targets(struct plan *pl)
{
	const struct side *side[] = { &pl->from, &pl->into };

	pl->room = pl->from.count + pl->into.count;
	pl->c.target = env_alloc(pl->h->env, pl->room * sizeof(*pl->c.target));
	if (!pl->c.target)
		return -ENOMEM;
	for (unsigned n = 0; n < 2; n++)
		for (unsigned i = 0; i < side[n]->count; i++)
			target_add(pl, side[n]->place[i].mm, gfn_add(side[n]->base, side[n]->first),
				   gfn_add(side[n]->base, side[n]->end));
	return 0;
}

static void plan_locks(struct plan *pl)
{
	struct side *a = &pl->from, *b = pl->into.family ? &pl->into : NULL;
	struct lock *x = table_lock_of(a->family, 0, a->base), *y;

	pl->lock[pl->locks++] = x;
	if (!b)
		return;
	y = table_lock_of(b->family, 0, b->base);
	if (x == y)
		return;
	pl->lock[pl->locks++] = y;
	if (b->family->id < a->family->id || (b->family == a->family && y < x))
		SWAP(pl->lock[0], pl->lock[1]);
}

/* What commit will need of stable frames. A page for which there is no memory ends the run. */
static int plan_stables(struct plan *pl)
{
	struct run *run = pl->r;

	for_each_page(p, &pl->from, run) {
		int r = 0;

		if (p->to == RUN_FRESH) {
			p->stable = stable_alloc(pl->h, run->domain, p->hash);
			r = p->stable ? 0 : -ENOMEM;
		} else if (p->to == RUN_STABLE) {
			r = stable_promise(pl->h, p->stable);
			p->promised = r == 0;
		}
		if (r)
			return r;
	}
	return 0;
}

static int plan_prepare(struct change *c)
{
	struct plan *pl = container_of(c, struct plan, c);
	int r = places_find(pl, &pl->from);

	if (!r && pl->into.family)
		r = places_find(pl, &pl->into);
	if (r)
		return r;
	if (!pl->into.count) {
		for_each_page(p, &pl->into, pl->r)
			page_drop(p, RUN_RACED);
	}
	if (!run_lives(pl->r) || !pl->from.count)
		return -EAGAIN;
	if (side_coarse(pl, &pl->from) | side_coarse(pl, &pl->into))
		return -EOPNOTSUPP;
	r = plan_stables(pl);
	if (!r)
		r = plan_targets(pl);
	if (r)
		return r;
	plan_locks(pl);
	pl->locked = pl->mirrored;
	if (pl->locked)
		lock_take(&pl->m->mirrors);
	return 0;
}

/* -- between start and end ----------------------------------------------------------------- */

/* Pages that the host kernel has made private (mm/mirror.h): that guest has them home, they are not merged. */
static void plan_diverged(struct change *c, const struct change_target *t, const uint64_t *map)
{
	struct plan *pl = container_of(c, struct plan, c);
	struct side *side[] = { &pl->from, &pl->into };

	pl->stale = true;
	for (unsigned n = 0; n < 2; n++) {
		for_each_page(p, side[n], pl->r) {
			uint64_t i = side[n]->base.v + page_at(side[n], pl->r, p) - t->notify.start.v;

			if (side[n]->family == t->mm->family && i < t->notify.end.v - t->notify.start.v &&
			    bit_test(map, i))
				page_drop(p, RUN_RACED);
		}
	}
}

/* The mms' walks still end in these tables. Inside a read section. */
static bool side_stands(const struct side *s)
{
	for (unsigned i = 0; i < s->count; i++) {
		entry_t *above;
		pfn_t table;
		unsigned level;

		if (table_leaves(s->place[i].mm, s->base, &table, &above, &level) != s->place[i].slot)
			return false;
	}
	return true;
}

/* An entry maps it, so it is not even released yet: readable for the rest of the read section. */
static bool page_mapped(const struct side *s, struct run *r, const struct run_page *p)
{
	for (unsigned i = 0; i < s->count; i++)
		if (entry_maps(entry_load(&s->place[i].slot[page_at(s, r, p)]), page_pfn(s, p)))
			return true;
	return false;
}

static void page_prefetch(struct pool *pool, const struct run_page *p)
{
	if (!p->live)
		return;
	for (unsigned i = 0; i < 4; i++) {
		__builtin_prefetch((char *)pfn_hva(pool, p->from) + i * CACHE_LINE);
		__builtin_prefetch((char *)pfn_hva(pool, p->into) + i * CACHE_LINE);
	}
}

/* Before contents are compared (X3 of mm/access.c): no pin begins before the end, and what one stored is seen. */
static bool page_pinned(struct pool *pool, const struct run_page *p)
{
	bool pinned = frame_pins(pfn_frame(pool, p->from)) || frame_pins(pfn_frame(pool, p->into));

	atomic_thread_fence(memory_order_acquire);
	return pinned;
}

/* Two pages that are equal have one hash: it is taken of the one that is near now. */
static void page_compare(struct plan *pl, struct run_page *p)
{
	struct pool *pool = pl->h->pool;

	if (!page_mapped(&pl->from, pl->r, p) || (p->to == RUN_FRESH && !page_mapped(&pl->into, pl->r, p)) ||
	    page_pinned(pool, p)) {
		page_drop(p, RUN_RACED);
		return;
	}
	if (guest_compare(pfn_hva(pool, p->from), pfn_hva(pool, p->into), PAGE_SIZE)) {
		page_drop(p, RUN_DIFFERS);
		return;
	}
	if (p->hashed)
		return;
	p->hash = page_hash(pl->r->family->tenant, pfn_hva(pool, p->from));
	if (p->hash == pl->r->zero_hash && pl->r->zero_hash)
		page_drop(p, RUN_DIFFERS);
	else if (p->to == RUN_FRESH)
		p->stable->hash = p->hash;
}

#define COMPARED_AT_ONCE 32 /* pages: a grace period waits no longer */

static int plan_inspect(struct change *c)
{
	struct plan *pl = container_of(c, struct plan, c);
	struct run *r = pl->r;
	int err = 0;

	for (unsigned i = r->first; err == 0 && i < r->end;) {
		unsigned end = MIN(i + COMPARED_AT_ONCE, r->end);

		rcu_enter();
		if (!side_stands(&pl->from) || !side_stands(&pl->into))
			err = -EAGAIN;
		for (; err == 0 && i < end; i++) {
			if (i + 1 < r->end)
				page_prefetch(pl->h->pool, &r->page[i + 1]);
			if (r->page[i].live)
				page_compare(pl, &r->page[i]);
		}
		rcu_leave();
	}
	return err ? err : run_lives(r) ? 0 : -EAGAIN;
}

static void plan_lock(struct change *c)
{
	struct plan *pl = container_of(c, struct plan, c);

	for (unsigned i = 0; i < pl->locks; i++)
		lock_take(pl->lock[i]);
}

static void plan_unlock(struct change *c)
{
	struct plan *pl = container_of(c, struct plan, c);

	for (unsigned i = pl->locks; i-- > 0;)
		lock_drop(pl->lock[i]);
}

/* The scanned guest's own no, and memory that is being unmapped, are news: no reason to leave the page alone for long. */
static enum run_result refusal(const struct plan *pl, const struct side *s, const struct place *at, const struct region *reg)
{
	if (s->into)
		return RUN_DIFFERS;
	return reg && at->mm != pl->r->mm ? RUN_REFUSED : RUN_RACED;
}

/* Counts the entries that map each page's frame; a page that somebody does not let be merged is let go. */
static void place_count(struct plan *pl, const struct side *s, const struct place *at)
{
	const struct region *reg = NULL;

	for_each_page(p, s, pl->r) {
		unsigned i = page_at(s, pl->r, p);
		gfn_t gfn = gfn_add(s->base, i);

		if (!entry_maps(entry_load(&at->slot[i]), page_pfn(s, p)))
			continue;
		if (!reg || gfn.v < reg->start.v || gfn.v >= reg->start.v + reg->npages)
			reg = mm_region(at->mm, gfn);
		if (!reg || !(reg->flags & KAGE_REGION_MERGEABLE))
			page_drop(p, refusal(pl, s, at, reg));
		p->slots += !at->again;
		if (!s->into)
			p->guests++;
	}
}

/* Every entry that a frame counts is in one of the places, and nothing else holds it where it is. */
static void side_recheck(struct plan *pl, const struct side *s)
{
	for_each_page(p, s, pl->r) {
		p->slots = 0;
		if (!s->into)
			p->guests = 0;
	}
	rcu_enter();
	for (unsigned i = 0; i < s->count; i++)
		place_count(pl, s, &s->place[i]);
	rcu_leave();
	for_each_page(p, s, pl->r) {
		pfn_t pfn = page_pfn(s, p);
		struct frame *f = pfn_frame(pl->h->pool, pfn);

		if (p->slots == 0 || frame_kind(f) == FRAME_STABLE || frame_pins(f) || atomic_load(&f->refs) != p->slots ||
		    frame_in_block(pl->h, pfn))
			page_drop(p, RUN_RACED);
	}
}

static int plan_recheck(struct change *c)
{
	struct plan *pl = container_of(c, struct plan, c);
	bool stands;

	rcu_enter();
	stands = side_stands(&pl->from) && side_stands(&pl->into);
	rcu_leave();
	if (!stands)
		return -EAGAIN;
	side_recheck(pl, &pl->from);
	side_recheck(pl, &pl->into);
	return run_lives(pl->r) ? 0 : -EAGAIN;
}

/* -- commit ---------------------------------------------------------------------------------- */

static void commit_fresh(struct plan *pl)
{
	const struct side *s = &pl->into;

	for (unsigned i = 0; i < s->count; i++) {
		for_each_page(p, s, pl->r) {
			entry_t *slot = &s->place[i].slot[p->at], e = entry_load(slot);

			if (e & ENTRY_W && entry_maps(e, p->into))
				entry_store(slot, e & ~ENTRY_W);
		}
	}
}

/*
 * Frames become stable, chains learn of their new places. The page that a frame was found at may be in this very run (another
 * thread made the frame a candidate meanwhile, through a clone), before or behind the one that comes to it. So all chains learn of
 * the pages first, while the frames still say whose they are; and each frame has a reference for the entry that
 * comes, since the page may leave it before, with the last one.
 */
static void commit_stable(struct plan *pl)
{
	struct host *h = pl->h;

	lock_take(&h->stable);
	for_each_page(p, &pl->from, pl->r)
		if (p->to != RUN_ZERO)
			stable_chain(p->stable, rmap_where(h, p->from));
	for_each_page(p, &pl->from, pl->r) {
		uint64_t where;

		if (p->to != RUN_FRESH)
			continue;
		where = rmap_where(h, p->into);
		stable_publish(h, p->stable, p->into);
		atomic_fetch_add_explicit(&pfn_frame(h->pool, p->into)->refs, 1, memory_order_relaxed);
		stable_chain(p->stable, where);
		candidate_unmark(&pl->m->candidates, pfn_frame(h->pool, p->into));
	}
	lock_drop(&h->stable);
}

/* The entries are where the chains say (S5 of mm/stable.h). */
static void commit_chained(struct plan *pl)
{
	lock_take(&pl->h->stable);
	for_each_page(p, &pl->from, pl->r)
		if (p->to != RUN_ZERO)
			p->stable->promised--;
	lock_drop(&pl->h->stable);
}

static void commit_entry(struct plan *pl, struct run_page *p, entry_t *slot)
{
	struct host *h = pl->h;
	bool zero = p->to == RUN_ZERO;

	/* the reference of stable_get(), or of commit_stable(), becomes the first entry's */
	if (!zero && p->result == RUN_MERGED)
		atomic_fetch_add_explicit(&pfn_frame(h->pool, p->into)->refs, 1, memory_order_relaxed);
	p->result = RUN_MERGED;
	entry_store(slot, entry_leaf(p->into, zero ? ENTRY_SPECIAL : 0));
	frame_drop(h, p->from, &pl->c.dead);
}

static void plan_commit(struct change *c)
{
	struct plan *pl = container_of(c, struct plan, c);

	commit_fresh(pl);
	commit_stable(pl);
	for (unsigned i = 0; i < pl->from.count; i++) {
		const struct place *at = &pl->from.place[i];

		for_each_page(p, &pl->from, pl->r) {
			entry_t *slot = &at->slot[p - pl->r->page];

			if (!at->again && entry_maps(entry_load(slot), p->from))
				commit_entry(pl, p, slot);
		}
	}
	commit_chained(pl);
}

static const struct change_ops plan_ops = {
	.prepare = plan_prepare, .diverged = plan_diverged, .inspect = plan_inspect, .lock = plan_lock,
	.recheck = plan_recheck, .commit = plan_commit, .unlock = plan_unlock,
};

/* -- after it ---------------------------------------------------------------------------------- */

/* Of a target's range, what the host kernel has made private. mm->range held. */
static void target_diverged(const struct change_target *t, uint64_t map[BLOCK_PAGES / 64])
{
	gfn_t base = GFN(ALIGN_DOWN(t->notify.start.v, BLOCK_PAGES));
	unsigned n = (unsigned)(t->notify.end.v - t->notify.start.v);
	uint64_t found[BLOCK_PAGES / 64];

	t->mm->mirror->ops->diverged(t->mm->mirror, t->notify.start, n, found);
	for (unsigned i = 0; i < n; i++) {
		uint64_t at = t->notify.start.v - base.v + i;

		if (bit_test(found, i) && mm_region(t->mm, gfn_add(base, at)))
			bit_set(map, at);
	}
}

static int plan_adopt(struct plan *pl)
{
	int r = 0;

	for (unsigned i = 0; r == 0 && i < pl->c.targets; i++) {
		const struct change_target *t = &pl->c.target[i];
		gfn_t base = GFN(ALIGN_DOWN(t->notify.start.v, BLOCK_PAGES));
		struct brlock_held held = brlock_read(&t->mm->range);
		uint64_t map[BLOCK_PAGES / 64] = { 0 }, any = 0;

		if (t->mm->mirror)
			target_diverged(t, map);
		for (unsigned w = 0; w < BLOCK_PAGES / 64; w++)
			any |= map[w];
		if (any)
			r = mm_adopt(t->mm, base, map, NULL, NULL);
		brlock_read_drop(&t->mm->range, held);
		r = r == -ENOMEM ? r : 0;
	}
	return r;
}

/* Counts what was merged; gives back what pages that were not had been promised. */
static void run_finish(struct plan *pl, int r)
{
	struct run *run = pl->r;
	struct mm *mm = pl->c.targets ? pl->from.place[0].mm : NULL;
	uint64_t moved = 0;

	for (unsigned i = run->first; i < run->end; i++) {
		struct run_page *p = &run->page[i];
		bool merged = p->to != RUN_NONE && p->live && r == 0;

		if (merged) {
			moved += pl->from.mirrored + (p->to == RUN_FRESH ? pl->into.mirrored : 0);
			mm_count(mm, ksm_merges);
			if (p->to == RUN_ZERO)
				mm_count_add(mm, ksm_zero_pages, p->guests);
			trace(pl->h->env, merge, mm->id, run->base.v + i, p->to == RUN_ZERO);
			continue;
		}
		if (p->live)
			p->result = RUN_RACED;
		if (p->to == RUN_FRESH)
			stable_free(pl->h, p->stable);
		else if (p->to == RUN_STABLE && p->promised)
			stable_give_up(pl->h, p->stable);
	}
	add_relaxed(&pl->m->moved, moved);
}

int merge_run(struct merge *m, struct run *run)
{
	struct plan pl = {
		.c = { .ops = &plan_ops, .reason = KAGE_REASON_CLEAR,
		       .flags = KAGE_RANGE_SAME_CONTENT | KAGE_RANGE_OPTIONAL },
		.m = m, .h = m->host, .r = run,
		.from = { .family = run->family, .base = run->base },
		.into = { .into = true, .family = run->fresh ? run->into_family : NULL,
			  .base = where_index(run->into << LEVEL_BITS) },
	};
	struct env *env = m->host->env;
	int r;

	for (unsigned i = run->first; i < run->end; i++) {
		run->page[i].live = run->page[i].to != RUN_NONE;
		run->page[i].result = RUN_RACED;
		run->page[i].promised = false;
	}
	r = change_run(&pl.c);
	if (pl.locked)
		lock_drop(&m->mirrors);
	run_finish(&pl, r);
	if (pl.stale && r != -ENOMEM) {
		int err = plan_adopt(&pl);

		r = err ? err : r;
	}
	env_free(env, pl.c.target, pl.room * sizeof(*pl.c.target));
	env_free(env, pl.from.place, pl.from.room * sizeof(*pl.from.place));
	env_free(env, pl.into.place, pl.into.room * sizeof(*pl.into.place));
	return r == -ENOMEM ? r : 0;
}
