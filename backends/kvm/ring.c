/* SPDX-License-Identifier: MIT */
/*
 * Dirty rings. An entry is KVM's (flags 0), dirty (F_DIRTY: ours to take),
 * or taken (F_RESET) until KVM_RESET_DIRTY_RINGS write-protects the page again
 * and makes it KVM's. Both sides go round in order, so an index for each is enough.
 *
 *   KVM, vCPU thread                       here
 *     entry->slot, entry->offset
 *     (1) release: flags = F_DIRTY   <---    (2) acquire: flags
 *                                            slot, offset
 *     (4) acquire: flags & F_RESET   <---    (3) release: flags = F_RESET
 *     page protected, flags = 0
 *
 * Without (1)-(2) a page of the entry's former use is marked; without (3)-(4)
 * KVM overwrites the entry while it is read. On arm64 KVM promises this order with
 * KVM_CAP_DIRTY_LOG_RING_ACQ_REL; on x86 it always holds.
 *
 * Invariants:
 *  G1  a page is marked after the reset that protects it: the reason is K4 of slots.c. So entries
 *      are taken in batches, and each batch is reset before it is marked.
 *  G2  one harvest takes from a ring at most as many entries as it has: a vCPU that
 *      writes all the time does not keep it busy for ever.
 *  G3  no signal interrupts a reset. KVM may stop there when one is pending (Linux 6.18
 *      does), and has then freed entries whose pages it does not protect: writes to them would be
 *      lost, and nothing tells. A stop (SIGSTOP, a tracer) cannot be blocked.
 *
 * An entry may be older than its slot's present use, if a slot was removed and
 * its id used again: then some page of the new slot is marked and protected, which is harmless.
 *
 * Locks: none taken; the caller's lock is around all calls, and the same one as for the slots.
 */
#include <linux/kvm.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "frame/pool.h"
#include "ring.h"

#ifndef KVM_DIRTY_LOG_PAGE_OFFSET
#define KVM_DIRTY_LOG_PAGE_OFFSET 0
#endif

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

#define BATCH	    4096u
#define RESET_TRIES 1000

struct ring_run {
	gfn_t gfn;
	uint64_t npages;
};

struct ring {
	struct list node;
	struct kvm_dirty_gfn *entry;
	uint32_t size;	/* entries, a power of two */
	uint32_t next;	/* index of the entry to look at; counts on, masked when used */
	uint32_t quota; /* entries that this harvest may still take (G2) */
};

int rings_init(struct rings *r, struct env *env, int vmfd)
{
	*r = (struct rings){.env = env, .vmfd = vmfd};
	list_init(&r->list);
	r->batch = env_alloc(env, BATCH * sizeof(*r->batch));
	return r->batch ? 0 : -ENOMEM;
}

void rings_finish(struct rings *r)
{
	list_for_each_safe (n, next, &r->list) {
		struct ring *ring = container_of(n, struct ring, node);

		munmap(ring->entry, ring->size * sizeof(*ring->entry));
		env_free(r->env, ring, sizeof(*ring));
	}
	env_free(r->env, r->batch, BATCH * sizeof(*r->batch));
	r->batch = NULL;
	list_init(&r->list);
}

/* Is there a page? A kernel before 5.14 cannot say: `otherwise`. */
static bool has_page(void *at, bool otherwise)
{
	if (madvise(at, host_page_size(), MADV_POPULATE_READ) == 0)
		return true;
	return errno == EINVAL ? otherwise : false;
}

/*
 * KVM maps any size at any vCPU and lets the access fail (SIGBUS), so the page
 * after the ring is mapped as well, found missing, and unmapped.
 */
static int ring_map(int vcpufd, size_t bytes, char **out)
{
	size_t page = host_page_size();
	char *map = mmap(NULL, bytes + page, PROT_READ | PROT_WRITE, MAP_SHARED, vcpufd, KVM_DIRTY_LOG_PAGE_OFFSET * page);

	if (map == MAP_FAILED)
		return errno == ENODEV ? -EINVAL : -errno;
	if (!has_page(map + bytes - page, true) || has_page(map + bytes, false)) {
		munmap(map, bytes + page);
		return -EINVAL;
	}
	munmap(map + bytes, page);
	*out = map;
	return 0;
}

