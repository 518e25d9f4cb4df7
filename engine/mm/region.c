/* SPDX-License-Identifier: MIT */
/*
 * Regions: map, unmap, protect, advise. See region.h for the sets.
 *
 * Locks taken: mm->range for writing around every change; the funnel's.
 */
#include <sys/mman.h>
#include <fcntl.h>

#include "mm/region.h"
#include "mm/stable.h"
#include "mm/change.h"
#include "mm/layer.h"
#include "mm/mirror.h"

/* -- sets ------------------------------------------------------------------- */

static size_t regions_bytes(unsigned count)
{
	return sizeof(struct regions) + count * sizeof(struct region);
}

/* The room of a set is what it was allocated with; `count` may be less. */
struct regions *regions_new(struct host *h, unsigned n)
{
	struct regions *set = env_alloc(h->env, regions_bytes(n));

	if (set) {
		set->host = h;
		set->room = n;
	}
	return set;
}

static void region_put(struct region *r)
{
	struct extent *e = atomic_load(&r->extent);

	if (e)
		extent_put(e, 1);
}

static struct region *regions_append(struct regions *set, const struct region *r)
{
	struct region *to = &set->r[set->count++];
	struct extent *e = atomic_load(&((struct region *)r)->extent);

	kage_assert(set->count <= set->room);
	*to = *r;
	if (e)
		extent_get(e, 1);
	return to;
}

struct regions *regions_copy(struct host *h, const struct regions *set, unsigned extra)
{
	struct regions *copy = regions_new(h, set->count + extra);

	for (unsigned i = 0; copy && i < set->count; i++)
		regions_append(copy, &set->r[i]);
	return copy;
}

struct regions *regions_clone(struct host *h, const struct regions *set, bool keep)
{
	struct regions *copy = regions_new(h, set->count);

	for (unsigned i = 0; copy && i < set->count; i++) {
		struct region r = set->r[i];

		if (r.kind == KAGE_REGION_ANON && !(keep && (r.flags & KAGE_REGION_EXTERNAL)))
			atomic_store(&r.extent, NULL);
		regions_append(copy, &r);
	}
	return copy;
}

void regions_free(struct host *h, struct regions *set)
{
	if (!set)
		return;
	for (unsigned i = 0; i < set->count; i++)
		region_put(&set->r[i]);
	env_free(h->env, set, regions_bytes(set->room));
}

static void regions_reclaim(struct defer_node *node, void *arg)
{
	regions_free(arg, container_of(node, struct regions, defer));
}

void regions_retire(struct host *h, struct regions *set)
{
	defer_add(&h->env->defer, &set->defer, regions_reclaim, h);
}

void regions_replace(struct mm *mm, struct regions *set)
{
	struct regions *old = atomic_exchange(&mm->regions, set);

	regions_retire(mm->host, old);
}

const struct region *regions_find(const struct regions *set, gfn_t gfn)
{
	unsigned lo = 0, hi = set->count;

	while (lo < hi) {
		unsigned mid = (lo + hi) / 2;
		const struct region *r = &set->r[mid];

		if (gfn.v < r->start.v)
			hi = mid;
		else if (gfn.v >= region_end(r).v)
			lo = mid + 1;
		else
			return r;
	}
	return NULL;
}

bool regions_cover(const struct regions *set, gfn_t start, gfn_t end)
{
	while (start.v < end.v) {
		const struct region *r = regions_find(set, start);

		if (!r)
			return false;
		start = region_end(r);
	}
	return true;
}

const struct region *mm_region(const struct mm *mm, gfn_t gfn)
{
	return regions_find(load_acquire(&mm->regions), gfn);
}

struct extent *region_home(struct mm *mm, const struct region *r)
{
	struct region *reg = (struct region *)r; /* the one field that is filled in later */
	struct extent *e = load_acquire(&reg->extent), *none = NULL;

	if (e)
		return e;
	if (extent_create(mm->host->pool, mm->domain, r->start, r->npages,
			  !mm->cloned && !(r->flags & (KAGE_REGION_NOHUGE | KAGE_REGION_TRAP)), &e))
		return NULL;
	e->layer = mm->layer->id;
	layer_use(mm->layer);
	if (atomic_compare_exchange_strong(&reg->extent, &none, e))
		return e;
	extent_put(e, 1);
	return none;
}

int region_touch(struct mm *mm, const struct region *r, gfn_t gfn, pfn_t pfn)
{
	int err = r->touch && !(mm->mirror && READ_ONCE(mm->mirror->abandoned)) ?
			  r->touch(r->opaque, gfn_gpa(gfn).v, pfn_hva(mm->host->pool, pfn)) : 0;

	if (err == -EAGAIN)
		return KAGE_WAIT;
	return err > 0 && err != KAGE_WAIT ? -EIO : err;
}

