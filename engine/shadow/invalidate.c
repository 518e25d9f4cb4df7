/* SPDX-License-Identifier: MIT */
/*
 * The shadow MMU as a listener, and the shootdown of TLBs.
 *
 * A change of the primary table starts here: entries of the range lose what the
 * change takes, TLB tags are overwritten, all under the shadow lock; after it,
 * windows in which an overwritten tag may still be in use are waited for.
 *
 *      vCPU                            shootdown
 *      win = odd          (plain)      tags overwritten, dirty_seq moves on
 *      [compiler barrier] (a)          membarrier(2)                  (b)
 *      load tag, access                win odd? wait until it changes
 *      win = even         (release)    flushed_seq moves on
 *
 * (a) pairs with (b): either the probe sees the overwritten tag or the
 * shootdown sees the odd window. A vCPU that is not `running` opens no window
 * before it has taken its TLB lock and passed a full fence. A thread in a slow
 * path has its vCPU's window closed: its own vCPU needs no barrier.
 *
 * Tags are overwritten without a barrier where hardware would owe none (a
 * guest's table write, eviction, a flush of one CPU's own TLB). A flush that is
 * for all vCPUs owes it at its end (shadow_broadcast()). dirty_seq remembers it, so that the next
 * change of the primary table waits although it finds no entry (KVM calls the
 * same thing tlbs_dirty).
 *
 * Invariants: S5, S6, S7 (internal.h), and
 *  I1  flushed_seq only grows, to a value of dirty_seq that was read before the
 *      barrier.
 *  I2  a write protection of more than WHOLESALE pages costs O(1): write_gen
 *      moves on, write contexts are renewed, hW bits of older pages are void.
 *
 * Locks: the shadow lock, TLB locks within the ops. shootdown() holds cpus_lock
 * for reading while it waits, so that no vCPU is freed under it.
 */
#include <linux/membarrier.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include "shadow/internal.h"

#define WHOLESALE     BLOCK_PAGES
#define SPIN_NS	      2000
#define NAP_NS	      50000
#define YIELDS	      64
#define BARRIER_TRIES 1000

/* -- the batch ---------------------------------------------------------------- */

void batch_add(struct shadow *s, uint64_t gva, uint64_t npages, uint32_t kinds)
{
	struct shadow_drop *last = s->nbatch ? &s->batch[s->nbatch - 1] : NULL;

	if ((s->batch_flush & kinds) == kinds)
		return;
	if (npages > BLOCK_PAGES || s->nbatch == BATCH_MAX) {
		s->batch_flush |= kinds;
		return;
	}
	if (last && last->kinds == kinds && last->gva + last->npages * PAGE_SIZE == gva &&
	    last->npages + npages <= BLOCK_PAGES) {
		last->npages += npages;
		return;
	}
	s->batch[s->nbatch++] = (struct shadow_drop){.gva = gva, .npages = npages, .kinds = kinds};
}

static bool in_slow_path_here(const struct shadow_cpu *cpu)
{
	return atomic_load_explicit(&cpu->slow_thread, memory_order_relaxed) == (uintptr_t)pthread_self();
}

/* The calling thread is between enter and leave of this vCPU. */
static bool entered_here(const struct shadow_cpu *cpu)
{
	return atomic_load_explicit(&cpu->enter_thread, memory_order_relaxed) == (uintptr_t)pthread_self();
}

/* vCPUs that this thread has entered and not left. Too high if it never leaves one: then each guest is asked. */
static _Thread_local unsigned entered;

void shadow_enter(struct shadow_cpu *cpu)
{
	entered += !entered_here(cpu);
	atomic_store_explicit(&cpu->enter_thread, (uintptr_t)pthread_self(), memory_order_relaxed);
}

void shadow_leave(struct shadow_cpu *cpu)
{
	entered -= entered_here(cpu);
	atomic_store_explicit(&cpu->enter_thread, 0, memory_order_relaxed);
}

bool shadow_entered_any(void)
{
	return entered > 0;
}

