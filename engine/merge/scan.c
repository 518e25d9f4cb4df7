/* SPDX-License-Identifier: MIT */
/*
 * Scanning: where a pass is.
 *
 * Each guest with a mergeable region has a dirty log of merging's own. A pass goes over the guests
 * in the order in which they came, and in each to the chunks (128 MiB) in which something was written
 * since it was there last, or something waits: the log's tree and a count say which, so what is idle
 * costs a look at a summary for each 128 MiB. Before the pass go hints (hint.c).
 *
 * A batch takes a chunk from the guest that the pass is at: one that another step left
 * open, or the next. While it is at it nobody else takes that chunk. The pass is over when
 * there is no guest left, and nobody is at a chunk. The next one is for steps that begin after that: else a step that has
 * begun long ago would take for quiet what another has just seen written (Q1 of chunk.c).
 *
 * Locks: merge->gate (reading), host->lock (reading), merge->lock for moments, the guest's
 * family (reading) around a batch of at most 512 pages. Under merge->lock a family is only tried: memory that is
 * mapped needs it for its hint, and must not wait for a clone of somebody else. Who finds a writer there
 * waits for it with nothing held, and chooses anew. The gate keeps an audit out, which would
 * wait for a family while we, with another one, wait for that.
 */
#include "merge/backoff.h"
#include "merge/scan.h"
#include "mm/layer.h"
#include "mm/mirror.h"
#include "mm/region.h"
#include "mm/stable.h"

#define BATCH 512
#define LIVE_MOST 128 /* pages of one change where somebody may be waiting for its end */

#define SHARING_DEFAULT (256u << 10)

int merge_init(struct merge *m, struct host *h, uint64_t salt)
{
	memset(m, 0, sizeof(*m));
	m->host = h;
	m->salt = salt;
	m->max_sharing = SHARING_DEFAULT;
	m->backoff = BACKOFF_DEFAULT;
	list_init(&m->hints);
	list_init(&m->guests);
	list_init(&m->left);
	m->past = &m->guests;
	brlock_init(&m->gate, RANK_MERGE, 0);
	lock_init(&m->lock, RANK_SCAN, 0);
	lock_init(&m->mirrors, RANK_MIRRORS, 0);
	return candidates_init(&m->candidates, h->env);
}

void merge_finish(struct merge *m)
{
	hints_forget(m, NULL);
	candidates_finish(&m->candidates);
}

void merge_tune(struct merge *m, bool on, bool no_zero, uint32_t max_sharing, uint32_t backoff)
{
	uint32_t most = max_sharing ? max_sharing : SHARING_DEFAULT;

	brlock_write(&m->gate);
	m->on = on;
	m->no_zero = no_zero;
	if (most > m->max_sharing)
		stable_reopen_all(m->host);
	m->max_sharing = most;
	m->backoff = backoff;
	brlock_write_drop(&m->gate);
}

/* -- what is known of a guest ----------------------------------------------------------- */

void merge_enter(struct merge *m, struct mm *mm)
{
	lock_take(&m->lock);
	list_add_tail(&m->guests, &mm->merging);
	lock_drop(&m->lock);
}

void merge_forget(struct merge *m, struct mm *mm)
{
	struct merge_mm *g;

	brlock_write(&m->gate);
	hints_forget(m, mm);
	lock_take(&m->lock);
	if (m->past == &mm->merging)
		m->past = mm->merging.prev;
	list_del(&mm->merging);
	lock_drop(&m->lock);
	g = mm->merge;
	if (g) {
		list_del(&g->node);
		dirty_close(g->log);
		chunks_free(m, g);
		env_free(m->host->env, g, sizeof(*g));
		mm->merge = NULL;
	}
	brlock_write_drop(&m->gate);
}

int merge_attach(struct merge *m, struct mm *mm)
{
	struct merge_mm *g = env_alloc(m->host->env, sizeof(*g));
	int r;

	if (!g)
		return -ENOMEM;
	g->mm = mm;
	list_init(&g->node);
	r = dirty_open(mm, DIRTY_MERGE, KAGE_DIRTY_INITIALLY_SET | KAGE_DIRTY_FINE, &g->log);
	if (r) {
		env_free(m->host->env, g, sizeof(*g));
		return r;
	}
	mm->merge = g;
	return 0;
}