void mm_mark_regions(struct mm *mm, gfn_t start, gfn_t end)
{
	struct regions *set;

	rcu_enter();
	set = load_acquire(&mm->regions);
	for (unsigned i = 0; i < set->count; i++) {
		gfn_t from = GFN(MAX(start.v, set->r[i].start.v));
		gfn_t to = GFN(MIN(end.v, region_end(&set->r[i]).v));

		if (from.v < to.v)
			mm_mark_dirty(mm, from, to.v - from.v);
	}
	rcu_leave();
}

/* Splits the regions of a copy so that none reaches across gfn. The copy has room. */
static void regions_cut(struct regions *set, gfn_t gfn)
{
	struct region *r = (struct region *)regions_find(set, gfn);
	struct extent *e;
	unsigned at;

	if (!r || r->start.v == gfn.v)
		return;
	at = r - set->r;
	memmove(&set->r[at + 1], r, (set->count - at) * sizeof(*r));
	set->count++;
	r[0].npages = gfn.v - r[0].start.v;
	r[1].start = gfn;
	r[1].npages -= r[0].npages;
	e = atomic_load(&r->extent);
	if (e)
		extent_get(e, 1);
}

/* -- what a region may be ------------------------------------------------------------ */

static int region_check(const struct kage_region *c)
{
	uint32_t known = KAGE_REGION_MERGEABLE | KAGE_REGION_TRAP | KAGE_REGION_EXTERNAL | KAGE_REGION_FD |
			 KAGE_REGION_NOHUGE;

	if ((c->gpa | c->len | c->offset) & (PAGE_SIZE - 1) || c->len == 0)
		return -EINVAL;
	if (c->gpa >= (uint64_t)1 << KAGE_GPA_BITS || c->len > ((uint64_t)1 << KAGE_GPA_BITS) - c->gpa)
		return -EINVAL;
	if (c->flags & ~known || c->prot & ~KAGE_RWX || c->kind > KAGE_REGION_FOREIGN)
		return -EINVAL;
	if (c->flags & KAGE_REGION_EXTERNAL && c->flags & KAGE_REGION_MERGEABLE)
		return -EINVAL;
	if (c->kind == KAGE_REGION_ANON)
		return c->flags & KAGE_REGION_FD || c->offset ? -EINVAL : 0;
	if (!(c->flags & KAGE_REGION_FD) || c->flags & (KAGE_REGION_TRAP | KAGE_REGION_EXTERNAL))
		return -EINVAL;
	if (c->kind == KAGE_REGION_FOREIGN && c->flags & KAGE_REGION_MERGEABLE)
		return -EINVAL;
	return 0;
}

static int region_open(struct mm *mm, const struct kage_region *c, struct region *r)
{
	struct extent *e;
	int prot = PROT_READ, err;

	*r = (struct region){
		.start = GFN(c->gpa >> PAGE_SHIFT), .npages = c->len >> PAGE_SHIFT, .kind = c->kind,
		.flags = c->flags & ~KAGE_REGION_FD, .prot = c->prot ? c->prot : KAGE_RWX,
		.touch = c->touch, .opaque = c->opaque,
	};
	if (c->kind == KAGE_REGION_ANON)
		return 0;
	if (c->kind == KAGE_REGION_FOREIGN && r->prot & KAGE_WRITE)
		prot |= PROT_WRITE;
	err = extent_create_device(mm->host->pool, c->fd, c->offset, r->start, r->npages, prot, &e);
	if (err == 0)
		atomic_store(&r->extent, e);
	return err;
}

static void regions_insert(struct regions *set, const struct region *r)
{
	unsigned at = 0;

	while (at < set->count && set->r[at].start.v < r->start.v)
		at++;
	memmove(&set->r[at + 1], &set->r[at], (set->count - at) * sizeof(*r));
	set->r[at] = *r;
	set->count++;
}

static bool regions_overlap(const struct regions *set, const struct region *r)
{
	for (unsigned i = 0; i < set->count; i++)
		if (set->r[i].start.v < region_end(r).v && r->start.v < region_end(&set->r[i]).v)
			return true;
	return false;
}

/* -- the mirror has windows where there are regions --------------------------------- */

static int mirror_prepare(struct mm *mm, const struct regions *next)
{
	return mm->mirror ? mm->mirror->ops->regions_prepare(mm->mirror, next) : 0;
}

