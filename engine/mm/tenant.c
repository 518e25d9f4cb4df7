/* SPDX-License-Identifier: MIT */
/*
 * The table of tenants. See tenant.h.
 *
 * Salts come from the engine's key and the domain's number, through a function that
 * cannot be inverted (base/random.h): one tenant's salt says nothing about another's,
 * and a repeated run has the same.
 */
#include <kage/engine.h>

#include "mm/fused.h"
#include "mm/tenant.h"

int tenants_init(struct host *h)
{
	h->tenants = env_alloc(h->env, sizeof(*h->tenants));
	return h->tenants ? 0 : -ENOMEM;
}

void tenants_finish(struct host *h)
{
	for (unsigned i = 0; h->tenants && i < TENANT_BUCKETS; i++) {
		for (struct tenant *t = h->tenants->bucket[i], *next; t; t = next) {
			next = t->next;
			reserve_free(t->reserve);
			env_free(h->env, t, sizeof(*t));
		}
	}
	env_free(h->env, h->tenants, sizeof(*h->tenants));
	h->tenants = NULL;
}

static struct tenant **bucket_of(struct host *h, uint32_t id)
{
	return &h->tenants->bucket[id % TENANT_BUCKETS];
}

/* host->ids held. */
static struct tenant *tenant_find(struct host *h, uint32_t id)
{
	struct tenant *t = *bucket_of(h, id);

	while (t && t->id != id)
		t = t->next;
	return t;
}

/* Found, or made and put in; with host->ids held on return. NULL: no memory, and the lock is not held. */
static struct tenant *tenant_lock(struct host *h, uint32_t id)
{
	struct tenant *fresh = env_alloc(h->env, sizeof(*fresh)), *t;

	if (!fresh)
		return NULL;
	*fresh = (struct tenant){ .host = h, .id = id, .salt = random_of(&h->key, id), .zero = PFN_NONE };
	lock_take(&h->ids);
	t = tenant_find(h, id);
	if (!t) {
		SWAP(t, fresh);
		t->next = *bucket_of(h, id);
		*bucket_of(h, id) = t;
	}
	env_free(h->env, fresh, sizeof(*fresh));
	return t;
}

int tenant_get(struct host *h, uint32_t id, struct tenant **out)
{
	struct tenant *t = tenant_lock(h, id);

	if (!t)
		return -ENOMEM;
	t->families++;
	lock_drop(&h->ids);
	*out = t;
	return 0;
}

void tenant_put(struct tenant *t)
{
	struct host *h = t->host;

	lock_take(&h->ids);
	t->families--;
	lock_drop(&h->ids);
}

int tenant_configure(struct host *h, uint32_t id, uint32_t flags, uint32_t frames)
{
	struct tenant *t = tenant_lock(h, id);
	struct reserve *r = NULL;

	if (!t)
		return -ENOMEM;
	lock_drop(&h->ids);
	if (flags & KAGE_DOMAIN_HARDENED) {
		r = reserve_make(t, frames);
		if (!r)
			return -ENOMEM;
	}
	lock_take(&h->ids);
	if (t->families) {
		lock_drop(&h->ids);
		reserve_free(r);
		return -EBUSY;
	}
	t->flags = flags;
	SWAP(t->reserve, r);
	atomic_store(&h->tenants->hardened, atomic_load(&h->tenants->hardened) + (t->reserve != NULL) - (r != NULL));
	lock_drop(&h->ids);
	reserve_free(r);
	return 0;
}

/* The hardened tenant with the lowest id from `id` on. */
static struct tenant *hardened_from(struct host *h, uint32_t id)
{
	struct tenant *best = NULL;

	lock_take(&h->ids);
	for (unsigned i = 0; i < TENANT_BUCKETS; i++)
		for (struct tenant *t = h->tenants->bucket[i]; t; t = t->next)
			if (t->reserve && t->id >= id && (!best || t->id < best->id))
				best = t;
	lock_drop(&h->ids);
	return best;
}

void tenants_hardened(struct host *h, void (*fn)(struct tenant *t, void *arg), void *arg)
{
	if (atomic_load(&h->tenants->hardened) == 0)
		return;
	for (struct tenant *t = hardened_from(h, 0); t; t = hardened_from(h, t->id + 1))
		fn(t, arg);
}

struct upkeep {
	uint64_t until;
	bool more;
};

static void upkeep(struct tenant *t, void *arg)
{
	struct upkeep *u = arg;

	u->more |= reserve_upkeep(t->reserve, u->until);
}

bool tenants_upkeep(struct host *h, uint64_t until)
{
	struct upkeep u = { .until = until };

	tenants_hardened(h, upkeep, &u);
	return u.more;
}

pfn_t tenant_zero(struct tenant *t)
{
	if (t->reserve)
		return PFN_NONE; /* all contents alike */
	if (t->flags & KAGE_DOMAIN_ZERO_SHARED)
		return PFN_ZERO;
	if (pfn_is_none(t->zero))
		pool_zero_new(t->host->pool, &t->zero); /* fails: merged as any other contents */
	return t->zero;
}
