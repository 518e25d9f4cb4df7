/* SPDX-License-Identifier: MIT */
/*
 * Change slots, reader slots, holds: who waits for whom.
 *
 * Structures: struct notify_change_slot and struct notify_reader_slot, each
 * array with an occupancy bitmap, so that nobody looks at a slot that is not
 * in use. A slot is a seqlock of its own: `use` (`ticket`) is odd while the
 * range beside it counts, moves by one at each end, and never goes back.
 *
 *  R1  The range of a slot changes only while its use (ticket) is even. So two
 *      looks at one odd value have the range between them that belongs to it.
 *  R2  A bit is set before its slot is published and cleared after. A bit
 *      without an odd use is a change that has not published: the looker's
 *      slot was published first, and that change will find it (Dekker).
 *  R3  hit only grows. The CAS keeps a change that was delayed, and holds an
 *      old ticket, from wiping out the hit of a later section.
 *  R4  change_find() comes before the look at hit: a change that is gone from
 *      the slots has set hit before it left (release of use; acquire of it).
 *  R5  A reader waits for one use of one slot, never for "the slot is free":
 *      a slot that is taken again at once does not keep it.
 *
 * Slot reuse, as a reader sees it:
 *
 *      change C, slot 3                    reader
 *      use = 5, range A                    bit 3 is set
 *      use = 6                             reads use 5
 *      clear bit; another takes the slot   reads start of A
 *      range B                             reads end of B
 *      use = 7                             reads use 7 (or 6): looks again
 *
 * A hold (N4). Both sides publish, pass a full fence, and look:
 *
 *      change                              writer
 *      use odd                             hold = 1
 *      fence (a)                           fence (c)
 *      hit = ticket                        overlapping change, or hit?
 *      hold? wait until 0 or the             yes: hold = 0, wake; false
 *        ticket has moved                    no: true; write; end
 *
 * If (a) comes first the writer sees the change and backs off; if (c) comes
 * first the change sees the hold and waits; if each sees the other, the writer
 * backs off and its wake lets the change go on.
 *
 * Sleeping: who waits for a change, or for a free slot, adds itself to
 * `waiters` and looks once more at the bitmap; who ends clears its bit and
 * looks at `waiters`. These four accesses are seq_cst, so one sees the other.
 * Sleeps are bounded besides. A hold has its own futex: 2 says that a change
 * sleeps on it.
 *
 * Locks: none. Only the owner of a slot writes its range.
 *
 * Why not one sequence for a guest, as KVM has: every change would send every
 * fault back, and merging makes thousands of changes a second. Why not a range
 * tree under a lock: a fault would write a shared line twice.
 */
#include "base/trace.h"
#include "notify/internal.h"

#define SPINS 100
#define SLEEP_MS 100

/* --- waiting --- */

struct waited {
	bool (*over)(struct notify *n, const struct in_flight *f);
	const struct in_flight *f;
};

static void wait_until(struct notify *n, struct waited w)
{
	for (unsigned i = 0; i < SPINS; i++) {
		if (w.over(n, w.f))
			return;
		cpu_relax();
	}
	atomic_fetch_add_explicit(&n->waiters, 1, memory_order_seq_cst);
	for (;;) {
		uint32_t seen = atomic_load_explicit(&n->ended, memory_order_acquire);

		if (w.over(n, w.f))
			break;
		word_wait(&n->ended, seen, SLEEP_MS);
	}
	atomic_fetch_sub_explicit(&n->waiters, 1, memory_order_relaxed);
}

/* Something left its bitmap, by a seq_cst operation just before. */
static inline void wake_waiters(struct notify *n)
{
	if (likely(atomic_load_explicit(&n->waiters, memory_order_seq_cst) == 0))
		return;
	atomic_fetch_add_explicit(&n->ended, 1, memory_order_release);
	word_wake(&n->ended);
}

