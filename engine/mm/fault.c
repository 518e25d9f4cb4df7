/* SPDX-License-Identifier: MIT */
/*
 * The one fault path of the primary MMU: first touch, COW break, reuse.
 *
 *   lookup ── leaf, access allowed ─────────────────────────────► done
 *     │         └─ leaf, write, no effective W ─► fault_write: own the path, then
 *     │               exclusive        set W (no secondary MMU caches a W here)
 *     │               block            split, again
 *     │               shared           cow_break through the change funnel
 *     │               fused            cow_break, whatever the access: mm/fused.h
 *     └─ none ─► fault_fill: home block, home page, arena page, device page
 *
 * Invariants:
 *  A1  mm->range is held for reading from walk to commit: no clone, no change of
 *      regions, no destroy in between. So an effective W stays, and exclusive
 *      tables stay where they are.
 *      Under a mirror, instead of all below the lookup: mm_adopt() (mirror.c).
 *
 *  A2  the source of a COW break does not change while it is copied: our entry
 *      maps it without W and keeps its reference; only this guest could find it
 *      exclusive and set W, and then the recheck sees another entry.
 *
 *      vCPU 1 (break)                     vCPU 2 (same guest, same page)
 *      copies from f
 *                                         the other sharer is gone: refs == 1,
 *                                         sets W in the entry, writes to f
 *      lock; entry != old: -EAGAIN
 *      drops its copy, looks again
 *
 * Locks taken: mm->range for reading, table locks, those of the funnel.
 */
#include "base/guest.h"
#include "mm/change.h"
#include "mm/fused.h"
#include "mm/mirror.h"
#include "mm/region.h"
#include "mm/layer.h"
#include "mm/stable.h"

/* Inner outcome: look again. Never leaves this file. */
#define FAULT_AGAIN 1000

/* -- COW break ----------------------------------------------------------------- */

struct cow {
	struct change c;
	struct change_target target;
	gfn_t gfn;
	entry_t *slot;
	entry_t old;
	bool merged; /* `old` was */
	pfn_t copy;
	struct table_locked lock;
};

static int cow_prepare(struct change *c)
{
	struct cow *w = container_of(c, struct cow, c);
	struct mm *mm = w->target.mm;
	struct pool *pool = mm->host->pool;
	pfn_t from = entry_pfn(w->old);
	bool hole = pfn_is_zero(from), fused = entry_is_fused(w->old);
	pfn_t copy;
	int r = fused ? fused_frame(mm, w->gfn, &copy) : layer_frame(mm, w->gfn, hole ? ARENA_ZERO : 0, &copy);

	if (r)
		return r;
	w->copy = copy;
	if (hole)
		return 0;
	rcu_enter(); /* a frame that the entry still has now stays readable, even if merging takes it away meanwhile */
	if (entry_load(w->slot) == w->old)
		guest_copy_page(pfn_hva(pool, copy), pfn_hva(pool, from));
	else
		r = -EAGAIN;
	if (fused)
		fused_was_read(pool, from);
	rcu_leave();
	return r;
}

static void cow_lock(struct change *c)
{
	struct cow *w = container_of(c, struct cow, c);

	w->lock = table_lock(w->target.mm->family, 0, w->gfn);
}

static void cow_unlock(struct change *c)
{
	table_unlock(container_of(c, struct cow, c)->lock);
}

static int cow_recheck(struct change *c)
{
	struct cow *w = container_of(c, struct cow, c);

	return entry_load(w->slot) == w->old ? 0 : -EAGAIN;
}

static void cow_commit(struct change *c)
{
	struct cow *w = container_of(c, struct cow, c);
	struct host *h = w->target.mm->host;

	w->merged = entry_merged(h->pool, w->old);
	entry_store(w->slot, entry_leaf(w->copy, ENTRY_W));
	if (entry_is_fused(w->old))
		fused_gone(w->target.mm->family->tenant, entry_pfn(w->old));
	else if (!(w->old & ENTRY_SPECIAL))
		frame_drop(h, entry_pfn(w->old), &c->dead);
}

