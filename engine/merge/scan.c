/* SPDX-License-Identifier: MIT */
/*
 * Scanning: which pages are quiet, what they hash to, and whom they equal.
 *
 * Each guest with a mergeable region has a dirty log of merging's own. Taking a
 * chunk (128 MiB) of it gives the pages written since the last pass; they are
 * pending. Pages that were pending and are not in this harvest are quiet and get
 * hashed. State is one bit a page.
 *
 * Invariants:
 *  Q1  a page is hashed only if nobody wrote it during one whole pass.
 *  Q2  a frame that is a candidate already (a clone's page, say) is not hashed
 *      again: a shared frame cannot have changed, and a written one is harvested.
 *
 * Locks: merge->lock around a step; host->lock and the guest's family (reading)
 * around a batch of at most 512 pages, a second family for a moment of a merge.
 */
#include <time.h>
#include <xxhash.h>

#include "base/guest.h"
#include "merge/merge.h"
#include "mm/layer.h"
#include "mm/mirror.h"
#include "mm/region.h"
#include "mm/rmap.h"
#include "mm/stable.h"
#include "mm/tenant.h"

#define BATCH 512

/* What became of a quiet page; errors are negative. */
enum scan {
	SCAN_MERGED,
	SCAN_UNIQUE,  /* no partner: a candidate from now on */
	SCAN_NOTHING, /* not a page for merging */
	SCAN_LATER,   /* somebody was in the way: again in the next pass */
	SCAN_NO_STABLE,
	SCAN_LOOKED,  /* quiet, and hashed: not merged yet */
	SCAN_ADOPT,   /* quiet, but in a page of the host kernel's */
};

#define SHARING_DEFAULT (256u << 10)

int merge_init(struct merge *m, struct host *h, uint64_t salt)
{
	memset(m, 0, sizeof(*m));
	m->host = h;
	m->salt = salt;
	m->max_sharing = SHARING_DEFAULT;
	lock_init(&m->lock, RANK_MERGE, 0);
	return candidates_init(&m->candidates, h->env);
}

void merge_finish(struct merge *m)
{
	candidates_finish(&m->candidates);
}

