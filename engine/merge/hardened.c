/* SPDX-License-Identifier: MIT */
/*
 * Merging for tenants that must not learn of each other: what becomes of a quiet
 * page in a hardened domain (mm/fused.h says why, and has invariants H1 to H6).
 *
 * Each page that is looked at is fused, whether its contents occur once or a
 * thousand times: its entries map a stable frame that was drawn at random, and
 * trap. A content that occurs once is a stable frame with one user, so there are no
 * candidates here, and it makes no difference to anybody but this file whether a page has
 * found its like. A block entry is split because one of its pages is quiet, not because of what
 * is in it.
 *
 *      fusing                               vCPU of the guest
 *      start: no translation is left        waits for the end of the change, or has written before
 *      copies, or compares
 *      lock; entries become fused
 *      end                                  any access: mm_fault(), cow_break() from the new frame
 *
 * Invariants:
 *  J1  of a change's outcomes all but "raced" leave the page fused: there is none that depends on contents.
 *  J2  the frame that a guest wrote to is given up, also by the first of equals.
 *
 * Locks taken: the level-0 lock of the page; host->stable; those of the funnel.
 *
 * Two threads that step at once and meet equal pages at the same moment leave two frames: fused pages are not looked
 * at again before somebody has accessed them.
 *
 * Why not in plan.c: that merges frames where they are, in runs; here every frame comes
 * from the reserve, one by one.
 */
#include "base/guest.h"
#include "merge/hardened.h"
#include "mm/change.h"
#include "mm/fused.h"
#include "mm/layer.h"
#include "mm/rmap.h"
#include "mm/stable.h"

/* An entry that maps the frame. */
struct spot {
	struct mm *mm;
	entry_t *slot;
	pfn_t table;
	bool again; /* the same slot as an earlier spot: another mm that reaches it */
};

struct fuse {
	struct change c;
	struct host *h;
	struct tenant *tenant;
	struct family *family;
	gfn_t gfn;
	pfn_t from, into;
	struct stable *stable;
	bool fresh; /* `into` was drawn and `stable` made for it */
	bool promised; /* room in the chain of `stable` */
	unsigned notes; /* room to note so many entries (H6 of mm/fused.h) */
	struct spot *spot;
	unsigned count, room;
	struct table_locked lock;
};

/* -- where the frame is mapped -------------------------------------------------- */

static int spot_add(struct fuse *f, const struct spot *s)
{
	struct env *env = f->h->env;

	if (f->count == f->room) {
		unsigned room = f->room ? 2 * f->room : 4;
		struct spot *more = env_alloc(env, room * sizeof(*more));

		if (!more)
			return -ENOMEM;
		if (f->count)
			memcpy(more, f->spot, f->count * sizeof(*more));
		env_free(env, f->spot, f->room * sizeof(*more));
		f->spot = more;
		f->room = room;
	}
	f->spot[f->count++] = *s;
	return 0;
}

static bool maps(entry_t e, unsigned level, gfn_t gfn, pfn_t pfn)
{
	return entry_is_leaf(e) && !(e & ENTRY_SPECIAL) &&
	       entry_pfn(e).v + (gfn.v & (level_pages(level) - 1)) == pfn.v;
}

static int spot_of_mm(struct mm *mm, void *arg)
{
	struct fuse *f = arg;
	struct spot s = { .mm = mm };
	unsigned level = 0;
	bool found;
	int r = 0;

	do {
		rcu_enter();
		s.table = table_holding(mm, f->gfn, &s.slot, &level);
		found = !pfn_is_none(s.table) && maps(entry_load(s.slot), level, f->gfn, f->from);
		if (found && level > 0)
			r = table_split(mm, s.slot, level, GFN(ALIGN_DOWN(f->gfn.v, level_pages(level))));
		rcu_leave();
	} while (found && level > 0 && r == 0);
	if (!found || r)
		return r;
	for (unsigned i = 0; i < f->count; i++)
		s.again |= f->spot[i].slot == s.slot;
	return spot_add(f, &s);
}

/* The spots are those below the frame's layer; -EAGAIN: it is not, or no longer, a frame of this page. */
static int spots_find(struct fuse *f)
{
	struct host *h = f->h;
	struct layer *l = NULL;

	rcu_enter();
	if (frame_listed(h, f->from)) {
		uint64_t where = rmap_where(h, f->from);

		if (where_index(where).v == f->gfn.v)
			l = layer_find(h, where_owner(where));
	}
	rcu_leave();
	return l && l->family == f->family ? layer_each_mm(l, spot_of_mm, f) : -EAGAIN;
}

