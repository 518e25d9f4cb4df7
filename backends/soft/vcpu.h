/* SPDX-License-Identifier: MIT */
/*
 * The soft backend's vCPU, for the files of this folder.
 *
 *   head      what the inline functions probe (kage/vcpu.h): window, contexts,
 *             and the TLB, direct mapped, 2^tlb_bits entries of 4 KiB
 *   large     2 MiB pages, 256 entries; pieces are copied to the TLB when used
 *   set       a context: what of the registers a translation depends on, and
 *             the ids that tags carry for reading, writing, executing
 *
 * An id is 12 bits, from a counter; a whole flush gives new ids to the current
 * set and takes those of the others (they get new ones when they come back).
 * When ids run out every array is wiped. Id 0 is in no context: tag 0 is an
 * empty one. Id 0xfff is in no tag: head.ctx holds it while the vCPU is parked.
 *
 * Invariants:
 *  V1  the owner alone fills, under the shadow lock or tlb_lock; others store tags
 *      under both. So a tag never comes back after somebody overwrote it.
 *  V2  a translation that the owner may be using has its tag in the TLB: who
 *      overwrites finds it (the result of drop).
 *  V3  running == 0 implies that head.ctx is parked: inline probes miss, and
 *      the way to a hit leads through tlb_lock and a full fence (tlb_ready).
 *  V4  without membarrier(2) head.ctx is parked for ever: every access goes
 *      through the out-of-line functions, which use a real fence.
 *
 * Locks: tlb_lock (RANK_TLB), within the shadow lock where both are needed.
 */
#ifndef KAGE_SOFT_VCPU_H
#define KAGE_SOFT_VCPU_H

#include "api/engine.h"
#include "api/vm.h"
#include "shadow/shadow.h"

#define TLB_PARKED	0xfffu
#define TLB_LARGE	256
#define TLB_LARGE_SHIFT 21
#define TLB_SETS	16
#define TLB_KINDS	3

_Static_assert(BLOCK_PAGES *PAGE_SIZE == 1u << TLB_LARGE_SHIFT, "a large page is the engine's block");
_Static_assert(KAGE_READ == 1 << 0 && KAGE_WRITE == 1 << 1 && KAGE_EXEC == 1 << 2, "kind n is access 1 << n");

struct ctx_set {
	bool used;
	uint16_t id[TLB_KINDS]; /* 0: to be given when the set is selected */
	uint64_t stamp;
	uint64_t key; /* of the mode: equal keys have equal rights */
	struct pt_guest mode;
};

struct kage_vcpu;

/* An architecture of guests: what a CPU of it takes, and what its registers mean. */
struct soft_arch {
	uint32_t features_known, features_default, phys_bits_default;
	size_t regs_size, regs_least; /* of the public struct, now and in its first version */
	bool (*phys_bits_valid)(uint32_t phys_bits, uint32_t features);
	/* Checks and takes new registers; calls vcpu_switch(). Results of kage_vcpu_set_regs(). */
	int (*set_regs)(struct kage_vcpu *v, const void *regs);
	void (*get_regs)(const struct kage_vcpu *v, void *regs);
	struct pt_guest (*mode)(const struct kage_vcpu *v);
	bool (*asid_valid)(const struct kage_vcpu *v, uint64_t asid);
	bool broadcasts; /* a flush is for all vCPUs of the guest */
	int (*flush_cr3)(struct kage_vcpu *v, uint64_t value); /* NULL: there is no such flush */
};