static void cow_cancel(struct change *c)
{
	struct cow *w = container_of(c, struct cow, c);

	if (!pfn_is_none(w->copy))
		arena_free(w->target.mm->host->pool, w->copy);
}

static const struct change_ops cow_ops = {
	.prepare = cow_prepare, .lock = cow_lock, .recheck = cow_recheck,
	.commit = cow_commit, .unlock = cow_unlock, .cancel = cow_cancel,
};

static int cow_break(struct mm *mm, struct mm_fault *f, struct cursor *c)
{
	struct cow w = {
		.c = { .ops = &cow_ops, .targets = 1, .reason = KAGE_REASON_CLEAR,
		       .flags = KAGE_RANGE_SAME_CONTENT, .owner = f->owner, .self = f->reader },
		.target = { .mm = mm, .notify = { .start = f->gfn, .end = gfn_add(f->gfn, 1) } },
		.gfn = f->gfn, .slot = c->slot, .old = c->entry, .copy = PFN_NONE,
	};
	int r;

	w.c.target = &w.target;
	r = change_run(&w.c);
	if (r == -EAGAIN)
		return FAULT_AGAIN;
	if (r)
		return r;
	if (!(f->access & KAGE_WRITE))
		mm_mark_changed(mm, f->gfn, 1); /* as it was, but in a frame that merging has not seen */
	mm_count(mm, cow_breaks);
	mm_count_add(mm, ksm_cow_breaks, w.merged);
	trace(mm->host->env, cow_break, mm->id, f->gfn.v, 0);
	f->pfn = w.copy;
	f->level = 0;
	return KAGE_OK;
}

/* -- a write, or a claim to exclusive use, to an entry without effective W ----------- */

static bool leaf_reusable(struct mm *mm, entry_t e, unsigned level, gfn_t gfn, const struct region *reg)
{
	if (e & ENTRY_SPECIAL)
		return reg->kind == KAGE_REGION_FOREIGN;
	if (level == 0)
		return frame_exclusive(mm->host, entry_pfn(e));
	return level == 1 && block_exclusive(mm, entry_pfn(e), gfn);
}

/* The path above is exclusive: if what the entry maps is so too, W says so from now on. */
static int fault_reuse(struct mm *mm, struct mm_fault *f, const struct region *reg, struct cursor *c)
{
	struct table_locked w = table_lock(mm->family, c->level, f->gfn);
	entry_t e = entry_load(c->slot);
	int r = FAULT_AGAIN;

	if (e == c->entry && leaf_reusable(mm, e, c->level, f->gfn, reg)) {
		entry_store(c->slot, e | ENTRY_W);
		r = KAGE_OK;
	} else if (e == c->entry) {
		r = KAGE_RETRY; /* shared */
	}
	table_unlock(w);
	if (r == KAGE_OK) {
		f->pfn = pfn_add(entry_pfn(e), f->gfn.v & (level_pages(c->level) - 1));
		f->level = c->level;
		mm_count(mm, cow_reused);
		trace(mm->host->env, cow_reuse, mm->id, f->gfn.v, 0);
	}
	return r;
}

static int fault_write(struct mm *mm, struct mm_fault *f, const struct region *reg)
{
	struct cursor c;
	int r = table_own(mm, f->gfn, 0, false, &c);

	if (r)
		return r;
	if (!entry_is_leaf(c.entry))
		return FAULT_AGAIN;
	if (c.entry & ENTRY_W) { /* another thread was faster, or the path was all that was shared */
		f->pfn = pfn_add(entry_pfn(c.entry), f->gfn.v & (level_pages(c.level) - 1));
		f->level = c.level;
		return KAGE_OK;
	}
	if (entry_is_fused(c.entry)) /* H3: whose the frame is, is not looked at */
		return cow_break(mm, f, &c);
	r = fault_reuse(mm, f, reg, &c);
	if (r != KAGE_RETRY)
		return r;
	if (c.level == 0)
		return cow_break(mm, f, &c);
	r = table_split(mm, c.slot, c.level, GFN(ALIGN_DOWN(f->gfn.v, level_pages(c.level))));
	return r ? r : FAULT_AGAIN;
}

/* -- first touch ----------------------------------------------------------------------- */

