/* SPDX-License-Identifier: MIT */
/*
 * The TLB of a vCPU: contexts, filling, pieces of large pages, and losing entries
 * to others. Structures and invariants: vcpu.h.
 *
 *  T1  an entry is overwritten as a whole by a fill; of what others take, only
 *      the tags of the kinds that go.
 *  T2  entries that came from a large page are exact for their 4 KiB: a
 *      lost large page drops them by address, a lost piece of it (paging off)
 *      leaves the others.
 *
 * Locks: all functions but fill take tlb_lock; fill, drop and audit are called
 * under the shadow lock.
 *
 * Why not simpler: the index ignores the context, so two address spaces evict
 * each other where they use the same addresses, but losing a page is one probe
 * of each array whatever the number of contexts. There is one level: a second one
 * behind a small first one would need a lock for each copy forward, which costs
 * more than the cache misses of one large array.
 */
#include <sys/mman.h>
#include "vcpu.h"

static uint64_t page_of(uint64_t gva)
{
	return gva & ~(PAGE_SIZE - 1);
}
static uint64_t large_of(uint64_t gva)
{
	return gva & ~(((uint64_t)1 << TLB_LARGE_SHIFT) - 1);
}

static struct kage_tlb_entry *large_slot(struct kage_vcpu *v, uint64_t gva)
{
	return &v->large[(gva >> TLB_LARGE_SHIFT) & (TLB_LARGE - 1)];
}

int tlb_init(struct kage_vcpu *v, unsigned bits)
{
	size_t bytes = sizeof(struct kage_tlb_entry) << bits;
	void *tlb = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (tlb == MAP_FAILED)
		return -ENOMEM;
	madvise(tlb, bytes, MADV_DONTFORK);
	madvise(tlb, bytes, MADV_DONTDUMP);
	if (bytes >= BLOCK_PAGES * PAGE_SIZE)
		madvise(tlb, bytes, MADV_HUGEPAGE);
	v->head.tlb = tlb;
	v->head.mask = bytes - sizeof(struct kage_tlb_entry);
	v->next_id = 1;
	for (unsigned k = 0; k < TLB_KINDS; k++)
		v->head.ctx[k] = TLB_PARKED;
	lock_init(&v->tlb_lock, RANK_TLB, (uintptr_t)v);
	return 0;
}

void tlb_finish(struct kage_vcpu *v)
{
	if (v->head.tlb)
		munmap(v->head.tlb, tlb_entries(v) * sizeof(struct kage_tlb_entry));
}

/* -- contexts --------------------------------------------------------------- */

static void wipe_array(struct kage_tlb_entry *e, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		for (unsigned k = 0; k < TLB_KINDS; k++)
			WRITE_ONCE(e[i].tag[k], 0);
}

static void wipe(struct kage_vcpu *v)
{
	wipe_array(v->head.tlb, tlb_entries(v));
	wipe_array(v->large, TLB_LARGE);
	v->large_used = false;
	for (unsigned i = 0; i < TLB_SETS; i++)
		memset(v->set[i].id, 0, sizeof(v->set[i].id));
	v->next_id = 1;
}

/* Stores the current set's ids where probes see them. */
static void publish(struct kage_vcpu *v)
{
	bool visible = v->fast && atomic_load_explicit(&v->cpu.running, memory_order_relaxed);

	for (unsigned k = 0; k < TLB_KINDS; k++) {
		WRITE_ONCE(v->ctx[k], v->current->id[k]);
		WRITE_ONCE(v->head.ctx[k], visible ? v->current->id[k] : TLB_PARKED);
	}
}

/* Gives the current set the ids it lacks: one new number serves all kinds. */
static void give_ids(struct kage_vcpu *v)
{
	struct ctx_set *set = v->current;
	uint16_t id;

	if (set->id[0] && set->id[1] && set->id[2])
		return;
	if (v->next_id == TLB_PARKED)
		wipe(v);
	id = (uint16_t)v->next_id++;
	for (unsigned k = 0; k < TLB_KINDS; k++)
		if (!set->id[k])
			set->id[k] = id;
}

