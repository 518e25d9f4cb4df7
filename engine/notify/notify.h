/* SPDX-License-Identifier: MIT */
/*
 * The notifier protocol of one mm, exact by range.
 *
 * A change publishes its range in one of 64 change slots, a reader (a fault
 * that will install a translation, an engine write, an interval reader)
 * publishes its own in a reader slot. Each looks at the other's after a full
 * fence, so one of the two always sees the other (Dekker):
 *
 *      change                              reader
 *      publish slot                        publish slot {ticket, range}
 *      fence (a)                           fence (b)
 *      for each overlapping reader:        for each overlapping change: wait
 *          hit = its ticket                look up
 *          wait while it holds             [own lock] valid: !hit and no
 *      call listeners                          overlapping change in flight
 *      ... commit ...                      install [unlock]
 *      call end; clear slot, wake          clear slot
 *
 * Invariants:
 *  N1  a reader that validated under the lock that a listener's start takes has
 *      installed before that start ran, or sees the change.
 *  N2  `hit` is sticky for the reader's ticket: a change that began and ended
 *      between the reader's begin and valid is seen.
 *  N3  a change that overlaps no reader disturbs none (spurious retries are
 *      counted and stay 0).
 *  N4  while a reader holds, no overlapping start has returned.
 *  N5  every listener whose start returned 0 gets exactly one end with the same id.
 *  N6  a listener registered during a change sees neither its start nor end;
 *      one unregistered during a change whose start it saw gets the end first.
 *  N7  who holds the lock that a registered listener's start takes, and finds no
 *      overlapping change in flight (notify_quiet()), may look up and install
 *      in that range, and no more, until he drops it, without a section: of a change that he did not see,
 *      that start has not run yet, or the end is over.
 *
 * The ends are called before the slot is cleared: that a slot was left is then
 * all that register, unregister and release need to wait for, and no change has
 * to count references to the listeners' snapshot.
 *
 * Pairing: (a) and (b) are sequentially consistent fences.
 * Locks: RANK_NOTIFY for the listener list. Callbacks run without it. Who
 * registers or unregisters holds it while he waits for changes in flight, none
 * of which ever takes it; his thread must have no change of this mm in flight.
 */
#ifndef KAGE_NOTIFY_NOTIFY_H
#define KAGE_NOTIFY_NOTIFY_H

#include <kage/notifier.h>
#include "base/addr.h"
#include "base/env.h"
#include "base/lock.h"

#define NOTIFY_CHANGES 64
#define NOTIFY_READERS 128
#define NOTIFY_PERMANENT 96 /* reader slots below this one are given at attach, the rest for a section */
#define NOTIFY_PIECE 32     /* reader slots are allocated in pieces */

struct notify_reader;

/* One change of one mm. The caller fills the first part. */
struct notify_change {
	gfn_t start, end; /* end exclusive */
	uint32_t reason, flags, lost;
	const void *owner;
	/*
	 * The reader of this thread on whose behalf the change is made; not
	 * hit by it, does not wait for it. May be NULL, or of another mm.
	 */
	struct notify_reader *self;
	/* filled by notify_start() */
	uint64_t id;
	unsigned slot;
	struct notify_set *listeners; /* the snapshot that was told */
};

struct notify_change_slot {
	_Atomic uint64_t start, end; /* gfn */
	_Atomic uint64_t use;	     /* even: nothing in flight; odd: the range is. id = use * 64 + slot */
};

struct notify_reader_slot {
	_Alignas(CACHE_LINE) _Atomic uint64_t ticket; /* even: idle; odd: in a section */
	_Atomic uint64_t start, end;
	_Atomic uint64_t hit;  /* ticket of the section that a change hit */
	_Atomic uint32_t hold; /* futex: the section may write until it ends */
	uint32_t pad;
};

