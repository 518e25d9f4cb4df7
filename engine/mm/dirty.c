/* SPDX-License-Identifier: MIT */
/*
 * Dirty and accessed logs.
 *
 *   log -> top[256] -> mid[256] -> low[512] -> chunk: 32,768 bits and a summary
 *
 * A chunk covers 128 MiB: 512 words of bits, and 512 summary bits that say which
 * words are not zero. A harvest reads summaries first, so a clean guest costs a
 * few loads for each 128 MiB. It runs as a change (SOFT_DIRTY) through the
 * funnel: between start and end no secondary MMU holds, or is given, a
 * translation that was marked before.
 *
 * Invariants:
 *  D1  a mark precedes the write that it reports: secondary MMUs mark before
 *      they install, holders before they copy.
 *  D2  mark: word bit, then summary bit. Harvest: summary, then words. So a bit
 *      whose summary bit was taken just before stays for the next harvest, with
 *      its summary bit set again by the marker, or is seen by this one.
 *  D3  a mark never fails: without memory for a chunk the log reports everything
 *      (`overflow`) at the next harvest.
 *
 * Locks taken: mm->dirty_lock for opening and closing; marks are lock-free in a
 * read section.
 */
#include "mm/change.h"
#include "mm/dirty.h"
#include "mm/mirror.h"
#include "mm/region.h"

#define CHUNK_SHIFT 15
#define CHUNK_PAGES ((uint64_t)1 << CHUNK_SHIFT)
#define CHUNK_WORDS (CHUNK_PAGES / 64)
#define TOP 256
#define MID 256
#define LOW 512
_Static_assert(CHUNK_SHIFT + 9 + 8 + 8 == GFN_BITS, "the tree covers all gfns");

struct chunk {
	_Atomic uint64_t summary[CHUNK_WORDS / 64];
	_Atomic uint64_t word[CHUNK_WORDS];
};

struct low {
	struct chunk *_Atomic chunk[LOW];
};

struct mid {
	struct low *_Atomic low[MID];
};

struct dirty_log {
	struct dirty_log *_Atomic next;
	struct mm *mm;
	struct env *env; /* outlives the mm: closing frees after a grace period */
	uint32_t kind, flags;
	_Atomic bool overflow;
	_Atomic uint64_t bytes; /* of the nodes */
	struct mid *_Atomic mid[TOP];
	struct defer_node defer;
};

/* -- the tree -------------------------------------------------------------------- */

/* Returns *slot, allocating it if it is empty. NULL: no memory. */
static void *node_get(struct dirty_log *log, void *_Atomic *slot, size_t bytes)
{
	struct env *env = log->env;
	void *node = load_acquire(slot), *none = NULL;

	if (node)
		return node;
	node = env_alloc(env, bytes);
	if (!node)
		return NULL;
	if (atomic_compare_exchange_strong(slot, &none, node)) {
		add_relaxed(&log->bytes, bytes);
		return node;
	}
	env_free(env, node, bytes);
	return none;
}

static struct chunk *chunk_get(struct dirty_log *log, gfn_t gfn)
{
	uint64_t c = gfn.v >> CHUNK_SHIFT;
	struct mid *mid = node_get(log, (void *_Atomic *)&log->mid[c / LOW / MID], sizeof(*mid));
	struct low *low = mid ? node_get(log, (void *_Atomic *)&mid->low[c / LOW % MID], sizeof(*low)) : NULL;

	return low ? node_get(log, (void *_Atomic *)&low->chunk[c % LOW], sizeof(struct chunk)) : NULL;
}

/* The chunk that covers *gfn, or NULL after moving *gfn to the next page that a chunk may cover. */
static struct chunk *chunk_find(struct dirty_log *log, gfn_t *gfn)
{
	uint64_t c = gfn->v >> CHUNK_SHIFT;
	struct mid *mid = load_acquire(&log->mid[c / LOW / MID]);
	struct low *low = mid ? load_acquire(&mid->low[c / LOW % MID]) : NULL;
	struct chunk *chunk = low ? load_acquire(&low->chunk[c % LOW]) : NULL;