/* The new set is installed. */
static void mirror_commit(struct mm *mm)
{
	if (mm->mirror)
		mm->mirror->ops->regions_commit(mm->mirror, mm->regions);
}

static void mirror_cancel(struct mm *mm)
{
	if (mm->mirror)
		mm->mirror->ops->regions_cancel(mm->mirror);
}

/* -- map ------------------------------------------------------------------------ */

/* Installs a set with one region more, that nobody has touched yet. A mirror wants it filled first. */
static int regions_extend(struct mm *mm, struct regions *set, const struct region *r)
{
	int err;

	regions_insert(set, r);
	err = mirror_prepare(mm, set);
	if (err)
		return err;
	regions_replace(mm, set);
	if (mm->mirror)
		mm_fill(mm, r->start, region_end(r)); /* what stays empty is mapped as anonymous memory */
	mirror_commit(mm);
	return 0;
}

int mm_map(struct mm *mm, const struct kage_region *cfg)
{
	struct host *h = mm->host;
	struct regions *set;
	struct region r;
	int err = region_check(cfg);

	if (err)
		return err;
	brlock_write(&mm->range);
	r = (struct region){ .start = GFN(cfg->gpa >> PAGE_SHIFT), .npages = cfg->len >> PAGE_SHIFT };
	if (regions_overlap(mm->regions, &r))
		err = -EEXIST;
	if (!err)
		err = table_grow(mm, gfn_add(region_end(&r), -1));
	if (err)
		goto out;
	set = regions_copy(h, mm->regions, 1);
	err = set ? region_open(mm, cfg, &r) : -ENOMEM;
	if (!err)
		err = regions_extend(mm, set, &r);
	if (err) {
		regions_free(h, set);
		goto out;
	}
	mm_mark_changed(mm, r.start, r.npages);
	trace(h->env, map, mm->id, r.start.v, r.npages);
out:
	brlock_write_drop(&mm->range);
	return err;
}

/* -- unmap, discard: entries go ---------------------------------------------- */

struct zap {
	struct change c;
	struct change_target target;
	gfn_t start, end;
	struct regions *set; /* unmap: what comes after; NULL: the regions stay */
};

static bool range_pinned(struct mm *mm, gfn_t start, gfn_t end)
{
	bool found = false;

	lock_take(&mm->pin_lock);
	list_for_each(pos, &mm->pins) {
		struct pin *p = container_of(pos, struct pin, node);

		found |= p->gfn.v < end.v && start.v < p->gfn.v + p->npages;
	}
	lock_drop(&mm->pin_lock);
	return found;
}

static int zap_prepare(struct change *c)
{
	struct zap *z = container_of(c, struct zap, c);
	struct mm *mm = z->target.mm;
	int r = range_pinned(mm, z->start, z->end) ? -EBUSY : 0;

	if (mm->mirror && (z->start.v | z->end.v) % mm->mirror->granule)
		r = -EINVAL;

	if (!r)
		r = table_cut(mm, z->start);
	if (!r)
		r = table_cut(mm, z->end);
	return r || !z->set ? r : mirror_prepare(mm, z->set);
}

static void zap_commit(struct change *c)
{
	struct zap *z = container_of(c, struct zap, c);

	struct mm *mm = z->target.mm;

	/* Windows first: the frames may be other guests' too, who write to them as soon as they have them alone. */
	if (z->set) {
		regions_replace(mm, z->set);
		mirror_commit(mm);
	} else if (mm->mirror) {
		mm->mirror->ops->drop(mm->mirror, z->start, z->end);
	}
	table_zap(mm, z->start, z->end, &c->dead);
}

static void zap_cancel(struct change *c)
{
	struct zap *z = container_of(c, struct zap, c);

	if (z->set)
		mirror_cancel(z->target.mm);
	regions_free(z->target.mm->host, z->set);
}

static const struct change_ops zap_ops = { .prepare = zap_prepare, .commit = zap_commit, .cancel = zap_cancel };

/* mm->range held for writing. */
static int zap_run(struct mm *mm, gfn_t start, gfn_t end, uint32_t reason, struct regions *set)
{
	struct zap z = {
		/* a mirror has to be able to say that it has no mapping left for the pieces */
		.c = { .ops = &zap_ops, .targets = 1, .reason = reason, .flags = mm->mirror ? KAGE_RANGE_OPTIONAL : 0 },
		.target = { .mm = mm, .notify = { .start = start, .end = end } },
		.start = start, .end = end, .set = set,
	};

	z.c.target = &z.target;
	return change_run(&z.c);
}

static int range_check(uint64_t npages)
{
	return npages ? 0 : -EINVAL;
}

