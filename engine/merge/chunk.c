/* SPDX-License-Identifier: MIT */
/*
 * 128 MiB of a guest: which pages have been quiet, which are left alone.
 *
 * A visit takes what was written from the dirty log. State is one bit a page, four times, and
 * a struct backoff for 2 MiB in which a page has failed:
 *
 *   written        pending; a try that was waiting, or lasted only until now, has failed (backoff.h)
 *   not, pending   quiet: to be looked at, unless it is left alone: then later
 *   not, tried     its last try has lasted
 *
 * Nothing here walks bitmaps of memory that nobody wrote and in which nothing waits: scan.c visits
 * chunks with a mark in the log, and those that are `busy`.
 *
 * Pages that are left alone need not fault at every write either: a mirror's log keeps their bits from one harvest to the
 * next, so they count as written until a pass takes them in which they may be tried again. That they were then says nothing.
 *
 * Invariants:
 *  Q1  a page is looked at only if nobody wrote it during one whole pass; memory of a hint: between
 *      two visits of the hint, or at once if the hint says that it is final. Of the two visits, that which looks at it is
 *      of a step that began after the other: none was under way, however many there are.
 *  Q2  what was known of a frame goes with the harvest that says it was written.
 *  Q3  whatever becomes of a page later (`todo`) has been harvested before: a write from then on is in the next harvest.
 *
 * Locks: the chunk is taken; chunk_have() and chunk_search(): merge->lock.
 */
#include "merge/backoff.h"
#include "merge/scan.h"
#include "mm/mirror.h"
#include "mm/rmap.h"
#include "mm/table.h"

/* -- a guest's chunks ------------------------------------------------------------------- */

uint32_t chunk_search(const struct merge_mm *g, uint64_t index)
{
	uint32_t low = 0, high = g->chunks;

	while (low < high) {
		uint32_t mid = (low + high) / 2;

		if (g->chunk[mid]->index < index)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

static int chunks_grow(struct merge *m, struct merge_mm *g)
{
	uint32_t room = g->room ? 2 * g->room : 4;
	struct merge_chunk **chunk = env_alloc(m->host->env, room * sizeof(*chunk));

	if (!chunk)
		return -ENOMEM;
	if (g->chunks)
		memcpy(chunk, g->chunk, g->chunks * sizeof(*chunk));
	env_free(m->host->env, g->chunk, g->room * sizeof(*chunk));
	g->chunk = chunk;
	g->room = room;
	return 0;
}

struct merge_chunk *chunk_have(struct merge *m, struct merge_mm *g, uint64_t index)
{
	uint32_t at = chunk_search(g, index);
	struct merge_chunk *c;

	if (at < g->chunks && g->chunk[at]->index == index)
		return g->chunk[at];
	if (g->chunks == g->room && chunks_grow(m, g))
		return NULL;
	c = env_alloc(m->host->env, sizeof(*c));
	if (!c)
		return NULL;
	c->index = index;
	memmove(&g->chunk[at + 1], &g->chunk[at], (g->chunks - at) * sizeof(c));
	g->chunk[at] = c;
	g->chunks++;
	return c;
}

void chunks_free(struct merge *m, struct merge_mm *g)
{
	struct env *env = m->host->env;

	for (uint32_t i = 0; i < g->chunks; i++) {
		for (unsigned b = 0; b < ARRAY_SIZE(g->chunk[i]->backoff); b++)
			env_free(env, g->chunk[i]->backoff[b], sizeof(struct backoff));
		env_free(env, g->chunk[i], sizeof(struct merge_chunk));
	}
	env_free(env, g->chunk, g->room * sizeof(*g->chunk));
	g->chunk = NULL;
	g->chunks = g->room = 0;
}

uint64_t chunks_bytes(const struct merge_mm *g)
{
	uint64_t bytes = g->room * sizeof(*g->chunk) + g->chunks * sizeof(struct merge_chunk);

	for (uint32_t i = 0; i < g->chunks; i++)
		for (unsigned b = 0; b < ARRAY_SIZE(g->chunk[i]->backoff); b++)
			bytes += READ_ONCE(g->chunk[i]->backoff[b]) ? sizeof(struct backoff) : 0;
	return bytes;
}

/* -- what was written -------------------------------------------------------------------- */

/*
 * A new guest's log begins with everything, written or not. What a clone shares is known as its parent's, and cannot
 * have been written through it.
 */
static bool known_as_shared(const struct mm *mm, gfn_t gfn, const struct frame *f)
{
	return READ_ONCE(f->bits) & FRAME_CANDIDATE && !mm_lookup(mm, gfn).writable;
}

/* Pages of 2 MiB that were written: what merging knew of their frames is old. `all`: or all, see above. Inside a read section. */
static void forget_group(struct merge *m, struct mm *mm, gfn_t base, const uint64_t *dirty, bool all)
{
	entry_t *above, *leaf, e = ENTRY_NONE;
	pfn_t table, first = PFN_NONE;
	unsigned level;
	struct frame *f;

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
			if (!entry_is_leaf(e) || e & ENTRY_SPECIAL)
				continue;
			f = pfn_frame(m->host->pool, leaf ? entry_pfn(e) : pfn_add(first, i));
			if (!all || !known_as_shared(mm, gfn_add(base, i), f))
				candidate_unmark(&m->candidates, f);
		}
	}
}

