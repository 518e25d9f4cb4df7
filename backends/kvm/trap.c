/* SPDX-License-Identifier: MIT */
/*
 * Traps: faults that userfaultfd(2) hands to the embedder's thread.
 *
 *      vCPU                      embedder's thread
 *      touches a page ─────────► kage_kvm_trap_run(): reads the event
 *      waits in the kernel       mm_fault() as for any other secondary MMU:
 *                                  a write: adoption maps a page of the guest's own
 *                                  a read of a shared page: UFFDIO_CONTINUE, write-protected
 *      goes on ◄──────────────── wakes
 *
 * Invariants:
 *  1. a page of a PRIVATE run is mapped write-protected under exact policy, or not at
 *     all: every first write traps, also after a handler has died (then the kernel's COW answers).
 *  2. an event that has been read is served, or its page is on the waiting list, or its thread is woken.
 *
 * Locks taken: none while the mm faults; k->lock to map a read.
 */
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "helper.h"
#include "internal.h"

/* What one answer maps around a page that is read: up to 64 KiB, as the kernel's own fault-around. */
#define AROUND ((uint64_t)16)

static int trap_wake(struct kage_kvm *k, gfn_t gfn)
{
	char *at;

	lock_take(&k->lock);
	at = kvm_hva(k, granule_down(k, gfn));
	if (at)
		uffd_wake(&k->uffd, at, k->mirror.granule << PAGE_SHIFT);
	lock_drop(&k->lock);
	return 1;
}

/* The page's frame holds no memory yet: CONTINUE wants a page of the file. */
static void populate(struct kage_kvm *k, pfn_t pfn)
{
	(void)READ_ONCE(*(char *)pfn_hva(k->pool, pfn));
}

/* Shared memory that is read: mapped as it is, so that a write traps. k->lock held, the reader is valid. */
static int read_private(struct kage_kvm *k, const struct run *run, gfn_t gfn)
{
	gfn_t from = GFN(MAX(run->gfn.v, ALIGN_DOWN(gfn.v, AROUND)));
	gfn_t to = GFN(MIN(run_end(run).v, ALIGN_DOWN(gfn.v, AROUND) + AROUND));
	size_t granule = (size_t)k->mirror.granule << PAGE_SHIFT;
	int64_t n;

	gfn = granule_down(k, gfn);
	n = uffd_continue(&k->uffd, kvm_hva(k, gfn), granule, true);
	if (n == -EFAULT || (n >= 0 && n < (int64_t)granule)) {
		for (unsigned i = 0; i < k->mirror.granule; i++)
			populate(k, run_pfn(run, gfn_add(gfn, i)));
		n = uffd_continue(&k->uffd, kvm_hva(k, gfn), granule, true);
	}
	if (n < 0)
		return (int)n;
	/* The neighbourhood, up to its first hole; nothing depends on it. */
	if (gfn.v + k->mirror.granule < to.v)
		uffd_continue(&k->uffd, kvm_hva(k, gfn_add(gfn, k->mirror.granule)),
			      (to.v - gfn.v - k->mirror.granule) << PAGE_SHIFT, true);
	if (from.v < gfn.v)
		uffd_continue(&k->uffd, kvm_hva(k, from), (gfn.v - from.v) << PAGE_SHIFT, true);
	return KAGE_OK;
}

/* KAGE_OK: it is mapped, or no window has it any more; -EAGAIN: again; -EEXIST: it ought not to have trapped. */
static int trap_read(struct kage_kvm *k, struct notify_reader *reader, gfn_t gfn)
{
	const struct run *run;
	int r = -EAGAIN;

	lock_take(&k->lock);
	run = runs_find(&k->runs, gfn);
	if (!run)
		r = KAGE_OK;
	else if (!notify_read_valid(reader))
		r = -EAGAIN;
	else if (run->kind == RUN_PRIVATE)
		r = read_private(k, run, gfn);
	else
		r = -EEXIST;
	lock_drop(&k->lock);
	return r;
}

/* The zero frame cannot be mapped so that the first write traps for certain: the page gets memory. */
static int trap_zero(struct kage_kvm *k, struct notify_reader *reader, gfn_t gfn)
{
	struct brlock_held held = brlock_read(&k->mm->range);
	int r = mm_region(k->mm, gfn) ? mm_adopt_page(k->mm, gfn, reader, NULL) : 0;

	brlock_read_drop(&k->mm->range, held);
	return r;
}