void merge_tune(struct merge *m, bool on, bool no_zero, uint32_t max_sharing)
{
	lock_take(&m->lock);
	m->on = on;
	m->no_zero = no_zero;
	m->max_sharing = max_sharing ? max_sharing : SHARING_DEFAULT;
	lock_drop(&m->lock);
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

	lock_take(&m->lock);
	mm->leaving = true;
	g = mm->merge;
	if (g) {
		dirty_close(g->log);
		chunks_free(m, g);
		env_free(m->host->env, g, sizeof(*g));
		mm->merge = NULL;
	}
	lock_drop(&m->lock);
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

/* -- a page ------------------------------------------------------------------------------- */

static bool is_zero(const void *page)
{
	const uint64_t *w = page;

	for (unsigned i = 0; i < PAGE_SIZE / 8; i += 8)
		if (READ_ONCE(w[i]) | READ_ONCE(w[i + 1]) | READ_ONCE(w[i + 2]) | READ_ONCE(w[i + 3]) |
		    READ_ONCE(w[i + 4]) | READ_ONCE(w[i + 5]) | READ_ONCE(w[i + 6]) | READ_ONCE(w[i + 7]))
			return false;
	return true;
}

__attribute__((no_sanitize("thread"))) static uint64_t page_hash(const struct tenant *t, const void *page)
{
	return XXH3_64bits_withSeed(page, PAGE_SIZE, t->salt);
}

/* The family of a candidate's frame, NULL if it is no frame of a guest any more. */
static struct family *family_of(struct host *h, pfn_t pfn)
{
	struct layer *l = NULL;

	rcu_enter();
	if (candidate_alive(h->pool, pfn))
		l = layer_find(h, where_owner(rmap_where(h, pfn)));
	rcu_leave();
	return l ? l->family : NULL;
}

/* Is the frame that was looked up still the page's? For the rest of a read section it is readable then. */
static bool still_mapped(struct mm *mm, gfn_t gfn, pfn_t pfn)
{
	struct mm_lookup l = mm_lookup(mm, gfn);

	return entry_is_leaf(l.entry) && pfn_eq(l.pfn, pfn);
}

/* A page that has moved on says nothing about the candidate. */
static bool contents_differ(struct mm *mm, gfn_t gfn, pfn_t page, pfn_t candidate)
{
	struct pool *pool = mm->host->pool;
	bool differ = true;

	rcu_enter();
	if (candidate_alive(pool, candidate))
		differ = still_mapped(mm, gfn, page) &&
			 guest_compare(pfn_hva(pool, page), pfn_hva(pool, candidate), PAGE_SIZE) != 0;
	rcu_leave();
	return differ;
}

/*
 * Merges a page's frame with a candidate, whose family is read-locked for it.
 * Writers of a family's lock hold only that one, and host->lock keeps audits out: waiting
 * for a second family while holding a first one cannot close a circle.
 */
static int merge_pair(struct merge *m, struct mm *mm, pfn_t pfn, struct candidate *c)
{
	struct host *h = m->host;
	struct brlock_held held;
	struct family *other = family_of(h, c->pfn);
	bool locked = false;
	int r;

	if (!other)
		return -EILSEQ;
	if (other != mm->family) {
		while (!brlock_read_try(&other->lock, &held))
			cpu_relax();
		locked = true;
	}
	r = merge_frames(m, mm->family, pfn, other, c->pfn, NULL, c->hash, c->domain);
	if (locked)
		brlock_read_drop(&other->lock, held);
	return r;
}

static bool pair_keeps(struct host *h, uint64_t where, pfn_t pfn);

/* -ENOMEM ends the step; anything else that kept a merge from happening passes. */
static int scan_of(int r)
{
	return r == 0 ? SCAN_MERGED : r == -ENOMEM ? r : SCAN_LATER;
}

/* Merges into a stable frame that has room. */
static int merge_stable(struct merge *m, struct mm *mm, pfn_t pfn, uint64_t hash)
{
	struct host *h = m->host;

	for (unsigned skip = 0;; skip++) {
		struct stable *s = stable_get(h, mm->domain, hash, skip);
		uint32_t refs;
		int r;

		if (!s)
			return SCAN_NO_STABLE;
		refs = atomic_load(&pfn_frame(h->pool, s->pfn)->refs);
		if (refs > m->max_sharing) /* ours included */ {
			stable_put(h, s);
			continue;
		}
		if (s->count > 2 * (uint64_t)refs + 8)
			stable_prune(h, s, pair_keeps);
		r = merge_frames(m, mm->family, pfn, NULL, s->pfn, s, hash, mm->domain);
		if (r)
			stable_put(h, s);
		if (r != -EILSEQ)
			return scan_of(r);
	}
}

static int found_one(const struct rmap_entry *e, void *arg)
{
	return 1;
}

/* A pair of a chain is worth keeping if an entry is still found through it. When in doubt: yes. */
static bool pair_keeps(struct host *h, uint64_t where, pfn_t pfn)
{
	struct layer *l = layer_find(h, where_owner(where));
	struct brlock_held held;
	bool keep;

	if (!l)
		return false;
	if (!brlock_read_try(&l->family->lock, &held))
		return true;
	keep = rmap_walk_where(h, where, pfn, found_one, NULL) != 0;
	brlock_read_drop(&l->family->lock, held);
	return keep;
}

static int merge_unstable(struct merge *m, struct mm *mm, gfn_t gfn, pfn_t pfn, uint64_t hash)
{
	struct pool *pool = m->host->pool;
	struct candidate *c;
	int r;

	while ((c = candidates_find(&m->candidates, mm->domain, hash, pfn))) {
		r = merge_pair(m, mm, pfn, c);
		if (r == -EAGAIN && contents_differ(mm, gfn, pfn, c->pfn))
			r = -EILSEQ; /* freed or written since it was hashed */
		if (r == 0 || r == -EILSEQ)
			candidates_remove(&m->candidates, pool, c);
		if (r != -EILSEQ)
			return scan_of(r);
	}
	/* Only a frame that is still mapped gets the mark. */
	rcu_enter();
	r = SCAN_LATER;
	if (still_mapped(mm, gfn, pfn))
		r = candidates_add(&m->candidates, pool, mm->domain, hash, pfn) ? -ENOMEM : SCAN_UNIQUE;
	rcu_leave();
	return r;
}

/* A quiet page, as it was in the read section in which it was looked up. */
struct quiet {
	pfn_t pfn;
	bool zero;
	uint64_t hash;
};

static int merge_page(struct merge *m, struct mm *mm, gfn_t gfn, const struct quiet *q)
{
	int r;

	if (q->zero)
		return scan_of(merge_frames(m, mm->family, q->pfn, NULL, tenant_zero(mm->family->tenant), NULL, 0, mm->domain));
	r = merge_stable(m, mm, q->pfn, q->hash);
	return r == SCAN_NO_STABLE ? merge_unstable(m, mm, gfn, q->pfn, q->hash) : r;
}

/* -- a batch ---------------------------------------------------------------------------------- */

/* Memory of a home that was never touched is not there to be read. One query for 2 MiB. */
struct populated {
	pfn_t base; /* of the block that `map` describes; PFN_NONE: none yet */
	uint64_t map[8];
};

static bool is_populated(struct merge *m, struct populated *p, pfn_t pfn)
{
	pfn_t base = PFN(ALIGN_DOWN(pfn.v, BLOCK_PAGES));

	if (frame_kind(pfn_frame(m->host->pool, pfn)) != FRAME_HOME)
		return true;
	if (!pfn_eq(base, p->base)) {
		pool_populated(m->host->pool, base, BLOCK_PAGES, p->map);
		p->base = base;
	}
	return p->map[(pfn.v - base.v) / 64] >> (pfn.v % 64) & 1;
}

/* Q2. A candidate whose frame has been handed out anew is forgotten on the way. */
static bool known(struct merge *m, pfn_t pfn)
{
	struct candidate *c = candidates_find_pfn(&m->candidates, pfn);

	if (!c)
		return false;
	if (READ_ONCE(pfn_frame(m->host->pool, pfn)->bits) & FRAME_CANDIDATE)
		return true;
	candidates_remove(&m->candidates, m->host->pool, c);
	return false;
}

/* Inside a read section: nothing else keeps the frame, or its metadata. */
static int page_look(struct merge *m, struct merge_mm *g, struct populated *pop, gfn_t gfn, struct quiet *q)
{
	const struct region *reg;
	struct mm_lookup l;
	enum frame_kind kind;
	bool mergeable;
	const void *page;

	reg = mm_region(g->mm, gfn);
	l = mm_lookup(g->mm, gfn);
	mergeable = reg && reg->flags & KAGE_REGION_MERGEABLE;
	if (!mergeable || mm_coarse(g->mm) || (g->mm->mirror && !g->mm->mirror->blocks))
		return SCAN_NOTHING;
	if (g->mm->mirror && READ_ONCE(g->mm->mirror->scarce))
		return SCAN_LATER;
	if (entry_state(l.entry) == ENTRY_HOST_PRIVATE)
		return SCAN_ADOPT;
	if (!entry_is_leaf(l.entry) || l.entry & ENTRY_SPECIAL)
		return SCAN_NOTHING;
	kind = frame_kind(pfn_frame(m->host->pool, l.pfn));
	if ((kind != FRAME_HOME && kind != FRAME_PRIVATE) || known(m, l.pfn))
		return SCAN_NOTHING;
	if (frame_pins(pfn_frame(m->host->pool, l.pfn))) {
		g->skipped++;
		return SCAN_LATER;
	}
	if (!is_populated(m, pop, l.pfn))
		return SCAN_NOTHING;
	page = pfn_hva(m->host->pool, l.pfn);
	q->pfn = l.pfn;
	q->zero = !m->no_zero && !pfn_is_none(tenant_zero(g->mm->family->tenant)) && is_zero(page);
	q->hash = q->zero ? 0 : page_hash(g->mm->family->tenant, page);
	return SCAN_LOOKED;
}

/* A page that the host kernel has made private comes home; it is looked at once it has been quiet there. */
static int scan_adopt(struct mm *mm, gfn_t gfn)
{
	struct brlock_held held = brlock_read(&mm->range);
	int r = mm->mirror && mm_region(mm, gfn) ? mm_adopt_page(mm, gfn, NULL, NULL) : 0;

	brlock_read_drop(&mm->range, held);
	return r == -ENOMEM ? r : SCAN_LATER;
}

static int scan_page(struct merge *m, struct merge_mm *g, struct populated *pop, gfn_t gfn)
{
	struct quiet q;
	int r;

	rcu_enter();
	r = page_look(m, g, pop, gfn, &q);
	rcu_leave();
	if (r == SCAN_ADOPT)
		return scan_adopt(g->mm, gfn);
	if (r != SCAN_LOOKED)
		return r;
	atomic_fetch_add_explicit(&m->scanned, 1, memory_order_relaxed);
	WRITE_ONCE(g->scanned, g->scanned + 1);
	return merge_page(m, g->mm, gfn, &q);
}

/* Pages that were written: what merging knew of their frames is old. */
static void forget_written(struct merge *m, struct mm *mm, gfn_t base, const uint64_t *dirty)
{
	for (unsigned w = 0; w < MERGE_CHUNK_WORDS; w++) {
		for (uint64_t bits = dirty[w]; bits; bits &= bits - 1) {
			struct candidate *c;
			struct mm_lookup l;

			rcu_enter();
			l = mm_lookup(mm, gfn_add(base, w * 64 + __builtin_ctzll(bits)));
			rcu_leave();
			c = entry_is_leaf(l.entry) ? candidates_find_pfn(&m->candidates, l.pfn) : NULL;
			if (c)
				candidates_remove(&m->candidates, m->host->pool, c);
		}
	}
}

/* Harvests the chunk and works out what is to be hashed. */
static int chunk_begin(struct merge *m, struct merge_mm *g)
{
	gfn_t base = GFN(m->chunk << MERGE_CHUNK_SHIFT);
	struct merge_chunk *c = chunk_at(m, g, m->chunk, true);
	int64_t n;

	if (!c)
		return -ENOMEM;
	if (mm_native(g->mm)) /* pages that the host kernel made private are to be found as such */
		mm_reconcile(g->mm, base, gfn_add(base, MERGE_CHUNK_PAGES), false);
	n = dirty_collect_bitmap(g->log, base, MERGE_CHUNK_PAGES, m->todo);
	if (n < 0)
		return (int)n;
	if (n > 0 && m->candidates.count)
		forget_written(m, g->mm, base, m->todo);
	for (unsigned w = 0; w < MERGE_CHUNK_WORDS; w++) {
		uint64_t dirty = m->todo[w];

		g->volatiles += __builtin_popcountll(dirty & c->pending[w]);
		m->todo[w] = (c->pending[w] | c->later[w]) & ~dirty;
		c->pending[w] = dirty;
		m->waiting_pass += __builtin_popcountll(dirty);
		c->later[w] = 0;
	}
	m->chunk_open = true;
	m->next_word = 0;
	return 0;
}

/* Up to BATCH pages of the open chunk. Returns the number it spent, or -errno. */
static int64_t chunk_batch(struct merge *m, struct merge_mm *g, uint64_t limit, uint64_t *merged)
{
	struct merge_chunk *c = chunk_at(m, g, m->chunk, false);
	struct populated pop = { .base = PFN_NONE };
	int64_t spent = 0;

	for (; m->next_word < MERGE_CHUNK_WORDS; m->next_word++) {
		uint64_t *todo = &m->todo[m->next_word];

		while (*todo) {
			gfn_t gfn = GFN((m->chunk << MERGE_CHUNK_SHIFT) + m->next_word * 64 + __builtin_ctzll(*todo));
			int r;

			if (spent == (int64_t)limit)
				return spent;
			r = scan_page(m, g, &pop, gfn);
			if (r < 0)
				return r;
			*todo &= *todo - 1;
			spent++;
			*merged += r == SCAN_MERGED;
			m->waiting_pass += r == SCAN_LATER;
			if (r == SCAN_LATER)
				c->later[m->next_word] |= (uint64_t)1 << (gfn.v % 64);
		}
	}
	m->chunk_open = false;
	m->chunk++;
	return spent;
}

/* -- a pass -------------------------------------------------------------------------------------- */

/* The next chunk at or after m->chunk that a mergeable region, or old state, reaches. */
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
		atomic_fetch_add(&m->volatiles_pass, g->volatiles);
		atomic_fetch_add(&m->skipped_pass, g->skipped);
		WRITE_ONCE(g->volatiles_last, g->volatiles);
		WRITE_ONCE(g->skipped_last, g->skipped);
		g->volatiles = g->skipped = 0;
		WRITE_ONCE(g->passes, g->passes + 1);
	}
	m->mm_id++;
	m->chunk = 0;
	m->chunk_open = false;
}

