/* SPDX-License-Identifier: MIT */
/*
 * What the files of this folder share: the snapshot of who is told (set.c) and
 * the slots of what is in flight (range.c). Nobody else includes it.
 */
#ifndef KAGE_NOTIFY_INTERNAL_H
#define KAGE_NOTIFY_INTERNAL_H

#include "notify/notify.h"

/* One who is told. Listeners and intervals have one size: see the spare's invariant in set.c. */
struct set_entry {
	void *who; /* struct kage_notifier or struct kage_interval */
	/* intervals: guest physical; `reach` is the largest end of the entry's subtree (interval.c) */
	uint64_t start, end, reach;
};

/* Immutable once published. Listeners come first, in order of registration, then intervals by start. */
struct notify_set {
	unsigned capacity, listeners, intervals;
	struct set_entry entry[];
};

/* A change that was seen in flight. */
struct in_flight {
	unsigned slot;
	uint64_t use;
	uint64_t start, end;
};

static inline uint64_t get(const _Atomic uint64_t *p)
{
	return atomic_load_explicit(p, memory_order_acquire);
}

static inline void put(_Atomic uint64_t *p, uint64_t v)
{
	atomic_store_explicit(p, v, memory_order_release);
}

/* range.c */
/* Takes a slot and puts a range in flight. An empty range overlaps nothing, but pins the snapshot. */
int change_open(struct notify *n, struct notify_change *c, uint64_t start, uint64_t end);
void change_close(struct notify *n, struct notify_change *c);
/* Finds a change in flight that overlaps; `skip` has a bit for each slot not to look at. */
bool change_find(struct notify *n, uint64_t start, uint64_t end, uint64_t skip, struct in_flight *f);
void change_wait(struct notify *n, const struct in_flight *f);
/* Waits for every change that is in flight now. */
void change_drain(struct notify *n);

/* set.c; with n->lock held */
unsigned set_count(const struct notify_set *s);
struct notify_set *set_current(struct notify *n);
/* Looks `who` up among entries [from, to). -1: not there. */
int set_find(const struct notify_set *s, unsigned from, unsigned to, const void *who);
/* Puts an entry in at `pos`, or leaves one out; waits until nobody uses the snapshot before. 0 or -ENOMEM. */
int set_put_in(struct notify *n, unsigned pos, const struct set_entry *e, bool interval);
void set_leave_out(struct notify *n, unsigned pos);
/* Leaves all out; the caller gets what was in force, which nobody uses any more. May be NULL. */
struct notify_set *set_take(struct notify *n);
void set_free(struct notify *n, struct notify_set *s);

/* listener.c */
int listeners_start(struct notify *n, struct notify_change *c);
void listeners_end(struct notify *n, struct notify_change *c);
/* What a start or an invalidate answered, after the rules of the range's flags. */
int listener_answer(struct notify *n, const struct kage_range *range, int rc);
/* Callbacks must not register or unregister: debug builds assert it. */
#ifdef KAGE_DEBUG
void callback_enter(void);
void callback_leave(void);
bool callback_inside(void);
#else
static inline void callback_enter(void)
{
}
static inline void callback_leave(void)
{
}
static inline bool callback_inside(void)
{
	return false;
}
#endif

/* interval.c */
int intervals_invalidate(struct notify *n, struct notify_set *s, const struct kage_range *range);
void intervals_forget(struct notify_set *s);
void intervals_index(struct notify_set *s); /* fills `reach` */

#endif