/* The look at the bitmap is what pairs with wake_waiters(); a bit set again still shows the use that left. */
static bool change_over(struct notify *n, const struct in_flight *f)
{
	uint64_t used = atomic_load_explicit(&n->changes_used, memory_order_seq_cst);

	return !(used >> f->slot & 1) || get(&n->change[f->slot].use) != f->use;
}

static bool change_slot_free(struct notify *n, const struct in_flight *f)
{
	return ~atomic_load_explicit(&n->changes_used, memory_order_seq_cst) != 0;
}

#define TEMPORARY_WORD (NOTIFY_PERMANENT / 64)
#define TEMPORARY_MASK (~(uint64_t)0 << (NOTIFY_PERMANENT % 64))

static bool reader_slot_free(struct notify *n, const struct in_flight *f)
{
	uint64_t used = atomic_load_explicit(&n->readers_used[TEMPORARY_WORD], memory_order_seq_cst);

	return (~used & TEMPORARY_MASK) != 0;
}

void change_wait(struct notify *n, const struct in_flight *f)
{
	wait_until(n, (struct waited){ change_over, f });
}

/* --- looking at changes --- */

/* R1. False: nothing is in flight there, or not yet (R2). */
static inline bool change_look(const struct notify_change_slot *s, struct in_flight *f)
{
	do {
		f->use = get(&s->use);
		if (!(f->use & 1))
			return false;
		f->start = get(&s->start);
		f->end = get(&s->end);
	} while (unlikely(atomic_load_explicit(&s->use, memory_order_relaxed) != f->use));
	return true;
}

static bool change_find_in(struct notify *n, uint64_t used, uint64_t start, uint64_t end, struct in_flight *f)
{
	for (; used; used &= used - 1) {
		f->slot = (unsigned)__builtin_ctzll(used);
		if (change_look(&n->change[f->slot], f) && f->start < end && start < f->end)
			return true;
	}
	return false;
}

static inline bool find(struct notify *n, uint64_t start, uint64_t end, uint64_t skip, struct in_flight *f)
{
	uint64_t used = get(&n->changes_used) & ~skip;

	return unlikely(used != 0) && change_find_in(n, used, start, end, f);
}

bool change_find(struct notify *n, uint64_t start, uint64_t end, uint64_t skip, struct in_flight *f)
{
	return find(n, start, end, skip, f);
}

void change_drain(struct notify *n)
{
	struct in_flight f;

	for (uint64_t used = get(&n->changes_used); used; used &= used - 1) {
		f.slot = (unsigned)__builtin_ctzll(used);
		if (change_look(&n->change[f.slot], &f))
			change_wait(n, &f);
	}
}

/* --- change slots --- */

static int change_claim(struct notify *n, bool blockable)
{
	uint64_t used = atomic_load_explicit(&n->changes_used, memory_order_relaxed);

	for (;;) {
		if (unlikely(~used == 0)) {
			if (!blockable)
				return -EAGAIN;
			wait_until(n, (struct waited){ change_slot_free, NULL });
			used = atomic_load_explicit(&n->changes_used, memory_order_relaxed);
			continue;
		}
		if (likely(atomic_compare_exchange_weak_explicit(&n->changes_used, &used, used | (used + 1),
								 memory_order_acq_rel, memory_order_relaxed)))
			return __builtin_ctzll(~used);
	}
}

int change_open(struct notify *n, struct notify_change *c, uint64_t start, uint64_t end)
{
	int slot = change_claim(n, c->flags & KAGE_RANGE_BLOCKABLE);
	struct notify_change_slot *s;
	uint64_t use;

	if (unlikely(slot < 0))
		return slot;
	s = &n->change[slot];
	use = atomic_load_explicit(&s->use, memory_order_relaxed) + 1;
	put(&s->start, start); /* release: who sees the new range sees that the old use is over */
	put(&s->end, end);
	put(&s->use, use);
	c->slot = (unsigned)slot;
	c->id = use << 6 | (unsigned)slot;
	c->listeners = NULL;
	if (c->self && c->self->notify == n)
		c->self->own |= (uint64_t)1 << slot;
	atomic_thread_fence(memory_order_seq_cst); /* (a): pairs with (b), (c), set.c (d), interval.c (e) */
	return 0;
}