static void pass_done(struct merge *m)
{
	candidates_sweep(&m->candidates, m->host->pool);
	atomic_store(&m->volatiles, atomic_exchange(&m->volatiles_pass, 0));
	atomic_store(&m->skipped, atomic_exchange(&m->skipped_pass, 0));
	atomic_fetch_add(&m->passes, 1);
	atomic_store(&m->waiting, m->waiting_pass);
	m->waiting_pass = 0;
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

/* One batch, or one move to the next chunk or guest. 1: the pass is over. */
static int step_once(struct merge *m, uint64_t limit, uint64_t *spent, uint64_t *merged)
{
	struct brlock_held held;
	struct mm *mm;
	int64_t n = 0;

	lock_take(&m->host->lock);
	mm = guest_next(m, &held);
	if (!mm) {
		lock_drop(&m->host->lock);
		pass_done(m);
		return 1;
	}
	if (mm->id != m->mm_id) {
		m->mm_id = mm->id;
		m->chunk = 0;
		m->chunk_open = false;
	}
	if (!m->chunk_open && !chunk_next(m, mm))
		guest_done(m, mm->merge);
	else if (!mm->merge)
		n = merge_attach(m, mm);
	else if (!m->chunk_open)
		n = chunk_begin(m, mm->merge);
	else
		n = chunk_batch(m, mm->merge, limit, merged);
	brlock_read_drop(&mm->family->lock, held);
	lock_drop(&m->host->lock);
	if (n > 0)
		*spent += n;
	return n < 0 ? (int)n : 0;
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
	int r = 0;

	*more = false;
	lock_take(&m->lock);
	while (r == 0 && m->on) {
		if ((pages && spent >= pages) || (usec && now_usec() - start >= usec)) {
			*more = true;
			break;
		}
		r = step_once(m, pages ? MIN(BATCH, pages - spent) : BATCH, &spent, merged);
	}
	lock_drop(&m->lock);
	*scanned += spent;
	return r < 0 ? r : 0;
}