/* -- the change -------------------------------------------------------------------- */

static int notes_have(struct fuse *f)
{
	unsigned n = 0;
	int r;

	for (unsigned i = 0; i < f->count; i++)
		n += !f->spot[i].again;
	r = notes_promise(f->tenant->reserve, n);
	f->notes = r ? 0 : n;
	return r;
}

static int fuse_prepare(struct change *c)
{
	struct fuse *f = container_of(c, struct fuse, c);
	int r = spots_find(f);

	if (r == 0)
		r = f->count ? notes_have(f) : -EAGAIN;
	if (r)
		return r;
	if (f->stable) {
		r = stable_promise(f->h, f->stable);
		f->promised = r == 0;
	} else {
		f->fresh = true;
		f->stable = stable_alloc(f->h, f->tenant->id, 0);
		if (f->stable)
			f->stable->fused = true;
		r = f->stable ? reserve_draw(f->tenant->reserve, false, &f->into) : -ENOMEM;
	}
	if (r)
		return r;
	c->targets = f->count;
	c->target = env_alloc(f->h->env, f->count * sizeof(*c->target));
	if (!c->target)
		return -ENOMEM;
	for (unsigned i = 0; i < f->count; i++)
		c->target[i] = (struct change_target){
			.mm = f->spot[i].mm, .notify = { .start = f->gfn, .end = gfn_add(f->gfn, 1) },
		};
	return 0;
}

/* The spot is still where its mm's walk ends, and maps the frame. Inside a read section. */
static bool spot_holds(const struct fuse *f, const struct spot *s)
{
	unsigned level;
	entry_t *slot;
	pfn_t table = table_holding(s->mm, f->gfn, &slot, &level);

	return pfn_eq(table, s->table) && slot == s->slot && maps(entry_load(slot), level, f->gfn, f->from);
}

/* Before contents are read (X3 of mm/access.c): no pin begins before the end, and what one stored is seen. */
static bool fuse_pinned(const struct fuse *f)
{
	bool pinned = frame_pins(pfn_frame(f->h->pool, f->from)) != 0;

	atomic_thread_fence(memory_order_acquire);
	return pinned;
}

/* Nobody writes the frame: a copy is what the page holds, and a comparison final. */
static int fuse_inspect(struct change *c)
{
	struct fuse *f = container_of(c, struct fuse, c);
	void *from = pfn_hva(f->h->pool, f->from), *into = pfn_hva(f->h->pool, f->into);
	int r = -EAGAIN;

	rcu_enter();
	if (spot_holds(f, &f->spot[0]) && !fuse_pinned(f)) {
		r = 0;
		if (f->fresh) {
			guest_copy_page(into, from);
			f->stable->hash = page_hash(f->tenant, into);
		} else if (guest_compare(from, into, PAGE_SIZE)) {
			r = -EILSEQ;
		}
		fused_was_read(f->h->pool, f->into);
	}
	rcu_leave();
	return r;
}

static void fuse_lock(struct change *c)
{
	struct fuse *f = container_of(c, struct fuse, c);

	f->lock = table_lock(f->family, 0, f->gfn);
}

static void fuse_unlock(struct change *c)
{
	table_unlock(container_of(c, struct fuse, c)->lock);
}

/* The spots are all entries that the frame counts, everybody lets it be merged, and nobody has pinned it. */
static int fuse_recheck(struct change *c)
{
	struct fuse *f = container_of(c, struct fuse, c);
	struct frame *frame = pfn_frame(f->h->pool, f->from);
	unsigned slots = 0;
	bool holds = true;

	rcu_enter();
	for (unsigned i = 0; holds && i < f->count; i++) {
		const struct region *r = mm_region(f->spot[i].mm, f->gfn);

		holds = r && r->flags & KAGE_REGION_MERGEABLE && spot_holds(f, &f->spot[i]);
		slots += !f->spot[i].again;
	}
	rcu_leave();
	holds = holds && frame_kind(frame) != FRAME_STABLE && frame_pins(frame) == 0 &&
		atomic_load(&frame->refs) == slots && !frame_in_block(f->h, f->from);
	return holds ? 0 : -EAGAIN;
}

