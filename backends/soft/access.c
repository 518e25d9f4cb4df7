/* SPDX-License-Identifier: MIT */
/*
 * Guest accesses out of line: TLB misses, odd sizes, page crossings, pointers.
 *
 * An access of at most a page touches two pages at most. Each is made ready
 * (ensure()), then one window is opened in which both tags are probed again and
 * all bytes move; if a tag went meanwhile, all over again. So it transfers all
 * or nothing. Longer accesses are cut at page borders.
 *
 * Invariants:
 *  C1  guest memory is touched only inside a window in which the tag was seen.
 *  C2  every call of the shadow MMU is made between slow_begin() and slow_end().
 *
 * Locks: none held over an access; tlb_lock for a refill.
 *
 * Why not simpler: a store to a watched page (a guest's table) is done by the
 * shadow MMU, which cannot be within a window. For a store that crosses into
 * one the page is made writable instead; if the guest's tables fight back (the
 * store's own translation needs the table), it is done in two halves.
 */
#include <pthread.h>
#include "vcpu.h"

#define FIGHTS 16 /* attempts at a crossing store before it is done in halves */

uint64_t slow_begin(struct kage_vcpu *v)
{
	uint64_t win = READ_ONCE(v->head.win);

	atomic_store_explicit(&v->cpu.slow_thread, (uintptr_t)pthread_self(), memory_order_relaxed);
	if (win & 1)
		store_release(&v->head.win, win + 1);
	return win;
}

void slow_end(struct kage_vcpu *v, uint64_t win)
{
	atomic_store_explicit(&v->cpu.slow_thread, 0, memory_order_release);
	if (!(win & 1))
		return;
	WRITE_ONCE(v->head.win, win + 2);
	if (v->fast)
		KAGE_WINDOW_FENCE();
	else
		atomic_thread_fence(memory_order_seq_cst);
}

struct access {
	struct kage_vcpu *v;
	uint64_t gva;
	char *buf;
	size_t len;
	unsigned kind;
	struct kage_fault *fault; /* never NULL */
};

/* Makes one page's translation present in the TLB. Results of shadow_fault(). */
static int ensure(struct access *a, uint64_t gva, unsigned flags)
{
	struct kage_vcpu *v = a->v;
	uint64_t win;
	int r;

	if (tlb_probe(v, gva, 1, a->kind) || tlb_refill(v, gva, a->kind))
		return KAGE_OK;
	win = slow_begin(v);
	a->fault->gva = gva;
	a->fault->access = 1u << a->kind;
	r = shadow_fault(&v->cpu, gva, 1u << a->kind, flags, a->fault);
	slow_end(v, win);
	if (r == KAGE_OK)
		tlb_refill(v, gva, a->kind); /* a large page is not in the TLB yet */
	return r;
}

static void move(const struct access *a, const struct kage_tlb_entry *e, size_t from, size_t len)
{
	void *hva = kage_tlb_hva(e, a->gva + from);

	if (a->kind == 1)
		guest_copy(hva, a->buf + from, len);
	else
		guest_copy(a->buf + from, hva, len);
}

/* Moves all bytes in one window; false if a tag is missing. `first`: bytes on the first page. */
static bool transfer(const struct access *a, size_t first)
{
	uint64_t win = window_open(a->v);
	struct kage_tlb_entry *e = tlb_probe(a->v, a->gva, first, a->kind), *e2 = e;

	if (e && first < a->len)
		e2 = tlb_probe(a->v, a->gva + first, a->len - first, a->kind);
	if (e && e2) {
		move(a, e, 0, first);
		if (first < a->len)
			move(a, e2, first, a->len - first);
	}
	kage_window_close(&a->v->head, win);
	return e && e2;
}

static int store_watched(struct access *a)
{
	uint64_t win = slow_begin(a->v);
	int r = shadow_store(&a->v->cpu, GPA(a->fault->gpa), a->buf, a->len);

	slow_end(a->v, win);
	return r;
}

static int access_one(struct access *a)
{
	for (;;) {
		int r = ensure(a, a->gva, 0);

		if (r == SHADOW_EMULATE) {
			r = store_watched(a);
			if (r != KAGE_RETRY)
				return r;
			continue;
		}
		if (r)
			return r;
		if (transfer(a, a->len))
			return KAGE_OK;
	}
}

static int access_halves(struct access *a, size_t first)
{
	struct access half = *a;
	int r;

	half.len = first;
	r = access_one(&half);
	if (r)
		return r;
	a->fault->done = first;
	half.gva += first;
	half.buf += first;
	half.len = a->len - first;
	return access_one(&half);
}

static int access_two(struct access *a, size_t first)
{
	for (unsigned i = 0; i < FIGHTS; i++) {
		int r = ensure(a, a->gva, SHADOW_UNTRACK);

		if (!r)
			r = ensure(a, a->gva + first, SHADOW_UNTRACK);
		if (r)
			return r;
		if (transfer(a, first))
			return KAGE_OK;
	}
	return access_halves(a, first);
}

/* At most a page. */
static int access_piece(struct access *a)
{
	size_t first = MIN(a->len, PAGE_SIZE - (a->gva & (PAGE_SIZE - 1)));

	return first == a->len ? access_one(a) : access_two(a, first);
}

static int access_long(struct access *a, size_t len)
{
	size_t done = 0;

	while (done < len) {
		int r;

		a->len = MIN(len - done, PAGE_SIZE - (a->gva & (PAGE_SIZE - 1)));
		r = access_piece(a);
		if (r) {
			a->fault->done = done;
			return r;
		}
		done += a->len;
		a->gva += a->len;
		a->buf += a->len;
	}
	return KAGE_OK;
}

