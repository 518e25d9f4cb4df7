/* SPDX-License-Identifier: MIT */
/*
 * The reserve of a hardened tenant: draws, notes, upkeep. See fused.h.
 *
 * A draw exchanges: a fresh frame comes from the arena first, then a random place of
 * the reserve gives its frame and takes the fresh one. So the reserve stays full, and
 * a frame that was just freed is handed out after as many draws as there are places, on average.
 *
 * Why references are noted and not just deferred frees: to know that a frame is free one has
 * to look at its count, and then a page that was merged takes another path than one that was not.
 */
#include "base/cache.h"
#include "mm/fused.h"
#include "mm/layer.h"
#include "mm/stable.h"

#define BATCH 256

struct reserve *reserve_make(struct tenant *t, uint32_t want)
{
	struct env *env = t->host->env;
	struct reserve *r = env_alloc(env, sizeof(*r));

	if (!r)
		return NULL;
	lock_init(&r->lock, RANK_RESERVE, t->id);
	random_init(&r->random, &t->host->key, t->id);
	r->tenant = t;
	r->want = want;
	r->frame = env_alloc(env, want * sizeof(*r->frame));
	r->note = env_alloc(env, NOTED_MAX * sizeof(*r->note));
	if (r->frame && r->note)
		return r;
	reserve_free(r);
	return NULL;
}

/* The last up to BATCH of a list that has `*count`, taken off it. */
static unsigned take_some(struct reserve *r, const pfn_t *list, _Atomic uint32_t *count, pfn_t out[BATCH])
{
	uint32_t all, n;

	lock_take(&r->lock);
	all = READ_ONCE(*count);
	n = MIN(all, (uint32_t)BATCH);
	memcpy(out, list + all - n, n * sizeof(*out));
	WRITE_ONCE(*count, all - n);
	lock_drop(&r->lock);
	return n;
}

uint64_t reserve_settle(struct reserve *r)
{
	struct host *h = r->tenant->host;
	pfn_t gone[BATCH];
	uint64_t done = 0;
	unsigned n;

	while ((n = take_some(r, r->note, &r->noted, gone)) != 0) {
		for (unsigned i = 0; i < n; i++)
			stable_put(h, frame_stable(h->pool, gone[i]));
		done += n;
	}
	return done;
}

static void reserve_empty(struct reserve *r)
{
	pfn_t some[BATCH];
	unsigned n;

	while ((n = take_some(r, r->frame, &r->count, some)) != 0)
		for (unsigned i = 0; i < n; i++)
			arena_free(r->tenant->host->pool, some[i]);
}

void reserve_free(struct reserve *r)
{
	struct env *env;

	if (!r)
		return;
	env = r->tenant->host->env;
	if (r->note)
		reserve_settle(r);
	if (r->frame)
		reserve_empty(r);
	env_free(env, r->frame, r->want * sizeof(*r->frame));
	env_free(env, r->note, NOTED_MAX * sizeof(*r->note));
	env_free(env, r, sizeof(*r));
}

static bool reserve_add(struct reserve *r, pfn_t pfn)
{
	uint32_t n;
	bool room;

	lock_take(&r->lock);
	n = READ_ONCE(r->count);
	room = n < r->want;
	if (room) {
		r->frame[n] = pfn;
		WRITE_ONCE(r->count, n + 1);
	}
	lock_drop(&r->lock);
	return room;
}

static int fresh(struct reserve *r, pfn_t *out)
{
	return arena_alloc(r->tenant->host->pool, r->tenant->id, 0, FRAME_RESERVED, 0, out);
}

/* True: it is not full, because it is `until`. */
static bool reserve_fill(struct reserve *r, uint64_t until)
{
	struct env *env = r->tenant->host->env;
	struct pool *pool = r->tenant->host->pool;
	pfn_t pfn;

	for (unsigned n = 0; !reserve_full(r); n++) {
		if (until && n % BATCH == BATCH - 1 && env_now(env, KAGE_CLOCK_WALL) >= until)
			return true;
		if (fresh(r, &pfn)) {
			if (!READ_ONCE(r->told))
				env_log(env, KAGE_LOG_WARN,
					"domain %u: %u of %u frames in the reserve: nothing is merged until there is memory for the rest",
					r->tenant->id, READ_ONCE(r->count), r->want);
			WRITE_ONCE(r->told, true);
			if (!READ_ONCE(r->used))
				reserve_empty(r);
			return false;
		}
		if (!reserve_add(r, pfn))
			arena_free(pool, pfn);
	}
	WRITE_ONCE(r->told, false);
	WRITE_ONCE(r->used, true);
	return false;
}

bool reserve_upkeep(struct reserve *r, uint64_t until)
{
	reserve_settle(r);
	if (READ_ONCE(r->tenant->families))
		return reserve_fill(r, until);
	reserve_empty(r);
	WRITE_ONCE(r->used, false);
	return false;
}

int reserve_draw(struct reserve *r, bool must, pfn_t *out)
{
	pfn_t pfn = PFN_NONE;
	int err = fresh(r, &pfn);
	uint32_t n, i;

	if (err && !must)
		return err;
	lock_take(&r->lock);
	n = READ_ONCE(r->count);
	if (n == 0) {
		*out = pfn;
		err = pfn_is_none(pfn) ? -ENOMEM : 0;
	} else {
		i = random_below(&r->random, n);
		*out = r->frame[i];
		r->frame[i] = pfn;
		if (pfn_is_none(pfn)) {
			r->frame[i] = r->frame[n - 1];
			WRITE_ONCE(r->count, n - 1);
		}
		err = 0;
	}
	lock_drop(&r->lock);
	return err;
}

int fused_frame(struct mm *mm, gfn_t gfn, pfn_t *out)
{
	struct reserve *r = mm->family->tenant->reserve;
	struct frame *f;
	int err;

	if (READ_ONCE(r->noted) >= NOTED_MAX / 2) {
		env_due(mm->host->env);
		if (READ_ONCE(r->noted) >= NOTED_MAX - NOTED_MAX / 8)
			reserve_settle(r);
	}
	err = reserve_draw(r, true, out);
	if (err)
		return err;
	f = pfn_frame(mm->host->pool, *out);
	layer_use(mm->layer);
	frame_set_kind(f, FRAME_PRIVATE, 0);
	atomic_store_explicit(&f->where, frame_where(mm->layer->id, gfn), memory_order_relaxed);
	return 0;
}

bool fused_gone(struct tenant *t, pfn_t pfn)
{
	struct reserve *r = t->reserve;
	uint32_t n;
	bool room;

	lock_take(&r->lock);
	n = READ_ONCE(r->noted);
	room = n < NOTED_MAX;
	if (room) {
		r->note[n] = pfn;
		WRITE_ONCE(r->noted, n + 1);
	}
	lock_drop(&r->lock);
	return room;
}

void fused_was_read(const struct pool *pool, pfn_t pfn)
{
	cache_flush(pfn_hva(pool, pfn), PAGE_SIZE);
}

uint64_t mm_reap(struct mm *mm)
{
	struct reserve *r = mm->family->tenant->reserve;

	return (r ? reserve_settle(r) : 0) + pool_reap(mm->host->pool);
}