/* What an entry of this level maps around gfn lies inside the region. */
static bool level_inside(const struct region *r, gfn_t gfn, unsigned level)
{
	uint64_t first = ALIGN_DOWN(gfn.v, level_pages(level));

	return first >= r->start.v && first + level_pages(level) <= region_end(r).v;
}

/* Entries of this level may map the neighbourhood of gfn: inside the region, lined up with its extent. */
static bool level_fits(struct mm *mm, const struct region *r, gfn_t gfn, unsigned level)
{
	uint64_t n = level_pages(level);
	uint64_t first = ALIGN_DOWN(gfn.v, n);
	struct extent *e = load_acquire(&((struct region *)r)->extent);

	if (level == 0)
		return true;
	if (r->flags & (KAGE_REGION_NOHUGE | KAGE_REGION_TRAP) || !level_inside(r, gfn, level) ||
	    level > root_level(atomic_load(&mm->root)))
		return false;
	if (r->kind == KAGE_REGION_ANON && mm->host->limited)
		return false;
	if (!e)
		return true; /* a home that is yet to come will line up */
	return (extent_pfn(e, GFN(first)).v & (n - 1)) == 0 && first >= e->gfn.v &&
	       first + n <= e->gfn.v + e->npages;
}

/* Puts an entry into an empty slot. FAULT_AGAIN: it is not empty (any more), or this home is taken. */
static int fill_home(struct mm *mm, struct mm_fault *f, const struct region *reg, struct cursor *c)
{
	gfn_t first = GFN(ALIGN_DOWN(f->gfn.v, level_pages(c->level)));
	struct extent *e = region_home(mm, reg);
	struct table_locked w;
	pfn_t pfn;
	int r = e ? pool_charge(mm->host->pool, level_pages(c->level), 0) : -ENOMEM;

	if (r)
		return r;
	pfn = extent_pfn(e, first);
	r = FAULT_AGAIN;
	w = table_lock(mm->family, c->level, first);
	if (entry_is_none(entry_load(c->slot)) && home_claim(mm->host, e, pfn, c->level)) {
		entry_store(c->slot, entry_leaf(pfn, ENTRY_W));
		r = KAGE_OK;
	}
	table_unlock(w);
	if (r)
		pool_uncharge(mm->host->pool, level_pages(c->level));
	f->pfn = pfn_add(pfn, f->gfn.v - first.v);
	f->level = c->level;
	return r;
}

/* The common arena: trapped first touches, and slots whose home is gone. */
static int fill_arena(struct mm *mm, struct mm_fault *f, const struct region *reg, struct cursor *c)
{
	struct pool *pool = mm->host->pool;
	struct table_locked w;
	pfn_t pfn;
	int r = layer_frame(mm, f->gfn, ARENA_ZERO, &pfn);

	if (r)
		return r;
	if (reg->flags & KAGE_REGION_TRAP) {
		r = region_touch(mm, reg, f->gfn, pfn);
		if (r)
			goto free;
	}
	r = FAULT_AGAIN;
	w = table_lock(mm->family, 0, f->gfn);
	if (entry_is_none(entry_load(c->slot))) {
		entry_store(c->slot, entry_leaf(pfn, ENTRY_W));
		r = KAGE_OK;
	}
	table_unlock(w);
	if (r == KAGE_OK) {
		if (reg->touch)
			mm_mark_changed(mm, f->gfn, 1); /* merging has not seen these contents */
		f->pfn = pfn;
		f->level = 0;
		return r;
	}
free:
	arena_free(pool, pfn);
	return r;
}

static int fill_device(struct mm *mm, struct mm_fault *f, const struct region *reg, struct cursor *c)
{
	gfn_t first = GFN(ALIGN_DOWN(f->gfn.v, level_pages(c->level)));
	entry_t w = reg->kind == KAGE_REGION_FOREIGN ? ENTRY_W : 0;
	pfn_t pfn = extent_pfn(atomic_load(&((struct region *)reg)->extent), first);
	struct table_locked lock = table_lock(mm->family, c->level, first);
	int r = FAULT_AGAIN;

	if (entry_is_none(entry_load(c->slot))) {
		entry_store(c->slot, entry_leaf(pfn, ENTRY_SPECIAL | w));
		r = KAGE_OK;
	}
	table_unlock(lock);
	f->pfn = pfn_add(pfn, f->gfn.v - first.v);
	f->level = c->level;
	return r;
}