void batch_apply(struct shadow *s)
{
	bool in_use = false;

	if (!s->nbatch && !s->batch_flush)
		return;
	list_for_each(n, &s->cpus) {
		struct shadow_cpu *cpu = container_of(n, struct shadow_cpu, node);

		if (cpu->ops->drop(cpu, s->batch, s->nbatch, s->batch_flush) && !in_slow_path_here(cpu))
			in_use = true;
	}
	if (s->batch_flush)
		shadow_count_locked(s, flushes);
	s->dirty_seq += in_use;
	s->nbatch = 0;
	s->batch_flush = 0;
}

/* -- shootdown ---------------------------------------------------------------- */

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* (b). Once registered it fails only for want of kernel memory, which may pass. */
static int barrier_all(struct shadow *s)
{
	const struct timespec nap = {.tv_nsec = NAP_NS};

	atomic_thread_fence(memory_order_seq_cst); /* enough where vCPUs use real fences */
	if (!s->membarrier)
		return 0;
	for (unsigned i = 0; i < BARRIER_TRIES; i++) {
		if (syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0) == 0)
			return 0;
		nanosleep(&nap, NULL);
	}
	return -ETIMEDOUT;
}

static bool others_running(struct shadow *s)
{
	list_for_each(n, &s->cpus) {
		struct shadow_cpu *cpu = container_of(n, struct shadow_cpu, node);

		if (atomic_load_explicit(&cpu->running, memory_order_acquire) && !in_slow_path_here(cpu))
			return true;
	}
	return false;
}

static bool window_moved(const struct shadow_cpu *cpu, uint64_t win)
{
	return load_acquire(cpu->win) != win;
}

static int wait_moved(struct shadow *s, struct shadow_cpu *cpu, uint64_t win)
{
	uint64_t start = now_ns(), limit = (uint64_t)s->env->window_timeout_ms * 1000000u;
	const struct timespec nap = {.tv_nsec = NAP_NS};
	unsigned yields = 0;
	int r = 0;

	while (now_ns() - start < SPIN_NS) {
		if (window_moved(cpu, win))
			return 0;
		cpu_relax();
	}
	add_relaxed(cpu->wanted, 1);
	while (!window_moved(cpu, win) && !r) {
		if (now_ns() - start > limit)
			r = -ETIMEDOUT;
		else if (yields++ < YIELDS)
			sched_yield();
		else
			nanosleep(&nap, NULL);
	}
	add_relaxed(cpu->wanted, -1);
	return r;
}

static int wait_window(struct shadow *s, struct shadow_cpu *cpu, bool blockable)
{
	uint64_t win = load_acquire(cpu->win);

	if (!(win & 1))
		return 0;
	if (entered_here(cpu))
		return -EDEADLK;
	if (!blockable)
		return -EAGAIN;
	shadow_count(s, window_waits);
	return wait_moved(s, cpu, win);
}

bool shadow_entered(struct shadow *s)
{
	struct brlock_held held = brlock_read(&s->cpus_lock);
	bool here = false;

	list_for_each(n, &s->cpus) {
		here |= entered_here(container_of(n, struct shadow_cpu, node));
	}
	brlock_read_drop(&s->cpus_lock, held);
	return here;
}

static void flushed_up_to(struct shadow *s, uint64_t seq)
{
	uint64_t old = atomic_load_explicit(&s->flushed_seq, memory_order_relaxed);

	while (old < seq && !atomic_compare_exchange_weak_explicit(
				&s->flushed_seq, &old, seq, memory_order_release, memory_order_relaxed))
		;
}

static int shootdown_seq(struct shadow *s, uint64_t seq, bool blockable)
{
	struct brlock_held held;
	int r = 0;

	if (!unflushed(s, seq))
		return 0;
	held = brlock_read(&s->cpus_lock);
	if (others_running(s)) {
		shadow_count(s, shootdowns);
		trace(s->env, shootdown, s->mm->id, 1, 0);
		r = barrier_all(s);
	} else {
		atomic_thread_fence(memory_order_seq_cst);
	}
	list_for_each(n, &s->cpus) {
		int wait = wait_window(s, container_of(n, struct shadow_cpu, node), blockable);

		r = r ? r : wait;
	}
	brlock_read_drop(&s->cpus_lock, held);
	if (!r)
		flushed_up_to(s, seq);
	return r;
}