/* merge->lock held. */
static uint64_t guest_bytes(const struct mm *mm)
{
	const struct merge_mm *g = mm->merge;

	return g ? sizeof(*g) + dirty_bytes(g->log) + chunks_bytes(g) : 0;
}

uint64_t merge_mm_bytes(struct merge *m, struct mm *mm)
{
	uint64_t bytes;

	lock_take(&m->lock);
	bytes = guest_bytes(mm);
	lock_drop(&m->lock);
	return bytes;
}

uint64_t merge_bytes(struct merge *m)
{
	struct brlock_held gate = brlock_read(&m->gate);
	uint64_t bytes = READ_ONCE(m->candidates.slots) * sizeof(struct candidate);

	lock_take(&m->lock);
	list_for_each(pos, &m->hints)
		bytes += sizeof(struct merge_hint);
	list_for_each(pos, &m->guests)
		bytes += guest_bytes(container_of(pos, struct mm, merging));
	lock_drop(&m->lock);
	brlock_read_drop(&m->gate, gate);
	return bytes;
}

/* -- a pass -------------------------------------------------------------------------------------- */

uint64_t mergeable_next(struct mm *mm, uint64_t index)
{
	uint64_t best = UINT64_MAX;
	struct regions *set;

	rcu_enter();
	set = load_acquire(&mm->regions);
	for (unsigned i = 0; i < set->count; i++) {
		const struct region *r = &set->r[i];
		uint64_t last = (region_end(r).v - 1) >> MERGE_CHUNK_SHIFT;

		if (r->flags & KAGE_REGION_MERGEABLE && last >= index)
			best = MIN(best, MAX(r->start.v >> MERGE_CHUNK_SHIFT, index));
	}
	rcu_leave();
	return best;
}

/* The first chunk at or after `index` in which something waits. UINT64_MAX: none. merge->lock held. */
static uint64_t busy_next(const struct merge_mm *g, uint64_t index)
{
	for (uint32_t i = READ_ONCE(g->busy) ? chunk_search(g, index) : g->chunks; i < g->chunks; i++)
		if (atomic_load(&g->chunk[i]->busy))
			return g->chunk[i]->index;
	return UINT64_MAX;
}

/* The next chunk at or after m->chunk in which something was written or waits. merge->lock held. */
static bool chunk_next(struct merge *m, struct merge_mm *g)
{
	uint64_t busy = busy_next(g, m->chunk), index = m->chunk, at;

	do {
		gfn_t dirty = dirty_next(g->log, GFN(index << MERGE_CHUNK_SHIFT));

		at = dirty.v == DIRTY_NONE.v ? UINT64_MAX : dirty.v >> MERGE_CHUNK_SHIFT;
		index = at < busy ? mergeable_next(g->mm, at) : at;
	} while (index != at && index < busy);
	m->chunk = MIN(index, busy);
	return m->chunk != UINT64_MAX;
}

static void guest_done(struct merge *m, struct mm *mm)
{
	struct merge_mm *g = mm->merge;

	if (g) {
		uint64_t volatiles = atomic_exchange(&g->volatiles, 0), skipped = atomic_exchange(&g->skipped, 0);
		uint64_t backed_off = atomic_exchange(&g->backed_off, 0);

		atomic_fetch_add(&m->volatiles_pass, volatiles);
		atomic_fetch_add(&m->skipped_pass, skipped);
		atomic_fetch_add(&m->backed_off_pass, backed_off);
		atomic_store(&g->volatiles_last, volatiles);
		atomic_store(&g->skipped_last, skipped);
		atomic_store(&g->backed_off_last, backed_off);
		g->fetched = false;
		add_relaxed(&g->passes, 1);
	}
	m->past = &mm->merging;
	m->mm_id++;
	m->chunk = 0;
}

