/* SPDX-License-Identifier: MIT */
/*
 * The audit of everything that the primary MMU and the pool believe.
 *
 * With every family and every mm stopped, the tables of all guests are walked,
 * each table page once, and what is counted on the way is compared with the
 * counts that frames and blocks carry (M2), with the write rule (M1), and with
 * the reverse map (M5). Then every frame that carries a count is compared with
 * what the walk found, so that leaks show as well.
 *
 * Counts are kept in a hash from pfn; the audit's memory and time follow what is
 * mapped, not the size of the pool.
 */
#include "mm/fused.h"
#include "mm/layer.h"
#include "mm/region.h"
#include "mm/rmap.h"
#include "mm/stable.h"
#include "mm/table.h"

enum tally_what { TALLY_FRAME = 1, TALLY_BLOCK = 2, TALLY_GIANT = 3, TALLY_TABLE = 4, TALLY_NOTED = 5, TALLY_FUSED = 6 };

struct tally {
	uint64_t key; /* pfn (FUSED: domain) << 3 | what; 0: empty */
	uint64_t count;
};

struct census {
	struct host *h;
	struct audit *a;
	struct tally *slot;
	uint64_t room, used; /* room: power of two */
	uint64_t tables, frames;
	uint32_t domain; /* of the tables that are counted */
	int err;
};

#define CHECK(cs, cond, ...)                                 \
	do {                                                 \
		(cs)->a->checks++;                           \
		if (unlikely(!(cond)))                       \
			(cs)->a->report((cs)->a, __VA_ARGS__); \
	} while (0)

/* -- counting ---------------------------------------------------------------------- */

static struct tally *tally_at(struct tally *slot, uint64_t room, uint64_t key)
{
	uint64_t i = key * 0x9e3779b97f4a7c15u >> 20;

	while (slot[i & (room - 1)].key && slot[i & (room - 1)].key != key)
		i++;
	return &slot[i & (room - 1)];
}

static int tally_grow(struct census *cs)
{
	uint64_t room = cs->room ? cs->room * 2 : 1024;
	struct tally *slot = env_alloc(cs->h->env, room * sizeof(*slot));

	if (!slot)
		return -ENOMEM;
	for (uint64_t i = 0; i < cs->room; i++)
		if (cs->slot[i].key)
			*tally_at(slot, room, cs->slot[i].key) = cs->slot[i];
	env_free(cs->h->env, cs->slot, cs->room * sizeof(*slot));
	cs->slot = slot;
	cs->room = room;
	return 0;
}

/* Counts one more; returns the count. */
static uint64_t tally(struct census *cs, pfn_t pfn, enum tally_what what)
{
	struct tally *t;

	if (cs->used * 2 >= cs->room && tally_grow(cs)) {
		cs->err = -ENOMEM;
		return 1;
	}
	t = tally_at(cs->slot, cs->room, pfn.v << 3 | what);
	if (!t->key) {
		t->key = pfn.v << 3 | what;
		cs->used++;
	}
	return ++t->count;
}

static uint64_t tally_read(const struct census *cs, pfn_t pfn, enum tally_what what)
{
	return cs->room ? tally_at(cs->slot, cs->room, pfn.v << 3 | what)->count : 0;
}

/* First pass: every table page once, every entry of it. */
static void count_table(struct census *cs, pfn_t table, unsigned level)
{
	entry_t *t = table_entries(cs->h->pool, table);

	if (tally(cs, table, TALLY_TABLE) > 1 || cs->err)
		return;
	cs->tables++;
	CHECK(cs, frame_kind(pfn_frame(cs->h->pool, table)) == FRAME_TABLE, "table %#lx: kind %d", (long)table.v,
	      frame_kind(pfn_frame(cs->h->pool, table)));
	for (unsigned i = 0; i < LEVEL_ENTRIES; i++) {
		entry_t e = t[i];

		if (entry_is_table(e))
			count_table(cs, entry_pfn(e), level - 1);
		else if (entry_is_leaf(e) && !(e & ENTRY_SPECIAL))
			tally(cs, entry_pfn(e), level == 0 ? TALLY_FRAME : level == 1 ? TALLY_BLOCK : TALLY_GIANT);
		if (entry_is_fused(e))
			tally(cs, PFN(cs->domain), TALLY_FUSED);
	}
}