int trap_serve(struct kage_kvm *k, struct notify_reader *reader, gfn_t gfn, uint32_t access)
{
	int r;

	for (;;) {
		/* The vCPU is woken before mm_fault() returns: its write would be marked by KVM, and here once more, later. */
		struct mm_fault f = {.gfn = gfn, .access = access, .reader = reader, .logged = true};

		notify_read_begin(reader, gfn, gfn_add(gfn, 1));
		r = mm_fault(k->mm, &f);
		if (r == KAGE_OK && !(f.prot & KAGE_WRITE))
			r = f.zero ? trap_zero(k, reader, gfn) : trap_read(k, reader, gfn);
		notify_read_end(reader);
		if (r != KAGE_RETRY && r != -EAGAIN)
			break;
	}
	if (r == KAGE_WAIT)
		return 0;
	/* KAGE_MMIO: not its memory any more. A thread of ours comes again and fails as it ought to. */
	if (r == KAGE_OK || r == KAGE_MMIO || r == -EEXIST)
		return trap_wake(k, gfn);
	return r;
}

/* -- pages whose owner wants them later ------------------------------------------------------- */

static int waiting_add(struct kage_kvm *k, gfn_t gfn, uint32_t access)
{
	struct waiting *w;
	int r = 0;

	lock_take(&k->lock);
	if (k->nwaiting == k->waiting_room) {
		unsigned room = 2 * k->waiting_room + 16;

		w = env_alloc(k->env, room * sizeof(*w));
		if (w) {
			if (k->nwaiting)
				memcpy(w, k->waiting, k->nwaiting * sizeof(*w));
			env_free(k->env, k->waiting, k->waiting_room * sizeof(*w));
			k->waiting = w;
			k->waiting_room = room;
		}
		r = w ? 0 : -ENOMEM;
	}
	if (r == 0)
		k->waiting[k->nwaiting++] = (struct waiting){gfn, access};
	lock_drop(&k->lock);
	return r;
}

static bool waiting_take(struct kage_kvm *k, struct waiting *w)
{
	bool any;

	lock_take(&k->lock);
	any = k->nwaiting > 0;
	if (any)
		*w = k->waiting[--k->nwaiting];
	lock_drop(&k->lock);
	return any;
}

static int trap_one(struct kage_kvm *k, struct notify_reader *reader, gfn_t gfn, uint32_t access)
{
	int r = trap_serve(k, reader, gfn, access), err = 0;

	if (r > 0)
		atomic_fetch_add(&k->traps, 1);
	else
		err = waiting_add(k, gfn, access);
	if (err) /* no memory to remember it: it traps again at once */
		trap_wake(k, gfn);
	return r;
}

int trap_waiting(struct kage_kvm *k, struct notify_reader *reader)
{
	unsigned n;
	struct waiting w;
	int r = 0, served = 0;

	lock_take(&k->lock);
	n = k->nwaiting;
	lock_drop(&k->lock);
	while (n-- && waiting_take(k, &w)) {
		int one = trap_one(k, reader, w.gfn, w.access);

		served += one > 0;
		if (one < 0 && r == 0)
			r = one;
	}
	return r ? r : served;
}

/* A page of a run that traps for its own sake. k->lock held. */
static bool trapping(const struct kage_kvm *k, gfn_t gfn)
{
	const struct run *run = runs_find(&k->runs, gfn);

	return run && mirror_mode(k, run) & UFFDIO_REGISTER_MODE_MISSING;
}

int trap_message(struct kage_kvm *k, struct notify_reader *reader, const struct uffd_msg *msg)
{
	uint64_t flags = msg->arg.pagefault.flags;
	bool write = flags & (UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP);
	bool ours, block;
	gfn_t gfn;

	if (msg->event != UFFD_EVENT_PAGEFAULT)
		return 0;
	lock_take(&k->lock);
	ours = window_gfn(k, (char *)(uintptr_t)msg->arg.pagefault.address, &gfn);
	block = ours && !trapping(k, gfn);
	lock_drop(&k->lock);
	if (!ours) { /* unmapped since: it comes again, and fails as it ought to */
		uffd_wake(&k->uffd, (void *)ALIGN_DOWN((uintptr_t)msg->arg.pagefault.address, host_page_size()),
			  host_page_size());
		return 0;
	}
	/* A write that some change blocks is woken by that change's end. */
	return block ? 0 : trap_one(k, reader, gfn, write ? KAGE_WRITE : KAGE_READ);
}

/* -- the public calls --------------------------------------------------------------------------- */

#define MESSAGES 16

static bool traps(const struct kage_kvm *k)
{
	return k->uffd.fd >= 0 && !READ_ONCE(k->mirror.abandoned) && (k->mirror.exact || kvm_trapped(k));
}