/* A fault's address has the tag that the access had. */
static void put_fault(const struct kage_vcpu *v, const struct kage_fault *found, uint64_t gva, struct kage_fault *out)
{
	uint64_t tag = ~(uint64_t)0 << 56;

	*out = *found;
	if (unlikely(v->tags))
		out->gva = (found->gva & ~tag) | (gva & tag);
}

static int access_slow(struct kage_vcpu *v, uint64_t gva, void *buf, size_t len, unsigned kind,
		       struct kage_fault *fault)
{
	struct kage_fault found = {.gva = gva, .access = 1u << kind};
	struct access a = {.v = v, .buf = buf, .len = len, .kind = kind, .fault = &found};
	int r;

	if (!v || !buf || !len)
		return -EINVAL;
	a.gva = untagged(v, gva);
	tlb_ready(v);
	r = len <= PAGE_SIZE ? access_piece(&a) : access_long(&a, len);
	if (r && fault)
		put_fault(v, &found, gva, fault);
	return r;
}

/* The common case: a register's size within a page, of a parked vCPU or from a large page. */
static inline bool access_quick(struct kage_vcpu *v, uint64_t gva, void *buf, size_t len, unsigned kind)
{
	struct kage_tlb_entry *e;
	uint64_t win;

	if (unlikely(!v || len > 8 || (len & (len - 1)) || !len || !buf ||
		     (gva & (PAGE_SIZE - 1)) > PAGE_SIZE - len))
		return false;
	gva = untagged(v, gva);
	tlb_ready(v);
	if (!tlb_probe(v, gva, len, kind) && !tlb_refill(v, gva, kind))
		return false;
	win = window_open(v);
	e = tlb_probe(v, gva, len, kind);
	if (e) {
		if (kind == 1)
			kage_guest_store(kage_tlb_hva(e, gva), buf, len);
		else
			kage_guest_load(buf, kage_tlb_hva(e, gva), len);
	}
	kage_window_close(&v->head, win);
	return e != NULL;
}

int kage_vcpu_load_slow(struct kage_vcpu *v, uint64_t gva, void *buf, size_t len, struct kage_fault *fault)
{
	return access_quick(v, gva, buf, len, 0) ? KAGE_OK : access_slow(v, gva, buf, len, 0, fault);
}

int kage_vcpu_store_slow(struct kage_vcpu *v, uint64_t gva, const void *buf, size_t len,
			 struct kage_fault *fault)
{
	return access_quick(v, gva, (void *)buf, len, 1) ? KAGE_OK
							 : access_slow(v, gva, (void *)buf, len, 1, fault);
}

int kage_vcpu_fetch_slow(struct kage_vcpu *v, uint64_t gva, void *buf, size_t len, struct kage_fault *fault)
{
	return access_quick(v, gva, buf, len, 2) ? KAGE_OK : access_slow(v, gva, buf, len, 2, fault);
}

/* -- blocks of guest work ----------------------------------------------------- */

void kage_vcpu_enter(struct kage_vcpu *v)
{
	shadow_enter(&v->cpu);
	tlb_unpark(v);
	window_open(v);
}

void kage_vcpu_leave(struct kage_vcpu *v)
{
	uint64_t win = READ_ONCE(v->head.win);

	if (win & 1)
		store_release(&v->head.win, win + 1);
	shadow_leave(&v->cpu);
	tlb_park(v);
}

/* Both kinds from one entry, or neither. */
static struct kage_tlb_entry *probe_all(struct kage_vcpu *v, uint64_t gva, size_t len, uint32_t access)
{
	struct kage_tlb_entry *e = NULL;

	for (unsigned k = 0; k < 2; k++) {
		if (!(access & (1u << k)))
			continue;
		e = tlb_probe(v, gva, len, k);
		if (!e)
			return NULL;
	}
	return e;
}

int kage_vcpu_ptr(struct kage_vcpu *v, uint64_t gva, size_t len, uint32_t access, void **ptr,
		  struct kage_fault *fault)
{
	struct kage_fault found = {.gva = gva, .access = access};
	struct access a = {.v = v, .len = len, .fault = &found};
	uint64_t at;
	struct kage_tlb_entry *e;

	if (!v || !ptr || !len || !access || (access & ~(uint32_t)(KAGE_READ | KAGE_WRITE)) ||
	    len > PAGE_SIZE - (gva & (PAGE_SIZE - 1)) ||
	    !atomic_load_explicit(&v->cpu.enter_thread, memory_order_relaxed))
		return -EINVAL;
	at = a.gva = untagged(v, gva);
	while (!(e = probe_all(v, at, len, access))) {
		int r = KAGE_OK;

		for (a.kind = 0; a.kind < 2 && !r; a.kind++)
			if (access & (1u << a.kind))
				r = ensure(&a, at, SHADOW_UNTRACK);
		if (r) {
			if (fault)
				put_fault(v, &found, gva, fault);
			return r;
		}
	}
	*ptr = kage_tlb_hva(e, at);
	return KAGE_OK;
}

int kage_vcpu_translate(struct kage_vcpu *v, uint64_t gva, uint32_t access, struct kage_fault *fault)
{
	struct kage_fault found = {.gva = gva, .access = access};
	uint64_t win;
	int r;

	if (!v || !fault || (access & ~(uint32_t)(KAGE_RWX | KAGE_IMPLICIT)) ||
	    (access & KAGE_RWX & ((access & KAGE_RWX) - 1)))
		return -EINVAL;
	win = slow_begin(v);
	r = shadow_translate(&v->cpu, untagged(v, gva), access, &found);
	slow_end(v, win);
	if (r >= 0)
		*fault = found;
	return r;
}
