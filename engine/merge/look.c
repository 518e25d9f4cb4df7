/* SPDX-License-Identifier: MIT */
/*
 * Looking at pages: what they map, and what is in them. Sixteen at a time, in one read
 * section: their frames can be read for so long, and a grace period waits no longer.
 *
 * Reading is what merging costs, so a page is read once:
 *  - the test for zeroes ends in the first line that has another word, which the hash
 *    reads next;
 *  - a page whose neighbour has found a partner is not hashed at all if its own partner
 *    would be the neighbour's neighbour and one line of both is the same (a *hint*). Whether
 *    all of it is equal, plan.c finds out, which has to compare in any case;
 *  - what is read next is asked for while the page before is hashed: hardware that reads
 *    ahead stops at the end of a page.
 *
 * XXH3 through libxxhash's run-time dispatch where the library has it: of the packaged library, the plain function is
 * made for the least of CPUs, and several times slower. The symbol is weak: static
 * libraries come without it.
 *
 * Invariants:
 *  L1  what a hint names is of the page's own merge domain: nothing of another domain is even read.
 *  L2  a frame that is a candidate already (a clone's page, say) is not looked at
 *      again: a shared frame cannot have changed, and a written one has lost its mark.
 *  L3  a page without memory is not read: it would get some.
 *
 * Locks: none; host->lock and the guest's family are held for reading.
 */
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include "base/guest.h"
#include "merge/run.h"
#include "mm/layer.h"
#include "mm/mirror.h"
#include "mm/region.h"
#include "mm/rmap.h"
#include "mm/stable.h"
#include "mm/table.h"

#define HINT_MISSES 8 /* one after the other: what follows is another matter */

/* -- reading ------------------------------------------------------------------------------ */

#if defined(__x86_64__)
XXH64_hash_t XXH3_64bits_withSeed_dispatch(const void *input, size_t len, XXH64_hash_t seed) __attribute__((weak));
#endif

__attribute__((no_sanitize("thread"))) uint64_t page_hash(const struct tenant *t, const void *page)
{

#if defined(__x86_64__)
	if (likely(XXH3_64bits_withSeed_dispatch != NULL))
		return XXH3_64bits_withSeed_dispatch(page, PAGE_SIZE, t->salt);
#endif
	return XXH3_64bits_withSeed(page, PAGE_SIZE, t->salt);
}

static bool line_is_zero(const uint64_t *w)
{
	return !(READ_ONCE(w[0]) | READ_ONCE(w[1]) | READ_ONCE(w[2]) | READ_ONCE(w[3]) | READ_ONCE(w[4]) |
		 READ_ONCE(w[5]) | READ_ONCE(w[6]) | READ_ONCE(w[7]));
}

/* What equals itself a line further on is all like its first line. The C library has a comparison for each CPU. */
static bool is_zero(const void *page)
{
	return line_is_zero(page) && !guest_compare(page, (const char *)page + CACHE_LINE, PAGE_SIZE - CACHE_LINE);
}

/* One line, in another place for each page: pages that differ tend to do so everywhere. */
static bool sample_equal(const void *a, const void *b, unsigned at)
{
	size_t off = at * 29u % (PAGE_SIZE / CACHE_LINE) * CACHE_LINE;

	return !guest_compare((const char *)a + off, (const char *)b + off, CACHE_LINE);
}

/* -- what a page maps ----------------------------------------------------------------------- */

/* Of the scanner's 2 MiB. Valid for a read section. */
struct view {
	const entry_t *leaf; /* NULL: one entry covers all of it */
	entry_t above;	     /* that entry */
	pfn_t first;	     /* its frame of the first page */
	const struct region *reg;
};

static struct view view_of(const struct scanner *s)
{
	struct view v = { .above = ENTRY_NONE };
	entry_t *above;
	unsigned level;
	pfn_t table;

	v.leaf = table_leaves(s->mm, s->base, &table, &above, &level);
	if (!v.leaf && above)
		v.above = entry_load(above);
	if (entry_is_leaf(v.above))
		v.first = pfn_add(entry_pfn(v.above), s->base.v & (level_pages(level) - 1));
	return v;
}

static entry_t view_entry(const struct view *v, unsigned at, pfn_t *pfn)
{
	entry_t e = v->leaf ? entry_load(&v->leaf[at]) : v->above;

	*pfn = v->leaf ? entry_pfn(e) : pfn_add(v->first, at);
	return e;
}

static bool page_mergeable(const struct scanner *s, struct view *v, gfn_t gfn)
{
	if (!v->reg || gfn.v < v->reg->start.v || gfn.v >= region_end(v->reg).v)
		v->reg = mm_region(s->mm, gfn);
	return v->reg && v->reg->flags & KAGE_REGION_MERGEABLE;
}

/* L3 */
static bool is_populated(struct scanner *s, pfn_t pfn)
{
	pfn_t base = PFN(ALIGN_DOWN(pfn.v, BLOCK_PAGES));

	if (frame_kind(pfn_frame(s->m->host->pool, pfn)) != FRAME_HOME)
		return true;
	if (!pfn_eq(base, s->populated_base)) {
		pool_populated(s->m->host->pool, base, BLOCK_PAGES, s->populated);
		s->populated_base = base;
	}
	return bit_test(s->populated, pfn.v - base.v);
}

/* LOOK_HASHED stands for: it has a frame to be read. */
static enum looked page_look(struct scanner *s, struct view *v, struct look *l)
{
	gfn_t gfn = gfn_add(s->base, l->at);
	struct frame *f;
	enum frame_kind kind;
	entry_t e = view_entry(v, l->at, &l->pfn);