static int count_mm(struct mm *mm, void *arg)
{
	struct census *cs = arg;

	cs->domain = mm->domain;
	count_table(cs, entry_pfn(mm->root), root_level(mm->root));
	return cs->err;
}

/* Each entry that the walk found is one that the reverse map finds, and the other way round (M5). */
static int count_leaf(const struct rmap_entry *e, void *arg)
{
	*(uint64_t *)arg += e->level == 0;
	return 0;
}

static void check_rmap(struct census *cs, pfn_t pfn, uint64_t entries)
{
	uint64_t found = 0;
	int r = rmap_walk(cs->h, pfn, count_leaf, &found);

	if (r)
		cs->err = r;
	else
		CHECK(cs, found == entries, "frame %#lx: mapped by %lu entries, its reverse map finds %lu", (long)pfn.v,
		      (long)entries, (long)found);
}

/* Second pass: what frames say equals what was counted. */
static void check_tally(struct census *cs, const struct tally *t)
{
	struct pool *pool = cs->h->pool;
	pfn_t pfn = PFN(t->key >> 3);
	struct frame *f = pfn_frame(pool, pfn);
	uint64_t refs = atomic_load(&f->refs), noted;

	switch ((enum tally_what)(t->key & 7)) {
	case TALLY_TABLE:
		CHECK(cs, refs == t->count, "table %#lx: refs %lu, %lu entries point to it", (long)pfn.v, (long)refs,
		      (long)t->count);
		break;
	case TALLY_FRAME:
		cs->frames++;
		noted = tally_read(cs, pfn, TALLY_NOTED); /* H4 */
		CHECK(cs, refs == t->count + noted, "frame %#lx kind %d: refs %lu, mapped by %lu entries, noted %lu",
		      (long)pfn.v, frame_kind(f), (long)refs, (long)t->count, (long)noted);
		CHECK(cs, frame_kind(f) == FRAME_HOME || frame_kind(f) == FRAME_PRIVATE || frame_kind(f) == FRAME_STABLE,
		      "frame %#lx is mapped, kind %d", (long)pfn.v, frame_kind(f));
		check_rmap(cs, pfn, t->count);
		break;
	case TALLY_BLOCK:
		CHECK(cs, pfn_block(pool, pfn)->refs == (int64_t)t->count, "block %#lx: refs %d, mapped by %lu entries",
		      (long)pfn.v, pfn_block(pool, pfn)->refs, (long)t->count);
		break;
	case TALLY_GIANT:
		CHECK(cs, pfn_block(pool, pfn)->giant == (int64_t)t->count, "giant %#lx: refs %d, mapped by %lu entries",
		      (long)pfn.v, pfn_block(pool, pfn)->giant, (long)t->count);
		break;
	case TALLY_NOTED:
		CHECK(cs, frame_kind(f) == FRAME_STABLE, "frame %#lx kind %d: noted as fused", (long)pfn.v, frame_kind(f));
		CHECK(cs, refs == t->count + tally_read(cs, pfn, TALLY_FRAME), "frame %#lx: refs %lu, noted %lu", (long)pfn.v,
		      (long)refs, (long)t->count);
		break;
	case TALLY_FUSED: /* its domain's reserve has been compared */
		break;
	}
}

/* -- the write rule, the reverse map, regions: each mm ----------------------------------- */

struct mm_check {
	struct census *cs;
	struct mm *mm;
};

static int rmap_finds(const struct rmap_entry *e, void *arg)
{
	return e->slot == arg ? 1 : 0;
}