static void fuse_commit(struct change *c)
{
	struct fuse *f = container_of(c, struct fuse, c);
	struct frame *into = pfn_frame(f->h->pool, f->into);
	uint64_t where = rmap_where(f->h, f->from);
	bool first = true; /* the frame comes with a reference, drawn or from stable_get() */

	lock_take(&f->h->stable);
	if (f->fresh)
		stable_publish(f->h, f->stable, f->into);
	stable_chain(f->stable, where);
	lock_drop(&f->h->stable);
	for (unsigned i = 0; i < f->count; i++) {
		if (f->spot[i].again)
			continue;
		if (!first)
			atomic_fetch_add_explicit(&into->refs, 1, memory_order_relaxed);
		first = false;
		entry_store(f->spot[i].slot, entry_fused(f->into));
		frame_drop(f->h, f->from, &c->dead);
	}
	stable_give_up(f->h, f->stable);
}

static void fuse_cancel(struct change *c)
{
	struct fuse *f = container_of(c, struct fuse, c);

	if (f->notes)
		notes_give_up(f->tenant->reserve, f->notes);
	if (f->promised)
		stable_give_up(f->h, f->stable);
	if (!f->fresh)
		return;
	stable_free(f->h, f->stable);
	if (!pfn_is_none(f->into))
		arena_free(f->h->pool, f->into);
}

static const struct change_ops fuse_ops = {
	.prepare = fuse_prepare, .inspect = fuse_inspect, .lock = fuse_lock, .recheck = fuse_recheck,
	.commit = fuse_commit, .unlock = fuse_unlock, .cancel = fuse_cancel,
};

/* `s`: an equal stable frame, with a reference that is consumed on success; NULL: a frame is drawn. */
static int fuse(struct mm *mm, gfn_t gfn, pfn_t pfn, struct stable *s)
{
	struct host *h = mm->host;
	struct fuse f = {
		.c = { .ops = &fuse_ops, .reason = KAGE_REASON_CLEAR,
		       .flags = KAGE_RANGE_SAME_CONTENT | KAGE_RANGE_OPTIONAL },
		.h = h, .tenant = mm->family->tenant, .family = mm->family, .gfn = gfn, .from = pfn,
		.into = s ? s->pfn : PFN_NONE, .stable = s,
	};
	int r = change_run(&f.c);

	if (r == 0 && s) {
		mm_count(f.spot[0].mm, ksm_merges);
		trace(h->env, merge, f.spot[0].mm->id, gfn.v, 0);
	}
	env_free(h->env, f.c.target, f.c.targets * sizeof(*f.c.target));
	env_free(h->env, f.spot, f.room * sizeof(*f.spot));
	return r;
}

/* -- pages ----------------------------------------------------------------------------- */

/* -EILSEQ: no stable frame has these contents and room. */
static int fuse_with_equal(struct scanner *s, gfn_t gfn, const struct look *l)
{
	struct host *h = s->m->host;
	struct stable *equal = stable_get(h, s->mm->domain, l->hash, s->m->max_sharing);
	int r;

	if (!equal)
		return -EILSEQ;
	if (stable_is_stale(h, equal))
		stable_prune(h, equal, pair_keeps);
	r = fuse(s->mm, gfn, l->pfn, equal);
	if (r)
		stable_put(h, equal);
	else
		s->merged++;
	return r;
}

static bool fuse_page(struct scanner *s, const struct look *l)
{
	gfn_t gfn = gfn_add(s->base, l->at);
	int r;

	if (!reserve_ready(s->mm->family->tenant->reserve))
		return false; /* upkeep has told the log, or goes on in the next step */
	r = fuse_with_equal(s, gfn, l);
	if (r == -EILSEQ)
		r = fuse(s->mm, gfn, l->pfn, NULL);
	return r == 0;
}

void hardened_group(struct scanner *s)
{
	struct look l[LOOKS];
	unsigned n;

	while ((n = look_some(s, l)) > 0)
		for (unsigned i = 0; i < n; i++)
			if (l[i].what == LOOK_LATER || (l[i].what == LOOK_HASHED && !fuse_page(s, &l[i])))
				bit_set(s->later, l[i].at);
}
