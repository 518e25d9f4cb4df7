/* SPDX-License-Identifier: MIT */
/**
 * @file
 * The soft backend's vCPU: the registers that matter to translation, a TLB,
 * and guest loads, stores and fetches through it.
 *
 * One thread at a time uses a vCPU. An access opens the vCPU's *window of
 * use*, probes the TLB, accesses the frame and closes the window; whoever
 * takes the frame away overwrites the TLB tags first and then waits for open
 * windows. kage_vcpu_enter() and kage_vcpu_leave() hold one window over a
 * block of guest work. Inside it the thread must not block, must not call
 * functions other than those of this header, and polls kage_vcpu_wanted().
 */
#ifndef KAGE_VCPU_H
#define KAGE_VCPU_H

#include <kage/types.h>

KAGE_BEGIN

enum kage_arch {
	KAGE_ARCH_X86 = 1,
	KAGE_ARCH_ARM64 = 2,
};

/** CPU features that change translation (x86). */
enum kage_x86_feature {
	KAGE_X86_NX = 1u << 0,
	KAGE_X86_PAGE1GB = 1u << 1,
	KAGE_X86_SMEP = 1u << 2,
	KAGE_X86_SMAP = 1u << 3,
	KAGE_X86_PCID = 1u << 4,
	KAGE_X86_LA57 = 1u << 5,
	KAGE_X86_PKU = 1u << 6,
};

/** CPU features that change translation (arm64). Those a CPU always has are not listed. */
enum kage_arm64_feature {
	KAGE_ARM64_HAF = 1u << 0,     /**< FEAT_HAFDBS: hardware sets the access flag where TCR_EL1.HA says so */
	KAGE_ARM64_HD = 1u << 1,      /**< FEAT_HAFDBS: and dirty state (DBM) where TCR_EL1.HD says so, with HA */
	KAGE_ARM64_PAN = 1u << 2,     /**< FEAT_PAN: PSTATE.PAN */
	KAGE_ARM64_EPAN = 1u << 3,    /**< FEAT_PAN3: SCTLR_EL1.EPAN */
	KAGE_ARM64_HPDS = 1u << 4,    /**< FEAT_HPDS: TCR_EL1.HPD0 and HPD1 switch table attributes off */
	KAGE_ARM64_LVA = 1u << 5,     /**< 52-bit virtual addresses with 64K granules */
	KAGE_ARM64_LPA = 1u << 6,     /**< 52-bit physical addresses with 64K granules; counts with phys_bits 52 only */
	KAGE_ARM64_LPA2 = 1u << 7,    /**< 52-bit both with 4K and 16K granules (TCR_EL1.DS) */
	KAGE_ARM64_ASID16 = 1u << 8,  /**< 16-bit ASIDs */
	KAGE_ARM64_TTST = 1u << 9,    /**< FEAT_TTST: small tables, TxSZ up to 48 (47 for 64K) */
	KAGE_ARM64_GRAN16 = 1u << 10, /**< 16K granule implemented */
	KAGE_ARM64_GRAN64 = 1u << 11, /**< 64K granule implemented */
};

enum kage_x86_regs_flag {
	KAGE_X86_PDPTES = 1u << 0, /**< `pdpte` holds the four PDPTE registers */
};

/** x86 state that takes part in translation. May grow at its end: calls take its size. */
struct kage_x86_regs {
	uint64_t cr0, cr3, cr4, efer;
	uint64_t rflags; /**< only AC (bit 18) counts */
	uint32_t cpl;    /**< 0 to 3 */
	uint32_t pkru;
	uint32_t flags;  /**< enum kage_x86_regs_flag */
	uint32_t reserved; /**< 0 */
	/** PAE paging: what the CPU has loaded (Intel SDM vol. 3A, 4.4.1); memory may hold something else since. */
	uint64_t pdpte[4];
};

/**
 * arm64 state that takes part in translation: EL1&0, stage 1. Bits that are not named are ignored, as are those of
 * features that the vCPU lacks. Where the architecture leaves a choice: a reserved or missing granule is 4K; a TxSZ
 * out of range gives translation faults of Arm's level 0; IPS above what there is counts as the largest.
 */