	if (!mid)
		gfn->v = (c / LOW / MID + 1) * MID * LOW << CHUNK_SHIFT;
	else if (!low)
		gfn->v = (c / LOW + 1) * LOW << CHUNK_SHIFT;
	else if (!chunk)
		gfn->v = (c + 1) << CHUNK_SHIFT;
	return chunk;
}

static void log_free(struct dirty_log *log)
{
	struct env *env = log->env;

	for (unsigned i = 0; i < TOP; i++) {
		struct mid *mid = atomic_load(&log->mid[i]);

		for (unsigned j = 0; mid && j < MID; j++) {
			struct low *low = atomic_load(&mid->low[j]);

			for (unsigned k = 0; low && k < LOW; k++)
				env_free(env, atomic_load(&low->chunk[k]), sizeof(struct chunk));
			env_free(env, low, sizeof(*low));
		}
		env_free(env, mid, sizeof(*mid));
	}
	env_free(env, log, sizeof(*log));
}

/* -- marking ------------------------------------------------------------------------- */

/*
 * The word, then its summary bit; a harvest takes them the other way round. All of it seq_cst: a summary bit that is
 * seen here, and stays unset therefore, must not be one that the harvest has taken before the word's bit was there.
 */
static void chunk_mark(struct chunk *c, unsigned word, uint64_t bits)
{
	if ((atomic_load_explicit(&c->word[word], memory_order_relaxed) & bits) != bits)
		atomic_fetch_or_explicit(&c->word[word], bits, memory_order_seq_cst);
	if (!(atomic_load_explicit(&c->summary[word / 64], memory_order_seq_cst) >> (word % 64) & 1))
		atomic_fetch_or_explicit(&c->summary[word / 64], (uint64_t)1 << (word % 64), memory_order_release);
}

static void log_mark(struct dirty_log *log, gfn_t gfn, uint64_t npages)
{
	gfn_t end = gfn_add(gfn, npages);

	while (gfn.v < end.v) {
		struct chunk *c = chunk_get(log, gfn);
		gfn_t stop = GFN(MIN(end.v, ALIGN_DOWN(gfn.v, 64) + 64));
		uint64_t bits = (stop.v - gfn.v == 64 ? ~(uint64_t)0 : ((uint64_t)1 << (stop.v - gfn.v)) - 1)
				<< (gfn.v % 64);

		if (!c) {
			atomic_store(&log->overflow, true);
			return;
		}
		chunk_mark(c, gfn.v / 64 % CHUNK_WORDS, bits);
		gfn = stop;
	}
}

/* Merging has something to do. Writes it hears of in its own time if the advisor sets the pace. */
static bool marks_are_due(const struct dirty_log *log, uint32_t kind)
{
	return kind == DIRTY_MERGE || (kind == KAGE_DIRTY_WRITTEN && !READ_ONCE(log->env->paced));
}

static void logs_mark(struct mm *mm, uint32_t kind, gfn_t gfn, uint64_t npages)
{
	rcu_enter();
	for (struct dirty_log *log = load_acquire(&mm->dirty); log; log = load_acquire(&log->next)) {
		if (log->kind == DIRTY_MERGE && marks_are_due(log, kind))
			env_due(log->env);
		if (log->kind == kind || (log->kind == DIRTY_MERGE && kind == KAGE_DIRTY_WRITTEN))
			log_mark(log, gfn, npages);
	}
	rcu_leave();
}

void mm_mark_changed(struct mm *mm, gfn_t gfn, uint64_t npages)
{
	if (mm_dirty_logged(mm))
		logs_mark(mm, DIRTY_MERGE, gfn, npages);
}

void mm_mark_dirty(struct mm *mm, gfn_t gfn, uint64_t npages)
{
	if (unlikely(mm_dirty_logged(mm)))
		logs_mark(mm, KAGE_DIRTY_WRITTEN, gfn, npages);
}

