/* SPDX-License-Identifier: MIT */
/*
 * Table and chains of stable frames. See stable.h.
 */
#include "mm/stable.h"
#include "mm/table.h"
#include <stdlib.h>

struct stable_table {
	uint64_t buckets; /* power of two */
	uint64_t count;	  /* frames */
	uint64_t chains, dups; /* contents with more than one frame; these */
	struct stable **bucket;
};

#define BUCKETS_MIN 256

int stable_init(struct host *h)
{
	struct stable_table *t = env_alloc(h->env, sizeof(*t));

	if (!t)
		return -ENOMEM;
	t->buckets = BUCKETS_MIN;
	t->bucket = env_alloc(h->env, t->buckets * sizeof(*t->bucket));
	if (!t->bucket) {
		env_free(h->env, t, sizeof(*t));
		return -ENOMEM;
	}
	h->stable_table = t;
	return 0;
}

void stable_finish(struct host *h)
{
	struct stable_table *t = h->stable_table;

	if (!t)
		return;
	env_free(h->env, t->bucket, t->buckets * sizeof(*t->bucket));
	env_free(h->env, t, sizeof(*t));
	h->stable_table = NULL;
}

static struct stable **bucket_of(struct stable_table *t, uint32_t domain, uint64_t hash)
{
	return &t->bucket[(hash ^ (uint64_t)domain * 0x9e3779b97f4a7c15u) & (t->buckets - 1)];
}

/* -- who leads its contents (S4); host->stable held -------------------------------- */

static void bucket_add(struct stable **bucket, struct stable *s)
{
	s->next = *bucket;
	s->at = bucket;
	if (s->next)
		s->next->at = &s->next;
	*bucket = s;
}

static void bucket_del(struct stable *s)
{
	*s->at = s->next;
	if (s->next)
		s->next->at = s->at;
	s->at = NULL;
}

/* `to` takes the place of `from` in the bucket. */
static void lead(struct stable *from, struct stable *to)
{
	if (from == to)
		return;
	to->next = from->next;
	to->at = from->at;
	*to->at = to;
	if (to->next)
		to->next->at = &to->next;
	from->at = NULL;
}

static struct stable *same_next(const struct stable *s)
{
	return container_of(s->same.next, struct stable, same);
}

static struct stable *leader_of(struct host *h, uint32_t domain, uint64_t hash)
{
	struct stable *s = *bucket_of(h->stable_table, domain, hash);

	while (s && (s->hash != hash || s->domain != domain))
		s = s->next;
	return s;
}

/* A new leader, if there is one already. */
static void same_add(struct host *h, struct stable *s)
{
	struct stable_table *t = h->stable_table;
	struct stable *first = leader_of(h, s->domain, s->hash);

	list_init(&s->same);
	if (!first) {
		bucket_add(bucket_of(t, s->domain, s->hash), s);
		return;
	}
	t->chains += list_empty(&first->same);
	t->dups += list_empty(&first->same) ? 2 : 1;
	list_add_tail(&first->same, &s->same); /* before the leader: behind the last */
	lead(first, s);
}

static void same_del(struct host *h, struct stable *s)
{
	struct stable_table *t = h->stable_table;
	bool alone = list_empty(&s->same), two = !alone && s->same.next == s->same.prev;

	if (alone)
		bucket_del(s);
	else if (s->at)
		lead(s, same_next(s));
	list_del(&s->same);
	t->chains -= two;
	t->dups -= alone ? 0 : two ? 2 : 1;
}

/* To the front of its ring, or to its end. */
static void same_move(struct host *h, struct stable *s, bool front)
{
	struct stable *first = leader_of(h, s->domain, s->hash);

	if (s == first) {
		if (!front)
			lead(s, same_next(s));
		return;
	}
	list_del(&s->same);
	list_add_tail(&first->same, &s->same);
	if (front)
		lead(first, s);
}

static void full_set(struct host *h, struct stable *s, bool full)
{
	_Atomic uint32_t *bits = &pfn_frame(h->pool, s->pfn)->bits;

	s->full = full;
	if (full)
		atomic_fetch_or_explicit(bits, FRAME_FULL, memory_order_seq_cst);
	else
		atomic_fetch_and_explicit(bits, ~FRAME_FULL, memory_order_relaxed);
}

/* It had `most` users a moment ago. */
static void fill(struct host *h, struct stable *s, uint32_t most)
{
	full_set(h, s, true);
	if (atomic_load_explicit(&pfn_frame(h->pool, s->pfn)->refs, memory_order_seq_cst) < most)
		full_set(h, s, false);
	else
		same_move(h, s, false);
}

/* A reference of a frame that looked full has gone. It may have died since, and be anything. */
static void reopen(struct host *h, pfn_t pfn)
{
	struct frame *f = pfn_frame(h->pool, pfn);

	lock_take(&h->stable);
	if (frame_kind(f) == FRAME_STABLE && READ_ONCE(f->bits) & FRAME_FULL) { /* taken away under the lock when it dies */
		struct stable *s = frame_stable(h->pool, pfn);

		full_set(h, s, false);
		same_move(h, s, true);
	}
	lock_drop(&h->stable);
}

