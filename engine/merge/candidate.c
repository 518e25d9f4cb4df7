/* SPDX-License-Identifier: MIT */
/*
 * Candidates: frames that were hashed and have no partner yet (KSM's unstable
 * tree, except that it is not thrown away after each pass).
 *
 * One table with open addressing, 16 bytes an entry: the salted hash, and the
 * pfn. The reverse question, "is this frame a candidate?", is answered by the
 * frame's own bits: FRAME_CANDIDATE, and two bits of its hash (FRAME_TAG). So
 * nothing is allocated for a page, a frame that was written loses its mark
 * without being looked up, and one that is freed loses it with its other bits.
 *
 * Invariants:
 *  1. a frame with FRAME_CANDIDATE had the contents that some entry's hash says
 *     when it was marked.
 *  2. an entry whose frame has no mark, or another tag, is garbage: whoever
 *     meets it takes it out. So is one that a comparison has disproved, and one whose frame is pinned:
 *     nobody can be merged with it, and the pin has marked its page as changed, so it is looked at again.
 *  3. `marked` counts marks that were set, less those that merging took away;
 *     frames that were given back with their mark are counted by the pool. The
 *     difference is exact, however much garbage there is.
 *  4. garbage is at most half of a table with more than SWEEP_MIN entries after
 *     each pass. Of frames that were written and hashed anew, whose old entry is told
 *     by its tag alone, each sweep takes three in four.
 *  5. a table that is used to less than a sixteenth after a pass becomes as small as four times what is in it.
 *  6. who sees the mark inside a read section finds the frame's owner in the rest of it, if the mark is still there afterwards:
 *
 *      the reader, inside a read section       unmap, destroy; a COW break of the last entry
 *      bits: CANDIDATE, HOME
 *                                              the last entry goes: DEAD, then PENDING
 *                                              (the pieces of a block keep their bits: only the first is PENDING)
 *      the extent's layer, gfn
 *                                              pool_reap(): a grace period, so the section is over; the slot is emptied, its bits
 *                                              become zero, it lets its reference of the extent go; with the last one:
 *                                              another grace period, and the extent is freed
 *
 *     So a mark that is still to be seen says that neither grace period has passed for whoever sees it. Nobody sets one
 *     later: candidates_add() is for a frame that an entry maps in that same section. Of a PRIVATE frame `where` is
 *     the owner only while its bits say so: it is the link of a DEAD or PENDING one (dead_add() sets the bit first), the record of
 *     a STABLE one (stable_publish() sets the kind first). So the bits are looked at once more.
 *
 * Locks: t->lock, for moments; inside it nothing else is taken.
 *
 * Why not lock-free: a scanner takes the lock once for sixteen pages, which
 * cost it eight microseconds to read.
 */
#include "merge/merge.h"
#include "mm/rmap.h"

#define SLOTS_MIN 1024
#define SWEEP_MIN 4096

static uint32_t tag_of(uint64_t hash)
{
	return (uint32_t)(hash >> 32) & FRAME_TAG;
}

int candidates_init(struct candidates *t, struct env *env)
{
	memset(t, 0, sizeof(*t));
	t->env = env;
	lock_init(&t->lock, RANK_CANDIDATES, 0);
	t->slot = env_alloc(env, SLOTS_MIN * sizeof(*t->slot));
	if (!t->slot)
		return -ENOMEM;
	t->slots = SLOTS_MIN;
	return 0;
}

void candidates_finish(struct candidates *t)
{
	env_free(t->env, t->slot, t->slots * sizeof(*t->slot));
	t->slot = NULL;
	t->slots = t->used = 0;
}

static struct candidate *slot_of(const struct candidates *t, uint64_t hash)
{
	return &t->slot[hash & (t->slots - 1)];
}

static struct candidate *slot_next(const struct candidates *t, struct candidate *c)
{
	return ++c == t->slot + t->slots ? t->slot : c;
}

/* Takes an entry out; those behind it that it had pushed on move up. */
static void slot_clear(struct candidates *t, struct candidate *hole)
{
	uint64_t mask = t->slots - 1, at = (uint64_t)(hole - t->slot);

	for (struct candidate *c = slot_next(t, hole); c->pfn; c = slot_next(t, c)) {
		uint64_t home = c->hash & mask, here = (uint64_t)(c - t->slot);

		if (((here - home) & mask) < ((here - at) & mask))
			continue; /* its home lies behind the hole */
		*hole = *c;
		hole = c;
		at = here;
	}
	hole->pfn = 0;
	t->used--;
}

bool candidate_alive(struct pool *pool, pfn_t pfn)
{
	uint32_t bits;
	enum frame_kind kind;

	if (!pfn_section(pool, pfn))
		return false;
	bits = load_acquire(&pfn_frame(pool, pfn)->bits);
	kind = (enum frame_kind)((bits & FRAME_KIND_MASK) >> FRAME_KIND_SHIFT);
	return bits & FRAME_CANDIDATE && !(bits & (FRAME_PINS_MAX | FRAME_DEAD)) &&
	       (kind == FRAME_HOME || kind == FRAME_PRIVATE);
}

bool candidate_where(struct host *h, pfn_t pfn, uint64_t *where)
{
	if (!candidate_alive(h->pool, pfn))
		return false;
	*where = rmap_where(h, pfn);
	atomic_thread_fence(memory_order_acquire);
	return candidate_alive(h->pool, pfn);
}