void mm_mark_accessed(struct mm *mm, gfn_t gfn, uint64_t npages)
{
	if (unlikely(mm_dirty_logged(mm)))
		logs_mark(mm, KAGE_DIRTY_ACCESSED, gfn, npages);
}

bool mm_dirty_accessed(const struct mm *mm)
{
	bool any = false;

	rcu_enter();
	for (struct dirty_log *log = load_acquire(&mm->dirty); log; log = load_acquire(&log->next))
		any |= log->kind == KAGE_DIRTY_ACCESSED;
	rcu_leave();
	return any;
}

bool mm_dirty_fine(const struct mm *mm)
{
	bool fine = false;

	if (!mm_dirty_logged(mm))
		return false;
	rcu_enter();
	for (struct dirty_log *log = load_acquire(&mm->dirty); log; log = load_acquire(&log->next))
		fine |= (log->flags & KAGE_DIRTY_FINE) != 0;
	rcu_leave();
	return fine;
}

/* -- harvesting ------------------------------------------------------------------------ */

struct harvest {
	struct change c;
	struct change_target target;
	struct dirty_log *log;
	gfn_t start, end;
	void (*take)(struct harvest *h, gfn_t gfn, uint64_t bits); /* NULL: nothing is taken */
	bool (*full)(struct harvest *h);
	uint64_t *bitmap;
	gfn_t origin; /* of bit 0 */
	struct kage_dirty_run *run;
	uint64_t room, count;
};

/* The bits of one word that lie in the range. */
static uint64_t word_mask(const struct harvest *h, gfn_t first)
{
	uint64_t mask = ~(uint64_t)0;

	if (first.v < h->start.v)
		mask &= ~(uint64_t)0 << (h->start.v - first.v);
	if (first.v + 64 > h->end.v)
		mask &= ~(uint64_t)0 >> (first.v + 64 - h->end.v);
	return mask;
}

static bool harvest_full(struct harvest *h)
{
	return h->run && h->count == h->room;
}

static void harvest_word(struct harvest *h, struct chunk *c, unsigned word, gfn_t first)
{
	uint64_t mask = word_mask(h, first), bits;

	if (mask == ~(uint64_t)0)
		bits = atomic_exchange_explicit(&c->word[word], 0, memory_order_seq_cst);
	else
		bits = atomic_fetch_and_explicit(&c->word[word], ~mask, memory_order_seq_cst) & mask;
	if (bits)
		h->take(h, first, bits);
	if (atomic_load_explicit(&c->word[word], memory_order_relaxed)) /* neighbours outside, or handed back */
		chunk_mark(c, word, 0);
}

static void harvest_chunk(struct harvest *h, struct chunk *c, gfn_t base, uint64_t from, uint64_t to)
{
	for (unsigned s = from / 64 / 64; s <= (to - 1) / 64 / 64; s++) {
		uint64_t summary = atomic_load_explicit(&c->summary[s], memory_order_relaxed);
		unsigned lo = s * 64, hi = lo + 64;

		if (!summary)
			continue;
		/* only words of the range lose their summary bit */
		if (from / 64 > lo)
			summary &= ~(uint64_t)0 << (from / 64 - lo);
		if ((to - 1) / 64 + 1 < hi)
			summary &= ~(uint64_t)0 >> (hi - ((to - 1) / 64 + 1));
		summary &= atomic_fetch_and_explicit(&c->summary[s], ~summary, memory_order_seq_cst);
		for (; summary; summary &= summary - 1) {
			unsigned word = lo + __builtin_ctzll(summary);

			if (harvest_full(h)) {
				atomic_fetch_or_explicit(&c->summary[s], summary, memory_order_release);
				return;
			}
			harvest_word(h, c, word, gfn_add(base, word * 64));
		}
	}
}

/* Everything that regions have is dirty. Without memory it stays an overflow. */
static void mark_regions(struct dirty_log *log)
{
	struct regions *set;

	rcu_enter();
	set = load_acquire(&log->mm->regions);
	for (unsigned i = 0; i < set->count; i++)
		log_mark(log, set->r[i].start, set->r[i].npages);
	rcu_leave();
}

