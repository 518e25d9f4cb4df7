/* SPDX-License-Identifier: MIT */
/*
 * The pool as a whole: its reservations, its domains, what it may use.
 *
 * Invariants:
 *  1. a domain once published stays until the pool is destroyed: lookups take
 *     no lock and no reference.
 *  2. charged never exceeds the limit, not even for a moment: with a limit it
 *     grows by compare-and-swap.
 *
 * Locks: pool->lock to make a domain.
 *
 * Why domains are not dropped when they fall empty: an arena's caches would
 * have to be quiesced against allocations that found it without a lock; an idle
 * domain costs a descriptor, a reserve, and what the shrinking leaves it.
 */
#include <fcntl.h>
#include <unistd.h>

#include "frame/private.h"

#define DEFAULT_SPACE ((uint64_t)16 << 40)
#define DEFAULT_RESERVE ((uint64_t)4 << 20)
#define MIN_SPACE (GIANT_PAGES << PAGE_SHIFT)
#define TSAN_SPACE ((uint64_t)64 << 30) /* its shadow is four times the size */
#define KEPT_SHARE 64
#define KEPT_MIN 64

struct pool_whole {
	struct pool pool;
	struct pool_private priv;
};

static void unreserve(struct pool *pool)
{
	struct pool_private *p = pool->priv;

	host_unmap(p->space_map, p->space_len);
	host_unmap(p->frames_map, p->frames_len);
	p->space_map = p->frames_map = NULL;
}

static bool reserve(struct pool *pool, uint64_t bytes)
{
	struct pool_private *p = pool->priv;

	pool->npages = bytes >> PAGE_SHIFT;
	pool->base = host_reserve(bytes, GIANT_PAGES << PAGE_SHIFT, &p->space_map, &p->space_len);
	pool->frames =
	    host_reserve(pool->npages * sizeof(struct frame), PAGE_SIZE, &p->frames_map, &p->frames_len);
	if (pool->base && pool->frames)
		return true;
	unreserve(pool);
	return false;
}

/* Halved until the host agrees: RLIMIT_AS, sanitizers and small machines say no to 16 TiB. */
static int reserve_most(struct pool *pool, uint64_t bytes)
{
	bytes = ALIGN_DOWN(bytes ? bytes : DEFAULT_SPACE, MIN_SPACE);
#ifdef KAGE_TSAN
	bytes = MIN(bytes, TSAN_SPACE);
#endif
	for (; bytes >= MIN_SPACE; bytes = ALIGN_DOWN(bytes / 2, MIN_SPACE))
		if (reserve(pool, bytes))
			return 0;
	return -ENOMEM;
}

static size_t sections_bytes(const struct pool *pool)
{
	return ALIGN_UP((pool->npages >> SECTION_SHIFT) * sizeof(pool->sections[0]), PAGE_SIZE);
}

static size_t taken_bytes(const struct pool *pool)
{
	return ALIGN_UP(pool->npages >> SECTION_SHIFT, (uint64_t)64) / 8;
}

/* Section 0: pfn 0 is nothing, pfn 1 a page of zeroes, and what pool_zero_new() gives out. */
static int zero_create(struct pool *pool)
{
	struct section *s = env_alloc(pool->env, sizeof(*s));
	int err = s ? host_show_zero(pool) : -ENOMEM;

	if (err) {
		env_free(pool->env, s, sizeof(*s));
		return err;
	}
	s->used = ~(uint64_t)0;
	list_init(&s->node);
	pool->sections[0] = s;
	pool->priv->taken[0] = 1;
	pool->priv->taken_hint = 1;
	pool->priv->active = 1;
	WRITE_ONCE(pfn_frame(pool, PFN_ZERO)->bits, (uint32_t)FRAME_ZERO << FRAME_KIND_SHIFT);
	pool->priv->zeroes = MAX(host_page_size() >> PAGE_SHIFT, (uint64_t)2);
	return 0;
}

int pool_zero_new(struct pool *pool, pfn_t *out)
{
	struct pool_private *p = pool->priv;
	uint64_t step = host_page_size() >> PAGE_SHIFT;
	pfn_t pfn;
	int err = -ENOSPC;

	lock_take(&p->lock);
	pfn = PFN(p->zeroes);
	if (pfn.v + step <= ZERO_PFNS)
		err = host_own_zero(pool, pfn);
	if (!err) {
		WRITE_ONCE(pfn_frame(pool, pfn)->bits, (uint32_t)FRAME_ZERO << FRAME_KIND_SHIFT);
		p->zeroes += step;
		*out = pfn;
	}
	lock_drop(&p->lock);
	return err;
}

static void private_init(struct pool_private *p, const struct pool_config *config)
{
	long ncpu = sysconf(_SC_NPROCESSORS_CONF);

	lock_init(&p->lock, RANK_POOL, 0);
	lock_init(&p->vacating, RANK_POOL, 1);
	p->backing = config->backing;
	p->limit = config->memory_limit >> PAGE_SHIFT;
	p->kept = MIN(MAX(p->limit / KEPT_SHARE, (uint64_t)KEPT_MIN), p->limit / 2);
	p->reserve = (config->reserve ? config->reserve : DEFAULT_RESERVE) >> PAGE_SHIFT;
	p->ncpu = ncpu < 1 ? 1 : (unsigned)ncpu;
	p->pagemap = -1;
	list_init(&p->extents);
	for (unsigned i = 0; i < WAIT_BUCKETS; i++) {
		lock_init(&p->bucket[i].lock, RANK_NONE, 0);
		list_init(&p->bucket[i].waiters);
	}
}

static void domain_free(struct pool_domain *d)
{
	if (d->fd >= 0)
		close(d->fd);
	arena_finish(&d->arena);
	env_free(d->pool->env, d, sizeof(*d));
}