static int fault_fill(struct mm *mm, struct mm_fault *f, const struct region *reg)
{
	bool device = reg->kind != KAGE_REGION_ANON;

	for (unsigned level = 3; level-- > 0;) {
		struct cursor c;
		int r;

		if (!level_fits(mm, reg, f->gfn, level))
			continue;
		r = table_own(mm, f->gfn, level, true, &c);
		if (r)
			return r;
		if (c.level != level || entry_is_leaf(c.entry))
			return FAULT_AGAIN; /* filled meanwhile */
		if (!entry_is_none(c.entry))
			continue;
		if (device)
			r = fill_device(mm, f, reg, &c);
		else if (reg->flags & KAGE_REGION_TRAP)
			r = fill_arena(mm, f, reg, &c);
		else
			r = fill_home(mm, f, reg, &c);
		if (r == FAULT_AGAIN && !device && level == 0 && !(reg->flags & KAGE_REGION_TRAP))
			r = fill_arena(mm, f, reg, &c);
		if (level == 0 || (r != FAULT_AGAIN && r != -ENOMEM))
			return r;
	}
	return FAULT_AGAIN;
}

int mm_fill(struct mm *mm, gfn_t start, gfn_t end)
{
	while (start.v < end.v) {
		const struct region *reg = mm_region(mm, start);
		struct mm_lookup l = mm_lookup(mm, start);
		struct mm_fault f = { .gfn = start };
		unsigned level = reg && entry_is_none(l.entry) ? 3 : 0;
		struct cursor c;
		int r = FAULT_AGAIN;

		if (!reg)
			return -ENOENT;
		if (reg->kind != KAGE_REGION_ANON || reg->flags & KAGE_REGION_TRAP) {
			start = region_end(reg);
			continue;
		}
		while (r == FAULT_AGAIN && level-- > 0) {
			if (!level_fits(mm, reg, start, level) || start.v % level_pages(level) ||
			    end.v - start.v < level_pages(level))
				continue;
			r = table_own(mm, start, level, true, &c);
			if (r == 0)
				r = c.level == level && entry_is_none(c.entry) ? fill_home(mm, &f, reg, &c) : FAULT_AGAIN;
		}
		if (r != KAGE_OK && r != FAULT_AGAIN)
			return r;
		if (r == FAULT_AGAIN) /* there is something, or its home is taken */
			level = entry_is_leaf(l.entry) ? l.level : 0;
		start = GFN(ALIGN_DOWN(start.v, level_pages(level)) + level_pages(level));
	}
	return 0;
}

/* -- entry ------------------------------------------------------------------------------- */

static int fault_finish(struct mm *mm, struct mm_fault *f, const struct region *reg, bool writable)
{
	f->prot = reg->prot;
	/* a block may reach over the end of a region since protect has split it: there are other rights beyond */
	while (f->level > 0 && !level_inside(reg, f->gfn, f->level))
		f->level--;
	if (!writable)
		f->prot &= ~(uint32_t)KAGE_WRITE;
	f->foreign = reg->kind == KAGE_REGION_FOREIGN || mm->mirror;
	f->zero = pfn_is_zero(f->pfn);
	if (f->access & KAGE_WRITE && !f->logged)
		mm_mark_dirty(mm, f->gfn, 1);
	return KAGE_OK;
}

/*
 * A mirrored guest gets pages of its own by adoption. Under native policy that goes for
 * reads as well: a frame that others share is not kept in step with the window.
 */
static bool fault_adopts(const struct mm *mm, const struct region *reg)
{
	return mm->mirror && reg->kind != KAGE_REGION_FOREIGN;
}

/* `exclusive`: for a write, or as good as one. */
static bool fault_is_spurious(const struct mm_lookup *l, bool exclusive)
{
	return entry_is_leaf(l->entry) && (l->writable || (!exclusive && !entry_is_fused(l->entry)));
}