/* Inside a read section. */
static bool entry_alive(struct pool *pool, const struct candidate *c)
{
	return candidate_alive(pool, PFN(c->pfn)) &&
	       (READ_ONCE(pfn_frame(pool, PFN(c->pfn))->bits) & FRAME_TAG) == tag_of(c->hash);
}

/* -ENOMEM: it is as it was. */
static int resize(struct candidates *t, uint64_t to)
{
	struct candidate *old = t->slot, *slot = env_alloc(t->env, to * sizeof(*slot));
	uint64_t slots = t->slots;

	if (!slot)
		return -ENOMEM;
	WRITE_ONCE(t->slot, slot);
	WRITE_ONCE(t->slots, to);
	for (uint64_t i = 0; i < slots; i++) {
		struct candidate *c;

		if (!old[i].pfn)
			continue;
		for (c = slot_of(t, old[i].hash); c->pfn; c = slot_next(t, c))
			;
		*c = old[i];
	}
	env_free(t->env, old, slots * sizeof(*old));
	return 0;
}

int candidates_reserve(struct candidates *t, uint64_t n)
{
	if ((t->used + n) * 8 <= t->slots * 5)
		return 0;
	if (resize(t, 2 * t->slots))
		return t->used + n < t->slots - t->slots / 16 ? 0 : -ENOMEM; /* slower, but it works */
	return 0;
}

void candidates_prefetch(const struct candidates *t, uint64_t hash)
{
	const struct candidate *slot = READ_ONCE(t->slot);

	__builtin_prefetch(&slot[hash & (READ_ONCE(t->slots) - 1)], 1);
}

pfn_t candidates_find(struct candidates *t, struct pool *pool, uint64_t hash, pfn_t not)
{
	struct candidate *c = slot_of(t, hash);

	while (c->pfn) {
		if (c->hash != hash || c->pfn == not.v)
			c = slot_next(t, c);
		else if (entry_alive(pool, c))
			return PFN(c->pfn);
		else
			slot_clear(t, c);
	}
	return PFN_NONE;
}

void candidates_add(struct candidates *t, struct pool *pool, uint64_t hash, pfn_t pfn)
{
	_Atomic uint32_t *word = &pfn_frame(pool, pfn)->bits;
	uint32_t bits = atomic_load_explicit(word, memory_order_relaxed);
	struct candidate *c;

	do {
		enum frame_kind kind = (enum frame_kind)((bits & FRAME_KIND_MASK) >> FRAME_KIND_SHIFT);

		if (kind != FRAME_HOME && kind != FRAME_PRIVATE)
			return; /* another thread has made it stable since it was looked at */
	} while (!atomic_compare_exchange_weak_explicit(word, &bits, (bits & ~FRAME_TAG) | FRAME_CANDIDATE | tag_of(hash),
							memory_order_release, memory_order_relaxed));
	if (!(bits & FRAME_CANDIDATE))
		atomic_fetch_add_explicit(&t->marked, 1, memory_order_relaxed);
	for (c = slot_of(t, hash); c->pfn; c = slot_next(t, c))
		if (c->hash == hash && c->pfn == pfn.v)
			return;
	*c = (struct candidate){ .hash = hash, .pfn = pfn.v };
	t->used++;
}

void candidates_drop(struct candidates *t, uint64_t hash, pfn_t pfn)
{
	struct candidate *c;

	lock_take(&t->lock);
	for (c = slot_of(t, hash); c->pfn; c = slot_next(t, c)) {
		if (c->hash == hash && c->pfn == pfn.v) {
			slot_clear(t, c);
			break;
		}
	}
	lock_drop(&t->lock);
}

void candidate_unmark(struct candidates *t, struct frame *f)
{
	if (READ_ONCE(f->bits) & FRAME_CANDIDATE &&
	    atomic_fetch_and_explicit(&f->bits, ~(FRAME_CANDIDATE | FRAME_TAG), memory_order_relaxed) & FRAME_CANDIDATE)
		atomic_fetch_sub_explicit(&t->marked, 1, memory_order_relaxed);
}

uint64_t candidates_count(const struct candidates *t, struct pool *pool)
{
	uint64_t lost = pool_forgotten(pool), marked = READ_ONCE(t->marked);

	return marked > lost ? marked - lost : 0;
}

/* 5. Without memory it stays as it is. */
static void shrink(struct candidates *t)
{
	uint64_t slots = t->slots;

	if (slots == SLOTS_MIN || t->used >= slots / 16)
		return;
	while (slots > SLOTS_MIN && slots > 4 * t->used)
		slots /= 2;
	resize(t, slots);
}

void candidates_sweep(struct candidates *t, struct pool *pool)
{
	lock_take(&t->lock);
	if (t->used > SWEEP_MIN && t->used > 2 * candidates_count(t, pool)) {
		/* An entry that moves up into a cleared slot is looked at there; one that wraps round, not this time. */
		for (uint64_t i = 0; i < t->slots; i++) {
			rcu_enter();
			while (t->slot[i].pfn && !entry_alive(pool, &t->slot[i]))
				slot_clear(t, &t->slot[i]);
			rcu_leave();
		}
	}
	shrink(t);
	lock_drop(&t->lock);
}