int kage_kvm_trap_fd(struct kage_kvm *k)
{
	if (!k)
		return -EINVAL;
	return traps(k) && !atomic_load(&k->helper) ? k->uffd.fd : -ENOENT;
}

/* All that waits. Served, or the first error. */
static int trap_drain(struct kage_kvm *k, struct notify_reader *reader)
{
	struct uffd_msg msg[MESSAGES];
	int served = trap_waiting(k, reader), err = served < 0 ? served : 0, n;

	served = MAX(served, 0);
	while ((n = uffd_read(&k->uffd, msg, MESSAGES)) > 0) {
		for (int i = 0; i < n; i++) {
			int r = trap_message(k, reader, &msg[i]);

			served += r > 0;
			if (r < 0 && err == 0)
				err = r;
		}
	}
	return err ? err : served;
}

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int trap_loop(struct kage_kvm *k, struct notify_reader *reader, int timeout_ms)
{
	int64_t until = now_ms() + timeout_ms;
	int total = 0;

	for (;;) {
		struct pollfd p[2] = {{.fd = k->uffd.fd, .events = POLLIN},
				      {.fd = k->kick, .events = POLLIN}};
		int r = trap_drain(k, reader);
		int64_t left = timeout_ms < 0 ? -1 : until - now_ms();

		if (r < 0)
			return r;
		total += r;
		if (!traps(k))
			return total ? total : -ENOENT;
		if (timeout_ms < 0 ? total > 0 : left <= 0)
			return total;
		/* a page that somebody wants later is tried again, a tick later */
		if (READ_ONCE(k->nwaiting) && (left < 0 || left > 1))
			left = 1;
		poll(p, 2, (int)left);
	}
}

int kage_kvm_trap_run(struct kage_kvm *k, int timeout_ms)
{
	struct notify_reader reader;
	int r;

	if (!k)
		return -EINVAL;
	if (!traps(k) || atomic_load(&k->helper))
		return -ENOENT;
	r = notify_reader_attach(&k->mm->notify, &reader);
	if (r)
		return r;
	r = trap_loop(k, &reader, timeout_ms);
	notify_reader_detach(&reader);
	return r;
}

/* Whoever is between start and end has blocked writes through it: they come to their end soon, a dead handler apart. */
static void blocked_drain(struct kage_kvm *k)
{
	int64_t until = now_ms() + k->env->window_timeout_ms;
	bool any = true;

	while (any && now_ms() < until) {
		uint32_t seen = atomic_load(&k->unblocked);

		any = false;
		for (unsigned i = 0; i < BLOCKED_MAX; i++)
			any |= k->blocked[i].used && k->blocked[i].protected;
		if (!any)
			break;
		lock_drop(&k->lock);
		word_wait(&k->unblocked, seen, 10);
		lock_take(&k->lock);
	}
}

/*
 * What was registered is let go and woken by hand: a thread that polls the descriptor would keep the
 * kernel from doing it. Its number stays taken, by an eventfd, so that a handler that is stuck somewhere can do
 * no harm with it.
 */
static void trap_release(struct kage_kvm *k)
{
	for (unsigned i = 0; i < k->windows; i++) {
		const struct window *w = &k->window[i];

		uffd_unregister(&k->uffd, w->hva, w->npages << PAGE_SHIFT);
		uffd_wake(&k->uffd, w->hva, w->npages << PAGE_SHIFT);
	}
	dup3(k->kick, k->uffd.fd, O_CLOEXEC);
	eventfd_write(k->kick, 1);
}

int kage_kvm_trap_abandon(struct kage_kvm *k)
{
	int r = 0;

	if (!k)
		return -EINVAL;
	lock_take(&k->lock);
	blocked_drain(k);
	if (k->uffd.fd < 0 || k->mirror.abandoned)
		r = -ENOENT;
	if (r == 0) {
		WRITE_ONCE(k->mirror.abandoned, true);
		WRITE_ONCE(k->mirror.exact, false);
		k->policy_why = "trapping was abandoned";
		WRITE_ONCE(k->wp, false);
		WRITE_ONCE(k->mirror.blocks, k->config.pause != NULL);
		trap_release(k);
		k->nwaiting = 0;
		helper_kick(k);
	}
	lock_drop(&k->lock);
	if (r == 0)
		env_log(k->env, KAGE_LOG_WARN, "mm %llu: trapping was abandoned: native from now on",
			(unsigned long long)k->mm->id);
	return r;
}