struct kage_arm64_regs {
	uint64_t sctlr;        /**< SCTLR_EL1: M, WXN, EPAN; EE (big endian tables) must be 0 */
	uint64_t tcr;          /**< TCR_EL1: T0SZ, T1SZ, EPD, A1, TG, IPS, AS, TBI, HA, HD, HPD, DS */
	uint64_t ttbr0, ttbr1; /**< TTBRn_EL1: address, ASID */
	uint64_t pstate;       /**< EL (bits 3:2: 0 or 1), PAN (bit 22) */
};

/** Layout version of everything inline in this header; kage_vcpu_create() compares it. */
#define KAGE_VCPU_ABI 0x4b470002u

struct kage_vcpu_config {
	uint32_t size;
	/** KAGE_VCPU_ABI, or 0 for a caller that uses none of the inline functions. */
	uint32_t abi;
	uint32_t arch;      /**< enum kage_arch; 0: KAGE_ARCH_X86 */
	/**
	 * Guest physical address bits the CPU has. x86: 36 to 52; 0: 46. arm64: 32, 36, 40, 42, 44, 48, or 52 (with
	 * LPA or LPA2); 0: 48.
	 */
	uint32_t phys_bits;
	/**
	 * enum kage_x86_feature; 0: NX | PAGE1GB | SMEP | SMAP | PCID. Or enum kage_arm64_feature; 0: HAF | HD | PAN |
	 * HPDS | ASID16 | GRAN16 | GRAN64.
	 */
	uint32_t features;
	/** log2 of the entries of the TLB, 9 to 20; 0: 14. An entry maps 4 KiB and takes 32 bytes, once used. */
	uint32_t tlb_bits;
	/**
	 * Called before the first write to a page from which instructions were
	 * fetched since the last call for that page, by whichever vCPU, engine
	 * call or VMM write does it. `vcpu` is the one this callback was given
	 * for. May run on another thread; must not call the engine.
	 */
	void (*code_written)(void *opaque, struct kage_vcpu *vcpu, uint64_t gpa, uint64_t len);
	void *opaque;
};

/** Why an access did not happen. Filled for every outcome other than KAGE_OK, and for -EFAULT. */
struct kage_fault {
	uint64_t gva;    /**< first byte that faulted */
	uint64_t gpa;    /**< KAGE_MMIO, KAGE_WAIT and KAGE_OK of translate: its guest physical address */
	uint32_t access; /**< what was asked (enum kage_access) */
	/**
	 * KAGE_GUEST_FAULT. x86: 14 (#PF), 13 (#GP: not canonical). arm64: the exception class (ESR_ELx.EC): 0x20 or
	 * 0x21 instruction abort, 0x24 or 0x25 data abort, from EL0 or from EL1.
	 */
	uint32_t vector;
	/** x86: error code. arm64: ESR_ELx.ISS, of which FSC (bits 5:0) and WnR (bit 6) are filled. */
	uint32_t error;
	/** Level of the guest entry that decided, leaf is 0 (arm64: 3 less Arm's level); translate: page size level. */
	uint32_t level;
	uint64_t done;   /**< bytes that were transferred before the fault */
	uint64_t reserved;
};

/** One entry; a tag is the gva of the page, its low 12 bits the context that may use it. */
struct kage_tlb_entry {
	uint64_t tag[3]; /* read, write, execute */
	uint64_t addend; /* hva - gva */
};

/** Head of every vCPU, part of the ABI that KAGE_VCPU_ABI names. */
struct kage_vcpu_head {
	uint64_t win;    /* odd: inside a window of use. Written by the owner only */
	uint64_t ctx[3]; /* contexts for read, write, execute */
	struct kage_tlb_entry *tlb; /* constant */
	uint64_t mask;   /* of the byte offset of an entry: (gva >> KAGE_TLB_SHIFT) & mask. Constant */
	uint32_t wanted; /* somebody waits for the window */
	uint32_t reserved;
	uint64_t pad;
};

/** A gva shifted right by this is the byte offset of its entry, before masking. */
#define KAGE_TLB_SHIFT (KAGE_PAGE_SHIFT - 5)

/** For a JIT that emits the probe itself. */
struct kage_tlb_layout {
	uint32_t size;
	uint32_t abi;
	uint32_t win_offset, ctx_offset, wanted_offset;
	uint32_t tlb_offset, mask_offset; /**< of the pointer to the entries, and of the mask */
	uint32_t index_shift;             /**< KAGE_TLB_SHIFT */
	uint32_t entry_size, tag_offset, addend_offset;
	uint32_t reserved;
};