static bool exclusive(struct census *cs, pfn_t pfn, unsigned level)
{
	struct pool *pool = cs->h->pool;
	uint64_t pieces = 0;

	if (level == 0) {
		pfn_t block = PFN(ALIGN_DOWN(pfn.v, BLOCK_PAGES)), giant = PFN(ALIGN_DOWN(pfn.v, GIANT_PAGES));

		return tally_read(cs, pfn, TALLY_FRAME) == 1 && !tally_read(cs, block, TALLY_BLOCK) &&
		       !tally_read(cs, giant, TALLY_GIANT) && frame_kind(pfn_frame(pool, pfn)) != FRAME_STABLE;
	}
	if (level == 1) {
		for (unsigned i = 0; i < LEVEL_ENTRIES; i++)
			pieces += tally_read(cs, pfn_add(pfn, i), TALLY_FRAME);
		return tally_read(cs, pfn, TALLY_BLOCK) == 1 && pieces == 0 &&
		       !tally_read(cs, PFN(ALIGN_DOWN(pfn.v, GIANT_PAGES)), TALLY_GIANT);
	}
	return tally_read(cs, pfn, TALLY_GIANT) == 1;
}

/* H1: stable frames of a hardened domain are mapped by fused entries, and they map nothing else. */
static void check_fused(struct mm_check *m, entry_t e, unsigned level, gfn_t gfn)
{
	bool hardened = m->mm->family->tenant->reserve != NULL;
	bool stable = level == 0 && frame_kind(pfn_frame(m->cs->h->pool, entry_pfn(e))) == FRAME_STABLE;

	CHECK(m->cs, entry_is_fused(e) == (hardened && stable), "mm %lu gfn %#lx: entry %#llx in a domain that is%s hardened",
	      (long)m->mm->id, (long)gfn.v, (unsigned long long)e, hardened ? "" : " not");
	CHECK(m->cs, !entry_is_fused(e) || !(e & (ENTRY_W | ENTRY_X | ENTRY_SPECIAL)), "mm %lu gfn %#lx: fused, entry %#llx",
	      (long)m->mm->id, (long)gfn.v, (unsigned long long)e);
}

/* G1 of merge/merge.h: what is merged is of one domain. */
static void check_domain(struct mm_check *m, entry_t e, gfn_t gfn)
{
	struct pool *pool = m->cs->h->pool;
	const struct stable *s;

	if (frame_kind(pfn_frame(pool, entry_pfn(e))) != FRAME_STABLE)
		return;
	s = frame_stable(pool, entry_pfn(e));
	CHECK(m->cs, s->domain == m->mm->domain, "mm %lu gfn %#lx: of domain %u, maps stable %#lx of domain %u", (long)m->mm->id,
	      (long)gfn.v, m->mm->domain, (long)s->pfn.v, s->domain);
}

static void check_leaf(struct mm_check *m, entry_t *slot, unsigned level, gfn_t gfn, bool w)
{
	struct census *cs = m->cs;
	entry_t e = *slot;
	const struct region *reg = mm_region(m->mm, gfn);

	CHECK(cs, reg != NULL, "mm %lu gfn %#lx: an entry without a region", (long)m->mm->id, (long)gfn.v);
	check_fused(m, e, level, gfn);
	if (e & ENTRY_SPECIAL) {
		CHECK(cs, !w || (reg && reg->kind == KAGE_REGION_FOREIGN),
		      "mm %lu gfn %#lx: a special entry is writable", (long)m->mm->id, (long)gfn.v);
		return;
	}
	if (level == 0)
		check_domain(m, e, gfn);
	CHECK(cs, !w || exclusive(cs, entry_pfn(e), level), "mm %lu gfn %#lx level %u: writable, but not exclusive",
	      (long)m->mm->id, (long)gfn.v, level);
	CHECK(cs, level == 0 || rmap_walk(cs->h, entry_pfn(e), rmap_finds, slot) == 1,
	      "mm %lu gfn %#lx level %u pfn %#lx: not found by its reverse map", (long)m->mm->id, (long)gfn.v, level,
	      (long)entry_pfn(e).v);
}