void change_close(struct notify *n, struct notify_change *c)
{
	uint64_t bit = (uint64_t)1 << c->slot;

	kage_assert(get(&n->change[c->slot].use) == c->id >> 6);
	if (c->self && c->self->notify == n)
		c->self->own &= ~bit;
	put(&n->change[c->slot].use, (c->id >> 6) + 1);
	atomic_fetch_and_explicit(&n->changes_used, ~bit, memory_order_seq_cst);
	wake_waiters(n);
}

/* --- what a change does to readers --- */

static inline struct notify_reader_slot *reader_at(struct notify *n, unsigned slot)
{
	struct notify_reader_slot *piece;

	piece = atomic_load_explicit(&n->reader[slot / NOTIFY_PIECE], memory_order_acquire);
	return &piece[slot % NOTIFY_PIECE];
}

/* The ticket of the section that overlaps, or 0. */
static uint64_t reader_look(const struct notify_reader_slot *s, uint64_t start, uint64_t end)
{
	uint64_t ticket, from, to;

	do {
		ticket = get(&s->ticket);
		if (!(ticket & 1))
			return 0;
		from = get(&s->start);
		to = get(&s->end);
	} while (unlikely(atomic_load_explicit(&s->ticket, memory_order_relaxed) != ticket));
	return from < end && start < to ? ticket : 0;
}

/* R3. Who sets it looks again: a hit that was not due would be a spurious retry. */
static void reader_set_hit(struct notify *n, struct notify_reader_slot *s, uint64_t ticket,
			   const struct notify_change *c)
{
	uint64_t hit = atomic_load_explicit(&s->hit, memory_order_relaxed);

	do {
		if (hit >= ticket)
			return;
	} while (!atomic_compare_exchange_weak_explicit(&s->hit, &hit, ticket, memory_order_acq_rel,
							memory_order_relaxed));
	if (unlikely(!reader_look(s, c->start.v, c->end.v)) && get(&s->ticket) == ticket)
		atomic_fetch_add_explicit(&n->spurious, 1, memory_order_relaxed);
}

static bool hold_lasts(struct notify_reader_slot *s, uint64_t ticket)
{
	return atomic_load_explicit(&s->hold, memory_order_acquire) != 0 && get(&s->ticket) == ticket;
}

static int hold_wait(struct notify_reader_slot *s, uint64_t ticket, bool blockable)
{
	for (unsigned i = 0; hold_lasts(s, ticket); i++) {
		uint32_t held = 1;

		if (!blockable)
			return -EAGAIN;
		if (i < SPINS) {
			cpu_relax();
			continue;
		}
		/* A 2 that lands in a later hold costs its owner one wake. */
		if (!atomic_compare_exchange_strong_explicit(&s->hold, &held, 2, memory_order_relaxed,
							     memory_order_relaxed) && held == 0)
			break;
		if (get(&s->ticket) == ticket)
			word_wait(&s->hold, 2, SLEEP_MS);
	}
	return 0;
}

static int readers_stop(struct notify *n, const struct notify_change *c)
{
	int self = c->self && c->self->notify == n ? c->self->slot : -1;

	for (unsigned w = 0; w < ARRAY_SIZE(n->readers_used); w++) {
		for (uint64_t used = get(&n->readers_used[w]); used; used &= used - 1) {
			unsigned slot = w * 64 + (unsigned)__builtin_ctzll(used);
			struct notify_reader_slot *s = reader_at(n, slot);
			uint64_t ticket;
			int err;

			if ((int)slot == self)
				continue;
			ticket = reader_look(s, c->start.v, c->end.v);
			if (likely(!ticket))
				continue;
			reader_set_hit(n, s, ticket, c);
			err = hold_wait(s, ticket, c->flags & KAGE_RANGE_BLOCKABLE);
			if (err)
				return err;
		}
	}
	return 0;
}