/* The same for the range of a harvest, without bits: there is no memory for them (D3). */
static void harvest_overflow(struct harvest *h)
{
	struct regions *set;

	rcu_enter();
	set = load_acquire(&h->log->mm->regions);
	for (unsigned i = 0; i < set->count; i++) {
		gfn_t at = GFN(MAX(h->start.v, set->r[i].start.v));
		gfn_t end = GFN(MIN(h->end.v, region_end(&set->r[i]).v));

		for (; at.v < end.v; at = GFN(ALIGN_DOWN(at.v, 64) + 64)) {
			gfn_t first = GFN(ALIGN_DOWN(at.v, 64));
			uint64_t bits = ~(uint64_t)0 << (at.v - first.v);

			if (end.v - first.v < 64)
				bits &= ((uint64_t)1 << (end.v - first.v)) - 1;
			h->take(h, first, bits);
		}
	}
	rcu_leave();
}

static void harvest_commit(struct change *c)
{
	struct harvest *h = container_of(c, struct harvest, c);
	gfn_t at = h->start;

	if (!h->take)
		return;
	if (atomic_exchange(&h->log->overflow, false))
		mark_regions(h->log);
	while (at.v < h->end.v && !harvest_full(h)) {
		struct chunk *chunk = chunk_find(h->log, &at);
		gfn_t base = GFN(ALIGN_DOWN(at.v, CHUNK_PAGES));
		gfn_t end = GFN(MIN(h->end.v, base.v + CHUNK_PAGES));

		if (!chunk)
			continue;
		harvest_chunk(h, chunk, base, at.v - base.v, end.v - base.v);
		at = end;
	}
	if (atomic_load(&h->log->overflow) && !harvest_full(h))
		harvest_overflow(h);
}

static bool chunk_clean(struct chunk *c)
{
	uint64_t any = 0;

	for (unsigned i = 0; i < ARRAY_SIZE(c->summary); i++)
		any |= atomic_load_explicit(&c->summary[i], memory_order_relaxed);
	return any == 0;
}

gfn_t dirty_next(struct dirty_log *log, gfn_t gfn)
{
	if (atomic_load(&log->overflow))
		return GFN(ALIGN_DOWN(gfn.v, CHUNK_PAGES)); /* everything is */
	while (gfn.v < (uint64_t)1 << GFN_BITS) {
		struct chunk *c = chunk_find(log, &gfn);

		if (!c)
			continue;
		if (!chunk_clean(c))
			return GFN(ALIGN_DOWN(gfn.v, CHUNK_PAGES));
		gfn.v = ALIGN_DOWN(gfn.v, CHUNK_PAGES) + CHUNK_PAGES;
	}
	return DIRTY_NONE;
}

uint64_t dirty_bytes(const struct dirty_log *log)
{
	return sizeof(*log) + READ_ONCE(log->bytes);
}

static bool log_clean(struct dirty_log *log, gfn_t start, gfn_t end)
{
	if (atomic_load(&log->overflow))
		return false;
	while (start.v < end.v) {
		struct chunk *c = chunk_find(log, &start);

		if (!c)
			continue;
		if (!chunk_clean(c))
			return false;
		start = GFN(ALIGN_DOWN(start.v, CHUNK_PAGES) + CHUNK_PAGES);
	}
	return true;
}

static const struct change_ops harvest_ops = { .commit = harvest_commit };

static int64_t harvest_run(struct harvest *h)
{
	struct mm *mm = h->log->mm;
	int r;

	h->c.ops = &harvest_ops;
	h->c.targets = 1;
	h->c.target = &h->target;
	h->c.reason = KAGE_REASON_SOFT_DIRTY;
	h->c.lost = h->log->kind == KAGE_DIRTY_ACCESSED ? KAGE_RWX : KAGE_WRITE;
	h->target.mm = mm;
	h->target.notify.start = h->start;
	h->target.notify.end = h->end;
	r = change_run(&h->c);
	return r ? r : (int64_t)h->count;
}