static void renew(struct kage_vcpu *v, uint32_t kinds)
{
	for (unsigned i = 0; i < TLB_SETS; i++)
		for (unsigned k = 0; k < TLB_KINDS; k++)
			if (kinds & (1u << k))
				v->set[i].id[k] = 0;
	give_ids(v);
	publish(v);
}

/* Translation off is the same whatever else the registers say. */
static bool same_mode(const struct ctx_set *set, const struct pt_guest *mode, uint64_t key)
{
	const struct pt_guest *m = &set->mode;

	return set->key == key && (m->arch == mode->arch || !m->nroots) && pt_same_roots(m, mode);
}

static struct ctx_set *find_set(struct kage_vcpu *v, const struct pt_guest *mode)
{
	uint64_t key = mode->nroots ? mode->arch->key(mode) : 0;
	struct ctx_set *oldest = &v->set[0];

	for (unsigned i = 0; i < TLB_SETS; i++) {
		struct ctx_set *set = &v->set[i];

		if (set->used && same_mode(set, mode, key))
			return set;
		if (set->stamp < oldest->stamp)
			oldest = set;
	}
	*oldest = (struct ctx_set){.used = true, .key = key, .mode = *mode};
	return oldest;
}

void tlb_select(struct kage_vcpu *v, const struct pt_guest *mode)
{
	lock_take(&v->tlb_lock);
	v->current = find_set(v, mode);
	v->current->stamp = ++v->clock;
	give_ids(v);
	publish(v);
	lock_drop(&v->tlb_lock);
}

/* -- running ------------------------------------------------------------------ */

static void unpark_locked(struct kage_vcpu *v)
{
	if (likely(atomic_load_explicit(&v->cpu.running, memory_order_relaxed)))
		return;
	atomic_store_explicit(&v->cpu.running, 1, memory_order_relaxed);
	atomic_thread_fence(
	    memory_order_seq_cst); /* pairs with tlb_drop()'s lock and the fence in shootdown() */
	publish(v);
}

void tlb_unpark(struct kage_vcpu *v)
{
	lock_take(&v->tlb_lock);
	unpark_locked(v);
	lock_drop(&v->tlb_lock);
}

void tlb_park(struct kage_vcpu *v)
{
	lock_take(&v->tlb_lock);
	for (unsigned k = 0; k < TLB_KINDS; k++)
		WRITE_ONCE(v->head.ctx[k], TLB_PARKED);
	atomic_store_explicit(&v->cpu.running, 0, memory_order_release);
	lock_drop(&v->tlb_lock);
}

/* -- filling -------------------------------------------------------------------- */

static void set_entry(struct kage_vcpu *v, struct kage_tlb_entry *e, uint64_t tag, uint64_t addend,
		      uint32_t rights)
{
	for (unsigned k = 0; k < TLB_KINDS; k++)
		WRITE_ONCE(e->tag[k], rights & (1u << k) ? tag | v->ctx[k] : 0);
	WRITE_ONCE(e->addend, addend);
}

static void soft_fill(struct shadow_cpu *cpu, const struct shadow_fill *f)
{
	struct kage_vcpu *v = vcpu_of(cpu);
	uint64_t addend = (uintptr_t)f->hva - f->gva;

	if (f->large) {
		v->large_used = true;
		set_entry(v, large_slot(v, f->gva), f->gva, addend, f->rights);
	} else {
		set_entry(v, tlb_slot(v, f->gva), f->gva, addend, f->rights);
	}
}

bool tlb_refill(struct kage_vcpu *v, uint64_t gva, unsigned kind)
{
	struct kage_tlb_entry *to = tlb_slot(v, gva), *from = large_slot(v, gva);
	bool found;

	if (!v->large_used) /* only the owner's own fills set it */
		return false;
	lock_take(&v->tlb_lock);
	found = from->tag[kind] == (large_of(gva) | v->ctx[kind]);
	for (unsigned k = 0; found && k < TLB_KINDS; k++)
		WRITE_ONCE(to->tag[k],
			   from->tag[k] == (large_of(gva) | v->ctx[k]) ? page_of(gva) | v->ctx[k] : 0);
	if (found)
		WRITE_ONCE(to->addend, from->addend);
	lock_drop(&v->tlb_lock);
	return found;
}