static void not_full(struct stable *s, void *arg)
{
	if (s->full)
		full_set(arg, s, false);
}

void stable_reopen_all(struct host *h)
{
	stable_each(h, not_full, h);
}

void stable_chains(struct host *h, uint64_t *chains, uint64_t *dups)
{
	lock_take(&h->stable);
	*chains = h->stable_table->chains;
	*dups = h->stable_table->dups;
	lock_drop(&h->stable);
}

uint64_t stable_bytes(struct host *h)
{
	uint64_t bytes;

	lock_take(&h->stable);
	bytes = sizeof(*h->stable_table) + h->stable_table->buckets * sizeof(*h->stable_table->bucket);
	lock_drop(&h->stable);
	return bytes;
}

/* Doubles the table when it is full; without memory it just gets slower. */
static void table_resize(struct host *h, struct stable_table *t)
{
	struct stable **old = t->bucket;
	uint64_t n = t->buckets;
	struct stable **bucket = env_alloc(h->env, 2 * n * sizeof(*bucket));

	if (!bucket)
		return;
	WRITE_ONCE(t->bucket, bucket);
	WRITE_ONCE(t->buckets, 2 * n);
	for (uint64_t i = 0; i < n; i++) {
		for (struct stable *s = old[i], *next; s; s = next) {
			next = s->next;
			bucket_add(bucket_of(t, s->domain, s->hash), s);
		}
	}
	env_free(h->env, old, n * sizeof(*old));
}

/* -- objects, and room in their chains ---------------------------------------------- */

struct stable *stable_alloc(struct host *h, uint32_t domain, uint64_t hash)
{
	struct stable *s = env_alloc(h->env, sizeof(*s));

	if (!s)
		return NULL;
	s->domain = domain;
	s->hash = hash;
	s->chain = s->first;
	s->room = STABLE_FIRST;
	return s;
}

static void chain_free(struct host *h, uint64_t *chain, uint32_t room)
{
	if (room > STABLE_FIRST)
		env_free(h->env, chain, room * sizeof(*chain));
}

void stable_free(struct host *h, struct stable *s)
{
	if (!s)
		return;
	chain_free(h, s->chain, s->room);
	env_free(h->env, s, sizeof(*s));
}

/* True: there is room, and it is promised. */
static bool promise(struct stable *s)
{
	if (s->count + s->promised >= s->room) /* a pair that is added is still promised for a moment */
		return false;
	s->promised++;
	return true;
}

int stable_promise(struct host *h, struct stable *s)
{
	uint32_t room = 0, old_room;
	uint64_t *chain = NULL, *old;
	bool done;

	for (;;) {
		lock_take(&h->stable);
		if (chain && room > s->room) {
			memcpy(chain, s->chain, s->count * sizeof(*chain));
			old = s->chain;
			old_room = s->room;
			s->chain = chain;
			WRITE_ONCE(s->room, room);
			chain = old;
			room = old_room;
		}
		done = promise(s);
		old_room = s->room;
		lock_drop(&h->stable);
		if (chain)
			chain_free(h, chain, room);
		if (done)
			return 0;
		room = 2 * old_room;
		chain = env_alloc(h->env, room * sizeof(*chain));
		if (!chain)
			return -ENOMEM;
	}
}

void stable_give_up(struct host *h, struct stable *s)
{
	lock_take(&h->stable);
	kage_assert(s->promised);
	s->promised--;
	lock_drop(&h->stable);
}

void stable_publish(struct host *h, struct stable *s, pfn_t pfn)
{
	struct stable_table *t = h->stable_table;
	struct frame *f = pfn_frame(h->pool, pfn);

	s->pfn = pfn;
	s->promised = 1;
	if (frame_kind(f) == FRAME_HOME)
		atomic_fetch_or_explicit(&f->bits, FRAME_WAS_HOME, memory_order_relaxed);
	frame_set_kind(f, FRAME_STABLE, 0);
	atomic_store_explicit(&f->where, (uintptr_t)s, memory_order_release);
	if (t->count >= t->buckets)
		table_resize(h, t);
	same_add(h, s);
	t->count++;
	atomic_fetch_add_explicit(&h->stable_frames, 1, memory_order_relaxed);
}

void stable_chain(struct stable *s, uint64_t where)
{
	kage_assert(s->count < s->room);
	s->chain[s->count] = where;
	WRITE_ONCE(s->count, s->count + 1);
}

static bool frame_get_unless_zero(struct frame *f)
{
	uint32_t refs = atomic_load_explicit(&f->refs, memory_order_relaxed);

	do {
		if (refs == 0)
			return false;
	} while (!atomic_compare_exchange_weak_explicit(&f->refs, &refs, refs + 1, memory_order_acquire,
							memory_order_relaxed));
	return true;
}

/* Of a leader's ring: one with room, with a reference. */
static struct stable *same_get(struct host *h, struct stable *first, uint32_t most)
{
	struct stable *s = first, *next;