	if (!page_mergeable(s, v, gfn))
		return LOOK_NOTHING;
	if (entry_state(e) == ENTRY_HOST_PRIVATE)
		return LOOK_ADOPT;
	if (!entry_is_leaf(e) || e & ENTRY_SPECIAL)
		return LOOK_NOTHING;
	f = pfn_frame(s->m->host->pool, l->pfn);
	kind = frame_kind(f);
	if ((kind != FRAME_HOME && kind != FRAME_PRIVATE) || READ_ONCE(f->bits) & FRAME_CANDIDATE)
		return LOOK_NOTHING;
	if (frame_pins(f)) {
		add_relaxed(&s->g->skipped, 1);
		return LOOK_LATER;
	}
	return is_populated(s, l->pfn) ? LOOK_HASHED : LOOK_NOTHING;
}

/* -- hints ------------------------------------------------------------------------------------ */

/* It is a candidate, and its domain the page's. Inside a read section. */
static bool candidate_near(const struct scanner *s, pfn_t pfn)
{
	struct host *h = s->m->host;
	uint64_t where;
	struct layer *l = candidate_where(h, pfn, &where) ? layer_find(h, where_owner(where)) : NULL;

	return l && l->family->domain == s->mm->domain;
}

/* The frame beside the neighbour's partner, if it is one to be merged with and looks alike. */
static bool page_hinted(struct scanner *s, struct look *l)
{
	struct pool *pool = s->m->host->pool;
	uint64_t next = s->hint.v + s->base.v + l->at - s->hint_gfn.v;

	if (pfn_is_none(s->hint) || bit_test(s->hashed, l->at))
		return false;
	l->into = PFN(next);
	l->stable = NULL;
	if (next >= pool->npages || !pfn_section(pool, l->into) || pfn_eq(l->into, l->pfn))
		return false;
	if (frame_kind(pfn_frame(pool, l->into)) == FRAME_STABLE)
		l->stable = stable_get_frame(s->m->host, s->mm->domain, l->into, s->m->max_sharing);
	else if (!candidate_near(s, l->into))
		return false;
	else if (sample_equal(pfn_hva(pool, l->pfn), pfn_hva(pool, l->into), l->at))
		return true;
	if (l->stable && sample_equal(pfn_hva(pool, l->pfn), pfn_hva(pool, l->into), l->at))
		return true;
	if (l->stable)
		stable_put(s->m->host, l->stable);
	l->stable = NULL;
	return false;
}

static void page_read(struct scanner *s, struct look *l)
{
	const void *page = pfn_hva(s->m->host->pool, l->pfn);

	add_relaxed(&s->m->scanned, 1);
	add_relaxed(&s->g->scanned, 1);
	if (page_hinted(s, l)) {
		s->misses = 0;
		l->what = LOOK_HINT;
		return;
	}
	if (!pfn_is_none(s->hint) && s->misses++ == HINT_MISSES)
		s->hint = PFN_NONE;
	if (!pfn_is_none(s->zero) && is_zero(page)) {
		l->what = LOOK_ZERO;
		return;
	}
	l->hash = page_hash(s->mm->family->tenant, page);
	candidates_prefetch(&s->m->candidates, l->hash);
	stable_prefetch(s->m->host, s->mm->domain, l->hash);
}

/* -- a few pages -------------------------------------------------------------------------------- */

static void prefetch_page(const void *page)
{
	for (unsigned i = 0; i < 8; i++)
		__builtin_prefetch((const char *)page + i * CACHE_LINE);
}

/* Nothing of the guest can be merged as it is, or not at the moment. */
static enum looked guest_look(const struct scanner *s)
{
	const struct mirror *mirror = s->mm->mirror; /* the family is held */

	if (mm_coarse(s->mm) || (mirror && !mirror->blocks))
		return LOOK_NOTHING;
	return mirror && READ_ONCE(mirror->scarce) ? LOOK_LATER : LOOK_HASHED;
}

unsigned look_some(struct scanner *s, struct look *l)
{
	enum looked guest = guest_look(s);
	struct view v;
	unsigned n = 0;

	for (unsigned w = 0; w < GROUP_WORDS && n < LOOKS; w++) {
		for (; s->todo[w] && n < LOOKS; s->todo[w] &= s->todo[w] - 1)
			l[n++] = (struct look){ .at = w * 64 + (unsigned)__builtin_ctzll(s->todo[w]), .what = guest };
	}
	if (guest != LOOK_HASHED)
		return n;
	rcu_enter();
	v = view_of(s);
	for (unsigned i = 0; i < n; i++)
		l[i].what = page_look(s, &v, &l[i]);
	for (unsigned i = 0; i < n; i++) {
		if (l[i].what != LOOK_HASHED)
			continue;
		if (i + 1 < n && l[i + 1].what == LOOK_HASHED)
			prefetch_page(pfn_hva(s->m->host->pool, l[i + 1].pfn));
		page_read(s, &l[i]);
	}
	rcu_leave();
	return n;
}

void look_again(struct scanner *s, struct look *l, unsigned n)
{
	struct view v = view_of(s);

	for (unsigned i = 0; i < n; i++) {
		pfn_t pfn;
		entry_t e;

		if (l[i].what < LOOK_ZERO)
			continue;
		e = view_entry(&v, l[i].at, &pfn);
		if (!entry_is_leaf(e) || e & ENTRY_SPECIAL || !pfn_eq(pfn, l[i].pfn))
			l[i].what = LOOK_LATER; /* a reference that it has is let go by who asked */
	}
}