/**
 * Creates a vCPU. Returns KAGE_OK, -EINVAL, -E2BIG, -ENOMEM, -ENOEXEC (`abi`
 * is not this library's), -EOPNOTSUPP (`arch`). Until kage_vcpu_set_regs() it
 * has paging off: gva is gpa.
 */
KAGE_API int kage_vcpu_create(struct kage_vm *vm, const struct kage_vcpu_config *config,
			      struct kage_vcpu **out);
/** Destroys a vCPU that no thread uses; NULL is fine. */
KAGE_API void kage_vcpu_destroy(struct kage_vcpu *vcpu);

/**
 * Sets the registers (x86: struct kage_x86_regs, arm64: struct kage_arm64_regs,
 * `size` its size). Outside a window of use.
 *
 * x86: a CR3 value other than the present one counts as a MOV to CR3 with the
 * flushes that has; changes of CR0.PG, CR4.PSE, PGE, PAE, PCIDE, SMEP, LA57 and
 * EFER.NXE flush as the manual says (Intel SDM vol. 3A, 4.10.4). 32-bit paging
 * has 4 MiB pages of 40-bit addresses (PSE-36). With PAE paging the four PDPTEs
 * are registers: they are read from memory when CR3 changes and with the
 * changes of CR0 and CR4 that the manual names (4.4.1), or by KAGE_FLUSH_CR3,
 * and one with a reserved bit is refused. With KAGE_X86_PDPTES they are those in
 * the struct and nothing is read, which is how a vCPU is restored; outside of PAE
 * paging that flag does not count. Addresses from 4 GiB up, which these
 * modes do not have, fault like those that are not canonical. Returns KAGE_OK,
 * -EINVAL (a combination the CPU would refuse, or a reserved bit or flag), -EOPNOTSUPP
 * (CET, PKS, LAM); with PAE paging KAGE_WAIT and -EFAULT, -ENOMEM of the read,
 * and then no register has changed.
 *
 * A `size` of the struct's first version (48) is fine, a larger one than this library's if the rest is zero: else
 * -E2BIG.
 *
 * arm64: nothing is flushed but what the architecture promises to see at once;
 * a switch of TTBRn or ASID finds what earlier use has left. Returns KAGE_OK,
 * -EINVAL (an EL above 1), -EOPNOTSUPP (EE).
 */
KAGE_API int kage_vcpu_set_regs(struct kage_vcpu *vcpu, const void *arch_regs, size_t size);
/**
 * The registers as the vCPU has them, to be given to kage_vcpu_set_regs() of a new one: with PAE paging also the PDPTEs,
 * which nobody else knows after a MOV to CR3. `size` as there; what the library does not know is zeroed. Returns
 * KAGE_OK, -EINVAL. On the vCPU's thread, or while none uses it.
 */
KAGE_API int kage_vcpu_get_regs(const struct kage_vcpu *vcpu, void *arch_regs, size_t size);

/** Opens a window of use over a block of guest work. No nesting. */
KAGE_API void kage_vcpu_enter(struct kage_vcpu *vcpu);
/** Closes it. Also tells the engine that this vCPU is idle: call it before the thread sleeps. */
KAGE_API void kage_vcpu_leave(struct kage_vcpu *vcpu);

/** For arm64, the inner shareable forms of TLBI with their DSB: one vCPU of the guest makes the call for all. */
enum kage_flush_kind {
	KAGE_FLUSH_ALL = 0,  /**< everything, global pages too. arm64: TLBI VMALLE1 */
	KAGE_FLUSH_PAGE = 1, /**< INVLPG: `gva`, in all address spaces. arm64: TLBI VAAE1 */
	KAGE_FLUSH_ASID = 2, /**< x86 INVPCID type 1: `asid` is the PCID. arm64: TLBI ASIDE1 */
	/** x86: MOV to CR3 of `value`, bit 63 included when CR4.PCIDE is set. Not for arm64 (kage_vcpu_set_regs()). */
	KAGE_FLUSH_CR3 = 3,
	KAGE_FLUSH_PAGE_ASID = 4, /**< `gva` in one address space. x86 INVPCID type 0; arm64: TLBI VAE1 */
};

struct kage_flush {
	uint32_t size;
	uint32_t kind; /**< enum kage_flush_kind */
	uint64_t gva;
	uint64_t asid;
	uint64_t value;
};

