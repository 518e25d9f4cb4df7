/* SPDX-License-Identifier: MIT */
/*
 * Scanning: where a pass is, and which pages are quiet.
 *
 * Each guest with a mergeable region has a dirty log of merging's own. Taking a
 * chunk (128 MiB) of it gives the pages written since the last pass; they are
 * pending. Pages that were pending and are not in this harvest are quiet: they go, 2 MiB
 * at a time, to scan_group(). State is one bit a page, three times.
 *
 * A batch takes a chunk from the guest that the pass is at: one that another step left
 * open, or the next. While it is at it nobody else takes that chunk. The pass is over when
 * there is no guest left, and nobody is at a chunk.
 *
 * Invariants:
 *  Q1  a page is hashed only if nobody wrote it during one whole pass.
 *  Q2  what was known of a frame goes with the harvest that says it was written.
 *
 * Locks: merge->gate (reading), host->lock (reading), merge->lock for moments, the guest's
 * family (reading) around a batch of at most 512 pages. The gate keeps an audit out, which would
 * wait for a family while we, with another one, wait for that.
 */
#include <time.h>

#include "merge/run.h"
#include "mm/layer.h"
#include "mm/mirror.h"
#include "mm/region.h"
#include "mm/rmap.h"
#include "mm/table.h"

#define BATCH 512
#define LIVE_MOST 128 /* pages of one change where somebody may be waiting for its end */

#define SHARING_DEFAULT (256u << 10)

int merge_init(struct merge *m, struct host *h, uint64_t salt)
{
	memset(m, 0, sizeof(*m));
	m->host = h;
	m->salt = salt;
	m->max_sharing = SHARING_DEFAULT;
	brlock_init(&m->gate, RANK_MERGE, 0);
	lock_init(&m->lock, RANK_SCAN, 0);
	lock_init(&m->mirrors, RANK_MIRRORS, 0);
	return candidates_init(&m->candidates, h->env);
}

void merge_finish(struct merge *m)
{
	candidates_finish(&m->candidates);
}

void merge_tune(struct merge *m, bool on, bool no_zero, uint32_t max_sharing)
{
	brlock_write(&m->gate);
	m->on = on;
	m->no_zero = no_zero;
	m->max_sharing = max_sharing ? max_sharing : SHARING_DEFAULT;
	brlock_write_drop(&m->gate);
}

/* -- what is known of a guest ----------------------------------------------------------- */

static void chunks_free(struct merge *m, struct merge_mm *g)
{
	for (struct merge_chunk *c = g->chunks, *next; c; c = next) {
		next = c->next;
		env_free(m->host->env, c, sizeof(*c));
	}
	g->chunks = NULL;
}

void merge_forget(struct merge *m, struct mm *mm)
{
	struct merge_mm *g;

	brlock_write(&m->gate);
	mm->leaving = true;
	g = mm->merge;
	if (g) {
		dirty_close(g->log);
		chunks_free(m, g);
		env_free(m->host->env, g, sizeof(*g));
		mm->merge = NULL;
	}
	brlock_write_drop(&m->gate);
}

static int merge_attach(struct merge *m, struct mm *mm)
{
	struct merge_mm *g = env_alloc(m->host->env, sizeof(*g));
	int r;

	if (!g)
		return -ENOMEM;
	g->mm = mm;
	r = dirty_open(mm, DIRTY_MERGE, KAGE_DIRTY_INITIALLY_SET | KAGE_DIRTY_FINE, &g->log);
	if (r) {
		env_free(m->host->env, g, sizeof(*g));
		return r;
	}
	mm->merge = g;
	return 0;
}

/* The guest's chunk with this index, NULL: none. Made if `add`. */
static struct merge_chunk *chunk_at(struct merge *m, struct merge_mm *g, uint64_t index, bool add)
{
	struct merge_chunk **at = &g->chunks, *c;

	while (*at && (*at)->index < index)
		at = &(*at)->next;
	if ((*at && (*at)->index == index) || !add)
		return *at && (*at)->index == index ? *at : NULL;
	c = env_alloc(m->host->env, sizeof(*c));
	if (c) {
		c->index = index;
		c->next = *at;
		*at = c;
	}
	return c;
}

/* -- a chunk ------------------------------------------------------------------------------ */