/* -- losing ------------------------------------------------------------------------ */

/* Overwrites the tags of `kinds` that are for `addr` in any context. */
static bool lose(struct kage_tlb_entry *e, uint64_t addr, uint32_t kinds)
{
	bool found = false;

	for (unsigned k = 0; k < TLB_KINDS; k++) {
		uint64_t tag = e->tag[k];

		if (!(kinds & (1u << k)) || !tag || page_of(tag) != addr)
			continue;
		WRITE_ONCE(e->tag[k], 0);
		found = true;
	}
	return found;
}

static bool lose_range(struct kage_vcpu *v, const struct shadow_drop *d)
{
	bool found = false;

	for (uint64_t i = 0; i < d->npages; i++) {
		uint64_t gva = page_of(d->gva) + i * PAGE_SIZE;

		found |= lose(tlb_slot(v, gva), gva, d->kinds);
	}
	if (!v->large_used)
		return found;
	found |= lose(large_slot(v, d->gva), large_of(d->gva), d->kinds);
	if (d->npages > 1) {
		uint64_t last = large_of(d->gva + (d->npages - 1) * PAGE_SIZE);

		found |= lose(large_slot(v, last), last, d->kinds);
	}
	return found;
}

static bool soft_drop(struct shadow_cpu *cpu, const struct shadow_drop *d, unsigned n, uint32_t flush)
{
	struct kage_vcpu *v = vcpu_of(cpu);
	bool found = flush != 0, running;

	lock_take(&v->tlb_lock);
	for (unsigned i = 0; i < n; i++)
		found |= lose_range(v, &d[i]);
	if (flush)
		renew(v, flush);
	/* The tags are stored; unpark_locked() comes before us and is seen, or after us and sees them. */
	running = atomic_load_explicit(&cpu->running, memory_order_relaxed);
	lock_drop(&v->tlb_lock);
	return found && running;
}

void tlb_drop_page(struct kage_vcpu *v, uint64_t gva)
{
	const struct shadow_drop d = {.gva = gva, .npages = 1, .kinds = KAGE_RWX};

	lock_take(&v->tlb_lock);
	lose_range(v, &d);
	lock_drop(&v->tlb_lock);
}

/* -- the rest of the ops ------------------------------------------------------------- */

static void soft_code_written(struct shadow_cpu *cpu, gpa_t gpa, uint64_t len)
{
	struct kage_vcpu *v = vcpu_of(cpu);

	v->code_written(v->opaque, v, gpa.v, len);
}

static void audit_tag(struct kage_vcpu *v, const struct kage_tlb_entry *e, unsigned k, bool large,
		      struct audit *a)
{
	struct shadow_fill f = {.large = large, .gva = page_of(e->tag[k]), .rights = 1u << k};

	f.hva = (void *)(uintptr_t)(f.gva + e->addend);
	for (unsigned i = 0; i < TLB_SETS; i++)
		if (v->set[i].used && v->set[i].id[k] && (e->tag[k] & TLB_PARKED) == v->set[i].id[k])
			shadow_audit_tlb(&v->cpu, &v->set[i].mode, &f, a);
}

static void audit_array(struct kage_vcpu *v, const struct kage_tlb_entry *e, uint64_t n, bool large,
			struct audit *a)
{
	for (uint64_t i = 0; i < n; i++)
		for (unsigned k = 0; k < TLB_KINDS; k++)
			if (e[i].tag[k])
				audit_tag(v, &e[i], k, large, a);
}

static void soft_audit(struct shadow_cpu *cpu, struct audit *a)
{
	struct kage_vcpu *v = vcpu_of(cpu);

	lock_take(&v->tlb_lock);
	audit_array(v, v->head.tlb, tlb_entries(v), false, a);
	audit_array(v, v->large, TLB_LARGE, true, a);
	lock_drop(&v->tlb_lock);
}

const struct shadow_cpu_ops soft_ops = {
    .fill = soft_fill,
    .drop = soft_drop,
    .audit = soft_audit,
};

const struct shadow_cpu_ops soft_ops_code = {
    .fill = soft_fill,
    .drop = soft_drop,
    .code_written = soft_code_written,
    .audit = soft_audit,
};