/**
 * What the guest's flush instructions do. Returns KAGE_OK, -EINVAL, -E2BIG; KAGE_FLUSH_CR3 with PAE paging
 * also what kage_vcpu_set_regs() returns then. Outside a window of use.
 *
 * arm64: returns when no other vCPU uses a translation that is gone, so it waits for their windows of use
 * (kage_vcpu_wanted()), and may return -ETIMEDOUT (one stayed open) or -EDEADLK (the calling thread has another
 * vCPU's open). New accesses do not find what was flushed even then.
 */
KAGE_API int kage_vcpu_flush(struct kage_vcpu *vcpu, const struct kage_flush *flush);

/** Offsets of the inline layout. Returns KAGE_OK, -EINVAL, -E2BIG. */
KAGE_API int kage_vcpu_layout(struct kage_tlb_layout *layout);

/**
 * Translates without touching the page or setting accessed and dirty bits.
 * `access` 0 asks for the translation without a permission check. On KAGE_OK
 * `fault->gpa` is the answer. Other results as kage_vcpu_load(). Outside a
 * window of use.
 */
KAGE_API int kage_vcpu_translate(struct kage_vcpu *vcpu, uint64_t gva, uint32_t access,
				 struct kage_fault *fault);

/**
 * A pointer to `len` bytes within one page for `access` (KAGE_READ, KAGE_WRITE
 * or both), for atomic or vector instructions. Call it between enter and
 * leave; it is valid until leave, or until the next access on this vCPU that
 * misses the TLB (kage_vcpu_window() changes then).
 * Results as kage_vcpu_load(), and -EINVAL (crosses a page, not entered).
 */
KAGE_API int kage_vcpu_ptr(struct kage_vcpu *vcpu, uint64_t gva, size_t len, uint32_t access,
			   void **ptr, struct kage_fault *fault);

/** Out-of-line halves of the inline functions below. */
KAGE_API int kage_vcpu_load_slow(struct kage_vcpu *, uint64_t gva, void *, size_t, struct kage_fault *);
KAGE_API int kage_vcpu_store_slow(struct kage_vcpu *, uint64_t gva, const void *, size_t,
				  struct kage_fault *);
KAGE_API int kage_vcpu_fetch_slow(struct kage_vcpu *, uint64_t gva, void *, size_t, struct kage_fault *);

KAGE_API bool kage_vcpu_wanted(const struct kage_vcpu *vcpu);
KAGE_API uint64_t kage_vcpu_window(const struct kage_vcpu *vcpu);
KAGE_API int kage_vcpu_load(struct kage_vcpu *vcpu, uint64_t gva, void *buf, size_t len,
			    struct kage_fault *fault);
KAGE_API int kage_vcpu_store(struct kage_vcpu *vcpu, uint64_t gva, const void *buf, size_t len,
			     struct kage_fault *fault);
KAGE_API int kage_vcpu_fetch(struct kage_vcpu *vcpu, uint64_t gva, void *buf, size_t len,
			     struct kage_fault *fault);

/*
 * The inline fast path.
 *
 * Invariant: while `win` is odd, a frame whose tag was seen valid stays where
 * it is. The owner stores win (plain), then loads the tag; who invalidates
 * stores the tag, then makes every running vCPU pass a full barrier
 * (membarrier(2)), then loads win. So either the probe sees the overwritten
 * tag, or the invalidator sees the odd window and waits until win changes.
 *
 * A 1, 2, 4 or 8 byte access whose size the compiler knows is one load or
 * store; other sizes take the out-of-line path, which probes as well.
 * `gva + len - 1` in the comparison makes an access that crosses a page miss.
 */
#if defined(__SANITIZE_THREAD__)
#define KAGE_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define KAGE_TSAN 1
#endif
#endif
#ifdef KAGE_TSAN /* it knows neither membarrier nor volatile: real fences and atomics */
#define KAGE_WINDOW_FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define KAGE_GUEST_GET(type, from) __atomic_load_n((const type *)(from), __ATOMIC_RELAXED)
#define KAGE_GUEST_PUT(type, to, value) __atomic_store_n((type *)(to), (type)(value), __ATOMIC_RELAXED)
#else
typedef uint8_t __attribute__((may_alias)) kage_guest_uint8_t;
typedef uint16_t __attribute__((may_alias, aligned(1))) kage_guest_uint16_t;
typedef uint32_t __attribute__((may_alias, aligned(1))) kage_guest_uint32_t;
typedef uint64_t __attribute__((may_alias, aligned(1))) kage_guest_uint64_t;
#define KAGE_WINDOW_FENCE() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define KAGE_GUEST_GET(type, from) (*(const volatile kage_guest_##type *)(from))
#define KAGE_GUEST_PUT(type, to, value) (*(volatile kage_guest_##type *)(to) = (type)(value))
#endif