int mm_unmap(struct mm *mm, gfn_t start, uint64_t npages)
{
	gfn_t end = gfn_add(start, npages);
	struct regions *set;
	unsigned n = 0;
	int r = range_check(npages);

	if (r)
		return r;
	brlock_write(&mm->range);
	set = regions_copy(mm->host, mm->regions, 2);
	if (!set) {
		brlock_write_drop(&mm->range);
		return -ENOMEM;
	}
	regions_cut(set, start);
	regions_cut(set, end);
	for (unsigned i = 0; i < set->count; i++) {
		if (set->r[i].start.v >= start.v && set->r[i].start.v < end.v) {
			mm_mark_changed(mm, set->r[i].start, set->r[i].npages);
			region_put(&set->r[i]);
		} else {
			set->r[n++] = set->r[i];
		}
	}
	set->count = n;
	r = zap_run(mm, start, end, KAGE_REASON_UNMAP, set);
	if (r == 0)
		trace(mm->host->env, unmap, mm->id, start.v, npages);
	brlock_write_drop(&mm->range);
	return r;
}

static int mm_discard(struct mm *mm, gfn_t start, uint64_t npages)
{
	gfn_t end = gfn_add(start, npages);
	int r = 0;

	brlock_write(&mm->range);
	if (!regions_cover(mm->regions, start, end))
		r = -ENOENT;
	for (unsigned i = 0; r == 0 && i < mm->regions->count; i++) {
		const struct region *reg = &mm->regions->r[i];

		if (reg->flags & KAGE_REGION_EXTERNAL && reg->start.v < end.v && start.v < region_end(reg).v)
			r = -EOPNOTSUPP;
	}
	if (r == 0)
		r = zap_run(mm, start, end, KAGE_REASON_CLEAR, NULL);
	if (r == 0) {
		mm_count_add(mm, pages_discarded, npages);
		mm_mark_dirty(mm, start, npages);
		trace(mm->host->env, discard, mm->id, start.v, npages);
	}
	brlock_write_drop(&mm->range);
	return r;
}

/* -- protect, mergeable: only the set changes ---------------------------------- */

struct protect {
	struct change c;
	struct change_target target;
	struct regions *set;
};

static int protect_prepare(struct change *c)
{
	struct protect *p = container_of(c, struct protect, c);

	return mirror_prepare(p->target.mm, p->set);
}

static void protect_commit(struct change *c)
{
	struct protect *p = container_of(c, struct protect, c);

	regions_replace(p->target.mm, p->set);
	mirror_commit(p->target.mm);
}

static void protect_cancel(struct change *c)
{
	struct protect *p = container_of(c, struct protect, c);

	mirror_cancel(p->target.mm);
	regions_free(p->target.mm->host, p->set);
}

static const struct change_ops protect_ops = {
	.prepare = protect_prepare, .commit = protect_commit, .cancel = protect_cancel,
};

/* Runs `edit` on the regions of a range, cut out; `lost` collects permissions that go. */
static int regions_edit(struct mm *mm, gfn_t start, uint64_t npages,
			int (*edit)(struct region *r, uint32_t arg, uint32_t *lost), uint32_t arg)
{
	gfn_t end = gfn_add(start, npages);
	struct regions *set;
	uint32_t lost = 0;
	int r = 0;

	if (!regions_cover(mm->regions, start, end))
		return -ENOENT;
	set = regions_copy(mm->host, mm->regions, 2);
	if (!set)
		return -ENOMEM;
	regions_cut(set, start);
	regions_cut(set, end);
	for (unsigned i = 0; r == 0 && i < set->count; i++)
		if (set->r[i].start.v >= start.v && set->r[i].start.v < end.v)
			r = edit(&set->r[i], arg, &lost);
	if (r) {
		regions_free(mm->host, set);
		return r;
	}
	if (!lost) { /* nothing that anybody cached becomes wrong */
		r = mirror_prepare(mm, set);
		if (r) {
			regions_free(mm->host, set);
			return r;
		}
		regions_replace(mm, set);
		mirror_commit(mm);
		return 0;
	}
	struct protect p = {
		.c = { .ops = &protect_ops, .targets = 1, .reason = KAGE_REASON_PROTECT, .lost = lost },
		.target = { .mm = mm, .notify = { .start = start, .end = end } },
		.set = set,
	};
	p.c.target = &p.target;
	return change_run(&p.c);
}