int notify_start(struct notify *n, struct notify_change *c)
{
	int err;

	kage_assert(c->start.v < c->end.v);
	err = change_open(n, c, c->start.v, c->end.v);
	if (unlikely(err))
		return err;
	err = readers_stop(n, c);
	if (likely(!err))
		err = listeners_start(n, c);
	if (unlikely(err))
		change_close(n, c);
	return err;
}

void notify_end(struct notify *n, struct notify_change *c)
{
	if (c->listeners)
		listeners_end(n, c);
	change_close(n, c);
}

/* --- reader slots --- */

static int piece_have(struct notify *n, unsigned piece)
{
	struct notify_reader_slot *none = NULL, *p;

	if (atomic_load_explicit(&n->reader[piece], memory_order_acquire))
		return 0;
	p = env_alloc(n->env, NOTIFY_PIECE * sizeof(*p));
	if (!p)
		return -ENOMEM;
	if (!atomic_compare_exchange_strong_explicit(&n->reader[piece], &none, p, memory_order_release,
						     memory_order_acquire))
		env_free(n->env, p, NOTIFY_PIECE * sizeof(*p)); /* another attach was first */
	return 0;
}

/* Takes a free slot of [from, to), which lie in one word and have their pieces. -1: none is free. */
static int slot_take(struct notify *n, unsigned from, unsigned to)
{
	_Atomic uint64_t *word = &n->readers_used[from / 64];
	uint64_t mask = (~(uint64_t)0 >> (63 - (to - 1) % 64)) & (~(uint64_t)0 << from % 64);
	uint64_t used = atomic_load_explicit(word, memory_order_relaxed);
	uint64_t mine;

	do {
		mine = ~used & mask;
		if (!mine)
			return -1;
		mine &= -mine;
	} while (!atomic_compare_exchange_weak_explicit(word, &used, used | mine, memory_order_acq_rel,
							memory_order_relaxed));
	return (int)(from - from % 64) + __builtin_ctzll(mine);
}

static void slot_give(struct notify_reader *r)
{
	struct notify *n = r->notify;

	atomic_fetch_and_explicit(&n->readers_used[r->slot / 64], ~((uint64_t)1 << r->slot % 64),
				  memory_order_seq_cst);
	r->slot = -1;
	r->at = NULL;
	wake_waiters(n);
}

static void slot_use(struct notify_reader *r, int slot)
{
	r->slot = slot;
	r->at = reader_at(r->notify, (unsigned)slot);
	r->ticket = atomic_load_explicit(&r->at->ticket, memory_order_relaxed);
}

int notify_reader_attach(struct notify *n, struct notify_reader *r)
{
	int slot = -1;
	unsigned piece;

	for (piece = 0; slot < 0 && piece < NOTIFY_PERMANENT / NOTIFY_PIECE; piece++) {
		if (piece_have(n, piece))
			return -ENOMEM;
		slot = slot_take(n, piece * NOTIFY_PIECE, (piece + 1) * NOTIFY_PIECE);
	}
	if (slot < 0 && piece_have(n, piece))
		return -ENOMEM;
	*r = (struct notify_reader){ .notify = n, .slot = -1, .permanent = slot >= 0 };
	if (slot >= 0)
		slot_use(r, slot);
	return 0;
}

void notify_reader_detach(struct notify_reader *r)
{
	if (!r || !r->notify)
		return;
	kage_assert(!(r->ticket & 1) && !r->own);
	if (r->permanent)
		slot_give(r);
	r->notify = NULL;
}

