/* SPDX-License-Identifier: MIT */
/*
 * The life of a shadow MMU and of its vCPUs' part in it.
 *
 * Made at the guest's first vCPU, registered as an ordinary listener of the mm,
 * destroyed by the listener's release. A vCPU's root is a lookup: roots that no
 * vCPU uses at the moment stay in the hash until the limit takes them.
 *
 * Invariants:
 *  L1  a vCPU in the list has a reader attached to the mm, so the mm cannot be
 *      destroyed before it has left.
 *  L2  each of cpu->root is NULL or a page in use whose `roots` counts it.
 *
 * Locks: the maker's lock over shadow_get(); shadow lock and cpus_lock (write)
 * for the list of vCPUs.
 */
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "shadow/internal.h"

static struct shadow *shadow_alloc(struct mm *mm)
{
	struct env *env = mm->host->env;
	struct shadow *s = env_alloc(env, sizeof(*s));

	if (!s)
		return NULL;
	s->mm = mm;
	s->env = env;
	lock_init(&s->lock, RANK_SHADOW, mm->id);
	lock_init(&s->code_lock, RANK_NONE, 0);
	brlock_init(&s->cpus_lock, RANK_NONE, 0);
	list_init(&s->cpus);
	list_init(&s->pages);
	list_init(&s->runs);
	list_init(&s->idle);
	list_init(&s->unsync);
#ifndef KAGE_TSAN /* it does not see membarrier: real fences on both sides */
	/* Idempotent, and no state of ours: the kernel keeps it for the process. */
	s->membarrier = syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) == 0;
#endif
	if (pages_init(s)) {
		shadow_destroy(s);
		return NULL;
	}
	return s;
}

void shadow_destroy(struct shadow *s)
{
	if (!s)
		return;
	if (s->slot)
		atomic_store_explicit(s->slot, NULL, memory_order_release);
	pages_finish(s);
	env_free(s->env, s, sizeof(*s));
}

static int shadow_make(struct mm *mm, struct shadow *_Atomic *slot, struct shadow **out)
{
	struct shadow *s = shadow_alloc(mm);
	int r;

	if (!s)
		return -ENOMEM;
	r = notify_register(&mm->notify, &s->listener, &shadow_listener_ops);
	if (r) {
		shadow_destroy(s);
		return r;
	}
	s->slot = slot;
	atomic_store_explicit(slot, s, memory_order_release);
	*out = s;
	return 0;
}

int shadow_get(struct mm *mm, struct shadow *_Atomic *slot, struct lock *lock, struct shadow **out)
{
	struct shadow *s;
	int r = 0;

	lock_take(lock);
	s = atomic_load_explicit(slot, memory_order_acquire);
	if (s)
		*out = s;
	else
		r = shadow_make(mm, slot, out);
	lock_drop(lock);
	return r;
}

/* From now on fetches mark their pages: what could be fetched from unmarked so far goes. */
static void code_starts(struct shadow *s)
{
	if (s->code_cpus++)
		return;
	while (!list_empty(&s->pages))
		page_zap(s, container_of(s->pages.next, struct shadow_page, node));
	s->batch_flush |= KAGE_RWX;
	batch_apply(s);
}

int shadow_attach(struct shadow *s, struct shadow_cpu *cpu)
{
	int r = notify_reader_attach(&s->mm->notify, &cpu->reader);

	if (r)
		return r;
	cpu->shadow = s;
	brlock_write(&s->cpus_lock);
	lock_take(&s->lock);
	list_add_tail(&s->cpus, &cpu->node);
	if (cpu->ops->code_written)
		code_starts(s);
	lock_drop(&s->lock);
	brlock_write_drop(&s->cpus_lock);
	return 0;
}

void shadow_detach(struct shadow_cpu *cpu)
{
	struct shadow *s = cpu->shadow;

	brlock_write(&s->cpus_lock);
	lock_take(&s->lock);
	list_del(&cpu->node);
	page_roots_put(s, cpu);
	s->direct_cpus -= cpu->direct_used;
	if (cpu->ops->code_written)
		s->code_cpus--;
	s->misses_retired += READ_ONCE(cpu->misses);
	lock_drop(&s->lock);
	brlock_write_drop(&s->cpus_lock);
	notify_reader_detach(&cpu->reader);
}

void shadow_set_mode(struct shadow_cpu *cpu, const struct pt_guest *mode)
{
	struct shadow *s = cpu->shadow;

	lock_take(&s->lock);
	if (pt_same_roots(&cpu->mode, mode)) { /* another privilege, say */
		memcpy(&cpu->mode, mode, offsetof(struct pt_guest, root));
		lock_drop(&s->lock);
		return;
	}
	page_roots_put(s, cpu);
	cpu->mode = *mode;
	for (unsigned i = 0; i < mode->nroots; i++) {
		const struct pt_root *r = &mode->root[i];
		struct shadow_page *p;

		if (r->state != PT_TABLE)
			continue;
		cpu->role[i] = root_role(r);
		p = page_find(s, root_gfn(r), cpu->role[i]);
		if (p)
			page_root_get(s, cpu, i, p);
	}
	batch_apply(s);
	lock_drop(&s->lock);
}

bool shadow_fast_windows(const struct shadow *s)
{
#ifdef KAGE_TSAN
	return true; /* KAGE_WINDOW_FENCE() is a real one */
#else
	return s->membarrier;
#endif
}

void shadow_stats(struct shadow *s, struct kage_stats *out)
{
	uint64_t misses;

	lock_take(&s->lock);
	misses = s->misses_retired;
	out->shadow_pages += s->npages;
	out->shadow_bytes += (uint64_t)(s->npages + s->nfree_pages) * sizeof(struct shadow_page) +
			     (uint64_t)(s->nchunks + s->nfree_chunks) * sizeof(struct chunk);
	out->shadow_unsync += s->nunsync;
	list_for_each(n, &s->cpus) misses += READ_ONCE(container_of(n, struct shadow_cpu, node)->misses);
	lock_drop(&s->lock);
	out->tlb_misses += misses;
	out->shadow_faults += s->installed;
	out->shadow_dropped += s->dropped;
	out->table_writes += s->table_writes;
	out->tlb_flushes += s->flushes;
	out->shootdowns += s->shootdowns;
	out->window_waits += s->window_waits;
}