static int edit_prot(struct region *r, uint32_t prot, uint32_t *lost)
{
	if (r->kind == KAGE_REGION_FOREIGN && prot & KAGE_WRITE && !(atomic_load(&r->extent)->prot & PROT_WRITE))
		return -EACCES;
	*lost |= r->prot & ~prot;
	r->prot = prot;
	return 0;
}

int mm_protect(struct mm *mm, gfn_t start, uint64_t npages, uint32_t prot)
{
	int r = range_check(npages);

	if (r == 0 && prot & ~KAGE_RWX)
		r = -EINVAL;
	if (r)
		return r;
	brlock_write(&mm->range);
	r = regions_edit(mm, start, npages, edit_prot, prot);
	brlock_write_drop(&mm->range);
	return r;
}

static int edit_mergeable(struct region *r, uint32_t on, uint32_t *lost)
{
	if (on && (r->kind == KAGE_REGION_FOREIGN || r->flags & KAGE_REGION_EXTERNAL))
		return -EOPNOTSUPP;
	r->flags = on ? r->flags | KAGE_REGION_MERGEABLE : r->flags & ~KAGE_REGION_MERGEABLE;
	return 0;
}

/* Pages of [start, end) that merging shares become private again. */
static int mm_unmerge(struct mm *mm, gfn_t start, gfn_t end)
{
	while (start.v < end.v) {
		struct mm_fault f = { .gfn = start, .access = 0, .unshare = true };
		struct mm_lookup l;
		bool merged;
		int r;

		/* after a merge that still saw the old regions, or before one that sees the new */
		struct table_locked w = table_lock(mm->family, 0, start);

		rcu_enter();
		l = mm_lookup(mm, start);
		merged = l.level == 0 && entry_merged(mm->host->pool, l.entry);
		rcu_leave();
		table_unlock(w);
		if (!merged) {
			start = entry_is_table(l.entry) || l.level == 0 ?
					gfn_add(start, 1) :
					GFN(ALIGN_DOWN(start.v, level_pages(l.level)) + level_pages(l.level));
			continue;
		}
		r = mm_fault(mm, &f);
		if (r < 0)
			return r;
		if (r == KAGE_OK)
			mm_count(mm, ksm_unmerges);
		if (r != KAGE_RETRY)
			start = gfn_add(start, 1);
	}
	return 0;
}

static int mm_willneed(struct mm *mm, gfn_t start, gfn_t end)
{
	struct regions *set;
	bool covered;

	rcu_enter();
	set = load_acquire(&mm->regions);
	covered = regions_cover(set, start, end);
	rcu_leave();
	if (!covered)
		return -ENOENT;
	while (start.v < end.v) {
		struct mm_fault f = { .gfn = start, .unshare = true };
		int r = mm_fault(mm, &f);

		if (r < 0)
			return r;
		if (r == KAGE_OK)
			start = GFN(ALIGN_DOWN(start.v, level_pages(f.level)) + level_pages(f.level));
		else if (r != KAGE_RETRY)
			start = gfn_add(start, 1);
	}
	return 0;
}

static int all_mergeable(struct mm *mm, gfn_t start, gfn_t end)
{
	struct brlock_held held = brlock_read(&mm->range);
	int r = 0;

	while (r == 0 && start.v < end.v) {
		const struct region *reg = mm_region(mm, start);

		r = !reg ? -ENOENT : reg->flags & KAGE_REGION_MERGEABLE ? 0 : -EOPNOTSUPP;
		start = reg ? region_end(reg) : start;
	}
	brlock_read_drop(&mm->range, held);
	return r;
}

int mm_advise(struct mm *mm, gfn_t start, uint64_t npages, enum kage_advice advice)
{
	int r = range_check(npages);

	if (r)
		return r;
	switch (advice) {
	case KAGE_ADVICE_MERGEABLE:
	case KAGE_ADVICE_UNMERGEABLE:
		brlock_write(&mm->range);
		r = regions_edit(mm, start, npages, edit_mergeable, advice == KAGE_ADVICE_MERGEABLE);
		if (r == 0)
			mm_mark_changed(mm, start, npages);
		brlock_write_drop(&mm->range);
		if (r == 0 && advice == KAGE_ADVICE_UNMERGEABLE)
			r = mm_unmerge(mm, start, gfn_add(start, npages));
		return r;
	case KAGE_ADVICE_DISCARD:
		return mm_discard(mm, start, npages);
	case KAGE_ADVICE_MERGE_FIRST: /* what is done about it, merging does */
		return all_mergeable(mm, start, gfn_add(start, npages));
	case KAGE_ADVICE_WILLNEED:
		return mm_willneed(mm, start, gfn_add(start, npages));
	default:
		return -EINVAL;
	}
}