int shootdown(struct shadow *s, bool blockable)
{
	uint64_t seq;

	lock_take(&s->lock);
	seq = s->dirty_seq;
	lock_drop(&s->lock);
	return shootdown_seq(s, seq, blockable);
}

int shadow_broadcast(struct shadow *s)
{
	uint64_t seq;

	lock_take(&s->lock);
	s->broadcasts++;
	seq = s->dirty_seq;
	lock_drop(&s->lock);
	return shootdown_seq(s, seq, true);
}

/* -- what a change takes ------------------------------------------------------- */

static void protect_range(struct shadow *s, gfn_t start, gfn_t end)
{
	if (end.v - start.v > WHOLESALE) {
		s->write_gen++;
		s->batch_flush |= KAGE_WRITE;
		return;
	}
	for (gfn_t g = start; g.v < end.v; g.v++) {
		struct chunk *c = chunk_find(s, g);

		if (c)
			rmap_clear_write(s, c, g);
		else
			g.v |= BLOCK_PAGES - 1;
	}
}

static void drop_all_chunks(struct shadow *s, gfn_t start, gfn_t end)
{
	for (uint32_t i = 0; i < 1u << s->chunk_bits; i++) {
		for (struct chunk *c = s->chunk_hash[i], *next; c; c = next) {
			next = c->hash_next;
			if (c->key >= start.v >> LEVEL_BITS && c->key <= (end.v - 1) >> LEVEL_BITS)
				rmap_drop_chunk(s, c);
		}
	}
}

/* More than asked for may go: whole chunks where the range is long. */
static void drop_range(struct shadow *s, gfn_t start, gfn_t end)
{
	uint64_t npages = end.v - start.v;

	if (npages > (uint64_t)BLOCK_PAGES * (s->nchunks + 1)) {
		drop_all_chunks(s, start, end);
		return;
	}
	for (gfn_t g = start; g.v < end.v; g.v++) {
		struct chunk *c = chunk_find(s, g);

		if (c && npages < BLOCK_PAGES) {
			rmap_drop(s, c, g);
			continue;
		}
		if (c)
			rmap_drop_chunk(s, c);
		g.v |= BLOCK_PAGES - 1;
	}
}

static void zap_tables(struct shadow *s, gfn_t start, gfn_t end)
{
	struct shadow_page *p;

	if (end.v - start.v > s->ntables) {
		list_for_each_safe(n, tmp, &s->pages) {
			p = container_of(n, struct shadow_page, node);
			if (!(p->role & ROLE_UNFED) && p->gfn.v >= start.v && p->gfn.v < end.v)
				page_zap(s, p);
		}
		return;
	}
	for (gfn_t g = start; g.v < end.v; g.v++)
		while ((p = page_next_table(s, NULL, g)))
			page_zap(s, p);
}

static bool replaces_contents(const struct kage_range *r)
{
	return r->reason != KAGE_REASON_PROTECT && r->reason != KAGE_REASON_SOFT_DIRTY &&
	       r->reason != KAGE_REASON_EXCLUSIVE && !(r->flags & KAGE_RANGE_SAME_CONTENT);
}

static bool takes_write_only(const struct kage_range *r)
{
	return (r->reason == KAGE_REASON_PROTECT || r->reason == KAGE_REASON_SOFT_DIRTY) &&
	       !(r->lost & ~(uint32_t)KAGE_WRITE);
}

bool inflight_overlaps(const struct shadow *s, gfn_t gfn)
{
	for (unsigned i = 0; i < INFLIGHT_MAX; i++)
		if (s->inflight[i].id && gfn.v >= s->inflight[i].start.v && gfn.v < s->inflight[i].end.v)
			return true;
	return false;
}

static void inflight_add(struct shadow *s, uint64_t id, gfn_t start, gfn_t end)
{
	for (unsigned i = 0; i < INFLIGHT_MAX; i++) {
		if (!s->inflight[i].id) {
			s->inflight[i] = (struct inflight){.id = id, .start = start, .end = end};
			s->ninflight++;
			return;
		}
	}
	env_corrupt(s->env, "more changes in flight than slots");
}