/* merge->lock held, and nobody is at a chunk. */
static void pass_done(struct merge *m)
{
	candidates_sweep(&m->candidates, m->host->pool);
	atomic_store(&m->volatiles, atomic_exchange(&m->volatiles_pass, 0));
	atomic_store(&m->skipped, atomic_exchange(&m->skipped_pass, 0));
	atomic_store(&m->backed_off, atomic_exchange(&m->backed_off_pass, 0));
	atomic_fetch_add(&m->passes, 1);
	atomic_store(&m->waiting, atomic_exchange(&m->waiting_pass, 0));
	m->past = &m->guests;
	m->mm_id = 0;
	m->chunk = 0;
}

bool guest_enter(struct mm *mm, struct work *w)
{
	if (brlock_read_try(&mm->family->lock, &w->held))
		return true;
	w->busy = mm->family;
	return false;
}

/* The guest that the pass is at. merge->lock held; the gate: no guest goes away. */
static struct mm *guest_next(struct merge *m)
{
	return m->past->next == &m->guests ? NULL : container_of(m->past->next, struct mm, merging);
}

static bool chunk_free(const struct merge_chunk *c)
{
	return !c->taken && c->open;
}

/* A chunk of the guest that a step has left open. merge->lock held. */
static struct merge_chunk *chunk_open(const struct merge_mm *g)
{
	for (uint32_t i = 0; g->open && i < g->chunks; i++)
		if (chunk_free(g->chunk[i]))
			return g->chunk[i];
	return NULL;
}

/* A guest that the pass has left behind, with a chunk that a step left open. The same. */
static struct mm *guest_open(struct merge *m)
{
	list_for_each(pos, &m->left) {
		struct merge_mm *g = container_of(pos, struct merge_mm, node);

		if (chunk_open(g))
			return g->mm;
	}
	return NULL;
}

void chunk_take(struct merge *m, struct merge_mm *g, struct merge_chunk *c, struct work *w)
{
	c->taken = true;
	m->taken++;
	w->chunk = c;
	w->visit = VISIT_PASS;
	w->zero = m->no_zero ? PFN_NONE : tenant_zero(g->mm->family->tenant);
}

static void chunk_give(struct merge *m, struct merge_mm *g, struct merge_chunk *c)
{
	c->taken = false;
	m->taken--;
	g->open += (uint32_t)c->open - (uint32_t)c->counted;
	c->counted = c->open;
	if (g->open && list_empty(&g->node))
		list_add_tail(&m->left, &g->node);
	else if (!g->open)
		list_del(&g->node);
}

/* A chunk of the guest that some step left open; else the next. What there is no memory for waits for the next pass. */
static void chunk_choose(struct merge *m, struct merge_mm *g, struct work *w)
{
	struct merge_chunk *c = chunk_open(g);

	while (!c && chunk_next(m, g)) {
		c = chunk_have(m, g, m->chunk);
		m->chunk++;
		if (!c)
			w->starved = true;
		else if (c->seen >= w->step || c->taken) /* a hint's, which goes before */
			c = NULL;
	}
	if (c)
		chunk_take(m, g, c, w);
}

/* The pass comes to a guest. merge->lock held. */
static int guest_begin(struct merge *m, struct mm *mm)
{
	struct merge_mm *g = mm->merge;
	int r;

	if (mm->id != m->mm_id) {
		m->mm_id = mm->id;
		m->chunk = 0;
	}
	if (!g)
		return mergeable_next(mm, 0) != UINT64_MAX ? merge_attach(m, mm) : (guest_done(m, mm), 0);
	if (g->fetched)
		return 1;
	r = merge_fetch(m, g);
	g->fetched = r == 0;
	return r < 0 ? r : 1;
}

/* merge->lock held. -errno. */
static int work_take(struct merge *m, struct work *w)
{
	struct mm *next, *mm;
	int r = hint_take(m, w);

	if (r || w->mm || w->busy)
		return r;
	w->over = atomic_load(&m->passes) != w->pass;
	if (w->over)
		return 0;
	next = guest_next(m);
	mm = next ? next : guest_open(m);
	if (!mm || !guest_enter(mm, w))
		return 0;
	w->mm = mm;
	if (!next) {
		chunk_choose(m, mm->merge, w);
		return 0;
	}
	r = guest_begin(m, mm);
	if (r > 0)
		chunk_choose(m, mm->merge, w);
	w->starved |= r == -ENOMEM;
	if ((r > 0 && !w->chunk) || r == -ENOMEM)
		guest_done(m, mm);
	return r < 0 && r != -ENOMEM ? r : 0;
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
	s->run.mm = mm;
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
	if (!c->open || w->visit != VISIT_PASS) {
		r = chunk_visit(s, w);
		w->visited = r == 0;
	}
	return r || !c->open ? r : chunk_batch(s, c, limit);
}

