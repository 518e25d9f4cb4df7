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
 *
 * Why there is always room to note one more (H6), instead of so many and then letting go of them: that takes
 * three times as long if all those frames are free as if none is, and whoever comes last can time it. Room that is
 * made when an entry is fused depends on nothing that the entry's guest can find out by accessing it.
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
	if (r->frame)
		return r;
	reserve_free(r);
	return NULL;
}

/* -- notes -------------------------------------------------------------------------- */

int notes_promise(struct reserve *r, unsigned n)
{
	struct env *env = r->tenant->host->env;
	struct notes *page = NULL;
	bool done;

	for (;;) {
		lock_take(&r->lock);
		if (page) {
			page->next = r->spare;
			r->spare = page;
			WRITE_ONCE(r->room, r->room + NOTES_PAGE);
		}
		done = r->owed + n <= r->room;
		if (done)
			r->owed += n;
		lock_drop(&r->lock);
		if (done)
			return 0;
		page = env_alloc(env, sizeof(*page));
		if (!page)
			return -ENOMEM;
	}
}

void notes_give_up(struct reserve *r, unsigned n)
{
	lock_take(&r->lock);
	kage_assert(r->owed >= n);
	r->owed -= n;
	lock_drop(&r->lock);
}

/* The last ones, up to BATCH: they are owed no more. */
static unsigned notes_take(struct reserve *r, pfn_t out[BATCH])
{
	uint64_t noted;
	unsigned end, n = 0;

	lock_take(&r->lock);
	noted = READ_ONCE(r->noted);
	if (noted) {
		struct notes *page = r->note;

		end = (unsigned)((noted - 1) % NOTES_PAGE) + 1;
		n = MIN(end, BATCH);
		for (unsigned i = 0; i < n; i++)
			out[i] = PFN(page->pfn[end - n + i]);
		if (n == end) {
			r->note = page->next;
			page->next = r->spare;
			r->spare = page;
		}
		r->owed -= n;
		WRITE_ONCE(r->noted, noted - n);
	}
	lock_drop(&r->lock);
	return n;
}

/* Gives back all pages beyond those that are needed, and `keep`. */
static void notes_trim(struct reserve *r, unsigned keep)
{
	struct notes *page;

	do {
		page = NULL;
		lock_take(&r->lock);
		if (r->room - r->owed >= (keep + 1) * (uint64_t)NOTES_PAGE) {
			page = r->spare;
			r->spare = page->next;
			WRITE_ONCE(r->room, r->room - NOTES_PAGE);
		}
		lock_drop(&r->lock);
		env_free(r->tenant->host->env, page, sizeof(*page));
	} while (page);
}

/* Lets go of what is noted, `*done` references. True: not of all, because it is `until`. */
static bool notes_settle(struct reserve *r, uint64_t until, uint64_t *done)
{
	struct host *h = r->tenant->host;
	pfn_t gone[BATCH];
	unsigned n;

	*done = 0;
	while ((n = notes_take(r, gone)) != 0) {
		for (unsigned i = 0; i < n; i++)
			stable_put(h, frame_stable(h->pool, gone[i]));
		*done += n;
		if (until && env_now(h->env, KAGE_CLOCK_WALL) >= until)
			return READ_ONCE(r->noted) != 0;
	}
	return false;
}

/* -- frames -------------------------------------------------------------------------- */

/* The last ones, up to BATCH. */
static unsigned take_some(struct reserve *r, pfn_t out[BATCH])
{
	uint32_t all, n;

	lock_take(&r->lock);
	all = READ_ONCE(r->count);
	n = MIN(all, (uint32_t)BATCH);
	memcpy(out, r->frame + all - n, n * sizeof(*out));
	WRITE_ONCE(r->count, all - n);
	lock_drop(&r->lock);
	return n;
}

static void reserve_empty(struct reserve *r)
{
	pfn_t some[BATCH];
	unsigned n;

	while ((n = take_some(r, some)) != 0)
		for (unsigned i = 0; i < n; i++)
			arena_free(r->tenant->host->pool, some[i]);
}

void reserve_free(struct reserve *r)
{
	struct env *env;
	uint64_t done;

	if (!r)
		return;
	env = r->tenant->host->env;
	notes_settle(r, 0, &done);
	kage_assert(r->owed == 0);
	notes_trim(r, 0);
	if (r->frame)
		reserve_empty(r);
	env_free(env, r->frame, r->want * sizeof(*r->frame));
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
	uint64_t done;
	bool late = notes_settle(r, until, &done);

	WRITE_ONCE(r->late, late);
	notes_trim(r, 1);
	if (READ_ONCE(r->tenant->families))
		return late || reserve_fill(r, until);
	reserve_empty(r);
	WRITE_ONCE(r->used, false);
	return late;
}

uint64_t reserve_bytes(const struct reserve *r)
{
	return sizeof(*r) + r->want * sizeof(*r->frame) + READ_ONCE(r->room) / NOTES_PAGE * sizeof(struct notes);
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

	if (READ_ONCE(r->noted) >= NOTED_DUE)
		env_due(mm->host->env);
	err = reserve_draw(r, true, out);
	if (err)
		return err;
	f = pfn_frame(mm->host->pool, *out);
	layer_use(mm->layer);
	frame_set_kind(f, FRAME_PRIVATE, 0);
	atomic_store_explicit(&f->where, frame_where(mm->layer->id, gfn), memory_order_relaxed);
	return 0;
}

void fused_gone(struct tenant *t, pfn_t pfn)
{
	struct reserve *r = t->reserve;
	struct notes *page;
	uint64_t n;

	lock_take(&r->lock);
	n = READ_ONCE(r->noted);
	if (n % NOTES_PAGE == 0) {
		page = r->spare; /* H6 */
		r->spare = page->next;
		page->next = r->note;
		r->note = page;
	}
	r->note->pfn[n % NOTES_PAGE] = (uint32_t)pfn.v;
	WRITE_ONCE(r->noted, n + 1);
	lock_drop(&r->lock);
}

void fused_was_read(const struct pool *pool, pfn_t pfn)
{
	cache_flush(pfn_hva(pool, pfn), PAGE_SIZE);
}

uint64_t mm_reap(struct mm *mm)
{
	struct reserve *r = mm->family->tenant->reserve;
	uint64_t done = 0;

	if (r)
		notes_settle(r, 0, &done);
	return done + pool_reap(mm->host->pool);
}