static void check_table(struct mm_check *m, pfn_t table, unsigned level, gfn_t gfn, bool w)
{
	entry_t *t = table_entries(m->cs->h->pool, table);

	CHECK(m->cs, !w || tally_read(m->cs, table, TALLY_TABLE) == 1, "mm %lu gfn %#lx: table %#lx is writable, refs %lu",
	      (long)m->mm->id, (long)gfn.v, (long)table.v, (long)tally_read(m->cs, table, TALLY_TABLE));
	for (unsigned i = 0; i < LEVEL_ENTRIES; i++) {
		gfn_t at = gfn_add(gfn, i * level_pages(level));

		if (entry_is_table(t[i]))
			check_table(m, entry_pfn(t[i]), level - 1, at, w && t[i] & ENTRY_W);
		else if (entry_is_leaf(t[i]))
			check_leaf(m, &t[i], level, at, w && t[i] & ENTRY_W);
	}
}

static int check_mm(struct mm *mm, void *arg)
{
	struct mm_check m = { .cs = arg, .mm = mm };
	struct regions *set = mm->regions;

	for (unsigned i = 0; i + 1 < set->count; i++)
		CHECK(m.cs, region_end(&set->r[i]).v <= set->r[i + 1].start.v, "mm %lu: regions %u and %u overlap",
		      (long)mm->id, i, i + 1);
	CHECK(m.cs, mm->layer->mm == mm, "mm %lu: its layer says otherwise", (long)mm->id);
	check_table(&m, entry_pfn(mm->root), root_level(mm->root), GFN(0), mm->root & ENTRY_W);
	return 0;
}

static void check_stable(struct stable *s, void *arg)
{
	struct census *cs = arg;
	const struct stable *next = container_of(s->same.next, struct stable, same);

	CHECK(cs, frame_kind(pfn_frame(cs->h->pool, s->pfn)) == FRAME_STABLE, "stable %#lx: kind %d", (long)s->pfn.v,
	      frame_kind(pfn_frame(cs->h->pool, s->pfn)));
	CHECK(cs, tally_read(cs, s->pfn, TALLY_FRAME) + tally_read(cs, s->pfn, TALLY_NOTED) > 0, "stable %#lx: nothing maps it, refs %u", (long)s->pfn.v,
	      atomic_load(&pfn_frame(cs->h->pool, s->pfn)->refs));
	CHECK(cs, frame_stable(cs->h->pool, s->pfn) == s, "stable %#lx: chain and frame disagree", (long)s->pfn.v);
	CHECK(cs, !(READ_ONCE(pfn_frame(cs->h->pool, s->pfn)->bits) & FRAME_FULL) == !s->full, "stable %#lx: full, or not", (long)s->pfn.v);
	CHECK(cs, next->hash == s->hash && next->domain == s->domain, "stable %#lx: other contents beside it", (long)s->pfn.v);
	CHECK(cs, !s->full || next->full || next->at, "stable %#lx: full, and before one with room", (long)s->pfn.v); /* S4 */
}

/* H6, and what is noted. */
static void count_notes(struct census *cs, const struct reserve *r)
{
	uint64_t fused = tally_read(cs, PFN(r->tenant->id), TALLY_FUSED), left = r->noted;

	CHECK(cs, r->owed == fused + r->noted && r->owed <= r->room,
	      "domain %u: %lu fused entries, %lu references noted, %lu accounted for, room for %lu", r->tenant->id, (long)fused,
	      (long)r->noted, (long)r->owed, (long)r->room);
	for (const struct notes *page = r->note; page; page = page->next) {
		unsigned n = left % NOTES_PAGE ? left % NOTES_PAGE : NOTES_PAGE;

		for (unsigned i = 0; i < n; i++)
			tally(cs, PFN(page->pfn[i]), TALLY_NOTED);
		left -= n;
	}
	CHECK(cs, left == 0, "domain %u: %lu references noted, %lu are not there", r->tenant->id, (long)r->noted, (long)left);
}

