/* SPDX-License-Identifier: MIT */
/*
 * Figures of the pool, and the check of its invariants.
 *
 * pool_stats() may run beside everything else: it holds pool->lock, so that no
 * section goes, and takes each arena's lock for as long as it reads counters.
 * pool_audit() runs alone; it recounts from the frames' metadata what lists,
 * bitmaps and counters claim.
 *
 * Locks: pool->lock, an arena's, a magazine's, in that order.
 */
#include <stdarg.h>
#include <stdio.h>

#include "frame/private.h"

struct arena_figures {
	uint64_t free, cached, used, tables;
};

/* Of one section; blocks come and go meanwhile, which makes the figure a little old and no worse. */
static uint64_t count_tables(struct pool *pool, const struct section *s, uint64_t hole)
{
	uint64_t tables = 0;

	for (unsigned i = 0; i < SECTION_BLOCKS; i++) {
		struct frame *f = pfn_frame(pool, PFN(s->index * SECTION_PAGES + i * BLOCK_PAGES));

		if (hole >> i & 1)
			continue;
		for (uint64_t j = 0; j < BLOCK_PAGES; j++)
			tables += frame_kind(&f[j]) == FRAME_TABLE;
	}
	return tables;
}

static uint64_t count_cached(struct arena *a)
{
	uint64_t cached = 0;

	for (unsigned i = 0; i < a->nmag; i++) {
		lock_take(&a->mag[i].lock);
		cached += a->mag[i].count;
		lock_drop(&a->mag[i].lock);
	}
	return cached;
}

/* pool->lock is held. */
static struct arena_figures arena_figures(struct arena *a)
{
	struct arena_figures fig = {0};
	uint64_t blocks, out, hole;

	lock_take(&a->lock);
	fig.free = READ_ONCE(a->free);
	fig.cached = count_cached(a);
	blocks = a->nsections * SECTION_BLOCKS - a->holes - a->in_motion;
	out = fig.free + fig.cached + a->poisoned;
	lock_drop(&a->lock);
	/* A batch on its way to a magazine counts as used for that moment. */
	fig.used = blocks * BLOCK_PAGES > out ? blocks * BLOCK_PAGES - out : 0;
	list_for_each(l, &a->sections) {
		struct section *s = container_of(l, struct section, node);

		lock_take(&a->lock);
		hole = s->hole;
		lock_drop(&a->lock);
		fig.tables += count_tables(a->domain->pool, s, hole);
	}
	return fig;
}

/* pool->lock is held. Neighbouring sections are asked for in one call. */
static uint64_t metadata_bytes(const struct pool *pool)
{
	const struct pool_private *p = pool->priv;
	uint64_t pages = ALIGN_UP(p->zeroes * sizeof(struct frame), PAGE_SIZE) / PAGE_SIZE; /* section 0's part of the array */

	for (uint64_t i = 1; i < p->nsections;) {
		uint64_t first = i;

		if (i % 64 == 0 && p->taken[i / 64] == 0) {
			i += 64;
			continue;
		}
		while (i < p->nsections && bit_test(p->taken, i))
			i++;
		if (first == i)
			i++;
		else
			pages += host_resident(pfn_frame(pool, PFN(first * SECTION_PAGES)),
					       (i - first) * SECTION_PAGES * sizeof(struct frame));
	}
	return pages * PAGE_SIZE + p->active * sizeof(struct section);
}

void pool_stats(struct pool *pool, struct pool_stats *out)
{
	struct pool_private *p = pool->priv;
	struct pool_stats s = {0};

	lock_take(&p->lock);
	s.extents = p->nextents;
	s.extent_pages = p->extent_pages;
	s.sections = p->active;
	for_each_domain(d, pool) {
		struct arena_figures fig = arena_figures(&d->arena);

		s.arena_used += fig.used;
		s.arena_tables += fig.tables;
		s.arena_free += fig.free + fig.cached;
	}
	s.metadata_bytes = metadata_bytes(pool);
	lock_drop(&p->lock);
	s.charged = READ_ONCE(p->charged);
	s.pending = READ_ONCE(p->pending);
	s.vacated = READ_ONCE(p->vacated);
	*out = s;
}

/* -- audit ------------------------------------------------------------------ */

struct audit {
	struct pool *pool;
	void (*report)(void *opaque, const char *line);
	void *opaque;
	uint64_t checks;
	/* of the arena at hand */
	uint64_t free, cached, used, holes, poisoned;
	uint64_t skip;       /* blocks that a large run still covers */
	uint64_t arena_used; /* of all arenas */
};