struct kage_vcpu {
	struct kage_vcpu_head head;
	struct shadow_cpu cpu;
	struct kage_vm *vm;
	struct lock tlb_lock;
	bool fast;		 /* V4 does not apply */
	bool large_used;	 /* since the last wipe */
	uint64_t ctx[TLB_KINDS]; /* of the current set; head.ctx while running */
	uint32_t next_id;
	struct ctx_set *current;
	uint64_t clock;
	struct ctx_set set[TLB_SETS];
	struct kage_tlb_entry large[TLB_LARGE];
	/* configuration and registers */
	const struct soft_arch *arch;
	uint32_t features, phys_bits;
	union {
		struct kage_x86_regs x86; /* pdpte: with PAE paging, as loaded; flags: 0 */
		struct kage_arm64_regs arm64;
	};
	/* arm64: halves (bit 55 clear, set) in which the top byte of an address does not count */
	bool tagged[2];
	bool tags; /* one of them */
	void (*code_written)(void *opaque, struct kage_vcpu *vcpu, uint64_t gpa, uint64_t len);
	void *opaque;
};
_Static_assert(offsetof(struct kage_vcpu, head) == 0, "kage/vcpu.h casts");
_Static_assert(sizeof(struct kage_tlb_entry) == 32, "JITs know it");

/* -- tlb.c ----------------------------------------------------------------- */

extern const struct shadow_cpu_ops soft_ops, soft_ops_code;
int tlb_init(struct kage_vcpu *v, unsigned bits);
void tlb_finish(struct kage_vcpu *v);
/* Selects the context of the vCPU's mode; keeps what its TLB has for it. */
void tlb_select(struct kage_vcpu *v, const struct pt_guest *mode);
/* Copies a page of a large entry to the TLB, if there is one for `kind`. */
bool tlb_refill(struct kage_vcpu *v, uint64_t gva, unsigned kind);
void tlb_unpark(struct kage_vcpu *v);
void tlb_park(struct kage_vcpu *v);
/* INVLPG: the page, and what is larger around it, in all contexts. */
void tlb_drop_page(struct kage_vcpu *v, uint64_t gva);

static inline struct kage_tlb_entry *tlb_slot(struct kage_vcpu *v, uint64_t gva)
{
	return kage_tlb_slot(&v->head, gva);
}

static inline uint64_t tlb_entries(const struct kage_vcpu *v)
{
	return v->head.mask / sizeof(struct kage_tlb_entry) + 1;
}

/* V3: before the first probe of an access. */
static inline void tlb_ready(struct kage_vcpu *v)
{
	if (unlikely(!atomic_load_explicit(&v->cpu.running, memory_order_relaxed)))
		tlb_unpark(v);
}

/* The entry that answers, or NULL, for a vCPU that is ready, whether inline probes may hit (V4) or not. */
static inline struct kage_tlb_entry *tlb_probe(struct kage_vcpu *v, uint64_t gva, size_t len, unsigned kind)
{
	struct kage_tlb_entry *e = tlb_slot(v, gva);
	uint64_t want = ((gva + len - 1) & ~(KAGE_PAGE_SIZE - 1)) | READ_ONCE(v->ctx[kind]);

	return READ_ONCE(e->tag[kind]) == want ? e : NULL;
}

/* -- access.c -------------------------------------------------------------- */

/* As kage_window_open(), with a real fence where inline probes never hit (V4). */
static inline uint64_t window_open(struct kage_vcpu *v)
{
	uint64_t win = kage_window_open(&v->head);

	if (unlikely(!v->fast))
		atomic_thread_fence(memory_order_seq_cst);
	return win;
}

/* A slow path: the window is closed from begin to end, and reopened if an enter block had it open. */
uint64_t slow_begin(struct kage_vcpu *v);
void slow_end(struct kage_vcpu *v, uint64_t win);

/* The address without its tag. Inline probes take addresses as they are, and so miss those that have one. */
static inline uint64_t untagged(const struct kage_vcpu *v, uint64_t gva)
{
	if (likely(!v->tags) || !v->tagged[gva >> 55 & 1])
		return gva;
	return (uint64_t)((int64_t)(gva << 8) >> 8);
}

/* -- x86.c, arm64.c ----------------------------------------------------------- */

extern const struct soft_arch soft_x86, soft_arm64;

/* -- vcpu.c ---------------------------------------------------------------- */

static inline struct kage_vcpu *vcpu_of(struct shadow_cpu *cpu)
{
	return container_of(cpu, struct kage_vcpu, cpu);
}
/* New registers are in place: switches root and context. */
void vcpu_switch(struct kage_vcpu *v);

#endif