static int domain_make(struct pool *pool, uint32_t id, struct pool_domain **out)
{
	struct pool_domain *d = env_alloc(pool->env, sizeof(*d));
	int err;

	if (!d)
		return -ENOMEM;
	d->pool = pool;
	d->id = id;
	d->fd = -1;
	list_init(&d->partial);
	err = arena_init(&d->arena, d);
	if (!err && pool_memfd(pool)) {
		d->fd = host_memfd(pool->npages << PAGE_SHIFT);
		err = d->fd < 0 ? d->fd : 0;
	}
	if (err) {
		domain_free(d);
		return err;
	}
	*out = d;
	return 0;
}

int domain_get(struct pool *pool, uint32_t id, struct pool_domain **out)
{
	struct pool_private *p = pool->priv;
	struct pool_domain *d;
	int err = 0;

	if (id >= DOMAINS_MAX)
		return -EINVAL;
	d = domain_find(pool, id);
	if (!d) {
		lock_take(&p->lock);
		d = domain_find(pool, id);
		if (!d)
			err = domain_make(pool, pool_memfd(pool) ? id : 0, &d);
		if (!err && d != domain_find(pool, id)) {
			d->next = READ_ONCE(p->domain_list);
			store_release(&p->domain_list, d);
			store_release(&p->domains[d->id], d);
		}
		lock_drop(&p->lock);
	}
	if (err)
		return err;
	*out = d;
	return 0;
}

static void pool_free(struct pool *pool)
{
	struct pool_private *p = pool->priv;

	for (struct pool_domain *d = p->domain_list, *next; d; d = next) {
		next = d->next;
		domain_free(d);
	}
	for (uint64_t i = 0; pool->sections && p->taken && i < p->nsections; i++)
		if (bit_test(p->taken, i))
			env_free(pool->env, pool->sections[i], sizeof(struct section));
	if (p->pagemap >= 0)
		close(p->pagemap);
	host_unmap(p->domains, DOMAINS_MAX * sizeof(p->domains[0]));
	host_unmap(pool->sections, sections_bytes(pool));
	env_free(pool->env, p->taken, taken_bytes(pool));
	unreserve(pool);
	env_free(pool->env, container_of(pool, struct pool_whole, pool), sizeof(struct pool_whole));
}

static int pool_build(struct pool *pool, const struct pool_config *config)
{
	struct pool_private *p = pool->priv;
	struct pool_domain *first;
	int err = reserve_most(pool, config->address_space);

	if (err)
		return err;
	p->nsections = pool->npages >> SECTION_SHIFT;
	p->taken = env_alloc(pool->env, taken_bytes(pool));
	pool->sections = host_map_lazy(sections_bytes(pool));
	p->domains = host_map_lazy(DOMAINS_MAX * sizeof(p->domains[0]));
	if (!p->taken || !pool->sections || !p->domains)
		return -ENOMEM;
	err = zero_create(pool);
	if (err || pool_memfd(pool))
		return err;
	/* Without it pool_populated() knows less where the host swaps. */
	p->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	return domain_get(pool, 0, &first);
}

int pool_create(const struct pool_config *config, struct env *env, struct pool **out)
{
	struct pool_whole *w = env_alloc(env, sizeof(*w));
	int err;

	if (!w)
		return -ENOMEM;
	w->pool.env = env;
	w->pool.priv = &w->priv;
	private_init(&w->priv, config);
	err = pool_build(&w->pool, config);
	if (err) {
		pool_free(&w->pool);
		return err;
	}
	*out = &w->pool;
	return 0;
}

uint64_t pool_destroy(struct pool *pool)
{
	struct pool_stats stats;

	if (!pool)
		return 0;
	/* Reaping drops references of extents, and those are freed by the queue. */
	while (pool_reap(pool) || defer_run(&pool->env->defer))
		;
	pool_stats(pool, &stats);
	list_for_each_safe(l, tmp, &pool->priv->extents)
		env_free(pool->env, container_of(l, struct extent, node), sizeof(struct extent));
	pool_free(pool);
	return stats.extents + stats.arena_used;
}

pfn_t pool_hva_pfn(const struct pool *pool, const void *hva)
{
	uint64_t offset = (uintptr_t)hva - (uintptr_t)pool->base;
	pfn_t pfn = PFN(offset >> PAGE_SHIFT);

	if ((uintptr_t)hva < (uintptr_t)pool->base || pfn.v >= pool->npages || !pfn_section(pool, pfn))
		return PFN_NONE;
	return pfn;
}

int pool_charge(struct pool *pool, uint64_t n, unsigned flags)
{
	struct pool_private *p = pool->priv;
	uint64_t most, old;

	if (likely(!p->limit)) {
		atomic_fetch_add_explicit(&p->charged, n, memory_order_relaxed);
		return 0;
	}
	most = flags & ARENA_RESERVE ? p->limit : p->limit - p->kept;
	old = atomic_load_explicit(&p->charged, memory_order_relaxed);
	do {
		if (n > most || old > most - n)
			return -ENOMEM;
	} while (!atomic_compare_exchange_weak_explicit(&p->charged, &old, old + n, memory_order_relaxed,
							memory_order_relaxed));
	return 0;
}

void pool_uncharge(struct pool *pool, uint64_t n)
{
	uint64_t old = atomic_fetch_sub_explicit(&pool->priv->charged, n, memory_order_relaxed);

	kage_assert(old >= n);
	(void)old;
}

int pool_refill(struct pool *pool)
{
	for_each_domain(d, pool)
		while (READ_ONCE(d->arena.free) < pool->priv->reserve) {
			int err = buddy_grow(&d->arena);

			if (err)
				return err;
		}
	return 0;
}