static __attribute__((format(printf, 2, 3), cold)) bool complain(struct audit *au, const char *fmt, ...)
{
	char line[200];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	if (au->report)
		au->report(au->opaque, line);
	return false;
}

/* True if the condition holds; else a line. Most hold: the words are not even evaluated. */
#define expect(au, ok, ...) ((au)->checks++, likely(ok) ? true : complain(au, __VA_ARGS__))
#define ULL(x) ((unsigned long long)(x))

/* The 64 sections of one word of the bitmap. Returns how many are in use. */
static uint64_t audit_section_word(struct audit *au, uint64_t word)
{
	const struct pool_private *p = au->pool->priv;
	uint64_t active = 0;

	for (uint64_t i = word * 64; i < MIN(word * 64 + 64, p->nsections); i++) {
		bool taken = p->taken[word] >> i % 64 & 1;
		const struct section *s = au->pool->sections[i];

		expect(au, taken || !s, "section %llu: taken %d, descriptor %p", ULL(i), taken,
		       (void *)s);
		expect(au, taken || i >= p->taken_hint, "section %llu is free below the hint", ULL(i));
		if (!s)
			continue;
		active++;
		expect(au, s->index == i, "section %llu says it is %u", ULL(i), s->index);
	}
	return active;
}

/*
 * P1: the bitmap, the section pointers and the count agree. pfn space is far larger than what is in use: words of the
 * bitmap without a bit are passed over.
 */
static void audit_sections(struct audit *au)
{
	const struct pool_private *p = au->pool->priv;
	uint64_t active = 0;

	for (uint64_t word = 0; word * 64 < p->nsections; word++)
		if (p->taken[word])
			active += audit_section_word(au, word);
	expect(au, active == p->active, "%llu sections, counter %llu", ULL(active), ULL(p->active));
	expect(au, frame_kind(pfn_frame(au->pool, PFN_ZERO)) == FRAME_ZERO, "pfn 1 is not the zero frame");
}

/* P1: each block of a section has the extent that its bit promises, and users counts them. */
static void audit_extent_section(struct audit *au, const struct section *s, uint64_t *stuck)
{
	bool alone = s->users == 1 && s->used == ~(uint64_t)0;
	const struct extent *last = NULL;
	uint32_t users = 0;

	if (s->users == 0) {
		++*stuck;
		return;
	}
	for (unsigned i = 0; i < SECTION_BLOCKS; i++) {
		const struct extent *e = s->block[i].extent;

		expect(au, alone || (s->used >> i & 1) == (e != NULL),
		       "section %u block %u: used %d, extent %p", s->index, i, (int)(s->used >> i & 1),
		       (void *)e);
		if (e && e != last) {
			users++;
			last = e;
		}
	}
	expect(au, users == s->users, "section %u: %u extents, users %u", s->index, users, s->users);
	expect(au, list_empty(&s->node) == (s->used == ~(uint64_t)0), "section %u: on the wrong list",
	       s->index);
}

/* P1 for one extent, and what its blocks count. Each page in use holds a reference of a home extent. */
static void audit_extent(struct audit *au, const struct extent *e)
{
	uint64_t span = e->npages >= GIANT_PAGES ? GIANT_PAGES : BLOCK_PAGES;
	uint64_t end = e->base.v + e->npages, used = 0;

	expect(au, e->base.v % span == e->gfn.v % span, "extent %llx: not congruent to gfn %llx",
	       ULL(e->base.v), ULL(e->gfn.v));
	for (uint64_t at = ALIGN_DOWN(e->base.v, BLOCK_PAGES); at < end; at += BLOCK_PAGES) {
		const struct section *s = pfn_section(au->pool, PFN(at));
		const struct block *b = s ? pfn_block(au->pool, PFN(at)) : NULL;

		if (!expect(au, b && b->extent == e, "extent %llx: the block of pfn %llx is not its",
			    ULL(e->base.v), ULL(at)))
			continue;
		expect(au, READ_ONCE(b->used) <= BLOCK_PAGES, "block %llx: %u pages in use", ULL(at),
		       READ_ONCE(b->used));
		used += READ_ONCE(b->used);
	}
	expect(au, used <= READ_ONCE(e->refs), "extent %llx: %llu pages in use, %llu references",
	       ULL(e->base.v), ULL(used), ULL(READ_ONCE(e->refs)));
}

