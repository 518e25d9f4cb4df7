/* SPDX-License-Identifier: MIT */
/*
 * Listeners: register, unregister, release, and what a change tells them.
 *
 * Structures: a listener is the embedder's struct kage_notifier; priv[0] is the
 * struct notify it is registered with (NULL: none).
 *
 *  L1  A change that calls start of entry i has called those of all entries
 *      before it, in the snapshot it keeps in c->listeners; ends go to the
 *      same snapshot. On an error the entries before the one that refused get
 *      their end, last first (N5).
 *  L2  All ends are called before the change leaves its slot, so who waits for
 *      the slot waits for the last callback.
 *  L3  priv[0] is NULL before release is called: the listener may free itself.
 *
 * Locks: n->lock in register, unregister, release; callbacks run without it.
 *
 * Why not a list with a reference count for each listener: see set.c.
 */
#include "notify/internal.h"

#ifdef KAGE_DEBUG
static _Thread_local unsigned callbacks;

void callback_enter(void)
{
	callbacks++;
}

void callback_leave(void)
{
	callbacks--;
}

bool callback_inside(void)
{
	return callbacks != 0;
}
#endif

int notify_init(struct notify *n, struct env *env, uint64_t mm_id)
{
	memset(n, 0, sizeof(*n));
	n->env = env;
	n->mm_id = mm_id;
	lock_init(&n->lock, RANK_NOTIFY, mm_id);
	return 0;
}

void notify_finish(struct notify *n)
{
	if (!n || !n->env)
		return;
	kage_assert(!n->changes_used && !n->readers_used[0] && !n->readers_used[1]);
	kage_assert(!set_current(n));
	for (unsigned i = 0; i < ARRAY_SIZE(n->reader); i++)
		env_free(n->env, n->reader[i], NOTIFY_PIECE * sizeof(struct notify_reader_slot));
	memset(n, 0, sizeof(*n));
}

bool notify_busy(struct notify *n)
{
	struct notify_set *s;
	bool busy;

	lock_take(&n->lock);
	s = set_current(n);
	busy = (s && s->intervals) || n->readers_used[0] || n->readers_used[1];
	lock_drop(&n->lock);
	return busy;
}

/* --- telling --- */

static struct kage_range range_of(const struct notify_change *c)
{
	return (struct kage_range){
		.start = gfn_gpa(c->start).v,
		.end = gfn_gpa(c->end).v,
		.reason = c->reason,
		.flags = c->flags,
		.lost = c->lost,
		.owner = c->owner,
		.id = c->id,
	};
}

int listener_answer(struct notify *n, const struct kage_range *range, int rc)
{
	if (likely(rc == 0))
		return 0;
	if (rc == -ETIMEDOUT || rc == -EDEADLK)
		return rc;
	if (rc == -EAGAIN && !(range->flags & KAGE_RANGE_BLOCKABLE))
		return rc;
	if (rc == -ENOMEM && (range->flags & KAGE_RANGE_OPTIONAL))
		return rc;
	env_corrupt(n->env, "mm %llu: a listener answered %d to change %llu, flags %u do not allow it",
		    (unsigned long long)n->mm_id, rc, (unsigned long long)range->id, range->flags);
	return 0;
}

static int tell_start(struct notify *n, struct kage_notifier *l, const struct kage_range *range)
{
	int rc;

	if (!l->ops->invalidate_range_start)
		return 0;
	callback_enter();
	rc = l->ops->invalidate_range_start(l, range);
	callback_leave();
	return listener_answer(n, range, rc);
}

static void tell_end(struct kage_notifier *l, const struct kage_range *range)
{
	if (!l->ops->invalidate_range_end)
		return;
	callback_enter();
	l->ops->invalidate_range_end(l, range);
	callback_leave();
}

int listeners_start(struct notify *n, struct notify_change *c)
{
	struct notify_set *s = atomic_load_explicit(&n->set, memory_order_acquire);
	struct kage_range range;
	unsigned told;
	int err = 0;

	if (likely(!s))
		return 0;
	range = range_of(c);
	for (told = 0; told < s->listeners; told++) {
		err = tell_start(n, s->entry[told].who, &range);
		if (err)
			break;
	}
	if (!err && s->intervals)
		err = intervals_invalidate(n, s, &range);
	if (!err) {
		c->listeners = s;
		return 0;
	}
	while (told)
		tell_end(s->entry[--told].who, &range);
	return err;
}