#define KAGE_INLINE_SIZE(n) (__builtin_constant_p(n) && ((n) == 1 || (n) == 2 || (n) == 4 || (n) == 8))

/* One access of 1, 2, 4 or 8 bytes to guest memory. */
KAGE_HELPER uint64_t kage_guest_get(const void *from, size_t len)
{
	switch (len) {
	case 1: return KAGE_GUEST_GET(uint8_t, from);
	case 2: return KAGE_GUEST_GET(uint16_t, from);
	case 4: return KAGE_GUEST_GET(uint32_t, from);
	default: return KAGE_GUEST_GET(uint64_t, from);
	}
}

KAGE_HELPER void kage_guest_put(void *to, uint64_t value, size_t len)
{
	switch (len) {
	case 1: KAGE_GUEST_PUT(uint8_t, to, value); break;
	case 2: KAGE_GUEST_PUT(uint16_t, to, value); break;
	case 4: KAGE_GUEST_PUT(uint32_t, to, value); break;
	default: KAGE_GUEST_PUT(uint64_t, to, value); break;
	}
}

/* The same between two places that others may be using. */
KAGE_HELPER void kage_guest_move(void *to, const void *from, size_t len)
{
	kage_guest_put(to, kage_guest_get(from, len), len);
}

/* Between guest memory and a buffer of the caller's, which is nobody else's: hosts are little-endian. */
KAGE_HELPER void kage_guest_load(void *buf, const void *from, size_t len)
{
	uint64_t value = kage_guest_get(from, len);

	__builtin_memcpy(buf, &value, len);
}

KAGE_HELPER void kage_guest_store(void *to, const void *buf, size_t len)
{
	uint64_t value = 0;

	__builtin_memcpy(&value, buf, len);
	kage_guest_put(to, value, len);
}

/* Opens a window if none is open; returns what kage_window_close() needs. Within an enclosing one nothing is stored. */
KAGE_HELPER uint64_t kage_window_open(struct kage_vcpu_head *h)
{
	uint64_t win = __atomic_load_n(&h->win, __ATOMIC_RELAXED);

	if (!(win & 1))
		__atomic_store_n(&h->win, win + 1, __ATOMIC_RELAXED);
	KAGE_WINDOW_FENCE();
	return win;
}

/* An even window moves on to the next even number; an enclosing odd one stays. */
KAGE_HELPER void kage_window_close(struct kage_vcpu_head *h, uint64_t win)
{
	if (!(win & 1))
		__atomic_store_n(&h->win, win + 2, __ATOMIC_RELEASE);
}

/* The only entry that can answer for a gva. */
KAGE_HELPER struct kage_tlb_entry *kage_tlb_slot(const struct kage_vcpu_head *h, uint64_t gva)
{
	return (struct kage_tlb_entry *)((char *)h->tlb + ((gva >> KAGE_TLB_SHIFT) & h->mask));
}

/* Does it answer? `kind` is 0 to read, 1 to write, 2 to execute. Inside a window. */
KAGE_HELPER bool kage_tlb_hit(const struct kage_vcpu_head *h, const struct kage_tlb_entry *e, uint64_t gva, size_t len,
			      int kind)
{
	uint64_t want = ((gva + len - 1) & ~(KAGE_PAGE_SIZE - 1)) | __atomic_load_n(&h->ctx[kind], __ATOMIC_RELAXED);

	return KAGE_LIKELY(__atomic_load_n(&e->tag[kind], __ATOMIC_RELAXED) == want);
}

/*
 * TSan alone needs the tag's load and the addend's to be ordered; on real
 * hardware the fill of an entry happens on the thread that probes it.
 */
KAGE_HELPER void *kage_tlb_hva(const struct kage_tlb_entry *e, uint64_t gva)
{
	return (void *)(uintptr_t)(gva + __atomic_load_n(&e->addend, __ATOMIC_RELAXED));
}

