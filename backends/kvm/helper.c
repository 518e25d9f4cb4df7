/* SPDX-License-Identifier: MIT */
/*
 * The helper's two threads. See helper.h for who waits for whom.
 *
 * Invariants:
 *  1. the reader takes no lock and allocates nothing but queue entries, from a fixed
 *     array: full, it wakes the faulting thread, which comes again, or says that all windows changed.
 *  2. `own` is set before the engine's call and cleared after the reader has finished with every event that
 *     it had read by the time the call returned: an event of the engine's own is never taken for the VMM's.
 *
 * Locks: queue->lock (RANK_NONE, held for moments). k->lock by the worker only.
 */
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "api/engine.h"
#include "helper.h"

#define QUEUE 256

struct helper {
	struct kage_kvm *k;
	pthread_t reader, worker;
	struct notify_reader serving; /* the worker's */
	struct uffd uffd; /* the guest's, while the helper runs */
	int stop, work;	  /* eventfds */
	_Atomic bool stopping;
	_Atomic uint32_t busy; /* the reader reads and sorts */
	_Atomic uint64_t own_start, own_end;
	struct lock lock; /* the queue */
	struct uffd_msg msg[QUEUE];
	unsigned first, count;
	bool overflow; /* an event of the VMM's did not fit: anything may have changed */
};

/* -- the engine's own changes ----------------------------------------------------------- */

void helper_own(struct kage_kvm *k, const char *at, size_t len)
{
	struct helper *h = atomic_load(&k->helper);

	if (!h)
		return;
	atomic_store(&h->own_end, (uintptr_t)at + len);
	atomic_store(&h->own_start, (uintptr_t)at);
}

/* The event was read before the call returned; its reader may still be looking at it. */
void helper_own_end(struct kage_kvm *k)
{
	struct helper *h = atomic_load(&k->helper);

	if (!h)
		return;
	while (atomic_load(&h->busy))
		sched_yield();
	atomic_store(&h->own_start, 0);
	atomic_store(&h->own_end, 0);
}

void helper_kick(struct kage_kvm *k)
{
	struct helper *h = atomic_load(&k->helper);

	if (!h)
		return;
	eventfd_write(h->stop, 1);
	eventfd_write(h->work, 1);
}

static bool event_range(const struct uffd_msg *m, uint64_t *start, uint64_t *end)
{
	switch (m->event) {
	case UFFD_EVENT_REMOVE:
	case UFFD_EVENT_UNMAP:
		*start = m->arg.remove.start;
		*end = m->arg.remove.end;
		return true;
	case UFFD_EVENT_REMAP:
		*start = m->arg.remap.from;
		*end = m->arg.remap.from + m->arg.remap.len;
		return true;
	default:
		return false;
	}
}

static bool event_own(struct helper *h, const struct uffd_msg *m)
{
	uint64_t start, end;

	return event_range(m, &start, &end) && start >= atomic_load(&h->own_start) && end <= atomic_load(&h->own_end);
}

/* -- the reader ---------------------------------------------------------------------------- */

static bool queue_put(struct helper *h, const struct uffd_msg *m)
{
	bool room;

	lock_take(&h->lock);
	room = h->count < QUEUE;
	if (room)
		h->msg[(h->first + h->count++) % QUEUE] = *m;
	else if (m->event != UFFD_EVENT_PAGEFAULT)
		h->overflow = true;
	lock_drop(&h->lock);
	return room;
}

static void reader_take(struct helper *h, const struct uffd_msg *m)
{
	char *at = (char *)(uintptr_t)ALIGN_DOWN(m->arg.pagefault.address, host_page_size());

	if (m->event == UFFD_EVENT_FORK) {
		close((int)m->arg.fork.ufd); /* windows are not inherited: nothing of the child's traps */
		return;
	}
	if (event_own(h, m))
		return;
	if (!queue_put(h, m) && m->event == UFFD_EVENT_PAGEFAULT)
		uffd_wake(&h->uffd, at, host_page_size());
	eventfd_write(h->work, 1);
}