void listeners_end(struct notify *n, struct notify_change *c)
{
	struct notify_set *s = c->listeners;
	struct kage_range range = range_of(c);

	for (unsigned i = 0; i < s->listeners; i++)
		tell_end(s->entry[i].who, &range);
	c->listeners = NULL;
}

/* An empty range pins the snapshot as a change would (S1), and disturbs nobody. */
static bool ask_young(struct notify *n, gfn_t start, gfn_t end, bool clear)
{
	struct notify_change pin = { .flags = KAGE_RANGE_BLOCKABLE };
	struct notify_set *s;
	bool young = false;

	if (!atomic_load_explicit(&n->set, memory_order_relaxed))
		return false;
	change_open(n, &pin, 0, 0); /* blockable: cannot fail */
	s = atomic_load_explicit(&n->set, memory_order_acquire);
	callback_enter();
	for (unsigned i = 0; s && i < s->listeners; i++) {
		struct kage_notifier *l = s->entry[i].who;

		if (clear && l->ops->age)
			young |= l->ops->age(l, gfn_gpa(start).v, gfn_gpa(end).v);
		else if (!clear && l->ops->test_young)
			young |= l->ops->test_young(l, gfn_gpa(start).v, gfn_gpa(end).v);
	}
	callback_leave();
	change_close(n, &pin);
	return young;
}

bool notify_age(struct notify *n, gfn_t start, gfn_t end)
{
	return ask_young(n, start, end, true);
}

bool notify_test_young(struct notify *n, gfn_t start, gfn_t end)
{
	return ask_young(n, start, end, false);
}

/* --- coming and going --- */

static struct notify *home_of(struct kage_notifier *l)
{
	return load_acquire((struct notify **)&l->priv[0]);
}

static void home_set(struct kage_notifier *l, struct notify *n)
{
	store_release((struct notify **)&l->priv[0], n);
}

int notify_register(struct notify *n, struct kage_notifier *l, const struct kage_notifier_ops *ops)
{
	const struct kage_notifier_ops *was;
	struct notify_set *s;
	int err = -EBUSY;

	if (!l || !ops)
		return -EINVAL;
	kage_assert(!callback_inside());
	lock_take(&n->lock);
	if (!home_of(l)) {
		was = l->ops;
		l->ops = ops; /* callbacks may come before set_put_in() returns */
		home_set(l, n);
		s = set_current(n);
		err = set_put_in(n, s ? s->listeners : 0, &(struct set_entry){ .who = l }, false);
		if (err) {
			l->ops = was;
			home_set(l, NULL);
		}
	}
	lock_drop(&n->lock);
	return err;
}

int notify_unregister(struct kage_notifier *l)
{
	struct notify_set *s;
	struct notify *n;
	int pos;

	if (!l)
		return -EINVAL;
	kage_assert(!callback_inside());
	n = home_of(l);
	if (!n)
		return -ENOENT;
	lock_take(&n->lock);
	s = set_current(n);
	pos = set_find(s, 0, s ? s->listeners : 0, l);
	if (pos >= 0) {
		set_leave_out(n, (unsigned)pos);
		home_set(l, NULL);
	}
	lock_drop(&n->lock);
	return pos >= 0 ? 0 : -ENOENT;
}

void notify_release(struct notify *n)
{
	struct notify_set *s;

	kage_assert(!callback_inside());
	lock_take(&n->lock);
	s = set_take(n);
	for (unsigned i = 0; s && i < s->listeners; i++)
		home_set(s->entry[i].who, NULL); /* L3 */
	if (s)
		intervals_forget(s);
	lock_drop(&n->lock);
	callback_enter();
	for (unsigned i = 0; s && i < s->listeners; i++) {
		struct kage_notifier *l = s->entry[i].who;

		if (l->ops->release)
			l->ops->release(l);
	}
	callback_leave();
	set_free(n, s);
}