static void bitmap_or(struct harvest *h, uint64_t word, uint64_t bits)
{
	if (!bits)
		return;
	h->count += __builtin_popcountll(bits & ~h->bitmap[word]);
	h->bitmap[word] |= bits;
}

static void take_bitmap(struct harvest *h, gfn_t gfn, uint64_t bits)
{
	uint64_t at, shift;

	if (gfn.v < h->origin.v) {
		bitmap_or(h, 0, bits >> (h->origin.v - gfn.v));
		return;
	}
	at = (gfn.v - h->origin.v) / 64;
	shift = (gfn.v - h->origin.v) % 64;
	bitmap_or(h, at, bits << shift);
	if (shift)
		bitmap_or(h, at + 1, bits >> (64 - shift));
}

/*
 * Keeps the mirror where it is. Not mm->range: KVM's calls wait for vCPUs, one of which may wait for a
 * fault, which would wait behind a writer of mm->range that waits for us. Merging holds its guests' families anyway.
 */
static bool mirror_keep(struct mm *mm, bool merging, struct brlock_held *held)
{
	if (!merging)
		*held = brlock_read(&mm->family->lock);
	return !merging;
}

static void mirror_let_go(struct mm *mm, bool kept, struct brlock_held held)
{
	if (kept)
		brlock_read_drop(&mm->family->lock, held);
}

/* The mirror's hardware logs writes as long as somebody wants to know. */
static int mirror_track(struct mm *mm)
{
	return mm->mirror ? mm->mirror->ops->track(mm->mirror) : 0;
}

/* What a mirror's hardware logged goes into all open logs first. */
static int fetch(struct dirty_log *log, gfn_t start, gfn_t end, const struct dirty_left *left)
{
	struct mm *mm = log->mm;
	struct brlock_held held;
	bool kept = mirror_keep(mm, log->kind == DIRTY_MERGE, &held);
	int r = mm->mirror ? mm->mirror->ops->harvest(mm->mirror, start, end, left) : 0;

	mirror_let_go(mm, kept, held);
	return r;
}

/* All open logs are merging's. (A log that is being opened gets more than it needs at most.) */
static bool merge_only(struct mm *mm)
{
	bool only = true;

	rcu_enter();
	for (struct dirty_log *log = load_acquire(&mm->dirty); log; log = load_acquire(&log->next))
		only &= log->kind == DIRTY_MERGE;
	rcu_leave();
	return only;
}

int dirty_fetch(struct dirty_log *log, const struct dirty_left *left)
{
	return fetch(log, GFN(0), GFN((uint64_t)1 << GFN_BITS), merge_only(log->mm) ? left : NULL);
}

static int64_t harvest(struct harvest *h)
{
	int r = fetch(h->log, h->start, h->end, NULL);

	if (r)
		return r;
	return log_clean(h->log, h->start, h->end) ? 0 : harvest_run(h);
}

int64_t dirty_collect_bitmap(struct dirty_log *log, gfn_t start, uint64_t npages, uint64_t *bitmap)
{
	struct harvest h = { .log = log, .start = start, .end = gfn_add(start, npages), .take = take_bitmap,
			     .bitmap = bitmap, .origin = start };

	memset(bitmap, 0, (npages + 63) / 64 * 8);
	return harvest(&h);
}

int64_t dirty_take(struct dirty_log *log, gfn_t start, uint64_t npages, uint64_t *bitmap)
{
	struct harvest h = { .log = log, .start = start, .end = gfn_add(start, npages), .take = take_bitmap,
			     .bitmap = bitmap, .origin = GFN(ALIGN_DOWN(start.v, 64)) };

	memset(bitmap, 0, (ALIGN_UP(h.end.v, 64) - h.origin.v) / 8);
	return log_clean(log, h.start, h.end) ? 0 : harvest_run(&h);
}