static void *reader_main(void *arg)
{
	struct helper *h = arg;
	struct pollfd p[2] = { { .fd = h->uffd.fd, .events = POLLIN }, { .fd = h->stop, .events = POLLIN } };
	struct uffd_msg msg[16];
	int n;

	while (!atomic_load(&h->stopping) && !READ_ONCE(h->k->mirror.abandoned)) {
		poll(p, 2, -1);
		atomic_store(&h->busy, 1);
		n = uffd_read(&h->uffd, msg, ARRAY_SIZE(msg));
		for (int i = 0; i < n; i++)
			reader_take(h, &msg[i]);
		atomic_store(&h->busy, 0);
	}
	return NULL;
}

/* -- the worker ----------------------------------------------------------------------------- */

static void vmm_changed(struct kage_kvm *k, uint64_t start, uint64_t end, bool gone)
{
	struct brlock_held held = brlock_read(&k->mm->range);
	gfn_t first = GFN(0), last = GFN(0);
	bool ours;
	int n = 0;

	lock_take(&k->lock);
	ours = window_gfn(k, (char *)(uintptr_t)start, &first) && window_gfn(k, (char *)(uintptr_t)(end - 1), &last);
	if (ours && gone)
		n = mirror_repair(k);
	lock_drop(&k->lock);
	if (ours)
		mm_tell(k->mm, first, gfn_add(last, 1), &k->mirror);
	brlock_read_drop(&k->mm->range, held);
	if (!ours)
		return;
	atomic_fetch_add(&k->broken, 1);
	env_log(k->env, KAGE_LOG_WARN, "mm %llu gfn %llx: the VMM changed a window (%s); %d pieces put right",
		(unsigned long long)k->mm->id, (unsigned long long)first.v, gone ? "unmapped" : "madvise", n);
}

static bool queue_take(struct helper *h, struct uffd_msg *m, bool *overflow)
{
	bool any;

	lock_take(&h->lock);
	any = h->count > 0;
	if (any) {
		*m = h->msg[h->first];
		h->first = (h->first + 1) % QUEUE;
		h->count--;
	}
	*overflow = h->overflow;
	h->overflow = false;
	lock_drop(&h->lock);
	return any;
}

static void worker_serve(struct helper *h, struct notify_reader *reader)
{
	struct kage_kvm *k = h->k;
	uint64_t start, end;
	struct uffd_msg m;
	bool overflow;

	while (queue_take(h, &m, &overflow)) {
		if (event_range(&m, &start, &end))
			vmm_changed(k, start, end, m.event != UFFD_EVENT_REMOVE);
		else
			trap_message(k, reader, &m);
	}
	if (overflow) {
		lock_take(&k->lock);
		mirror_repair(k);
		lock_drop(&k->lock);
		mm_tell(k->mm, GFN(0), GFN((uint64_t)1 << GFN_BITS), &k->mirror);
	}
}

static void *worker_main(void *arg)
{
	struct helper *h = arg;
	struct pollfd p = { .fd = h->work, .events = POLLIN };
	eventfd_t n;

	while (!atomic_load(&h->stopping)) {
		poll(&p, 1, READ_ONCE(h->k->nwaiting) ? 1 : -1);
		eventfd_read(h->work, &n);
		worker_serve(h, &h->serving);
		trap_waiting(h->k, &h->serving);
	}
	worker_serve(h, &h->serving);
	return NULL;
}

/* -- start and stop ---------------------------------------------------------------------------- */

static void register_all(struct kage_kvm *k)
{
	const struct run *run;

	for (gfn_t at = GFN(0); (run = runs_from(&k->runs, at)); at = run_end(run)) {
		int r = mirror_register(k, run);

		if (r)
			env_log(k->env, KAGE_LOG_ERROR, "mm %llu gfn %llx: cannot trap: errno %d",
				(unsigned long long)k->mm->id, (unsigned long long)run->gfn.v, -r);
	}
}

