/* SPDX-License-Identifier: MIT */
/*
 * Candidates: frames that were hashed and have no partner yet, by hash and by
 * pfn (KSM's unstable tree, except that it is not thrown away after each pass).
 *
 * A frame that is a candidate carries FRAME_CANDIDATE; whoever hands the frame
 * out anew clears its flags, so a stale candidate gives itself away.
 */
#include "merge/merge.h"

#define BUCKETS_MIN 1024

int candidates_init(struct candidates *t, struct env *env)
{
	*t = (struct candidates){ .env = env, .buckets = BUCKETS_MIN };
	t->hash = env_alloc(env, t->buckets * sizeof(*t->hash));
	t->pfn = env_alloc(env, t->buckets * sizeof(*t->pfn));
	if (t->hash && t->pfn)
		return 0;
	candidates_finish(t);
	return -ENOMEM;
}

void candidates_finish(struct candidates *t)
{
	for (uint64_t i = 0; t->hash && i < t->buckets; i++) {
		for (struct candidate *c = t->hash[i], *next; c; c = next) {
			next = c->by_hash;
			env_free(t->env, c, sizeof(*c));
		}
	}
	env_free(t->env, t->hash, t->buckets * sizeof(*t->hash));
	env_free(t->env, t->pfn, t->buckets * sizeof(*t->pfn));
	*t = (struct candidates){ 0 };
}

static struct candidate **hash_bucket(struct candidates *t, uint32_t domain, uint64_t hash)
{
	return &t->hash[(hash ^ (uint64_t)domain * 0x9e3779b97f4a7c15u) & (t->buckets - 1)];
}

static struct candidate **pfn_bucket(struct candidates *t, pfn_t pfn)
{
	return &t->pfn[(pfn.v * 0x9e3779b97f4a7c15u >> 16) & (t->buckets - 1)];
}

static void link_in(struct candidates *t, struct candidate *c)
{
	struct candidate **h = hash_bucket(t, c->domain, c->hash), **p = pfn_bucket(t, c->pfn);

	c->by_hash = *h;
	*h = c;
	c->by_pfn = *p;
	*p = c;
}

/* Doubles both tables; without memory they just get slower. */
static void resize(struct candidates *t)
{
	uint64_t n = t->buckets;
	struct candidate **hash = env_alloc(t->env, 2 * n * sizeof(*hash)), **old = t->hash;
	struct candidate **pfn = env_alloc(t->env, 2 * n * sizeof(*pfn));

	if (!hash || !pfn) {
		env_free(t->env, hash, 2 * n * sizeof(*hash));
		env_free(t->env, pfn, 2 * n * sizeof(*pfn));
		return;
	}
	env_free(t->env, t->pfn, n * sizeof(*pfn));
	t->hash = hash;
	t->pfn = pfn;
	t->buckets = 2 * n;
	for (uint64_t i = 0; i < n; i++) {
		for (struct candidate *c = old[i], *next; c; c = next) {
			next = c->by_hash;
			link_in(t, c);
		}
	}
	env_free(t->env, old, n * sizeof(*old));
}

int candidates_add(struct candidates *t, struct pool *pool, uint32_t domain, uint64_t hash, pfn_t pfn)
{
	struct candidate *c = env_alloc(t->env, sizeof(*c));

	if (!c)
		return -ENOMEM;
	if (t->count >= t->buckets)
		resize(t);
	*c = (struct candidate){ .hash = hash, .pfn = pfn, .domain = domain };
	link_in(t, c);
	t->count++;
	atomic_fetch_or_explicit(&pfn_frame(pool, pfn)->bits, FRAME_CANDIDATE, memory_order_relaxed);
	return 0;
}

struct candidate *candidates_find(struct candidates *t, uint32_t domain, uint64_t hash, pfn_t not)
{
	struct candidate *c;

	for (c = *hash_bucket(t, domain, hash); c; c = c->by_hash)
		if (c->hash == hash && c->domain == domain && !pfn_eq(c->pfn, not))
			return c;
	return NULL;
}

struct candidate *candidates_find_pfn(struct candidates *t, pfn_t pfn)
{
	struct candidate *c;

	for (c = *pfn_bucket(t, pfn); c; c = c->by_pfn)
		if (pfn_eq(c->pfn, pfn))
			return c;
	return NULL;
}

bool candidate_alive(struct pool *pool, pfn_t pfn)
{
	return pfn_section(pool, pfn) && READ_ONCE(pfn_frame(pool, pfn)->bits) & FRAME_CANDIDATE;
}

static void forget(struct candidates *t, struct candidate *c)
{
	struct candidate **at;

	for (at = hash_bucket(t, c->domain, c->hash); *at != c; at = &(*at)->by_hash)
		;
	*at = c->by_hash;
	for (at = pfn_bucket(t, c->pfn); *at != c; at = &(*at)->by_pfn)
		;
	*at = c->by_pfn;
	t->count--;
	env_free(t->env, c, sizeof(*c));
}

void candidates_remove(struct candidates *t, struct pool *pool, struct candidate *c)
{
	rcu_enter();
	if (candidate_alive(pool, c->pfn))
		atomic_fetch_and_explicit(&pfn_frame(pool, c->pfn)->bits, ~FRAME_CANDIDATE, memory_order_relaxed);
	rcu_leave();
	forget(t, c);
}

void candidates_sweep(struct candidates *t, struct pool *pool)
{
	bool alive;

	for (uint64_t i = 0; i < t->buckets; i++) {
		for (struct candidate *c = t->hash[i], *next; c; c = next) {
			next = c->by_hash;
			rcu_enter();
			alive = candidate_alive(pool, c->pfn);
			rcu_leave();
			if (!alive)
				forget(t, c);
		}
	}
}