static void take_runs(struct harvest *h, gfn_t gfn, uint64_t bits)
{
	while (bits) {
		unsigned at = __builtin_ctzll(bits);
		uint64_t rest = bits >> at;
		unsigned len = rest == ~(uint64_t)0 ? 64 : __builtin_ctzll(~rest);
		struct kage_dirty_run *last = h->count ? &h->run[h->count - 1] : NULL;
		uint64_t gpa = gfn_gpa(gfn_add(gfn, at)).v;

		if (last && last->gpa + (last->pages << PAGE_SHIFT) == gpa) {
			last->pages += len;
		} else if (h->count == h->room) {
			log_mark(h->log, gfn_add(gfn, at), len); /* for the next call */
		} else {
			h->run[h->count++] = (struct kage_dirty_run){ .gpa = gpa, .pages = len };
		}
		bits = at + len >= 64 ? 0 : bits & (~(uint64_t)0 << (at + len));
	}
}

int64_t dirty_collect_runs(struct dirty_log *log, gfn_t start, uint64_t npages, struct kage_dirty_run *run,
			   uint64_t room)
{
	struct harvest h = { .log = log, .start = start, .end = gfn_add(start, npages), .take = take_runs,
			     .run = run, .room = room };

	return harvest(&h);
}

/* -- opening and closing ----------------------------------------------------------------- */

static void log_unlink(struct mm *mm, struct dirty_log *log)
{
	struct dirty_log *_Atomic *at;

	lock_take(&mm->dirty_lock);
	for (at = &mm->dirty; atomic_load(at) != log; at = &atomic_load(at)->next)
		;
	atomic_store(at, atomic_load(&log->next));
	lock_drop(&mm->dirty_lock);
}

static void log_reclaim(struct defer_node *node, void *arg)
{
	log_free(container_of(node, struct dirty_log, defer));
}

void dirty_close(struct dirty_log *log)
{
	struct brlock_held held;
	bool kept = mirror_keep(log->mm, false, &held);

	log_unlink(log->mm, log);
	mirror_track(log->mm); /* that it logs on costs time, nothing else */
	mirror_let_go(log->mm, kept, held);
	defer_add(&log->env->defer, &log->defer, log_reclaim, NULL);
}

static int log_link(struct mm *mm, struct dirty_log *log)
{
	struct brlock_held held;
	bool kept = mirror_keep(mm, log->kind == DIRTY_MERGE, &held);
	int r = mm->mirror && log->kind == KAGE_DIRTY_ACCESSED ? -EOPNOTSUPP : 0; /* KVM does not say who read */

	if (r == 0 && mm->mirror && log->kind != DIRTY_MERGE) /* what merging has left there is older than this log */
		r = mm->mirror->ops->harvest(mm->mirror, GFN(0), GFN((uint64_t)1 << GFN_BITS), NULL);
	if (r == 0) {
		lock_take(&mm->dirty_lock);
		atomic_store(&log->next, atomic_load(&mm->dirty));
		atomic_store(&mm->dirty, log);
		lock_drop(&mm->dirty_lock);
		r = mirror_track(mm);
		if (r)
			log_unlink(mm, log);
	}
	mirror_let_go(mm, kept, held);
	return r;
}

int dirty_open(struct mm *mm, uint32_t kind, uint32_t flags, struct dirty_log **out)
{
	struct dirty_log *log = env_alloc(mm->host->env, sizeof(*log));
	struct harvest h = { .start = GFN(0), .end = GFN((uint64_t)1 << GFN_BITS) };
	int r;

	if (!log)
		return -ENOMEM;
	log->mm = mm;
	log->env = mm->host->env;
	log->kind = kind;
	log->flags = flags;
	r = log_link(mm, log);
	if (r) {
		defer_add(&log->env->defer, &log->defer, log_reclaim, NULL);
		return r;
	}
	/* translations from before did not mark: they go, and from here on everybody sees the log */
	h.log = log;
	r = (int)harvest_run(&h);
	if (r < 0) {
		dirty_close(log);
		return r;
	}
	if (flags & KAGE_DIRTY_INITIALLY_SET)
		mark_regions(log);
	*out = log;
	return 0;
}

struct mm *dirty_mm(struct dirty_log *log)
{
	return log->mm;
}