static void audit_extents(struct audit *au, uint64_t *refs)
{
	const struct pool_private *p = au->pool->priv;
	uint64_t n = 0, pages = 0, stuck = 0;

	list_for_each(l, &p->extents) {
		const struct extent *e = container_of(l, struct extent, node);

		n++;
		pages += e->npages;
		*refs += e->kind == EXTENT_HOME ? READ_ONCE(e->refs) : 0;
		audit_extent(au, e);
	}
	for (uint64_t word = 0; word * 64 < p->nsections; word++) {
		for (uint64_t bits = p->taken[word]; bits; bits &= bits - 1) {
			const struct section *s = au->pool->sections[word * 64 + __builtin_ctzll(bits)];

			if (s && s->index && !s->arena)
				audit_extent_section(au, s, &stuck);
		}
	}
	expect(au, n == p->nextents && pages == p->extent_pages,
	       "%llu extents of %llu pages, counters %llu, %llu", ULL(n), ULL(pages), ULL(p->nextents),
	       ULL(p->extent_pages));
	expect(au, stuck == p->stuck, "%llu sections belong to nobody, %llu are stuck", ULL(stuck),
	       ULL(p->stuck));
}

static void audit_partial(struct audit *au, struct pool_domain *d)
{
	list_for_each(l, &d->partial) {
		const struct section *s = container_of(l, struct section, node);

		expect(au, s->domain == d && !s->arena && s->users && s->used != ~(uint64_t)0,
		       "section %u: on domain %u's list by mistake", s->index, d->id);
	}
}

/* P4 and F1 of the run that starts at `pfn`. Returns its length. */
static uint64_t audit_run(struct audit *au, pfn_t pfn)
{
	struct frame *f = pfn_frame(au->pool, pfn), *b;
	enum frame_kind kind = frame_kind(f);
	unsigned order = frame_order(f);
	uint64_t n = (uint64_t)1 << order;
	uint32_t refs = READ_ONCE(f->refs);
	bool idle = kind == FRAME_FREE || kind == FRAME_CACHED || kind == FRAME_PENDING;

	expect(au, pfn.v % n == 0, "pfn %llx kind %d: order %u not aligned", ULL(pfn.v), kind, order);
	expect(au, kind != FRAME_TAIL && kind != FRAME_HOME && kind != FRAME_DEVICE && kind != FRAME_ZERO,
	       "pfn %llx: kind %d heads a run of the arena", ULL(pfn.v), kind);
	/* A larger run in use or pending is counted in its struct block. */
	if (kind == FRAME_FREE || kind == FRAME_CACHED || (order == 0 && kind != FRAME_RESERVED))
		expect(au, idle == (refs == 0), "pfn %llx kind %d: refs %u", ULL(pfn.v), kind, refs);
	for (uint64_t i = 1; i < n; i++)
		expect(au, frame_kind(f + i) != FRAME_FREE && frame_kind(f + i) != FRAME_CACHED,
		       "pfn %llx: free inside the run of order %u at %llx", ULL(pfn.v + i), order,
		       ULL(pfn.v));
	if (kind == FRAME_FREE) {
		b = pfn_frame(au->pool, PFN(pfn.v ^ n));
		expect(au, order >= BLOCK_ORDER || frame_kind(b) != FRAME_FREE || frame_order(b) != order,
		       "pfn %llx: its buddy of order %u is free too", ULL(pfn.v), order);
		au->free += n;
	} else if (kind == FRAME_CACHED) {
		expect(au, order == 0, "pfn %llx: cached with order %u", ULL(pfn.v), order);
		au->cached += n;
	} else if (kind == FRAME_RESERVED && (READ_ONCE(f->bits) & FRAME_POISON)) {
		au->poisoned += n;
	} else {
		au->used += n;
	}
	return n;
}

static void audit_block(struct audit *au, const struct section *s, unsigned i)
{
	pfn_t start = PFN(s->index * SECTION_PAGES + i * BLOCK_PAGES);
	struct frame *f = pfn_frame(au->pool, start);
	bool used = s->used >> i & 1, hole = s->hole >> i & 1;
	uint64_t at = 0;

	expect(au, !s->block[i].extent, "arena block %llx has an extent", ULL(start.v));
	expect(au, !(used && hole), "block %llx: used and without memory", ULL(start.v));
	au->holes += hole;
	if (au->skip) {
		au->skip--;
		expect(au, used && !hole, "block %llx lies in a run, but is free", ULL(start.v));
		return;
	}
	if (hole)
		return;
	expect(au, used == !(frame_kind(f) == FRAME_FREE && frame_order(f) == BLOCK_ORDER),
	       "block %llx: used %d, kind %d order %u", ULL(start.v), used, frame_kind(f), frame_order(f));
	while (at < BLOCK_PAGES)
		at += audit_run(au, pfn_add(start, at));
	au->skip = at / BLOCK_PAGES - 1;
}