/* Pages of 2 MiB that were written: what merging knew of their frames is old. Inside a read section. */
static void forget_group(struct merge *m, struct mm *mm, gfn_t base, const uint64_t *dirty)
{
	entry_t *above, *leaf, e = ENTRY_NONE;
	pfn_t table, first = PFN_NONE;
	unsigned level;

	leaf = table_leaves(mm, base, &table, &above, &level);
	if (!leaf) {
		e = above ? entry_load(above) : ENTRY_NONE;
		if (!entry_is_leaf(e) || e & ENTRY_SPECIAL)
			return;
		first = pfn_add(entry_pfn(e), base.v & (level_pages(level) - 1));
	}
	for (unsigned w = 0; w < GROUP_WORDS; w++) {
		for (uint64_t bits = dirty[w]; bits; bits &= bits - 1) {
			unsigned i = w * 64 + (unsigned)__builtin_ctzll(bits);

			if (leaf)
				e = entry_load(&leaf[i]);
			if (entry_is_leaf(e) && !(e & ENTRY_SPECIAL))
				candidate_unmark(&m->candidates,
						 pfn_frame(m->host->pool, leaf ? entry_pfn(e) : pfn_add(first, i)));
		}
	}
}

/* Q2 */
static void forget_written(struct merge *m, struct mm *mm, gfn_t base, const uint64_t *dirty)
{
	for (unsigned w = 0; w < MERGE_CHUNK_WORDS; w += GROUP_WORDS) {
		uint64_t any = 0;

		for (unsigned i = 0; i < GROUP_WORDS; i++)
			any |= dirty[w + i];
		if (!any)
			continue;
		rcu_enter();
		forget_group(m, mm, gfn_add(base, w * 64), &dirty[w]);
		rcu_leave();
	}
}

/* Harvests the chunk and works out what is to be looked at. */
static int chunk_begin(struct merge *m, struct merge_mm *g, struct merge_chunk *c)
{
	gfn_t base = GFN(c->index << MERGE_CHUNK_SHIFT);
	uint64_t waiting = 0, volatiles = 0;
	int64_t n;

	if (mm_native(g->mm)) /* pages that the host kernel made private are to be found as such */
		mm_reconcile(g->mm, base, gfn_add(base, MERGE_CHUNK_PAGES), false);
	n = dirty_collect_bitmap(g->log, base, MERGE_CHUNK_PAGES, c->todo);
	if (n < 0)
		return (int)n;
	if (n > 0 && READ_ONCE(m->candidates.marked))
		forget_written(m, g->mm, base, c->todo);
	for (unsigned w = 0; w < MERGE_CHUNK_WORDS; w++) {
		uint64_t dirty = c->todo[w];

		volatiles += (unsigned)__builtin_popcountll(dirty & c->pending[w]);
		c->todo[w] = (c->pending[w] | c->later[w]) & ~dirty;
		c->pending[w] = dirty;
		waiting += (unsigned)__builtin_popcountll(dirty);
		c->later[w] = 0;
	}
	add_relaxed(&g->volatiles, volatiles);
	add_relaxed(&m->waiting_pass, waiting);
	c->open = true;
	return 0;
}

/* Up to `limit` pages of an open chunk, 2 MiB at a time. Returns the number it spent, or -errno. */
static int64_t chunk_batch(struct scanner *s, struct merge_chunk *c, uint64_t limit)
{
	uint64_t spent = 0, later = 0;
	int r = 0;

	for (unsigned w = 0; w < MERGE_CHUNK_WORDS; w += GROUP_WORDS) {
		uint64_t here = 0;

		if (spent == limit)
			return (int64_t)spent;
		for (unsigned i = 0; i < GROUP_WORDS; i++) {
			uint64_t *todo = &c->todo[w + i];

			s->todo[i] = s->later[i] = s->hashed[i] = 0;
			for (; *todo && spent + here < limit; *todo &= *todo - 1, here++)
				s->todo[i] |= *todo & -*todo;
		}
		if (!here)
			continue;
		s->base = GFN((c->index << MERGE_CHUNK_SHIFT) + w * 64);
		r = scan_group(s);
		for (unsigned i = 0; i < GROUP_WORDS; i++) {
			c->todo[w + i] |= s->todo[i]; /* what an error has left */
			c->later[w + i] |= s->later[i];
			later += (unsigned)__builtin_popcountll(s->later[i]);
		}
		add_relaxed(&s->m->waiting_pass, later);
		later = 0;
		spent += here;
		if (r)
			return r;
	}
	c->open = false;
	return (int64_t)spent;
}