struct notify {
	struct env *env;
	uint64_t mm_id; /* for events */
	_Atomic uint64_t changes_used;
	_Atomic uint64_t readers_used[NOTIFY_READERS / 64];
	_Atomic uint32_t ended; /* futex: moves when something ended and somebody waits */
	_Atomic uint32_t waiters;
	struct lock lock; /* listener list */
	struct notify_set *_Atomic set; /* immutable snapshot; NULL: no listener */
	struct notify_set *spare;	/* room for the next: unregister cannot fail. Under `lock` */
	_Atomic uint64_t retried, spurious;
	struct notify_change_slot change[NOTIFY_CHANGES];
	struct notify_reader_slot *_Atomic reader[NOTIFY_READERS / NOTIFY_PIECE]; /* NULL: none yet */
};

/* A reader: a permanent slot if one was free at attach, else one for each section. */
struct notify_reader {
	struct notify *notify;
	int slot;       /* -1: none at the moment */
	bool permanent;
	uint64_t ticket; /* odd: in a section */
	uint64_t own;	 /* change slots that hold changes made on behalf of this reader */
	struct notify_reader_slot *at;
};

static_assert(sizeof(struct notify) <= 2048, "every guest has one");
static_assert(sizeof(struct notify_reader_slot) == CACHE_LINE, "readers share no line");

int notify_init(struct notify *n, struct env *env, uint64_t mm_id);
/* No listener, change or reader may be left. */
void notify_finish(struct notify *n);
/*
 * Forgets every listener and interval notifier, and calls the listeners'
 * release once; a listener may free itself in it. Later unregister and remove
 * return -ENOENT.
 */
void notify_release(struct notify *n);
unsigned notify_listening(struct notify *n); /* listeners and interval notifiers, at this moment */
bool notify_busy(struct notify *n); /* interval notifiers or readers are attached */

/*
 * Publishes the change, waits for overlapping holds, tells the listeners.
 * 0; -EAGAIN (a listener would have to block, a hold is in the way, or 64
 * changes are in flight, and the change is not blockable); a listener's -ENOMEM or -ETIMEDOUT (if the flags
 * allow; from a mandatory change such an answer is env_corrupt() and ignored,
 * except -ETIMEDOUT and -EDEADLK which are always passed on). On any error
 * every listener that had its start gets its end and nothing is in flight.
 * Two overlapping changes may be in flight: their planners' locks order them.
 */
int notify_start(struct notify *n, struct notify_change *c);
void notify_end(struct notify *n, struct notify_change *c);

/* A reader is one thread's at a time. 0 or -ENOMEM. */
int notify_reader_attach(struct notify *n, struct notify_reader *r);
void notify_reader_detach(struct notify_reader *r); /* not within a section; NULL or all zero: nothing */
/*
 * Publishes the range and waits until no change of it is in flight. Not under a
 * lock that a listener or a planner takes. Widening or moving the range within
 * a section is another begin: what was looked up, and a hold, count no more.
 */
void notify_read_begin(struct notify_reader *r, gfn_t start, gfn_t end);
/* False: an overlapping change began. Under the lock that the listener's start takes (N1). */
bool notify_read_valid(struct notify_reader *r);
/* From now to the end of the section overlapping starts wait. False: a change was first. Needs no lock. */
bool notify_read_hold(struct notify_reader *r);
void notify_read_end(struct notify_reader *r);
/* No overlapping change is in flight whose start has had the lock that the caller holds (N7). Never waits. */
bool notify_quiet(struct notify *n, gfn_t start, gfn_t end);

/* age and test_young of every listener, ORed. */
bool notify_age(struct notify *n, gfn_t start, gfn_t end);
bool notify_test_young(struct notify *n, gfn_t start, gfn_t end);

/* The public calls, given the mm's struct notify. They wait for all changes that are in flight. */
int notify_register(struct notify *n, struct kage_notifier *l, const struct kage_notifier_ops *ops);
int notify_unregister(struct kage_notifier *l);
int notify_interval_insert(struct notify *n, struct kage_interval *i);
int notify_interval_remove(struct kage_interval *i);

#endif