static void audit_lists(struct audit *au, const struct arena *a)
{
	uint64_t listed = 0;

	for (unsigned order = 0; order <= BLOCK_ORDER; order++)
		for (uint32_t prev = 0, at = a->head[order]; at;
		     prev = at, at = pfn_frame(au->pool, PFN(at))->free.next) {
			struct frame *f = pfn_frame(au->pool, PFN(at));

			if (!expect(au,
				    frame_kind(f) == FRAME_FREE && frame_order(f) == order &&
					f->free.prev == prev,
				    "pfn %x on list %u: kind %d order %u prev %x", at, order, frame_kind(f),
				    frame_order(f), f->free.prev))
				break;
			listed += (uint64_t)1 << order;
		}
	expect(au, listed == au->free, "domain %u: %llu frames listed, %llu free", a->domain->id, ULL(listed),
	       ULL(au->free));
}

static void audit_magazines(struct audit *au, const struct arena *a)
{
	uint64_t cached = 0;

	for (unsigned i = 0; i < a->nmag; i++) {
		const struct magazine *m = &a->mag[i];

		expect(au, m->count <= MAG_SIZE, "magazine %u holds %u", i, m->count);
		for (unsigned j = 0; j < MIN(m->count, (uint32_t)MAG_SIZE); j++) {
			const struct section *s = pfn_section(au->pool, PFN(m->pfn[j]));

			expect(au,
			       s && s->arena == a &&
				   frame_kind(pfn_frame(au->pool, PFN(m->pfn[j]))) == FRAME_CACHED,
			       "magazine %u: pfn %x is not cached", i, m->pfn[j]);
			cached++;
		}
	}
	expect(au, cached == au->cached, "domain %u: %llu frames in caches, %llu cached", a->domain->id,
	       ULL(cached), ULL(au->cached));
}

static void audit_arena(struct audit *au, const struct arena *a)
{
	uint64_t sections = 0;
	uint32_t last = 0;

	au->free = au->cached = au->used = au->holes = au->poisoned = au->skip = 0;
	list_for_each(l, &a->sections) {
		const struct section *s = container_of(l, struct section, node);

		sections++;
		expect(au, s->index > last, "section %u comes after %u", s->index, last);
		expect(au, s->arena == a && s->domain == a->domain, "section %u is another arena's",
		       s->index);
		last = s->index;
		for (unsigned i = 0; i < SECTION_BLOCKS; i++)
			audit_block(au, s, i);
	}
	expect(au, sections == a->nsections && au->holes == a->holes && a->in_motion == 0,
	       "domain %u: %llu sections, %llu holes; counters %llu, %llu, in motion %llu", a->domain->id,
	       ULL(sections), ULL(au->holes), ULL(a->nsections), ULL(a->holes), ULL(a->in_motion));
	expect(au, au->free == READ_ONCE(a->free) && au->poisoned == a->poisoned,
	       "domain %u: %llu free, counter %llu", a->domain->id, ULL(au->free), ULL(READ_ONCE(a->free)));
	audit_lists(au, a);
	audit_magazines(au, a);
	au->arena_used += au->used;
}

void pool_audit(struct pool *pool, void (*report)(void *opaque, const char *line), void *opaque,
		uint64_t *checks)
{
	struct audit au = {.pool = pool, .report = report, .opaque = opaque};
	struct pool_private *p = pool->priv;
	uint64_t charged = READ_ONCE(p->charged), pending, refs = 0;

	lock_take(&p->lock);
	audit_sections(&au);
	audit_extents(&au, &refs);
	for_each_domain(d, pool) {
		audit_partial(&au, d);
		audit_arena(&au, &d->arena);
	}
	pending = pending_walk(pool);
	expect(&au, pending == READ_ONCE(p->pending), "%llu frames pending, counter %llu", ULL(pending),
	       ULL(READ_ONCE(p->pending)));
	/* P2; a home page that is mapped holds a reference of its extent. */
	expect(&au, charged >= au.arena_used && charged - au.arena_used <= refs,
	       "charged %llu, arena %llu, references of home extents %llu", ULL(charged), ULL(au.arena_used),
	       ULL(refs));
	expect(&au, !p->limit || charged <= p->limit, "charged %llu, limit %llu", ULL(charged),
	       ULL(p->limit));
	lock_drop(&p->lock);
	*checks += au.checks;
}