/* Q2 */
static void forget_written(struct merge *m, struct mm *mm, gfn_t base, const uint64_t *dirty, bool all)
{
	for (unsigned w = 0; w < MERGE_CHUNK_WORDS; w += GROUP_WORDS) {
		uint64_t any = 0;

		for (unsigned i = 0; i < GROUP_WORDS; i++)
			any |= dirty[w + i];
		if (!any)
			continue;
		rcu_enter();
		forget_group(m, mm, gfn_add(base, w * 64), &dirty[w], all);
		rcu_leave();
	}
}

/* -- what need not be heard of --------------------------------------------------------------- */

struct left_alone {
	struct dirty_left left;
	struct merge *m;
	const struct merge_mm *g;
};

/* Of one word of a chunk, those that this pass leaves alone. */
static uint64_t word_left(const struct left_alone *l, gfn_t gfn)
{
	const struct merge_mm *g = l->g;
	uint64_t index = gfn.v >> MERGE_CHUNK_SHIFT;
	uint32_t at = chunk_search(g, index);
	struct merge_chunk *c = at < g->chunks ? g->chunk[at] : NULL;
	unsigned word = gfn.v % MERGE_CHUNK_PAGES / 64;

	if (!c || c->index != index || c->taken)
		return 0;
	return backoff_stays(c->backoff[word / GROUP_WORDS], word % GROUP_WORDS, atomic_load(&l->m->passes));
}

static uint64_t pages_left(const struct dirty_left *left, gfn_t gfn)
{
	const struct left_alone *l = container_of(left, struct left_alone, left);
	unsigned shift = gfn.v % 64;
	uint64_t bits = word_left(l, GFN(gfn.v - shift)) >> shift;

	return shift ? bits | word_left(l, GFN(gfn.v - shift + 64)) << (64 - shift) : bits;
}

int merge_fetch(struct merge *m, struct merge_mm *g)
{
	struct left_alone l = { .left.word = pages_left, .m = m, .g = g };

	return dirty_fetch(g->log, &l.left);
}

/* -- a visit ------------------------------------------------------------------------------- */

static unsigned bits(uint64_t word)
{
	return (unsigned)__builtin_popcountll(word);
}

/* What one word of a visit comes to. */
struct tally {
	bool on_end; /* the last pass has left something to do, so this one follows in its own time */
	bool mirror; /* pages that were left alone until now may be dirty, whether they were written or not */
	uint64_t failed, off, waiting, rest;
};

/* The pass comes to 64 pages. */
static void word_pass(struct merge *m, struct merge_chunk *c, unsigned w, uint64_t dirty, struct tally *t)
{
	struct backoff **b = &c->backoff[w / GROUP_WORDS];
	uint64_t pass = atomic_load(&m->passes), quiet = (c->pending[w] | c->later[w]) & ~dirty;
	uint64_t tried = c->tried[w], recent = t->on_end && c->tried_pass + 1 == pass ? tried : 0;
	uint64_t back, off = backoff_off(*b, w % GROUP_WORDS, pass, &back);
	uint64_t failed = m->backoff ? dirty & (c->pending[w] | recent) & ~(t->mirror ? off | back : off) : 0;

	t->failed += bits(m->backoff ? failed : dirty & c->pending[w]);
	t->off += bits(off);
	if (tried & ~dirty)
		backoff_lasted(m->host->env, b, w % GROUP_WORDS, tried & ~dirty);
	if (failed)
		backoff_failed(m->host->env, b, w % GROUP_WORDS, failed, pass, m->backoff);
	c->todo[w] = c->tried[w] = quiet & ~off;
	c->later[w] = quiet & off;
	c->pending[w] = dirty;
	t->waiting += bits(dirty | c->later[w]);
	t->rest |= dirty | c->later[w];
}

/* A hint comes to 64 pages, to those of `range` among them. */
static void word_hint(struct merge_chunk *c, unsigned w, uint64_t dirty, uint64_t range, enum visit visit)
{
	uint64_t now = 0;

	if (visit == VISIT_YOUNG)
		now = c->pending[w] & ~dirty & range;
	if (visit == VISIT_FINAL)
		now = (c->pending[w] | c->later[w] | dirty) & range;
	c->pending[w] = (c->pending[w] | dirty) & ~now;
	c->later[w] &= ~(now | dirty);
	c->todo[w] = (c->todo[w] & ~dirty) | now;
	c->tried[w] |= now;
}

/* The bits of a word that lie in [start, end). */
static uint64_t range_mask(gfn_t first, gfn_t start, gfn_t end)
{
	uint64_t mask = ~(uint64_t)0;

	if (start.v > first.v)
		mask = start.v >= first.v + 64 ? 0 : mask << (start.v - first.v);
	if (end.v < first.v + 64)
		mask = end.v <= first.v ? 0 : mask & ~(uint64_t)0 >> (first.v + 64 - end.v);
	return mask;
}