/* What the visit has taken from the log is new to all steps that have begun. merge->lock held. */
static void chunk_seen(const struct merge *m, const struct work *w)
{
	struct merge_chunk *c = w->chunk;

	c->seen = atomic_load(&m->steps);
	if (w->visit == VISIT_PASS || w->visit == VISIT_ARM)
		c->armed = c->seen;
}

/* One batch, or one move to the next chunk or guest. 1: the pass is over, or others are at all that is left of it. */
static int step_once(struct scanner *s, uint64_t limit, uint64_t *spent, bool *more)
{
	struct merge *m = s->m;
	struct brlock_held gate = brlock_read(&m->gate), host = brlock_read(&m->host->lock);
	struct work w = { .step = s->step, .pass = s->pass };
	int64_t n = 0;
	int r;

	lock_take(&m->lock);
	r = work_take(m, &w);
	if (w.busy) {
		family_get(w.busy);
	} else if (!w.mm && r == 0) {
		r = 1;
		*more = !w.over && m->taken != 0;
		if (!w.over && !m->taken)
			pass_done(m);
	}
	lock_drop(&m->lock);
	if (w.chunk)
		n = work_do(s, &w, limit);
	if (w.mm)
		brlock_read_drop(&w.mm->family->lock, w.held);
	s->starved |= w.starved;
	if (w.chunk) { /* the gate keeps it */
		lock_take(&m->lock);
		if (w.visited)
			chunk_seen(m, &w);
		chunk_give(m, w.mm->merge, w.chunk);
		if (n < 0 && !w.chunk->open && m->mm_id == w.mm->id)
			m->chunk = MIN(m->chunk, w.chunk->index); /* not even begun */
		lock_drop(&m->lock);
	}
	brlock_read_drop(&m->host->lock, host);
	brlock_read_drop(&m->gate, gate);
	if (w.busy)
		family_wait(w.busy);
	*spent += n > 0 ? (uint64_t)n : 0;
	return n < 0 ? (int)n : r;
}

static uint64_t now_usec(const struct merge *m)
{
	return env_now(m->host->env, KAGE_CLOCK_WALL) / 1000;
}

/* Both at one moment: a step of the old pass, were it to go on in the next, would find its chunks seen and leave them out. */
static void step_begin(struct scanner *s)
{
	struct merge *m = s->m;

	lock_take(&m->lock);
	s->step = atomic_fetch_add(&m->steps, 1) + 1;
	s->pass = atomic_load(&m->passes);
	lock_drop(&m->lock);
}

int merge_step(struct merge *m, uint64_t pages, uint64_t usec, uint64_t moved, uint64_t *scanned, uint64_t *merged, bool *more)
{
	uint64_t start = usec ? now_usec(m) : 0, first = atomic_load(&m->moved), done, spent = 0;
	struct scanner *s;
	int r = 0;

	*more = false;
	if (!atomic_load(&m->on))
		return 0;
	s = env_alloc(m->host->env, sizeof(*s));
	if (!s)
		return -ENOMEM;
	s->m = m;
	step_begin(s);
	while (r == 0 && atomic_load(&m->on)) {
		done = atomic_load(&m->moved) - first;
		if ((pages && spent >= pages) || (usec && now_usec(m) - start >= usec) || done >= moved) {
			*more = true;
			break;
		}
		r = step_once(s, MIN(pages ? MIN(BATCH, pages - spent) : BATCH, moved - done), &spent, more);
	}
	*scanned += spent;
	*merged += s->merged;
	if (r >= 0)
		r = s->starved ? -ENOMEM : 0;
	env_free(m->host->env, s, sizeof(*s));
	return r;
}