/*
 * Everything is registered with another context. The caller's vCPUs are parked:
 * for a moment nothing traps. Returns the old one, which nothing is registered with any more.
 */
static struct uffd uffd_swap(struct kage_kvm *k, struct uffd next, bool events)
{
	struct uffd old;

	/* No change is in flight: protections of ranges that one has blocked would be gone. */
	brlock_write(&k->mm->family->lock);
	brlock_write(&k->mm->range);
	lock_take(&k->lock);
	old = k->uffd;
	for (unsigned i = 0; i < k->windows; i++)
		uffd_unregister(&old, k->window[i].hva, k->window[i].npages << PAGE_SHIFT);
	k->uffd = next;
	k->events = events;
	register_all(k);
	lock_drop(&k->lock);
	brlock_write_drop(&k->mm->range);
	brlock_write_drop(&k->mm->family->lock);
	return old;
}

static void helper_free(struct helper *h)
{
	notify_reader_detach(&h->serving);
	if (h->stop >= 0)
		close(h->stop);
	if (h->work >= 0)
		close(h->work);
	if (h->uffd.fd >= 0)
		uffd_close(&h->uffd);
	env_free(h->k->env, h, sizeof(*h));
}

static void threads_stop(struct helper *h, bool reader)
{
	atomic_store(&h->stopping, true);
	eventfd_write(h->stop, 1);
	eventfd_write(h->work, 1);
	if (reader)
		pthread_join(h->reader, NULL);
	pthread_join(h->worker, NULL);
}

static int threads_start(struct helper *h)
{
	if (pthread_create(&h->worker, NULL, worker_main, h) != 0)
		return -EAGAIN;
	if (pthread_create(&h->reader, NULL, reader_main, h) == 0)
		return 0;
	threads_stop(h, false);
	return -EAGAIN;
}

static int helper_start(struct kage_kvm *k)
{
	struct helper *h;
	struct uffd old;
	int r;

	if (atomic_load(&k->helper))
		return -EBUSY;
	if (k->uffd.fd < 0 || k->mirror.abandoned)
		return -EOPNOTSUPP;
	h = env_alloc(k->env, sizeof(*h));
	if (!h)
		return -ENOMEM;
	h->k = k;
	h->uffd.fd = -1;
	lock_init(&h->lock, RANK_NONE, 0);
	h->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	h->work = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	r = h->stop < 0 || h->work < 0 ? -EMFILE : uffd_open(&h->uffd, &k->features, k->wp);
	if (r == 0)
		r = notify_reader_attach(&k->mm->notify, &h->serving);
	if (r == 0)
		r = threads_start(h); /* before the first event that somebody waits for */
	if (r) {
		helper_free(h);
		return r;
	}
	atomic_store(&k->helper, h);
	old = uffd_swap(k, h->uffd, k->wp);
	uffd_close(&old);
	return KAGE_OK;
}

int kage_kvm_helper_start(struct kage_kvm *k)
{
	return k ? api_result(k->vm->engine, __func__, 0, 0, helper_start(k)) : -EINVAL;
}

static int helper_stop(struct kage_kvm *k)
{
	struct helper *h = atomic_load(&k->helper);
	struct uffd plain = { .fd = -1 };
	int r;

	if (!h)
		return -ENOENT;
	r = k->mirror.abandoned ? 0 : uffd_open(&plain, &k->features, false);
	if (r)
		return r;
	if (!k->mirror.abandoned)
		uffd_swap(k, plain, false); /* from here on nobody waits for events to be read */
	threads_stop(h, true);
	if (k->mirror.abandoned)
		h->uffd.fd = -1; /* the number is the guest's still */
	atomic_store(&k->helper, NULL);
	helper_free(h);
	return KAGE_OK;
}

int kage_kvm_helper_stop(struct kage_kvm *k)
{
	return k ? api_result(k->vm->engine, __func__, 0, 0, helper_stop(k)) : -EINVAL;
}