static void temporary_take(struct notify_reader *r)
{
	int slot;

	while ((slot = slot_take(r->notify, NOTIFY_PERMANENT, NOTIFY_READERS)) < 0)
		wait_until(r->notify, (struct waited){ reader_slot_free, NULL });
	slot_use(r, slot);
}

/* --- sections --- */

static inline void section_open(struct notify_reader *r, uint64_t start, uint64_t end)
{
	put(&r->at->start, start); /* release: who sees the new range sees that the old ticket is over */
	put(&r->at->end, end);
	put(&r->at->ticket, ++r->ticket);
	atomic_thread_fence(memory_order_seq_cst); /* (b): pairs with (a) in change_open() */
}

static void hold_drop(struct notify_reader_slot *s)
{
	if (atomic_exchange_explicit(&s->hold, 0, memory_order_release) == 2)
		word_wake(&s->hold);
}

static inline void section_close(struct notify_reader *r)
{
	put(&r->at->ticket, ++r->ticket);
	if (unlikely(atomic_load_explicit(&r->at->hold, memory_order_relaxed)))
		hold_drop(r->at);
}

/*
 * Waits outside of a section, and with a new ticket each time round: what hit
 * the reader while it waited is over when it looks things up.
 */
static void begin_again(struct notify_reader *r, uint64_t start, uint64_t end, struct in_flight *f)
{
	do {
		section_close(r);
		trace(r->notify->env, reader_wait, r->notify->mm_id, start, 0);
		change_wait(r->notify, f);
		section_open(r, start, end);
	} while (find(r->notify, start, end, r->own, f));
}

void notify_read_begin(struct notify_reader *r, gfn_t start, gfn_t end)
{
	struct in_flight f;

	if (unlikely(r->slot < 0))
		temporary_take(r);
	else if (unlikely(r->ticket & 1))
		section_close(r);
	section_open(r, start.v, end.v);
	if (unlikely(find(r->notify, start.v, end.v, r->own, &f)))
		begin_again(r, start.v, end.v, &f);
}

/* The listener's lock orders it: a start that had it before us has published its slot before. */
bool notify_quiet(struct notify *n, gfn_t start, gfn_t end)
{
	struct in_flight f;

	return !find(n, start.v, end.v, 0, &f);
}

/* R4. Only the owner calls it, so the range is its own. */
static inline bool section_clean(struct notify_reader *r)
{
	struct notify_reader_slot *s = r->at;
	uint64_t start = atomic_load_explicit(&s->start, memory_order_relaxed);
	uint64_t end = atomic_load_explicit(&s->end, memory_order_relaxed);
	struct in_flight f;

	return !find(r->notify, start, end, r->own, &f) && get(&s->hit) != r->ticket;
}

static bool section_failed(struct notify_reader *r)
{
	struct notify *n = r->notify;

	atomic_fetch_add_explicit(&n->retried, 1, memory_order_relaxed);
	trace(n->env, reader_hit, n->mm_id, atomic_load_explicit(&r->at->start, memory_order_relaxed), 0);
	return false;
}

bool notify_read_valid(struct notify_reader *r)
{
	kage_assert(r->ticket & 1);
	return likely(section_clean(r)) || section_failed(r);
}

bool notify_read_hold(struct notify_reader *r)
{
	kage_assert(r->ticket & 1);
	if (unlikely(atomic_load_explicit(&r->at->hold, memory_order_relaxed)))
		return true; /* it holds; storing 1 could wipe out a sleeper's 2 */
	atomic_store_explicit(&r->at->hold, 1, memory_order_relaxed);
	atomic_thread_fence(memory_order_seq_cst); /* (c): pairs with (a) in change_open() */
	if (likely(section_clean(r)))
		return true;
	hold_drop(r->at);
	return section_failed(r);
}

void notify_read_end(struct notify_reader *r)
{
	kage_assert(r->ticket & 1);
	section_close(r);
	if (unlikely(!r->permanent))
		slot_give(r);
}