/* -- a pass -------------------------------------------------------------------------------------- */

/* The next chunk at or after m->chunk that a mergeable region, or old state, reaches. merge->lock held. */
static bool chunk_next(struct merge *m, struct mm *mm)
{
	struct merge_mm *g = mm->merge;
	uint64_t best = UINT64_MAX;
	struct regions *set;

	rcu_enter();
	set = load_acquire(&mm->regions);
	for (unsigned i = 0; i < set->count; i++) {
		const struct region *r = &set->r[i];
		uint64_t first = r->start.v >> MERGE_CHUNK_SHIFT;
		uint64_t last = (region_end(r).v - 1) >> MERGE_CHUNK_SHIFT;

		if (r->flags & KAGE_REGION_MERGEABLE && last >= m->chunk)
			best = MIN(best, MAX(first, m->chunk));
	}
	rcu_leave();
	for (struct merge_chunk *c = g ? g->chunks : NULL; c; c = c->next)
		if (c->index >= m->chunk)
			best = MIN(best, c->index);
	m->chunk = best;
	return best != UINT64_MAX;
}

static void guest_done(struct merge *m, struct merge_mm *g)
{
	if (g) {
		uint64_t volatiles = atomic_exchange(&g->volatiles, 0), skipped = atomic_exchange(&g->skipped, 0);

		atomic_fetch_add(&m->volatiles_pass, volatiles);
		atomic_fetch_add(&m->skipped_pass, skipped);
		atomic_store(&g->volatiles_last, volatiles);
		atomic_store(&g->skipped_last, skipped);
		add_relaxed(&g->passes, 1);
	}
	m->mm_id++;
	m->chunk = 0;
}

/* merge->lock held, and nobody is at a chunk. */
static void pass_done(struct merge *m)
{
	candidates_sweep(&m->candidates, m->host->pool);
	atomic_store(&m->volatiles, atomic_exchange(&m->volatiles_pass, 0));
	atomic_store(&m->skipped, atomic_exchange(&m->skipped_pass, 0));
	atomic_fetch_add(&m->passes, 1);
	atomic_store(&m->waiting, atomic_exchange(&m->waiting_pass, 0));
	m->mm_id = 0;
	m->chunk = 0;
}

/*
 * The guest with the lowest id at or above m->mm_id, its family read-locked.
 * host->lock is held: no guest goes away, and a clone that comes has a higher id.
 */
static struct mm *guest_next(struct merge *m, struct brlock_held *held)
{
	struct mm *best = NULL;

	list_for_each(fp, &m->host->families) {
		struct family *f = container_of(fp, struct family, node);
		struct brlock_held now = brlock_read(&f->lock);

		list_for_each(mp, &f->mms) {
			struct mm *mm = container_of(mp, struct mm, node);

			if (!mm->leaving && mm->id >= m->mm_id && (!best || mm->id < best->id))
				best = mm;
		}
		brlock_read_drop(&f->lock, now);
	}
	if (best)
		*held = brlock_read(&best->family->lock);
	return best;
}

static bool chunk_free(const struct merge_chunk *c)
{
	return !c->taken && c->open;
}

/* A guest that the pass has left behind, with a chunk that a step left open. merge->lock held. */
static struct mm *guest_open(struct merge *m, struct brlock_held *held)
{
	list_for_each(fp, &m->host->families) {
		struct family *f = container_of(fp, struct family, node);

		*held = brlock_read(&f->lock);
		list_for_each(mp, &f->mms) {
			struct mm *mm = container_of(mp, struct mm, node);
			struct merge_mm *g = mm->merge;

			for (struct merge_chunk *c = g ? g->chunks : NULL; c; c = c->next)
				if (chunk_free(c))
					return mm;
		}
		brlock_read_drop(&f->lock, *held);
	}
	return NULL;
}

/* What a step does next. */
struct work {
	struct mm *mm; /* its family is held; NULL: nothing is left */
	struct brlock_held held;
	pfn_t zero; /* as in struct scanner */
	struct merge_chunk *chunk; /* taken; NULL: the guest is over, or nothing is known of it yet */
};

/* A chunk of the guest that some step left open; else the next. -ENOMEM. */
static int chunk_take(struct merge *m, struct merge_mm *g, struct work *w)
{
	struct merge_chunk *c = g->chunks;

	while (c && !chunk_free(c))
		c = c->next;
	if (!c) {
		if (!chunk_next(m, g->mm))
			return 0;
		c = chunk_at(m, g, m->chunk, true);
		if (!c)
			return -ENOMEM;
		m->chunk++;
	}
	c->taken = true;
	m->taken++;
	w->chunk = c;
	w->zero = m->no_zero ? PFN_NONE : tenant_zero(g->mm->family->tenant);
	return 0;
}