/* H5 */
static void count_reserve(struct tenant *t, void *arg)
{
	struct census *cs = arg;
	struct reserve *r = t->reserve;

	count_notes(cs, r);
	for (uint32_t i = 0; i < r->count; i++) {
		const struct frame *f = pfn_frame(cs->h->pool, r->frame[i]);

		CHECK(cs, frame_kind(f) == FRAME_RESERVED && f->refs == 1, "domain %u: frame %#lx of its reserve: kind %d refs %u",
		      t->id, (long)r->frame[i].v, frame_kind(f), f->refs);
	}
}

/* -- stopping everything ------------------------------------------------------------------- */

/* The mm with the lowest id above `id`: range locks are taken in the order of ids. */
static struct mm *mm_after(struct host *h, uint64_t id)
{
	struct mm *best = NULL;

	list_for_each(fp, &h->families) {
		list_for_each(mp, &container_of(fp, struct family, node)->mms) {
			struct mm *mm = container_of(mp, struct mm, node);

			if (mm->id > id && (!best || mm->id < best->id))
				best = mm;
		}
	}
	return best;
}

static struct family *family_after(struct host *h, uint64_t id)
{
	struct family *best = NULL;

	list_for_each(fp, &h->families) {
		struct family *f = container_of(fp, struct family, node);

		if (f->id > id && (!best || f->id < best->id))
			best = f;
	}
	return best;
}

static void stop_all(struct host *h)
{
	brlock_write(&h->lock);
	for (struct family *f = family_after(h, 0); f; f = family_after(h, f->id))
		brlock_write(&f->lock);
	for (struct mm *mm = mm_after(h, 0); mm; mm = mm_after(h, mm->id))
		brlock_write(&mm->range);
}

static void resume_all(struct host *h)
{
	list_for_each(fp, &h->families)
		list_for_each(mp, &container_of(fp, struct family, node)->mms)
			brlock_write_drop(&container_of(mp, struct mm, node)->range);
	list_for_each(fp, &h->families)
		brlock_write_drop(&container_of(fp, struct family, node)->lock);
	brlock_write_drop(&h->lock);
}

static int all_mms(struct host *h, int (*fn)(struct mm *mm, void *arg), void *arg)
{
	list_for_each(fp, &h->families) {
		list_for_each(mp, &container_of(fp, struct family, node)->mms) {
			int r = fn(container_of(mp, struct mm, node), arg);

			if (r)
				return r;
		}
	}
	return 0;
}

static void pool_line(void *opaque, const char *line)
{
	struct audit *a = opaque;

	a->report(a, "%s", line);
}

static void check_pool(struct census *cs)
{
	struct pool_stats st;

	pool_audit(cs->h->pool, pool_line, cs->a, &cs->a->checks);
	pool_stats(cs->h->pool, &st);
	CHECK(cs, st.arena_tables == cs->tables, "pool: %lu table frames, tables reach %lu", (long)st.arena_tables,
	      (long)cs->tables);
}

int host_audit(struct host *h, struct audit *a, int (*more)(struct mm *mm, struct audit *a))
{
	struct census cs = { .h = h, .a = a };

	defer_run(&h->env->defer);
	pool_reap(h->pool);
	stop_all(h);
	cs.err = all_mms(h, count_mm, &cs);
	if (cs.err == 0)
		tenants_hardened(h, count_reserve, &cs);
	for (uint64_t i = 0; cs.err == 0 && i < cs.room; i++)
		if (cs.slot[i].key)
			check_tally(&cs, &cs.slot[i]);
	if (cs.err == 0)
		all_mms(h, check_mm, &cs);
	if (cs.err == 0) {
		stable_each(h, check_stable, &cs);
		check_pool(&cs);
	}
	list_for_each(fp, &h->families)
		list_for_each(mp, &container_of(fp, struct family, node)->mms)
			if (cs.err == 0 && more)
				cs.err = more(container_of(mp, struct mm, node), a);
	resume_all(h);
	env_free(h->env, cs.slot, cs.room * sizeof(*cs.slot));
	return cs.err;
}