/* A load of a size that the compiler knows; the caller's variable stays in a register: its address goes nowhere. */
KAGE_HELPER int kage_vcpu_get(struct kage_vcpu *vcpu, uint64_t gva, void *buf, size_t len, struct kage_fault *fault,
			      int kind,
			      int (*slow)(struct kage_vcpu *, uint64_t, void *, size_t, struct kage_fault *))
{
	struct kage_vcpu_head *h = (struct kage_vcpu_head *)vcpu;
	uint64_t win = kage_window_open(h);
	struct kage_tlb_entry *e = kage_tlb_slot(h, gva);
	uint64_t value;
	int r;

	if (kage_tlb_hit(h, e, gva, len, kind)) {
		kage_guest_load(buf, kage_tlb_hva(e, gva), len);
		kage_window_close(h, win);
		return KAGE_OK;
	}
	kage_window_close(h, win);
	r = slow(vcpu, gva, &value, len, fault);
	if (r == KAGE_OK)
		__builtin_memcpy(buf, &value, len);
	return r;
}

/**
 * Loads `len` bytes at a guest virtual address, any alignment, across pages.
 *
 * Returns KAGE_OK; KAGE_GUEST_FAULT (the guest gets `vector` and `error`);
 * KAGE_MMIO (no memory answers at `gpa`; the embedder emulates the device);
 * KAGE_WAIT; -ENOMEM; -EFAULT (the frame is poisoned); -ETIMEDOUT; -EINVAL (NULL or len 0; not checked where
 * the size is a constant 1, 2, 4 or 8). An access of at
 * most KAGE_PAGE_SIZE bytes transfers all or nothing; of a longer one,
 * `fault->done` bytes are transferred. `fault` may be NULL.
 */
KAGE_INLINE int kage_vcpu_load(struct kage_vcpu *vcpu, uint64_t gva, void *buf, size_t len,
			       struct kage_fault *fault)
{
	if (KAGE_INLINE_SIZE(len))
		return kage_vcpu_get(vcpu, gva, buf, len, fault, 0, kage_vcpu_load_slow);
	return kage_vcpu_load_slow(vcpu, gva, buf, len, fault);
}

/** Stores; otherwise as kage_vcpu_load(). */
KAGE_INLINE int kage_vcpu_store(struct kage_vcpu *vcpu, uint64_t gva, const void *buf, size_t len,
				struct kage_fault *fault)
{
	if (KAGE_INLINE_SIZE(len)) {
		struct kage_vcpu_head *h = (struct kage_vcpu_head *)vcpu;
		uint64_t win = kage_window_open(h);
		struct kage_tlb_entry *e = kage_tlb_slot(h, gva);
		uint64_t value = 0;

		if (kage_tlb_hit(h, e, gva, len, 1)) {
			kage_guest_store(kage_tlb_hva(e, gva), buf, len);
			kage_window_close(h, win);
			return KAGE_OK;
		}
		kage_window_close(h, win);
		__builtin_memcpy(&value, buf, len);
		return kage_vcpu_store_slow(vcpu, gva, &value, len, fault);
	}
	return kage_vcpu_store_slow(vcpu, gva, buf, len, fault);
}

/** Loads instruction bytes (checks execute permission); otherwise as kage_vcpu_load(). */
KAGE_INLINE int kage_vcpu_fetch(struct kage_vcpu *vcpu, uint64_t gva, void *buf, size_t len,
				struct kage_fault *fault)
{
	if (KAGE_INLINE_SIZE(len))
		return kage_vcpu_get(vcpu, gva, buf, len, fault, 2, kage_vcpu_fetch_slow);
	return kage_vcpu_fetch_slow(vcpu, gva, buf, len, fault);
}

/** Somebody waits for this vCPU's window: leave soon. Poll it at back-edges of guest work. */
KAGE_INLINE bool kage_vcpu_wanted(const struct kage_vcpu *vcpu)
{
	return __atomic_load_n(&((const struct kage_vcpu_head *)vcpu)->wanted, __ATOMIC_RELAXED) != 0;
}

/** Changes whenever pointers from kage_vcpu_ptr() lose their meaning. */
KAGE_INLINE uint64_t kage_vcpu_window(const struct kage_vcpu *vcpu)
{
	return __atomic_load_n(&((const struct kage_vcpu_head *)vcpu)->win, __ATOMIC_RELAXED);
}

KAGE_END
#endif
