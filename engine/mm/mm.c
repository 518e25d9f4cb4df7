/* SPDX-License-Identifier: MIT */
/*
 * Lifetime of hosts, families and mms. Structures and invariants: mm.h.
 *
 * Locks taken: host->lock for the lists; destroy holds family->lock and
 * mm->range for writing, so no walk over the family is under way.
 */
#include "mm/layer.h"
#include "mm/region.h"
#include "mm/stable.h"
#include "mm/table.h"
#include "mm/tenant.h"

int host_init(struct host *h, struct env *env, struct pool *pool, const struct random_key *key, bool limited)
{
	int r;

	memset(h, 0, sizeof(*h));
	h->env = env;
	h->pool = pool;
	h->key = *key;
	h->limited = limited;
	brlock_init(&h->lock, RANK_ENGINE, 0);
	lock_init(&h->ids, RANK_IDS, 0);
	lock_init(&h->stable, RANK_STABLE, 0);
	list_init(&h->families);
	r = layer_table_init(h);
	if (!r)
		r = stable_init(h);
	if (!r)
		r = tenants_init(h);
	if (r)
		host_finish(h);
	return r;
}

void host_finish(struct host *h)
{
	tenants_finish(h);
	stable_finish(h);
	layer_table_finish(h);
}

static void family_locks_init(struct family *f)
{
	brlock_init(&f->lock, RANK_FAMILY, f->id);
	lock_init(&f->top, RANK_TABLE_TOP, f->id << 16);
	lock_init(&f->level4, RANK_TABLE_4, f->id << 16);
	lock_init(&f->level3, RANK_TABLE_3, f->id << 16);
	for (unsigned i = 0; i < TABLE_LOCKS_2; i++)
		lock_init(&f->level2[i], RANK_TABLE_2, f->id << 16 | i);
	for (unsigned i = 0; i < TABLE_LOCKS_1; i++)
		lock_init(&f->level1[i], RANK_TABLE_1, f->id << 16 | i);
	for (unsigned i = 0; i < TABLE_LOCKS_0; i++)
		lock_init(&f->level0[i], RANK_TABLE_0, f->id << 16 | i);
}

static int family_create(struct host *h, uint32_t domain, struct family **out)
{
	struct family *f = env_alloc(h->env, sizeof(*f));
	int r;

	if (!f)
		return -ENOMEM;
	r = tenant_get(h, domain, &f->tenant);
	if (r) {
		env_free(h->env, f, sizeof(*f));
		return r;
	}
	f->host = h;
	f->users = 1;
	f->domain = domain;
	list_init(&f->mms);
	lock_take(&h->ids);
	f->id = ++h->next_family;
	lock_drop(&h->ids);
	family_locks_init(f);
	*out = f;
	return 0;
}

static void family_put(struct family *f)
{
	if (atomic_fetch_sub(&f->users, 1) == 1)
		env_free(f->host->env, f, sizeof(*f));
}

static void family_free(struct family *f)
{
	tenant_put(f->tenant);
	family_put(f);
}

void family_wait(struct family *f)
{
	brlock_read_drop(&f->lock, brlock_read(&f->lock));
	family_put(f);
}

int mm_init(struct mm *mm, struct host *h, struct family *f)
{
	mm->host = h;
	mm->family = f;
	mm->domain = f->domain;
	lock_take(&h->ids);
	mm->id = ++h->next_mm;
	lock_drop(&h->ids);
	brlock_init(&mm->range, RANK_MM_RANGE, mm->id);
	lock_init(&mm->pin_lock, RANK_PIN, mm->id);
	lock_init(&mm->dirty_lock, RANK_DIRTY, mm->id);
	list_init(&mm->pins);
	list_init(&mm->node);
	list_init(&mm->merging);
	return notify_init(&mm->notify, h->env, mm->id);
}

int mm_create(struct host *h, struct mm *mm, uint32_t domain, unsigned levels)
{
	struct layer *l = NULL;
	struct family *f;
	pfn_t root;
	int r = family_create(h, domain, &f);

	if (r)
		return r;
	r = mm_init(mm, h, f);
	if (r)
		goto free_family;
	r = layer_new(h, f, &l);
	if (r)
		goto finish_notify;
	mm->regions = regions_new(h, 0);
	brlock_write(&h->lock); /* the audit knows of no table that no mm has */
	r = mm->regions ? table_new(mm, levels - 1, &root) : -ENOMEM;
	if (r)
		goto unlock;
	mm->root = entry_table(root, ENTRY_W) | (entry_t)(levels - 1) << ROOT_LEVEL_SHIFT;
	layer_attach(NULL, l, mm);
	list_add_tail(&f->mms, &mm->node);
	f->count = 1;
	list_add_tail(&h->families, &f->node);
	brlock_write_drop(&h->lock);
	return 0;
unlock:
	brlock_write_drop(&h->lock);
	regions_free(h, mm->regions);
	layer_free(h, l);
finish_notify:
	notify_finish(&mm->notify);
free_family:
	family_free(f);
	return r;
}

bool mm_busy(struct mm *mm)
{
	return !list_empty(&mm->pins) || notify_busy(&mm->notify);
}

bool mm_listening(struct mm *mm)
{
	return notify_listening(&mm->notify) != 0;
}

static void counters_retire(struct host *h, struct mm *mm)
{
#define X(name) atomic_fetch_add(&h->retired.name, atomic_load(&mm->count.name));
	MM_COUNTERS(X)
#undef X
}

int mm_destroy(struct mm *mm)
{
	struct host *h = mm->host;
	struct family *f = mm->family;
	struct dead dead = { 0 };
	bool last;

	if (mm_busy(mm))
		return -EBUSY;
	/* host->lock keeps walks over all guests away from listeners that are being released */
	brlock_write(&h->lock);
	notify_release(&mm->notify);
	brlock_write(&f->lock);
	brlock_write(&mm->range);
	table_drop_root(mm, &dead);
	layer_leave(h, mm->layer);
	list_del(&mm->node);
	last = --f->count == 0;
	if (last)
		list_del(&f->node);
	counters_retire(h, mm);
	brlock_write_drop(&mm->range);
	brlock_write_drop(&f->lock);
	dead_release(h->pool, &dead); /* still under a lock of the audit's: frames that no table reaches are pending */
	brlock_write_drop(&h->lock);
	regions_retire(h, mm->regions);
	notify_finish(&mm->notify);
	if (last)
		family_free(f);
	return 0;
}

int host_each_mm(struct host *h, int (*fn)(struct mm *mm, void *arg), void *arg)
{
	struct brlock_held walk = brlock_read(&h->lock);
	int r = 0;

	list_for_each(fp, &h->families) {
		struct family *f = container_of(fp, struct family, node);
		struct brlock_held held = brlock_read(&f->lock);

		list_for_each(mp, &f->mms) {
			r = fn(container_of(mp, struct mm, node), arg);
			if (r)
				break;
		}
		brlock_read_drop(&f->lock, held);
		if (r)
			break;
	}
	brlock_read_drop(&h->lock, walk);
	return r;
}