static void inflight_del(struct shadow *s, uint64_t id)
{
	for (unsigned i = 0; s->ninflight && i < INFLIGHT_MAX; i++) {
		if (s->inflight[i].id == id) {
			s->inflight[i].id = 0;
			s->ninflight--;
			return;
		}
	}
}

/* Direct contexts have gva == gpa. */
static void direct_lost(struct shadow *s, gfn_t start, gfn_t end, uint32_t kinds)
{
	if (s->direct_cpus)
		batch_add(s, gfn_gpa(start).v, end.v - start.v, kinds);
}

/* The first gfn of a chunk in [g, end) that is watched as code, or `end`. */
static gfn_t chunk_next_code(const struct chunk *c, gfn_t g, gfn_t end)
{
	uint64_t base = c->key << LEVEL_BITS;

	g.v = MAX(g.v, base);
	end.v = MIN(end.v, base + BLOCK_PAGES);
	while (c->watched && g.v < end.v && !chunk_code(c, g))
		g.v++;
	return g.v < end.v && c->watched ? g : GFN(UINT64_MAX);
}

static gfn_t next_code(struct shadow *s, gfn_t g, gfn_t end)
{
	gfn_t first = end;

	if (end.v - g.v <= BLOCK_PAGES * (uint64_t)s->nchunks) {
		for (; g.v < end.v && first.v == end.v; g.v = (g.v | (BLOCK_PAGES - 1)) + 1) {
			struct chunk *c = chunk_find(s, g);

			if (c)
				first.v = MIN(first.v, chunk_next_code(c, g, end).v);
		}
		return first;
	}
	for (uint32_t i = 0; i < 1u << s->chunk_bits; i++)
		for (struct chunk *c = s->chunk_hash[i]; c; c = c->hash_next)
			first.v = MIN(first.v, chunk_next_code(c, g, end).v);
	return first;
}

/* Ends every watch over code in the range, since its contents are new. */
void break_code(struct shadow *s, gfn_t g, gfn_t end)
{
	for (;; g.v++) {
		lock_take(&s->lock);
		g = s->code_cpus ? next_code(s, g, end) : end;
		lock_drop(&s->lock);
		if (g.v >= end.v)
			return;
		code_break(s, g);
	}
}

static int listener_start(struct kage_notifier *n, const struct kage_range *r)
{
	struct shadow *s = container_of(n, struct shadow, listener);
	gfn_t start = gpa_gfn(GPA(r->start)), end = gpa_gfn(GPA(r->end));
	bool replaces = replaces_contents(r), write_only = takes_write_only(r);
	uint64_t seq;
	bool trim, code;
	int err;

	lock_take(&s->lock);
	if (write_only)
		protect_range(s, start, end);
	else
		drop_range(s, start, end);
	direct_lost(s, start, end, write_only ? KAGE_WRITE : KAGE_RWX);
	if (replaces) {
		zap_tables(s, start, end);
		inflight_add(s, r->id, start, end);
	}
	batch_apply(s);
	seq = s->dirty_seq;
	trim = pages_to_trim(s);
	code = replaces && s->code_cpus;
	lock_drop(&s->lock);
	trace(s->env, shadow_drop, s->mm->id, start.v, end.v);
	if (trim)
		pages_trim(s);
	err = shootdown_seq(s, seq, r->flags & KAGE_RANGE_BLOCKABLE);
	if (!err && code)
		break_code(s, start, end);
	if (err && replaces) {
		lock_take(&s->lock);
		inflight_del(s, r->id);
		lock_drop(&s->lock);
	}
	return err;
}

static void listener_end(struct kage_notifier *n, const struct kage_range *r)
{
	struct shadow *s = container_of(n, struct shadow, listener);

	if (!replaces_contents(r))
		return;
	lock_take(&s->lock);
	inflight_del(s, r->id);
	lock_drop(&s->lock);
}

static void listener_release(struct kage_notifier *n)
{
	struct shadow *s = container_of(n, struct shadow, listener);

	shadow_destroy(s);
}

const struct kage_notifier_ops shadow_listener_ops = {
    .invalidate_range_start = listener_start,
    .invalidate_range_end = listener_end,
    .release = listener_release,
};