	do {
		struct frame *f = pfn_frame(h->pool, s->pfn);

		if (s->full)
			return NULL;
		next = same_next(s);
		if (READ_ONCE(f->refs) >= most)
			fill(h, s, most);
		else if (frame_get_unless_zero(f)) /* 0: dying, it leaves the table as soon as we drop the lock */
			return s;
		s = next;
	} while (s != first);
	return NULL;
}

struct stable *stable_get(struct host *h, uint32_t domain, uint64_t hash, uint32_t most)
{
	struct stable *s;

	if (READ_ONCE(h->stable_frames) == 0)
		return NULL;
	lock_take(&h->stable);
	s = leader_of(h, domain, hash);
	if (s)
		s = same_get(h, s, most);
	lock_drop(&h->stable);
	return s;
}

struct stable *stable_get_frame(struct host *h, uint32_t domain, pfn_t pfn, uint32_t most)
{
	struct frame *f = pfn_frame(h->pool, pfn);
	struct stable *s = NULL;

	if (frame_kind(f) != FRAME_STABLE)
		return NULL;
	lock_take(&h->stable); /* a frame becomes stable under it, and says where its object is until it has died under it */
	if (READ_ONCE(f->refs) > 0 && READ_ONCE(f->refs) < most) {
		s = frame_stable(h->pool, pfn);
		if (s->domain != domain || !frame_get_unless_zero(f))
			s = NULL;
	}
	lock_drop(&h->stable);
	return s;
}

void stable_prefetch(struct host *h, uint32_t domain, uint64_t hash)
{
	const struct stable_table *t = h->stable_table;
	struct stable **bucket = READ_ONCE(t->bucket);

	if (READ_ONCE(h->stable_frames))
		__builtin_prefetch(&bucket[(hash ^ (uint64_t)domain * 0x9e3779b97f4a7c15u) & (READ_ONCE(t->buckets) - 1)]);
}

bool stable_is_stale(struct host *h, struct stable *s)
{
	uint64_t refs = READ_ONCE(pfn_frame(h->pool, s->pfn)->refs), count = READ_ONCE(s->count);

	return count > 2 * refs + 8 && count > 2 * READ_ONCE(s->kept); /* else pruning would be for nothing once more */
}

static void stable_reclaim(struct defer_node *node, void *arg)
{
	stable_free(arg, container_of(node, struct stable, defer));
}

static void stable_die(struct host *h, pfn_t pfn)
{
	struct stable *s = frame_stable(h->pool, pfn);

	lock_take(&h->stable);
	same_del(h, s);
	full_set(h, s, false);
	h->stable_table->count--;
	atomic_fetch_sub_explicit(&h->stable_frames, 1, memory_order_relaxed);
	lock_drop(&h->stable);
	defer_add(&h->env->defer, &s->defer, stable_reclaim, h);
}

bool stable_drop(struct host *h, pfn_t pfn)
{
	struct frame *f = pfn_frame(h->pool, pfn);

	if (atomic_fetch_sub_explicit(&f->refs, 1, memory_order_seq_cst) == 1) {
		stable_die(h, pfn);
		return true;
	}
	if (unlikely(atomic_load_explicit(&f->bits, memory_order_seq_cst) & FRAME_FULL))
		reopen(h, pfn);
	return false;
}

void stable_put(struct host *h, struct stable *s)
{
	pfn_t pfn = s->pfn;

	if (stable_drop(h, pfn))
		pool_release(h->pool, pfn, 0);
}

void stable_each(struct host *h, void (*fn)(struct stable *s, void *arg), void *arg)
{
	struct stable_table *t = h->stable_table;

	lock_take(&h->stable);
	for (uint64_t i = 0; i < t->buckets; i++) {
		for (struct stable *first = t->bucket[i]; first; first = first->next) {
			struct stable *s = first;

			do {
				fn(s, arg);
				s = same_next(s);
			} while (s != first);
		}
	}
	lock_drop(&h->stable);
}

static int where_order(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

void stable_prune(struct host *h, struct stable *s, bool (*keep)(struct host *h, uint64_t where, pfn_t pfn))
{
	uint32_t n = 0, room = READ_ONCE(s->room), count = 0, pruned = 0;
	uint64_t *copy = env_alloc(h->env, room * sizeof(*copy));

	if (!copy)
		return;
	lock_take(&h->stable);
	if (s->room == room && !s->promised) { /* S5 */
		count = s->count;
		pruned = s->pruned;
		memcpy(copy, s->chain, count * sizeof(*copy));
	}
	lock_drop(&h->stable);
	qsort(copy, count, sizeof(*copy), where_order);
	for (uint32_t i = 0; i < count; i++)
		if ((n == 0 || copy[n - 1] != copy[i]) && keep(h, copy[i], s->pfn))
			copy[n++] = copy[i];
	lock_take(&h->stable);
	if (count && s->room == room && s->count == count && s->pruned == pruned) {
		memcpy(s->chain, copy, n * sizeof(*copy));
		WRITE_ONCE(s->count, n);
		WRITE_ONCE(s->kept, n);
		s->pruned++;
	}
	lock_drop(&h->stable);
	env_free(h->env, copy, room * sizeof(*copy));
}