int ring_add(struct rings *r, int vcpufd, size_t bytes)
{
	struct ring *ring;
	char *map = NULL;
	int err;

	if (!KVM_DIRTY_LOG_PAGE_OFFSET || bytes < host_page_size() || (bytes & (bytes - 1)) ||
	    bytes / sizeof(struct kvm_dirty_gfn) > UINT32_MAX / 2)
		return -EINVAL;
	if (ioctl(r->vmfd, KVM_RESET_DIRTY_RINGS, 0) < 0) /* refused if the VM has no rings */
		return -EINVAL;
	ring = env_alloc(r->env, sizeof(*ring));
	if (!ring)
		return -ENOMEM;
	err = ring_map(vcpufd, bytes, &map);
	if (err) {
		env_free(r->env, ring, sizeof(*ring));
		return err;
	}
	ring->entry = (struct kvm_dirty_gfn *)map;
	ring->size = (uint32_t)(bytes / sizeof(*ring->entry));
	list_add_tail(&r->list, &ring->node);
	return 0;
}

/* -- one harvest ------------------------------------------------------------------ */

static struct kvm_dirty_gfn *ring_entry(const struct ring *ring, uint32_t index)
{
	return &ring->entry[index & (ring->size - 1)];
}

/* (2) */
static uint32_t entry_flags(const struct kvm_dirty_gfn *e)
{
	return load_acquire(&e->flags) & KVM_DIRTY_GFN_F_MASK;
}

/* Neighbours become one run. False: no room, and nothing was put. */
static bool batch_put(struct rings *r, gfn_t gfn, uint32_t unit)
{
	struct ring_run *last = r->batched ? &r->batch[r->batched - 1] : NULL;

	if (last && gfn.v - last->gfn.v < last->npages)
		return true;
	if (last && gfn.v == last->gfn.v + last->npages) {
		last->npages += unit;
		return true;
	}
	if (r->batched == BATCH)
		return false;
	r->batch[r->batched++] = (struct ring_run){.gfn = gfn, .npages = unit};
	return true;
}

/* Moves entries of one ring into the batch. False: the batch is full. */
static bool ring_take(struct rings *r, struct ring *ring, const struct slots *s)
{
	for (; ring->quota; ring->quota--, ring->next++) {
		struct kvm_dirty_gfn *e = ring_entry(ring, ring->next);
		gfn_t gfn;

		if (entry_flags(e) != KVM_DIRTY_GFN_F_DIRTY)
			break;
		if (slots_gfn(s, e->slot, e->offset, &gfn) && !batch_put(r, gfn, s->config.unit))
			return false;
		store_release(&e->flags, KVM_DIRTY_GFN_F_RESET); /* (3) */
	}
	return true;
}

/* Is anything taken that KVM has not got back? It works in order, so the last entry tells. */
static bool rings_pending(const struct rings *r)
{
	list_for_each (n, &r->list) {
		const struct ring *ring = container_of(n, struct ring, node);

		if (entry_flags(ring_entry(ring, ring->next - 1)) & KVM_DIRTY_GFN_F_RESET)
			return true;
	}
	return false;
}

static int reset_blocked(const struct rings *r)
{
	for (int tries = 0; rings_pending(r); tries++) {
		int n = ioctl(r->vmfd, KVM_RESET_DIRTY_RINGS, 0);

		if (n < 0 && errno != EINTR)
			return -errno;
		if (tries == RESET_TRIES)
			return -EIO;
	}
	return 0;
}

static int rings_reset(const struct rings *r)
{
	sigset_t all, before;
	int err;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	err = reset_blocked(r);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (err)
		env_log(r->env, KAGE_LOG_ERROR, "kvm: KVM_RESET_DIRTY_RINGS: %d", err);
	return err;
}

static bool rings_take(struct rings *r, const struct slots *s)
{
	list_for_each (n, &r->list)
		if (!ring_take(r, container_of(n, struct ring, node), s))
			return false;
	return true;
}

int rings_harvest(struct rings *r, const struct slots *s, slots_mark_fn *mark, void *arg)
{
	int err = 0;
	bool all;

	list_for_each (n, &r->list) {
		struct ring *ring = container_of(n, struct ring, node);

		ring->quota = ring->size;
	}
	do {
		int e;

		r->batched = 0;
		all = rings_take(r, s);
		e = rings_reset(r);
		err = err ? err : e;
		for (uint32_t i = 0; i < r->batched; i++)
			mark(arg, r->batch[i].gfn, r->batch[i].npages);
	} while (!all);
	return err;
}