/*
 * A walk without a lock may end in a table that was shared when it came by, and that a relative has had to itself since:
 * what is read there then is the relative's. Who may write to a table sees that nobody shares it, after the others have
 * stored their way to a copy; so who read such a write (entry_load() acquires) finds another way now.
 */
static bool lookup_stands(const struct mm *mm, gfn_t gfn, const struct mm_lookup *l)
{
	struct mm_lookup now;

	if (l->writable)
		return true;
	atomic_thread_fence(memory_order_acquire);
	now = mm_lookup(mm, gfn);
	return now.entry == l->entry && now.level == l->level && pfn_eq(now.pfn, l->pfn);
}

static int fault_spurious(struct mm *mm, struct mm_fault *f, const struct region *reg, const struct mm_lookup *l)
{
	f->pfn = l->pfn;
	f->level = l->level;
	return fault_finish(mm, f, reg, l->writable);
}

static int fault_once(struct mm *mm, struct mm_fault *f, const struct region *reg)
{
	bool adopts = fault_adopts(mm, reg);
	bool exclusive = f->access & KAGE_WRITE || f->unshare || (adopts && mm_native(mm));
	struct mm_lookup l;
	bool stands;
	int r;

	rcu_enter();
	l = mm_lookup(mm, f->gfn);
	stands = lookup_stands(mm, f->gfn, &l);
	rcu_leave();
	if (!stands)
		return FAULT_AGAIN;
	if (entry_state(l.entry) == ENTRY_POISON)
		return -EFAULT;
	if (fault_is_spurious(&l, exclusive)) {
		mm_count(mm, faults_spurious);
		return fault_spurious(mm, f, reg, &l);
	}
	if (adopts && (exclusive || reg->kind == KAGE_REGION_ANON)) {
		r = mm_adopt_page(mm, f->gfn, f->reader, f->owner);
		return r == KAGE_OK || r == -EAGAIN ? FAULT_AGAIN : r;
	}
	if (entry_is_leaf(l.entry))
		r = fault_write(mm, f, reg);
	else
		r = fault_fill(mm, f, reg);
	if (r != KAGE_OK)
		return r;
	if (exclusive && entry_is_none(l.entry) && reg->kind == KAGE_REGION_FILE)
		return FAULT_AGAIN; /* filled with the file's page: now break that */
	return fault_finish(mm, f, reg, exclusive || reg->kind != KAGE_REGION_FILE);
}

static bool region_allows(const struct region *reg, uint32_t access)
{
	return reg && !((access & KAGE_RWX) & ~reg->prot);
}

bool mm_present(struct mm *mm, struct mm_fault *f)
{
	const struct region *reg;
	bool present = false;

	rcu_enter();
	reg = mm_region(mm, f->gfn);
	if (region_allows(reg, f->access) && !load_acquire(&mm->mirror)) {
		struct mm_lookup l = mm_lookup(mm, f->gfn);

		present = fault_is_spurious(&l, f->access & KAGE_WRITE || f->unshare) && lookup_stands(mm, f->gfn, &l);
		if (present)
			fault_spurious(mm, f, reg, &l);
	}
	rcu_leave();
	return present;
}

int mm_fault_held(struct mm *mm, struct mm_fault *f, struct brlock_held held)
{
	const struct region *reg = mm_region(mm, f->gfn);
	unsigned reaps = 0;
	int r;

	mm_count(mm, faults);
	trace(mm->host->env, fault, mm->id, f->gfn.v, f->access);
	if (!region_allows(reg, f->access)) {
		r = KAGE_MMIO;
	} else {
		do
			r = fault_once(mm, f, reg);
		while (r == FAULT_AGAIN || (r == -ENOMEM && reaps++ < REAPS_MAX && mm_reap(mm) > 0));
	}
	trace(mm->host->env, fault_done, mm->id, f->gfn.v, r);
	return r;
}

int mm_fault(struct mm *mm, struct mm_fault *f)
{
	struct brlock_held held = brlock_read(&mm->range);
	int r = mm_fault_held(mm, f, held);

	brlock_read_drop(&mm->range, held);
	return r;
}