/* Fills s->dirty. */
static int take_written(struct scanner *s, const struct work *w, gfn_t base)
{
	gfn_t start = w->start, end = w->end;
	struct mm *mm = s->mm;
	int64_t n;

	if (w->visit == VISIT_PASS) {
		start = base;
		end = gfn_add(base, MERGE_CHUNK_PAGES);
	} else {
		memset(s->dirty, 0, sizeof(s->dirty));
	}
	if (mm_native(mm)) /* pages that the host kernel made private are to be found as such */
		mm_reconcile(mm, start, end, false);
	n = dirty_take(s->g->log, start, end.v - start.v, &s->dirty[(start.v - base.v) / 64]);
	if (n > 0 && READ_ONCE(s->m->candidates.marked))
		forget_written(s->m, mm, base, s->dirty, !w->chunk->visited);
	w->chunk->visited |= n >= 0 && w->visit == VISIT_PASS;
	return n < 0 ? (int)n : 0;
}

static void set_busy(struct merge_mm *g, struct merge_chunk *c, bool busy)
{
	if (atomic_exchange(&c->busy, busy) != busy)
		add_relaxed(&g->busy, busy ? 1u : -1u);
}

static bool any_backoff(const struct merge_chunk *c)
{
	for (unsigned b = 0; b < ARRAY_SIZE(c->backoff); b++)
		if (c->backoff[b])
			return true;
	return false;
}

static void visit_pass(struct scanner *s, struct merge_chunk *c)
{
	struct merge *m = s->m;
	struct tally t = { .on_end = atomic_load(&m->waiting) != 0, .mirror = s->mm->mirror != NULL };

	for (unsigned w = 0; w < MERGE_CHUNK_WORDS; w++)
		if (s->dirty[w] | c->pending[w] | c->later[w] | c->tried[w] || c->backoff[w / GROUP_WORDS])
			word_pass(m, c, w, s->dirty[w], &t);
	c->tried_pass = atomic_load(&m->passes);
	add_relaxed(&s->g->volatiles, t.failed);
	add_relaxed(&s->g->backed_off, t.off);
	add_relaxed(&m->waiting_pass, t.waiting);
	set_busy(s->g, c, t.rest || any_backoff(c));
}

static void visit_hint(struct scanner *s, const struct work *w, gfn_t base)
{
	struct merge_chunk *c = w->chunk;
	uint64_t waiting = 0;

	for (unsigned i = 0; i < MERGE_CHUNK_WORDS; i++) {
		word_hint(c, i, s->dirty[i], range_mask(gfn_add(base, i * 64), w->start, w->end), w->visit);
		waiting += bits(c->pending[i] | c->later[i]);
	}
	add_relaxed(&s->m->waiting_pass, waiting);
	set_busy(s->g, c, true);
}

int chunk_visit(struct scanner *s, const struct work *w)
{
	struct merge_chunk *c = w->chunk;
	gfn_t base = GFN(c->index << MERGE_CHUNK_SHIFT);
	int r = take_written(s, w, base);

	if (r)
		return r;
	add_relaxed(&s->m->visits, 1);
	add_relaxed(&s->g->visits, 1);
	if (w->visit == VISIT_PASS) {
		visit_pass(s, c);
	} else {
		visit_hint(s, w, base);
	}
	c->open = w->visit != VISIT_ARM || c->open;
	return 0;
}

/* Up to `limit` pages of an open chunk, 2 MiB at a time. Returns the number it spent, or -errno. */
int64_t chunk_batch(struct scanner *s, struct merge_chunk *c, uint64_t limit)
{
	uint64_t spent = 0, later = 0, left = 0;
	int r = 0;

	for (unsigned w = 0; w < MERGE_CHUNK_WORDS; w += GROUP_WORDS) {
		uint64_t here = 0;

		if (spent == limit)
			return (int64_t)spent;
		for (unsigned i = 0; i < GROUP_WORDS; i++) {
			uint64_t *todo = &c->todo[w + i];

			s->todo[i] = s->later[i] = s->refused[i] = s->hashed[i] = 0;
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
			c->tried[w + i] &= ~s->later[i];
			later += (unsigned)__builtin_popcountll(s->later[i]);
			if (s->m->backoff)
				backoff_failed(s->m->host->env, &c->backoff[w / GROUP_WORDS], i, s->refused[i],
					       atomic_load(&s->m->passes), s->m->backoff);
		}
		add_relaxed(&s->m->waiting_pass, later);
		if (later)
			set_busy(s->g, c, true);
		later = 0;
		spent += here;
		if (r)
			return r;
	}
	for (unsigned i = MERGE_CHUNK_WORDS - GROUP_WORDS; i < MERGE_CHUNK_WORDS; i++)
		left |= c->todo[i]; /* the limit may have come within the last group */
	c->open = left != 0;
	return (int64_t)spent;
}