/* merge->lock held. -ENOMEM. */
static int work_take(struct merge *m, struct work *w)
{
	int r = 0;

	w->mm = guest_next(m, &w->held);
	if (!w->mm) {
		w->mm = guest_open(m, &w->held);
		return w->mm ? chunk_take(m, w->mm->merge, w) : 0;
	}
	if (w->mm->id != m->mm_id) {
		m->mm_id = w->mm->id;
		m->chunk = 0;
	}
	if (!w->mm->merge)
		return chunk_next(m, w->mm) ? merge_attach(m, w->mm) : (guest_done(m, NULL), 0);
	r = chunk_take(m, w->mm->merge, w);
	if (r == 0 && !w->chunk)
		guest_done(m, w->mm->merge);
	return r;
}

static void scanner_begin(struct scanner *s, const struct work *w)
{
	struct merge *m = s->m;
	struct mm *mm = w->mm;

	if (s->mm_id != mm->id) /* a guest's address may have been another's before */
		s->hint = PFN_NONE;
	s->mm_id = mm->id;
	s->mm = mm;
	s->g = mm->merge;
	s->populated_base = PFN_NONE;
	s->live = mm_listening(mm) ? LIVE_MOST : BLOCK_PAGES;
	s->run.family = mm->family;
	s->run.domain = mm->domain;
	s->zero = w->zero;
	s->run.zero_hash = pfn_is_none(s->zero) ? 0 : page_hash(mm->family->tenant, pfn_hva(m->host->pool, PFN_ZERO));
}

static int64_t work_do(struct scanner *s, struct work *w, uint64_t limit)
{
	struct merge_chunk *c = w->chunk;
	int r = 0;

	scanner_begin(s, w);
	if (!c->open)
		r = chunk_begin(s->m, s->g, c);
	return r ? r : chunk_batch(s, c, limit);
}

/* One batch, or one move to the next chunk or guest. 1: the pass is over, or others are at all that is left of it. */
static int step_once(struct scanner *s, uint64_t limit, uint64_t *spent, bool *more)
{
	struct merge *m = s->m;
	struct brlock_held gate = brlock_read(&m->gate), host = brlock_read(&m->host->lock);
	struct work w = { 0 };
	int64_t n = 0;
	int r;

	lock_take(&m->lock);
	r = work_take(m, &w);
	if (!w.mm) {
		r = 1;
		*more = m->taken != 0;
		if (!m->taken)
			pass_done(m);
	}
	lock_drop(&m->lock);
	if (w.chunk)
		n = work_do(s, &w, limit);
	if (w.mm)
		brlock_read_drop(&w.mm->family->lock, w.held);
	if (w.chunk) { /* the gate keeps it */
		lock_take(&m->lock);
		w.chunk->taken = false;
		m->taken--;
		if (n < 0 && !w.chunk->open && m->mm_id == w.mm->id)
			m->chunk = MIN(m->chunk, w.chunk->index); /* not even begun */
		lock_drop(&m->lock);
	}
	brlock_read_drop(&m->host->lock, host);
	brlock_read_drop(&m->gate, gate);
	*spent += n > 0 ? (uint64_t)n : 0;
	return n < 0 ? (int)n : r;
}

static uint64_t now_usec(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

int merge_step(struct merge *m, uint64_t pages, uint64_t usec, uint64_t *scanned, uint64_t *merged, bool *more)
{
	uint64_t start = usec ? now_usec() : 0, spent = 0;
	struct scanner *s;
	int r = 0;

	*more = false;
	if (!atomic_load(&m->on))
		return 0;
	s = env_alloc(m->host->env, sizeof(*s));
	if (!s)
		return -ENOMEM;
	s->m = m;
	while (r == 0 && atomic_load(&m->on)) {
		if ((pages && spent >= pages) || (usec && now_usec() - start >= usec)) {
			*more = true;
			break;
		}
		r = step_once(s, pages ? MIN(BATCH, pages - spent) : BATCH, &spent, more);
	}
	*scanned += spent;
	*merged += s->merged;
	env_free(m->host->env, s, sizeof(*s));
	return r < 0 ? r : 0;
}
